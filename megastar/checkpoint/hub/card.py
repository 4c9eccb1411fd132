"""The model card, README.md of a folder in the Hub's layout, written from provenance. What is not recorded is not claimed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.errors import UserError
from megastar.utils.json_file import ANY, FLOAT, core, dict_of, read_json, record, shown, text, validator
from megastar.utils.printable import one_line
from megastar.utils.redact import redact

MOST_SCORES = 16 << 20  # bytes of a file
_NUMBER = core.union_schema([FLOAT, core.int_schema(strict=True)])
_SCORES = validator(
    record(
        {"scores": dict_of(text(100), _NUMBER), "provenance": dict_of(text(1000), ANY)},
        {"real": dict_of(text(1000), ANY), "features": ANY, "generated": dict_of(text(1000), ANY), "settings": ANY},
    )
)
ALWAYS = ("cfg_scale", "temperature", "top_k", "top_p", "seed", "dtype", "label_plan")  # of a score's protocol
USUAL = {  # further fields of sampling/options.py, told where they differ from its defaults
    "cfg_schedule": "constant", "cfg_interval": -1, "parallel_steps": 0, "schedule": "cosine", "token_order": "auto",
}  # fmt: skip
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")  # the Hub's identifiers, as apache-2.0


@dataclass
class CardFacts:
    """What the weights' provenance does not hold. ``scores``: results of megastar evaluate, by file."""

    license: str = ""
    name: str = "megastar"
    data: str = ""  # the training shards
    config: Mapping[str, Any] = field(default_factory=dict)  # of the training: sections of config.yaml
    scores: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def check_license(name: str | None) -> str:
    """An identifier of the Hub, in lower case; empty where none is given. Raises ``UserError``."""
    found = (name or "").lower()
    if found and not LICENSE.fullmatch(found):
        raise UserError(
            f"--license {name}: give an identifier of the Hub, as apache-2.0, mit or cc-by-nc-4.0, or other"
        )
    return found


def read_scores(path: Path) -> dict[str, Any]:
    """A result of ``megastar evaluate --out`` or ``sample --score``. Raises ``UserError``."""
    remedy = "give a file of megastar evaluate --out or megastar sample --score"
    found: dict[str, Any] = read_json(path, _SCORES, remedy, MOST_SCORES)
    return found


def scores_of_run(run: Path, step: int, weights: str) -> dict[str, dict[str, Any]]:
    """The results in RUN/scores*.json whose samples are of the ``weights`` (ema or student) after ``step`` steps."""
    found = {}
    for path in sorted(run.glob("scores*.json"))[:20]:
        try:
            result = read_scores(path)
        except (UserError, OSError):
            continue
        trained = result["provenance"].get("trained")
        if isinstance(trained, dict) and (trained.get("step"), trained.get("weights")) == (step, weights):
            found[path.name] = result
    return found


def model_card(
    cfg: ModelConfig,
    provenance: Mapping[str, Any],
    tokenizer: TokenizerConfig,
    facts: CardFacts,
    parameters: int,
    dtype: str,
) -> str:
    """The text of README.md. Values are one line each and cannot leave their place in the table."""
    head = {
        "license": facts.license or None,
        "library_name": "megastar",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["megastar", "autoregressive", "class-conditional", "image-generation"],
    }
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in head.items() if v), "---", "", f"# {_plain(facts.name)}", ""]
    method = _method(provenance)
    size = tokenizer.image_size
    classes = provenance.get("classes") or []
    lines += [
        f"A class-conditional autoregressive transformer over image tokens, trained with megastar{method and ': '}{method}. It "
        f"generates {size} x {size} images of {cfg.num_classes} classes.", "", "## Use", "", "```bash",
        "pip install 'megastar[hub]'", "megastar sample hf://OWNER/NAME --out samples.png", "```", "", "```python",
        "import megastar", "", 'model = megastar.load("hf://OWNER/NAME")', "images = model.sample(0, n=4)", "```", "",
        "## Model", "",
    ]  # fmt: skip
    lines += _table(
        {
            "architecture": f"{cfg.n_layer} blocks, {cfg.n_head} heads, width {cfg.dim} ({cfg.name})",
            "parameters": f"{parameters:,}, stored as {dtype}",
            "tokens": f"{cfg.image_tokens} per image ({cfg.grid} x {cfg.grid}), {cfg.vocab_size} codes",
            "tokenizer": f"{tokenizer.quantizer}, SHA-256 {provenance.get('tokenizer')}",
            "weights": provenance.get("weights"),
        }
    )
    if classes:
        named = ", ".join(_plain(str(c)) for c in classes[:20]) + (
            f" and {len(classes) - 20} more" if len(classes) > 20 else ""
        )
        lines += ["", f"Classes: {named}."]
    lines += ["", "## Training", "", *_table(_training(provenance, facts)), ""]
    lines += ["## Scores", "", *_scores(facts.scores, provenance), "", "## Licence", ""]
    lines += [f"{facts.license}." if facts.license else "Not stated: ask the publisher before use."]
    return "\n".join(lines) + "\n"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _method(provenance: Mapping[str, Any]) -> str:
    """In words, from ``method`` (``RunConfig.method_name``), or of older weights from ``self_guided``; else empty."""
    guided, method = provenance.get("self_guided"), provenance.get("method")
    if method is None and isinstance(guided, bool):
        method = "star" if guided else "ar"
    parts = set(method.split("+")) if isinstance(method, str) else {""}
    if parts == {"ar"}:
        return "next-token prediction (AR baseline)"
    if parts - {"star", "repa", "random"}:
        return ""
    words = "ST-AR (self-guided training)" if "star" in parts else "next-token prediction"
    return words + (" with REPA" if "repa" in parts else "") + (" in random token order" if "random" in parts else "")


