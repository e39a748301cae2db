"""Recomputed logits: the cache stores the teacher's classifier once, and readers apply it to the decoded features.

In: a teacher's classifier, applied to the mean of the last map. Out: empty records, and `classifier.safetensors` in the
cache. Invariant: in float32, classifier(mean of F) reproduces the teacher's logits to within 1e-4 of the largest one.
This holds for Swin and SwinV2. It does not hold for teachers that normalize after pooling or use a class token, so they
are rejected.
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scalekd_cache.errors import UserError, counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from scalekd_cache.store.path import StoredPath

FILE = "classifier.safetensors"
MAX_BYTES = 1 << 30
RESTORE = "restore the file from a copy of the cache"
TOLERANCES = {"torch.float32": 1e-4, "torch.bfloat16": 2**-7}
"""Maximum difference between recomputed logits and the teacher's, relative to the largest logit. It depends on the
teacher's precision, because bfloat16 logits have only 8 significant bits."""


class RecomputedLogits:
    """Codec with empty records. `sha256` is the classifier file's hash."""

    id = "logits-recomputed"
    partial = False
    record_bytes = 0

    def __init__(self, num_classes: int, sha256: str) -> None:
        self.num_classes, self.sha256 = num_classes, sha256

    def get_config(self) -> dict[str, Any]:
        """JSON for rebuilding this codec."""
        return {"id": self.id, "version": 1, "num_classes": self.num_classes, "sha256": self.sha256}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "RecomputedLogits":
        """Rebuild the codec from its JSON config."""
        return cls(config.get("num_classes", -1), config.get("sha256", ""))

    def encode(self, logits: "Tensor") -> list[bytes]:
        """One empty record per row."""
        return [b""] * len(logits)

    def encode_rows(self, logits: "Tensor") -> "Tensor":
        """Return empty rows: uint8 (B, 0)."""
        import torch

        return logits.new_empty(len(logits), 0, dtype=torch.uint8)

    def pack(self, rows: NDArray[np.uint8]) -> list[bytes]:
        """(B, 0) -> one empty record per row."""
        return [b""] * len(rows)

    def decode(self, record: bytes | memoryview) -> NDArray[np.float32]:
        """Return an empty float32 array; readers compute logits with `load_classifier`."""
        if record:
            raise UserError(
                "a record's logits are damaged",
                got=counted(len(record), "byte"),
                expected="0 bytes",
                where="logits of a record",
                fix="run `scalekd verify` on the cache",
            )
        return np.zeros(0, np.float32)


def classifier_bytes(model: Any, features: "Tensor", logits: "Tensor", dtype: "torch.dtype") -> bytes:
    """The classifier file's contents, after checking that the classifier reproduces the teacher's logits.

    Args:
        model: the timm model.
        features: (B, C, H, W) float32 from the teacher.
        logits: (B, K) float32 from the teacher.
        dtype: the autocast dtype that both were computed with.

    Raises:
        UserError: this teacher's logits are not a linear function of its last map's mean.
    """
    from safetensors.torch import save
    from torch import nn

    from scalekd_cache.devices import autocast

    linear, got = model.get_classifier(), type(model).__name__
    if isinstance(linear, nn.Linear) and linear.in_features == features.shape[1]:
        with autocast(features.device, dtype):
            recomputed = linear(features.mean((2, 3))).float()
        difference = float((recomputed - logits).abs().max())
        if difference <= TOLERANCES[str(dtype)] * max(1.0, float(logits.abs().max())):
            tensors = {name: value.detach().cpu().contiguous() for name, value in linear.state_dict().items()}
            return bytes(save(tensors))
        got += f", whose logits differ from the recomputed ones by up to {difference:.3g}"
    raise UserError(
        "cannot recompute this teacher's logits from its features",
        got=got,
        expected="a linear classifier on the mean of the normalized last feature map, as in Swin",
        where="cache.logits=recomputed",
        fix="set cache.logits to dense or top_k",
    )


def load_classifier(config: Mapping[str, Any], folder: "StoredPath") -> "nn.Linear":
    """Load a cache's frozen classifier in float32 on the CPU.

    Raises:
        UserError: the file is missing or unreadable, or its sha256 differs from the manifest's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load
    from torch import nn

    from scalekd_cache.store.checked_files import read_file

    path = folder / FILE
    data = read_file(path, "the teacher's classifier", MAX_BYTES, fix=RESTORE)
    digest = hashlib.sha256(data).hexdigest()
    if digest != config["sha256"]:
        raise UserError(
            "the teacher's classifier is damaged",
            got=f"sha256 {digest[:16]}",
            expected=f"sha256 {config['sha256'][:16]}",
            where=path,
            fix=RESTORE,
        )
    try:
        tensors = load(data)
        linear = nn.Linear(tensors["weight"].shape[1], config["num_classes"], bias="bias" in tensors)
        linear.load_state_dict(tensors)
    except (SafetensorError, KeyError, IndexError, RuntimeError) as error:
        raise UserError("cannot read the teacher's classifier", got=error, where=path, fix=RESTORE) from error
    return linear.requires_grad_(False)
