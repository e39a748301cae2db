"""Parquet files laid out like Hugging Face datasets: an image column and, if there are labels, a label column.

In: a folder with parquet files in train/ and val/ (or validation/, test/), or with names like data/train-*.parquet.
Out: a `ListedSource` in file order (only whole row groups can be read, so in hashed order, every sample would need a
row group read). Invariant: row i of a file is one sample, with the key `<file>/<row>`.
"""

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from scalekd_cache.data.base import (
    MAX_KEY_BYTES,
    IntArray,
    ListedSource,
    NoSplitError,
    SampleList,
    Split,
    check_labels,
    encode_key,
    numbered_classes,
    read_listed_file,
)
from scalekd_cache.errors import UserError, counted, import_optional
from scalekd_cache.store.base import NO_LABEL
from scalekd_cache.store.checked_files import check_regular

SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "test")}
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMN = "label"
LABEL_LIKE = re.compile(r".*label.*|class|classes|cls|target", re.IGNORECASE)
"""Names of integer columns that might hold labels; such columns are rejected rather than ignored."""
LAYOUT = "train/*.parquet and val/*.parquet, or data/train-*.parquet and data/validation-*.parquet"


class ParquetFacts(NamedTuple):
    """Facts about a file: rows per row group, labels (rows,) int64, whether it has a label column (without one, all
    labels are `NO_LABEL`), the declared class names, if any, and the number of rows with neither bytes nor a path."""

    path: str
    image_column: str
    group_rows: list[int]
    labels: IntArray
    labeled: bool
    class_names: tuple[str, ...] | None
    empty_rows: int


