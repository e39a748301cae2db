"""Stage 1, growth and repair killed before every file operation: a rerun leaves the files of an uninterrupted job."""

import os
import random
import shutil

import pytest
from commands import cache_flags, file_bytes
from image_files import write
from small_cache import flip_byte
from stage1_process import KILLED, Job, warm_up

OPTIONS = {"data.max_samples": 8, "cache.samples_per_shard": 4, "cache.views_per_group": 1, "teacher.batch_size": 4}
"""Two units per view."""
BACKENDS = ("webdataset", "zarr")
STRIDE = {"webdataset": 1, "zarr": 12}
"""Every operation, or every twelfth from a random start: a zarr unit has hundreds of similar ones."""


def damage(root):
    """A record, the tail and the plan: one case for each kind of repair."""
    unit = root / "units" / "g000-r00001"
    payload = next(path for path in sorted(unit.rglob("*")) if path.suffix == ".tar" or path.parent.name == "c")
    flip_byte(payload, payload.stat().st_size // 2)
    flip_byte(root / "tail.safetensors", -100)
    write(root / "plan.json", b"{}")


class Story:
    """A command, and the folder state it starts from.

    Args:
        place: parent of its folders.
        weights: weights file of the teacher.
        name: `new`, `growth` or `repair`.
        backend: the store.
    """

    def __init__(self, place, weights, name, backend):
        self.place, self.root = place, place / "cache"
        self.command = "repair" if name == "repair" else "cache_teacher"

        def words(views):
            return cache_flags(self.root, weights, **{**OPTIONS, "cache.backend": backend, "cache.num_views": views})

        self.words = ["--cache", str(self.root)] if name == "repair" else words(2)
        self.before = place / "before"
        if name == "new":
            self.before.mkdir()
        else:
            assert Job(words(1 if name == "growth" else 2), self.root, place / "log").wait().statuses == [0]
            if name == "repair":
                damage(self.root)
            self.root.rename(self.before)
        self.start()
        outcome = self.run()
        assert outcome.statuses == [0], outcome.output
        self.after = file_bytes(self.root)

    def start(self):
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.before, self.root)

    def run(self, operation=0):
        return Job(self.words, self.root, self.place / "log", operation=operation, command=self.command).wait()

    def killed_at(self, operation):
        """Kill the command before a file operation and rerun it; False if it has fewer operations."""
        self.start()
        outcome = self.run(operation)
        if outcome.statuses == [0]:
            return False
        assert outcome.statuses == [KILLED], outcome.output
        outcome = self.run()
        assert outcome.statuses == [0], (operation, outcome.output)
        found = file_bytes(self.root)
        assert found.keys() == self.after.keys(), operation  # temporary files would be here too
        assert [name for name in found if found[name] != self.after[name]] == [], operation
        return True


def story(place, weights, name, backend):
    warm_up()
    return Story(place, weights, name, backend)


@pytest.mark.ci_slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["new", "growth", "repair"])
def test_killed_before_every_operation(tmp_path, weights, name, backend):
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(10**6)))
    print(f"SEED={seed}")
    told, stride = story(tmp_path, weights, name, backend), STRIDE[backend]
    operation = random.Random(seed).randint(1, stride)
    kills = 0
    while told.killed_at(operation):
        operation, kills = operation + stride, kills + 1
    print(f"{name}, {backend}: {kills} kills")
    assert kills >= 15


@pytest.mark.parametrize("name", ["growth", "repair"])
def test_killed_at_some_operations(tmp_path, weights, name):
    told = story(tmp_path, weights, name, "webdataset")
    assert all(told.killed_at(operation) for operation in random.SystemRandom().sample(range(1, 20), 2))
