"""Stage 1 killed at random moments and rerun: the finished cache equals that of an uninterrupted job byte for byte."""

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections import Counter

import psutil
import pytest
from commands import ENV, ROOT, cache_flags, execute, file_bytes, launcher
from stage1_process import KILLED, Job, phase, warm_up

from scalekd_cache.store.verify import verify_cache

UNITS = 6
OPTIONS = {"data.max_samples": 48, "cache.samples_per_shard": 8, "teacher.batch_size": 8}
"""Six units of two views of eight images."""
BACKENDS = ("webdataset", "zarr")


def words(path, weights, backend, **changes):
    return cache_flags(path, weights, **{**OPTIONS, "cache.backend": backend, **changes})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def untouched(place, weights):
    """Files and duration of an uninterrupted job, by backend."""
    made = {}
    warm_up()
    for backend in BACKENDS:
        root = place / f"untouched-{backend}"
        outcome = Job(words(root, weights, backend), root, place / "log").wait()
        assert outcome.statuses == [0], outcome.output
        assert verify_cache(root, deep=True) == []
        made[backend] = (file_bytes(root), outcome.seconds)
    return made


OPERATIONS = {"webdataset": 15, "zarr": 280}
"""Approximate number of file operations per unit."""


def units_left(root):
    """Units that are not in a cache yet."""
    return UNITS - len(list((root / "units").glob("g*")))


class Killer:
    """Repeatedly starts a job, kills it, and counts the phases in which it was killed."""

    def __init__(self, place, weights, untouched, seed):
        self.place, self.weights, self.untouched = place, weights, untouched
        self.random = random.Random(seed)
        self.phases = Counter()
        self.kills = self.first = 0

    def one_kill(self, root, backend, ranks):
        """Start and kill; True if the job finished first. Half of the kills happen after a random time, half just
        before a random file operation of the process itself."""
        options = words(root, self.weights, backend, workers=self.random.choice((0, 0, 1)))
        if self.random.random() < 0.5:
            after = self.random.uniform(0.0, 1.1 * self.untouched[backend][1])
            outcome = Job(options, root, self.place / "log", ranks=ranks).wait(after, then_kill=True)
        else:
            operation = self.random.randint(1, 15 + OPERATIONS[backend] * units_left(root))
            outcome = Job(options, root, self.place / "log", ranks=ranks, operation=operation).wait()
        assert set(outcome.statuses) <= {0, KILLED}, outcome.output
        if KILLED in outcome.statuses:
            self.kills += 1
            self.phases[phase(root, UNITS)] += 1
        return outcome.statuses == [0] * ranks

    def until_finished(self, root, backend, kills):
        """At most `kills` kills, alternating 1 and 2 ranks, then a job without kills; the cache must be identical."""
        for number in range(kills):
            if self.one_kill(root, backend, 1 + (number + self.first) % 2):
                break
        self.first += 1
        outcome = Job(words(root, self.weights, backend), root, self.place / "log").wait()
        assert outcome.statuses == [0], outcome.output
        self.same(root, backend)

    def same(self, root, backend):
        expected, found = self.untouched[backend][0], file_bytes(root)
        assert found.keys() == expected.keys()  # temporary files would be here too
        assert [name for name in found if found[name] != expected[name]] == []


def kill_until(killer, place, kills, phases=frozenset()):
    """Make new caches, alternating the backends, until there were `kills` kills and one in each of `phases`."""
    tries = 0
    while killer.kills < kills or not phases <= killer.phases.keys():
        backend = BACKENDS[tries % len(BACKENDS)]
        root = place / f"killed-{tries}"
        killer.until_finished(root, backend, min(4, max(1, kills - killer.kills)))
        shutil.rmtree(root)
        tries += 1
        assert tries < 4 * kills, f"jobs end before they are killed; kills so far: {dict(killer.phases)}"
    print(f"{killer.kills} kills in {tries} caches: {dict(killer.phases)}")


def seed_of_the_day():
    """A new, printed seed each time; SEED= repeats a run."""
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(10**6)))
    print(f"SEED={seed}")
    return seed


def test_killed_five_times(place, weights, untouched):
    kill_until(Killer(place, weights, untouched, seed_of_the_day()), place, 5)


@pytest.mark.ci_slow
def test_killed_forty_times(place, weights, untouched):
    killer = Killer(place, weights, untouched, seed_of_the_day())
    kill_until(killer, place, 40, {"before the first unit", "writing a unit", "committing a unit"})
    assert len(killer.phases) >= 4


@pytest.mark.ci_slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_command_itself_killed(place, weights, untouched, backend):
    """Without the fork server: real python and torchrun processes."""
    draw, root = random.Random(seed_of_the_day()), place / f"commands-{backend}"
    check, killed = Killer(place, weights, untouched, 0), 0
    for nproc in (2, 1) * 5:
        command = [*launcher(nproc), "pipelines.cache_teacher", *words(root, weights, backend)]
        started = subprocess.Popen([str(word) for word in command], cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL)
        seen = phase(root, UNITS)
        while phase(root, UNITS) == seen and started.poll() is None:  # wait for a change in the folder, then a moment
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5 * untouched[backend][1]))
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have finished
            job = psutil.Process(started.pid)
            for process in [*job.children(recursive=True), job]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        killed += started.wait() == KILLED
        print(f"nproc {nproc}: {phase(root, UNITS)}")
        if killed == 3:
            break
        if phase(root, UNITS) == "after the manifest":  # it finished before the kill: start over
            check.same(root, backend)
            shutil.rmtree(root)
    assert killed == 3
    execute(*launcher(2), "pipelines.cache_teacher", *words(root, weights, backend))
    check.same(root, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_jobs_at_once(place, weights, untouched, backend):
    """Each job makes the units that are missing; one of two writers of a unit wins, and both jobs succeed."""
    root = place / f"both-{backend}"
    jobs = [
        Job(words(root, weights, backend), root, place / f"log-{ranks}", ranks=ranks) for ranks in (1, 2)
    ]  # three processes
    for job in jobs:
        outcome = job.wait()
        assert set(outcome.statuses) == {0}, outcome.output
    Killer(place, weights, untouched, 0).same(root, backend)
