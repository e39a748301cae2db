"""Probing a backbone: all types of backbones, the split of labeled images, references, errors."""

import json
import shutil

import pytest
import timm
import torch
from documented import call
from image_files import encoded, folder_tree, picture, write
from safetensors.torch import save_file
from small_cache import shared_weights

import scalekd_cache
from pipelines import probe as command
from scalekd_cache import UserError
from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.convert.timm_export import export_student
from scalekd_cache.data.source import open_source
from scalekd_cache.models.normalize import resize
from scalekd_cache.models.probing import embed, knn_accuracy, linear_probe_accuracy, pooled_embedding
from scalekd_cache.models.student import build_student
from scalekd_cache.training.probe import labeled_splits

torch.set_num_threads(1)
OPTIONS = {"device": "cpu", "workers": 0}
FEW = {**OPTIONS, "data.max_samples": 150}


def exported(folder, num_classes=0):
    """A student without a classifier, as unlabeled training gives it."""
    config = StudentConfig(name="resnet10t")
    torch.manual_seed(5)
    student = build_student(config, num_classes=num_classes, image_size=32)
    export_student(student, config, folder, image_size=32, class_names=[])
    return folder


def test_the_figures_are_those_of_the_parts(tmp_path):
    facts = scalekd_cache.probe(backbone=exported(tmp_path / "b"), options=FEW)
    model = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=model)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    predictors = {
        "backbone": lambda images: model((images.float() / 255 - mean) / std),
        "pixels": lambda images: resize(images, 16).flatten(1),
    }
    for name, predict in predictors.items():
        sides = [
            embed(predict, open_source(DataConfig(max_samples=150), split), 32, torch.device("cpu"))
            for split in ("train", "val")
        ]
        parts = (*sides[0], *sides[1])
        row = facts["results"][name]
        assert row["channels"] == sides[0].features.shape[1]
        assert row["knn"] == pytest.approx(knn_accuracy(*parts), abs=1)
        assert row["linear_probe"] == pytest.approx(linear_probe_accuracy(*parts), abs=1)
    assert (facts["train_images"], facts["val_images"], facts["classes"]) == (150, 150, 10)
    random = facts["results"]["random_weights"]
    assert random["channels"] == 512
    assert random != facts["results"]["backbone"]


@pytest.mark.parametrize("kind", ["folder", "imported", "run", "name"])
def test_kinds_of_backbones(tmp_path, capsys, kind):
    words = ["--data", "demo", "--device", "cpu", "--data.max_samples", 60, "--json", "--workers", 0]
    if kind == "name":
        words += ["--weights", shared_weights()]
        place = "demo_swin"
        capsys.readouterr()  # the weights come with a cache
    else:
        place = tmp_path / "x"
        exported(place / {"folder": ".", "imported": "student", "run": "export"}[kind], 7)
        if kind == "run":
            (place / "config.yaml").touch()
    call(command, ["--backbone", place, *words])
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["results"]) == {"backbone", "random_weights", "pixels"}
    assert all(0 <= row[name] <= 100 for row in facts["results"].values() for name in ("knn", "linear_probe"))
    assert facts["image_size"] == (64 if kind == "name" else 32)


def test_without_one_split_the_other_is_divided(tmp_path):
    root, said = folder_tree(tmp_path / "data", [f"{name}/{n}.png" for name in ("a", "b") for n in range(10)]), []
    for split in ("val", "train"):
        copy = shutil.copytree(root, tmp_path / split)
        if split == "val":  # labels in train only
            shutil.rmtree(copy / "val")
        else:  # labels in val only
            shutil.rmtree(copy / "val")
            (copy / "train").rename(copy / "val")
            write(copy / "train" / "x.png", encoded(picture()))
        known, classified = labeled_splits(DataConfig(source=str(copy)), said.append)
        assert known.source is classified.source
        assert sorted([*known.indices, *classified.indices]) == [*range(20)]
        assert len(classified.indices) == 4
        assert "using 16 of its images for training and 4 for testing" in said[-1]
    flat = tmp_path / "flat"
    for number in range(4):
        write(flat / f"{number}.png", encoded(picture(number)))
    with pytest.raises(UserError, match="no labels"):
        labeled_splits(DataConfig(source=str(flat)))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}),
        ("mobilenetv3_small_050", {}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "depths": [1, 1], "num_heads": [1, 2]}),
        ("samvit_base_patch16_224", {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 2}),
    ],
)
def test_pooled_embeddings_are_the_input_of_the_classifier(name, args):
    model = timm.create_model(name, num_classes=5, **args).eval()
    images = torch.randn(2, 3, args.get("img_size", 64), args.get("img_size", 64))
    with torch.no_grad():
        pooled = pooled_embedding(model, images)
        assert pooled.ndim == 2
        logits = model(images)
        if logits.ndim == 2 and name != "samvit_base_patch16_224":
            torch.testing.assert_close(model.get_classifier()(pooled), logits)


def test_a_map_without_pooling_is_averaged():
    model = timm.create_model("resnet10t", num_classes=0, global_pool="").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(pooled_embedding(model, images), model.forward_features(images).mean((2, 3)))


def test_errors(tmp_path):
    place = exported(tmp_path / "b")
    bad = tmp_path / "bad.safetensors"
    save_file({"x": torch.zeros(1)}, str(bad))
    for given, text in (
        ({"backbone": tmp_path}, "does not contain an exported student"),
        ({"backbone": "runs/none"}, "the folder runs/none does not exist"),
        ({"backbone": "resnet1O"}, "there is no model resnet1O"),
        ({"backbone": "resnet10t", "weights": bad}, "do not match the model"),
        ({"backbone": place, "weights": bad}, "already contains weights"),
        ({"backbone": place, "data": tmp_path / "none"}, "none"),
        ({"backbone": place, "size": 4}, "invalid value for size"),
    ):
        with pytest.raises(UserError, match=text):
            scalekd_cache.probe(**{"options": FEW, **given})
    (place / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cannot load the exported student"):
        scalekd_cache.probe(backbone=place, options=FEW)
