"""Weights files of teachers: trained at other image sizes, the names of original checkpoints, CLIP's projection."""

import sys

import pytest
import timm
import torch
from commands import execute
from safetensors.torch import save_file

from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.convert.backbone import open_backbone
from scalekd_cache.errors import UserError
from scalekd_cache.models.teacher import load_teacher, teacher_classes
from scalekd_cache.models.timm_models import is_projection
from scalekd_cache.models.weights import save_weights, stored_shapes

TOKENS = {"embed_dim": 48, "depth": 2, "num_heads": 2}
SAM = {**TOKENS, "global_attn_indexes": [1], "neck_chans": 32}


def load(name, size, path, args=None, **options):
    config = TeacherConfig(name=name, weights=str(path), precision="float32", **options)
    return load_teacher(
        config, image_size=size, num_classes=5, device=torch.device("cpu"), model_args=TOKENS if args is None else args
    )


def save(model, path, rename=lambda name: name):
    torch.manual_seed(0)
    state = {rename(name): torch.randn_like(value) for name, value in model.state_dict().items()}
    save_file(state, path)
    return state


@pytest.mark.parametrize(
    ("name", "size", "other", "args"),
    [
        ("vit_small_patch14_dinov2", 56, 84, TOKENS),
        ("vit_small_patch14_reg4_dinov2", 56, 28, TOKENS),
        ("vit_base_patch16_siglip_224.v2_webli", 64, 96, TOKENS),
        ("vit_base_patch16_clip_224.openai", 64, 96, TOKENS),
        ("eva02_tiny_patch14_224", 56, 84, TOKENS),
        ("vit_small_patch16_rope_mixed_ape_224", 64, 96, TOKENS),
        ("vit_small_patch16_dinov3", 64, 96, TOKENS),
        ("beit_base_patch16_224", 64, 96, TOKENS),
        ("swin_tiny_patch4_window7_224", 64, 96, {"embed_dim": 24, "depths": [1, 1, 1, 1]}),
    ],
)
def test_a_file_of_another_image_size(tmp_path, name, size, other, args):
    """The same weights as timm's own: resampled from the image size they were trained at."""
    path = tmp_path / "teacher.safetensors"
    state = save(timm.create_model(name, img_size=size, **args, num_classes=0), path)
    teacher = load(name, other, path, args)
    overlay = {"file": str(path), "num_classes": 0}
    expected = timm.create_model(
        name, img_size=other, **args, num_classes=0, pretrained=True, pretrained_cfg_overlay=overlay
    )
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in teacher.model.state_dict().items())
    same = load(name, size, path, args).model.state_dict()
    assert all(torch.equal(value, same[key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "args", "channels"),
    [
        ("samvit_base_patch16", {**SAM, "img_size": 128}, 32),
        ("naflexvit_base_patch16_siglip", TOKENS, 48),
        ("naflexvit_base_patch16_radio_v3", TOKENS, 48),
    ],
)
def test_images_of_another_size_with_the_weights_as_they_are(tmp_path, name, args, channels):
    path = tmp_path / "teacher.safetensors"
    state = save(timm.create_model(name, **args, num_classes=0), path)
    for size in (64, 96):
        teacher = load(name, size, path, args)
        assert teacher.spec.feature_shape == (channels, size // 16, size // 16)
        assert all(torch.equal(value, state[key]) for key, value in teacher.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "args", "prefix"),
    [
        (
            "sam2_hiera_tiny",
            {"embed_dim": 24, "stages": [1, 1, 1, 1], "global_att_blocks": [3]},
            "image_encoder.trunk.",
        ),
        ("vit_tiny_patch16_224", TOKENS, "module.backbone."),
        ("convnext_tiny", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}, "model."),
    ],
)
def test_a_prefix_of_all_names_is_named(tmp_path, name, args, prefix):
    """A checkpoint of a wrapped model, or of a larger one: Meta's of SAM 2 has a neck, and no final norm."""
    path = tmp_path / "teacher.safetensors"
    state = save(timm.create_model(name, **args, num_classes=0), path, lambda name: prefix + name)
    state = {name: value for name, value in state.items() if "head.norm" not in name}
    save_file({**state, "image_encoder.neck.convs.0.conv.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="do not match the model") as caught:
        load(name, 64, path, args)
    assert f"remove the prefix {prefix} from the tensor names" in str(caught.value)


def test_original_names_of_sam(tmp_path):
    """Names of Meta's checkpoint, which also holds the rest of the model."""
    path = tmp_path / "sam.safetensors"
    args = {**SAM, "img_size": 64}
    model = timm.create_model("samvit_base_patch16", **args, num_classes=0)
    state = save(model, path, lambda name: "image_encoder." + name.replace("mlp.fc", "mlp.lin"))
    save_file({**state, "mask_decoder.weight": torch.zeros(3)}, path)
    loaded = load("samvit_base_patch16", 64, path, args).model.state_dict()
    assert torch.equal(loaded["blocks.0.mlp.fc1.weight"], state["image_encoder.blocks.0.mlp.lin1.weight"])


@pytest.mark.parametrize("change", [lambda state: state.pop("norm.bias"), lambda state: state.update(x=torch.ones(2))])
def test_a_file_that_fits_no_image_size(tmp_path, change):
    path = tmp_path / "teacher.safetensors"
    state = save(timm.create_model("vit_small_patch14_dinov2", img_size=56, **TOKENS), path)
    change(state)
    save_file(state, path)
    with pytest.raises(UserError, match="do not match the model"):
        load("vit_small_patch14_dinov2", 84, path)


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("vit_base_patch16_clip_224.openai", 0),
        ("vit_base_patch16_clip_224.laion2b_ft_in12k_in1k", 1000),
        ("eva02_base_patch16_clip_224.merged2b", 0),
        ("convnext_large_mlp.clip_laion2b_ft_320", 0),
        ("convnext_large_mlp.clip_laion2b_augreg_ft_in1k_384", 1000),
        ("vit_pe_core_base_patch16_224.fb", 0),
        ("vit_base_patch16_224.augreg_in21k", 21843),
    ],
)
def test_the_projection_of_clip_is_not_a_classifier(name, classes):
    assert teacher_classes(TeacherConfig(name=name), name, None, 10) == classes


