"""The examples without labels, with randomly initialized teachers: a backbone, its evaluation, its fine-tuning."""

import pytest
from image_files import encoded, folder_tree, picture, write

from examples import sam_encoder, unlabeled_resnet

pytestmark = pytest.mark.slow
QUICK = {"pretrained": False, "views": 1, "device": "cpu", "workers": 0, "teacher.batch_size": 8}
TRAINING = {"batch": 8, "device": "cpu", "workers": 0}


@pytest.fixture
def pictures(tmp_path):
    for number in range(18):
        write(tmp_path / "pictures" / f"{number}.jpg", encoded(picture(number, (64, 64)), "JPEG"))
    return str(tmp_path / "pictures")


def test_dinov2_into_a_resnet(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    images = [f"{name}/{number}.png" for name in ("ant", "bee") for number in range(12)]
    labeled = folder_tree(tmp_path / "labeled", images, images[::3])
    found = unlabeled_resnet.main(
        pictures, str(labeled), None, student="test_resnet", size=56, epochs=1, folder=str(tmp_path),
        teacher_options=QUICK, training_options=TRAINING,
    )  # fmt: skip
    assert all(0 <= accuracy <= 100 for accuracy in found)
    said = capsys.readouterr().out
    assert "backbone: k-NN" in said
    assert said.count("20 training images in 2 classes") == 2


def test_sam_into_a_tiny_vit(pictures, tmp_path):
    channels = sam_encoder.main(
        pictures, None, student="test_resnet", size=64, epochs=1, folder=str(tmp_path),
        teacher_options=QUICK, training_options=TRAINING,
    )  # fmt: skip
    assert len(channels) > 2
