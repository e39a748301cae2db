"""docs/FORMAT.md is complete: a reader written only from it gives the same results as our reader and codecs."""

import ast
import json
import tempfile
from pathlib import Path

import format_reader
import format_transform
import numpy as np
import pytest
import torch
from format_transform import decode_transform, read_state
from small_cache import copy_of_cache, flip_byte, make, shared_weights

from scalekd_cache.codec import codec_from_config
from scalekd_cache.codec.logits import logit_codec_from_config

CASES = [
    ("webdataset", "int8", "baked", "dense"),
    ("webdataset", "float16", "replayed", "recomputed"),
    ("webdataset", "float32", "baked", "dense"),
    ("zarr", "int8", "baked", "top_k"),
    ("zarr", "bfloat16", "replayed", "dense"),
    ("webdataset", "int4", "replayed", "dense"),
    ("zarr", "fp8", "replayed", "dense"),
    ("webdataset", "transform", "baked", "recomputed"),
    ("zarr", "transform-economy", "replayed", "dense"),
]


@pytest.mark.parametrize(("backend", "codec", "pixels", "kept"), CASES)
def test_a_reader_written_from_the_page_alone(tmp_path, backend, codec, pixels, kept):
    layout = {
        "backend": backend,
        "codec": codec,
        "samples_per_shard": 20,
        "num_views": 3,
        "views_per_group": 2,
        "logits": kept,
        "top_k": 4,
    }
    cache = make(tmp_path / "c", shared_weights(), data={"max_samples": 37}, cache=layout, views={"pixels": pixels})
    views = format_reader.read_cache(tmp_path / "c")
    assert sorted(views) == [0, 1, 2]
    ours, logits = (
        codec_from_config(cache.manifest.facts.codec, cache.root),
        logit_codec_from_config(cache.manifest.facts.logit_codec),
    )
    for view, decoded in views.items():
        records = cache.read(range(37), view)
        assert len(decoded) == 37
        maps = ours.decode(torch.from_numpy(ours.unpack([record.features for record in records])))
        for at, (record, other) in enumerate(zip(records, decoded, strict=True)):
            assert (record.key, record.label, record.digest) == (other.key, other.label, other.digest)
            assert json.loads(record.view) == other.view
            assert record.pixels == other.pixels
            assert_same_maps(ours.id, maps.features[at].numpy(), other.features)
            assert (other.norms is None) == (codec == "float32")
            assert other.norms is None or np.array_equal(maps.norms[at].numpy(), other.norms)
            assert np.array_equal(logits.decode(record.logits), other.logits)


def assert_same_maps(codec, ours, other):
    """Bit for bit equal; `transform` up to the order of its float32 sums."""
    assert ours.shape == other.shape
    if codec == "transform":
        assert np.abs(ours - other).max() <= 1e-5 * np.abs(ours).max()
    else:
        assert np.array_equal(ours, other)


def test_both_kinds_of_the_transform_coder():
    """Small caches hold rotated channels only; the golden records hold both kinds."""
    for golden in json.loads((Path(__file__).parents[1] / "golden" / "codec_transform.json").read_text()).values():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "state").write_bytes(bytes.fromhex(golden["state"]))
            state = read_state(Path(folder) / "state", golden["config"]["state_sha256"])
        found = [decode_transform(golden["config"], state, bytes.fromhex(record))[0] for record in golden["records"]]
        expected = np.frombuffer(bytes.fromhex(golden["decoded_float32"]), "<f4").reshape(np.shape(found))
        assert_same_maps("transform", expected, np.stack(found))


@pytest.mark.parametrize("module", [format_reader, format_transform])
def test_the_other_reader_stands_alone(module):
    tree = ast.parse(Path(module.__file__).read_text())
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
