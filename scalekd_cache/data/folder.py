"""Image folders: class folders under train/ and val/, ImageNet's flat val/ with its devkit, or images without labels.

In: a root folder. Out: a `ListedSource`; its keys are the paths below the split's folder, and its labels are indices
into the sorted class folders in train/. Images have no labels if train/ holds images but no folders, or if there is no
train/; without train/, all images below the root are listed. Invariant: an incomplete listing raises an error; every
file is either a sample or counted in `ignored`.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from scalekd_cache.data.base import (
    ListedSource,
    NoSplitError,
    PackedStrings,
    SampleList,
    Split,
    canonical_order,
    encode_key,
    read_listed_file,
)
from scalekd_cache.data.classes import normalize_name, read_class_names, reorder_classes
from scalekd_cache.data.devkit import flat_val_labels
from scalekd_cache.data.image_formats import (
    IMAGE_SUFFIXES,
    OTHER_SUFFIXES,
    START_BYTES,
    is_image_file,
    is_image_name,
    suffix_of,
)
from scalekd_cache.errors import UserError, closest_names, counted, is_text, some_of
from scalekd_cache.store.base import NO_LABEL

LAYOUT = f"train/<class>/*.jpg and val/<class>/*.jpg (or {OTHER_SUFFIXES})"
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
"""Names of files and folders that operating systems create, in lower case."""


OTHER_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "testing")}
"""Common names for a split's folder, in lower case."""
SPLIT_FOLDERS = frozenset(name for names in OTHER_NAMES.values() for name in names)


class FileReader:
    """Reads single image files. It holds only paths."""

    def __init__(self, folder: Path, paths: Sequence[str]) -> None:
        self._folder = str(folder)
        self._paths = PackedStrings(paths)

    def __call__(self, index: int) -> bytes:
        """Bytes of file `index`."""
        path = self._paths[index]
        return read_listed_file(os.path.join(self._folder, path), encode_key(path))


Kind = tuple[str, str]
"""A kind of ignored file: singular and plural noun."""
HIDDEN: Kind = ("hidden or system file or folder", "hidden or system files and folders")
BROKEN: Kind = ("broken link or special file", "broken links or special files")
UNREADABLE: Kind = ("file that cannot be read", "files that cannot be read")
NO_IMAGE: Kind = ("file that is not in a known image format", "files that are not in a known image format")


class IgnoredFiles:
    """Counts the files that are not samples."""

    def __init__(self) -> None:
        self._counts: dict[Kind, Counter[str]] = {}
        self._first: dict[Kind, str] = {}

    def add(self, kind: Kind, path: str) -> None:
        """Count one file."""
        self._first.setdefault(kind, path)
        self._counts.setdefault(kind, Counter())[suffix_of(path) or "without suffix"] += 1

    def messages(self) -> tuple[str, ...]:
        """One message per kind of file: count, suffixes, an example."""
        found = []
        for kind, counts in self._counts.items():
            suffixes = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(8))
            found.append(f"ignored: {counted(counts.total(), *kind)} ({suffixes}), such as {self._first[kind]}")
        return tuple(found)


def open_folder(name: str, root: Path, split: Split, devkit: str | None, *, classes_file: bool = True) -> ListedSource:
    """List an image folder.

    Args:
        name: the path that the user gave.
        root: the folder with train/ and val/.
        split: train or val.
        devkit: ImageNet devkit folder, for a flat val/.
        classes_file: whether to use the class order in classes.txt in `root`, if that file lists the class folders.

    Raises:
        UserError: there are no images, labeled images have no val/, a class folder is empty, val/ has a class that is
            missing from train/, there are images next to class folders, a split's folder has the wrong name, symbolic
            links form a loop, or a key is duplicated.
    """
    train = root / "train"
    if not train.is_dir():
        return _open_pictures(name, root)
    ignored = IgnoredFiles()
    class_names, stray = _entries(train, ignored if split == "train" else IgnoredFiles())
    if stray and not class_names:
        return _open_unlabeled_train(name, root, split, stray, devkit, ignored)
    if stray or not class_names:
        raise UserError(
            f"{train} has images outside class folders" if stray else f"{train} has no class folders",
            got=f"{stray[0]} ({counted(len(stray), 'such image')})" if stray else "no folders",
            expected=LAYOUT,
            fix="move the images into one folder per class",
        )
    by_text = _by_normalized_name(train, class_names)
    if split == "train":
        paths, labels = _list_classes(train, class_names, class_names, ignored)
    else:
        paths, labels = _list_validation(root, class_names, by_text, devkit, ignored)
    source = source_of_files(name, tuple(class_names), root / split, paths, labels, ignored)
    listed = root / "classes.txt"
    if not classes_file or not listed.is_file():
        return source
    if sorted(map(normalize_name, read_class_names(listed))) == sorted(by_text):
        return reorder_classes(source, str(listed))
    folders = counted(len(class_names), "class folder")
    note = f"ignored: {listed}, which does not list the {folders}; classes are sorted by code point"
    return dataclasses.replace(source, ignored=(*source.ignored, note))


