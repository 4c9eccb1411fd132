"""Time for which a save blocks training, compared with DeepSpeed's ``engine.save_checkpoint`` on the same engine.

    python benchmarks/checkpoint_save.py --ranks 2 --size b

DeepSpeed's function writes the student, its optimizer and the average (an optimizer state) before it returns. megastar's
returns when the states have been copied to host memory; the complete save, including the hashes, is also timed.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from common import relaunch, report, run_config, seconds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--size", default="b", choices=("nano", "b", "l", "xl", "xxl", "3b"))
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "megastar-save",
        help="folder for the files; it is emptied",
    )
    a = p.parse_args()
    relaunch(a.ranks)

    import torch.distributed as dist

    from megastar.engine.checkpointer.async_saver import Saver
    from megastar.engine.zero.process_group import start
    from megastar.engine.zero.setup import build

    cfg = run_config(a.size, f"train.global_batch={a.ranks}", "parallel.deepspeed=zero3", f"run={a.folder}/run")
    ctx = start(cfg)
    engines = build(cfg, ctx)
    engines.student._copy_recovery_script = lambda path: None
    saver = Saver(cfg, ctx, engines)
    step = iter(range(1, 100))

    def clear() -> None:
        saver.finish()
        if ctx.main:
            shutil.rmtree(a.folder, ignore_errors=True)
        dist.barrier()

    def whole() -> None:
        saver.save(next(step), {})
        saver.finish()

    def theirs() -> None:
        engines.student.save_checkpoint(str(a.folder / "plain"), tag="x")

    rows = {"engine.save_checkpoint (DeepSpeed)": seconds(theirs, a.repeats, clear)}
    rows["megastar, until training continues"] = seconds(lambda: saver.save(next(step), {}), a.repeats, clear)
    rows["megastar, until complete and hashed"] = seconds(whole, a.repeats, clear)
    size = sum(f.stat().st_size for f in a.folder.rglob("*.safetensors")) if ctx.main else 0
    clear()
    if ctx.main:
        title = f"saving {a.size}, ZeRO-3 on {a.ranks} ranks, {ctx.device.type}, {size / 1e9:.2f} GB"
        report(title, rows, next(iter(rows)))


if __name__ == "__main__":
    main()
