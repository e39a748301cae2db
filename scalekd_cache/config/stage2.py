"""Options for stage 2: student, method, optimization, training.

In: values from a recipe and the command line. Out: checked, immutable dataclasses, one per topic.
Invariant: each configuration validates itself.
"""

import sys
from dataclasses import field, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from scalekd_cache.config.base import Channels, Shares, read_number, require, require_minutes
from scalekd_cache.config.options import options_class
from scalekd_cache.config.places import expand_home
from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.errors import UserError, counted


@options_class("student")
class StudentConfig:
    """The student (`models/student.py`)."""

    name: str = "resnet18"
    """A timm model name, or a paper student's short name, such as mobilenetv1 (docs/METHOD.md). Multiple students,
    separated by commas, are trained one after another."""
    image_size: int | None = None
    """Side length of the student's images in pixels. Views are resized on the device (bicubic, with antialiasing);
    evaluation and export use this size too (default: the size of the views)."""
    drop_path: float = 0.0
    """Stochastic depth rate, for models that support it."""
    grad_checkpointing: bool = False
    """Activation checkpointing for the student's blocks, the projectors and the tail: less memory, more time, the same
    results."""
    mean: Channels = (0.485, 0.456, 0.406)
    """Channel means of the student's normalization, on a scale of 0 to 1."""
    std: Channels = (0.229, 0.224, 0.225)
    """Channel standard deviations of the student's normalization, on a scale of 0 to 1."""

    def __post_init__(self) -> None:
        size = self.image_size
        require(size is None or 8 <= size <= 2048, "student.image_size", size, "8 to 2048 pixels")
        require(0 <= self.drop_path < 1, "student.drop_path", self.drop_path, "at least 0, below 1")
        rescale = "for a scale of 0 to 255, divide by 255"
        require(max(self.mean) <= 1, "student.mean", self.mean, f"0 to 1; {rescale}")
        require(min(self.std) > 0 and max(self.std) <= 1, "student.std", self.std, f"above 0, at most 1; {rescale}")


PUBLISHED_WEIGHTS = {"spatial_weight": 0.08, "frequency_weight_s3": 0.06, "frequency_weight_s4": 0.06}
"""Upstream's feature weights, which balance a label loss over 1,000 classes."""
FEW_CLASSES = 20
FEW_CLASSES_WEIGHTS = {"spatial_weight": 0.005, "frequency_weight_s3": 0.004, "frequency_weight_s4": 0.004}
"""The feature weights for 2 to `FEW_CLASSES` classes: 1/16 of the published ones, rounded (docs/METHOD.md, Few
classes)."""


