"""Measure a backbone's k-NN and linear-probe accuracy on labeled images.

The baselines are the same architecture with random weights, and the raw pixels of downscaled images.
"""

from typing import Any

from pipelines.command import WORKERS, Command, Given, JsonOutput, run
from scalekd_cache.api import with_workers
from scalekd_cache.config.downstream import ProbeConfig
from scalekd_cache.config.options import take


def main(given: Given) -> None:
    """Print the accuracies of the backbone and the baselines."""
    output = take(given, JsonOutput)
    config = with_workers(ProbeConfig, given)
    from scalekd_cache.devices import choose_device
    from scalekd_cache.training.probe import probe, probe_table

    facts: dict[str, Any] = {}
    with output.printed(facts):
        facts |= probe(config, choose_device(config.device))
        print(probe_table(facts))


COMMAND = Command("probe", main, [ProbeConfig, JsonOutput], __doc__, defaults={"workers": WORKERS})

if __name__ == "__main__":
    run(COMMAND)
