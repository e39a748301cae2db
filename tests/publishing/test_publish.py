"""Publishing to a folder: the same files, resumed, grown, without pixels; and what is rejected."""

import json
import re
import shutil

import numpy as np
import pytest
from cache_facts import FIELDS
from documented import call
from publications import LICENSES, finish, finished_cache, published
from safetensors.numpy import save_file
from small_cache import reseal
from store_cases import GROUPS, RANGES, backends, fill, flip_byte, open_unit, payload_file, tree

from pipelines import publish as command
from pipelines import verify
from scalekd_cache.api import publish as publish_function
from scalekd_cache.config.base import fingerprint
from scalekd_cache.errors import UserError
from scalekd_cache.publishing import to_folder
from scalekd_cache.publishing.publication import read_publication
from scalekd_cache.store.base import ShardId, shard_reader
from scalekd_cache.store.durable_files import hash_file
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.shared_pixels import pixel_identity
from scalekd_cache.store.sidecar import read_keys, read_unit, unit_folder
from scalekd_cache.store.unit import UnitWriter
from scalekd_cache.store.verify import verify_cache

OWN = {"README.md", "publication.json"}


def stats(root):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in root.rglob("*")}


def fails(cache, to, words, **options):
    before = tree(to) if to.is_dir() else None
    with pytest.raises(UserError, match=words) as caught:
        published(cache, to, **options)
    if before is None:
        assert not any((to / name).exists() for name in ("manifest.json", "publication.json"))
    else:
        assert tree(to) == before
    return str(caught.value)


@backends
def test_the_same_files_and_a_rerun_sends_nothing(caches, backend, tmp_path):
    cache, place = caches[backend], tmp_path / "place"
    facts = published(cache, place)
    assert facts["units"] == facts["units_sent"] == 4
    files = tree(place)
    assert {name: data for name, data in files.items() if name not in OWN} == tree(cache)
    assert facts["bytes"] == facts["bytes_sent"] == sum(map(len, files.values()))
    assert verify_cache(place, deep=True) == []
    before = stats(place)
    again = published(cache, place)
    assert (again["units_sent"], again["bytes_sent"], again["bytes"]) == (0, 0, facts["bytes"])
    assert stats(place) == before


def test_a_publication_grows_with_its_cache(tmp_path):
    cache, place = finished_cache(tmp_path / "cache", "webdataset", GROUPS[:1]), tmp_path / "place"
    published(cache, place)
    old = stats(place / "units")
    finished_cache(cache, "webdataset")
    assert published(cache, place)["units_sent"] == 2
    assert old.items() <= stats(place / "units").items()
    assert read_manifest(place).num_views == 3
    finish(cache, "webdataset", GROUPS[:1])
    assert "contains this cache with more views" in fails(
        cache, place, "publish the copy of this cache that has more views"
    )


@pytest.mark.parametrize("without_pixels", [False, True])
def test_a_cache_that_grows_meanwhile_is_published_as_it_was(tmp_path, monkeypatch, without_pixels):
    cache, place = finished_cache(tmp_path / "cache", "webdataset", GROUPS[:1]), tmp_path / "place"
    before, send_units = tree(cache), to_folder.FolderPlace.send_units

    def growing(*words):
        finished_cache(cache, "webdataset")
        send_units(*words)

    with monkeypatch.context() as patch:
        patch.setattr(to_folder.FolderPlace, "send_units", growing)
        published(cache, place, without_pixels=without_pixels)
    there = tree(place / "original" if without_pixels else place)
    assert {name: there[name] for name in ("plan.json", "manifest.json")}.items() <= before.items()
    facts = read_publication(place).files
    assert all((place / name).stat().st_size == fact.bytes for name, fact in facts.items())
    assert without_pixels or verify_cache(place, deep=True) == []
    assert published(cache, place, without_pixels=without_pixels)["units_sent"] == 2


