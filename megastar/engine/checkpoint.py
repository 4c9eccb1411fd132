"""Save and resume. A save copies this rank's shards to host memory and writes them while training goes on.

Every rank writes its own files into ``.writing`` and then a note of their sizes and hashes; rank 0 waits for all the
notes, writes the manifest, renames the folder and points ``latest`` to it. Threads never use collectives.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from megastar.config.schema import RunConfig
from megastar.engine import folders
from megastar.engine.folders import WRITING, folder_of, name_of
from megastar.engine.state_files import FORMAT, KINDS, Piece, StateReader, state_file, write_pieces
from megastar.engine.upload import Uploader
from megastar.errors import UserError
from megastar.model.io import read_model_metadata
from megastar.parallel.plan import split_of

if TYPE_CHECKING:  # it imports deepspeed
    from megastar.engine.build import Context, Engines

PATIENCE = 1800.0  # seconds that rank 0 waits for the other ranks' files


def random_file(data_rank: int) -> str:
    return f"random-{data_rank:05d}.pt"


def full_shapes(engines: Engines, ctx: Context) -> dict[str, list[int]]:
    """Name -> shape of the whole parameter, whatever this rank holds of it."""
    out = {}
    for name, p in engines.student.module.named_parameters():
        shape = list(getattr(p, "ds_shape", p.shape))
        if (split := split_of(name)) and ctx.tensor > 1:
            shape[1 if split.partition == "row" else 0] *= ctx.tensor
        out[name] = shape
    return out


def owned(engines: Engines, ctx: Context) -> list[Any]:
    """The shards that this rank writes: what replicas hold alike is divided among them."""
    out = []
    replicas = engines.student.zero_optimization_stage() == 0
    for shard in engines.shards():
        if replicas:
            shard = shard.part(ctx.mesh.data_rank, ctx.mesh.data)
        if ctx.tensor > 1 and not split_of(shard.name):
            shard = shard.part(ctx.mesh.tensor_rank, ctx.tensor)
        if shard.start < shard.stop:
            out.append(shard)
    return out


class Saver:
    """One save at a time. ``save`` returns when the copy is made; ``finish`` when the last save is on the disk."""

    def __init__(self, cfg: RunConfig, ctx: Context, engines: Engines):
        self.cfg, self.ctx, self.engines = cfg, ctx, engines
        self.folder = folder_of(cfg)
        self.shapes = full_shapes(engines, ctx)
        self.host: dict[tuple[str, str], Tensor] = {}  # the copies, pinned for a GPU, kept from save to save
        self.thread: threading.Thread | None = None
        self.cancelled = threading.Event()
        self.error: OSError | None = None
        self.uploader = Uploader(cfg.train.upload) if cfg.train.upload and ctx.main else None
        self.done: Path | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None

    def save(self, step: int, about: dict[str, Any]) -> float:
        """Save after ``step`` steps; ``about`` goes into the manifest. Returns the seconds that training stood still.

        Raises ``UserError`` when the disk is full; the former checkpoint stays valid.
        """
        self.finish()
        start = time.perf_counter()
        self.step = step
        mine = owned(self.engines, self.ctx)
        need = torch.tensor([sum(s.stop - s.start for s in mine) * 4 * len(KINDS)], dtype=torch.int64)
        need = need.to(self.ctx.device)
        if self.ctx.world > 1:
            dist.all_reduce(need)
        if problem := on_main(self.ctx, lambda: self._prepare(int(need.item()) + (1 << 20))):
            raise self._told(problem)
        pieces = [self._copy(s) for s in mine]
        if self.ctx.device.type == "cuda":
            torch.cuda.synchronize()
        random = {"torch": torch.get_rng_state()}  # all other draws are functions of the seed and the step
        if self.ctx.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.ctx.device)
        manifest = {"format": FORMAT, "step": step, **about}
        manifest |= {
            "mesh": {
                "data": self.ctx.mesh.data,
                "tensor": self.ctx.tensor,
                "zero_stage": self.engines.student.zero_optimization_stage(),
            },
            "dtype": str(self.ctx.dtype),
            "optimizer_step": step,
            "parameters": self.shapes,
            "config": asdict(self.cfg),
        }
        self.cancelled.clear()
        self.thread = threading.Thread(target=self._write, args=(pieces, random, manifest), daemon=True)
        self.thread.start()
        return time.perf_counter() - start

    def _copy(self, shard: Any) -> tuple[Piece, dict[str, Tensor]]:
        rank = self.ctx.mesh.tensor_rank if split_of(shard.name) else 0
        copies = {}
        for kind in KINDS:
            source = shard.view(kind)
            if (shard.name, kind) not in self.host:
                cuda = source.device.type == "cuda"
                self.host[shard.name, kind] = torch.empty(source.shape, dtype=source.dtype, pin_memory=cuda)
            copies[kind] = self.host[shard.name, kind].copy_(source, non_blocking=True)
        return Piece(shard.name, rank, shard.start, shard.stop), copies

    def _prepare(self, need: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        writing = self.folder / WRITING
        if writing.exists():  # what a killed save left
            shutil.rmtree(writing)
        (writing / name_of(self.step)).mkdir(parents=True)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise OSError(f"{need / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")

    def _write(self, pieces: Any, random: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        try:
            written = self.folder / WRITING / name_of(self.step)
            size, digest = write_pieces(written / state_file(self.ctx.rank), pieces)
            mesh = self.ctx.mesh
            whose = f"rank {mesh.rank}: data rank {mesh.data_rank}, tensor rank {mesh.tensor_rank}"
            note = {state_file(mesh.rank): {"bytes": size, "sha256": digest, "whose": whose}}
            if mesh.tensor_rank == 0:
                file = written / random_file(mesh.data_rank)
                torch.save(random, file)
                entry = {"bytes": file.stat().st_size, "sha256": folders.digest_of(file), "whose": whose}
                note[file.name] = entry
            folders.write_atomically(self._note(mesh.rank), json.dumps(note))
            if self.ctx.main:
                self.done = self._complete(manifest)
        except (OSError, RuntimeError) as error:
            self.error = error if isinstance(error, OSError) else OSError(str(error))

    def _note(self, rank: int) -> Path:
        return self.folder / WRITING / f"{name_of(self.step)}.rank-{rank:05d}.json"

    def _complete(self, manifest: dict[str, Any]) -> Path:
        """Rank 0: wait for every rank's note, then publish."""
        waiting, files = set(range(self.ctx.world)), {}
        deadline = time.monotonic() + PATIENCE
        while waiting:
            for rank in sorted(waiting):
                if self._note(rank).is_file():
                    files |= json.loads(self._note(rank).read_text())
                    waiting.discard(rank)
            if waiting and time.monotonic() > deadline:
                raise OSError(f"rank {min(waiting)} wrote no files within {PATIENCE:.0f} s")
            if waiting and self.cancelled.wait(0.02):
                raise OSError("another rank could not write")
        done = folders.publish(self.folder, name_of(self.step), manifest | {"files": dict(sorted(files.items()))})
        folders.retire(self.cfg, self.folder)
        if self.uploader:
            self.uploader.put(done)
        return done

    def finish(self) -> Path | None:
        """Wait until the save under way is complete, on all ranks alike. Raises ``UserError`` if it failed anywhere."""
        if self.thread is None:
            return self.done
        if not self.ctx.main:
            self.thread.join()
        mine = str(self.error or "")
        if self.ctx.world > 1:  # rank 0 must not wait half an hour for the files of a rank that failed
            problems: list[Any] = [None] * self.ctx.world
            dist.all_gather_object(problems, mine)
            mine = next((p for p in problems if p), "")
        if self.ctx.main:
            if mine:
                self.cancelled.set()
            self.thread.join()
        last = [str(self.error or ""), self.done]
        if self.ctx.world > 1:
            dist.broadcast_object_list(last, src=0, device=self.ctx.device)
        self.thread, self.error, self.done = None, None, last[1]
        if problem := mine or last[0]:
            raise self._told(problem)
        return self.done

    def close(self) -> str:
        """Wait for the save and, on rank 0, the upload under way; returns what became of uploads that failed."""
        self.finish()
        return self.uploader.finish() if self.uploader else ""

    def _told(self, problem: str) -> UserError:
        former = folders.latest(self.folder)
        kept = f"{former} stays valid" if former else "there is no earlier checkpoint"
        return UserError(
            f"checkpoint of step {self.step} in {self.folder} could not be written ({problem}); {kept}: "
            "free some space and start again"
        )


