"""Run from test_checkpoint.py in one process: a save that is killed at each of its file operations in turn."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from megastar.engine.checkpointer import load
from megastar.engine.checkpointer.async_saver import Saver
from megastar.engine.train_step import losses, set_schedules
from megastar.engine.zero.engines import Engines
from megastar.engine.zero.process_group import start
from megastar.engine.zero.setup import build
from megastar.run_dir import checkpoint_dir
from tests.dist.reference import STEPS, batch_of, config

WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def die_at(event: int, folder: str) -> list[str]:
    """Kill this process at the ``event``-th file operation below ``folder`` from now on; returns what was seen."""
    seen: list[str] = []

    def hook(name: str, arguments: tuple) -> None:
        if name in WATCHED and any(folder in str(a) for a in arguments[:2]):
            seen.append(f"{name} {arguments[0]}")
            if len(seen) > event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def step_of(engines: Engines, cfg, ctx, step: int) -> float:
    loss, _ = losses(cfg, engines, ctx, batch_of(cfg, step, slice(None)), step)
    engines.student.backward(loss)
    set_schedules(cfg, engines, step, STEPS)
    engines.student.step()
    engines.refresh_teacher()
    return loss.item()


def main(out: Path) -> None:
    cfg = config(train={"keep_last": 1})
    cfg.run = str(out / "run")
    ctx = start(cfg)
    engines = build(cfg, ctx)
    engines.student.train()
    folder = checkpoint_dir.folder_of(cfg.run)
    saver = Saver(cfg, ctx, engines)
    saver.save(1, {})
    saver.finish()
    step_of(engines, cfg, ctx, 1)
    results = []
    for event in range(500):
        child = os.fork()
        if child == 0:
            die_at(event, str(folder))
            saver.save(2, {})
            saver.finish()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = checkpoint_dir.latest(folder)
        assert found is not None, f"nothing to resume from after a kill at file operation {event}"
        checkpoint_dir.verify(found)
        step = load.load_checkpoint(ctx, engines, found, cfg.train.seed)["step"]
        again = step_of(engines, cfg, ctx, step)
        results.append({"killed": os.WIFSIGNALED(status), "step": step, "loss": again})
        # The next save clears what the killed one left, and retires the older checkpoint.
        load.load_checkpoint(ctx, engines, found, cfg.train.seed)
        saver.save(1, {})
        left = sorted(p.name for p in saver.finish().parent.iterdir())
        results[-1]["left"] = left
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, status
            break
    (out / "kills.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
