"""``megastar elastic``: train on the available nodes."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from megastar.commands._shared.common import (
    Parser,
    bounded,
    config_and_overrides,
    logging_options,
    natural,
    positive,
    print_error,
    processes,
)
from megastar.commands._shared.outputs import check_outputs, run_folders
from megastar.errors import UserError
from megastar.utils.files import write_output
from megastar.utils.hostname import expand_hosts, host_name
from megastar.utils.printable import say
from megastar.utils.redact import redact

EXAMPLES = """
megastar elastic --nodes 3:4 --hosts n1,n2,n3,n4 --nproc 8 configs/run/star_xl_50ep.yaml faults.memory_every=50
megastar elastic --nodes 16:16 --hosts 'node[01-16]' --nproc 8 configs/run/star_xxl_50ep.yaml
MEGASTAR_ELASTIC=3:4 sbatch --no-kill --nodes=5 slurm/train_xl.sh           with a spare node; docs/elastic.md
kubectl apply -f deploy/kubernetes/train.yaml                               pods as nodes; docs/kubernetes.md
"""


def nodes(text: str) -> tuple[int, int]:
    """An argparse type: MIN:MAX."""
    least, _, most = text.partition(":")
    digits = text.isascii() and len(text) < 20 and least.isdigit() and most.isdigit()
    if not (digits and 1 <= int(least) <= int(most)):
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:MAX, two numbers of nodes with 1 <= MIN <= MAX")
    return int(least), int(most)


def parser() -> Parser:
    p = Parser(
        "elastic",
        "Train on several nodes, each of which runs this command. If a node is lost, the others continue within a minute, "
        "from the last checkpoint in memory (faults.memory_every) or on disk. A node that joins takes part. The "
        "global batch does not change.",
        EXAMPLES,
    )
    p.add_argument("items", nargs="*", metavar="CONFIG | section.field=value", help="as for megastar train")
    p.add_argument(
        "--nodes", type=nodes, required=True, metavar="MIN:MAX", help="nodes that train at a time; others are spare"
    )
    p.add_argument("--nproc", type=processes, default=1, help="ranks of each node (default 1)")
    p.add_argument(
        "--hosts",
        required=True,
        metavar="HOST,HOST,...",
        help="all nodes, also as ranges such as node[01-16]; one of them hosts their common store",
    )
    p.add_argument(
        "--port",
        type=bounded(int, 1, 65000),
        default=29400,
        help="port of the store on the first host; +1 on the second, ...",
    )
    p.add_argument("--index", type=natural, help="which of the hosts this is (default: the one with this host's name)")
    p.add_argument("--job", default="", help="name of the job, equal on all nodes (default: SLURM's, else the run's)")
    p.add_argument(
        "--join-timeout", type=bounded(float, 1, 86400), default=600.0, metavar="S", help="limit for MIN nodes to join"
    )
    p.add_argument("--max-restarts", type=positive, default=20, help="failures in a row, at most 10 minutes apart")
    p.add_argument("--status-file", type=Path, help="file for the exit status; srun's may be that of a lost node")
    return p


def main(words: list[str]) -> int:
    from megastar.config.load import load_config

    args = parser().parse(words, every_rank=True)  # below srun each node has its own log, and passes the level on
    path, overrides = config_and_overrides(args.items)
    check_outputs({"--status-file": args.status_file}, path)
    cfg = load_config(path, overrides)
    check_outputs({}, folders=run_folders(cfg))
    hosts = expand_hosts(args.hosts)
    index = args.index if args.index is not None else hosts.index(host_name()) if host_name() in hosts else -1
    if not hosts or index >= len(hosts):
        raise UserError(f"--index {index}: --hosts names {len(hosts)} host(s), counted from 0")
    # torch reports a connection to a lost node in thirty lines of C++; in the ranks its log level is unchanged.
    level = {} if "TORCH_CPP_LOG_LEVEL" in os.environ else {"TORCH_CPP_LOG_LEVEL": "FATAL"}
    os.environ.update(level)
    from megastar.engine.elastic.agent import run_node
    from megastar.engine.elastic.batch import fit_batch
    from megastar.engine.elastic.rendezvous import Nodes
    from megastar.engine.profiling.settings import check_ranks
    from megastar.run_dir.config_file import negatives_of_run

    for name in level:
        del os.environ[name]
    least, most = args.nodes
    cfg.self_guided.negatives = negatives_of_run(cfg)
    fit_batch(cfg, least * args.nproc, most * args.nproc)  # raises before anything is started
    check_ranks(cfg.train.profile, most * args.nproc, cfg.run)
    job = args.job or os.environ.get("SLURM_JOB_ID") or str(Path(cfg.run).resolve())
    address = hosts[index] if index >= 0 else host_name()
    there = Nodes(least, most, hosts, args.port, index, address, job, args.join_timeout)
    status, why = run_node(cfg, ["train", *args.items, *logging_options()], args.nproc, there, args.max_restarts)
    if why:
        print_error(redact(why))
    if status is None:
        return 0
    if args.status_file and not why:
        write_status(args.status_file, status)
    if "SLURM_SRUN_COMM_PORT" in os.environ and not srun_is_there(os.environ):
        end_job(os.environ["SLURM_JOB_ID"], status)
    return status


def write_status(path: Path, status: int) -> None:
    """Write the exit status for the batch script. An error is reported and does not replace the status."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_output(path, f"{status}\n".encode())
    except (OSError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        print_error(f"--status-file {path} cannot be written ({reason}): the exit status is {status}")


def srun_is_there(environ: Mapping[str, str]) -> bool:
    """Whether the srun that started this process still runs, and with it the batch script."""
    place = environ.get("SLURM_SRUN_COMM_HOST", ""), int(environ["SLURM_SRUN_COMM_PORT"])
    with suppress(OSError), socket.create_connection(place, 5.0):
        return True
    return False


def end_job(job: str, status: int) -> None:
    """After the loss of the batch script's node, SLURM would keep the job to its time limit: its next start ends it."""
    command = ["scancel", job] if status == 2 else ["scontrol", "requeue", job]
    say(f"megastar: the batch script of job {job} was lost with its node; {' '.join(command)}", sys.stderr)
    try:
        subprocess.run(command, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        print_error(f"{' '.join(command)} failed ({error}): run it yourself")
