"""WebDataset shards as a source: each sample is a run of adjacent tar members with the same key: an image and a .cls.

In: a folder with train and val tars, or a brace pattern for the train tars. Out: a `ListedSource` in tar order whose
work units never span two tars. A split without any .cls has no labels. Invariant: every header is checked once, when
the source is opened; truncated tars, samples without an image, labels for only some samples and duplicate keys are
errors; nothing is extracted.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scalekd_cache.data.base import (
    IntArray,
    ListedSource,
    NoSplitError,
    SampleList,
    Split,
    check_labels,
    encode_key,
    numbered_classes,
)
from scalekd_cache.data.classes import read_class_names
from scalekd_cache.data.image_formats import IMAGE_SUFFIXES, is_image_name
from scalekd_cache.data.patterns import expand_braces, find_val_tars, is_pattern, word
from scalekd_cache.data.tarscan import TarMember, scan_tar, split_name
from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.base import NO_LABEL

IMAGE_EXTENSIONS = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)
MAX_CLS_BYTES = 20
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation")}
LAYOUT = "train/*.tar and val/*.tar, or *train*.tar and *val*.tar"


class ShardSample(NamedTuple):
    """A sample and the position of its image in the tar: offset and size in bytes."""

    key: str
    label: int
    offset: int
    size: int


class TarReader:
    """Reads images from tars by offset. Holds no open files: each read opens and closes its tar."""

    def __init__(self, tars: list[str], samples: list[list[ShardSample]]) -> None:
        self._tars = tars
        self._tar_bytes = [os.path.getsize(tar) for tar in tars]
        rows = [(number, one.offset, one.size) for number, many in enumerate(samples) for one in many]
        self._rows = np.array(rows, dtype=np.int64).reshape(-1, 3)  # (N, 3): tar, offset, size

    def __call__(self, index: int) -> bytes:
        """Image bytes of sample `index`."""
        number, offset, size = self._rows[index].tolist()
        tar = self._tars[number]
        try:
            with open(tar, "rb", buffering=0) as file:
                now = os.fstat(file.fileno()).st_size
                data = _pread(file.fileno(), size, offset) if now == self._tar_bytes[number] else b""
        except OSError as error:
            raise UserError("cannot read a shard", got=error, where=tar, fix="check the file and the disk") from error
        if len(data) != size:
            raise UserError(
                "the shard has changed since it was opened",
                got=counted(now, "byte"),
                expected=counted(self._tar_bytes[number], "byte"),
                where=tar,
                fix="rerun, and do not change shards while they are in use",
            )
        return data


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    """Like `os.pread`, but continues after a short read; returns less than `size` only at the end of the file."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def has_shards(root: Path) -> bool:
    """Whether `root` has training tars in the expected layout."""
    return bool(_find(str(root), "train"))


