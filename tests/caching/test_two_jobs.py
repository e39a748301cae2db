"""Two stage-1 jobs with the same CACHE: the second is rejected, or joins if all options match; finished units stay."""

import contextlib
import json
import shutil

import pytest
from small_cache import CPU, make, options, shared_weights, tree, unit_stats, write_weights

from scalekd_cache.caching import codec_selection as calibration
from scalekd_cache.caching import job, prepare
from scalekd_cache.caching.configure import cache_teacher_config
from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.errors import UserError
from scalekd_cache.store import plan as plans
from scalekd_cache.store import resume
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.plan import read_plan, write_plan
from scalekd_cache.store.sidecar import unit_folder
from scalekd_cache.store.verify import verify_cache

SMALL = {"max_samples": 24}
LAYOUT = {"samples_per_shard": 12, "views_per_group": 1}
EMPTY = "0" * 64


def asked(root, **changes):
    """Options of a small job; `changes` are those of `small_cache.options`."""
    changes = {**changes, "cache": {**LAYOUT, **changes.get("cache", {})}}
    weights = changes.pop("weights", shared_weights())
    return options(root, weights, data=SMALL, **changes)


@pytest.fixture
def meanwhile(monkeypatch):
    """Register a function that is called while the next job measures its teacher, before it has a plan."""
    real = prepare._teacher_top1

    def arrange(act):
        def measure(*arguments, **options):
            monkeypatch.setattr(prepare, "_teacher_top1", real)
            act()
            return real(*arguments, **options)

        monkeypatch.setattr(prepare, "_teacher_top1", measure)

    return arrange


def other_teacher(tmp_path):
    from safetensors.torch import load_file, save_file

    weights = write_weights(tmp_path / "other.safetensors")
    state = load_file(weights)
    save_file({name: value + 0.01 if value.is_floating_point() else value for name, value in state.items()}, weights)
    return weights


OTHER = {
    "codec": lambda _: {"cache": {"codec": "fp8"}},
    "fitted codec": lambda _: {"cache": {"codec": "transform"}},
    "samples_per_shard": lambda _: {"cache": {"samples_per_shard": 6}},
    "store": lambda _: {"cache": {"backend": "zarr"}},
    "seed": lambda _: {"views": {"seed": 1}},
    "teacher": lambda tmp_path: {"weights": other_teacher(tmp_path)},
}


@pytest.mark.parametrize("name", OTHER)
def test_the_later_of_two_jobs_is_refused_and_the_first_cache_stays(tmp_path, meanwhile, name):
    root = tmp_path / "cache"
    first, second = asked(root), asked(root, **OTHER[name](tmp_path))
    finished = {}

    def begin_and_end():
        cache_teacher(first, CPU)
        finished.update(tree(root))

    meanwhile(begin_and_end)
    with pytest.raises(UserError, match="made with different options"):
        cache_teacher(second, CPU)
    assert tree(root) == finished
    assert verify_cache(root, deep=True) == []
    cache_teacher(first, CPU)  # nothing to do


def test_of_three_jobs_the_first_to_write_its_plan_stays(tmp_path, meanwhile):
    root = tmp_path / "cache"
    refused = []

    def try_job(codec, act=None):
        if act is not None:
            meanwhile(act)
        try:
            cache_teacher(asked(root, cache={"codec": codec}), CPU)
        except UserError as error:
            refused.append((codec, str(error).splitlines()[0]))

    try_job("fp8", lambda: try_job("float16", lambda: try_job("int8")))
    what = "the cache was made with different options"
    assert refused == [("float16", what), ("fp8", what)]
    assert read_manifest(root).facts.codec["id"] == "int8"
    assert verify_cache(root, deep=True) == []


