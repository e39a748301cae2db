"""Imports checkpoints from upstream's distiller under the names used by timm and `ScaleKDHeads`.

In: a .pth file written by mmengine. Out: a student folder for plain timm, and the projectors as heads.safetensors.
Invariant: every tensor in the models comes from the file and has the right shape. Every tensor in the file is either
used or known to be unused by upstream.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from scalekd_cache.config.stage2 import ScaleKDConfig, StudentConfig
from scalekd_cache.convert.names_upstream import FAMILIES, Family, Mapped, family_of, head_tensors, student_tensors
from scalekd_cache.convert.timm_export import export_student
from scalekd_cache.convert.upstream_file import HEADS, LEFT_OUT, read_checkpoint, shown_names, split_parts
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import SHORT_NAMES, build_student
from scalekd_cache.models.timm_models import check_name, default_image_size
from scalekd_cache.scalekd.heads import ScaleKDHeads

PAPER_STUDENTS = tuple(dict.fromkeys(["resnet50", "resnet50d", *SHORT_NAMES]))
OUTPUTS = {"student", "heads.safetensors"}


@dataclass(kw_only=True)
class Problems:
    """Problems that prevent an import, collected from all parts of a checkpoint."""

    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def check(self, where: Path, title: str) -> None:
        """Raise `UserError` with all problems, if there are any."""
        groups = (("missing", self.missing), ("unexpected", self.surplus), ("mismatched", self.wrong))
        lines = [f"{len(names)} {what}: {shown_names(names)}" for what, names in groups if names]
        if lines:
            raise UserError(
                "this checkpoint does not match the student and the projectors",
                got="; ".join(lines),
                expected=f"upstream's {title} and projector weights (docs/METHOD.md); missing tensors are listed under "
                "this package's names",
                where=where,
                fix="set --student and --classes to the values used in training",
            )


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What was imported from a checkpoint, and what was not."""

    family: str
    student_name: str
    student: Path
    student_tensors: int
    num_classes: int
    logit_difference: float
    """Largest difference between the student's and the exported model's logits."""
    heads: Path | None
    head_tensors: int
    s4_query: str | None
    left_out: list[str]


def fit_tensors(mapped: Mapped, wanted: Mapping[str, Tensor], problems: Problems) -> dict[str, Tensor]:
    """The tensors named in `wanted`. 1x1 convolutions and linear layers are converted into each other as needed."""
    problems.surplus += mapped.unknown + [mapped.sources[name] for name in mapped.tensors if name not in wanted]
    problems.missing += [name for name in wanted if name not in mapped.tensors]
    fitted = {}
    for name, value in mapped.tensors.items():
        if name not in wanted:
            continue
        shape = wanted[name].shape
        if _without_ones(value.shape) == _without_ones(shape):
            value = value.reshape(shape)
        if value.shape != shape:
            problems.wrong.append(
                f"{mapped.sources[name]} has shape {tuple(value.shape)}, but {name} needs {tuple(shape)}"
            )
        elif not value.is_meta and value.is_floating_point() and not value.isfinite().all():
            problems.wrong.append(f"{mapped.sources[name]} contains NaN or Inf")
        fitted[name] = value
    return fitted


def _without_ones(shape: torch.Size) -> tuple[int, ...]:
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def expected_heads(state: Mapping[str, Tensor], s4_query: str, problems: Problems) -> ScaleKDHeads | None:
    """Projectors on the meta device with a state dict's shapes; None if the tensors that define them are missing."""
    first = {f"s{tap}": f"loss_fmd_s{tap}.projector_0." for tap in (3, 4)}
    shape_sources = [first["s3"] + "query.weight", first["s4"] + "pos_attention.proj.weight"]
    shape_sources += [prefix + "pos_embed" for prefix in first.values()]
    if s4_query == "learned":
        shape_sources.append(first["s4"] + "query.weight")
    absent = [HEADS + name for name in shape_sources if name not in state or state[name].ndim < 2]
    if absent:
        problems.missing += absent
        return None
    positions, width = state[shape_sources[0]].shape
    s4_positions = (
        len(state[shape_sources[4]]) if s4_query == "learned" else 2
    )  # a query that is passed in has no parameter
    shapes = [(x.shape[1], *x.shape[2:]) for x in (state[shape_sources[2]], state[shape_sources[3]])]
    config = ScaleKDConfig(s4_query="learned" if s4_query == "learned" else "s3", heads_s3=1, heads_s4=1)
    layer_norm = first["s3"] + "proj_student.1.running_mean" not in state
    with torch.device("meta"):
        tail_out = (len(state[shape_sources[1]]), s4_positions, 1)
        return ScaleKDHeads(config, (shapes[0], shapes[1]), (width, positions, 1), tail_out, layer_norm)  # type: ignore[arg-type]


def import_heads(
    state: Mapping[str, Tensor], s4_query: str, problems: Problems, left_out: list[str]
) -> dict[str, Tensor]:
    """All four projectors under the names used by `ScaleKDHeads`. `state` is upstream's `distill_losses`, without the
    prefix."""
    mapped = head_tensors(state, s4_query=s4_query)
    mapped = mapped._replace(
        sources={ours: HEADS + theirs for ours, theirs in mapped.sources.items()},
        unknown=[HEADS + name for name in mapped.unknown],
    )
    left_out += [HEADS + name for name in mapped.dead]
    heads = expected_heads(state, s4_query, problems)
    if heads is None:
        problems.surplus += mapped.unknown
        return {}
    return fit_tensors(mapped, heads.state_dict(), problems)


