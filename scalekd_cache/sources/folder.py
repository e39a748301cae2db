"""Image folders: class folders under train/ and val/, or ImageNet's flat val/ with its devkit.

In: a root folder. Out: a `ListedSource` whose keys are the paths below the split, and whose labels index the sorted
class folders of train/. Invariant: a listing is complete or an error; nothing that looks like an image is left out.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from scalekd_cache.errors import UserError, nearest
from scalekd_cache.sources.base import (
    IMAGE_SUFFIXES,
    ListedSource,
    PackedStrings,
    SampleList,
    Split,
    canonical_order,
    encode_key,
    missing_folder,
    read_listed_file,
)
from scalekd_cache.sources.devkit import flat_labels

LAYOUT = "train/<class>/*.jpg and val/<class>/*.jpg (jpg, jpeg, png, webp, bmp)"


class FileReader:
    """Reads images that are files of their own. Holds paths only."""

    def __init__(self, folder: Path, paths: Sequence[str]) -> None:
        self._folder = str(folder)
        self._paths = PackedStrings(paths)

    def __call__(self, index: int) -> bytes:
        """Bytes of file `index`."""
        path = self._paths[index]
        return read_listed_file(os.path.join(self._folder, path), encode_key(path))


def open_folder(name: str, root: Path, split: Split, devkit: str | None) -> ListedSource:
    """List an image folder.

    Raises:
        UserError: no train/ or val/, an empty class folder, a validation class unknown to train/, images outside of
            class folders (except ImageNet's flat val/ with its devkit), a loop of links, two samples with one key.
    """
    train = root / "train"
    if not train.is_dir():
        raise missing_folder("the image folder has no train/", train, LAYOUT, "make train/ with one folder per class")
    class_names, stray = _entries(train)
    if stray or not class_names:
        raise UserError(
            "train/ has images outside of class folders" if stray else "train/ has no class folders",
            got=f"{stray[0]} ({len(stray)} such images)" if stray else "no folder at all",
            expected=LAYOUT,
            where=train,
            fix="move the images into one folder per class",
        )
    if split == "train":
        paths, labels = _list_classes(train, class_names, class_names)
    else:
        paths, labels = _list_validation(root, class_names, devkit)
    return _source(name, tuple(class_names), root / split, paths, labels)


def _list_validation(root: Path, class_names: list[str], devkit: str | None) -> tuple[list[str], list[int]]:
    folder = root / "val"
    if not folder.is_dir():
        raise missing_folder("the image folder has no val/", folder, LAYOUT, "add val/ with one folder per class")
    folders, flat = _entries(folder)
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
    unknown = [name for name in folders if name not in set(class_names)]
    if unknown:
        raise UserError(
            "val/ has a class that train/ does not have",
            got=", ".join(unknown[:5]) + f" ({len(unknown)} such classes)",
            expected=f"class folders of train/, such as {nearest(unknown[0], class_names)}",
            where=folder / unknown[0],
            fix="rename or remove that folder",
        )
    return _list_classes(folder, folders, class_names)


def _list_classes(folder: Path, folders: list[str], class_names: list[str]) -> tuple[list[str], list[int]]:
    number = {name: label for label, name in enumerate(class_names)}
    paths: list[str] = []
    labels: list[int] = []
    empty = []
    for name in folders:
        found = sorted(_images_below(folder / name, name, frozenset()))
        if not found:
            empty.append(name)
        paths += found
        labels += [number[name]] * len(found)
    if empty or not paths:
        raise UserError(
            f"{folder.name}/ has empty class folders" if empty else f"{folder.name}/ has no images",
            got=", ".join(empty[:5]) + f" ({len(empty)} of {len(folders)} folders)" if empty else "no folder at all",
            expected=f"at least one image in every class folder: {', '.join(sorted(IMAGE_SUFFIXES))}",
            where=folder / empty[0] if empty else folder,
            fix="fill these folders, or remove them from train/ and val/",
        )
    return paths, labels


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the class folders, and of the images that lie directly in `folder`; both sorted."""
    entries = _scan(folder)
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    images = sorted(entry.name for entry in entries if not entry.is_dir() and _is_image(entry.name))
    return folders, images


def _images_below(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Paths of all images below `folder`, each with `prefix` in front; links are followed."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise UserError("a link leads back to a folder above it", where=folder, fix="remove the link")
    for entry in _scan(folder):
        path = f"{prefix}/{entry.name}"
        if entry.is_dir():
            yield from _images_below(folder / entry.name, path, above | {here})
        elif _is_image(entry.name):
            if not entry.is_file():
                raise UserError(
                    "an entry with an image's name is not a file",
                    got="a broken link or a special file",
                    expected="a file, or a link to one",
                    where=entry.path,
                    fix="mend or remove it",
                )
            yield path


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """Entries of a folder but the hidden ones (such as the ._ files that some archivers leave)."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(
            "a folder of the data set cannot be listed", got=error.strerror, where=folder, fix="mend its permissions"
        ) from error


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def path_keys(paths: Sequence[str]) -> list[str]:
    """Keys of relative paths: without the extension, unless two files differ in nothing else."""
    stems = [os.path.splitext(path)[0] for path in paths]
    count = Counter(stems)
    return [encode_key(path if count[stem] > 1 else stem) for path, stem in zip(paths, stems)]


def _source(name: str, class_names: tuple[str, ...], folder: Path, paths: list[str], labels: list[int]) -> ListedSource:
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
    )
