"""Convert a published ScaleKD checkpoint to timm."""

from pathlib import Path
from typing import Literal

from pipelines.command import Command, Given, run
from scalekd_cache.config.options import build, options_class
from scalekd_cache.errors import counted


@options_class()
class ImportConfig:
    """Options of `import_upstream`."""

    ckpt: str
    """A .pth file: a checkpoint from the published distiller, or a student written by its transfer script."""
    out: str
    """Output folder for student/, which timm can load, and heads.safetensors."""
    student: str | None = None
    """The student's short name or timm name (default: the student from the paper that matches the checkpoint)."""
    classes: int | None = None
    """Number of classes (default: read from the checkpoint)."""
    image_size: int | None = None
    """Image size in pixels (default: timm's default for this model)."""
    s4_query: Literal["s3", "learned"] = "s3"
    """learned: import the learned S4 queries, which the published distiller does not use if S3 has projectors."""


def main(given: Given) -> None:
    """Import a checkpoint and print what was imported and what was not."""
    config = build(ImportConfig, given)
    from scalekd_cache.convert.upstream_checkpoint import import_checkpoint, summary

    report = import_checkpoint(
        Path(config.ckpt),
        Path(config.out),
        config.student,
        num_classes=config.classes,
        image_size=config.image_size,
        s4_query=config.s4_query,
    )
    print(
        f"{report.student}: {report.student_name} ({report.family}), {counted(report.student_tensors, 'tensor')}, "
        f"{counted(report.num_classes, 'class')}; timm.create_model('local-dir:{report.student}', pretrained=True); "
        f"largest logit difference after reloading: {report.logit_difference:.2g}"
    )
    if report.heads is None:
        print("this checkpoint has no projectors")
    else:
        print(f"{report.heads}: {counted(report.head_tensors, 'projector tensor')}, S4 query: {report.s4_query}")
    print(f"not imported: {', '.join(summary(report.left_out)) or 'nothing'}")


COMMAND = Command("import-upstream", main, [ImportConfig], __doc__)

if __name__ == "__main__":
    run(COMMAND)
