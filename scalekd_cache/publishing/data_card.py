"""The data card of a published cache: README.md with the YAML header that the model hub expects.

In: the manifest, and facts about the publication. Out: the card's text.
Invariant: the card states only licenses that the publisher specified. Names from the cache are escaped, so they are
never interpreted as markup. The card contains no credentials and no local paths.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from huggingface_hub import DatasetCard, DatasetCardData

from scalekd_cache import __version__
from scalekd_cache.config.places import default_cache
from scalekd_cache.convert.markup import escaped, last_part, table_cell
from scalekd_cache.errors import counted, shell_command
from scalekd_cache.models.teacher_spec import teacher_label
from scalekd_cache.progress import size_text
from scalekd_cache.publishing.publication import Publication
from scalekd_cache.store.manifest import Manifest, stored_share

HUB_LICENSES = set(
    """apache-2.0 mit cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 odbl odc-by pddl cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 bsd-2-clause bsd-3-clause
    gpl-3.0 lgpl-3.0 agpl-3.0 mpl-2.0 openrail unlicense""".split()  # noqa: SIM905 - a single list of many short words
)
"""License identifiers that the hub accepts in the header. For any other license, the header contains `other` and the
card gives the full name."""
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B",
         "10B<n<100B", "100B<n<1T", "n>1T")  # fmt: skip
"""The hub's size categories. From 1,000 on, each is ten times the previous one."""
CITATION = """@inproceedings{fan2024scalekd,
  title     = {ScaleKD: Strong Vision Transformers Could Be Excellent Teachers},
  author    = {Fan, Jiawei and Li, Chao and Liu, Xiaolong and Yao, Anbang},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2024},
  url       = {https://arxiv.org/abs/2411.06786}
}"""
"""The paper cited in CITATION.cff."""
TEMPLATE = """
# {title}

{summary}

{pixels}

| | |
|---|---|
{table}

## Licenses

| | license |
|---|---|
| images | {data_license} |
| teacher weights | {teacher_license} |

These licenses were declared by the cache's publisher. You must comply with both.

## Train from this cache

```
pip install "scalekd-cache[remote]"
{commands}
```

Any timm model can be used as the student.

## How the views were made

| | |
|---|---|
{views}

## Fidelity of the stored features

| metric | mean | 1st percentile |
|---|---|---|
{fidelity}

## Citation

Cite the authors of the images, the teacher and the method:

```bibtex
{citation}
```

Made with scalekd-cache {version}.
"""


class Card(NamedTuple):
    """Facts on the card that are not in the manifest."""

    manifest: Manifest
    publication: Publication
    """Licenses, how pixels are published, and where shared pixels are stored."""
    place: str
    """URL or folder of the publication."""
    total_bytes: int
    """Total size of the published files in bytes."""


def data_card(card: Card) -> str:
    """The text of README.md."""
    manifest, publication = card.manifest, card.publication
    facts, spec = manifest.facts, manifest.facts.teacher["spec"]
    teacher, source = escaped(teacher_label(facts.teacher)), escaped(last_part(str(facts.data["source"])))
    header = DatasetCardData(
        pretty_name=f"{teacher_label(facts.teacher)} on {last_part(str(facts.data['source']))}",
        **license_header(publication.licenses["data"], publication.licenses["teacher"]),
        task_categories=["image-classification" if facts.labeled else "image-feature-extraction"],
        size_categories=[size_category(manifest.num_samples * manifest.num_views)],
        tags=["knowledge-distillation", "scalekd", "scalekd-cache", "timm", facts.backend],
    )
    views = {name: _value(value) for name, value in facts.view_recipe.items()}
    body = TEMPLATE.format(
        title=f"Outputs of {teacher} on {source}",
        summary=f"Feature maps{' and logits' if spec['num_classes'] else ''} of the frozen teacher {teacher} for "
        f"{counted(manifest.num_views, 'augmented view')} of each of {counted(manifest.num_samples, 'image')}. Any "
        "number of students can be trained from this cache without re-running the teacher.",
        pixels=_about_pixels(publication),
        table=_table(_rows(card)),
        data_license=table_cell(publication.licenses["data"]),
        teacher_license=table_cell(publication.licenses["teacher"]),
        commands="\n".join(commands(publication, card.place if "://" in card.place else "FOLDER")),
        views=_table(views),
        fidelity=_fidelity(manifest.fidelity),
        citation=CITATION,
        version=__version__,
    )
    return str(DatasetCard(f"---\n{header.to_yaml()}\n---\n{body}"))


