"""Fine-tune a backbone with a new classifier on labeled images.

Starts from a run, an exported student or a timm model, and exports the result for timm. Its model.safetensors can be
used with `cache-teacher --teacher-weights`.
"""

from typing import Any

from pipelines.command import WORKERS, Command, Given, JsonOutput, run
from scalekd_cache.api import with_workers
from scalekd_cache.config.downstream import FinetuneConfig
from scalekd_cache.config.options import take


def main(given: Given) -> None:
    """Train, export the model and print its accuracy."""
    output = take(given, JsonOutput)
    config = with_workers(FinetuneConfig, given)
    from scalekd_cache.devices import choose_device
    from scalekd_cache.training.finetune import finetune

    facts: dict[str, Any] = {}
    with output.printed(facts):
        facts |= finetune(config, choose_device(config.device))


COMMAND = Command("finetune", main, [FinetuneConfig, JsonOutput], __doc__, defaults={"workers": WORKERS})

if __name__ == "__main__":
    run(COMMAND)
