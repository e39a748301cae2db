"""Pooled embeddings in caches without labels: stored for every view, read, checked, repaired, grown and forecast."""

import functools
import json
import re
import shutil
import tempfile
from pathlib import Path

import format_reader
import numpy as np
import pytest
import torch
from damage import rewrite_unit
from documented import call
from loaders import make_loader
from small_cache import CPU, make, options, reseal, unit_files
from unlabeled_cache import write_pictures

from pipelines import inspect_cache
from scalekd_cache.audit.repair import repair_cache
from scalekd_cache.audit.verify_cache import verify_deep
from scalekd_cache.codec.pooled import pooled_codec, second_codec_from_config
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig, StudentConfig
from scalekd_cache.errors import UserError
from scalekd_cache.loader.order import Order
from scalekd_cache.loader.record_pixels import decode_pooled
from scalekd_cache.models.student import build_student
from scalekd_cache.models.teacher import cache_teacher_config, load_cache_teacher, meta_teacher
from scalekd_cache.planning import forecast as planning
from scalekd_cache.planning.step import step_memory
from scalekd_cache.store.base import BACKENDS, Parts
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.training.custom_loop import CachedTargets, ScaleKDLoss, timm_student
from scalekd_cache.training.targets import TargetSource

IMAGES, SHARD, WIDTH = 16, 8, 64
LAYOUT = {"num_views": 2, "views_per_group": 2, "samples_per_shard": SHARD}
ORDER = Order(num_samples=IMAGES, block=4, window=2, seed=5)


@functools.cache
def _holder():
    return tempfile.TemporaryDirectory(prefix="pooled-")


@functools.cache
def pictures():
    return write_pictures(Path(_holder().name) / "data")


def changes(cache=None, **rest):
    """Options of a teacher with a class token."""
    return {
        "data": {"source": str(pictures()), "max_samples": IMAGES},
        "teacher": {"name": "test_vit", "pretrained": False, "weights": None, "num_classes": 10},
        "cache": {**LAYOUT, **(cache or {})},
        **rest,
    }


@functools.cache
def finished(backend="webdataset", codec="int8", share=1.0):
    """A finished cache that tests must not change."""
    root = Path(_holder().name) / f"{backend}-{codec}-{share}"
    return make(root, None, **changes({"backend": backend, "codec": codec, "stored_features": share}))


def teacher_of(cache):
    facts = cache.manifest.facts
    return load_cache_teacher(cache.manifest, cache_teacher_config(facts.teacher["config"], None), torch.device("cpu"))


def batches(cache):
    """A batch of a view, with live and with cached targets."""
    loader = make_loader(cache, order=ORDER, epochs=1, global_batch=IMAGES, micro_batch=IMAGES)
    source = TargetSource(loader.codecs[0])
    batch = next(iter(loader))
    return batch, source._replace(teacher=teacher_of(cache))(batch), source(batch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_view_has_one(backend, capsys):
    cache = finished(backend)
    manifest, codec = cache.manifest, pooled_codec("int8", WIDTH)
    assert manifest.facts.class_names == []
    assert manifest.facts.teacher["spec"]["pooled"] == WIDTH
    assert manifest.facts.second_codec == codec.get_config() == manifest.facts.fingerprint_fields["second_codec"]
    assert codec.bytes_per_view == 3 * WIDTH + 2 + 4  # docs/FORMAT.md
    for view in range(2):
        for record in cache.read(range(IMAGES), view):
            assert record.parts == Parts.FEATURES | Parts.LOGITS | Parts.SECOND
            assert len(record.second) == codec.bytes_per_view
    assert manifest.fidelity["pooled_cosine"]["count"] == 2 * IMAGES
    assert manifest.fidelity["pooled_cosine"]["p1"] > 0.9999
    found = verify_deep(cache.root)
    assert found.findings.problems == []
    assert found.agreement.figures["pooled_cosine"]["p1"] > 0.9999
    for number, view in format_reader.read_cache(cache.root).items():
        decoded = decode_pooled(codec, cache.read(range(IMAGES), number))
        assert np.allclose(np.stack([record.second for record in view]), decoded, rtol=1e-6, atol=1e-6)
    capsys.readouterr()
    call(inspect_cache, ["--cache", cache.root, "--index", 3, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["pooled"]["width"], shown["bytes"]["second"]) == (WIDTH, codec.bytes_per_view)


@pytest.mark.parametrize("codec", ["int8", "float16", "float32"])
def test_cached_is_live_within_the_bound_of_the_codec(codec):
    cache = finished(codec=codec)
    second = second_codec_from_config(cache.manifest.facts.second_codec)
    assert second.id == codec
    _, live, cached = batches(cache)
    assert live.pooled.shape == cached.pooled.shape == (IMAGES, WIDTH)
    bound = second.error_bound(live.pooled[..., None, None]).flatten(1)
    noise = 1e-5 * live.pooled.abs().max()  # other batch sizes round differently
    assert ((cached.pooled - live.pooled).abs() <= bound + noise).all()


@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "transform", "float16", "bfloat16", "float32"])
def test_its_codec_follows_from_that_of_the_maps(name):
    codec = pooled_codec(name, 100)
    assert codec.id == (name if "float" in name else "int8")
    assert codec.shape == (100, 1, 1)
    assert pooled_codec(name, 0) is None
    values = torch.randn(3, 100, 1, 1) * torch.tensor([1e-3, 1.0, 200.0])[:, None, None, None]
    decoded = codec.decode(codec.encode(values))
    assert ((decoded.features - values).abs() <= codec.error_bound(values)).all()
    assert torch.allclose(decoded.norms[:, 0, 0, 0], values.flatten(1).norm(dim=1), rtol=1e-2)


