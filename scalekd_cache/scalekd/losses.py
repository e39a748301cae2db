"""ScaleKD's losses as pure functions, and the tuples passed between student, heads and trainer.

In: projected student maps, the teacher's targets (decoded map, stored token norms, logits), student logits and labels.
Out: seven weighted scalar terms that sum to the training loss.
Invariant: all losses are computed in float32 or float64, even under autocast. Every gradient with respect to a student
map is linear in the decoded target map, because targets are divided by stored norms instead of their own norms.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scalekd_cache.config.stage2 import PUBLISHED_WEIGHTS, ScaleKDConfig, TrainConfig
from scalekd_cache.devices import autocast
from scalekd_cache.errors import UserError


class TermWeights(NamedTuple):
    """Feature term weights. `pooled` is used if the heads have a pooled output."""

    s3_spatial: float
    s3_frequency: float
    s4_spatial: float
    s4_frequency: float
    pooled: float


def term_weights(config: ScaleKDConfig) -> TermWeights:
    """Feature term weights. Disabled terms have weight 0.

    Linear heads have two terms: the map at S4, and its mean, which has the same weight as the map. Without labels, the
    pooled term trains the student's last layers, so `s4` does not disable it.
    """
    s3, s4, frequency = float(config.s3), float(config.s4), float(config.frequency)
    weights = config.feature_weights()
    spatial = weights["spatial_weight"] * s4
    pooled = weights["spatial_weight"] * REFERENCE_POSITIONS
    if config.projector == "linear":
        return TermWeights(0.0, 0.0, spatial, 0.0, pooled)
    return TermWeights(
        weights["spatial_weight"] * s3,
        weights["frequency_weight_s3"] * s3 * frequency,
        spatial,
        weights["frequency_weight_s4"] * s4 * frequency,
        pooled,
    )


def check_loss(config: ScaleKDConfig, train: TrainConfig, *, labeled: bool, logits: bool) -> None:
    """Raise `UserError` if no loss is left to train a student with.

    Args:
        config: the method's hyperparameters.
        train: the training loop's options, from `DistillConfig.on_data`.
        labeled: whether the data has labels.
        logits: whether any teacher has logits.
    """
    *maps, pooled = term_weights(config)
    if (
        train.label_loss != "none"
        or (logits and config.logit_weight > 0)
        or any(maps)
        or (not labeled and pooled > 0)
        or train.targets == "none"
    ):
        return
    raise UserError(
        "the run has no loss: the label loss, the logit loss and the feature losses are all turned off",
        got=", ".join(
            (
                "train.label_loss=none" if labeled else "no labels",
                "scalekd.logit_weight=0" if logits else "no teacher with a classifier",
                "no feature losses (scalekd.s3, scalekd.s4 or their weights)",
            )
        ),
        fix="set --scalekd.s3=true or --scalekd.s4=true (linear heads need s4), with a weight above 0, such as "
        f"--scalekd.spatial_weight={PUBLISHED_WEIGHTS['spatial_weight']}",
    )


NORM_EPS = 1e-12
"""Lower bound for the norm that a token is divided by, as in `F.normalize`."""
REFERENCE_POSITIONS = 49
"""Number of positions in the 7x7 grid for which upstream's loss weights were chosen."""


class Targets(NamedTuple):
    """The teacher's targets for a batch, decoded from the cache or computed live."""

    features: Tensor
    """(F, C, H, W) float32: unnormalized last-stage maps, after the final norm, for the first F <= B samples."""
    norms: Tensor
    """(F, 2, H, W) float32: exact L2 norms of the tokens, raw in [:, 0] and with channel means removed in [:, 1]."""
    logits: Tensor
    """(B, K) float32 logits; K = 0 for a teacher without a classifier. If `partial`, log-probabilities for some classes
    and -inf for the others, for which only the total probability is known (`partial_logit_loss`)."""
    partial: bool = False
    """Whether `logits` are log-probabilities for only some classes."""
    pooled: Tensor | None = None
    """(B, P) float32: the pooled embedding of all samples; None if it is the mean of `features` over positions."""

    def with_features(self, samples: int | None) -> "Targets":
        """Keep features for only the first `samples` samples (None: all)."""
        return self if samples is None else self._replace(features=self.features[:samples], norms=self.norms[:samples])


