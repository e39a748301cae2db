"""Exports other than timm's folder: equal logits, strict loads in other codebases, backbones, cards, clear refusals."""

import json
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
import upstream_students
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from scalekd_cache import export_formats
from scalekd_cache.checkpoint import MODEL, OPTIMIZER, STUDENT, commit_checkpoint
from scalekd_cache.config import DistillConfig, StudentConfig, to_plain
from scalekd_cache.errors import UserError
from scalekd_cache.export_formats import FORMATS, check_format, export_file
from scalekd_cache.finished import export_run
from scalekd_cache.report import RunFolder
from scalekd_cache.student import build_student
from scalekd_cache.transfer_names import timm_to_unfold, torchvision_twin, transfer_state
from scalekd_cache.upstream_names import unfold_to_timm

SWIN = {"depths": (1, 2, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 4)}
VIT = {"embed_dim": 48, "depth": 4, "num_heads": 3}


def student_of(name, size=64, classes=5, **args):
    torch.manual_seed(0)
    student = build_student(StudentConfig(name=name), num_classes=classes, image_size=size, args=args).eval()
    generator = torch.Generator().manual_seed(1)
    for value in student.model.state_dict().values():
        if value.is_floating_point() and value.ndim == 1:  # statistics and zero-initialised scales
            value.copy_(value + 0.05 * torch.rand(value.shape, generator=generator))
    return student


def logits(model, size):
    with torch.no_grad():
        return model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv1_100"])
@pytest.mark.parametrize("form", ["safetensors", "torch-export"])
def test_one_file_with_the_same_logits(tmp_path, name, form):
    student, file = student_of(name), tmp_path / "deep" / f"student{export_formats.SUFFIXES[form]}"
    difference = export_file(student, form, file, image_size=64, facts={"student": name})
    assert difference <= 1e-4
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    if form == "safetensors":
        plain = timm.create_model(
            name, num_classes=5, **({"act_layer": "relu"} if "act_layer" in student.model_args else {})
        )
        plain.load_state_dict(load_file(file))
        got = logits(plain.eval(), 64)
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["student"] == name
    else:
        got = logits(torch.export.load(file).module(), 64)
    torch.testing.assert_close(got, logits(student.model, 64), rtol=1e-4, atol=1e-4)


def test_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    student, file = student_of("resnet10t"), tmp_path / "student.onnx"
    assert export_file(student, "onnx", file, image_size=64, facts={}) < 1e-3
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["images"]
    images = (
        np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32)
    )  # another batch than it was made with
    got = session.run(["logits"], {"images": images})[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, student.model(torch.from_numpy(images)).numpy(), rtol=1e-3, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]  # weights inside


