"""How fast are the ScaleKD heads? Compares ours with a literal transcription of upstream and with the lite heads.

    python -m benchmarks.training.heads [--device cuda] [--batch 4] [--repeats 5]

Times forward and backward of heads and losses only, on ResNet-50 and Swin-L feature maps (a smaller teacher on a CPU).
Dtype, compile setting and results are the same for all (tests/scalekd/test_parity.py). The transcription is in
tests/support/upstream_reference.py. The upper limit is the rate of a plain matrix product in the same run.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import ROOT, Measurement, argument_parser, publish_table, ratio, time_interleaved
from scalekd_cache.config.stage2 import ScaleKDConfig, TrainConfig
from scalekd_cache.devices import choose_device
from scalekd_cache.scalekd.heads import ScaleKDHeads
from scalekd_cache.scalekd.losses import Targets, distillation_losses

sys.path.insert(0, str(ROOT / "tests" / "support"))
from upstream_reference import FreqMaskingDistillLoss

PRODUCT = 1024
"""Matrix size of the product that measures the peak rate of the machine."""


def inputs(
    batch: int, taps: tuple[tuple[int, int, int], ...], out: tuple[int, int, int], device: torch.device
) -> list[Tensor]:
    """S3, S4 (with gradients) and the teacher's map."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(batch, *shape, generator=generator).to(device) for shape in (*taps, out)]
    return [maps[0].requires_grad_(), maps[1].requires_grad_(), maps[2]]


def ours(
    taps: Any, middle: Any, out: Any, tail: torch.nn.Module, maps: list[Tensor], **options: Any
) -> Callable[[], Tensor]:
    """The project's heads and losses."""
    config, device = ScaleKDConfig(logit_weight=0.0, **options), maps[0].device
    heads = ScaleKDHeads(config, taps, middle, out).to(device)
    s3, s4, target = maps
    norms = torch.stack([target.norm(dim=1), (target - target.mean((2, 3), True)).norm(dim=1)], 1)
    logits, labels = torch.zeros(len(s3), 10, device=device), torch.zeros(len(s3), dtype=torch.int64, device=device)
    targets = Targets(target, norms, logits)

    def run() -> Tensor:
        return distillation_losses(config, TrainConfig(), logits, labels, heads(s3, s4, tail), targets).total

    return run


def transcription(taps: Any, middle: Any, out: Any, tail: torch.nn.Module, maps: list[Tensor]) -> Callable[[], Tensor]:
    """Upstream's modules as written: one pass per projector, DCT and inverse DCT for the frequency loss."""
    s3, s4, target = maps
    device = s3.device
    grids = [shape[1:] for shape in (*taps, middle, out)]
    first = FreqMaskingDistillLoss((0.08, 0.06), taps[0][0], middle[0], grids[2], grids[0], True, 16).to(device)
    second = FreqMaskingDistillLoss((0.08, 0.06), taps[1][0], out[0], grids[3], grids[1], False, 24).to(device)

    def to_map(tokens: Tensor, shape: tuple[int, int, int]) -> Tensor:
        return tokens.transpose(1, 2).reshape(len(tokens), *shape)

    def run() -> Tensor:
        total = torch.zeros((), device=device)
        for name, loss in (("projector_0", "get_spat_loss"), ("projector_1", "get_freq_loss")):
            query = tail(to_map(getattr(first, name)(s3), middle))
            tokens = query.flatten(2).transpose(1, 2)
            total = total + getattr(first, loss)(tokens, target)
            total = total + getattr(second, loss)(getattr(second, name)(s4, tokens), target)
        return total

    return run


class Merge(torch.nn.Module):
    """A tail of negligible cost: averages 2x2 patches and doubles the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2 C, H / 2, W / 2)."""
        small = torch.nn.functional.avg_pool2d(x, 2)
        return torch.cat([small, small], 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="default 4 on a CPU, 128 on a GPU")
    parser.add_argument(
        "--width", type=int, help="channels of the teacher's third stage (default 384 on a CPU, 768 on a GPU)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(argv)
    device = choose_device(options.device)
    gpu = device.type == "cuda"
    batch, width = options.batch or (128 if gpu else 4), options.width or (768 if gpu else 384)
    taps, middle, out = ((1024, 14, 14), (2048, 7, 7)), (width, 14, 14), (2 * width, 7, 7)
    maps = inputs(batch, taps, out, device)
    passes = {
        "ours": ours(taps, middle, out, Merge(), maps, heads_s3=16, heads_s4=24),
        "lite": ours(taps, middle, out, Merge(), maps, projector="lite"),
        "transcription": transcription(taps, middle, out, Merge(), maps),
    }
    if options.compile:
        passes = {name: torch.compile(run) for name, run in passes.items()}

    def step(run: Callable[[], Tensor]) -> Callable[[], None]:
        def whole() -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=gpu):
                loss = run()
            loss.backward()
            maps[0].grad = maps[1].grad = None
            if gpu:
                torch.cuda.synchronize()

        return whole

    flops = {}
    for name, run in passes.items():
        with FlopCounterMode(display=False) as counter:
            step(run)()
        flops[name] = counter.get_total_flops()
    dtype = torch.bfloat16 if gpu else torch.float32
    a, b = (torch.randn(PRODUCT * (8 if gpu else 1), PRODUCT, device=device, dtype=dtype) for _ in range(2))
    b = b[:PRODUCT]

    def product() -> None:
        for _ in range(4):
            a @ b
        if gpu:
            torch.cuda.synchronize()

    product()
    seconds = time_interleaved(options.repeats, **{name: step(run) for name, run in passes.items()}, product=product)
    peak = 4 * 2 * len(a) * PRODUCT**2 / statistics.median(seconds["product"])
    reached = [flops["ours"] / value / peak for value in seconds["ours"]]
    shapes = f"ResNet-50 maps, teacher {out[0]}x7x7, batch {batch}"
    counts = ", ".join(f"{name} {count / batch / 1e9:.1f}" for name, count in flops.items())
    figures = [
        ratio(f"heads, ours / transcription ({shapes})", seconds, "ours", "transcription", amount=batch,
              unit="images/s", goal="highest", gap=f"GFLOP per image, forward and backward: {counts}"),
        ratio("lite heads / ours, without the tail", seconds, "lite", "ours", amount=batch, unit="images/s",
              goal="4 with the tail", gap="normalization and losses cost the same; the tail adds one pass"),
        Measurement("heads, our FLOP/s / plain matrix product", statistics.median(reached),
               (min(reached), max(reached)), "x", f"{peak / 1e9:,.0f} GFLOP/s", "1",
               "3x3 convolutions, normalization, softmax, memory traffic"),
    ]  # fmt: skip
    publish_table(
        "heads-gpu" if gpu else "heads", figures, {"options": vars(options), "flops": flops, "seconds": seconds}
    )


if __name__ == "__main__":
    main()
