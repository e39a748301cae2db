"""Checks, repair and inspection of caches whose codec has its own files: a fitted state, a classifier."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from damage import rewrite_unit
from servers import faulty_server
from small_cache import CPU, flip_byte, make, shared_weights, tree

from scalekd_cache.audit.describe import describe_record
from scalekd_cache.audit.repair import repair_cache
from scalekd_cache.audit.verify_cache import verify_deep
from scalekd_cache.errors import UserError
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.verify import verify_cache
from scalekd_cache.store.verify_unit import Part

KINDS = {
    "transform": {"codec": "transform", "logits": "top_k", "top_k": 3},
    "economy": {"codec": "transform-economy", "codec_noise": 0.02, "logits": "recomputed"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def _holder():
    return tempfile.TemporaryDirectory(prefix="codecs-")


@functools.cache
def pristine(kind):
    root = Path(_holder().name) / kind
    make(root, shared_weights(), data={"max_samples": 48}, cache={**KINDS[kind], "samples_per_shard": 24})
    return root


@pytest.fixture
def root(kind, tmp_path):
    return Path(shutil.copytree(pristine(kind), tmp_path / "cache"))


@kinds
def test_whole(kind):
    root = pristine(kind)
    report = verify_deep(root, records=12)
    assert report.findings.problems == report.findings.notes == []
    assert report.agreement.records == 12
    assert report.agreement.top1_percent >= (
        100 if kind == "transform" else 80
    )  # economy: noisy features, random weights
    facts = describe_record(Cache.open(root), 1, 30)
    shares = [row["probability"] for row in facts["top_logits"]]
    assert len(shares) == (3 if kind == "transform" else 5)
    assert 0 < sum(shares) <= 1 + 1e-6
    assert shares == sorted(shares, reverse=True)
    assert facts["features"]["codec"] == "transform"


@kinds
@pytest.mark.parametrize("name", ["codec.safetensors", "codec.json", "classifier.safetensors"])
@pytest.mark.parametrize("gone", [True, False])
def test_files_of_the_codecs_are_checked_and_made_again(root, kind, name, gone):
    if name.startswith("classifier") and kind == "transform":
        assert not (root / name).exists()
        (root / name).touch()
        assert [problem.part for problem in verify_cache(root)] == [Part.UNKNOWN_FILE]
        return
    original = tree(root)
    if gone:
        (root / name).unlink()
    else:
        flip_byte(root / name, (root / name).stat().st_size // 2)
    report = verify_deep(root)
    assert {(problem.where, problem.part) for problem in report.findings.problems} == {
        (name, Part.CODEC_CHOICE if name == "codec.json" else Part.CODEC_STATE)
    }
    assert (report.agreement is None) == (name != "codec.json")
    assert bool(report.findings.notes) == (name != "codec.json")
    if name == "codec.json" and kind == "economy":  # a preset with custom noise: only this file had its name
        assert repair_cache(root, CPU).left == []
        assert json.loads((root / name).read_text())["preset"] == "transform, noise 0.02"
        return
    done = repair_cache(root, CPU)
    assert (done.units, done.left) == ([], [])
    assert tree(root) == original


@kinds
def test_a_bad_unit_is_made_again_with_the_fit_that_is_there(root, kind):
    original = tree(root)
    flip_byte(root / "units/g000-r00001/v0001.tar", 5000)
    assert repair_cache(root, CPU).units == [(0, 1)]
    assert tree(root) == original


def test_a_fit_that_comes_out_differently_changes_nothing(tmp_path, monkeypatch):
    root = Path(shutil.copytree(pristine("transform"), tmp_path / "cache"))
    (root / "codec.safetensors").unlink()
    before = tree(root)
    monkeypatch.setattr("scalekd_cache.caching.codec_selection.CALIBRATION_VIEWS", 20)
    with pytest.raises(UserError, match="state_sha256"):
        repair_cache(root, CPU)
    assert tree(root) == before


LIES = {
    "a torn frame": (lambda record: record._replace(features=record.features[:-3]), "record's features are damaged"),
    "no class": (lambda record: record._replace(logits=b"\xff" * len(record.logits)), "record's logits are damaged"),
    "short logits": (lambda record: record._replace(logits=record.logits[:-1]), "record's logits are damaged"),
}


@pytest.mark.parametrize("name", LIES)
def test_records_that_the_codecs_never_wrote(tmp_path, name):
    root = Path(shutil.copytree(pristine("transform"), tmp_path / "cache"))
    change, text = LIES[name]
    key = Cache.open(root).read([30], 0)[0].key
    rewrite_unit(root, lambda record: change(record) if record.key == key else record, 1)
    problems = verify_deep(root, records=96).findings.problems
    assert {problem.key for problem in problems} == {key}
    assert all(text in problem.what for problem in problems)


def test_the_codecs_files_of_a_url_are_verified_copies(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEKD_CACHE_DIR", str(tmp_path))
    with faulty_server(pristine("economy")) as server:
        report = verify_deep(server.url, records=4)
        assert report.findings.problems == []
        assert report.agreement.records == 4
        assert np.isfinite(report.agreement.figures["cosine"]["mean"])
        server.fail("codec.safetensors", 404)
        assert {problem.where for problem in verify_cache(server.url, deep=True)} == {"codec.safetensors"}
