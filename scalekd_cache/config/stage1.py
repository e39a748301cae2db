"""Options for stage 1: data, views, teacher, cache.

In: values from a recipe and the command line. Out: checked, immutable dataclasses, one per topic.
Invariant: each configuration validates itself.
"""

import math
from dataclasses import field, replace
from typing import Literal, Self

from scalekd_cache.config.base import Range, require, require_minutes
from scalekd_cache.config.options import options_class
from scalekd_cache.config.places import expand_home, teacher_folders
from scalekd_cache.config.target import parse_target
from scalekd_cache.errors import UserError, counted


@options_class("data")
class DataConfig:
    """The dataset (`data/source.py`)."""

    source: str = "demo"
    """demo, cifar10, imagenette, or a path: class folders under train/ and val/, WebDataset tars, or parquet files. For
    images without labels: any folder, or a .txt file of paths."""
    devkit: str | None = None
    """ImageNet devkit folder (ILSVRC2012_devkit_t12); needed if val/ has no class folders."""
    classes: str | None = None
    """Class order, which must match the teacher's outputs: a file with one class name per line, or one of: sorted (by
    code point, as in torchvision), natural (2 before 10, as in timm), caseless (sorted, ignoring case). Default for
    class folders: classes.txt in the dataset's folder if it lists exactly these folders, otherwise sorted. Default for
    tars and parquet files: the order of their label numbers."""
    download_dir: str = "data"
    """Folder for datasets downloaded by torchvision."""
    max_samples: int | None = None
    """Use only N samples of each split (default: all): the first N in tars and parquet files, otherwise a fixed
    pseudorandom subset."""

    def __post_init__(self) -> None:
        require(self.max_samples is None or self.max_samples > 0, "data.max_samples", self.max_samples, "> 0")


@options_class("views")
class ViewConfig:
    """The view recipe (`views/view.py`): how augmented views are sampled and how their pixels are stored."""

    size: int = 224
    """Side length of a square view, in pixels."""
    crop_scale: Range = (0.08, 1.0)
    """Range of the crop area, as a fraction of the image area."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio (width over height), sampled log-uniformly."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling filter for resizing."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip."""
    randaugment_ops: int = 0
    """RandAugment operations per view, sampled with replacement (0: off)."""
    randaugment_magnitude: float = 9.0
    """RandAugment magnitude on timm's scale of 0 to 10."""
    randaugment_magnitude_std: float = 0.5
    """Standard deviation of the magnitude, on the same scale."""
    erase_probability: float = 0.0
    """Probability of random erasing with per-pixel noise."""
    erase_area: Range = (0.02, 1 / 3)
    """Range of the erased area, as a fraction of the view's area."""
    erase_ratio: Range = (0.3, 10 / 3)
    """Range of the erased box's aspect ratio (height over width), sampled log-uniformly."""
    pixels: Literal["baked", "replayed"] = "baked"
    """baked: store encoded pixels; replayed: store only view parameters and a digest of the pixels, and regenerate the
    views from the images during training."""
    pixel_format: Literal["jpeg", "jpeg-optimized", "webp", "png"] = "jpeg"
    """Encoding of baked pixels: jpeg; jpeg-optimized: the same pixels in fewer bytes, but slower to encode; webp:
    fewer bytes for small views, but decoding takes twice as long as with JPEG at 128 px and three times as long at
    224 px; png: lossless (docs/CODECS.md)."""
    jpeg_quality: int = 90
    """JPEG and WebP quality, 1 to 100."""
    jpeg_subsampling: Literal["4:2:0", "4:4:4"] = "4:2:0"
    """JPEG chroma subsampling (WebP: always 4:2:0)."""
    seed: int = 0
    """Seed for the counter-based random number generator used for all views."""

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
        require(
            self.pixel_format != "webp" or self.jpeg_subsampling == "4:2:0",
            "views.jpeg_subsampling",
            self.jpeg_subsampling,
            "4:2:0, the only value for views.pixel_format=webp",
        )
        require(0 <= self.seed < 2**63, "views.seed", self.seed, "0 to 2^63 - 1")


