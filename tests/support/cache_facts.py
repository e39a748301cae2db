"""Consistent manifest facts of a cache without a teacher."""

from typing import Any

from scalekd_cache.config.base import fingerprint, to_plain
from scalekd_cache.config.stage1 import DataConfig, TeacherConfig, ViewConfig
from scalekd_cache.store.manifest import ManifestFacts, classes_digest

CLASSES = [f"class {number}" for number in range(7)]
FIELDS: dict[str, Any] = {
    "precision": "float32",
    "views": to_plain(ViewConfig(size=32)),
    "data": {"listing": "0" * 64, "samples": 40, "class_names": classes_digest(CLASSES)},
    "teacher": {"name": "demo", "feature_shape": [4, 2, 2], "num_classes": 7, "weights_sha256": "1" * 64},
    "codec": {"id": "int8", "version": 1, "shape": [4, 2, 2]},
    "logit_codec": {"id": "logits-int8", "version": 1, "num_classes": 7, "kl_limit": 0.0001},
}
FINGERPRINT = fingerprint(FIELDS)


def cache_facts(**changes: Any) -> ManifestFacts:
    """Consistent facts except for `changes`, which may include backend and groups."""
    values = {
        "fingerprint": FINGERPRINT,
        "fingerprint_fields": FIELDS,
        "recipe": "demo",
        "distill": {"train": {"epochs": 2}},
        "samples_per_shard": 21,
        "class_names": CLASSES,
        "tail_sha256": "",
        "view_recipe": FIELDS["views"],
        "teacher": {"spec": FIELDS["teacher"], "config": to_plain(TeacherConfig()), "top1": None},
        "codec": FIELDS["codec"],
        "logit_codec": FIELDS["logit_codec"],
        "second_codec": {},
        "data": {**to_plain(DataConfig()), **FIELDS["data"]},
        "pixels_from": {},
        "versions": {"torch": "2"},
    }
    return ManifestFacts(**{**values, **changes})
