"""Both stages on two machines (network namespaces): by torchrun and by deepspeed, with one of them lost on the way."""

import sys

import pytest
from commands import (
    STUDENT,
    TRAIN_OPTIONS,
    assert_same_losses,
    cache_flags,
    file_bytes,
    read_json,
    steps_of,
)
from hosts import Hosts
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
PORT = 29611
IMAGES = {"data.max_samples": 400, "cache.samples_per_shard": 4, "cache.num_views": 2, "teacher.batch_size": 4}
"""100 units of two views of four images."""


@pytest.fixture
def hosts(tmp_path):
    with Hosts(tmp_path) as both:
        yield both


def make_words(target, options, **variables):
    """`make <target>`, as a user types it on one of the machines."""
    pairs = " ".join(f"{name}={value}" for name, value in options.items())
    given = [f"{name}={value}" for name, value in variables.items()]
    return ["make", target, "VENV=none", f"PYTHON={sys.executable}", "WORKERS=0", *given, f"SET={pairs}"]


def torchrun(hosts, target, options, nnodes=2, **variables):
    """The command on both machines."""
    for host in range(2):
        variables = {**variables, "MASTER_ADDR": hosts.names[0], "MASTER_PORT": PORT}
        yield hosts.start(host, *make_words(target, options, NNODES=nnodes, NODE_RANK=host, **variables))


def stage1(folder, weights, **changes):
    variables = {"CACHE": folder, "TEACHER_WEIGHTS": weights, "VIEWS": IMAGES["cache.num_views"]}
    return {**{name: value for name, value in IMAGES.items() if name != "cache.num_views"}, **changes}, variables


def units(folder):
    return len(list((folder / "units").glob("g*"))) if (folder / "units").is_dir() else 0


@pytest.fixture(scope="module")
def untouched(workshop, weights):
    """The cache that one process makes."""
    from commands import run

    folder = workshop / "caches" / "hosts-alone"
    run("cache_teacher", *cache_flags(folder, weights, **IMAGES))
    return file_bytes(folder)


def assert_same_cache(folder, untouched):
    found = file_bytes(folder)
    assert found.keys() == untouched.keys()
    assert [name for name in found if found[name] != untouched[name] and name != "plan.json"] == []


@pytest.mark.parametrize("lost", [0, 1], ids=["the first host lost", "the second host lost"])
def test_stage_1_when_a_host_is_lost(lost, hosts, weights, untouched, tmp_path):
    """Without the first host, which keeps the counters, the other says so; without the second the first finishes."""
    folder = tmp_path / "cache"
    options, variables = stage1(folder, weights, peer_timeout_minutes=0.1)
    both = list(torchrun(hosts, "cache-teacher", options, **variables))
    both[0].until(lambda: units(folder) >= 2)
    hosts.kill(lost)
    other = both[1 - lost]
    if lost == 0:
        assert other.wait(90) != 0
        assert "the job has lost a process or a machine" in other.output()
        assert units(folder) < 100
        for command in list(torchrun(hosts, "cache-teacher", options, **variables)):
            assert command.wait() == 0, command.output()[-4000:]
    else:
        other.until(lambda: "next: make distill" in other.output(), 90)
        assert "process 1 has given no sign of life for 6 s; its unit is made here" in other.output()
        hosts.kill(0)  # torchrun waits five minutes for the other torchrun
    assert_same_cache(folder, untouched)


RUN = {**TRAIN_OPTIONS, "train.epochs": 6, "train.checkpoint_steps": 2, "train.timeout_minutes": 0.3}


@pytest.fixture(scope="module")
def uninterrupted(workshop, cache):
    """What one process gives that nobody disturbs."""
    from commands import distill_flags, run

    folder = workshop / "runs" / "hosts-alone"
    run("distill", *distill_flags(cache, folder, **RUN))
    return folder


def distill_words(cache, folder):
    return {"STUDENT": STUDENT, "CACHE": cache, "RUN": folder}


def assert_same_student(folder, expected):
    assert_same_losses(folder, expected, 1e-4)
    ours, theirs = (load_file(run / "export" / "model.safetensors") for run in (folder, expected))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].float() - value.float()).abs().max() < 1e-4 + 1e-3 * value.float().abs().max(), name
    assert read_json(folder / "summary.json")["top1"] == pytest.approx(
        read_json(expected / "summary.json")["top1"], abs=0.6
    )


def trained(folder):
    return len(steps_of(folder)) if (folder / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize("way", ["killed", "killed first", "cable"])
def test_stage_2_when_a_host_is_lost(way, hosts, cache, uninterrupted, workshop):
    """The other says which process is behind and ends within the time-out; both started again, the run finishes."""
    folder = workshop / "runs" / f"hosts-{way.replace(' ', '-')}"
    lost = 0 if way == "killed first" else 1
    both = list(torchrun(hosts, "distill", RUN, **distill_words(cache, folder)))
    both[0].until(lambda: trained(folder) >= 5)
    if way == "cable":
        hosts.cut(lost)
    hosts.kill(lost)
    other = both[1 - lost]
    assert other.wait(60) != 0
    assert "the processes wait for each other" in other.output(), other.output()[-4000:]
    if way == "cable":
        hosts.mend(lost)
    for command in list(torchrun(hosts, "distill", RUN, **distill_words(cache, folder))):
        assert command.wait() == 0, command.output()[-4000:]
    assert_same_student(folder, uninterrupted)
