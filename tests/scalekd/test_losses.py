"""Loss functions: finite differences, a dense DCT, formulas in NumPy, and unbiasedness with stored norms."""

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from torch import Tensor

from scalekd_cache.config.stage2 import ScaleKDConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.scalekd import losses
from scalekd_cache.scalekd.losses import (
    HeadOutputs,
    Targets,
    distillation_losses,
    frequency_loss,
    label_loss,
    logit_loss,
    pooled_loss,
    remove_spatial_mean,
    spatial_loss,
)


@pytest.fixture(autouse=True)
def _fixed_state():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def norms_of(features: Tensor) -> Tensor:
    removed = features - features.mean((2, 3), keepdim=True)
    return torch.stack([features.norm(dim=1), removed.norm(dim=1)], dim=1)


def pair(batch: int = 2, channels: int = 5, height: int = 3, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    prediction = torch.randn(batch, channels, height, width, dtype=torch.float64, requires_grad=True)
    features = 3 * torch.randn(batch, channels, height, width, dtype=torch.float64) + 1
    return prediction, features, norms_of(features)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.sqrt((x * x).sum(1, keepdims=True)), 1e-12)


def without_dc(x: np.ndarray) -> np.ndarray:
    spectrum = scipy.fft.dctn(x, axes=(2, 3))
    spectrum[:, :, 0, 0] = 0
    return scipy.fft.idctn(spectrum, axes=(2, 3))


@pytest.mark.parametrize("loss", [spatial_loss, frequency_loss])
def test_finite_differences(loss) -> None:
    prediction, features, norms = pair()
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, f: loss(p, f, norms, weight=0.7), (prediction, features))
    assert torch.autograd.gradgradcheck(lambda p: loss(p, features.detach(), norms), (prediction,))


@pytest.mark.parametrize("grid", [(7, 7), (4, 4), (2, 5), (14, 14)])
def test_removing_dc_is_subtracting_the_mean(grid: tuple[int, int]) -> None:
    x = torch.randn(2, 6, *grid, dtype=torch.float64) + 2
    ours = remove_spatial_mean(x).numpy()
    assert np.abs(ours - without_dc(x.numpy())).max() <= 1e-12
    single = x.float()
    error = np.abs(remove_spatial_mean(single).numpy() - without_dc(single.numpy())).max()
    assert error <= 1e-6 * single.abs().max()


@pytest.mark.parametrize("scaling", [True, False])
def test_losses_equal_the_dense_reference(scaling: bool) -> None:
    prediction, features, norms = pair()
    p, f = prediction.detach().numpy(), features.numpy()
    factor = 49 / 12 if scaling else 1
    spatial = ((unit(p) - unit(f)) ** 2).sum() / 2 * 0.08 * factor
    frequency = ((unit(without_dc(p)) - unit(without_dc(f))) ** 2).sum() / 2 * 0.06 * factor
    got = spatial_loss(prediction, features, norms, weight=0.08, grid_scaling=scaling)
    assert got.item() == pytest.approx(spatial, rel=1e-12)
    got = frequency_loss(prediction, features, norms, weight=0.06, grid_scaling=scaling)
    assert got.item() == pytest.approx(frequency, rel=1e-12)


def test_seven_by_seven_needs_no_scaling() -> None:
    prediction, features, norms = pair(height=7, width=7)
    with_factor = spatial_loss(prediction, features, norms, grid_scaling=True)
    assert torch.equal(with_factor, spatial_loss(prediction, features, norms, grid_scaling=False))


@pytest.mark.parametrize("loss", [spatial_loss, frequency_loss])
def test_noisy_targets_with_stored_norms_are_unbiased(loss) -> None:
    """Mean gradient over dithers: equal to the exact one with stored norms, shrunk with re-normalized targets."""
    draws, channels, grid = 4000, 16, (3, 3)
    prediction = torch.randn(1, channels, *grid, dtype=torch.float64)
    exact = torch.randn(1, channels, *grid, dtype=torch.float64) + 0.5
    step = 0.3 * 12**0.5  # a uniform dither with a standard deviation of 0.3
    noisy = exact + (torch.rand(draws, channels, *grid, dtype=torch.float64) - 0.5) * step

    def gradients(features: Tensor, norms: Tensor) -> Tensor:
        p = prediction.expand(len(features), -1, -1, -1).clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(p, features, norms) * len(features), p)
        return grad

    want = gradients(exact, norms_of(exact))
    stored = gradients(noisy, norms_of(exact).expand(draws, -1, -1, -1))
    error = (stored.mean(0) - want[0]) / (stored.std(0) / draws**0.5)
    assert error.abs().max() < 5
    assert error.square().mean() < 1.5  # about one if only sampling noise is left
    assert (stored.mean(0) * want[0]).sum() / want.square().sum() == pytest.approx(1, abs=0.005)
    renormalized = gradients(noisy, norms_of(noisy))
    assert (renormalized.mean(0) * want[0]).sum() / want.square().sum() < 0.98
    # Linear: half of one target and half of another give half of each gradient.
    norms, two = norms_of(exact), noisy[:2]
    both = gradients(two, norms.expand(2, -1, -1, -1)).mean(0)
    torch.testing.assert_close(gradients(two.mean(0, keepdim=True), norms)[0], both, rtol=1e-10, atol=1e-12)


