"""The study without training: pairing, confidence intervals, resuming after a kill."""

import json
import math

import pytest
import torch
from scipy import stats

from benchmarks.study import __main__ as study
from benchmarks.study.cifar10 import CLASSES, first_of_each
from benchmarks.study.evaluation import decoded_norms, noise_for_bytes, without_dither
from benchmarks.study.finetune_teacher import timm_name_of
from benchmarks.study.plan import ARMS, CACHES, CIFAR, DEMO, DEMO_SHORT, SUITES, Question, Run, runs_of
from benchmarks.study.statistics import append_line, interval, mean_and_std, paired, read_lines
from scalekd_cache.codec.base import feature_norms
from scalekd_cache.codec.transform_fit import fit
from scalekd_cache.config.recipes import recipe_file
from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.models.teacher import load_teacher

CPU = torch.device("cpu")


def line(arm, seed, top1, student="a", **more):
    return {"setting": "demo", "student": student, "arm": arm, "seed": seed, "steps": 8, "top1": top1, **more}


def test_pairs_share_student_and_seed():
    lines = [
        line("live", 0, 90.0),
        line("live", 1, 80.0),
        line("live", 3, 10.0),
        line("live", 1, 70.0, student="b"),
        line("cached", 1, 82.0),
        line("cached", 0, 91.0),
        line("cached", 2, 50.0),
    ]
    assert paired(lines, "cached", "live") == [1.0, 2.0]  # by seed; seeds 2 and 3 and student b have no partner
    assert paired(lines, "cached", "live", "held_out_loss") == []


def test_runs_of_other_lengths_are_not_paired():
    assert paired([line("live", 0, 90.0), {**line("cached", 0, 91.0), "steps": 9}], "cached", "live") == []


def test_interval_is_that_of_a_paired_t_test():
    ours, theirs = [91.0, 92.5, 90.0, 93.0], [90.5, 92.0, 90.5, 91.0]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = interval(differences)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(0.625)
    assert found.pairs == 4


def test_one_pair_establishes_nothing():
    found = interval([0.0])
    assert found.low == -math.inf
    assert not found.inside(0.5)
    with pytest.raises(ValueError, match="no pair"):
        interval([])


def test_inside_needs_both_ends():
    assert interval([0.1, 0.0, -0.1]).inside(0.5)
    assert not interval([0.6, 0.5, 0.4]).inside(0.5)
    assert not interval([-0.6, -0.5, -0.4]).inside(0.5)


def test_mean_and_spread_over_seeds():
    assert mean_and_std([line("live", 0, 90.0), line("live", 1, 92.0)], "live") == (91.0, pytest.approx(2**0.5), 2)
    assert mean_and_std([line("live", 0, 90.0)], "cached")[2] == 0


@pytest.mark.parametrize("setting", [one for suite in SUITES.values() for one in suite], ids=lambda one: one.name)
def test_plan_is_whole(setting):
    runs = runs_of(setting)
    keys = [run.key for run in runs]
    assert len(set(keys)) == len(keys)
    assert f"V={setting.epochs}" not in {run.arm for run in runs}, "this arm is called `cached`"
    for run in runs:
        assert ARMS[run.arm].cache in CACHES
        assert (ARMS[run.arm].views or 1) <= setting.epochs
    assert recipe_file(setting.recipe)
    for question in setting.questions:  # every arm has a partner with the same seed
        for seed in range(question.seeds):
            for student in question.students or (setting.student,):
                assert Run(setting.name, student, question.against, seed) in runs


def test_cached_against_live_comes_first_with_five_pairs():
    for setting in (DEMO, CIFAR):
        first = setting.questions[0]
        assert (first.against, first.arms[0]) == ("live", "cached")
        assert first.seeds >= 5


@pytest.mark.parametrize(("cache", "channels"), [("teacher-narrow", 64), ("teacher-wide", 256)])
def test_teachers_of_other_widths(cache, channels):
    specs = [
        load_teacher(TeacherConfig(name=name, pretrained=False), image_size=64, num_classes=10, device=CPU).spec
        for name in ("demo_swin", CACHES[cache].teacher.name)
    ]
    assert [spec.feature_shape for spec in specs] == [(128, 4, 4), (channels, 4, 4)]
    assert specs[0].mean == specs[1].mean


def test_the_short_form_is_a_subset_of_the_long_one():
    assert len(runs_of(DEMO_SHORT)) <= 24
    assert set(runs_of(DEMO_SHORT)) < set(runs_of(DEMO))
    smallest = {question.name: question for question in DEMO_SHORT.questions}["smallest codec"]
    assert (smallest.against, smallest.seeds) == ("live", 5)


def test_questions_share_runs():
    twice = DEMO._replace(questions=(Question("a", "live", ("cached",), 2), Question("b", "cached", ("V=1",), 1)))
    assert [run.arm for run in runs_of(twice)] == ["live", "cached", "live", "cached", "V=1"]


def study_paths(folder):
    return study.StudyPaths(folder / "work", folder / "results", "data", "teacher.safetensors")


def test_a_killed_study_resumes_with_runs_without_result_line(tmp_path):
    runs = runs_of(DEMO)
    file = tmp_path / "results" / "demo.jsonl"
    append_line(file, {"key": runs[0].key})
    with file.open("a") as stream:
        stream.write(json.dumps({"key": runs[1].key})[:-4])  # cut off by a kill
    assert study.pending(DEMO, study_paths(tmp_path)) == runs[1:]
    append_line(file, {"key": runs[1].key})
    assert [one["key"] for one in read_lines(file)] == [runs[0].key, runs[1].key]
    assert study.pending(DEMO, study_paths(tmp_path)) == runs[2:]


