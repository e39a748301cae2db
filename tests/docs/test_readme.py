"""Run the README's blocks: Python unchanged, commands on smaller data with the same variables."""

import re
import shutil
import subprocess
import sys

import pytest
from commands import ROOT, execute, read_json
from image_files import encoded, picture
from safetensors.torch import save_file
from small_cache import shared_cache
from timm import create_model

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python)?\n(.*?)```", README, re.DOTALL)
QUICK_START, _PICTURE, IMAGENET, LOOP = (text for _, text in BLOCKS)


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
def test_imagenet_in_five_lines(checkout):
    """All except the download: eight images of two classes replace ImageNet, an untrained Swin-T replaces Swin-L.
    Stage 1 gets no student, because eight images do not fill the recipe's batch."""
    for number in range(12):
        split, name = ("train", "val")[number >= 8], "ab"[number % 2]
        place = checkout / "imagenet" / split / name / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(picture(number).resize((256, 240)), "JPEG"))
    teacher = "swin_tiny_patch4_window7_224"
    save_file(create_model(teacher, num_classes=2).state_dict(), str(checkout / "teacher.safetensors"))
    fetch, cache, verify, *students = commands_of(IMAGENET)
    assert fetch[1] == "fetch"
    small = [f"DATA={checkout / 'imagenet'}", "CACHE=caches/imagenet", "NPROC=2", "WORKERS=0"]
    own = [f"TEACHER={teacher}", f"TEACHER_WEIGHTS={checkout / 'teacher.safetensors'}", "VIEWS=2", "STUDENT="]
    run_in(checkout, cache, *small, *own, "SET=teacher.batch_size=4 cache.samples_per_shard=4")
    run_in(checkout, verify, f"TEACHER_WEIGHTS={checkout / 'teacher.safetensors'}", small[0])
    for command in students:
        student = next(word.partition("=")[2] for word in command if word.startswith("STUDENT="))
        run_in(checkout, command, *small, "EPOCHS=1", "SET=train.global_batch_size=8 train.micro_batch_size=4")
        assert read_json(checkout / "runs" / student / "summary.json")["val_images"] == 4
