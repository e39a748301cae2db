"""The decoder for other pipelines: what it returns, from tars and by position; damage; every sample once per epoch."""

import pickle
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sparse_cache
import webdataset as wds
from cache_forms import FORMS, sharing
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from format_reader import read_view
from servers import faulty_server
from small_cache import SAMPLES, copy_of_cache, flip_byte, shared_cache

from scalekd_cache import RecordDecoder
from scalekd_cache.errors import UserError
from scalekd_cache.store.reader import Cache
from scalekd_cache.views.pixels import decode_pixels, pixel_digest


def tars(cache, view):
    return sorted(map(str, Path(cache.root).glob(f"units/*/v{view:04d}.tar")))


def from_tars(cache, view, decoder=None):
    return list(wds.WebDataset(tars(cache, view), shardshuffle=False).map(decoder or RecordDecoder(cache)))


def assert_equal(got, expected):
    got.pop("__key__", None)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert type(got[name]) is type(value)
        if value is not None and name == "logits":  # recomputed logits of one map, and of many
            np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6)
        else:
            assert np.array_equal(got[name], value), name


@pytest.mark.parametrize("form", FORMS)
def test_a_decoded_record_is_what_the_format_says(form):
    cache, view = FORMS[form](), 1
    decoded = RecordDecoder(cache).read(range(len(cache)), view)
    size = cache.manifest.facts.view_recipe["size"]
    for one, stored in zip(decoded, read_view(Path(cache.root), view), strict=True):
        assert (one["key"], one.get("label")) == (stored.key, stored.label)
        assert pixel_digest(np.ascontiguousarray(one["image"].transpose(1, 2, 0))) == stored.digest
        if stored.pixels:
            assert np.array_equal(one["image"].transpose(1, 2, 0), decode_pixels(stored.pixels, size))
        assert (one["features"] is None) == (one["norms"] is None) == (stored.features is None)
        if stored.features is not None:
            np.testing.assert_allclose(one["features"], stored.features, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(one["norms"], stored.norms, rtol=1e-5, atol=1e-5)
        classes = cache.manifest.facts.logit_codec["num_classes"]
        assert ("logits" in one) == (classes > 0)
        if classes and "recomputed" not in form:
            np.testing.assert_array_equal(one["logits"], stored.logits)
        assert ("pooled" in one) == (stored.second is not None)
        if stored.second is not None:
            np.testing.assert_allclose(one["pooled"], stored.second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [form for form in FORMS if "zarr" not in form])
def test_a_webdataset_pipeline_gives_the_same_records(form):
    cache, view = FORMS[form](), 1
    expected = RecordDecoder(cache).read(range(len(cache)), view)
    for got, one in zip(from_tars(cache, view), expected, strict=True):
        assert_equal(got, one)


def test_tars_at_a_url_are_read_by_webdataset_only(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEKD_CACHE_DIR", str(tmp_path))
    with faulty_server(Path(shared_cache().root)) as server:
        pattern = f"{server.url}/units/g000-r{{00000..00002}}/v0001.tar"
        got = list(wds.WebDataset(pattern, shardshuffle=False).map(RecordDecoder(server.url)))
        assert server.gets(".tar") == 3  # once each: the decoder fetches indexes and sidecars
    for one, expected in zip(got, RecordDecoder(shared_cache()).read(range(SAMPLES), 1), strict=True):
        assert_equal(one, expected)


def test_records_without_features_can_be_left_out():
    cache = sparse_cache.finished()
    pipeline = wds.WebDataset(tars(cache, 0), shardshuffle=False).map(RecordDecoder(cache))
    there = list(pipeline.select(lambda one: one["features"] is not None))
    assert len(there) == cache.has_features(np.arange(len(cache)), 0).sum() > 0


def test_the_recomputed_logits_are_those_of_the_teacher():
    recomputed, stored = RecordDecoder(sharing("recomputed")), RecordDecoder(shared_cache())
    for one, other in zip(recomputed.read(range(20), 0), stored.read(range(20), 0), strict=True):
        np.testing.assert_allclose(one["logits"], other["logits"], atol=0.02)


def test_a_decoder_pickles_after_use():
    decoder = RecordDecoder(shared_cache())
    first = from_tars(shared_cache(), 0, decoder)[0]
    data = pickle.dumps(decoder)
    assert len(data) < 100_000
    assert_equal(from_tars(shared_cache(), 0, pickle.loads(data))[0], RecordDecoder(shared_cache()).read([0], 0)[0])  # noqa: S301 - our own bytes
    assert first["key"] == shared_cache().read([0], 0)[0].key


# Every sample once an epoch, over any number of ranks and workers


def keys(decoded):
    return [one["key"] for one in decoded]


EVERYONE = Counter({record.key: 1 for record in shared_cache().read(range(SAMPLES), 0)})


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 2), (3, 1), (1, 3)])
def test_webdataset_gives_every_sample_once(monkeypatch, ranks, workers):
    decoder, seen = RecordDecoder(shared_cache()), Counter()
    for rank in range(ranks):
        for worker in range(workers):
            for name, value in {"RANK": rank, "WORLD_SIZE": ranks, "WORKER": worker, "NUM_WORKERS": workers}.items():
                monkeypatch.setenv(name, str(value))  # webdataset reads these
            part = wds.WebDataset(tars(shared_cache(), 0), shardshuffle=3, nodesplitter=wds.split_by_node, seed=4)
            seen += Counter(keys(part.shuffle(40, seed=rank).map(decoder)))
    assert seen == EVERYONE


