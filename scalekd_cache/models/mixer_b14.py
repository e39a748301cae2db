"""Registers Mixer-B/14 with timm: it is the only one of the paper's students that timm does not have.

In: `import scalekd_cache.models.mixer_b14` (`scalekd_cache.models.student` does this). Out: `mixer_b14_224` becomes a
timm model name for a model with random weights. Invariant: the model is timm's `MlpMixer` and has timm's tensor names.
Import this module before loading an exported Mixer-B/14 with `timm.create_model("local-dir:...")`.
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
"""The settings are those of timm's other Mixers, but there are no pretrained weights."""


@register_model  # type: ignore[untyped-decorator]
def mixer_b14_224(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """Mixer with 12 blocks and 768 channels; at 224 pixels, it has a grid of 16x16 patches of 14 pixels."""
    sizes = {"patch_size": 14, "num_blocks": 12, "embed_dim": 768, **kwargs}
    model: MlpMixer = build_model_with_cfg(
        MlpMixer, "mixer_b14_224", pretrained, feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **sizes
    )
    return model