def test_a_finished_run_leaves_a_line_and_no_folder(tmp_path, monkeypatch):
    done = []

    def train(setting, run, where, evaluators):
        study.run_folder(run, where).mkdir(parents=True, exist_ok=True)
        done.append(run)
        if len(done) == 3:
            raise KeyboardInterrupt
        return {**line(run.arm, run.seed, 90.0, run.student), "key": run.key, "wall_s": 1.0, "held_out_loss": None}

    monkeypatch.setattr(study, "train", train)
    setting = DEMO._replace(questions=(Question("a", "live", ("cached",), 2),))
    with pytest.raises(KeyboardInterrupt):
        study.run_pending([setting], study_paths(tmp_path), math.inf)
    assert not study.run_folder(done[0], study_paths(tmp_path)).exists()
    assert study.run_folder(done[2], study_paths(tmp_path)).exists()
    assert study.run_pending([setting], study_paths(tmp_path), math.inf)
    assert done == [*runs_of(setting)[:3], *runs_of(setting)[2:]]


def test_no_run_starts_that_would_exceed_the_time_limit(tmp_path, monkeypatch):
    append_line(
        tmp_path / "results" / "demo.jsonl", {**line("live", 9, 1.0, "test_resnet"), "key": "x", "wall_s": 50.0}
    )
    monkeypatch.setattr(study, "train", lambda *_: pytest.fail("started"))
    setting = DEMO._replace(questions=(Question("a", "live", (), 1),))
    assert not study.run_pending([setting], study_paths(tmp_path), 40.0)


def test_arms_of_one_seed_differ_only_in_the_tested_option(tmp_path):
    def words(arm):
        return study.stage2_command(DEMO, Run("demo", "test_resnet", arm, 2), study_paths(tmp_path))

    cached, one_view = words("cached"), words("V=1")
    added = one_view.index("--train.views")
    assert one_view[added : added + 2] == ["--train.views", "1"]
    rest = one_view[:added] + one_view[added + 2 :]
    folder = cached.index("--run") + 1
    assert cached[:folder] + cached[folder + 1 :] == rest[:folder] + rest[folder + 1 :]
    assert cached[folder] != rest[folder]


def test_codecs_share_the_pixels_of_the_default_cache(tmp_path):
    words = study.stage1_command(CIFAR, "economy", study_paths(tmp_path), CACHES["economy"].options)
    assert words[words.index("--cache.pixels_from") + 1].endswith("cifar10/caches/default")
    assert words[words.index("--cache.codec") + 1] == "transform-economy"
    own = study.stage1_command(CIFAR, "default", study_paths(tmp_path), ())
    assert own[own.index("--data.source") + 1] == "data"


def maps(count):
    spectrum = 0.7 ** torch.arange(16.0)[:, None, None]
    return torch.randn(count, 16, 4, 4, generator=torch.Generator().manual_seed(0)) * spectrum


def test_rounded_arms_have_no_dither():
    def decoded(seed):
        codec = fit(maps(64), 0.05)
        return codec.decode(codec.encode(maps(2), torch.tensor([seed, seed + 1]))).features

    with without_dither():
        assert torch.equal(decoded(1), decoded(1000))
    assert not torch.equal(decoded(1), decoded(1000)), "the patch was not undone"


def test_own_norms_are_those_of_the_decoded_map():
    codec = fit(maps(64), 0.05)
    codes = codec.encode(maps(2), torch.tensor([1, 2]))
    stored = codec.decode(codes)
    with decoded_norms():
        own = codec.decode(codes)
    assert torch.equal(own.features, stored.features)
    assert torch.allclose(own.norms, feature_norms(own.features))
    assert not torch.allclose(own.norms, stored.norms, rtol=1e-4)


def test_bit_arms_have_the_requested_size():
    features = maps(128)
    noise = noise_for_bytes(features, 200.0)
    codec = fit(features[::2].contiguous(), noise)
    records = codec.pack(codec.encode(features[1::2].contiguous(), torch.arange(64)).numpy())
    assert sum(map(len, records)) / 64 == pytest.approx(200, rel=0.03)
    with pytest.raises(ValueError, match="20 bytes per view: the transform codec takes"):
        noise_for_bytes(features, 20.0)


def test_a_subset_is_balanced():
    images = ((None, number % 7 % len(CLASSES)) for number in range(700))
    kept = list(first_of_each(images, 70))
    assert [sum(label == wanted for _, _, label in kept) for wanted in range(8)] == [7] * 7 + [0]
    assert [position for position, _, _ in kept] == list(range(49))


def test_names_of_the_published_encoder_map_to_timm_names():
    names = {
        "image_encoder.patch_embed.seq.0.c.weight": "patch_embed.conv1.conv.weight",
        "image_encoder.layers.0.downsample.conv1.bn.bias": "stages.1.downsample.conv1.bn.bias",
        "image_encoder.layers.3.blocks.1.mlp.fc1.weight": "stages.3.blocks.1.mlp.fc1.weight",
        "image_encoder.norm_head.weight": "head.norm.weight",
        "image_encoder.head.weight": None,
        "image_encoder.neck.0.weight": None,
        "mask_decoder.iou_token.weight": None,
    }
    assert {name: timm_name_of(name) for name in names} == names
