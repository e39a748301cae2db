"""What can be done with a student whose weights are at hand: judge it, export it. No training engine is needed.

In: a run folder, or a consolidated state dict. Out: a `Tally`; a folder that plain timm loads.
Invariant: nothing here needs the cache the student was trained from, or imports deepspeed.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor, nn

from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.convert.formats import SUFFIXES, check_format, export_file
from scalekd_cache.convert.timm_export import DESCRIPTION, WEIGHTS, export_student, load_export
from scalekd_cache.data.source import open_source
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.models.evaluate import Tally, evaluate, percent
from scalekd_cache.models.normalize import Normalize
from scalekd_cache.models.student import Student, build_student
from scalekd_cache.models.timm_models import check_name, create_timm_model
from scalekd_cache.models.weights import check_tensors, load_weights, stored_shapes
from scalekd_cache.store.checked_files import checked, read_json
from scalekd_cache.store.manifest import Manifest, ManifestFacts
from scalekd_cache.training.checkpoint import STUDENT, latest_checkpoint
from scalekd_cache.training.run_files import (
    data_of,
    read_config,
    read_facts,
    read_summary,
    student_options,
    text_option,
)
from scalekd_cache.training.run_folder import is_going
from scalekd_cache.versions import __version__

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

Images are {size} x {size} pixels, RGB on a scale of 0 to 1, normalized with mean {mean} and standard deviation {std}.
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
        "teacher's top-1": percent(summary["teacher_top1"]) if summary else "not known yet",
        "top-1": percent(summary["top1"]) if summary else "the run is not finished",
        "top-5": percent(summary["top5"]) if summary else "the run is not finished",
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
    return f"{_text(student)}, {how}; top-1 {percent(summary['top1'])} on {images}."


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


State = dict[str, Tensor]


def facts_of(manifest: Manifest | ManifestFacts, views: int) -> dict[str, Any]:
    """What a run keeps of its cache for later sessions and for the time after training; `views` are those it reads."""
    return {
        "fingerprint": manifest.fingerprint,
        "views": views,
        "image_size": manifest.view_recipe["size"],
        "class_names": manifest.class_names,
        "data": manifest.data,
    }


def consolidated_student(config: StudentConfig, state: State, num_classes: int, image_size: int) -> Student:
    """A plain student with these weights, in eval mode."""
    student = build_student(config, num_classes=num_classes, image_size=image_size)
    found, wanted = (
        {name: tuple(value.shape) for name, value in tensors.items()} for tensors in (state, student.model.state_dict())
    )
    check_tensors(found, wanted, f"{config.name} with {num_classes} classes")
    student.model.load_state_dict(state)
    return student.eval()


def classifier(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """A function from uint8 pixels (B, 3, S, S) to the model's logits (B, K)."""
    device = next(model.parameters()).device
    normalize = Normalize(mean, std).to(device)
    return lambda images: model(normalize(images))


def export_state(
    config: StudentConfig, state: State, facts: dict[str, Any], folder: Path, card: str | None = None
) -> float:
    """Export a student with its model card; returns the largest difference of a reloaded logit."""
    size, names = facts["image_size"], facts["class_names"]
    student = consolidated_student(config, state, len(names), size)
    return export_student(student, config, folder, image_size=size, class_names=names, card=card)


class Exported(NamedTuple):
    """What an export left behind."""

    path: Path
    """The folder of timm's form, the file of any other."""
    difference: float | None
    """Largest difference of a logit after loading; None where what loads it is not installed."""


