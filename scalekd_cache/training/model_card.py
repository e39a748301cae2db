"""The model card of an exported student: what it is, where it comes from, how it is loaded.

In: what a run says of itself. Out: README.md in the form that model hubs read. Invariant: every figure is the run's
own; what was not measured is reported so; names that come from files (a cache, a run) are shown as text, never as
markup.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from scalekd_cache import __version__
from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.training.run_files import text_option

MARKUP = re.compile(r"[\\`*{}\[\]()<>#+!|&~$:@]|^-|(?<!\w)_|_(?!\w)|(?<=[wW]{3})\.")
"""What Markdown, or the pages that show it, read as more than text."""
TEMPLATE = """---
{header}---
# {title}, distilled with ScaleKD

{sentence}

| | |
|---|---|
{table}

```python
import timm
model = timm.create_model({place}, pretrained=True)  # features_only=True for a backbone
```

Images are {size} x {size} pixels, RGB on a scale of 0 to 1, normalised with mean {mean} and standard deviation {std}.
Class names stand in config.json. Made by scalekd-cache {version}; the method is ScaleKD, https://arxiv.org/abs/2411.06786.
"""


def model_card(
    student: StudentConfig,
    options: Mapping[str, Any],
    facts: Mapping[str, Any],
    summary: Mapping[str, Any] | None,
    folder: Path,
) -> str:
    """The text of README.md.

    Args:
        student: the student's options.
        options: all options of the run.
        facts: what the run keeps of its cache.
        summary: the run's summary, None for one that is not finished.
        folder: where the exported student goes.
    """
    header = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "knowledge-distillation", "scalekd"],
    }
    return TEMPLATE.format(
        header=yaml.safe_dump(header, sort_keys=False),
        title=_text(student.name),
        sentence=_sentence(student.name, summary),
        table="\n".join(f"| {name} | {_cell(value)} |" for name, value in card_facts(options, facts, summary).items()),
        place=ascii(f"local-dir:{folder.resolve().name}").replace("`", "\\x60"),
        size=facts["image_size"],
        mean=_numbers(student.mean),
        std=_numbers(student.std),
        version=__version__,
    )


def card_facts(
    options: Mapping[str, Any], facts: Mapping[str, Any], summary: Mapping[str, Any] | None
) -> dict[str, str]:
    """Where a student comes from, as texts."""
    rows = {
        "student": text_option(options, "student.name"),
        "teacher": summary["teacher"] if summary else "see the cache",
        "teacher's top-1": _percent(summary["teacher_top1"]) if summary else "not known yet",
        "top-1": _percent(summary["top1"]) if summary else "the run is not finished",
        "top-5": _percent(summary["top5"]) if summary else "the run is not finished",
        "validation images": summary.get("val_images", 0) if summary else 0,
        "targets": text_option(options, "train.targets"),
        "recipe": text_option(options, "recipe"),
        "epochs": text_option(options, "train.epochs"),
        "seed": text_option(options, "train.seed"),
        "cache fingerprint": facts["fingerprint"],
        "views an image": facts["views"],
        "data set": facts["data"].get("source"),
        "classes": len(facts["class_names"]),
    }
    return {name: str(value) for name, value in rows.items()}


def _sentence(student: str, summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return f"A checkpoint of a run that is not finished: {_text(student)}."
    teacher = _text(str(summary["teacher"]))
    how = "trained on labels alone" if summary["targets"] == "none" else f"trained on targets of {teacher}"
    images = f"{summary.get('val_images', 0):,} validation images"
    return f"{_text(student)}, {how}; top-1 {_percent(summary['top1'])} on {images}."


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} %"


def _plain(value: str) -> str:
    """One line of printable characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in value).split())


def _text(value: str) -> str:
    """A text that Markdown shows as it is: no link, image, emphasis or HTML."""
    return MARKUP.sub(r"\\\g<0>", _plain(value))


def _cell(value: str) -> str:
    """A text that stays in its cell of a table, as code."""
    plain = _plain(value).replace("`", "'").replace("|", "/")
    return f"`{plain}`"


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)