@options_class("scalekd")
class ScaleKDConfig:
    """Hyperparameters of the method (`scalekd/`). The defaults are upstream's for Swin-L with ResNet and MobileNet,
    except for the feature weights with few classes (`feature_weights`)."""

    spatial_weight: float | None = None
    """Weight of the spatial feature loss for S3 and S4, the student's last two feature maps (default: 0.08; 0.005 for 2
    to 20 classes)."""
    frequency_weight_s3: float | None = None
    """Weight of the frequency feature loss for S3 (default: 0.06; 0.004 for 2 to 20 classes)."""
    frequency_weight_s4: float | None = None
    """Weight of the frequency feature loss for S4 (default: 0.06; 0.004 for 2 to 20 classes)."""
    heads_s3: int | None = None
    """Number of attention heads in the S3 projector; must divide its width. Default: the largest divisor of the width
    that is at most width / 48, such as 16 for Swin-L. The width is the number of channels of the projector's output
    (lite: a quarter of it)."""
    heads_s4: int | None = None
    """Number of attention heads in the S4 projector; must divide its width. Default: the largest divisor of the width
    that is at most width / 64, such as 24 for Swin-L."""
    cap_norm: Literal["auto", "batch", "layer"] = "auto"
    """Norm after the projectors' convolution; auto: layer norm for students without batch norm, otherwise batch norm
    (upstream uses batch norm for ViT students too)."""
    attention_scale: float = 5.0
    """Factor applied to the attention scale, head_dim^-0.5."""
    s4_query: Literal["s3", "learned"] = "s3"
    """Query for the S4 projector. s3: the map computed from S3 (after the tail, unless tpp=false); learned: a learned
    embedding, which is always used if s3=false."""
    s3: bool = True
    """Use the feature losses for S3 (false: ablation)."""
    s4: bool = True
    """Use the feature losses for S4 (false: ablation). With s3=false and s4=false, there are no feature losses; without
    labels, the pooled embedding is still a target."""
    frequency: bool = True
    """Use the frequency feature losses, which the paper calls the second view of dual-view feature mimicking (false:
    ablation)."""
    tpp: bool = True
    """Pass the projected S3 through the tail, which is the frozen last stage of the teacher (false: ablation that
    projects S3 directly to the teacher's last feature map)."""
    projector: Literal["cap", "lite", "linear", "linear-tpp"] = "cap"
    """cap: cross attention projectors; lite: narrower projectors, shared by the spatial and the frequency loss (not in
    the paper; docs/METHOD.md); linear: plain feature distillation with linear maps from the student's last feature map
    to the teacher's last feature map and its mean (not in the paper); linear-tpp: cap with 1x1 convolutions as
    projectors (ablation)."""
    feature_share: Shares | None = None
    """Fraction of each micro-batch's samples used by the feature losses; label and logit losses use all samples.
    Default: all samples, or all with stored features. With multiple caches: one number for all, or one per cache."""
    teacher_shares: Shares | None = None
    """With multiple caches: weights of the teachers' losses, one per cache, normalized to sum to 1 (default: equal)."""
    balance: Literal["fixed", "scale"] = "fixed"
    """With multiple caches, how feature losses are weighted. fixed: each teacher's losses are multiplied by its
    weight in teacher_shares; scale: they are also divided by their current value, so that a teacher with a large loss
    does not dominate the gradient."""
    logit_weight: float = 0.5
    """Weight of the logit loss; the label loss has weight 1 - logit_weight (0: no logit loss). If only one of the two
    losses is available, its weight is 1."""
    temperature: float = 1.0
    """Temperature of the logit loss."""
    grid_scaling: bool = True
    """Scale feature losses by 49 / (H W), where the teacher's last feature map is H x W, so that other sizes have the
    same weight as 7x7 (differs from upstream)."""
    tail_drop_path: bool = False
    """Keep the frozen tail's drop path active, as upstream does by accident (ablation)."""

    def __post_init__(self) -> None:
        require(0 <= self.logit_weight <= 1, "scalekd.logit_weight", self.logit_weight, "0 to 1")
        require(self.temperature > 0, "scalekd.temperature", self.temperature, "> 0")
        for name, weight in self.feature_weights().items():
            require(weight >= 0, f"scalekd.{name}", weight, ">= 0")
        require(self.attention_scale > 0, "scalekd.attention_scale", self.attention_scale, "> 0")
        for name, high, expected in (
            ("feature_share", 1.0, "above 0, at most 1"),
            ("teacher_shares", sys.float_info.max, "> 0"),
        ):
            given = getattr(self, name)
            shares = given if isinstance(given, tuple) else (1.0 if given is None else given,)
            require(bool(shares) and all(0 < share <= high for share in shares), f"scalekd.{name}", given, expected)

    def feature_weights(self, classes: int = 0) -> dict[str, float]:
        """The feature weights by name. Those that are None are set by rule: `FEW_CLASSES_WEIGHTS` for labels of 2 to
        `FEW_CLASSES` classes, otherwise `PUBLISHED_WEIGHTS`. `classes` is 0 without labels."""
        rule = FEW_CLASSES_WEIGHTS if 2 <= classes <= FEW_CLASSES else PUBLISHED_WEIGHTS
        given = {name: getattr(self, name) for name in rule}
        return {name: rule[name] if weight is None else weight for name, weight in given.items()}

    def share_of(self, number: int = 0) -> float | None:
        """The feature share for one of the teachers (None: all features in its cache)."""
        return self.feature_share[number] if isinstance(self.feature_share, tuple) else self.feature_share

    def of_teacher(self, number: int) -> "ScaleKDConfig":
        """The hyperparameters for one of the teachers, as in a run with only this teacher."""
        return replace(self, feature_share=self.share_of(number), teacher_shares=None)

    def weights_of(self, teachers: int) -> list[float]:
        """The weights of the teachers' losses, which sum to 1. A single teacher has weight 1."""
        shares = self.teacher_shares
        given = shares if isinstance(shares, tuple) and teachers > 1 else (1.0,) * teachers
        return [share / sum(given) for share in given]

    def check_teachers(self, teachers: int) -> None:
        """Raise `UserError` if the number of shares differs from the number of teachers. A single feature share applies
        to all teachers."""
        for name in ("feature_share", "teacher_shares"):
            given = getattr(self, name)
            one_for_all = given is None or (name == "feature_share" and not isinstance(given, tuple))
            shares = given if isinstance(given, tuple) else (given,)
            if not one_for_all and len(shares) != teachers:
                raise UserError(
                    f"the number of shares in scalekd.{name} differs from the number of teachers",
                    got=f"{counted(len(shares), 'share')} for {counted(teachers, 'teacher')}",
                    fix=f"set --scalekd.{name} to one number per teacher",
                )


