"""timm models by name: checks the name, builds the model with the options it takes.

In: a model name as a user types it and keyword arguments. Out: a timm module and the arguments that built it.
Invariant: only names of timm's own registry are built. `local-dir:` and `hf-hub:` names are refused: without
`pretrained=True` timm gives them random weights without a word, and with it they may load a pickle.
"""

import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from torch import nn

from scalekd_cache.errors import UserError, mistype

RESERVED_ARGS = frozenset(inspect.signature(timm.create_model).parameters) - {"kwargs"} | {"features_only", "device"}
"""Arguments of `timm.create_model` that choose weights or files; never taken from a file or a caller's mapping."""


def check_name(name: str, option: str) -> None:
    """Raise `UserError` with the nearest names unless `name` is an architecture (and tag) of timm's registry."""
    if not timm.is_model(name):
        where = f"{option}; python -c 'import timm; print(timm.list_models())' lists those of timm {timm.__version__}"
        raise mistype("model", name, timm.list_models(), where)
    stem, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{stem}.*")]
    if tag and tag not in tags:
        raise mistype(f"tag of {stem}'s weights", tag, tags, f"{option}, after the dot, which can be left out")


def default_image_size(name: str) -> int:
    """Side (pixels) of the images that timm builds this model for."""
    config = timm.get_pretrained_cfg(name)
    return int(config.input_size[-1]) if config is not None else 224


def create_timm_model(
    name: str, args: Mapping[str, Any], optional: Mapping[str, Any] | None = None, *, pretrained: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a timm model.

    Args:
        name: A name that `check_name` accepts.
        args: Arguments the model must take.
        optional: Arguments that are left out when the model's constructor does not know them.
        pretrained: Load timm's weights.

    Returns:
        The model and the arguments it was built with (without `pretrained`).

    Raises:
        UserError: an argument that chooses weights or files, one the model does not know, or an image size it refuses.
    """
    reserved = sorted(RESERVED_ARGS & {*args, *(optional or {})})
    if reserved:
        raise UserError(
            "these model arguments are not allowed: they choose weights or files",
            got=", ".join(reserved),
            expected="arguments of the model's constructor",
            where=f"model {name}",
        )
    extra = dict(optional or {})
    while True:
        used = {**args, **extra}
        try:
            return timm.create_model(name, pretrained=pretrained, **used), used
        except TypeError as error:
            found = re.search(r"unexpected keyword argument[^']*'(\w+)'", str(error))
            if found is None or found[1] not in used:
                raise
            if found[1] not in extra:
                raise UserError(
                    f"model {name} does not take the argument {found[1]}",
                    got=f"{found[1]}={used[found[1]]!r}",
                    fix=f"leave {found[1]} out",
                ) from error
            del extra[found[1]]
        except AssertionError as error:
            raise UserError(
                f"timm cannot build {name} with these arguments: {error}",
                got=used,
                fix="choose another image size or other model arguments",
            ) from error


def fetch_weights(name: str, folder: Path) -> Path:
    """Bring timm's pretrained weights of a model to `folder`/<name>.safetensors, which appears whole or not at all.

    Raises:
        UserError: an unknown name, or weights that cannot be had here.
    """
    check_name(name, "teacher")
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # hub clients raise errors of many kinds; all of them mean that there are no weights
        raise UserError(
            "the pretrained weights cannot be fetched",
            got=f"{type(error).__name__}: {error}",
            where=name,
            fix="run this where there is a network, and share the folder with the other machines",
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    file, temporary = folder / f"{name}.safetensors", folder / f".{name}.{os.getpid()}.tmp"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, str(temporary))
    os.replace(temporary, file)
    return file