@options_class("teacher")
class TeacherConfig:
    """The frozen teacher (`models/teacher.py`)."""

    name: str = "demo_swin"
    """A timm model name, or demo_swin, a small Swin that is trained on the demo set if its weights are missing."""
    weights: str | None = None
    """A .safetensors file with the timm model's state dict (default: pretrained weights; see `pretrained`)."""
    pretrained: bool = True
    """Without `weights`: use pretrained weights, from `weights_dir` or downloaded by timm (false: random weights, for
    tests)."""
    weights_dir: str = "teachers"
    """Folder for the demo teacher and for weights downloaded by `fetch`; searched before downloading pretrained
    weights."""
    num_classes: int | None = None
    """Number of classes in the teacher's head (default: from the weights or, for random weights, from the dataset; 0:
    no head, distill only features)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward pass; auto: bfloat16 on a GPU, float32 on a CPU."""
    batch_size: int = 64
    """Views per teacher forward pass. For views larger than 512 px, batches are split so that a pass has no more pixels
    than 64 views at 224 px."""
    check_classes: bool = True
    """Stop before the first unit if the teacher's accuracy is near chance, or much higher with a different
    class order (false: only warn)."""

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "teacher.batch_size", self.batch_size, "> 0")
        classes = self.num_classes
        require(classes is None or 0 <= classes <= 1_000_000, "teacher.num_classes", classes, "0 to 1,000,000")


