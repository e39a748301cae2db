"""The device of a process, its report, and that DeepSpeed uses the same device."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from commands import LIMIT_S, ROOT

from scalekd_cache import devices
from scalekd_cache.devices import (
    autocast_dtype,
    choose_device,
    deepspeed_device,
    describe_device,
    describe_setup,
    library_versions,
    memory_errors,
    recorded_versions,
    restored_launcher_variables,
    set_launcher_variables,
    usable_device,
)
from scalekd_cache.errors import UserError, counted

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_LOCALID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("DS_ACCELERATOR")


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs (by default)."""

    def set_count(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    set_count(2)
    return set_count


@pytest.fixture
def unusable(monkeypatch, tmp_path):
    """A machine with a GPU whose driver is too old for this PyTorch."""

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).")

    (tmp_path / "nvidia0").touch()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC\n")
    monkeypatch.setattr(devices, "GPU_FILES", f"{tmp_path}/nvidia[0-9]*")
    monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "init", init)


def test_devices(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    chosen, threads = [], []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert choose_device("cuda") == choose_device("auto") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    assert chosen == [1, 1, 0]
    assert threads == [1, 1, 1]  # loader workers use the other cores
    with pytest.raises(UserError, match="does not exist") as error:
        choose_device("cuda:2")
    assert "expected: cuda:0 to cuda:1\n" in str(error.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", "", "cuda:-1", "cuda:²", "cuda:", "cpu:3", "cpu:0"])
def test_unknown_devices(name):
    with pytest.raises(UserError, match="unknown device"):
        choose_device(name)


def test_the_tests_use_the_cpu_on_a_machine_with_gpus(gpus, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert choose_device("auto") == CPU
    assert choose_device("cuda").type == "cuda"


def test_a_slurm_task_with_one_visible_gpu_takes_it(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(UserError, match="does not exist"):  # torchrun with more processes than GPUs
        choose_device("cuda")
    monkeypatch.setenv("SLURM_LOCALID", "0")  # torchrun in a SLURM task
    with pytest.raises(UserError, match="does not exist"):
        choose_device("auto")
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 0)
    set_launcher_variables(torch.device("cuda", 0))
    assert os.environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_that_cannot_be_used_is_an_error(name, unusable, monkeypatch):
    with pytest.raises(UserError, match="has an NVIDIA GPU, but PyTorch cannot use it") as error:
        choose_device(name)
    for part in ("550.54.15", "driver on your system is too old", "/whl/cu126", "device=cpu"):
        assert part in str(error.value)
    assert choose_device("cpu") == CPU
    if name == "auto":  # hidden by the user, or not accessible
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert choose_device(name) == CPU
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        monkeypatch.setattr(devices, "_opens", lambda file: False)
        assert choose_device(name) == CPU


def test_the_line_and_the_recorded_versions(gpus, monkeypatch):
    assert describe_device(CPU) == f"device: cpu ({counted(torch.get_num_threads(), 'thread')}; 2 GPUs not used)"
    gpus(0)
    assert describe_device(CPU) == f"device: cpu ({counted(torch.get_num_threads(), 'thread')})"
    assert describe_setup(CPU, "auto", 2, "0 loader workers").endswith("), float32, 2 processes, 0 loader workers")
    assert recorded_versions(CPU) == library_versions()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    properties = type("Properties", (), {"total_memory": 80 << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91400)
    gpu = torch.device("cuda", 1)
    assert describe_device(gpu).startswith("device: cuda:1 (NVIDIA H100, 80 GiB; driver ")
    found = recorded_versions(gpu)
    assert found.items() > library_versions().items()
    assert (found["gpu"], found["cudnn"], found["cuda"]) == ("NVIDIA H100", "91400", str(torch.version.cuda))


def test_precision():
    assert autocast_dtype("auto", CPU) == torch.float32
    assert autocast_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert autocast_dtype("bfloat16", CPU) == torch.bfloat16
    assert autocast_dtype("float32", torch.device("cuda", 0)) == torch.float32


def test_float32_is_not_tf32(monkeypatch):
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
    torch.set_float32_matmul_precision("high")
    choose_device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_deepspeed_gets_the_chosen_gpu(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    set_launcher_variables(torch.device("cuda", 3))
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "3"]
    with deepspeed_device(torch.device("cuda", 3)):
        assert os.environ["DS_ACCELERATOR"] == "cuda"
    assert "DS_ACCELERATOR" not in os.environ  # `device=auto` of a later job in this process is not changed
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    set_launcher_variables(torch.device("cuda", 1))
    assert os.environ["LOCAL_RANK"] == "1"
    with pytest.raises(UserError, match="cannot share a GPU"):
        set_launcher_variables(torch.device("cuda", 0))


def test_a_notebook_can_start_processes_after_a_run(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with restored_launcher_variables():
        set_launcher_variables(torch.device("cpu"))
        assert os.environ["RANK"] == "0"
    assert "RANK" not in os.environ
    assert os.environ["MASTER_PORT"] == "29500"


ON_A_GPU_MACHINE = """
import sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
from scalekd_cache.distributed import this_process
from scalekd_cache.errors import UserError
from scalekd_cache.training.trainer import deepspeed_accelerator, start_processes
assert "deepspeed" not in sys.modules
process = this_process("cpu")
start_processes(process)
from deepspeed.accelerator import get_accelerator
print(process.device, get_accelerator().device_name(), torch.distributed.get_backend())
gpu = torch.device("cuda", 0)
try:
    deepspeed_accelerator(gpu)
except UserError as error:
    print(error)
"""


def test_deepspeed_follows_the_device_not_the_machine_and_compiles_nothing(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_GPU_MACHINE],
        env={**environment, "PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cpu cpu gloo" in done.stdout
    assert not list(tmp_path.iterdir())  # DeepSpeed would compile an operator
    assert "already using a different device" in done.stdout


def test_out_of_memory_says_what_to_lower():
    with pytest.raises(UserError, match="out of memory") as error, memory_errors("lower teacher.batch_size"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    assert "Tried to allocate 2.00 GiB" in str(error.value)
    assert "what to do: lower teacher.batch_size" in str(error.value)


@pytest.mark.parametrize("device", ["nope", "cuda:99", "cpu:x"])
def test_a_device_that_a_custom_loop_cannot_use_is_a_user_error(device):
    with pytest.raises(UserError, match=f"(?s)cannot use this device.*{device}"):
        usable_device(device)
    assert usable_device("cpu") == CPU


FAULTS = """
import resource, torch
from scalekd_cache.devices import choose_device
choose_device("cpu")
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10, 1 << 20)  # 40 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
@pytest.mark.parametrize(("variables", "keeps"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "131072"}, False)])
def test_on_a_cpu_freed_memory_is_reused(variables, keeps):
    """Pages of a second tensor of the same size are not faulted in again, unless the user has set glibc's options."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    assert (int(run.stdout) < 1000) == keeps
