"""Transfers between host and device in the real training loop, and a check that nothing waits for the device.

No device is needed: meta tensors replace it, and operators that would wait are counted on the CPU.
"""

import pytest
import torch
import torch.distributed as dist
from codec_maps import SHAPE, maps
from crossings import META, device_crossings
from deepspeed.accelerator import get_accelerator
from device_trace import PlainEngine, ReadCounter, counted_calls
from small_cache import CPU
from small_trainer import MICRO, STEPS, Lines, config_of, trainer_of
from unlabeled_cache import unlabeled_cache

from scalekd_cache.codec import make_codec
from scalekd_cache.codec.transform_fit import fit
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig, StudentConfig
from scalekd_cache.data.source import open_cache_source
from scalekd_cache.models.student import build_student
from scalekd_cache.scalekd.heads import make_heads
from scalekd_cache.training.held_out_evaluation import TeacherComparison
from scalekd_cache.training.targets import load_cache_tail
from scalekd_cache.training.trainer import DistillModel, Trainer, start_processes

MICROS = 2
"""Micro-batches per step."""


@pytest.fixture(scope="module", autouse=True)
def processes():
    start_processes(CPU)


class MetaTrainer(Trainer):
    """The real trainer, loop and optimizer on meta tensors; DeepSpeed needs a real device."""

    def _initialize(self, model, optimizer):
        return PlainEngine(model, optimizer, MICROS)


@pytest.mark.parametrize(("targets", "optim"), [("cached", "adamw"), ("live", "sgd"), ("none", "lamb")])
def test_every_crossing_is_in_the_list(monkeypatch, targets, optim):
    """A whole epoch: the next batch, its targets, student, heads, losses, backward, optimizer, average, one log."""
    train = {"targets": targets, "epochs": 1, "log_every": 100}
    process = CPU._replace(device=META)
    trainer = trainer_of(config_of(train=train, optim={"name": optim}), process=process, kind=MetaTrainer)
    lines, per_step = Lines(), []
    with counted_calls(monkeypatch, dist, "all_reduce", lambda *args, **kwargs: None), device_crossings() as seen:
        for _ in trainer.train(lines):
            per_step.append(list(seen))
            seen.clear()
    row, classes = trainer.loader.codecs[0].features.bytes_per_view, 10
    shapes = ((MICRO, 3, 64, 64), (MICRO,), (MICRO, row), (MICRO, classes))  # pixels, labels, codes, logits
    in_a_step = [("to device", shape) for shape in shapes] * MICROS
    logged = [("to host", (7,)), ("read", ())]  # the mean terms; the first micro-batch with NaN
    assert per_step == [in_a_step] * (STEPS - 1) + [in_a_step + logged]
    assert lines.steps == [STEPS]
    assert all(parameter.is_meta for parameter in trainer.model.parameters())


@pytest.mark.parametrize("options", [{}, {"projector": "linear"}, {"s3": False}, {"s4": False}])
@pytest.mark.parametrize("classes", [0, 2])
def test_an_evaluation_without_labels_mixes_no_devices(monkeypatch, classes, options):
    """Held-out images: student, heads, loss, cosines, embeddings."""
    cache, process = unlabeled_cache(classes), CPU._replace(device=META)
    facts = cache.manifest.facts
    config = DistillConfig(student=StudentConfig(name="test_resnet"), scalekd=ScaleKDConfig(**options))
    student = build_student(config.student, num_classes=classes, image_size=facts.view_recipe["size"])
    tail = load_cache_tail(cache)
    model = DistillModel(config, student, [make_heads(config, student, tail)]).to(META).eval()
    source = open_cache_source(facts.data, None, "val")
    with counted_calls(monkeypatch, dist, "all_reduce", lambda *args, **kwargs: None), device_crossings() as seen:
        TeacherComparison(cache, 0, source, process).figures(model, tail.to(META))
    assert seen


@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "float16", "bfloat16", "float32", "rotated", "predicted"])
def test_decoding_stays_on_the_device(name):
    """The tables of a transform codec are copied to the device once."""
    if name in ("rotated", "predicted"):
        codec, features = fit(maps(200), 0.01, rotated=name == "rotated"), maps(3)
        rows = codec.encode(features, torch.arange(3))
    else:
        codec, features = make_codec(name, SHAPE), maps(3)
        rows = codec.encode(features)
    codec.decode(rows.to(META))
    with device_crossings() as seen:
        decoded = codec.decode(rows.to(META))
    assert seen == [("to device", tuple(rows.shape))]
    assert decoded.features.shape == features.shape
    assert decoded.features.is_meta
    assert decoded.norms.is_meta


@pytest.mark.parametrize(
    ("zero", "optim"), [(0, "adamw"), (0, "sgd"), (0, "lamb"), (1, "adamw"), (2, "sgd"), (3, "sgd")]
)
def test_nothing_waits_between_logged_steps(monkeypatch, zero, optim):
    """With DeepSpeed's engine, our code reads no value, and does not synchronize or communicate until a logged step.

    At ZeRO 1 to 3, DeepSpeed reads the norm of the gradient once or twice per optimizer step.
    """
    average = 0.5 if optim == "adamw" else 0.0
    train = {"zero": zero, "log_every": 100, "ema_decay": average, "epochs": 2, "log_samples": True}
    trainer = trainer_of(config_of(train=train, optim={"name": optim, "clip_norm": 5.0}))
    per_step = []
    with (
        counted_calls(monkeypatch, get_accelerator(), "synchronize") as waits,
        counted_calls(monkeypatch, dist, "all_reduce") as exchanges,
        ReadCounter() as counter,
    ):
        for _ in trainer.train(Lines()):
            assert trainer.signal_of_any_rank(0) == 0
            per_step.append((dict(counter.reads), len(waits), [name for name in exchanges if "deepspeed" not in name]))
            counter.reads.clear()
            waits.clear()
            exchanges.clear()
    unlogged = [found for step, found in enumerate(per_step, 1) if step % STEPS and step > 1]  # ZeRO 3 plans in step 1
    assert len(unlogged) == 2 * (STEPS - 1) - 1
    for reads, waited, exchanged in unlogged:
        assert (waited, exchanged) == (0, [])
        assert all(name.startswith("deepspeed/runtime") for name in reads)
        assert sum(reads.values()) <= (2 if zero else 0), reads
    assert "training/watchdog.py Watchdog.first_nonfinite" in per_step[STEPS - 1][0]
