"""The price list: a valid plan, the ablation of whole micro-batches, and one tiny run."""

import json
import math

import pytest
import torch
from small_cache import CPU
from small_trainer import config_of, trainer_of

from benchmarks.price_list import costs, figures
from benchmarks.price_list import plan as plans
from benchmarks.study import __main__ as study
from benchmarks.study import evaluation
from benchmarks.study.plan import Question, runs_of
from benchmarks.study.statistics import append_line, paired, read_lines
from scalekd_cache.scalekd.losses import TermWeights
from scalekd_cache.training.trainer import start_processes

STEPS = {"seconds": {"cap-1": 0.3, "baseline": 0.1, "cap-0.25": 0.15, "cap-0.25-equal-cost": 0.15}}


@pytest.mark.parametrize("setting", plans.SETTINGS.values(), ids=lambda one: one.name)
def test_plan_is_whole(setting):
    runs = runs_of(setting)
    assert len({run.key for run in runs}) == len(runs)
    for run in runs:
        arm = setting.arms[run.arm]
        train = costs.config_of(setting, arm).train
        assert train.global_batch_size % train.micro_batch_size == 0
        assert (train.global_batch_size // train.micro_batch_size) % arm.heads_every == 0
        assert setting.epochs_of(run.arm) >= 1
        assert "/" not in run.arm


def test_every_arm_of_a_method_exists():
    arms = {name for setting in plans.SETTINGS.values() for name in setting.arms}
    for group in (*figures.METHODS.values(), *(group for curves in figures.LONGER.values() for group in curves)):
        assert set(group) <= arms


def test_the_first_question_has_eight_paired_seeds():
    first = runs_of(plans.DEMO)[: 8 * (1 + len(plans.FIRST))]
    assert {(run.arm, run.seed) for run in first} == {
        (arm, seed) for arm in ("cap-1", *plans.FIRST) for seed in range(8)
    }


def test_arms_of_other_lengths_are_paired_only_on_request():
    lines = [
        {"setting": "demo", "student": "a", "seed": 0, "arm": arm, "steps": steps, "top1": top1}
        for arm, steps, top1 in (("cap-1", 8, 90.0), ("longer", 12, 91.0))
    ]
    assert paired(lines, "longer", "cap-1") == []
    assert paired(lines, "longer", "cap-1", same_steps=False) == [1.0]


def test_whole_micro_batches_have_the_features_of_one_in_four():
    start_processes(CPU)
    trainer = trainer_of(config_of(train={"epochs": 1}))
    batch, model = next(iter(trainer.loader)), trainer.model.eval()
    inputs = (batch.images, batch.labels, [source(batch) for source in trainer.targets], trainer.tails)
    plain = model(*inputs).terms
    with evaluation.heads_on_one_of(4):
        terms = [model(*inputs).terms for _ in range(8)]
    for name in TermWeights._fields:
        means = torch.stack([getattr(one, name) for one in terms]).reshape(2, 4).mean(1)
        assert torch.allclose(means, getattr(plain, name))
        assert all(getattr(one, name) == 0 for number, one in enumerate(terms) if number % 4)
    assert all(one.logit == plain.logit and one.label == plain.label for one in terms)
    assert torch.equal(torch.stack(model(*inputs).terms), torch.stack(plain)), "the patch was not undone"


def test_a_tiny_price_list(tmp_path, monkeypatch):
    """Cache, cost of a step and two runs through the real commands; then tables and chart."""

    class NoLosses:
        def __init__(self, *_):
            pass

        def losses(self, folder):
            return None

    monkeypatch.setattr(evaluation, "HeldOutLosses", NoLosses)
    monkeypatch.setattr(costs, "REPEATS", 1)
    tiny = plans.DEMO._replace(
        epochs=1,
        views=1,
        stage1=("data.max_samples=32", "cache.views_per_group=1", "teacher.pretrained=false"),
        stage2=("train.global_batch_size=16", "train.micro_batch_size=16"),
        arms={**plans.DEMO.arms, "cap-0.25-equal-cost": plans.heads(share=0.25, length=2.0)},
        questions=(Question("price", "baseline", ("cap-0.25",), 1),),
    )
    paths = study.StudyPaths(tmp_path / "work", tmp_path / "results", None, None)
    seconds = costs.measure(tiny, study.make_cache(tiny, "default", paths), paths.results / "demo-steps.json")
    assert set(seconds) == {"baseline", "cap-0.25"}
    assert study.run_pending([tiny], paths, math.inf)
    lines = read_lines(paths.results / "demo.jsonl")
    assert [(line["arm"], line["steps"]) for line in lines] == [("baseline", 2), ("cap-0.25", 2)]
    assert study.pending(tiny, paths) == []
    assert not any((tmp_path / "work" / "demo" / "runs").iterdir())


def test_tables_and_chart_from_lines_only(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "flops_table", lambda _: "")
    (tmp_path / "demo-steps.json").write_text(json.dumps(STEPS))
    for seed, arm in ((seed, arm) for seed in range(3) for arm in STEPS["seconds"]):
        steps = 12 if arm.endswith("equal-cost") else 8
        append_line(tmp_path / "demo.jsonl", {
            "setting": "demo", "student": "a", "arm": arm, "seed": seed, "epochs": steps, "steps": steps, "cpu_s": 1.0,
            "top1": 90.0 + seed + len(arm) / 10, "held_out": None, "teacher_top1": 98.0,
        })  # fmt: skip
    figures.draw(tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "| cap-0.25-equal-cost | 12 | 12 | 1.50 | 2.25 |" in text
    assert "| cap-0.25 - cap-1 | 3 | +0.30 [+0.30, +0.30] | within ±0.5 |" in text
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_flops_fall_with_the_share():
    ratios = costs.flops("demo_swin", "test_resnet", names=("cap",), shares=(1.0, 0.25))
    assert ratios["cap"]["1"] > ratios["cap"]["0.25"] > 1
