"""Opens a dataset by name or path.

In: `DataConfig` and a split, or the data facts in a manifest. Out: a `Source` (keys, labels, encoded images) and a
digest of its listing. Invariant: every command opens its images here, so a name or path means the same dataset in all
of them.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalekd_cache.config.places import home_path
from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.data.base import ListedSource, Source, Split
from scalekd_cache.data.builtin import BUILTIN, open_builtin
from scalekd_cache.data.classes import normalize_name, reorder_classes
from scalekd_cache.data.folder import LAYOUT, is_system_name, open_folder
from scalekd_cache.data.held_out import divide
from scalekd_cache.data.parquet import has_parquet, open_parquet
from scalekd_cache.data.path_list import SUFFIX, open_path_list
from scalekd_cache.data.patterns import is_pattern
from scalekd_cache.data.shards import has_shards, open_shards
from scalekd_cache.errors import UserError, close_names, counted, unknown_name
from scalekd_cache.store.checked_files import unreadable
from scalekd_cache.store.manifest import classes_digest


def open_source(config: DataConfig, split: Split, *, download: bool = True) -> Source:
    """List a dataset.

    Args:
        config: `source` is demo, cifar10, imagenette, a folder (class folders, images without labels, WebDataset tars
            or parquet files), a text file with image paths or a brace pattern of tars; `max_samples` keeps only the
            first samples in canonical order.
        split: train or val. Class names come from train in both cases, unless train has no labels. If an unlabeled
            train has no val, `divide` holds out a share of the `max_samples` images as val.
        download: whether to download a missing dataset; if false, it raises `NotDownloadedError`.

    Raises:
        UserError: the name is unknown, the dataset is missing, unreadable or damaged, or the download fails.
    """
    assert split in ("train", "val"), split
    with _readable(config.source):
        return divide(reorder_classes(_open(config, split, download), config.classes).first(config.max_samples), split)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn errors of the file system, such as a folder that this user may not enter, into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise unreadable(error, error.filename or name, f"the dataset {name}") from error


def open_cache_source(facts: Mapping[str, Any], source: str | None, split: Split) -> Source:
    """The dataset that a cache was made from; see `data_config` for the arguments and `open_recorded_source` for the
    errors."""
    return open_recorded_source(data_config(facts, source), split, None if source else "the cache")


def open_recorded_source(config: DataConfig, split: Split, recorded_by: str | None) -> Source:
    """A dataset whose path was recorded by a cache or a run (None: the user gave the path).

    Raises:
        UserError: nothing exists at the recorded path, or as in `open_source`.
    """
    name = config.source
    with _readable(name):
        missing = not (name in BUILTIN or "://" in name or is_pattern(name) or home_path(name).exists())
    if recorded_by and missing:
        raise UserError(
            f"the dataset is not at the path stored in {recorded_by}",
            got=f"no folder or file {name}",
            fix="set its current path with --data",
        )
    return open_source(config, split)


def data_config(facts: Mapping[str, Any], source: str | None) -> DataConfig:
    """A cache's data options from its manifest; `source`, if given, is the new location of the dataset."""
    return DataConfig(
        source=source or facts["source"],
        devkit=facts.get("devkit"),
        classes=facts.get("classes"),
        download_dir=facts.get("download_dir", "data"),
        max_samples=facts.get("max_samples"),
    )


def _open(config: DataConfig, split: Split, download: bool) -> ListedSource:
    name = config.source
    if name in BUILTIN:
        return open_builtin(name, config, split, download=download)
    if "://" in name or name.startswith("pipe:"):
        raise UserError(
            "data.source is a URL", got=name, expected="a local or mounted path", fix="copy or mount the data first"
        )
    if is_pattern(name):
        return open_shards(name, name, split)
    root = home_path(name)
    if root.suffix.lower() == SUFFIX and root.is_file():
        return open_path_list(name, root)
    if not root.is_dir():
        raise _not_a_folder(name, root)
    has_classes = any(path.is_dir() and not is_system_name(path.name) for path in (root / "train").glob("*"))
    if not has_classes and has_shards(root):
        return open_shards(name, str(root), split)
    if not has_classes and has_parquet(root):
        return open_parquet(name, root, split)
    return open_folder(name, root, split, config.devkit, classes_file=config.classes is None)


def _not_a_folder(name: str, root: Path) -> UserError:
    if root.is_file():
        return UserError(
            f"--data {name} is a file: pass a folder with {LAYOUT}, WebDataset tars or parquet files, "
            f"or a {SUFFIX} file with one image path per line"
        )
    if root.exists():
        return UserError(f"--data {name} is neither a folder nor a regular file")
    beside = [str(folder.parent) for folder in root.parent.glob("*/train")]
    for folder in beside:
        if normalize_name(folder) == normalize_name(str(root)):
            return UserError(
                "--data and the folder's name use different Unicode normalization (NFC and NFD)",
                got=ascii(name),
                expected=ascii(folder),
                fix="use the shell's tab completion for the name, or rename the folder",
            )
    there = [path for path in root.parent.glob("*") if os.path.isdir(path) or path.suffix.lower() == SUFFIX]
    near = close_names(root.name, sorted(path.name for path in there), 3)
    known = dict.fromkeys([*BUILTIN, *beside, *(str(root.parent / other) for other in near)])
    return unknown_name("dataset", name, known, "--data, data.source: a name, a folder, or an image list (.txt)")


def describe_source(source: Source) -> str:
    """One line about a training split: the number of images and classes, or of held-out images if it has no labels."""
    count = len(source.samples)
    place = f"in {source.name.rstrip('/')}/" if os.path.isdir(home_path(source.name)) else f"in {source.name}"
    if source.class_names:
        return f"data: {counted(count, 'image')} of {counted(len(source.class_names), 'class')} {place}"
    if source.held_out:
        total = count + source.held_out
        return (
            f"data: {counted(total, 'image')} without labels {place} "
            + f"({count:,} for training, {source.held_out:,} held out)"
        )
    return (
        f"data: {counted(count, 'image')} without labels {place} (all for training; the validation images are separate)"
    )


def data_facts(source: Source) -> dict[str, Any]:
    """The facts about a dataset that enter a cache's fingerprint."""
    return {
        "listing": listing_digest(source),
        "samples": len(source.samples),
        "class_names": classes_digest(source.class_names),
    }


def listing_digest(source: Source) -> str:
    """SHA-256 hex digest of the keys and labels in canonical order."""
    digest = hashlib.sha256()
    for key, label in source.samples:
        digest.update(f"{key}\0{label}\n".encode())
    return digest.hexdigest()