class ParquetReader:
    """Reads image bytes and caches the last row group, which is not pickled. Holds no open files.

    Args:
        files: the facts about the files.
        root: the dataset folder; image paths may be relative to it or to the folder of their parquet file.
    """

    def __init__(self, files: list[ParquetFacts], root: Path) -> None:
        self._root = root
        self._files = [(facts.path, facts.image_column) for facts in files]
        self._groups = [(number, group) for number, facts in enumerate(files) for group in range(len(facts.group_rows))]
        rows = [count for facts in files for count in facts.group_rows]
        self._starts = np.cumsum([0, *rows], dtype=np.int64)
        self._latest: tuple[int, Any] | None = None

    def __call__(self, index: int) -> bytes:
        """Image bytes of row `index` (counted across all files), embedded or read from a path; b"" for a null value."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        latest = self._latest
        if latest is None or latest[0] != group:
            latest = self._latest = (group, self._load(group))
        value = latest[1][index - int(self._starts[group])].as_py()
        data, path = _parts(value)
        if data or not path:
            return data
        file = Path(self._files[self._groups[group][0]][0])
        place = _place_of(path, file, self._root)
        return read_listed_file(str(place or file.parent / path), f"row {index}")

    def _load(self, group: int) -> Any:
        number, group_in_file = self._groups[group]
        path, column = self._files[number]
        parquet = _pyarrow_parquet()
        try:
            with parquet.ParquetFile(path) as file:
                values = file.read_row_group(group_in_file, columns=[column], use_threads=False).column(column)
        except Exception as error:  # pyarrow raises many exception types on a damaged file
            raise _damaged(path, error) from error
        expected = int(self._starts[group + 1] - self._starts[group])
        if len(values) != expected:
            raise _damaged(path, f"row group {group_in_file} has {counted(len(values), 'row')}, expected {expected}")
        return values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None}


def has_parquet(root: Path) -> bool:
    """Whether `root` has training parquet files in the expected layout."""
    return bool(_find(root, "train"))


def open_parquet(name: str, root: Path, split: Split) -> ListedSource:
    """List a folder of parquet files. Class names are those declared in the files, or else "0".."max".

    If no training file has a label column, val may have its own labels; without val files, the list covers both splits.

    Raises:
        UserError: pyarrow or the files are missing, columns or labels are not as expected, only some files have labels,
            or a file is damaged.
    """
    train_paths, val_paths = _find(root, "train"), _find(root, "val")
    paths = val_paths if split == "val" else train_paths
    train = [_read_facts(path, root, images=paths is train_paths) for path in train_paths]
    if not paths and train and not train[0].labeled:
        paths = train_paths
        train = [_read_facts(path, root, images=True) for path in train_paths]
    if not train_paths or not paths:
        missing = split if train_paths else "train"
        raise NoSplitError(
            f"no parquet files for the {missing} split", expected=LAYOUT, where=root, fix=f"add the {missing} files"
        )
    files = train if paths is train_paths else [_read_facts(path, root, images=True) for path in paths]
    for many in (train, files):
        _check_all_labeled(many, needed=train[0].labeled)
    class_names = _class_names(train, files) if files[0].labeled else ()
    for facts in files:
        check_labels(facts.labels, len(class_names), "a parquet file", facts.path)
    labels = np.concatenate([facts.labels for facts in files])
    if not len(labels):
        raise UserError(f"the parquet files for {split} have no rows", where=root, fix="add images")
    if files[0].labeled and not class_names:
        raise _wrong_columns(Path(files[0].path), f"{LABEL_COLUMN} {NO_LABEL} in every row")
    limit = MAX_KEY_BYTES - len("/0000000000")
    prefixes = [encode_key(str(Path(facts.path).relative_to(root).with_suffix("")), limit) for facts in files]
    empty_rows = sum(facts.empty_rows for facts in files)
    return ListedSource(
        name=name,
        class_names=class_names,
        samples=SampleList(
            (f"{prefix}/{row:07d}" for prefix, facts in zip(prefixes, files) for row in range(len(facts.labels))),
            labels,
        ),
        reader=ParquetReader(files, root),
        file_starts=np.cumsum([0, *(len(facts.labels) for facts in files[:-1])], dtype=np.int64),
        ignored=(f"ignored: {counted(empty_rows, 'row')} without an image (neither bytes nor a path)",)
        if empty_rows
        else (),
        held_out=0 if train[0].labeled or val_paths else None,
    )


def _check_all_labeled(files: list[ParquetFacts], *, needed: bool) -> None:
    """Raise `UserError` for the first file without a label column, if any file has one or labels are `needed`."""
    unlabeled = [facts for facts in files if not facts.labeled]
    if unlabeled and (needed or len(unlabeled) < len(files)):
        raise UserError(
            "some parquet files have no label column, but others do",
            got=f"no `{LABEL_COLUMN}` in {len(unlabeled)} of {counted(len(files), 'file')}",
            expected=f"`{LABEL_COLUMN}` in every file",
            where=unlabeled[0].path,
            fix="add the column to these files, or remove them",
        )


def _find(root: Path, split: str) -> list[Path]:
    for part in SPLIT_NAMES[split]:
        for folder, pattern in (
            (root / part, "*.parquet"),
            (root / "data", f"{part}-*.parquet"),
            (root, f"{part}-*.parquet"),
            (root, f"{part}.parquet"),
        ):
            found = sorted(folder.glob(pattern))
            if found:
                return found
    return []


def _read_facts(path: Path, root: Path, *, images: bool) -> ParquetFacts:
    """Read a file's metadata; with `images`, also check that every image has bytes or an existing file."""
    parquet = _pyarrow_parquet()
    check_regular(path, "a parquet file")
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            column = _image_column(schema, path)
            labeled = LABEL_COLUMN in schema.names
            labels = file.read(columns=[LABEL_COLUMN], use_threads=False).column(LABEL_COLUMN) if labeled else None
            rows = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            empty_rows = _check_images(file, column, path, root) if images else 0
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many exception types on a damaged file
        raise _damaged(path, error) from error
    if labels is None:
        return ParquetFacts(str(path), column, rows, np.full(sum(rows), NO_LABEL), False, None, empty_rows)
    if labels.null_count:
        raise _wrong_columns(path, f"{counted(labels.null_count, 'row')} without a label")
    values = labels.to_numpy()
    if len(values) and values.max() > np.iinfo(np.int64).max:
        raise _wrong_columns(path, f"label {values.max()}")
    values = np.asarray(values, dtype=np.int64)
    return ParquetFacts(str(path), column, rows, values, True, _declared_classes(schema.metadata, path), empty_rows)


def _parts(value: Any) -> tuple[bytes, str]:
    """Image bytes and path from a column value, which is bytes, a path or a struct of both."""
    if isinstance(value, dict):
        return value.get("bytes") or b"", value.get("path") or ""
    return (b"", value) if isinstance(value, str) else (value or b"", "")


def _place_of(path: str, file: Path, root: Path) -> Path | None:
    """The file at a path that is absolute, relative to the parquet file, or relative to the dataset."""
    places = (folder / path for folder in (file.parent, root))  # an absolute path is kept
    return next((place for place in places if place.is_file()), None)


