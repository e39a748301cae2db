"""Importing checkpoints of upstream's distiller, generated here from transcribed module definitions."""

import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from upstream_students import (
    Classifier,
    ConvNeXt,
    Distiller,
    MlpMixer,
    MobileNetV1,
    PatchMerging,
    ResNet,
    SwinTransformer,
    VisionTransformer,
    paper_student,
)

from pipelines.import_upstream import main
from scalekd_cache.config.stage2 import ScaleKDConfig
from scalekd_cache.convert.names_upstream import family_of, student_tensors, unfold_to_timm
from scalekd_cache.convert.upstream_checkpoint import (
    Problems,
    fit_tensors,
    guess_student,
    import_checkpoint,
    import_student,
)
from scalekd_cache.convert.upstream_file import read_checkpoint
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import SHORT_NAMES, Student
from scalekd_cache.scalekd.heads import ScaleKDHeads

torch.set_num_threads(1)
PAPER = ["resnet50", "resnet50d", "mobilenetv1", "convnext_tiny", "mixer_s16", "mixer_b16", "mixer_b14", "vit_small",
         "swin_tiny", "vit_base"]  # fmt: skip


def scattered(module: nn.Module) -> nn.Module:
    """Randomize every tensor, so that a swap shows: no norm weights of one, no zero biases, no zero running means."""
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn_like(value)
            if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.copy_(1 + 0.3 * noise.clamp(-2, 2))
            elif value.ndim < 2 or value.std() < 0.05:
                value.add_(0.1 * noise)
    return module


@pytest.mark.parametrize("name", PAPER)
def test_names_and_shapes_of_every_student(name: str) -> None:
    """At full size on the meta device: every tensor of timm's model is filled, and none is left over."""
    with torch.device("meta"):
        upstream = paper_student(name)
        timm_name, args = SHORT_NAMES.get(name, (name, {}))
        model = timm.create_model(timm_name, **args)
    state = upstream.state_dict()
    family = family_of(state)
    assert family is not None
    assert all(args.get(key) == value for key, value in family.args.items())  # short names compute the same as upstream
    problems, left_out = Problems(), []
    tensors = import_student(family, state, model.state_dict(), problems, left_out, "student.")
    assert problems == Problems()
    model.load_state_dict(tensors, strict=True, assign=True)
    assert guess_student(family, state, 1000, Path("x.pth")) == name
    allowed = ("cls_token", "relative_position_index")
    assert all(entry.endswith(allowed) for entry in left_out)
    assert len(tensors) + len(left_out) == len(state)


SMALL = {
    "ResNet-V1": (lambda: (ResNet((1, 2, 1, 1), deep=False), 2048), "resnet50", {"layers": (1, 2, 1, 1)}, 64),
    "ResNet-V1d": (lambda: (ResNet((1, 2, 1, 1), deep=True), 2048), "resnet50d", {"layers": (1, 2, 1, 1)}, 64),
    "MobileNet-V1": (lambda: (MobileNetV1(), 1024), "mobilenetv1_100", {}, 64),
    "ConvNeXt": (
        lambda: (ConvNeXt((1, 2, 1, 1), (8, 16, 24, 32)), 32),
        "convnext_tiny",
        {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)},
        64,
    ),
    "ConvNeXt with 1x1 convolutions": (
        lambda: (ConvNeXt((1, 2, 1, 1), (8, 16, 24, 32), linear=False), 32),
        "convnext_tiny",
        {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)},
        64,
    ),
    "MLP-Mixer": (lambda: (MlpMixer(512, 8, 16), 512), "mixer_s16_224", {"img_size": 64}, 64),
    "ViT": (
        lambda: (VisionTransformer(48, 2, 3, 16), 48),
        "vit_small_patch16_224",
        {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64},
        64,
    ),
    "Swin": (
        lambda: (SwinTransformer(16, (2, 2, 2, 2), (2, 2, 4, 4)), 128),
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (2, 2, 4, 4)},
        224,
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_imported_students_compute_what_upstreams_do(case: str) -> None:
    torch.manual_seed(0)
    make, name, args, size = SMALL[case]
    upstream = scattered(Classifier(*make(), 7)).eval()
    for module in upstream.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data *= 2.5  # activations that a cap at 6 would change
    family = family_of(upstream.state_dict())
    assert family is not None
    model = timm.create_model(name, num_classes=7, **args, **family.args)
    problems = Problems()
    tensors = import_student(family, upstream.state_dict(), model.state_dict(), problems, [], "")
    assert problems == Problems()
    model.load_state_dict(tensors, strict=True)
    model.eval()
    x = torch.randn(2, 3, size, size)
    # Upstream's Mixer has epsilon 1e-5 in its norms, timm's 1e-6.
    tolerance = 1e-3 if case == "MLP-Mixer" else 2e-5
    student = Student(model, name, {}, size)
    with torch.no_grad():
        output, s4 = student(x), upstream.backbone(x)
        pairs = [(upstream(x), output.logits)]
    if case != "MLP-Mixer":  # its S4 is taken before the final norm
        pairs.append((s4[-1] if isinstance(s4, tuple) else s4, output.s4))
    for want, got in pairs:
        assert float(want.std()) > 1e-2
        assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


def test_patch_merging_is_reordered() -> None:
    torch.manual_seed(0)
    upstream = scattered(PatchMerging(6))
    ours = timm.models.swin_transformer.PatchMerging(6)
    state = {
        name: unfold_to_timm(f"layers.1.downsample.{name}", value) for name, value in upstream.state_dict().items()
    }
    ours.load_state_dict(state)
    x = torch.randn(2, 4, 8, 6)
    torch.testing.assert_close(ours(x), upstream(x), rtol=1e-5, atol=1e-5)
    ours.load_state_dict(upstream.state_dict())
    assert not torch.allclose(ours(x), upstream(x), atol=0.1)  # the order matters


def checkpoint(path: Path, *, name: str = "mobilenetv1", classes: int = 5, **options) -> dict[str, Tensor]:
    """A distiller's checkpoint on disk, and its state dict."""
    torch.manual_seed(0)
    state = scattered(Distiller(paper_student(name, classes), **options)).state_dict()
    torch.save({"meta": {"epoch": 300, "dataset_meta": {"classes": ("a", "b")}}, "state_dict": state}, path)
    return state


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("upstream") / "distiller.pth"
    return path, checkpoint(path)


def altered(whole: tuple[Path, dict[str, Tensor]], path: Path, change) -> Path:
    state = dict(whole[1])
    change(state)
    torch.save({"state_dict": state}, path)
    return path


def test_command_imports_student_and_projectors(whole, tmp_path, capsys) -> None:
    path, state = whole
    out = tmp_path / "out"
    main({"ckpt": str(path), "out": str(out), "image_size": "64"})
    printed = capsys.readouterr().out
    assert "mobilenetv1 (MobileNet-V1)" in printed
    assert "5 classes" in printed
    assert "teacher.* (4), linear.* (2)" in printed
    model = timm.create_model(f"local-dir:{out / 'student'}", pretrained=True).eval()
    upstream = paper_student("mobilenetv1", 5).eval()
    upstream.load_state_dict({k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")})
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), upstream(x), rtol=1e-4, atol=1e-5)

    heads = ScaleKDHeads(ScaleKDConfig(heads_s3=4, heads_s4=6), ((10, 6, 6), (20, 3, 3)), (12, 6, 6), (24, 3, 3))
    heads.load_state_dict(load_file(out / "heads.safetensors"), strict=True)
    with safe_open(out / "heads.safetensors", framework="pt") as file:
        assert file.metadata() == {"s4_query": "s3"}
    theirs = state["distill_losses.loss_fmd_s4.projector_1.ffn.layers.1.weight"]
    assert torch.equal(heads.s4["frequency"].ffn[2].weight, theirs)
    main({"ckpt": str(path), "out": str(out), "image_size": "64", "student": "mobilenetv1"})  # again


def test_layer_norm_projectors_and_the_wrapped_student(tmp_path) -> None:
    """A ConvNeXt's projectors have layer norm; a parallel wrapper adds `module.`."""
    path, out = tmp_path / "c.pth", tmp_path / "out"
    state = checkpoint(path, layer_norm=True)
    torch.save({f"module.{name}": value for name, value in state.items()}, path)
    report = import_checkpoint(path, out, "mobilenetv1", image_size=64)
    heads = ScaleKDHeads(
        ScaleKDConfig(heads_s3=4, heads_s4=6), ((10, 6, 6), (20, 3, 3)), (12, 6, 6), (24, 3, 3), layer_norm=True
    )
    heads.load_state_dict(load_file(report.heads), strict=True)


