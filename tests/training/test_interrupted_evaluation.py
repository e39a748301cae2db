"""A signal during an evaluation: the checkpoint does not wait for its end, and a rerun does the evaluation."""

import dataclasses
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from commands import LIMIT_S, metric_lines
from small_cache import CPU, shared_cache
from unlabeled_cache import unlabeled_cache

from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.errors import RunInterrupted
from scalekd_cache.models import evaluate
from scalekd_cache.training import held_out_evaluation, watchdog
from scalekd_cache.training import run as run_module
from scalekd_cache.training.run import distill


def config_of(cache, run, checkpoint_epochs):
    return DistillConfig(
        cache=str(cache.root),
        run=str(run),
        student=StudentConfig(name="test_resnet"),
        optim=OptimConfig(name="adamw", lr=1e-3, base_batch_size=32),
        scalekd=ScaleKDConfig(projector="linear"),
        train=TrainConfig(
            epochs=2, global_batch_size=32, micro_batch_size=16, log_every=1, checkpoint_epochs=checkpoint_epochs
        ),
    )


def lines_of(run):
    """The metrics without what depends on time."""
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in metric_lines(run)]


def evaluate_by_eight(monkeypatch, signal_in=0, batch_s=0.0):
    """Evaluate eight images at a time, each in at least `batch_s` seconds (above 1: only the first); send a signal in
    the first batch of the evaluation with this number.

    Returns:
        For each evaluation, the sizes of its batches.
    """
    original, evaluations = evaluate.center_views, []

    def center_views(source, indices, size, **options):
        evaluations.append(batches := [])
        for batch in original(source, indices, size, **{**options, "batch_size": 8}):
            batches.append(len(batch.indices))
            time.sleep(batch_s if batch_s < 1 or (len(evaluations), len(batches)) == (1, 1) else 0)
            if len(evaluations) == signal_in and len(batches) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    for module in (evaluate, held_out_evaluation):
        monkeypatch.setattr(module, "center_views", center_views)
    return evaluations


@pytest.mark.parametrize(
    ("make_cache", "number", "checkpoint_epochs"),
    [
        pytest.param(shared_cache, 1, 2, id="no-checkpoint-of-this-epoch"),
        pytest.param(unlabeled_cache, 2, 1, id="final-held-out"),
        pytest.param(shared_cache, 1, 1, id="checkpoint-of-this-epoch", marks=pytest.mark.slow),
        pytest.param(shared_cache, 2, 1, id="final", marks=pytest.mark.slow),
        pytest.param(unlabeled_cache, 1, 1, id="held-out", marks=pytest.mark.slow),
    ],
)
def test_the_run_stops_at_once_and_the_rerun_evaluates(tmp_path, monkeypatch, make_cache, number, checkpoint_epochs):
    run, whole = tmp_path / "run", tmp_path / "whole"
    config = config_of(make_cache(), run, checkpoint_epochs)
    evaluate_by_eight(monkeypatch)
    expected = distill(dataclasses.replace(config, run=str(whole)), CPU)
    monkeypatch.undo()
    evaluations = evaluate_by_eight(monkeypatch, signal_in=number)
    step = number * expected["steps"] // 2
    with pytest.raises(RunInterrupted, match=f"SIGTERM: checkpoint saved at step {step} of") as stop:
        distill(config, CPU)
    assert (stop.value.exit_code, evaluations[-1]) == (75, [8])
    monkeypatch.undo()
    evaluate_by_eight(monkeypatch)
    summary = distill(config, CPU)
    assert lines_of(run) == lines_of(whole)
    same = ("top1", "held_out", "steps")
    assert {name: summary.get(name) for name in same} == {name: expected.get(name) for name in same}


@pytest.mark.parametrize("batch_s", [0.25, 4.0])
def test_the_timeout_applies_to_a_batch_not_to_the_evaluation(tmp_path, monkeypatch, batch_s):
    """An evaluation of 64 images takes longer than the timeout of 1.5 s; only a batch that takes longer is stalled."""
    evaluations, ended = evaluate_by_eight(monkeypatch, batch_s=batch_s), []
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    config = config_of(shared_cache(), tmp_path / "run", 1)
    distill(dataclasses.replace(config, train=dataclasses.replace(config.train, timeout_minutes=1.5 / 60)), CPU)
    assert len(evaluations) == 2
    assert len(evaluations[0]) * batch_s > 1.5
    assert bool(ended) == (batch_s > 1.5)


@pytest.mark.parametrize("describe", [lambda step, micro: {}[step], lambda step, micro: time.sleep(60)])
def test_a_stalled_process_exits_even_if_it_cannot_say_where_it_is(monkeypatch, describe):
    ended = threading.Event()

    def end(status):
        ended.set()
        sys.exit(status)  # only this thread

    monkeypatch.setattr(watchdog, "REPORT_S", 0.1)
    monkeypatch.setattr(watchdog.os, "_exit", end)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    guarded = watchdog.Watchdog(CPU, SimpleNamespace(step=0, describe=describe))
    monkeypatch.setattr(guarded, "_peers", SimpleNamespace(get=lambda name: "0"))
    with guarded.guard(0.1):
        assert ended.wait(LIMIT_S)


def test_a_node_that_is_lost_in_the_final_evaluation_can_be_resumed(tmp_path, monkeypatch):
    def lost(*args, **kwargs):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4711")

    monkeypatch.setattr(run_module, "evaluate_state", lost)
    monkeypatch.setattr(watchdog.Watchdog, "_is_lost_peer", lambda self, error: "Connection closed" in str(error))
    config = config_of(shared_cache(), tmp_path / "run", 1)
    train = dataclasses.replace(config.train, epochs=1, targets="none")
    with pytest.raises(RunInterrupted, match=r"Connection closed(.|\n)*rerun the same command") as stop:
        distill(dataclasses.replace(config, train=train), CPU)
    assert stop.value.exit_code == 75