def test_sparse_caches_have_it_in_every_view():
    cache = finished(share=0.5)
    records = cache.read(range(IMAGES), 1)
    assert sum(bool(record.features) for record in records) == IMAGES // 2
    assert [record.second for record in records] == [one.second for one in finished().read(range(IMAGES), 1)]
    batch = next(iter(CachedTargets(cache, batch_size=8)))
    assert (len(batch.targets.features), batch.targets.pooled.shape) == (4, (8, WIDTH))
    assert verify_deep(cache.root).findings.problems == []


def test_growth_and_shared_pixels(tmp_path):
    root = tmp_path / "cache"
    shutil.copytree(finished().root, root)
    before = unit_files(root)
    grown = make(root, None, **changes({"num_views": 4}))
    assert before.items() <= unit_files(root).items()
    shared = make(tmp_path / "other", None, **changes({"codec": "float16", "pixels_from": str(root)}))
    assert shared.manifest.facts.second_codec["id"] == "float16"
    codecs = [second_codec_from_config(cache.manifest.facts.second_codec) for cache in (grown, shared)]
    for view in (0, 1):
        pairs = zip(grown.read(range(IMAGES), view), shared.read(range(IMAGES), view), strict=True)
        for records in pairs:
            rows = [torch.from_numpy(codec.unpack([one.second])) for codec, one in zip(codecs, records, strict=True)]
            one, other = (codec.decode(row).features for codec, row in zip(codecs, rows, strict=True))
            assert torch.allclose(one, other, atol=1e-2)
    assert all(record.second for record in grown.read(range(IMAGES), 3))
    assert verify_deep(shared.root).findings.problems == verify_deep(root).findings.problems == []


def without(record):
    return record._replace(second=b"")


def short(record):
    return record._replace(second=record.second[:-1])


def negated(record):
    codec = pooled_codec("int8", WIDTH)
    values = codec.decode(torch.from_numpy(codec.unpack([record.second]))).features
    return record._replace(second=codec.pack(codec.encode(-values).numpy())[0])