@pytest.mark.parametrize("kept", range(0, 24, 3))
@pytest.mark.parametrize("without_pixels", [False, True])
def test_a_publication_that_stops_at_any_file_is_no_cache_and_resumes(
    cache, tmp_path, monkeypatch, kept, without_pixels
):
    place, copied, copy = tmp_path / "place", [], to_folder._copy

    def counted(*words):
        if len(copied) == kept:
            raise KeyboardInterrupt
        copied.append(copy(*words))

    monkeypatch.setattr(to_folder, "_copy", counted)
    with pytest.raises(KeyboardInterrupt):
        published(cache, place, without_pixels=without_pixels, connections=1)
    assert not (place / "manifest.json").exists()
    assert not without_pixels or not (place / "publication.json").exists()
    monkeypatch.setattr(to_folder, "_copy", copy)
    published(cache, place, without_pixels=without_pixels)
    whole = tmp_path / "whole"
    published(cache, whole, without_pixels=without_pixels)
    assert tree(place) == tree(whole)


@backends
def test_without_pixels_every_shard_can_be_made_again(caches, backend, tmp_path):
    cache, place = caches[backend], tmp_path / "place"
    facts = published(cache, place, without_pixels=True)
    found = read_publication(place)
    assert (found.pixels, found.cache_folder, facts["pixels"]) == ("left out", "original", "left out")
    assert facts["bytes"] == sum(map(len, tree(place).values()))
    original, whole = place / "original", Cache.open(cache)
    assert read_manifest(original) == whole.manifest
    for row, listed in zip(whole.manifest.units, found.targets, strict=True):
        there, made = unit_folder(place / "targets", *row[:2]), tmp_path / "made"
        info, _ = read_unit(unit_folder(original, *row[:2]))
        stripped, _ = read_unit(there)
        assert (listed[:2], stripped.payload_bytes["pixels"]) == (row[:2], 0)
        assert (stripped.skipped, stripped.fidelity, stripped.versions) == (info.skipped, info.fidelity, info.versions)
        names = ("group", "range_id", "start", "stop", "views", "fingerprint", "versions")
        with UnitWriter(made, backend=backend, **{name: getattr(info, name) for name in names}) as writer:
            for view in info.views:
                reader = shard_reader("webdataset", there, ShardId(*row[:2], view), read_keys(there, stripped))
                pixels = {record.key: record.pixels for record in whole.read(range(40), view)}
                for record in reader.read(np.arange(row.count)):
                    assert not len(record.pixels)
                    writer.append(view, record._replace(pixels=pixels[record.key]))
            writer.commit(info.fidelity)
        assert tree(unit_folder(made, *row[:2])) == tree(unit_folder(cache, *row[:2]))


def test_a_place_without_pixels_is_not_read_as_a_cache(cache, tmp_path):
    place = tmp_path / "place"
    published(cache, place, without_pixels=True)
    with pytest.raises(UserError, match="without pixels") as caught:
        Cache.open(place)
    assert re.search("scalekd pull .* --data", str(caught.value))
    with pytest.raises(UserError, match="without pixels"):
        call(verify, ["--cache", place])
    fails(cache, place, "without pixels")
    published(cache, tmp_path / "whole")
    fails(cache, tmp_path / "whole", "with pixels", without_pixels=True)


def with_tail(root, number):
    """The finished cache with a tail file; all have the same length."""
    save_file({"weight": np.full(4, number, np.float32)}, str(root / "tail.safetensors"))
    return finish(root, "webdataset", GROUPS, tail_sha256=hash_file(root / "tail.safetensors").sha256)


@pytest.mark.parametrize("missing", [None, "publication.json"])
def test_an_old_file_of_the_same_length_is_sent_again(tmp_path, missing):
    """A folder reports no SHA-256; if the publication was finished, publication.json does."""
    cache, place = finished_cache(tmp_path / "cache", "webdataset"), tmp_path / "place"
    published(with_tail(cache, 1), place)
    if missing:
        (place / missing).unlink()
    published(with_tail(cache, 2), place)
    assert (place / "tail.safetensors").read_bytes() == (cache / "tail.safetensors").read_bytes()
    assert verify_cache(place, deep=True) == []
    before = stats(place)
    assert published(cache, place)["bytes_sent"] == 0
    assert stats(place) == before


def test_an_edited_card_is_kept(cache, tmp_path, capsys):
    place = tmp_path / "place"
    published(cache, place)
    card = (place / "README.md").read_bytes() + b"\nMy own words.\n"
    (place / "README.md").write_bytes(card)
    published(cache, place)
    assert (place / "README.md").read_bytes() == card
    assert "was edited, so it was not replaced" in capsys.readouterr().out
    published(cache, place, data_license="mit")
    assert (place / "README.md").read_bytes() == card
    assert read_publication(place).licenses == {"data": "mit", "teacher": "apache-2.0"}


