"""Register any `nn.Module` with a separate last stage as teacher (--plugin examples.my_teacher --teacher my_net)."""

from itertools import pairwise
from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from scalekd_cache import TailParts, register_family


class MyNet(nn.Module):
    """Placeholder for your network: four stages, a norm, a classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64)
        steps = [nn.Sequential(nn.Conv2d(a, b, 2, 2), nn.GELU()) for a, b in pairwise(widths)]
        self.stem, self.stage4 = nn.Sequential(*steps[:3]), steps[3]
        self.norm, self.head = nn.GroupNorm(1, widths[-1]), nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalized images -> (B, K) logits."""
        return self.head(self.norm(self.stage4(self.stem(x))).mean((2, 3)))


# The adapter.
@register_model
def my_net(pretrained: bool = False, num_classes: int = 1000, **_: Any) -> MyNet:
    """Build the model for timm; weights come from --teacher-weights."""
    if pretrained:
        raise ValueError("set --teacher-weights")
    model = MyNet(num_classes)
    model.num_classes, model.get_classifier = num_classes, lambda: model.head
    model.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return model


register_family("my_net", MyNet, lambda model: TailParts(body=[model.stage4], norm=model.norm, layout="nchw"))
