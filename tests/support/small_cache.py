"""A tiny cache of demo digits, made in-process by a small Swin with random weights."""

import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import timm
import torch
from image_files import write
from safetensors.torch import save_file

from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.config.stage1 import CacheTeacherConfig, DataConfig, StoreConfig, TeacherConfig, ViewConfig
from scalekd_cache.distributed import Process
from scalekd_cache.models.teacher import demo_teacher_args
from scalekd_cache.models.timm_models import DEMO_TIMM_NAME
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.sealed_json import SEAL, sealed

torch.set_num_threads(1)
CPU = Process(0, 1, torch.device("cpu"))
SAMPLES, SHARD, VIEWS = 96, 32, 2


def write_weights(path, num_classes=10):
    """A weights file for the demo teacher, randomly initialized."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(DEMO_TIMM_NAME, num_classes=num_classes, **demo_teacher_args())
    save_file(model.state_dict(), str(path))
    return path


def options(root, weights, *, data=None, views=None, teacher=None, cache=None, **rest):
    """Stage-1 options for a cache in `root`; keyword arguments override sections."""
    small = {"num_views": VIEWS, "views_per_group": VIEWS, "samples_per_shard": SHARD}
    drawn = {"size": 64, "crop_scale": (0.5, 1.0), "interpolation": "bilinear", "flip_probability": 0.0}
    return CacheTeacherConfig(
        data=DataConfig(**{"max_samples": SAMPLES, **(data or {})}),
        views=ViewConfig(**{**drawn, **(views or {})}),
        teacher=TeacherConfig(**{"weights": str(weights), "batch_size": 16, "check_classes": False, **(teacher or {})}),
        cache=StoreConfig(**{"path": str(root), **small, **(cache or {})}),
        **rest,
    )


def make(root, weights, **changes):
    """Make the cache and open it."""
    cache_teacher(options(root, weights, **changes), CPU)
    return Cache.open(root)


@functools.cache
def _pristine(pixels):
    """One cache for all test modules, removed with the process."""
    holder = tempfile.TemporaryDirectory(prefix="small-cache-")
    folder = Path(holder.name)
    weights = write_weights(folder / "teacher.safetensors")
    make(folder / "cache", weights, views={"pixels": pixels})
    return holder, weights, folder / "cache"


def shared_weights():
    return _pristine("baked")[1]


def shared_cache(pixels="baked"):
    """A finished cache that tests must not change."""
    return Cache.open(_pristine(pixels)[2])


def copy_of_cache(folder, pixels="baked"):
    """A private copy of a finished cache that a test may damage."""
    shutil.copytree(_pristine(pixels)[2], folder)
    return folder


def unit_files(root):
    """Files in the units: {path: sha256}."""
    files = sorted(path for path in (root / "units").rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def unit_stats(root):
    """Inode and modification time of every file in the units."""
    return {
        path.relative_to(root): (s.st_ino, s.st_mtime_ns) for path in (root / "units").rglob("*") if (s := path.stat())
    }


def flip_byte(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    write(path, bytes(data))


def tree(root):
    """All files: {path: sha256}."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def reseal(path, change):
    """Change the object in manifest.json or plan.json and update its checksum."""
    fields = json.loads(path.read_text())
    del fields[SEAL]
    change(fields)
    path.write_bytes(sealed(fields))
