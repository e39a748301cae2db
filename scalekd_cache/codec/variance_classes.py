"""Groups symbols sorted by variance into the classes of `blocks.py`.

In: symbols from a sample of views. Out: classes. Invariant: adjacent classes are merged if a separate Huffman table
costs more than it saves. Costs are for the lossless stage's Huffman code.
"""

import heapq
import itertools

import torch
from torch import Tensor

from scalekd_cache.codec.blocks import LARGEST, Segment, pack_plane

BINS = 64
"""Number of classes before merging."""
TABLE_BITS = 8 * 80
"""Approximate cost of a zstd block with its Huffman table, in bits."""
ESCAPE_BITS = 40
"""Approximate cost of an escape, in bits."""


def variance_classes(symbols: Tensor) -> list[Segment]:
    """Choose classes for sorted int64 symbols (N, n), merging adjacent classes while that lowers the cost."""
    edges = [symbols.shape[1] * number // BINS for number in range(BINS + 1)]
    bins = [(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]
    costs = {span: _cheapest(symbols[:, slice(*span)]) for span in bins}
    while len(bins) > 1:
        joined = [(first[0], second[1]) for first, second in itertools.pairwise(bins)]
        for span in joined:
            if span not in costs:
                costs[span] = _cheapest(symbols[:, slice(*span)])
        gains = [costs[a][0] + costs[b][0] - costs[ab][0] for a, b, ab in zip(bins, bins[1:], joined, strict=False)]
        best = max(range(len(gains)), key=gains.__getitem__)
        if gains[best] + TABLE_BITS <= 0:
            break
        bins[best : best + 2] = [joined[best]]
    return [Segment(stop - start, costs[start, stop][1]) for start, stop in bins]


def _cheapest(symbols: Tensor) -> tuple[float, int]:
    """A class's lowest cost in bits per view, and the corresponding bits per symbol."""
    return min((_bits(symbols, bits), bits) for bits in LARGEST)


def _bits(symbols: Tensor, bits: int) -> float:
    """Cost in bits per view: the plane's Huffman-coded bytes plus the escapes."""
    segment, beyond = Segment(symbols.shape[1], bits), symbols.abs() > LARGEST[bits]
    escapes = ESCAPE_BITS * float(beyond.double().sum()) / len(symbols)
    plane = pack_plane(symbols.masked_fill(beyond, 0), [segment])
    return escapes + sum(
        part.shape[1] * huffman_bits(part) for part in torch.split(plane, max(1, segment.count), dim=1)
    )


def huffman_bits(symbols: Tensor) -> float:
    """Mean Huffman code length for these bytes, in bits: the total weight of the inner nodes per byte."""
    heap = [count for count in torch.bincount(symbols.flatten().long()).tolist() if count]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        node = heapq.heappop(heap) + heapq.heappop(heap)
        total += node
        heapq.heappush(heap, node)
    return total / symbols.numel()