def _training(provenance: Mapping[str, Any], facts: CardFacts) -> dict[str, Any]:
    out: dict[str, Any] = {"method": _method(provenance), "data": facts.data}
    step, of = provenance.get("step"), provenance.get("of_steps")
    if step is not None:
        out["steps"] = f"{step}{f' of {of}' if of else ''}"
    if isinstance(seen := provenance.get("images_seen"), int):
        out["images seen"] = f"{seen:,}"
    out |= {"seed": provenance.get("seed"), "command": provenance.get("command")}
    if isinstance(init := provenance.get("init"), Mapping):
        out["started from"] = f"{init.get('file')}, step {init.get('step')}"
    if source := provenance.get("source"):
        out["converted from"] = f"{source} (SHA-256 {provenance.get('source_sha256')})"
    for name in ("optim.name", "optim.lr", "train.global_batch", "train.dtype"):
        if name in facts.config:
            out[name] = facts.config[name]
    return out


def _scores(results: Mapping[str, dict[str, Any]], provenance: Mapping[str, Any]) -> list[str]:
    """A row per score, with its protocol: fields of the sampler that are defaults are left out, except those in ``ALWAYS``."""
    if not results:
        return ["None are recorded."]
    lines = ["| score | value | images | real images | protocol |", "|---|---|---|---|---|"]
    for result in results.values():
        made, real, by = (_mapping(result.get(k)) for k in ("generated", "real", "provenance"))
        told = {n: by.get(n) for n in ALWAYS} | {n: by.get(n) for n, usual in USUAL.items() if by.get(n) != usual}
        trained = _mapping(by.get("trained"))
        if trained.get("weights") != "ema" or trained.get("weights") != provenance.get("weights"):
            told["weights"] = trained.get("weights")
        if trained.get("step") != provenance.get("step"):
            told["step"] = trained.get("step")
        protocol = ", ".join(f"{n} {shown(str(value))}" for n, value in told.items() if value is not None)
        features = result.get("features")
        network = features.get("name", "") if isinstance(features, dict) else features or ""
        protocol = "; ".join(filter(None, (str(network) and f"features {network}", protocol)))
        count = f"{real.get('pictures', '')} of {real.get('source', '?')}"
        for name, value in result["scores"].items():
            cells = (name, f"{value:.4g}", made.get("pictures", ""), count, protocol)
            lines.append("| " + " | ".join(_plain(str(cell)) for cell in cells) + " |")
    return lines


def _table(rows: Mapping[str, Any]) -> list[str]:
    known = {k: v for k, v in rows.items() if v not in (None, "")}
    return ["| | |", "|---|---|", *(f"| {_plain(k)} | {_plain(str(v))} |" for k, v in known.items())]


def _plain(value: str) -> str:
    """``value`` as text of one Markdown line: no markup, no end of a table's cell, no secret."""
    return re.sub(r"([\\`*_<>|\[\]#])", r"\\\1", one_line(redact(value)))[:2000]
