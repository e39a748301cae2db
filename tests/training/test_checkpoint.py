"""Checkpoints: committed in one rename, used only when undamaged."""

import errno
import hashlib
import itertools
import json
import os

import pytest
import torch
from safetensors import SafetensorError

from scalekd_cache.errors import UserError
from scalekd_cache.store.durable_files import canonical_json
from scalekd_cache.training import checkpoint as module
from scalekd_cache.training.checkpoint import (
    MODEL,
    OPTIMIZER,
    STUDENT,
    commit_checkpoint,
    latest_checkpoint,
    prune_checkpoints,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(folder):
    return [int(name.removeprefix("step-")) for name in names(folder)]


def damage(folder, step):
    file = folder / f"step-{step:08d}" / MODEL
    file.write_bytes(file.read_bytes()[:-1] + b"!")


def commit(folder, step, keep=2):
    tensors = {"a": torch.full((3, 4), float(step)), "b": torch.tensor(step)}
    files = {STUDENT: tensors, MODEL: {**tensors, "c": torch.ones(5).t()}, OPTIMIZER: {}}
    return commit_checkpoint(folder, step, files, {"loader": {"step": step}}, keep)


def test_the_newest_comes_back_and_the_oldest_go(tmp_path):
    assert latest_checkpoint(tmp_path / "none") == (None, [])
    for step in (1, 2, 10):
        commit(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    found, problems = latest_checkpoint(tmp_path)
    assert problems == []
    assert found.facts["step"] == found.facts["loader"]["step"] == 10
    assert torch.equal(found.tensors(MODEL)["a"], torch.full((3, 4), 10.0))
    assert found.tensors(OPTIMIZER) == {}


@pytest.mark.parametrize("name", [STUDENT, MODEL, OPTIMIZER, "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_one_is_reported_and_the_previous_one_is_used(tmp_path, name, damage):
    commit(tmp_path, 1)
    file = commit(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    data[data.index(b'"step":2') + 7 if name == "checkpoint.json" else len(data) // 2] ^= 0x01
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[:-1])
    found, problems = latest_checkpoint(tmp_path)
    assert found.facts["step"] == 1
    assert len(problems) == 1
    assert "step-00000002" in problems[0]


def test_a_description_with_outside_paths_is_refused(tmp_path):
    commit(tmp_path, 1)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((tmp_path / "step-00000001" / MODEL).read_bytes())
    facts = tmp_path / "step-00000001" / "checkpoint.json"
    text = json.loads(facts.read_text().replace(f'"{MODEL}"', '"../outside.safetensors"'))
    del text["sha256"]
    text["sha256"] = hashlib.sha256(canonical_json(text).encode()).hexdigest()
    facts.write_text(canonical_json(text))
    found, problems = latest_checkpoint(tmp_path)
    assert found is None
    assert len(problems) == 1


@pytest.mark.parametrize("where", ["save_file", "fsync_path", "write_new", "os.rename"])
def test_a_failure_while_saving_leaves_what_was_there(tmp_path, monkeypatch, where):
    commit(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = (module.os, "rename") if where == "os.rename" else (module, where)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(UserError, match="disk is full"):
            commit(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    assert latest_checkpoint(tmp_path)[0].facts["step"] == 1


@pytest.mark.parametrize("text", ["Error while serializing: I/O error: No space left on device (os error 28)"])
def test_a_disk_that_is_full_for_safetensors_is_explained(tmp_path, monkeypatch, text):
    """safetensors writes in Rust: its error is not an OSError; the error number is in its text."""
    commit(tmp_path, 1)

    def full(*_):
        raise SafetensorError(text)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match=r"disk is full\n.*\n  expected: at least 64 bytes") as error:
        commit_checkpoint(tmp_path, 2, {STUDENT: {"a": torch.zeros(16)}}, {}, 2)
    assert isinstance(error.value.__cause__, SafetensorError)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("bad", [(30,), (20, 30), (10, 30), (10, 20), (10, 20, 30), (25,)])
def test_damaged_ones_never_displace_undamaged_ones(tmp_path, keep, bad):
    """After falling back to an older checkpoint, the new one has a lower step than the damaged ones."""
    for step in (5, 10, 20, 25, 30):
        commit(tmp_path, step, keep=9)
    for step in bad:
        damage(tmp_path, step)
    whole = [step for step in (5, 10, 20, 25, 30) if step not in bad]
    resumed = latest_checkpoint(tmp_path)[0].facts["step"]
    assert resumed == whole[-1]
    commit(tmp_path, resumed + 1, keep)
    assert steps(tmp_path) == sorted([resumed + 1, *whole[len(whole) - keep + 1 :]])
    assert latest_checkpoint(tmp_path)[0].facts["step"] == resumed + 1


def test_the_one_just_written_stays_when_all_others_are_damaged(tmp_path):
    for step, keep in itertools.product((50, 60, 70), (9,)):
        commit(tmp_path, step, keep)
        damage(tmp_path, step)
    (tmp_path / "step-00000080").mkdir()
    (tmp_path / "step-00000090").write_text("a file")
    (tmp_path / "step-00000095").symlink_to("nowhere")
    (tmp_path / "step-notes").write_text("somebody's")
    commit(tmp_path, 1, keep=2)
    assert names(tmp_path) == ["step-00000001", "step-notes"]


def test_a_kill_while_an_old_one_is_removed_leaves_no_damaged_one(tmp_path, monkeypatch):
    commit(tmp_path, 1, keep=1)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            commit(tmp_path, 2, keep=1)
    assert [name for name in names(tmp_path) if not name.startswith(".tmp-step-00000001-")] == ["step-00000002"]
    prune_checkpoints(tmp_path, tmp_path / "step-00000002", 1)
    assert names(tmp_path) == ["step-00000002"]


def test_temporary_files_of_another_host_are_removed(tmp_path):
    (tmp_path / ".tmp-step-00000001-00000000-7-0a1b2c3d").mkdir()
    (tmp_path / ".tmp-step-00000002-00000000-7-0a1b2c3d").write_text("")
    commit(tmp_path, 3)
    assert names(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("kind", ["folder", "link loop", "named pipe", "unreadable"])
@pytest.mark.parametrize("name", [MODEL, "checkpoint.json"])
def test_a_special_file_is_a_damaged_checkpoint(tmp_path, monkeypatch, name, kind):
    commit(tmp_path, 1)
    file = commit(tmp_path, 2) / name
    if kind == "unreadable":
        opener = os.open

        def fail(path, *args, **kwargs):
            if path == file:
                raise OSError(errno.EIO, "Input/output error", str(path))
            return opener(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", fail)
    else:
        file.unlink()
        put = {"folder": os.mkdir, "link loop": lambda path: os.symlink(path, path), "named pipe": os.mkfifo}[kind]
        put(file)
    found, problems = latest_checkpoint(tmp_path)
    assert found.facts["step"] == 1
    assert "step-00000002" in problems[0]


def test_the_same_step_again_replaces_a_damaged_one(tmp_path):
    (commit(tmp_path, 3) / MODEL).write_bytes(b"")
    commit(tmp_path, 3)
    assert latest_checkpoint(tmp_path)[0].facts["step"] == 3