def test_places_that_hold_something_else(cache, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    fails(cache, place, "not empty and does not contain a cache")
    other = tmp_path / "other"
    published(cache, other)
    reseal(other / "plan.json", lambda fields: fields.update(fingerprint="0" * 64))
    fails(cache, other, "a different cache")
    changed = tmp_path / "changed"
    published(cache, changed)

    def change(fields):
        fields["units"][0][3] = "0" * 64

    reseal(changed / "manifest.json", change)
    fails(cache, changed, "different units of this cache")
    broken = tmp_path / "broken"
    published(cache, broken)
    (broken / "plan.json").write_bytes(b"{}")
    fails(cache, broken, "self_sha256")


@pytest.mark.parametrize("layout", ["same", "without_pixels"])
def test_two_publications_to_one_folder(cache, tmp_path, layout):
    place = tmp_path / "place"
    with to_folder.FolderPlace(place, 1).locked():
        fails(cache, place, "another process is publishing to this folder", without_pixels=layout != "same")
    assert not place.exists()
    published(cache, place)
    with to_folder.FolderPlace(place, 1).locked():
        fails(cache, place, "another process is publishing to this folder")
    assert not verify_cache(place)


def test_a_rejected_publication_leaves_no_folder(cache, tmp_path, monkeypatch):
    place = tmp_path / "place"
    monkeypatch.setattr(to_folder.FolderPlace, "send", lambda *_: (_ for _ in ()).throw(UserError("no")))
    fails(cache, place, "no")
    assert not place.exists()


def test_caches_that_are_not_published(cache, tmp_path):
    copy, place = tmp_path / "copy", tmp_path / "place"
    shutil.copytree(cache, copy)
    (copy / "manifest.json").rename(tmp_path / "manifest.json")
    fails(copy, place, "not a finished cache")
    (tmp_path / "manifest.json").rename(copy / "manifest.json")
    (copy / "plan.json").rename(tmp_path / "plan.json")
    fails(copy, place, "plan.json.*\n.*\n.*repair")
    (tmp_path / "plan.json").rename(copy / "plan.json")
    shard = payload_file(copy)
    with shard.open("ab") as file:
        file.write(b"more")
    fails(copy, place, "damaged: nothing was published")
    assert not place.exists()
    shutil.copy(payload_file(cache), shard)
    flip_byte(shard, 5000)  # only its sha256 shows this
    fails(copy, place, "has changed since it was committed")
    fails(copy, tmp_path / "stripped", "checksum", without_pixels=True)


def test_a_foreign_file_in_the_cache_is_not_published(cache, tmp_path):
    copy, place = tmp_path / "copy", tmp_path / "place"
    shutil.copytree(cache, copy)
    (copy / "notes.txt").write_text("mine")
    (copy / "units" / ".tmp-g000-r00000-0-0-0").mkdir()
    published(copy, place)
    assert tree(place).keys() - OWN == tree(cache).keys()


def test_a_place_inside_the_cache(cache, tmp_path):
    fails(cache, cache, "the cache itself")
    fails(cache, cache / "units", "must not contain each other")
    fails(cache, cache.parent, "must not contain each other")
    link = tmp_path / "link"
    link.symlink_to(cache)
    fails(cache, link, "the cache itself")
    for to, words in ((cache, "the cache itself"), (cache / "units", "must not contain each other")):
        with pytest.raises(UserError, match=words):
            published(cache, to.as_uri())


def test_a_file_url_with_an_escaped_name(cache, tmp_path):
    place = tmp_path / "my cache"
    published(cache, place.as_uri())
    assert "%20" in place.as_uri()
    assert (place / "manifest.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["my cache"]


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("s4://bucket/cache", "unsupported URL scheme: use s3://"),
        ("hub://datasets/ann/pets", "unsupported URL scheme: use "),
        ("https://huggingface.co/datasets/ann/pets", "use --to hf://datasets/ann/pets"),
        ("huggingface.co/datasets/ann/pets", "use --to hf://datasets/ann/pets"),
        ("https://host/cache", "unsupported URL scheme: use "),
        ("datasets/ann/pets", "hf://datasets/ann/pets"),
        ("hf://ann/pets", "use hf://datasets/ann/pets"),
        ("hf://models/ann/pets", "use hf://datasets/ann/pets"),
        ("hf://datasets/ann", "use hf://datasets/USER/NAME"),
        ("s3:bucket/cache", "not a complete URL"),
        ("s3:/bucket/cache", "not a complete URL"),
        ("s3://bucket", "not a complete URL"),
        ("s3://", "not a complete URL"),
        ("gs://bucket/../x", "contains //, . or .. in its path"),
        ("s3://bucket/cache*", "a pattern"),
        ("no/such/folder", "neither a URL nor inside an existing folder"),
        ("", "--to is empty"),
    ],
)
def test_places_that_are_mistyped(cache, tmp_path, monkeypatch, to, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        published(cache, to)
    assert len(str(caught.value).splitlines()) <= 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["s3://key:hunter2secret@bucket/c", "hf://hunter2secret@datasets/a/b",
                                "hf://datasets/a/b?token=hunter2secret", "xx://key:hunter2secret@bucket/c",
                                "s3:key:hunter2secret@bucket/c", "gs://u:hunter2secret@b"])  # fmt: skip
