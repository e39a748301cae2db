"""Options for the commands that use a backbone on labeled images: `probe` and `finetune`.

In: values from the command line or a Python call. Out: checked, immutable dataclasses.
Invariant: each configuration validates itself.
"""

from dataclasses import field

from scalekd_cache.config.base import Range, require
from scalekd_cache.config.options import options_class
from scalekd_cache.config.stage1 import DataConfig, ViewConfig
from scalekd_cache.errors import UserError


@options_class()
class ProbeConfig:
    """Options for `probe`."""

    backbone: str
    """A finished run's folder, the folder of an exported or imported student, or a timm model name (with pretrained
    weights)."""
    data: DataConfig = field(default_factory=DataConfig)
    weights: str | None = None
    """With a model name: a .safetensors file with the timm model's state dict (default: the file that `scalekd fetch`
    saved in teachers/, or timm's pretrained weights)."""
    size: int | None = None
    """Side length of the images in pixels (default: the backbone's input size)."""
    workers: int = 0
    """Worker processes that decode images (0: decode in the main process)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        _check_machine(self.size, self.workers)


NOT_STORED = ("size", "pixels", "pixel_format", "jpeg_quality", "jpeg_subsampling")
"""View options of stage 1 that fine-tuning does not use: it stores no views, and `size` sets their size."""


@options_class("views")
class FinetuneViews(ViewConfig):
    """Augmented views of the labeled images: the same options as in stage 1, but with larger crops by default."""

    crop_scale: Range = (0.35, 1.0)
    """Range of the crop area, as a fraction of the image area."""


@options_class()
class FinetuneConfig:
    """Options for `finetune`."""

    init: str | None = None
    """Folder of a finished run, or of an exported or imported student, to start from."""
    model: str | None = None
    """timm model name to start from, instead of init."""
    weights: str | None = None
    """With --model: a .safetensors file with the timm model's state dict (default: the file that `scalekd fetch` saved
    in teachers/, or timm's pretrained weights)."""
    pretrained: bool = True
    """With --model but without --weights: use pretrained weights (false: random weights)."""
    data: DataConfig = field(default_factory=DataConfig)
    size: int | None = None
    """Side length of the images in pixels (default: the model's input size)."""
    epochs: int = 30
    """Passes over the labeled images."""
    batch: int = 64
    """Batch size. If there are fewer training images, each batch contains all of them."""
    lr: float = 5e-4
    """Peak learning rate for AdamW."""
    labels_per_class: int | None = None
    """Train on this many images per class, selected by hashing the seed and image key (default: all)."""
    out: str | None = None
    """Output folder for the timm export (default: finetuned/<model>)."""
    seed: int = 0
    """Seed for classifier initialization, data order and dropout (augmentation uses views.seed)."""
    weight_decay: float = 0.05
    """Weight decay; not applied to biases and norm layers."""
    layer_decay: float = 0.75
    """Layer-wise learning rate decay: each layer's rate is this factor times that of the next deeper layer (1: off)."""
    label_smoothing: float = 0.1
    """Label smoothing for the cross-entropy loss."""
    ema_decay: float = 0.0
    """Decay of the weight EMA; the EMA weights are evaluated and exported (0: off)."""
    views: FinetuneViews = field(default_factory=FinetuneViews)
    workers: int = 0
    """Worker processes that decode images (0: decode in the main process)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if (self.init is None) == (self.model is None):
            raise UserError("set either --init (a folder) or --model (a timm model name)")
        if self.init is not None and self.weights is not None:
            raise UserError("--weights needs --model; with --init, the weights come from its folder")
        for name in NOT_STORED:
            if getattr(self.views, name) != getattr(FinetuneViews, name):
                fix = "set --size" if name == "size" else "remove it: it only affects views stored in a cache"
                raise UserError(f"finetune does not use --views.{name}", got=getattr(self.views, name), fix=fix)
        _check_machine(self.size, self.workers)
        require(self.epochs > 0, "epochs", self.epochs, "> 0")
        require(self.batch > 1, "batch", self.batch, "> 1")
        require(self.lr > 0, "lr", self.lr, "> 0")
        require(self.labels_per_class is None or self.labels_per_class > 0, "labels_per_class", self.labels_per_class,
                "> 0")  # fmt: skip
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, ">= 0")
        require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "above 0, at most 1")
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "at least 0, below 1")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "at least 0, below 1")


def _check_machine(size: int | None, workers: int) -> None:
    require(size is None or 8 <= size <= 4096, "size", size, "8 to 4096 pixels")
    require(0 <= workers <= 256, "workers", workers, "0 to 256")
