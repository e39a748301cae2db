"""Stage 1 stops before the first unit if the teacher's classes are in another order than the dataset's."""

import numpy as np
import pytest
from small_cache import CPU, options, shared_weights

from scalekd_cache.caching import job
from scalekd_cache.caching.job import cache_teacher, dry_run
from scalekd_cache.data.classes import natural_key
from scalekd_cache.errors import UserError
from scalekd_cache.models.teacher_classes import check_class_order


def answers(count, classes, accuracy, order=None, seed=0):
    """Labels, and the guesses of a teacher of this accuracy whose output k is class order[k]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    right = np.where(rng.random(count) < accuracy, labels, rng.integers(0, classes, count))
    output = np.argsort(np.arange(classes) if order is None else np.array(order))
    return labels, output[right]


def make_order(names, key):
    return [names.index(name) for name in sorted(names, key=key)]


NUMBERS = sorted(str(number) for number in range(100))  # the order of sorted folders: 0, 1, 10, 11, ...
CASES = sorted(["Abyssinian", "beagle", "Bengal", "boxer", "Birman", "pug", "Sphynx", "samoyed", "Zwerg", "akita"])


@pytest.mark.parametrize(
    ("names", "key", "name"),
    [(NUMBERS, natural_key, "natural"), (CASES, str.lower, "natural"), (CASES, str.casefold, "natural")],
)
@pytest.mark.parametrize("count", [40, 3000])
def test_the_order_that_fits_is_named(names, key, name, count):
    labels, guesses = answers(count, len(names), 0.97, make_order(names, key))
    with pytest.raises(UserError, match="class order differs") as error:
        check_class_order(labels, guesses, names, "t")
    assert f"in {name} order" in str(error.value)
    assert f"--classes {name}" in str(error.value)
    assert "teacher.check_classes=false" in str(error.value)


def test_numbered_tars_of_a_teacher_that_sorted_them_as_text():
    names = [str(number) for number in range(100)]
    with pytest.raises(UserError, match="in sorted order"):
        check_class_order(*answers(2000, 100, 0.9, make_order(names, str)), names, "t")


def test_any_other_order_is_found_when_there_are_images_enough():
    names = [f"c{number:03d}" for number in range(50)]
    shuffled = np.random.default_rng(1).permutation(50)
    with pytest.raises(UserError, match=r"class order differs(?s:.*)fitted to half(?s:.*)--classes FILE"):
        check_class_order(*answers(5000, 50, 0.9, shuffled), names, "t")
    two = [1, 0, *range(2, 50)]
    with pytest.raises(UserError, match="class order differs"):
        check_class_order(*answers(5000, 50, 0.9, two), names, "t")


@pytest.mark.parametrize(("accuracy", "classes", "count"), [(0.9, 10, 30), (0.5, 100, 1000), (0.1, 1000, 2000)])
@pytest.mark.parametrize("seed", range(5))
def test_a_teacher_that_is_only_weak_is_not_stopped(accuracy, classes, count, seed):
    check_class_order(*answers(count, classes, accuracy, seed=seed), [f"{c:04d}" for c in range(classes)], "t")


def test_near_chance_is_stopped_when_images_are_enough():
    names = list("abcdefghij")
    with pytest.raises(UserError, match="near chance"):
        check_class_order(*answers(1000, 10, 0.0), names, "t")
    labels = np.arange(1000) % 10
    with pytest.raises(UserError, match="near chance"):
        check_class_order(labels, np.zeros_like(labels), names, "t")  # one class, always
    check_class_order(*answers(36, 10, 0.0), names, "t")  # too few images to decide
    check_class_order(np.zeros(0, np.int64), np.zeros(0, np.int64), names, "t")


@pytest.mark.parametrize("call", [cache_teacher, dry_run])
def test_stage_1_stops_before_the_first_unit(tmp_path, call):
    config = options(
        tmp_path / "cache",
        shared_weights(),
        data={"max_samples": 400},
        teacher={"check_classes": True, "batch_size": 64},
    )
    with pytest.raises(UserError, match="near chance"):
        call(config, CPU)
    assert not list((tmp_path / "cache").glob("*"))


def test_the_option_goes_on_with_a_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job, "make_units", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    config = options(tmp_path / "cache", shared_weights(), data={"max_samples": 400}, teacher={"batch_size": 64})
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(config, CPU)
    assert "warning: the teacher's accuracy is near chance" in capsys.readouterr().out
