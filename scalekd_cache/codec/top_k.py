"""Top-k logits: log-probabilities of the k most probable classes.

In: float32 logits (B, K). Out: one record per row with k class indices (uint32) and k log-probabilities (float32). Both
are little-endian, and the most probable class comes first. Invariant: stored values are exact to float32, so all other
classes together have probability 1 - sum(exp). The loss compares this with the student's probability for the same
classes and never renormalizes over the stored ones.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scalekd_cache.errors import UserError, counted

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_K = 10


def not_finite(rows: list[int], batch: int) -> UserError:
    """The error for logits with NaN or infinity in these rows of a batch."""
    return UserError(
        "cannot store the teacher's logits",
        got=f"NaN or Inf in rows {rows[:16]} of a batch of {batch}",
        expected="finite values",
        where="logit codec",
        fix="check the teacher's weights and precision",
    )


class TopKLogits:
    """Log-probabilities of the `k` most probable among `num_classes` classes. A record takes 8 k bytes."""

    id = "logits-top-k"
    partial = True

    def __init__(self, num_classes: int, k: int = DEFAULT_K) -> None:
        whole = type(num_classes) is int and type(k) is int
        if not whole or not 1 <= k < num_classes <= 10_000_000:
            raise UserError(
                "invalid number of top-k classes",
                got=f"cache.top_k={k}, number of classes: {num_classes}",
                expected="at least 1 and fewer than the number of classes, which is at most 10,000,000",
                where="cache.top_k",
                fix="change cache.top_k, or store all logits with cache.logits=dense",
            )
        self.num_classes, self.k = num_classes, k
        self.record_bytes = 8 * k

    def get_config(self) -> dict[str, Any]:
        """JSON for rebuilding this codec."""
        return {"id": self.id, "version": 1, "num_classes": self.num_classes, "k": self.k}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TopKLogits":
        """Rebuild the codec from its JSON config."""
        return cls(config.get("num_classes", -1), config.get("k", -1))

    def encode(self, logits: "Tensor") -> list[bytes]:
        """Encode float32 logits (B, K) on any device to one record per row. Raises `UserError` for NaN or infinity."""
        return self.pack(self.encode_rows(logits).cpu().numpy())

    def encode_rows(self, logits: "Tensor") -> "Tensor":
        """Encode on the device without reading values on the host: (B, K) -> uint8 (B, 8 k + 1).

        The last byte is 1 if all logits in the row are finite.
        """
        import torch

        top = logits.detach().double().log_softmax(1).topk(self.k, dim=1)
        finite = logits.isfinite().all(1, keepdim=True).to(torch.uint8)
        return torch.cat(
            (top.indices.int().view(torch.uint8), top.values.float().contiguous().view(torch.uint8), finite), dim=1
        )

    def pack(self, rows: NDArray[np.uint8]) -> list[bytes]:
        """uint8 (B, 8 k + 1) from `encode_rows` -> one record per row. Raises `UserError` for NaN or infinity."""
        bad = np.flatnonzero(rows[:, -1] == 0).tolist()
        if bad:
            raise not_finite(bad, len(rows))
        return [row[:-1].tobytes() for row in rows]

    def decode(self, record: bytes | memoryview) -> NDArray[np.float32]:
        """Decode a record to float32 log-probabilities (K,). Classes that are not stored get -inf.

        Raises:
            UserError: the length is wrong, classes are unknown or repeated, or the probabilities sum to more than 1.
        """
        if len(record) != self.record_bytes:
            raise _damaged(counted(len(record), "byte"), f"{self.record_bytes} bytes")
        classes = np.frombuffer(record, "<u4", self.k)
        values = np.frombuffer(record, "<f4", self.k, 4 * self.k)
        mass = float(np.exp(values.astype(np.float64)).sum())
        if len(set(classes.tolist())) != self.k or int(classes.max()) >= self.num_classes:
            raise _damaged(f"classes {classes.tolist()[:16]}", f"{self.k} distinct classes below {self.num_classes}")
        if not mass <= 1 + 1e-5:  # also true for NaN
            raise _damaged(f"probabilities that sum to {mass}", "at most 1")
        row = np.full(self.num_classes, -np.inf, np.float32)
        row[classes] = values
        return row


def _damaged(got: str, expected: str) -> UserError:
    return UserError(
        "a record's logits are damaged",
        got=got,
        expected=expected,
        where="logits of a record",
        fix="run `scalekd verify` on the cache",
    )
