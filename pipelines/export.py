"""Export the student of a run to a standard format (`make export RUN=dir [FORMAT=timm|safetensors|onnx|...]`)."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.command import parse, run


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of `export`."""

    run: str
    """Folder of a run with a checkpoint."""
    out: str | None = None
    """Folder (timm) or file to write (None: inside the run folder)."""
    format: str = "timm"
    """timm: a folder with a model card; safetensors: the state dict; onnx; torch-export: a .pt2 program; torchvision or
    mmpretrain: the state dict with that library's parameter names (docs/METHOD.md lists the architectures)."""


def main(argv: list[str]) -> None:
    """Export the student of the last checkpoint and print what was checked."""
    config = parse(ExportConfig, "export", argv, {}, __doc__ or "")
    from scalekd_cache.training.run_export import export_run

    path, difference = export_run(Path(config.run), Path(config.out) if config.out else None, config.format)
    how = f"timm.create_model('local-dir:{path}', pretrained=True)" if config.format == "timm" else config.format
    checked = (
        f"renamed for {config.format} (not installed, so not loaded); the logits match the plain architecture"
        if difference is None
        else f"largest logit difference {difference:.2g}"
    )
    print(f"{path}: {how}; {checked}")


if __name__ == "__main__":
    run(main)
