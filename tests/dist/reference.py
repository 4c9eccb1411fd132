"""ST-AR training written the plain way: one process, no DeepSpeed, no shards. What the engine is compared with."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import torch

from megastar.config.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RepaConfig,
    RunConfig,
    SelfGuidedConfig,
    TrainConfig,
)
from megastar.data.token_order import draw_orders
from megastar.engine.lr_schedule import learning_rate, muon_rate
from megastar.model.masks import MaskSpec, draw_hidden
from megastar.model.token_order import Placement
from megastar.objectives.next_token import next_token_loss
from megastar.objectives.self_guided import draw_positions, total
from megastar.teacher.schedule import decay_at

STEPS, BATCH, TOKENS, VOCAB, CLASSES = 5, 8, 16, 32, 5
WIDTH = 12  # of the encoder's features
PERMUTED = 0.6  # share of the images of a random order


def config(**changes) -> RunConfig:
    """A tiny run; ``changes`` are section=dict(field=value)."""
    model = ModelConfig(
        name="tiny", n_layer=3, n_head=2, dim=16, multiple_of=16, vocab_size=VOCAB, num_classes=CLASSES,
        image_tokens=TOKENS, token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0, initializer_range=0.2,
    )  # fmt: skip
    cfg = RunConfig(
        model=model,
        data=DataConfig(),
        self_guided=SelfGuidedConfig(contrastive_block=2, projector_dim=24, teacher_decay=0.9, teacher_warmup=True),
        repa=RepaConfig(projector_dim=20, width=WIDTH),
        # A larger eps than a run's: with 1e-8 Adam makes whole steps of gradients that are rounding errors.
        optim=OptimConfig(lr=3e-3, eps=1e-6, scale_lr=False, grad_clip=0.5, warmup_steps=2, schedule="cosine"),
        parallel=ParallelConfig(deepspeed="configs/ds/zero3.json"),
        train=TrainConfig(global_batch=BATCH, steps=STEPS, dtype="fp32", threads=1),
    )
    for section, fields in changes.items():
        for name, value in fields.items():
            assert hasattr(getattr(cfg, section), name)
            if isinstance(value, dict):
                value = replace(getattr(getattr(cfg, section), name), **value)
            setattr(getattr(cfg, section), name, value)
    return cfg


def batch_of(cfg: RunConfig, step: int, rows: slice) -> dict:
    """Rows of the step's global batch."""
    views = cfg.self_guided.views if cfg.self_guided.enabled else 1
    g = torch.Generator().manual_seed(1000 + step)
    whole = {
        "codes": torch.randint(0, VOCAB, (BATCH, views, TOKENS), generator=g),
        "labels": torch.randint(0, CLASSES + 1, (BATCH,), generator=g),
        "ids": torch.arange(BATCH) + step * BATCH,
        "epochs": torch.full((BATCH,), step),
    }
    if cfg.repa.active:
        whole["features"] = torch.randn(BATCH, views, TOKENS, WIDTH, generator=g).half()
    if cfg.token_order.kind == "random":
        epochs, ids = whole["epochs"].numpy(), whole["ids"].numpy()
        whole["orders"] = torch.from_numpy(draw_orders(cfg.train.seed, epochs, ids, views, TOKENS, PERMUTED))
    return {k: v[rows] for k, v in whole.items()}


def in_order(b: dict) -> tuple[torch.Tensor, Placement | None, list[list[int]]]:
    """Codes (B, M, T) one by one in the order of their images, their placement, and each sequence's order."""
    B, M, T = b["codes"].shape
    if "orders" not in b:
        return b["codes"], None, [list(range(T))] * (B * M)
    orders = b["orders"].view(B * M, T).tolist()
    rows = [[codes[p] for p in o] for codes, o in zip(b["codes"].view(B * M, T).tolist(), orders, strict=True)]
    own = [[0, *(1 + p for p in o[:-1])] for o in orders]
    return torch.tensor(rows).view(B, M, T), Placement(torch.tensor(own), torch.tensor(orders)), orders


def place(order: list[int], position: int) -> int:
    """Where the token that a raster sequence holds at ``position`` is an input; the last token is no input."""
    return min(1 + order.index(position - 1), TOKENS - 1)


def some(placement: Placement | None, M: int, Ms: int) -> Placement | None:
    """Of the student's views."""
    if placement is None:
        return None
    return Placement(*(p.unflatten(0, (-1, M))[:, :Ms].flatten(0, 1) for p in placement))


def initial_weights() -> dict[str, torch.Tensor]:
    """A transformer's weights that no seed of a run draws."""
    from megastar.model.transformer import Transformer

    torch.manual_seed(77)
    return {k: v + 0.05 * torch.randn_like(v) for k, v in Transformer(config().model).state_dict().items()}


