"""A text file that lists images: one path per line, relative to the file's folder or absolute, without labels.

In: the file. Out: a `ListedSource` that holds both splits; its keys are the paths as written. Invariant: every listed
path is an image file, and no file is listed twice; errors give the line number.
"""

import dataclasses
import os
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from scalekd_cache.data.base import ListedSource
from scalekd_cache.data.folder import IgnoredFiles, source_of_files
from scalekd_cache.data.image_formats import START_BYTES, is_image_file, is_image_name
from scalekd_cache.errors import UserError
from scalekd_cache.store.base import NO_LABEL
from scalekd_cache.store.checked_files import read_file

SUFFIX = ".txt"
MAX_LIST_BYTES = 1 << 30
MAX_PATHS = 20_000_000
EXPECTED = "one image path per line, relative to the file's folder or absolute"


def open_path_list(name: str, file: Path) -> ListedSource:
    """List the images of a text file; empty lines and lines that start with # are skipped.

    Raises:
        UserError: the file is not UTF-8, is too large or lists no images; or a line names a missing file, a folder, a
            file that is not an image, or an image already listed. The error gives the line number.
    """
    line_of: dict[str, int] = {}
    paths = []
    for number, path in _lines(file):
        place = os.path.normpath(os.path.join(file.parent, path))
        earlier = line_of.setdefault(place, number)
        if earlier != number:
            raise _bad_line(file, number, f"{path}, which is already on line {earlier}", "remove one of the lines")
        if len(line_of) > MAX_PATHS:
            raise _bad_line(file, number, f"more than {MAX_PATHS:,} paths", "split the list")
        _check_image(file, number, place)
        paths.append(os.path.normpath(path))
    if not paths:
        raise UserError("the image list is empty", expected=EXPECTED, where=file, fix="add image paths")
    source = source_of_files(name, (), file.parent, paths, [NO_LABEL] * len(paths), IgnoredFiles())
    return dataclasses.replace(source, held_out=None)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The paths in the list, with line numbers starting from 1."""
    data = read_file(file, "the image list", MAX_LIST_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise _bad_line(file, number, error, "write the list in UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):
        path = line.strip()
        if path and not path.startswith("#"):
            yield number, path


def _check_image(file: Path, number: int, place: str) -> None:
    fix = "correct the path or remove the line"
    try:
        mode = os.stat(place).st_mode
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        for form in ("NFC", "NFD"):
            if isinstance(error, FileNotFoundError) and os.path.exists(other := unicodedata.normalize(form, place)):
                got = f"{place!a}: the file name has a different Unicode normalization (NFC or NFD): {other!a}"
                raise _bad_line(file, number, got, "write the actual file names in the list") from error
        raise _bad_line(file, number, f"{place}: {getattr(error, 'strerror', error)}", fix) from error
    if not stat.S_ISREG(mode):
        what = "a folder: pass the folder itself to --data, or list its images" if stat.S_ISDIR(mode) else "not a file"
        raise _bad_line(file, number, f"{place} is {what}", fix)
    if is_image_name(place):
        return
    try:
        with open(place, "rb", buffering=0) as image:
            start = image.read(START_BYTES)
    except OSError as error:
        raise _bad_line(file, number, f"{place}: {error.strerror}", "correct its permissions") from error
    if not is_image_file(place, start):
        raise _bad_line(file, number, f"{place} is not in a known image format", "convert it to JPEG")


def _bad_line(file: Path, number: int, got: object, fix: str) -> UserError:
    return UserError(f"line {number} of the image list is invalid", got=got, expected=EXPECTED, where=file, fix=fix)
