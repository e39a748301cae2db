"""Selects a cache's codec by name or by a target, and fits it to the teacher if necessary.

In: options, dataset, teacher. Out: the codec, codec.json in the cache folder, and codec.safetensors if it is fitted.
Invariant: all units in a cache use the same codec. One process fits or selects it once; a resumed job loads it.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scalekd_cache.caching.pixel_cache import PixelCache
from scalekd_cache.caching.sample_views import spread_views
from scalekd_cache.codec import CODECS, FITTED, codec_from_config, make_codec
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.dither import dither_seed
from scalekd_cache.codec.fidelity import fidelity
from scalekd_cache.codec.logits import kl_divergence
from scalekd_cache.codec.recomputed import classifier_bytes
from scalekd_cache.codec.transform_fit import codec_for_noise, fit_moments
from scalekd_cache.codec.transform_state import MAX_TOKENS
from scalekd_cache.config.stage1 import CacheTeacherConfig, StoreConfig
from scalekd_cache.config.target import CodecTarget, parse_target
from scalekd_cache.data.base import Source
from scalekd_cache.distributed import Peers
from scalekd_cache.errors import UserError, counted, join_or
from scalekd_cache.models.teacher import Teacher
from scalekd_cache.store.durable_files import write_atomically
from scalekd_cache.store.manifest import STATE
from scalekd_cache.store.plan import NAME as PLAN
from scalekd_cache.store.plan import locked_plan, read_plan
from scalekd_cache.store.sealed_json import sealed
from scalekd_cache.store.verify import CODEC_FILE, read_codec_choice

NOISES = tuple(float(f"{1e-4 * 10 ** (step / 32):.3g}") for step in range(93))
"""Noise levels for the transform codec, from 0.0001 to 0.075, in steps of about 7%."""
BATCH = 64
MIN_VIEWS = 8


class CodecMeasurement(NamedTuple):
    """A codec's size and accuracy on held-out views."""

    codec: str
    noise: float
    """The transform codec's noise level; 0 for other codecs."""
    bytes: float
    """Mean bytes per record, including norms."""
    cosine_mean: float
    """Cosine of the mean-removed features, averaged over the views."""
    cosine_p1: float
    kl_mean: float | None
    """KL divergence in nats, computed with the teacher's head; None if that head does not take the mean feature."""
    kl_p99: float | None
    top1_agreement: float | None
    meets: bool

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return self._asdict()


class CodecChoice(NamedTuple):
    """The selected codec, and measurements for all codecs that were tried."""

    codec: FeatureCodec
    rows: list[CodecMeasurement]
    """Measurements, sorted from smallest to largest size."""
    chosen: CodecMeasurement


def choose_codec(features: Tensor, logits: Tensor, teacher: Teacher, target: CodecTarget) -> CodecChoice:
    """Select the smallest codec that meets an accuracy target, or the most accurate one that meets a size target.

    Args:
        features: (N, C, H, W) float32 on the CPU, with one view per image; a third of them are held out.
        logits: (N, K) float32 from the teacher.
        teacher: provides the head used to compute the KL divergence.
        target: 99% of the views must meet a cosine or KL target; the mean over the views must meet a size target.

    Raises:
        UserError: there are too few views, no codec meets the target, or the KL divergence cannot be computed with
            this teacher's head.
    """
    if len(features) < MIN_VIEWS:
        raise UserError(
            "too few images to select a codec",
            got=counted(len(features), "image"),
            expected=f"at least {MIN_VIEWS}",
            where="--codec auto",
            fix="choose a codec by name: --codec int8",
        )
    judged = torch.arange(len(features)) % 3 == 2
    head = _readable_head(teacher, features[:2], logits[:2], needed=target.metric == "kl")
    held_out = features[judged]
    tried = {name: make_codec(name, teacher.spec.feature_shape) for name in CODECS}
    found = [(codec, _measure(codec, held_out, head, target)) for codec in tried.values()]
    if held_out.shape[2] * held_out.shape[3] <= MAX_TOKENS:
        found += _measure_transforms(features[~judged].contiguous(), held_out, head, target)
    found.sort(key=lambda pair: pair[1].bytes)
    rows = [row for _, row in found]
    fitting = [pair for pair in found if pair[1].meets]
    if not fitting:
        raise UserError(
            "no codec meets the target",
            got=f"{target.text}\n{codec_table(rows, None)}",
            where="--codec auto",
            fix="relax --target",
        )
    if target.metric == "bytes":
        codec, chosen = max(fitting, key=lambda pair: (pair[1].cosine_p1, -pair[1].bytes))
    else:
        codec, chosen = fitting[0]
    return CodecChoice(codec, rows, chosen)


