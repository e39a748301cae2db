"""Image folders: class folders under train/ and val/, or ImageNet's flat val/ with its devkit.

In: a root folder. Out: a `ListedSource` whose keys are the paths below the split, and whose labels index the sorted
class folders of train/. Invariant: a listing is complete or an error; every file is a sample or is counted in
`left_out`.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from scalekd_cache.data.base import (
    ListedSource,
    PackedStrings,
    SampleList,
    Split,
    canonical_order,
    encode_key,
    missing_folder,
    read_listed_file,
)
from scalekd_cache.data.classes import in_class_order, read_class_names, same_text
from scalekd_cache.data.devkit import flat_labels
from scalekd_cache.data.image_formats import IMAGE_SUFFIXES, START_BYTES, is_image_file, is_image_name, suffix_of
from scalekd_cache.errors import UserError, closest_names

LAYOUT = "train/<class>/*.jpg and val/<class>/*.jpg (or png, webp, tif, gif, bmp, ppm, avif, jp2)"
SYSTEM_NAMES = frozenset(
    {
        "__macosx",
        "@eadir",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "lost+found",
        "$recycle.bin",
        "system volume information",
    }
)
"""Files and folders, in lower case, that operating systems add to a data set."""


class FileReader:
    """Reads images that are files of their own. Holds paths only."""

    def __init__(self, folder: Path, paths: Sequence[str]) -> None:
        self._folder = str(folder)
        self._paths = PackedStrings(paths)

    def __call__(self, index: int) -> bytes:
        """Bytes of file `index`."""
        path = self._paths[index]
        return read_listed_file(os.path.join(self._folder, path), encode_key(path))


class LeftOut:
    """Counts the files that a listing passes over."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._first: dict[str, str] = {}

    def add(self, kind: str, path: str) -> None:
        """One more file of a kind."""
        self._first.setdefault(kind, path)
        self._counts.setdefault(kind, Counter())[suffix_of(path) or "no suffix"] += 1

    def sentences(self) -> tuple[str, ...]:
        """For each kind of file how many there are, of which suffixes, and an example."""
        found = []
        for kind, counts in self._counts.items():
            suffixes = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(8))
            found.append(f"left out: {counts.total():,} {kind} ({suffixes}), such as {self._first[kind]}")
        return tuple(found)


def open_folder(name: str, root: Path, split: Split, devkit: str | None, *, classes_file: bool = True) -> ListedSource:
    """List an image folder.

    Args:
        name: what the user asked for.
        root: the folder with train/ and val/.
        split: train or val.
        devkit: ImageNet devkit folder, for a flat val/.
        classes_file: whether classes.txt in `root` gives the order of the classes, where it lists the class folders.

    Raises:
        UserError: no train/ or val/, an empty class folder, a validation class unknown to train/, images outside of
            class folders (except ImageNet's flat val/ with its devkit), a loop of links, two samples with one key.
    """
    train = root / "train"
    if not train.is_dir():
        raise missing_folder("the image folder has no train/", train, LAYOUT, "make train/ with one folder per class")
    left_out = LeftOut()
    class_names, stray = _entries(train, left_out if split == "train" else LeftOut())
    if stray or not class_names:
        raise UserError(
            "train/ has images outside of class folders" if stray else "train/ has no class folders",
            got=f"{stray[0]} ({len(stray)} such images)" if stray else "no folder at all",
            expected=LAYOUT,
            where=train,
            fix="move the images into one folder per class",
        )
    by_text = _one_form(train, class_names)
    if split == "train":
        paths, labels = _list_classes(train, class_names, class_names, left_out)
    else:
        paths, labels = _list_validation(root, class_names, by_text, devkit, left_out)
    source = _source(name, tuple(class_names), root / split, paths, labels, left_out)
    listed = root / "classes.txt"
    if not classes_file or not listed.is_file():
        return source
    if sorted(map(same_text, read_class_names(listed))) == sorted(by_text):
        return in_class_order(source, str(listed))
    note = f"left out: {listed}, which does not list the {len(class_names)} class folders; their order is by code point"
    return dataclasses.replace(source, left_out=(*source.left_out, note))


def _one_form(train: Path, class_names: list[str]) -> dict[str, str]:
    """The class folders by their names in one Unicode form."""
    by_text: dict[str, str] = {}
    for name in class_names:
        other = by_text.setdefault(same_text(name), name)
        if other != name:
            raise UserError(
                "train/ has two class folders whose names differ in their Unicode form only (NFC and NFD)",
                got=f"{other!a} and {name!a}",
                expected="one folder per class",
                where=train,
                fix="move the images of one into the other",
            )
    return by_text