def open_shards(name: str, root: str, split: Split) -> ListedSource:
    """List WebDataset tars; `root` is a folder or a brace pattern for the training tars.

    Class names are the lines of classes.txt, next to the tars or one folder up. Without that file, they run from "0" to
    the maximum training label, and opening val also reads the headers of the training tars. If the training samples
    have no labels, val may have its own labels; without val tars, the list covers both splits.

    Raises:
        UserError: there are no tars, a tar is damaged, a sample has no image, only some samples have labels, a key is
            duplicated, or a label is outside the class list.
    """
    train_tars, val_tars = _find(root, "train"), _find(root, "val")
    if not train_tars or (split == "val" and not val_tars and _has_labels(train_tars)):
        raise NoSplitError(
            f"no tars for {split}",
            expected=f"{LAYOUT}, or a brace pattern with `train` in it",
            where=root,
            fix=f"add the {split} tars",
        )
    tars = val_tars if split == "val" and val_tars else train_tars
    others: Counter[str] = Counter()
    samples = [_read_samples(tar, others) for tar in tars]
    _check_unique(tars, samples)
    flat = [sample for many in samples for sample in many]
    if not flat:
        raise UserError(f"the {split} tars contain no samples", where=root, fix="add images")
    labels = np.array([sample.label for sample in flat], dtype=np.int64)
    labeled = bool((labels != NO_LABEL).any())
    if labeled or (tars is val_tars and _has_labels(train_tars)):
        _check_all_labeled(tars, samples)
    class_names = _class_names(train_tars, labels, split, root) if labeled else ()
    for tar, many in zip(tars, samples):
        labels_of_tar = np.array([sample.label for sample in many], dtype=np.int64)
        wrong = np.flatnonzero(labels_of_tar >= len(class_names))
        describe = f"sample {many[wrong[0]].key}" if len(wrong) else "a shard"
        check_labels(labels_of_tar, len(class_names), describe, tar)
    return ListedSource(
        name=name,
        class_names=class_names,
        samples=SampleList((sample.key for sample in flat), labels),
        reader=TarReader(tars, samples),
        file_starts=np.cumsum([0, *(len(many) for many in samples[:-1])], dtype=np.int64),
        ignored=(
            *(f"ignored: {counted(count, 'tar member')}: {kind}" for kind, count in others.items()),
            *(() if labeled else _ignored_beside(tars[0])),
        ),
        held_out=0 if labeled or val_tars else None,
    )


def _has_labels(tars: list[str]) -> bool:
    """Whether the samples in the first nonempty tar have labels."""
    samples = next((found for tar in tars if (found := _read_samples(tar, Counter()))), [])
    return any(sample.label != NO_LABEL for sample in samples)


def _check_all_labeled(tars: list[str], samples: list[list[ShardSample]]) -> None:
    """Raise `UserError` for the first sample without a label."""
    unlabeled = [(tar, sample.key) for tar, many in zip(tars, samples) for sample in many if sample.label == NO_LABEL]
    if unlabeled:
        tar, key = unlabeled[0]
        raise _bad_sample(tar, key, f"no .cls ({len(unlabeled):,} of {sum(map(len, samples)):,} samples have none)")


def _class_names(train_tars: list[str], labels: IntArray, split: Split, root: str) -> tuple[str, ...]:
    """Class names for a split with `labels`; they come from its own labels if train has none."""
    listed = _class_names_beside(train_tars[0])
    if listed is not None:
        return listed
    if split == "val" and _has_labels(train_tars):
        train = [sample.label for tar in train_tars for sample in _read_samples(tar, Counter())]
        labels = np.array(train, dtype=np.int64)
    return numbered_classes(labels, root)


def _ignored_beside(tar: str) -> Iterator[str]:
    """Notes about a class list and images next to tars without labels."""
    listed = _class_names_beside(tar)
    if listed is not None:
        yield f"ignored: classes.txt with {counted(len(listed), 'name')}, because no sample has a .cls"
    images = sorted(path.name for path in Path(tar).parent.iterdir() if is_image_name(path.name))
    if images:
        yield f"ignored: {counted(len(images), 'image')} next to the tars, such as {images[0]}"


def _find(root: str, split: str) -> list[str]:
    """A split's tars in order; empty if there are none."""
    if is_pattern(root):
        return expand_braces(root) if split == "train" else find_val_tars(root, SPLIT_NAMES["val"])
    for part in SPLIT_NAMES[split]:
        found = sorted(Path(root, part).glob("*.tar")) or sorted(
            path for path in Path(root).glob("*.tar") if word(part).search(path.name)
        )
        if found:
            return [str(path) for path in found]
    return []


def _class_names_beside(tar: str) -> tuple[str, ...] | None:
    """Lines of classes.txt in the folder of a training tar, or in the parent folder if that folder is train/."""
    folder = Path(tar).parent
    for path in (folder / "classes.txt", folder.parent / "classes.txt"):
        if path.is_file() and (path.parent == folder or folder.name == "train"):
            return read_class_names(path)
    return None


