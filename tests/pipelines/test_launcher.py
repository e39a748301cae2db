"""How many processes a command starts."""

import pytest

from pipelines import launcher


@pytest.mark.parametrize(("given", "nproc", "expected"), [({}, None, 8), ({}, 2, 2), ({"device": "cpu"}, None, None)])
def test_every_visible_gpu_gets_a_process(monkeypatch, given, nproc, expected):
    """On a node with 8 GPUs, unless --nproc or --device says otherwise; None: the command runs in this process."""
    started = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(launcher, "ENVIRONMENT", {})
    monkeypatch.setattr(launcher, "visible_gpus", lambda: 8)
    monkeypatch.setattr(launcher, "_torchrun", lambda options, count, command: started.append(count) or 0)
    options = launcher.LaunchConfig(nproc=nproc)
    code = launcher.launch(options, "distill", given, ["scalekd", "distill"], lambda given, nproc: None)
    assert (code, started) == ((None, []) if expected is None else (0, [expected]))
