"""The study's plan as data: settings, caches, arms, questions and the resulting runs.

In: the name of a suite. Out: `Run`s, most important first. Invariant: every run has one key, and the same key always
means the same commands. Questions share runs, so nothing is trained twice.

An arm defines what varies. Everything else (views, order, initialization, steps, learning rate) depends only on setting
and seed, so two arms of one question are paired by (student, seed).
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple


class OwnTeacher(NamedTuple):
    """The demo teacher with one change."""

    epochs: int = 30
    """Training epochs."""
    name: str = "demo_swin"
    """timm name of the model (`demo_teachers.py`)."""


class CacheSpec(NamedTuple):
    """Stage-1 options of a cache, in addition to the setting's."""

    options: tuple[str, ...] = ()
    """dotted.key=value"""
    own_pixels: bool = False
    """Sample and store its own views. False: share the pixels of the default cache, so the views are identical."""
    dither: bool = True
    """Dither the transform codec. False: round to nearest, in writing and reading."""
    teacher: OwnTeacher | None = None
    """None: the setting's teacher."""


CACHES: dict[str, CacheSpec] = {
    "default": CacheSpec(own_pixels=True),
    "float16": CacheSpec(("cache.codec=float16",)),
    "int4": CacheSpec(("cache.codec=int4",)),
    "transform": CacheSpec(("cache.codec=transform",)),
    "economy": CacheSpec(("cache.codec=transform-economy",)),
    **{
        f"{bits}-bit-{kind}": CacheSpec(
            ("cache.codec=auto", f"cache.codec_target=bits:{bits}"), dither=kind == "dithered"
        )
        for bits in (4, 3, 2)
        for kind in ("dithered", "rounded")
    },
    "lossless-pixels": CacheSpec(("views.pixel_format=png",), own_pixels=True),
    "jpeg-75": CacheSpec(("views.jpeg_quality=75",), own_pixels=True),
    **{f"teacher-{epochs}-epochs": CacheSpec(teacher=OwnTeacher(epochs)) for epochs in (2, 8)},
    "teacher-narrow": CacheSpec(teacher=OwnTeacher(name="study_swin_16")),
    "teacher-wide": CacheSpec(teacher=OwnTeacher(name="study_swin_64")),
    "top-k": CacheSpec(("cache.logits=top_k", "cache.top_k=3")),
}
"""`bits:` is a target in bits per value of the teacher's map; `resolve_options` finds the noise that reaches it."""


class Arm(NamedTuple):
    """One variant of training."""

    targets: Literal["cached", "live", "none"] = "cached"
    cache: str = "default"
    views: int | None = None
    """Views V (None: one per epoch)."""
    options: tuple[str, ...] = ()
    """Stage-2 options, dotted.key=value."""
    norms: Literal["stored", "decoded"] = "stored"
    """Norms that the losses divide targets by; `decoded` is the ablation: the norms of the decoded map."""
    length: float = 1.0
    """Epochs as a multiple of the setting's."""
    heads_every: int = 1
    """Ablation: the heads see one of this many micro-batches of a step, and feature weights grow by as much."""


ARMS: dict[str, Arm] = {
    "baseline": Arm(targets="none"),
    "live": Arm(targets="live"),
    "cached": Arm(),
    **{f"V={views}": Arm(views=views) for views in (1, 2, 4, 8, 16)},
    **{name: Arm(cache=name) for name in CACHES if name != "default"},
    "economy-own-norms": Arm(cache="economy", norms="decoded"),
    "logits-only": Arm(options=("scalekd.s3=false", "scalekd.s4=false")),
    "linear-projector": Arm(
        options=("scalekd.projector=linear-tpp", "scalekd.tpp=false", "scalekd.frequency=false", "scalekd.s3=false")
    ),
    "CAP": Arm(options=("scalekd.tpp=false", "scalekd.frequency=false")),
    "CAP+DFM": Arm(options=("scalekd.tpp=false",)),
    "lite": Arm(options=("scalekd.projector=lite",)),
    "no-logits": Arm(options=("scalekd.logit_weight=0",)),
}


class Question(NamedTuple):
    """Arms to compare with one baseline."""

    name: str
    against: str
    arms: tuple[str, ...]
    seeds: int
    students: tuple[str, ...] = ()
    """timm models (empty: the setting's student)."""


class Setting(NamedTuple):
    """Data, teacher, recipe and questions."""

    name: str
    recipe: str
    epochs: int
    student: str
    """Student for questions that name none."""
    questions: tuple[Question, ...]
    stage1: tuple[str, ...] = ()
    """dotted.key=value for every cache."""
    stage2: tuple[str, ...] = ()
    """dotted.key=value for every run."""
    arms: Mapping[str, Arm] = ARMS
    """Arms by name."""
    views: int | None = None
    """Views of every cache (None: one per epoch)."""
    given: bool = True
    """The user provides data and teacher. False: the demo's."""
    held_out: int = 512
    """Held-out images on which losses against the live teacher are measured (0: not measured)."""

    def epochs_of(self, arm: str) -> int:
        """Epochs of an arm."""
        return round(self.epochs * self.arms[arm].length)