def test_an_equal_job_joins(tmp_path, meanwhile, capsys):
    root = tmp_path / "cache"
    finished = {}

    def begin_and_end():
        cache_teacher(asked(root), CPU)
        finished.update(tree(root), stats=unit_stats(root))

    meanwhile(begin_and_end)
    cache_teacher(asked(root, recipe="traditional"), CPU)
    assert {**tree(root), "stats": unit_stats(root)} == finished
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize("views", [(1, 3), (3, 1), (2, 3)])
def test_a_job_of_fewer_views_does_not_undo_the_growth_of_another(tmp_path, monkeypatch, views):
    """The first job has a plan and makes its units; the second extends the cache and finishes it."""
    root = tmp_path / "cache"
    first, second = (asked(root, cache={"num_views": number}) for number in views)
    real = job.make_units

    def make_units(*args):
        monkeypatch.setattr(job, "make_units", real)
        cache_teacher(second, CPU)
        return real(*args)

    monkeypatch.setattr(job, "make_units", make_units)
    manifest = cache_teacher(first, CPU)
    assert manifest.num_views == max(views) == read_plan(root).num_views
    assert manifest == read_manifest(root)
    assert verify_cache(root, deep=True) == []


def test_two_jobs_that_let_a_cache_grow_agree_on_the_plan(tmp_path, meanwhile, monkeypatch):
    """Both jobs read a plan with one view; one adds groups [1], [2], the other would add [1, 2]."""
    root = tmp_path / "cache"
    cache_teacher(asked(root, cache={"num_views": 1}), CPU)
    real = job.open_folder

    def open_folder(folder):
        monkeypatch.setattr(job, "open_folder", real)
        cache_teacher(asked(root, cache={"num_views": 3}), CPU)
        real(folder)

    monkeypatch.setattr(job, "open_folder", open_folder)
    manifest = cache_teacher(asked(root, cache={"num_views": 3, "views_per_group": 2}), CPU)
    assert manifest.facts.groups == read_plan(root).facts.groups == [[0], [1], [2]]
    assert verify_cache(root, deep=True) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_plan_is_created_once(tmp_path, monkeypatch, links):
    """Also on a file system without locks and hard links."""
    root = tmp_path / "cache"
    make(root, shared_weights(), data=SMALL, cache=LAYOUT)
    plan = read_plan(root)
    before = tree(root)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr("scalekd_cache.store.durable_files.os.link", refuse)
        monkeypatch.setattr("scalekd_cache.store.locks.fcntl.flock", refuse)
    with pytest.raises(FileExistsError):
        write_plan(root, plan, create=True)
    assert tree(root) == before
    (root / plans.NAME).unlink()
    with plans.locked_plan(root):
        write_plan(root, plan, create=True)
    assert tree(root) == before


def test_a_plan_that_appears_where_there_are_no_locks_is_joined(tmp_path, monkeypatch):
    """The other job writes its plan between our check and our write. Our lock is released before we join it: locks may
    work within one node only, and we would wait for ourselves."""
    root = tmp_path / "cache"
    real, locked, held = plans.write_plan, plans.locked_plan, []

    @contextlib.contextmanager
    def counted(folder):
        held.append("locked")
        with locked(folder), contextlib.ExitStack() as stack:
            stack.callback(held.append, "released")
            yield

    other = asked(root, cache={"num_views": 1})

    def write_late(folder, plan, **how):
        monkeypatch.setattr("scalekd_cache.caching.job_plan.write_plan", real)
        cache_teacher(other, CPU)
        held.append("other plan")
        real(folder, plan, **how)

    monkeypatch.setattr("scalekd_cache.store.locks.fcntl.flock", lambda *_: None)
    monkeypatch.setattr(plans, "locked_plan", counted)
    monkeypatch.setattr("scalekd_cache.caching.job_plan.write_plan", write_late)
    assert cache_teacher(asked(root, cache={"num_views": 2}), CPU).num_views == 2
    assert held[held.index("other plan") + 1] == "released"
    assert verify_cache(root, deep=True) == []


@pytest.mark.parametrize(
    ("field", "value"), [("views", [1]), ("start", 1), ("stop", 11), ("backend", "zarr"), ("fingerprint", EMPTY)]
)
def test_a_unit_of_another_job_is_refused_and_stays(tmp_path, field, value):
    root = tmp_path / "cache"
    config = asked(root, cache={"num_views": 1})
    cache_teacher(config, CPU)
    (root / "manifest.json").unlink()
    sidecar = unit_folder(root, 0, 0) / "unit.json"
    unit = json.loads(sidecar.read_text())
    unit[field] = value
    unit["count"] = unit["stop"] - unit["start"]
    sidecar.write_text(json.dumps(unit))
    before = tree(root)
    with pytest.raises(UserError, match=r"a different (layout|teacher)"):
        cache_teacher(config, CPU)
    assert tree(root) == before


