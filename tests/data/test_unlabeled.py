"""Data sets without labels: folders, the held-out share, and what a labeled val/ beside them means."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import assert_readable, encoded, folder_tree, picture, source_of, write

from scalekd_cache.data.base import ListedSource, SampleList, canonical_order, check_labels
from scalekd_cache.data.held_out import divide
from scalekd_cache.data.source import data_facts, describe_source
from scalekd_cache.errors import UserError
from scalekd_cache.store.base import NO_LABEL


def pictures(root, names):
    for number, name in enumerate(names):
        write(root / name, encoded(picture(number)))
    return root


def keys(source):
    return [sample.key for sample in source.samples]


def assert_unlabeled(source):
    assert source.class_names == ()
    assert set(source.samples.labels.tolist()) == {NO_LABEL}
    assert_readable(source)


FLAT = [f"{number}.png" for number in range(40)]
NESTED = [f"{place}/{number}.png" for place in ("rome", "oslo/2024") for number in range(20)]


@pytest.mark.parametrize("names", [FLAT, NESTED, [*FLAT[:3], "rome/1.png"]])
def test_all_images_below_a_folder_without_train(tmp_path, names):
    source, val = source_of(pictures(tmp_path, names)), source_of(tmp_path, "val")
    assert_unlabeled(source)
    assert_unlabeled(val)
    assert sorted(keys(source) + keys(val)) == sorted(name.removesuffix(".png") for name in names)
    assert len(val.samples) == max(1, len(names) // 20) == source.held_out == val.held_out
    for one in (source, val):
        assert keys(one) == [keys(one)[index] for index in canonical_order(keys(one))]
        for index, key in enumerate(keys(one)):
            assert one.read(index) == (tmp_path / f"{key}.png").read_bytes()
    assert data_facts(source)["samples"] == len(source.samples)


def test_the_folders_of_pictures_could_be_classes(tmp_path):
    (note,) = source_of(pictures(tmp_path / "a", NESTED)).ignored
    assert "the names of 2 folders, such as oslo/" in note
    assert "train/<class>/" in note
    assert source_of(pictures(tmp_path / "b", [*NESTED, "1.png"])).ignored == ()
    (note,) = source_of(folder_tree(tmp_path / "c/imagenet").parent).ignored
    assert f"that {tmp_path}/c/imagenet has a train/" in note


@pytest.mark.parametrize("val", [(), ("1.png", "2.png"), ("ant/1.png", "bee/1.png", "bee/2.png")])
def test_train_with_only_images(tmp_path, val):
    source = source_of(folder_tree(tmp_path, [f"{number}.png" for number in range(30)], val))
    assert_unlabeled(source)
    held_out = source_of(tmp_path, "val")
    assert_readable(held_out)
    assert held_out.held_out == source.held_out == (0 if val else 1)
    assert len(source.samples) == (30 if val else 29)
    assert len(held_out.samples) == (len(val) or 1)
    labeled = len(val) == 3
    assert held_out.class_names == (("ant", "bee") if labeled else ())
    assert {s.key: s.label for s in held_out.samples} == (
        {"ant/1": 0, "bee/1": 1, "bee/2": 1} if labeled else dict.fromkeys(keys(held_out), NO_LABEL)
    )


def test_folders_beside_an_unlabeled_train_are_named(tmp_path):
    pictures(folder_tree(tmp_path, ("1.png", "2.png"), ()), ["plane/1.png", "car/1.png"])
    assert source_of(tmp_path).ignored == ("ignored: 2 folders beside train/, such as car/",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Train/1.png", "2.png"], r"has no train/(?s:.*)what to do: rename Train/ to train/$"),
        (["training/1.png", "testing/1.png"], "rename training/ to train/ and rename testing/ to val/$"),
        (["val/ant/1.png", "x/2.png"], r"put the training images into train/; or, to train on the images of val/ too"),
        (["Test/1.png", "2.png"], r"into train/ and rename Test/ to val/; or, to train on the images of Test/ too"),
        (["train/1.png", "train/2.png", "valid/1.png"], "rename valid/ to val/"),
        (["train/1.png", "train/ant/1.png"], "images outside of class folders"),
        (["train/1.png", "train/2.png", "val/1.png", "val/ant/1.png"], "both class folders and images"),
        (["1.png"], r"too few images(?s:.*)1 images without labels"),
        (["x/a.png", "x/a.jpg", "x/a.png.jpg"], "two images have the same sample key"),
    ],
)
def test_folders_that_are_refused(tmp_path, names, message):
    pictures(tmp_path, names)
    with pytest.raises(UserError, match=message):
        source_of(tmp_path, "val")


@pytest.mark.parametrize("name", ["1.HEIC", "x/raw.cr2", "train-00.zip"])
def test_a_folder_without_any_image(tmp_path, name):
    write(tmp_path / name, b"x" * 100)
    with pytest.raises(UserError, match=r"no train/ and no images(?s:.*)ignored: 1 files that are not images"):
        source_of(tmp_path)


def test_hidden_and_split_like_files_are_no_images(tmp_path):
    pictures(tmp_path, ["1.png", "2.png", ".git/x.png"])
    write(tmp_path / "test", b"x")
    assert len(source_of(tmp_path).samples) == 1
    assert len(source_of(tmp_path).ignored) == 2


def test_the_order_of_classes_needs_labels(tmp_path):
    for split in ("train", "val"):
        with pytest.raises(UserError, match="the images have no labels"):
            source_of(pictures(tmp_path, FLAT[:3]), split, classes="natural")
    folder_tree(tmp_path / "b", ("1.png", "2.png"), ("bee/1.png",))
    with pytest.raises(UserError, match=r"train/ has no class folders(?s:.*)kit"):
        source_of(tmp_path / "b", "val", devkit="kit")


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([0, NO_LABEL, 1, NO_LABEL], 0, r"images without one(?s:.*)2 of 4 (?s:.*)position 1"),
        ([0, NO_LABEL, 1, NO_LABEL], 2, r"label -1 at position 1 \(2 such labels\)(?s:.*)images without a label"),
        ([NO_LABEL, NO_LABEL], 2, "outside the class list"),
        ([0, 0], 0, "outside the class list"),
        ([-2, -2], 0, "outside the class list"),
    ],
)
def test_a_split_has_labels_or_none(labels, classes, message):
    with pytest.raises(UserError, match=message):
        check_labels(np.array(labels), classes, "the data set x", "x")
    check_labels(np.full(3, NO_LABEL), 0, "", "")


class Echo:
    def __init__(self, names):
        self.names = names

    def __call__(self, index):
        return self.names[index].encode()


def listed(names, file_sizes=None):
    starts = None if file_sizes is None else np.cumsum([0, *file_sizes[:-1]])
    labels = [NO_LABEL] * len(names)
    return ListedSource(
        name="x", class_names=(), samples=SampleList(names, labels), reader=Echo(names), file_starts=starts,
        held_out=None,
    )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_held_out_share_is_a_partition_that_depends_on_the_keys_only(sizes, random):
    total = sum(sizes)
    names = [f"k{number}" for number in range(total)]
    if total < 2:
        return
    source = listed(names, sizes)
    train, val = divide(source, "train"), divide(source, "val")
    assert len(val.samples) == max(1, total // 20) == train.held_out
    assert sorted(keys(train) + keys(val)) == sorted(names)
    owner = {name: number for number, size in enumerate(sizes) for name in names[sum(sizes[:number]) :][:size]}
    for part in (train, val):
        assert keys(part) == sorted(keys(part), key=names.index)
        assert [part.read(index).decode() for index in range(len(part.samples))] == keys(part)
        assert pickle.loads(pickle.dumps(part.reader))(0) == part.read(0)  # noqa: S301
        units = part.ranges(7)
        assert [index for unit in units for index in unit] == list(range(len(part.samples)))
        assert all(len({owner[keys(part)[index]] for index in unit}) == 1 for unit in units)
        assert divide(part, "train") is part
    random.shuffle(names)
    assert set(keys(divide(listed(names), "val"))) == set(keys(val))


def test_the_held_out_share_of_a_large_data_set_has_a_limit():
    source = listed([str(number) for number in range(100_400)])
    assert len(divide(source, "val").samples) == 5_000
    assert len(divide(source, "train").samples) == 95_400


def test_max_samples_counts_both_splits(tmp_path):
    pictures(tmp_path, FLAT)
    train, val = (source_of(tmp_path, split, max_samples=30) for split in ("train", "val"))
    assert len(train.samples) + len(val.samples) == 30
    assert not {*keys(train)} & {*keys(val)}


def test_describe_source(tmp_path):
    pictures(tmp_path / "flat", FLAT)
    assert describe_source(source_of(tmp_path / "flat")) == (
        f"data: 40 images without labels below {tmp_path}/flat/ (38 for training, 2 held out)"
    )
    folder_tree(tmp_path / "part", ("1.png", "2.png"), ("bee/1.png",))
    assert "2 images without labels" in describe_source(source_of(tmp_path / "part"))
    assert "validation images are separate" in describe_source(source_of(tmp_path / "part"))
    assert describe_source(source_of("demo")).endswith("images of 10 classes in demo")
