"""The forecast compared with a cache that stage 1 writes, and with a real training step."""

import dataclasses
import json
import math
import re
from itertools import accumulate

import pytest
import torch
from documented import call
from image_files import encoded, write
from PIL import Image
from sklearn.datasets import load_sample_images
from small_cache import CPU, VIEWS, make, options, shared_weights, write_weights

from pipelines import cache_teacher
from pipelines import plan as command
from scalekd_cache.caching import prepare
from scalekd_cache.codec import variance_classes
from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import build_student
from scalekd_cache.models.teacher import MetaTeacher, meta_teacher
from scalekd_cache.planning import forecast as planning
from scalekd_cache.planning import step
from scalekd_cache.planning.forecast_result import describe, describe_together, together
from scalekd_cache.planning.gpus import name_of_model
from scalekd_cache.planning.step import step_memory
from scalekd_cache.scalekd import projectors
from scalekd_cache.training import targets


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fit with fewer classes, and only the requested codec."""
    monkeypatch.setattr(variance_classes, "BINS", 12)
    monkeypatch.setattr(planning, "MAX_EXTRA_S", 0.0)


TRAINING = DistillConfig(
    student=StudentConfig(name="resnet10t"), train=TrainConfig(global_batch_size=16, micro_batch_size=8)
)


@pytest.fixture(autouse=True)
def quick_step(monkeypatch):
    """Measure a training step on as few images as possible."""
    monkeypatch.setattr(step, "MEASURED_S", 0.0)


def plan_of(config, gpu="h100", training=TRAINING, **changes):
    return planning.forecast(config, training, CPU, **{"students": 8, "epochs": 300, "gpu": gpu, **changes})


def on_disk(root):
    """Bytes of a cache without its manifest and plan."""
    whole = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    return whole - sum((root / name).stat().st_size for name in ("manifest.json", "plan.json"))


def assert_close(found, cache, within=0.03):
    stored = cache.manifest.bytes_per_view
    assert found.bytes_per_view["total"] == pytest.approx(stored["total"], rel=within)
    for part in ("features", "target", "pixels"):
        assert found.bytes_per_view[part] == pytest.approx(stored[part], rel=within, abs=1)
    assert found.bytes_per_view["index"] == pytest.approx(stored["index"], rel=0.1, abs=10)
    assert found.total_bytes == pytest.approx(on_disk(cache.root), rel=within)
    assert found.images * found.views == cache.manifest.num_samples * cache.manifest.num_views


@pytest.mark.parametrize(
    "cache",
    [
        {"codec": "int8", "num_views": 3},
        {"codec": "int8", "backend": "zarr"},
        {"codec": "transform", "num_views": 1},
    ],
)
def test_bytes_on_the_demo(tmp_path, cache):
    config = options(tmp_path / "cache", shared_weights(), cache=cache)
    found = plan_of(config)
    assert not (tmp_path / "cache").exists()
    assert_close(found, make(tmp_path / "cache", shared_weights(), cache=cache))


@pytest.mark.parametrize("codec", ["int8", "transform"])
def test_stage_1_measures_the_space_it_needs_in_the_same_way(tmp_path, monkeypatch, codec):
    asked = []
    monkeypatch.setattr(prepare, "check_disk_space", lambda path, views, needed: asked.append((views, needed)))
    cache = make(tmp_path / "cache", shared_weights(), cache={"codec": codec, "num_views": 2})
    files = cache.manifest.bytes_per_view["total"] * cache.manifest.num_samples * 2
    assert asked == [(cache.manifest.num_samples * 2, pytest.approx(files, rel=0.05))]


def test_bytes_of_photographs_at_224(tmp_path):
    pictures = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(16):
        left, top = 12 * number, 6 * number
        side = 150 + 8 * number
        crop = pictures[number % 2].crop((left % 300, top % 170, left % 300 + side, top % 170 + side))
        write(tmp_path / "data" / "train" / "ab"[number % 2] / f"{number}.jpg", encoded(crop, "JPEG", quality=90))
    changes = {
        "data": {"source": str(tmp_path / "data")},
        "views": {"size": 224, "crop_scale": (0.08, 1.0)},
        "teacher": {"name": "vit_tiny_patch16_224", "pretrained": False, "weights": None},
        "cache": {"samples_per_shard": 8},
    }
    found = plan_of(options(tmp_path / "cache", None, **changes))
    cache = make(tmp_path / "cache", None, **changes)
    assert_close(found, cache)
    assert found.teacher_available


def test_a_teacher_that_is_not_available(tmp_path, monkeypatch):
    teacher = {
        "weights": None,
        "weights_dir": str(tmp_path),
    }  # no weights file, and no download
    config = options(tmp_path / "cache", None, teacher=teacher)
    found = plan_of(config)
    assert not found.teacher_available
    assert found.here.stage_1_s > 0
    assert "NO TEACHER WEIGHTS" in describe(found)
    real = plan_of(options(tmp_path / "cache", shared_weights()))
    assert found.bytes_per_view["total"] == pytest.approx(real.bytes_per_view["total"], rel=0.005)
    for codec in ({"codec": "transform"}, {"codec": "auto", "codec_target": "kl:0.1"}):
        with pytest.raises(UserError, match="depends on the teacher's features"):
            plan_of(options(tmp_path / "cache", None, teacher=teacher, cache=codec))
    damaged = write_weights(tmp_path / "bad.safetensors")
    damaged.write_bytes(b"no")
    with pytest.raises(UserError):
        plan_of(options(tmp_path / "cache", damaged))


def test_hours_and_students_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "MAX_EXTRA_S", 600.0)
    config = options(tmp_path / "cache", shared_weights(), cache={"num_views": 4})
    found = plan_of(config)
    online_more = found.gpu.online_gpu_hours - found.gpu.student_gpu_hours
    assert found.gpu.teacher_gpu_hours == pytest.approx(online_more * 4 / 300)
    assert found.gpu.saved_gpu_hours == pytest.approx(8 * online_more - found.gpu.teacher_gpu_hours)
    for one in (found, plan_of(config, epochs=1)):
        live_s = one.here.online_s - one.here.student_s
        assert one.here.breaks_even_after_students == math.ceil(one.here.stage_1_s / live_s)
    monkeypatch.setattr(planning, "MAX_EXTRA_S", 0.0)
    slower = plan_of(config, gpu="L4", epochs=2)
    assert slower.gpu.teacher_gpu_hours == pytest.approx(found.gpu.teacher_gpu_hours * 989 / 121)
    assert slower.gpu.images_per_s == pytest.approx(found.gpu.images_per_s * 121 / 989)
    assert found.gpu.read_mb_per_s == pytest.approx(found.gpu.images_per_s * found.bytes_per_view["total"] / 1e6)
    changes = {row["change"]: row for row in found.alternatives}
    assert changes["--views 2"]["stage_1_s"] < found.here.stage_1_s < changes["--views 8"]["stage_1_s"]
    assert changes["--codec transform"]["bytes"] < found.total_bytes < changes["--codec float16"]["bytes"]
    with pytest.raises(UserError, match="no GPU h1000: did you mean h100"):
        plan_of(config, gpu="h1000")


def allocated_peak(work):
    """Most bytes that PyTorch's allocator held at a time during `work`, above those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize(
    ("kind", "projector", "checkpointing"), [("ce", "cap", False), ("bce", "lite", False), ("ce", "lite", True)]
)
def test_the_memory_of_a_step_is_that_of_a_real_one(kind, projector, checkpointing, monkeypatch):
    """The count on the meta device equals that of a real step, and explains what PyTorch's allocator holds in it."""
    train = TrainConfig(global_batch_size=8, micro_batch_size=8, label_loss=kind)
    training = dataclasses.replace(
        TRAINING,
        train=train,
        optim=OptimConfig(name="adamw"),
        student=StudentConfig(name="resnet10t", grad_checkpointing=checkpointing),
        scalekd=ScaleKDConfig(projector=projector),
    )
    with torch.device("meta"):
        meta = meta_teacher("demo_swin", 64, 10)
        counted = step_memory(training, meta, 64, 10)
    monkeypatch.setattr(projectors, "TINY_MAP", 0)  # the CPU path for convolutions of tiny maps keeps more
    real: MetaTeacher = meta_teacher("demo_swin", 64, 10)
    assert step_memory(training, real, 64, 10)["activations"] == pytest.approx(counted["activations"], rel=0.01)
    with torch.backends.mkldnn.flags(enabled=False):  # its copies of weights depend on the CPU: 10 to 38 MB here
        peak = allocated_peak(lambda: step_memory(training, real, 64, 10))
    known = 2 * counted["gradients"] + counted["activations"]  # the weights that are trained, and their gradients
    workspace = 1e6  # column buffers of the convolutions
    assert known < peak < known + workspace
    student = build_student(training.student, num_classes=10, image_size=64)
    assert counted["gradients"] > 4 * sum(value.numel() for value in student.parameters())
    assert counted["optimizer"] == 2 * counted["gradients"]
    assert counted["total"] == sum(value for name, value in counted.items() if name != "total")


