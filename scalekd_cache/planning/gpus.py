"""GPUs by name, with peak throughput and memory from data sheets, and the utilization measured on one of them.

In: a name or a device. Out: a `Gpu`, or its name.
Invariant: peaks are not measured; they are the cited documents' values for dense bfloat16 with float32 accumulation.
Utilization was measured on an H200 without torch.compile, and is assumed for all models and GPUs.
"""

import re
from typing import NamedTuple

import torch

from scalekd_cache.errors import unknown_name

FORWARD_UTILIZATION = 0.13
"""Fraction of the peak reached by a teacher's forward pass: Swin-L, batches of 256 (docs/BENCHMARKS.md, On a GPU)."""
STUDENT_UTILIZATION = 0.11
"""Fraction of the peak reached by a student's training step: ResNet-50, micro-batches of 128."""
HEADS_UTILIZATION = 0.31
"""Fraction of the peak reached by the published heads in that step."""


class Gpu(NamedTuple):
    """A GPU model."""

    peak_tflops: float
    """Dense bfloat16 peak in TFLOP/s."""
    memory_gb: float
    source: str
    """The vendor's document. Data sheets often give twice this peak, labeled "with sparsity"."""


GPUS = {
    "b200": Gpu(2250, 180, "NVIDIA HGX B200 specifications; DGX B200 user guide (1,440 GB for 8)"),
    "h200": Gpu(989, 141, "NVIDIA H200 data sheet (1,979 with sparsity)"),
    "h100": Gpu(989, 80, "NVIDIA H100 data sheet, SXM5 (1,979 with sparsity)"),
    "h100-pcie": Gpu(756, 80, "NVIDIA H100 data sheet, PCIe (1,513 with sparsity)"),
    "mi300x": Gpu(1307, 192, "AMD Instinct MI300X data sheet (2,615 with sparsity)"),
    "a100": Gpu(312, 80, "NVIDIA A100 80GB data sheet (624 with sparsity)"),
    "l40s": Gpu(362, 48, "NVIDIA L40S data sheet (733 with sparsity)"),
    "a10": Gpu(125, 24, "NVIDIA A10 data sheet (250 with sparsity)"),
    "l4": Gpu(121, 24, "NVIDIA L4 data sheet (242 with sparsity)"),
    "rtx4090": Gpu(165, 24, "NVIDIA Ada architecture white paper, sums in float32"),
}


SLOWER = re.compile(r"\b(mig|laptop|mobile|max-q|nvl|d)\b|-\d+[abcq]\b")
"""In a model name: a slice of a GPU (MIG, or a vGPU such as "NVIDIA L40S-8Q"), or a variant with a lower peak."""


def gpu_name(name: str) -> str:
    """The name as it is in the table. Raises `UserError` with the closest names if it is not there."""
    if name.lower() not in GPUS:
        raise unknown_name("GPU", name.lower(), GPUS, "--gpu; for other GPUs, choose one of similar speed")
    return name.lower()


def name_of_device(device: torch.device) -> str | None:
    """A device's name in `GPUS`; None for a CPU or a GPU that is not in the table."""
    return name_of_model(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def name_of_model(model: str) -> str | None:
    """The name in `GPUS` for a model name reported by the driver, such as "NVIDIA H100 80GB HBM3"; None for a slice of
    a GPU and for slower variants."""
    words = set(model.lower().replace("rtx ", "rtx").replace("-", " ").split())
    if SLOWER.search(model.lower()):
        return None
    names = [name for name in GPUS if words >= set(name.split("-"))]
    return max(names, key=len, default=None)