def _measure_transforms(
    features: Tensor, held_out: Tensor, head: "torch.nn.Linear | None", target: CodecTarget
) -> list[tuple[FeatureCodec, CodecMeasurement]]:
    """Binary search for the highest noise level at which the transform codec meets the target; returns every level
    tried."""
    state = fit_moments(features)
    found: list[tuple[FeatureCodec, CodecMeasurement]] = []

    def attempt(noise: float) -> bool:
        codec = codec_for_noise(state, features, noise)
        found.append((codec, _measure(codec, held_out, head, target)))
        return found[-1][1].meets

    fine_meets = target.metric != "bytes"  # a target in bytes is met at high noise levels
    low, high = 0, len(NOISES)
    while low < high:  # [low, high] contains the first noise level past the boundary
        middle = (low + high) // 2
        if attempt(NOISES[middle]) == fine_meets:
            low = middle + 1
        else:
            high = middle
    return found


def _readable_head(teacher: Teacher, features: Tensor, logits: Tensor, needed: bool) -> "torch.nn.Linear | None":
    """The teacher's classifier if its input is the mean feature; otherwise None."""
    model: Any = teacher.model
    device = next(model.parameters()).device
    reason = "it has no classifier"
    if teacher.spec.has_classifier:
        try:
            classifier_bytes(model, features.to(device), logits.to(device), teacher.autocast_dtype)
        except UserError:
            reason = "its classifier does not take the mean of the normalized last feature map"
        else:
            linear: torch.nn.Linear = model.get_classifier()
            return linear
    if needed:
        raise UserError(
            "cannot compute the KL divergence for this teacher",
            got=f"{teacher.spec.name}: {reason}",
            where="--target kl:...",
            fix="use --target ac-cosine:... or --target bytes:...",
        )
    return None


