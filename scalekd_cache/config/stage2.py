"""Options of stage 2: student, method, optimization, training.

In: values from a recipe and the command line. Out: checked, immutable dataclasses, one per owner.
Invariant: a configuration that exists is valid on its own.
"""

from dataclasses import dataclass, field
from typing import Literal

from scalekd_cache.config.base import require
from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.errors import UserError


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model that learns (`student.py`)."""

    name: str = "resnet18"
    """A timm model name."""
    drop_path: float = 0.0
    """Stochastic depth rate, for models that have it."""
    grad_checkpointing: bool = False
    """Keep the inputs of the student's blocks, of projectors and tail alone and compute the rest again in the backward
    pass: less memory, more time, the same numbers."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means that the student subtracts, on a scale of 0 to 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations, on a scale of 0 to 1."""

    def __post_init__(self) -> None:
        require(0 <= self.drop_path < 1, "student.drop_path", self.drop_path, "0 to 1, 1 excluded")
        require(min(self.std) > 0, "student.std", self.std, "all > 0")


@dataclass(frozen=True, kw_only=True)
class ScaleKDConfig:
    """The method's constants (`scalekd.py`); the defaults are upstream's for Swin-L with ResNet and MobileNet."""

    spatial_weight: float = 0.08
    """Weight of the spatial feature loss at both taps."""
    frequency_weight_s3: float = 0.06
    """Weight of the frequency feature loss at S3."""
    frequency_weight_s4: float = 0.06
    """Weight of the frequency feature loss at S4."""
    heads_s3: int | None = None
    """Attention heads of the S3 projector (None: the teacher's widths over 48, 16 for Swin-L; lite: of a quarter)."""
    heads_s4: int | None = None
    """Attention heads of the S4 projector (None: the teacher's widths over 64, 24 for Swin-L; lite: of a quarter)."""
    cap_norm: Literal["auto", "batch", "layer"] = "auto"
    """Norm after the projectors' convolution; auto: layer norm for students without batch norm, else batch norm
    (upstream has batch norm for ViT students too)."""
    attention_scale: float = 5.0
    """Factor on the attention scale head_dim^-0.5."""
    s4_query: Literal["s3", "learned"] = "s3"
    """Where the S4 projector's query comes from: the S3 branch after the tail, or its own embedding (always its own
    without the S3 branch)."""
    s3: bool = True
    """Use the S3 tap (ablation when false)."""
    s4: bool = True
    """Use the S4 tap (ablation when false; with both taps off only the logit loss is left)."""
    frequency: bool = True
    """Use the frequency view, the second of dual-view feature mimicking (ablation when false)."""
    tpp: bool = True
    """Run S3's projection through the teacher's frozen tail (false, an ablation: straight onto the last grid)."""
    projector: Literal["cap", "lite", "linear"] = "cap"
    """cap: cross attention projectors; lite: cheap ones, one a tap for both views (not in the paper; docs/METHOD.md);
    linear: a 1x1 convolution, plain feature distillation (ablation)."""
    logit_weight: float = 0.5
    """Weight of the logit loss; the label loss gets one minus it (0: no logit loss)."""
    temperature: float = 1.0
    """Temperature of the logit loss."""
    grid_scaling: bool = True
    """Scale feature losses by 49 / (H W), so that grids other than 7x7 weigh the same (our deviation)."""
    tail_drop_path: bool = False
    """Leave the frozen tail's drop path on, as upstream does by accident (ablation)."""

    def __post_init__(self) -> None:
        require(0 <= self.logit_weight <= 1, "scalekd.logit_weight", self.logit_weight, "0 to 1")
        require(self.temperature > 0, "scalekd.temperature", self.temperature, "> 0")
        for name in ("spatial_weight", "frequency_weight_s3", "frequency_weight_s4"):
            require(getattr(self, name) >= 0, f"scalekd.{name}", getattr(self, name), ">= 0")
        require(self.attention_scale > 0, "scalekd.attention_scale", self.attention_scale, "> 0")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule (`engine.py`, made by timm)."""

    name: Literal["sgd", "adamw", "lamb"] = "sgd"
    """Optimizer."""
    lr: float = 0.1
    """Learning rate at `base_batch_size`; scaled linearly to the actual global batch and printed."""
    base_batch_size: int = 256
    """Global batch that `lr` was chosen for."""
    weight_decay: float = 1e-4
    """Weight decay."""
    no_decay: Literal["nothing", "position", "norm_bias_position"] = "nothing"
    """What weight decay spares: nothing, position embeddings, or also every bias and one-dimensional parameter."""
    momentum: float = 0.9
    """Momentum of SGD."""
    schedule: Literal["cosine", "step"] = "cosine"
    """Learning-rate schedule; the cosine begins where the warm-up ends."""
    schedule_per_epoch: bool = False
    """Hold the rate within an epoch, as upstream does after the warm-up (false: change it every step)."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""
    warmup_start: float = 0.0
    """Learning rate at the first step of the warm-up, as a share of `lr`."""
    min_lr: float = 0.0
    """Learning rate at the end, as a share of `lr`."""
    step_epochs: int = 30
    """Epochs between two divisions by ten (step schedule)."""
    clip_norm: float = 0.0
    """Largest gradient norm (0: no clipping)."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "> 0")
        require(self.base_batch_size > 0, "optim.base_batch_size", self.base_batch_size, "> 0")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, ">= 0")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "0 to 1, 1 excluded")
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, ">= 0")
        require(self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, ">= 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop (`engine.py`)."""

    epochs: int = 100
    """Passes over the data; epoch e reads view e mod V."""
    views: int | None = None
    """V: use the first this many views of the cache (None: all there are, or are planned, when the run starts)."""
    global_batch_size: int = 256
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int = 32
    """Samples per forward pass: the group BatchNorm sees, the same on any number of ranks."""
    label_loss: Literal["ce", "bce"] = "ce"
    """ce: cross entropy; bce: binary cross entropy, summed over classes and averaged over samples."""
    label_smoothing: float = 0.0
    """Label smoothing of ce (bce has none)."""
    sync_bn: bool = False
    """Synchronize the student's BatchNorm over all processes (upstream's traditional ResNet; GPUs only)."""
    targets: Literal["cached", "live", "none"] = "cached"
    """cached: from the cache; live: from the teacher run beside the student; none: labels only."""
    zero: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    deepspeed: str | None = None
    """A DeepSpeed JSON file that is merged under what this configuration sets."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype of the student; auto is bfloat16 on a GPU and float32 on a CPU."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights; evaluated and exported when on (0: off)."""
    seed: int = 0
    """Seed of initialization, order and regularization."""
    shuffle_block: int = 64
    """Neighboring samples that are read together."""
    shuffle_window: int | None = None
    """Blocks whose samples are mixed with each other (None: 64, more where neighboring images are of one class)."""
    workers: int = 0
    """Loader worker processes, per rank (0: in the main process)."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    log_samples: bool = False
    """Write the positions of every micro-batch's samples to samples-r00000.jsonl, a file a process."""
    timeout_minutes: float = 30.0
    """Longest time that processes wait for each other; then the run ends and names the one that is behind."""
    checkpoint_epochs: int = 1
    """Epochs between two checkpoints (the last step always has one)."""
    checkpoint_steps: int = 0
    """Steps between two checkpoints within epochs (0: at the ends of epochs alone)."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept."""
    eval_epochs: int = 1
    """Epochs between two evaluations (the last epoch is always evaluated)."""

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "global_batch_size",
            "micro_batch_size",
            "shuffle_block",
            "log_every",
            "checkpoint_epochs",
            "keep_checkpoints",
            "eval_epochs",
        ):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "> 0")
        for name in ("views", "shuffle_window"):
            require(getattr(self, name) is None or getattr(self, name) > 0, f"train.{name}", getattr(self, name), "> 0")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            "train.micro_batch_size",
            self.micro_batch_size,
            f"a divisor of train.global_batch_size={self.global_batch_size}",
        )
        require(0 <= self.label_smoothing < 1, "train.label_smoothing", self.label_smoothing, "0 to 1, 1 excluded")
        smoothing_is_used = self.label_loss == "ce" or self.label_smoothing == 0
        require(smoothing_is_used, "train.label_smoothing", self.label_smoothing, "0 with train.label_loss=bce")
        require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "0 to 1, 1 excluded")
        require(self.timeout_minutes > 0, "train.timeout_minutes", self.timeout_minutes, "> 0")
        require(self.checkpoint_steps >= 0, "train.checkpoint_steps", self.checkpoint_steps, ">= 0")
        require(0 <= self.workers <= 256, "train.workers", self.workers, "0 to 256")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Stage 2: everything `distill` reads."""

    recipe: str | None = None
    """Name of the recipe (None: the one the cache was made with)."""
    cache: str = "caches/demo"
    """Folder or URL (file, http, https, s3, gs) of the cache."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    follow: bool = False
    """Train while the cache grows: begin when its first view group is there, wait for the others where they are due."""
    follow_timeout_minutes: float = 60.0
    """Longest wait without a new unit before a followed cache is given up, minutes."""
    pixels_from: str | None = None
    """Folder of the cache whose pixels this one shares (None: where it was, relative to this one, at stage 1)."""
    run: str | None = None
    """Folder of the run (None: runs/<student>-<targets>)."""
    init: str | None = None
    """Folder with a student to start from, written by `export` or `import-upstream` (None: random weights); its
    heads.safetensors, if it has one, starts the ScaleKD heads."""
    student: StudentConfig = field(default_factory=StudentConfig)
    scalekd: ScaleKDConfig = field(default_factory=ScaleKDConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    teacher_weights: str | None = None
    """Weights of the teacher, for train.targets=live only (None: where stage 1 found them)."""
    data: str | None = None
    """Where the validation images are (None: where stage 1 found them)."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        require(self.follow_timeout_minutes > 0, "follow_timeout_minutes", self.follow_timeout_minutes, "> 0")
        if self.student.grad_checkpointing and self.train.sync_bn:
            raise UserError(
                "synchronized BatchNorm and activation checkpointing do not go together: a recomputation would "
                "exchange statistics between processes in the middle of a backward pass",
                got="train.sync_bn=true with student.grad_checkpointing=true",
                expected="one of them",
                fix='set SET="train.sync_bn=false", or SET="student.grad_checkpointing=false"',
            )
        if self.optim.name == "lamb" and self.train.zero > 0:
            raise UserError(
                "LAMB under ZeRO 1-3 is not LAMB: trust ratios would be taken on a flat partition, not on each layer",
                got=f"optim.name=lamb with train.zero={self.train.zero}",
                expected="train.zero=0 with lamb, or sgd / adamw with any stage",
                fix='set ZERO=0, or SET="optim.name=adamw"',
            )
        if self.train.ema_decay > 0 and self.train.zero == 3:
            raise UserError(
                "a moving average of the weights needs whole weights at every step, ZeRO 3 keeps them in parts",
                got=f"train.ema_decay={self.train.ema_decay} with train.zero=3",
                expected="ema_decay=0, or ZeRO 0 to 2",
                fix='set ZERO=2, or SET="train.ema_decay=0"',
            )
