"""docs/FORMAT.md is enough: a reader written from it alone gives what our own reader and codecs give."""

import ast
import json
from pathlib import Path

import format_reader
import numpy as np
import pytest
import torch
from small_cache import copy_of_cache, flip_byte, make, shared_weights

from scalekd_cache.codec import codec_from_config
from scalekd_cache.codec.logits import logit_codec_from_config

CASES = [
    ("webdataset", "int8", "baked", "dense"),
    ("webdataset", "float16", "replayed", "recomputed"),
    ("webdataset", "float32", "baked", "dense"),
    ("zarr", "int8", "baked", "top_k"),
    ("zarr", "bfloat16", "replayed", "dense"),
]


@pytest.mark.parametrize(("backend", "codec", "pixels", "kept"), CASES)
def test_a_reader_written_from_the_page_alone(tmp_path, backend, codec, pixels, kept):
    layout = {"backend": backend, "codec": codec, "samples_per_shard": 20, "num_views": 3, "views_per_group": 2,
              "logits": kept, "top_k": 4}  # fmt: skip
    cache = make(tmp_path / "c", shared_weights(), data={"max_samples": 37}, cache=layout, views={"pixels": pixels})
    views = format_reader.read_cache(tmp_path / "c")
    assert sorted(views) == [0, 1, 2]
    ours, logits = codec_from_config(cache.manifest.codec), logit_codec_from_config(cache.manifest.logit_codec)
    for view, decoded in views.items():
        records = cache.read(range(37), view)
        assert len(decoded) == 37
        rows = np.stack([np.frombuffer(record.features, np.uint8) for record in records])
        maps = ours.decode(torch.from_numpy(rows.copy()))
        for at, (record, other) in enumerate(zip(records, decoded, strict=True)):
            assert (record.key, record.label, record.digest) == (other.key, other.label, other.digest)
            assert json.loads(record.view) == other.view
            assert record.pixels == other.pixels
            assert np.array_equal(maps.features[at].numpy(), other.features)
            assert (other.norms is None) == (codec == "float32")
            assert other.norms is None or np.array_equal(maps.norms[at].numpy(), other.norms)
            assert np.array_equal(logits.decode(record.logits), other.logits)


def test_the_other_reader_stands_alone():
    tree = ast.parse(Path(format_reader.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "struct" in names
    assert not any(name.split(".")[0] in ("scalekd_cache", "zarr", "torch", "webdataset") for name in names)


def test_the_other_reader_notices_a_flipped_byte_of_the_manifest(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    format_reader.read_manifest(root)
    data = (root / "manifest.json").read_bytes()
    flip_byte(root / "manifest.json", data.index(b'"recipe": "demo"') + 12)
    with pytest.raises(AssertionError):
        format_reader.read_manifest(root)
    format_reader.check_seal((root / "plan.json").read_bytes())
