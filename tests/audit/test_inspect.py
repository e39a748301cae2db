"""The commands inspect, repair and verify: output, imports, exit codes."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from commands import ENV, LIMIT_S, ROOT
from documented import call
from small_cache import copy_of_cache, flip_byte, shared_cache

from pipelines import inspect_cache, repair, verify
from scalekd_cache.errors import UserError
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.reader import Cache


def output_of(capsys, command, *words):
    capsys.readouterr()
    with command.COMMAND.make_context("x", [str(word) for word in words]) as context:
        status = command.COMMAND.invoke(context)
    return capsys.readouterr().out, status


def test_a_key_as_a_report_shows_it(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(Cache, "position", lambda cache, key, view: asked.append(key) or 0)
    for key in ("Größe/1", "Gr%C3%B6%C3%9Fe/1"):
        output_of(capsys, inspect_cache, "--cache", shared_cache().root, "--key", key)
    assert asked == ["Gr%C3%B6%C3%9Fe/1"] * 2


def test_a_record_by_key_and_by_position(capsys, tmp_path):
    cache = shared_cache()
    record = cache.read([40], 1)[0]
    out = tmp_path / "view.jpg"
    text, _ = output_of(
        capsys, inspect_cache, "--cache", cache.root, "--index", 40, "--view", 1, "--json", "--out", out
    )
    facts = json.loads(text)
    assert (facts["key"], facts["label"], facts["view"]) == (record.key, record.label, 1)
    assert facts["class"] == cache.manifest.facts.class_names[record.label]
    assert facts["digest_ok"] is True
    assert facts["bytes"]["features"] == len(record.features)
    assert facts["where"] == {"shard": str(cache.root / "units/g000-r00001/v0001.tar"), "row": 8}
    assert facts["view_record"] == json.loads(record.view)
    assert facts["view_in_words"].startswith("crop ")
    assert facts["features"]["shape"] == [128, 4, 4]
    assert facts["features"]["min"] < facts["features"]["mean"] < facts["features"]["max"]
    assert len(facts["top_logits"]) == 5
    assert sum(row["probability"] for row in facts["top_logits"]) <= 1
    assert out.read_bytes() == record.pixels
    by_key, _ = output_of(capsys, inspect_cache, "--cache", cache.root, "--key", record.key, "--view", 1, "--json")
    assert json.loads(by_key) == facts
    plain, _ = output_of(capsys, inspect_cache, "--cache", cache.root, "--key", record.key, "--view", 1)
    assert f"key: {record.key}" in plain


def test_a_cache_in_short(capsys):
    text, _ = output_of(capsys, inspect_cache, "--cache", shared_cache().root)
    for part in ("images: 96", "views: 2", "demo_swin", "cosine mean removed:"):
        assert part in text


@pytest.mark.parametrize(
    "words",
    [
        ["--index", 96],
        ["--view", 2, "--index", 0],
        ["--key", "nobody"],
        ["--key", "a", "--index", 1],
        ["--index", 0, "--out", "view.png"],
    ],
)
def test_what_is_not_there_is_said(words):
    with pytest.raises(UserError):
        call(inspect_cache, ["--cache", str(shared_cache().root), *map(str, words)])


def test_verify_for_scripts(tmp_path, capsys):
    root = copy_of_cache(tmp_path / "cache")
    text, status = output_of(capsys, verify, "--cache", root, "--json")
    report = json.loads(text)
    assert (status, report["whole"], report["problems"], report["units"]) == (0, True, [], 3)
    assert report["fidelity"] == read_manifest(root).fidelity
    tar = root / "units/g000-r00001/v0000.tar"
    flip_byte(tar, tar.read_bytes().index(Cache.open(root).read([33], 0)[0].features))
    text, status = output_of(capsys, verify, "--cache", root, "--deep", "--json", "--records", 4)
    report = json.loads(text)
    assert (status, report["whole"], report["teacher"]["records"]) == (1, False, 4)
    assert {problem["key"] for problem in report["problems"]} == {None, Cache.open(root).read([33], 1)[0].key}
    assert {tuple(problem["unit"]) for problem in report["problems"]} == {(0, 1)}


def test_repair_as_a_command(tmp_path, capsys):
    root = copy_of_cache(tmp_path / "cache")
    (root / "units/g000-r00002/v0001.idx").unlink()
    text, status = output_of(capsys, repair, "--cache", root)
    assert status == 0
    assert "units rebuilt: g000-r00002" in text
    assert "no problems (every byte checked" in text
    text, status = output_of(capsys, verify, "--cache", root, "--deep")
    assert status == 0
    assert "fidelity of the stored features" in text
    assert "cosine mean removed 0.999" in text
    assert "teacher re-run on 16 views" in text
    assert output_of(capsys, repair, "--cache", root)[0].endswith("nothing to do\n")


def next_of(text):
    return [line.removeprefix("next: ") for line in text.splitlines() if line.startswith("next: ")]


@pytest.mark.parametrize(
    "lost",
    [
        "units/g000-r00002/v0001.tar",
        "manifest.json",
        pytest.param("units/g000-r00001/unit.json", marks=pytest.mark.slow),
        pytest.param("tail.safetensors", marks=pytest.mark.slow),
    ],
)
def test_the_command_that_verify_prints_mends_what_it_found(tmp_path, capsys, lost):
    root = copy_of_cache(tmp_path / "a cache")
    (root / lost).unlink()
    text, status = output_of(capsys, verify, "--cache", root)
    (command,) = next_of(text)
    assert (status, command) == (1, f"scalekd repair --cache '{root}'")
    assert output_of(capsys, repair, *shlex.split(command)[2:])[1] == 0
    text, status = output_of(capsys, verify, "--cache", root)
    assert (status, next_of(text)) == (0, [])


def test_the_other_places_of_data_and_weights_are_part_of_the_command(tmp_path, capsys):
    root = copy_of_cache(tmp_path / "cache")
    (root / "units/g000-r00002/v0001.idx").unlink()
    text, _ = output_of(capsys, verify, "--cache", root, "--data", "demo", "--teacher-weights", "w", "--json")
    assert json.loads(text)["next"] == [f"scalekd repair --cache {root} --data demo --teacher-weights w"]


def test_what_no_command_mends_suggests_none(tmp_path, capsys):
    root = copy_of_cache(tmp_path / "cache")
    (root / "notes.txt").touch()
    text, status = output_of(capsys, verify, "--cache", root)
    assert (status, next_of(text)) == (1, [])
    assert "remove it" in text


def test_damage_that_another_command_meets_names_the_cache(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    (root / "units/g000-r00001/v0000.idx").write_bytes(b"")
    with pytest.raises(UserError, match=f"scalekd repair --cache {re.escape(str(root))}"):
        call(inspect_cache, ["--cache", str(root), "--index", "40"])
    (root / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=f"scalekd repair --cache {re.escape(str(root))}"):
        call(inspect_cache, ["--cache", str(root)])


def test_a_mistyped_path_is_no_damaged_cache(tmp_path):
    for command in (verify, repair, inspect_cache):
        with pytest.raises(UserError, match="there is no cache"):
            call(command, ["--cache", str(tmp_path / "nothing")])


@pytest.mark.parametrize("words", ["repair --help", "verify --cache {root}", "inspect_cache --cache {root}"])
def test_commands_import_no_more_than_they_need(words):
    name, *rest = words.format(root=shared_cache().root).split()
    code = (
        f"import sys, atexit; sys.argv = ['x', *{rest!r}]\n"
        "def say():\n    print('IMPORTED', [m for m in ('torch', 'deepspeed') if m in sys.modules])\n"
        f"atexit.register(say)\nimport runpy; runpy.run_module('pipelines.{name}', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENV, text=True, capture_output=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    allowed = ["['torch']"] if words.startswith("inspect_cache --cache") else []
    assert any(f"IMPORTED {modules}" in done.stdout for modules in ["[]", *allowed]), done.stdout


@pytest.mark.parametrize("out", ["missing/view.jpg", "folder.jpg", "file/view.jpg"])
def test_pixels_that_cannot_be_written(tmp_path, out):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write|cannot create a file"):
        call(inspect_cache, ["--cache", shared_cache().root, "--index", 0, "--out", tmp_path / out])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.jpg"]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"got: there is no folder {tmp_path}/new\n.*\n.*create this folder"):
        call(inspect_cache, ["--cache", shared_cache().root, "--index", 0, "--out", tmp_path / "new/view.jpg"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--out", "view.jpg"], ["--view", 1]])
def test_an_option_for_a_record_needs_a_record(words):
    with pytest.raises(UserError) as error:
        call(inspect_cache, ["--cache", shared_cache().root, *words])
    assert str(error.value) == f"{words[0]} needs a record: set --key or --index"