def test_own_s4_query_is_dead_unless_asked_for(tmp_path) -> None:
    path = tmp_path / "c.pth"
    state = checkpoint(path, self_query_s4=True)
    names = [f"distill_losses.loss_fmd_s4.projector_{i}.query.weight" for i in (0, 1)]
    report = import_checkpoint(path, tmp_path / "a", "mobilenetv1", image_size=64)
    assert set(names) <= set(report.left_out)
    assert "s4.spatial.query" not in load_file(report.heads)
    report = import_checkpoint(path, tmp_path / "b", "mobilenetv1", image_size=64, s4_query="learned")
    assert not set(names) & set(report.left_out)
    assert torch.equal(load_file(report.heads)["s4.frequency.query"], state[names[1]])


def test_student_of_the_transfer_script(whole, tmp_path) -> None:
    path = tmp_path / "student.pth"
    student = {k.removeprefix("student."): v for k, v in whole[1].items() if k.startswith("student.")}
    torch.save({"state_dict": student}, path)
    report = import_checkpoint(path, tmp_path / "out", "mobilenetv1", image_size=64)
    assert report.heads is None
    assert report.left_out == []
    assert not (tmp_path / "out" / "heads.safetensors").exists()


def test_transformer_from_the_command_at_its_own_size(tmp_path, capsys) -> None:
    """A ViT that keeps its class token and its position."""
    torch.manual_seed(0)
    upstream = scattered(Classifier(VisionTransformer(192, 12, 3, 16), 192, 5)).eval()
    path, out = tmp_path / "c.pth", tmp_path / "out"
    torch.save({"state_dict": {f"student.{k}": v for k, v in upstream.state_dict().items()}}, path)
    main({"ckpt": str(path), "out": str(out), "image_size": "64", "student": "vit_tiny_patch16_224"})
    assert "student.backbone.cls_token" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{out / 'student'}", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), upstream(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("student.backbone.s3.2.3.weight"), "1 missing: blocks.3.4.conv_pw.weight"),
        (lambda s: s.update({"student.backbone.s5.0.0.weight": torch.ones(1)}), "1 unexpected: student.backbone.s5"),
        (lambda s: s.update({"optimizer.x": torch.ones(1)}), "1 unexpected: optimizer.x"),
        (lambda s: s.pop("distill_losses.loss_fmd_s4.projector_0.norm.bias"), "1 missing: s4.spatial.norm.bias"),
        (
            lambda s: s.update({"distill_losses.loss_fmd_s3.projector_0.extra": torch.ones(1)}),
            "1 unexpected: distill_losses.loss_fmd_s3.projector_0.extra",
        ),
        (lambda s: s.update({"distill_losses.loss_mgd.x": torch.ones(1)}), "1 unexpected: distill_losses.loss_mgd.x"),
        (
            lambda s: s.pop("distill_losses.loss_fmd_s3.projector_0.query.weight"),
            "1 missing: distill_losses.loss_fmd_s3.projector_0.query.weight",
        ),
        (
            lambda s: s.update({"student.backbone.s1.0.0.weight": torch.ones(32, 3, 5, 5)}),
            "student.backbone.s1.0.0.weight has shape (32, 3, 5, 5), but conv_stem.weight needs (32, 3, 3, 3)",
        ),
        (
            lambda s: s.update({"distill_losses.loss_fmd_s3.projector_1.norm.bias": torch.ones(3)}),
            "distill_losses.loss_fmd_s3.projector_1.norm.bias has shape (3,), but s3.frequency.norm.bias needs (12,)",
        ),
        (lambda s: s["student.head.fc.bias"].fill_(float("nan")), "student.head.fc.bias contains NaN or Inf"),
    ],
    ids=["missing", "surplus", "other part", "missing head", "surplus head", "other loss", "telling head", "shape",
         "head shape", "nan"],
)  # fmt: skip
def test_wrong_checkpoints_are_named(whole, tmp_path, change, named) -> None:
    def copying(state):
        state["student.head.fc.bias"] = state["student.head.fc.bias"].clone()
        change(state)

    path = altered(whole, tmp_path / "wrong.pth", copying)
    with pytest.raises(UserError) as error:
        import_checkpoint(path, tmp_path / "out", "mobilenetv1", image_size=64)
    assert named in str(error.value)
    assert not (tmp_path / "out").exists()


def test_all_that_is_wrong_is_named_at_once(whole, tmp_path) -> None:
    def change(state):
        state["student.backbone.s9.x"] = torch.ones(1)
        del state["student.backbone.s2.0.1.bias"], state["distill_losses.loss_fmd_s4.projector_1.pos_attention.v.bias"]

    with pytest.raises(UserError) as error:
        import_checkpoint(altered(whole, tmp_path / "w.pth", change), tmp_path / "out", "mobilenetv1", image_size=64)
    for name in ("student.backbone.s9.x", "blocks.2.0.bn1.bias", "s4.frequency.pos_attention.v.bias"):
        assert name in str(error.value)


