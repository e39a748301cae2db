"""Held-out losses for the study, and codec ablations that have no command-line option.

In: a finished run with its checkpoint, the live teacher. Out: loss terms on held-out images against exact live targets.
Invariant: no file is changed, and code patched for an ablation is restored afterwards.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from scalekd_cache.codec.base import FeatureMap, feature_norms
from scalekd_cache.codec.dither import dither_seed, dither_table
from scalekd_cache.codec.transform import TransformCodec
from scalekd_cache.codec.transform_fit import codec_for_noise, fit_moments
from scalekd_cache.config.base import from_plain
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.data.images import decode_image
from scalekd_cache.data.source import open_cache_source
from scalekd_cache.distributed import this_process
from scalekd_cache.models.evaluate import ValidationImages
from scalekd_cache.models.student import build_student
from scalekd_cache.scalekd.losses import LossTerms, TermWeights
from scalekd_cache.store.reader import Cache
from scalekd_cache.training.checkpoint import MODEL, latest_checkpoint
from scalekd_cache.training.run_files import read_config
from scalekd_cache.training.trainer import DistillModel, StepLosses
from scalekd_cache.views.view import apply_view, sample_view

BATCH = 64


@contextmanager
def without_dither() -> Iterator[None]:
    """Ablation: the transform codec rounds to nearest instead of dithering, in fitting, writing and reading."""

    def zeros(count: int) -> Tensor:
        return torch.zeros_like(dither_table(count))

    with ExitStack() as stack:
        for module in ("transform", "transform_fit"):
            stack.enter_context(patch(f"scalekd_cache.codec.{module}.dither_table", zeros))
        yield


@contextmanager
def decoded_norms() -> Iterator[None]:
    """Ablation: losses divide decoded transform maps by their own norms, not by the stored norms of the exact maps."""
    decode = TransformCodec.decode

    def own(self: TransformCodec, codes: Tensor) -> FeatureMap:
        features = decode(self, codes).features
        return FeatureMap(features, feature_norms(features))

    with patch.object(TransformCodec, "decode", own):
        yield


@contextmanager
def heads_on_one_of(count: int) -> Iterator[None]:
    """Ablation: the heads see the first of every `count` micro-batches, with feature terms times `count`."""
    forward, calls = DistillModel.forward, itertools.count()

    def some(self: DistillModel, *inputs: Any) -> StepLosses:
        if next(calls) % count == 0:
            losses = forward(self, *inputs)
            scaled = {name: count * getattr(losses.terms, name) for name in TermWeights._fields}
            return losses._replace(terms=losses.terms._replace(**scaled))
        with patch.object(DistillModel, "project", lambda *inputs, **options: None):
            return forward(self, *inputs)

    with patch.object(DistillModel, "forward", some):
        yield


@torch.no_grad()
def first_views(cache: Path, weights: str | None, count: int = 192) -> Tensor:
    """The teacher's maps (N, C, H, W) of view 0 of `count` images of a cache, float32 on the CPU."""
    from scalekd_cache.models.teacher import cache_teacher_config, load_cache_teacher

    opened = Cache.open(cache)
    device = this_process().device
    options = cache_teacher_config(opened.manifest.facts.teacher["config"], weights)
    teacher = load_cache_teacher(opened.manifest, options, device)
    source = open_cache_source(opened.manifest.facts.data, None, "train")
    recipe = view_config(opened.manifest.facts.view_recipe)
    maps = []
    for index in torch.linspace(0, len(source.samples) - 1, min(count, len(source.samples))).long().tolist():
        sample = source.samples[index]
        image = decode_image(source.read(index), sample.key)
        view = apply_view(sample_view(recipe, sample.key, 0, image.shape[1], image.shape[0]), image, recipe)
        maps.append(teacher(torch.from_numpy(view).permute(2, 0, 1)[None].to(device)).features.cpu())
    return torch.cat(maps)


def view_config(recipe: dict[str, Any]) -> ViewConfig:
    """View options from a manifest's view recipe."""
    return ViewConfig(**from_plain({name: recipe[name] for name in ViewConfig.__dataclass_fields__ if name in recipe}))


