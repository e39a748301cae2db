"""JSON files that contain their own checksum: manifest.json, plan.json and codec.json.

In: an object, or a file's bytes. Out: a file, or the object in a file. The file's last field, `self_sha256`, is the
SHA-256 of the whole file with 64 zeros in place of that field's value. Invariant: a change to any byte of the file,
including whitespace, is detected.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from scalekd_cache.store.base import damaged
from scalekd_cache.store.checked_files import is_hex
from scalekd_cache.store.path import StoredPath

SEAL = "self_sha256"
ZEROS = "0" * 64


def sealed(fields: Mapping[str, Any]) -> bytes:
    """An object's file contents; equal objects (with keys in the same order) give equal bytes."""
    assert SEAL not in fields, SEAL
    blank = (json.dumps({**fields, SEAL: ZEROS}, indent=1, allow_nan=False) + "\n").encode()
    head, _, tail = blank.rpartition(ZEROS.encode())
    return head + hashlib.sha256(blank).hexdigest().encode() + tail


def unsealed(fields: Mapping[str, Any], data: bytes, path: StoredPath | str) -> dict[str, Any]:
    """Verify an object's checksum and return the object without it.

    Args:
        fields: the parsed object.
        data: the bytes from which it was parsed.
        path: the file, for the error.

    Raises:
        UserError: the checksum is missing or does not match these bytes.
    """
    seal: Any = fields.get(SEAL, "")
    if not is_hex(seal, 64):
        raise damaged(f"no {SEAL} in a file", repr(seal)[:100], "64 hex digits", path)
    head, _, tail = data.rpartition(seal.encode())
    found = hashlib.sha256(head + ZEROS.encode() + tail).hexdigest()
    if found != seal:
        raise damaged(f"a file does not match its {SEAL}", f"sha256 {found}", seal, path)
    return {name: value for name, value in fields.items() if name != SEAL}