def export_run(run: Path, out: Path | None, form: str = "timm") -> Exported:
    """Export the student of a run's last checkpoint, whether the run is finished or not.

    Args:
        run: its folder.
        out: folder (timm) or file to write (None: <run>/export, or <run>/<name of the student> with the form's ending).
        form: one of `export_formats.FORMATS`.

    Raises:
        UserError: no run, no checkpoint yet, or a form that does not fit.
    """
    check_format(form)
    options, facts = read_config(run), read_facts(run)
    checkpoint, problems = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        where, fix = run / "checkpoints", "wait for the first one; make report RUN= shows how far the run is"
        raise UserError("the run has no checkpoint yet", got="; ".join(problems) or None, where=where, fix=fix)
    state, config = checkpoint.tensors(STUDENT), student_options(run)
    if form == "timm":
        folder = out or run / "export"
        card = model_card(config, options, facts, read_summary(run), folder)
        return Exported(folder, export_state(config, state, facts, folder, card))
    student = consolidated_student(config, state, len(facts["class_names"]), facts["image_size"])
    file = out or run / f"{config.name.replace('/', '_')}{SUFFIXES[form]}"
    if file.is_dir():
        raise UserError("the place of the export is a folder", where=file, expected="a file name", fix="correct OUT=")
    about = card_facts(options, facts, read_summary(run))
    return Exported(file, export_file(student, form, file, image_size=facts["image_size"], facts=about))


def evaluate_export(run: Path, data: str | None, process: Process, workers: int) -> Tally:
    """The accuracy of a finished run's exported model.

    Raises:
        UserError: no exported student, a damaged one, or no validation images.
    """
    student, facts, source = student_options(run), read_facts(run), data_of(run, data)
    folder = run / "export"
    if not os.path.lexists(folder):
        state = "is still going" if is_going(run) else "is not finished"
        raise UserError(f"the run {run} {state}: `make export RUN={run}` takes its last checkpoint, or finish it")
    return evaluate(
        classifier(load_export(folder, facts["image_size"]).to(process.device), student.mean, student.std),
        open_source(source, "val"),
        facts["image_size"],
        process.device,
        workers=workers,
    )


@dataclass(frozen=True)
class _ImageConfig:
    """The part of timm's `pretrained_cfg` that says what images the model wants."""

    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class _Description:
    """The fields of an export's config.json that are read."""

    architecture: str
    num_classes: int
    pretrained_cfg: _ImageConfig
    model_args: dict[str, Any] = field(default_factory=dict)
    label_names: list[str] = field(default_factory=list)


def _read_description(file: Path) -> _Description:
    """timm writes more fields than are read here."""
    what = "the description of an exported student"
    fields, _ = read_json(file, what)
    images = fields.get("pretrained_cfg")
    if isinstance(images, dict):
        fields["pretrained_cfg"] = {key: images[key] for key in _ImageConfig.__annotations__ if key in images}
    known = {key: fields[key] for key in _Description.__annotations__ if key in fields}
    return checked(json.dumps(known), _Description, what, file)


def exported_folder(place: Path) -> Path | None:
    """An exported or imported student that is no run: the folder itself, or its student/; None for anything else."""
    if (place / "config.yaml").exists():
        return None
    found = (folder for folder in (place, place / "student") if (folder / DESCRIPTION).exists())
    return next(found, None)


def evaluate_folder(folder: Path, data: str | None, process: Process, workers: int) -> Tally:
    """The accuracy of an exported or imported student, without a run: size, means and model come from its config.json.

    Raises:
        UserError: no data set is named, a file is damaged, or the classes of data set and student differ.
    """
    if data is None:
        raise UserError("an exported student does not say where its images are", where=folder, fix="give DATA=folder")
    shown = _read_description(folder / DESCRIPTION)
    name = check_name(shown.architecture, str(folder / DESCRIPTION))
    shapes = stored_shapes(str(folder / WEIGHTS))
    model, _ = create_timm_model(name, {"num_classes": shown.num_classes, **shown.model_args})
    load_weights(model, str(folder / WEIGHTS), shapes)
    source = open_source(DataConfig(source=data), "val")
    named = bool(shown.label_names) and shown.label_names != list(source.class_names)
    if named or len(source.class_names) != shown.num_classes:
        raise UserError(
            "the classes of the data set are not those of the student",
            got=f"{len(source.class_names)}: {', '.join(source.class_names[:5])} ...",
            expected=f"{shown.num_classes}: {', '.join(shown.label_names[:5]) or 'without names'} ...",
            where=data,
            fix="give the data set it was trained for; classes.txt in the folder of the data set orders its classes",
        )
    config = shown.pretrained_cfg
    predict = classifier(model.eval().to(process.device), config.mean, config.std)
    return evaluate(predict, source, config.input_size[-1], process.device, workers=workers)