def train(cfg: RunConfig, accumulation: int, initial: dict[str, torch.Tensor] | None = None) -> dict:
    """Losses and gradient norm of each step, and the last weights of student and average."""
    from megastar.engine.student import Student
    from megastar.model.transformer import Transformer

    torch.manual_seed(cfg.train.seed)
    student, guided = Student(cfg), cfg.self_guided
    if initial:
        student.transformer.load_state_dict(initial)
    average = {k: v.detach().clone() for k, v in student.named_parameters()}
    teacher = Transformer(cfg.model).eval()
    matrices = [] if cfg.optim.name == "adamw" else [p for n, p in student.named_parameters() if is_matrix(n, p)]
    assert not matrices or cfg.optim.layer_decay == 1 and not cfg.train.freeze_blocks
    muon = Matrices(cfg, student, matrices) if matrices else None
    taken = {id(p) for p in matrices}
    frozen = {id(p) for n, p in student.named_parameters() if n.startswith(frozen_prefixes(cfg.train.freeze_blocks))}
    for p in student.parameters():
        p.requires_grad_(id(p) not in frozen)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p],
                "weight_decay": cfg.optim.weight_decay * (p.dim() >= 2),
                "scale": cfg.optim.layer_decay ** layers_below_head(n, cfg.model.n_layer),
            }
            for n, p in student.named_parameters()
            if id(p) not in taken | frozen
        ],
        betas=(cfg.optim.beta1, cfg.optim.beta2),
        eps=cfg.optim.eps,
    )
    history = []
    for step in range(STEPS):
        teacher.load_state_dict({k.removeprefix("transformer."): v for k, v in average.items() if "projector" not in k})
        rows, sums = BATCH // accumulation, {}
        for a in range(accumulation):
            b = batch_of(cfg, step, slice(a * rows, (a + 1) * rows))
            if guided.enabled:
                loss, parts = _guided(cfg, student, teacher, b, step)
            else:
                every, placement, _ = in_order(b)
                out = student(b["labels"], codes := every[:, 0], placement=placement, align=cfg.repa.active)
                plain = total(guided, loss_ar=_next_token(student, out, codes))
                loss, parts = _with_alignment(cfg, out, b, 1, *plain)
            (loss / accumulation).backward()
            for k, v in parts.items():
                sums[k] = sums.get(k, 0.0) + v.item() / accumulation
        sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.optim.grad_clip).item()
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(cfg.optim, cfg.train.global_batch, step, STEPS)
        optimizer.step()
        if muon:
            muon.step(step)
        student.zero_grad()
        decay = decay_at(step, guided)
        with torch.no_grad():
            for name, p in student.named_parameters():
                average[name] = decay * average[name] + (1 - decay) * p
            if guided.enabled:  # the projector is the student's alone
                trunk = [(average[n], p) for n, p in student.named_parameters() if n.startswith("transformer.")]
                away = sum((a - p).double().square().sum() for a, p in trunk)
                sums["teacher_distance"] = (away / sum(p.double().square().sum() for _, p in trunk)).sqrt().item()
        history.append(sums)
    weights = {k.removeprefix("transformer."): v.detach() for k, v in student.named_parameters()}
    return {
        "history": history,
        "student": weights,
        "ema": {k.removeprefix("transformer."): v for k, v in average.items()},
    }


def frozen_prefixes(blocks: int) -> tuple[str, ...]:
    """Of the weights that ``train.freeze_blocks`` keeps; the empty tuple for 0."""
    names = ["transformer.tok_embeddings.", "transformer.cls_embedding."] if blocks else []
    return tuple(names + [f"transformer.layers.{i}." for i in range(blocks)])


def layers_below_head(name: str, n_layer: int) -> int:
    """0 for head, final norm, projector and the last block; n_layer for the embeddings."""
    if "embedding" in name:
        return n_layer
    return n_layer - 1 - int(name.split(".")[2]) if name.startswith("transformer.layers.") else 0


def is_matrix(name: str, p: torch.Tensor) -> bool:
    """Whether Muon updates the weight: the 2-D ones of the blocks."""
    return name.startswith("transformer.layers.") and p.dim() == 2


