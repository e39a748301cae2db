"""The smallest codec that meets a target, from measured views (`CODEC=auto TARGET=...`).

In: features of views to fit to, features of other images' views to judge by, a `CodecTarget`. Out: the codec, and the
table it was chosen from.
Invariant: no codec is judged by an image that it was fitted to; equal features give an equal choice.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scalekd_cache.codec import CODECS, make_codec
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.dither import dither_seed
from scalekd_cache.codec.fidelity import fidelity
from scalekd_cache.codec.logits import kl_divergence
from scalekd_cache.codec.recomputed import classifier_bytes
from scalekd_cache.codec.transform_fit import fit_bases, with_noise
from scalekd_cache.codec.transform_state import MAX_TOKENS
from scalekd_cache.config.target import CodecTarget
from scalekd_cache.errors import UserError
from scalekd_cache.models.teacher import Teacher

NOISES = tuple(float(f"{1e-4 * 10 ** (step / 32):.3g}") for step in range(93))
"""Noises of the transform coder: 0.0001 to 0.075, each 7 % above the one before."""
BATCH = 64
MIN_VIEWS = 8


class Row(NamedTuple):
    """A codec, measured on views that it was not fitted to."""

    codec: str
    noise: float
    """Of the transform coder, else 0."""
    bytes: float
    """Mean bytes of a record, norms included."""
    cosine_mean: float
    """Of mean-removed features."""
    cosine_p1: float
    kl_mean: float | None
    """Nats, through the teacher's own head; None where the head does not read the mean of the features."""
    kl_p99: float | None
    top1_agreement: float | None
    meets: bool

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return self._asdict()


class Choice(NamedTuple):
    """What was chosen, and from what."""

    codec: FeatureCodec
    rows: list[Row]
    """By rising bytes."""
    chosen: Row


def choose(features: Tensor, logits: Tensor, teacher: Teacher, target: CodecTarget) -> Choice:
    """The smallest codec that meets a target; for a target in bytes the closest to the original that meets it.

    Args:
        features: (N, C, H, W) float32 on the CPU, a view of each of N images; a third of them judges.
        logits: (N, K) float32, the teacher's.
        teacher: whose head gives the KL.
        target: cosine and KL have to be met by 99 % of the views, bytes in the mean.

    Raises:
        UserError: too few views, no codec meets the target, or a KL target with a head that features do not determine.
    """
    if len(features) < MIN_VIEWS:
        raise UserError("too few images to choose a codec by", got=f"{len(features)} images", expected=MIN_VIEWS,
                        where="CODEC=auto", fix="name a codec: CODEC=int8")  # fmt: skip
    judged = torch.arange(len(features)) % 3 == 2
    head = _head(teacher, features[:2], logits[:2], needed=target.metric == "kl")
    held_out = features[judged]
    tried = {name: make_codec(name, teacher.spec.feature_shape) for name in CODECS}
    found = [(codec, _row(codec, held_out, head, target)) for codec in tried.values()]
    if held_out.shape[2] * held_out.shape[3] <= MAX_TOKENS:
        found += _transforms(features[~judged].contiguous(), held_out, head, target)
    found.sort(key=lambda pair: pair[1].bytes)
    rows = [row for _, row in found]
    fitting = [pair for pair in found if pair[1].meets]
    if not fitting:
        raise UserError(
            "no codec meets the target",
            got=f"{target.text}\n{table(rows, None)}",
            where="CODEC=auto",
            fix="ask for less, or for fewer things: TARGET=",
        )
    if target.metric == "bytes":
        codec, chosen = max(fitting, key=lambda pair: (pair[1].cosine_p1, -pair[1].bytes))
    else:
        codec, chosen = fitting[0]
    return Choice(codec, rows, chosen)


