"""The small files of a finished run, and the options of a run on the shared cache."""

from small_cache import shared_cache

from scalekd_cache.config.stage2 import DistillConfig, StudentConfig, TrainConfig

FACTS = {"fingerprint": "f" * 64, "views": 2, "image_size": 64, "class_names": ["a", "b"], "data": {"source": "demo"}}
SUMMARY = {
    "student": "resnet18",
    "teacher": "demo_swin",
    "targets": "cached",
    "top1": 91.25,
    "top5": 99.5,
    "teacher_top1": 97.0,
    "epochs": 3,
    "steps": 66,
    "seed": 0,
    "views": 4,
    "bytes_per_view": 6245.3,
    "cache_fingerprint": "f" * 64,
    "images_per_s": 120.4,
    "minutes": 2.34,
}


def config_of(run, **train):
    small = TrainConfig(**{"epochs": 3, "global_batch_size": 32, "micro_batch_size": 16, **train})
    return DistillConfig(
        cache=str(shared_cache().root), run=str(run), student=StudentConfig(name="test_resnet"), train=small
    )
