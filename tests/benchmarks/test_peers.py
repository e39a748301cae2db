"""The comparisons with other libraries: the parts that run without these libraries, on a few samples."""

import numpy as np
import pytest
from codec_maps import maps
from small_cache import shared_cache

from benchmarks.peers import coders, step
from benchmarks.peers.codecs import at_cosine, measure_codec, measure_coder, noise_of, tokens_of
from benchmarks.peers.formats import FORMATS
from benchmarks.peers.reading import content, outcome
from benchmarks.peers.samples import make_samples
from scalekd_cache.codec import make_codec

INSTALLED = [kind for kind in FORMATS if not set(kind.packages) - {"torch", "webdataset", "zarr"}]
OURS = [kind for kind in INSTALLED if kind.name.startswith("ours")]


def names(items):
    return [item.name for item in items]


@pytest.mark.parametrize("kind", INSTALLED, ids=names(INSTALLED))
def test_a_pass_reads_every_sample_once_as_it_was_written(kind, tmp_path):
    samples = make_samples(5)
    kind.write(tmp_path / "store", samples)
    passes = kind.open(tmp_path / "store")
    for _ in range(2):
        found = {sample.number: content(sample) for sample in passes()}
        assert found == {sample.number: content(sample) for sample in samples}


@pytest.mark.parametrize("damage", ["flip", "cut"])
@pytest.mark.parametrize("kind", OURS, ids=names(OURS))
def test_damage_is_an_error_in_our_stores(kind, damage, tmp_path):
    assert outcome(kind, damage, str(tmp_path)) == "error (UserError)"


def test_a_flipped_byte_of_a_file_goes_unnoticed(tmp_path):
    kind = next(kind for kind in FORMATS if kind.name == "jpg and npy files")
    assert outcome(kind, "flip", str(tmp_path)) == "silent: 1 wrong sample"


@pytest.mark.parametrize(
    ("make", "error"),
    [(coders.float16_zstd, 1e-3), (coders.pca_step_zstd, 0.02), (coders.rotated_4_bits, 0.15), (coders.pca(16), 0.03)],
)
def test_coders_give_back_what_they_encoded(make, error):
    tokens = tokens_of(maps(24))
    coder = make(tokens)
    setting = 0.02 * float(tokens.std()) if coder.settings else 0.0
    decoded = coder.decode(coder.encode(tokens[3], setting), setting)
    assert np.linalg.norm(decoded - tokens[3]) < error * np.linalg.norm(tokens[3])


def test_a_setting_is_found_for_a_cosine():
    views = maps(24)
    coder = coders.pca_step_zstd(tokens_of(views))
    found = at_cosine(lambda setting: measure_coder(coder, views, setting), coder.settings, 0.99)
    assert found.cosine == pytest.approx(0.99, abs=1e-4)
    assert 1 / np.sqrt(1 + noise_of(found.cosine)) == pytest.approx(found.cosine)
    assert found.bytes < measure_codec(make_codec("int8", tuple(views.shape[1:])), views).bytes


def test_the_smallest_arm_takes_a_step():
    arm = next(arm for arm in step.ARMS if arm.name == "linear heads, share 1/4")
    for kind in (None, arm):
        step.own_step(kind, "test_resnet", 8, shared_cache())()
