"""Datasets without labels: folders, the held-out share, and the effect of a labeled val/ next to them."""

import pickle
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import (
    PNG,
    assert_readable,
    encoded,
    folder_tree,
    parquet_file,
    picture,
    shard,
    source_of,
    tar_bytes,
    write,
)

from scalekd_cache.data import path_list
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
    assert f"ignored: train/ in {tmp_path}/c/imagenet;" in note


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


def test_one_ignored_file_or_name_is_in_the_singular(tmp_path):
    folder = folder_tree(tmp_path, ("ant/1.png", "bee/1.png"), ("ant/1.png",))
    (folder / "train" / ".thumbs").mkdir()
    (folder / "train" / "gone").symlink_to("nowhere")
    (folder / "classes.txt").write_text("cow\n")
    assert [message.partition(", ")[0] for message in source_of(folder).ignored] == [
        "ignored: 1 hidden or system file or folder (1 without suffix)",
        "ignored: 1 broken link or special file (1 without suffix)",
        f"ignored: {folder}/classes.txt",
    ]
    assert "the 2 class folders" in source_of(folder).ignored[-1]


def test_folders_beside_an_unlabeled_train_are_named(tmp_path):
    pictures(folder_tree(tmp_path, ("1.png", "2.png"), ()), ["plane/1.png", "car/1.png"])
    assert source_of(tmp_path).ignored == ("ignored: 2 folders next to train/, such as car/",)


@pytest.mark.parametrize(
    "names",
    [
        ["a/1.png", "a/2.png", "a/.notiz\udce4.doc"],
        ["\udce4/1.png", "\udce5/1.png"],
        ["\udce4/train/1.png", "\udce4/train/2.png"],
        ["train/1.png", "train/2.png", "\udce4/1.png"],
    ],
    ids=["file", "classes", "splits", "beside train"],
)
def test_notes_about_names_that_are_not_utf_8_can_be_printed(tmp_path, names):
    source = source_of(pictures(tmp_path, names))
    assert source.ignored
    assert any(r"\udce4" in message for message in source.ignored)
    assert all(message.encode() for message in source.ignored)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Train/1.png", "2.png"], r"has no train/(?s:.*)what to do: rename Train/ to train/$"),
        (["training/1.png", "testing/1.png"], "rename training/ to train/ and rename testing/ to val/$"),
        (["val/ant/1.png", "x/2.png"], r"put the training images into train/; or, to train on the images in val/ too"),
        (["Test/1.png", "2.png"], r"into train/ and rename Test/ to val/; or, to train on the images in Test/ too"),
        (["train/1.png", "train/2.png", "valid/1.png"], "rename valid/ to val/"),
        (["train/1.png", "train/ant/1.png"], "images outside class folders"),
        (["train/1.png", "train/2.png", "val/1.png", "val/ant/1.png"], "both class folders and images"),
        (["1.png"], r"too few images(?s:.*)1 image without labels"),
        (["x/a.png", "x/a.jpg", "x/a.png.jpg"], "two images have the same sample key"),
        (["\udce4/a.png", "\udce4/a.jpg", "\udce4/a.png.jpg"], r"got: \\udce4/a.png and \\udce4/a.png.jpg"),
    ],
)
def test_folders_that_are_refused(tmp_path, names, message):
    pictures(tmp_path, names)
    with pytest.raises(UserError, match=message):
        source_of(tmp_path, "val")


@pytest.mark.parametrize("name", ["1.HEIC", "x/raw.cr2", "train-00.zip"])
def test_a_folder_without_any_image(tmp_path, name):
    write(tmp_path / name, b"x" * 100)
    with pytest.raises(UserError, match=r"no train/ and no images(?s:.*)ignored: 1 file that is not in a known image"):
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
    with pytest.raises(UserError, match=r"needs class folders in train/(?s:.*)kit"):
        source_of(tmp_path / "b", "val", devkit="kit")


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([0, NO_LABEL, 1, NO_LABEL], 0, r"both labeled and unlabeled images(?s:.*)2 of 4 (?s:.*)position 1"),
        ([0, NO_LABEL, 1, NO_LABEL], 2, r"label -1 at position 1 \(2 such labels\)(?s:.*)unlabeled images"),
        ([NO_LABEL, NO_LABEL], 2, "outside the class list"),
        ([0, 0], 0, "outside the class list"),
        ([-2, -2], 0, "outside the class list"),
    ],
)
def test_a_split_has_labels_or_none(labels, classes, message):
    with pytest.raises(UserError, match=message):
        check_labels(np.array(labels), classes, "the dataset x", "x")
    check_labels(np.full(3, NO_LABEL), 0, "", "")


