"""Parts a to d of the GPU smoke run: environment, attention, codecs, the teacher.

In: `Sizes`, the folder of the run. Out: results, reported one by one.
Invariant: GPU times come from CUDA events; a missing kernel is a result, not an error.
"""

import itertools
import resource
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.codec.decode import fitted_codecs, synthetic_maps
from benchmarks.harness import machine
from benchmarks.smoke.sizes import Add, Sizes, attempt
from scalekd_cache.codec import make_codec
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.dither import dither_seed
from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.models.teacher import Teacher, check_tail, load_teacher

BACKENDS = ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")


def milliseconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, after one warm-up call."""
    action()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            action()
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last))
        else:
            started = time.perf_counter()
            action()
            times.append(1e3 * (time.perf_counter() - started))
    return round(statistics.median(times), 4)


def synchronizations(action: Callable[[], object], device: torch.device) -> int | None:
    """Number of GPU synchronizations in a call; None on a CPU."""
    if device.type != "cuda":
        action()
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            action()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


def environment(sizes: Sizes, folder: Path, add: Add) -> None:
    """Part a."""
    add("machine", machine())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    shared = shutil.disk_usage("/dev/shm")
    add(
        "limits",
        {"open_files": limits, "shared_memory_bytes": shared.free, "disk_bytes": shutil.disk_usage(folder).free},
    )
    add("cuda", {"built_for": torch.version.cuda, "available": torch.cuda.is_available()})
    if sizes.device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        add("gpu", {
            "name": facts.name, "capability": f"{facts.major}.{facts.minor}", "processors": facts.multi_processor_count,
            "free_bytes": free, "total_bytes": total, "cudnn": torch.backends.cudnn.version(),
            "bfloat16": torch.cuda.is_bf16_supported(), "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        })  # fmt: skip


def attention(sizes: Sizes, folder: Path, add: Add) -> None:
    """Part b: each attention backend at the projectors' shapes, query expanded or contiguous, against float32 math.

    The suspected case is last, cuDNN with an expanded query: an illegal memory access ends the use of the GPU.
    """
    device = torch.device(sizes.device)
    expected, parts = {}, {}
    for stage, shape in sizes.attention.items():
        torch.manual_seed(0)
        batch, head = sizes.attention_batch, shape.width // shape.heads
        query = torch.randn(1, shape.heads, shape.queries, head, device=device, dtype=torch.bfloat16)
        key, value = (
            torch.randn(batch, shape.heads, shape.keys, head, device=device, dtype=torch.bfloat16) for _ in range(2)
        )
        parts[stage] = query, key, value
        with sdpa_kernel(SDPBackend.MATH):
            expected[stage] = attend(torch.float32, True, *parts[stage])
    for contiguous, backend, stage in itertools.product((True, False), BACKENDS, parts):
        name = f"{stage}, {backend.lower()}, {'contiguous' if contiguous else 'expanded'} query"
        call = partial(attend, torch.bfloat16, contiguous, *parts[stage])
        try:
            with warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, backend)):
                warnings.simplefilter("ignore")
                errors = [relative(a, b) for a, b in zip(call(), expected[stage], strict=True)]
                ms = milliseconds(call, device, sizes.repeats)
        except RuntimeError as error:
            add(name, {"error": str(error).splitlines()[0][:200]})
            continue
        add(name, {"forward_backward_ms": ms, **dict(zip(("out", "d_query", "d_key", "d_value"), errors))})


def attend(dtype: torch.dtype, contiguous: bool, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Output and gradients of an attention whose query (1, heads, queries, head) is the same for all samples."""
    leaves = [part.detach().to(dtype).requires_grad_() for part in (query, key, value)]
    q, k, v = leaves
    q = q.expand(len(k), -1, -1, -1)
    scale = 5 * q.shape[-1] ** -0.5
    out = functional.scaled_dot_product_attention(q.contiguous() if contiguous else q, k, v, scale=scale)
    out.square().mean().backward()
    return [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def codecs(sizes: Sizes, folder: Path, add: Add) -> None:
    """Part c: rows encoded on the device compared with the CPU, time per batch, synchronizations."""
    device, count = torch.device(sizes.device), sizes.codec_views
    maps = synthetic_maps(count, 2, sizes.feature_shape)
    placed = maps.to(device)
    seeds = torch.tensor([dither_seed(str(number), 0) for number in range(count)])
    for name, codec in fitted_codecs(sizes.feature_shape, count, ("int8", "transform", "transform-rotated")):
        with attempt(add, name):
            add(name, codec_figures(codec, maps, placed, seeds, sizes.repeats))


def codec_figures(codec: FeatureCodec, maps: Tensor, placed: Tensor, seeds: Tensor, repeats: int) -> dict[str, Any]:
    """One codec on the device, with maps (B, C, H, W) on the CPU and `placed` there; encoded as stage 1 does."""
    device = placed.device
    expected = codec.encode(maps, seeds)
    codes, seeds = expected.to(device), seeds.to(device)
    rows = codec.encode(placed, seeds)

    def encode() -> object:
        return codec.encode_rows(placed, seeds)

    def decode() -> object:
        return codec.decode(codes)

    return {
        "views": len(maps),
        "rows_that_differ_from_the_cpu": int((rows.cpu() != expected).any(1).sum()),
        "decoded_difference": relative(codec.decode(codes).features.cpu(), codec.decode(expected).features),
        "encode_ms": milliseconds(encode, device, repeats),
        "decode_ms": milliseconds(decode, device, repeats),
        "encode_waits": synchronizations(encode, device),
        "decode_waits": synchronizations(decode, device),
    }


def teacher(sizes: Sizes, folder: Path, add: Add) -> None:
    """Part d: rates by batch size, bytes that depend on the batch, the tail; fused attention; compiled blocks last."""
    device = torch.device(sizes.device)
    torch.manual_seed(0)
    config = TeacherConfig(name=sizes.teacher, pretrained=False)
    model = load_teacher(config, image_size=sizes.views_px, num_classes=1000, device=device)
    images = torch.randint(0, 256, (max(sizes.teacher_batches), 3, sizes.views_px, sizes.views_px), dtype=torch.uint8)
    images = images.to(device)
    rates(model, images, sizes, add, "as timm has it")
    add("batches", bytes_by_batch(model, images[: sizes.teacher_batches[0]]))
    add("tail_difference", check_tail(model, images[:4]))
    expected = model(images).features
    fused = [module for module in model.modules() if hasattr(module, "fused_attn")]
    before = [module.fused_attn for module in fused]
    for module in fused:
        module.fused_attn = True
    rates(model, images, sizes, add, "fused attention")
    difference = relative(model(images).features, expected)
    add("fused_attention", {"was_on": sum(before), "of": len(fused), "difference": difference})
    for module, value in zip(fused, before, strict=True):
        module.fused_attn = value
    started = time.perf_counter()
    for module in model.modules():
        if "Block" in type(module).__name__:
            module.compile(backend=sizes.compiler, dynamic=False)
    difference = relative(model(images).features, expected)
    add("compile", {"first_call_s": round(time.perf_counter() - started, 1), "difference": difference})
    rates(model, images, sizes._replace(teacher_batches=sizes.teacher_batches[-1:]), add, "compiled blocks")


def rates(model: Teacher, images: Tensor, sizes: Sizes, add: Add, name: str) -> None:
    """Views per second for each batch size."""
    device, found = images.device, {}
    for batch in sizes.teacher_batches:
        part = images[:batch]
        ms = milliseconds(lambda part=part: model(part), device, sizes.repeats)
        found[str(batch)] = {"ms": ms, "views_per_s": round(1e3 * batch / ms, 1)}
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    add(name, found)


def bytes_by_batch(model: Teacher, images: Tensor) -> dict[str, Any]:
    """Number of int8 rows and bytes that differ when the same images run again, or in a batch with one image less."""
    codec = make_codec("int8", model.spec.feature_shape)
    first = codec.encode(model(images).features)
    again = codec.encode(model(images).features)
    fewer = codec.encode(model(images[:-1]).features)

    def different(rows: Tensor, others: Tensor) -> dict[str, float]:
        unequal = rows != others
        return {"rows": int(unequal.any(1).sum()), "bytes": int(unequal.sum()), "of_bytes": unequal.numel()}

    return {"twice": different(first, again), f"{len(images)} and {len(images) - 1}": different(first[:-1], fewer)}
