"""Feature share: the feature losses use the first samples of a micro-batch, the other losses use all of them."""

import dataclasses
import itertools

import pytest
import torch
from small_cache import CPU, make, shared_cache, shared_weights
from small_trainer import MICRO, config_of, finish, trainer_of
from torch import nn

from scalekd_cache import CachedTargets, ScaleKDLoss, timm_student
from scalekd_cache.codec.base import feature_norms
from scalekd_cache.config.stage2 import ScaleKDConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.scalekd.heads import ScaleKDHeads
from scalekd_cache.scalekd.losses import Targets, distillation_losses
from scalekd_cache.training.targets import feature_samples
from scalekd_cache.training.trainer import start_processes

SHAPES = ((6, 4, 4), (8, 2, 2)), (12, 4, 4), (24, 2, 2)
TERMS = ("s3_spatial", "s3_frequency", "s4_spatial", "s4_frequency")


def gradients(heads, features, maps, chosen):
    """The gradient of all feature terms over some samples of a batch: of every parameter of the heads, and of the
    student's maps."""
    inputs = [one.clone().requires_grad_() for one in maps]
    targets = Targets(features[chosen], feature_norms(features[chosen]), torch.zeros(len(features), 0).double())

    def tail(x):
        return nn.functional.pixel_unshuffle(x, 2)[:, :24]

    outputs = heads(*(one[chosen] for one in inputs), tail)
    logits, labels = torch.zeros(len(features), 2).double(), torch.zeros(len(features), dtype=torch.int64)
    terms = distillation_losses(ScaleKDConfig(logit_weight=0), TrainConfig(), logits, labels, outputs, targets)
    total = sum(getattr(terms, name) for name in TERMS)
    return torch.cat([one.flatten() for one in torch.autograd.grad(total, [*heads.parameters(), *inputs])])


def mean_over_subsets(layer_norm, samples, count):
    """Relative difference of the mean gradient over all subsets of `count` samples and the gradient of all samples."""
    torch.manual_seed(0)
    heads = ScaleKDHeads(ScaleKDConfig(), *SHAPES, layer_norm=layer_norm).double().train()
    features = torch.randn(samples, 24, 2, 2).double()
    maps = [torch.randn(samples, *shape).double() for shape in SHAPES[0]]
    whole = gradients(heads, features, maps, list(range(samples)))
    subsets = [list(one) for one in itertools.combinations(range(samples), count)]
    mean = torch.stack([gradients(heads, features, maps, one) for one in subsets]).mean(0)
    return float((mean - whole).norm() / whole.norm())


def test_the_gradient_is_unbiased_with_layer_norm_projectors():
    assert mean_over_subsets(True, 6, 2) < 1e-12
    assert mean_over_subsets(True, 6, 3) < 1e-12


def test_batch_norm_projectors_see_another_group():
    """The bias falls with the size of the group (docs/METHOD.md, Feature share)."""
    small, large = mean_over_subsets(False, 6, 2), mean_over_subsets(False, 6, 5)
    assert 0 < large < small


def test_share_one_is_the_published_method():
    start_processes(CPU)
    plain, one = (finish(trainer_of(with_share(share))).lines for share in (None, 1.0))
    for before, after in zip(plain, one, strict=True):
        assert [before[name] for name in ("label", "logit", *TERMS)] == [
            after[name] for name in ("label", "logit", *TERMS)
        ]


def with_share(share, **train):

    config = config_of(train={"epochs": 1, **train})
    return dataclasses.replace(config, scalekd=dataclasses.replace(config.scalekd, feature_share=share))


@pytest.mark.parametrize("targets", ["cached", "live"])
def test_the_first_samples_of_a_micro_batch_have_features(targets):
    """Half of each micro-batch: the loss of the first step equals that of the same samples, computed by hand."""
    start_processes(CPU)
    trainer = trainer_of(with_share(0.5, targets=targets))
    batch = next(iter(trainer.loader))
    model, tails = trainer.model, trainer.tails
    got = trainer.targets[0]._replace(features=MICRO // 2)(batch)
    everything = trainer.targets[0]._replace(features=None)(batch)
    assert len(got.features) == len(got.norms) == MICRO // 2
    assert len(got.logits) == MICRO
    assert torch.equal(got.features, everything.features[: MICRO // 2])
    model.eval()
    terms, all_terms = (model(batch.images, batch.labels, [one], tails).terms for one in (got, everything))
    assert terms.label == all_terms.label
    assert terms.logit == all_terms.logit
    rest = Targets(everything.features[MICRO // 2 :], everything.norms[MICRO // 2 :], everything.logits)
    flipped = rest._replace(features=rest.features.flip(0), norms=rest.norms.flip(0))
    other = model(batch.images.flip(0), batch.labels.flip(0), [flipped], tails).terms
    for name in TERMS:
        mean = (getattr(terms, name) + getattr(other, name)) / 2
        assert torch.allclose(mean, getattr(all_terms, name), rtol=1e-5)


@pytest.mark.parametrize(
    ("share", "micro", "message", "nearest"),
    [
        (0.3, 8, "whole number of samples per micro-batch, at least 2", "0.25 (2 samples), 0.375 (3 samples)"),
        (0.125, 8, "whole number of samples per micro-batch, at least 2", "0.25 (2 samples)"),
    ],
)
def test_shares_that_do_not_divide_are_refused_with_the_nearest(share, micro, message, nearest):
    with pytest.raises(UserError, match=message) as caught:
        feature_samples(ScaleKDConfig(feature_share=share), shared_cache(), micro)
    assert nearest in str(caught.value)


def test_custom_loops_have_the_share_too():
    targets = CachedTargets(shared_cache(), batch_size=16, feature_share=0.25)
    batch = next(iter(targets))
    assert len(batch.images) == len(batch.targets.logits) == 16
    assert len(batch.targets.features) == len(batch.targets.norms) == 4
    with pytest.raises(UserError, match="whole number"):
        CachedTargets(shared_cache(), batch_size=16, feature_share=0.3)


def test_a_share_that_only_the_loss_has_is_refused():
    targets = CachedTargets(shared_cache(), batch_size=8, feature_share=0.5)
    student = timm_student("test_resnet", targets)
    with pytest.raises(UserError, match=r"(?s)feature_share=0.25.*CachedTargets\(..., feature_share=0.25\)"):
        ScaleKDLoss(targets, student, {"feature_share": 0.25})
    assert ScaleKDLoss(targets, student, {"feature_share": 0.5}).config.feature_share == 0.5


def test_building_the_loss_leaves_frozen_layers_in_evaluation_mode():
    targets = CachedTargets(shared_cache(), batch_size=8)
    student = timm_student("test_resnet", targets)
    student.model.layer1.eval()
    before = [module.training for module in student.modules()]
    ScaleKDLoss(targets, student)
    assert [module.training for module in student.modules()] == before


def test_custom_loops_take_the_share_of_the_recipe(tmp_path):
    recipe = tmp_path / "half.yaml"
    recipe.write_text("distill: {scalekd: {feature_share: 0.5}}\n")
    cache = make(tmp_path / "cache", shared_weights(), recipe=str(recipe))
    _, _, target = next(iter(CachedTargets(cache, batch_size=8)))
    assert len(target.features) == 4
