"""Export: plain timm loads it with the same logits; no partial or pickled files are left."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from image_files import picture
from timm.data import create_transform, resolve_data_config

from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.convert import timm_export as export
from scalekd_cache.convert.timm_export import check_not_in_run, export_student, load_export, read_description
from scalekd_cache.errors import UserError
from scalekd_cache.models.normalize import Normalize
from scalekd_cache.models.student import build_student
from scalekd_cache.views.view import eval_view

CLASSES = ["ant", "bee", "cat"]


def student_of(name, seed=0):
    torch.manual_seed(seed)
    student = build_student(StudentConfig(name=name), num_classes=3, image_size=64)
    generator = torch.Generator().manual_seed(seed)
    for value in student.model.state_dict().values():
        if value.is_floating_point():  # statistics and zero-initialized scales too
            value.copy_(value + 0.05 * torch.rand(value.shape, generator=generator))
    return student


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "mobilenetv1_100"])
def test_plain_timm_loads_it(tmp_path, name):
    student, folder = student_of(name), tmp_path / "run" / "export"
    folder.parent.mkdir()
    student.model.pretrained_cfg["crop_mode"] = "squash"  # as some models recommend
    config = StudentConfig(name=name, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert export_student(student, config, folder, image_size=64, class_names=CLASSES) <= 1e-4
    reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = student.model.eval()(images)
        torch.testing.assert_close(reloaded(images), expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 1e-3
    assert reloaded.pretrained_cfg["mean"] in ((0.1, 0.2, 0.3), [0.1, 0.2, 0.3])
    transform = {"input_size": (3, 64, 64), "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center",
                 "mean": config.mean, "std": config.std}  # fmt: skip
    for test_size in (False, True):  # the models' own recommendations for tests are gone
        found = resolve_data_config({}, model=reloaded, use_test_size=test_size)
        assert {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()} == transform
    assert json.loads((folder / "config.json").read_text())["label_names"] == CLASSES
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


@pytest.mark.parametrize("size", [32, 64, 384])  # 32 and 384 are no multiples of the crop fraction
def test_timm_evaluates_as_we_do(size):
    """The tensor of `evaluate` and that of timm's transform, made from what an export says."""
    config = StudentConfig(name="resnet10t", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    transform = create_transform(**export.eval_transform(config, size))
    for shape in ((100, 75), (75, 100), (20, 20), (500, 90)):
        image = picture(3, shape)
        ours = torch.from_numpy(eval_view(np.array(image), size)).permute(2, 0, 1)[None]
        torch.testing.assert_close(Normalize(config.mean, config.std)(ours)[0], transform(image), rtol=0, atol=1e-5)


def test_a_second_export_takes_the_place_of_the_first(tmp_path):
    folder = tmp_path / "export"
    for seed in (0, 1):
        student = student_of("resnet10t", seed)
        export_student(student, StudentConfig(name="resnet10t"), folder, image_size=64, class_names=CLASSES)
    reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(reloaded.state_dict()["fc.bias"], student.model.state_dict()["fc.bias"])
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("kept", [True, False])
def test_an_export_that_answers_differently_leaves_nothing(tmp_path, monkeypatch, kept):
    folder = tmp_path / "export"
    student, config = student_of("resnet10t"), StudentConfig(name="resnet10t")
    if kept:
        export_student(student, config, folder, image_size=64, class_names=CLASSES)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    create = timm.create_model

    def broken(*args, **options):
        model = create(*args, **options)
        model.fc.weight.data *= 1.01
        return model

    monkeypatch.setattr(export.timm, "create_model", broken)
    with pytest.raises(UserError, match="logits differ from the student's") as error:
        export_student(student, config, folder, image_size=64, class_names=CLASSES)
    assert "difference" in str(error.value)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "out"
    export_student(student_of("test_resnet"), StudentConfig(), folder, image_size=64, class_names=CLASSES)
    return folder


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda fields: fields.update(num_classes=10**9), "num_classes: input should be less"),
        (lambda fields: fields.update(num_classes=-1), "num_classes: input should be greater"),
        (lambda fields: fields.update(num_classes=4), "specify different numbers of classes"),
        (lambda fields: fields.update(label_names=["a"]), "specify different numbers of classes"),
        (lambda fields: fields["model_args"].update(num_classes=10**9), "specify different numbers of classes"),
        (lambda fields: fields["pretrained_cfg"].update(input_size=[3, 60_000, 60_000]), r"input_size\[1\]"),
        (lambda fields: fields["pretrained_cfg"].update(input_size=[3, 64, 32]), "not square"),
        (lambda fields: fields["pretrained_cfg"].update(input_size=[1, 64, 64]), r"input_size\[0\]"),
        (lambda fields: fields["pretrained_cfg"].update(std=[0, 0, 0]), r"std\[0\]"),
        (lambda fields: fields["model_args"].update(in_chans=10**8), "do not match the model"),  # 58 GB
        (lambda fields: fields["model_args"].update(in_chans="x"), "timm cannot build"),
        (lambda fields: fields["model_args"].update(drop_rate=5.0), "dropout probability"),
    ],
)
def test_a_crafted_description_is_an_error_before_anything_is_allocated(written, tmp_path, change, text):
    folder = tmp_path / "out"
    shutil.copytree(written, folder)
    fields = json.loads((folder / "config.json").read_text())
    change(fields)
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=text):
        load_export(folder, read_description(folder).pretrained_cfg.input_size[-1])


