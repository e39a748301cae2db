"""--codec auto: the table and the selection, which happens only once."""

import json

import pytest
import torch
from small_cache import CPU, make, options, shared_weights, unit_files

from scalekd_cache.caching.codec_selection import choose_codec, codec_options, codec_table, write_codec_choice
from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.codec import codec_from_config, variance_classes
from scalekd_cache.config.stage1 import StoreConfig, TeacherConfig
from scalekd_cache.config.target import parse_target
from scalekd_cache.errors import UserError
from scalekd_cache.models.teacher import load_teacher
from scalekd_cache.store.verify import CODEC_FILE, verify_cache


@pytest.fixture(autouse=True)
def fewer_classes(monkeypatch):
    """Fit with fewer classes, in a fifth of the time."""
    monkeypatch.setattr(variance_classes, "BINS", 12)


@pytest.fixture(scope="module")
def teacher():
    config = TeacherConfig(weights=str(shared_weights()))
    return load_teacher(config, image_size=64, num_classes=10, device=CPU.device)


@pytest.fixture(scope="module")
def outputs(teacher):
    images = torch.randint(0, 256, (60, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return teacher(images)


def test_targets_are_read_and_mistypes_named():
    assert parse_target("ac-cosine:0.9990").text == "ac-cosine:0.999"
    assert parse_target("bytes:2e4") == ("bytes", 20000.0)
    for text, words in {
        "ac-cosin:0.9": "ac-cosine",
        "cosine:0.9": "ac-cosine",
        "ac-cosine:1": "below 1",
        "ac-cosine": "NUMBER is above 0 and below 1",
        "kl:-1": "above 0",
        "bytes:many": "bytes:20000",
        "kl:nan": "above 0",
    }.items():
        with pytest.raises(UserError, match=r"--target|codec.target") as error:
            StoreConfig(codec="auto", codec_target=text)
        assert words in str(error.value)
    for fields in ({"codec": "auto"}, {"codec": "int8", "codec_target": "kl:0.01"}):
        with pytest.raises(UserError, match=r"codec=auto needs a target|applies only to --codec auto"):
            StoreConfig(**fields)


@pytest.mark.parametrize("text", ["ac-cosine:0.995", "kl:0.0001", "bytes:1500"])
def test_the_best_that_meets_is_chosen(teacher, outputs, text):
    target = parse_target(text)
    choice = choose_codec(outputs.features, outputs.logits, teacher, target)
    rows = choice.rows
    assert [row.bytes for row in rows] == sorted(row.bytes for row in rows)
    assert {"int8", "int4", "fp8", "float16", "bfloat16", "float32", "transform"} == {row.codec for row in rows}
    value = {"ac-cosine": lambda r: -r.cosine_p1, "kl": lambda r: r.kl_p99, "bytes": lambda r: r.bytes}[target.metric]
    bound = -target.value if target.metric == "ac-cosine" else target.value
    for row in rows:
        assert row.meets == (value(row) <= bound)
    meeting = [row for row in rows if row.meets]
    assert len(meeting) < len(rows)
    assert choice.chosen in meeting
    if target.metric == "bytes":
        assert choice.chosen.cosine_p1 == max(row.cosine_p1 for row in meeting)
        assert choice.chosen.bytes > 0.9 * target.value
    else:
        assert choice.chosen == meeting[0]
        # the search reached the adjacent noise level
        assert min(row.noise / choice.chosen.noise for row in rows if row.noise > choice.chosen.noise) < 1.1
    assert choice.codec.get_config()["id"] == choice.chosen.codec
    lines = codec_table(rows, choice.chosen).splitlines()
    assert len(lines) == len(rows) + 1
    assert [line for line in lines if line.startswith("->")] == [lines[1 + rows.index(choice.chosen)]]


def test_nobody_is_judged_by_what_it_was_fitted_to(teacher, outputs, monkeypatch):
    fitted = []
    from scalekd_cache.caching import codec_selection as codec_choice

    fit = codec_choice.fit_moments
    monkeypatch.setattr(codec_choice, "fit_moments", lambda maps: fitted.append(maps) or fit(maps))
    judged = []
    measure = codec_choice.fidelity
    monkeypatch.setattr(codec_choice, "fidelity", lambda a, b: judged.append(a) or measure(a, b))
    target = parse_target("ac-cosine:0.99")
    choice = choose_codec(outputs.features, outputs.logits, teacher, target)
    assert choose_codec(outputs.features, outputs.logits, teacher, target).chosen == choice.chosen
    del fitted[1:]
    of = {maps.numpy().tobytes(): number for number, maps in enumerate(outputs.features)}
    first, second = ({of[m.numpy().tobytes()] for maps in part for m in maps} for part in (fitted, judged))
    assert len(first) == 40
    assert second == set(range(60)) - first


def test_what_cannot_be_chosen_is_said(teacher, outputs):
    with pytest.raises(UserError, match="no codec meets the target") as error:
        choose_codec(outputs.features, outputs.logits, teacher, parse_target("bytes:10"))
    assert "transform" in str(error.value)
    with pytest.raises(UserError, match="too few images"):
        choose_codec(outputs.features[:5], outputs.logits[:5], teacher, parse_target("kl:0.01"))
    vit = load_teacher(
        TeacherConfig(name="vit_tiny_patch16_224", pretrained=False), image_size=64, num_classes=10, device=CPU.device
    )
    images = torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(UserError, match="cannot compute the KL divergence for this teacher"):
        choose_codec(*vit(images)[:2], vit, parse_target("kl:0.01"))


def test_a_cache_keeps_its_choice(tmp_path, monkeypatch, capsys):
    root = tmp_path / "cache"
    auto = {"codec": "auto", "codec_target": "ac-cosine:0.99", "num_views": 1}
    cache = make(root, shared_weights(), cache=auto)
    assert "target ac-cosine:0.99" in capsys.readouterr().out
    mark = json.loads((root / CODEC_FILE).read_text())
    assert mark["codec"] == cache.manifest.facts.codec
    assert len(mark["chosen_from"]) > 10
    assert cache.manifest.fidelity["cosine_mean_removed"]["p1"] > 0.985
    before = unit_files(root)
    from scalekd_cache.caching import codec_selection as calibration

    monkeypatch.setattr(calibration, "select_codec", None)  # the codec is not selected again
    grown = make(root, shared_weights(), cache={**auto, "codec_target": "ac-cosine:0.990", "num_views": 2})
    assert before.items() <= unit_files(root).items()
    assert grown.manifest.facts.codec == cache.manifest.facts.codec
    codec_from_config(grown.manifest.facts.codec, root)
    assert verify_cache(root) == []
    assert codec_options(root) == {"codec": "auto", "codec_target": "ac-cosine:0.99"}  # the options that a repair uses
    for other in ("ac-cosine:0.98", "bytes:900"):
        with pytest.raises(UserError, match="fitted with different options"):
            cache_teacher(options(root, shared_weights(), cache={**auto, "codec_target": other}), CPU)


def test_a_chosen_codec_that_is_not_fitted(tmp_path):
    root = tmp_path / "cache"
    auto = {"codec": "auto", "codec_target": "ac-cosine:0.99999999", "num_views": 1}
    cache = make(root, shared_weights(), cache=auto)
    assert cache.manifest.facts.codec["id"] == "float16"
    assert not (root / "codec.safetensors").exists()
    assert verify_cache(root) == []
    make(root, shared_weights(), cache=auto)
    make(root, shared_weights(), cache={"codec": "float16", "num_views": 1})  # by its name, too
    (root / CODEC_FILE).write_bytes((root / CODEC_FILE).read_bytes().replace(b"auto", b"aut0"))
    assert [problem.where for problem in verify_cache(root)] == [CODEC_FILE]
    write_codec_choice(root, cache.manifest.facts.fingerprint_fields)
    assert verify_cache(root) == []


def test_a_cache_of_a_named_codec_gets_no_other(tmp_path):
    root = tmp_path / "cache"
    make(root, shared_weights(), cache={"num_views": 1})
    for cache in ({"codec": "auto", "codec_target": "kl:0.1"}, {"codec": "transform"}):
        with pytest.raises(UserError, match="made with a different codec"):
            cache_teacher(options(root, shared_weights(), cache=cache), CPU)
    assert not (root / CODEC_FILE).exists()


def test_before_the_plan_a_choice_for_other_options_is_replaced(tmp_path, monkeypatch):
    root = tmp_path / "cache"
    from scalekd_cache.caching import job as stage

    shared_weights()  # stage 1 creates it if this is the first test
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_start", None)  # stops after the codec
        with pytest.raises(TypeError):
            make(root, shared_weights(), cache={"codec": "transform-economy"})
    first = json.loads((root / CODEC_FILE).read_text())
    cache = make(root, shared_weights(), cache={"codec": "transform", "num_views": 1})
    assert first["preset"] == "transform-economy"
    assert cache.manifest.facts.codec["noise"] == 0.0018
