"""`TeacherSpec`, the description of a teacher that a cache stores, and the digest of its weights.

In: a loaded teacher, or JSON from a manifest. Out: a frozen, validated description that rebuilds the architecture.
Invariant: `TeacherSpec.from_json(spec.to_json()) == spec`; an incomplete or unknown field is an error.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import Sha256, checked_value

Side = Annotated[int, Field(gt=0, le=1 << 16)]
Triple = tuple[FiniteFloat, FiniteFloat, FiniteFloat]
Spread = Annotated[float, Field(gt=0, allow_inf_nan=False)]
DEPTH = re.compile("depth|layer|block")
MAX_DEPTH, MAX_LENGTH, MAX_NUMBER = 1000, 100, 10_000_000
"""Limits of model arguments: number of layers, length of a list, any other number."""
RANDOM = " (random weights)"
"""Suffix of the name of a teacher without trained weights."""


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """Description of a teacher."""

    name: str
    """timm model name, or demo_swin."""
    timm_version: str
    """timm version that built it (recorded, not compared)."""
    model_args: dict[str, Any]
    """Arguments of `timm.create_model`, JSON values."""
    family: str
    """Family in `tail.FAMILIES`."""
    num_classes: Annotated[int, Field(ge=0, le=10_000_000)]
    """Width of the logits, 0 without a classifier."""
    image_size: Side
    """Side of its input images, pixels."""
    mean: Triple
    """Channel means, on a scale of 0 to 1."""
    std: tuple[Spread, Spread, Spread]
    """Channel standard deviations, on a scale of 0 to 1."""
    feature_shape: tuple[Side, Side, Side]
    """(C, H, W) of the features after the final norm."""
    tail_shape: tuple[Side, Side, Side]
    """(C3, H3, W3) that the tail takes."""
    weights_sha256: Sha256
    """`weights_digest` of the state dict."""
    has_classifier: bool
    """False: the teacher has no classifier, only features are used."""
    pooled: Annotated[int, Field(ge=0, le=1 << 16)] = 0
    """Width of the pooled embedding. 0: it is the mean of the map over positions, or the data set has labels."""

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values, without `pooled` where it is 0."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))
        return plain if self.pooled else {name: value for name, value in plain.items() if name != "pooled"}

    @staticmethod
    def from_json(value: object, where: str = "teacher") -> "TeacherSpec":
        """The inverse of `to_json`; raises `UserError` naming the first field that is missing, unknown or malformed."""
        spec = checked_value(value, TeacherSpec, "the teacher's description", where)
        if not all(_is_plain(name, argument) for name, argument in spec.model_args.items()):
            raise UserError(
                "the teacher's description: model_args are out of range",
                got=repr(spec.model_args)[:300],
                expected=f"plain arguments, depths of at most {MAX_DEPTH}, lists of at most {MAX_LENGTH}",
                where=where,
                fix="restore the file, or rebuild the cache with this version",
            )
        return spec


def _is_plain(name: str, value: object, inside: int = 0) -> bool:
    """Whether an argument is within the limits: a crafted file could ask for 20,000 layers."""
    if isinstance(value, list | tuple):
        return inside < 3 and len(value) <= MAX_LENGTH and all(_is_plain(name, item, inside + 1) for item in value)
    if isinstance(value, int | float) and type(value) is not bool:
        return math.isfinite(value) and abs(value) <= (MAX_DEPTH if DEPTH.search(name) else MAX_NUMBER)
    return value is None or isinstance(value, str | bool)


def teacher_label(teacher: Mapping[str, Any]) -> str:
    """The teacher's name, from its entry in the manifest, with a suffix for random weights (--pretrained false)."""
    random = not teacher["config"]["pretrained"] and teacher["config"]["weights"] is None
    return f"{teacher['spec']['name']}{RANDOM if random else ''}"


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of a state dict: name, dtype, shape and raw bytes of each tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
