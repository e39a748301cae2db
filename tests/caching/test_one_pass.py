"""Several teachers in one pass: every cache equals the cache that a separate job writes, byte for byte."""

import functools
import json
import os
import random
import shutil

import pytest
from commands import execute
from documented import call
from image_files import encoded, folder_tree, picture, write
from safetensors.torch import load_file, save_file
from small_cache import shared_weights, tree
from stage1_process import KILLED, Job

import scalekd_cache
from pipelines import cache_teacher as command
from pipelines import plan
from scalekd_cache import UserError
from scalekd_cache.caching import make_units as caching
from scalekd_cache.caching import prepare, sample_views
from scalekd_cache.caching.pixel_cache import PixelCache
from scalekd_cache.config.places import teacher_folders
from scalekd_cache.config.stage1 import CacheTeacherConfig, TeacherConfig
from scalekd_cache.planning import forecast as planning
from scalekd_cache.planning.forecast_result import Forecast, HereTimes, describe_together
from scalekd_cache.planning.forecast_result import together as sum_of_plans
from scalekd_cache.progress import size_text
from scalekd_cache.store import unit
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.verify import verify_cache

NAMES = [f"c{number}/{letter}.png" for number in range(10) for letter in "ab"]
FIRST, SECOND = "demo_swin", "test_vit"
RANGES = 4
COMMON = {
    "cache.views_per_group": 1,
    "cache.samples_per_shard": 5,
    "teacher.batch_size": 4,
    "teacher.check_classes": False,
    "teacher.pretrained": False,
    "device": "cpu",
    "workers": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder_tree(tmp_path_factory.mktemp("several") / "data", train=NAMES, val=NAMES[::2])


def together(root, data, views=2, teachers=f"{FIRST},{SECOND}", weights=None, **options):
    """One pass for several teachers."""
    weights = f"{shared_weights()}{',' * teachers.count(',')}" if weights is None else weights
    given = {**COMMON, **options}
    return scalekd_cache.cache_teacher(
        data=data, teachers=teachers, teacher_weights=weights, cache=root, views=views, size=64, options=given
    )


def apart(root, data, views=2, shares=True, **options):
    """A job for each teacher; the second shares the pixels of the first."""
    for name, weights in ((FIRST, shared_weights()), (SECOND, None)):
        given = {**COMMON, **options}
        if shares and name == SECOND:
            given["pixels_from"] = str(root / FIRST)
        scalekd_cache.cache_teacher(
            data=data, teacher=name, teacher_weights=weights, cache=root / name, views=views, size=64, options=given
        )
    return tree(root)


def units(root, name):
    return sorted(path.name for path in (root / name / "units").glob("g*"))


CASES = {
    "tars": {},
    "zarr": {"store": "zarr"},
    "fitted codec": {"codec": "transform"},
    "sparse, top-k logits": {
        "stored_features": 0.5,
        "cache.views_per_group": 2,
        "cache.logits": "top_k",
        "cache.top_k": 3,
    },
    "replayed": {"pixels": "replayed"},
}


QUICK = ("tars", "zarr")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.ci_slow) for case in CASES]
)
def test_one_pass_writes_what_a_job_per_teacher_writes(tmp_path, data, case, monkeypatch):
    expected = apart(tmp_path / "apart", data, shares=case != "replayed", **CASES[case])
    decoded = []
    real = sample_views.apply_view
    monkeypatch.setattr(sample_views, "apply_view", lambda *rest: decoded.append(rest) or real(*rest))
    found = together(tmp_path / "together", data, **CASES[case])
    assert tree(tmp_path / "together") == expected
    assert found.place == f"{tmp_path}/together/{FIRST},{tmp_path}/together/{SECOND}"
    assert [one.teacher for one in (found, *found.others)] == [FIRST, f"{SECOND} (random weights)"]
    if case == "tars":  # every view once; and view 0 of some images for each teacher's checks
        assert len(NAMES) * 2 <= len(decoded) <= len(NAMES) * 2 + 2 * 3 * len(NAMES)
        assert verify_cache(tmp_path / "together" / SECOND, deep=True) == []