def commands(publication: Publication, place: str) -> list[str]:
    """Shell commands for using a publication."""
    cache, data = default_cache(place), {"data": "IMAGES"} if publication.pixels in ("replayed", "left out") else {}
    pixels = {"pixels_from": publication.pixels_from} if publication.pixels == "shared" else {}
    train = {"student": "resnet50", **pixels}
    pull = f"scalekd pull {shlex.quote(place)} --cache {cache}"
    if publication.pixels == "left out":
        return [f"{pull} --data IMAGES", shell_command("distill", cache=cache, **train)]
    return [
        f"{shell_command('distill', cache=place, **train, **data)}  # streams the cache",
        f"{pull}  # or copy all views to disk first",
        shell_command("distill", cache=cache, **train, **data),
    ]


def license_header(*names: str) -> dict[str, Any]:
    """License fields for the header: the hub's identifiers, or `other` with a name."""
    unique = list(dict.fromkeys(name.strip().lower() for name in names))
    if set(unique) <= HUB_LICENSES:
        return {"license": unique if len(unique) > 1 else unique[0]}
    slug = re.sub(r"[^a-z0-9.]+", "-", "-and-".join(unique)).strip("-")
    return {"license": "other", "license_name": slug[:100] or "other"}


def size_category(count: int) -> str:
    """The hub's size category for a number of examples."""
    return SIZES[min(max(len(str(count)) - 3, 0), len(SIZES) - 1)]


def _about_pixels(publication: Publication) -> str:
    """One or more sentences that state whether the views' pixels are included."""
    return {
        "stored": "The views' pixels are included, exactly as the teacher saw them.",
        "shared": "The views' pixels are not in this cache. They are stored in another cache, published at "
        f"{table_cell(publication.pixels_from)}.",
        "replayed": "The views' pixels are not included. Training regenerates each view from the images "
        "(`--data`) and compares it with the digest in its record.",
        "left out": "**The views' pixels are not included.** `scalekd pull` recreates them from your own copy "
        "of the images (`--data`), verifies each digest, and restores the original cache bit for bit. Readers "
        "cannot open this publication directly.",
    }[publication.pixels]


def _rows(card: Card) -> dict[str, str]:
    manifest = card.manifest
    facts, spec = manifest.facts, manifest.facts.teacher["spec"]
    top1, size = facts.teacher["top1"], " x ".join(map(str, spec["feature_shape"]))
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    rows = {
        "teacher": f"{teacher_label(facts.teacher)} (timm {spec.get('timm_version', 'unknown')})",
        "SHA-256 of the weights": str(spec.get("weights_sha256", "")),
        "teacher's top-1 on the validation images": "not measured" if top1 is None else f"{top1:.2f}%",
        "dataset": last_part(str(facts.data["source"])),
        "images": f"{manifest.num_samples:,}",
        "classes": f"{len(facts.class_names):,}" if facts.labeled else "none (no labels)",
        "views per image": f"{manifest.num_views:,}",
        "feature map (C x H x W)": size,
        "features": " ".join(filter(None, (_codec(facts.codec), stored_share(facts.features_every)))),
        "logits": _codec(facts.logit_codec) if spec["num_classes"] else "none (the teacher has no classifier)",
        "pooled embedding": _codec(facts.second_codec) if facts.second_codec else "",
        "recipe": last_part(facts.recipe),
        "store": f"{facts.backend}, at most {counted(facts.samples_per_shard, 'image')} per shard",
        "bytes": f"{size_text(card.total_bytes)} in total",
        "bytes per view in the original cache": ", ".join(
            f"{name} {number:,.0f}" for name, number in manifest.bytes_per_view.items()
        ),
        "fingerprint": facts.fingerprint,
        "made with": versions,
    }
    return {name: value for name, value in rows.items() if value}


def _codec(config: Mapping[str, Any]) -> str:
    """A codec's name and scalar parameters, without shapes and hashes."""
    kept = {name: config[name] for name in ("channels", "noise", "k", "kl_limit") if config.get(name)}
    return ", ".join([str(config["id"]), *(f"{name} {value}" for name, value in kept.items())])


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(f"| {escaped(name)} | {table_cell(value)} |" for name, value in rows.items())


def _fidelity(metrics: Mapping[str, Mapping[str, float]]) -> str:
    rows = []
    for name, row in metrics.items():
        tail = row.get("p1", row.get("p99"))
        shown = "" if tail is None else f"{tail:.5g}{'' if 'p1' in row else ' (99th)'}"
        rows.append(f"| {escaped(name.replace('_', ' '))} | {row['mean']:.5g} | {shown} |")
    return "\n".join(rows)


def _value(value: object) -> str:
    return (
        " to ".join(f"{part:g}" for part in value)
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )
