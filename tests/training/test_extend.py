"""Extending a run: exact if the schedule does not depend on the number of epochs, and never by accident."""

import dataclasses
import json
import shutil

import pytest
import yaml
from commands import metric_lines, steps_of
from safetensors.torch import load_file
from small_cache import CPU, shared_cache

from scalekd_cache.config.stage2 import (
    FEW_CLASSES_WEIGHTS,
    PUBLISHED_WEIGHTS,
    DistillConfig,
    OptimConfig,
    StudentConfig,
    TrainConfig,
)
from scalekd_cache.errors import UserError
from scalekd_cache.training.dry_run import plan_distill
from scalekd_cache.training.optim import describe_extension, learning_rate
from scalekd_cache.training.run import distill
from scalekd_cache.training.run_files import read_config, read_summary

STEPS = 3
"""Steps per epoch: 96 images in batches of 32."""


def config_of(run, epochs, *, schedule="constant", extend=False, **changes):
    return DistillConfig(
        cache=str(shared_cache().root),
        run=str(run),
        extend=extend,
        student=StudentConfig(name="test_resnet"),
        optim=OptimConfig(
            name="adamw", lr=1e-3, base_batch_size=32, schedule=schedule, warmup_epochs=0.5, cycle_epochs=1
        ),
        train=TrainConfig(epochs=epochs, global_batch_size=32, micro_batch_size=16, log_every=1),
        **changes,
    )


def losses(run):
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in steps_of(run)]


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    """A finished run of one epoch; tests work on copies."""
    run = tmp_path_factory.mktemp("runs") / "run"
    distill(config_of(run, 1), CPU)
    return run


def copy_of(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_is_extended_exactly(one_epoch, tmp_path, capsys):
    whole, run = tmp_path / "whole", copy_of(one_epoch, tmp_path)
    expected = distill(config_of(whole, 2), CPU)
    before = read_summary(run)
    with pytest.raises(UserError) as error:
        distill(config_of(run, 2), CPU)
    assert str(error.value).splitlines()[0] == f"{run} contains a run of 1 epoch, not 2"
    assert f"to resume it: scalekd distill --run {run} --resume; " in str(error.value)
    assert "to extend it, set --extend" in str(error.value)
    assert f"--init {run}" in str(error.value)
    assert "would resume after step 3" in plan_distill(config_of(run, 2, extend=True), CPU)[-1]
    assert read_summary(run) == before
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    capsys.readouterr()
    summary = distill(config_of(run, 2, extend=True), CPU)
    assert "with the constant schedule, the result is the same as 2 epochs from the start" in capsys.readouterr().out
    assert losses(run) == losses(whole)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert [line["step"] for line in metric_lines(run) if "top1" in line] == [STEPS, 2 * STEPS]
    assert summary["minutes"] >= before["minutes"]
    for name in ("top1", "epochs", "steps"):
        assert summary[name] == expected[name]
    ours, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (run, whole))
    assert all(ours[name].equal(theirs[name]) for name in ours.keys() | theirs.keys())
    assert "| epochs | `2` |" in (run / "export" / "README.md").read_text()
    assert read_config(run)["train"]["epochs"] == 2
    assert distill(config_of(run, 2), CPU) == summary  # with or without the option, it is a run of 2 epochs now
    with pytest.raises(UserError, match="a run of 2 epochs, not 1"):
        distill(config_of(run, 1, extend=True), CPU)


def test_a_run_from_before_the_rule_keeps_the_published_weights(one_epoch, tmp_path):
    run, note = copy_of(one_epoch, tmp_path), "feature weights: spatial 0.005, frequency 0.004 and 0.004, the defaults"
    stored = read_config(run)
    assert FEW_CLASSES_WEIGHTS.items() <= stored["scalekd"].items()
    assert note in "\n".join(plan_distill(config_of(run, 2, extend=True), CPU))
    stored["scalekd"] |= PUBLISHED_WEIGHTS
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    said = plan_distill(config_of(run, 2, extend=True), CPU)
    assert "would resume after step 3" in said[-1]
    assert note not in "\n".join(said)


@pytest.mark.parametrize("kept", ["summary.json", "export"])
def test_a_job_killed_while_it_extends_is_resumed_by_a_rerun(one_epoch, tmp_path, monkeypatch, kept):
    """Killed after the new number of epochs was written: before the summary is removed, and before the first step."""
    run = copy_of(one_epoch, tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    places = {"summary.json": "run_folder.RunFolder.reopen", "export": "trainer.Trainer.train"}
    with monkeypatch.context() as patch:
        patch.setattr(f"scalekd_cache.training.{places[kept]}", killed)
        with pytest.raises(KeyboardInterrupt):
            distill(config_of(run, 2, extend=True), CPU)
    assert (run / kept).exists()
    assert distill(config_of(run, 2), CPU)["epochs"] == 2
    assert len(losses(run)) == 2 * STEPS
    assert [line["step"] for line in metric_lines(run) if "top1" in line] == [STEPS, 2 * STEPS]


def test_without_a_checkpoint_only_the_weights_remain(one_epoch, tmp_path):
    run = copy_of(one_epoch, tmp_path)
    shutil.rmtree(run / "checkpoints")
    before = json.loads((run / "summary.json").read_text())
    advice = f"it has no checkpoint\n  what to do: to start a new run from its weights, set --init {run} and"
    with pytest.raises(UserError, match=advice):
        distill(config_of(run, 2, extend=True), CPU)
    assert json.loads((run / "summary.json").read_text()) == before
    with pytest.raises(UserError, match="different options"):
        distill(config_of(run, 2, extend=True, schedule="step"), CPU)
    assert distill(config_of(tmp_path / "new", 1, init=str(run)), CPU)["epochs"] == 1


def test_what_is_said_of_each_schedule(tmp_path):
    for schedule in ("step", "constant", "restarts"):
        long, short = (config_of(tmp_path, epochs, schedule=schedule) for epochs in (4, 2))
        assert "the same as 4 epochs" in describe_extension(long, 2, 2 * STEPS, STEPS)
        for warmup in (0.5, 3):  # within the short run, and longer than it
            both = [
                dataclasses.replace(c, optim=dataclasses.replace(c.optim, warmup_epochs=warmup)) for c in (long, short)
            ]
            rates = [[learning_rate(config, step, STEPS) for step in range(2 * STEPS)] for config in both]
            assert rates[0] == rates[1]
    cosine = config_of(tmp_path, 4, schedule="cosine")
    assert "changes from 0.000146 to 0.000655;" in describe_extension(cosine, 2, 2 * STEPS, STEPS)
    same = dataclasses.replace(cosine.optim, warmup_epochs=0.0, min_lr=1.0)
    assert "stays at 0.001;" in describe_extension(dataclasses.replace(cosine, optim=same), 2, 2 * STEPS, STEPS)
    assert "the result is the same" in describe_extension(cosine, 2, 0, STEPS)


def test_restarts_and_constant_rates(tmp_path):
    config = config_of(tmp_path, 3, schedule="restarts")
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_epochs=0.0))
    rates = [learning_rate(config, step, STEPS) for step in range(3 * STEPS)]
    assert rates[:STEPS] == rates[STEPS : 2 * STEPS] == rates[2 * STEPS :]
    assert rates[0] > rates[1] > rates[2] > 0
    constant = dataclasses.replace(config, optim=dataclasses.replace(config.optim, schedule="constant"))
    assert {learning_rate(constant, step, STEPS) for step in (0, 1, 10**6)} == {1e-3}