def _transforms(
    features: Tensor, held_out: Tensor, head: "torch.nn.Linear | None", target: CodecTarget
) -> list[tuple[FeatureCodec, Row]]:
    """The transform coder at the noises of a binary search for where it just meets the target."""
    state = fit_bases(features)
    found: list[tuple[FeatureCodec, Row]] = []

    def attempt(noise: float) -> bool:
        codec = with_noise(state, features, noise)
        found.append((codec, _row(codec, held_out, head, target)))
        return found[-1][1].meets

    fine_meets = target.metric != "bytes"  # else it is the coarse end that does
    low, high = 0, len(NOISES)
    while low < high:  # the first noise of the other kind is in [low, high]
        middle = (low + high) // 2
        if attempt(NOISES[middle]) == fine_meets:
            low = middle + 1
        else:
            high = middle
    return found


def _head(teacher: Teacher, features: Tensor, logits: Tensor, needed: bool) -> "torch.nn.Linear | None":
    """The teacher's classifier, where it reads the mean of the features."""
    model: Any = teacher.model
    device = next(model.parameters()).device
    reason = "it has no classifier"
    if teacher.spec.has_classifier:
        try:
            classifier_bytes(model, features.to(device), logits.to(device))
        except UserError:
            reason = "its classifier does not read the mean of the last map after its norm, as Swin's does"
        else:
            linear: torch.nn.Linear = model.get_classifier()
            return linear
    if needed:
        raise UserError("a KL cannot be measured through this teacher's head", got=f"{teacher.spec.name}: {reason}",
                        where="TARGET=kl:...", fix="give a target of ac-cosine:... or bytes:...")  # fmt: skip
    return None


@torch.no_grad()
def _row(codec: FeatureCodec, maps: Tensor, head: "torch.nn.Linear | None", target: CodecTarget) -> Row:
    """Measure a codec on maps (N, C, H, W)."""
    sizes: list[int] = []
    cosines: list[float] = []
    kls: list[float] = []
    agree: list[bool] = []
    for start in range(0, len(maps), BATCH):
        part = maps[start : start + BATCH].contiguous()
        seeds = torch.tensor([dither_seed(str(start + number), 0) for number in range(len(part))])
        rows = codec.encode(part, seeds)
        sizes += map(len, codec.pack(rows.numpy()))
        decoded = codec.decode(rows).features
        cosines += fidelity(part, decoded).cosine_mean_removed.tolist()
        if head is not None:
            said, kept = (head(x.mean((2, 3)).to(head.weight.device)).cpu().numpy() for x in (part, decoded))
            kls += kl_divergence(said, kept).tolist()
            agree += (said.argmax(1) == kept.argmax(1)).tolist()
    kl_p99 = float(np.percentile(kls, 99)) if kls else None
    size, p1 = float(np.mean(sizes)), float(np.percentile(cosines, 1))
    meets = {
        "bytes": size <= target.value,
        "ac-cosine": p1 >= target.value,
        "kl": kl_p99 is not None and kl_p99 <= target.value,
    }
    return Row(
        codec=codec.id,
        noise=float(getattr(codec, "noise", 0.0)),
        bytes=size,
        cosine_mean=float(np.mean(cosines)),
        cosine_p1=p1,
        kl_mean=float(np.mean(kls)) if kls else None,
        kl_p99=kl_p99,
        top1_agreement=float(np.mean(agree)) if agree else None,
        meets=meets[target.metric],
    )


def table(rows: Sequence[Row], chosen: Row | None) -> str:
    """The rows for people; an arrow marks the one that was chosen."""
    lines = [
        f"  {'codec':<12}{'noise':>9}{'bytes':>11}{'ac-cosine':>11}{'p1':>9}{'KL':>10}{'p99':>10}{'top-1':>9}  meets"
    ]
    for row in rows:
        kl = [f"{value:.1e}" if value is not None else "-" for value in (row.kl_mean, row.kl_p99)]
        top1 = f"{100 * row.top1_agreement:.1f} %" if row.top1_agreement is not None else "-"
        noise = f"{row.noise:g}" if row.noise else "-"
        lines.append(
            f"{'->' if row is chosen else '  '}{row.codec:<12}{noise:>9}{row.bytes:>11,.0f}{row.cosine_mean:>11.5f}"
            f"{row.cosine_p1:>9.5f}{kl[0]:>10}{kl[1]:>10}{top1:>9}  {'yes' if row.meets else 'no'}"
        )
    return "\n".join(lines)
