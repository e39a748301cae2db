"""`TeacherSpec`, the teacher description stored in a cache, and the digest of the teacher's weights.

In: a loaded teacher, or JSON from a manifest. Out: a frozen, validated description for rebuilding the architecture.
Invariant: `TeacherSpec.from_json(spec.to_json()) == spec`; a missing or unknown field is an error.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
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
"""Limits for model arguments: number of layers, list length, and any other number."""
RANDOM = " (random weights)"
"""Suffix for the name of a teacher with random weights."""


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """Description of a teacher, stored in a cache."""

    name: str
    """timm model name, or demo_swin."""
    timm_version: str
    """timm version that built the model, which is recorded but not compared."""
    model_args: dict[str, Any]
    """Arguments to `timm.create_model` as JSON values."""
    family: str
    """Family in `tail.FAMILIES`."""
    num_classes: Annotated[int, Field(ge=0, le=10_000_000)]
    """Width of the logits; 0 without a classifier."""
    image_size: Side
    """Input image size in pixels."""
    mean: Triple
    """Channel means for pixel values in [0, 1]."""
    std: tuple[Spread, Spread, Spread]
    """Channel standard deviations, on a scale of 0 to 1."""
    feature_shape: tuple[Side, Side, Side]
    """Shape (C, H, W) of the features after the final norm."""
    tail_shape: tuple[Side, Side, Side]
    """Shape (C3, H3, W3) of the tail's input."""
    weights_sha256: Sha256
    """`weights_digest` of the state dict."""
    has_classifier: bool
    """Whether the teacher has a classifier. If not, only its features are used."""
    pooled: Annotated[int, Field(ge=0, le=1 << 16)] = 0
    """Width of the pooled embedding; 0 if it is the mean of the map over positions, or if the dataset has labels."""

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values. `pooled` is omitted if it is 0."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))
        return plain if self.pooled else {name: value for name, value in plain.items() if name != "pooled"}

    @staticmethod
    def from_json(value: object, where: str = "teacher") -> "TeacherSpec":
        """The inverse of `to_json`. Raises `UserError` naming the first field that is missing, unknown or malformed."""
        spec = checked_value(value, TeacherSpec, "the teacher's description", where)
        if not all(_is_plain(name, argument) for name, argument in spec.model_args.items()):
            raise UserError(
                "the teacher's model_args contain a value of the wrong type or out of range",
                got=repr(spec.model_args)[:300],
                expected=f"text, true, false, null, numbers up to {MAX_NUMBER:,} (layer counts: up to {MAX_DEPTH:,}), "
                f"or lists of up to {MAX_LENGTH} such values",
                where=where,
                fix="restore the file, or rebuild the cache with this version",
            )
        return spec


def _is_plain(name: str, value: object, inside: int = 0) -> bool:
    """Whether an argument is within the limits. Without limits, a malicious file could request 20,000 layers."""
    if isinstance(value, list | tuple):
        return inside < 3 and len(value) <= MAX_LENGTH and all(_is_plain(name, item, inside + 1) for item in value)
    if isinstance(value, int | float) and type(value) is not bool:
        return math.isfinite(value) and abs(value) <= (MAX_DEPTH if DEPTH.search(name) else MAX_NUMBER)
    return value is None or isinstance(value, str | bool)


def label_of(name: str, config: Mapping[str, Any]) -> str:
    """A teacher's name, marked if its options (`teacher.*`) give it random weights (--pretrained false)."""
    return f"{name}{RANDOM if not config['pretrained'] and config['weights'] is None else ''}"


def teacher_label(teacher: Mapping[str, Any]) -> str:
    """The teacher's name from its manifest entry, marked if its weights are random."""
    return label_of(teacher["spec"]["name"], teacher["config"])


def random_note(labels: Iterable[str]) -> str | None:
    """A note if one of these `teacher_label`s is marked."""
    random = [label for label in labels if label.endswith(RANDOM)]
    one, it = ("is", "it") if len(random) == 1 else ("are", "them")
    text = f"{', '.join(random)} {one} for tests only: students learn nothing useful from {it}"
    return f"note: teacher{'s' if it == 'them' else ''} {text}" if random else None


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of a state dict, over each tensor's name, dtype, shape and raw bytes, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