class HeadOutputs(NamedTuple):
    """The projected student maps, each (F, C, H, W) on the teacher's last grid. Maps that no loss uses are None."""

    s3_spatial: Tensor | None
    s3_frequency: Tensor | None
    s4_spatial: Tensor | None
    s4_frequency: Tensor | None
    pooled: Tensor | None = None
    """(F, C) or (B, P): the projected pooled embeddings for the samples with a pooled target."""


class LossTerms(NamedTuple):
    """Weighted scalar float32 terms. A disabled term is a constant 0."""

    label: Tensor
    logit: Tensor
    s3_spatial: Tensor
    s3_frequency: Tensor
    s4_spatial: Tensor
    s4_frequency: Tensor
    pooled: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of all terms, which is the training loss."""
        return torch.stack(tuple(self)).sum()


def wide(x: Tensor) -> Tensor:
    """Convert a tensor to float32. A float64 tensor stays float64, for gradient checks."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor) -> torch.autocast:
    """Context manager that disables autocast on the device of `x`."""
    return autocast(x.device, torch.float32)


def remove_spatial_mean(x: Tensor) -> Tensor:
    """Subtract each channel's mean over positions: (B, C, H, W) -> same.

    Equal to upstream's 2-D DCT-II with coefficient (0, 0) set to zero, followed by the inverse transform.
    """
    return x - x.mean(dim=(2, 3), keepdim=True)


def check_grid(height: int, width: int) -> None:
    """Raise `UserError` for a teacher map with a single position, because its mean-removed map is zero."""
    if height * width < 2:
        raise UserError(
            "the teacher's last feature map is 1x1, but the feature losses need a spatial grid",
            got=f"{height}x{width}",
            expected="at least two positions",
            fix="use larger views (views.size), or a teacher with a larger last feature map",
        )


def feature_loss(prediction: Tensor, target: Tensor, norms: Tensor, weight: float, grid_scaling: bool) -> Tensor:
    """weight * sum((P / ||P|| - F / n)^2) / B, with norms over channels; P, F (B, C, H, W), n (B, H, W) -> scalar.

    n is the norm of the exact F. Dividing a noisy decoded F by its own norm would shrink the gradient, while dividing
    by n keeps it linear in F. A token with n = 0 has no direction; its target is 0 rather than amplified decoding
    noise.
    """
    assert prediction.shape == target.shape, (prediction.shape, target.shape)
    batch, _, height, width = target.shape
    assert norms.shape == (batch, height, width), (norms.shape, target.shape)
    n = norms.unsqueeze(1)
    direction = torch.where(n > NORM_EPS, target / n.clamp_min(NORM_EPS), torch.zeros_like(target))
    difference = F.normalize(prediction, dim=1, eps=NORM_EPS) - direction
    scale = REFERENCE_POSITIONS / (height * width) if grid_scaling else 1.0
    return difference.square().sum() * (weight * scale / batch)


def spatial_loss(
    prediction: Tensor, features: Tensor, norms: Tensor, *, weight: float = 1.0, grid_scaling: bool = True
) -> Tensor:
    """The spatial view in dual-view feature mimicking (DFM), which compares normalized tokens directly.

    prediction, features (B, C, H, W) and norms (B, 2, H, W), any float dtype -> scalar float32 (float64 for float64
    inputs). Only norms[:, 0] is used. Raises `UserError` for a 1x1 map. Source: ScaleKD, `get_spat_loss`.
    """
    check_grid(*features.shape[2:])
    with full_precision(prediction):
        return feature_loss(wide(prediction), wide(features), wide(norms[:, 0]), weight, grid_scaling)


def frequency_loss(
    prediction: Tensor, features: Tensor, norms: Tensor, *, weight: float = 1.0, grid_scaling: bool = True
) -> Tensor:
    """The frequency view in DFM: like `spatial_loss`, but the maps' direct component (the spatial mean) is removed.

    Shapes, dtypes and errors are the same, but it uses norms[:, 1]. Source: ScaleKD, `get_freq_loss`.
    """
    check_grid(*features.shape[2:])
    with full_precision(prediction):
        p, f = remove_spatial_mean(wide(prediction)), remove_spatial_mean(wide(features))
        return feature_loss(p, f, wide(norms[:, 1]), weight, grid_scaling)


