"""The changes to a small cache from which `damaged_cases.py` makes its cases.

In: the folder of a cache, a copy of `tar-plain` or `zarr-plain` in most cases. Out: the same folder, damaged.
Invariant: every length, hash and checksum that a writer computes is computed again (`rehash`), except where a stale
hash is the damage.
"""

import json
import shutil
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zstandard
from damage import rewrite_unit
from image_files import encoded
from PIL import Image
from small_cache import flip_byte, reseal

from scalekd_cache.store.durable_files import canonical_json
from scalekd_cache.views.pixels import pixel_digest

UNIT = "units/g000-r00000"
LABELS = "v0000.zarr/labels/c/0"


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
    digest_units(fields)


def digest_units(fields: dict[str, Any]) -> None:
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


def change_codec(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change a codec in both places and recompute the fingerprint."""

    def changed(cache: Path) -> None:
        reseal(cache / "manifest.json", lambda fields: fields[name].update(changes))
        refingerprint(lambda fields: fields[name].update(changes))(cache)

    return changed


def change_teacher(**changes: Any) -> Callable[[Path], None]:
    """Change the teacher's specification in both places (None: remove a field) and recompute the fingerprint."""

    def update(spec: dict[str, Any]) -> None:
        for name, value in changes.items():
            spec.pop(name) if value is None else spec.update({name: value})

    def changed(cache: Path) -> None:
        reseal(cache / "manifest.json", lambda fields: update(fields["teacher"]["spec"]))
        refingerprint(lambda fields: update(fields["teacher"]))(cache)

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


def cut_keys(cache: Path) -> None:
    file = cache / UNIT / "keys.txt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
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


def flip_index(cache: Path) -> None:
    """A byte of the first chunk's length."""
    file = cache / UNIT / "v0000.zarr" / "features" / "c" / "0"
    flip_byte(file, len(file.read_bytes()) - 12)
    rehash(cache)


def replace_once(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(old, new, 1)


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def one_record(change: Callable[[Any], Any], row: int = 1) -> Callable[[Path], None]:
    """Rewrite the first unit with another record in this row of view 0; every checksum and hash is valid."""

    def changed(cache: Path) -> None:
        key = (cache / UNIT / "keys.txt").read_text().splitlines()[row]
        first = iter([True])
        rewrite_unit(cache, lambda one: change(one) if one.key == key and next(first, False) else one)

    return changed


def patch(part: str, at: int, new: bytes) -> Callable[[Any], Any]:
    """Replace bytes of a part of a record; negative places count from its end."""

    def patched(record: Any) -> Any:
        data = bytearray(getattr(record, part))
        at_byte = at % len(data)
        data[at_byte : at_byte + len(new)] = new
        return record._replace(**{part: bytes(data)})

    return patched


def longer(part: str) -> Callable[[Any], Any]:
    return lambda record: record._replace(**{part: getattr(record, part) + b"\0"})


def with_image(image: Image.Image, pixels: Image.Image | None = None) -> Callable[[Any], Any]:
    """A record with this image as a PNG file and the digest of `pixels`, by default of the image."""
    digest = pixel_digest(np.asarray((pixels or image).convert("RGB")))
    return lambda record: record._replace(pixels=encoded(image), digest=digest)


def replane(change: Callable[[bytes], bytes]) -> Callable[[Any], Any]:
    """Change the plane of a transform record of 4 positions: what its zstd frame holds."""

    def changed(record: Any) -> Any:
        head, frame = record.features[:24], record.features[24:]
        return record._replace(features=head + zstandard.compress(change(zstandard.decompress(frame)), 1))

    return changed


def patch_index(at: int, new: bytes) -> Callable[[Path], None]:
    """Change bytes of v0000.idx outside of its records."""

    def changed(cache: Path) -> None:
        file = cache / UNIT / "v0000.idx"
        data = file.read_bytes()
        file.write_bytes(data[:at] + new + data[at + len(new) :])
        rehash(cache)

    return changed


def repeat_record(cache: Path) -> None:
    """The second row of the index has the JSON of the first record, and begins there."""
    first, second = index_row(cache, 0), index_row(cache, 1)
    packed = struct.pack("<QQQIII", first[0], second[1], second[2], first[3], *second[4:6])
    tar = (cache / UNIT / "v0000.tar").read_bytes()
    key = (cache / UNIT / "keys.txt").read_text().splitlines()[1].encode()
    crc = google_crc32c.value(key + packed + tar[first[0] : second[2] + second[5]])
    patch_index(88, packed + struct.pack("<I", crc))(cache)


def rename_key(new: str) -> Callable[[Path], None]:
    """Another second key in keys.txt and in the checksums of all views; the members of the tars keep their names."""

    def changed(cache: Path) -> None:
        keys = (cache / UNIT / "keys.txt").read_text().splitlines()
        (cache / UNIT / "keys.txt").write_text("".join(f"{key}\n" for key in [keys[0], new, *keys[2:]]))
        for file in (cache / UNIT).glob("*.idx"):
            rows, tar = bytearray(file.read_bytes()), file.with_suffix(".tar").read_bytes()
            start, _, features, _, _, size, _ = struct.unpack_from("<QQQIIII", rows, 88)
            crc = google_crc32c.value(new.encode() + bytes(rows[88:124]) + tar[start : features + size])
            struct.pack_into("<I", rows, 124, crc)
            file.write_bytes(rows)
        rehash(cache)

    return changed


def change_space(cache: Path) -> None:
    with (cache / UNIT / "unit.json").open("a") as file:
        file.write("\n")


def outside_file(cache: Path) -> None:
    """unit.json lists a file of the next unit, with its right hash."""
    file = cache / UNIT / "unit.json"
    unit = json.loads(file.read_bytes())
    unit["files"]["../g000-r00001/keys.txt"] = {}
    file.write_text(json.dumps(unit, indent=1) + "\n")
    rehash(cache)


def change_attributes(**changes: int) -> Callable[[Path], None]:
    """Change the attributes of v0000.zarr."""

    def changed(cache: Path) -> None:
        file = cache / UNIT / "v0000.zarr" / "zarr.json"
        group = json.loads(file.read_bytes())
        file.write_text(json.dumps({**group, "attributes": {**group["attributes"], **changes}}, indent=1))
        rehash(cache)

    return changed


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
