"""Compares teacher and student on held-out images by nearest neighbors and feature maps.

In: a run on a cache without labels, its export, and the teacher outputs stored by stage 1. Out: pictures for the page.
Invariant: nothing is trained, and the teacher is not run. Missing inputs are noted on the page.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from scalekd_cache.config.places import cache_places
from scalekd_cache.convert.timm_export import WEIGHTS
from scalekd_cache.data.base import key_text, sample_indices
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.models.evaluate import ValidationImages, center_views, omitted
from scalekd_cache.models.normalize import Normalize
from scalekd_cache.models.student import Student
from scalekd_cache.models.teacher_outputs import HeldOut, load_held_out
from scalekd_cache.reports.colors import fit_palette, overlay, paint
from scalekd_cache.reports.page import SIDE, Picture, picture
from scalekd_cache.store.checked_files import check_safetensors
from scalekd_cache.store.manifest import HELD_OUT, read_manifest
from scalekd_cache.store.remote.remote_path import local_path, open_place
from scalekd_cache.training.run_evaluation import open_run_source
from scalekd_cache.training.run_export import consolidated_student
from scalekd_cache.training.run_files import classes_of, read_config, read_facts, student_options

QUERIES, NEIGHBORS, MAPS = 6, 5, 6
"""Numbers of images shown with neighbors, neighbors per image, and images shown with maps."""
MOST = 1_000
"""Maximum number of images searched for neighbors."""


class Neighbor(NamedTuple):
    """A neighboring image."""

    picture: Picture
    common: bool
    """Whether the other model also ranks it among the nearest."""


class Neighbors(NamedTuple):
    """An image and its nearest neighbors, nearest first."""

    picture: Picture
    key: str
    teacher: list[Neighbor]
    student: list[Neighbor]


class Maps(NamedTuple):
    """An image's feature maps, as colors."""

    key: str
    picture: Picture
    teacher: Picture
    student: Picture


class Spaces(NamedTuple):
    """The report section with neighbors and maps for a run."""

    searched: int
    neighbors: list[Neighbors]
    maps: list[Maps]


def read_spaces(run: Path, data: str | None, process: Process, notes: list[str]) -> Spaces | None:
    """Build the section for a finished run on a cache without labels. If anything is missing, adds a note and returns
    None."""
    try:
        source = open_run_source(run, data)
        root = open_place(cache_places(str(read_config(run).get("cache")))[0])
        digest = read_manifest(root).facts.teacher_files.get(HELD_OUT)
        held_out = load_held_out(local_path(root / HELD_OUT), source, digest)
        return _spaces(run, ValidationImages(source, 0), held_out, process, notes)
    except UserError as error:
        if data:
            raise
        notes.append(f"{run.name}: held-out images are not compared: {str(error).splitlines()[0]}")
        return None


@torch.no_grad()
def _spaces(run: Path, images: ValidationImages, held_out: HeldOut, process: Process, notes: list[str]) -> Spaces:
    options, facts = student_options(run), read_facts(run)
    size = facts["image_size"]
    images.size = size
    file = run / "export" / WEIGHTS
    check_safetensors(file, "the exported student")
    student = consolidated_student(options, load_file(file), classes_of(facts), size).to(process.device)
    normalize = Normalize(options.mean, options.std).to(process.device)
    rows = sample_indices(len(held_out.indices), MOST)
    indices = held_out.indices[rows].tolist()
    embedded: list[Tensor] = []
    found: list[int] = []
    row_of = dict(zip(indices, rows, strict=True))
    for batch in center_views(images.source, indices, size):
        if batch.indices:
            held_out.check_images(batch, [row_of[index] for index in batch.indices], images.source)
            embedded.append(student.embed(normalize(batch.images.to(process.device))).float().cpu())
            found += batch.indices
    if lost := len(indices) - len(found):
        notes.append(f"{run.name}: {omitted(lost, 'held-out image')}")
    teacher = held_out.pooled[[row_of[index] for index in found]]
    neighbors = _neighbors(images, found, teacher, torch.cat(embedded)) if len(found) > NEIGHBORS else []
    return Spaces(len(found), neighbors, _maps(images, held_out, student, normalize, process))


def _neighbors(images: ValidationImages, found: list[int], teacher: Tensor, student: Tensor) -> list[Neighbors]:
    count = min(NEIGHBORS, len(found) - 1)
    queries = sample_indices(len(found), QUERIES)
    near = [_nearest(space, queries, count) for space in (teacher, student)]
    rows = []
    for query, of_teacher, of_student in zip(queries, *near, strict=True):
        shown, other = (
            [Neighbor(_picture(images, found[row]), row in set(others)) for row in mine]
            for mine, others in ((of_teacher, of_student), (of_student, of_teacher))
        )
        rows.append(Neighbors(_picture(images, found[query]), _key(images, found[query]), shown, other))
    return rows


def _nearest(space: Tensor, queries: list[int], count: int) -> list[list[int]]:
    """For each query, the rows of the `count` embeddings with the largest cosine."""
    unit = F.normalize(space, dim=1)
    similarity = unit[queries] @ unit.T
    similarity[range(len(queries)), queries] = -torch.inf
    nearest: list[list[int]] = similarity.topk(count, dim=1).indices.tolist()
    return nearest


def _maps(
    images: ValidationImages, held_out: HeldOut, student: Student, normalize: Normalize, process: Process
) -> list[Maps]:
    """Feature maps from teacher and student. Each model has its own palette."""
    places = sample_indices(len(held_out.mapped), MAPS)
    mapped = held_out.mapped[places].tolist()
    found = held_out.indices[mapped].tolist()
    (batch,) = center_views(images.source, found, images.size)
    if not batch.indices:
        return []
    held_out.check_images(batch, [mapped[found.index(index)] for index in batch.indices], images.source)
    s4 = student(normalize(batch.images.to(process.device))).s4.float().cpu()
    features = held_out.features[[places[found.index(index)] for index in batch.indices]]
    palettes = fit_palette(features), fit_palette(s4)
    rows = []
    for at, index in enumerate(batch.indices):
        pixels, key = batch.images[at].permute(1, 2, 0).numpy(), _key(images, index)
        painted = [
            picture(overlay(pixels, paint(palette, maps[at]), SIDE), f"Feature map of the {name} for {key}")
            for name, palette, maps in zip(("teacher", "student"), palettes, (features, s4), strict=True)
        ]
        rows.append(Maps(key, _picture(images, index), *painted))
    return rows


def _key(images: ValidationImages, index: int) -> str:
    return key_text(images.source.samples[index].key)


def _picture(images: ValidationImages, index: int) -> Picture:
    example = images[index]
    assert example is not None, index
    return picture(example[0].permute(1, 2, 0).numpy(), f"The held-out image {_key(images, index)}")
