"""Feature codecs under numcodecs' contract, in a Zarr array."""

import numcodecs
import numpy as np
import pytest
import torch
import zarr

from scalekd_cache.codec import make_codec
from scalekd_cache.codec.transform_fit import fit
from scalekd_cache.codec.transform_state import FILE, state_bytes
from scalekd_cache.codec.zarr_filter import FeatureMaps
from scalekd_cache.errors import UserError

MAPS = torch.randn(10, 8, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["int8", "float32", "transform"])
def test_a_zarr_array_carries_a_codec(tmp_path, name):
    if name == "transform":
        codec = fit(MAPS, 0.01)
        (tmp_path / FILE).write_bytes(state_bytes(codec.state))
    else:
        codec = make_codec(name, (8, 2, 3))
    wrapped = FeatureMaps(codec.get_config(), str(tmp_path))
    again = numcodecs.get_codec(wrapped.get_config())
    assert again.get_config() == wrapped.get_config()
    array = zarr.create_array(
        tmp_path / "maps.zarr", shape=MAPS.shape, chunks=(4, 8, 2, 3), dtype="f4", compressors=wrapped, zarr_format=2
    )
    array[:] = MAPS.numpy()
    read = zarr.open_array(tmp_path / "maps.zarr", mode="r")[:]
    assert (np.abs(read - MAPS.numpy()) <= codec.error_bound(MAPS).numpy()).all()
    assert (read == MAPS.numpy()).all() == (name == "float32")


def test_bytes_of_another_codec_are_refused():
    wrapped = FeatureMaps(make_codec("int8", (8, 2, 3)).get_config())
    data = wrapped.encode(MAPS.numpy())
    for bad in (
        b"",
        data[:-1],
        b"\xff" * 8,
        FeatureMaps(make_codec("float16", (8, 2, 3)).get_config()).encode(MAPS.numpy()),
    ):
        with pytest.raises(UserError, match="damaged"):
            wrapped.decode(bad)