def test_onnx_without_its_packages(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="needs onnx") as error:
        export_file(student_of("resnet10t"), "onnx", tmp_path / "a.onnx", image_size=64, facts={})
    assert "scalekd-cache[export]" in str(error.value)
    with pytest.raises(UserError, match=r"no form of export onx: did you mean onnx\?"):
        check_format("onx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_answers_differently_is_not_kept(tmp_path, monkeypatch):
    write = export_formats._write

    def broken(*args):
        answer = write(*args)
        return lambda batch: answer(batch) + 0.1

    monkeypatch.setattr(export_formats, "_write", broken)
    with pytest.raises(UserError, match="does not give the student's logits"):
        export_file(student_of("resnet10t"), "safetensors", tmp_path / "a.safetensors", image_size=64, facts={})
    assert not list(tmp_path.iterdir())


TORCHVISION = {
    "resnet50": (64, {}, lambda: torchvision.models.resnet50(num_classes=5)),
    "resnet18": (64, {}, lambda: torchvision.models.resnet18(num_classes=5)),
    "swin_tiny": (224, {}, lambda: torchvision.models.swin_t(num_classes=5)),
    "vit_base_patch16_224": (224, {}, lambda: torchvision.models.vit_b_16(num_classes=5)),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_names_of_torchvision_load_strictly_and_answer_the_same(name):
    """ResNet-50, Swin-T and ViT-B at their own size, into the constructors that a user calls."""
    size, args, make = TORCHVISION[name]
    student = student_of(name, size, **args)
    twin = make().eval()
    twin.load_state_dict(transfer_state(student.model, "torchvision"), strict=True)
    torch.testing.assert_close(logits(twin, size), logits(student.model, size), rtol=1e-3, atol=1e-3)
    assert torchvision_twin(student.model, size).state_dict().keys() == twin.state_dict().keys()


def test_torchvision_as_a_file(tmp_path):
    student = student_of("swin_tiny", 224, **SWIN)
    assert export_file(student, "torchvision", tmp_path / "s.safetensors", image_size=224, facts={}) < 1e-3
    for name, size in (("resnet10t", 64), ("vit_base", 64), ("mobilenetv1_100", 64)):
        args = VIT if name == "vit_base" else {}
        with pytest.raises(UserError, match="torchvision") as error:
            export_file(student_of(name, size, **args), "torchvision", tmp_path / "x", image_size=size, facts={})
        assert "FORMAT=timm" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def vit_b_of_mmpretrain(class_token):
    """Names and shapes of mmpretrain 1.2's VisionTransformer, arch "b", with VisionTransformerClsHead; without a class
    token, of out_type "featmap" with GlobalAveragePooling and LinearClsHead. Compared with the package itself once."""
    head = "head.layers.head" if class_token else "head.fc"
    shapes = {
        "backbone.pos_embed": (1, 196 + class_token, 768),
        "backbone.patch_embed.projection.weight": (768, 3, 16, 16),
        "backbone.patch_embed.projection.bias": (768,),
        "backbone.ln1.weight": (768,),
        "backbone.ln1.bias": (768,),
        f"{head}.weight": (5, 768),
        f"{head}.bias": (5,),
    }
    if class_token:
        shapes["backbone.cls_token"] = (1, 1, 768)
    for layer in range(12):
        for name, shape in {"ln1": (768,), "attn.qkv": (2304, 768), "attn.proj": (768, 768), "ln2": (768,),
                            "ffn.layers.0.0": (3072, 768), "ffn.layers.1": (768, 3072)}.items():  # fmt: skip
            shapes[f"backbone.layers.{layer}.{name}.weight"] = shape
            shapes[f"backbone.layers.{layer}.{name}.bias"] = shape[:1]
    return shapes


@pytest.mark.parametrize(("name", "class_token"), [("vit_base_patch16_224", 1), ("vit_base", 0)])
def test_vit_names_of_mmpretrain(name, class_token):
    with torch.device("meta"):
        student = build_student(StudentConfig(name=name), num_classes=5, image_size=224)
    state = transfer_state(student.model, "mmpretrain")
    assert {key: tuple(value.shape) for key, value in state.items()} == vit_b_of_mmpretrain(class_token)


@pytest.mark.parametrize(("name", "paper"), [("resnet50", "resnet50"), ("swin_tiny", "swin_tiny")])
def test_names_of_mmpretrain_load_strictly_and_answer_the_same(name, paper):
    """Into the transcribed modules that the importer is tested with."""
    size = 224 if name == "swin_tiny" else 64
    student = student_of(name, size, classes=5)
    twin = mmpretrain_module(paper)
    twin.load_state_dict(transfer_state(student.model, "mmpretrain"), strict=True)
    torch.testing.assert_close(logits(twin.eval(), size), logits(student.model, size), rtol=1e-3, atol=1e-3)


def mmpretrain_module(name):
    return upstream_students.paper_student(name, 5)


def test_patch_merging_is_reordered_there_and_back():
    value = torch.randn(6, 4 * 5)
    name = "layers.1.downsample.reduction.weight"
    assert torch.equal(unfold_to_timm(name, timm_to_unfold(name, value)), value)
    assert not torch.equal(timm_to_unfold(name, value), value)
    assert torch.equal(timm_to_unfold("layers.1.blocks.0.attn.qkv.weight", value), value)


def test_models_that_no_codebase_names():
    with pytest.raises(UserError, match="no counterpart in mmpretrain"):
        transfer_state(nn.Linear(2, 2), "mmpretrain")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint of a student of random weights."""
    folder = tmp_path_factory.mktemp("run") / "first"
    run = RunFolder(folder, to_plain(DistillConfig(student=StudentConfig(name="resnet10t"))))
    run.keep_facts({"fingerprint": "f" * 64, "views": 2, "image_size": 64, "class_names": ["a|b\n# c", "b", "c"],
                    "data": {"source": "pets`|x"}})  # fmt: skip
    state = student_of("resnet10t", classes=3).model.state_dict()
    files = {STUDENT: dict(state), MODEL: {}, OPTIMIZER: {}}
    commit_checkpoint(run.checkpoints, 5, files, {"loader": {}}, 1)
    return folder


def test_exports_of_a_run(run, tmp_path):
    path, difference = export_run(run, None, "safetensors")
    assert path == run / "resnet10t.safetensors"
    assert difference < 1e-5
    with safe_open(path, "pt") as opened:
        assert opened.metadata()["cache fingerprint"] == "f" * 64
    folder, difference = export_run(run, None)
    assert folder == run / "export"
    assert difference < 1e-4
    with pytest.raises(UserError, match="is a folder"):
        export_run(run, tmp_path, "safetensors")
    assert set(FORMATS) == {"timm", "safetensors", "onnx", "torch-export", "torchvision", "mmpretrain"}


def test_the_model_card(run):
    export_run(run, None)
    text = (run / "export" / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["library_name"] == "timm"
    assert "| cache fingerprint | `" + "f" * 64 in text
    assert "not finished" in text
    assert "| data set | `pets'/x` |" in text  # stays in its cell
    assert "# c" not in text
    summary = {
        "teacher": "demo_swin",
        "teacher_top1": 97.0,
        "top1": 91.5,
        "top5": None,
        "val_images": 1234,
        "targets": "cached",
    }
    (run / "summary.json").write_text(json.dumps(summary))
    export_run(run, None)
    text = (run / "export" / "README.md").read_text()
    (run / "summary.json").unlink()
    assert "trained on targets of demo_swin; top-1 91.50 % on 1,234 validation images" in text
    assert "| top-5 | `not measured` |" in text


def test_the_exported_student_is_a_backbone(run):
    folder, _ = export_run(run, None)
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    whole = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        maps = backbone(images)
        expected = whole.forward_features(images)
    assert [value.shape[-1] for value in maps] == [48, 24, 12, 6, 3]
    assert torch.equal(maps[-1], expected)