class Matrices:
    """``torch.optim.Muon`` on the blocks' weights; on q, k and v each for itself where the run says so.

    torch's Newton-Schulz iterations are in bf16, which turns a last bit of an fp32 gradient into 0.4 % of an update. To
    compare to 1e-5, the reference runs torch's own function in fp32 where the run does (``in_fp32``).
    """

    def __init__(self, cfg: RunConfig, student: torch.nn.Module, matrices: list[torch.nn.Parameter]):
        m, self.cfg, self.pairs = cfg.optim.muon, cfg, []  # (weight, its parts, which share its memory)
        fused = {id(p) for n, p in student.named_parameters() if n.endswith("wqkv.weight")}
        for p in matrices:
            parts = p.detach().chunk(3) if m.split_qkv and id(p) in fused else [p.detach()]
            self.pairs.append((p, [torch.nn.Parameter(part) for part in parts]))
        self.torchs = torch.optim.Muon(
            [part for _, parts in self.pairs for part in parts], weight_decay=m.weight_decay, momentum=m.momentum,
            nesterov=m.nesterov, eps=m.eps, ns_steps=m.ns_steps, adjust_lr_fn=m.adjust_lr_fn,
        )  # fmt: skip

    def step(self, step: int) -> None:
        for p, parts in self.pairs:
            assert all(part.data_ptr() - p.data_ptr() == 4 * i * part.numel() for i, part in enumerate(parts))
            for part, grad in zip(parts, p.grad.chunk(len(parts)), strict=True):
                part.grad = grad
        self.torchs.param_groups[0]["lr"] = muon_rate(self.cfg.optim, self.cfg.train.global_batch, step, STEPS)
        with in_fp32() if self.cfg.optim.muon.ns_dtype != "bf16" else nullcontext():
            self.torchs.step()


@contextmanager
def in_fp32():
    """``torch.optim.Muon``'s iterations, whose first operation is a conversion to bf16, in fp32."""
    with mock.patch.object(torch.Tensor, "bfloat16", lambda x: x.clone()):
        yield


def _next_token(student, out, codes):
    """From all logits, where the engine computes it in chunks from the features."""
    trunk = student.transformer
    return next_token_loss(trunk.output(trunk.norm(out.last)), codes)[0]


def _with_alignment(cfg, out, b, views, loss, parts):
    """With the term of representation alignment, as its equation."""
    if not cfg.repa.active:
        return loss, parts
    wanted = b["features"][:, :views].flatten(0, 1).float()  # (N, T, C)
    wanted = wanted if cfg.repa.match == "next" else wanted[:, :-1]
    cosine = (out.aligned * wanted).sum(-1) / (out.aligned.norm(dim=-1) * wanted.norm(dim=-1))
    value = (1 - cosine).mean()
    loss = loss + cfg.repa.weight * value
    return loss, {**parts, "loss_repa": value.detach(), "loss": loss.detach()}


def _guided(cfg, student, teacher, b, step):
    guided, (B, M, _) = cfg.self_guided, b["codes"].shape
    Ms = guided.student_views
    contrastive = guided.step_loss or guided.view_loss
    K = draw_positions(cfg.train.seed, step, TOKENS, guided.positions)
    hidden = [draw_hidden(cfg.train.seed, b["epochs"], b["ids"], TOKENS, guided.mask_ratio, view=m) for m in range(Ms)]
    mask = MaskSpec.hidden(torch.stack(hidden, 1).flatten(0, 1))
    whole, placement, orders = in_order(b)
    at = torch.tensor([[place(order, k) for k in K.tolist()] for order in orders])  # (B * M, K)
    codes = whole[:, :Ms].flatten(0, 1)
    own = at.unflatten(0, (B, M))[:, :Ms].flatten(0, 1)
    out = student(
        b["labels"].repeat_interleave(Ms), codes, mask=mask, positions=own if placement else K,
        placement=some(placement, M, Ms), align=cfg.repa.active,
    )  # fmt: skip
    with torch.no_grad():
        every = whole.flatten(0, 1)
        seen = teacher(
            b["labels"].repeat_interleave(M), every[:, :-1], features_at=guided.contrastive_block, placement=placement
        )
    last = seen.last.unflatten(0, (B, M))[:, :Ms].flatten(0, 1)
    targets = torch.stack([row[index] for row, index in zip(seen.features, at, strict=True)]).unflatten(0, (B, M))
    loss, parts = total(
        guided, loss_ar=_next_token(student, out, codes), student_last=out.last, teacher_last=last,
        anchors=out.anchors.unflatten(0, (B, Ms)) if contrastive else None, targets=targets if contrastive else None,
        spreads=True,
    )  # fmt: skip
    return _with_alignment(cfg, out, b, Ms, loss, parts)


def uncut_step(cfg: RunConfig, passes: int = 1) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and gradients of the first step from ``initial_weights``, in ``passes`` that know nothing of each other."""
    from megastar.engine.student import Student
    from megastar.model.transformer import Transformer

    torch.manual_seed(cfg.train.seed)
    student, teacher, weights = Student(cfg), Transformer(cfg.model).eval(), initial_weights()
    student.transformer.load_state_dict(weights)
    teacher.load_state_dict(weights)
    sums: dict[str, float] = {}
    for a in range(passes):
        rows = slice(a * BATCH // passes, (a + 1) * BATCH // passes)
        loss, parts = _guided(cfg, student, teacher, batch_of(cfg, 0, rows), 0)
        (loss / passes).backward()
        for k, v in parts.items():
            sums[k] = sums.get(k, 0.0) + v.item() / passes
    return sums, {n: p.grad for n, p in student.named_parameters()}
