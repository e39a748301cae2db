"""Use torchvision models as teachers (--plugin examples.torchvision_teachers --teacher torchvision_vit_b_16)."""

from collections.abc import Callable
from typing import Any

import torchvision.models as zoo
from timm.models import register_model
from torch import nn

from scalekd_cache import TailParts, register_family

NAMES = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14", "swin_t", "swin_s", "swin_b", "swin_v2_t",
         "swin_v2_s", "swin_v2_b", "convnext_tiny", "convnext_small", "convnext_base", "convnext_large", "resnet18",
         "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")  # fmt: skip


def adapt(name: str) -> Callable[..., nn.Module]:
    """Returns the function with which timm builds the torchvision model, with the attributes that a teacher needs."""

    def build(pretrained: bool = False, num_classes: int = 1000, img_size: int = 224, **_: Any) -> nn.Module:
        if pretrained:
            raise ValueError("set --teacher-weights: torchvision's state dict, saved with safetensors.torch.save_file")
        size = {"image_size": img_size} if name.startswith("vit") else {}
        model: Any = zoo.get_model(name, num_classes=num_classes or 1, **size)
        classifier = next(
            key for key in ("heads.head", "head", "classifier.2", "fc") if f"{key}.weight" in model.state_dict()
        )
        if num_classes == 0:
            model.set_submodule(classifier, nn.Identity())
        model.num_classes, model.get_classifier = num_classes, lambda: model.get_submodule(classifier)
        model.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "classifier": classifier}
        return model

    build.__name__, build.__module__ = f"torchvision_{name}", __name__
    return build


for known in NAMES:
    register_model(adapt(known))


def vit(model: Any) -> TailParts:
    """The last quarter of the blocks."""
    blocks = list(model.encoder.layers)
    return TailParts(blocks[-(len(blocks) // 4) :], model.encoder.ln, "tokens", prefix=1)


register_family("torchvision_vit", zoo.VisionTransformer, vit)
register_family(
    "torchvision_swin",
    zoo.SwinTransformer,
    lambda model: TailParts([model.features[-2], model.features[-1]], model.norm, "nhwc"),
)
register_family(
    "torchvision_convnext",
    zoo.ConvNeXt,
    lambda model: TailParts([model.features[-2], model.features[-1]], model.classifier[0], "nchw"),
)
register_family("torchvision_resnet", zoo.ResNet, lambda model: TailParts([model.layer4], nn.Identity(), "nchw"))