def import_student(
    family: Family,
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    problems: Problems,
    left_out: list[str],
    prefix: str,
) -> dict[str, Tensor]:
    """Build a timm state dict from `backbone.*` and `head.*`. `wanted` is the target model's state dict."""
    mapped = student_tensors(family, state)
    mapped = mapped._replace(
        sources={ours: prefix + theirs for ours, theirs in mapped.sources.items()},
        unknown=[prefix + name for name in mapped.unknown],
    )
    left_out += [prefix + name for name in mapped.dead]
    return fit_tensors(mapped, wanted, problems)


def import_checkpoint(
    path: Path,
    out: Path,
    student_name: str | None = None,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    s4_query: str = "s3",
) -> ImportReport:
    """Write `out`/student, a folder for timm, and `out`/heads.safetensors if the checkpoint has projectors.

    Args:
        path: The checkpoint file.
        out: A new or empty folder, or the folder of an earlier import.
        student_name: The student's timm name or short name (None: the matching student from the paper).
        num_classes: Width of the classifier (None: the checkpoint's).
        image_size: Image size in pixels (None: timm's default for this name).
        s4_query: "s3" if S4's query came from S3, as in upstream's distiller with S3 projectors; the stored query is
            then unused and not imported. "learned" imports it.

    Raises:
        UserError: tensors are missing, extra or misshapen. Nothing is written.
    """
    if out.exists() and not (out.is_dir() and {entry.name for entry in out.iterdir()} <= OUTPUTS):
        raise UserError(
            "the import folder already contains other files" if out.is_dir() else "the import folder is a file",
            where=out,
            expected="a new or empty folder, or the folder of an earlier import",
            fix="choose a different --out",
        )
    if student_name is not None and student_name not in SHORT_NAMES:
        student_name = check_name(student_name, "student")
    student_state, prefix, head_state, left_out, unknown = split_parts(read_checkpoint(path), path)
    family = _family(student_state, prefix, path)
    classes = num_classes or _classes(student_state, prefix, path)
    student_name = student_name or guess_student(family, student_state, classes, path)
    config = StudentConfig(name=student_name)
    size = image_size or default_image_size(SHORT_NAMES.get(student_name, (student_name, {}))[0])
    student = build_student(config, num_classes=classes, image_size=size, args=family.args)
    problems = Problems(surplus=unknown)
    tensors = import_student(family, student_state, student.model.state_dict(), problems, left_out, prefix)
    heads = import_heads(head_state, s4_query, problems, left_out) if head_state else {}
    problems.check(path, family.title)
    student.model.load_state_dict(tensors, strict=True)

    out.mkdir(parents=True, exist_ok=True)
    difference = export_student(student, config, out / "student", image_size=size, class_names=[])
    heads_file = _write_heads(out, heads, s4_query)
    return ImportReport(
        family=family.title,
        student_name=student_name,
        student=out / "student",
        student_tensors=len(tensors),
        num_classes=classes,
        logit_difference=difference,
        heads=heads_file,
        head_tensors=len(heads),
        s4_query=s4_query if heads else None,
        left_out=left_out,
    )


def _family(state: Mapping[str, Tensor], prefix: str, path: Path) -> Family:
    """The student's family. If it is unknown, raises `UserError` with a typical tensor from each known family."""
    family = family_of(state)
    if family is None:
        raise UserError(
            "this checkpoint's student architecture is not supported",
            got=shown_names([prefix + name for name in state]),
            expected=", ".join(f"{known.title} ({prefix}{known.mark})" for known in FAMILIES),
            where=path,
        )
    return family


def _write_heads(out: Path, heads: Mapping[str, Tensor], s4_query: str) -> Path | None:
    """Write heads.safetensors and return its path. Returns None if the checkpoint has no projectors."""
    file = out / "heads.safetensors"
    file.unlink(missing_ok=True)
    if not heads:
        return None
    save_file(
        {name: value.contiguous().clone() for name, value in heads.items()}, str(file), metadata={"s4_query": s4_query}
    )
    return file


def guess_student(family: Family, state: Mapping[str, Tensor], num_classes: int, path: Path) -> str:
    """Find the student from the paper with these tensor names and shapes."""
    for short in PAPER_STUDENTS:
        name, args = SHORT_NAMES.get(short, (short, {}))
        if not args.items() >= family.args.items():
            continue
        with torch.device("meta"):
            model = timm.create_model(name, **args, num_classes=num_classes)
        problems = Problems()
        import_student(family, state, model.state_dict(), problems, [], "")
        if problems == Problems():
            return short
    raise UserError(
        f"this {family.title} is not one of the paper's students",
        expected=", ".join(PAPER_STUDENTS),
        where=path,
        fix="set --student to the model's name; the import then lists any tensors that do not match",
    )


def _classes(state: Mapping[str, Tensor], prefix: str, path: Path) -> int:
    for name in ("head.fc.weight", "head.layers.head.weight"):
        if name in state and state[name].ndim == 2:
            return len(state[name])
    raise UserError(
        "the checkpoint has no classifier",
        expected=f"a tensor {prefix}head.fc.weight or {prefix}head.layers.head.weight",
        where=path,
    )


def summary(names: list[str]) -> list[str]:
    """Group names by their first part and count them ("teacher.* (329)"). A single name is kept in full."""
    groups = Counter(name.partition(".")[0] + "." if name.startswith(LEFT_OUT) else name for name in names)
    return [f"{group}* ({count})" if group.endswith(".") else group for group, count in groups.items()]
