"""Checks, repair and inspection of a cache that shares another cache's pixels, and of caches behind a URL."""

import json
import shutil

import numpy as np
import pytest
from damage import rewrite_unit
from documented import call
from servers import faulty_server
from small_cache import CPU, copy_of_cache, flip_byte, make, shared_weights, tree

from pipelines import inspect_cache, verify
from scalekd_cache.audit.repair import repair_cache
from scalekd_cache.audit.verify_cache import verify_deep
from scalekd_cache.config.base import from_plain
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.errors import UserError
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.plan import read_plan
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.verify import bad_units
from scalekd_cache.store.verify_unit import Part
from scalekd_cache.views.pixels import decode_pixels, encode_pixels, pixel_digest

UNIT = "units/g000-r00001"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The small cache, and a float16 cache that shares its pixels; tests must not change them."""
    folder = tmp_path_factory.mktemp("made")
    first = copy_of_cache(folder / "first")
    make(folder / "second", shared_weights(), cache={"codec": "float16", "pixels_from": str(first)})
    return folder


@pytest.fixture
def pair(made, tmp_path):
    """Private copies (first, second) that a test may change."""
    shutil.copytree(made, tmp_path / "pair")
    return tmp_path / "pair" / "first", tmp_path / "pair" / "second"


def flip_in_pixels(root, position=40, view=1):
    """Damage a record's pixels; returns its key."""
    record = Cache.open(root).read([position], view)[0]
    tar = root / UNIT / f"v{view:04d}.tar"
    flip_byte(tar, tar.read_bytes().index(record.pixels) + 5)
    return record.key