def _check_images(file: Any, column: str, path: Path, root: Path) -> int:
    """Count the rows with neither bytes nor a path. Only row groups with images that have no bytes are read.

    Raises:
        UserError: there is no file at one of the paths.
    """
    first, empty, example = 0, 0, ""
    lost: list[int] = []
    paths_only = str(file.schema_arrow.field(column).type) in ("string", "large_string")
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if paths_only or _has_nulls(file.metadata.row_group(group), column):
            values = file.read_row_group(group, columns=[column], use_threads=False).column(column)
            for row, value in enumerate(values, start=first):
                data, place = _parts(value.as_py())
                if not data and not place:
                    empty += 1
                elif not data and _place_of(place, path, root) is None:
                    lost.append(row)
                    example = example or place
        first += rows
    if lost:
        raise UserError(
            "a parquet file lists image paths that do not exist",
            got=f"column {column}: {len(lost)} of {first} rows; the first is row {lost[0]}, with path {example}",
            expected=f"image bytes, an absolute path, or a path relative to {path.parent} or {root}",
            where=path,
            fix="put the images at these paths, or write the dataset with embedded images",
        )
    return empty


def _has_nulls(group: Any, column: str) -> bool:
    """Whether a row group may have images without bytes, according to its statistics."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    found = [chunk.statistics for chunk in chunks if chunk.path_in_schema in (column, f"{column}.bytes")]
    return not found or found[0] is None or found[0].null_count != 0


def _image_column(schema: Any, path: Path) -> str:
    """Name of the image column: bytes, a path, or a struct with a field `bytes` or `path`."""
    types = {field.name: field.type for field in schema}
    column = next((name for name in IMAGE_COLUMNS if name in types), None)
    others = [name for name, kind in types.items() if LABEL_LIKE.fullmatch(name) and _is_integer(kind)]
    if column is None or (LABEL_COLUMN not in types and others):
        raise _wrong_columns(path, ", ".join(f"{name}: {kind}" for name, kind in types.items()))
    fields = {field.name: field.type for field in types[column]} if str(types[column]).startswith("struct") else {}
    kinds = [str(fields[name]) for name in ("bytes", "path") if name in fields] or [str(types[column])]
    if not set(kinds) <= {"binary", "large_binary", "string", "large_string", "null"}:
        raise _wrong_columns(path, f"{column}: {types[column]}")
    if LABEL_COLUMN in types and not _is_integer(types[LABEL_COLUMN]):
        raise _wrong_columns(path, f"{LABEL_COLUMN}: {types[LABEL_COLUMN]}")
    return column


def _is_integer(kind: Any) -> bool:
    return str(kind).lstrip("u").startswith("int")


def _declared_classes(metadata: dict[bytes, bytes] | None, path: Path) -> tuple[str, ...] | None:
    """Class names from the ClassLabel feature in the Hugging Face schema metadata, if any."""
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        names = json.loads(text)["info"]["features"][LABEL_COLUMN].get("names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "a parquet file has invalid Hugging Face metadata",
            got=repr(error),
            expected=f"info.features.{LABEL_COLUMN}.names in the schema's `huggingface` entry",
            where=path,
            fix="write the file again, or remove this entry",
        ) from error
    if isinstance(names, dict):  # older format: {"0": "cat", "1": "dog"}
        names = [names.get(str(number)) for number in range(len(names))]
    return tuple(str(name) for name in names) if names else None


def _class_names(train: list[ParquetFacts], files: list[ParquetFacts]) -> tuple[str, ...]:
    declared = {facts.class_names for facts in [*train, *files] if facts.class_names is not None}
    if len(declared) > 1:
        first, second = sorted(declared)[:2]
        at = next((at for at, pair in enumerate(zip(first, second)) if pair[0] != pair[1]), len(first))
        raise UserError(
            "parquet files declare different class names",
            got=" and ".join(
                f"{counted(len(names), 'class')} (class {at}: {names[at] if at < len(names) else 'none'})"
                for names in (first, second)
            ),
            expected="the same list in all train and val files",
            where=train[0].path,
            fix="write all files from a single dataset",
        )
    if declared:
        return next(iter(declared))
    named = train if train[0].labeled else files
    return numbered_classes(np.concatenate([facts.labels for facts in named]), named[0].path)


def _wrong_columns(path: Path, got: str) -> UserError:
    return UserError(
        "a parquet file lacks a valid image or label column",
        got=got,
        expected="`image` (bytes, a path, or a struct with `bytes` or `path`) and `label` (an integer in every row); "
        "for unlabeled images, no integer column with a label-like name",
        where=path,
        fix="rename or convert the columns",
    )


def _damaged(path: str | Path, error: object) -> UserError:
    return UserError(
        "cannot read a parquet file",
        got=error,
        expected="a complete parquet file",
        where=path,
        fix="copy or download the file again",
    )


def _pyarrow_parquet() -> ModuleType:
    return import_optional("pyarrow.parquet", "parquet files need pyarrow", "remote")
