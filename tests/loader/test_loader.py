"""The loader: batches compared with records read directly, position, workers, and all errors."""

import io
import itertools
import shutil

import numpy as np
import pytest
import torch
from image_files import folder_tree
from loaders import GLOBAL, MICRO, ORDER, assert_same_batches, make_loader
from PIL import Image
from small_cache import SAMPLES, VIEWS, copy_of_cache, flip_byte, make, shared_cache, shared_weights

from scalekd_cache.caching import make_units as caching
from scalekd_cache.caching import sample_views as drawing
from scalekd_cache.codec.logits import logit_codec_from_config
from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.data.source import open_source
from scalekd_cache.errors import UserError
from scalekd_cache.loader import loader, record_pixels
from scalekd_cache.loader.order import Order, epoch_ids, micro_batch_ids
from scalekd_cache.store.reader import Cache

MICROS = GLOBAL // MICRO
STEPS = SAMPLES // GLOBAL


def test_a_batch_is_the_records_of_its_ids():
    cache = shared_cache()
    labels = {sample.key: sample.label for sample in open_source(DataConfig(max_samples=SAMPLES), "train").samples}
    logit_codec = logit_codec_from_config(cache.manifest.facts.logit_codec)
    batches = list(make_loader(cache))
    assert len(batches) == 2 * STEPS * MICROS
    for number, batch in enumerate(batches):
        epoch, within = divmod(number, STEPS * MICROS)
        step, micro = divmod(within, MICROS)
        ids = micro_batch_ids(ORDER, epoch=epoch, step=step, micro=micro, global_batch=GLOBAL, micro_batch=MICRO)
        assert batch.view == epoch
        assert batch.ids.tolist() == ids.tolist()
        assert batch.images.shape == (MICRO, 3, 64, 64)
        for row, record in enumerate(cache.read(ids, epoch)):
            pixels = np.asarray(Image.open(io.BytesIO(record.pixels)).convert("RGB"))
            assert np.array_equal(batch.images[row].permute(1, 2, 0).numpy(), pixels)
            assert batch.labels[row] == record.label == labels[record.key]
            assert bytes(batch.stored[0].codes[row].numpy()) == record.features
            assert np.array_equal(batch.stored[0].logits[row].numpy(), logit_codec.decode(record.logits))
        assert batch.stored[0].second is None
        stored = batch.stored[0]
        tensors = (batch.images, batch.labels, stored.codes, stored.logits, batch.ids)
        assert [t.dtype for t in tensors] == [torch.uint8, torch.int64, torch.uint8, torch.float32, torch.int64]


def test_an_epoch_holds_every_sample_once_and_reads_view_epoch_mod_views():
    batches = list(make_loader(epochs=5))
    for epoch in range(5):
        mine = batches[epoch * STEPS * MICROS : (epoch + 1) * STEPS * MICROS]
        assert {batch.view for batch in mine} == {epoch % VIEWS}
        ids = torch.cat([batch.ids for batch in mine]).tolist()
        assert ids == epoch_ids(ORDER, epoch, 0, SAMPLES).tolist()
        assert sorted(ids) == list(range(SAMPLES))


def test_worker_processes_change_nothing():
    assert_same_batches(make_loader(), make_loader(workers=2))


