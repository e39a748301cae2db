"""Fine-tunes a pretrained model into a teacher for a dataset, with the project's own commands.

    python -m benchmarks.study.finetune_teacher --weights mobile_sam.pt --data data/cifar10-small [--epochs 3 --lr 5e-4]
    python -m benchmarks.study.finetune_teacher --name vit_small_patch14_dinov2 --weights file.safetensors --data ...

In: weights of a timm model (safetensors), or the published mobile_sam.pt, whose image encoder is a TinyViT-5M (its
weights are renamed to timm's names); an image folder. Out: teachers/<name>-<data>.safetensors, with a new classifier,
and the training results in benchmarks/results/study/teacher-<name>-<data>.json.
Steps: cache the views (with the demo's small teacher, whose targets are unused), run `distill` with TARGETS=none and
INIT= on them, export the weights. Invariant: the file appears after the training is finished.
"""

import json
import re
import shutil
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.harness import RESULTS, argument_parser
from scalekd_cache.models.timm_models import default_image_size

ENCODER = "image_encoder."
RENAMED = (
    (r"\.c\.weight$", ".conv.weight"),
    (r"^patch_embed\.seq\.0", "patch_embed.conv1"),
    (r"^patch_embed\.seq\.2", "patch_embed.conv2"),
    (r"^norm_head", "head.norm"),
)


def timm_name_of(name: str) -> str | None:
    """timm's name of a mobile_sam.pt weight; None for the mask decoder, the neck and the unused classifier."""
    if not name.startswith(ENCODER) or name.startswith((f"{ENCODER}neck", f"{ENCODER}head.")):
        return None
    name = name.removeprefix(ENCODER)
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    name = re.sub(r"^layers\.(\d)\.downsample", lambda found: f"stages.{int(found[1]) + 1}.downsample", name)
    return re.sub(r"^layers\.", "stages.", name)


def read_weights(file: Path) -> dict[str, Tensor]:
    """A state dict with timm's names."""
    if file.suffix == ".safetensors":
        return load_file(str(file))
    stored = torch.load(file, map_location="cpu", weights_only=True)
    return {new: value for name, value in stored.items() if (new := timm_name_of(name)) is not None}


def write_start(name: str, file: Path, classes: int, size: int, folder: Path) -> None:
    """Write a folder for INIT=: the pretrained weights with a new classifier (seed 0)."""
    torch.manual_seed(0)
    kwargs = {} if size == default_image_size(name) or name.startswith("tiny_vit") else {"img_size": size}
    model = timm.create_model(name, num_classes=classes, **kwargs)
    own, given = model.state_dict(), read_weights(file)
    head = model.pretrained_cfg["classifier"]
    taken = {key: value for key, value in given.items() if key in own and value.shape == own[key].shape}
    missing = sorted(key for key in own.keys() - taken.keys() if not key.startswith(f"{head}."))
    if missing:
        raise SystemExit(f"{file} lacks {len(missing)} weights of {name}, for example {missing[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in (own | taken).items()}, folder / "model.safetensors")


def main() -> None:
    """Parse options and train."""
    parser = argument_parser(__doc__)
    parser.add_argument("--name", default="tiny_vit_5m_224", help="timm model")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True, help="image folder with train/ and val/")
    parser.add_argument("--recipe", default="cifar10-small", help="recipe whose views are used for training")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument(
        "--lr", type=float, default=5e-4, help="peak learning rate of AdamW at the recipe's base batch size"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from pipelines import cache_teacher, distill
    from scalekd_cache.config.recipes import recipe_section

    label = f"{options.name}-{Path(options.data).name}"
    out = options.out or Path("teachers") / f"{label}.safetensors"
    size = recipe_section(options.recipe, "cache")["views"]["size"]
    classes = sum(1 for entry in (Path(options.data) / "train").iterdir() if entry.is_dir())
    cache, start, run = f"caches/{label}-views", Path(f"runs/{label}-start"), Path(f"runs/{label}")
    cache_teacher.COMMAND.run_here([
        "--recipe", options.recipe, "--data.source", options.data, "--cache.path", cache, "--teacher.name", "demo_swin",
        "--teacher.pretrained", "false", "--cache.num_views", str(options.epochs),
    ])  # fmt: skip
    write_start(options.name, options.weights, classes, size, start)
    distill.COMMAND.run_here([
        "--recipe", options.recipe, "--cache", cache, "--run", str(run), "--student.name", options.name,
        "--init", str(start), "--train.targets", "none", "--train.epochs", str(options.epochs),
        "--optim.lr", str(options.lr), "--optim.weight_decay", "0.05", "--train.checkpoint_steps", "50",
    ])  # fmt: skip
    out.parent.mkdir(exist_ok=True)
    shutil.copyfile(run / "export" / "model.safetensors", out)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in summary.items() if name not in ("teacher", "teacher_top1", "targets")}
    file = RESULTS / "study" / f"teacher-{label}.json"
    file.write_text(json.dumps({**kept, "weights": options.weights.name, "lr": options.lr}, indent=1) + "\n")
    print(f"{out}: top-1 {summary['top1']}% ({file})")


if __name__ == "__main__":
    main()
