"""Distill DINOv2 into a ResNet-18 on images without labels, then fine-tune it with ten labels per class.

python examples/unlabeled_resnet.py pictures labeled dinov2.safetensors

`pictures` is any folder of images, `labeled` has train/<class>/ and val/<class>/, and the file holds the weights of
timm's vit_small_patch14_dinov2 (`scalekd fetch --teacher vit_small_patch14_dinov2`). The script prints the k-NN and
linear-probe accuracy of the student's embeddings. It also prints the accuracy after fine-tuning from the student and
from random weights, with the same labels.
"""

import sys
from pathlib import Path
from typing import Any

import scalekd_cache

TEACHER = "vit_small_patch14_dinov2"


def main(
    pictures: str,
    labeled: str,
    weights: str | None,
    *,
    student: str = "resnet18",
    size: int = 224,
    epochs: int = 100,
    folder: str = ".",
    teacher_options: dict[str, Any] | None = None,
    training_options: dict[str, Any] | None = None,
) -> tuple[float, float]:
    """Returns the accuracies after fine-tuning from the student and from random weights, in percent."""
    place = Path(folder)
    cache, run = place / "caches" / "pictures", place / "runs" / student
    scalekd_cache.cache_teacher(
        data=pictures, teacher=TEACHER, teacher_weights=weights, size=size, cache=cache, options=teacher_options
    )
    scalekd_cache.distill(
        cache=cache, student=student, run=run, heads="linear", epochs=epochs, options=training_options
    )
    figures = scalekd_cache.probe(backbone=run, data=labeled)["results"]
    for name, row in figures.items():
        print(f"{name}: k-NN {row['knn']:.1f}%, linear probe {row['linear_probe']:.1f}%")
    accuracies = []
    random = {"model": student, "size": size, "options": {"pretrained": False}}
    for name, start in {"student": {"init": run}, "random": random}.items():
        out = place / "finetuned" / name
        tuned = scalekd_cache.finetune(data=labeled, labels_per_class=10, out=out, **start)
        print(f"ten labels per class, from {name}: top-1 {tuned['top1']:.1f}%")
        accuracies.append(tuned["top1"])
    return accuracies[0], accuracies[1]


if __name__ == "__main__":
    main(*sys.argv[1:4])
