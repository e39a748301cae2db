"""The cost table compared with independent counts, and with the parameters of real modules."""

from pathlib import Path

import pytest
import torch
from documented import call
from torch import nn

from pipelines import costs as costs_command
from scalekd_cache.config.stage2 import ScaleKDConfig, StudentConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import build_student
from scalekd_cache.planning import costs
from scalekd_cache.scalekd.heads import ScaleKDHeads

torch.set_num_threads(1)


def test_swin_l_and_resnet50():
    pair = costs.pair_costs(costs.SWIN_L, "resnet50")
    assert pair.teacher.forward / 1e9 == pytest.approx(69, abs=0.5)
    assert pair.student.total / 1e9 == pytest.approx(24, abs=0.5)
    # 107 with a learned query projected per sample; once per batch saves 2.8
    per_sample = 2 * 3 * 2 * 2 * 196 * 768 * 768 / 1e9 * (1 - 1 / costs.BATCH)
    assert pair.heads_total / 1e9 + per_sample == pytest.approx(107, abs=0.5)
    trainable = sum(part.params for part in pair.heads if "projector" in part.name)
    assert trainable / 1e6 == pytest.approx(175.5, abs=1)
    assert pair.ceiling == pytest.approx(1.52, abs=0.02)


def test_grouped_convolutions_count_their_gradients_once():
    """A depthwise convolution's gradients cost twice its forward pass, for MobileNet as for ResNet."""
    pair = costs.pair_costs("swin_tiny_patch4_window7_224", "mobilenetv1")
    assert pair.student.backward / pair.student.forward == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    ("teacher", "student", "size"),
    [
        ("demo_swin", "resnet10t", 64),
        ("demo_swin", "mixer_s16", 64),
        ("vit_tiny_patch16_384", "mixer_s16", 384),
        ("eva02_tiny_patch14_336", "vit_tiny_patch16_224", 336),
        ("deit3_small_patch16_384_in21ft1k", "resnet10t", 384),  # a deprecated name
    ],
)
def test_a_pair_is_counted_at_the_size_that_the_teacher_was_made_for(teacher, student, size):
    pair = costs.pair_costs(teacher, student)
    assert (pair.image_size, pair.ceiling > 1) == (size, True)


@pytest.mark.parametrize(("teacher", "size"), [("hiera_tiny_224", 200), ("demo_swin", 16), ("demo_swin", 8)])
def test_a_size_that_the_teacher_does_not_take_is_a_message(teacher, size):
    with pytest.raises(UserError, match="the teacher"):
        costs.pair_costs(teacher, "resnet10t", image_size=size)


@pytest.mark.parametrize("size", [0, -3, 100_000])
def test_an_impossible_size_is_a_message(size):
    with pytest.raises(UserError, match="image_size"):
        costs_command.CostsConfig(image_size=size)


def test_linear_layer_by_hand():
    with torch.device("meta"):
        part = costs._map_cost("layer", 45, nn.Linear(8, 5), (8,), of=costs._Share(1.0, 32))
    assert (part.forward, part.backward) == (2 * 8 * 5, 2 * 2 * 8 * 5)


def test_ablations_cost_less():
    full = costs.pair_costs("swin_tiny_patch4_window7_224", "resnet18")
    logits_only = costs.pair_costs("swin_tiny_patch4_window7_224", "resnet18", ScaleKDConfig(s3=False, s4=False))
    assert logits_only.heads == []
    no_tail = costs.pair_costs("swin_tiny_patch4_window7_224", "resnet18", ScaleKDConfig(tpp=False))
    assert not any("tail" in part.name for part in no_tail.heads)
    assert logits_only.ceiling > full.ceiling


@pytest.mark.parametrize("student", costs.PAPER_STUDENTS)
def test_lite_projectors_cost_at_most_a_quarter(student: str) -> None:
    faithful, lite = (
        costs.pair_costs(costs.SWIN_L, student, ScaleKDConfig(projector=kind)) for kind in ("cap", "lite")
    )
    most = 0.27 if student == "vit_small" else 0.25  # its last map has 14 x 14 positions
    assert lite.heads_total <= most * faithful.heads_total
    assert any("tail, 1 pass" in part.name for part in lite.heads)


@pytest.mark.parametrize(("student", "gain"), [("resnet18", 2.46), ("mobilenetv1", 3.87)])
def test_a_feature_share_divides_the_cost_of_the_heads(student, gain):
    """Live at share 1 over cached at share 1/4, by FLOPs; a learned query is projected once per batch at any share."""
    teacher = "swin_tiny_patch4_window7_224"
    full = costs.pair_costs(teacher, student)
    quarter = costs.pair_costs(teacher, student, ScaleKDConfig(feature_share=0.25))
    assert quarter.student == full.student
    assert quarter.heads_total == pytest.approx(full.heads_total / 4, rel=0.01)
    live = full.student.total + full.heads_total + full.teacher.forward
    assert live / (quarter.student.total + quarter.heads_total) == pytest.approx(gain, abs=0.01)