def test_each_view_reads_its_own_norm() -> None:
    prediction, features, norms = pair()
    for loss, other in ((spatial_loss, 1), (frequency_loss, 0)):
        changed = norms.clone()
        changed[:, other] *= 2
        assert torch.equal(loss(prediction, features, norms), loss(prediction, features, changed))
        changed[:, 1 - other] *= 2
        assert not torch.equal(loss(prediction, features, norms), loss(prediction, features, changed))


def test_zero_norms_and_zero_predictions_stay_finite() -> None:
    features = torch.zeros(1, 4, 2, 2)
    norms = torch.zeros(1, 2, 2, 2)
    noise = 1e-3 * torch.randn_like(features)  # decoding noise around an exact zero
    prediction = torch.zeros(1, 4, 2, 2, requires_grad=True)
    for loss in (spatial_loss, frequency_loss):
        value = loss(prediction, features + noise, norms)
        assert value == 0
        (grad,) = torch.autograd.grad(value, prediction)
        assert grad.isfinite().all()


@pytest.mark.parametrize("loss", [spatial_loss, frequency_loss])
def test_losses_widen_and_switch_autocast_off(loss, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, features, norms = (x.detach().bfloat16() for x in pair())
    states: list[bool] = []
    inner = losses.feature_loss

    def noted(*arguments):
        states.append(torch.is_autocast_enabled("cpu"))
        return inner(*arguments)

    monkeypatch.setattr(losses, "feature_loss", noted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(prediction, features, norms)
    assert states == [False]
    assert got.dtype == torch.float32
    assert torch.equal(got, loss(prediction.float(), features.float(), norms.float()))


def test_one_position_is_refused() -> None:
    prediction, features, norms = pair(height=1, width=1)
    for loss in (spatial_loss, frequency_loss):
        with pytest.raises(UserError, match="1x1"):
            loss(prediction, features, norms)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logit_loss_is_the_formula(temperature: float) -> None:
    student, teacher = torch.randn(6, 9, dtype=torch.float64), 3 * torch.randn(6, 9, dtype=torch.float64)
    s, t = student.numpy() / temperature, teacher.numpy() / temperature
    soft = np.exp(t) / np.exp(t).sum(1, keepdims=True)
    log_s = s - np.log(np.exp(s).sum(1, keepdims=True))
    want = -0.5 * temperature**2 * (soft * log_s).sum(1).mean()
    assert logit_loss(student, teacher, temperature=temperature, weight=0.5).item() == pytest.approx(want, rel=1e-12)
    assert logit_loss(student.half() * 1000, teacher.half()).isfinite()  # where log(softmax) would give -inf
    with pytest.raises(UserError, match="different numbers of classes"):
        logit_loss(student, teacher[:, :8])


def test_label_losses() -> None:
    logits, labels = torch.randn(6, 9, dtype=torch.float64), torch.randint(0, 9, (6,))
    x, hot = logits.numpy(), np.eye(9)[labels.numpy()]
    probability = 1 / (1 + np.exp(-x))
    bce = -(hot * np.log(probability) + (1 - hot) * np.log(1 - probability)).sum() / 6
    assert label_loss(logits, labels, kind="bce", weight=0.5).item() == pytest.approx(bce / 2, rel=1e-12)
    mean = F.binary_cross_entropy_with_logits(logits, torch.tensor(hot))
    assert label_loss(logits, labels, kind="bce").item() == pytest.approx(9 * mean.item(), rel=1e-12)
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    ce = -((0.9 * hot + 0.1 / 9) * log_p).sum(1).mean()
    assert label_loss(logits, labels, smoothing=0.1).item() == pytest.approx(ce, rel=1e-12)


def batch_of(num_classes: int) -> tuple[Tensor, Tensor, HeadOutputs, Targets]:
    features = torch.randn(3, 8, 2, 2)
    maps = HeadOutputs(*(torch.randn(3, 8, 2, 2) for _ in range(4)))
    return (
        torch.randn(3, 5),
        torch.tensor([0, 2, 4]),
        maps,
        Targets(features, norms_of(features), torch.randn(3, num_classes)),
    )


def test_terms_are_weighted_and_summed() -> None:
    logits, labels, maps, targets = batch_of(5)
    config = ScaleKDConfig(logit_weight=0.3, temperature=2.0, frequency_weight_s3=0.01, frequency_weight_s4=0.02)
    terms = distillation_losses(config, TrainConfig(label_smoothing=0.1), logits, labels, maps, targets)
    features, norms, teacher, *_ = targets
    want = [
        0.7 * F.cross_entropy(logits, labels, label_smoothing=0.1),
        logit_loss(logits, teacher, temperature=2.0, weight=0.3),
        0.08 * spatial_loss(maps.s3_spatial, features, norms),
        0.01 * frequency_loss(maps.s3_frequency, features, norms),
        0.08 * spatial_loss(maps.s4_spatial, features, norms),
        0.02 * frequency_loss(maps.s4_frequency, features, norms),
        torch.zeros(()),
    ]
    for got, expected in zip(terms, want, strict=True):
        assert got.shape == ()
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(terms.total, torch.stack(want).sum())


def test_label_weight_is_one_without_a_logit_term() -> None:
    logits, labels, maps, targets = batch_of(0)  # a teacher without a classifier
    full = F.cross_entropy(logits, labels)
    terms = distillation_losses(ScaleKDConfig(), TrainConfig(), logits, labels, maps, targets)
    torch.testing.assert_close(terms.label, full)
    assert terms.logit == 0
    assert terms.s4_spatial > 0
    terms = distillation_losses(ScaleKDConfig(), TrainConfig(targets="none"), logits, labels, None, None)
    torch.testing.assert_close(terms.total, full)
    terms = distillation_losses(ScaleKDConfig(logit_weight=0), TrainConfig(), logits, labels, *batch_of(7)[2:])
    torch.testing.assert_close(terms.label, full)  # other classes do not matter if logits are not compared


def test_weight_zero_skips_the_branch_and_keeps_the_term() -> None:
    logits, labels, maps, targets = batch_of(5)
    config = ScaleKDConfig(frequency_weight_s4=0.0)
    for s4_frequency in (None, torch.full((3, 8, 2, 2), torch.nan)):
        terms = distillation_losses(
            config, TrainConfig(), logits, labels, maps._replace(s4_frequency=s4_frequency), targets
        )
        assert terms.s4_frequency == 0
        assert terms.s4_frequency.dtype == torch.float32
        assert terms.total.isfinite()


def test_pooled_loss_compares_directions_of_means() -> None:
    """2 - 2 cos per sample; a batch of the first samples has the mean of theirs."""
    torch.manual_seed(0)
    features, prediction = torch.randn(3, 8, 2, 2), torch.randn(3, 8)
    cosine = F.cosine_similarity(prediction, features.mean((2, 3)))
    mean = features.mean((2, 3))
    assert torch.allclose(pooled_loss(prediction, mean, weight=5.0), 5 * (2 - 2 * cosine).mean())
    assert torch.allclose(pooled_loss(3 * prediction, mean), pooled_loss(prediction, 0.1 * mean))
    logits, labels, maps, targets = batch_of(5)
    config = ScaleKDConfig(projector="linear")
    maps = maps._replace(pooled=prediction)
    terms = distillation_losses(config, TrainConfig(), logits, labels, maps, targets)
    assert terms.pooled == pooled_loss(prediction, targets.features.mean((2, 3)), weight=0.08 * 49)
    assert terms.s3_spatial == terms.s3_frequency == terms.s4_frequency == 0


def test_a_stored_embedding_replaces_the_mean_of_the_map() -> None:
    """Of all samples, also where fewer have features; any kind of heads that has a pooled output has the term."""
    logits, labels, maps, targets = batch_of(5)
    prediction, stored = torch.randn(3, 6), torch.randn(3, 6)
    first = HeadOutputs(*(part[:1] for part in maps[:4]), prediction)
    some = targets.with_features(1)._replace(pooled=stored)
    terms = distillation_losses(ScaleKDConfig(), TrainConfig(), logits, labels, first, some)
    assert terms.pooled == pooled_loss(prediction, stored, weight=0.08 * 49)
    assert torch.allclose(terms.pooled, 0.08 * 49 * (2 - 2 * F.cosine_similarity(prediction, stored)).mean())
    other = distillation_losses(ScaleKDConfig(), TrainConfig(), logits, labels, first._replace(pooled=None), some)
    assert other.pooled == 0
    assert other[:-1] == terms[:-1]
