"""The data card: header of the hub, licenses as given, commands that parse, no markup and no paths from the cache."""

import dataclasses
import re
import shlex

import pytest
import yaml
from commands import ROOT
from documented import check
from huggingface_hub import DatasetCard
from store_cases import RANGES, facts, write_cache

from scalekd_cache.publishing.data_card import CITATION, Card, commands, data_card, license_header, size_category
from scalekd_cache.publishing.publication import Publication
from scalekd_cache.store.manifest import build_manifest, read_manifest

URL = "hf://datasets/ann/pets"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return read_manifest(write_cache(tmp_path_factory.mktemp("cache"), "webdataset"))


def publication(**changes):
    values = {"publication_version": 1, "fingerprint": "0" * 64, "pixels": "stored", "pixels_from": "",
              "licenses": {"data": "cc-by-4.0", "teacher": "apache-2.0"}, "files": {}, "targets": []}  # fmt: skip
    return Publication(**{**values, **changes})


def test_header_and_facts(manifest):
    text = data_card(Card(manifest, publication(), URL, 5_000_000))
    header = DatasetCard(text).data.to_dict()
    assert header["license"] == ["cc-by-4.0", "apache-2.0"]
    assert header["pretty_name"] == "demo on demo"
    assert header["size_categories"] == ["n<1K"]
    assert header["task_categories"] == ["image-classification"]
    assert {"scalekd-cache", "knowledge-distillation", "webdataset"} <= set(header["tags"])
    for fact in ("`cc-by-4.0`", "`apache-2.0`", "5.00 MB in total", manifest.facts.fingerprint, "`int8`", "1" * 64,
                 "3 augmented views", "| cosine |", "`0.08 to 1`"):  # fmt: skip
        assert fact in text


def test_license_names_that_the_hub_does_not_know():
    assert license_header("MIT", "mit") == {"license": "mit"}
    assert license_header("ImageNet terms (research only)", "mit") == {
        "license": "other",
        "license_name": "imagenet-terms-research-only-and-mit",
    }


@pytest.mark.parametrize(("count", "name"), [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"),
                                             (10**12 - 1, "100B<n<1T"), (10**15, "n>1T")])  # fmt: skip
def test_size_categories(count, name):
    assert size_category(count) == name


@pytest.mark.parametrize("pixels", ["stored", "shared", "replayed", "left out"])
@pytest.mark.parametrize("place", [URL, "s3://bucket/caches/pets", "/data/my caches/pets"])
def test_the_commands_parse(manifest, pixels, place):
    shared = "hf://datasets/ann/pixels" if pixels == "shared" else ""
    found = publication(pixels=pixels, pixels_from=shared)
    for command in commands(found, place):
        program, name, *words = shlex.split(command, comments=True)
        assert program == "scalekd"
        check(name, words)
    text = data_card(Card(manifest, found, place, 1))
    assert "my caches" not in text  # a path of this machine
    assert ("--data IMAGES" in text) == (pixels in ("replayed", "left out"))
    assert (f"--pixels-from {shared}" in text) == bool(shared)
    assert "scalekd pull" in text


def test_names_of_the_cache_are_text(tmp_path):
    root = write_cache(tmp_path / "cache", "webdataset")
    known = facts("webdataset")
    nasty = "</td><script>x</script> [a](http://x) `b` | c\n# d"
    changed = dataclasses.replace(
        known,
        recipe=f"/home/ann/{nasty}",
        data={**known.data, "source": f"/home/ann/{nasty}"},
        versions={nasty: "1"},
    )
    manifest = dataclasses.replace(build_manifest(root, known, RANGES), facts=changed)
    licenses = {"data": "a | b `c` <i>", "teacher": "[x](http://y)"}
    text = data_card(Card(manifest, publication(licenses=licenses), URL, 1))
    assert "/home/ann" not in text
    body = text.split("---\n", 2)[2]
    outside = re.sub(r"`[^`\n]*`", "", body)
    assert "<script>" not in outside
    assert not re.search(r"(?<!\\)\]\(", outside)
    assert "\n# d" not in body
    assert yaml.safe_load(text.split("---\n", 2)[1])["license"] == "other"


def test_the_citation_is_that_of_the_repository():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"][0]
    assert {cited["title"], str(cited["year"]), cited["url"], cited["collection-title"]} <= set(
        re.findall(r"\{([^{}]+)\}", CITATION)
    )
    authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in cited["authors"])
    assert f"{{{authors}}}" in CITATION