def test_ranks_share_the_micro_batches():
    shares = [list(make_loader(rank=rank, world_size=2)) for rank in range(2)]
    assert_same_batches(make_loader(), itertools.chain.from_iterable(zip(*shares, strict=True)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_with_the_next_batch(workers):
    whole = list(make_loader())
    first = make_loader(workers=workers)
    iterator = iter(first)
    seen = [next(iterator) for _ in range(2 * MICROS)]  # two of three steps of the first epoch
    state = first.state_dict()  # right after the last micro-batch of a step
    assert state["step"] == 2
    second = make_loader(workers=2 - workers)
    second.load_state_dict(state)
    assert_same_batches(whole, seen + list(second))
    assert second.state_dict()["step"] == second.total_steps == 2 * STEPS


def test_a_step_counts_with_its_last_micro_batch():
    whole = make_loader()
    steps = [whole.state_dict()["step"] for _ in whole]
    assert steps == [(number + 1) // MICROS for number in range(2 * STEPS * MICROS)]


def test_a_state_of_another_order_is_refused():
    state = make_loader().state_dict()
    for change in ({"seed": 6}, {"block": 16}, {"window": 1}, {"num_samples": 64}):
        other = make_loader(order=Order(**{"num_samples": SAMPLES, "block": 8, "window": 3, "seed": 5, **change}))
        (name,) = change
        with pytest.raises(UserError, match="different sample order") as error:
            other.load_state_dict(state)
        assert f"{name}={change[name]}" in str(error.value)
        assert f"{name}={state[name]}" in str(error.value)
    with pytest.raises(UserError, match="global_batch=16"):
        make_loader(global_batch=16).load_state_dict(state)
    with pytest.raises(UserError, match="fingerprint"):
        make_loader(shared_cache("replayed")).load_state_dict(state)
    make_loader(workers=2, rank=1, world_size=2).load_state_dict(state)  # these do not affect the sample order


@pytest.mark.parametrize("step", [-1, 2 * STEPS + 1, None, "1", 1.5])
def test_a_position_outside_the_run_is_refused(step):
    loader = make_loader()
    with pytest.raises(UserError, match="outside this run"):
        loader.load_state_dict({**loader.state_dict(), "step": step})
    loader.load_state_dict({**loader.state_dict(), "step": 2 * STEPS})
    assert list(loader) == []


def test_pixels_that_are_not_the_teachers_are_reported(monkeypatch):
    cache = shared_cache()
    position = int(epoch_ids(ORDER, 0, 0, 1)[0])
    key = cache.read([position], 0)[0].key

    def drifted(data, size):
        changed = loader_decode(data, size).copy()
        changed[0, 0, 0] ^= 1
        return changed

    loader_decode = record_pixels.decode_pixels
    monkeypatch.setattr(record_pixels, "decode_pixels", drifted)
    with pytest.raises(UserError, match="differ from the teacher's input") as error:
        next(iter(make_loader(cache)))
    assert f"view 0 of {key} " in str(error.value)
    assert f"torch {torch.__version__.partition('+')[0]}" in str(error.value)


def test_digests_are_compared_at_the_start_of_every_session_then_sampled(monkeypatch):
    checked = []
    monkeypatch.setattr(record_pixels, "pixel_digest", lambda array: checked.append(1) or real(array))
    real = drawing.pixel_digest
    resumed = make_loader(epochs=4)
    resumed.load_state_dict({**resumed.state_dict(), "step": STEPS})
    counts = []
    for number, batch in enumerate(resumed, start=STEPS * MICROS):
        turn = number // (STEPS * MICROS) // VIEWS
        sampled = sum((position + turn) % loader.DIGEST_EVERY == 0 for position in batch.ids.tolist())
        counts.append((len(checked), sampled))
        checked.clear()
    at_start, later = counts[: loader.DIGEST_STEPS * MICROS], counts[loader.DIGEST_STEPS * MICROS :]
    assert [done for done, _ in at_start] == [MICRO] * len(at_start)
    assert all(done == sampled for done, sampled in later)
    assert sum(done for done, _ in later) > 0


def test_sampled_digests_reach_every_stored_view_in_turn(monkeypatch):
    checked = set()
    read = loader.verified_pixels

    def noted(pixels_of, record, cache, view, *, check):
        if check:
            checked.add((record.key, view))
        return read(pixels_of, record, cache, view, check=check)

    monkeypatch.setattr(loader, "DIGEST_STEPS", 0)
    monkeypatch.setattr(loader, "verified_pixels", noted)
    for _ in make_loader(epochs=VIEWS * loader.DIGEST_EVERY):
        pass
    assert len(checked) == SAMPLES * VIEWS


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_byte_stops_the_loader_and_names_the_sample(tmp_path, workers):
    root = copy_of_cache(tmp_path / "cache")
    record = Cache.open(root).read([40], 1)[0]
    tar = root / "units" / "g000-r00001" / "v0001.tar"
    flip_byte(tar, tar.read_bytes().index(record.features) + 100)
    seen = []

    def read():
        for batch in make_loader(Cache.open(root), workers=workers):
            seen.append(batch)
            assert batch.view == 0 or 40 not in batch.ids

    with pytest.raises(UserError) as error:
        read()
    assert record.key in str(error.value)
    assert len(seen) >= STEPS * MICROS  # view 0 is intact
    assert "Traceback" not in str(error.value)


def test_a_missing_shard_stops_the_loader(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    (root / "units" / "g000-r00002" / "v0000.tar").unlink()
    with pytest.raises(UserError, match="v0000"):
        list(make_loader(Cache.open(root)))


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    """A replayed cache of a folder of noise images, and every view that the teacher got."""
    folder = tmp_path_factory.mktemp("replayed")
    names = [f"{kind}/{number}.png" for kind in ("ant", "bee") for number in range(20)]
    root = folder_tree(folder / "data", train=names)
    seen = {}
    batches = caching._batches

    def spy(*args):
        for batch, pixels in batches(*args):
            seen.update(
                {(item.sample.key, n): pixels[n, row].clone() for row, item in enumerate(batch) for n in range(VIEWS)}
            )
            yield batch, pixels

    recipe = {
        "pixels": "replayed",
        "flip_probability": 0.5,
        "randaugment_ops": 2,
        "erase_probability": 0.5,
        "interpolation": "bicubic",
    }
    teacher = {"weights": None, "pretrained": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "_batches", spy)
        cache = make(folder / "cache", shared_weights(), data={"source": str(root)}, views=recipe, teacher=teacher)
    return cache, seen, root


REPLAY_ORDER = Order(num_samples=40, block=8, window=2, seed=1)


def replay_loader(cache, **changes):
    return make_loader(cache, order=REPLAY_ORDER, global_batch=16, **changes)


def test_replayed_pixels_are_what_the_teacher_saw(replayed):
    cache, seen, _ = replayed
    assert len(seen) == 40 * VIEWS
    for workers in (0, 2):
        for batch in replay_loader(cache, workers=workers):
            for row, record in enumerate(cache.read(batch.ids.numpy(), batch.view)):
                assert record.pixels == b""
                assert torch.equal(batch.images[row], seen[record.key, batch.view])


def test_a_replayed_image_that_changed_or_went_is_reported(replayed, tmp_path):
    cache, _, root = replayed
    key = cache.read(epoch_ids(REPLAY_ORDER, 0, 0, 1), 0)[0].key
    other = shutil.copytree(root, tmp_path / "data")
    file = other / "train" / f"{key}.png"
    Image.fromarray(np.zeros((9, 12, 3), np.uint8)).save(file)
    with pytest.raises(UserError, match="differ from the teacher's input") as error:
        list(replay_loader(cache, data=str(other)))
    assert f"view 0 of {key} " in str(error.value)
    file.unlink()
    with pytest.raises(UserError, match=f"no sample {key}") as error:
        list(replay_loader(cache, data=str(other)))
    assert str(other) in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resumed", [False, True])
def test_any_replaced_image_is_reported_the_first_time_it_is_used(replayed, tmp_path, workers, resumed):
    """For any position, in a session that starts anywhere, before a batch with it is returned."""
    cache, _, root = replayed
    other = shutil.copytree(root, tmp_path / "data")
    victim = int(epoch_ids(REPLAY_ORDER, 0, 39, 40)[0]) if resumed else int(epoch_ids(REPLAY_ORDER, 1, 33, 34)[0])
    key = cache.read([victim], 0)[0].key
    Image.fromarray(np.full((9, 12, 3), 7, np.uint8)).save(other / "train" / f"{key}.png")
    steps = replay_loader(cache, data=str(other), workers=workers, epochs=4)
    if resumed:
        steps.load_state_dict({**steps.state_dict(), "step": 1})
    used = []
    with pytest.raises(
        UserError, match=f"differ from the teacher's input(.|\n)*of {key} (.|\n)*replaced after stage 1"
    ):
        used.extend(batch.ids.tolist() for batch in steps)
    assert all(victim not in ids for ids in used)
