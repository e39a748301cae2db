"""GPUs by name: what their vendors say, and what share of it is assumed to be reached.

In: a name. Out: a `Gpu`. Invariant: peaks are dense bfloat16 with float32 sums, from data sheets; nothing is measured.
"""

from typing import NamedTuple

from scalekd_cache.errors import UserError, nearest

FORWARD_UTILISATION = 0.35
"""Assumed share of the peak that a teacher's forward pass reaches."""
TRAINING_UTILISATION = 0.25
"""Assumed share of the peak that a training step reaches."""


class Gpu(NamedTuple):
    """One kind."""

    peak_tflops: float
    """Dense bfloat16, TFLOP/s."""
    memory_gb: float


GPUS = {
    "b200": Gpu(2250, 180),
    "h200": Gpu(989, 141),
    "h100": Gpu(989, 80),
    "h100-pcie": Gpu(756, 80),
    "mi300x": Gpu(1307, 192),
    "a100": Gpu(312, 80),
    "l40s": Gpu(362, 48),
    "a10": Gpu(125, 24),
    "l4": Gpu(121, 24),
    "rtx4090": Gpu(165, 24),
}


def gpu_of(name: str) -> Gpu:
    """UserError with the nearest names for one that is not in the table."""
    if name.lower() not in GPUS:
        raise UserError("this GPU is not in the table", got=name, expected=nearest(name.lower(), GPUS), where="gpu",
                        fix="give the nearest one: GPU=")  # fmt: skip
    return GPUS[name.lower()]
