"""A cache reader written only from docs/FORMAT.md; imports neither scalekd_cache nor zarr."""

import hashlib
import json
import struct
import tarfile
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
from format_transform import decode_transform, read_state
from numcodecs import zstd


class Decoded(NamedTuple):
    """A record, decoded."""

    key: str
    label: int | None
    view: dict
    digest: str
    pixels: bytes
    features: np.ndarray | None
    """(C, H, W) float32."""
    norms: np.ndarray | None
    """(2, H, W) float32."""
    logits: np.ndarray
    """(K,) float32."""
    second: np.ndarray | None
    """(P,) float32, the pooled embedding."""


def canonical(value, *, escaped=False):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=escaped)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def check_seal(data):
    """manifest.json and plan.json: the last `self_sha256` value, taken as 64 zeros, gives the file's sha256."""
    seal = json.loads(data)["self_sha256"].encode()
    head, _, tail = data.rpartition(seal)
    assert sha256(head + b"0" * 64 + tail) == seal.decode()


def read_manifest(root):
    data = (root / "manifest.json").read_bytes()
    manifest = json.loads(data)
    assert manifest["format_version"] == 2
    check_seal(data)
    assert sha256(canonical(manifest["fingerprint_fields"], escaped=True).encode()) == manifest["fingerprint"]
    assert sha256(canonical(manifest["units"]).encode()) == manifest["units_digest"]
    for group in range(len(manifest["groups"])):
        assert sum(row[2] for row in manifest["units"] if row[0] == group) == manifest["num_samples"]
    return manifest