@torch.no_grad()
def _measure(
    codec: FeatureCodec, maps: Tensor, head: "torch.nn.Linear | None", target: CodecTarget
) -> CodecMeasurement:
    """Measure a codec on feature maps (N, C, H, W)."""
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
    return CodecMeasurement(
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


def codec_table(rows: Sequence[CodecMeasurement], chosen: CodecMeasurement | None) -> str:
    """Format the measurements as a table with an arrow next to the chosen codec."""
    lines = [
        f"  {'codec':<12}{'noise':>9}{'bytes':>11}{'ac-cosine':>11}{'p1':>9}{'KL':>10}{'p99':>10}{'top-1':>9}  meets"
    ]
    for row in rows:
        kl = [f"{value:.1e}" if value is not None else "-" for value in (row.kl_mean, row.kl_p99)]
        top1 = f"{100 * row.top1_agreement:.1f}%" if row.top1_agreement is not None else "-"
        noise = f"{row.noise:g}" if row.noise else "-"
        lines.append(
            f"{'->' if row is chosen else '  '}{row.codec:<12}{noise:>9}{row.bytes:>11,.0f}{row.cosine_mean:>11.5f}"
            f"{row.cosine_p1:>9.5f}{kl[0]:>10}{kl[1]:>10}{top1:>9}  {'yes' if row.meets else 'no'}"
        )
    return "\n".join(lines)


CALIBRATION_VIEWS = 512
"""Number of images whose view 0 is used to fit a codec."""
AUTO = "auto"


class SelectedCodec(NamedTuple):
    """A codec and the measurements used to select it (empty if it was selected by name)."""

    codec: FeatureCodec
    rows: list[dict[str, Any]]


def load_or_select_codec(
    config: CacheTeacherConfig, peers: Peers, source: Source | PixelCache, teacher: Teacher, *, dry_run: bool = False
) -> FeatureCodec:
    """Load a cache's codec, or let rank 0 fit or select a new one.

    A dry run does not fit a codec; it uses int8 instead and prints a note.

    Raises:
        UserError: the codec is unknown, no codec meets the target, or the cache's codec file is damaged or was made
            with different options.
    """
    check_codec_options(config)
    name, root = config.cache.codec, Path(config.cache.path)
    if name not in (*FITTED, AUTO):
        return make_codec(name, teacher.spec.feature_shape)
    if dry_run:
        if not _is_selected(config, root, teacher):
            if (root / PLAN).exists():
                return codec_from_config(read_plan(root).facts.codec, root)
            peers.process.print_rank0(
                f"codec {name} is not fitted in a dry run: the sizes below are estimates based on int8"
                if name != AUTO
                else "a dry run does not select a codec: the sizes below are estimates based on int8"
            )
            return make_codec("int8", teacher.spec.feature_shape)
    else:
        if peers.process.rank == 0 and not _is_selected(config, root, teacher):
            selected = select_codec(config, source, teacher, peers.process.device)
            root.mkdir(parents=True, exist_ok=True)
            with locked_plan(root):
                if not _is_selected(config, root, teacher):  # another job may have selected one in the meantime
                    _write_codec(config, root, selected, teacher)
        if peers.process.rank == 0:
            peers.publish("codec")
        peers.wait("codec")
    kept, asked = read_codec_choice(root), _preset(config)
    if kept.preset != asked:
        raise UserError(
            "this cache's codec was selected or fitted with different options",
            got=asked,
            expected=kept.preset,
            where=root,
            fix="use the codec, noise and target that the cache was made with, or a different folder (--cache ...)",
        )
    return codec_from_config(kept.codec, root)


def check_codec_files(options: StoreConfig, root: Path, codec: FeatureCodec) -> None:
    """Check that the codec files belong to this job, and remove files left by a job that wrote no plan.

    Called before the plan is written.

    Raises:
        UserError: another job has written a different codec.
    """
    if options.codec not in (*FITTED, AUTO):
        for name in (CODEC_FILE, STATE):
            (root / name).unlink(missing_ok=True)
    elif read_codec_choice(root).codec != codec.get_config():
        raise UserError(
            "another job is writing this cache with a different teacher or codec",
            where=root,
            fix="use a different --cache for one of the jobs",
        )


def check_codec_options(config: CacheTeacherConfig) -> None:
    """Raise `UserError` if the noise level is out of range or the codec has no noise option."""
    name, noise = config.cache.codec, config.cache.codec_noise
    if not 0 <= noise <= 1 or (noise and name not in FITTED):
        raise UserError(
            "invalid codec noise",
            got=f"{noise} for codec {name}",
            expected=f"0 to 1 for {join_or(FITTED)}; 0 for any other codec",
            where="cache.codec_noise",
        )


def codec_options(root: Path) -> dict[str, Any]:
    """The stage-1 options used to fit or select a cache's codec, read from codec.json."""
    preset = read_codec_choice(root).preset
    if preset.startswith(f"{AUTO}, "):
        return {"codec": AUTO, "codec_target": preset.removeprefix(f"{AUTO}, ")}
    name, _, noise = preset.partition(", noise ")
    return {"codec": name, "codec_noise": float(noise or 0)}


def write_codec_choice(root: Path, fields: Mapping[str, Any]) -> None:
    """Rewrite codec.json from a cache's fingerprint fields, deriving the preset from the codec's noise level."""
    from scalekd_cache.codec.transform_fit import preset_name

    codec = fields["codec"]
    if "noise" not in codec:  # selected by a target but not fitted, so its name is enough
        (root / CODEC_FILE).unlink(missing_ok=True)
        return
    preset = preset_name(codec)
    _write_mark(root, preset, fields["teacher"]["weights_sha256"], codec, [])


def _write_mark(
    root: Path, preset: str, teacher: str, codec: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    content = {"preset": preset, "teacher": teacher, "codec": dict(codec), "chosen_from": list(rows)}
    write_atomically(root / CODEC_FILE, sealed(content))


def _preset(config: CacheTeacherConfig) -> str:
    noise, target = config.cache.codec_noise, config.cache.codec_target
    if target is not None:
        return f"{AUTO}, {parse_target(target).text}"
    return f"{config.cache.codec}, noise {noise:g}" if noise else config.cache.codec


def _is_selected(config: CacheTeacherConfig, root: Path, teacher: Teacher) -> bool:
    """Whether the cache already has a codec. Until a plan exists, a codec for another preset or teacher is replaced."""
    planned = (root / PLAN).exists()
    if not (root / CODEC_FILE).exists():
        # `repair` removes a damaged codec state and repeats the fit.
        if planned and read_plan(root).facts.codec.get("id") not in FITTED:
            raise UserError(
                "this cache was made with a different codec",
                got=f"--codec {config.cache.codec}",
                expected=f"--codec {read_plan(root).facts.codec.get('id')}",
                where=root,
                fix="use the --codec that the cache was made with, or a different --cache",
            )
        return False
    kept = read_codec_choice(root)
    return planned or (kept.preset, kept.teacher) == (_preset(config), teacher.spec.weights_sha256)


def select_codec(
    config: CacheTeacherConfig, source: Source | PixelCache, teacher: Teacher, device: torch.device
) -> SelectedCodec:
    """Fit or select the codec on view 0 of images spread over the dataset, without writing any files."""
    from scalekd_cache.codec.transform_fit import ALWAYS_ROTATED, PRESETS, fit

    name, (_, height, width) = config.cache.codec, teacher.spec.feature_shape
    if name != AUTO and height * width > MAX_TOKENS:
        raise UserError(
            f"codec {name} supports feature maps with at most {MAX_TOKENS:,} positions",
            got=f"{height} x {width} positions from {teacher.spec.name} at {teacher.spec.image_size} px",
            fix="set --codec int8 or --codec auto, or use smaller views (--size)",
        )
    print(
        f"{'selecting a codec for' if name == AUTO else f'fitting codec {name} to'} the teacher's features", flush=True
    )
    with torch.no_grad():
        outputs = [teacher(batch.to(device)) for batch in _calibration_batches(config, source)]
    features = torch.cat([output.features.cpu() for output in outputs])
    if config.cache.codec_target is None:
        rotated = True if name == ALWAYS_ROTATED else None
        return SelectedCodec(fit(features, config.cache.codec_noise or PRESETS[name], rotated=rotated), [])
    target = parse_target(config.cache.codec_target)
    choice = choose_codec(features, torch.cat([output.logits.cpu() for output in outputs]), teacher, target)
    print(f"target {target.text}, measured on held-out images:", flush=True)
    print(codec_table(choice.rows, choice.chosen), flush=True)
    return SelectedCodec(choice.codec, [row.to_json() for row in choice.rows])


def _calibration_batches(config: CacheTeacherConfig, source: Source | PixelCache) -> Iterator[Tensor]:
    """View 0 of each calibration image, in uint8 batches (B, 3, S, S), exactly as fed to the teacher."""
    images = spread_views(source, config.views, (0,), CALIBRATION_VIEWS)
    while batch := [item.pixels for item in islice(images, config.teacher.batch_size)]:
        yield torch.cat(batch)


def _write_codec(config: CacheTeacherConfig, root: Path, selected: SelectedCodec, teacher: Teacher) -> None:
    """Write the codec state, then codec.json. If the job is killed in between, the next job repeats the fit."""
    from scalekd_cache.codec.transform import TransformCodec
    from scalekd_cache.codec.transform_state import FILE, state_bytes

    if isinstance(selected.codec, TransformCodec):
        write_atomically(root / FILE, state_bytes(selected.codec.state))
    else:
        (root / FILE).unlink(missing_ok=True)  # left by a fit with different options before a plan existed
    _write_mark(root, _preset(config), teacher.spec.weights_sha256, selected.codec.get_config(), selected.rows)
