"""Stage 2 killed before every file operation: a rerun leaves the files and losses of an uninterrupted run.

One run is recorded: an audit hook copies its folder before each file operation if the folder has changed (writes inside
safetensors are detected at the fsync). Each copy is the state after a SIGKILL at that moment, and one rerun of the
command must finish it. Of more than `MOST` copies, a random sample chosen by SEED is rerun.
"""

import os
import random
import shutil
import time

import pytest
from commands import LIMIT_S, assert_same_losses, cache_flags, distill_flags
from run_states import record_states
from stage1_process import Job

MOST = 60
OPTIONS = {
    "train.epochs": 2,
    "train.global_batch_size": 16,
    "train.micro_batch_size": 16,
    "train.ema_decay": 0.5,
    "train.keep_checkpoints": 1,
    "train.eval_epochs": 1,
    "train.log_samples": True,
}
"""Two steps; a checkpoint and an evaluation after each, and the second checkpoint removes the first."""


def files(run):
    """Names of all files in a run folder; for TensorBoard's files, which are named by time, only their folder."""
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.parent.name != "tensorboard"}


@pytest.mark.ci_slow
@pytest.mark.timeout(3 * LIMIT_S)
def test_killed_before_every_operation(tmp_path, weights):
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(10**6)))
    cache, whole, log = tmp_path / "cache", tmp_path / "whole", tmp_path / "log"
    assert Job(cache_flags(cache, weights, **{"data.max_samples": 16}), cache, log).wait().statuses == [0]
    status = record_states(distill_flags(cache, whole, **OPTIONS), whole, tmp_path / "states", log)
    assert status == 0, log.read_text()
    states = sorted((tmp_path / "states").iterdir())
    sample = states if len(states) <= MOST else sorted(random.Random(seed).sample(states, MOST))
    started = time.monotonic()
    for run in sample:
        before = files(run)
        outcome = Job(distill_flags(cache, run, **OPTIONS), run, log, command="distill").wait()
        assert outcome.statuses == [0], (run.name, sorted(before), outcome.output)
        assert files(run) == files(whole), (run.name, sorted(before))
        assert_same_losses(run, whole, 1e-4)
        shutil.rmtree(run)
    print(f"SEED={seed}: {len(sample)} of {len(states)} states, {time.monotonic() - started:.0f} s")
    assert len(states) >= 30
