"""How much information does each logit format lose, and how many bytes does it take?

    python -m benchmarks.codec.logits --cache DIR --head teacher.safetensors [--views 512] [--top-k 3]

The cache must hold float32 features; its logits are then exact. The head file holds the teacher's `head.fc.weight` and
`.bias`, applied to the mean of its last map. Top-k stores the exact logits of k classes and the total probability of
the rest. Its row shows the KL of a reader that spreads the rest evenly; the training loss does not do that
(`partial_logit_loss`). Codecs are fitted on half of the views and measured on the other half.
Writes benchmarks/results/logits-<name>.json.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.harness import argument_parser, write_results
from scalekd_cache.codec import codec_from_config, make_codec
from scalekd_cache.codec.dither import dither_seed
from scalekd_cache.codec.logits import DenseLogits, kl_divergence, logit_codec_from_config
from scalekd_cache.codec.top_k import TopKLogits
from scalekd_cache.codec.transform_fit import PRESETS, fit
from scalekd_cache.store.reader import Cache


def spread(decoded: np.ndarray) -> np.ndarray:
    """Log-probabilities with the unknown mass spread evenly."""
    row = decoded.astype(np.float64)
    unknown = ~np.isfinite(row)
    row[unknown] = np.log(max(1e-300, 1 - np.exp(row[~unknown]).sum()) / max(1, unknown.sum()))
    return row


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--name", default="demo")
    parser.add_argument("--views", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cache = Cache.open(options.cache)
    records = cache.read(np.linspace(0, len(cache) - 1, min(options.views, len(cache))).astype(np.int64), 0)
    exact, kept = (
        codec_from_config(cache.manifest.facts.codec),
        logit_codec_from_config(cache.manifest.facts.logit_codec),
    )
    maps = exact.decode(torch.from_numpy(exact.unpack([record.features for record in records]))).features.contiguous()
    logits = np.stack([kept.decode(record.logits) for record in records])
    head = load_file(options.head)
    weight, bias = head["head.fc.weight"], head["head.fc.bias"]
    half = len(maps) // 2
    seeds = torch.tensor([dither_seed(record.key, 0) for record in records[half:]])
    rows = []

    def row(name: str, record_bytes: float, decoded: np.ndarray, original: np.ndarray) -> None:
        kl = kl_divergence(original, decoded)
        same = float((decoded.argmax(1) == original.argmax(1)).mean())
        rows.append(
            {
                "kept": name,
                "bytes": record_bytes,
                "kl_mean": float(kl.mean()),
                "kl_max": float(kl.max()),
                "top1_agreement": same,
            }
        )
        print(f"{name:34} {record_bytes:7.1f} B   KL mean {kl.mean():.2e} max {kl.max():.2e}   top-1 {100 * same:.1f}%")

    values, classes = torch.from_numpy(logits), logits.shape[1]
    for name, codec in (("dense", DenseLogits(classes)), (f"top {options.top_k}", TopKLogits(classes, options.top_k))):
        stored = codec.encode(values)
        decoded = np.stack([spread(codec.decode(one)) if codec.partial else codec.decode(one) for one in stored])
        row(name, float(np.mean([len(one) for one in stored])), decoded, logits)
    shape = tuple(maps.shape[1:])
    for name in ("int8", "int4", "transform", "transform-economy"):
        codec = fit(maps[:half], PRESETS[name]) if name in PRESETS else make_codec(name, shape)
        features = codec.decode(codec.encode(maps[half:], seeds)).features
        again = torch.nn.functional.linear(features.mean((2, 3)), weight, bias).numpy()
        row(f"recomputed from {name}", 0.0, again, logits[half:])
    result = {
        "teacher": cache.manifest.facts.teacher["spec"]["name"],
        "classes": classes,
        "rows": rows,
    }
    print(write_results(f"logits-{options.name}", result))


if __name__ == "__main__":
    main()
