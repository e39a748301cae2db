"""FLOPs and parameters of a teacher, a student and the ScaleKD heads (`make costs [TEACHER=] [STUDENT=] [ALL=1]`)."""

from dataclasses import dataclass, field

from pipelines.command import parse, run
from scalekd_cache.config.stage2 import ScaleKDConfig

INTRODUCTION = """# What each part costs

Written by `make costs ALL=1 > docs/COSTS.md`; nothing here is typed by hand. Counted with PyTorch's FLOP counter on
the meta device, per 224 px image in a batch of 32; a multiply and an add are two FLOPs; matrix products, convolutions
and attention are counted, element-wise work is not. The gradients of a convolution count as its forward pass each
(PyTorch's own count ignores groups there). Heads are both taps, both views and the passes through the frozen tail.
"Offline over online, at most" is (student + heads + teacher forward) / (student + heads): what a step gains when the
teacher is not run in it, if FLOPs were all that counts. The paper's BEiT-L/14 is timm's eva_large_patch14_196 at
224 px; its Mixer-B/14 has no timm name, Mixer-B/16 stands for it.
"""


@dataclass(frozen=True, kw_only=True)
class CostsConfig:
    """Options of `costs`."""

    teacher: str = "swin_large_patch4_window7_224"
    """A timm model name."""
    student: str = "resnet50"
    """A timm model name or a short name."""
    image_size: int = 224
    """Side of the images, pixels."""
    all: bool = False
    """The whole table, for every pair of the paper, as a Markdown page."""
    scalekd: ScaleKDConfig = field(default_factory=ScaleKDConfig)


def main(argv: list[str]) -> None:
    """Count and print."""
    config = parse(CostsConfig, "costs", argv, {}, __doc__ or "")
    from scalekd_cache.planning.costs import PAPER_PAIRS, SUMMARY_HEAD, pair_costs, report, summary_row

    if not config.all:
        print(report(pair_costs(config.teacher, config.student, config.scalekd, config.image_size)))
        return
    print(INTRODUCTION)
    pairs = [pair_costs(teacher, student, config.scalekd) for teacher, student in PAPER_PAIRS]
    print(SUMMARY_HEAD)
    print("\n".join(summary_row(costs) for costs in pairs))
    for costs in pairs:
        print(f"\n## {report(costs)}")


if __name__ == "__main__":
    run(main)
