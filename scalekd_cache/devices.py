"""Chooses this process's device once, so that PyTorch, DeepSpeed and NCCL use the same one.

In: the `device` option and the launcher's environment variables. Out: a `torch.device` and its description.
Invariant: if a GPU exists but cannot be used, an error is raised; the run never falls back to the CPU silently. TF32
is off, so float32 runs at full precision.
"""

import ctypes
import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path

import torch

from scalekd_cache.errors import UserError, counted

ACCELERATOR = "DS_ACCELERATOR"
"""DeepSpeed's environment variable. If set to `cpu`, `device=auto` selects the CPU. The tests set it."""
GPU_FILES = "/dev/nvidia[0-9]*"
DRIVER_FILE = Path("/proc/driver/nvidia/version")
MALLOC_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
"""glibc's environment variables. If the user sets one of them, `keep_freed_memory` changes nothing."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of `mallopt`, from glibc's malloc.h."""
HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs."""
INDEX = "https://download.pytorch.org/whl/cu126"
"""PyTorch builds for CUDA 12, which need driver 525 or newer. The default build is for CUDA 13 and needs 580."""


def choose_device(name: str) -> torch.device:
    """Select the device for the `device` option. If it is a GPU, make it PyTorch's current device.

    `cuda` means the GPU for this process's local rank, or the only visible GPU if SLURM gave each task its own. With a
    GPU, this process's tensor operations on the CPU use one thread.

    Raises:
        UserError: the name is unknown, the device does not exist, or PyTorch cannot use the GPU.
    """
    exact_float32()
    kind, _, number = name.partition(":")
    if name == "auto":
        kind = "cuda" if os.environ.get(ACCELERATOR) != "cpu" and _cuda_works() else "cpu"
    if kind not in ("cpu", "cuda") or (":" in name and not (kind == "cuda" and number.isdecimal())):
        raise UserError(
            "unknown device", got=name, expected="auto, cpu, cuda or cuda:N", fix="set device to one of these values"
        )
    if kind == "cpu":
        keep_freed_memory()
        return torch.device("cpu")
    index = int(number) if number else 0 if has_own_gpu() else _local_rank()
    count = torch.cuda.device_count()
    if index >= count:
        _cuda_works()
        known = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0" if count else "cpu, because there is no GPU"
        raise UserError(
            "the CUDA device does not exist",
            got=f"cuda:{index}",
            expected=known,
            fix="set device to a device on this node" if number or not count else "lower --nproc, or set device=cpu",
        )
    torch.cuda.set_device(index)
    torch.set_num_threads(1)  # with more, each copy waits for threads that loader workers keep off the cores
    return torch.device("cuda", index)


def usable_device(device: torch.device | str) -> torch.device:
    """The device that a custom training loop asked for. Unlike `choose_device`, it changes no global setting.

    Raises:
        UserError: PyTorch does not know the device or cannot use it.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            "PyTorch cannot use this device",
            got=f"{device}: {str(error).splitlines()[0][:200]}",
            fix='set device to a device on this machine, such as "cpu" or "cuda:0"',
        ) from error


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory in this process and its forks instead of returning it to the operating system.

    By default, glibc maps every block above 32 MiB anew, so each step on a CPU faults in its activations again: 36% of
    the CPU time of a ResNet-50 step (docs/guides/memory.md). Other C libraries have no `mallopt` and are left alone.
    """
    if any(name in os.environ for name in MALLOC_VARIABLES):
        return
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def describe_setup(device: torch.device, precision: str, processes: int, workers: str) -> str:
    """A line for the start of a job: device, precision, number of processes, and loader workers per process (as
    text)."""
    kind = str(autocast_dtype(precision, device)).removeprefix("torch.")
    each = counted(processes, "process")
    return f"{describe_device(device)}, {kind}, {each}, {workers}"


def exact_float32() -> None:
    """Compute float32 matrix products and convolutions at full precision. cuDNN defaults to TF32 (10 mantissa bits)."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The autocast dtype for a `precision` option. "auto" means bfloat16 on a GPU and float32 on a CPU."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """An autocast context for this dtype; float32 disables autocast. Meta tensors use CPU autocast."""
    kind = "cpu" if device.type == "meta" else device.type
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16)


