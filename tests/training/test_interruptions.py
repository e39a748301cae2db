"""Stage 2 under SIGKILL and with a stalled process: every global batch is used once, and nothing hangs."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time

import psutil
import pytest
from commands import ENV, LIMIT_S, ROOT, STEPS, assert_same_losses, distill_flags, launcher, run, steps_of

pytestmark = pytest.mark.slow
SEED = int(os.environ.get("SEED", "0")) or random.randrange(1, 10**6)
EPOCHS = 20
"""Enough steps for twenty kills: three per epoch."""


def samples(folder):
    lines = [json.loads(line) for file in sorted(folder.glob("samples-r*.jsonl")) for line in file.open()]
    return sorted((line["step"], line["micro"], line["view"], tuple(line["ids"])) for line in lines)


def start(words, nproc=1):
    return subprocess.Popen(
        [*map(str, launcher(nproc)), "pipelines.distill", *words],
        cwd=ROOT,
        env=ENV,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.timeout(6 * LIMIT_S)
def test_twenty_kills(cache, workshop):
    """A run killed at random moments, also while saving, has the steps, losses and samples of an uninterrupted one."""
    print(f"SEED={SEED}")
    draw = random.Random(SEED)
    options = {"train.epochs": EPOCHS, "train.eval_epochs": EPOCHS, "train.log_samples": True}
    whole, killed = workshop / "runs" / "whole", workshop / "runs" / "twenty-kills"
    run("distill", *distill_flags(cache, whole, **options))
    words = distill_flags(cache, killed, **options, **{"train.checkpoint_steps": 1})
    metrics, kills, saving = killed / "metrics.jsonl", 0, 0
    while kills < 20:
        process = start(words)
        before = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > before):
            time.sleep(0.01)  # kills should hit training, not the seconds of imports before it
        time.sleep(draw.uniform(0, 0.4))
        assert process.poll() is None, f"ended by itself after {kills} kills\n{process.communicate()[0][-2000:]}"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        saving += bool(list(killed.glob("checkpoints/.tmp-*")))
        kills += 1
    run("distill", *words)
    print(f"{kills} kills, {saving} of them while saving")
    assert [line["step"] for line in steps_of(killed)] == list(range(1, 3 * EPOCHS + 1))
    assert samples(killed) == samples(whole)
    assert len({line[0] for line in samples(killed)}) == 3 * EPOCHS
    assert_same_losses(killed, whole, 1e-4)


def test_a_stalled_process_is_named(cache, workshop):
    folder = workshop / "runs" / "stalled"
    words = distill_flags(cache, folder, **{"train.epochs": 50, "train.timeout_minutes": 0.2})
    process = start(words, nproc=2)
    metrics = folder / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children(recursive=True)}
    ranks["1"].send_signal(signal.SIGSTOP)
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    finally:
        for child in ranks.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    assert process.returncode != 0
    assert "distributed hang" in output, output[-4000:]
    assert "micro-batch 1 (view" in output.split("furthest behind", 1)[1]
    assert sorted(folder.glob("checkpoints/step-*")) or len(steps_of(folder)) < STEPS
