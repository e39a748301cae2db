"""What has to be known of a teacher without having it: `TeacherSpec`, and the digest of its weights.

In: a loaded teacher, or JSON out of a manifest. Out: a frozen, checked description that rebuilds its architecture.
Invariant: `TeacherSpec.from_json(spec.to_json()) == spec`, and nothing else than a complete specification is accepted.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalekd_cache.errors import UserError

Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """A teacher, described."""

    name: str
    """timm model name, or demo_swin."""
    timm_version: str
    """timm that built it (recorded, not compared)."""
    model_args: dict[str, Any]
    """Arguments `timm.create_model` got, JSON values."""
    family: str
    """Family in `tail.FAMILIES`."""
    num_classes: int
    """Width of the logits, 0 without a classifier."""
    image_size: int
    """Side of the images it takes, pixels."""
    mean: tuple[float, float, float]
    """Channel means it subtracts, on a scale of 0 to 1."""
    std: tuple[float, float, float]
    """Channel standard deviations, on a scale of 0 to 1."""
    feature_shape: Shape
    """(C, H, W) of the features after the final norm."""
    tail_shape: Shape
    """(C3, H3, W3) that the tail takes."""
    weights_sha256: str
    """`weights_digest` of the state dict."""
    has_classifier: bool
    """Whether the logits mean anything."""

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))
        return plain

    @staticmethod
    def from_json(value: object, where: str = "teacher") -> "TeacherSpec":
        """The inverse of `to_json`; raises `UserError` naming the first field that is missing, unknown or malformed."""
        if not isinstance(value, Mapping):
            raise _malformed("teacher", value, "an object", where)
        names = [field.name for field in dataclasses.fields(TeacherSpec)]
        if set(value) != set(names):
            wrong = sorted(set(value) ^ set(names), key=str)
            raise _malformed(", ".join(map(str, wrong)), "missing or unknown", f"exactly {', '.join(names)}", where)
        for name in ("name", "timm_version", "family"):
            _check(isinstance(value[name], str) and value[name], name, value, "a string", where)
        for name, low in (("num_classes", 0), ("image_size", 1)):
            _check(_is_int(value[name], low), name, value, f"an integer, at least {low}", where)
        for name in ("mean", "std"):
            _check(_is_triple(value[name], _is_number), name, value, "three finite numbers", where)
        for name in ("feature_shape", "tail_shape"):
            _check(_is_triple(value[name], _is_int), name, value, "three positive integers", where)
        _check(min(value["std"]) > 0, "std", value, "all above 0", where)
        _check(type(value["has_classifier"]) is bool, "has_classifier", value, "true or false", where)
        _check(_is_hex(value["weights_sha256"]), "weights_sha256", value, "64 hexadecimal digits", where)
        args = value["model_args"]
        _check(isinstance(args, Mapping) and all(map(_is_plain, args.values())), "model_args", value, "plain", where)
        triples = {name: tuple(value[name]) for name in ("mean", "std", "feature_shape", "tail_shape")}
        return TeacherSpec(**{**value, **triples, "model_args": dict(args)})


def _malformed(name: str, got: object, expected: str, where: str) -> UserError:
    return UserError(
        f"the teacher's description is malformed: {name}",
        got=got,
        expected=expected,
        where=where,
        fix="make the cache anew with this version, or restore the file",
    )


def _check(ok: object, name: str, value: Mapping[str, Any], expected: str, where: str) -> None:
    if not ok:
        raise _malformed(name, repr(value[name])[:200], expected, where)


def _is_int(value: object, low: int = 1) -> bool:
    return type(value) is int and low <= value < 2**31


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_triple(value: object, check: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(check, value))


def _is_hex(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | bool) or _is_number(value)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of a state dict: name, dtype, shape and raw bytes of each tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
