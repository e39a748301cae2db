"""Codecs: error bounds hold, old bytes stay readable, NaN and Inf are rejected, logits keep their distribution."""

import json

import numpy as np
import pytest
import torch
from codec_maps import SHAPE, cases
from golden_codes import GOLDEN, golden_input
from hypothesis import given, settings
from hypothesis import strategies as st

from scalekd_cache.codec import CODECS, codec_from_config, make_codec
from scalekd_cache.codec.base import feature_norms
from scalekd_cache.codec.fidelity import fidelity
from scalekd_cache.codec.groups import round_up_to_float16
from scalekd_cache.codec.logits import KL_LIMIT, DenseLogits, kl_divergence, logit_codec_from_config
from scalekd_cache.errors import UserError
from scalekd_cache.store.fidelity_summary import merge_summaries, summarize

SHAPES = [(64, 2, 2), (96, 3, 2), (5, 1, 3), (320, 7, 7)]


def heavy_tailed(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    return normal * torch.exp(2 * torch.randn(shape[1], generator=generator))[None, :, None, None]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_within_the_declared_bound(name, shape):
    codec = make_codec(name, shape)
    features = heavy_tailed((6, *shape))
    features[0] = 0
    features[1] *= 1e-7
    features[2] *= 1e-12
    features[3] *= 100 / features[3].abs().max()
    codes = codec.encode(features)
    assert codes.shape == (6, codec.bytes_per_view)
    assert codes.dtype == torch.uint8
    decoded = codec.decode(codes)
    assert decoded.features.shape == features.shape
    assert decoded.features.dtype == decoded.norms.dtype == torch.float32
    assert bool(((decoded.features - features).abs() <= codec.error_bound(features)).all())
    norms = feature_norms(features)
    assert bool(((decoded.norms - norms).abs() <= norms * 2**-11 + 2**-25).all())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("kind", cases())
def test_every_kind_of_map_is_within_the_declared_bound(name, kind):
    """Random, constant, sparse, outlier channels, tiny norms, signs, values halfway between codes."""
    codec, features = make_codec(name, SHAPE), cases()[kind]
    codes = codec.encode(features)
    assert torch.equal(codes, codec.encode(features.clone()))
    decoded = codec.decode(codes)
    assert bool(((decoded.features - features).abs() <= codec.error_bound(features)).all())
    norms = feature_norms(features)
    rounding = norms[:, :1] * 2**-20  # of float32 means, where the summation order differs
    assert bool(((decoded.norms - norms).abs() <= norms * 2**-11 + 2**-25 + rounding).all())


@pytest.mark.parametrize("name", CODECS)
def test_rows_do_not_depend_on_the_batch(name):
    codec = make_codec(name, (96, 3, 2))
    features = heavy_tailed((4, 96, 3, 2))
    together = codec.encode(features)
    alone = torch.cat([codec.encode(features[row : row + 1].contiguous()) for row in range(4)])
    assert torch.equal(together, alone)
    odd = torch.empty(4 * codec.bytes_per_view + 1, dtype=torch.uint8)[1:].view(4, -1)  # rows at an unaligned address
    odd.copy_(together)
    assert torch.equal(codec.decode(odd).features, codec.decode(together).features)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(-40, 4.5), st.integers(1, 130))
def test_int8_never_clips_and_is_within_half_a_scale(seed, log10_size, channels):
    codec = make_codec("int8", (channels, 2, 1))
    features = torch.randn(2, channels, 2, 1, generator=torch.Generator().manual_seed(seed))
    features *= 10**log10_size / features.abs().max()
    if float(feature_norms(features).max()) > 65504:
        return
    codes = codec.encode(features)
    values = codes[:, 2 * channels + 2 * 2 * codec.groups : codec.value_bytes].contiguous().view(torch.int8)
    assert int(values.min()) >= -127
    assert bool(((codec.decode(codes).features - features).abs() <= codec.error_bound(features)).all())


def test_scales_round_up():
    values = torch.cat([torch.logspace(-12, 4.8, 2000), torch.tensor([0.0, 2.0**-24, 65504.0])])
    up = round_up_to_float16(values)
    assert bool((up.float() >= values).all())
    assert float(up[-3]) == 0
    assert bool((up[:5].float() == 2.0**-24).all())  # tiny but not zero: the smallest subnormal
    below = (up.view(torch.int16) - 1).clamp_min(0).view(torch.float16).float()
    assert bool(((below < values) | (values == 0)).all())


