"""Registers the demo teacher at half and at twice its width with timm, for the study's question on teacher size.

In: an import. Out: timm models. Invariant: apart from the width, model and training are those of the demo teacher.
"""

from typing import Any

import timm
from timm.models import register_model
from torch import nn

from scalekd_cache.models.teacher import demo_teacher_args
from scalekd_cache.models.timm_models import DEMO_TIMM_NAME

WIDTHS: dict[str, dict[str, Any]] = {
    "study_swin_16": {"embed_dim": 16, "num_heads": [1, 1, 2]},
    "study_swin_64": {"embed_dim": 64, "num_heads": [2, 4, 8]},
}
"""Arguments that override `demo_teacher_args` (embed_dim 32): maps of 64 and 256 channels instead of 128."""


def _swin(name: str, options: dict[str, Any]) -> nn.Module:
    options.pop("pretrained", None)
    known = ("num_classes", "img_size", "drop_path_rate")
    kept = {key: value for key, value in options.items() if key in known}
    return timm.create_model(DEMO_TIMM_NAME, **{**demo_teacher_args(), **WIDTHS[name], **kept})


@register_model
def study_swin_16(img_size: int = 64, num_classes: int = 10, **options: Any) -> nn.Module:
    return _swin("study_swin_16", {"img_size": img_size, "num_classes": num_classes, **options})


@register_model
def study_swin_64(img_size: int = 64, num_classes: int = 10, **options: Any) -> nn.Module:
    return _swin("study_swin_64", {"img_size": img_size, "num_classes": num_classes, **options})
