"""Stage 1 stops before the first unit if a trained teacher's classes are in another order than the class folders."""

import re
import shutil

import numpy as np
import pytest
import timm
import torch
from commands import flags, run
from image_files import write
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from small_cache import CPU, options

from scalekd_cache.caching.job import cache_teacher, dry_run
from scalekd_cache.data.builtin import DigitReader
from scalekd_cache.data.classes import natural_key
from scalekd_cache.data.images import decode_image
from scalekd_cache.errors import UserError
from scalekd_cache.models.normalize import Normalize
from scalekd_cache.models.teacher import demo_teacher_args
from scalekd_cache.models.timm_models import DEMO_TIMM_NAME
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.views.view import eval_view

torch.set_num_threads(1)
NUMBERS = tuple(str(label) for label in range(11))
"""Folders of the digits, and 10 for digits in black on white: 10 comes before 2 when they are sorted as text."""
BREEDS = ("Abyssinian", "beagle", "Bengal", "boxer", "Birman", "pug", "Sphynx", "samoyed", "Zwerg", "akita", "Mops")
ONE_VIEW = {"num_views": 1, "views_per_group": 1, "samples_per_shard": 64}


def digits(first, last):
    """(label, PNG) of digits number first ... last - 1 of every class, and of their negatives."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.uint8)
    readers = [DigitReader(images), DigitReader(16 - images)]
    for label in range(11):
        for index in np.flatnonzero(labels == label % 10)[first:last]:
            yield label, readers[label // 10](int(index))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The head of a teacher of the 11 classes, rows in the order of `NUMBERS`: a linear fit on random features."""
    torch.manual_seed(0)
    model = timm.create_model(DEMO_TIMM_NAME, num_classes=11, **demo_teacher_args()).eval()
    labels, images = zip(*digits(0, 120), strict=True)
    pixels = torch.from_numpy(np.stack([eval_view(decode_image(png, ""), 64) for png in images])).permute(0, 3, 1, 2)
    config = model.pretrained_cfg
    with torch.no_grad():
        x = Normalize(tuple(config["mean"]), tuple(config["std"]))(pixels)
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        wide = torch.cat((features, torch.ones(len(features), 1)), 1).double()
        wanted = torch.nn.functional.one_hot(torch.tensor(labels), 11).double()
        fit = torch.linalg.solve(wide.T @ wide + 1e-3 * torch.eye(wide.shape[1]), wide.T @ wanted).T.float()
    return {**model.state_dict(), "head.fc.weight": fit[:, :-1], "head.fc.bias": fit[:, -1]}


def weights(trained, path, order):
    """The teacher's weights; output k is class order[k] of `NUMBERS`."""
    state = {**trained, **{name: trained[name][order] for name in ("head.fc.weight", "head.fc.bias")}}
    save_file({name: value.contiguous() for name, value in state.items()}, str(path))
    return path


def folders(root, names=NUMBERS, val=12):
    """Image folders: class k of the digits is called names[k]."""
    for split, last in (("train", 136), ("val", 120 + val)):
        for number, (label, png) in enumerate(digits(120, last)):
            write(root / split / names[label] / f"{number}.png", png)
    return root


def in_order(names, key):
    """The numbers of the classes, sorted by their names: the outputs of a teacher trained with this order."""
    return sorted(range(11), key=lambda label: key(names[label]))


def stage1(root, images, file, **sections):
    small = {
        "data": {"source": str(images), "max_samples": None},
        "teacher": {"check_classes": True},
        "cache": ONE_VIEW,
    }
    merged = {name: {**small.get(name, {}), **sections.get(name, {})} for name in {**small, **sections}}
    return options(root, file, **merged)


@pytest.mark.ci_slow
def test_the_command_stops_names_the_order_and_passes_with_it(trained, tmp_path):
    """A common case: folders 0 ... 10, and a teacher trained with timm, which sorts 10 after 9."""
    data, file = folders(tmp_path / "data"), weights(trained, tmp_path / "t.safetensors", list(range(11)))
    words = flags({"data.source": data, "teacher.weights": file, "cache.path": tmp_path / "cache",
                   "cache.num_views": 1, "recipe": "demo"})  # fmt: skip
    output = run("cache_teacher", *words, status=2)
    assert "the teacher's class order differs from the dataset's" in output
    assert "in natural order" in output
    assert not list(tmp_path.glob("cache/*"))
    option = re.search(r"--classes natural", output)[0]
    run("cache_teacher", *words, *option.split())
    facts = read_manifest(tmp_path / "cache").facts
    assert facts.class_names == list(NUMBERS)
    assert facts.teacher["top1"] > 80


@pytest.mark.parametrize(
    ("names", "key", "named", "val"),
    [
        (NUMBERS, natural_key, "natural", 1),
        (BREEDS, str.lower, "natural", 12),
        (NUMBERS, lambda name: name[::-1], "FILE", 12),
    ],
)
def test_orders_of_the_same_kind(trained, tmp_path, names, key, named, val):
    """With few validation images, training images are added."""
    data = folders(tmp_path / "data", names, val)
    file = weights(trained, tmp_path / "t.safetensors", in_order(names, key))
    with pytest.raises(UserError, match="class order differs") as error:
        dry_run(stage1(tmp_path / "cache", data, file), CPU)
    assert f"--classes {named}" in str(error.value)
    if named == "FILE":
        named = str(tmp_path / "classes")
        write(tmp_path / "classes", "\n".join(names[label] for label in in_order(names, key)).encode())
    dry_run(stage1(tmp_path / "cache", data, file, data={"classes": named}), CPU)


def test_without_validation_images_the_training_images_are_used(trained, tmp_path, capsys):
    data = folders(tmp_path / "data")
    shutil.rmtree(data / "val")
    right = weights(trained, tmp_path / "right.safetensors", in_order(NUMBERS, str))
    wrong = weights(trained, tmp_path / "wrong.safetensors", list(range(11)))
    with pytest.raises(UserError, match="in natural order"):
        cache_teacher(stage1(tmp_path / "wrong", data, wrong), CPU)
    assert not (tmp_path / "wrong").exists()
    cache_teacher(stage1(tmp_path / "pixels", data, right), CPU)
    shutil.rmtree(data)
    shared = {"pixels_from": str(tmp_path / "pixels")}
    with pytest.raises(UserError, match="in natural order") as error:  # of the stored views
        cache_teacher(stage1(tmp_path / "wrong", data, wrong, cache=shared), CPU)
    assert f"when you rebuild {tmp_path / 'pixels'}" in str(error.value)
    assert not (tmp_path / "wrong").exists()
    assert "warning" not in capsys.readouterr().out
    cache_teacher(stage1(tmp_path / "second", data, right, cache=shared), CPU)
    cache_teacher(stage1(tmp_path / "third", data, wrong, cache=shared, teacher={"check_classes": False}), CPU)
    assert "warning: the teacher's class order differs from the dataset's" in capsys.readouterr().out
