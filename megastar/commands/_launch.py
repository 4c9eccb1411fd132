"""Several local processes of this command, through torch's launcher."""

from __future__ import annotations

import logging
import os
import sys

from megastar.commands._common import BY_US
from megastar.errors import UserError


def launch(nproc: int, words: list[str]) -> int:
    """Run ``megastar WORDS`` as ``nproc`` ranks; returns the first failing rank's status, else 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, parse_args, run

    # The ranks tell what is wrong themselves; the launcher's own report would repeat it as a traceback.
    for name in logging.root.manager.loggerDict:
        if name.startswith(("torch.distributed.elastic", "torch.distributed.run")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    # A signal reaches the ranks, which save before they leave: a save may take longer than the launcher's 30 s.
    options = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    if "--shutdown-timeout" in get_args_parser().format_help():
        options.append("--shutdown-timeout=600")
    os.environ[BY_US] = "1"
    try:
        run(parse_args(["--standalone", f"--nproc-per-node={nproc}", *options, "-m", "megastar", *words]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == 2 and failure.error_file_data.get("message"):
            raise UserError(str(failure.message)) from error
        if failure.exitcode < 0:
            print(f"megastar: error: process {rank} was ended by {failure.signal_name()}", file=sys.stderr)
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        del os.environ[BY_US]
    return 0
