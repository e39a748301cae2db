"""The plan of the price list as data, in the terms of the study's plan (`benchmarks/study/plan.py`).

In: the name of a setting. Out: its arms and questions. Invariant: an arm's name says its heads and its share; arms of
one question have the same seeds, so they are paired.
"""

from benchmarks.study.plan import Arm, Question, Setting


def heads(projector: str = "cap", share: float = 1.0, length: float = 1.0, *options: str) -> Arm:
    """An arm with some heads, a feature share, and a multiple of the setting's epochs."""
    named = (f"scalekd.projector={projector}", f"scalekd.feature_share={share:g}", *options)
    return Arm(options=named, length=length)


SHARES = (1.0, 0.5, 0.25, 0.125)
LAYER_NORM = "scalekd.cap_norm=layer"
MICRO_32 = "train.micro_batch_size=32"
EQUAL_COST = {"cap-0.25": 1.5, "lite": 1.75, "linear": 2.5}
"""Epochs, as a multiple, at about the cost of `cap-1` (demo: 1.46, 1.72, 2.50 in `demo-steps.json`)."""


def arms(equal_cost: dict[str, float]) -> dict[str, Arm]:
    """All arms, with the lengths of those of equal cost."""
    cheaper = {
        **{f"cap-{share:g}": heads(share=share) for share in SHARES},
        "lite": heads("lite"),
        "lite-0.25": heads("lite", 0.25),
        "linear": heads("linear"),
        "logits-only": Arm(options=("scalekd.s3=false", "scalekd.s4=false")),
    }
    return {
        **{
            "baseline" + ("" if times == 1 else f"-{times}x"): Arm(targets="none", length=times)
            for times in (1, 2, 3, 4, 7)
        },
        **cheaper,
        **{
            f"{name}-{times}x": cheaper["cap-1" if name == "cap" else name]._replace(length=times)
            for name in ("cap", "lite", "linear", "logits-only")
            for times in (2, 3, 4)
        },
        **{f"{name}-equal-cost": cheaper[name]._replace(length=times) for name, times in equal_cost.items()},
        "cap-1-of-4-micro-batches": heads()._replace(heads_every=4),
        "cap-1-layer-norm": heads("cap", 1.0, 1.0, LAYER_NORM),
        "cap-0.25-layer-norm": heads("cap", 0.25, 1.0, LAYER_NORM),
        "cap-1-micro-32": heads("cap", 1.0, 1.0, MICRO_32),
        "cap-0.25-micro-32": heads("cap", 0.25, 1.0, MICRO_32),
    }


FIRST = ("baseline", "cap-0.25", "lite", "linear", "cap-0.25-equal-cost")
LONGER = ("baseline-3x", "baseline-2x", "baseline-4x", "linear-equal-cost", "lite-equal-cost")
REST = ("cap-0.5", "cap-0.125", "lite-0.25", "logits-only")


def questions(seeds: int) -> tuple[Question, ...]:
    """The price list, most important arms first."""
    longer = tuple(f"{name}-equal-cost" for name in EQUAL_COST)
    return (
        Question("price", "cap-1", FIRST, seeds),
        Question("more epochs", "cap-1", LONGER, seeds),
        Question("equal cost", "baseline-3x", longer, seeds),
        Question("rest of the list", "cap-1", REST, seeds),
    )