def _open_pictures(name: str, root: Path) -> ListedSource:
    """All images below a folder that has no train/, without labels."""
    others = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name.lower() in SPLIT_FOLDERS)
    if others:
        renames = [text for split in OTHER_NAMES if (text := _rename(root, split))]
        raise UserError(
            f"{root} has no train/",
            got=_contents(root),
            expected=f"{LAYOUT}; or images without labels, in folders that are not named after a split",
            fix=" and ".join(renames)
            if _rename(root, "train")
            else " and ".join(["put the training images into train/", *renames])
            + f"; or, to train on the images in {others[0]}/ too, rename that folder",
        )
    ignored = IgnoredFiles()
    paths = sorted(_images_below(root, "", frozenset(), ignored))
    if not paths:
        raise UserError(
            f"{root} has no train/ and no images",
            got="; ".join([_contents(root), *ignored.messages()]),
            expected=f"{LAYOUT}; or images without labels",
            fix="add images (convert HEIC and raw files to JPEG); "
            "for tars without `train` in their names, use a pattern such as {00000..00099}.tar",
        )
    source = source_of_files(name, (), root, paths, [NO_LABEL] * len(paths), ignored)
    return dataclasses.replace(source, ignored=(*source.ignored, *_unused_names(root, paths)), held_out=None)


def _unused_names(root: Path, paths: list[str]) -> Iterator[str]:
    """Notes about folders that could be class folders or the splits of a dataset in a subfolder."""
    classes = sorted({path.partition("/")[0] for path in paths if "/" in path})
    if len(classes) > 1 and all("/" in path for path in paths):
        yield (
            f"ignored: the names of {len(classes):,} folders, such as {classes[0]}/; to use them as labels, "
            "move most images of each class into train/<class>/ and some into val/<class>/"
        )
    below = next((head for path in paths for head, found, _ in [f"/{path}".partition("/train/")] if found), None)
    if below is not None:
        yield f"ignored: train/ in {root}{below}; to use its splits and labels, pass that folder"


def _open_unlabeled_train(
    name: str, root: Path, split: Split, images: list[str], devkit: str | None, ignored: IgnoredFiles
) -> ListedSource:
    """A split of a dataset whose train/ holds `images` but no folders. Class folders in val/, if any, are its
    classes."""
    folder = root / "val"
    if not folder.is_dir() and (fix := _rename(root, "val")):
        raise UserError(f"{root} has no val/", fix=fix)
    if devkit is not None:
        raise UserError(
            "a flat val/ with labels from the ImageNet devkit needs class folders in train/",
            got=f"data.devkit: {devkit}",
            where=root / "train",
            fix="omit data.devkit, or move the images in val/ into class folders",
        )
    if split == "train" or not folder.is_dir():
        source = source_of_files(name, (), root / "train", images, [NO_LABEL] * len(images), ignored)
        others = sorted(entry.name for entry in _scan(root, "", IgnoredFiles()) if _is_folder(entry))
        others = [other for other in others if other not in ("train", "val")]
        note = (f"ignored: {counted(len(others), 'folder')} next to train/, such as {others[0]}/",) if others else ()
        return dataclasses.replace(source, ignored=(*source.ignored, *note), held_out=0 if folder.is_dir() else None)
    ignored = IgnoredFiles()
    folders, flat = _val_entries(folder, ignored)
    if flat:
        return source_of_files(name, (), folder, flat, [NO_LABEL] * len(flat), ignored)
    _by_normalized_name(folder, folders)
    paths, labels = _list_classes(folder, folders, folders, ignored)
    return source_of_files(name, tuple(folders), folder, paths, labels, ignored)


