"""What a user can choose, as frozen dataclasses, one per owner, and the fingerprint of what changes cached bytes.

In: values from a YAML recipe and dotted overrides (`pipelines/` parses them). Out: checked, immutable configurations.
Invariant: a configuration that exists is valid on its own; checks across configurations are `preflight.py`'s.
"""

from scalekd_cache.config.base import fingerprint, flat, from_plain, require, to_plain
from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.config.stage1 import CacheTeacherConfig, DataConfig, StoreConfig, TeacherConfig, ViewConfig
from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.config.target import CodecTarget, parse_target

__all__ = [
    "CacheTeacherConfig",
    "CodecTarget",
    "DataConfig",
    "DistillConfig",
    "OptimConfig",
    "RemoteConfig",
    "ScaleKDConfig",
    "StoreConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "ViewConfig",
    "fingerprint",
    "flat",
    "from_plain",
    "parse_target",
    "require",
    "to_plain",
]