def test_a_lost_plan_does_not_let_another_teacher_in(tmp_path):
    """Without plan and manifest, the units identify the cache, and the tail is not changed."""
    root = tmp_path / "cache"
    cache_teacher(asked(root), CPU)
    original = tree(root)
    for name in ("plan.json", "manifest.json"):
        (root / name).unlink()
    before = tree(root)
    with pytest.raises(UserError, match="a different teacher"):
        cache_teacher(asked(root, weights=other_teacher(tmp_path)), CPU)
    assert tree(root) == before
    cache_teacher(asked(root), CPU)
    assert tree(root) == original


def test_a_codec_is_not_fitted_over_that_of_a_plan(tmp_path, monkeypatch):
    """The second job fits its codec while the first one starts and finishes."""
    root = tmp_path / "cache"
    first, second = (asked(root, cache={"codec": "transform", "codec_noise": noise}) for noise in (0.3, 0.5))
    real = calibration.select_codec

    def select(*args):
        monkeypatch.setattr(calibration, "select_codec", real)
        cache_teacher(first, CPU)
        return real(*args)

    monkeypatch.setattr(calibration, "select_codec", select)
    with pytest.raises(UserError, match="selected or fitted with different options"):
        cache_teacher(second, CPU)
    assert verify_cache(root, deep=True) == []
    cache_teacher(first, CPU)


def test_a_codec_that_another_job_has_replaced_stops_the_job_before_its_plan(tmp_path, meanwhile):
    root = tmp_path / "cache"
    first, second = (asked(root, cache={"codec": "transform", "codec_noise": noise}) for noise in (0.3, 0.5))

    def replace_codec():
        meanwhile(lambda: (_ for _ in ()).throw(UserError("stopped")))
        with pytest.raises(UserError, match="stopped"):
            cache_teacher(second, CPU)

    meanwhile(replace_codec)
    with pytest.raises(UserError, match="another job is writing this cache"):
        cache_teacher(first, CPU)
    assert not (root / "plan.json").exists()
    cache_teacher(first, CPU)
    assert verify_cache(root, deep=True) == []


def test_what_was_whole_is_found_by_its_sidecar(tmp_path):
    root = tmp_path / "cache"
    cache_teacher(asked(root), CPU)
    ledger = resume.CommittedUnits(root, read_plan(root).units())
    assert ledger.skipped_images() == {}
    shutil.rmtree(unit_folder(root, 0, 1))
    assert resume.CommittedUnits(root, read_plan(root).units()).skipped_images() is None


def test_an_existing_cache_grows_with_its_own_options(tmp_path):
    """`cache-teacher --cache X --views N`, as an error of `distill` suggests, for a cache with other options than the
    recipe's."""
    root = tmp_path / "cache"
    changes = {"views": {"size": 48, "seed": 3}, "cache": {"codec": "float16", "backend": "zarr", "num_views": 1}}
    make(root, shared_weights(), data=SMALL, **changes)
    before = read_plan(root).facts
    config = cache_teacher_config(CacheTeacherConfig, {"cache.path": str(root), "cache.num_views": 2})
    assert cache_teacher(config, CPU).num_views == 2
    after = read_plan(root).facts
    assert (after.fingerprint, after.view_recipe, after.data) == (before.fingerprint, before.view_recipe, before.data)
    assert verify_cache(root, deep=True) == []
    again = cache_teacher_config(CacheTeacherConfig, {"cache.path": str(root)})
    assert again.cache.num_views == 2
    other = cache_teacher_config(CacheTeacherConfig, {"cache.path": str(root), "cache.codec": "int4"})
    with pytest.raises(UserError, match="codec"):
        cache_teacher(other, CPU)


def test_several_caches_keep_their_views(tmp_path):
    root = tmp_path / "many"
    teachers = {"teachers": "demo_swin,demo_swin", "teacher.weights": f"{shared_weights()},other.safetensors"}
    make(root / "demo_swin", shared_weights(), data=SMALL, cache={"num_views": 1})
    given = {"cache.path": str(root), **teachers}
    assert cache_teacher_config(CacheTeacherConfig, given).cache.num_views == 1
    assert cache_teacher_config(CacheTeacherConfig, {**given, "cache.num_views": 3}).cache.num_views == 3
