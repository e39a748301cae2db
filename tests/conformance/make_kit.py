"""Makes the conformance kit: small caches of every form with their expected values (README.md).

    PYTHONPATH=.:tests/support python tests/conformance/make_kit.py [FOLDER] [--only NAME ...]

Rerunning it with the library versions that a cache's manifest.json records gives the same files. The teachers have
random weights, and their tails are removed from the caches (`tail_sha256` is empty) except in `tar-float32`.
"""

import argparse
import contextlib
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import timm
import torch
from damaged_cases import DAMAGED, write_damaged
from image_files import encoded, write
from PIL import Image
from safetensors.torch import load_file, save_file
from small_cache import make, reseal

from scalekd_cache.codec import codec_from_config
from scalekd_cache.codec.logits import logit_codec_from_config
from scalekd_cache.codec.pooled import second_codec_from_config
from scalekd_cache.models.timm_models import DEMO_TIMM_NAME
from scalekd_cache.store.base import Record
from scalekd_cache.store.reader import Cache

CASES = Path(__file__).resolve().parent / "cases"
WEIGHTS, CLASSIFIER = "weights.safetensors", "classifier.safetensors"
INEXACT = ("transform", "transform-economy", "recomputed")
"""Decoded by sums of floats, whose order is not part of the format."""
SHOWN = 8
"""Values of features, norms and pooled embeddings that expected.json holds next to their sha256."""

SWIN = {"patch_size": 4, "window_size": 2, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "img_size": 32}
WIDTHS = {"small": 4, "wide": 34}
"""Swins with maps of 16 and of 136 channels, 2 x 2 positions: int8 then has one and two scales per position."""

IMAGES = ("ant/1", "bee/2", "ant/3", "bee/4", "cat/5")
STRANGE = ("Zürich/Ä-1", "Zürich/𝄞", f"bee/{'long-' * 25}1", "bee/" + "é" * 60, "ant/under_score/x")
ALL_OPERATIONS = {"randaugment_ops": 2, "erase_probability": 0.5, "flip_probability": 0.5}


class Case(NamedTuple):
    """One valid cache."""

    about: str
    cache: dict[str, Any] = {}
    views: dict[str, Any] = {}
    teacher: str = "small"
    names: tuple[str, ...] = IMAGES
    keeps_tail: bool = False
    grows_to: int = 0
    """A second job makes views up to this number."""
    labeled: bool = True
    pixels_of: str = ""
    """The case that holds the pixels."""
    bias: tuple[float, ...] = ()
    """Of the classifier: a class this improbable needs a wider logit record (mode 1)."""


def tar(**options: Any) -> dict[str, Any]:
    return {"backend": "webdataset", **options}


def zarr(**options: Any) -> dict[str, Any]:
    return {"backend": "zarr", "samples_per_shard": 8, **options}


