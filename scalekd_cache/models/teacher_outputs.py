"""The teacher's outputs on held-out images, which an unlabeled cache stores for comparison with students.

In: a teacher and the validation split. Out: `HeldOut`, and its file's bytes.
Invariant: the file identifies its images, and using it with different images is an error. Sizes are checked before
anything is allocated.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scalekd_cache.data.base import Source
from scalekd_cache.data.held_out import MAX_HELD_OUT
from scalekd_cache.errors import UserError, counted
from scalekd_cache.models.evaluate import CenterViews, center_views
from scalekd_cache.models.teacher import Teacher
from scalekd_cache.progress import progress
from scalekd_cache.store.base import repair_fix
from scalekd_cache.store.checked_files import check_safetensors
from scalekd_cache.store.durable_files import hash_file

MAPPED_IMAGES = 256
"""Maximum number of images with a feature map."""
MAP_BYTES = 1 << 27
"""Maximum total size of all feature maps in bytes. Large maps are stored for fewer images, but at least 2."""


class HeldOut(NamedTuple):
    """The teacher's outputs for center views of held-out images."""

    indices: Tensor
    """(N,) int64: image indices in the validation split, in ascending order."""
    pooled: Tensor
    """(N, P) float32: pooled embeddings."""
    mapped: Tensor
    """(M,) int64: rows of `pooled` whose images have a feature map, in ascending order."""
    features: Tensor
    """(M, C, H, W) float32: feature maps after the final norm."""
    digests: Tensor | None = None
    """(N,) int64: digests of the image files. Early unlabeled caches have none, so their images are not compared."""

    def check_images(self, batch: CenterViews, rows: Sequence[int], source: Source) -> None:
        """Compare these images, whose outputs are in `rows`, with the files that stage 1 read.

        Raises:
            UserError: an image file has changed.
        """
        if self.digests is None:
            return
        changed = (batch.digests != self.digests[list(rows)]).nonzero().flatten().tolist()
        if changed:
            raise UserError(
                "a held-out image has changed since stage 1, so the stored teacher outputs no longer match it",
                got=f"{counted(len(changed), 'changed image')} in a batch of {len(rows)}",
                where=source.samples[batch.indices[changed[0]]].key,
                fix="restore the original image, or build a new cache",
            )


