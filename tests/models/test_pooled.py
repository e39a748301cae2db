"""The pooled embedding of a teacher: timm's own pooling, stored only where it is not the mean of the map."""

import pytest
import torch

from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.models.teacher import load_teacher
from scalekd_cache.models.teacher_spec import TeacherSpec

torch.set_num_threads(1)
TOKENS = {"embed_dim": 48, "depth": 2, "num_heads": 3}
STAGES = {"depths": [1, 1, 1, 2], "dims": [8, 16, 32, 48]}
SWIN = {"embed_dim": 24, "depths": [1, 1, 1, 2]}
# name, image size, model arguments, P
CASES = [
    ("vit_tiny_patch16_224", 64, TOKENS, 48),  # class token
    ("vit_tiny_patch16_224", 64, {**TOKENS, "global_pool": "avg"}, 48),  # fc_norm after the mean
    ("vit_tiny_patch16_224", 64, {**TOKENS, "global_pool": "avg", "fc_norm": False}, 0),  # mean after the norm
    ("vit_tiny_patch16_224", 64, {**TOKENS, "global_pool": ""}, 0),  # no pooling
    ("deit_tiny_distilled_patch16_224", 64, TOKENS, 48),  # mean of two tokens
    ("vit_small_patch14_reg4_dinov2", 56, TOKENS, 48),  # class token before registers
    ("vit_base_patch16_siglip_224", 64, TOKENS, 48),  # attention pool
    ("naflexvit_base_patch16_siglip", 64, TOKENS, 48),
    ("naflexvit_base_patch16_gap", 64, TOKENS, 48),
    ("vit_small_patch16_rope_mixed_224", 64, {**TOKENS, "num_heads": 2}, 48),
    ("beit_base_patch16_224", 64, TOKENS, 48),
    ("eva02_tiny_patch14_224", 56, {}, 192),
    ("demo_swin", 64, {}, 0),
    ("swin_tiny_patch4_window7_224", 128, SWIN, 0),
    ("hiera_tiny_224", 64, {"embed_dim": 24, "stages": (1, 1, 1, 2), "q_pool": 2,
                            "mask_unit_attn": (True, True, False, False)}, 192),  # norm after the mean
    ("tiny_vit_5m_224", 64, {}, 320),
    ("convnext_tiny", 64, STAGES, 48),  # norm after the mean
    ("convnext_tiny", 64, {**STAGES, "head_norm_first": True}, 0),  # mean after the norm
    ("vit_base_patch16_clip_quickgelu_224.openai", 64, TOKENS, 48),
    ("samvit_base_patch16", 64, {**TOKENS, "global_attn_indexes": [0, 1], "neck_chans": 32}, 0),  # keeps positions
    ("sam2_hiera_tiny", 128, {"embed_dim": 24, "stages": [1, 2, 2, 2], "global_att_blocks": [6]}, 192),
]  # fmt: skip


def make(name, size, args, data_classes=0, **options):
    torch.manual_seed(0)
    config = TeacherConfig(name=name, pretrained=False, **options)
    return load_teacher(config, image_size=size, num_classes=data_classes, device=torch.device("cpu"), model_args=args)


def views(size, batch=2):
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def timm_pooled(teacher, images):
    model = teacher.model
    return model.forward_head(model.forward_features(teacher.normalize(images)), pre_logits=True)


@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}-{number}" for number, case in enumerate(CASES)])
def test_it_is_timms(case):
    name, size, args, width = case
    teacher, images = make(name, size, args), views(size)
    assert teacher.spec.pooled == width
    output, own = teacher(images), timm_pooled(teacher, images)
    if width:
        assert torch.equal(output.pooled, own)
    else:
        assert output.pooled.shape == (2, 0)
        assert own.dim() != 2 or torch.allclose(output.features.mean((2, 3)), own, atol=1e-5)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224"])
def test_features_and_logits_stay_the_same(name):
    """Over the teacher's own classes, for a dataset without labels."""
    plain, pools = (make(name, 64, TOKENS, classes, num_classes=7) for classes in (5, 0))
    assert (plain.spec.pooled, pools.spec.pooled) == (0, 48)
    one, other = plain(views(64)), pools(views(64))
    assert one.logits.shape == (2, 7)
    assert one.pooled.shape == (2, 0)
    assert torch.equal(one.features, other.features)
    assert torch.equal(one.logits, other.logits)


def test_the_description_of_a_labeled_teacher_is_what_it_was():
    """Caches, tails and fingerprints of labeled datasets have no such field."""
    spec = make("vit_tiny_patch16_224", 64, TOKENS, 5).spec
    assert "pooled" not in spec.to_json()
    assert TeacherSpec.from_json(spec.to_json()) == spec
    pools = make("vit_tiny_patch16_224", 64, TOKENS).spec
    assert pools.to_json()["pooled"] == 48
    assert TeacherSpec.from_json(pools.to_json()) == pools


def test_bfloat16_is_returned_as_float32():
    exact, rough = (
        make("vit_base_patch16_siglip_224", 64, TOKENS, precision=name)(views(64)).pooled
        for name in ("float32", "bfloat16")
    )
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert torch.allclose(exact, rough, atol=0.1)
