"""Run the README's code blocks: Python unchanged, commands on smaller data with the same variables."""

import re
import shutil
import subprocess
import sys

import pytest
from commands import ROOT, execute, read_json
from image_files import encoded, picture
from small_cache import shared_cache

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
QUICK_START, OWN_DATA = (text for kind, text in BLOCKS if not kind)
(LOOP,) = (text for kind, text in BLOCKS if kind == "python")


def commands_of(block):
    return [line.partition("#")[0].split() for line in block.splitlines() if line.strip()]


@pytest.fixture
def checkout(tmp_path):
    """The tracked files, in a folder that a command may write to."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0")[:-1]:
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 110
    assert len(commands_of(OWN_DATA)) == 5
    table = README.partition("## Everyday commands")[2].partition("\n\n[")[0]
    assert 0 < len([line for line in table.splitlines() if line.startswith("| `")]) <= 8


def test_loop_of_ones_own():
    text = LOOP.replace('"caches/demo"', repr(str(shared_cache().root)))
    assert text != LOOP
    names = {}
    exec(text, names)
    assert names["terms"].total.isfinite()
    assert all(p.grad is not None for p in names["loss"].parameters())


def run_in(folder, words, *given):
    """One of the README's commands, with the tests' interpreter and options that make it small."""
    assert words[0] == "make"
    return execute("env", "-C", folder, "make", "VENV=none", f"PYTHON={sys.executable}", *words[1:], *given)


@pytest.mark.slow
def test_quick_start(checkout):
    """Both commands, with fewer epochs."""
    first, second = commands_of(QUICK_START)
    run_in(checkout, first)
    run_in(checkout, second, "EPOCHS=1")
    summary = read_json(checkout / "runs" / "resnet50" / "summary.json")
    assert summary["top1"] > 50
    assert (checkout / "runs" / "resnet50" / "export" / "model.safetensors").exists()


@pytest.mark.slow
def test_own_data_in_five_lines(checkout):
    """All except the download: twelve images of two classes, and a teacher with random weights."""
    for number in range(12):
        split, name = ("train", "val")[number >= 8], "ab"[number % 2]
        place = checkout / "photos" / split / name / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(picture(number).resize((256, 240)), "JPEG"))
    fetch, cache, verify, distill, report = commands_of(OWN_DATA)
    assert fetch[1:] == ["fetch", cache[4]]
    run_in(checkout, cache, "PRETRAINED=0", "VIEWS=2", "WORKERS=0")
    run_in(checkout, verify)
    run_in(checkout, distill, "EPOCHS=1", "WORKERS=0", "BATCH=8")
    run = checkout / "runs" / "photos"
    assert read_json(run / "summary.json")["val_images"] == 4
    run_in(checkout, report)
    assert (run / "report.html").is_file()
    assert (run / "export" / "model.safetensors").is_file()
