"""The frozen teacher: a timm transformer that turns uint8 views into features and logits, and whose end can be split off.

In: a `TeacherConfig`, and images (B, 3, H, W) uint8. Out: `TeacherOutput` in float32; `TeacherSpec`; the `Tail` and its
file. Invariant: always in eval mode, never with gradients; features are those after the final norm (`tail.py` says what
that is for each family), logits are the model's own, both from one pass.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from scalekd_cache.config import TeacherConfig
from scalekd_cache.errors import UserError
from scalekd_cache.tail import (
    DEMO_TEACHER,
    Tail,
    build_tail,
    check_tensors,
    family_of,
    features_of,
    load_tail,
    timm_name,
    to_map,
    write_tail,
)
from scalekd_cache.teacher_spec import Shape, TeacherSpec, weights_digest
from scalekd_cache.zoo import check_name, create_timm_model, default_image_size
