"""Registers Mixer-B/14, the only student in the paper that is missing from timm.

Importing this module (as `scalekd_cache.models.student` does) adds the timm model name `mixer_b14_224`, with random
weights. Invariant: the model is timm's `MlpMixer` with timm's tensor names. Import this module before loading an
exported Mixer-B/14 with `timm.create_model("local-dir:...")`.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import MlpMixer

default_cfgs = generate_default_cfgs(
    {
        "mixer_b14_224": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "stem.proj",
            "classifier": "head",
        }
    }
)
"""The same settings as timm's other Mixers, but without pretrained weights."""


@register_model  # type: ignore[untyped-decorator]
def mixer_b14_224(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """Mixer with 12 blocks, 768 channels and 14-pixel patches (a 16x16 grid at 224 pixels)."""
    sizes = {"patch_size": 14, "num_blocks": 12, "embed_dim": 768, **kwargs}
    model: MlpMixer = build_model_with_cfg(
        MlpMixer, "mixer_b14_224", pretrained, feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **sizes
    )
    return model