@pytest.mark.parametrize(("samples", "batch"), [(2, 128), (2, 48), (3, 10)])
@pytest.mark.parametrize("projector", ["cap", "lite", "linear"])
def test_the_heads_of_any_share_and_micro_batch(samples, batch, projector):
    """They cost as much as in a micro-batch of only their samples. A learned query is projected once in both."""
    share, whole = (
        costs.pair_costs(
            "demo_swin", "test_resnet", ScaleKDConfig(projector=projector, feature_share=one), 64, 10, batch=size
        )
        for one, size in ((samples / batch, batch), (None, samples))
    )
    assert share.heads_total * batch == pytest.approx(whole.heads_total * samples)


def test_linear_heads_cost_a_hundredth_of_the_student():
    linear = costs.pair_costs("vit_small_patch14_dinov2", "resnet18", ScaleKDConfig(projector="linear"), 224)
    assert [part.name for part in linear.heads] == ["S4 projector, linear"]
    assert linear.heads_total < 0.01 * linear.student.total


@pytest.mark.parametrize(
    ("teacher", "projector", "share"),
    [
        ("test_vit", "cap", None),
        ("demo_swin", "lite", 0.25),
        ("test_vit", "linear", 0.25),
        ("demo_swin", "linear", None),
    ],
)
def test_without_labels_the_pooled_head_counts(teacher, projector, share):
    """The parts add up to what PyTorch's counter counts in the heads that `distill` builds for unlabeled data."""
    config = ScaleKDConfig(projector=projector, feature_share=share)
    pair = costs.pair_costs(teacher, "test_resnet", config, 64, 10, labeled=False)
    with torch.device("meta"):
        known = costs.meta_teacher(teacher, 64, 10)
        student = build_student(StudentConfig(name="test_resnet"), num_classes=10, image_size=64)
        width = known.tail.out_shape[0]
        heads = ScaleKDHeads(
            config, student.tap_shapes, known.tail.in_shape, known.tail.out_shape, False, width, student.pooled_width
        )
        samples = round(costs.BATCH * (share or 1))
        s3, s4 = (torch.empty(samples, *shape, requires_grad=True) for shape in student.tap_shapes)
        embedding = torch.empty(costs.BATCH, student.pooled_width, requires_grad=True)

        def step():
            maps = [value for value in heads(s3, s4, known.tail, embedding) if value is not None]
            torch.autograd.backward([value.sum() for value in {id(value): value for value in maps}.values()])

        assert pair.heads_total == pytest.approx(costs._flops(step))
    if projector != "linear":  # those map the mean of S4, if there are labels
        assert pair.heads_total > costs.pair_costs(teacher, "test_resnet", config, 64, 10).heads_total


@pytest.mark.parametrize(
    ("teacher", "student", "text"),
    [
        (
            costs.SWIN_L,
            "resnet50",
            "703.83 MB of float32 head gradients, and reads and writes 3.52 GB with SGD or 4.93 GB with AdamW",
        ),
        ("swin_tiny_patch4_window7_224", "resnet18", "97.67 MB of float32 head gradients"),
    ],
)
def test_optimizer_traffic_does_not_fall_with_the_feature_share(teacher, student, text):
    whole, quarter = (
        costs.report(costs.pair_costs(teacher, student, ScaleKDConfig(feature_share=share), 224)) for share in (1, 0.25)
    )
    assert text in whole
    assert whole.splitlines()[-1] == quarter.splitlines()[-1]
    assert whole != quarter


def test_command_and_committed_page(capsys):
    page = (Path(__file__).parents[2] / "docs" / "COSTS.md").read_text(encoding="utf-8")
    assert "scalekd costs --all" in page
    row = costs.summary_row(costs.pair_costs(costs.SWIN_L, "resnet50"))
    stale = "docs/COSTS.md is stale: scalekd costs --all > docs/COSTS.md"
    assert row in page, stale
    assert costs_command.INTRODUCTION in page, stale
    assert "Regardless of the feature share, each optimizer step all-reduces 703.83 MB" in page, stale
    call(costs_command, ["--teacher", "swin_tiny_patch4_window7_224", "--student", "resnet18"])
    text = capsys.readouterr().out
    assert text.startswith("swin_tiny_patch4_window7_224 -> resnet18, 224 px\n")
    assert "maximum speedup" in text
    assert "pooled" not in text
    call(costs_command, ["--teacher", "test_vit", "--student", "resnet10t", "--labeled", "false"])
    assert "| pooled projector |" in capsys.readouterr().out


def test_several_teachers_have_a_table_each_and_the_sum_of_their_heads(capsys):
    """At the size of the first one's images."""
    names = "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"
    call(costs_command, ["--teacher", ",".join(names), "--student", "resnet18", "--feature-share", "1,0.25"])
    text = capsys.readouterr().out
    apart = [
        costs.pair_costs(name, "resnet18", ScaleKDConfig(feature_share=share), 224)
        for name, share in zip(names, (1.0, 0.25), strict=True)
    ]
    assert all(costs.report(one) in text for one in apart)
    assert f"all 2 teachers: heads {sum(one.heads_total for one in apart) / 1e9:.1f} GFLOP" in text
    with pytest.raises(UserError, match="the number of shares in"):
        call(costs_command, ["--teacher", names[0], "--feature-share", "1,0.25"])
