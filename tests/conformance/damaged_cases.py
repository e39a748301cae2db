"""The damaged cases of the conformance kit: each is a valid case in which a few files were changed or removed.

In: the folder of the cases, with the valid ones. Out: a folder per damaged case: expected.json and `changed/`, which
holds the changed files only. Invariant: only the named check finds the damage.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import damage_kit as to
import numpy as np
from image_files import picture
from small_cache import flip_byte

from scalekd_cache.store.base import NO_LABEL


class Damage(NamedTuple):
    """One damaged case."""

    base: str
    why: str
    found_by: str
    change: Callable[[Path], object]


HASH, CRC, RECORD = "hash of a file in unit.json", "checksum of the record", "rules of a record"
MANIFEST, SIDECAR, INDEX = "rules of the manifest", "fields of unit.json", "header of the index"

DAMAGED = {
    "damaged-no-manifest": Damage(
        "tar-plain", "manifest.json is missing: unfinished", MANIFEST, to.remove("manifest.json")
    ),
    "damaged-self-sha256": Damage(
        "tar-plain",
        "one character of manifest.json differs",
        "self_sha256",
        lambda cache: flip_byte(
            cache / "manifest.json", (cache / "manifest.json").read_bytes().index(b'"recipe": "demo"') + 12
        ),
    ),
    "damaged-format-version": Damage("tar-plain", "format_version is 3", MANIFEST, to.manifest(format_version=3)),
    "damaged-fingerprint": Damage(
        "tar-plain",
        "fingerprint_fields were changed, fingerprint was not",
        MANIFEST,
        to.change_manifest(lambda fields: (fields["fingerprint_fields"]["views"].update(seed=1), to.new_seed(fields))),
    ),
    "damaged-codec-contradiction": Damage(
        "tar-plain",
        "codec differs from its copy in fingerprint_fields",
        MANIFEST,
        to.change_manifest(lambda fields: fields["codec"].update(shape=[16, 4, 1])),
    ),
    "damaged-view-recipe": Damage(
        "tar-plain",
        "view_recipe differs from its copy in fingerprint_fields",
        MANIFEST,
        to.change_manifest(to.new_seed),
    ),
    "damaged-teacher": Damage(
        "tar-plain",
        "teacher.spec differs from its copy in fingerprint_fields",
        MANIFEST,
        to.change_manifest(lambda fields: fields["teacher"]["spec"].update(name="other")),
    ),
    "damaged-data": Damage(
        "tar-plain",
        "data differs from its copy in fingerprint_fields",
        MANIFEST,
        to.change_manifest(lambda fields: fields["data"].update(samples=6)),
    ),
    "damaged-class-names": Damage(
        "tar-plain", "two class names are swapped", MANIFEST, to.manifest(class_names=["bee", "ant", "cat"])
    ),
    "damaged-feature-shape": Damage(
        "tar-plain",
        "the codec has another shape than the teacher's maps",
        MANIFEST,
        to.change_codec("codec", shape=[16, 4, 1]),
    ),
    "damaged-num-classes": Damage(
        "tar-top-k",
        "the logits have more classes than the teacher",
        MANIFEST,
        to.change_codec("logit_codec", num_classes=4),
    ),
    "damaged-unknown-codec": Damage("tar-plain", "an unknown codec", MANIFEST, to.change_codec("codec", id="int9")),
    "damaged-codec-version": Damage("tar-plain", "int8 of version 2", MANIFEST, to.change_codec("codec", version=2)),
    "damaged-pixels-from": Damage("tar-shared-pixels", "pixels_from is empty", MANIFEST, to.manifest(pixels_from={})),
    "damaged-num-views": Damage(
        "tar-plain", "num_views is less than the views of groups", MANIFEST, to.manifest(num_views=1)
    ),
    "damaged-unit-order": Damage(
        "tar-plain",
        "the rows of units are not sorted; units_digest matches",
        MANIFEST,
        to.change_manifest(lambda fields: (fields["units"].reverse(), to.digest_units(fields))),
    ),
    "damaged-unit-count": Damage("tar-plain", "unit.json has another count", SIDECAR, to.change_unit(count=2)),
    "damaged-unit-stop": Damage(
        "tar-plain", "unit.json: count is not stop - start - skipped", SIDECAR, to.change_unit(stop=4)
    ),
    "damaged-unit-views": Damage(
        "tar-plain", "unit.json lists other views than the group", SIDECAR, to.change_unit(views=[0])
    ),
    "damaged-unit-backend": Damage(
        "tar-plain", "unit.json names the other store", SIDECAR, to.change_unit(backend="zarr")
    ),
    "damaged-keys": Damage(
        "tar-plain", "keys.txt lacks its last line; all hashes match", "lines of keys.txt", to.cut_keys
    ),
    "damaged-num-samples": Damage(
        "tar-plain", "num_samples is not the sum of count", MANIFEST, to.manifest(num_samples=4)
    ),
    "damaged-units-digest": Damage("tar-plain", "units_digest differs", MANIFEST, to.manifest(units_digest="0" * 64)),
    "damaged-features-every": Damage(
        "tar-plain",
        "features_every does not divide the views of a group",
        MANIFEST,
        to.refingerprint(lambda fields: fields.update(features_every=3)),
    ),
    "damaged-features-of-all-views": Damage(
        "tar-plain",
        "features_every is 2, but all views have features",
        RECORD,
        to.refingerprint(lambda fields: fields.update(features_every=2)),
    ),
    "damaged-missing-unit": Damage(
        "tar-plain", "a unit is missing", "files of the units", to.remove("units/g000-r00001")
    ),
    "damaged-missing-shard": Damage("tar-plain", "a shard is missing", HASH, to.remove(f"{to.UNIT}/v0001.tar")),
    "damaged-unit-json": Damage(
        "tar-plain",
        "unit.json was replaced by that of the next unit",
        "sha256 of unit.json",
        lambda cache: shutil.copy(cache / "units/g000-r00001/unit.json", cache / to.UNIT / "unit.json"),
    ),
    "damaged-other-fingerprint": Damage(
        "tar-plain",
        "a unit of another cache: its fingerprint differs",
        SIDECAR,
        to.change_unit(fingerprint="f" * 64),
    ),
    "damaged-truncated-tar": Damage("tar-plain", "a tar was cut between two records", HASH, to.cut_tar),
    "damaged-lost-record": Damage(
        "tar-plain", "tar and index lack the last record of keys.txt; all hashes match", INDEX, to.cut_tar_and_count
    ),
    "damaged-swapped-shards": Damage(
        "tar-plain",
        "two views of a unit are swapped; all hashes match",
        INDEX,
        to.swap("v0000.tar", "v0001.tar", "v0000.idx", "v0001.idx"),
    ),
    "damaged-swapped-tars": Damage(
        "tar-plain", "the tars of two views are swapped, their indices are not", CRC, to.swap("v0000.tar", "v0001.tar")
    ),
    "damaged-swapped-keys": Damage(
        "tar-plain", "two lines of keys.txt are swapped; all hashes match", CRC, to.swap_keys
    ),
    "damaged-flipped-byte": Damage("tar-plain", "one byte of the features differs", HASH, to.flip_feature),
    "damaged-flipped-byte-rehashed": Damage(
        "tar-plain", "one byte of the features differs; all hashes match", CRC, to.flip_feature_rehashed
    ),
    "damaged-tar-header": Damage("tar-plain", "one byte of the first tar header differs", HASH, to.flip_tar_header),
    "damaged-unknown-flag": Damage(
        "tar-plain", "a record has flag 16; all checksums match", RECORD, to.edit_json(b'"flags":7', b'"flags":23')
    ),
    "damaged-absent-part": Damage(
        "tar-plain",
        "a record has flag 8 without the part; all checksums match",
        RECORD,
        to.edit_json(b'"flags":7', b'"flags":15'),
    ),
    "damaged-no-features": Damage(
        "tar-plain",
        "a record lacks its features; all checksums match",
        RECORD,
        to.one_record(lambda one: one._replace(features=b"")),
    ),
    "damaged-no-logits": Damage(
        "tar-plain",
        "a record lacks its logits; all checksums match",
        RECORD,
        to.one_record(lambda one: one._replace(logits=b"")),
    ),
    "damaged-no-label": Damage(
        "tar-plain",
        "a record lacks its label; all checksums match",
        RECORD,
        to.one_record(lambda one: one._replace(label=NO_LABEL)),
    ),
    "damaged-view-number": Damage(
        "tar-plain",
        "a record holds the parameters of another view; all checksums match",
        RECORD,
        to.one_record(lambda one: one._replace(view=one.view.replace('"number":0', '"number":1'))),
    ),
    "damaged-label": Damage(
        "tar-plain",
        "a label is beyond class_names; all checksums match",
        RECORD,
        to.one_record(lambda one: one._replace(label=3)),
    ),
    "damaged-long-row": Damage(
        "tar-plain",
        "the features have one byte too many; all checksums match",
        "length of a row of the codec",
        to.one_record(to.longer("features")),
    ),
    "damaged-infinite": Damage(
        "tar-plain",
        "a scale is infinite; all checksums match",
        "decoded values",
        to.one_record(to.patch("features", 32, np.float16(np.inf).tobytes())),
    ),
    "damaged-pixel-size": Damage(
        "tar-plain",
        "the image of a record has another size than the recipe; all checksums match",
        "header of the image",
        to.one_record(to.with_image(picture(size=(16, 16)))),
    ),
    "damaged-pixel-digest": Damage(
        "tar-plain",
        "the image of a record has other pixels than its digest; all checksums match",
        "digest of the decoded pixels",
        to.one_record(to.with_image(picture(size=(32, 32)), picture(1, size=(32, 32)))),
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
    "damaged-held-out": Damage(
        "tar-unlabeled",
        "one byte of heldout.safetensors differs",
        "held_out_sha256",
        lambda cache: flip_byte(cache / "heldout.safetensors", -2),
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
        to.change_manifest(lambda fields: fields["pixels_from"].update(identity="0" * 64)),
    ),
    "damaged-shared-record": Damage(
        "tar-shared-pixels",
        "a record has another digest than in the cache that holds its pixels",
        "comparison with the shared record",
        to.one_record(lambda one: one._replace(digest="0" * 16)),
    ),
    "damaged-zarr-missing-chunk": Damage(
        "zarr-plain", "a shard file of an array is missing", HASH, to.remove(f"{to.UNIT}/v0000.zarr/features/c/0")
    ),
    "damaged-zarr-swapped-shards": Damage(
        "zarr-plain",
        "two views of a unit are swapped; all hashes match",
        "attributes of the group",
        to.swap("v0000.zarr", "v0001.zarr"),
    ),
    "damaged-zarr-flipped-byte": Damage(
        "zarr-plain",
        "one byte of the features differs; all other checksums match",
        CRC,
        to.edit_flat("features", to.flip(40)),
    ),
    "damaged-zarr-index": Damage(
        "zarr-plain",
        "one byte of the index of a shard file differs; all hashes match",
        "checksum of the index",
        to.flip_index,
    ),
    "damaged-zarr-flag": Damage(
        "zarr-plain",
        "the flags of a record lack its features; all checksums match",
        RECORD,
        to.edit_flat("target", to.replace_once(b'"flags":7', b'"flags":5')),
    ),
    "damaged-zarr-labels": Damage(
        "zarr-plain", "the labels are in another order; all hashes match", CRC, to.swap_labels
    ),
    "damaged-zarr-long-frame": Damage(
        "zarr-plain", "a zstd frame declares 64 MiB; all hashes match", "size that the frame declares", to.long_frame
    ),
    "damaged-unit-json-space": Damage(
        "tar-plain", "one more line break in unit.json", "sha256 of unit.json", to.change_space
    ),
    "damaged-outside-file": Damage("tar-plain", "unit.json lists a file of another unit", SIDECAR, to.outside_file),
    "damaged-key": Damage(
        "tar-plain", "a key contains `..`; all checksums match", "form of a key", to.rename_key("../5")
    ),
    "damaged-other-images": Damage(
        "tar-grown",
        "an image of group 0 is not in group 1; all checksums match",
        "keys of the groups",
        to.rename_key("cat/9"),
    ),
    "damaged-pooled": Damage(
        "tar-unlabeled",
        "second_codec without pooled embeddings of the teacher",
        MANIFEST,
        to.change_teacher(pooled=None),
    ),
    "damaged-features-every-1": Damage(
        "tar-plain", "features_every is 1", MANIFEST, to.refingerprint(lambda fields: fields.update(features_every=1))
    ),
    "damaged-logits-version": Damage(
        "tar-plain", "an unknown version of the logits", MANIFEST, to.change_codec("logit_codec", version=2)
    ),
    "damaged-index-magic": Damage("tar-plain", "the index has another name", INDEX, to.patch_index(0, b"SKDCIDX3")),
    "damaged-index-range": Damage("tar-plain", "the index of another range", INDEX, to.patch_index(20, b"\1")),
    "damaged-index-count": Damage("tar-plain", "the index counts one record more", INDEX, to.patch_index(32, b"\4")),
    "damaged-index-bytes": Damage(
        "tar-plain", "the index has another length of the tar", INDEX, to.patch_index(40, b"\1")
    ),
    "damaged-index-overlap": Damage(
        "tar-plain",
        "two records share a JSON member; all checksums match",
        "order of the members in the index",
        to.repeat_record,
    ),
    "damaged-no-pixels": Damage(
        "tar-plain",
        "a record lacks its image; all checksums match",
        RECORD,
        to.one_record(lambda one: one._replace(pixels=b"")),
    ),
    "damaged-no-second": Damage(
        "tar-unlabeled",
        "a record lacks its pooled embedding; all checksums match",
        RECORD,
        to.one_record(lambda one: one._replace(second=b"")),
    ),
    "damaged-pixel-mode": Damage(
        "tar-plain",
        "the image of a record has an alpha channel; all checksums match",
        "header of the image",
        to.one_record(to.with_image(picture(size=(32, 32)).convert("RGBA"))),
    ),
    "damaged-long-logits": Damage(
        "tar-plain",
        "the logits have one byte too many; all checksums match",
        "length of the logits",
        to.one_record(to.longer("logits")),
    ),
    "damaged-logit-mode": Damage(
        "tar-plain",
        "an unknown mode of logits; all checksums match",
        "mode of the logits",
        to.one_record(to.patch("logits", 0, b"\3")),
    ),
    "damaged-infinite-logits": Damage(
        "tar-plain",
        "the largest logit is infinite; all checksums match",
        "decoded values",
        to.one_record(to.patch("logits", 1, np.float32(np.inf).tobytes())),
    ),
    "damaged-top-k-class": Damage(
        "tar-top-k",
        "a class number is beyond num_classes; all checksums match",
        "class numbers of the logits",
        to.one_record(to.patch("logits", 0, b"\7")),
    ),
    "damaged-transform-plane": Damage(
        "tar-transform",
        "the plane of a record has one byte too many; all checksums match",
        "size that the frame declares",
        to.one_record(to.replane(lambda plane: plane + b"\0")),
    ),
    "damaged-infinite-halves": Damage(
        "tar-bfloat16",
        "a distance of logits in 16 bits is infinite; all checksums match",
        "decoded values",
        to.one_record(to.patch("logits", -2, np.float16(np.inf).tobytes()), row=0),
    ),
    "damaged-zarr-range": Damage(
        "zarr-plain", "the attributes name another range", "attributes of the group", to.change_attributes(range_id=1)
    ),
    "damaged-zarr-label": Damage(
        "zarr-unlabeled",
        "labels of a cache without labels are not 0",
        RECORD,
        lambda cache: to.write_labels(cache, np.arange(5, dtype="<i8").tobytes()),
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
