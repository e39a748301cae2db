"""The method with every student and teacher family: full size on the meta device, small size with real tensors.

At full size the shapes must match (nothing is computed). At small size a whole training step runs: student, projectors,
frozen tail, all losses, backward. Hooks check for operations that must not happen.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scalekd_cache.codec.base import feature_norms
from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.config.stage2 import ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.models.student import build_student
from scalekd_cache.models.tail import FAMILIES, build_tail, family_of
from scalekd_cache.models.taps import map_shapes, run_with_taps
from scalekd_cache.models.teacher import load_teacher, split_tail
from scalekd_cache.models.timm_models import create_timm_model, default_image_size
from scalekd_cache.planning.costs import PAPER_STUDENTS, SWIN_L
from scalekd_cache.scalekd.heads import ScaleKDHeads
from scalekd_cache.scalekd.losses import Targets, distillation_losses
from scalekd_cache.scalekd.projectors import CAP

torch.set_num_threads(1)
# timm name, image size, family, (C3, H3, W3), (C, H, W)
TEACHERS = [
    ("swin_small_patch4_window7_224", 224, "swin", (384, 14, 14), (768, 7, 7)),
    ("swin_base_patch4_window7_224", 224, "swin", (512, 14, 14), (1024, 7, 7)),
    ("swin_large_patch4_window7_224", 224, "swin", (768, 14, 14), (1536, 7, 7)),
    ("swinv2_base_window8_256", 256, "swin", (512, 16, 16), (1024, 8, 8)),
    ("hiera_base_plus_224", 224, "hiera", (448, 14, 14), (896, 7, 7)),
    ("tiny_vit_21m_224", 224, "tiny_vit", (384, 14, 14), (576, 7, 7)),
    ("vit_large_patch16_224", 224, "vit", (1024, 14, 14), (1024, 14, 14)),
    ("eva_large_patch14_196", 224, "vit", (1024, 16, 16), (1024, 16, 16)),  # the paper's BEiT-L/14
    ("deit3_base_patch16_224", 224, "vit", (768, 14, 14), (768, 14, 14)),
    ("vit_base_patch14_dinov2", 224, "vit", (768, 16, 16), (768, 16, 16)),
    ("beit_large_patch16_224", 224, "beit", (1024, 14, 14), (1024, 14, 14)),
    ("eva02_base_patch14_224", 224, "eva", (768, 16, 16), (768, 16, 16)),
    ("vit_base_patch16_dinov3", 256, "eva", (768, 16, 16), (768, 16, 16)),
    ("convnext_base.dinov3_lvd1689m", 224, "convnext", (512, 14, 14), (1024, 7, 7)),
    ("vit_so400m_patch16_siglip_512", 512, "vit", (1152, 32, 32), (1152, 32, 32)),
    ("vit_small_patch14_reg4_dinov2", 518, "vit", (384, 37, 37), (384, 37, 37)),
    ("vit_base_patch16_clip_384", 384, "vit", (768, 24, 24), (768, 24, 24)),
    ("naflexvit_base_patch16_siglip", 384, "vit", (768, 24, 24), (768, 24, 24)),
    ("vit_base_patch16_rope_mixed_224", 384, "eva", (768, 24, 24), (768, 24, 24)),
    ("samvit_base_patch16", 512, "vitdet", (768, 32, 32), (256, 32, 32)),
    ("samvit_base_patch16", 1024, "vitdet", (768, 64, 64), (256, 64, 64)),
    ("sam2_hiera_base_plus", 512, "hieradet", (448, 32, 32), (896, 16, 16)),
    ("sam2_hiera_large", 1024, "hieradet", (576, 64, 64), (1152, 32, 32)),
]
STUDENTS = (*PAPER_STUDENTS, "resnet50d", "vit_base_14", "mixer_b14")
TAPS = {
    "mobilenetv1": ((512, 14, 14), (1024, 7, 7)),
    "resnet50": ((1024, 14, 14), (2048, 7, 7)),
    "resnet50d": ((1024, 14, 14), (2048, 7, 7)),
    "convnext_tiny": ((384, 14, 14), (768, 7, 7)),
    "mixer_s16": ((512, 14, 14), (512, 14, 14)),
    "mixer_b16": ((768, 14, 14), (768, 14, 14)),
    "mixer_b14": ((768, 16, 16), (768, 16, 16)),
    "vit_small": ((384, 14, 14), (384, 14, 14)),
    "swin_tiny": ((384, 14, 14), (768, 7, 7)),
    "vit_base": ((768, 14, 14), (768, 14, 14)),
    "vit_base_14": ((768, 16, 16), (768, 16, 16)),
}
KINDS = ("mobilenetv1", "convnext_tiny", "vit_small")
"""Batch norm, layer norm with shrinking maps, one resolution."""
LAYER_NORM = {
    "convnext_tiny",
    "mixer_s16",
    "mixer_b16",
    "mixer_b14",
    "vit_small",
    "swin_tiny",
    "vit_base",
    "vit_base_14",
}


def test_every_family_is_here():
    assert {row[2] for row in TEACHERS} == {family.name for family in FAMILIES}
    assert set(TAPS) == set(STUDENTS)


def meta_student(name: str):
    with torch.device("meta"):
        return build_student(StudentConfig(name=name), num_classes=1000, image_size=224)


@pytest.fixture(scope="module")
def students():
    return {name: meta_student(name) for name in STUDENTS}


@pytest.mark.parametrize("row", TEACHERS, ids=[row[0] for row in TEACHERS])
def test_real_dimensions(row, students):
    """Swin-L with each student, each other teacher with one student of each kind: heads, tail and all losses."""
    name, size, family, tail_in, tail_out = row
    with torch.device("meta"):
        optional = {"img_size": size} if size != default_image_size(name) else {}
        model, _ = create_timm_model(name, {}, optional)
        model.requires_grad_(False).eval()
        parts = family_of(model, name).parts(model)
        taps = run_with_taps(model, parts, torch.empty(1, 3, size, size))
        shapes = map_shapes(taps, parts)
        assert (family_of(model, name).name, *shapes) == (family, tail_in, tail_out)
        tail = build_tail(model, name, *shapes)
        targets = Targets(torch.empty(2, *tail_out), torch.empty(2, 2, *tail_out[1:]), torch.empty(2, 1000))
        kinds = STUDENTS if name == SWIN_L else KINDS
        for student_name, student in ((kind, students[kind]) for kind in kinds):
            assert student.tap_shapes == TAPS[student_name]
            assert student.layer_norm is (student_name in LAYER_NORM)
            config = ScaleKDConfig()
            heads = ScaleKDHeads(config, student.tap_shapes, *shapes, student.layer_norm)
            s3, s4 = (torch.empty(2, *shape, requires_grad=True) for shape in student.tap_shapes)
            maps = heads(s3, s4, tail)
            labels = torch.empty(2, dtype=torch.int64)
            terms = distillation_losses(config, TrainConfig(), torch.empty(2, 1000), labels, maps, targets)
            terms.total.backward()
            assert s3.grad.shape == s3.shape
            assert s4.grad.shape == s4.shape


@pytest.mark.parametrize("name", STUDENTS)
def test_real_students_run_forward_and_backward(name, students):
    student = students[name]
    output = student(torch.empty(2, 3, 224, 224, device="meta"))
    assert output.logits.shape == (2, 1000)
    torch.autograd.backward([part.sum() for part in output])
    assert all(value.grad is not None for value in student.parameters())


class Watch(TorchDispatchMode):
    """Records the dtypes of the inputs of normalizations and squares."""

    NAMES = ("aten::linalg_vector_norm", "aten::pow", "aten::mean", "aten::_log_softmax", "aten::_softmax")

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in self.NAMES:
            self.seen.setdefault(name, set()).update(a.dtype for a in args if isinstance(a, Tensor))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    config = TeacherConfig(name="demo_swin", pretrained=False)
    return load_teacher(config, image_size=64, num_classes=5, device=torch.device("cpu"))


SMALL = ["mobilenetv1", "resnet50", "convnext_tiny", "mixer_s16", "vit_small", "swin_tiny"]
SMALL += [pytest.param("resnet50d", marks=pytest.mark.ci_slow)]


@pytest.mark.parametrize("name", SMALL)
def test_a_whole_step_at_small_size(name, teacher):
    """64 px: grids of 8x8 and 4x4 in the teacher, 4x4 and 2x2 in the student."""
    torch.manual_seed(0)
    tail, config = split_tail(teacher), ScaleKDConfig()
    student = build_student(StudentConfig(name=name), num_classes=5, image_size=64)
    heads = ScaleKDHeads(config, student.tap_shapes, tail.in_shape, tail.out_shape, student.layer_norm)
    learned: list[int] = []
    for cap in (module for module in heads.modules() if isinstance(module, CAP) and module.query is not None):
        for layer in (cap.proj_pos[0], cap.pos_attention.q):
            layer.register_forward_hook(lambda _module, _inputs, output: learned.append(len(output)))
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    features, logits, _ = teacher(images)
    frozen = {key: value.clone() for key, value in tail.state_dict().items()}
    tail.train()

    s3, s4, answer = student(images.float() / 255)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = heads(s3, s4, tail)
        with Watch() as watch:
            targets = Targets(features, feature_norms(features), logits)
            terms = distillation_losses(config, TrainConfig(), answer, torch.tensor([0, 1, 4]), maps, targets)
    terms.total.backward()

    assert all(term.isfinite() and term > 0 for term in terms[:-1])
    assert terms.pooled == 0
    assert learned == [1] * 4  # two S3 projectors, each query projected once for the batch of three
    assert {"aten::linalg_vector_norm", "aten::pow", "aten::mean"} <= set(watch.seen)
    assert all(dtypes == {torch.float32} for dtypes in watch.seen.values()), watch.seen
    assert all(value.grad is not None for value in student.parameters())
    assert all(value.grad is not None for value in heads.parameters())
    _frozen(tail, heads, frozen)


def _frozen(tail: nn.Module, heads: nn.Module, before: dict[str, Tensor]) -> None:
    """The tail has no gradients, does not change, stays in eval mode and is not in the heads' module tree."""
    assert not any(value.requires_grad or value.grad is not None for value in tail.parameters())
    assert all(torch.equal(value, before[key]) for key, value in tail.state_dict().items())
    assert not any(module.training for module in tail.modules())
    inside = {value.data_ptr() for value in (*heads.parameters(), *heads.buffers())}
    assert not inside & {value.data_ptr() for value in tail.parameters()}
    assert {key.split(".")[0] for key in heads.state_dict()} == {"s3", "s4"}


def test_watch_would_see_low_precision():
    with torch.autocast("cpu", dtype=torch.bfloat16), Watch() as watch:
        F.normalize(torch.ones(2, 3, dtype=torch.bfloat16), dim=1).square()
    assert torch.bfloat16 in watch.seen["aten::linalg_vector_norm"] | watch.seen["aten::pow"]
