"""Start several local processes of a command through torch's launcher."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile

from megastar.commands._common import LAUNCHED_BY_US, logging_options
from megastar.errors import UserError


def launch(nproc: int, words: list[str]) -> int:
    """Run ``megastar WORDS`` as ``nproc`` ranks, which ignore --nproc; returns the first failing rank's status, else 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, parse_args, run

    # The ranks report their errors themselves; the launcher would repeat them as a traceback.
    for name in logging.root.manager.loggerDict:
        if name.startswith(("torch.distributed.elastic", "torch.distributed.run")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    # Ranks save a checkpoint on these signals, which may take longer than the launcher's default of 30 s.
    options = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    if "--shutdown-timeout" in get_args_parser().format_help():
        options.append("--shutdown-timeout=600")
    # Without "--" the launcher takes --nproc among WORDS for an abbreviation of its own options.
    options += [f"--nproc-per-node={nproc}", "-m", "--", "megastar"]
    os.environ[LAUNCHED_BY_US] = "1"
    folder = tempfile.mkdtemp(prefix="megastar-")  # the ranks' error files; torch's own is never removed
    try:
        run(parse_args(["--standalone", f"--log-dir={folder}", *options, *words, *logging_options()]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == 2 and failure.error_file_data.get("message"):
            raise UserError(str(failure.message)) from error
        if failure.exitcode < 0:
            print(f"megastar: error: rank {rank} was killed by {failure.signal_name()}", file=sys.stderr)
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        del os.environ[LAUNCHED_BY_US]
        shutil.rmtree(folder, ignore_errors=True)
    return 0