def tar(path, keys, more=()):
    members = [member for key in keys for member in ((f"{key}.png", PNG), (f"{key}.json", b"{}"))]
    write(path, tar_bytes([*members, *more]))


def without_labels(path, rows, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [encoded(picture(number)) for number in range(rows)]
    pq.write_table(pa.table({"image": images, **columns}), path, row_group_size=4)


def tars(root, split, sizes):
    for number, size in enumerate(sizes):
        tar(root / f"{split}/{number}.tar", [f"{split}{number}-{row}" for row in range(size)])


def parquets(root, split, sizes):
    for number, size in enumerate(sizes):
        without_labels(root / f"{split}/{number}.parquet", size, caption=["a"] * size)


@pytest.mark.parametrize("make", [tars, parquets])
def test_tars_and_parquet_files_without_labels(tmp_path, make):
    make(tmp_path, "train", [25, 1, 20])
    source, val = source_of(tmp_path), source_of(tmp_path, "val")
    for one in (source, val):
        assert_unlabeled(one)
        assert one.held_out == len(val.samples) == 2
    units = source.ranges(100)
    assert [index for unit in units for index in unit] == list(range(44))
    assert {len({keys(source)[index].rpartition("-" if make is tars else "/")[0] for index in u}) for u in units} == {1}
    assert sum(len(source_of(tmp_path, split, max_samples=26).samples) for split in ("train", "val")) == 26
    make(tmp_path, "val", [3])
    assert (len(source_of(tmp_path).samples), source_of(tmp_path).held_out) == (46, 0)
    assert_unlabeled(source_of(tmp_path, "val"))
    assert len(source_of(tmp_path, "val").samples) == 3


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_val_with_labels_beside_train_without(tmp_path, kind):
    if kind == "tar":
        tars(tmp_path, "train", [3])
        shard(tmp_path / "val/0.tar", ["a", "b"], [0, 2])
    else:
        parquets(tmp_path, "train", [3])
        parquet_file(tmp_path / "val/0.parquet", [0, 2])
    assert source_of(tmp_path).class_names == ()
    val = source_of(tmp_path, "val")
    assert val.class_names == ("0", "1", "2")
    assert [sample.label for sample in val.samples] == [0, 2]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_of_a_part_are_refused(tmp_path, kind, split):
    if kind == "tar":
        shard(tmp_path / "train/0.tar", ["a"], [0])
        tar(tmp_path / f"{split}/1.tar", ["bad"])
    else:
        parquet_file(tmp_path / "train/0.parquet", [0])
        without_labels(tmp_path / f"{split}/1.parquet", 2)
    with pytest.raises(UserError, match=f"{'bad(?s:.*)no .cls' if kind == 'tar' else 'no label column'}(?s:.*)/1."):
        source_of(tmp_path, split)


@pytest.mark.parametrize(("typed", "meant"), [("picturs", "pictures"), ("lists.txt", "list.txt"), ("pic", "pictures")])
def test_a_mistyped_folder_or_list_is_found(tmp_path, typed, meant):
    pictures(tmp_path / "pictures", FLAT[:2])
    write(tmp_path / "list.txt", b"pictures/0.png")
    with pytest.raises(UserError, match=f"did you mean {tmp_path}/{meant}"):
        source_of(tmp_path / typed)


def test_what_tars_without_labels_leave_out_is_reported(tmp_path):
    tar(tmp_path / "train/0.tar", ["a", "b"], [("b.seg.png", PNG)])
    write(tmp_path / "train/c.png", PNG)
    write(tmp_path / "classes.txt", b"x\ny\n")
    text = "\n".join(source_of(tmp_path).ignored)
    assert "1 tar member: additional images in samples without a .cls" in text
    assert "1 image next to the tars, such as c.png" in text
    assert "classes.txt with 2 names" in text
    shard(tmp_path / "train/0.tar", ["a"], [0])
    assert source_of(tmp_path).ignored == ()


@pytest.mark.parametrize("column", ["fine_label", "Labels", "target"])
def test_a_parquet_column_that_could_hold_labels_is_not_dropped(tmp_path, column):
    without_labels(tmp_path / "train/0.parquet", 2, **{column: [0, 1]})
    with pytest.raises(UserError, match=f"lacks a valid image or label column(?s:.*){column}: int64"):
        source_of(tmp_path)


def test_a_label_column_without_labels_is_refused(tmp_path):
    without_labels(tmp_path / "train/0.parquet", 2, label=[-1, -1])
    with pytest.raises(UserError, match="label -1 in every row"):
        source_of(tmp_path)


def test_a_list_of_paths(tmp_path):
    pictures(tmp_path / "images", FLAT)
    write(tmp_path / "images/no_suffix", encoded(picture(7)))
    names = [f"images/{name}" for name in FLAT[:-1]]
    lines = [
        "# pictures",
        "",
        *names[:5],
        "  images/../images/no_suffix \r",
        str(tmp_path / "images/39.png"),
        *names[5:],
    ]
    write(tmp_path / "list.txt", b"\xef\xbb\xbf" + "\n".join(lines).encode())
    source, val = source_of(tmp_path / "list.txt"), source_of(tmp_path / "list.txt", "val")
    for one in (source, val):
        assert_unlabeled(one)
        for index, key in enumerate(keys(one)):
            assert (
                one.read(index)
                == (tmp_path / "images" / key.rpartition("/")[2])
                .with_suffix("" if key.endswith("no_suffix") else ".png")
                .read_bytes()
            )
    assert len(source.samples) + len(val.samples) == 41
    assert {"images/no_suffix", f"{tmp_path}/images/39"[1:]} <= {*keys(source), *keys(val)}
    assert describe_source(source).endswith(f"in {tmp_path}/list.txt (39 for training, 2 held out)")
    write(tmp_path / "list.txt", "\n".join(reversed(lines)).encode())
    assert keys(source_of(tmp_path / "list.txt")) == keys(source)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"gone.png", r"line 3 .*(?s:.*)gone\.png: No such file"),
        (b"1.png 0", "line 3 .*(?s:.*)1.png 0: No such file"),
        (b"./0.png", r"line 3 .*(?s:.*)\./0\.png, which is already on line 1"),
        (b"folder", "line 3 .*(?s:.*)folder is a folder"),
        (b"notes.doc", "line 3 .*(?s:.*)not in a known image format"),
        (b"\xff.png", "line 3 .*(?s:.*)can't decode byte(?s:.*)UTF-8"),
        (b"a\0.png", "line 3 .*(?s:.*)null byte"),
        (b"x" * 5000, "line 3 .*(?s:.*)name too long"),
    ],
)
def test_a_wrong_line_of_a_list_is_named(tmp_path, line, message):
    pictures(tmp_path, ["0.png", "1.png", "folder/2.png"])
    write(tmp_path / "notes.doc", b"not an image at all")
    write(tmp_path / "list.txt", b"0.png\n\n" + line + b"\n1.png\n")
    with pytest.raises(UserError, match=message):
        source_of(tmp_path / "list.txt")