def darker(root):
    """Another image under the same view record: consistent, but not what the teacher of the sharing cache saw."""
    config = ViewConfig(**from_plain(read_manifest(root).facts.view_recipe))

    def change(record):
        encoded = encode_pixels(decode_pixels(record.pixels, config.size) // 2, config)
        return record._replace(pixels=encoded, digest=pixel_digest(decode_pixels(encoded, config.size)))

    return change


def test_a_whole_pair_is_whole(made):
    report = verify_deep(made / "second", records=12)
    assert report.findings.problems == report.findings.notes == []
    assert (report.agreement.records, report.agreement.top1_percent) == (12, 100)


def test_damage_of_the_other_cache_is_not_this_ones(pair):
    first, second = pair
    key, before = flip_in_pixels(first), tree(second)
    problems = verify_deep(second, records=0).findings.problems
    assert [(problem.key, problem.part, problem.where) for problem in problems] == [(key, Part.PIXELS, f"{UNIT}/v0001")]
    done = repair_cache(second, CPU)
    assert (done.units, [problem.part for problem in done.left]) == ([], [Part.PIXELS])
    assert tree(second) == before
    assert repair_cache(first, CPU).units == [(0, 1)]
    assert verify_deep(second, records=0).findings.problems == []


@pytest.mark.parametrize("field", ["pixels", "label", "view"])
def test_targets_of_other_pixels_labels_or_views_are_found_and_made_again(pair, field):
    first, second = pair
    shift = {
        "pixels": darker(first),
        "label": lambda record: record._replace(label=(record.label + 1) % 10),
        "view": lambda record: record._replace(view=json.dumps({**json.loads(record.view), "flip": True})),
    }[field]
    key = Cache.open(first).read([33], 0)[0].key
    rewrite_unit(first, lambda record: shift(record) if record.key == key else record, 1)
    problems = verify_deep(second, records=0).findings.problems
    assert {(problem.key, problem.part) for problem in problems} == {(key, Part.UNIT)}
    assert {problem.where for problem in problems} == {f"{UNIT}/v0000", f"{UNIT}/v0001"}
    assert all(("digest" if field == "pixels" else field) in problem.what for problem in problems)
    done = repair_cache(second, CPU)
    assert (done.units, done.left) == ([(0, 1)], [])


def test_a_repaired_sharing_cache_is_the_original(pair):
    _, second = pair
    original = tree(second)
    flip_byte(second / UNIT / "v0001.tar", 5000)
    (second / "manifest.json").unlink()
    flip_byte(second / "tail.safetensors", -100)
    assert repair_cache(second, CPU)[1:] == ([(0, 1)], [])
    assert tree(second) == original


def test_pixels_that_are_elsewhere(pair, tmp_path):
    first, second = pair
    moved = first.rename(tmp_path / "moved")
    report = verify_deep(second, records=4)
    assert report.findings.problems == []
    assert report.agreement is None
    assert "shared pixels were not checked" in report.findings.notes[0]
    findings = verify_deep(second, pixels_from=str(moved), records=4).findings
    assert findings.problems == findings.notes == []
    flip_byte(second / UNIT / "v0001.tar", 5000)
    before = tree(second)
    with pytest.raises(UserError, match="--pixels-from"):
        repair_cache(second, CPU)
    with pytest.raises(UserError, match=r"local copy[\s\S]*scalekd pull"):
        repair_cache(second, CPU, pixels_from="https://host/first")
    assert tree(second) == before
    done = repair_cache(second, CPU, pixels_from=str(moved))
    assert (done.units, done.left) == ([(0, 1)], [])
    assert read_manifest(second).facts.pixels_from["path"] == "../../moved"
    assert read_plan(second).facts.pixels_from == read_manifest(second).facts.pixels_from


def test_another_cache_in_the_place_of_the_pixels(pair, tmp_path):
    first, second = pair
    shutil.rmtree(first)
    make(first, shared_weights(), views={"seed": 5}, cache={"num_views": 1})
    problems = verify_deep(second, records=0).findings.problems
    assert [(problem.part, problem.where) for problem in problems] == [(Part.PIXELS, "manifest.json")]
    assert "different dataset or view recipe" in problems[0].what
    assert bad_units(problems) == []
    with pytest.raises(UserError, match="different dataset or view recipe"):
        verify_deep(second, pixels_from=str(first))
    with pytest.raises(UserError, match="does not share the pixels"):
        verify_deep(first, pixels_from=str(second))


def test_an_unfinished_sharing_cache(pair):
    _, second = pair
    (second / "manifest.json").unlink()
    findings = verify_deep(second).findings
    assert [problem.part for problem in findings.problems] == [Part.UNFINISHED]
    assert "shared pixels were not checked" in findings.notes[0]


def test_inspecting_shared_pixels(pair, tmp_path, capsys):
    first, second = pair
    words = ["--cache", str(second), "--index", "40", "--view", "1", "--json"]
    call(inspect_cache, [*words, "--out", str(tmp_path / "view.jpg")])
    facts = json.loads(capsys.readouterr().out)
    assert facts["digest_ok"] is True
    assert facts["bytes"]["pixels"] == 0
    assert (tmp_path / "view.jpg").read_bytes() == Cache.open(first).read([40], 1)[0].pixels
    first.rename(tmp_path / "moved")
    call(inspect_cache, words)
    assert json.loads(capsys.readouterr().out)["digest_ok"] is None
    with pytest.raises(UserError, match="--pixels-from"):
        call(inspect_cache, [*words, "--out", str(tmp_path / "view.jpg")])
    call(inspect_cache, [*words, "--pixels_from", str(tmp_path / "moved")])
    assert json.loads(capsys.readouterr().out)["digest_ok"] is True


def checked(capsys, *words):
    status = call(verify, ["--json", *words])
    return status, json.loads(capsys.readouterr().out)


def test_verify_at_a_url(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SCALEKD_CACHE_DIR", str(tmp_path))
    deep = ["--deep", "--records", "4", "--pixels_from", str(made / "first")]
    with faulty_server(made / "second") as server:
        status, report = checked(capsys, "--cache", server.url)
        assert (status, report["whole"], report["units"], report["cache"]) == (0, True, 3, server.url)
        assert np.isfinite(report["fidelity"]["cosine"]["mean"])
        assert report["notes"] == ["a remote folder cannot be listed, so unknown files were not searched for"]
        assert checked(capsys, "--cache", server.url, "--deep")[1]["teacher"] is None
        status, report = checked(capsys, "--cache", server.url, *deep)
        assert (status, report["teacher"]["records"], len(report["notes"])) == (0, 4, 1)
        server.fail(f"{UNIT.removeprefix('units/')}/v0001.tar", 404)
        status, report = checked(capsys, "--cache", server.url, *deep)
        assert status == 1
        assert {problem["where"] for problem in report["problems"]} == {f"{UNIT}/v0001.tar", f"{UNIT}/v0001"}
        server.fail("manifest.json", 404)
        assert checked(capsys, "--cache", server.url)[1]["problems"][0]["where"] == "manifest.json"