def test_int8_size_at_swin_l():
    assert make_codec("int8", (1536, 7, 7)).bytes_per_view == 3_072 + 49 * 12 * 2 + 75_264 + 196 == 79_708


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_values_that_cannot_be_stored_are_refused(name, value):
    codec = make_codec(name, (64, 2, 2))
    features = torch.ones(5, 64, 2, 2)
    features[3, 7, 1, 0] = value
    with pytest.raises(UserError, match=r"rows \[3\]"):
        codec.encode(features)


def test_norms_beyond_float16_are_refused():
    features = torch.full((1, 256, 2, 2), 60_000.0)
    with pytest.raises(UserError, match="cannot store"):
        make_codec("int8", (256, 2, 2)).encode(features)
    exact = make_codec("float32", (256, 2, 2))
    assert torch.equal(exact.decode(exact.encode(features)).features, features)


def with_means(strength: float) -> torch.Tensor:
    """Features of a plain ViT are mostly channel means, which the losses remove."""
    features = torch.randn(20, 384, 8, 8, generator=torch.Generator().manual_seed(0))
    return features + strength * torch.randn(1, 384, 1, 1, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "least"), [("int8", 0.9998), ("float16", 0.9999999), ("bfloat16", 0.99999)])
@pytest.mark.parametrize("strength", [0, 3, 100, 1000])
def test_codecs_do_not_spend_their_precision_on_channel_means(name, least, strength):
    codec, features = make_codec(name, (384, 8, 8)), with_means(strength)
    figures = fidelity(features.double(), codec.decode(codec.encode(features)).features.double()).cosine_mean_removed
    assert float(figures.min()) > least


@pytest.mark.parametrize(("name", "most"), [("float16", 0.001), ("bfloat16", 0.005)])
def test_the_gradient_of_a_codec_whose_means_are_large(name, most):
    """Means 1,000 times the spread: rounding the values themselves gave errors of 24% and 150%."""
    codec, features = make_codec(name, (384, 8, 8)), with_means(1000)
    decoded = codec.decode(codec.encode(features))

    def gradient(target: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:  # the frequency view up to a factor
        centered = target.double() - target.double().mean((2, 3), keepdim=True)
        return centered / norms[:, 1:].double()

    exact, got = gradient(features, feature_norms(features)), gradient(*decoded)
    assert float((got - exact).norm() / exact.norm()) < most


def test_norms_are_those_of_the_loss():
    features = heavy_tailed((2, 64, 3, 3)).double()
    norms = feature_norms(features.float())
    centered = features - features.mean(dim=(2, 3), keepdim=True)
    assert torch.allclose(norms[:, 0].double(), features.norm(dim=1), rtol=1e-6)
    assert torch.allclose(norms[:, 1].double(), centered.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("name", CODECS)
def test_config_rebuilds_the_codec(name):
    codec = make_codec(name, (64, 2, 3))
    config = json.loads(json.dumps(codec.get_config()))
    assert codec_from_config(config).get_config() == config
    with pytest.raises(UserError, match="cannot read"):
        codec_from_config({**config, "version": 3})


@pytest.mark.parametrize("name", CODECS)
def test_another_layout_of_the_rows_is_refused(name):
    config = make_codec(name, (64, 2, 3)).get_config()
    for version in (0, config["version"] - 1, config["version"] + 1, "1", None, [1]):
        with pytest.raises(UserError, match="cannot read"):
            codec_from_config({**config, "version": version})


def test_unknown_codec_names_the_nearest():
    with pytest.raises(UserError, match="int8"):
        make_codec("int88", (64, 2, 2))
    with pytest.raises(UserError):
        codec_from_config({"id": "int8"})
    with pytest.raises(UserError, match="shape"):
        codec_from_config({"id": "int8", "shape": [2**60, 2, 2]})


@pytest.mark.parametrize("name", CODECS)
def test_golden_bytes(name):
    golden = json.loads((GOLDEN / f"codec_{name}.json").read_text())
    codec = codec_from_config(golden["config"])
    codes = codec.encode(golden_input(golden["config"]["shape"]))
    assert [row.numpy().tobytes().hex() for row in codes] == golden["rows"]
    stored = torch.tensor([list(bytes.fromhex(row)) for row in golden["rows"]], dtype=torch.uint8)
    expected = torch.frombuffer(bytearray.fromhex(golden["decoded_float32"]), dtype=torch.float32)
    assert torch.equal(codec.decode(stored).features.reshape(-1), expected)


LOGITS = {
    "usual": lambda g: torch.randn(8, 1000, generator=g) * 2,
    "confident": lambda g: torch.randn(8, 1000, generator=g) * 30,
    "offset": lambda g: torch.randn(8, 1000, generator=g) + 3000,
    "outlier": lambda g: torch.randn(8, 1000, generator=g).index_fill_(1, torch.tensor([3]), -1e6),
    "huge": lambda g: torch.randn(8, 1000, generator=g) * 1e30,
    "limits": lambda g: torch.tensor([[-3.4e38, 3.4e38, 0.0], [3.4e38, 3.4e38, -3.4e38]]),
    "equal": lambda g: torch.full((2, 10), -7.25),
    "one class": lambda g: torch.tensor([[5.0]]),
    "close ties": lambda g: 1e4 + torch.rand(8, 1000, generator=g) * 0.01,
    "two scales": lambda g: torch.cat((torch.randn(8, 500, generator=g), torch.randn(8, 500, generator=g) - 9e4), 1),
}


@pytest.mark.parametrize("kind", LOGITS)
def test_logits_keep_their_distribution(kind):
    logits = LOGITS[kind](torch.Generator().manual_seed(0))
    codec = DenseLogits(logits.shape[1])
    records = codec.encode(logits)
    decoded = np.stack([codec.decode(record) for record in records])
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()
    assert kl_divergence(logits.numpy(), decoded).max() <= KL_LIMIT
    assert (decoded.max(1) == logits.numpy().max(1)).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=40))
