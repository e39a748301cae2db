import copy

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import build_student

torch.set_num_threads(1)
# name, S3, S4, LayerNorm family
CASES = [
    ("resnet18", (256, 4, 4), (512, 2, 2), False),
    ("resnet50", (1024, 4, 4), (2048, 2, 2), False),
    ("mobilenetv1", (512, 4, 4), (1024, 2, 2), False),
    ("mobilenetv3_small_100", (48, 4, 4), (576, 2, 2), False),
    ("convnext_atto", (160, 4, 4), (320, 2, 2), True),  # norm after pooling
    ("convnext_tiny", (384, 4, 4), (768, 2, 2), True),  # with the short name, norm before pooling
    ("swin_tiny", (384, 4, 4), (768, 2, 2), True),
    ("vit_tiny_patch16_224", (192, 4, 4), (192, 4, 4), True),
    ("vit_small", (384, 4, 4), (384, 4, 4), True),
    ("mixer_s16", (512, 4, 4), (512, 4, 4), True),
    ("cait_xxs24_224", (192, 4, 4), (192, 4, 4), True),  # its class token comes after these blocks
]


def make(name: str, **options):
    torch.manual_seed(0)
    return build_student(StudentConfig(name=name, **options), num_classes=5, image_size=64)


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_taps_and_logits(case):
    name, s3, s4, layer_norm = case
    student = make(name)
    assert student.training
    assert student.tap_shapes == (s3, s4)
    assert student.layer_norm is layer_norm
    x = torch.randn(2, 3, 64, 64)
    student.eval()
    with torch.no_grad():
        output = student(x)
        assert torch.equal(output.logits, student.model(x))
        expected = reference_maps(student.model, x)
    assert output.s3.shape == (2, *s3)
    assert output.s4.shape == (2, *s4)
    assert torch.allclose(output.s3, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(output.s4, expected[1], rtol=1e-5, atol=1e-5)
    assert all(tap.value is None for tap in student._taps)

    student.train()
    output = student(x)
    sum(part.square().sum() for part in output).backward()
    assert all(value.grad is not None for value in student.parameters())

    rebuilt = timm.create_model(student.model_name, pretrained=False, **student.model_args)
    rebuilt.load_state_dict(student.model.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(x), student.eval().model(x))


def reference_maps(model, x):
    """The documented definition, compared with timm's `forward_intermediates`."""
    if len({entry["reduction"] for entry in model.feature_info}) > 1:
        s3, s4 = model.forward_intermediates(x, indices=2, intermediates_only=True)
        if isinstance(model, timm.models.swin_transformer.SwinTransformer):
            s4 = model.norm(s4.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif isinstance(model, timm.models.convnext.ConvNeXt):
            norm = model.head.norm if isinstance(model.norm_pre, torch.nn.Identity) else model.norm_pre
            s4 = norm(s4)
        return s3, s4
    third = len(model.blocks) * 3 // 4 - 1
    mixer = isinstance(model, timm.models.mlp_mixer.MlpMixer)
    third = len(model.blocks) - 3 if mixer else third
    s3, s4 = model.forward_intermediates(x, indices=[third, len(model.blocks) - 1], intermediates_only=True)
    if mixer:
        return s3, s4
    norm = model.norm if not isinstance(model.norm, torch.nn.Identity) else model.fc_norm
    return s3, norm(s4.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_class_token_and_pooling():
    assert make("vit_tiny_patch16_224").model.num_prefix_tokens == 1
    pooled = make("vit_small")
    assert pooled.model.num_prefix_tokens == 0
    assert pooled.model_args["class_token"] is False
    assert pooled.model_args["img_size"] == 64


def test_drop_path_is_used_where_it_exists():
    assert make("convnext_atto", drop_path=0.3).model_args["drop_path_rate"] == 0.3
    assert "drop_path_rate" not in make("densenet121", drop_path=0.3).model_args


def test_default_size_needs_no_argument():
    student = build_student(StudentConfig(name="vit_tiny_patch16_224"), num_classes=5, image_size=224)
    assert "img_size" not in student.model_args
    assert student.tap_shapes == ((192, 14, 14), (192, 14, 14))


def test_probe_leaves_running_statistics_alone():
    student = make("resnet18")
    assert all(value == 0 for name, value in student.named_buffers() if name.endswith("num_batches_tracked"))


def test_a_copy_has_its_own_taps():
    student = make("resnet18").eval()
    twin = copy.deepcopy(student)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        next(twin.parameters()).zero_()
        assert not torch.equal(student(x).s4, twin(x).s4)


@pytest.mark.parametrize("name", ["resnet51", "hf-hub:timm/resnet18", "vitsmall"])
def test_unknown_name(name):
    with pytest.raises(UserError, match=rf"there is no model {name}(: did you mean .*\?)? \(student\.name;"):
        make(name)


def test_maps_in_another_order_are_refused():
    with pytest.raises(UserError, match="do not return plain feature maps"):
        make("hiera_tiny_224")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pit_ti_224", "returns a tuple"),
        ("tnt_s_legacy_patch16_224", "returns a tuple"),
        ("hrnet_w18_small", "but the model has no such module"),
        ("mvitv2_tiny", "but the model has no such module"),
        ("twins_svt_small", "but the model has no such module"),
        ("coat_tiny", "does not call parallel_blocks"),
    ],
)
def test_maps_of_other_kinds_are_refused(name, reason):
    with torch.device("meta"), pytest.raises(UserError, match=f"cannot be used as a student: .*{reason}"):
        build_student(StudentConfig(name=name), num_classes=5, image_size=224)


def test_an_old_name_is_resolved():
    student = build_student(StudentConfig(name="resnetv2_50x1_bitm"), num_classes=5, image_size=64)
    assert student.model_name == "resnetv2_50x1_bit.goog_in21k_ft_in1k"


def test_mixer_b14_is_a_model_of_timm():
    """It can be exported, and loaded by name once the module that registers it is imported."""
    student = build_student(
        StudentConfig(name="mixer_b14"), num_classes=5, image_size=56, args={"embed_dim": 24, "num_blocks": 4}
    )
    assert student.tap_shapes == ((24, 4, 4), (24, 4, 4))
    rebuilt = timm.create_model(student.model_name, **student.model_args)
    rebuilt.load_state_dict(student.model.state_dict())
    assert rebuilt.stem.proj.kernel_size == (14, 14)


def test_size_that_does_not_fit():
    with pytest.raises(UserError, match="failed on images of 64 x 64 pixels"):
        make("efficientformer_l1")


@pytest.mark.parametrize("name", ["densenet121", "resnet10t"])
def test_a_converted_model_keeps_its_maps(name):
    """SyncBatchNorm replaces modules without their hooks; DenseNet's last map is that of a BatchNorm layer."""
    student = build_student(StudentConfig(name=name), num_classes=2, image_size=64).eval()
    images = torch.rand(2, 3, 64, 64)
    expected = student(images)
    student.replace_model(convert_sync_batchnorm(student.model))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in student.model.modules())
    assert all(torch.equal(one, other) for one, other in zip(student(images), expected, strict=True))
    assert [len(student.model.get_submodule(name)._forward_hooks) for name in student.plan.modules] == [1, 1]