def samples(decoder, view, ranges):
    for number in ranges:
        yield from decoder.read(decoder.cache.positions(view, number), view)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 3), (3, 1), (2, 2)])
def test_hugging_face_datasets_give_every_sample_once(ranks, workers):
    whole = {"decoder": RecordDecoder(shared_cache()), "view": 0, "ranges": [0, 1, 2]}
    dataset = IterableDataset.from_generator(samples, gen_kwargs=whole).shuffle(seed=1, buffer_size=20)
    seen = Counter()
    for rank in range(ranks):
        part = split_dataset_by_node(dataset, rank, ranks)
        for worker in range(min(workers, part.num_shards)):
            seen += Counter(keys(part.shard(workers, worker) if workers <= part.num_shards else part))
    assert seen == EVERYONE


# Errors


@pytest.mark.parametrize("member", ["json", "pixels", "features"])
def test_a_flipped_byte_of_a_member_is_an_error(tmp_path, member):
    cache = Cache.open(copy_of_cache(tmp_path / "cache"))
    reader = cache._reader(0, 1)
    at = {"json": 0, "pixels": 1, "features": 2}[member]
    flip_byte(Path(tars(cache, 0)[1]), reader._rows[5][at] + 20)
    whole = from_tars(cache, 1)
    assert len(whole) == SAMPLES
    with pytest.raises(UserError, match=f"(?s)checksum.*v0000.tar, sample '{cache.read([37], 1)[0].key}'"):
        from_tars(cache, 0)


def test_members_of_another_record_are_an_error():
    """Features of another record: each member is whole."""
    first, second, *_ = wds.WebDataset(tars(shared_cache(), 0), shardshuffle=False)
    with pytest.raises(UserError, match="does not match its checksum"):
        RecordDecoder(shared_cache())({**first, "features": second["features"]})


def test_views_under_the_name_of_others_are_an_error(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    first, second = (Path(tars(Cache.open(root), view)[0]) for view in (0, 1))
    decoder = RecordDecoder(root)
    with pytest.raises(UserError, match="does not match its checksum"):
        list(wds.WebDataset(str(first), shardshuffle=False).map(lambda one: decoder({**one, "__url__": str(second)})))


def test_a_tar_that_was_cut_between_members_is_an_error(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    tar = Path(tars(Cache.open(root), 0)[2])
    with tarfile.open(tar) as opened:
        end = opened.getmembers()[30].offset
    with tar.open("r+b") as file:
        file.truncate(end)
    assert len(list(wds.WebDataset(str(tar), shardshuffle=False))) == 10  # webdataset sees no error
    with pytest.raises(UserError, match="truncated"):
        from_tars(Cache.open(root), 0)


def test_a_tar_of_another_cache_is_an_error():
    sparse, small = RecordDecoder(sparse_cache.finished()), shared_cache()
    with pytest.raises(UserError, match=r"not in keys.txt|checksum"):
        from_tars(small, 0, sparse)
    with pytest.raises(UserError, match="does not belong to the cache"):
        from_tars(sparse.cache, 3, RecordDecoder(small))


def test_a_zarr_cache_has_no_tars():
    decoder = RecordDecoder(sparse_cache.finished(backend="zarr"))
    with pytest.raises(UserError, match=r"(?s)it has no tars.*by position"):
        from_tars(shared_cache(), 0, decoder)


def without(sample, name):
    return {key: value for key, value in sample.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: {**one, "json": {"label": 3}}, "(?s)got: json: dict.*decode"),
        (lambda one: without(one, "features"), "(?s)features.*the bytes of the member"),
        (lambda one: without(one, "__url__"), "which shard"),
        (lambda one: {**one, "__url__": "elsewhere/v0000.tar"}, "which shard"),
        (lambda one: {**one, "__key__": "digits/none"}, "not in keys.txt"),
        (lambda one: without(one, "jpg"), "checksum"),
        (lambda one: {**one, "features": one["features"] + b"x"}, "checksum"),
        (lambda one: {**one, "json": one["json"].replace(b'"flags":7', b'"flags":3')}, "checksum"),
    ],
)  # fmt: skip
def test_samples_that_webdataset_did_not_read(change, message):
    sample = next(iter(wds.WebDataset(tars(shared_cache(), 0), shardshuffle=False)))
    with pytest.raises(UserError, match=message):
        RecordDecoder(shared_cache())(change(sample))


def test_what_a_decoder_needs(tmp_path):
    with pytest.raises(UserError, match="is not a cache"):
        RecordDecoder(tmp_path)
    with pytest.raises(UserError, match="does not share the pixels"):
        RecordDecoder(shared_cache(), pixels_from=str(tmp_path))
    alone = tmp_path / "alone"
    shutil.copytree(sharing("top_k").root, alone)
    with pytest.raises(UserError, match="stores the shared pixels is missing"):
        RecordDecoder(alone)
    assert_equal(
        RecordDecoder(alone, pixels_from=str(shared_cache().root)).read([7], 0)[0],
        RecordDecoder(sharing("top_k")).read([7], 0)[0],
    )
