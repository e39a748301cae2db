"""Checkpoints: committed in one rename, believed only when whole."""

import errno
import hashlib
import json

import pytest
import torch

from scalekd_cache import checkpoint as module
from scalekd_cache.checkpoint import MODEL, OPTIMIZER, STUDENT, commit_checkpoint, latest_checkpoint
from scalekd_cache.errors import UserError
from scalekd_cache.store.files import canonical_json


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
def test_a_damaged_one_is_said_and_the_one_before_is_taken(tmp_path, name, damage):
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


def test_a_description_that_leads_elsewhere_is_refused(tmp_path):
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
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert latest_checkpoint(tmp_path)[0].facts["step"] == 1


def test_the_same_step_again_replaces_a_damaged_one(tmp_path):
    (commit(tmp_path, 3) / MODEL).write_bytes(b"")
    commit(tmp_path, 3)
    assert latest_checkpoint(tmp_path)[0].facts["step"] == 3
