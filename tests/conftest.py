"""Fixtures shared by tests of whole commands: a teacher's weights, caches and runs, each made once per session."""

import os

import commands
import pytest
from commands import LIMIT_S, TEST_LIMITS, TRAIN_OPTIONS, cache_flags, distill_flags, make, run

# All tests use the CPU on any machine (also with `device=auto`), except those marked gpu.
os.environ["DS_ACCELERATOR"] = "cpu"
# `make test` runs the tests: without its variables, messages name `scalekd` commands.
for name in ("MAKELEVEL", "MAKEFLAGS"):
    os.environ.pop(name, None)
os.environ.setdefault("PYTEST_TIMEOUT", str(TEST_LIMITS * LIMIT_S))  # pytest-timeout's variable, applies to every test


@pytest.hookimpl(tryfirst=True)  # must run before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Mark tests for continuous integration as slow. With several test processes, one process gets all tests of a
    file, and one gets all tests that use the session's caches and runs."""
    for item in items:
        if item.get_closest_marker("ci_slow"):
            item.add_marker(pytest.mark.slow)
        group = "workshop" if "workshop" in item.fixturenames else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session", autouse=True)
def no_fsync():
    """Skip fsync in the processes of pytest: thousands of small ones take longer than the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scalekd_cache.store.durable_files.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="session")
def weights(workshop):
    """A demo teacher with random weights; accuracy does not matter here, but all tests use the same weights."""
    import timm
    import torch
    from safetensors.torch import save_file

    from scalekd_cache.models.teacher import demo_teacher_args
    from scalekd_cache.models.timm_models import DEMO_TIMM_NAME

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = timm.create_model(DEMO_TIMM_NAME, num_classes=10, **demo_teacher_args())
    file = workshop / "teacher.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, str(file))
    return file


def _set(options):
    return " ".join(f"{name}={value}" for name, value in options.items())


@pytest.fixture(scope="session")
def cache(workshop, weights):
    """A webdataset cache made by `make cache-teacher`."""
    folder = workshop / "caches" / "tar"
    options = {name: value for name, value in commands.CACHE_OPTIONS.items() if name != "cache.num_views"}
    output = make("cache-teacher", CACHE=folder, TEACHER_WEIGHTS=weights, VIEWS=2, SET=_set(options))
    assert "96 images x 2 views" in output
    assert "device: cpu (" in output
    return folder


@pytest.fixture(scope="session")
def zarr_cache(workshop, weights):
    folder = workshop / "caches" / "zarr"
    run("cache_teacher", *cache_flags(folder, weights, **{"cache.backend": "zarr"}))
    return folder


@pytest.fixture(scope="session")
def finished(workshop, cache):
    """A finished run of `make distill` from the cache; the reference for other runs."""
    folder = workshop / "runs" / "finished"
    output = make("distill", STUDENT=commands.STUDENT, CACHE=cache, RUN=folder, SET=_set(TRAIN_OPTIONS))
    assert "resuming" not in output
    assert "device: cpu (" in output
    return folder


@pytest.fixture(scope="session")
def alone(workshop, cache):
    """The same student and steps without a teacher."""
    folder = workshop / "runs" / "alone"
    run("distill", *distill_flags(cache, folder, **{"train.targets": "none"}))
    return folder
