"""The transform codec: unbiased, has the declared noise, writes reproducible bytes, rejects foreign records."""

import hashlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_maps import SHAPE, cases, maps
from golden_codes import GOLDEN, golden_input

from scalekd_cache.codec import codec_from_config, make_codec
from scalekd_cache.codec.base import feature_norms
from scalekd_cache.codec.blocks import BlockPacker, Segment, pack_symbols, unpack_symbols
from scalekd_cache.codec.dither import dither, dither_seed, dither_table
from scalekd_cache.codec.fidelity import fidelity
from scalekd_cache.codec.transform import TransformCodec, token_scales
from scalekd_cache.codec.transform_fit import ALWAYS_ROTATED, FACTORS, PRESETS, fit, preset_name
from scalekd_cache.codec.transform_state import FILE, TransformState, state_bytes
from scalekd_cache.errors import UserError
from scalekd_cache.scalekd.losses import frequency_loss, spatial_loss


def seeds(count: int, start: int = 0) -> torch.Tensor:
    return torch.tensor([dither_seed(f"n{number}", 0) for number in range(start, start + count)])


@cache
def codec(noise: float = 0.01, rotated: bool = True) -> TransformCodec:
    return fit(maps(200), noise, rotated=rotated)


KINDS = pytest.mark.parametrize("rotated", [True, False])


@KINDS
@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("noise", [0.002, 0.3])
def test_error_is_within_the_declared_bound(name, noise, rotated):
    features = cases()[name]
    coder = codec(noise, rotated)
    rows = coder.encode(features, seeds(3))
    assert np.array_equal(coder.unpack(coder.pack(rows.numpy())), rows.numpy())
    decoded = coder.decode(rows)
    assert bool(((decoded.features - features).abs() <= coder.error_bound(features)).all())
    norms = feature_norms(features)
    assert bool(((decoded.norms - norms).abs() <= norms * 2**-11 + 2**-25).all())


@pytest.mark.parametrize(
    "name", ["usual", "random", "sparse", "outlier channel", "large", "sign noise", "constant channels"]
)
@KINDS
def test_error_energy_is_what_the_codec_declares(name, rotated):
    """Error energy over squared divisor, mean over many dithers and tokens: step^2 / 12 per coefficient."""
    features, coder = cases()[name][:1].expand(400, *SHAPE).contiguous(), codec(rotated=rotated)
    rows = coder.encode(features, seeds(400))
    scales = token_scales(feature_norms(features).half().float())
    energy = ((coder.decode(rows).features - features).square().sum(1).flatten(1) / scales.square()).mean()
    assert float(energy) == pytest.approx(float(coder.expected_error(rows).mean()), rel=0.03)


@KINDS
def test_cosine_is_the_knob(rotated):
    features = maps(200, seed=8)
    for noise in (0.002, 0.05):
        coder = codec(noise, rotated)
        figures = fidelity(features, coder.decode(coder.encode(features, seeds(200))).features).cosine_mean_removed
        assert float(figures.mean()) == pytest.approx((1 + noise) ** -0.5, abs=noise / 8)
        assert float(figures.min()) > 1 - noise


@KINDS
def test_decoded_maps_are_unbiased(rotated):
    features, coder, count = maps(1, seed=4), codec(0.5, rotated), 4000
    errors = []
    for start in range(0, count, 500):
        rows = coder.encode(features.expand(500, *SHAPE).contiguous(), seeds(500, start))
        errors.append(coder.decode(rows).features - features)
    error = torch.cat(errors)
    mean, spread = error.mean(0), error.std(0) / count**0.5
    assert float((mean / spread).abs().max()) < 5  # 288 values; five standard errors
    assert float((mean / spread).square().mean()) == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("loss", [spatial_loss, frequency_loss])
