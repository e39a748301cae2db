"""scalekd-cache: run a frozen vision teacher once, cache its outputs, and train any number of students from them.

Exports the names used in a custom training loop (docs/guides/students.md). Each is imported on first use.
Invariant: importing the package does not import torch or other slow modules.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalekd_cache.api import cache_teacher, distill, finetune, probe, publish, pull
    from scalekd_cache.caching.cache_info import CacheInfo
    from scalekd_cache.config.stage2 import ScaleKDConfig
    from scalekd_cache.errors import RunInterrupted, UserError
    from scalekd_cache.loader.decoder import RecordDecoder
    from scalekd_cache.models.tail import TailParts, register_family
    from scalekd_cache.store.reader import Cache
    from scalekd_cache.training.custom_loop import CachedTargets, ScaleKDLoss, timm_student
    from scalekd_cache.training.run_files import RunSummary

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "CacheInfo",
    "CachedTargets",
    "RecordDecoder",
    "RunInterrupted",
    "RunSummary",
    "ScaleKDConfig",
    "ScaleKDLoss",
    "TailParts",
    "UserError",
    "__version__",
    "cache_teacher",
    "distill",
    "finetune",
    "probe",
    "publish",
    "pull",
    "register_family",
    "timm_student",
]

_HOME = {
    "Cache": "store.reader",
    "CacheInfo": "caching.cache_info",
    "CachedTargets": "training.custom_loop",
    "RecordDecoder": "loader.decoder",
    "RunInterrupted": "errors",
    "RunSummary": "training.run_files",
    "ScaleKDConfig": "config.stage2",
    "ScaleKDLoss": "training.custom_loop",
    "TailParts": "models.tail",
    "UserError": "errors",
    "cache_teacher": "api",
    "distill": "api",
    "finetune": "api",
    "probe": "api",
    "publish": "api",
    "pull": "api",
    "register_family": "models.tail",
    "timm_student": "training.custom_loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