def on_main(ctx: Context, work: Callable[[], None]) -> str:
    """Run ``work`` on rank 0; every rank learns what went wrong on its disk, or the empty string."""
    problem = [""]
    if ctx.main:
        try:
            work()
        except OSError as error:
            problem = [str(error)]
    if ctx.world > 1:
        dist.broadcast_object_list(problem, src=0, device=ctx.device)
    return problem[0]


def newest(ctx: Context, folder: Path) -> Path | None:
    """``latest`` as rank 0 sees it, on every rank: views of a shared file system may differ for a while."""
    found = [folders.latest(folder) if ctx.main else None]
    if ctx.world > 1:
        dist.broadcast_object_list(found, src=0, device=ctx.device)
    return found[0]


@torch.no_grad()
def load(cfg: RunConfig, ctx: Context, engines: Engines, checkpoint: Path) -> dict[str, Any]:
    """Restore everything from ``checkpoint``, whatever ranks and ZeRO stage wrote it; returns its manifest.

    With another number of data ranks dropout draws other numbers from here on; all else goes on as it was. Raises
    ``UserError`` for another network and for files that are not what was written.
    """
    from megastar.engine.sharding import publish_masters

    about = folders.read_manifest(checkpoint)
    names = list(about["files"])
    folders.verify(checkpoint, names[ctx.rank :: ctx.world])  # the ranks share the hashing
    if ctx.world > 1:
        dist.barrier()
    _same_network(about["parameters"], full_shapes(engines, ctx), checkpoint)
    reader = StateReader(checkpoint, about)
    for shard in engines.shards():
        where = (ctx.tensor, ctx.mesh.tensor_rank, shard.start, shard.stop)
        for kind in KINDS:
            shard.view(kind).copy_(reader.range(shard.name, kind, *where))
        engines.optimizer.state[shard.flat]["step"].fill_(reader.optimizer_step)
    publish_masters(engines.student)
    engines.refresh_teacher()
    engines.student.global_steps = about["step"]
    random = checkpoint / random_file(ctx.mesh.data_rank)
    if about["mesh"]["data"] == ctx.mesh.data:
        state = torch.load(random, weights_only=True)
        torch.set_rng_state(state["torch"])
        if "cuda" in state and ctx.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], ctx.device)
    else:
        seed_dropout(cfg, ctx, about["step"])
    return about