def _read_samples(tar: str, others: Counter[str]) -> list[ShardSample]:
    """All samples in one tar, in order; members that do not belong to a sample are counted in `others`."""
    groups: list[tuple[str, dict[str, TarMember]]] = []
    for member in scan_tar(tar, others):
        parts = split_name(member.name)
        if parts is None:
            others["hidden, without a suffix, or named like __this__"] += 1
            continue
        stem, extension = parts
        if not groups or groups[-1][0] != stem:
            groups.append((stem, {}))
        if extension in groups[-1][1]:
            raise _bad_sample(tar, stem, f"two members with the extension .{extension}")
        groups[-1][1][extension] = member
    try:
        with open(tar, "rb", buffering=0) as file:
            return [_sample(tar, file.fileno(), stem, members, others) for stem, members in groups]
    except OSError as error:
        raise UserError("cannot read a shard", got=error, where=tar, fix="check the file and the disk") from error


def _sample(tar: str, descriptor: int, stem: str, members: dict[str, TarMember], others: Counter[str]) -> ShardSample:
    images = sorted(IMAGE_EXTENSIONS & members.keys())
    whole = len(images) == 1
    dotted = sorted(name for name in members if "." in name and name.rpartition(".")[2] in {*IMAGE_EXTENSIONS, "cls"})
    pairs = {name.rpartition(".")[0] for name in dotted if name.endswith(".cls")}
    # WebDataset uses extensions such as seg.png for additional data; an image with its own label is a separate sample.
    if dotted and (not whole or any(name.rpartition(".")[0] in pairs for name in dotted if not name.endswith(".cls"))):
        raise _dotted(tar, stem, dotted[0])
    if not whole:
        raise _bad_sample(tar, stem, f"{counted(len(images), 'image')} among its members: {', '.join(sorted(members))}")
    image = members[images[0]]
    if "cls" in members:
        return _labeled(tar, descriptor, stem, image, members["cls"])
    if dotted:
        others["additional images in samples without a .cls"] += len(dotted)
    return ShardSample(encode_key(stem), NO_LABEL, image.offset, image.size)


def _labeled(tar: str, descriptor: int, stem: str, image: TarMember, cls: TarMember) -> ShardSample:
    text = _pread(descriptor, min(cls.size, MAX_CLS_BYTES + 1), cls.offset).strip()
    if not text.isdigit() or cls.size > MAX_CLS_BYTES or int(text) >= 2**31:
        raise _bad_sample(tar, stem, f"label {text!r}")
    return ShardSample(encode_key(stem), int(text), image.offset, image.size)


def _dotted(tar: str, stem: str, extension: str) -> UserError:
    base = stem.rpartition("/")[2]
    return UserError(
        "the sample keys in a shard contain dots",
        got=f"{base}.{extension}",
        expected=f"keys without dots: WebDataset splits names at the first dot and reads this member as key {base}, "
        f"extension .{extension}",
        where=tar,
        fix="rewrite the shard with a different character, such as an underscore, instead of dots in the keys",
    )


def _bad_sample(tar: str, stem: str, got: str) -> UserError:
    return UserError(
        f"a shard has an invalid sample: {stem}",
        got=got,
        expected="adjacent members: one image (.jpg, .png, .webp, ...) and, in a labeled dataset, one .cls with a "
        "whole number in ASCII",
        where=tar,
        fix="rewrite the shard so that each sample consists of these members",
    )


def _check_unique(tars: Iterable[str], samples: Iterable[list[ShardSample]]) -> None:
    seen: dict[str, str] = {}
    for tar, many in zip(tars, samples):
        for sample in many:
            if sample.key in seen:
                raise UserError(
                    f"two samples have the same key: {sample.key}",
                    got=f"in {seen[sample.key]} and in {tar}" if seen[sample.key] != tar else f"twice in {tar}",
                    expected="keys that are unique across all tars in a split",
                    where=tar,
                    fix="rewrite the shards with unique keys and with each sample's members next to each other",
                )
            seen[sample.key] = tar