def test_logits_keep_their_distribution_whatever_they_are(values):
    codec = DenseLogits(len(values))
    decoded = codec.decode(codec.encode(torch.tensor([values]))[0])
    assert kl_divergence(np.array(values, np.float32), decoded) <= KL_LIMIT


def test_logit_records():
    codec = DenseLogits(1000)
    record = codec.encode(torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)))[0]
    assert len(record) == 1009
    assert logit_codec_from_config(codec.get_config()).num_classes == 1000
    for bad in (b"", b"\x07" + record[1:], record[:-1], record + b"x"):
        with pytest.raises(UserError, match="record's logits are damaged"):
            codec.decode(bad)
    with pytest.raises(UserError, match=r"rows \[1\]"):
        codec.encode(torch.tensor([[0.0] * 1000, [float("nan")] * 1000]))
    with pytest.raises(UserError):
        logit_codec_from_config({"id": "logits-int8", "version": 1, "num_classes": 2**60, "kl_limit": 1e-4})


def test_golden_logits():
    golden = json.loads((GOLDEN / "codec_logits.json").read_text())
    codec = logit_codec_from_config(golden["config"])
    modes = []
    for row in golden["rows"]:
        record = bytes.fromhex(row["record"])
        modes.append(record[0])
        assert codec.encode(torch.tensor([row["logits"]])) == [record]
        assert codec.decode(record).astype("<f4").tobytes().hex() == row["decoded"]
    assert set(modes) == {0, 1}


def test_fidelity_and_its_summaries():
    features = heavy_tailed((8, 64, 4, 4))
    same = fidelity(features, features.clone())
    assert torch.allclose(same.cosine, torch.ones(8))
    codec = make_codec("int8", (64, 4, 4))
    figures = fidelity(features, codec.decode(codec.encode(features)).features)
    assert float(figures.cosine_mean_removed.min()) > 0.999
    assert float(fidelity(features, -features).cosine.max()) < -0.999
    first = summarize({"cosine": figures.cosine[:2].tolist()})
    second = summarize({"cosine": figures.cosine[2:].tolist()})
    merged = merge_summaries([first, second])["cosine"]
    assert merged["count"] == 8
    assert merged["mean"] == pytest.approx(float(figures.cosine.double().mean()))
    assert merged["p1"] == min(first["cosine"]["p1"], second["cosine"]["p1"])


def write_golden() -> None:
    """Write the golden files; run by hand, and only together with a new format version."""
    for name in CODECS:
        codec = make_codec(name, (70, 1, 2) if name in ("int8", "int4", "fp8") else (3, 1, 2))
        codes = codec.encode(golden_input(codec.get_config()["shape"]))
        rows = [row.numpy().tobytes().hex() for row in codes]
        decoded = codec.decode(codes).features.contiguous().numpy().astype("<f4").tobytes().hex()
        content = {"config": codec.get_config(), "rows": rows, "decoded_float32": decoded}
        (GOLDEN / f"codec_{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    codec = DenseLogits(4)
    rows = []
    for logits in ([1.5, -2.0, 0.25, 7.0], [30.0, 29.75, -6000.0, 28.0]):
        record = codec.encode(torch.tensor([logits]))[0]
        decoded = codec.decode(record).astype("<f4").tobytes().hex()
        rows.append({"logits": logits, "record": record.hex(), "decoded": decoded})
    content = {"config": codec.get_config(), "rows": rows}
    (GOLDEN / "codec_logits.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    write_golden()
