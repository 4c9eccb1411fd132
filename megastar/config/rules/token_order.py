"""The rules of the section token_order."""

from __future__ import annotations

from collections.abc import Iterator

from megastar.config.rules.problem import Problem
from megastar.config.schema import RunConfig
from megastar.config.sections.token_order import TokenOrderConfig

DEFAULT_TARGET = "rotary"  # of model.target_position, for a random order


def set_target_position(cfg: RunConfig) -> None:
    """A random order needs ``model.target_position``: the default one where the run sets none."""
    if cfg.token_order.kind == "random" and cfg.model.target_position == "none":
        cfg.model.target_position = DEFAULT_TARGET


def token_order_rules(cfg: RunConfig) -> Iterator[Problem]:
    o, here = cfg.token_order, "token_order."
    if o.kind == "raster":
        if cfg.model.target_position != "none":
            yield Problem(
                f"model.target_position = {cfg.model.target_position}: is an input of random-order networks; set "
                f"{here}kind=random, or model.target_position=none",
                ("model.target_position", here + "kind"),
            )
        plain = TokenOrderConfig()
        for name in ("anneal_start", "anneal_end", "anneal_unit"):
            if (value := getattr(o, name)) != getattr(plain, name):
                yield Problem(
                    f"{here}{name} = {value}: applies to {here}kind=random, but it is raster: set it, or leave {name} out",
                    (here + name, here + "kind"),
                )
        return
    if cfg.model.target_position == "none":
        yield Problem(
            f"model.target_position = none: {here}kind=random needs embedding or rotary",
            ("model.target_position", here + "kind"),
        )
    if cfg.repa.active:
        yield Problem(
            f"repa.weight = {cfg.repa.weight:g}: representation alignment matches features of raster order, and {here}kind is "
            f"random: set repa.enabled=false, or {here}kind=raster",
            ("repa.weight", here + "kind"),
        )
    if o.anneal_start > o.anneal_end:
        yield Problem(
            f"{here}anneal_start = {o.anneal_start:g}: must be at most {here}anneal_end {o.anneal_end:g}",
            (here + "anneal_start", here + "anneal_end"),
        )
    for name in ("anneal_start", "anneal_end"):
        if o.anneal_unit == "run" and (value := getattr(o, name)) > 1:
            yield Problem(
                f"{here}{name} = {value:g}: must be at most 1, the end of the run; set {here}anneal_unit=epochs to count epochs",
                (here + name, here + "anneal_unit"),
            )