def test_lists_of_a_wrong_size(tmp_path, monkeypatch):
    pictures(tmp_path, ["0.png", "1.png", "2.png"])
    write(tmp_path / "list.txt", b"# nothing\n\n")
    with pytest.raises(UserError, match="image list is empty"):
        source_of(tmp_path / "list.txt")
    write(tmp_path / "list.txt", b"0.png\n1.png\n2.png\n")
    monkeypatch.setattr(path_list, "MAX_PATHS", 2)
    with pytest.raises(UserError, match=r"line 3 .*(?s:.*)more than 2 paths"):
        source_of(tmp_path / "list.txt")
    monkeypatch.setattr(path_list, "MAX_LIST_BYTES", 10)
    with pytest.raises(UserError, match="too large"):
        source_of(tmp_path / "list.txt")
    write(tmp_path / "list.csv", b"0.png\n")
    with pytest.raises(UserError, match=r"is a file(?s:.*)a \.txt file with one image path per line"):
        source_of(tmp_path / "list.csv")


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
        f"data: 40 images without labels in {tmp_path}/flat/ (38 for training, 2 held out)"
    )
    folder_tree(tmp_path / "part", ("1.png", "2.png"), ("bee/1.png",))
    assert "2 images without labels" in describe_source(source_of(tmp_path / "part"))
    assert "validation images are separate" in describe_source(source_of(tmp_path / "part"))
    assert describe_source(source_of("demo")).endswith("images of 10 classes in demo")


@pytest.mark.parametrize(("written", "there"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_list_in_another_unicode_form_is_named(tmp_path, written, there):
    """Both names look the same in a message."""
    write(tmp_path / f"{unicodedata.normalize(there, 'ä')}.png", encoded(picture()))
    write(tmp_path / "list.txt", f"{unicodedata.normalize(written, 'ä')}.png\n".encode())
    with pytest.raises(UserError, match=r"line 1 (?s:.*)different Unicode normalization"):
        source_of(tmp_path / "list.txt", "train")