def read_view(root, view):
    """All records of a view in its canonical order."""
    manifest = read_manifest(root)
    state = (
        read_state(root / "codec.safetensors", manifest["codec"]["state_sha256"])
        if manifest["codec"]["id"] == "transform"
        else None
    )
    group = next(number for number, views in enumerate(manifest["groups"]) if view in views)
    for row_group, range_id, count, digest in manifest["units"]:
        if row_group != group:
            continue
        folder = root / "units" / f"g{group:03d}-r{range_id:05d}"
        data = (folder / "unit.json").read_bytes()
        assert sha256(data) == digest
        unit = json.loads(data)
        assert (unit["format"], unit["fingerprint"]) == (2, manifest["fingerprint"])
        assert (unit["count"], unit["views"]) == (count, manifest["groups"][group])
        for name, fact in unit["files"].items():
            if name.startswith((f"v{view:04d}.", "keys.txt")):
                file = (folder / name).read_bytes()
                assert (len(file), sha256(file)) == (fact["bytes"], fact["sha256"])
        keys = (folder / "keys.txt").read_text(encoding="utf-8").split("\n")[:-1]
        assert len(keys) == count
        place = (group, range_id, view)
        read = read_tar if manifest["backend"] == "webdataset" else read_zarr
        every = manifest["fingerprint_fields"].get("features_every", 1)
        for row, record in enumerate(read(folder / f"v{view:04d}", place, keys)):
            decoded = decode(manifest, state, *record)
            assert every == 1 or (decoded.features is not None) == ((row + row // every + view) % every == 0)
            yield decoded


LABEL, FEATURES, LOGITS, SECOND = 1, 2, 4, 8


def check_flags(flags, label, features, second, logits):
    """Absent parts have no bytes; unknown flags are an error."""
    assert 0 <= flags < 16
    for flag, there in ((LABEL, label is not None), (FEATURES, features), (LOGITS, logits), (SECOND, second)):
        assert bool(flags & flag) == bool(there)


def record_crc(key, label, view, digest, pixels, features, second, logits):
    data, packed = b"", b"" if label is None else struct.pack("<q", label)
    for field in (
        key.encode(),
        packed,
        view.encode(),
        digest.encode(),
        pixels,
        features,
        *filter(None, [second]),
        logits,
    ):
        data += struct.pack("<I", len(field)) + field
    return google_crc32c.value(data)


def view_text(target):
    """The view record is stored unchanged at the end of the JSON."""
    return target[target.index('"view":') + len('"view":') : -1]


# Backend webdataset


def read_tar(stem, place, keys):
    tar = stem.with_suffix(".tar").read_bytes()
    index = stem.with_suffix(".idx").read_bytes()
    magic, header, row_bytes, group, range_id, view, zero, count, tar_bytes = struct.unpack_from("<8sIIIIIIQQ", index)
    assert (magic, header, row_bytes, zero) == (b"SKDCIDX2", 48, 40, 0)
    assert ((group, range_id, view), count, tar_bytes) == (place, len(keys), len(tar))
    members = read_members(stem.with_suffix(".tar"))
    for number, key in enumerate(keys):
        *places, crc = struct.unpack_from("<QQQIIII", index, header + number * row_bytes)
        target, pixels, features = (tar[at : at + size] for at, size in zip(places[:3], places[3:], strict=True))
        assert members[key]["json"] == target
        assert members[key]["features"] == features
        assert next((members[key][end] for end in ("jpg", "webp", "png") if end in members[key]), b"") == pixels
        text = target.decode()
        fields = json.loads(text)
        cut = fields["features_bytes"]
        end = cut + fields.get("second_bytes", 0)
        parts = features[:cut], features[cut:end], features[end:]
        check_flags(fields["flags"], fields.get("label"), *parts)
        stretch = tar[places[0] : places[2] + places[5]]
        row = index[header + number * row_bytes : header + number * row_bytes + 36]
        assert google_crc32c.value(key.encode() + row + stretch) == crc
        yield key, fields.get("label"), view_text(text), fields["digest"], pixels, *parts


def read_members(path):
    """{key: {extension: data}}, read with a tar library, without the index."""
    members = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.rpartition(".")
            members.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return members


# Backend zarr

FLAT = ("features", "pixels", "target", "logits")


def read_array(folder):
    """A whole array: every chunk of every shard file, concatenated along the first axis."""
    meta = json.loads((folder / "zarr.json").read_text())
    (sharding,) = meta["codecs"]
    assert (meta["zarr_format"], meta["node_type"], sharding["name"]) == (3, "array", "sharding_indexed")
    inner = sharding["configuration"]
    assert [codec["name"] for codec in inner["codecs"]] == ["bytes", "crc32c" if folder.name in FLAT else "zstd"]
    assert [codec["name"] for codec in inner["index_codecs"]] == ["bytes", "crc32c"]
    dtype = np.dtype(meta["data_type"]).newbyteorder("<")
    shape, shard = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
    chunks = shard[0] // inner["chunk_shape"][0]
    chunk_bytes = int(np.prod(inner["chunk_shape"])) * dtype.itemsize
    data = b""
    for number in range(-(-shape[0] // shard[0])):
        file = (folder / "c" / "/".join([str(number), *["0"] * (len(shape) - 1)])).read_bytes()
        index = file[-16 * chunks - 4 :]
        assert google_crc32c.value(index[:-4]) == struct.unpack("<I", index[-4:])[0]
        for offset, size in struct.iter_unpack("<QQ", index[:-4]):
            if offset == 2**64 - 1:  # this chunk is entirely outside the array's shape
                continue
            chunk = file[offset : offset + size]
            if folder.name in FLAT:
                assert google_crc32c.value(chunk[:-4]) == struct.unpack("<I", chunk[-4:])[0]
                chunk = chunk[:-4]
            else:
                chunk = zstd.decompress(chunk)
            assert len(chunk) == chunk_bytes
            data += chunk
    values = np.frombuffer(data, dtype).reshape(-1, *shape[1:])
    assert len(values) >= shape[0]
    return values[: shape[0]]


def read_zarr(stem, place, keys):
    root = stem.with_suffix(".zarr")
    attributes = json.loads((root / "zarr.json").read_text())["attributes"]
    assert attributes == {"scalekd_cache": 2, "group": place[0], "range_id": place[1], "view": place[2]}
    arrays = {path.name: read_array(path) for path in root.iterdir() if path.is_dir()}

    def cut(name, number):
        start, stop = arrays[f"{name}_offsets"][number : number + 2].tolist()
        return arrays[name][start:stop].tobytes()

    for number, key in enumerate(keys):
        target = cut("target", number).decode()
        fields, label, features = json.loads(target), int(arrays["labels"][number]), cut("features", number)
        if not fields["flags"] & LABEL:
            assert label == 0
            label = None
        at = len(features) - fields.get("second_bytes", 0)
        parts = features[:at], features[at:], cut("logits", number)
        check_flags(fields["flags"], label, *parts)
        record = (key, label, view_text(target), fields["digest"], cut("pixels", number), *parts)
        assert record_crc(*record) == arrays["crc32c"][number]
        yield record


# Codecs


def decode(manifest, state, key, label, view, digest, pixels, features, second, logits):
    maps, norms = decode_features(manifest["codec"], state, features) if features else (None, None)
    scores = decode_logits(manifest["logit_codec"], logits)
    pooled = decode_features(manifest["second_codec"], None, second)[0].ravel() if second else None
    return Decoded(key, label, json.loads(view), digest, pixels, maps, norms, scores, pooled)


def decode_features(codec, state, row):
    channels, height, width = codec["shape"]
    tokens = height * width
    assert codec["version"] == (2 if codec["id"] in ("float16", "bfloat16") else 1)
    norms = None
    if codec["id"] == "transform":
        maps, norms = decode_transform(codec, state, row)
        return maps.astype(np.float32), norms
    if codec["id"] != "float32":
        row, tail = row[: -4 * tokens], row[-4 * tokens :]
        norms = np.frombuffer(tail, "<f2").astype(np.float32).reshape(2, height, width)
    if codec["id"] in ("int8", "int4", "fp8"):
        groups = -(-channels // 128)
        means = np.frombuffer(row, "<f2", channels).astype(np.float32)
        scales = np.frombuffer(row, "<f2", tokens * groups, 2 * channels).astype(np.float32).reshape(tokens, groups)
        codes = decode_codes(codec["id"], row[2 * channels + 2 * tokens * groups :])[: tokens * channels]
        values = means + codes.reshape(tokens, channels) * scales[:, np.arange(channels) // 128]
    elif codec["id"] in ("float16", "bfloat16"):
        means, halves = (
            np.frombuffer(row, "<f2", channels).astype(np.float32),
            np.frombuffer(row[2 * channels :], "<u2"),
        )
        wide = halves.view("<f2") if codec["id"] == "float16" else (halves.astype("<u4") << 16).view("<f4")
        values = means + wide.astype(np.float32).reshape(tokens, channels)
    else:
        assert codec["id"] == "float32"
        values = np.frombuffer(row, "<f4").reshape(tokens, channels)
    return values.astype(np.float32).reshape(height, width, channels).transpose(2, 0, 1), norms


def decode_codes(kind, data):
    """The values of int8, int4 and fp8 codes, in units of the scale."""
    if kind == "int8":
        return np.frombuffer(data, np.int8).astype(np.float32)
    codes = np.frombuffer(data, np.uint8)
    if kind == "int4":
        return np.stack([codes & 15, codes >> 4], axis=1).ravel().astype(np.float32) - 8
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7) / np.float32(8)
    size = np.where(exponent > 0, (1 + mantissa) * 2.0 ** (exponent - 7), mantissa * 2.0**-6)
    return np.where(codes & 128, -size, size).astype(np.float32)


def decode_logits(codec, record):
    classes = codec["num_classes"]
    assert codec["version"] == 1
    if codec["id"] == "logits-top-k":
        k = codec["k"]
        values = np.full(classes, -np.inf, np.float32)
        values[np.frombuffer(record, "<u4", k)] = np.frombuffer(record, "<f4", k, 4 * k)
        return values
    if codec["id"] == "logits-recomputed" or classes == 0:
        assert record == b""
        return np.zeros(0, np.float32)
    assert codec["id"] == "logits-int8"
    mode, largest = struct.unpack_from("<Bf", record)
    if mode == 0:
        (step,) = struct.unpack_from("<f", record, 5)
        values = largest - np.float64(step) * np.frombuffer(record, np.uint8, classes, 9)
    elif mode == 1:
        values = largest - np.frombuffer(record, "<f2", classes, 5).astype(np.float64)
    else:
        assert mode == 2
        values = np.frombuffer(record, "<f4", classes, 5)
    return values.astype(np.float32)


def read_cache(root):
    """{view: [Decoded, ...]}."""
    root = Path(root)
    return {view: list(read_view(root, view)) for view in range(read_manifest(root)["num_views"])}