@options_class("optim")
class OptimConfig:
    """Optimizer and learning-rate schedule (`training/optim.py`; from timm)."""

    name: Literal["sgd", "adamw", "lamb"] = "sgd"
    """Optimizer."""
    lr: float = 0.1
    """Learning rate at `base_batch_size`; scaled linearly with the global batch size."""
    base_batch_size: int = 256
    """Global batch size that `lr` refers to."""
    weight_decay: float = 1e-4
    """Weight decay."""
    no_decay: Literal["nothing", "position", "norm_bias_position"] = "nothing"
    """Parameters without weight decay. nothing: none; position: position embeddings, relative position biases and class
    tokens; norm_bias_position: also all biases and one-dimensional parameters."""
    momentum: float = 0.9
    """Momentum for SGD."""
    schedule: Literal["cosine", "step", "constant", "restarts"] = "cosine"
    """Learning-rate schedule; cosine starts after the warm-up. restarts: a new cosine cycle every `cycle_epochs`.
    All schedules except cosine are independent of the number of epochs, so extending a run (`extend`) gives the same
    result as a longer run."""
    schedule_per_epoch: bool = False
    """After the warm-up, update the learning rate once per epoch, as upstream does (false: every step)."""
    warmup_epochs: float = 0.0
    """Number of linear warm-up epochs."""
    warmup_start: float = 0.0
    """Learning rate at the first step of the warm-up, as a fraction of `lr`."""
    min_lr: float = 0.0
    """Lowest learning rate of the cosine and restarts schedules, as a fraction of `lr`."""
    step_epochs: int = 30
    """Epochs between learning-rate drops by a factor of 10 (step schedule)."""
    cycle_epochs: int = 10
    """Number of epochs per cosine cycle (restarts schedule)."""
    clip_norm: float = 0.0
    """Maximum gradient norm (0: no clipping)."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "> 0")
        require(self.base_batch_size > 0, "optim.base_batch_size", self.base_batch_size, "> 0")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, ">= 0")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "at least 0, below 1")
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, ">= 0")
        require(0 <= self.warmup_start <= 1, "optim.warmup_start", self.warmup_start, "0 to 1")
        require(0 <= self.min_lr <= 1, "optim.min_lr", self.min_lr, "0 to 1")
        require(self.step_epochs > 0, "optim.step_epochs", self.step_epochs, "> 0")
        require(self.cycle_epochs > 0, "optim.cycle_epochs", self.cycle_epochs, "> 0")
        require(self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, ">= 0")


def _one_target(value: object) -> object:
    """Reject a list of targets, which other options such as `seeds` allow."""
    if isinstance(value, str) and "," in value:
        raise UserError(
            "--targets takes a single value",
            got=value,
            fix="run `scalekd distill` once for each value (the default folders differ), then compare the runs with "
            "`scalekd report --runs`",
        )
    return value


@options_class("train")
class TrainConfig:
    """The training loop (`training/trainer.py`)."""

    epochs: int = 100
    """Number of passes over the data. Epoch e reads view e mod V of every image, where V is the number of views."""
    views: int | None = None
    """Use only the first V views in the cache (default: all views that it has when the run starts; with `follow`, also
    the planned ones)."""
    global_batch_size: int = 256
    """Samples per optimizer step, summed over all ranks."""
    micro_batch_size: int = 32
    """Samples per forward pass on one rank; without sync_bn, this is also the BatchNorm group size. Does not depend on
    the number of ranks."""
    label_loss: Literal["ce", "bce", "none"] = "ce"
    """ce: cross entropy; bce: binary cross entropy, summed over classes and averaged over samples; none: no label loss,
    always used for a cache without labels."""
    label_smoothing: float = 0.0
    """Label smoothing for label_loss=ce; must be 0 for bce and none."""
    sync_bn: bool = False
    """Use SyncBatchNorm in the student, as upstream does for its traditional ResNet recipe (GPUs only)."""
    targets: Annotated[Literal["cached", "live", "none"], BeforeValidator(_one_target)] = "cached"
    """Source of the teacher's targets. cached: the cache; live: the teacher, run in the training loop; none: no
    teacher, labels only."""
    zero: Annotated[Literal[0, 1, 2, 3], BeforeValidator(read_number)] = 0
    """DeepSpeed ZeRO stage."""
    deepspeed: str | None = None
    """A DeepSpeed JSON file with additional settings. Settings that conflict with other options are rejected, except
    for the ZeRO stage, which `zero` overrides."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype of the student and the projectors; auto: bfloat16 on a GPU, float32 on a CPU."""
    compile: bool = False
    """Compile the student and projectors with torch.compile. Results match eager mode up to rounding. On an H200,
    `compile` and `channels_last` together reduced GPU time, but steps did not get faster, because they were CPU-bound
    (docs/BENCHMARKS.md)."""
    channels_last: bool = False
    """Keep convolution weights in channels-last memory format (ZeRO 0 only). See `compile` for its effect on speed."""
    cudnn_benchmark: bool = False
    """Benchmark cuDNN's algorithms for each shape and use the fastest (GPU only; speedup not measured yet)."""
    ema_decay: float = 0.0
    """Decay of the weight EMA; the EMA weights are evaluated and exported (0: off)."""
    seed: int = 0
    """Seed for initialization, sample order and regularization."""
    seeds: str | None = None
    """Multiple seeds, separated by commas. They run one after another, in folders named <run>-seed<N>; the mean and
    standard deviation are printed at the end (default: one run with `seed`)."""
    shuffle_block: int = 64
    """Number of adjacent samples read together."""
    shuffle_window: int | None = None
    """Number of blocks shuffled together (default: 64, or more if adjacent images have the same class)."""
    workers: int = 0
    """Number of loader worker processes per rank (0: load in the main process)."""
    log_every: int = 10
    """Number of steps between lines in metrics.jsonl."""
    tracker: Literal["tensorboard", "csv", "wandb", "mlflow", "trackio"] = "tensorboard"
    """Also send the metrics to this tracker; every run writes metrics.jsonl and TensorBoard events."""
    log_samples: bool = False
    """Log the sample positions in every micro-batch to one file per rank, such as samples-r00000.jsonl."""
    timeout_minutes: float = 30.0
    """Hang timeout for distributed training, in minutes. When it expires, the run stops and reports the stalled
    rank."""
    checkpoint_epochs: int = 1
    """Epochs between checkpoints (one is always written at the last step)."""
    checkpoint_steps: int = 0
    """Steps between checkpoints within an epoch (0: only at the end of epochs)."""
    keep_checkpoints: int | None = None
    """Number of checkpoints to keep (default: two during training; a finished run keeps the last one, so that it can be
    extended)."""
    eval_epochs: int = 1
    """Epochs between evaluations (the last epoch is always evaluated)."""

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "global_batch_size",
            "micro_batch_size",
            "shuffle_block",
            "log_every",
            "checkpoint_epochs",
            "eval_epochs",
        ):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "> 0")
        for name in ("views", "shuffle_window", "keep_checkpoints"):
            require(getattr(self, name) is None or getattr(self, name) > 0, f"train.{name}", getattr(self, name), "> 0")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            "train.micro_batch_size",
            self.micro_batch_size,
            f"a divisor of train.global_batch_size={self.global_batch_size}; or set --batch to a multiple of "
            f"{self.micro_batch_size}",
        )
        require(0 <= self.label_smoothing < 1, "train.label_smoothing", self.label_smoothing, "at least 0, below 1")
        smoothing_is_used = self.label_loss == "ce" or self.label_smoothing == 0
        expected = f"0 with train.label_loss={self.label_loss}"
        require(smoothing_is_used, "train.label_smoothing", self.label_smoothing, expected)
        require(0 <= self.seed < 2**63, "train.seed", self.seed, "0 to 2^63 - 1")
        listed = [one.strip() for one in (self.seeds or "0").split(",")]
        valid = all(one.isdecimal() and len(one) < 20 and int(one) < 2**63 for one in listed)
        require(valid, "train.seeds", self.seeds, "numbers from 0 to 2^63 - 1, such as 0,1,2")
        require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "at least 0, below 1")
        require_minutes("train.timeout_minutes", self.timeout_minutes)
        require(self.checkpoint_steps >= 0, "train.checkpoint_steps", self.checkpoint_steps, ">= 0")
        require(0 <= self.workers <= 256, "train.workers", self.workers, "0 to 256")