VALID = {
    "tar-int8": Case(
        "int8 with two scales per position, JPEG, all operations of a view", tar(), ALL_OPERATIONS, "wide"
    ),
    "zarr-int8": Case("the same in the other store, PNG", zarr(), {**ALL_OPERATIONS, "pixel_format": "png"}, "wide"),
    "tar-float32": Case(
        "float32, logits without loss, WebP, with tail.safetensors",
        tar(codec="float32"),
        {"pixel_format": "webp"},
        keeps_tail=True,
    ),
    "zarr-float16": Case("float16; two shards per view", zarr(codec="float16", samples_per_shard=3)),
    "tar-bfloat16": Case(
        "bfloat16, JPEG with optimized Huffman codes, logits in 16 bits",
        tar(codec="bfloat16"),
        {"pixel_format": "jpeg-optimized"},
        bias=(0, 0, -6000),
    ),
    "zarr-float32": Case("float32, no pixels (replayed views)", zarr(codec="float32"), {"pixels": "replayed"}),
    "zarr-int4": Case("int4, no pixels (replayed views)", zarr(codec="int4"), {"pixels": "replayed"}),
    "tar-fp8": Case("fp8, no pixels (replayed views)", tar(codec="fp8"), {"pixels": "replayed"}),
    "tar-transform": Case("transform with rotated channels", tar(codec="transform"), {"pixels": "replayed"}),
    "zarr-transform": Case("transform, coarse", zarr(codec="transform-economy"), {"pixels": "replayed"}),
    "tar-top-k": Case(
        "the two most probable classes only", tar(codec="bfloat16", logits="top_k", top_k=2), {"pixels": "replayed"}
    ),
    "tar-recomputed": Case(
        "no stored logits, with classifier.safetensors", tar(logits="recomputed"), {"pixels": "replayed"}
    ),
    "tar-sparse": Case("features of one in two views", tar(stored_features=0.5), {"pixels": "replayed"}),
    "zarr-sparse": Case("features of one in two views", zarr(stored_features=0.5), {"pixels": "replayed"}),
    "tar-unlabeled": Case(
        "no labels, no classifier; pooled embeddings and heldout.safetensors",
        tar(),
        {"pixel_format": "png"},
        "vit",
        labeled=False,
    ),
    "zarr-unlabeled": Case(
        "no labels, no classifier; pooled embeddings in float16",
        zarr(codec="float16"),
        {"pixels": "replayed"},
        "vit",
        labeled=False,
    ),
    "tar-shared-pixels": Case(
        "pixels are those of tar-int8", tar(codec="float16"), ALL_OPERATIONS, pixels_of="tar-int8"
    ),
    "tar-grown": Case("two groups, each in its own order", tar(views_per_group=1, num_views=1), {}, grows_to=3),
    "tar-strange-keys": Case(
        "non-ASCII and long keys and class names (pax headers), one image that could not be decoded",
        tar(codec="float16"),
        {"pixels": "replayed"},
        names=STRANGE,
    ),
    "zarr-strange-keys": Case(
        "the same in the other store", zarr(codec="float16"), {"pixels": "replayed"}, names=STRANGE
    ),
    "tar-plain": Case("int8; the damaged cases are made from it", tar(), {"pixel_format": "png"}),
    "zarr-plain": Case("int8; the damaged cases are made from it", zarr(), {"pixel_format": "png"}),
}


def picture(number: int) -> Image.Image:
    """A smooth image of 20 x 24 pixels."""
    rows, columns = np.mgrid[0:24, 0:20]
    planes = [(rows * (7 + number) + 40 * number) % 256, (columns * 9 + 30 * number) % 256, (rows + columns) * 5 % 256]
    return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))


def write_pictures(root: Path, case: Case) -> Path:
    """The dataset of a case: class folders, or images without labels and a labeled val/."""
    for number, name in enumerate(case.names):
        place = root / "train" / (name if case.labeled else name.replace("/", "-"))
        write(place.with_name(place.name + ".png"), encoded(picture(number)))
        write(root / "val" / name.split("/")[0] / f"v{number}.png", encoded(picture(50 + number)))
    if case.names is STRANGE:
        write(root / "train" / "ant" / "broken.png", encoded(picture(99))[:60])
    return root


@contextlib.contextmanager
def teacher_of(case: Case, classes: int) -> Iterator[dict[str, Any]]:
    """The options of the teacher, which has random weights and, if it is a Swin, other widths than demo_swin."""
    args = {**SWIN, "embed_dim": WIDTHS.get(case.teacher, 4)}
    name, args = ("test_vit", {"img_size": 32}) if case.teacher == "vit" else (DEMO_TIMM_NAME, args)
    classes = classes if case.labeled else 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=classes, **args)
    if case.bias:
        model.get_classifier().bias.data = torch.tensor(case.bias, dtype=torch.float32)
    save_file(model.state_dict(), WEIGHTS)
    options = {"name": name if case.teacher == "vit" else "demo_swin", "num_classes": classes}
    with mock.patch("scalekd_cache.models.teacher.demo_teacher_args", return_value={**SWIN, **args}):
        yield options


