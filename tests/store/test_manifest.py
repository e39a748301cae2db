"""An inconsistent manifest or plan is rejected when it is read, and the error names the field."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_cache import copy_of_cache, reseal, shared_cache

from scalekd_cache.audit.verify_cache import verify_deep
from scalekd_cache.config.base import fingerprint
from scalekd_cache.errors import UserError
from scalekd_cache.store.plan import read_plan
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.verify import verify_cache

Change = Callable[[dict[str, Any]], Any]
CONTRADICTIONS: dict[str, tuple[Change, str]] = {
    "codec": (lambda f: f["codec"].update(id="int4"), "codec"),
    "logit codec": (lambda f: f["logit_codec"].update(kl_limit=0.0), "logit_codec"),
    "second codec": (lambda f: f.update(second_codec={"id": "float32"}), "second_codec"),
    "view recipe": (lambda f: f["view_recipe"].update(flip_probability=0.5), "view_recipe"),
    "weights": (lambda f: f["teacher"]["spec"].update(weights_sha256="0" * 64), "teacher"),
    "listing": (lambda f: f["data"].update(listing="0" * 64), "data"),
    "samples": (lambda f: f["data"].update(samples=5), "data"),
    "class order": (lambda f: f["class_names"].reverse(), "class_names"),
    "one class name": (lambda f: f["class_names"].__setitem__(3, "x"), "class_names"),
    "classes left out": (lambda f: f["class_names"].pop(), "class_names"),
    "fields": (lambda f: f["fingerprint_fields"]["teacher"].update(timm_version="0"), "fingerprint is not the hash"),
    "fingerprint": (lambda f: f.update(fingerprint="0" * 64), "fingerprint is not the hash"),
    "a path among the training options": (lambda f: f["distill"].update(train={"deepspeed": "/x"}), "distill"),
    "another part among the training options": (lambda f: f["distill"].update(run={"x": "/tmp"}), "distill"),
    "shared pixels": (lambda f: f.update(pixels_from={"identity": "x", "path": "y"}), "pixels and pixels_from"),
}
NESTED: dict[str, tuple[Change, str]] = {
    "groups": (lambda f: f.update(groups=[[0, 1], 5]), r"groups\[1\]"),
    "negative view": (lambda f: f.update(groups=[[0, -1]]), r"groups\[0\]\[1\]"),
    "unknown view option": (lambda f: f["view_recipe"].update(x=1), "x: unknown"),
    "view option out of range": (lambda f: f["view_recipe"].update(crop_scale=[0.5, 1.5]), "crop_scale"),
    "view option of another type": (lambda f: f["view_recipe"].update(size="64"), "size: .*integer"),
    "teacher option": (lambda f: f["teacher"]["config"].update(batch_size=[]), "batch_size"),
    "top-1": (lambda f: f["teacher"].update(top1="high"), "teacher.top1"),
    "likeness": (lambda f: f["data"].update(class_likeness=[-1, 0.5]), "class_likeness"),
    "data option": (lambda f: f["data"].update(max_samples="all"), "max_samples"),
    "class names": (lambda f: f.update(class_names=[1]), r"class_names\[0\]"),
    "training options of another type": (lambda f: f["distill"].update(optim=3), r"distill\.optim"),
    "versions": (lambda f: f.update(versions={"torch": 2}), "versions.torch"),
}


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
@pytest.mark.parametrize("case", [*CONTRADICTIONS, *NESTED])
def test_facts_that_disagree_are_refused_when_they_are_read(tmp_path: Path, case: str, name: str) -> None:
    change, words = {**CONTRADICTIONS, **NESTED}[case]
    root = copy_of_cache(tmp_path / "cache")
    reseal(root / name, change)
    with pytest.raises(UserError, match=words):
        Cache.open(root) if name == "manifest.json" else read_plan(root)
    assert name in {problem.where for problem in verify_cache(root)}


def test_a_lie_in_both_places_is_another_cache(tmp_path: Path) -> None:
    """Also with a recomputed fingerprint: then no unit belongs to the cache."""
    root = copy_of_cache(tmp_path / "cache")

    def change(fields: dict[str, Any]) -> None:
        fields["fingerprint_fields"]["codec"]["id"] = fields["codec"]["id"] = "int4"
        fields["fingerprint"] = fingerprint(fields["fingerprint_fields"])

    reseal(root / "manifest.json", change)
    with pytest.raises(UserError, match="does not match the manifest"):
        Cache.open(root).read([0], 0)


def test_arguments_of_the_teacher_are_compared_by_verify_and_before_they_are_used(tmp_path: Path) -> None:
    from scalekd_cache.training.targets import load_cache_tail

    root = copy_of_cache(tmp_path / "cache")
    for depths, words in (([1, 1, 1], "does not belong to the cache's teacher"), ([1, 20_000, 1], "out of range")):
        reseal(
            root / "manifest.json", lambda f, depths=depths: f["teacher"]["spec"]["model_args"].update(depths=depths)
        )
        assert [problem.where for problem in verify_cache(root)] == ["manifest.json"]
        cache = Cache.open(root)
        with pytest.raises(UserError, match=words):
            load_cache_tail(cache)


def test_nested_fields_of_figures(tmp_path: Path) -> None:
    for change in (
        lambda f: f["fidelity"].update(cosine="x"),
        lambda f: f["fidelity"]["cosine"].pop("mean"),
        lambda f: f["fidelity"]["cosine"].update(count=1.5),
        lambda f: f["bytes_per_view"].update(total="much"),
    ):
        root = copy_of_cache(tmp_path / f"cache{len(list(tmp_path.iterdir()))}")
        reseal(root / "manifest.json", change)
        with pytest.raises(UserError, match="the manifest has invalid values"):
            Cache.open(root)


SIDECAR = {
    "file name with NUL": lambda f: f["files"].update({"a\0b": f["files"]["keys.txt"]}),
    "long file name": lambda f: f["files"].update({"x" * 300: f["files"]["keys.txt"]}),
    "file outside": lambda f: f["files"].update({"../plan.json": f["files"]["keys.txt"]}),
    "length a text": lambda f: f["files"]["keys.txt"].update(bytes="1"),
    "negative length": lambda f: f["files"]["keys.txt"].update(bytes=-1),
    "figures": lambda f: f.update(fidelity={"cosine": 1.0}),
    "skipped": lambda f: f.update(skipped=[{"key": "a"}]),
}


@pytest.mark.parametrize("case", SIDECAR)
def test_a_sidecar_with_other_fields_is_a_finding(tmp_path: Path, case: str) -> None:
    root = copy_of_cache(tmp_path / "cache")
    path = root / "units/g000-r00000/unit.json"
    fields = json.loads(path.read_text())
    SIDECAR[case](fields)
    path.write_text(json.dumps(fields))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def change(fields: dict[str, Any]) -> None:
        fields["units"][0][3] = digest
        text = json.dumps(fields["units"], separators=(",", ":"))
        fields["units_digest"] = hashlib.sha256(text.encode()).hexdigest()

    reseal(root / "manifest.json", change)
    with pytest.raises(UserError):
        Cache.open(root).read([0], 0)
    assert [problem.where for problem in verify_deep(root, records=0).findings.problems] == [
        "units/g000-r00000/unit.json"
    ]


def test_a_pristine_cache_agrees_with_itself() -> None:
    manifest = shared_cache().manifest
    assert manifest.facts.fingerprint == fingerprint(manifest.facts.fingerprint_fields)