def test_gradients_are_unbiased_with_stored_norms_only(loss):
    """The mean over n dithers approaches the exact gradient like 1 / sqrt(n), but not with the noisy map's norms."""
    features, coder = maps(1, seed=4), codec(0.5)
    student = maps(1, seed=11).requires_grad_()

    def gradient(target: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Mean over the batch of targets."""
        value = loss(student.expand(len(target), *SHAPE), target, norms)
        return torch.autograd.grad(value, student)[0]

    exact = gradient(features, feature_norms(features))
    stored, own = [], []
    for start in range(0, 4096, 256):
        rows = coder.encode(features.expand(256, *SHAPE).contiguous(), seeds(256, start))
        decoded = coder.decode(rows)
        norms = feature_norms(features).expand(256, 2, 4, 3)  # up to float16 rounding, the norms in the record
        assert torch.allclose(decoded.norms, norms, rtol=2**-10)
        stored.append(gradient(decoded.features, norms))
        own.append(gradient(decoded.features, feature_norms(decoded.features)))

    def distances(gradients: list[torch.Tensor]) -> tuple[float, float]:
        """Relative RMS distance to the exact gradient, for means over 256 and over 4096 dithers."""
        few = torch.stack([(g - exact).square().sum() for g in gradients]).mean().sqrt()
        many = (torch.stack(gradients).mean(0) - exact).norm()
        return float(few / exact.norm()), float(many / exact.norm())

    few, many = distances(stored)
    assert many == pytest.approx(few / 4, rel=0.5)  # 16 times as many dithers: a quarter of the error
    few, many = distances(own)
    assert many > few * 0.7
    assert many > 5 * distances(stored)[1]


def test_dither_is_uniform_and_uncorrelated():
    table = dither_table(40)
    values = dither(torch.tensor([dither_seed(str(n), 3) for n in range(6000)]), table, 40).double()
    assert float(values.abs().max()) < 0.5
    assert float(values.mean(0).abs().max()) < 5 * 12**-0.5 / 6000**0.5
    assert torch.allclose(values.var(0) * 12, torch.ones(40, dtype=torch.float64), atol=0.06)
    correlation = torch.corrcoef(values.T) - torch.eye(40)
    assert float(correlation.abs().max()) < 5 / 6000**0.5
    every = dither(torch.arange(2**16), table, 40)  # 65,536 levels, each once at each position
    assert float(every.double().mean(0).abs().max()) < 1e-9
    assert torch.equal(dither(torch.tensor([2**16 + 7]), table, 40), every[7:8])
    assert dither_seed("a", 1) != dither_seed("a", 2) != dither_seed("b", 2)


PROBE = """
import sys, hashlib, torch
torch.set_num_threads(int(sys.argv[1]))
sys.path[:0] = ["tests/support", "tests/codec"]
import test_transform as t
coder = t.codec_from_config(t.json.loads(sys.argv[2]), t.Path(sys.argv[3]))
rows = coder.encode(t.maps(32, seed=21), t.seeds(32)).numpy()
print(hashlib.sha256(b"".join(coder.pack(rows))).hexdigest())
"""


@KINDS
def test_bytes_do_not_depend_on_process_threads_or_batch(tmp_path, rotated):
    coder = codec(rotated=rotated)
    (tmp_path / FILE).write_bytes(state_bytes(coder.state))
    features, numbers = maps(32, seed=21), seeds(32)
    rows = coder.encode(features, numbers)
    alone = torch.cat([coder.encode(features[n : n + 1], numbers[n : n + 1]) for n in range(32)])
    assert torch.equal(rows, alone)
    expected = hashlib.sha256(b"".join(coder.pack(rows.numpy()))).hexdigest()
    config = json.dumps(coder.get_config())
    for threads in ("1", "2"):
        command = [sys.executable, "-c", PROBE, threads, config, str(tmp_path)]
        root = Path(__file__).parents[2]
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        assert found.stdout.strip() == expected


@KINDS
def test_correlation_is_worth_bytes(rotated):
    features = maps(64, seed=30)
    coder = codec(0.002, rotated)
    size = np.mean([len(record) for record in coder.pack(coder.encode(features, seeds(64)).numpy())])
    assert size < 0.75 * make_codec("int8", SHAPE).bytes_per_view


def test_records_refuse_what_is_not_theirs():
    coder, whole = codec(), make_codec("int8", SHAPE)
    record = coder.pack(coder.encode(maps(1), seeds(1)).numpy())[0]
    other = fit(maps(50)[..., :2].contiguous(), 0.01)
    foreign = other.pack(other.encode(maps(1)[..., :2].contiguous(), seeds(1)).numpy())[0]
    for bad in (
        b"",
        record[:30],
        record[:-3],
        record[:56] + b"x" * 20,
        foreign,
        whole.pack(whole.encode(maps(1)).numpy())[0],
    ):
        with pytest.raises(UserError, match="record's features are damaged"):
            coder.unpack([bad])
    with pytest.raises(UserError, match="record's features are damaged"):
        whole.unpack([record])
    for value in (float("nan"), float("inf"), 1e30):
        bad = maps(3)
        bad[1, 3] = value
        with pytest.raises(UserError, match=r"rows \[1\]"):
            coder.encode(bad, seeds(3))


@KINDS
def test_state_travels_with_the_cache(tmp_path, rotated):
    coder = codec(rotated=rotated)
    config = json.loads(json.dumps(coder.get_config()))
    with pytest.raises(UserError, match="state is missing"):
        codec_from_config(config, tmp_path)
    with pytest.raises(UserError, match="state is missing"):
        codec_from_config(config)
    data = state_bytes(coder.state)
    (tmp_path / FILE).write_bytes(data)
    again = codec_from_config(config, tmp_path)
    assert again.get_config() == config
    features = maps(4, seed=2)
    assert torch.equal(again.encode(features, seeds(4)), coder.encode(features, seeds(4)))
    (tmp_path / FILE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match="does not match the cache"):
        codec_from_config(config, tmp_path)
    (tmp_path / FILE).write_bytes(data)
    for changed in (
        {"version": 2},
        {"shape": [24, 3, 3]},
        {"noise": "0.1"},
        {"noise": -1.0},
        {"state_sha256": "0" * 64},
    ):
        with pytest.raises(UserError):
            codec_from_config({**config, **changed}, tmp_path)


def test_classes_hold_any_symbol():
    segments = [Segment(10, 16), Segment(11, 8), Segment(8, 4), Segment(13, 2), Segment(1, 4)]
    generator = np.random.default_rng(0)
    symbols = torch.from_numpy(generator.integers(-32767, 32768, (50, 43)) >> generator.integers(0, 16, (50, 43)))
    planes = pack_symbols(symbols, segments)
    joined = torch.empty(symbols.shape)
    unpack_symbols(planes, segments, joined)
    assert torch.equal(joined.long(), symbols)
    packer = BlockPacker(segments, head=0)
    assert packer.row_bytes == planes.shape[1] == 20 + 11 + 4 + 4 + 1 + 43 * 6
    assert np.array_equal(packer.unpack(packer.pack(planes.numpy())), planes.numpy())
    import numcodecs

    frame = packer.pack(planes.numpy()[:1])[0]
    assert numcodecs.Zstd().decode(frame) == planes.numpy()[0].tobytes()  # a plain zstd frame


def test_too_few_views_cannot_calibrate():
    with pytest.raises(UserError, match="calibrate"):
        fit(maps(1), 0.01)


def golden_codec(kind: str) -> TransformCodec:
    """An integer codec with two bands and all kinds of classes; bases are signed permutations, or one factor each."""
    basis = torch.eye(3, dtype=torch.float64)[[2, 0, 1]] * torch.tensor([1.0, -1.0, 1.0])
    nothing = basis.new_zeros(2, 0, 3)
    state = TransformState(
        mean=torch.tensor([0.5, 0.0, -0.25]).double(),
        frequencies=torch.tensor([0, 4, 5, 1, 2, 3]),
        bands=torch.tensor([1, 5]),
        basis=torch.stack([basis, basis.T]),
        analysis=nothing,
        loadings=nothing.long(),
        units=torch.ones(2, 3, dtype=torch.float64),
        order=torch.arange(17, -1, -1),
        segments=torch.tensor([[4, 16], [3, 8], [3, 4], [8, 2]]),
    )
    if kind == "predicted":
        state = state._replace(
            basis=nothing,
            analysis=torch.tensor([[[2.0, 1.0, 0.0]], [[0.0, -3.0, 1.5]]]).double(),
            loadings=torch.tensor([[[3, 2, -1]], [[1, -4, 2]]]),
            units=torch.tensor([[0.5, 0.25, 1.0], [0.125, 0.5, 0.5]]).double(),
            order=torch.tensor([0, 5, 4, 3, 2, 1]),
            segments=torch.tensor([[6, 8], [4, 8], [3, 4], [3, 16], [8, 2]]),
        )
    digest = hashlib.sha256(state_bytes(state)).hexdigest()
    return TransformCodec((3, 2, 3), state, noise=0.25, state_sha256=digest)


@pytest.mark.parametrize("kind", ["rotated", "predicted"])
def test_golden_bytes(tmp_path, kind):
    golden = json.loads((GOLDEN / "codec_transform.json").read_text())[kind]
    (tmp_path / FILE).write_bytes(bytes.fromhex(golden["state"]))
    coder = codec_from_config(golden["config"], tmp_path)
    assert coder.get_config() == golden_codec(kind).get_config()
    rows = coder.encode(golden_input([3, 2, 3]), torch.tensor([1, 2**32 - 1]))
    assert [row.numpy().tobytes().hex() for row in rows] == golden["rows"]
    records = [bytes.fromhex(record) for record in golden["records"]]
    assert np.array_equal(coder.unpack(records), rows.numpy())
    expected = torch.frombuffer(bytearray.fromhex(golden["decoded_float32"]), dtype=torch.float32)
    decoded = coder.decode(torch.from_numpy(coder.unpack(records))).features.reshape(-1)
    assert torch.allclose(decoded, expected, rtol=1e-6, atol=1e-6)


def test_channels_are_rotated_up_to_512():
    assert fit(torch.randn(4, 512, 1, 2), 0.01).factors == 0
    wide = fit(torch.randn(4, 528, 1, 2), 0.01)
    assert wide.factors == 2 * FACTORS
    assert wide.get_config()["channels"] == "predicted"
    always = fit(torch.randn(4, 528, 1, 2), PRESETS[ALWAYS_ROTATED], rotated=True)
    assert always.factors == 0
    assert preset_name(always.get_config()) == ALWAYS_ROTATED
    assert preset_name(wide.get_config()) == "transform, noise 0.01"


def golden_content(kind: str) -> dict[str, object]:
    """The fields of a golden file about a codec."""
    coder = golden_codec(kind)
    rows = coder.encode(golden_input([3, 2, 3]), torch.tensor([1, 2**32 - 1]))
    return {
        "config": coder.get_config(),
        "state": state_bytes(coder.state).hex(),
        "rows": [row.numpy().tobytes().hex() for row in rows],
        "records": [record.hex() for record in coder.pack(rows.numpy())],
        "decoded_float32": coder.decode(rows).features.contiguous().numpy().astype("<f4").tobytes().hex(),
    }


def write_golden() -> None:
    """Write the golden file; run by hand, and only together with a new format version."""
    content = {kind: golden_content(kind) for kind in ("rotated", "predicted")}
    (GOLDEN / "codec_transform.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    write_golden()
