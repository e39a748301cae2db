"""Anything other than the expected file is an immediate `UserError` that names it, with bounded memory."""

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pytest
from pydantic import Field
from safetensors.numpy import save_file

from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import (
    JSON_BYTES,
    check_regular,
    check_safetensors,
    checked,
    open_regular,
    read_at,
    read_checked,
    read_file,
    read_json,
)
from scalekd_cache.store.durable_files import hash_file


def _socket(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.close()


def _large(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "directory": (lambda path: path.mkdir(), "a directory"),
    "FIFO": (lambda path: os.mkfifo(path), "a FIFO"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "a character device"),
    "socket": (_socket, "No such device"),
    "loop of links": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "missing"),
    "too large": (_large, "too large"),
}
READERS: dict[str, Callable[[Path], Any]] = {
    "read_file": lambda path: read_file(path, "the manifest", 1000),
    "read_json": lambda path: read_json(path, "the manifest"),
    "read_checked": lambda path: read_checked(path, Whole, "the manifest"),
}


class Row(NamedTuple):
    number: int
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True)
class Range:
    bounds: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Whole:
    rows: list[Row]
    range: Range
    names: dict[str, str]


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_named(tmp_path: Path, kind: str, reader: Callable[[Path], Any]) -> None:
    make, words = KINDS[kind]
    make(tmp_path / "m.json")
    with pytest.raises(UserError, match=words) as caught:
        reader(tmp_path / "m.json")
    assert str(tmp_path / "m.json") in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("dangling link", "too large")])
def test_hashing_and_libraries_meet_regular_files_only(tmp_path: Path, kind: str) -> None:
    make, words = KINDS[kind]
    make(tmp_path / "file")
    for reader in (hash_file, check_regular, open_regular):
        with pytest.raises(UserError, match=words):
            reader(tmp_path / "file")


@pytest.mark.parametrize("change", ["longer", "shorter", "sparse", "no header", "empty"])
def test_a_file_of_tensors_has_the_length_that_its_header_gives(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": np.zeros((3, 5), np.float32), "y": np.ones(1, np.uint8)}, path, metadata={"spec": "{}"})
    size = path.stat().st_size
    assert check_safetensors(path) == hash_file(path).bytes == size
    if change == "no header":
        path.write_bytes(b"\xff" * 100)
    else:
        os.truncate(path, {"longer": size + 1, "shorter": size - 1, "sparse": 64 << 30, "empty": 0}[change])
    for reader in (check_safetensors, hash_file):
        with pytest.raises(UserError, match="damaged" if change in ("no header", "empty") else "wrong length"):
            reader(path)


def test_missing_is_left_to_the_caller_of_open_regular(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file" / "inside"):
        with pytest.raises(FileNotFoundError):
            open_regular(path)
        with pytest.raises(UserError, match="missing"):
            check_regular(path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_file(tmp_path / name, "a file", 10)


def test_a_bad_sector_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UserError, match="Input/output error"):
        read_at(0, 1, 0, tmp_path / "v0000.tar")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": NaN}', "not valid JSON"),
        ('{"a": "\\ud800"}', "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"a":[' + "{}," * (1 << 22) + "0]}", "too many values"),
        ('{"a":[' + "1," * (1 << 22) + "0]}", "too many values"),
    ],
    ids=["empty", "cut", "deep", "NaN", "lone surrogate", "list", "many objects", "many numbers"],
)
def test_text_that_is_no_object(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_json(tmp_path / "m.json", "the manifest")


def test_a_file_longer_than_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(b" " * (JSON_BYTES + 1))
    with pytest.raises(UserError, match="too large"):
        read_json(tmp_path / "m.json", "the manifest")
    assert read_file(tmp_path / "m.json", "the manifest", JSON_BYTES + 1) == b" " * (JSON_BYTES + 1)


GOOD = '{"rows": [[1, "%s"]], "range": {"bounds": [0, 1.5]}, "names": {}}' % ("0" * 64)


def test_types_are_checked_all_the_way_down() -> None:
    assert checked(GOOD, Whole, "it", "here") == Whole(
        rows=[Row(1, "0" * 64)], range=Range(bounds=(0.0, 1.5)), names={}
    )
    for change, words in (  # file, replacement, and words in the error
        (("1,", '"1",'), r"rows\[0\]\[0\]: .*integer"),
        (("1,", "1.0,"), r"rows\[0\]\[0\]: .*integer"),
        (("1,", "true,"), r"rows\[0\]\[0\]: .*integer"),
        (("0" * 64, "0" * 63), r"rows\[0\]\[1\]: .*pattern"),
        (("[0, 1.5]", "[0]"), r"range.bounds\[1\]: missing"),
        (("[0, 1.5]", "[0, 1, 2]"), r"range.bounds: "),
        (('"bounds"', '"bound"'), r"range.bounds: missing; range.bound: unknown"),
        (('"names": {}', '"names": {"a": 1}'), r"names.a: .*string, not 1"),
        ((', "names": {}', ""), r"names: missing"),
    ):
        with pytest.raises(UserError, match=words):
            checked(GOOD.replace(*change, 1), Whole, "it", "here")
