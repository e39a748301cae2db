"""JSON files that carry their own checksum: manifest.json, plan.json and codec.json, which no other file's hash covers.

In: an object, or a file's bytes. Out: a file whose last field, `self_sha256`, is the sha256 of the whole file with 64
zeros in that place; or the object again. Invariant: any changed byte of such a file, white space included, is noticed.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from scalekd_cache.store.base import damaged
from scalekd_cache.store.path import StoredPath

SEAL = "self_sha256"
HEX64 = re.compile(r"[0-9a-f]{64}")
ZEROS = "0" * 64


def sealed(fields: Mapping[str, Any]) -> bytes:
    """The file of an object; equal objects (with keys in the same order) give equal bytes."""
    assert SEAL not in fields, SEAL
    blank = (json.dumps({**fields, SEAL: ZEROS}, indent=1, allow_nan=False) + "\n").encode()
    head, _, tail = blank.rpartition(ZEROS.encode())
    return head + hashlib.sha256(blank).hexdigest().encode() + tail


def unsealed(fields: Mapping[str, Any], data: bytes, path: StoredPath) -> dict[str, Any]:
    """The object without its seal.

    Args:
        fields: the parsed object.
        data: the bytes it was parsed from.
        path: where they come from.

    Raises:
        UserError: no seal, or one that is not that of these bytes.
    """
    seal = fields.get(SEAL)
    if not isinstance(seal, str) or HEX64.fullmatch(seal) is None:
        raise damaged("a file has no checksum of its own", repr(seal)[:100], f"{SEAL}: 64 hex digits", path)
    head, _, tail = data.rpartition(seal.encode())
    found = hashlib.sha256(head + ZEROS.encode() + tail).hexdigest()
    if found != seal:
        raise damaged("a file does not match its own checksum", f"sha256 {found}", seal, path)
    return {name: value for name, value in fields.items() if name != SEAL}
