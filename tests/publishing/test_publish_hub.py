"""Publishing to the model hub, with a local stand-in: commits, resumption, errors, and no token in any message."""

import hashlib
import json
import logging

import huggingface_hub
import pytest
from cache_facts import FIELDS
from hub import hub_server
from publications import finished_cache, published
from store_cases import GROUPS, backends, expected, flip_byte, payload_file, tree

from pipelines import publish as command
from pipelines.command import run
from scalekd_cache.config.base import fingerprint
from scalekd_cache.errors import UserError
from scalekd_cache.publishing import to_hub
from scalekd_cache.store.reader import Cache

URL = "hf://datasets/ann/pets"
TOKEN = "hf_averysecrettoken0123"
OWN = {"README.md", "publication.json"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SCALEKD_CACHE_DIR", str(tmp_path / "copies"))
    with hub_server() as server:
        server.token = TOKEN
        yield server


@backends
def test_the_hub_has_the_cache_and_a_rerun_sends_nothing(caches, backend, hub, capfd):
    cache = caches[backend]
    facts = published(cache, URL, private=True)
    assert {name: data for name, data in hub.files.items() if name not in OWN} == tree(cache)
    assert [(one["type"], one["name"], one["visibility"]) for one in hub.created] == [("dataset", "pets", "private")]
    assert hub.commits[0] == ["plan.json"]
    assert hub.commits[-1] == ["README.md", "publication.json", "manifest.json"]
    assert facts["to"] == URL
    assert facts["bytes"] == sum(map(len, hub.files.values()))
    assert f"scalekd distill --cache {URL} --student resnet50" in hub.files["README.md"].decode()
    done = len(hub.commits), len(hub.puts)
    again = published(cache, URL)
    assert (again["units_sent"], again["bytes_sent"]) == (0, 0)
    assert (len(hub.commits), len(hub.puts)) == done
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_published_cache_is_read_where_it_is(cache, hub):
    published(cache, URL)
    found = Cache.open(URL)
    assert found.read(range(40), 2) == expected(2)


def test_a_folder_of_a_repository(cache, hub):
    hub.exists, hub.files[".gitattributes"], hub.files["README.md"] = True, b"x", b"of another cache"
    published(cache, f"{URL}/swin")
    names = {name.removeprefix("swin/") for name in hub.files if name.startswith("swin/")}
    assert names == tree(cache).keys() | OWN
    assert hub.files["README.md"] == b"of another cache"
    with pytest.raises(UserError, match="not empty and does not contain a cache"):
        published(cache, URL)


def test_a_new_repository_may_have_a_card_and_gets_ours(cache, hub):
    hub.exists, hub.files[".gitattributes"], hub.files["README.md"] = True, b"x", b"---\nlicense: mit\n---\n"
    published(cache, URL)
    assert b"fan2024scalekd" in hub.files["README.md"]
    hub.files["README.md"] += b"edited on the web page"
    published(cache, URL, data_license="mit")
    assert hub.files["README.md"].endswith(b"edited on the web page")


def test_growth_and_a_second_cache(tmp_path, hub):
    cache = finished_cache(tmp_path / "cache", "webdataset", GROUPS[:1])
    published(cache, URL)
    sent = len(hub.puts)
    finished_cache(cache, "webdataset")
    assert published(cache, URL)["units_sent"] == 2
    assert len(hub.puts) - sent == 2
    assert {name: data for name, data in hub.files.items() if name not in OWN} == tree(cache)
    before = dict(hub.files)
    with pytest.raises(UserError, match="a different cache"):
        published(finished_cache(tmp_path / "other", "webdataset", recipe="x", **other_facts()), URL)
    assert hub.files == before


def other_facts():
    fields = {**FIELDS, "precision": "bfloat16"}
    return {"fingerprint": fingerprint(fields), "fingerprint_fields": fields}


@pytest.mark.parametrize("without_pixels", [False, True])
def test_an_interrupted_upload_resumes(cache, hub, monkeypatch, without_pixels):
    monkeypatch.setattr(to_hub, "COMMIT_FILES", 1)  # a unit in each commit
    start = "original/" if without_pixels else ""
    for kept in range(1, 6):
        hub.faults = {"/commit/main$": [403, 10**6]} if kept == 1 else {}
        if kept > 1:
            stop_after(hub, 1)
        with pytest.raises(UserError, match="rejected"):
            published(cache, URL, without_pixels=without_pixels)
        assert "manifest.json" not in hub.files
        assert "publication.json" not in hub.files
    hub.faults = {}
    published(cache, URL, without_pixels=without_pixels)
    assert len(hub.puts) == len(set(hub.puts))  # nothing was sent twice
    assert len(hub.commits) == 1 + 4 + 1
    names = {name.removeprefix(start) for name in hub.files if name not in OWN and not name.startswith("targets/")}
    shards = {name for name in tree(cache) if ".tar" in name or ".idx" in name}
    assert names == (tree(cache).keys() - shards if without_pixels else tree(cache).keys())


def stop_after(hub, commits):
    """Let so many commits through, and reject all others."""
    limit = len(hub.commits) + commits

    class Fault(list):
        def __getitem__(self, at):
            return 403 if at == 0 else int(len(hub.commits) >= limit)

        def __setitem__(self, at, value):
            pass

    hub.faults = {"/commit/main$": Fault()}


@pytest.mark.parametrize(("status", "words"), [(401, "hf auth login"), (403, "hf auth login"), (400, "rejected")])
def test_a_hub_that_refuses(cache, hub, status, words, capfd):
    hub.faults = {"/api/repos/create": [status, 10**6]}
    with pytest.raises(UserError, match=words) as caught:
        published(cache, URL)
    assert not hub.files
    assert TOKEN not in str(caught.value) + "".join(capfd.readouterr())


def test_a_failed_upload_of_a_shard(cache, hub):
    hub.faults = {"/objects/[0-9a-f]{64}": [403, 10**6]}
    with pytest.raises(UserError, match="the model hub rejected the upload"):
        published(cache, URL)
    assert hub.files.keys() == {"plan.json"}


def test_a_hub_that_cannot_be_reached(cache, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot reach the model hub"):
        published(cache, URL)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="unset HF_HUB_OFFLINE"):
        published(cache, URL)


@pytest.mark.parametrize("token", ["hf_secret\x7fvalue-0123456789", "hf_sécret-0123456789", "hf_plain_0123456789"])
def test_no_message_contains_the_token(cache, hub, monkeypatch, capfd, caplog, token):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", token)
    words = ["--cache", cache, "--to", URL, "--data-license", "mit", "--teacher-license", "mit"]
    monkeypatch.setattr("pipelines.command._exit", stop)
    with pytest.raises(SystemExit) as ended:
        run(command.COMMAND, list(map(str, words)))
    assert ended.value.code == 2
    assert token not in "".join(capfd.readouterr()) + caplog.text
    assert not any(token.encode() in data for data in hub.files.values())


def stop(status):
    raise SystemExit(status)


def test_a_damaged_shard_is_not_sent(tmp_path, hub):
    cache = finished_cache(tmp_path / "cache", "webdataset")
    flip_byte(payload_file(cache), 5000)
    with pytest.raises(UserError, match="has changed since it was committed"):
        published(cache, URL)
    damaged = hashlib.sha256(payload_file(cache).read_bytes()).hexdigest()
    assert damaged not in hub.objects
    assert "manifest.json" not in hub.files
    assert json.loads(hub.files["plan.json"])["fingerprint"]