def _bits(*bits: int, seeds: int = 3) -> tuple[Question, ...]:
    return tuple(Question(f"dither, {n} bits", f"{n}-bit-rounded", (f"{n}-bit-dithered",), seeds) for n in bits)


DEMO_STUDENTS = ("test_resnet", "test_vit", "lcnet_050")
CIFAR_STUDENTS = ("resnet18", "mobilenetv1", "vit_small", "resnet50")
DEMO = Setting(
    name="demo",
    recipe="demo",
    epochs=8,
    student="test_resnet",
    stage1=("data.max_samples=360", "cache.views_per_group=8"),
    stage2=("train.global_batch_size=16", "train.micro_batch_size=16", "optim.lr=2e-3"),
    given=False,
    questions=(
        Question("cached against live", "live", ("cached", "baseline"), 12),
        Question("reuse", "live", ("cached",), 1, DEMO_STUDENTS),
        Question("one view", "cached", ("V=1",), 3),
        Question("heads", "cached", ("lite",), 3),
        Question("economy", "cached", ("economy",), 3),
        *_bits(2, 3, 4),
        Question("teacher training", "cached", ("teacher-2-epochs", "teacher-8-epochs"), 3),
        Question("teacher size", "cached", ("teacher-narrow", "teacher-wide"), 3),
        Question("more views", "cached", ("V=2", "V=4"), 3),
        Question("components", "cached", ("logits-only", "linear-projector", "CAP", "CAP+DFM", "no-logits"), 3),
        Question("codecs", "cached", ("transform", "int4"), 3),
        Question("norms", "economy", ("economy-own-norms",), 3),
        Question("pixels", "cached", ("lossless-pixels", "jpeg-75"), 3),
        Question("logits", "cached", ("top-k",), 3),
        Question("smallest codec", "live", ("economy", "transform"), 12),
    ),
)
DEMO_SHORT = DEMO._replace(
    questions=(
        Question("cached against live", "live", ("cached",), 5),
        Question("baseline", "live", ("baseline",), 3),
        Question("smallest codec", "live", ("economy",), 5),
        Question("reuse", "live", ("cached",), 1, DEMO_STUDENTS),
        Question("one view", "cached", ("V=1",), 2),
    )
)
CIFAR_SMALL = Setting(
    name="cifar10-small",
    recipe="cifar10-small",
    epochs=4,
    student="test_resnet",
    stage1=("data.max_samples=500",),
    stage2=("train.global_batch_size=16", "train.micro_batch_size=16", "optim.lr=2e-3"),
    held_out=256,
    questions=(
        Question("cached against live", "live", ("cached", "baseline"), 3),
        Question("heads", "cached", ("lite",), 3),
        Question("views", "cached", ("V=1",), 3),
        *_bits(2, 3, 4),
        Question("economy", "cached", ("economy",), 3),
    ),
)
CIFAR = Setting(
    name="cifar10",
    recipe="cifar10",
    epochs=16,
    student="resnet18",
    held_out=2048,
    questions=(
        Question("cached against live", "live", ("cached", "baseline"), 5, CIFAR_STUDENTS),
        Question("views", "cached", ("V=1", "V=2", "V=4", "V=8"), 5),
        Question("heads", "cached", ("lite",), 5, CIFAR_STUDENTS[:2]),
        Question("codecs", "live", ("transform", "economy", "int4", "float16"), 5),
        *_bits(2, 3, 4, seeds=5),
        Question("norms", "economy", ("economy-own-norms",), 5),
        Question("components", "cached", ("logits-only", "linear-projector", "CAP", "CAP+DFM", "no-logits"), 5),
        Question("pixels", "cached", ("lossless-pixels", "jpeg-75"), 5),
        Question("logits", "cached", ("top-k",), 5),
        Question("reuse", "live", ("cached",), 1, CIFAR_STUDENTS[:3]),
    ),
)
SUITES: dict[str, tuple[Setting, ...]] = {
    "cpu": (DEMO_SHORT,),
    "cpu-long": (DEMO, CIFAR_SMALL),
    "full": (DEMO, CIFAR),
}
"""Runs that two suites share are trained once."""


class Run(NamedTuple):
    """One training run."""

    setting: str
    student: str
    arm: str
    seed: int

    @property
    def key(self) -> str:
        """Name of the run in result files and of its folder."""
        return f"{self.setting}/{self.student}/{self.arm}/seed{self.seed}"


def canonical(arm: str, epochs: int) -> str:
    """The canonical name of an arm: V = epochs is the arm `cached`."""
    return "cached" if arm == f"V={epochs}" else arm


def runs_of(setting: Setting) -> list[Run]:
    """All runs, most important first: by question, then by seed, then by arm."""
    ordered: dict[Run, None] = {}
    for question in setting.questions:
        arms = [canonical(arm, setting.epochs) for arm in (question.against, *question.arms)]
        for seed in range(question.seeds):
            for student in question.students or (setting.student,):
                ordered.update(dict.fromkeys(Run(setting.name, student, arm, seed) for arm in arms))
    return list(ordered)
