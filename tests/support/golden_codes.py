"""Golden bytes of codecs and the input they were made from."""

from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_input(shape: list[int]) -> torch.Tensor:
    """Exact in every float format, with an empty group, a tiny one and a large one."""
    count = 2 * int(np.prod(shape))
    values = torch.tensor([((7 * i) % 31 - 15) * 2.0 ** ((i % 5) - 2) for i in range(count)]).view(2, *shape)
    values[0, :, 0, 0] = 0
    values[1, :, 0, 0] *= 2.0**-30
    return values