def has_own_gpu() -> bool:
    """Whether srun gave this process its own GPU. That GPU has index 0 regardless of the local rank."""
    local_rank = os.environ.get("LOCAL_RANK")
    return local_rank is not None and os.environ.get("SLURM_LOCALID") == local_rank and torch.cuda.device_count() == 1


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _cuda_works() -> bool:
    """Whether PyTorch can use a GPU.

    Raises:
        UserError: this process has access to a GPU, but PyTorch cannot use it.
    """
    if torch.cuda.is_available():
        return True
    files = [file for file in sorted(glob(GPU_FILES)) if _opens(file)]
    if not files or os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN:
        return False
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        reason = "PyTorch gives no reason"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    raise UserError(
        "this machine has an NVIDIA GPU, but PyTorch cannot use it",
        got=f"torch {torch.__version__}, built for {built}; NVIDIA driver {driver_version()}; {reason}",
        expected="a PyTorch build for this driver: CUDA 13 needs driver 580 or newer, CUDA 12 needs 525",
        where=files[0],
        fix=f"pip install --force-reinstall torch torchvision --index-url {INDEX} (CUDA 12), or update the driver; to "
        "use the CPU, set device=cpu",
    )


def _opens(file: str) -> bool:
    """Whether this process can open a device file. Containers and SLURM hide GPUs that were not requested."""
    try:
        os.close(os.open(file, os.O_RDWR))
    except OSError:
        return False
    return True


def driver_version() -> str:
    """The NVIDIA driver version, or `unknown` without a driver."""
    try:
        words = DRIVER_FILE.read_text(encoding="utf-8", errors="replace").splitlines()[0].split()
    except (OSError, IndexError):
        return "unknown"
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that can affect the cached bytes, recorded for diagnosis and never compared."""
    names = ("scalekd-cache", "torch", "torchvision", "timm", "pillow", "numpy", "webdataset", "zarr", "numcodecs")
    return {name: importlib.metadata.version(name) for name in names if _installed(name)}


def _installed(name: str) -> bool:
    return any(importlib.metadata.distributions(name=name))


def gpu_versions(device: torch.device) -> dict[str, str]:
    """GPU model and driver, CUDA and cuDNN versions, which can change a result's last bits. Empty on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver_version(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
    }


def recorded_versions(device: torch.device) -> dict[str, str]:
    """Library, GPU and driver versions that can affect the cached bytes. They are recorded for diagnosis only."""
    return {**library_versions(), **gpu_versions(device)}


def describe_device(device: torch.device) -> str:
    """One-line description of the device, printed at the start of every job."""
    threads = counted(torch.get_num_threads(), "thread")
    if device.type != "cuda":
        unused = torch.cuda.device_count()
        more = f"; {unused} GPU{'s' * (unused > 1)} not used" if unused else ""
        return f"device: {device} ({threads}{more})"
    facts, gib = gpu_versions(device), torch.cuda.get_device_properties(device).total_memory / 2**30
    software = f"driver {facts['driver']}, CUDA {facts['cuda']}, cuDNN {facts['cudnn']}"
    return f"device: {device} ({facts['gpu']}, {gib:.0f} GiB; {software}; {threads})"


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""Launcher variables of a process that no launcher started."""


def set_launcher_variables(device: torch.device) -> None:
    """Set any missing launcher variables for torch and DeepSpeed, which use LOCAL_RANK as the GPU index.

    Without a launcher, this process is rank 0 of 1. The variables stay set because DeepSpeed reads LOCAL_RANK at every
    step.

    Raises:
        UserError: multiple processes on this node would use the same GPU.
    """
    if device.type == "cuda":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if device.index != _local_rank() and (processes > 1 or _local_rank() > 0) and not has_own_gpu():
            raise UserError(
                "multiple processes on a node cannot share a GPU",
                got=f"device={device} for local rank {_local_rank()}",
                expected="device=cuda, so that each process uses the GPU for its local rank",
                fix="set device=cuda, or --nproc 1",
            )
        os.environ["LOCAL_RANK"] = str(device.index)
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)


@contextmanager
def restored_launcher_variables() -> Iterator[None]:
    """Context manager that undoes `set_launcher_variables`, so that commands started later by this process (a notebook)
    can use a launcher."""
    before = {name: os.environ.get(name) for name in ALONE}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def deepspeed_device(device: torch.device) -> Iterator[None]:
    """Context manager for importing DeepSpeed, which reads `DS_ACCELERATOR` or else detects the device."""
    before = os.environ.get(ACCELERATOR)
    os.environ[ACCELERATOR] = device.type
    try:
        yield
    finally:
        del os.environ[ACCELERATOR]
        if before is not None:
            os.environ[ACCELERATOR] = before


@contextmanager
def memory_errors(fix: str) -> Iterator[None]:
    """Context manager that turns out-of-memory errors into a `UserError` with advice (`fix`)."""
    try:
        yield
    except RuntimeError as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        if not on_gpu and "DefaultCPUAllocator" not in str(error):  # PyTorch has no exception class for it
            raise
        where = "GPU" if on_gpu else "machine"
        raise UserError(f"the {where} is out of memory", got=str(error).splitlines()[0][:300], fix=fix) from error