def make_case(name: str, root: Path) -> None:
    """Make the cache of a valid case at root/name/cache, and its expected.json."""
    case, root = VALID[name], root.resolve()
    place = root / name
    shutil.rmtree(place, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temp, contextlib.chdir(temp), quiet():
        # the manifest records paths as given: relative ones, so that the bytes do not depend on the folder
        data = {"source": str(write_pictures(Path("pictures"), case)), "max_samples": None}
        classes = len({one.split("/")[0] for one in case.names})
        cache = {"num_views": 2, "views_per_group": 2, "samples_per_shard": 3, **case.cache}
        if case.pixels_of:
            cache["pixels_from"] = str(root / case.pixels_of / "cache")
        with teacher_of(case, classes) as teacher:
            for views in filter(None, (cache["num_views"], case.grows_to)):
                per_group = max(1, views - 1) if case.grows_to else cache["views_per_group"]
                make(
                    place / "cache",
                    WEIGHTS,
                    data=data,
                    views={"size": 32, "pixels": "baked", **case.views},
                    teacher=teacher,
                    cache={**cache, "num_views": views, "views_per_group": per_group},
                    recipe="demo",
                )
    if not case.keeps_tail:
        remove_tail(place / "cache")
    write_json(place / "expected.json", expected(name, place / "cache"))


def remove_tail(cache: Path) -> None:
    (cache / "tail.safetensors").unlink()
    for file in ("manifest.json", "plan.json"):
        reseal(cache / file, lambda fields: fields.update(tail_sha256=""))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def read_lines(root: Path) -> list[dict[str, Any]]:
    """What a reader prints for a cache (README.md), from this project's own reader and codecs."""
    cache = Cache.open(root)
    facts = cache.manifest.facts
    codec = codec_from_config(facts.codec, root)
    second = second_codec_from_config(facts.second_codec) if facts.second_codec else None
    logits = logit_codec_from_config(facts.logit_codec)
    classifier = load_file(root / CLASSIFIER) if facts.logit_codec["id"] == "logits-recomputed" else None

    def line(record: Record) -> dict[str, Any]:
        maps = codec.decode(torch.from_numpy(codec.unpack([record.features]))) if record.features else None
        scores = logits.decode(record.logits) if record.logits else None
        if classifier is not None and maps is not None:
            weight, mean = classifier["weight"].double(), maps.features[0].double().mean(dim=(1, 2))
            scores = weight @ mean + classifier["bias"].double()
        pooled = None
        if record.second and second is not None:
            pooled = second.decode(torch.from_numpy(second.unpack([record.second]))).features
        return {
            "key": record.key,
            "label": record.label if facts.labeled else None,
            "view": json.loads(record.view),
            "digest": record.digest,
            "pixels": sha256(record.pixels).hexdigest() if record.pixels else None,
            "features": None if maps is None else hex_of(maps.features),
            "norms": None if maps is None or codec.id == "float32" else hex_of(maps.norms),
            "logits": None if scores is None else hex_of(scores),
            "second": None if pooled is None else hex_of(pooled),
        }

    head = {
        "num_samples": len(cache),
        "num_views": facts.num_views,
        "class_names": facts.class_names,
        "fingerprint": facts.fingerprint,
    }
    views = range(facts.num_views)
    return [head, *(line(record) for view in views for record in cache.read(range(len(cache)), view))]


def hex_of(values: np.ndarray | torch.Tensor) -> str:
    """The little-endian float32 bytes of an array, row by row."""
    return np.ascontiguousarray(values, "<f4").tobytes().hex()


def expected(name: str, root: Path) -> dict[str, Any]:
    """expected.json of a valid case."""
    head, *lines = read_lines(root)
    case, parts = VALID[name], ("features", "norms", "logits", "second")
    inexact = [part for part, form in (("features", "codec"), ("logits", "logits")) if case.cache.get(form) in INEXACT]

    def shortened(line: dict[str, Any]) -> dict[str, Any]:
        shown = {part: None if part in inexact else 8 * SHOWN for part in parts}
        values = {
            part: {"sha256": sha256(bytes.fromhex(line[part])).hexdigest(), "first": line[part][: shown[part]]}
            for part in parts
            if line[part] is not None
        }
        return {**line, **values}

    count = head["num_samples"]
    return {
        "about": case.about,
        "accept": True,
        **({"pixels_of": case.pixels_of} if case.pixels_of else {}),
        "exact": [part for part in parts if part not in inexact],
        **head,
        "records": [[shortened(line) for line in lines[at : at + count]] for at in range(0, len(lines), count)],
    }


def write_json(path: Path, value: Any) -> None:
    """One line per record, so that differences are easy to read."""
    text = json.dumps({**value, "records": None}, indent=1, ensure_ascii=False)
    if "records" in value:
        views = [",\n  ".join(json.dumps(one, ensure_ascii=False) for one in view) for view in value["records"]]
        text = text.replace('"records": null', '"records": [\n  [' + "],\n  [".join(views) + "]\n ]")
    else:
        text = json.dumps(value, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def main(words: list[str] | None = None) -> None:
    """Make the cases with these names, by default all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=CASES)
    parser.add_argument("--only", nargs="*", default=[*VALID, *DAMAGED])
    given = parser.parse_args(words)
    makers: dict[str, Callable[[str, Path], None]] = {**dict.fromkeys(VALID, make_case)}
    for name in given.only:
        makers.get(name, write_damaged)(name, given.folder)
        print(name)


if __name__ == "__main__":
    main()