@torch.no_grad()
def run_held_out(teacher: Teacher, source: Source, *, batch_size: int, workers: int = 0) -> HeldOut:
    """Run the teacher on at most `MAX_HELD_OUT` evenly spaced images from the validation split.

    Args:
        teacher: the teacher.
        source: the validation split.
        batch_size: maximum number of images per forward pass.
        workers: number of processes that decode images.

    Raises:
        UserError: none of the images can be decoded.
    """
    wanted = held_out_images(source)
    maps = min(MAPPED_IMAGES, max(2, MAP_BYTES // (4 * math.prod(teacher.spec.feature_shape))))
    every = max(1, math.ceil(len(wanted) / maps))
    indices: list[int] = []
    digests = []
    mapped: list[int] = []
    pooled, features = [], []
    with progress("held-out images", len(wanted), "image") as bar:
        for batch in center_views(source, wanted, teacher.spec.image_size, batch_size=batch_size, workers=workers):
            bar.update(len(batch.indices) + batch.unreadable)
            if not batch.indices:
                continue
            output = teacher(batch.images)
            rows = [row for row in range(len(batch.indices)) if (len(indices) + row) % every == 0]
            mapped += [len(indices) + row for row in rows]
            features.append(output.features[rows].cpu())
            pooled.append((output.pooled if teacher.spec.pooled else output.features.mean((2, 3))).cpu())
            digests.append(batch.digests)
            indices += batch.indices
    if not indices:
        raise UserError(
            "none of the held-out images could be decoded", where=source.name, fix="check the dataset's image files"
        )
    maps_and_rows = torch.tensor(mapped), torch.cat(features)
    return HeldOut(torch.tensor(indices), torch.cat(pooled), *maps_and_rows, torch.cat(digests))


def held_out_images(source: Source) -> Sequence[int]:
    """Indices of the images to run the teacher on: at most `MAX_HELD_OUT`, evenly spaced."""
    total = len(source.samples)
    return range(0, total, max(1, math.ceil(total / MAX_HELD_OUT)))


def held_out_bytes(held_out: HeldOut, source: Source) -> bytes:
    """The file's contents (safetensors). Equal outputs give equal bytes."""
    tensors = {name: tensor for name, tensor in held_out._asdict().items() if tensor is not None}
    data: bytes = save(tensors, metadata={"keys_sha256": _keys_digest(source)})
    return data


def load_held_out(path: Path, source: Source, sha256: str | None = None) -> HeldOut:
    """Read a cache's held-out outputs.

    Args:
        path: the file.
        source: the validation split.
        sha256: the file's sha256 from the manifest (None: not checked).

    Raises:
        UserError: the file is missing or damaged, or belongs to different images.
    """
    try:
        check_safetensors(path, "the file")
        if sha256 is not None and hash_file(path).sha256 != sha256:
            raise UserError("the file's sha256 differs from the manifest's")
        with safe_open(path, framework="pt", device="cpu") as file:
            digest = (file.metadata() or {}).get("keys_sha256")
            stored = [name for name in HeldOut._fields if name != "digests" or name in file.keys()]  # noqa: SIM118
            found = HeldOut(*(file.get_tensor(name) for name in stored))
    except (OSError, SafetensorError, UserError) as error:
        what = "cannot read the teacher's outputs on held-out images"
        raise UserError(what, got=str(error).splitlines()[0], where=path, fix=repair_fix(path)) from error
    if digest != _keys_digest(source):
        raise UserError(
            "the held-out images are not those of the cache",
            got=counted(len(source.samples), "image"),
            expected="the images held out in stage 1",
            where=source.name,
            fix="set --data to the cache's dataset",
        )
    if wrong := _contradiction(found, len(source.samples)):
        fix = f"{repair_fix(path)}, or rebuild the cache"
        raise UserError("the teacher's outputs on held-out images are damaged", got=wrong, where=path, fix=fix)
    return found


def _contradiction(found: HeldOut, images: int) -> str | None:
    """Describe what is wrong with a file's values. None if they are a valid `HeldOut` for this number of images."""
    indices, pooled, mapped, features, digests = found
    tensors, dtypes = (indices, pooled, mapped, features), (torch.int64, torch.float32, torch.int64, torch.float32)
    for name, tensor, dtype, dimensions in zip(HeldOut._fields, tensors, dtypes, (1, 2, 1, 4), strict=False):
        if tensor.dtype != dtype or tensor.ndim != dimensions or not tensor.numel():
            return f"{name}: {tensor.dtype} with shape {tuple(tensor.shape)}"
    if digests is not None and (digests.dtype, digests.shape) != (torch.int64, indices.shape):
        return f"digests: {digests.dtype} with shape {tuple(digests.shape)} for {len(indices)} images"
    if len(pooled) != len(indices) or len(features) != len(mapped):
        return f"{len(pooled)} embeddings for {len(indices)} images, and {len(features)} maps for {len(mapped)}"
    for name, rows, count in (("indices", indices, images), ("mapped", mapped, len(indices))):
        if int(rows[0]) < 0 or int(rows[-1]) >= count or bool((rows.diff() <= 0).any()):
            return f"{name}: not ascending numbers below {count}"
    return None if bool(pooled.isfinite().all() and features.isfinite().all()) else "NaN or Inf"


def _keys_digest(source: Source) -> str:
    digest = hashlib.sha256()
    for sample in source.samples:
        digest.update(sample.key.encode() + b"\n")
    return digest.hexdigest()
