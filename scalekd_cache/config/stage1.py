"""Options of stage 1: data, views, teacher, cache.

In: values from a recipe and the command line. Out: checked, immutable dataclasses, one per owner.
Invariant: a configuration that exists is valid on its own.
"""

from dataclasses import dataclass, field
from typing import Literal

from scalekd_cache.config.base import require
from scalekd_cache.config.target import parse_target


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from (`images.py`)."""

    source: str = "demo"
    """demo, cifar10, imagenette, or a path: class folders under train/ and val/, WebDataset tars or parquet files."""
    devkit: str | None = None
    """ImageNet devkit folder, needed when val/ is flat (ILSVRC2012_devkit_t12)."""
    classes: str | None = None
    """Order of the classes, which has to be that of the teacher's outputs: a file with one class name per line; sorted
    (by code point, as torchvision), natural (2 before 10, as timm) or caseless; None: classes.txt in the folder of the
    data set where it lists exactly the class folders, else sorted."""
    download_dir: str = "data"
    """Folder for data sets that torchvision downloads."""
    max_samples: int | None = None
    """Use only the first this many samples of the canonical order (None: all)."""

    def __post_init__(self) -> None:
        require(self.max_samples is None or self.max_samples > 0, "data.max_samples", self.max_samples, "> 0")


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """The view recipe (`views.py`): how an augmented view is drawn and in which form its pixels are kept."""

    size: int = 224
    """Side of a square view, pixels."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's share of the image area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width over height, drawn log-uniformly."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling filter of the resize."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip."""
    randaugment_ops: int = 0
    """RandAugment operations per view, drawn with replacement (0: off)."""
    randaugment_magnitude: float = 9.0
    """RandAugment magnitude on timm's scale of 0 to 10."""
    randaugment_magnitude_std: float = 0.5
    """Standard deviation of the magnitude, same scale."""
    erase_probability: float = 0.0
    """Probability of random erasing with per-pixel noise."""
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    """Range of the erased share of the view's area."""
    erase_ratio: tuple[float, float] = (0.3, 10 / 3)
    """Range of the erased box's height over width, drawn log-uniformly."""
    pixels: Literal["baked", "replayed"] = "baked"
    """baked: encoded pixels are stored; replayed: only the record and a digest, the student recomputes the view."""
    pixel_format: Literal["jpeg", "png"] = "jpeg"
    """How baked pixels are encoded (png is lossless)."""
    jpeg_quality: int = 90
    """JPEG quality, 1 to 100."""
    jpeg_subsampling: Literal["4:2:0", "4:4:4"] = "4:2:0"
    """JPEG chroma subsampling."""
    seed: int = 0
    """Seed of the counter-based generator that draws every view."""

    def __post_init__(self) -> None:
        require(8 <= self.size <= 4096, "views.size", self.size, "8 to 4096 pixels")
        for name in ("crop_scale", "crop_ratio", "erase_area", "erase_ratio"):
            low, high = getattr(self, name)
            require(0 < low <= high, f"views.{name}", (low, high), "0 < low <= high")
        require(self.crop_scale[1] <= 1, "views.crop_scale", self.crop_scale, "at most 1")
        require(self.erase_area[1] <= 1, "views.erase_area", self.erase_area, "at most 1")
        for name in ("flip_probability", "erase_probability"):
            require(0 <= getattr(self, name) <= 1, f"views.{name}", getattr(self, name), "0 to 1")
        require(0 <= self.randaugment_ops <= 15, "views.randaugment_ops", self.randaugment_ops, "0 to 15")
        require(
            0 <= self.randaugment_magnitude <= 10, "views.randaugment_magnitude", self.randaugment_magnitude, "0 to 10"
        )
        require(
            self.randaugment_magnitude_std >= 0,
            "views.randaugment_magnitude_std",
            self.randaugment_magnitude_std,
            ">= 0",
        )
        require(1 <= self.jpeg_quality <= 100, "views.jpeg_quality", self.jpeg_quality, "1 to 100")
        require(0 <= self.seed < 2**63, "views.seed", self.seed, "0 to 2^63 - 1")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen teacher (`teacher.py`)."""

    name: str = "demo_swin"
    """A timm model name, or demo_swin, the small Swin that is trained on the demo set when its weights are missing."""
    weights: str | None = None
    """A .safetensors file with the state dict of that timm model (None: pretrained weights, or random ones)."""
    pretrained: bool = True
    """Fetch timm's pretrained weights when no file is given; false gives random weights (for trying things out)."""
    weights_dir: str = "teachers"
    """Folder of the demo teacher and of weights brought by `fetch`; looked at before pretrained weights are fetched."""
    num_classes: int | None = None
    """Classes of the head (None: the number in the weights file, the data set's, or the pretrained head's; 0: none,
    only features are distilled)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; auto is bfloat16 on a GPU and float32 on a CPU."""
    batch_size: int = 64
    """Views per teacher forward pass."""
    check_classes: bool = True
    """Stop before the first unit when the teacher's accuracy is near chance, or far below what it would be with the
    classes in another order (false: report it and continue)."""

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "teacher.batch_size", self.batch_size, "> 0")
        require(self.num_classes is None or self.num_classes >= 0, "teacher.num_classes", self.num_classes, ">= 0")


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """The cache on disk (`store/`, `codec/`)."""

    path: str = "caches/demo"
    """Folder of the cache."""
    backend: Literal["webdataset", "zarr"] = "webdataset"
    """File format of the shards."""
    codec: str = "int8"
    """Feature codec (docs/CODECS.md): int8, transform, transform-economy, float16, bfloat16, float32, int4, fp8; or
    auto: the smallest that meets codec_target, chosen once, on views of this data set."""
    codec_target: str | None = None
    """What codec auto has to meet, in 99 % of views that no codec was fitted to: ac-cosine:0.999 (mean-removed cosine),
    kl:0.01 (nats, through the teacher's own head); or bytes:20000, the closest codec of at most so many a view."""
    codec_noise: float = 0.0
    """Noise of a transform codec: its mean-removed cosine is 1 / sqrt(1 + noise). 0: the preset's, 0.0018 or 0.06."""
    logits: Literal["dense", "top_k", "recomputed"] = "dense"
    """What is kept of the logits: all in 8 bits; the most probable with the mass of the rest (top_k); or nothing, for
    teachers whose classifier reads the mean of the last map (recomputed)."""
    top_k: int = 10
    """Classes that logits=top_k keeps."""
    num_views: int = 4
    """Augmented views of every image."""
    views_per_group: int = 4
    """Views that one work unit makes from one decoded image."""
    samples_per_shard: int = 512
    """Images in a shard (a shard holds one view of each)."""
    pixels_from: str | None = None
    """Folder of a finished cache of the same data set and view recipe, whose baked pixels are shared: this one stores
    features and logits only, in shards of the same images (None: pixels of its own)."""

    def __post_init__(self) -> None:
        require(1 <= self.num_views <= 10_000, "cache.num_views", self.num_views, "1 to 10,000")
        require(1 <= self.views_per_group <= 64, "cache.views_per_group", self.views_per_group, "1 to 64")
        require(
            (self.codec == "auto") == (self.codec_target is not None),
            "cache.codec_target",
            self.codec_target,
            "TARGET=ac-cosine:0.999 (or bytes:20000, kl:0.01) with CODEC=auto, none with another codec",
        )
        if self.codec_target is not None:
            parse_target(self.codec_target)
        require(1 <= self.samples_per_shard <= 65_536, "cache.samples_per_shard", self.samples_per_shard, "1 to 65,536")


@dataclass(frozen=True, kw_only=True)
class CacheTeacherConfig:
    """Stage 1: everything `cache_teacher` reads."""

    recipe: str = "demo"
    """Name of the recipe, kept in the manifest; `distill` uses the same one unless told otherwise."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    cache: StoreConfig = field(default_factory=StoreConfig)
    student: str | None = None
    """A student to try before the work starts: it and the recipe's training options shall fit the cache."""
    workers: int = 0
    """Worker processes that decode images and draw views, per rank (0: in the main process)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    peer_timeout_minutes: float = 1.0
    """A process without a sign of life for this long counts as gone: the others make its units."""

    def __post_init__(self) -> None:
        require(0 <= self.workers <= 256, "workers", self.workers, "0 to 256")
        require(self.peer_timeout_minutes > 0, "peer_timeout_minutes", self.peer_timeout_minutes, "> 0")
