"""The smoke run for a GPU: its guard, its files, and the code of its parts at tiny sizes on a CPU."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_smoke
from benchmarks.gpu_smoke import PARTS, guarded, ratios, run_parts
from benchmarks.smoke import __main__ as smoke_part
from benchmarks.smoke import jobs, kernels, sizes
from benchmarks.smoke.__main__ import Report, run_part
from benchmarks.smoke.sizes import FAILED, GPU, STAND_IN, write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    write_images(folder / "images", STAND_IN)
    return folder


def test_a_part_that_hangs_ends_with_its_children(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    log, started = tmp_path / "log", time.monotonic()
    status, seconds = guarded([sys.executable, "-c", child], 1.0, log)
    assert status == "stopped after 1 s"
    assert 1 <= seconds <= time.monotonic() - started < 20


def test_what_a_failing_part_reported_is_kept(tmp_path, monkeypatch):
    """The first part reports and fails; in the next run, the second one has no time left. The file records both."""
    Report(tmp_path / "a.json").add("ms", 3)
    monkeypatch.setattr(
        gpu_smoke, "guarded", lambda command, limit_s, log: (log.write_text("why"), ("exit code 1", 5.0))[1]
    )
    out = tmp_path / "out.json"
    run_parts("a", tmp_path, out, stand_in=True)
    found = json.loads(out.read_text())["parts"]["a"]
    assert found["status"] == "exit code 1"
    assert found["figures"] == {"ms": 3}
    assert found["log"] == "why"
    run_parts("b", tmp_path, out, stand_in=True, total_limit_s=0.5)
    found = json.loads(out.read_text())["parts"]
    assert found["b"]["status"].startswith("not started")
    assert found["a"]["figures"] == {"ms": 3}  # an earlier run's


@pytest.mark.ci_slow
def test_a_failed_result_does_not_end_its_part(folder, monkeypatch):
    """Out of memory in one variant, a codec that fails, a resume that fails: the results after it are reported, and the
    exit code tells."""

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    reported = {}
    monkeypatch.setattr(kernels, "codec_figures", full)
    kernels.codecs(STAND_IN, folder, reported.__setitem__)
    assert {tuple(value) for value in reported.values()} == {(FAILED,)}
    assert len(reported) == 3
    monkeypatch.setattr(jobs, "cache_of", lambda *args, **options: folder)
    for name in ("timed_epoch", "resumed", "audited"):
        monkeypatch.setattr(jobs, name, full)
    monkeypatch.setattr(jobs, "trained_on_cpu", lambda *args: {"exit_code": 0})
    reported.clear()
    jobs.trainer(STAND_IN, folder, reported.__setitem__)
    jobs.recovery(STAND_IN, folder, reported.__setitem__)
    assert reported.pop("device_cpu") == {"exit_code": 0}
    assert {value[FAILED] for value in reported.values()} == {
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    }
    assert reported.keys() == {*(variant.name for variant in jobs.variants(STAND_IN)), "resume", "audit"}
    monkeypatch.setattr(smoke_part, "run_part", lambda *args, **options: {"resume": {FAILED: "why"}})
    with pytest.raises(SystemExit) as ended:
        smoke_part.main(["g", str(folder), "--stand-in"])
    assert ended.value.code == 1


def test_small_shared_memory_lowers_the_number_of_workers(monkeypatch, tmp_path):
    monkeypatch.setattr(sizes, "available_cores", lambda: 16)
    for free, expected in ((64 << 20, 0), (1 << 30, 10), (64 << 30, 15)):
        monkeypatch.setattr(sizes.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert sizes.gpu_workers(tmp_path) == expected


def test_most_important_variants_are_first():
    """The part is stopped after 240 s."""
    names = [variant.name for variant in jobs.variants(GPU)]
    first = ("synthetic", "cached", "live", "baseline", "share 1/4", "lite", "linear")
    assert names[:7] == [f"{name} 128" for name in first]
    assert names[-4:-1] == ["zero1 128", "zero2 128", "zero3 128"]  # ZeRO 3 keeps its engine in memory
    assert len(set(names)) == len(names) == 22


def test_ratios_with_goals():
    trained = {"synthetic 8": 100, "cached 8": 101, "live 8": 190}
    figures = {name: {"step_ms": value} for name, value in trained.items()}
    figures["live 8"]["teacher_ms"] = 100
    parts = {
        "f": {"figures": figures},
        "e": {"figures": {"stage1": {"ratio": 0.9}}},
        "c": {"figures": {"int8": {"decode_ms": 4.0}}},
    }
    met = {row["what"]: row["met"] for row in ratios(parts)}
    assert met == {
        "decode, int8, ms per batch": True,
        "stage 1 / plain teacher": False,
        "cached / synthetic targets, micro-batch 8": True,
        "live / cached, micro-batch 8": False,
    }


def test_kernels(folder):
    assert run_part("a", folder, stand_in=True)["limits"]["open_files"][0] > 0
    attention = run_part("b", folder, stand_in=True)
    assert len(attention) == 2 * 4 * 2  # two projectors, four backends, two layouts of the query
    assert attention["stage 3, math, expanded query"]["d_query"] < 0.02
    codecs = run_part("c", folder, stand_in=True)
    assert set(codecs) == {"int8", "transform", "transform-rotated"}
    assert all(facts["rows_that_differ_from_the_cpu"] == 0 for facts in codecs.values())


def test_sizes_of_the_real_run_fit():
    assert GPU.images * GPU.views % GPU.teacher_batches[-1] == 0
    assert all(GPU.trained % micro == 0 for micro in GPU.micro_batches)


@pytest.mark.slow
def test_whole_stand_in(tmp_path):
    """Every part in a separate process, as on a GPU."""
    assert gpu_smoke.main(["--stand-in", "--out", str(tmp_path / "out.json")]) == 0
    parts = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert set(parts) == set(PARTS)
    assert parts["f"]["figures"]["cached 8"]["step_ms"] > 0
    recovery = parts["g"]["figures"]
    assert recovery["resume"]["difference"] < 1e-5
    assert recovery["audit"]["left"] == []
    assert recovery["audit"]["same_bytes"]
    assert recovery["device_cpu"]["exit_code"] == 0