def test_a_data_set_with_as_many_classes_as_the_projection(tmp_path):
    name = "vit_base_patch16_clip_224.openai"
    assert teacher_classes(TeacherConfig(name=name), name, None, 512) == 512
    assert teacher_classes(TeacherConfig(name=name, num_classes=512), name, None, 0) == 512
    assert not is_projection("vit_base_patch16_224", 512)
    path = tmp_path / "clip.safetensors"
    save(timm.create_model(name, img_size=64, **TOKENS, num_classes=512), path)
    assert not load(name, 64, path).spec.has_classifier
    assert load(name, 64, path, num_classes=512).spec.num_classes == 512


RESAMPLE = """
import sys, warnings
import timm
from scalekd_cache.models.weights import load_converted, save_weights, stored_shapes
from pathlib import Path
small = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "num_classes": 2}
file = Path(sys.argv[1])
save_weights(timm.create_model("swin_tiny_patch4_window7_224", img_size=112, **small), file)
load_converted(timm.create_model("swin_tiny_patch4_window7_224", img_size=32, **small), file, stored_shapes(file))
warnings.warn_explicit("another text", UserWarning, "interpolate.py", 1, "timm.layers.interpolate")
warnings.warn_explicit("torch.searchsorted(): input value tensor is non-contiguous", UserWarning, "mine.py", 1, "mine")
"""


def test_resampling_position_biases_prints_no_warning_of_timm(tmp_path):
    """Each appears once per process; the same text from another module, and other texts, are still printed."""
    output = execute(sys.executable, "-c", RESAMPLE, tmp_path / "swin.safetensors")
    assert output.splitlines() == [
        "interpolate.py:1: UserWarning: another text",
        "mine.py:1: UserWarning: torch.searchsorted(): input value tensor is non-contiguous",
    ]


def test_a_model_that_shares_tensors_is_saved(tmp_path):
    """CoaT uses one layer in several blocks; safetensors rejects tensors that share memory."""
    model = timm.create_model("coat_tiny", img_size=32)
    save_weights(model, tmp_path / "coat.safetensors")
    assert stored_shapes(str(tmp_path / "coat.safetensors")).keys() == model.state_dict().keys()


def test_the_projection_in_a_fetched_file_is_left_out_by_probe_and_finetune(tmp_path):
    name, file = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m", tmp_path / "clip.safetensors"
    model = timm.create_model(name)
    save_weights(model, file)
    backbone = open_backbone(name, str(file), size=None, pretrained=True, option="--backbone")
    assert (model.num_classes, backbone.model.num_classes) == (512, 0)
    kept = model.state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in backbone.model.state_dict().items())
