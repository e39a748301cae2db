"""The benchmark of image formats: every format decodes to a view; comparison at equal feature change."""

import numpy as np
import pytest
import torch
from image_files import picture

from benchmarks.codec.pixels import BASE, at_equal_change, formats, ssim, summary_table


def test_every_format_gives_a_view_back():
    image = picture(3, (32, 32)).convert("RGB")
    names = set()
    for one in formats(32):
        decoded = one.decode(one.encode(image))
        assert (decoded.shape, decoded.dtype) == ((32, 32, 3), np.uint8), one.name
        names.add(one.name)
    assert f"{BASE[0]}, {BASE[1]}" in names
    assert {"WebP, method 4, 90", "AVIF, speed 8, 85", "PNG, 100"} <= names


def row(family, quality, size, change, decode=1.0):
    return {"family": family, "quality": quality, "bytes": size, "feature_change": change, "psnr_db": 40.0,
            "feature_change_p99": change, "encode_ratio": 2.0, "decode_ratio": decode}  # fmt: skip


def test_formats_are_compared_at_the_feature_change_of_jpeg_90():
    rows = [row(BASE[0], 80, 50, 0.04), row(*BASE, 100, 0.01), row("other", 1, 40, 0.02, 1.0),
            row("other", 2, 90, 0.005, 4.0), row("coarse", 1, 20, 0.05), row("coarse", 2, 30, 0.02)]  # fmt: skip
    found = at_equal_change(rows)
    assert found.keys() == {BASE[0], "other"}
    assert found[BASE[0]]["bytes_ratio"] == pytest.approx(1)
    assert found["other"]["bytes"] == pytest.approx(60)  # half way between 40 and 90, on a logarithmic scale
    assert found["other"]["decode_ratio"] == pytest.approx(2)
    assert "| other | 60 | 0.60 |" in summary_table(found)


def test_structural_similarity():
    draw = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert ssim(draw, draw) == pytest.approx(1)
    assert ssim(draw, 255 - draw) < 0
