"""Copies pixels to the teacher's device and encoded batches back to the host, asynchronously.

In: image pixels; a teacher's output. Out: a view's pixels on the device; encoded rows and flags on the host, with an
event that signals when the copy is complete.
Invariant: this code never waits for the device, so the next forward pass is enqueued immediately. Encoding is enqueued
right after the forward pass. Only the thread that writes records waits.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from scalekd_cache.codec.base import EncodedRows, FeatureCodec
from scalekd_cache.codec.fidelity import Fidelity, fidelity
from scalekd_cache.codec.logits import LogitCodec
from scalekd_cache.models.teacher import TeacherOutput


class EncodedPooled(NamedTuple):
    """A batch's encoded pooled embeddings."""

    codes: Tensor
    """(B, bytes_per_view) uint8."""
    final: Tensor
    """(B,) bool: `EncodedRows.final`."""
    cosine: Tensor
    """(B,) float32: cosine between the original and the decoded embedding."""


class Encoded(NamedTuple):
    """An encoded batch of views."""

    codes: Tensor
    """(F, bytes_per_view) uint8: feature codec rows for the F <= B views with stored features."""
    final: Tensor
    """(F,) bool: `EncodedRows.final`."""
    finite: Tensor
    """(B,) bool: whether the teacher's output is finite."""
    similarity: Tensor
    """(2, F) float32: the fields of `Fidelity`."""
    logits: Tensor
    """(B, n) uint8: rows from the logit codec's `encode_rows`."""


class Event(Protocol):
    """The `torch.cuda.Event` methods used here."""

    def synchronize(self) -> None:
        """Wait until all work enqueued before the event is done."""


class HostBatch(NamedTuple):
    """An encoded batch in pinned host memory; valid after the `arrived` event."""

    encoded: Encoded
    pooled: EncodedPooled | None
    """None if the cache has no pooled embeddings."""
    arrived: Event


class PixelBuffers:
    """Two alternating host buffers for the pixels of an image batch.

    Allocating new memory would take longer than copying into it. A buffer is reused once its copies to the device
    are done; with two buffers, this rarely requires waiting.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor] = []
        self._sent: list[Event] = [Done(), Done()]
        self._turn = 0

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """A uint8 buffer (V, B, 3, size, size) for the next batch, pinned if the device is a GPU."""
        if not self._buffers or self._buffers[0].shape != shape:
            self._buffers = [
                torch.empty(shape, dtype=torch.uint8, pin_memory=page_locked(self.device)) for _ in self._sent
            ]
        self._turn = (self._turn + 1) % len(self._sent)
        self._sent[self._turn].synchronize()
        return self._buffers[self._turn]

    def sent(self) -> None:
        """Record that all copies from the last buffer have been enqueued."""
        self._sent[self._turn] = recorded_event(self.device)


class Done:
    """The CPU's event: work is already complete when a call returns."""

    def synchronize(self) -> None:
        """Return immediately."""


@torch.no_grad()
def encode_batch(
    codec: FeatureCodec,
    logit_codec: LogitCodec,
    output: TeacherOutput,
    stored: Tensor,
    seeds: Tensor,
    second_codec: FeatureCodec | None = None,
) -> HostBatch:
    """After the teacher's forward pass, enqueue encoding, fidelity measurement, flags and copies to the host.

    Args:
        codec: codec for the features.
        logit_codec: codec for the logits.
        output: the teacher's output.
        stored: (F, C, H, W): the features to store; F may be 0.
        seeds: (F,) int64 on the teacher's device: one dither seed per stored view.
        second_codec: codec for the pooled embeddings, which are stored for all views (None: not stored).
    """
    if len(stored):
        rows = codec.encode_rows(stored, seeds)
        similarity = compare(codec, stored, rows.codes)
    else:
        rows = EncodedRows(seeds.new_empty(0, 1, dtype=torch.uint8), seeds.new_empty(0, dtype=torch.bool))
        similarity = Fidelity(*stored.new_empty(len(Fidelity._fields), 0))
    finite = output.features.flatten(1).isfinite().all(1) & output.logits.isfinite().all(1)
    finite &= output.pooled.isfinite().all(1)
    encoded = Encoded(*rows, finite, torch.stack(similarity), logit_codec.encode_rows(output.logits))
    host = Encoded(*map(_to_host, encoded))
    pooled: EncodedPooled | None = None
    if second_codec is not None:
        embeddings = pooled_maps(output)
        rows = second_codec.encode_rows(embeddings)
        cosine = compare(second_codec, embeddings, rows.codes).cosine
        pooled = EncodedPooled(*map(_to_host, (*rows, cosine)))
    return HostBatch(host, pooled, recorded_event(encoded.codes.device))


def pooled_maps(output: TeacherOutput) -> Tensor:
    """The pooled embeddings as 1x1 feature maps, (B, P, 1, 1)."""
    return output.pooled[..., None, None]


def _to_host(value: Tensor) -> Tensor:
    return value.to("cpu", non_blocking=True)  # torch allocates pinned memory


def compare(codec: FeatureCodec, features: Tensor, codes: Tensor) -> Fidelity:
    """Compare the features with the decoded rows."""
    return fidelity(features, codec.decode(codes).features)


def recorded_event(device: torch.device) -> Event:
    """An event recorded after everything enqueued so far on the device's current stream."""
    if device.type != "cuda":
        return Done()
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # waiting does not occupy a core
    event.record()
    return event


def page_locked(device: torch.device) -> bool:
    """Whether host memory must be pinned for asynchronous copies."""
    return device.type == "cuda"
