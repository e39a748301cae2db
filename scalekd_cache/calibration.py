"""Which codec a cache gets, and the fit of those that are fitted to their teacher.

In: options, source, teacher. Out: the codec; for fitted ones codec.safetensors in the cache's folder.
Invariant: one process fits, once a cache: a job that continues takes the state that is there, so that all units of a
cache have one codec.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalekd_cache.codec import FITTED, codec_from_config, make_codec
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.config import CacheTeacherConfig
from scalekd_cache.errors import UserError
from scalekd_cache.images import Source, UnreadableImage, decode_image
from scalekd_cache.pixel_cache import PixelCache
from scalekd_cache.processes import Peers
from scalekd_cache.store.files import canonical_json, write_atomically
from scalekd_cache.teacher import Teacher
from scalekd_cache.views import apply_view, decode_pixels, encode_pixels, sample_view

CALIBRATION_VIEWS = 512
"""First views that a codec is fitted to."""
MARK = "codec.json"


def calibrated_codec(
    config: CacheTeacherConfig, peers: Peers, source: Source | PixelCache, teacher: Teacher
) -> FeatureCodec:
    """The codec that the options name; rank 0 fits it when it needs a fit and the cache has none yet.

    Raises:
        UserError: no such codec, or a state in the cache that is damaged or of another preset.
    """
    name, noise, shape = config.cache.codec, config.cache.codec_noise, teacher.spec.feature_shape
    if not 0 <= noise <= 1 or (noise and name not in FITTED):
        raise UserError(
            "bad noise of a codec",
            got=f"{noise} for codec {name}",
            expected=f"0 to 1, and 0 for codecs other than {', '.join(FITTED)}",
            where="cache.codec_noise",
        )
    if name not in FITTED:
        return make_codec(name, shape)
    root = Path(config.cache.path)
    if peers.process.rank == 0:
        if not (root / MARK).exists():
            _fit(config, root, source, teacher, peers.process.device)
        peers.announce("codec")
    peers.wait("codec")
    kept = _kept(root)
    asked = _preset(config)
    if kept["preset"] != asked:
        raise UserError(
            "this cache's codec was fitted for another preset",
            got=asked,
            expected=kept["preset"],
            where=root,
            fix="use the codec and noise the cache was made with, or another folder (CACHE=...)",
        )
    return codec_from_config(kept["codec"], root)


def _kept(root: Path) -> dict[str, Any]:
    """What codec.json says."""
    try:
        kept = json.loads((root / MARK).read_text(encoding="utf-8"))
        if not isinstance(kept, dict) or set(kept) != {"preset", "codec"}:
            raise ValueError("expected preset and codec")
    except (OSError, ValueError) as error:
        raise UserError(
            "the codec's file is missing or damaged", got=error, where=root / MARK, fix="restore it from a copy"
        ) from error
    return kept


def write_mark(root: Path, codec: Mapping[str, Any]) -> None:
    """codec.json again, from a codec's config: the preset is the one of its noise."""
    from scalekd_cache.codec.transform_fit import PRESETS

    names = {noise: name for name, noise in PRESETS.items()}
    preset = names.get(codec["noise"], f"transform, noise {codec['noise']:g}")
    content = {"preset": preset, "codec": dict(codec)}
    write_atomically(root / MARK, (canonical_json(content) + "\n").encode())


def fitted_preset(root: Path) -> tuple[str, float]:
    """The preset and noise that a cache's codec was fitted for; noise 0 is the preset's own."""
    name, _, noise = str(_kept(root)["preset"]).partition(", noise ")
    return name, float(noise or 0)


def _preset(config: CacheTeacherConfig) -> str:
    noise = config.cache.codec_noise
    return f"{config.cache.codec}, noise {noise:g}" if noise else config.cache.codec


def _fit(
    config: CacheTeacherConfig, root: Path, source: Source | PixelCache, teacher: Teacher, device: torch.device
) -> None:
    """Write the state, then the file that names it: a job killed between the two fits again."""
    from scalekd_cache.codec.transform_fit import FILE, PRESETS, fit, state_bytes

    print(f"fitting codec {config.cache.codec} to the teacher's features", flush=True)
    with torch.no_grad():
        batches = _views(config, source)
        features = torch.cat([teacher(batch.to(device)).features.cpu() for batch in batches])
    codec = fit(features, config.cache.codec_noise or PRESETS[config.cache.codec])
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(root / FILE, state_bytes(codec.state))
    content = {"preset": _preset(config), "codec": codec.get_config()}
    write_atomically(root / MARK, (canonical_json(content) + "\n").encode())


def _views(config: CacheTeacherConfig, source: Source | PixelCache) -> Iterator[Tensor]:
    """View 0 of images spread over the data set, (B, 3, S, S) uint8, as the teacher will see them."""
    drawn = _stored(config, source) if isinstance(source, PixelCache) else _drawn(config, source)
    pixels: list[Tensor] = []
    for view in islice(drawn, CALIBRATION_VIEWS):
        pixels.append(torch.from_numpy(view).permute(2, 0, 1))
        if len(pixels) == config.teacher.batch_size:
            yield torch.stack(pixels)
            pixels = []
    if pixels:
        yield torch.stack(pixels)


def _stored(config: CacheTeacherConfig, source: PixelCache) -> Iterator[NDArray[np.uint8]]:
    """Views (S, S, 3) from another cache."""
    for position in range(0, len(source.cache), max(1, len(source.cache) // CALIBRATION_VIEWS)):
        yield decode_pixels(source.cache.read([position], 0)[0].pixels, config.views.size)


def _drawn(config: CacheTeacherConfig, source: Source) -> Iterator[NDArray[np.uint8]]:
    """Views (S, S, 3) drawn from the images."""
    order = source.order(0)
    for index in order[:: max(1, len(order) // CALIBRATION_VIEWS)].tolist():
        key = source.samples[index].key
        try:
            image = decode_image(source.read(index), key)
        except UnreadableImage:
            continue  # stage 1 itself records what it leaves out
        view = apply_view(sample_view(config.views, key, 0, image.shape[1], image.shape[0]), image, config.views)
        if config.views.pixels == "baked":
            view = decode_pixels(encode_pixels(view, config.views), config.views.size)
        yield view
