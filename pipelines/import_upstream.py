"""Bring a published ScaleKD checkpoint to timm (`make import-upstream CKPT=file.pth OUT=dir`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.command import parse, run


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Options of `import_upstream`."""

    ckpt: str
    """A .pth file of upstream's distiller, or a student that its transfer script wrote."""
    out: str
    """Folder to write: student/ for timm, and heads.safetensors."""
    student: str | None = None
    """Short name or timm name of the student in it (None: the paper's student that it fits)."""
    classes: int | None = None
    """Classes of its head (None: those of the checkpoint)."""
    image_size: int | None = None
    """Side of its images, pixels (None: timm's for this name)."""
    s4_query: Literal["s3", "learned"] = "s3"
    """learned takes S4's own queries; upstream's distiller does not use them when it has S3's projectors."""


def main(argv: list[str]) -> None:
    """Import a checkpoint and say what was taken and what was left."""
    config = parse(ImportConfig, "import_upstream", argv, {}, __doc__ or "")
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
        f"{report.student}: {report.student_name} ({report.family}), {report.student_tensors} tensors, "
        f"{report.num_classes} classes; timm.create_model('local-dir:{report.student}', pretrained=True); "
        f"largest logit difference {report.logit_difference:.2g}"
    )
    if report.heads is None:
        print("no projectors in this checkpoint")
    else:
        print(f"{report.heads}: {report.head_tensors} tensors of the projectors, S4's query: {report.s4_query}")
    print(f"left in the checkpoint: {', '.join(summary(report.left_out)) or 'nothing'}")


if __name__ == "__main__":
    run(main)
