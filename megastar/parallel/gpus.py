"""Data sheets of GPUs, and machines of them: what `megastar plan` and MFU are computed with. No torch."""

from __future__ import annotations

from dataclasses import dataclass

BANDWIDTH_EFFICIENCY = 0.7  # of a link's bandwidth, in collectives; assumed


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures. memory GiB; tflops dense bf16; hbm GB/s of its memory; nvlink GB/s, both directions together
    (PCIe without NVLink); network GB/s per GPU and direction of the usual server (400 Gb/s = 50)."""

    memory: float
    tflops: float
    hbm: float
    nvlink: float
    network: float


@dataclass(frozen=True)
class Machine:
    name: str
    gpu: Gpu
    gpus: int
    per_node: int

    @property
    def nodes(self) -> int:
        return self.gpus // self.per_node

    def tensor_rate(self) -> float:
        """Bytes per second and direction inside a node."""
        return self.gpu.nvlink / 2 * 1e9 * BANDWIDTH_EFFICIENCY

    def data_rate(self, tensor: int) -> float:
        """Of the data group's ring. Between nodes it uses the network cards of all its ranks on a node."""
        network = self.gpu.network * (self.per_node // tensor) * 1e9 * BANDWIDTH_EFFICIENCY
        return self.tensor_rate() if self.nodes == 1 else min(self.tensor_rate(), network)


# NVIDIA's data sheets; peaks without sparsity. Network: DGX A100 8 x 200 Gb/s, DGX H100, H200 and B200 8 x 400 Gb/s.
GPUS = {
    "a100-40": Gpu(40, 312, 1555, 600, 25),
    "a100-80": Gpu(80, 312, 2039, 600, 25),
    "h100": Gpu(80, 989, 3350, 900, 50),
    "h100-pcie": Gpu(80, 756, 2000, 600, 50),
    "h200": Gpu(141, 989, 4800, 900, 50),
    "b200": Gpu(180, 2250, 8000, 1800, 50),
    "l40s": Gpu(48, 362, 864, 64, 25),
    "a10": Gpu(24, 125, 600, 64, 12.5),
    "rtx4090": Gpu(24, 165, 1008, 64, 12.5),
}


def gpu_model(name: str) -> str | None:
    """The key of ``GPUS`` by torch's or nvidia-smi's name; None for an unlisted GPU."""
    words = name.lower().replace("-", " ").replace("rtx ", "rtx").split()
    models = [model for model in GPUS if model.split("-")[0] in words]
    if "pcie" in words and "h100-pcie" in models:
        return "h100-pcie"
    return models[0] if models else None


def peak_tflops(name: str) -> float | None:
    """The data sheet's dense bf16 peak of a GPU by torch's name; None for an unlisted GPU."""
    model = gpu_model(name)
    return GPUS[model].tflops if model else None
