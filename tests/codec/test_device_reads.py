"""On a GPU, codecs enqueue their work and never wait: no value is read on the host, constants are sent once."""

import pytest
import torch
from codec_maps import SHAPE, maps
from crossings import META, device_crossings

from scalekd_cache.codec import make_codec
from scalekd_cache.codec.fidelity import fidelity
from scalekd_cache.codec.logits import DenseLogits
from scalekd_cache.codec.top_k import TopKLogits
from scalekd_cache.codec.transform_fit import fit
from scalekd_cache.errors import UserError

BATCH = 3
MAPS = maps(32)
PLAIN = ("int8", "int4", "fp8", "float16", "bfloat16", "float32")


def codec_of(name):
    if name in PLAIN:
        return make_codec(name, SHAPE)
    return fit(MAPS, 0.01, rotated=name == "rotated")


@pytest.mark.parametrize("name", [*PLAIN, "rotated", "predicted"])
def test_feature_codecs_do_not_wait(name):
    codec, placed, seeds = codec_of(name), MAPS[:BATCH].to(META), torch.arange(BATCH).to(META)
    with device_crossings() as first:
        codec.encode_rows(placed, seeds)
    assert all(kind == "to device" for kind, _ in first)  # constants
    with device_crossings() as seen:
        rows = codec.encode_rows(placed, seeds)
        fidelity(placed, codec.decode(rows.codes).features)
    assert [crossing for crossing in seen if crossing not in first] == []
    with device_crossings() as again:
        codec.decode(codec.encode_rows(placed, seeds).codes)
    assert again == []
    assert rows.codes.device == rows.final.device == META


@pytest.mark.parametrize("codec", [DenseLogits(5), DenseLogits(5, exact=True), DenseLogits(0), TopKLogits(5, 2)])
def test_logit_codecs_do_not_wait(codec):
    with device_crossings() as seen:
        rows = codec.encode_rows(torch.empty(BATCH, codec.num_classes, device=META))
    assert seen == []
    assert rows.device == META


def test_rows_that_encode_must_finish():
    """Rows that cannot be stored, or whose step must be doubled, are not final; `encode` handles them."""
    broken = MAPS[:4].clone()
    broken[1, 0, 0, 0] = torch.nan
    assert make_codec("int8", SHAPE).encode_rows(broken).final.tolist() == [True, False, True, True]
    with pytest.raises(UserError, match=r"rows \[1\] of a batch of 4"):
        make_codec("int8", SHAPE).encode(broken)
    codec, seeds = codec_of("rotated"), torch.arange(4)
    with pytest.raises(UserError, match=r"rows \[1\] of a batch of 4"):
        codec.encode(broken, seeds)
    codec.step /= 1e5  # symbols beyond 16 bits in all nonzero rows
    flat = MAPS[:4].clone()
    flat[2] = 0
    rows, whole = codec.encode_rows(flat, seeds), codec.encode(flat, seeds)
    assert rows.final.tolist() == [False, False, True, False]
    assert torch.equal(whole[2], rows.codes[2])
    assert whole[:, 4].bool().tolist() == [True, True, False, True]