def _list_validation(
    root: Path, class_names: list[str], by_text: dict[str, str], devkit: str | None, left_out: LeftOut
) -> tuple[list[str], list[int]]:
    folder = root / "val"
    if not folder.is_dir():
        raise missing_folder("the image folder has no val/", folder, LAYOUT, "add val/ with one folder per class")
    folders, flat = _entries(folder, left_out)
    if folders and flat:
        raise UserError(
            "val/ has both class folders and images of its own",
            got=f"{len(folders)} folders and {len(flat)} images, such as {flat[0]}",
            expected="one or the other",
            where=folder,
            fix="move the images into their class folders",
        )
    if flat:
        return flat, flat_labels(root, flat, class_names, devkit)
    _one_form(folder, folders)
    unknown = [name for name in folders if same_text(name) not in by_text]
    if unknown:
        raise UserError(
            "val/ has a class that train/ does not have",
            got=", ".join(unknown[:5]) + f" ({len(unknown)} such classes)",
            expected=f"class folders of train/, such as {closest_names(unknown[0], class_names)}",
            where=folder / unknown[0],
            fix="rename or remove that folder",
        )
    return _list_classes(folder, folders, class_names, left_out)


def _list_classes(
    folder: Path, folders: list[str], class_names: list[str], left_out: LeftOut
) -> tuple[list[str], list[int]]:
    number = {same_text(name): label for label, name in enumerate(class_names)}
    paths: list[str] = []
    labels: list[int] = []
    empty = []
    for name in folders:
        found = sorted(_images_below(folder / name, name, frozenset(), left_out))
        if not found:
            empty.append(name)
        paths += found
        labels += [number[same_text(name)]] * len(found)
    if empty or not paths:
        raise UserError(
            f"{folder.name}/ has empty class folders" if empty else f"{folder.name}/ has no images",
            got=", ".join(empty[:5]) + f" ({len(empty)} of {len(folders)} folders)" if empty else "no folder at all",
            expected=f"at least one image in every class folder: {', '.join(sorted(IMAGE_SUFFIXES))}",
            where=folder / empty[0] if empty else folder,
            fix="fill these folders, or remove them from train/ and val/",
        )
    return paths, labels


def _entries(folder: Path, left_out: LeftOut) -> tuple[list[str], list[str]]:
    """Names of the class folders, and of the images that lie directly in `folder`; both sorted."""
    entries = _scan(folder, f"{folder.name}/", left_out)
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    images = sorted(entry.name for entry in entries if not entry.is_dir() and _is_image(entry, folder.name, left_out))
    return folders, images


def _images_below(folder: Path, prefix: str, above: frozenset[tuple[int, int]], left_out: LeftOut) -> Iterator[str]:
    """Paths of all images below `folder`, each with `prefix` in front; links are followed."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise UserError("a link leads back to a folder above it", where=folder, fix="remove the link")
    for entry in _scan(folder, f"{prefix}/", left_out):
        path = f"{prefix}/{entry.name}"
        if entry.is_dir():
            yield from _images_below(folder / entry.name, path, above | {here}, left_out)
        elif _is_image(entry, prefix, left_out):
            yield path


def _scan(folder: Path, prefix: str, left_out: LeftOut) -> list[os.DirEntry[str]]:
    """Entries of a folder but hidden ones (such as the ._ files of some archivers) and those of operating systems."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_system_name(entry.name):
                    left_out.add("hidden or system files and folders", prefix + entry.name)
                else:
                    found.append(entry)
    except OSError as error:
        raise UserError(
            "a folder of the data set cannot be listed", got=error.strerror, where=folder, fix="mend its permissions"
        ) from error
    return found


def _is_image(entry: os.DirEntry[str], prefix: str, left_out: LeftOut) -> bool:
    """Whether a file is an image: by its suffix, or with another suffix or none by its first bytes."""
    named = is_image_name(entry.name)
    if not entry.is_file():
        if not named:
            left_out.add("broken links or special files", f"{prefix}/{entry.name}")
            return False
        raise UserError(
            "an entry with an image's name is not a file",
            got="a broken link or a special file",
            expected="a file, or a link to one",
            where=entry.path,
            fix="mend or remove it",
        )
    if named:
        return True
    try:
        with open(entry.path, "rb", buffering=0) as file:
            start = file.read(START_BYTES)
    except OSError:
        left_out.add("files that cannot be read", f"{prefix}/{entry.name}")
        return False
    if not is_image_file(entry.path, start):
        left_out.add("files that are not images of a known format", f"{prefix}/{entry.name}")
        return False
    return True


def is_system_name(name: str) -> bool:
    """Whether a file or folder is hidden, or one that operating systems add."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def path_keys(paths: Sequence[str]) -> list[str]:
    """Keys of relative paths: without an image's suffix, unless two files differ in nothing else."""
    stems = [os.path.splitext(path)[0] if is_image_name(path) else path for path in paths]
    count = Counter(stems)
    return [encode_key(path if count[stem] > 1 else stem) for path, stem in zip(paths, stems)]


def _source(
    name: str, class_names: tuple[str, ...], folder: Path, paths: list[str], labels: list[int], left_out: LeftOut
) -> ListedSource:
    keys = path_keys(paths)
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        files = [path for path, key in zip(paths, keys) if key == twice[0]]
        raise UserError(
            "two images have the same sample key",
            got=f"{files[0]} and {files[1]} both give {twice[0]}",
            expected="unique paths once the extension is gone",
            where=folder,
            fix="rename one of them",
        )
    order = canonical_order(keys)
    return ListedSource(
        name=name,
        class_names=class_names,
        samples=SampleList((keys[i] for i in order), [labels[i] for i in order]),
        reader=FileReader(folder, [paths[i] for i in order]),
        left_out=left_out.sentences(),
    )