def test_a_secret_in_the_url_is_never_printed(cache, to):
    with pytest.raises(UserError) as caught:
        published(cache, to)
    assert "hunter2secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "--data-license and --teacher-license"),
        ({"data_license": "mit"}, "set --teacher-license:"),
        ({"teacher_license": " ", "data_license": "mit"}, "set --teacher-license:"),
        ({"teacher_license": "a\nb", "data_license": "mit"}, "one line"),
    ],
)
def test_licenses_are_asked_for(cache, tmp_path, given, words):
    with pytest.raises(UserError, match=words):
        published(cache, tmp_path / "place", **{**dict.fromkeys(LICENSES, ""), **given})


def test_a_full_disk(cache, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert "free up space" in fails(cache, tmp_path / "place", "the disk is full")
    assert not list((tmp_path / "place").rglob(".tmp-*"))


def test_a_place_that_cannot_be_written(cache, tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(shutil, "copyfile", denied)
    fails(cache, tmp_path / "place", "cannot write to this path")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        published(cache, tmp_path / "file")


def test_shared_pixels_are_never_lost(cache, tmp_path):

    fields = {**FIELDS, "pixels": "shared"}
    reference = {"identity": pixel_identity(FIELDS), "path": "../pixels"}
    other = tmp_path / "caches" / "other"
    shared = finished_shared(other, fields, fingerprint(fields), reference)
    place = tmp_path / "published" / "other"
    place.parent.mkdir()
    assert "publish that cache first" in fails(shared, place, "not published at the expected location")
    fails(shared, place, "remove --without-pixels here", without_pixels=True)
    fails(cache, place, "does not share the pixels of another cache", pixels_from="x")
    pixels = tmp_path / "published" / "pixels"
    published(cache, pixels, without_pixels=True)
    facts = published(shared, place)
    assert read_publication(place).pixels_from == str(pixels) == facts["pixels_from"]
    assert f"--pixels-from {pixels}" in facts["next"][0]
    assert "stored in another cache" in (place / "README.md").read_text()


def finished_shared(root, fields, mark, reference):
    for group in range(len(GROUPS)):
        for range_id in range(len(RANGES)):
            with open_unit(root, "webdataset", group, range_id, fingerprint=mark) as writer:
                fill(writer, replayed=True)
                writer.commit({"cosine": {"mean": 0.5, "p1": 0.25, "count": 10}})
    return finish(root, "webdataset", GROUPS, fingerprint=mark, fingerprint_fields=fields, pixels_from=reference)


def test_command_and_function(cache, tmp_path, capsys):
    words = ["--cache", cache, "--to", tmp_path / "a", "--data-license", "mit", "--teacher-license", "mit", "--json"]
    assert call(command, words) is None
    facts = json.loads(capsys.readouterr().out)
    again = publish_function(cache=cache, to=tmp_path / "b", data_license="mit", teacher_license="mit")
    assert {**again, "to": "", "next": ""} == {**facts, "to": "", "next": ""}
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
