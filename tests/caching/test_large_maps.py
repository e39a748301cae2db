"""Maps of 64 x 64 positions at 1,024 px (SAM's encoder, shallow): forecast, stage 1, verification, training step."""

import pytest
import torch
from small_cache import CPU, make, options
from timm.models import register_model
from timm.models.vision_transformer_sam import VisionTransformerSAM

from scalekd_cache.audit.verify_cache import verify_deep
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig
from scalekd_cache.errors import UserError
from scalekd_cache.planning import forecast as planning
from scalekd_cache.training.custom_loop import CachedTargets, ScaleKDLoss, timm_student

TEACHER = {"name": "shallow_sam", "weights": None, "pretrained": False, "num_classes": 0}


@register_model
def shallow_sam(pretrained=False, num_classes=0, **_) -> VisionTransformerSAM:
    """Two blocks with windows and one with global attention, and the neck with SAM's 256 channels."""
    model = VisionTransformerSAM(
        num_classes=num_classes, embed_dim=48, depth=4, num_heads=1, use_rel_pos=True, global_attn_indexes=(2,)
    )
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return model


def test_the_transform_codec_refuses_them(tmp_path):
    changes = {"data": {"max_samples": 2}, "views": {"size": 1024}, "teacher": TEACHER}
    with pytest.raises(UserError, match="codec transform supports feature maps with at most 1,024 positions") as error:
        make(tmp_path / "cache", None, **changes, cache={"num_views": 1, "views_per_group": 1, "codec": "transform"})
    assert "--codec int8" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["webdataset", "zarr"])
def test_a_map_of_64_by_64_positions(tmp_path, backend):
    changes = {
        "data": {"max_samples": 4},
        "views": {"size": 1024},
        "teacher": TEACHER,
        "cache": {"num_views": 1, "views_per_group": 1, "backend": backend},
    }
    root = tmp_path / "cache"
    training = DistillConfig(scalekd=ScaleKDConfig())
    plan = planning.forecast(options(root, None, **changes), training, CPU, students=1, epochs=1, gpu="h100")
    cache = make(root, None, **changes)
    assert cache.manifest.facts.teacher["spec"]["feature_shape"] == [256, 64, 64]
    stored = sum(path.stat().st_size for path in (root / "units").rglob("*") if path.is_file()) / len(cache)
    assert abs(plan.bytes_per_view["total"] / stored - 1) < 0.03
    assert verify_deep(root).findings.problems == []
    for heads in ("cap", "lite", "linear"):
        targets = CachedTargets(cache, batch_size=2)
        student = timm_student("resnet10t", targets)
        loss = ScaleKDLoss(targets, student, ScaleKDConfig(projector=heads))
        images, labels, target = next(iter(targets))
        assert target.features.shape == (2, 256, 64, 64)
        total = loss(*student(images), labels, target).total
        total.backward()
        assert torch.isfinite(total)
