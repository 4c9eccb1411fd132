"""Nodes of a run whose ranks train nothing: they report where they are, and end when they are told to.

A process that has imported the agent forks a node for each line ``FOLDER INDEX NODES HOSTS PORT RANKS BATCH JOIN`` on its stdin, and prints
its process id; the node writes FOLDER/node-INDEX at its end. A rank (RANK is set) writes FOLDER/ranks/PID.json and exits
with the status in FOLDER/exit-RANK or FOLDER/exit, with 87 on SIGUSR2, 85 on SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from megastar.utils.process_exit import die_with_agent


def rank(folder: Path) -> None:
    die_with_agent()
    for number, status in ((signal.SIGUSR2, 87), (signal.SIGTERM, 85)):
        signal.signal(number, lambda *_, status=status: os._exit(status))
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "GROUP_RANK",
        "MEGASTAR_MEMORY",
        "TORCHELASTIC_RUN_ID",
        "MEGASTAR_AGENT",
    )
    facts = {name: os.environ[name] for name in names} | {"pid": os.getpid(), "words": sys.argv[2:], "at": time.time()}
    (folder / f"{os.getpid()}.tmp").write_text(json.dumps(facts))
    (folder / f"{os.getpid()}.tmp").rename(folder / "ranks" / f"{os.getpid()}.json")
    while True:
        for path in (folder / f"exit-{os.environ['RANK']}", folder / "exit"):
            if path.is_file() and (text := path.read_text()):
                if path.name != "exit":
                    path.unlink()
                os._exit(int(text))
        time.sleep(0.05)


def agent(folder: Path, index: str, nodes: str, hosts: str, port: str, ranks: str, batch: str, join: str) -> None:
    from megastar.config.load import as_run_config
    from megastar.engine.elastic.agent import run_node
    from megastar.engine.elastic.rendezvous import Nodes

    least, most = (int(n) for n in nodes.split(":"))
    cfg = as_run_config(
        {"run": str(folder), "data": {"shards": "none"}, "train": {"global_batch": int(batch), "micro_batch": 2}}
    )
    there = Nodes(least, most, ("127.0.0.1",) * int(hosts), int(port), int(index), "127.0.0.1", "job", float(join))
    status, why = run_node(cfg, [str(folder)], int(ranks), there, 3, module="tests.dist.workers.elastic_worker")
    (folder / f"end-{index}.tmp").write_text(json.dumps([status, why]))
    (folder / f"end-{index}.tmp").rename(folder / f"node-{index}")  # the file is complete when it exists


def serve() -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    import megastar.engine.elastic.agent  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        if not (pid := os.fork()):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            os.dup2(os.open(Path(line.split()[0]) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            try:
                agent(Path(line.split()[0]), *line.split()[1:])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    rank(Path(sys.argv[1])) if "RANK" in os.environ else serve()