def test_the_command(tmp_path, capsys):
    words = [
        "--recipe", "demo", "--data.max_samples", "40", "--teacher.weights", str(shared_weights()), "--student",
        "resnet10t", "--cache.path", str(tmp_path / "cache"), "--gpu", "a100",
    ]  # fmt: skip
    capsys.readouterr()  # what making the weights printed
    assert call(command, [*words, "--json", "true"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert (fields["images"], fields["epochs"], fields["gpu"]["name"], fields["students"]) == (40, 2, "a100", 8)
    with pytest.raises(UserError, match="plan cannot read a cache from a URL"):
        call(command, ["--cache", "https://example.org/cache"])
    with pytest.raises(UserError, match="invalid value for students"):
        call(command, [*words, "--students", "0"])


def test_the_first_line_names_the_data(tmp_path, capsys, monkeypatch):
    """An existing cache is planned with its stored options, also if its recipe is gone; a new one as stage 1 would."""
    monkeypatch.setattr(step, "MEASURED_S", 0.0)
    recipe = tmp_path / "mine.yaml"
    stored = {"data": {"max_samples": 24}, "views": {"size": 48}, "cache": {"num_views": 3, "samples_per_shard": 16}}
    text = {"cache": stored, "distill": {"train": {"epochs": 7}, "student": {"name": "resnet10t"}}}
    recipe.write_text(json.dumps(text))
    weights = ["--teacher.weights", str(shared_weights())]
    root = str(tmp_path / "cache")
    assert call(cache_teacher, ["--recipe", recipe, "--cache", root, *weights]) is None
    recipe.unlink()

    def first_line_and_plan(*words):
        capsys.readouterr()
        assert call(command, [*words, "--student", "resnet10t"]) == 0
        printed = capsys.readouterr().out
        return printed.splitlines()[0], printed

    line, printed = first_line_and_plan("--cache", root)
    assert line == f"plan for {root} (an existing cache, planned with its stored options): data demo, recipe {recipe}"
    assert "24 images of demo x 3 views, teacher demo_swin, student resnet10t" in printed
    assert "stage 2: one student, 7 epochs" in printed
    assert "24 images of demo x 6 views" in first_line_and_plan("--cache", root, "--views", "6")[1]
    few = ("--data.max_samples", "24", *weights)
    line, _ = first_line_and_plan("--cache", str(tmp_path / "new"), *few)
    assert line.startswith(
        f"plan for {tmp_path}/new (no such cache yet): the built-in demo images (the default; set --data to plan for "
    )
    line, _ = first_line_and_plan("--cache", str(tmp_path / "new"), "--data", "demo", *few)
    assert line == f"plan for {tmp_path}/new (no such cache yet): data demo, recipe demo"


def test_a_full_disk_is_said(tmp_path, monkeypatch, capsys):
    found = plan_of(options(tmp_path / "cache", shared_weights()))
    text = describe(found)
    for words in (
        "features (int8)",
        "stage 1, with checks and evaluation",
        "stage 2: one student, 300 epochs",
        "GPU-second",
        "images/s",
        "memory for a step",
        "data sheet",
        "--views 4",
    ):
        assert words in text
    assert "DOES NOT FIT" not in text
    assert "DOES NOT FIT" in describe(dataclasses.replace(found, free_bytes=1000))


def test_what_is_stored_already_needs_no_more_space(tmp_path, monkeypatch):
    """A finished cache fits, however full the disk is; a larger one needs the rest."""
    root = tmp_path / "cache"
    make(root, shared_weights())
    monkeypatch.setattr("scalekd_cache.planning.forecast.free_bytes", lambda place: 100_000)
    monkeypatch.setattr(step, "MEASURED_S", 0.0)
    words = ["--cache", str(root), "--student", "test_resnet"]
    for views, code in ((VIEWS, 0), (50 * VIEWS, 1)):
        assert call(command, [*words, "--views", str(views)]) == code


def test_a_plan_without_a_loss_is_refused(tmp_path):
    scalekd = ScaleKDConfig(s3=False, s4=False, logit_weight=0.0)
    train = dataclasses.replace(TRAINING.train, label_loss="none")
    with pytest.raises(UserError, match="the run has no loss"):
        plan_of(options(tmp_path / "cache", shared_weights()), training=DistillConfig(scalekd=scalekd, train=train))


def test_a_plan_knows_the_stored_share(tmp_path):
    """Bytes as stage 1 writes them; students take the share, so they cost less; more than is stored is refused."""
    sparse = {"num_views": 4, "views_per_group": 4, "stored_features": 0.25}
    config = options(tmp_path / "cache", shared_weights(), cache=sparse)
    found, full = plan_of(config), plan_of(options(tmp_path / "full", shared_weights(), cache={"num_views": 4}))
    assert_close(found, make(tmp_path / "cache", shared_weights(), cache=sparse))
    assert found.bytes_per_view["features"] == full.bytes_per_view["features"] / 4
    assert found.gpu.student_gpu_hours < full.gpu.student_gpu_hours
    assert found.step_memory["activations"] < full.step_memory["activations"]
    assert "features (int8, 0.25 of the views)" in describe(found)
    changes = {row["change"] for row in found.alternatives}
    assert "--views 8" in changes
    assert not changes & {"--views 1", "--views 2"}
    asked = dataclasses.replace(TRAINING, scalekd=dataclasses.replace(TRAINING.scalekd, feature_share=0.5))
    with pytest.raises(UserError, match="feature share is larger than the fraction of views"):
        plan_of(config, training=asked)


@pytest.mark.parametrize(("share", "micro"), [(0.1, 8), (0.125, 8), (1 / 24, 32)])
def test_a_plan_refuses_the_shares_that_training_refuses(tmp_path, share, micro):
    asked = dataclasses.replace(
        TRAINING, scalekd=ScaleKDConfig(feature_share=share), train=TrainConfig(micro_batch_size=micro)
    )
    with pytest.raises(UserError, match="the feature share must select a whole number of samples per micro-batch"):
        plan_of(options(tmp_path / "cache", shared_weights()), training=asked)


def test_teacher_rate_is_measured_if_this_machine_has_the_gpu(tmp_path, monkeypatch):
    """A stand-in: the CPU is taken for an H100. Students of another GPU, or of no GPU, use the assumed utilization."""
    monkeypatch.setattr(planning, "name_of_device", lambda device: "h100")
    forward = planning._forward_s
    asked = []
    monkeypatch.setattr(planning, "_forward_s", lambda stage: asked.append(forward(stage)) or asked[-1])
    config = options(tmp_path / "cache", shared_weights())
    other, found = plan_of(config, gpu="l4"), plan_of(config)
    assert not other.gpu.teacher_rate_measured
    assert "assumed utilization 13% for the teacher" in describe(other)
    assert found.gpu.teacher_rate_measured
    assert len(asked) == 1
    assert found.gpu.teacher_gpu_hours == pytest.approx(found.images * found.views * asked[0] / 3600)
    assert found.gpu.cores_per_gpu == pytest.approx(found.here.draw_s_per_view / asked[0])
    assert found.gpu.online_gpu_hours - found.gpu.student_gpu_hours == pytest.approx(
        found.images * 300 * asked[0] / 3600
    )
    assert "measured utilization 0% for the teacher, assumed 11% for the student and 31% for the heads" in describe(
        found
    )
    seconds_at_peak = other.gpu.teacher_gpu_hours * 0.13 * 121 / 989 * 3600 / (found.images * found.views)
    assert found.gpu.forward_utilization == pytest.approx(seconds_at_peak / asked[0])


def test_a_machine_without_a_gpu_gets_its_own_times_and_no_gpu_lines(tmp_path):
    found = plan_of(options(tmp_path / "cache", shared_weights()), gpu=None)
    assert found.gpu is None
    assert found.here.student_s == pytest.approx(300 * found.images * found.here.step_s_per_image)
    assert found.here.online_s - found.here.student_s > 0  # the teacher's forward passes, without codec and store
    text = describe(found)
    assert not re.search("GPU|h100|TFLOP", text)
    assert text.index("time on this machine") < text.index("bytes per view")


def test_a_gpu_that_waits_for_the_views_has_no_ratio_of_cores(tmp_path):
    found = plan_of(options(tmp_path / "cache", shared_weights()))
    few = dataclasses.replace(found, gpu=dataclasses.replace(found.gpu, cores_per_gpu=11.2))
    many = dataclasses.replace(found, gpu=dataclasses.replace(found.gpu, cores_per_gpu=41300))
    assert "; 12 CPU cores per GPU" in describe(few)
    assert "the CPU cores that sample the views limit the speed (" in describe(many)
    assert not re.search("41,?300 CPU cores", describe(many))
    assert "CPU cores per GPU" not in describe_together(together([many, many]))


def test_random_weights_are_named(tmp_path):
    teacher = {"pretrained": False, "weights": None}
    found = plan_of(options(tmp_path / "cache", None, teacher=teacher))
    assert found.to_json()["teacher"] == "demo_swin (random weights)"
    assert "teacher demo_swin (random weights), student" in describe(found)
    assert plan_of(options(tmp_path / "cache", shared_weights())).teacher == "demo_swin"


@pytest.mark.parametrize(("teacher", "noted"), [({"num_classes": 7}, True), ({"num_classes": 0}, False), ({}, False)])
def test_a_note_about_classes_that_cache_teacher_would_not_accept(tmp_path, teacher, noted):
    config = options(tmp_path / "cache", None, teacher={"pretrained": False, "weights": None, **teacher})
    assert ("note: the teacher has 7 classes, the dataset 10:" in describe(plan_of(config))) == noted


def test_a_missing_demo_teacher_has_the_classes_that_it_will_be_trained_on(tmp_path):
    missing = {"weights": None, "weights_dir": str(tmp_path / "teachers"), "num_classes": 5}
    with pytest.raises(UserError, match=r"different number of classes(.|\n)*expected: 10 or 0"):
        plan_of(options(tmp_path / "cache", None, teacher=missing))


def test_notes_about_the_heads_and_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "HEAVY_HEADS", 0)
    few = {"max_samples": 40}
    train = dataclasses.replace(TRAINING.train, global_batch_size=1024)
    training = dataclasses.replace(TRAINING, train=train)
    text = describe(plan_of(options(tmp_path / "cache", shared_weights(), data=few), training=training))
    assert "cheaper: --heads linear or --feature-share 0.25" in text
    assert "note: with 40 images, use a smaller batch than 1024: `scalekd distill --batch " in text


@pytest.mark.parametrize(
    ("model", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA A100-SXM4-80GB", "a100"),
     ("NVIDIA A10", "a10"), ("NVIDIA L40S", "l40s"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA H200", "h200"),
     ("AMD Instinct MI300X", "mi300x"), ("Tesla T4", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
     ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
     ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA H100 NVL", None), ("NVIDIA L40S-8Q", None),
     ("NVIDIA A10-24Q", None)],
)  # fmt: skip
def test_names_of_gpus_as_drivers_report_them(model, name):
    assert name_of_model(model) == name
