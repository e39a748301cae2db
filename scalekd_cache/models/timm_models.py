"""timm models by name: checks the name, builds the model with the options it takes.

In: a model name as a user types it and keyword arguments. Out: a timm module and the arguments that built it.
Invariant: old names are resolved before anything is asked about them. A pretrained model's classifier comes from its
weights or is not there. Only names of timm's own registry are built. `local-dir:` and `hf-hub:` names are refused:
without `pretrained=True` timm gives them random weights without a word, and with it they may load a pickle.
"""

import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from safetensors.torch import save_file
from torch import nn

from scalekd_cache.errors import UserError, unknown_name
from scalekd_cache.models.weights import weights_file

DEMO_TEACHER = "demo_swin"


DEMO_TIMM_NAME = "swin_tiny_patch4_window7_224"


def timm_name(name: str) -> str:
    """The timm model behind a teacher's name."""
    return DEMO_TIMM_NAME if name == DEMO_TEACHER else name


RESERVED_ARGS = frozenset(inspect.signature(timm.create_model).parameters) - {"kwargs"} | {"features_only", "device"}
"""Arguments of `timm.create_model` that choose weights or files; never taken from a file or a caller's mapping."""


HUB_PREFIX = re.compile(r"(https?://)?(huggingface\.co/|hf[-_]hub:)?(timm/)?")
"""What stands before a model's name on its page and in the code shown there."""


def check_name(name: str, option: str) -> str:
    """The name under which timm has this model today, with the tag of its weights where an old name means one.

    timm maps old names (`vit_base_patch16_224_in21k`) when it builds a model, but knows their classes, image size and
    weights under the new ones alone (`vit_base_patch16_224.augreg_in21k`).

    Raises:
        UserError: no architecture (or tag) of timm's registry; it names the nearest ones.
    """
    stem, _, tag = name.partition(".")
    old = timm.models.get_deprecated_models()
    if stem in old:
        if old[stem] is None:
            raise UserError(f"timm {timm.__version__} has removed the model {stem} ({option})")
        stem, _, known_tag = old[stem].partition(".")
        tag = tag or known_tag
        name = f"{stem}.{tag}" if tag else stem
    elif not timm.is_model(name):
        where = f"{option}; python -c 'import timm; print(timm.list_models())' lists those of timm {timm.__version__}"
        page = HUB_PREFIX.sub("", name, count=1)
        raise unknown_name("model", name, [page] if timm.is_model(page) else timm.list_models(), where)
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{stem}.*")]
    if tag and tag not in tags:
        raise unknown_name(f"tag of {stem}'s weights", tag, tags, f"{option}, after the dot, which can be left out")
    return name


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
        pretrained: Load timm's weights. A classifier that is not among them is removed, never left at random values.

    Returns:
        The model and the arguments that build it (without `pretrained`).

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
        generator = torch.get_rng_state()
        try:
            model: Any = timm.create_model(name, pretrained=pretrained, **used)
            if pretrained and _random_head(name, model, used, generator):
                model.reset_classifier(0)
                used["num_classes"] = 0
            return model, used
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


def _random_head(name: str, model: Any, args: Mapping[str, Any], generator: torch.Tensor) -> bool:
    """Whether a pretrained model has a classifier that its weights do not hold; `generator` is the state before it."""
    config, head = timm.get_pretrained_cfg(name), _head_tensors(model)
    if not head:
        return False
    if config is not None and config.num_classes != model.num_classes:
        return True  # timm leaves the head of the weights out
    if config is not None and not config.custom_load:
        return False  # timm has loaded all tensors strictly
    after = torch.get_rng_state()
    torch.set_rng_state(generator)
    fresh = _head_tensors(timm.create_model(name, pretrained=False, **args))
    torch.set_rng_state(after)
    return any(torch.equal(value, initial) for value, initial in zip(head, fresh, strict=True))


def _head_tensors(model: Any) -> list[torch.Tensor]:
    """Weights of the classifier, or of both of a distilled model; biases may be zero in trained heads too."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    heads = found if isinstance(found, tuple | list) else (found,)
    return [value for head in heads if isinstance(head, nn.Module) for value in head.parameters() if value.ndim > 1]


def fetch_weights(name: str, folder: Path) -> Path:
    """Bring timm's pretrained weights of a model to `folder`/<name>.safetensors, which appears whole or not at all.

    Raises:
        UserError: an unknown name, or weights that cannot be had here.
    """
    current = check_name(name, "teacher")
    try:
        model, _ = create_timm_model(current, {}, pretrained=True)
    except Exception as error:  # hub clients raise errors of many kinds; all of them mean that there are no weights
        raise UserError(
            "the pretrained weights cannot be fetched",
            got=f"{type(error).__name__}: {error}",
            where=name,
            fix="run this where there is a network, and share the folder with the other machines",
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    file, temporary = weights_file(folder, name), folder / f".{name}.{os.getpid()}.tmp"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, str(temporary))
    os.replace(temporary, file)
    return file
