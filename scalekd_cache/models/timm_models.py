"""Checks timm model names and builds the models with the arguments they accept.

In: a model name as typed by the user, and keyword arguments. Out: a timm module and the arguments that built it.
Invariant: deprecated names are resolved first. A pretrained model's classifier comes from its weights or is removed.
Only names in timm's registry are accepted. `local-dir:` and `hf-hub:` names are rejected, because timm would silently
give such models random weights without `pretrained=True`, and might load a pickle with it.
"""

import contextlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from timm.data import infer_imagenet_subset
from torch import nn

from scalekd_cache.errors import UserError, unknown_name
from scalekd_cache.models.hub import hub_or_cache
from scalekd_cache.models.weights import save_weights, weights_file

DEMO_TEACHER = "demo_swin"
DEMO_CLASSES = 10
"""The ten digits."""


DEMO_TIMM_NAME = "swin_tiny_patch4_window7_224"


def timm_name(name: str) -> str:
    """The timm name for a teacher's name."""
    return DEMO_TIMM_NAME if name == DEMO_TEACHER else name


RESERVED_ARGS = frozenset(inspect.signature(timm.create_model).parameters) - {"kwargs"} | {"features_only", "device"}
"""Arguments to `timm.create_model` that select weights or files, which are never accepted from a file or a caller."""


HUB_PREFIX = re.compile(r"(https?://)?(huggingface\.co/|hf[-_]hub:)?(timm/)?")
"""Prefixes of model names on hub pages and in the code shown there."""


def check_name(name: str, option: str) -> str:
    """timm's current name for this model, with the weights tag implied by a deprecated name.

    timm resolves deprecated names (`vit_base_patch16_224_in21k`) when it builds a model. However, it lists the number
    of classes, the image size and the weights only under the current name (`vit_base_patch16_224.augreg_in21k`).

    Raises:
        UserError: the architecture or tag is not in timm's registry; the message suggests the closest names.
    """
    stem, dot, tag = name.partition(".")
    old = timm.models.get_deprecated_models()
    if stem in old:
        if old[stem] is None:
            raise UserError(f"timm {timm.__version__} has removed the model {stem} ({option})")
        stem, _, known_tag = old[stem].partition(".")
        tag = tag or known_tag
        name = f"{stem}.{tag}" if tag else stem
    elif not timm.is_model(name):
        where = (
            f"{option}; python -c 'import timm; print(timm.list_models())' lists the models in timm {timm.__version__}"
        )
        page = HUB_PREFIX.sub("", name.strip().lower(), count=1).partition("/")[0]
        raise unknown_name("model", name, [page] if timm.is_model(page) else timm.list_models(), where)
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{stem}.*")]
    if dot and tag not in tags:
        raise unknown_name(f"{stem} weights tag", tag, tags, f"the optional part of {option} after the dot")
    return name


def is_projection(name: str, width: int) -> bool:
    """Whether a last layer of this width is a projection to an image-text embedding (CLIP) rather than a classifier.

    timm loads CLIP's projection as the classifier. The width is compared with all CLIP weights for this architecture,
    except those fine-tuned on ImageNet.
    """
    tags = [tag for tag in timm.list_pretrained(f"{name.partition('.')[0]}.*") if "clip" in tag or "pe_core" in tag]
    configs = [config for tag in tags if (config := timm.get_pretrained_cfg(tag)) is not None]
    return any(config.num_classes == width and infer_imagenet_subset(config) is None for config in configs)


def default_image_size(name: str) -> int:
    """timm's default image size for this model, in pixels."""
    config = timm.get_pretrained_cfg(name)
    return int(config.input_size[-1]) if config is not None else 224


def create_timm_model(
    name: str, args: Mapping[str, Any], optional: Mapping[str, Any] | None = None, *, pretrained: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a timm model.

    Args:
        name: A name that `check_name` accepts.
        args: Arguments that the model must accept.
        optional: Arguments that are dropped if the model does not accept them.
        pretrained: Load timm's weights. A classifier without pretrained weights is removed.

    Returns:
        The model and the arguments that build it (without `pretrained`).

    Raises:
        UserError: an argument selects weights or files, the model rejects an argument, or the image size is not
            supported.
    """
    reserved = sorted(RESERVED_ARGS & {*args, *(optional or {})})
    if reserved:
        raise UserError(
            "these model arguments are not allowed: they select weights or files",
            got=", ".join(reserved),
            expected="arguments to the model's constructor",
            where=f"model {name}",
        )
    extra = dict(optional or {})
    while True:
        used = {**args, **extra}
        generator = torch.get_rng_state()
        try:
            with hub_or_cache() if pretrained else contextlib.nullcontext():
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
                    f"model {name} does not accept the argument {found[1]}",
                    got=f"{found[1]}={used[found[1]]!r}",
                    fix=f"remove {found[1]}",
                ) from error
            del extra[found[1]]
        except AssertionError as error:
            raise UserError(
                f"timm cannot build {name} with these arguments: {error}",
                got=used,
                fix="choose a different image size or different model arguments",
            ) from error


def _random_head(name: str, model: Any, args: Mapping[str, Any], generator: torch.Tensor) -> bool:
    """Whether a pretrained model's classifier is random. `generator` is the RNG state before the model was built."""
    config, head = timm.get_pretrained_cfg(name), _head_tensors(model)
    if not head:
        return False
    if config is not None and config.num_classes != model.num_classes:
        return True  # timm drops the pretrained head
    if config is not None and not config.custom_load:
        return False  # timm loaded all tensors strictly
    after = torch.get_rng_state()
    torch.set_rng_state(generator)
    fresh = _head_tensors(timm.create_model(name, pretrained=False, **args))
    torch.set_rng_state(after)
    return any(torch.equal(value, initial) for value, initial in zip(head, fresh, strict=True))


def _head_tensors(model: Any) -> list[torch.Tensor]:
    """Weights of all classifiers (distilled models have two). Biases are excluded, because they can be zero in trained
    heads."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    heads = found if isinstance(found, tuple | list) else (found,)
    return [value for head in heads if isinstance(head, nn.Module) for value in head.parameters() if value.ndim > 1]


def no_weights(shown: str, name: str, error: Exception, other: str) -> UserError:
    """The error for a model whose pretrained weights cannot be downloaded; `other` continues the list of fixes."""
    why = str(error) if isinstance(error, ConnectionError) else f"{type(error).__name__}: {error}"
    return UserError(
        f"no weights for {shown}: {why}",
        expected="a weights file, or a network connection to download timm's weights",
        fix=f"run `scalekd fetch --teacher {name}` on a machine with network access, {other}",
    )


def fetch_weights(name: str, folder: Path) -> Path:
    """Download timm's pretrained weights for a model and write them atomically to `folder`/<name>.safetensors.

    Raises:
        UserError: the name is unknown, or the weights cannot be downloaded.
    """
    current = check_name(name, "teacher")
    try:
        model, _ = create_timm_model(current, {}, pretrained=True)
    except ConnectionError as error:
        raise UserError(
            f"cannot download the pretrained weights for {name}: {error}. Run `scalekd fetch --teacher {name}` "
            f"on a machine with network access, then copy {folder}/ here"
        ) from error
    except UserError:
        raise
    except Exception as error:  # hub clients raise many kinds of errors; all mean that the weights are not available
        raise UserError(
            "cannot download the pretrained weights",
            got=f"{type(error).__name__}: {error}",
            where=name,
            fix=f"check the network connection and the free disk space, then rerun; or run this command on another "
            f"machine and copy {folder}/ here",
        ) from error
    file = weights_file(folder, name)
    save_weights(model, file)
    return file
