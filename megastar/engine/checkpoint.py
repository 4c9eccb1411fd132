"""Save and resume. A save copies this rank's shards to host memory and writes them while training goes on.

Every rank writes its own files into ``.writing`` and tells rank 0 their sizes and hashes; rank 0 waits for all of them,
writes the manifest, renames the folder and points ``latest`` to it. Threads never use collectives.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
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
from megastar.data.files import sha256
from megastar.engine import folders
from megastar.engine.folders import WRITING, folder_of, name_of
from megastar.engine.state_files import FORMAT, KINDS, Piece, StateReader, state_file, write_pieces
from megastar.engine.upload import Uploader
from megastar.errors import UserError
from megastar.model.io import read_model_metadata
from megastar.parallel.plan import split_of

if TYPE_CHECKING:  # it imports deepspeed
    from megastar.engine.build import Context, Engines

PATIENCE = 3600.0  # seconds that ranks wait for each other's files
UPLOAD_PATIENCE = 86400.0


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
    """One save at a time. ``save`` returns when the copy is made; ``finish`` when the last save is on the disk.

    Ranks tell each other what became of their files through the process group's key-value store: a thread may use it
    while collectives run, nothing there times out, and no rank has to see another's files before rank 0 does.
    """

    def __init__(self, cfg: RunConfig, ctx: Context, engines: Engines):
        self.cfg, self.ctx, self.engines = cfg, ctx, engines
        self.folder = folder_of(cfg)
        self.shapes = full_shapes(engines, ctx)
        self.store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()
        self.token = ""  # of the last save: a name that no other save has, in this job or in one that is dying
        self.host: Tensor | None = None  # the copies, pinned for a GPU, kept from save to save
        self.thread: threading.Thread | None = None
        self.error: OSError | None = None
        self.warning = ""
        self.uploader = Uploader(cfg.train.upload) if cfg.train.upload and ctx.main else None
        self.done: Path | None = None
        self.step = 0  # of the last save

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
        align_replicas(self.engines, self.ctx)
        mine = owned(self.engines, self.ctx)
        elements = sum(s.stop - s.start for s in mine)
        need = torch.tensor([elements * 4 * len(KINDS)], dtype=torch.int64, device=self.ctx.device)
        if self.ctx.world > 1:
            dist.all_reduce(need)
        token = [secrets.token_hex(4)]
        if self.ctx.world > 1:
            dist.broadcast_object_list(token, src=0, device=self.ctx.device)
        self.token = token[0]
        self.written = self.folder / WRITING / self.token / name_of(step)
        if problem := on_main(self.ctx, lambda: self._prepare(int(need.item()) + (1 << 20))):
            raise self._told(problem)
        pieces = self._copy(mine, elements)
        random = {"torch": torch.get_rng_state()}  # all other draws are functions of the seed and the step
        if self.ctx.device.type == "cuda":
            torch.cuda.synchronize()
            random["cuda"] = torch.cuda.get_rng_state(self.ctx.device)
        manifest = {"format": FORMAT, "step": step, **about}
        manifest |= {
            "mesh": {
                "data": self.ctx.mesh.data,
                "tensor": self.ctx.tensor,
                "zero_stage": self.engines.student.zero_optimization_stage(),
            },
            "dtype": str(self.ctx.dtype),
            "optimizer_step": self.engines.updates(),
            "parameters": self.shapes,
            "config": asdict(self.cfg),
        }
        self.thread = threading.Thread(target=self._write, args=(pieces, random, manifest), daemon=True)
        self.thread.start()
        return time.perf_counter() - start

    def _copy(self, mine: list[Any], elements: int) -> list[tuple[Piece, dict[str, Tensor]]]:
        """This rank's states in one host buffer."""
        if self.host is None or self.host.numel() < elements * len(KINDS):
            cuda = self.ctx.device.type == "cuda"
            self.host = torch.empty(elements * len(KINDS), dtype=torch.float32, pin_memory=cuda)
        offset, pieces = 0, []
        for shard in mine:
            rank = self.ctx.mesh.tensor_rank if split_of(shard.name) else 0
            copies = {}
            for kind in KINDS:
                copies[kind] = self.host.narrow(0, offset, shard.stop - shard.start)
                copies[kind].copy_(shard.view(kind), non_blocking=True)
                offset += shard.stop - shard.start
            pieces.append((Piece(shard.name, rank, shard.start, shard.stop), copies))
        return pieces

    def _prepare(self, need: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder / WRITING, ignore_errors=True)  # what a killed save left
        self.written.mkdir(parents=True)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise OSError(errno.ENOSPC, f"{need / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")

    def _write(self, pieces: Any, random: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        """The thread: this rank's files, then word of them to rank 0; rank 0 goes on to complete the checkpoint."""
        note: dict[str, Any] = {}
        try:
            note = {"files": self._write_files(pieces, random)}
        except Exception as error:  # whatever it is, it must reach the loop
            self.error = as_os_error(error)
            note = {"problem": f"rank {self.ctx.rank}: {self.error}"}
        self.store.set(self._key(self.ctx.rank), json.dumps(note))
        if self.ctx.main:
            problem = ""
            try:
                self.done = self._complete(manifest)
            except Exception as error:
                self.error = self.error or as_os_error(error)
                problem = str(self.error)
            self.store.set(self._key("all"), problem)

    def _write_files(self, pieces: Any, random: dict[str, Tensor]) -> dict[str, Any]:
        mesh = self.ctx.mesh
        self.written.mkdir(parents=True, exist_ok=True)  # another node may not see it yet
        size, digest = write_pieces(self.written / state_file(mesh.rank), pieces)
        whose = f"rank {mesh.rank}: data rank {mesh.data_rank}, tensor rank {mesh.tensor_rank}"
        files = {state_file(mesh.rank): {"bytes": size, "sha256": digest, "whose": whose}}
        if mesh.tensor_rank == 0:
            file = self.written / random_file(mesh.data_rank)
            with file.open("wb") as f:
                torch.save(random, f)
                f.flush()
                os.fsync(f.fileno())
            entry = {"bytes": file.stat().st_size, "sha256": sha256(file), "whose": whose}
            files[file.name] = entry
        return files

    def _key(self, whose: int | str) -> str:
        return f"megastar/save/{self.token}/{whose}"

    def _complete(self, manifest: dict[str, Any]) -> Path:
        """Rank 0: wait for every rank's word, then publish."""
        files: dict[str, Any] = {}
        for rank in range(self.ctx.world):
            word = json.loads(wait_for(self.store, self._key(rank), f"rank {rank} wrote no files"))
            if problem := word.get("problem"):
                raise OSError(problem)
            files |= word["files"]
        manifest |= {"files": dict(sorted(files.items()))}
        done = folders.publish(self.folder, name_of(self.step), manifest, self.written)
        try:
            folders.retire(self.cfg, self.folder)
        except (OSError, ValueError) as error:  # the checkpoint is complete: no reason to stop
            self.warning = f"older checkpoints in {self.folder} could not be removed ({error})"
        if self.uploader:
            self.uploader.put(done)
        return done

    def finish(self) -> Path | None:
        """Wait until the save under way is complete, on all ranks alike. Raises ``UserError`` if it failed anywhere."""
        if self.thread is None:
            return self.done
        self.thread.join()
        try:
            problem = wait_for(self.store, self._key("all"), "rank 0 completed no checkpoint")
        except OSError as error:
            problem = str(error)
        self.thread, self.error = None, None
        if problem:
            raise self._told(problem)
        self.done = self.folder / name_of(self.step)
        return self.done

    def close(self) -> str:
        """Wait for the save and the upload under way, on all ranks; returns what was left undone, or nothing.

        No rank may leave while rank 0 still uploads: a launcher takes the first to leave for the end of the job.
        """
        self.finish()
        if not self.cfg.train.upload:
            return self.warning
        if self.uploader:
            self.store.set(self._key("uploaded"), self.uploader.finish())
        return wait_for(self.store, self._key("uploaded"), "rank 0 did not finish its upload", UPLOAD_PATIENCE)

    def _told(self, problem: str) -> UserError:
        former = folders.latest(self.folder)
        kept = f"{former} stays valid" if former else "there is no earlier checkpoint"
        room = any(w in problem for w in ("No space left", "needed, ", "quota", "File too large"))
        remedy = "free some space" if room else f"see that {self.folder} can be written on every node"
        return UserError(
            f"checkpoint of step {self.step} in {self.folder} could not be written ({problem}); {kept}: "
            f"{remedy} and start again"
        )


def as_os_error(error: Exception) -> OSError:
    return error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}")


def wait_for(store: Any, key: str, otherwise: str, patience: float = PATIENCE) -> str:
    """The value of ``key`` once some rank has set it. Polls: a blocking wait would hold the store for every thread."""
    deadline = time.monotonic() + patience
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise OSError(f"{otherwise} within {patience:.0f} s")
        time.sleep(0.02)
    value: bytes = store.get(key)
    return value.decode()


@torch.no_grad()
def align_replicas(engines: Engines, ctx: Context) -> None:
    """Give all ranks of a tensor group tensor rank 0's values of the weights that each holds whole.

    Their gradients are the same sum, but reduced in different groups, which may round differently: without this they
    would drift apart, and a checkpoint would stitch parts of different replicas together.
    """
    if ctx.tensor_group is None:
        return
    from megastar.engine.sharding import publish_masters

    source = ctx.mesh.rank - ctx.mesh.tensor_rank
    for shard in engines.shards():
        if not split_of(shard.name):
            for kind in KINDS:
                view = shard.view(kind)
                value = view.to(ctx.device)
                dist.broadcast(value, src=source, group=ctx.tensor_group)
                if value is not view:
                    view.copy_(value)
    publish_masters(engines.student)
    engines.refresh_teacher()


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