def pooled_loss(prediction: Tensor, target: Tensor, *, weight: float = 1.0) -> Tensor:
    """weight * sum((P / ||P|| - T / ||T||)^2) / B, with P and T (B, C) -> scalar.

    This is 2 - 2 cosine, averaged over samples. The target can be divided by its own norm, because the mean of a map
    averages out most codec noise, and a stored embedding has almost none.
    """
    assert prediction.shape == target.shape, (prediction.shape, target.shape)
    with full_precision(prediction):
        difference = F.normalize(wide(prediction), dim=1, eps=NORM_EPS) - F.normalize(wide(target), dim=1, eps=NORM_EPS)
        return difference.square().sum() * (weight / len(target))


def pooled_target(targets: Targets) -> Tensor:
    """(B, P) or (F, C): the stored pooled embedding, or else the map's mean over positions."""
    return wide(targets.features).mean((2, 3)) if targets.pooled is None else targets.pooled


def logit_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, weight: float = 1.0
) -> Tensor:
    """weight * T^2 * cross entropy between softmax(teacher / T) and softmax(student / T), averaged over samples.

    Both logits (B, K) -> scalar float32. Raises `UserError` if the numbers of classes differ. Source: ScaleKD,
    `KDLoss`.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            "the student and the teacher have different numbers of classes",
            got=f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}",
            expected="the same shape",
            fix="set scalekd.logit_weight=0, or train the student on the teacher's classes",
        )
    with full_precision(student_logits):
        soft = F.softmax(wide(teacher_logits) / temperature, dim=1)
        return F.cross_entropy(wide(student_logits) / temperature, soft) * (weight * temperature**2)


def partial_logit_loss(student_logits: Tensor, log_probabilities: Tensor, *, weight: float = 1.0) -> Tensor:
    """weight * cross entropy with the teacher's probabilities for some classes and their total for all others.

    student_logits (B, K); log_probabilities (B, K), -inf where unknown -> scalar float32. The unknown classes count as
    a single event, for which the teacher's total probability is compared with the student's. Nothing is renormalized.
    The temperature must be 1, because the unknown classes' total is not known at other temperatures.
    """
    with full_precision(student_logits):
        known = log_probabilities > float("-inf")
        p = torch.where(known, wide(log_probabilities).exp(), 0.0)
        log_q = F.log_softmax(wide(student_logits), dim=1)
        rest = torch.where(known, torch.finfo(log_q.dtype).min, log_q).logsumexp(1)
        rest_mass = torch.where(known.all(1), 0.0, (1 - p.sum(1)).clamp_min(0))
        return -((p * log_q).sum(1) + rest_mass * rest).mean() * weight


def label_loss(
    student_logits: Tensor, labels: Tensor, *, kind: str = "ce", smoothing: float = 0.0, weight: float = 1.0
) -> Tensor:
    """The label loss: logits (B, K), int64 labels (B,) -> scalar float32.

    ce is cross entropy with label smoothing, averaged over samples. bce is binary cross entropy, summed over classes
    and averaged over samples (a mean over classes would be K times smaller).
    """
    assert kind in ("ce", "bce"), kind
    with full_precision(student_logits):
        logits = wide(student_logits)
        if kind == "ce":
            return F.cross_entropy(logits, labels, label_smoothing=smoothing) * weight
        hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, hot, reduction="sum") * (weight / len(labels))


class FeatureTerms(NamedTuple):
    """One teacher's weighted scalar float32 feature terms. A disabled term is a constant 0."""

    s3_spatial: Tensor
    s3_frequency: Tensor
    s4_spatial: Tensor
    s4_frequency: Tensor
    pooled: Tensor


def distillation_losses(
    config: ScaleKDConfig,
    train: TrainConfig,
    student_logits: Tensor,
    labels: Tensor,
    maps: HeadOutputs | None,
    targets: Targets | None,
) -> LossTerms:
    """All terms for a batch, from student_logits (B, K) and int64 labels (B,).

    Logits and labels are not read if neither a label term nor a logit term is computed. Without distillation, maps and
    targets are None. Otherwise, they have features for the first F <= B samples. The feature terms are divided by F, so
    their expected value does not depend on F. `losses_of_teachers` does the same for multiple teachers.
    """
    assert maps is None or targets is not None, "projected maps without targets"
    given = [] if targets is None else [(maps, targets)]
    return losses_of_teachers(config, train, student_logits, labels, given)[0]


