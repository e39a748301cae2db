"""Parquet files of images as Hugging Face data sets lay them out: a column of image bytes and a column of labels.

In: a folder with train/ and val/ (validation/, test/) parquet files, or data/train-*.parquet and its like.
Out: a `ListedSource` in file order (a row group is the smallest thing that can be read, so a hashed order would read
every group once a sample). Invariant: row i of a file is one sample, key `<file>/<row>`.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from scalekd_cache.errors import UserError
from scalekd_cache.sources.base import IntArray, ListedSource, SampleList, Split, check_labels, encode_key

SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "test")}
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMN = "label"
LAYOUT = "train/*.parquet and val/*.parquet, or data/train-*.parquet and data/validation-*.parquet"


class ParquetFacts(NamedTuple):
    """What opening a file tells: rows of each row group, labels (rows,) int64, class names when declared."""

    path: str
    image_column: str
    group_rows: list[int]
    labels: IntArray
    class_names: tuple[str, ...] | None


class ParquetReader:
    """Reads image bytes by row group and keeps the latest one. Pickles without it; holds no open file."""

    def __init__(self, files: list[ParquetFacts]) -> None:
        self._files = [(facts.path, facts.image_column) for facts in files]
        self._groups = [(number, group) for number, facts in enumerate(files) for group in range(len(facts.group_rows))]
        rows = [count for facts in files for count in facts.group_rows]
        self._starts = np.cumsum([0, *rows], dtype=np.int64)
        self._latest: tuple[int, Any] | None = None

    def __call__(self, index: int) -> bytes:
        """Bytes of row `index`, counted over all files; b"" for a null."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        latest = self._latest
        if latest is None or latest[0] != group:
            latest = self._latest = (group, self._load(group))
        value = latest[1][index - int(self._starts[group])].as_py()
        return (value.get("bytes") if isinstance(value, dict) else value) or b""

    def _load(self, group: int) -> Any:
        number, group_in_file = self._groups[group]
        path, column = self._files[number]
        parquet = _pyarrow_parquet()
        try:
            with parquet.ParquetFile(path) as file:
                values = file.read_row_group(group_in_file, columns=[column], use_threads=False).column(column)
        except Exception as error:  # pyarrow raises several kinds on a damaged file
            raise _damaged(path, error) from error
        expected = int(self._starts[group + 1] - self._starts[group])
        if len(values) != expected:
            raise _damaged(path, f"row group {group_in_file} has {len(values)} rows, {expected} when it was opened")
        return values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None}


def has_parquet(root: Path) -> bool:
    """Whether `root` has training parquet files where they are looked for."""
    return bool(_find(root, "train"))


def open_parquet(name: str, root: Path, split: Split) -> ListedSource:
    """List a folder of parquet files; class names are those declared in the training files, else "0".."max".

    Raises:
        UserError: pyarrow is missing, no files, columns or labels that are not as expected, a damaged file.
    """
    paths = {part: _find(root, part) for part in ("train", split)}
    for part in ("train", split):
        if not paths[part]:
            raise UserError(f"no parquet files for {part}", expected=LAYOUT, where=root, fix=f"add the {part} files")
    train = [_read_facts(path) for path in paths["train"]]
    files = train if split == "train" else [_read_facts(path) for path in paths[split]]
    class_names = _class_names(train, files)
    for facts in files:
        check_labels(facts.labels, len(class_names), "a parquet file", facts.path)
    labels = np.concatenate([facts.labels for facts in files])
    if not len(labels):
        raise UserError(f"the parquet files for {split} have no rows", where=root, fix="add images")
    prefixes = [encode_key(str(Path(facts.path).relative_to(root).with_suffix(""))) for facts in files]
    return ListedSource(
        name=name,
        class_names=class_names,
        samples=SampleList(
            (f"{prefix}/{row:07d}" for prefix, facts in zip(prefixes, files) for row in range(len(facts.labels))),
            labels,
        ),
        reader=ParquetReader(files),
        file_starts=np.cumsum([0, *(len(facts.labels) for facts in files[:-1])], dtype=np.int64),
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


def _read_facts(path: Path) -> ParquetFacts:
    parquet = _pyarrow_parquet()
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            column = _image_column(schema, path)
            labels = file.read(columns=[LABEL_COLUMN], use_threads=False).column(LABEL_COLUMN)
            rows = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    except UserError:
        raise
    except Exception as error:  # pyarrow raises several kinds on a damaged file
        raise _damaged(path, error) from error
    if labels.null_count:
        raise _wrong_columns(path, f"{labels.null_count} rows without a label")
    values = np.asarray(labels.to_numpy(), dtype=np.int64)
    return ParquetFacts(str(path), column, rows, values, _declared_classes(schema.metadata, path))


def _image_column(schema: Any, path: Path) -> str:
    """Name of the image column: bytes, or a struct with a field `bytes`."""
    types = {field.name: field.type for field in schema}
    column = next((name for name in IMAGE_COLUMNS if name in types), None)
    if column is None or LABEL_COLUMN not in types:
        raise _wrong_columns(path, ", ".join(f"{name}: {kind}" for name, kind in types.items()))
    fields = {field.name: field.type for field in types[column]} if str(types[column]).startswith("struct") else {}
    if str(fields.get("bytes", types[column])) not in ("binary", "large_binary"):
        raise _wrong_columns(path, f"{column}: {types[column]}")
    if not str(types[LABEL_COLUMN]).lstrip("u").startswith("int"):
        raise _wrong_columns(path, f"{LABEL_COLUMN}: {types[LABEL_COLUMN]}")
    return column


def _declared_classes(metadata: dict[bytes, bytes] | None, path: Path) -> tuple[str, ...] | None:
    """Names of the ClassLabel feature in the Hugging Face schema metadata, if there is one."""
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        names = json.loads(text)["info"]["features"][LABEL_COLUMN].get("names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"huggingface metadata: {error!r}") from error
    if isinstance(names, dict):  # an older way of writing the list: {"0": "cat", "1": "dog"}
        names = [names.get(str(number)) for number in range(len(names))]
    return tuple(str(name) for name in names) if names else None


def _class_names(train: list[ParquetFacts], files: list[ParquetFacts]) -> tuple[str, ...]:
    declared = {facts.class_names for facts in [*train, *files] if facts.class_names is not None}
    if len(declared) > 1:
        first, second = sorted(declared)[:2]
        raise UserError(
            "parquet files declare different class names",
            got=f"{first[:4]}... ({len(first)}) and {second[:4]}... ({len(second)})",
            expected="one list for all files of train and val",
            where=train[0].path,
            fix="write all files from one data set",
        )
    highest = max((int(facts.labels.max()) for facts in train if len(facts.labels)), default=-1)
    return next(iter(declared)) if declared else tuple(str(label) for label in range(highest + 1))


def _wrong_columns(path: Path, got: str) -> UserError:
    return UserError(
        "a parquet file does not have the columns of labelled images",
        got=got,
        expected="`image` (bytes, or a struct with `bytes`) and `label` (an integer in every row)",
        where=path,
        fix="rename or convert the columns",
    )


def _damaged(path: str | Path, error: object) -> UserError:
    return UserError(
        "a parquet file cannot be read",
        got=error,
        expected="a whole parquet file",
        where=path,
        fix="copy or download the file again",
    )


def _pyarrow_parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "parquet files need pyarrow, which is not installed",
            got=error,
            expected="the optional extra `remote`",
            fix="pip install 'scalekd-cache[remote]'",
        ) from error
    return pyarrow.parquet  # type: ignore[no-any-return]
