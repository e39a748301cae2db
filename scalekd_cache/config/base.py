"""Helpers for all configurations: range checks, JSON values, the fingerprint.

In: options and dataclasses. Out: an error, JSON values, a hash.
Invariant: equal configurations give equal fingerprints.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator

from scalekd_cache.config.plain_names import SHORT
from scalekd_cache.errors import UserError

LONGEST_MINUTES = 1_000_000
"""The longest timeout: two years."""


def _read_list(value: object) -> object:
    """Convert a list or array to a tuple. On the command line, a list is written as YAML: `[0.2,1]` or `0.2,1`."""
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value if value.startswith("[") else f"[{value}]")
        except yaml.YAMLError:
            return value
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(value) if isinstance(value, list) else value


def read_number(value: object) -> object:
    """Parse a whole number from the command line, for options that allow only a few numbers."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _read_one_or_more(value: object) -> object:
    """Like `_read_list`, but a single number on the command line stays a number."""
    found = _read_list(value)
    return found[0] if isinstance(value, str) and isinstance(found, tuple) and len(found) == 1 else found


Range = Annotated[tuple[float, float], BeforeValidator(_read_list)]
Channels = Annotated[tuple[float, float, float], BeforeValidator(_read_list)]
Shares = Annotated[float | tuple[float, ...], BeforeValidator(_read_one_or_more)]


def require(ok: bool, option: str, got: object, expected: str) -> None:
    """Raise `UserError` if an option has an invalid value."""
    if not ok:
        typed = f"; {SHORT[option]}" if option in SHORT else ""
        raise UserError(f"invalid value for {option}: {got} (expected {expected}{typed})")


def require_minutes(option: str, got: float) -> None:
    """Raise `UserError` if a timeout is zero or longer than timers and sockets accept."""
    require(0 < got <= LONGEST_MINUTES, option, got, f"above 0, at most {LONGEST_MINUTES:,} minutes")


def to_plain(config: Any) -> Any:
    """Convert a dataclass to JSON values: dataclasses become dicts, tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Convert JSON values to arguments for a configuration: lists become tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def fingerprint(fields: Mapping[str, Any]) -> str:
    """SHA-256 hex digest of `fields` as canonical JSON. `fields` must contain everything that affects cached bytes."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested options to dotted names, as on the command line."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found