def _contents(root: Path) -> str:
    """The first few names in a folder."""
    names = sorted(entry.name for entry in root.iterdir())
    return some_of(names, 4) or "nothing"


def _rename(root: Path, split: str) -> str:
    """Advice if a split's folder has the wrong name; empty if there is no such folder."""
    for entry in sorted(root.iterdir()):
        named = entry.name.lower() in OTHER_NAMES[split] and entry.name != split and entry.is_dir()
        if named and not (root / split).exists():
            return f"rename {entry.name}/ to {split}/"
    return ""


def _by_normalized_name(folder: Path, class_names: list[str]) -> dict[str, str]:
    """Class folders, keyed by their names in Unicode form NFC."""
    by_text: dict[str, str] = {}
    for name in class_names:
        if not is_text(name):
            raise UserError("the name of a class folder is not UTF-8", got=f"{name!a}", where=folder, fix="rename it")
        other = by_text.setdefault(normalize_name(name), name)
        if other != name:
            raise UserError(
                f"{folder.name}/ has two class folders whose names differ only in Unicode normalization (NFC and NFD)",
                got=f"{other!a} and {name!a}",
                expected="one folder per class",
                where=folder,
                fix="move the images from one folder into the other",
            )
    return by_text


def _list_validation(
    root: Path, class_names: list[str], by_text: dict[str, str], devkit: str | None, ignored: IgnoredFiles
) -> tuple[list[str], list[int]]:
    folder = root / "val"
    if not folder.is_dir():
        if fix := _rename(root, "val"):
            raise UserError(f"{root} has no val/", fix=fix)
        if os.path.lexists(folder):
            raise UserError(
                "val is not a folder", expected=LAYOUT, where=folder, fix="replace it with a folder, or remove it"
            )
        raise NoSplitError(f"{root} has no val/", fix="add val/<class>/ with some images for each class")
    folders, flat = _val_entries(folder, ignored)
    if flat:
        return flat, flat_val_labels(root, flat, class_names, devkit)
    _by_normalized_name(folder, folders)
    unknown = [name for name in folders if normalize_name(name) not in by_text]
    if unknown:
        raise UserError(
            "val/ has a class that is missing from train/",
            got=", ".join(unknown[:5]) + f" ({counted(len(unknown), 'such class')})",
            expected=f"the name of a class folder in train/, such as {closest_names(unknown[0], class_names)}",
            where=folder / unknown[0],
            fix="rename or remove the folder" if len(unknown) == 1 else "rename or remove the folders",
        )
    return _list_classes(folder, folders, class_names, ignored)


def _val_entries(folder: Path, ignored: IgnoredFiles) -> tuple[list[str], list[str]]:
    """The class folders in val/, or the images in a flat val/."""
    folders, flat = _entries(folder, ignored)
    if folders and flat:
        raise UserError(
            "val/ has both class folders and images outside them",
            got=f"{counted(len(folders), 'class folder')}; outside them: {some_of(flat)}",
            expected="only class folders, or only images",
            where=folder,
            fix="move the images into their class folders",
        )
    return folders, flat


def _list_classes(
    folder: Path, folders: list[str], class_names: list[str], ignored: IgnoredFiles
) -> tuple[list[str], list[int]]:
    number = {normalize_name(name): label for label, name in enumerate(class_names)}
    paths: list[str] = []
    labels: list[int] = []
    empty = []
    for name in folders:
        found = sorted(_images_below(folder / name, f"{name}/", frozenset(), ignored))
        if not found:
            empty.append(name)
        paths += found
        labels += [number[normalize_name(name)]] * len(found)
    if empty or not paths:
        raise UserError(
            f"{folder.name}/ has class folders without images" if empty else f"{folder.name}/ has no images",
            got="; ".join(
                [", ".join(empty[:5]) + f" ({len(empty)} of {counted(len(folders), 'folder')})", *ignored.messages()]
            )
            if empty
            else "no folders",
            expected=f"at least one image in every class folder: {', '.join(sorted(IMAGE_SUFFIXES))}",
            where=folder / empty[0] if empty else folder,
            fix="add images to these folders (convert HEIC and raw files to JPEG), or remove the folders"
            if empty
            else "add class folders with images",
        )
    return paths, labels