@pytest.mark.parametrize(
    ("change", "text"),
    [(without, "0 bytes"), (short, "197 bytes"), (negated, "pooled embeddings: cosine -")],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_ones_with_valid_checksums_are_found_and_repaired(tmp_path, backend, change, text):
    root = tmp_path / "cache"
    shutil.copytree(finished(backend).root, root)
    original = unit_files(root)
    rewrite_unit(root, change, range_id=1)
    found = verify_deep(root, records=2 * IMAGES)
    assert len(found.findings.problems) == 2 * SHARD
    assert all(problem.unit == (0, 1) for problem in found.findings.problems)
    assert all(re.search(text, problem.what) for problem in found.findings.problems)
    if change is not negated:
        with pytest.raises(UserError, match=r"pooled embedding|record's features are damaged"):
            list(CachedTargets(root, batch_size=IMAGES))
    assert repair_cache(root, CPU).left == []
    assert unit_files(root) == original


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields["teacher"]["spec"].pop("pooled"),
        lambda fields: fields["second_codec"].update(shape=[WIDTH - 1, 1, 1]),
        lambda fields: fields.update(second_codec={}),
        lambda fields: fields["second_codec"].update(id="transform"),
    ],
)
def test_manifests_that_contradict_themselves(tmp_path, change):
    root = tmp_path / "cache"
    shutil.copytree(finished().root, root)
    reseal(root / "manifest.json", change)
    with pytest.raises(UserError, match="is inconsistent"):
        read_manifest(root)


def test_labels_leave_it_out(tmp_path):
    """The same teacher on class folders: no new field, part or figure."""
    data = {"source": "demo", "max_samples": IMAGES}
    cache = make(tmp_path / "cache", None, **{**changes(), "data": data})
    text = (cache.root / "manifest.json").read_text()
    assert '"second_codec": {}' in text
    assert "pooled" not in text
    assert all(Parts.SECOND not in record.parts for record in cache.read(range(IMAGES), 0))
    assert batches(cache)[2].pooled is None


@pytest.mark.parametrize("cache", [{}, {"backend": "zarr", "codec": "float16"}, {"stored_features": 0.5}])
def test_the_planner_counts_it(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(planning, "MAX_EXTRA_S", 0.0)
    kinds = {"backend": "webdataset", "codec": "int8", "share": 1.0}
    kinds |= {"share" if name == "stored_features" else name: value for name, value in cache.items()}
    stored = finished(**kinds).manifest.bytes_per_view
    training = DistillConfig(student=StudentConfig(name="test_resnet"))
    plan = functools.partial(planning.forecast, process=CPU, students=2, epochs=2, gpu="h100", training=training)
    found = plan(options(tmp_path / "cache", None, **changes(cache)))
    for part in ("features", "total"):
        assert found.bytes_per_view[part] == pytest.approx(stored[part], rel=0.03)
    missing = {"pretrained": True, "weights_dir": str(tmp_path), "num_classes": 0}
    monkeypatch.setattr(planning, "find_weights", lambda config: config)
    known = changes(cache)
    unknown = plan(options(tmp_path / "cache", None, **{**known, "teacher": {**known["teacher"], **missing}}))
    assert not unknown.teacher_available
    assert unknown.bytes_per_view["features"] == found.bytes_per_view["features"]


def test_the_memory_of_a_step_has_its_head():
    training = DistillConfig(student=StudentConfig(name="test_resnet"), scalekd=ScaleKDConfig(projector="lite"))
    training = training.on_data(classes=0)
    with torch.device("meta"):
        teacher = meta_teacher("test_vit", 64, 0)
        width = build_student(training.student, num_classes=0, image_size=64).pooled_width
        without_it, with_it = (step_memory(training, teacher, 64, 0, pooled)["weights"] for pooled in (0, WIDTH))
    assert with_it - without_it == 4 * (width + 1) * WIDTH


@pytest.mark.parametrize(
    "taps", [{}, {"s4": False}, {"s3": False, "s4": False}], ids=lambda taps: "without " + " ".join(taps)
)
@pytest.mark.parametrize("projector", ["cap", "lite", "linear"])
def test_students_learn_it(projector, taps):
    """Also without feature losses: no other term reaches the last layers."""
    cache = finished(share=0.5)
    targets = CachedTargets(cache, batch_size=8)
    torch.manual_seed(0)
    student = timm_student("test_resnet", targets)
    loss = ScaleKDLoss(targets, student, ScaleKDConfig(projector=projector, s4_query="learned", **taps))
    batch = next(iter(targets))
    terms = loss(*student(batch.images), batch.labels, batch.targets)
    assert 0 < terms.pooled <= 4 * 0.08 * 49
    terms.total.backward()
    assert all(value.grad is not None for value in loss.heads.parameters())
    assert all(value.grad is not None for value in student.model.layer4.parameters())
    assert terms.label == 0
