"""Measure the accuracy of a run's student or of an exported student."""

import json
from pathlib import Path

from pipelines.command import WORKERS, Command, Given, run
from scalekd_cache.config.machine import default_workers
from scalekd_cache.config.options import build, options_class
from scalekd_cache.errors import UserError, counted


@options_class()
class EvaluateConfig:
    """Options of `evaluate`."""

    run: str
    """Folder of a finished run, or of an exported or imported student (which also needs `data`)."""
    data: str | None = None
    """Dataset with the validation images (default: the dataset used in stage 1; required for an exported student)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 0
    """Number of worker processes that decode images (0: decode in the main process)."""
    json: bool = False
    """Print one JSON object instead of text."""


def main(given: Given) -> None:
    """Evaluate the student and print its accuracy."""
    config = build(EvaluateConfig, {"workers": default_workers()}, given)
    from scalekd_cache.convert.backbone import find_exported_folder
    from scalekd_cache.distributed import this_process
    from scalekd_cache.training.run_evaluation import evaluate_folder, evaluate_run

    process, folder = this_process(config.device), find_exported_folder(Path(config.run))
    if folder is not None:
        tally = evaluate_folder(folder, config.data, process, config.workers)
    else:
        tally = evaluate_run(Path(config.run), config.data, process, config.workers)
    if tally.images == 0:
        raise UserError(
            "none of the validation images could be read",
            where=config.data or config.run,
            fix="check the dataset's image files",
        )
    if config.json:
        facts = {"run": config.run, "top1": tally.top1_percent, "top5": tally.top5_percent}
        print(json.dumps({**facts, "images": tally.images, "unreadable": tally.unreadable}))
        return
    omitted = f" ({tally.unreadable:,} more could not be read)" if tally.unreadable else ""
    print(f"{config.run}: {tally.accuracies} of {counted(tally.images, 'image')}{omitted}")


COMMAND = Command("evaluate", main, [EvaluateConfig], __doc__, defaults={"workers": WORKERS})

if __name__ == "__main__":
    run(COMMAND)
