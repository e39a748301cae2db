"""The model card shows quoted names as text."""

from pathlib import Path

import pytest
import yaml

from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.training.model_card import model_card

HOSTILE = "x](http://evil) ![i](u) <script>alert(1)</script> | `a` **b**\n---\n# title\n{0}"
FACTS = {
    "fingerprint": "f" * 64,
    "views": 2,
    "image_size": 64,
    "class_names": [HOSTILE],
    "data": {"source": HOSTILE},
}


@pytest.mark.parametrize("size", [64, 384])
def test_the_evaluation_transform_is_stated(size):
    text = model_card(StudentConfig(mean=(0.1, 0.2, 0.3)), {}, {**FACTS, "image_size": size}, None, Path("export"))
    resize = {64: 73, 384: 438}[size]
    for row in (f"| resize | shorter side to {resize} pixels, bicubic |", "| mean | 0.1, 0.2, 0.3 |",
                f"| crop | central {size} x {size} pixels (crop fraction 0.875) |",
                "| std | 0.229, 0.224, 0.225 |",
                "| colors | RGB |"):  # fmt: skip
        assert row in text


def test_the_card_of_an_unfinished_run_has_no_results():
    facts = {"image_size": 64, "class_names": ["a", "b"], "num_classes": 2, "fingerprint": "f", "views": 2, "data": {}}
    card = model_card(StudentConfig(name="resnet10t"), {}, facts, None, Path("export"))
    assert "the run is not finished" in card
    assert "validation images" not in card


def test_no_path_of_this_machine_is_quoted():
    for place in ("/home/ann/pets", "C:\\Users\\ann\\pets", "s3://ann-home/pets/", "/home/ann/pets/{train,val}.tar"):
        options = {"student": {"name": "resnet18"}, "recipe": place, "train": {"targets": "cached"}}
        facts = {**FACTS, "data": {"source": place}}
        text = model_card(StudentConfig(), options, facts, None, Path("/home/ann/runs/export"))
        assert "ann" not in text
        assert "pets" in text or "tar" in text


def test_quoted_names_are_escaped():
    summary = {"teacher": HOSTILE, "teacher_top1": 1.0, "top1": 2.0, "top5": None, "targets": "cached"}
    options = {"student": {"name": HOSTILE}, "train": {"targets": HOSTILE, "epochs": 1, "seed": 0}, "recipe": HOSTILE}
    text = model_card(StudentConfig(name=HOSTILE), options, FACTS, summary, Path("/run/`a`'b"))
    header, body = text.split("---\n")[1], text.split("---\n", 2)[2]
    assert yaml.safe_load(header)["library_name"] == "timm"
    assert [line for line in body.splitlines() if line.startswith("# ")] == [body.splitlines()[0]]
    lines = body.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert all(row.count("|") == 3 for row in rows)  # the table cell stays intact
    cells = [row for row in rows if "evil" in row]
    assert len(cells) >= 3
    assert all(row.count("`") == 2 for row in cells)  # as code
    prose = [line for line in lines if "evil" in line and not line.startswith("|")]
    assert prose
    for line in prose:
        assert "\\<script\\>" in line
        assert "\\]\\(http" in line
        assert "\\!\\[i\\]" in line
    assert sum(line.startswith("```") for line in lines) == 2