def test_the_export_of_a_run_is_not_replaced_by_another(tmp_path):
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    run = tmp_path / "run"
    check_not_in_run(run / "export", run)
    check_not_in_run(tmp_path / "out", run)
    for mine in (None, tmp_path / "other"):
        with pytest.raises(UserError, match="inside a run folder"):
            check_not_in_run(run / "export", mine)


def test_images_of_another_size_are_not_blamed_on_the_export(tmp_path):
    torch.manual_seed(0)
    args = {"num_classes": 3, "img_size": 64}
    backbone = SimpleNamespace(model=timm.create_model("vit_tiny_patch16_224", **args), model_args=args)
    export_student(backbone, StudentConfig(), tmp_path / "out", image_size=64, class_names=CLASSES)
    load_export(tmp_path / "out", 64)
    with pytest.raises(UserError, match=r"(?s)does not accept images.*96 x 96.*use images of 64 x 64 pixels"):
        load_export(tmp_path / "out", 96)


def test_a_model_whose_layers_share_weights(tmp_path):
    """safetensors refuses tensors that share memory; `finetune` found that out after its last step."""
    args = {"num_classes": 3}
    backbone = SimpleNamespace(model=timm.create_model("coat_tiny", **args), model_args=args)
    assert export_student(backbone, StudentConfig(), tmp_path / "out", image_size=224, class_names=CLASSES) <= 1e-4
    load_export(tmp_path / "out", 224)


def test_an_export_does_not_describe_the_weights_of_timm(tmp_path):
    """They are not in it; plain timm loads the export without these fields (`test_plain_timm_loads_it`)."""
    student = student_of("mobilenetv3_small_100")
    known = dict(student.model.pretrained_cfg)
    assert known["tag"]
    assert known["license"]
    export_student(student, StudentConfig(name="mobilenetv3_small_100"), tmp_path / "export", image_size=64,
                   class_names=CLASSES)  # fmt: skip
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    assert {"architecture", "num_classes", "label_names", "pretrained_cfg"} <= written.keys()
    assert {"input_size", "mean", "std", "interpolation", "crop_pct"} <= written["pretrained_cfg"].keys()
    fields = {"tag", "url", "hf_hub_id", "license", "origin_url", "paper_name", "paper_ids", "description", "notes"}
    assert not fields & written["pretrained_cfg"].keys()
    assert dict(student.model.pretrained_cfg) == known
    reloaded = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    assert torch.equal(reloaded.state_dict()["classifier.bias"], student.model.state_dict()["classifier.bias"])