def test_unreadable_images_are_skipped_in_every_cache(tmp_path):
    data = folder_tree(tmp_path / "data", train=NAMES, val=NAMES[::2])
    write(data / "train" / NAMES[6], b"no image")
    expected = apart(tmp_path / "apart", data)
    assert together(tmp_path / "together", data).others[0].images == len(NAMES) - 1
    assert tree(tmp_path / "together") == expected


def test_held_out_outputs_of_every_teacher(tmp_path):
    for number in range(24):
        write(tmp_path / "data" / f"{number}.png", encoded(picture(number)))
    options = {"teacher.num_classes": 0}
    expected = apart(tmp_path / "apart", tmp_path / "data", views=1, **options)
    together(tmp_path / "together", tmp_path / "data", views=1, **options)
    assert tree(tmp_path / "together") == expected
    assert {f"{name}/heldout.safetensors" for name in (FIRST, SECOND)} <= expected.keys()


class Stop(Exception):
    """Stands for a kill."""


def stopped(monkeypatch, root, publication, run):
    """Run until just before a publication of a unit below `root`, the first is 1."""
    left, real = [publication], unit.UnitWriter._publish

    def publish(writer):
        left[0] -= root in writer.root.parents  # not for the units that measure sizes
        if left[0] <= 0:
            raise Stop
        return real(writer)

    with monkeypatch.context() as patch:
        patch.setattr(unit.UnitWriter, "_publish", publish)
        with pytest.raises(Stop):
            run()


