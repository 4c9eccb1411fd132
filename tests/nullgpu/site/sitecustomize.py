"""Under the null GPU: cuDNN, which calls the real driver, is off, and numbers that must make sense are replaced."""

import contextlib
import importlib.abc
import importlib.util
import os
import sys


def _torch(module):
    module.backends.cudnn.enabled = False
    module.backends.cudnn.flags = lambda *args, **kwargs: contextlib.nullcontext()
    module.backends.cuda.enable_cudnn_sdp(False)


def _step_metrics(module):
    module.teacher_distance_squares = lambda ctx, engines: (0.0, 1.0)  # a sum of squares may be negative here


def _sampler(module):
    module.any_below = lambda *args: False  # no logits count as not finite


def _features(module):
    import numpy

    module.not_finite = lambda values: numpy.zeros(values.shape, bool)


def _check(module):
    """The kernels run; what they computed counts as exact."""
    module.errors = lambda attend, inputs, spec, exact: [
        0.0 for _ in module.results(attend, inputs, spec, grad=len(exact) > 1)
    ]


def _gradient_norm(module):
    """With NULLGPU_FINITE no step is skipped: the norms are computed, and replaced by 1."""
    if "NULLGPU_FINITE" not in os.environ:
        return
    import torch

    norms = module.GradientNorm
    partitions_norm, group_norms = norms.partitions_norm, norms.group_norms
    norms.partitions_norm = lambda self: (partitions_norm(self), torch.ones(()))[1]
    norms.group_norms = lambda self: [torch.ones(()) for _ in group_norms(self)]


AFTER = {
    "torch": _torch, "megastar.engine.metrics.step_metrics": _step_metrics, "megastar.sampling.sampler": _sampler,
    "megastar.model.kernels.check": _check, "megastar.engine.zero.gradient_norm": _gradient_norm,
    "megastar.data.pretokenize.features": _features,
}  # fmt: skip


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls the functions of ``AFTER`` when their module has been imported."""

    def find_spec(self, name, path, target=None):
        if name not in AFTER:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def then(module):
            execute(module)
            AFTER[name](module)

        spec.loader.exec_module = then
        return spec


if os.environ.get("NULLGPU"):
    sys.meta_path.insert(0, _AfterImport())