@options_class()
class DistillConfig:
    """All options for stage 2 (`distill`)."""

    recipe: str | None = None
    """Recipe name, or path to a recipe file (default: the training options stored in the cache)."""
    cache: str = "caches/demo"
    """Folder or URL (file, http, https, s3, gs, hf) of the cache. Multiple caches with the same views, separated by
    commas, train one student on all their teachers; the first cache provides pixels, labels and sample order."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    follow: bool = False
    """Train while stage 1 is still running: start when the first view group is complete, and wait for later groups
    as needed."""
    follow_timeout_minutes: float = 60.0
    """With `follow`: the run stops with an error if no new unit appears for this many minutes."""
    pixels_from: str | None = None
    """Folder or URL of the cache that stores the shared pixels (default: the path used in stage 1, relative to this
    cache)."""
    run: str | None = None
    """Run folder (default: runs/<student>, followed by -<targets> unless targets are cached)."""
    resume: bool = False
    """Resume the run in `run` with the options in its config.yaml; fail if the folder does not contain a run (default:
    start or resume)."""
    extend: bool = False
    """Extend a run: continue from its last checkpoint to a larger `train.epochs`, with all other options taken from its
    config.yaml; fail if the run folder does not contain a run. The learning rate follows the schedule for the new
    number of epochs."""
    init: str | None = None
    """Folder with initial student weights: a finished run, or a folder written by `export` or `import-upstream`
    (default: random weights). If it contains heads.safetensors, that file initializes the first cache's projectors."""
    student: StudentConfig = field(default_factory=StudentConfig)
    scalekd: ScaleKDConfig = field(default_factory=ScaleKDConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    teacher_weights: str | None = None
    """File with the teacher's weights; only for train.targets=live (default: the path used in stage 1). With multiple
    caches: one file per cache, separated by commas."""
    data: str | None = None
    """Path of the dataset, which provides the validation images and, for replayed views, the training images (default:
    the path used in stage 1)."""
    device: str = "auto"
    """auto, cpu, cuda or, for a single process, cuda:N."""

    def on_data(self, *, classes: int) -> "DistillConfig":
        """The options adapted to a dataset: all feature weights are numbers, and without labels there is no label loss.

        Args:
            classes: number of classes of the labels; 0 without labels.

        Raises:
            UserError: there are no labels and train.targets=none.
        """
        weights: dict[str, Any] = self.scalekd.feature_weights(classes)
        scalekd = replace(self.scalekd, **weights)
        if classes or self.train.label_loss == "none":
            return replace(self, scalekd=scalekd)
        if self.train.targets == "none":
            raise UserError(
                "the cache has no labels, so training needs the teacher's targets",
                got="train.targets=none",
                expected="cached or live",
                fix="set --targets cached, or make a cache of labeled images",
            )
        return replace(self, scalekd=scalekd, train=replace(self.train, label_loss="none", label_smoothing=0.0))

    def __post_init__(self) -> None:
        require_minutes("follow_timeout_minutes", self.follow_timeout_minutes)
        if self.student.grad_checkpointing and self.train.sync_bn:
            raise UserError(
                "SyncBatchNorm and activation checkpointing cannot be combined, because recomputation would "
                "exchange statistics between ranks in the backward pass",
                got="train.sync_bn=true with student.grad_checkpointing=true",
                expected="only one of them",
                fix="set --train.sync_bn=false, or --student.grad_checkpointing=false",
            )
        if self.train.label_loss == "none" and self.train.targets == "none":
            raise UserError(
                "the run has no loss: both the labels and the teacher's targets are turned off",
                got="train.label_loss=none with train.targets=none",
                fix="set --targets cached, or --train.label_loss=ce",
            )
        if self.optim.name == "lamb" and self.train.zero > 0:
            raise UserError(
                "LAMB does not work with ZeRO 1-3, because it would compute trust ratios per flat partition "
                "instead of per layer",
                got=f"optim.name=lamb with train.zero={self.train.zero}",
                expected="train.zero=0, or a different optimizer (sgd or adamw)",
                fix="set --zero 0, or --optim.name=adamw",
            )
        if self.train.channels_last and self.train.zero > 0:
            raise UserError(
                "channels-last weights need ZeRO 0, because ZeRO 1-3 store weights in flat buffers",
                got=f"train.channels_last=true with train.zero={self.train.zero}",
                fix="set --zero 0, or --train.channels_last=false",
            )
        if self.train.compile and (self.train.zero == 3 or self.student.grad_checkpointing):
            raise UserError(
                "train.compile supports neither ZeRO 3 nor activation checkpointing",
                got=f"train.compile=true with train.zero={self.train.zero} and "
                f"student.grad_checkpointing={str(self.student.grad_checkpointing).lower()}",
                fix="set --train.compile=false",
            )
        if self.train.ema_decay > 0 and self.train.zero == 3:
            raise UserError(
                "EMA needs the full weights at every step, but ZeRO 3 partitions them",
                got=f"train.ema_decay={self.train.ema_decay} with train.zero=3",
                expected="ema_decay=0, or ZeRO 0 to 2",
                fix="set --zero 2, or --train.ema_decay=0",
            )


def teacher_files(text: str | None, caches: int) -> list[str | None]:
    """The files in `teacher_weights`, one per cache; None means the file used in stage 1.

    Raises:
        UserError: the number of files differs from the number of caches.
    """
    given = [text] if caches == 1 else (text or "," * (caches - 1)).split(",")
    if len(given) != caches:
        raise UserError(
            "--teacher-weights needs one entry per cache",
            got=f"{counted(len(given), 'entry', 'entries')} for {counted(caches, 'cache')}",
            fix="specify one file per cache, separated by commas; an empty entry means the file used in stage 1",
        )
    return [expand_home(file) or None for file in given]