def _entries(folder: Path, ignored: IgnoredFiles) -> tuple[list[str], list[str]]:
    """Names of the class folders, and of the images directly in `folder`; both sorted."""
    entries = _scan(folder, f"{folder.name}/", ignored)
    folders = sorted(entry.name for entry in entries if _is_folder(entry))
    images = sorted(
        entry.name for entry in entries if not _is_folder(entry) and _is_image(entry, f"{folder.name}/", ignored)
    )
    return folders, images


def _images_below(folder: Path, prefix: str, above: frozenset[tuple[int, int]], ignored: IgnoredFiles) -> Iterator[str]:
    """Paths of all images below `folder`, prefixed with `prefix`; links are followed."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise UserError("a symbolic link points to one of its parent folders", where=folder, fix="remove the link")
    for entry in _scan(folder, prefix, ignored):
        path = f"{prefix}{entry.name}"
        if _is_folder(entry):
            yield from _images_below(folder / entry.name, f"{path}/", above | {here}, ignored)
        elif _is_image(entry, prefix, ignored):
            yield path


def _scan(folder: Path, prefix: str, ignored: IgnoredFiles) -> list[os.DirEntry[str]]:
    """Entries in a folder, except hidden files (such as the ._ files some archivers write) and system files."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_system_name(entry.name):
                    ignored.add(HIDDEN, prefix + entry.name)
                else:
                    found.append(entry)
    except OSError as error:
        raise UserError(
            "cannot list a folder in the dataset", got=error.strerror, where=folder, fix="correct its permissions"
        ) from error
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; false for a link loop."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file or a link to one; false for a link loop."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _is_image(entry: os.DirEntry[str], prefix: str, ignored: IgnoredFiles) -> bool:
    """Whether a file is an image, judging by its suffix or, failing that, its first bytes."""
    named = is_image_name(entry.name)
    if not _is_file(entry):
        if not named:
            ignored.add(BROKEN, f"{prefix}{entry.name}")
            return False
        raise UserError(
            "a path with an image extension is not a file",
            got="a broken link or a special file",
            expected="a file, or a link to a file",
            where=entry.path,
            fix="replace it with an image file, or remove it",
        )
    if named:
        return True
    try:
        with open(entry.path, "rb", buffering=0) as file:
            start = file.read(START_BYTES)
    except OSError:
        ignored.add(UNREADABLE, f"{prefix}{entry.name}")
        return False
    if not is_image_file(entry.path, start):
        ignored.add(NO_IMAGE, f"{prefix}{entry.name}")
        return False
    return True


def is_system_name(name: str) -> bool:
    """Whether a file or folder is hidden or created by the operating system."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def path_keys(paths: Sequence[str]) -> list[str]:
    """Keys for relative paths. The image suffix is dropped unless two files differ only in their suffix."""
    stems = [os.path.splitext(path)[0] if is_image_name(path) else path for path in paths]
    count = Counter(stems)
    return [encode_key(path if count[stem] > 1 else stem) for path, stem in zip(paths, stems)]


def source_of_files(
    name: str, class_names: tuple[str, ...], folder: Path, paths: list[str], labels: list[int], ignored: IgnoredFiles
) -> ListedSource:
    """A source for the image files at `paths` (absolute or relative to `folder`), in canonical order.

    Raises:
        UserError: two files have the same key.
    """
    keys = path_keys(paths)
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        files = [path for path, key in zip(paths, keys) if key == twice[0]]
        raise UserError(
            "two images have the same sample key",
            got=f"{files[0]} and {files[1]} both have the key {twice[0]}",
            expected="a different key for each image: its path without the extension, or the whole path if that is not "
            "unique",
            where=folder,
            fix="rename one of them",
        )
    order = canonical_order(keys)
    return ListedSource(
        name=name,
        class_names=class_names,
        samples=SampleList((keys[i] for i in order), [labels[i] for i in order]),
        reader=FileReader(folder, [paths[i] for i in order]),
        ignored=ignored.messages(),
    )
