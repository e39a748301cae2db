"""Cached and live targets, and the effect of their difference on a student's gradient."""

import dataclasses
import json

import pytest
from documented import call
from safetensors.torch import load_file, save_file
from small_cache import CPU, copy_of_cache, make, shared_cache, shared_weights

from pipelines import prove as command
from scalekd_cache.audit.gradients import compare_gradients
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.store.manifest import write_manifest

TRAIN = TrainConfig(global_batch_size=32, micro_batch_size=8)


def prove(root, views=64, **changes):
    config = DistillConfig(cache=str(root), student=StudentConfig(name="test_resnet"), train=TRAIN, **changes)
    return compare_gradients(config, CPU, views)


@pytest.fixture(scope="module")
def proofs(tmp_path_factory):
    """One comparison per codec, with the same views and student."""
    folder = tmp_path_factory.mktemp("proofs")
    found = {"int8": prove(shared_cache().root)}
    for codec in ("float32", "transform-economy"):
        cache = {"codec": codec, "pixels_from": str(shared_cache().root)}
        found[codec] = prove(make(folder / codec, shared_weights(), cache=cache).root)
    return found


def test_float32_is_the_live_teacher(proofs):
    proof = proofs["float32"]
    assert proof.gradient_cosine == pytest.approx(1, abs=1e-9)
    assert proof.micro_batch_cosine == pytest.approx(1, abs=1e-9)
    assert proof.gradient_relative_error < 1e-5
    assert proof.micro_batch_relative_error < 1e-5
    assert proof.noise_ratio < 1e-9
    assert proof.fidelity["logit_kl"]["mean"] < 1e-9
    assert (proof.views, proof.micro_batches, proof.holds) == (64, 8, True)


def test_coarser_codecs_make_more_noise(proofs):
    fine, coarse = proofs["int8"], proofs["transform-economy"]
    assert 0 < fine.gradient_relative_error < coarse.gradient_relative_error < 0.5
    assert 1 > fine.gradient_cosine > coarse.gradient_cosine > 0.9
    assert 0 < fine.noise_ratio < coarse.noise_ratio < 1
    assert fine.noise_ratio_db > coarse.noise_ratio_db > 0
    # unbiased targets: errors average out over micro-batches
    assert coarse.gradient_relative_error < coarse.micro_batch_relative_error
    assert coarse.bias_share < 0.3
    for proof in proofs.values():
        assert proof.fidelity["cosine_mean_removed"]["p1"] == pytest.approx(
            proof.as_cached["cosine_mean_removed"]["p1"], abs=3e-3
        )
        assert proof.fidelity["cosine"]["count"] == 64
        assert "dB below sampling noise" in proof.sentence() or proof.noise_ratio_db is None


def test_targets_of_other_views_do_not_hold(proofs):
    wrong = {**proofs["int8"].fidelity, "cosine_mean_removed": {"mean": 0.6, "p1": 0.5, "count": 64}}
    proof = dataclasses.replace(proofs["int8"], fidelity=wrong, holds=False)
    assert "cached targets do not match" in proof.sentence()


def test_targets_that_were_changed_are_found(tmp_path, monkeypatch):
    """A cache in which each record has its neighbor's features, with valid checksums."""
    from scalekd_cache.codec.int8 import Int8Codec

    encode = Int8Codec.encode_rows
    monkeypatch.setattr(Int8Codec, "encode_rows", lambda self, maps, seeds=None: encode(self, maps.roll(1, 0)))
    cache = make(tmp_path / "cache", shared_weights())
    monkeypatch.undo()
    fidelity = {name: {**row, "p1": 0.999} for name, row in cache.manifest.fidelity.items()}
    write_manifest(cache.root, dataclasses.replace(cache.manifest, fidelity=fidelity))
    proof = prove(cache.root, views=32)
    assert not proof.holds
    assert proof.gradient_cosine < 0.99


def test_another_teacher_is_refused(tmp_path):
    state = load_file(str(shared_weights()))
    state["head.fc.bias"] += 1
    other = tmp_path / "other.safetensors"
    save_file(state, str(other))
    with pytest.raises(UserError, match="not the weights of the cache's teacher"):
        prove(shared_cache().root, teacher_weights=str(other))


def test_damage_is_refused(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    for tar in root.glob("units/*/*.tar"):
        data = bytearray(tar.read_bytes())
        data[::300] = bytes(byte ^ 1 for byte in data[::300])  # something in every record
        tar.write_bytes(bytes(data))
    with pytest.raises(UserError, match="damaged cache"):
        prove(root)
    (root / "manifest.json").unlink()
    with pytest.raises(UserError, match="no manifest"):
        prove(root)


def test_one_micro_batch_says_nothing():
    config = DistillConfig(cache=str(shared_cache().root), train=TRAIN)
    with pytest.raises(UserError, match="from fewer than two micro-batches"):
        compare_gradients(config, CPU, 1)


def test_micro_batches_suit_the_feature_share():
    """12 views would be two micro-batches of 6, of which a quarter is not a whole number."""
    root, quarter = shared_cache().root, ScaleKDConfig(feature_share=0.25)
    assert prove(root, views=16, scalekd=quarter).views == 16
    with pytest.raises(UserError, match=r"(?s)got: 12 views.*at least 16 views.*set --views 16 or more"):
        prove(root, views=12, scalekd=quarter)


def test_the_command_prints_a_sentence_or_json(capsys):
    root = shared_cache().root
    words = ["--cache", str(root), "--student", "test_resnet", "--views", "32"]
    assert call(command, words) == 0
    sentence = capsys.readouterr().out.splitlines()[-1]
    assert call(command, [*words, "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert sentence.startswith(f"{root}: teacher demo_swin re-run on 32 views")
    assert fields["fingerprint"] == shared_cache().manifest.facts.fingerprint
    assert {"torch", "timm", "scalekd_cache"} <= set(fields["versions"])
    assert fields["student"] == "test_resnet"
    with pytest.raises(UserError, match="invalid value for views"):
        call(command, ["--views", "1"])
