"""Both stages on a folder of real photographs, two of them damaged, with a Swin-T at 224 px."""

import io

import numpy as np
import pytest
from commands import file_bytes, flags, read_json, run, steps_of
from PIL import Image
from sklearn.datasets import load_sample_images

BAD = ("flower/empty", "china/cut")


def jpeg(image, left, top):
    buffer = io.BytesIO()
    image.crop((left, top, left + 320, top + 240)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Class folders china/ and flower/: 12 + 4 crops of two photographs, and two files that are not images."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for name, pixels in zip(("china", "flower"), load_sample_images().images):
        image = Image.fromarray(pixels)
        for split, count in (("train", 6), ("val", 2)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                data = jpeg(image, int(rng.integers(320)), int(rng.integers(187)))
                (folder / f"{number}.jpg").write_bytes(data)
    (root / "train" / "flower" / "empty.jpg").write_bytes(b"")
    (root / "train" / "china" / "cut.jpg").write_bytes(data[: len(data) // 2])
    return root


@pytest.mark.ci_slow
def test_photographs_go_through_both_stages(photographs, tmp_path):
    cache, folder = tmp_path / "cache", tmp_path / "run"
    recipe = {"recipe": "traditional", "data.source": photographs, "cache.path": cache, "cache.num_views": 1}
    teacher = {"teacher.name": "swin_tiny_patch4_window7_224", "teacher.pretrained": "false"}
    output = run("cache_teacher", *flags({**recipe, **teacher, "teacher.batch_size": 4}))
    assert "2 images could not be decoded" in output
    manifest = read_json(cache / "manifest.json")
    assert manifest["teacher"]["spec"]["name"] == "swin_tiny_patch4_window7_224"
    assert manifest["class_names"] == ["china", "flower"]
    units = [read_json(file) for file in cache.glob("units/*/unit.json")]
    assert sum(unit["count"] for unit in units) == 12
    skipped = [entry for unit in units for entry in unit["skipped"]]
    assert len(skipped) == 2
    for key in BAD:
        assert any(key in str(entry) for entry in skipped), skipped
    keys = b"".join(data for path, data in file_bytes(cache).items() if path.endswith("keys.txt")).decode()
    assert not any(key in keys for key in BAD)

    train = {"train.epochs": 1, "train.global_batch_size": 4, "train.micro_batch_size": 4, "train.log_every": 1}
    run("distill", *flags({"cache": cache, "run": folder, "student.name": "resnet18", **train}))
    summary = read_json(folder / "summary.json")
    assert [line["step"] for line in steps_of(folder)] == [1, 2, 3]
    assert (summary["val_images"], summary["teacher"]) == (4, "swin_tiny_patch4_window7_224 (random weights)")
    assert summary["top1"] in (0, 25, 50, 75, 100)
    assert (folder / "export" / "model.safetensors").exists()