@torch.no_grad()
def load_initial(cfg: RunConfig, ctx: Context, engines: Engines) -> dict[str, Any]:
    """Put the weights file ``train.init`` into the masters of student and average; returns the file's provenance.

    Every rank reads one whole tensor at a time. Raises ``UserError`` for a file of another network.
    """
    from megastar.engine.sharding import publish_masters

    model, provenance = read_model_metadata(cfg.train.init)
    with safe_open(cfg.train.init, "pt") as f:
        theirs = {"transformer." + n: list(f.get_slice(n).get_shape()) for n in f.keys()}  # noqa: SIM118
        ours = {n: s for n, s in full_shapes(engines, ctx).items() if n.startswith("transformer.")}
        _same_network(theirs, ours, Path(cfg.train.init))
        for shard in engines.shards():
            if shard.name in theirs:
                value = f.get_tensor(shard.name.removeprefix("transformer.")).float()
                split = split_of(shard.name) if ctx.tensor > 1 else None
                local = split.cut(value, ctx.tensor, ctx.mesh.tensor_rank) if split else value
                for kind in ("fp32", "ema"):
                    shard.view(kind).copy_(local.reshape(-1)[shard.start : shard.stop])
    publish_masters(engines.student)
    engines.refresh_teacher()
    return {"file": cfg.train.init, "model": model.name, **provenance}


def seed_dropout(cfg: RunConfig, ctx: Context, step: int) -> None:
    """Dropout differs between data ranks and agrees within a tensor group."""
    torch.manual_seed((cfg.train.seed * 1_000_003 + step) * 100_003 + ctx.mesh.data_rank)


def _same_network(theirs: dict[str, list[int]], ours: dict[str, list[int]], checkpoint: Path) -> None:
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"{checkpoint} is of another network: {name} is {theirs.get(name, 'absent')} there, "
                f"{ours.get(name, 'absent')} in this configuration: use the checkpoint's model section"
            )
