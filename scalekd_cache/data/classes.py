"""Orders the classes of a dataset to match the teacher's outputs.

In: a source, and `data.classes`: a named order or a file of class names. Out: the same source with its labels
renumbered in that order. Invariant: every image keeps its class; the list must contain exactly the dataset's classes.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scalekd_cache.config.places import home_path
from scalekd_cache.data.base import ListedSource, Source
from scalekd_cache.errors import UserError, close_names, counted, some_of
from scalekd_cache.store.checked_files import read_file

MAX_LIST_BYTES = 1 << 26


def natural_key(name: str) -> list[Any]:
    """The sort key that timm uses for image folders: case-insensitive, with numbers compared by value."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name.lower()))]


ORDERS: dict[str, Callable[[str], Any]] = {"sorted": lambda name: name, "natural": natural_key, "caseless": str.lower}
"""Named orders: by code point (as in torchvision's image folders), natural (as in timm's), and case-insensitive."""


def normalize_name(name: str) -> str:
    """Convert a name to Unicode form NFC; macOS may store accents as separate characters (NFD)."""
    return unicodedata.normalize("NFC", name)


def read_class_names(path: Path) -> tuple[str, ...]:
    """The non-empty lines of a class list.

    Raises:
        UserError: the file does not exist, is not UTF-8 or is too large.
    """
    what = "the list of class names"
    try:
        text = read_file(path, what, MAX_LIST_BYTES).decode("utf-8-sig")
    except ValueError as error:
        raise UserError(
            f"cannot read {what}",
            got=error,
            expected="UTF-8, one name per line",
            where=path,
            fix="save the file as UTF-8 text",
        ) from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def reorder_classes(source: ListedSource, classes: str | None) -> ListedSource:
    """Reorder a source's classes as given by `classes`: one of `ORDERS`, a file, or None to keep the order.

    If the source's classes are only numbered, a file can name them.

    Raises:
        UserError: the file cannot be read, its names are not the dataset's classes, or there are no labels.
    """
    if classes is None:
        return source
    if not source.class_names:
        raise UserError(
            "--classes (data.classes) sets the class order, but the images have no labels",
            got=classes,
            where=source.name,
            fix="omit --classes, or use a dataset with labels, such as train/<class>/*.jpg",
        )
    names = source.class_names
    if classes in ORDERS:
        return _renumbered(source, sorted(names, key=lambda name: (ORDERS[classes](name), name)))
    listed = read_class_names(home_path(classes))
    by_text = {normalize_name(name): name for name in names}
    wanted = [by_text.get(normalize_name(name), name) for name in listed]
    if sorted(wanted) == sorted(names):
        return _renumbered(source, wanted)
    numbered = names == tuple(map(str, range(len(names))))
    if numbered and len(listed) >= len(names) and len(set(listed)) == len(listed):
        return dataclasses.replace(source, class_names=listed)
    raise _other_classes(names, wanted, classes)


def check_classes(source: Source, expected: Sequence[str], count: int) -> None:
    """Check that the labels of a dataset match the outputs of a model.

    Args:
        source: the images.
        expected: the model's class names in the order of its outputs; empty if they are unknown.
        count: number of model outputs.

    Raises:
        UserError: there are no labels, or the classes differ from the model's in number, names or order. Names are not
            compared if the classes are only numbered.
    """
    names = [normalize_name(name) for name in source.class_names]
    if not names:
        raise UserError(
            "the validation images have no labels", expected="val/<class>/ for the model's classes", where=source.name
        )
    wanted = [normalize_name(name) for name in expected]
    numbers = [str(number) for number in range(len(names))]
    unnamed = not wanted or (numbers in (names, wanted) and sorted(names) != sorted(wanted))
    if len(names) == count and (unnamed or names == wanted):
        return
    order = sorted(names) == sorted(wanted)
    raise UserError(
        "the dataset has the model's classes in a different order"
        if order
        else "the dataset and the model have different classes",
        got=_listed(names),
        expected=_listed(wanted) if wanted else counted(count, "class"),
        where=source.name,
        fix="use the dataset the model was trained on; classes.txt in the dataset's folder sets the class order",
    )


def _listed(names: Sequence[str]) -> str:
    """The number of classes and the first few names."""
    return f"{counted(len(names), 'class')}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


def _renumbered(source: ListedSource, names: Sequence[str]) -> ListedSource:
    number = {name: label for label, name in enumerate(names)}
    new_label = np.array([number[name] for name in source.class_names], dtype=np.int64)
    samples = source.samples.with_labels(new_label[source.samples.labels])
    return dataclasses.replace(source, class_names=tuple(names), samples=samples)


def _other_classes(names: Sequence[str], listed: Sequence[str], where: str) -> UserError:
    missing = [name for name in names if name not in set(listed)]
    unknown = [name for name in listed if name not in set(names)]
    twice = [name for name in listed if listed.count(name) > 1] if not missing and not unknown else []
    found = []
    if missing:
        found.append(f"not in the list: {counted(len(missing), 'class')} in the dataset ({some_of(missing)})")
    if unknown:
        near = close_names(unknown[0], names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        found.append(f"not in the dataset: {counted(len(unknown), 'listed name')} ({some_of(unknown)}{hint})")
    if twice:
        found.append(f"{twice[0]} is listed more than once")
    return UserError(
        "the list of class names does not match the dataset",
        got="; ".join(found),
        expected=f"the {counted(len(names), 'class name')}, one per line, in the order of the teacher's outputs",
        where=where,
        fix=f"correct the file, or choose a named order: --classes {'|'.join(ORDERS)}",
    )
