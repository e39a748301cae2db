"""The conformance kit: our reader agrees with it, it is reproducible, and it covers every form of a cache."""

import json
import shutil

import numpy as np
import pytest
from damaged_cases import DAMAGED
from make_kit import VALID, make_case, read_lines
from run_kit import CASES, case_names, compare, expected_of, place_case

from scalekd_cache.audit.verify_cache import verify_deep
from scalekd_cache.codec import CODECS
from scalekd_cache.devices import library_versions
from scalekd_cache.errors import UserError
from scalekd_cache.store.base import BACKENDS
from scalekd_cache.store.reader import Cache

VALUES = ("features", "norms", "logits", "second")


def manifest_of(name):
    return json.loads((CASES / name / "cache" / "manifest.json").read_bytes())


def test_the_folder_holds_the_cases_of_the_scripts_and_is_small():
    """About 0.3 MB in git, where equal and similar files share their bytes."""
    assert case_names() == sorted([*VALID, *DAMAGED])
    assert sum(file.stat().st_size for file in CASES.rglob("*") if file.is_file()) < 2_500_000


def test_every_form_of_a_cache_is_there():
    manifests = [manifest_of(name) for name in VALID]
    assert {(one["backend"], bool(one["class_names"])) for one in manifests} == {
        (backend, labeled) for backend in BACKENDS for labeled in (False, True)
    }
    assert {one["codec"]["id"] for one in manifests} == {*CODECS, "transform"}
    logits = {(one["logit_codec"]["id"], one["logit_codec"]["num_classes"] > 0) for one in manifests}
    assert logits == {*((f"logits-{form}", True) for form in ("int8", "top-k", "recomputed")), ("logits-int8", False)}
    formats = {one["view_recipe"]["pixel_format"] for one in manifests if one["view_recipe"]["pixels"] == "baked"}
    assert formats == {"jpeg", "jpeg-optimized", "webp", "png"}
    assert {one["fingerprint_fields"].get("features_every") for one in manifests} == {None, 2}
    assert {bool(one["pixels_from"]) for one in manifests} == {False, True}
    assert {len(one["groups"]) for one in manifests} == {1, 2}


@pytest.mark.parametrize("name", VALID)
def test_our_reader_gives_the_expected_values(name):
    cache = CASES / name / "cache"
    assert compare(expected_of(name), read_lines(cache)) == ""
    assert verify_deep(cache, records=0).findings.problems == []


@pytest.mark.parametrize("name", DAMAGED)
def test_our_check_rejects_what_is_damaged(name, tmp_path):
    cache = place_case(name, tmp_path)
    with pytest.raises((UserError, AssertionError)):  # noqa: PT012
        Cache.open(cache)
        assert verify_deep(cache, records=0).findings.problems == []


def test_a_wrong_reader_fails():
    """The comparison of `run_kit.py` notices every field, and a value that differs in its last bit."""
    facts, lines = expected_of("tar-unlabeled"), read_lines(CASES / "tar-unlabeled" / "cache")
    for field, value in lines[3].items():
        last = f"{int(value[-1], 16) ^ 1:x}" if field in VALUES and value else ""
        wrong = {**lines[3], field: value[:-1] + last if last else "0"}
        assert f"record 2 (key {lines[3]['key']!r}): {field}" in compare(facts, [*lines[:3], wrong, *lines[4:]])
    assert "9 records, expected 10" in compare(facts, lines[:-1])
    assert "num_views" in compare(facts, [{**lines[0], "num_views": 3}, *lines[1:]])


@pytest.mark.parametrize(
    "name", ["tar-int8", *(pytest.param(name, marks=pytest.mark.slow) for name in VALID if name != "tar-int8")]
)
def test_made_again_it_is_the_same(name, tmp_path):
    """Pixels and records are equal; values of the teacher may differ in their last bits on another processor."""
    if manifest_of(name)["versions"] != library_versions():
        pytest.skip("the kit was made with other library versions")
    if pixels_of := VALID[name].pixels_of:
        shutil.copytree(CASES / pixels_of, tmp_path / pixels_of)
    make_case(name, tmp_path)
    again, facts = json.loads((tmp_path / name / "expected.json").read_bytes()), expected_of(name)
    for view, other in zip(again.pop("records"), facts.pop("records"), strict=True):
        for record, wanted in zip(view, other, strict=True):
            for part in VALUES:
                ours, theirs = record.pop(part), wanted.pop(part)
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    found, expected = (np.frombuffer(bytes.fromhex(one["first"]), "<f4") for one in (ours, theirs))
                    assert np.allclose(
                        found, expected, rtol=0, atol=0.02 * np.abs(expected[np.isfinite(expected)]).max()
                    )
            assert record == wanted
    assert again == facts