def test_stopped_between_any_two_units_and_rerun(tmp_path, data, monkeypatch):
    expected = apart(tmp_path / "apart", data, views=1)
    root = tmp_path / "together"
    run = functools.partial(together, root, data, views=1)
    for publication in range(1, 2 * RANGES + 1, 3):  # before a unit of the first cache, or of the second one
        shutil.rmtree(root, ignore_errors=True)
        stopped(monkeypatch, root, publication, run)
        there = [units(root, name) for name in (FIRST, SECOND)]
        assert [len(names) for names in there] == [publication // 2, (publication - 1) // 2]
        assert {*there[1]} <= {*there[0]}
        run()
        assert tree(root) == expected, publication


def other_weights(folder):
    """A second demo teacher."""
    state = load_file(shared_weights())
    save_file({name: value + 0.01 for name, value in state.items()}, folder / "other.safetensors")
    return folder / "other.safetensors"


def test_growth_and_a_further_teacher(tmp_path, data, monkeypatch):
    """Adding views, then a teacher, whose views come from the stored pixels."""
    root = tmp_path / "together"
    together(root, data, views=1)
    together(root, data, views=2)
    expected = apart(tmp_path / "apart", data, views=2)
    assert tree(root) == expected
    sources, real = [], caching.views_of_units
    monkeypatch.setattr(
        caching, "views_of_units", lambda source, *rest: sources.append(type(source)) or real(source, *rest)
    )
    teachers, weights = f"{FIRST},{SECOND},{FIRST}", f"{shared_weights()},,{other_weights(tmp_path)}"
    found = together(root, data, views=2, teachers=teachers, weights=weights)
    assert sources == [PixelCache]
    assert [one.path.name for one in (found, *found.others)] == [FIRST, SECOND, f"{FIRST}-2"]
    third = read_manifest(root / f"{FIRST}-2")
    assert (third.facts.pixels_from["path"], third.num_samples, third.num_views) == (f"../{FIRST}", len(NAMES), 2)
    assert verify_cache(root / f"{FIRST}-2", deep=True) == []
    assert tree(root).items() >= expected.items()


def test_a_unit_of_other_images_than_in_the_first_cache_is_rebuilt(tmp_path):
    """An image that was unreadable is restored, and the unit of the first cache is lost and made again."""
    data, root = folder_tree(tmp_path / "data", train=NAMES, val=NAMES[::2]), tmp_path / "together"
    image = (data / "train" / NAMES[6]).read_bytes()
    write(data / "train" / NAMES[6], b"no image")
    together(root, data, views=1)
    write(data / "train" / NAMES[6], image)
    for folder in (root / FIRST / "units").glob("g*"):
        shutil.rmtree(folder)
    together(root, data, views=1)
    assert tree(root) == apart(tmp_path / "apart", data, views=1)


@pytest.mark.ci_slow
def test_replayed_caches_skip_the_same_images_after_a_kill(tmp_path, monkeypatch):
    data, root = folder_tree(tmp_path / "data", train=NAMES, val=NAMES[::2]), tmp_path / "together"
    image = (data / "train" / NAMES[6]).read_bytes()
    write(data / "train" / NAMES[6], b"no image")
    run = functools.partial(together, root, data, views=1, pixels="replayed")
    run()
    shutil.rmtree(root / SECOND)
    write(data / "train" / NAMES[6], image)
    assert run().others[0].images == len(NAMES) - 1


def test_several_ranks(tmp_path, data):
    expected, root = apart(tmp_path / "apart", data, views=1), tmp_path / "together"
    outcome = Job([*words(root, data), "--json"], root, tmp_path / "log", ranks=3).wait()
    assert outcome.statuses == [0] * 3, outcome.output
    assert tree(root) == expected
    assert f"scalekd distill --student resnet50 --cache {root}/{FIRST},{root}/{SECOND}" in outcome.output
    facts = json.loads(next(line for line in outcome.output.splitlines() if line.startswith("{")))
    assert (facts["cache"], facts["teacher"]) == (str(root), FIRST)
    assert [(one["teacher"], one["path"]) for one in facts["others"]] == [
        (f"{SECOND} (random weights)", f"{root}/{SECOND}")
    ]


@pytest.mark.ci_slow
def test_killed_at_random_moments(tmp_path, data):
    expected, draw = apart(tmp_path / "apart", data, views=1), random.Random(22)
    root, kills = tmp_path / "together", 0
    while kills < 20:
        for ranks in (1, 2, 1, 2):
            operation = draw.randint(1, 150)
            outcome = Job(words(root, data), root, tmp_path / "log", ranks=ranks, operation=operation).wait()
            assert set(outcome.statuses) <= {0, KILLED}, outcome.output
            assert {*units(root, SECOND)} <= {*units(root, FIRST)}
            kills += KILLED in outcome.statuses
        outcome = Job(words(root, data), root, tmp_path / "log").wait()
        assert outcome.statuses == [0], outcome.output
        assert tree(root) == expected
        shutil.rmtree(root)


def words(root, data):
    """The options of `together`, with one view, as typed."""
    given = {"teachers": f"{FIRST},{SECOND}", "teacher_weights": f"{shared_weights()},", "cache": root, "views": 1}
    given |= {"data": data, "size": 64, **COMMON}
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def test_a_dry_run_names_every_cache_and_the_sum(tmp_path, data, capsys):
    call(command, [*words(tmp_path / "new", data), "--dry-run"])
    output = capsys.readouterr().out
    for name in (FIRST, SECOND):
        assert f"{tmp_path}/new/{name}: 20 views to compute, about " in output
        assert f"would compute 4 of 4 units (20 views) in {tmp_path}/new/{name}; dry run" in output
    assert "all teachers: 40 views to compute, " in output
    assert not (tmp_path / "new").exists()


@pytest.mark.ci_slow
def test_the_disk_must_hold_all_caches(tmp_path, data, monkeypatch, capsys):
    asked = []
    shared_weights()  # its first use makes a cache
    monkeypatch.setattr(prepare, "check_disk_space", lambda path, views, needed: asked.append((views, needed)))
    found = together(tmp_path / "new", data)
    total = sum(one.bytes_per_view["total"] * 2 * len(NAMES) for one in (found, *found.others))
    assert asked == [(4 * len(NAMES), pytest.approx(total, rel=0.1))]
    capsys.readouterr()
    monkeypatch.setattr(planning, "MAX_EXTRA_S", 0)  # no codec is fitted for comparison
    call(plan, [*words(tmp_path / "new", data), "--views", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    files = sum(path.stat().st_size for path in (tmp_path / "new").rglob("*") if path.is_file())
    assert found["total_bytes"] == sum(one["total_bytes"] for one in found["plans"])
    assert found["total_bytes"] == pytest.approx(files, rel=0.1)
    plans = [Forecast(**{**one, "here": HereTimes(**one["here"])}) for one in found["plans"]]
    text = describe_together(sum_of_plans(plans))
    assert f"{tmp_path}/new/{SECOND}\n" in text
    assert f"all teachers: {size_text(found['total_bytes'])}" in text


def test_make_trains_from_all_caches_and_makes_missing_ones():
    typed = ["make", "-n", "distill", "VENV=none", "STUDENT=resnet18", "TEACHERS=a,b/c"]
    printed = execute(*typed)
    assert "ls caches/demo/a/manifest.json caches/demo/b-c/manifest.json" in printed
    assert "distill --student resnet18 --cache caches/demo/a,caches/demo/b-c" in printed
    assert "distill --student resnet18 --cache x,y" in execute(*typed, "CACHE=x,y")


def test_refused_before_anything_is_written(tmp_path, data):
    copy, root = tmp_path / "copy.safetensors", tmp_path / "new"
    shutil.copyfile(shared_weights(), copy)
    with pytest.raises(UserError, match="two teachers have identical weights"):
        together(root, data, teachers=f"{FIRST},{FIRST}", weights=f"{shared_weights()},{copy}")
    with pytest.raises(UserError, match=f"no timm model {SECOND}s|{SECOND}s"):
        together(root, data, teachers=f"{FIRST},{SECOND}s")
    assert not root.exists()
    (root / FIRST).mkdir(parents=True)
    (root / "plan.json").touch()
    with pytest.raises(UserError, match=r"this folder is itself a cache(.|\n)*--pixels-from"):
        together(root, data)
    (root / "plan.json").unlink()
    write(root / SECOND, b"")
    with pytest.raises(UserError, match=f"{SECOND} is a file"):
        together(root, data)


@pytest.mark.ci_slow
def test_another_order_of_the_teachers_is_explained(tmp_path, data):
    together(tmp_path / "new", data, views=1)
    with pytest.raises(UserError, match="the order of --teachers must not change"):
        together(tmp_path / "new", data, views=1, teachers=f"{SECOND},{FIRST}", weights=f",{shared_weights()}")


@pytest.mark.parametrize(
    ("teachers", "weights", "text"),
    [
        ("a,,b", None, "contains an empty name"),
        ("a,b", "x", "1 entry for 2 teachers: x"),
        ("a,b", "x,y,z", "3 entries for 2 teachers"),
        ("a,b,a", None, "lists a twice"),
        ("a,a", "x, x", "lists a twice"),
    ],
)
def test_invalid_lists(teachers, weights, text):
    with pytest.raises(UserError, match=text):
        CacheTeacherConfig(teachers=teachers, teacher=TeacherConfig(weights=weights))


def test_one_of_teacher_and_teachers():
    with pytest.raises(UserError, match="not both"):
        scalekd_cache.cache_teacher(teacher="a", teachers="b,c")


def test_a_configuration_per_teacher():
    config = CacheTeacherConfig(teachers="a/b, c,c", teacher=TeacherConfig(weights="x,,~/y"))
    found = [(one.teacher.name, one.teacher.weights, one.cache.path) for one in config.per_teacher()]
    assert found == [
        ("a/b", "x", "caches/demo/a-b"),
        ("c", None, "caches/demo/c"),
        ("c", os.path.expanduser("~/y"), "caches/demo/c-2"),
    ]
    assert teacher_folders(["hf-hub:org/name", "x", "x-2", "x", "x"]) == ["hf-hub-org-name", "x", "x-2", "x-3", "x-4"]
    assert CacheTeacherConfig().per_teacher() == [CacheTeacherConfig()]
