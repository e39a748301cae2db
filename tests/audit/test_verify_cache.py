"""Problems that only decoding finds (valid checksums, wrong contents), and re-running the teacher."""

import hashlib
import json
import struct

import numpy as np
import pytest
from damage import rewrite_unit
from small_cache import SAMPLES, copy_of_cache, reseal, shared_cache, shared_weights

from scalekd_cache.audit.verify_cache import verify_deep
from scalekd_cache.errors import UserError
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.sidecar import unit_folder
from scalekd_cache.store.verify_unit import Part


def nan_scale(record):
    return record._replace(features=struct.pack("<e", float("nan")) + record.features[2:])


def infinite_norm(record):
    return record._replace(features=record.features[:-2] + struct.pack("<e", float("inf")))


def view_field(name, value):
    def change(record):
        return record._replace(view=json.dumps({**json.loads(record.view), name: value}))

    return change


LIES = {
    "NaN scale": (nan_scale, "features contain NaN or Inf"),
    "infinite norm": (infinite_norm, "features contain NaN or Inf"),
    "short features": (lambda r: r._replace(features=r.features[:-1]), "record's features are damaged"),
    "NaN logits": (lambda r: r._replace(logits=r.logits[:1] + b"\xff\xff\xff\x7f" + r.logits[5:]), "NaN or Inf"),
    "logits of another mode": (lambda r: r._replace(logits=b"\x09" + r.logits[1:]), "record's logits are damaged"),
    "no logits": (lambda r: r._replace(logits=b""), "record's logits are damaged"),
    "label": (lambda r: r._replace(label=10), "label 10 is out of range for 10 classes"),
    "negative label": (lambda r: r._replace(label=-1), "label -1"),
    "view number": (view_field("number", 7), "view 7"),
    "view field": (view_field("crop", [0, 0, 0, 0]), "crop"),
    "digest": (lambda r: r._replace(digest="0" * 16), "expected 0000000000000000"),
    "no pixels": (lambda r: r._replace(pixels=b""), "cannot decode"),
    "other pixels": (lambda r: r._replace(pixels=b"\x80\x04cos\nsystem\n."), "cannot decode"),
}


@pytest.mark.parametrize("name", LIES)
def test_contents_that_lie_under_right_checksums_are_found(tmp_path, name):
    change, text = LIES[name]
    root = copy_of_cache(tmp_path / "cache")
    keys = (root / "units/g000-r00001/keys.txt").read_text().splitlines()
    rewrite_unit(root, lambda record: change(record) if record.key == keys[5] else record, 1)
    problems = verify_deep(root, records=0).findings.problems
    assert {problem.unit for problem in problems} == {(0, 1)}
    assert {problem.part for problem in problems} == {Part.UNIT}
    assert {problem.where for problem in problems} == {f"units/g000-r00001/v000{view}" for view in (0, 1)}
    named = [problem for problem in problems if problem.key == keys[5]]
    assert len(named) >= 2
    assert all(text in problem.what for problem in problems if problem.key), problems


def test_the_teacher_recognizes_its_own_answers():
    root = shared_cache().root
    report = verify_deep(root, records=20, seed=3)
    assert report.findings.problems == report.findings.notes == []
    agreement = report.agreement
    assert agreement.records == 20
    assert agreement.top1_percent == 100
    assert agreement.figures["cosine_mean_removed"]["mean"] > 0.999
    assert verify_deep(root, records=20, seed=3).agreement == agreement
    assert verify_deep(root, records=0).agreement is None


def test_answers_of_another_view_are_recognized_as_wrong(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    rows = [record.features for record in Cache.open(root).read(range(32), 0)]
    others = iter([*rows[1:], rows[0]] * 2)
    rewrite_unit(root, lambda record: record._replace(features=next(others)))
    problems = verify_deep(root, records=2 * SAMPLES).findings.problems
    assert {problem.unit for problem in problems} == {(0, 0)}
    assert len(problems) >= 48
    record = Cache.open(root).read([7], 1)[0]
    assert any(problem.key == record.key and "v0001" in problem.where for problem in problems)


def test_positions_belong_to_units():
    cache = shared_cache()
    for position in (0, 31, 32, 95):
        unit, row = cache.locate(position, 1)
        keys = (unit_folder(cache.root, unit.group, unit.range_id) / "keys.txt").read_text().splitlines()
        assert cache.read([position], 1)[0].key == keys[row]


def test_a_teacher_that_is_not_available_is_reported(tmp_path):
    root = shared_cache().root
    with pytest.raises(UserError, match="the teacher's weights file does not exist"):
        verify_deep(root, weights=str(tmp_path / "absent.safetensors"))
    weights = tmp_path / "moved.safetensors"
    weights.write_bytes(shared_weights().read_bytes())
    assert verify_deep(root, weights=str(weights), records=4).agreement.records == 4
    copy = copy_of_cache(tmp_path / "cache")
    gone = str(tmp_path / "gone.safetensors")
    reseal(copy / "manifest.json", lambda fields: fields["teacher"]["config"].update(weights=gone))
    report = verify_deep(copy)
    assert report.agreement is None
    assert "gone.safetensors" in report.findings.notes[0]


def test_replayed_views_need_the_images(tmp_path):
    root = copy_of_cache(tmp_path / "cache", "replayed")
    assert verify_deep(root, records=4).agreement.records == 4
    report = verify_deep(root, data=str(tmp_path / "nowhere"))
    assert report.findings.problems == []
    assert "pixels were not checked" in report.findings.notes[0]
    key = Cache.open(root).read([3], 0)[0].key
    rewrite_unit(root, lambda r: r._replace(digest=hashlib.sha256().hexdigest()[:16]) if r.key == key else r)
    assert {problem.key for problem in verify_deep(root, records=0).findings.problems} == {key}


def test_figures_are_sane():
    figures = shared_cache().manifest.fidelity
    assert all(np.isfinite([row["mean"], row["p1"]]).all() for row in figures.values())
    assert {"cosine", "cosine_mean_removed"} <= figures.keys()