DEMO = Setting(
    name="demo",
    recipe="demo",
    epochs=8,
    student="test_resnet",
    views=32,
    stage1=("data.max_samples=360", "cache.views_per_group=8"),
    stage2=("train.global_batch_size=16", "train.micro_batch_size=16", "optim.lr=2e-3"),
    given=False,
    arms=arms(EQUAL_COST),
    questions=questions(8),
)
"""176 steps of one micro-batch of 16."""
DEMO_LONG = DEMO._replace(
    name="demo-long",
    epochs=24,
    views=96,
    stage2=("train.global_batch_size=32", "train.micro_batch_size=32", "optim.lr=2e-3"),
    questions=(
        Question("price", "cap-1", FIRST, 4),
        Question("the second trial", "cap-1", ("baseline", "cap-0.25", "cap-0.25-equal-cost"), 8),
        Question("baseline at equal cost", "cap-0.25-equal-cost", ("baseline-3x",), 4),
        *questions(4)[1:],
    ),
)
"""264 steps of one micro-batch of 32."""
DEMO_MICRO = DEMO._replace(
    name="demo-micro",
    epochs=12,
    views=12,
    stage1=("data.max_samples=360", "cache.views_per_group=4"),
    stage2=("train.global_batch_size=32", "train.micro_batch_size=8", "optim.lr=2e-3"),
    questions=(
        Question("the two ways", "cap-0.25", ("cap-1-of-4-micro-batches",), 8),
        Question("share 1", "cap-1", ("cap-0.25", "cap-1-of-4-micro-batches"), 8),
        Question("baseline", "cap-1", ("baseline",), 8),
        Question("groups of 8", "cap-1-micro-32", ("cap-0.25-micro-32",), 8),
        Question("layer norm", "cap-1-layer-norm", ("cap-0.25-layer-norm",), 8),
    ),
)
"""132 steps of four micro-batches of 8: which samples should have features?"""
CIFAR_EQUAL_COST = {"cap-0.25": 7 / 3, "lite": 2.0, "linear": 20 / 3}
"""`cap-1` costs 7.09 baseline steps (`cifar10-steps.json`): the tail pads 2 x 2 maps to windows of 7 x 7."""
CIFAR = Setting(
    name="cifar10",
    recipe="cifar10-small",
    epochs=3,
    student="test_resnet",
    views=8,
    stage1=("data.max_samples=2000", "cache.views_per_group=8"),
    stage2=("train.global_batch_size=32", "train.micro_batch_size=32", "optim.lr=2e-3"),
    arms=arms(CIFAR_EQUAL_COST),
    questions=(
        Question("cheapest heads", "baseline", ("linear", "baseline-3x"), 4),
        Question("published heads", "cap-1", ("baseline", "linear", "baseline-3x"), 4),
        Question("linear heads, longer", "baseline-3x", ("linear-3x",), 4),
        Question("cheaper heads", "cap-1", ("cap-0.25", "lite", "cap-0.25-equal-cost"), 4),
        Question("equal cost", "baseline-7x", ("cap-1", "cap-0.25-equal-cost", "linear-equal-cost"), 4),
        Question("rest of the list", "cap-1", ("baseline-2x", "lite-equal-cost", *REST), 4),
    ),
)
"""186 steps of one micro-batch of 32. --data, --teacher-weights: as for the study (docs/STUDY.md). Runs of more than 8
epochs repeat views."""
FASHION = CIFAR._replace(name="fashion-mnist")
"""--data, --teacher-weights: an image folder of Fashion-MNIST and TinyViT fine-tuned on it."""
GPU = Setting(
    name="cifar10-gpu",
    recipe="cifar10",
    epochs=6,
    student="resnet18",
    views=12,
    stage2=("train.workers=3",),
    arms=arms(EQUAL_COST),
    questions=(
        Question("equal epochs", "baseline", ("linear", "lite", "cap-1", "logits-only"), 4),
        Question("twice the epochs", "baseline-2x", ("linear-2x", "logits-only-2x", "lite-2x", "cap-1"), 4),
        Question("more epochs", "baseline-4x", ("linear-4x", "cap-2x", "linear-2x"), 4),
        Question("share 1/4", "cap-1", ("cap-0.25",), 4),
    ),
)
"""One GPU, 10,000 images at 128 px: 468 steps of 128. Runs of more than 12 epochs repeat views."""
FEW = CIFAR._replace(
    name="cifar10-few",
    epochs=16,
    views=16,
    stage1=("data.max_samples=500", "cache.views_per_group=8"),
    arms=arms({"lite": 15 / 7, "linear": 20 / 3, "logits-only": 7}),
    questions=(
        Question("equal cost", "baseline-7x", ("cap-1", "linear-equal-cost", "logits-only-equal-cost"), 4),
        Question("equal epochs", "baseline", ("cap-1", "linear", "logits-only"), 4),
        Question("lite heads", "baseline-7x", ("lite-equal-cost",), 4),
        Question("less cost", "baseline-3x", ("linear-3x",), 4),
    ),
    held_out=0,
)
"""CIFAR-10 with 50 images of each class, 15 steps per epoch: what is distillation worth if there are few images? Runs
of more than 16 epochs repeat views."""
SETTINGS = {setting.name: setting for setting in (DEMO, DEMO_LONG, DEMO_MICRO, CIFAR, FASHION, GPU, FEW)}
