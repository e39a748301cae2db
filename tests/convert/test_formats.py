"""Exports other than timm's folder: equal logits, strict loads in other codebases, backbones, cards, clear errors."""

import hashlib
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

from scalekd_cache.config.base import to_plain
from scalekd_cache.config.stage2 import DistillConfig, StudentConfig
from scalekd_cache.convert import formats as export_formats
from scalekd_cache.convert.formats import FORMATS, check_format, export_file
from scalekd_cache.convert.names_torchvision_mmpretrain import timm_to_unfold, torchvision_twin, transfer_state
from scalekd_cache.convert.names_upstream import unfold_to_timm
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import build_student
from scalekd_cache.training.checkpoint import MODEL, OPTIMIZER, STUDENT, commit_checkpoint
from scalekd_cache.training.run_export import export_run
from scalekd_cache.training.run_folder import RunFolder

SWIN = {"depths": (1, 2, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 4)}
VIT = {"embed_dim": 48, "depth": 4, "num_heads": 3}


def student_of(name, size=64, classes=5, **args):
    torch.manual_seed(0)
    student = build_student(StudentConfig(name=name), num_classes=classes, image_size=size, args=args).eval()
    generator = torch.Generator().manual_seed(1)
    for value in student.model.state_dict().values():
        if value.is_floating_point() and value.ndim == 1:  # statistics and zero-initialized scales
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
    )  # a different batch size than at export
    got = session.run(["logits"], {"images": images})[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, student.model(torch.from_numpy(images)).numpy(), rtol=1e-3, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]  # includes the weights


@pytest.mark.parametrize("fault", ["missing", "broken"])
@pytest.mark.parametrize("module", ["onnx", "onnxruntime"])
def test_onnx_with_a_package_that_is_missing_or_broken(module, fault, monkeypatch, tmp_path):
    (tmp_path / f"{module}.py").write_text("raise ValueError('invalid literal for int(): post0')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, module, raising=False)
    if fault == "missing":
        monkeypatch.setitem(sys.modules, module, None)
    expected = rf"needs {module}, which is not installed" if fault == "missing" else "cannot be imported(?s:.*)post0"
    with pytest.raises(UserError, match=expected) as error:
        check_format("onnx")
    assert "scalekd-cache[export]" in str(error.value)
    with pytest.raises(UserError, match=r"no export format onx: did you mean onnx\?"):
        check_format("onx")


def test_a_file_that_answers_differently_is_not_kept(tmp_path, monkeypatch):
    write = export_formats._write

    def broken(*args):
        answer = write(*args)
        return lambda batch: answer(batch) + 0.1

    monkeypatch.setattr(export_formats, "_write", broken)
    with pytest.raises(UserError, match="logits differ from the student's"):
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
    """ResNet-50, Swin-T and ViT-B at full size, loaded into the public constructors."""
    size, args, make = TORCHVISION[name]
    student = student_of(name, size, **args)
    twin = make().eval()
    twin.load_state_dict(transfer_state(student.model, "torchvision", size), strict=True)
    torch.testing.assert_close(logits(twin, size), logits(student.model, size), rtol=1e-3, atol=1e-3)
    assert torchvision_twin(student.model, size).state_dict().keys() == twin.state_dict().keys()


def test_torchvision_as_a_file(tmp_path):
    student = student_of("swin_tiny", 224, **SWIN)
    assert export_file(student, "torchvision", tmp_path / "s.safetensors", image_size=224, facts={}) < 1e-3
    for name, size in (("resnet10t", 64), ("vit_base", 64), ("mobilenetv1_100", 64)):
        args = VIT if name == "vit_base" else {}
        with pytest.raises(UserError, match="torchvision") as error:
            export_file(student_of(name, size, **args), "torchvision", tmp_path / "x", image_size=size, facts={})
        assert "--format timm" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


MMPRETRAIN = {
    "resnet50": (64, "13cb629e5716380bb4473fbd678f49c3342d2f3d86f76a1e0ffa93872a5c0bac"),  # ResNet
    "resnet18": (64, "f1bf2c2384a85d698d17a6a2828ac18af9f5fec71ebdef490be10655a01ee86b"),
    "resnet18d": (64, "1c40b06b2a05e8842d4d4257feefa007f8651754a82213caea4f276b96920e94"),  # ResNetV1d
    "resnet50d": (64, "58693287896b1708274f10a8780022196ed80a84c826cdfaa7089bc64906c9b9"),
    "resnet50c": (64, "87e6ce9d49c7c45ccacf32cc6205b269983f09f4ed57e41eb30ea250fcef33ed"),  # ResNetV1c
    "resnet50s": (64, "13a6a3d53681c381d0f0afd6e93c7ad31b0f8c21d2805143a8501ca075690674"),  # and stem_channels=128
    "seresnet50": (64, "268172f85ddeeeef3d72dd2353d3f6f70f34bac5479b73bc91ac2cd57a3ba03a"),  # SEResNet
    "resnext50_32x4d": (64, "5c37d9e9a60f6a848a87a9adbdaf81a7f736054018eed617c7577654f38de5ee"),  # ResNeXt
    "convnext_tiny": (64, "85dc7fc6be5548396a214ef5b80eeabcb7e00cc120450ddaaec1db5ec48e5ada"),
    "convnext_atto": (64, "daf5a9a7e5f2d3c04c52f66e3bdadbca11e3f00cb295cbcb600bda609bd07a68"),
    "mixer_s16": (224, "bf4fe436379fecc00a758860dba52ea8c167209314cd9ca03067f61f0b178c40"),
    "vit_base_patch16_224": (
        224,
        "fed1b67b7780773f5487481eb4bd06a105e5bf066c189a34d0361ab0850a0ad7",
    ),  # with a class token
    "vit_base": (
        64,
        "165b50fe3d0d213d801a03d3d0f4baf6c003861aa0622429999a0ca3ef6c2f0d",
    ),  # with_cls_token=False, out_type="featmap"
    "swin_tiny": (224, "deb293e8f49839cca547fbd4547161bb2f9de1c16b7495faab9012c4aa3b3e1a"),
}
"""sha256 over the names and shapes (sorted, one line "name (1, 2)" each) of mmpretrain 1.2.0's modules with 5 classes
at the given image sizes. The package is not a dependency. When these were recorded, the exports loaded strictly into
its modules and gave the same logits to 1e-5."""


def slow_but(quick, cases):
    """Large models are slow tests; `quick` names the others."""
    named = [(case if isinstance(case, tuple) else (case,)) for case in cases]
    return [pytest.param(*case, marks=() if case[0] in quick else pytest.mark.slow) for case in named]


@pytest.mark.parametrize("name", slow_but({"resnet18d", "seresnet50", "convnext_atto"}, MMPRETRAIN))
def test_names_and_shapes_are_those_of_mmpretrain(name):
    size, expected = MMPRETRAIN[name]
    state = transfer_state(student_of(name, size).model, "mmpretrain", size)
    lines = [f"{key} {tuple(value.shape)}" for key, value in sorted(state.items())]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == expected, "\n".join(lines)


TRANSCRIBED = {
    "resnet50": 64,
    "resnet50d": 64,
    "mobilenetv1": 64,
    "convnext_tiny": 64,
    "mixer_s16": 224,
    "swin_tiny": 224,
}


@pytest.mark.parametrize("name", slow_but({"resnet50d", "mobilenetv1"}, TRANSCRIBED))
def test_names_of_mmpretrain_load_strictly_and_answer_the_same(name):
    """Load into the transcribed modules that the importer tests use."""
    size = TRANSCRIBED[name]
    student = student_of(name, size, classes=5)
    twin = upstream_students.paper_student(name, 5)
    twin.load_state_dict(transfer_state(student.model, "mmpretrain", size), strict=True)
    got, expected = logits(twin.eval(), size), logits(student.model, size)
    assert float((got - expected).abs().max()) < 2e-3 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    slow_but(
        {"resnetblur18", "resnet26t", "seresnet18", "mobilenetv1_100", "mobilenetv2_050", "convnextv2_atto"},
        [
            ("resnetaa50", 64, "with different operations"),  # the tensors of a ResNet-50
            ("resnetblur18", 64, "with different operations"),
            ("resnet26t", 64, "a different variant of"),
            ("ecaresnet50t", 64, "a different variant of"),
            ("seresnet18", 64, "a different variant of"),  # SEResNet lacks this block
            ("mobilenetv1_100", 64, "with different operations"),  # ReLU6
            ("mobilenetv2_050", 64, "a different variant of"),
            ("swin_tiny", 64, "needs one window size that divides all map sizes"),  # windows of 7, 4 and 2
            ("swin_tiny", 128, "needs one window size that divides all map sizes"),
            (
                "swin_tiny",
                256,
                "needs one window size that divides all map sizes",
            ),  # padded maps: mmpretrain's mask differs
            ("vit_small_patch14_dinov2", 56, "a different variant of"),
            ("resmlp_12_224", 64, "a different variant of"),
            ("convnextv2_atto", 64, "a different variant of"),
            ("densenet121", 64, "DenseNet"),
        ],
    ),
)
def test_forms_that_mmpretrain_does_not_have_are_refused(name, size, reason):
    model = student_of(name, size).model
    with pytest.raises(UserError, match=f"no counterpart in mmpretrain[^$]*{reason}"):
        transfer_state(model, "mmpretrain", size)


