"""Information about a finished cache, for users and for `--json`.

In: a cache's folder and manifest. Out: a `CacheInfo`.
Invariant: importing this file does not import torch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.store.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """Information about a finished cache."""

    path: Path
    """The cache folder."""
    images: int
    """Images per view."""
    views: int
    """Views per image."""
    teacher: str
    """Name of the teacher, followed by "(random weights)" if it has any."""
    teacher_top1: float | None
    """The teacher's accuracy in percent on the validation images (None: not measured)."""
    bytes_per_view: dict[str, float]
    """Mean bytes on disk for pixels, features, targets and index, and in total."""
    fidelity: dict[str, dict[str, float]]
    """Cosine and mean-removed cosine of the decoded features: mean and 1st percentile."""
    fingerprint: str
    """Hash of everything that affects the cached bytes."""
    others: tuple["CacheInfo", ...] = ()
    """With multiple teachers, the caches of the remaining teachers, in order."""

    @property
    def place(self) -> str:
        """The value for `distill(cache=...)`: the folder, or a comma-separated list of all teachers' folders."""
        return ",".join(str(one.path) for one in (self, *self.others))

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {**asdict(self), "path": str(self.path), "others": [other.to_json() for other in self.others]}


def caches_info(config: CacheTeacherConfig, manifests: Sequence[Manifest]) -> CacheInfo:
    """Information about a job's finished caches, read from their manifests."""
    pairs = zip(config.per_teacher(), manifests, strict=True)
    first, *others = [cache_info(Path(one.cache.path), manifest) for one, manifest in pairs]
    return replace(first, others=tuple(others))


def cache_info(root: Path, manifest: Manifest) -> CacheInfo:
    """Information about a finished cache."""
    from scalekd_cache.models.teacher_spec import teacher_label

    facts = manifest.facts
    return CacheInfo(
        path=root,
        images=manifest.num_samples,
        views=manifest.num_views,
        teacher=teacher_label(facts.teacher),
        teacher_top1=facts.teacher["top1"],
        bytes_per_view=dict(manifest.bytes_per_view),
        fidelity={name: dict(row) for name, row in manifest.fidelity.items()},
        fingerprint=facts.fingerprint,
    )
