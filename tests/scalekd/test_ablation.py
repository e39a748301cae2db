"""Ablations: each row of the table builds its variant, and the default options are the full method."""

import pytest
import torch
from torch import Tensor

from scalekd_cache.codec.base import feature_norms
from scalekd_cache.config.stage2 import ScaleKDConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.scalekd.heads import ScaleKDHeads
from scalekd_cache.scalekd.losses import Targets, distillation_losses, term_weights
from scalekd_cache.scalekd.projectors import CAP, LinearHead, LinearProjector, LiteCAP

torch.set_num_threads(1)
SHAPES = ((6, 4, 4), (8, 2, 2)), (12, 4, 4), (24, 2, 2)
PLAIN = {"tpp": False, "frequency": False}
# switches, enabled terms (s3 spatial, s3 frequency, s4 spatial, s4 frequency, pooled), calls of the tail
ROWS = {
    "logit KD": ({"s3": False, "s4": False}, (0, 0, 0, 0, 0), 0),
    "feature distillation": ({"projector": "linear-tpp", **PLAIN, "s3": False}, (0, 0, 1, 0, 0), 0),
    "feature distillation, both taps": ({"projector": "linear-tpp", **PLAIN}, (1, 0, 1, 0, 0), 0),
    "linear through the tail": ({"projector": "linear-tpp"}, (1, 1, 1, 1, 0), 2),
    "CAP": (PLAIN, (1, 0, 1, 0, 0), 0),
    "CAP + DFM": ({"tpp": False}, (1, 1, 1, 1, 0), 0),
    "CAP + DFM + TPP": ({}, (1, 1, 1, 1, 0), 2),
    "linear": ({"projector": "linear"}, (0, 0, 1, 0, 1), 0),
    "linear without S4": ({"projector": "linear", "s4": False}, (0, 0, 0, 0, 0), 0),
    "lite": ({"projector": "lite"}, (1, 1, 1, 1, 0), 1),
    "lite, stage 4 only": ({"projector": "lite", "s3": False}, (0, 0, 1, 1, 0), 0),
    "stage 4 only": ({"s3": False}, (0, 0, 1, 1, 0), 0),
    "stage 3 only": ({"s4": False}, (1, 1, 0, 0, 0), 2),
}


@pytest.mark.parametrize("row", ROWS)
def test_rows(row: str) -> None:
    torch.manual_seed(0)
    options, on, tail_calls = ROWS[row]
    config = ScaleKDConfig(**options)
    heads = ScaleKDHeads(config, *SHAPES)
    calls: list[tuple[int, ...]] = []

    def tail(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape[1:]))
        return torch.nn.functional.pixel_unshuffle(x, 2)[:, :24]

    maps = heads(torch.randn(2, 6, 4, 4), torch.randn(2, 8, 2, 2), tail)
    assert tuple(int(m is not None) for m in maps) == on
    assert calls == [(12, 4, 4)] * tail_calls
    kind = {"linear-tpp": LinearProjector, "linear": LinearHead, "lite": LiteCAP, "cap": CAP}[config.projector]
    assert all(type(cap) is kind for tap in (heads.s3, heads.s4) for cap in tap.values())

    features = torch.randn(2, 24, 2, 2)
    targets = Targets(features, feature_norms(features), torch.randn(2, 5))
    logits = torch.randn(2, 5, requires_grad=True)
    terms = distillation_losses(config, TrainConfig(), logits, torch.tensor([0, 4]), maps, targets)
    assert tuple(int(term.item() > 0) for term in terms[2:]) == on
    assert terms.label.item() > 0
    assert terms.logit.item() > 0
    terms.total.backward()
    assert all(p.grad is not None for p in heads.parameters())


def test_defaults_are_the_published_weights() -> None:
    assert term_weights(ScaleKDConfig()) == (0.08, 0.06, 0.08, 0.06, 0.08 * 49)


def test_s4_owns_its_query_without_s3() -> None:
    assert ScaleKDHeads(ScaleKDConfig(s3=False), *SHAPES).s4["spatial"].query is not None
    assert ScaleKDHeads(ScaleKDConfig(), *SHAPES).s4["spatial"].query is None


def test_attention_scale_and_heads_reach_the_projectors() -> None:
    heads = ScaleKDHeads(ScaleKDConfig(attention_scale=2.0, heads_s3=3, heads_s4=6), *SHAPES)
    attention = heads.s4["spatial"].pos_attention
    assert attention.num_heads == 6
    assert attention.scale == pytest.approx(2.0 * (24 / 6) ** -0.5)
    with pytest.raises(UserError, match="attention_scale"):
        ScaleKDConfig(attention_scale=0.0)


def test_temperature_and_weights_reach_the_losses() -> None:
    torch.manual_seed(0)
    logits, teacher, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 1, 2])
    targets = Targets(torch.zeros(3, 1, 2, 2), torch.zeros(3, 2, 2, 2), teacher)

    def terms(**options):
        return distillation_losses(ScaleKDConfig(**options), TrainConfig(), logits, labels, None, targets)

    whole = torch.nn.functional.cross_entropy(logits / 2, (teacher / 2).softmax(1)) * 4
    assert torch.allclose(terms(temperature=2.0, logit_weight=0.3).logit, whole * 0.3)
    assert torch.allclose(terms(logit_weight=0.3).label, torch.nn.functional.cross_entropy(logits, labels) * 0.7)