def noise_for_bytes(features: Tensor, wanted: float) -> float:
    """The noise at which the transform codec's records have a mean size of `wanted` bytes, found by the secant method.

    Half of the views fit the codec, the other half measures it. Stops within 1% or after 8 fits.

    Raises:
    ValueError: no noise from 1e-4 to 1 reaches this size.
    """
    fitted, counted = features[::2].contiguous(), features[1::2].contiguous()
    state = fit_moments(fitted)
    seeds = torch.tensor([dither_seed(str(number), 0) for number in range(len(counted))])

    def size(noise: float) -> float:
        codec = codec_for_noise(state, fitted, noise)
        return sum(map(len, codec.pack(codec.encode(counted, seeds).numpy()))) / len(counted)

    low, high = 1e-4, 1.0
    bytes_low, bytes_high = size(low), size(high)
    if not bytes_high <= wanted <= bytes_low:
        raise ValueError(f"{wanted:.0f} bytes per view: the transform codec takes {bytes_high:.0f} to {bytes_low:.0f}")
    for _ in range(8):
        share = (bytes_low - wanted) / (bytes_low - bytes_high)
        middle = math.exp(math.log(low) + min(max(share, 0.05), 0.95) * math.log(high / low))
        found = size(middle)
        if abs(found / wanted - 1) < 0.01:
            break
        if found > wanted:
            low, bytes_low = middle, found
        else:
            high, bytes_high = middle, found
    return float(f"{middle:.4g}")


class HeldOutLosses:
    """Losses of students on held-out images, against exact live targets that are computed once."""

    def __init__(self, cache: Path, weights: str | None, count: int) -> None:
        """Compute the targets of `count` held-out images; `cache` is any cache of the setting."""
        from scalekd_cache.models.teacher import cache_teacher_config, load_cache_teacher
        from scalekd_cache.training.targets import live_targets, load_cache_tail

        self.cache, self.device = Cache.open(cache), this_process().device
        manifest = self.cache.manifest
        options = cache_teacher_config(manifest.facts.teacher["config"], weights)
        teacher = load_cache_teacher(manifest, options, self.device)
        source = open_cache_source(manifest.facts.data, None, "val")
        order = torch.randperm(len(source.samples), generator=torch.Generator().manual_seed(0)).tolist()[:count]
        images = ValidationImages(source, manifest.facts.view_recipe["size"])
        examples = [example for index in order if (example := images[index]) is not None]
        self.batches = []
        for start in range(0, len(examples), BATCH):
            part = examples[start : start + BATCH]
            pixels, labels = torch.stack([image for image, *_ in part]), torch.tensor([label for _, label, _ in part])
            pixels = pixels.to(self.device)
            self.batches.append((pixels, labels.to(self.device), live_targets(teacher, pixels)))
        self.tail = load_cache_tail(self.cache).to(self.device)

    @torch.no_grad()
    def losses(self, run: Path) -> dict[str, float]:
        """Mean weighted loss terms of a finished run's student and heads, in eval mode."""
        from scalekd_cache.scalekd.heads import make_heads

        options = read_config(run)
        config = DistillConfig(
            student=StudentConfig(**from_plain(options["student"])),
            optim=OptimConfig(**from_plain(options["optim"])),
            scalekd=ScaleKDConfig(**from_plain(options["scalekd"])),
            train=TrainConfig(**from_plain(options["train"])),
        )
        manifest = self.cache.manifest
        size, classes = manifest.facts.view_recipe["size"], len(manifest.facts.class_names)
        student = build_student(config.student, num_classes=classes, image_size=size)
        model = DistillModel(config, student, [make_heads(config, student, self.tail)])
        checkpoint, problems = latest_checkpoint(run / "checkpoints")
        assert checkpoint is not None, problems
        model.load_state_dict(checkpoint.tensors(MODEL))
        model.to(self.device).eval()
        sums, count = torch.zeros(len(LossTerms._fields)), 0
        for pixels, labels, targets in self.batches:
            sums += len(labels) * torch.stack(list(model(pixels, labels, [targets], [self.tail]).terms)).cpu()
            count += len(labels)
        return {name: round(value, 5) for name, value in zip(LossTerms._fields, (sums / count).tolist(), strict=True)}
