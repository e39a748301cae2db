"""Write the student of a run as plain timm loads it (`make export RUN=dir`)."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.command import parse, run


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of `export`."""

    run: str
    """Folder of a run with a checkpoint."""
    out: str | None = None
    """Folder to write (None: <run>/export)."""


def main(argv: list[str]) -> None:
    """Export the last checkpoint's student and say what was checked."""
    config = parse(ExportConfig, "export", argv, {}, __doc__ or "")
    from scalekd_cache.finished import export_run

    folder, difference = export_run(Path(config.run), Path(config.out) if config.out else None)
    print(
        f"{folder}: timm.create_model('local-dir:{folder}', pretrained=True); largest logit difference {difference:.2g}"
    )


if __name__ == "__main__":
    run(main)
