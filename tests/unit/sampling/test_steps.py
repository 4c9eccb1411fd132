"""The step of sampling, as CUDA graphs replay it: the same codes as the plain loop."""

from __future__ import annotations

import pytest
import torch

from megastar.config.schema import ModelConfig
from megastar.model.transformer import Transformer
from megastar.sampling.logits import draw, probabilities
from megastar.sampling.options import SamplingOptions
from megastar.sampling.sampler import Sampler, sample_seeds, uniform_noise

CFG = ModelConfig(name="t", n_layer=3, n_head=2, dim=32, multiple_of=16, vocab_size=23, num_classes=4, image_tokens=16)


@pytest.mark.parametrize("passes", [1, 2])
@torch.inference_mode()
def test_a_step_may_be_repeated_on_all_rows(passes):
    """As CUDA graphs require: a step reads and writes static tensors only, and the rows of a smaller batch are padded."""
    torch.manual_seed(0)
    model = Transformer(CFG)
    for p in model.parameters():  # large weights, so that the distributions are far from flat
        torch.nn.init.normal_(p, std=0.3)
    options = SamplingOptions(cfg_scale=2.0, cfg_interval=6, temperature=0.8, top_k=9, top_p=0.9)
    plain, graphed = (Sampler(model, options, 4, passes=passes, cuda_graphs=False) for _ in range(2))

    class Twice(dict):  # every position is captured
        def __call__(self, position):
            graphed._step(position, 4)
            graphed._step(position, 4)

    graphed.graphs = Twice.fromkeys(range(CFG.image_tokens))
    for first, count in ((0, 4), (4, 3)):
        labels, seeds = torch.arange(count), sample_seeds(5, first + count)[first:]
        codes = graphed.draw(labels, seeds)
        assert torch.equal(codes, plain.draw(labels, seeds))
        tokens = torch.zeros(count, CFG.image_tokens, dtype=torch.long)
        for t in range(CFG.image_tokens):  # the steps, written out
            logits = plain.decoder.logits(labels, tokens, t, plain.scales[t], t < plain.null_until)
            tokens[:, t] = draw(probabilities(logits, 0.8, 9, 0.9), uniform_noise(seeds, CFG.image_tokens)[:, t])
        assert torch.equal(codes, tokens)
