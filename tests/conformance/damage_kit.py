"""The damaged cases of the conformance kit: each is a valid case in which a few files were changed or removed.

In: the folder of the cases, with the valid ones. Out: a folder per damaged case: expected.json and `changed/`, which
holds the changed files only. Invariant: only the named check finds the damage. Every hash and checksum that a careless
writer would have recomputed is recomputed (`rehash`), unless the stale hash is the damage.
"""

import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import zstandard
from damage import rewrite_unit
from image_files import encoded, picture
from small_cache import flip_byte, reseal

from scalekd_cache.store.base import NO_LABEL
from scalekd_cache.store.durable_files import canonical_json

UNIT = "units/g000-r00000"
LABELS = "v0000.zarr/labels/c/0"


class Damage(NamedTuple):
    """One damaged case."""

    base: str
    why: str
    found_by: str
    change: Callable[[Path], object]


def rehash(cache: Path) -> None:
    """Recompute the hashes of the files in every unit.json, then the manifest's hashes of these."""
    for sidecar in sorted(cache.glob("units/*/unit.json")):
        unit = json.loads(sidecar.read_bytes())
        for name in unit["files"]:
            data = (sidecar.parent / name).read_bytes()
            unit["files"][name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
        sidecar.write_text(json.dumps(unit, indent=1) + "\n", encoding="utf-8")
    reseal(cache / "manifest.json", lambda fields: update_units(cache, fields))


def update_units(cache: Path, fields: dict[str, Any]) -> None:
    for row in fields["units"]:
        row[3] = sha256((cache / f"units/g{row[0]:03d}-r{row[1]:05d}/unit.json").read_bytes()).hexdigest()
    fields["units_digest"] = sha256(canonical_json(fields["units"]).encode()).hexdigest()


def manifest(**changes: Any) -> Callable[[Path], None]:
    """Replace fields of the manifest and recompute its self_sha256."""
    return lambda cache: reseal(cache / "manifest.json", lambda fields: fields.update(changes))


def change_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda cache: reseal(cache / "manifest.json", change)


def new_seed(fields: dict[str, Any]) -> None:
    fields["view_recipe"].update(seed=1)


def refingerprint(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change `fingerprint_fields` and recompute the fingerprint, there and in every unit."""

    def changed(cache: Path) -> None:
        def update(fields: dict[str, Any]) -> None:
            change(fields["fingerprint_fields"])
            fields["fingerprint"] = sha256(json.dumps(fields["fingerprint_fields"], **ESCAPED).encode()).hexdigest()
            for sidecar in cache.glob("units/*/unit.json"):
                unit = json.loads(sidecar.read_bytes())
                sidecar.write_text(json.dumps({**unit, "fingerprint": fields["fingerprint"]}, indent=1) + "\n")

        reseal(cache / "manifest.json", update)
        rehash(cache)

    return changed


ESCAPED: dict[str, Any] = {"sort_keys": True, "separators": (",", ":")}


def swap(*names: str) -> Callable[[Path], None]:
    """Swap pairs of files or folders of the first unit, and recompute all hashes."""

    def changed(cache: Path) -> None:
        for first, second in zip(names[::2], names[1::2], strict=True):
            one, other, aside = (cache / UNIT / name for name in (first, second, "aside"))
            one.rename(aside)
            other.rename(one)
            aside.rename(other)
        rehash(cache)

    return changed


def swap_keys(cache: Path) -> None:
    file = cache / UNIT / "keys.txt"
    first, second, *rest = file.read_text().splitlines()
    file.write_text("\n".join([second, first, *rest, ""]))
    rehash(cache)


def cut_tar(cache: Path, *, end: bool = False) -> None:
    """Cut v0000.tar behind its second record, with or without the end-of-archive marker of a tar."""
    _, _, start, _, _, size, _ = index_row(cache, 1)
    file = cache / UNIT / "v0000.tar"
    data = file.read_bytes()[: start + -(-size // 512) * 512]
    file.write_bytes(data + bytes(1024) * end)


def index_row(cache: Path, number: int) -> tuple[int, ...]:
    return struct.unpack_from("<QQQIIII", (cache / UNIT / "v0000.idx").read_bytes(), 48 + 40 * number)


def cut_tar_and_count(cache: Path) -> None:
    """A tar without its last record whose length the index knows."""
    cut_tar(cache, end=True)
    index = cache / UNIT / "v0000.idx"
    data = bytearray(index.read_bytes()[:-40])
    struct.pack_into("<QQ", data, 32, 2, (cache / UNIT / "v0000.tar").stat().st_size)
    index.write_bytes(data)
    rehash(cache)


def flip_feature(cache: Path) -> None:
    flip_byte(cache / UNIT / "v0000.tar", index_row(cache, 1)[2] + 40)


def flip_feature_rehashed(cache: Path) -> None:
    flip_feature(cache)
    rehash(cache)


def flip_tar_header(cache: Path) -> None:
    """A byte of a tar header that no record's checksum covers: the mode of the first member."""
    flip_byte(cache / UNIT / "v0000.tar", 101)


def edit_json(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Change the JSON of the second record of v0000.tar; recompute tar header, index, checksum and hashes."""

    def changed(cache: Path) -> None:
        index, tar = (cache / UNIT / f"v0000.{end}" for end in ("idx", "tar"))
        rows, data = bytearray(index.read_bytes()), bytearray(tar.read_bytes())
        at, pixels, features, size, *sizes, _ = index_row(cache, 1)
        text = bytes(data[at : at + size])
        assert text.count(old) == 1
        text = text.replace(old, new)
        assert -(-len(text) // 512) == -(-size // 512)
        data[at : at + max(size, len(text))] = text.ljust(size, b"\0")
        header = data[at - 512 : at]
        header[124:136] = b"%011o\0" % len(text)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[at - 512 : at] = header
        packed = struct.pack("<QQQIII", at, pixels, features, len(text), *sizes)
        key = (cache / UNIT / "keys.txt").read_text().splitlines()[1].encode()
        crc = google_crc32c.value(key + packed + bytes(data[at : features + sizes[-1]]))
        rows[88:128] = packed + struct.pack("<I", crc)
        index.write_bytes(rows)
        tar.write_bytes(data)
        rehash(cache)

    return changed


def edit_flat(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the only chunk of a flat array of v0000.zarr; recompute the chunk's checksum and the hashes."""

    def changed(cache: Path) -> None:
        file = cache / UNIT / "v0000.zarr" / name / "c" / "0"
        data = file.read_bytes()
        offset, size = struct.unpack_from("<QQ", data, len(data) - 20)
        chunk = change(data[offset : offset + size - 4])
        assert len(chunk) == size - 4
        crc = struct.pack("<I", google_crc32c.value(chunk))
        file.write_bytes(data[:offset] + chunk + crc + data[offset + size :])
        rehash(cache)

    return changed


def replace_once(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(old, new, 1)


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def second_record(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Rewrite the first unit with another second record in view 0; every checksum and hash is valid."""

    def changed(cache: Path) -> None:
        key = (cache / UNIT / "keys.txt").read_text().splitlines()[1]
        first = iter([True])
        rewrite_unit(cache, lambda one: change(one) if one.key == key and next(first, False) else one)

    return changed


def infinite_scale(record: Any) -> Any:
    """The first scale of an int8 row of 16 channels is infinite."""
    row = bytearray(record.features)
    row[32:34] = np.float16(np.inf).tobytes()
    return record._replace(features=bytes(row))


def remove(name: str) -> Callable[[Path], None]:
    def changed(cache: Path) -> None:
        (shutil.rmtree if (cache / name).is_dir() else Path.unlink)(cache / name)

    return changed


def change_unit(**changes: Any) -> Callable[[Path], None]:
    def changed(cache: Path) -> None:
        file = cache / UNIT / "unit.json"
        file.write_text(json.dumps({**json.loads(file.read_bytes()), **changes}, indent=1) + "\n")
        rehash(cache)

    return changed


def swap_labels(cache: Path) -> None:
    """The labels of view 0 in another order; only the records' checksums notice."""
    data = (cache / UNIT / LABELS).read_bytes()
    offset, size = struct.unpack_from("<QQ", data, len(data) - 20)
    labels = np.frombuffer(zstandard.decompress(data[offset : offset + size]), "<i8").copy()
    labels[:2] = labels[1::-1]
    write_labels(cache, labels.tobytes())


def write_labels(cache: Path, values: bytes) -> None:
    """Replace the only chunk of `labels`; recompute its checksum and the hashes."""
    frame = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(values)
    pairs = struct.pack("<QQ", 0, len(frame))
    (cache / UNIT / LABELS).write_bytes(frame + pairs + struct.pack("<I", google_crc32c.value(pairs)))
    rehash(cache)


def long_frame(cache: Path) -> None:
    """The zstd frame of `labels` declares and holds 64 MiB of zeros."""
    write_labels(cache, bytes(2**26))


HASH, CRC, RECORD = "hash of a file in unit.json", "checksum of the record", "rules of a record"
MANIFEST, INDEX = "rules of the manifest", "header of the index"

DAMAGED = {
    "damaged-no-manifest": Damage(
        "tar-plain", "manifest.json is missing: unfinished", MANIFEST, remove("manifest.json")
    ),
    "damaged-self-sha256": Damage(
        "tar-plain",
        "one character of manifest.json differs",
        "self_sha256",
        lambda cache: flip_byte(
            cache / "manifest.json", (cache / "manifest.json").read_bytes().index(b'"recipe": "demo"') + 12
        ),
    ),
    "damaged-format-version": Damage("tar-plain", "format_version is 3", MANIFEST, manifest(format_version=3)),
    "damaged-fingerprint": Damage(
        "tar-plain",
        "fingerprint_fields were changed, fingerprint was not",
        MANIFEST,
        change_manifest(lambda fields: (fields["fingerprint_fields"]["views"].update(seed=1), new_seed(fields))),
    ),
    "damaged-codec-contradiction": Damage(
        "tar-plain",
        "codec differs from its copy in fingerprint_fields",
        MANIFEST,
        change_manifest(lambda fields: fields["codec"].update(shape=[16, 4, 1])),
    ),
    "damaged-view-recipe": Damage(
        "tar-plain",
        "view_recipe differs from its copy in fingerprint_fields",
        MANIFEST,
        change_manifest(new_seed),
    ),
    "damaged-num-samples": Damage(
        "tar-plain", "num_samples is not the sum of count", MANIFEST, manifest(num_samples=4)
    ),
    "damaged-units-digest": Damage("tar-plain", "units_digest differs", MANIFEST, manifest(units_digest="0" * 64)),
    "damaged-features-every": Damage(
        "tar-plain",
        "features_every does not divide the views of a group",
        MANIFEST,
        refingerprint(lambda fields: fields.update(features_every=3)),
    ),
    "damaged-features-of-all-views": Damage(
        "tar-plain",
        "features_every is 2, but all views have features",
        RECORD,
        refingerprint(lambda fields: fields.update(features_every=2)),
    ),
    "damaged-missing-unit": Damage("tar-plain", "a unit is missing", "files of the units", remove("units/g000-r00001")),
    "damaged-missing-shard": Damage("tar-plain", "a shard is missing", HASH, remove(f"{UNIT}/v0001.tar")),
    "damaged-unit-json": Damage(
        "tar-plain",
        "unit.json was replaced by that of the next unit",
        "sha256 of unit.json",
        lambda cache: shutil.copy(cache / "units/g000-r00001/unit.json", cache / UNIT / "unit.json"),
    ),
    "damaged-other-fingerprint": Damage(
        "tar-plain",
        "a unit of another cache: its fingerprint differs",
        "fields of unit.json",
        change_unit(fingerprint="f" * 64),
    ),
    "damaged-truncated-tar": Damage("tar-plain", "a tar was cut between two records", HASH, cut_tar),
    "damaged-lost-record": Damage(
        "tar-plain", "tar and index lack the last record of keys.txt; all hashes match", INDEX, cut_tar_and_count
    ),
    "damaged-swapped-shards": Damage(
        "tar-plain",
        "two views of a unit are swapped; all hashes match",
        INDEX,
        swap("v0000.tar", "v0001.tar", "v0000.idx", "v0001.idx"),
    ),
    "damaged-swapped-tars": Damage(
        "tar-plain", "the tars of two views are swapped, their indices are not", CRC, swap("v0000.tar", "v0001.tar")
    ),
    "damaged-swapped-keys": Damage("tar-plain", "two lines of keys.txt are swapped; all hashes match", CRC, swap_keys),
    "damaged-flipped-byte": Damage("tar-plain", "one byte of the features differs", HASH, flip_feature),
    "damaged-flipped-byte-rehashed": Damage(
        "tar-plain", "one byte of the features differs; all hashes match", CRC, flip_feature_rehashed
    ),
    "damaged-tar-header": Damage("tar-plain", "one byte of the first tar header differs", HASH, flip_tar_header),
    "damaged-unknown-flag": Damage(
        "tar-plain", "a record has flag 16; all checksums match", RECORD, edit_json(b'"flags":7', b'"flags":23')
    ),
    "damaged-absent-part": Damage(
        "tar-plain",
        "a record has flag 8 without the part; all checksums match",
        RECORD,
        edit_json(b'"flags":7', b'"flags":15'),
    ),
    "damaged-no-features": Damage(
        "tar-plain",
        "a record lacks its features; all checksums match",
        RECORD,
        second_record(lambda one: one._replace(features=b"")),
    ),
    "damaged-no-logits": Damage(
        "tar-plain",
        "a record lacks its logits; all checksums match",
        RECORD,
        second_record(lambda one: one._replace(logits=b"")),
    ),
    "damaged-no-label": Damage(
        "tar-plain",
        "a record lacks its label; all checksums match",
        RECORD,
        second_record(lambda one: one._replace(label=NO_LABEL)),
    ),
    "damaged-view-number": Damage(
        "tar-plain",
        "a record holds the parameters of another view; all checksums match",
        RECORD,
        second_record(lambda one: one._replace(view=one.view.replace('"number":0', '"number":1'))),
    ),
    "damaged-label": Damage(
        "tar-plain",
        "a label is beyond class_names; all checksums match",
        RECORD,
        second_record(lambda one: one._replace(label=3)),
    ),
    "damaged-long-row": Damage(
        "tar-plain",
        "the features have one byte too many; all checksums match",
        "length of a row of the codec",
        second_record(lambda one: one._replace(features=one.features + b"\0")),
    ),
    "damaged-infinite": Damage(
        "tar-plain", "a scale is infinite; all checksums match", "decoded values", second_record(infinite_scale)
    ),
    "damaged-pixel-size": Damage(
        "tar-plain",
        "the image of a record has another size than the recipe; all checksums match",
        "header of the image",
        second_record(lambda one: one._replace(pixels=encoded(picture(size=(16, 16))))),
    ),
    "damaged-pixel-digest": Damage(
        "tar-plain",
        "the image of a record has other pixels than its digest; all checksums match",
        "digest of the decoded pixels",
        second_record(lambda one: one._replace(pixels=encoded(picture(size=(32, 32)).quantize(4).convert("RGB")))),
    ),
    "damaged-tail": Damage(
        "tar-float32",
        "one byte of tail.safetensors differs",
        "tail_sha256",
        lambda cache: flip_byte(cache / "tail.safetensors", 5000),
    ),
    "damaged-classifier": Damage(
        "tar-recomputed",
        "one byte of classifier.safetensors differs",
        "sha256 of logit_codec",
        lambda cache: flip_byte(cache / "classifier.safetensors", -2),
    ),
    "damaged-codec-state": Damage(
        "tar-transform",
        "one byte of codec.safetensors differs",
        "state_sha256",
        lambda cache: flip_byte(cache / "codec.safetensors", -2),
    ),
    "damaged-shared-identity": Damage(
        "tar-shared-pixels",
        "pixels_from.identity names another cache",
        "identity of the shared pixels",
        change_manifest(lambda fields: fields["pixels_from"].update(identity="0" * 64)),
    ),
    "damaged-shared-record": Damage(
        "tar-shared-pixels",
        "a record has another digest than in the cache that holds its pixels",
        "comparison with the shared record",
        second_record(lambda one: one._replace(digest="0" * 16)),
    ),
    "damaged-zarr-missing-chunk": Damage(
        "zarr-plain", "a shard file of an array is missing", HASH, remove(f"{UNIT}/v0000.zarr/features/c/0")
    ),
    "damaged-zarr-swapped-shards": Damage(
        "zarr-plain",
        "two views of a unit are swapped; all hashes match",
        "attributes of the group",
        swap("v0000.zarr", "v0001.zarr"),
    ),
    "damaged-zarr-flipped-byte": Damage(
        "zarr-plain",
        "one byte of the features differs; all other checksums match",
        CRC,
        edit_flat("features", flip(40)),
    ),
    "damaged-zarr-flag": Damage(
        "zarr-plain",
        "the flags of a record lack its features; all checksums match",
        RECORD,
        edit_flat("target", replace_once(b'"flags":7', b'"flags":5')),
    ),
    "damaged-zarr-labels": Damage("zarr-plain", "the labels are in another order; all hashes match", CRC, swap_labels),
    "damaged-zarr-long-frame": Damage(
        "zarr-plain", "a zstd frame declares 64 MiB; all hashes match", "size that the frame declares", long_frame
    ),
}


def write_damaged(name: str, root: Path) -> None:
    """Write a damaged case to root/name."""
    damage, place = DAMAGED[name], root / name
    base = root / damage.base / "cache"
    shutil.rmtree(place, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temp:
        if damage.base == "tar-shared-pixels":  # its path to the other cache
            shutil.copytree(root / "tar-int8", Path(temp) / "tar-int8")
        cache = Path(temp) / name / "cache"
        shutil.copytree(base, cache)
        damage.change(cache)
        before, after = files_of(base), files_of(cache)
        for file in sorted(after):
            if after[file] != before.get(file):
                (place / "changed" / file).parent.mkdir(parents=True, exist_ok=True)
                (place / "changed" / file).write_bytes(after[file])
    facts = {"about": damage.why, "accept": False, "found_by": damage.found_by, "base": damage.base}
    place.mkdir(exist_ok=True)
    text = json.dumps({**facts, "removed": sorted(before.keys() - after.keys())}, indent=1)
    (place / "expected.json").write_text(text + "\n", encoding="utf-8")


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
