"""What every configuration has in common: one check, one plain form, one fingerprint.

In: options and dataclasses. Out: an error, JSON values, a hash.
Invariant: equal configurations give equal fingerprints.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from scalekd_cache.errors import UserError


def require(ok: bool, option: str, got: object, expected: str) -> None:
    """Raise the one kind of error a bad option gives."""
    if not ok:
        raise UserError(f"option {option} is out of range: {got}, expected {expected}")


def to_plain(config: Any) -> Any:
    """Dataclasses to dicts, tuples to lists: what JSON would give back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a configuration from its plain form: JSON's lists become tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def fingerprint(fields: Mapping[str, Any]) -> str:
    """The sha256 (hex) of canonical JSON of `fields`, everything that changes cached bytes."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as one level of dotted names, as they are typed."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found
