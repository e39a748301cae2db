"""Simulates runs of 1 to 1,024 processes: curves, tables and a comparison with measured runs.

In: options, and with --check a cache and runs made here. Out: `benchmarks/results/`.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, argument_parser, pyplot, write_results
from benchmarks.scaling.simulate import (
    DRAWS,
    RANKS,
    Cluster,
    cache_job,
    imagenet_cache,
    imagenet_train,
    sweep,
    train_job,
)


def curves() -> dict[str, dict[str, Any]]:
    """The simulated rows of every curve."""
    cache, train, result = imagenet_cache(), imagenet_train(), {}
    for name, storage in (("5 GB/s", 5e9), ("20 GB/s", 20e9), ("100 GB/s", 100e9), ("unlimited", 1e15)):
        result[f"stage 1, storage {name}"] = (cache_job, cache, Cluster(storage=storage), RANKS)
    large = replace(cache, units=11 * cache.units)  # 14 million images, the size of ImageNet-21k
    result["stage 1, 11 times ImageNet, storage 100 GB/s"] = (cache_job, large, Cluster(storage=100e9), RANKS)
    for hours in (100.0, 10.0, 1.0):
        cluster = Cluster(storage=100e9, node_mtbf_h=hours)
        result[f"stage 1, 11 times ImageNet, 100 GB/s, node MTBF {hours:g} h"] = (
            cache_job, large, cluster, RANKS,
        )  # fmt: skip
    up_to = [count for count in RANKS if count <= train.micros]
    for name, link in (("25 GB/s", 25e9), ("100 GB/s", 100e9), ("400 GB/s", 400e9)):
        result[f"stage 2, global batch 2048, link {name}"] = (train_job, train, Cluster(link=link), up_to)
    for hours, every in ((5000.0, 500), (100.0, 500), (10.0, 500), (10.0, 50)):
        job = replace(imagenet_train(micros=1024), save_every=every)
        cluster = Cluster(link=100e9, storage=1e12, node_mtbf_h=hours)
        result[f"stage 2, global batch 65,536, 100 GB/s, node MTBF {hours:g} h, checkpoint every {every} steps"] = (
            train_job,
            job,
            cluster,
            RANKS,
        )
    return {
        name: {"job": asdict(job), "cluster": asdict(cluster), "rows": sweep(simulate, job, cluster, ranks)}
        for name, (simulate, job, cluster, ranks) in result.items()
    }


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot efficiency and lost work of both stages over the number of processes."""
    plt = pyplot()

    figure, axes = plt.subplots(2, 2, figsize=(13, 9))
    panels = (
        (axes[0, 0], "useful", "stage 1, ", "useful time / total time", lambda name: "MTBF" not in name),
        (axes[0, 1], "lost", "stage 1, ", "discarded time / total time", lambda name: "MTBF" in name),
        (axes[1, 0], "useful", "stage 2, ", "useful time / total time", lambda name: True),
        (axes[1, 1], "lost", "stage 2, ", "discarded time / total time", lambda name: "MTBF" in name),
    )
    for axis, field, stage, label, chosen in panels:
        for number, (name, curve) in enumerate(
            item for item in found.items() if item[0].startswith(stage) and chosen(item[0])
        ):
            rows = curve["rows"]
            axis.plot([row["ranks"] for row in rows], [row[field] for row in rows], "o-" if number < 5 else "s--",
                      markersize=3.5, label=name.removeprefix(stage))  # fmt: skip
        axis.set(xscale="log", xlabel="processes", ylabel=label, title=stage.strip(", "), ylim=(0, None))
        axis.set_xticks(RANKS, [str(count) for count in RANKS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7.5)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Simulate, check, write, print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="measure the demo on one and two processes")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    file = RESULTS / "scale-model.json"
    check = json.loads(file.read_text())["check"] if file.exists() else None
    if options.check:
        from benchmarks.scaling.measure import measure

        check = measure(options.repeats)
    found = curves()
    content = {
        "draws": DRAWS,
        "check": check,
        "curves": found,
    }
    write_results("scale-model", content, allow_nan=True)  # a cluster without failures: Infinity
    plot(found, RESULTS / "scale-model.png")
    for name, curve in found.items():
        print(name, " ".join(f"{row['ranks']}: {row['useful']:.2f}/{row['lost']:.3f}" for row in curve["rows"]))
    for row in (check or {}).get("rows", ()):
        print(row)