def losses_of_teachers(
    config: ScaleKDConfig,
    train: TrainConfig,
    student_logits: Tensor,
    labels: Tensor,
    teachers: Sequence[tuple[HeadOutputs | None, Targets]],
) -> tuple[LossTerms, list[FeatureTerms]]:
    """All terms for a batch, and each teacher's own feature terms, from the teachers' projected maps and targets.

    The label term has weight 1 - logit_weight if there is a logit term. It has weight 1 if there is no logit term,
    because there are no targets or no teacher has a classifier. Without a label term (`train.label_loss` = none), the
    logit term has weight 1 unless logit_weight is 0. Terms with weight 0 are not computed.

    Teachers have weights w_t from `teacher_shares`, which sum to 1. The logit term is the weighted mean over the
    teachers with logits. At equal temperatures, it is the cross entropy with their mean probabilities. A feature term
    is the weighted sum of the teachers' terms. With `balance` = scale, w_t is multiplied by M / L_t, where L_t is the
    teacher's feature loss and M is the weighted mean of all L_t. No gradient flows through this factor. The sum of the
    feature terms is still M, and its gradient is M times the weighted sum of the gradients of log L_t.
    """
    zero = torch.zeros((), dtype=wide(student_logits).dtype, device=student_logits.device)
    label, logit = _label_and_logit(config, train, student_logits, labels, [one for _, one in teachers], zero)
    own = [feature_terms(config, maps, targets, zero) for maps, targets in teachers if maps is not None]
    if len(own) < 2:
        return LossTerms(label, logit, *(own[0] if own else [zero] * len(FeatureTerms._fields))), own
    rows, shares = [torch.stack(one) for one in own], config.weights_of(len(own))
    weights: Sequence[float | Tensor] = shares
    if config.balance == "scale":
        losses = [row.detach().sum().clamp_min(torch.finfo(row.dtype).tiny) for row in rows]
        mean = torch.stack([share * loss for share, loss in zip(shares, losses, strict=True)]).sum()
        weights = [share * mean / loss for share, loss in zip(shares, losses, strict=True)]
    terms = torch.stack([weight * row for weight, row in zip(weights, rows, strict=True)]).sum(0)
    return LossTerms(label, logit, *terms.unbind()), own


def _label_and_logit(
    config: ScaleKDConfig,
    train: TrainConfig,
    student_logits: Tensor,
    labels: Tensor,
    targets: Sequence[Targets],
    zero: Tensor,
) -> tuple[Tensor, Tensor]:
    """The label term and the logit term (see `losses_of_teachers`)."""
    weighted = zip(config.weights_of(len(targets)), targets, strict=True)
    teachers = [(share, one) for share, one in weighted if one.logits.shape[1] > 0]
    total = config.logit_weight if teachers else 0.0
    label, logit = zero, zero
    if train.label_loss == "none":
        total = 1.0 if total > 0 else 0.0
    else:
        label = label_loss(
            student_logits, labels, kind=train.label_loss, smoothing=train.label_smoothing, weight=1 - total
        )
    for share, one in teachers if total > 0 else ():
        weight = total * share / sum(other for other, _ in teachers)
        if one.partial:
            term = partial_logit_loss(student_logits, one.logits, weight=weight)
        else:
            term = logit_loss(student_logits, one.logits, temperature=config.temperature, weight=weight)
        logit = term if logit is zero else logit + term
    return label, logit


def feature_terms(config: ScaleKDConfig, maps: HeadOutputs, targets: Targets, zero: Tensor) -> FeatureTerms:
    """The feature terms for one teacher. Terms with weight 0 are not computed; `zero` replaces them."""
    features, norms, weights = targets.features, targets.norms, term_weights(config)

    def mimic(view: Callable[..., Tensor], projected: Tensor | None, weight: float) -> Tensor:
        if weight == 0:
            return zero
        assert projected is not None, "a weighted term without its map"
        return view(projected, features, norms, weight=weight, grid_scaling=config.grid_scaling)

    pooled = zero
    if maps.pooled is not None:
        pooled = pooled_loss(maps.pooled, pooled_target(targets), weight=weights.pooled)
    return FeatureTerms(
        mimic(spatial_loss, maps.s3_spatial, weights.s3_spatial),
        mimic(frequency_loss, maps.s3_frequency, weights.s3_frequency),
        mimic(spatial_loss, maps.s4_spatial, weights.s4_spatial),
        mimic(frequency_loss, maps.s4_frequency, weights.s4_frequency),
        pooled,
    )