@options_class("cache")
class StoreConfig:
    """The cache on disk (`store/`, `codec/`)."""

    path: str = "caches/demo"
    """Folder of the cache."""
    backend: Literal["webdataset", "zarr"] = "webdataset"
    """File format of the shards."""
    codec: str = "int8"
    """Feature codec (docs/CODECS.md): int8, transform, transform-economy, transform-rotated, float16, bfloat16,
    float32, int4, fp8; or auto, which selects a codec that meets codec_target on views of this dataset."""
    codec_target: str | None = None
    """Target for codec=auto. ac-cosine:0.999 (mean-removed cosine) or kl:0.01 (KL divergence in nats at the output of
    the teacher's head): the smallest codec that meets it on 99% of held-out views; bytes:20000: the most accurate codec
    with at most this many bytes per view."""
    codec_noise: float = 0.0
    """Noise level of a transform codec; the resulting mean-removed cosine is 1 / sqrt(1 + noise). 0: the preset's value
    (0.06 for transform-economy, otherwise 0.0018)."""
    logits: Literal["dense", "top_k", "recomputed"] = "dense"
    """How logits are stored. dense: all classes, in 8 bits; top_k: the most probable classes and the remaining
    probability mass; recomputed: not stored, but computed from the features during training (only for teachers whose
    classifier takes the mean of the last feature map)."""
    top_k: int = 10
    """With logits=top_k: number of classes stored per view."""
    num_views: int = 4
    """Number of augmented views per image. If it is not set, an existing cache keeps its number of views."""
    views_per_group: int = 4
    """Number of views per work unit. An image is decoded once for all views of a unit."""
    stored_features: float = 1.0
    """Fraction of each image's views for which features are stored; labels, logits and pixels are stored for all.
    1 / fraction must be a whole number that divides num_views and views_per_group."""
    samples_per_shard: int = 512
    """Images per shard (a shard holds one view of each)."""
    pixels_from: str | None = None
    """Reuse the pixels of this finished cache, which must have the same dataset and view recipe. The new cache stores
    only features and logits, with the same sharding (default: store pixels)."""

    def __post_init__(self) -> None:
        require(1 <= self.num_views <= 10_000, "cache.num_views", self.num_views, "1 to 10,000")
        require(1 <= self.views_per_group <= 64, "cache.views_per_group", self.views_per_group, "1 to 64")
        if self.codec == "auto" and self.codec_target is None:
            raise UserError(
                "cache.codec=auto needs a target",
                fix="set --target, for example ac-cosine:0.999, kl:0.01 or bytes:20000",
            )
        if self.codec_target is not None:
            if self.codec != "auto":
                raise UserError(
                    "--target (cache.codec_target) applies only to --codec auto",
                    got=f"cache.codec_target={self.codec_target} with cache.codec={self.codec}",
                    fix="set --codec auto, or remove --target",
                )
            parse_target(self.codec_target)
        require(1 <= self.samples_per_shard <= 65_536, "cache.samples_per_shard", self.samples_per_shard, "1 to 65,536")
        self._check_share()

    @property
    def features_every(self) -> int:
        """Features are stored for one in this many views of each image."""
        return round(1 / self.stored_features)

    def _check_share(self) -> None:
        """Raise `UserError` unless features are stored for the same number of views of each image."""
        share = self.stored_features
        require(1 / 64 <= share <= 1, "cache.stored_features", share, "1/64 to 1")
        every = self.features_every
        if abs(1 / share - every) > 0.01:
            near = sorted({math.floor(1 / share), math.ceil(1 / share)})
            raise UserError(
                "1 / cache.stored_features must be a whole number",
                got=f"cache.stored_features={share:g}, 1 / {share:g} = {1 / share:.4g}",
                expected=" or ".join(f"{1 / whole:.6g}" for whole in near),
                fix="change --stored-features",
            )
        if every > 1 and self.logits == "recomputed":
            raise UserError(
                "logits=recomputed needs features for every view",
                got=f"cache.logits=recomputed with cache.stored_features={share:g}",
                expected="stored logits",
                fix="set --cache.logits=dense (or top_k), or remove --stored-features",
            )
        counts = {"cache.num_views": self.num_views}
        if self.pixels_from is None:  # otherwise the other cache determines the view groups
            counts["cache.views_per_group"] = self.views_per_group
        for name, count in counts.items():
            if count % every:
                what = "number of views" if name == "cache.num_views" else "number of views per group"
                near = sorted({max(every, count // every * every), -(-count // every) * every})
                raise UserError(
                    f"with this {what}, some images would have more stored features than others"
                    + ("" if name == "cache.num_views" else " in the same group"),
                    got=f"{name}={count}, features for one in {every} views (cache.stored_features={share:g})",
                    expected=f"a multiple of {every}",
                    fix=f"set {_OPTIONS[name]} to {' or '.join(map(str, near))}, or change --stored-features",
                )


_OPTIONS = {"cache.num_views": "--views", "cache.views_per_group": "--cache.views_per_group"}


@options_class()
class CacheTeacherConfig:
    """All options for stage 1 (`cache_teacher`)."""

    recipe: str = "demo"
    """Recipe name, or path to a recipe file. The manifest stores the recipe's name and its training options, which
    `distill` uses by default."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: str | None = None
    """Multiple teachers in one pass over the images: timm model names, separated by commas. cache.path is then a
    folder with one cache per teacher, each named after its model. The first cache stores the pixels, and the others
    share them. teacher.weights may list files in the same order, with an empty entry for a teacher without a file."""
    cache: StoreConfig = field(default_factory=StoreConfig)
    student: str | None = None
    """Check before stage 1 that this student and the recipe's training options are compatible with the cache."""
    workers: int = 0
    """Worker processes per rank that decode images and compute views (0: use the main process)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    peer_timeout_minutes: float = 1.0
    """Heartbeat timeout in minutes: if a rank sends no heartbeat for this long, rank 0 redoes that rank's unfinished
    units."""

    def __post_init__(self) -> None:
        require(0 <= self.workers <= 256, "workers", self.workers, "0 to 256")
        require_minutes("peer_timeout_minutes", self.peer_timeout_minutes)
        self.per_teacher()

    def per_teacher(self) -> list[Self]:
        """One configuration per teacher, each for an ordinary cache. Without `teachers`, this is the configuration
        itself.

        Raises:
            UserError: a name is empty, the number of weights files differs from the number of teachers, or a teacher is
                listed twice.
        """
        if self.teachers is None:
            return [self]
        names = [name.strip() for name in self.teachers.split(",")]
        files = self.teacher.weights.split(",") if self.teacher.weights else [""] * len(names)
        if not all(names):
            raise UserError(f"--teachers {self.teachers} contains an empty name")
        if len(files) != len(names):
            raise UserError(
                "--teacher-weights needs one entry per teacher",
                got=f"{counted(len(files), 'entry', 'entries')} for {counted(len(names), 'teacher')}: "
                f"{self.teacher.weights}",
                expected="files in the order of --teachers, with an empty entry for a teacher without a file",
                fix="correct --teacher-weights, as in --teachers a,b,c --teacher-weights a.safetensors,,c.safetensors",
            )
        pairs = [(name, expand_home(file.strip()) or None) for name, file in zip(names, files, strict=True)]
        if twice := [name for number, (name, file) in enumerate(pairs) if (name, file) in pairs[:number]]:
            raise UserError(f"--teachers lists {twice[0]} twice with the same weights: remove one of them")
        return [
            replace(
                self,
                teachers=None,
                teacher=replace(self.teacher, name=name, weights=file),
                cache=replace(self.cache, path=f"{self.cache.path}/{folder}"),
            )
            for (name, file), folder in zip(pairs, teacher_folders(names), strict=True)
        ]
