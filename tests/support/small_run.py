"""Contents of the small files of a finished run."""

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