def test_patch_merging_is_reordered_there_and_back():
    value = torch.randn(6, 4 * 5)
    name = "layers.1.downsample.reduction.weight"
    assert torch.equal(unfold_to_timm(name, timm_to_unfold(name, value)), value)
    assert not torch.equal(timm_to_unfold(name, value), value)
    assert torch.equal(timm_to_unfold("layers.1.blocks.0.attn.qkv.weight", value), value)


def test_models_that_no_codebase_names():
    with pytest.raises(UserError, match="no counterpart in mmpretrain"):
        transfer_state(nn.Linear(2, 2), "mmpretrain", 64)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint of a randomly initialized student."""
    folder = tmp_path_factory.mktemp("run") / "first"
    run = RunFolder(folder, to_plain(DistillConfig(student=StudentConfig(name="resnet10t"))))
    run.write_facts(
        {
            "fingerprint": "f" * 64,
            "views": 2,
            "image_size": 64,
            "class_names": ["a|b\n# c", "b", "c"],
            "data": {"source": "pets`|x"},
        }
    )
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
    assert "| dataset | `pets'/x` |" in text  # stays in its cell
    assert "# c" not in text
    summary = {
        "student": "resnet10t",
        "epochs": 1,
        "steps": 5,
        "seed": 0,
        "views": 2,
        "bytes_per_view": 1.5,
        "cache_fingerprint": "f" * 64,
        "images_per_s": 1.0,
        "minutes": 0.1,
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
    assert "distilled from demo_swin; top-1 91.50% on 1,234 validation images" in text
    assert "top-5" not in text


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
