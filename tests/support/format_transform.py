"""Decodes records of codec `transform`, written only from docs/FORMAT.md; does not import scalekd_cache."""

import hashlib
import json
import struct

import numpy as np
from numcodecs import zstd

TYPES = {"F32": "<f4", "I32": "<i4", "I8": "i1"}


def read_state(path, sha256):
    """Tensors of a safetensors file: its header's length (uint64), the header (JSON), data."""
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == sha256
    (length,) = struct.unpack_from("<Q", data)
    state = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            part = data[8 + length + start : 8 + length + stop]
            state[name] = np.frombuffer(part, TYPES[entry["dtype"]]).reshape(entry["shape"])
    return state


def decode_transform(codec, state, record):
    """A record -> maps (C, H, W) float64 and norms (2, H, W) float32."""
    channels, height, width = codec["shape"]
    tokens, rotated = height * width, state["basis"].shape[1] > 0
    seed, doublings = struct.unpack_from("<IB", record)
    norms = np.frombuffer(record, "<f2", 2 * tokens, 8).astype(np.float32).reshape(2, tokens)
    symbols = read_symbols(zstd.decompress(record[8 + 4 * tokens :]), state["segments"].tolist())
    step = np.sqrt(12 * codec["noise"] / channels)
    split = 0 if rotated else len(state["order"])
    values = (symbols[split:] - dither(seed, tokens * channels)) * 2.0**doublings
    places = np.empty(tokens * channels)
    if rotated:
        places[state["order"]] = values
    else:
        places[:] = values
        factors = np.empty(split)
        factors[state["order"]] = symbols[:split]
        factors = factors.reshape(tokens, -1)
    grid, band = places.reshape(tokens, channels), np.repeat(np.arange(len(state["bands"])), state["bands"])
    for place in range(tokens):
        number = band[place]
        if rotated:
            grid[place] = grid[place] @ state["basis"][number].astype(np.float64)
        else:
            grid[place] += state["units"][number] * (factors[place] @ state["loadings"][number].astype(np.float64))
    grid[0] += state["mean"] * np.sqrt(tokens) / step
    spectrum = np.empty_like(grid)
    spectrum[state["frequencies"]] = grid
    spectrum = spectrum.reshape(height, width, channels)
    maps = np.einsum("yh,xw,yxc->chw", dct(height), dct(width), spectrum)
    scales = step * np.maximum(norms[1], norms[0] / 64).reshape(height, width)
    return maps * scales, norms.reshape(2, height, width)


def read_symbols(data, segments):
    symbols, start = [], 0
    for count, bits in segments:
        size = -(-count * bits // 8)
        part, start = np.frombuffer(data, np.uint8, size, start), start + size
        if bits == 16:
            found = part[:count].astype(int) + 256 * part[count:].view(np.int8).astype(int)
        elif bits == 8:
            found = part.view(np.int8).astype(int)
        else:
            found = np.concatenate([part >> shift & 2**bits - 1 for shift in range(0, 8, bits)])[:count].astype(int)
            found -= 2 ** (bits - 1)
        symbols.append(found)
    symbols = np.concatenate(symbols)
    escapes = min(len(symbols), max(64, len(symbols) // 32))
    assert len(data) == start + 6 * escapes
    np.add.at(
        symbols, np.frombuffer(data, "<i4", escapes, start), np.frombuffer(data, "<i2", escapes, start + 4 * escapes)
    )
    return symbols


def dither(seed, count):
    period = 2**16
    while period < count:
        period *= 2
    mixed = np.arange(1, period + 1, dtype=np.uint64)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D), (16, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor) % np.uint64(2**32)
    table = (np.argsort(mixed, kind="stable") + 0.5) / period - 0.5
    return table[(seed + np.arange(count)) % period]


def dct(size):
    """Orthonormal DCT-II: rows are frequencies."""
    angles = np.pi * (np.arange(size) + 0.5) * np.arange(size)[:, None] / size
    matrix = np.sqrt(2 / size) * np.cos(angles)
    matrix[0] /= np.sqrt(2)
    return matrix