@pytest.mark.parametrize(("student", "classes"), [("mobilenetv1", 9), ("resnet18", None), ("vit_small", None)])
def test_another_student_or_number_of_classes(whole, tmp_path, student, classes) -> None:
    with pytest.raises(UserError):
        import_checkpoint(whole[0], tmp_path / "out", student, num_classes=classes, image_size=64)
    assert not (tmp_path / "out").exists()


class Hostile:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_in_a_checkpoint_do_not_run(whole, tmp_path, legacy) -> None:
    path, made = tmp_path / "hostile.pth", tmp_path / "made"
    content = {"state_dict": whole[1], "message_hub": Hostile(made)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="weights_only") as error:
        import_checkpoint(path, tmp_path / "out", "mobilenetv1", image_size=64)
    assert "mkdir" in str(error.value)
    assert not made.exists()


class HistoryBuffer:
    """Like mmengine's message hub: arrays, and methods by name, pickled under mmengine's name."""

    def __init__(self) -> None:
        self._log_history = np.arange(3.0)
        self._statistics_methods = {"mean": HistoryBuffer.mean}
        self.last = np.float64(0.5)

    def mean(self) -> float:
        raise AssertionError


class Argumented:
    """An object that `copyreg` reconstructs with arguments."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return Called, (self.path,)


class Called:
    """Calling this makes a folder."""

    def __init__(self, path: str) -> None:
        os.mkdir(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_logs_in_a_checkpoint_become_inert(whole, tmp_path, monkeypatch, legacy) -> None:
    """mmengine's checkpoints hold its message hub; skipping it must not need mmengine."""
    monkeypatch.setattr(HistoryBuffer, "__module__", "mmengine.logging.history_buffer")
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, "mmengine.logging.history_buffer", module)
        content = {"state_dict": whole[1], "message_hub": {"log_scalars": {"loss": HistoryBuffer()}}}
        torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "c.pth", weights_only=True)
    found = read_checkpoint(tmp_path / "c.pth")
    assert found.keys() == whole[1].keys()
    assert all(torch.equal(value, whole[1][name]) for name, value in found.items())


def test_a_weight_that_is_no_tensor_is_not_taken_for_one(whole, tmp_path) -> None:
    torch.save({"state_dict": {**whole[1], "student.head.fc.bias": np.zeros(5)}}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="no state dict"):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_classes_of_a_checkpoint_are_not_called(whole, tmp_path, legacy) -> None:
    path, made = tmp_path / "c.pth", tmp_path / "made"
    content = {"state_dict": whole[1], "message_hub": Argumented(made)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="calls functions") as error:
        read_checkpoint(path)
    assert "Called" in str(error.value)
    assert not made.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 cut"])
def test_damaged_files(tmp_path, content) -> None:
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.pth"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="the checkpoint is missing"):
        read_checkpoint(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    "content", [[1, 2], {"state_dict": {"x": 3}}, {"meta": {}}, {"state_dict": {"x": torch.ones(1)}}]
)
def test_files_without_a_student(tmp_path, content) -> None:
    path = tmp_path / "c.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match="has no"):
        import_checkpoint(path, tmp_path / "out", "mobilenetv1")


def test_a_folder_with_other_things_is_refused(whole, tmp_path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="already contains other files"):
        import_checkpoint(whole[0], tmp_path, "mobilenetv1", image_size=64)
    assert (tmp_path / "mine").read_text() == "x"


def test_a_student_of_another_size_asks_for_its_name(tmp_path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"state_dict": Classifier(VisionTransformer(32, 1, 2, 16), 32, 5).state_dict()}, path)
    with pytest.raises(UserError, match="set --student to the model's name"):
        import_checkpoint(path, tmp_path / "out")


def test_two_names_for_one_tensor_are_surplus() -> None:
    state = {"backbone.layers.0.attn.qkv.weight": torch.ones(3, 1), "head.fc.bias": torch.ones(1)}
    family = family_of(state)
    assert family is not None
    mapped = student_tensors(family, {**state, "head.layers.head.bias": torch.ones(1)})
    assert mapped.unknown == ["head.layers.head.bias"]
    problems = Problems()
    fit_tensors(mapped, {"head.bias": torch.ones(1)}, problems)
    assert problems.surplus == ["head.layers.head.bias", "backbone.layers.0.attn.qkv.weight"]
