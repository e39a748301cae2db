"""Upload to a model hub, with a local mock server: it receives the files of the export, and errors contain a fix."""

import errno
import json
import re

import huggingface_hub
import pytest
import torch
from hub import hub_server
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file

from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.convert.hub import push_export
from scalekd_cache.convert.timm_export import export_student
from scalekd_cache.errors import UserError
from scalekd_cache.models.hub import upload_errors
from scalekd_cache.models.student import build_student

CARD = """---
library_name: timm
---
Run this in the folder that contains `export`:
    timm.create_model({!r}, pretrained=True)  # it's a student
"""


@pytest.fixture
def hub():
    with hub_server() as server:
        yield server


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "export"
    torch.manual_seed(0)
    config = StudentConfig(name="resnet10t", mean=(0.1, 0.2, 0.3))
    student = build_student(config, num_classes=2, image_size=64)
    export_student(
        student, config, folder, image_size=64, class_names=["cat", "dog"], card=CARD.format("local-dir:export")
    )
    return folder


def test_the_hub_receives_the_files_of_the_export(export, hub):
    assert push_export(export, "ann/pets", token="t", private=True) == f"{hub.url}/ann/pets/commit/{'a' * 40}"
    assert all("private" in json.dumps(request) for request in hub.created)
    assert sorted(hub.files) == sorted(path.name for path in export.iterdir())  # no pickle, no other card
    expected = CARD.format("hf-hub:ann/pets").replace(
        "Run this in the folder that contains `export`", "Load the student"
    )
    assert hub.files["README.md"].decode() == expected
    assert json.loads(hub.files["config.json"]) == json.loads((export / "config.json").read_text())
    copy = export.parent / "served.safetensors"
    copy.write_bytes(hub.files["model.safetensors"])
    expected = load_file(export / "model.safetensors")
    assert {name: value.tolist() for name, value in load_file(copy).items()} == {
        name: value.tolist() for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("status", "repo", "words"),
    [(401, "ann/pets", "hf auth login"), (500, "ann/pets", "rejected"), (200, "a b/c/d", "user/name")],
)
def test_a_rejected_upload(export, hub, status, repo, words):
    hub.status = status
    with pytest.raises(UserError, match=words):
        push_export(export, repo, token="t")
    assert not hub.files


def test_a_hub_that_cannot_be_reached(export, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot reach"):
        push_export(export, "ann/pets", token="t")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set") as error:
        push_export(export, "ann/pets", token="t")
    assert "cannot reach" not in str(error.value)


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full\n  got: .* bytes free.*\n  where: "),
        (PermissionError(errno.EACCES, "denied", "/tmp/x"), "cannot write to this path\n  got: .*\n  where: /tmp/x"),
        (FileNotFoundError(errno.ENOENT, "no file", "card.md"), "cannot read a file .*\n.*\n  where: card.md"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "cannot reach the model hub"),
        (TimeoutError("timed out"), "cannot reach the model hub"),
    ],
)
def test_an_upload_error_names_its_cause(broken, text):
    with pytest.raises(UserError) as error, upload_errors("https://hub", "ann/pets", "rerun"):
        raise broken
    assert re.match(text, str(error.value)), error.value
