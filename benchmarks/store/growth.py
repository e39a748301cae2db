"""How do opening, starting and verifying a cache scale from 10^4 to 10^8 records?

    python -m benchmarks.store.growth [--records 4 6 8]

Uses synthetic caches with real manifests and sidecars, and sparse shard files of the right length. One unit holds 512
images and 8 views. Each size runs in a separate process, which reports times and peak memory.
"""

import argparse
import hashlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Measurement, argument_parser, publish_table, run_python

IMAGES_PER_UNIT, VIEWS = 512, 8
SHARD_BYTES = 97_000 * IMAGES_PER_UNIT
ZEROS = "0" * 64


def make_cache(root: Path, records: int) -> None:
    """Write sidecars and a manifest for `records` views, with sparse shard files of the right length."""
    sys.path.append(str(ROOT / "tests" / "support"))
    from cache_facts import FINGERPRINT, cache_facts

    from scalekd_cache.store.base import FORMAT_VERSION
    from scalekd_cache.store.durable_files import FileHash
    from scalekd_cache.store.manifest import Manifest, UnitRow, units_digest, write_manifest
    from scalekd_cache.store.sidecar import UnitInfo, sidecar_text, unit_folder

    images = max(1, records // VIEWS)
    rows, index_bytes = [], 48 + 40 * IMAGES_PER_UNIT
    for number, start in enumerate(range(0, images, IMAGES_PER_UNIT)):
        count = min(IMAGES_PER_UNIT, images - start)
        keys = "".join(f"n{number % 1000:08d}/ILSVRC2012_{start + row:08d}\n" for row in range(count))
        files = {"keys.txt": FileHash(len(keys), hashlib.sha256(keys.encode()).hexdigest())}
        for view in range(VIEWS):
            files |= {
                f"v{view:04d}.tar": FileHash(SHARD_BYTES, ZEROS),
                f"v{view:04d}.idx": FileHash(index_bytes, ZEROS),
            }
        info = UnitInfo(
            format=FORMAT_VERSION, fingerprint=FINGERPRINT, backend="webdataset", group=0, range_id=number, start=start,
            stop=start + count, views=list(range(VIEWS)), count=count, skipped=[], files=files,
            payload_bytes={"pixels": 0, "features": 0, "target": 0}, fidelity={}, versions={},
        )  # fmt: skip
        folder, text = unit_folder(root, 0, number), sidecar_text(info).encode()
        folder.mkdir(parents=True)
        (folder / "unit.json").write_bytes(text)
        (folder / "keys.txt").write_text(keys)
        for name, fact in files.items():
            if name != "keys.txt":
                with (folder / name).open("wb") as file:
                    file.truncate(fact.bytes)
        rows.append(UnitRow(0, number, count, hashlib.sha256(text).hexdigest()))
    facts = cache_facts(backend="webdataset", samples_per_shard=IMAGES_PER_UNIT, groups=[list(range(VIEWS))])
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        facts=facts,
        num_samples=images,
        num_views=VIEWS,
        units=rows,
        units_digest=units_digest(rows),
        fidelity={},
        bytes_per_view=dict.fromkeys(("pixels", "features", "target", "index", "total"), 0.0),
    )
    write_manifest(root, manifest)


def use_cache(root: Path, verify: bool) -> dict[str, float]:
    """Time what a training process does before its first batch, then the fast check."""
    from scalekd_cache.loader.order import Order, micro_batch_ids
    from scalekd_cache.store.reader import Cache
    from scalekd_cache.store.verify import verify_cache

    seconds, start = {}, time.perf_counter()
    cache = Cache.open(root)
    seconds["open"] = time.perf_counter() - start
    start = time.perf_counter()
    order = Order(num_samples=len(cache), block=64, window=32, seed=0)
    ids = micro_batch_ids(order, epoch=3, step=0, micro=0, global_batch=64, micro_batch=64)
    assert len({cache.shard_at(position, 3) for position in ids.tolist()}) >= 1
    seconds["order"] = time.perf_counter() - start
    if verify:
        start = time.perf_counter()
        problems = verify_cache(root)
        seconds["verify"] = time.perf_counter() - start
        kinds = {problem.what.split(" ")[0] for problem in problems}
        assert len(problems) <= 4, (len(problems), kinds, problems[:3])
    seconds["memory_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return seconds


def measure(records: int, folder: Path) -> dict[str, Any]:
    """Make a cache of one size and measure it in a separate process."""
    root = folder / f"cache{records}"
    start = time.perf_counter()
    make_cache(root, records)
    made = time.perf_counter() - start
    figures = json.loads(run_python("-m", "benchmarks.store.growth", "--use", str(root)))
    manifest_bytes = (root / "manifest.json").stat().st_size
    return {"records": records, "made_s": made, "manifest_bytes": manifest_bytes, **figures}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--records", type=int, nargs="+", default=[4, 6, 8], help="powers of ten")
    parser.add_argument(
        "--folder", type=Path, help="where to write (default: the temporary folder); 10^8 makes 420,000 files"
    )
    parser.add_argument("--use", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.use:
        print(json.dumps(use_cache(options.use, verify=True)))
        return
    figures, raw = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for power in options.records:
            raw.append(row := measure(10**power, Path(folder)))
            rates = f"manifest {row['manifest_bytes'] / 1e6:.2f} MB, peak memory {row['memory_MB']:.0f} MB"
            start = row["open"] + row["order"]
            goal = "5 s, 1 GB" if power == 8 else ""
            figures.append(
                Measurement(
                    f"10^{power} records: open the cache, compute the first batch's positions",
                    start,
                    None,
                    "s",
                    rates,
                    goal,
                    "",
                )
            )
            per_unit = row["verify"] / max(1, -(-row["records"] // (IMAGES_PER_UNIT * VIEWS)))
            what, rates = f"10^{power} records: `make verify`, fast", f"{1e3 * per_unit:.2f} ms per unit of 18 files"
            figures.append(Measurement(what, row["verify"], None, "s", rates, "linear", "one stat call per file"))
    publish_table("growth", figures, {"sizes": raw, "images_per_unit": IMAGES_PER_UNIT, "views": VIEWS})


if __name__ == "__main__":
    main()
