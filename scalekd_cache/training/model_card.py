"""The model card (README.md) for an exported student.

In: a run's options, cache facts and summary. Out: the card's text.
Invariant: values are escaped, so names read from files appear as plain text, never as markup, links or HTML. The card
contains no local paths.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from scalekd_cache import __version__
from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.convert.backbone import Backbone
from scalekd_cache.convert.markup import escaped, last_part, table_cell
from scalekd_cache.convert.timm_export import InputStatistics, eval_transform
from scalekd_cache.errors import counted
from scalekd_cache.models.evaluate import percent
from scalekd_cache.training.run_files import classes_of, text_option
from scalekd_cache.views.view import eval_resize

TEMPLATE = """---
{header}---
# {title}

{sentence}

| | |
|---|---|
{table}

{where}

```python
import timm
from timm.data import create_transform, resolve_data_config
model = timm.create_model({place}, pretrained=True).eval()  # features_only=True for a backbone
transform = create_transform(**resolve_data_config({{}}, model=model))
```

## Evaluation transform

The accuracy is measured with `transform`. A different resize, crop or normalization gives a different accuracy.

| step | value |
|---|---|
| colors | RGB |
| resize | shorter side to {resize} pixels, {interpolation} |
| crop | central {size} x {size} pixels (crop fraction {crop}) |
| scale | 0 to 1 |
| mean | {mean} |
| std | {std} |

Class names are in config.json. Made by scalekd-cache {version}{credit}.
"""


def model_card(
    student: StudentConfig,
    options: Mapping[str, Any],
    facts: Mapping[str, Any],
    summary: Mapping[str, Any] | None,
    folder: Path,
) -> str:
    """Text for README.md.

    Args:
        student: the student's options.
        options: all options of the run.
        facts: the run's cache facts.
        summary: the run's summary (None: not finished).
        folder: the exported student's folder.
    """
    task = "image-classification" if classes_of(facts) else "image-feature-extraction"
    return _filled(
        student,
        folder,
        facts["image_size"],
        tags=[task, "timm", "knowledge-distillation", "scalekd"],
        title=f"{escaped(student.name)}, distilled with ScaleKD",
        sentence=_sentence(student.name, summary),
        rows=card_facts(options, facts, summary),
        credit="; the method is ScaleKD (https://arxiv.org/abs/2411.06786)",
    )


def finetuned_card(backbone: Backbone, facts: Mapping[str, Any], folder: Path) -> str:
    """Text for a fine-tuned backbone's README.md.

    Args:
        backbone: the backbone, for its name and normalization.
        facts: the result of `finetune`.
        folder: the export folder.
    """
    start = last_part(str(facts["start"]))
    how = f"{facts['train_images']:,} labeled images of {escaped(last_part(str(facts['data'])))}"
    accuracy = percent(facts["top1"]) if facts["val_images"] else "not measured"
    names = {"train_images": "training images", "labels_per_class": "labels per class", "epochs": "epochs",
             "seed": "seed", "classes": "classes", "val_images": "validation images"}  # fmt: skip
    rows = {"started from": start, "dataset": last_part(str(facts["data"]))}
    rows |= {label: "all" if facts[name] is None else str(facts[name]) for name, label in names.items()}
    rows["top-1"] = percent(facts["top1"])
    rows |= {"top-5": percent(facts["top5"])} if facts["top5"] is not None else {}
    return _filled(
        backbone,
        folder,
        facts["image_size"],
        tags=["image-classification", "timm"],
        title=f"{escaped(backbone.name)}, fine-tuned",
        sentence=f"{escaped(backbone.name)}, fine-tuned on {how}; top-1 {accuracy}.",
        rows=rows,
        credit="",
    )


def _filled(
    statistics: InputStatistics,
    folder: Path,
    image_size: int,
    *,
    tags: list[str],
    title: str,
    sentence: str,
    rows: Mapping[str, str],
    credit: str,
) -> str:
    """Fill in the template. The first tag is the task."""
    header = {"library_name": "timm", "pipeline_tag": tags[0], "tags": tags}
    transform = eval_transform(statistics, image_size)
    return TEMPLATE.format(
        header=yaml.safe_dump(header, sort_keys=False),
        title=title,
        sentence=sentence,
        table="\n".join(f"| {name} | {table_cell(value)} |" for name, value in rows.items()),
        where=f"Run this in the folder that contains {table_cell(os.path.basename(os.path.realpath(folder)))}:",
        place=ascii(f"local-dir:{os.path.basename(os.path.realpath(folder))}").replace("`", "\\x60"),
        size=image_size,
        resize=eval_resize(image_size, transform["crop_pct"]),
        interpolation=transform["interpolation"],
        crop=transform["crop_pct"],
        mean=_numbers(transform["mean"]),
        std=_numbers(transform["std"]),
        version=__version__,
        credit=credit,
    )


def card_facts(
    options: Mapping[str, Any], facts: Mapping[str, Any], summary: Mapping[str, Any] | None
) -> dict[str, str]:
    """A student's provenance, as text."""
    rows = {
        "student": text_option(options, "student.name"),
        "teacher": summary["teacher"] if summary else facts.get("teacher", "see the cache"),
        **({"teacher's top-1": percent(summary["teacher_top1"])} if summary else {}),
        "top-1": percent(summary["top1"]) if summary else "the run is not finished",
        **({"top-5": percent(summary["top5"])} if summary and summary["top5"] is not None else {}),
        **({"validation images": summary.get("val_images", 0)} if summary else {}),
        "targets": text_option(options, "train.targets"),
        "recipe": last_part(text_option(options, "recipe")),
        "epochs": text_option(options, "train.epochs"),
        "seed": text_option(options, "train.seed"),
        "cache fingerprint": facts["fingerprint"],
        "views per image": facts["views"],
        "dataset": last_part(str(facts["data"].get("source"))),
        "classes": classes_of(facts),
    }
    return {name: str(value) for name, value in rows.items()}


def _sentence(student: str, summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return f"A checkpoint of an unfinished run: {escaped(student)}."
    teacher = escaped(str(summary["teacher"]))
    how = "trained on labels only" if summary["targets"] == "none" else f"distilled from {teacher}"
    images = summary.get("val_images", 0)
    held_out = summary.get("held_out")
    if held_out:
        return f"{escaped(student)}, {how} without labels; {_figures(held_out)}."
    accuracy = f"{percent(summary['top1'])} on {counted(images, 'validation image')}" if images else "not measured"
    return f"{escaped(student)}, {how}; top-1 {accuracy}."


def _figures(held_out: Mapping[str, float]) -> str:
    """Metrics on held-out images, as text."""
    units = {name: "%" if "knn" in name or "probe" in name else "" for name in held_out}
    return ", ".join(f"{name.replace('_', ' ')} {value:g}{units[name]}" for name, value in held_out.items())


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)
