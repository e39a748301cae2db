"""Checked configurations: `options_class` defines one, and `build` merges layers of options (a recipe, then the user's
options) into one.

In: mappings of nested or dotted names (`{"train": {"epochs": 2}}` or `{"train.epochs": "2"}`); later ones override
earlier ones. Out: a configuration. Invariant: options from the command line, Python functions, recipes and a class that
is called directly are all checked by this code.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, dataclass_transform, get_args

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from scalekd_cache.config.base import require
from scalekd_cache.config.places import expand_home
from scalekd_cache.config.plain_names import SHORT
from scalekd_cache.errors import UserError, is_text, unknown_name

Config = TypeVar("Config")
STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""Settings of all options classes: unknown names are errors, and a field's docstring is its help."""
EXPECTED = {"int_parsing": "a whole number", "int_from_float": "a whole number", "float_parsing": "a number",
            "bool_parsing": "true or false", "bool_type": "true or false", "string_type": "text",
            "int_type": "a whole number", "float_type": "a number", "dataclass_type": "a group of options"}  # fmt: skip
"""The expected value for each pydantic error type."""
LISTS = {2: "two numbers, such as [0.2,1]", 3: "three numbers, such as [0.5,0.5,0.5]"}
"""The expected value for a list, by its length."""
TOO_LARGE = 2**63
"""2^63: libraries that store options as 64-bit integers fail from here on."""

LARGEST = 3.4028235e38
"""The largest float32."""


class Option(NamedTuple):
    """One option of a configuration."""

    name: str
    """Dotted name."""
    info: FieldInfo
    """Type and default."""
    help: str
    """The docstring of the field as one line."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def options_class(group: str = "") -> Callable[[type[Config]], type[Config]]:
    """Class decorator for a group of options: a frozen dataclass whose invalid or unknown fields raise `UserError`.

    Args:
        group: the first part of the options' dotted names, such as train; empty for a whole command.
    """
    prefix = f"{group}." if group else ""

    def decorate(config_class: type[Config]) -> type[Config]:
        made: Any = dataclass(frozen=True, kw_only=True, config=STRICT)(config_class)
        validate = made.__init__

        @functools.wraps(validate)
        def checked(self: Any, /, **values: Any) -> None:
            try:
                validate(self, **values)
            except ValidationError as error:
                raise _option_error(error, made, prefix) from error
            for option in options_of(made):
                _check_value(prefix + option.name, operator.attrgetter(option.name)(self))

        made.__init__ = checked
        return made  # type: ignore[no-any-return]

    return decorate


def options_of(config_class: type, prefix: str = "") -> Iterator[Option]:
    """All options of a configuration class, in field order."""
    infos: Mapping[str, FieldInfo] = config_class.__pydantic_fields__  # type: ignore[attr-defined]
    for name, info in infos.items():
        if dataclasses.is_dataclass(info.annotation):
            assert isinstance(info.annotation, type)
            yield from options_of(info.annotation, f"{prefix}{name}.")
        else:
            # For a subclass, pydantic has docstrings only for fields that the subclass itself defines.
            owners = (base.__dict__.get("__pydantic_fields__", {}).get(name) for base in config_class.__mro__)
            text = next((owner.description for owner in owners if owner is not None and owner.description), "")
            yield Option(prefix + name, info, " ".join(text.split()))


@options_class()
class DryRun:
    """The `dry_run` option of both stages."""

    dry_run: bool = False
    """Run all checks and print what would be done, without writing anything."""


def build(config_class: type[Config], *layers: Mapping[str, Any]) -> Config:
    """A configuration: the defaults, overridden by each layer in turn.

    Raises:
        UserError: an option is unknown (the message suggests the closest names) or has an invalid value. No number may
            be negative, NaN or infinite.
    """
    tree: dict[str, Any] = {}
    for layer in layers:
        _merge(tree, layer)
    return config_class(**tree)


def take(given: dict[str, Any], config_class: type[Config]) -> Config:
    """Build a configuration from the matching options in `given`, and remove them from it."""
    names = [option.name for option in options_of(config_class) if option.name in given]
    return build(config_class, {name: given.pop(name) for name in names})


def plain_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options with null as None and ~/ expanded.

    Raises:
        UserError: a value is empty.
    """
    if empty := [name for name, value in given.items() if value == ""]:
        raise UserError(f"--{empty[0]} has an empty value: is a shell variable unset?")
    return {name: None if value in ("null", "None") else expand_home(value) for name, value in given.items()}


def _check_value(name: str, value: object) -> None:
    """Raise `UserError` for a number that no option accepts (NaN, infinite, negative or too large) and for text that is
    not UTF-8, which cannot be stored or printed."""
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, int):
            require(0 <= part < TOO_LARGE, name, value, "0 to 2^63 - 1")
        elif isinstance(part, float):
            require(0 <= part <= LARGEST, name, value, "a finite float32 number >= 0")
        elif isinstance(part, str) and not is_text(part):
            raise UserError(f"the value of option {name} is not valid UTF-8: {part!a}", fix="rename the file or folder")


def _merge(tree: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Add a layer to the tree; dotted names become nested."""
    for name, value in layer.items():
        head, _, rest = name.partition(".")
        inner = {rest: value} if rest else value
        if isinstance(inner, Mapping):
            branch = tree.setdefault(head, {})
            if isinstance(branch, dict):
                _merge(branch, inner)
                continue
        tree[head] = inner


def _option_error(error: ValidationError, config_class: type, prefix: str) -> UserError:
    """The first problem, as a one-line error. Unknown options are reported before invalid values."""
    problems = error.errors(include_url=False)
    problem = min(problems, key=lambda found: found["type"] != "unexpected_keyword_argument")
    name = prefix + ".".join(str(part) for part in problem["loc"])
    infos = {option.name: option.info for option in options_of(config_class, prefix)}
    names = list(infos)
    if problem["type"] == "unexpected_keyword_argument":
        short = [SHORT[known].removeprefix("--").replace("-", "_") for known in names if known in SHORT]
        return unknown_name("option", name, [*names, *short], "--help lists all", listed=0)
    if problem["type"] == "missing" and name in names:
        return UserError(f"--{name} is required (see --help)")
    if name not in names:  # a part of an option, such as one number in a list
        name = next((known for known in names if name.startswith(f"{known}.")), name)
    got = problem["input"]
    expected = EXPECTED.get(problem["type"]) or problem.get("ctx", {}).get("expected") or problem["msg"]
    if problem["type"] in ("tuple_type", "missing", "too_long"):
        expected = LISTS.get(len(get_args(infos[name].annotation)) if name in infos else 0, expected)
    typed = f"; {SHORT[name]}" if name in SHORT else ""
    return UserError(f"invalid value for {name}: {got} (expected {str(expected).replace(chr(39), '')}{typed})")
