"""The parts of a training run that come out of a cache: tail, heads, classifier, targets.

In: an open cache, options. Out: modules and `Targets`. Invariant: no training engine is needed; the plain loop of
`targets.py` and the runs of `distill.py` are put together by the same functions.
"""

import torch
from torch import nn

from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.logits import LogitCodec
from scalekd_cache.codec.recomputed import RecomputedLogits, load_classifier
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig, TrainConfig
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.loader.loader import Batch
from scalekd_cache.loader.order import WINDOW, Likeness, Order, mixing_window
from scalekd_cache.models.student import Student
from scalekd_cache.models.tail import Tail
from scalekd_cache.models.tail_file import load_tail
from scalekd_cache.models.teacher_spec import TeacherSpec
from scalekd_cache.scalekd.heads import ScaleKDHeads
from scalekd_cache.scalekd.losses import Targets
from scalekd_cache.store.checked_files import is_there
from scalekd_cache.store.durable_files import fact_of
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.remote.remote_path import local_path


def check_logits(config: ScaleKDConfig, cache: Cache, kept: LogitCodec) -> None:
    """`UserError` for a loss that the kept logits cannot give."""
    if kept.partial and config.temperature != 1 and config.logit_weight > 0:
        raise UserError(
            "the cache keeps the mass of its less probable classes at temperature 1 only",
            got=f"scalekd.temperature={config.temperature}",
            expected="1, or a cache with all logits",
            where=cache.root,
            fix='set SET="scalekd.temperature=1", or make a cache with cache.logits=dense',
        )


def kept_classifier(config: DistillConfig, cache: Cache, kept: LogitCodec, process: Process) -> nn.Linear | None:
    """The teacher's classifier where the cache has it in place of logits; what the kept logits cannot do is refused."""
    check_logits(config.scalekd, cache, kept)
    if not isinstance(kept, RecomputedLogits) or config.train.targets != "cached":
        return None
    return load_classifier(kept.get_config(), cache.root).to(process.device)


def tail_of(cache: Cache, spec: TeacherSpec) -> Tail:
    """The teacher's tail, byte for byte the one the cache was made with."""
    file = cache.root / "tail.safetensors"
    if not is_there(file) or fact_of(file).sha256 != cache.manifest.tail_sha256:
        raise UserError(
            "the teacher's tail is missing or damaged",
            expected=f"sha256 {cache.manifest.tail_sha256[:16]}",
            where=file,
            fix="restore the file, or delete the manifest and run make cache-teacher again: it keeps the units",
        )
    return load_tail(local_path(file), spec)


def make_heads(config: DistillConfig, student: Student, tail: Tail) -> ScaleKDHeads:
    """The ScaleKD heads between a student and a teacher's tail."""
    heads = ScaleKDHeads(
        config.scalekd,
        tap_shapes=student.tap_shapes,
        tail_in_shape=tail.in_shape,
        tail_out_shape=tail.out_shape,
        layer_norm=student.layer_norm,
    )
    if config.student.grad_checkpointing:
        heads.checkpoint_gradients()
    return heads


def order_of(train: TrainConfig, cache: Cache, process: Process) -> Order:
    """The order of a run; where neighbouring images are of one class, it mixes wider."""
    found = Likeness(*cache.manifest.data.get("class_likeness", (1.0, 1.0)))
    window = train.shuffle_window or mixing_window(len(cache), train.shuffle_block, found)
    if window > WINDOW and train.shuffle_window is None:
        process.say(
            f"the cache holds images of one class side by side ({found.neighbours:.0%} of neighbours, "
            f"{found.chance:.1%} by chance), so windows of {window:,} blocks = {window * train.shuffle_block:,} images "
            f"are mixed instead of {WINDOW}; read with more seeks, and from a URL with more copies (docs/SCALE.md)"
        )
    return Order(num_samples=len(cache), block=train.shuffle_block, window=window, seed=train.seed)


@torch.no_grad()
def cached_targets(codec: FeatureCodec, logit_codec: LogitCodec, classifier: nn.Linear | None, batch: Batch) -> Targets:
    """The targets of a batch, decoded on its device; `classifier` is `kept_classifier`'s."""
    decoded = codec.decode(batch.codes)
    if classifier is not None:
        return Targets(*decoded, classifier(decoded.features.mean((2, 3))))
    return Targets(*decoded, batch.logits, logit_codec.partial)
