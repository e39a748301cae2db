"""The order of the classes: named orders, lists in files, names in two Unicode forms, labels without names."""

import os

import numpy as np
import pytest
from image_files import encoded, folder_tree, parquet_file, picture, shard, source_of, write
from timm.utils import natural_key as natural_key_of_timm

from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.data.base import ListedSource, SampleList
from scalekd_cache.data.classes import ORDERS, check_classes, natural_key
from scalekd_cache.data.source import open_source
from scalekd_cache.errors import UserError

FOLDERS = ("Zebra", "ant", "n10", "n2")


def tree(root, names=FOLDERS, val=None):
    return folder_tree(root, [f"{name}/1.png" for name in names], [f"{name}/9.png" for name in val or names])


def classes_of_keys(source):
    return {sample.key.partition("/")[0]: source.class_names[sample.label] for sample in source.samples}


def test_natural_order_is_that_of_timm():
    names = [*FOLDERS, "N3", "007", "7", "a1b20", "a1b3", ""]
    assert sorted(names, key=natural_key) == sorted(names, key=natural_key_of_timm)
    assert natural_key("x²")  # timm's key fails here: a digit that int() rejects


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (None, ("Zebra", "ant", "n10", "n2")),
        ("sorted", ("Zebra", "ant", "n10", "n2")),
        ("natural", ("ant", "n2", "n10", "Zebra")),
        ("caseless", ("ant", "n10", "n2", "Zebra")),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_named_orders_keep_the_class_of_every_image(tmp_path, order, expected, split):
    source = source_of(tree(tmp_path), split, classes=order)
    assert source.class_names == expected
    assert classes_of_keys(source) == {name: name for name in FOLDERS}


def test_a_list_of_class_names_orders_folders(tmp_path):
    listed = write_list(tmp_path / "mine.txt", ["n2", "Zebra", "n10", "ant"])
    source = source_of(tree(tmp_path / "data"), classes=str(listed))
    assert source.class_names == ("n2", "Zebra", "n10", "ant")
    assert classes_of_keys(source) == {name: name for name in FOLDERS}
    write_list(tmp_path / "data/classes.txt", ["n10", "n2", "ant", "Zebra"])  # found automatically
    assert source_of(tmp_path / "data", "val").class_names == ("n10", "n2", "ant", "Zebra")
    assert source_of(tmp_path / "data", classes="natural").class_names[0] == "ant"


def test_a_list_of_other_names_beside_folders_is_named(tmp_path):
    write_list(tree(tmp_path) / "classes.txt", ["1 ant", "2 bee"])
    source = source_of(tmp_path)
    assert source.class_names == FOLDERS
    assert "classes.txt, which does not list the 4 class folders" in " ".join(source.ignored)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["n2", "Zebra", "n10"], r"not in the list: 1 class in the dataset \(ant\)"),
        (["n2", "Zebra", "n10", "aunt"], r"not in the dataset: 1 listed name \(aunt; did you mean ant\?\)"),
        (["n2", "Zebra", "n10", "ant", "ant"], "ant is listed more than once"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        source_of(tree(tmp_path / "data"), classes=str(write_list(tmp_path / "mine.txt", names)))


def test_a_list_that_cannot_be_read_is_refused(tmp_path):
    tree(tmp_path / "data")
    with pytest.raises(UserError, match="list of class names is missing"):
        source_of(tmp_path / "data", classes=str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="list of class names is not a regular file"):
        source_of(tmp_path / "data", classes=str(tmp_path / "data"))
    write(tmp_path / "latin.txt", "Z\xfcrich".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8, one name per line"):
        source_of(tmp_path / "data", classes=str(tmp_path / "latin.txt"))


def test_numbered_classes_of_tars_and_parquet_in_another_order(tmp_path):
    pytest.importorskip("pyarrow")
    labels = [0, 1, 2, 10, 10]
    shard(tmp_path / "tars/train/0.tar", ["a", "b", "c", "d", "e"], labels)
    parquet_file(tmp_path / "pq/train/x.parquet", labels)
    for root in (tmp_path / "tars", tmp_path / "pq"):
        plain, text = source_of(root), source_of(root, classes="sorted")
        assert text.class_names[:4] == ("0", "1", "10", "2")
        assert [text.class_names[s.label] for s in text.samples] == [str(label) for label in labels]
        assert [s.label for s in plain.samples] == labels
        names = write_list(tmp_path / "names.txt", [f"name {number}" for number in range(11)])
        named = source_of(root, classes=str(names))
        assert [s.label for s in named.samples] == labels
        assert named.class_names[10] == "name 10"


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(("train", "val"), [(NFC, NFD), (NFD, NFC)])
def test_names_in_two_unicode_forms_are_one_class(tmp_path, train, val):
    source = source_of(tree(tmp_path, (train, "dog"), (val, "dog")), "val")
    assert source.class_names == (train, "dog")
    assert sorted(s.label for s in source.samples) == [0, 1]
    listed = write_list(tmp_path / "mine.txt", ["dog", val])
    assert source_of(tmp_path, classes=str(listed)).class_names == ("dog", train)


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_class_in_two_unicode_forms_is_refused(tmp_path, split):
    tree(tmp_path, (NFC, "dog"))
    write(tmp_path / split / NFD / "1.png", encoded(picture()))
    with pytest.raises(UserError, match=r"Unicode normalization \(NFC and NFD\)"):
        source_of(tmp_path, split)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_folder_that_is_not_utf_8_is_refused(tmp_path, split):
    tree(tmp_path, ("cat", "dog"))
    write(tmp_path / split / "z\udcff" / "1.png", encoded(picture()))
    with pytest.raises(UserError, match=r"class folder is not UTF-8\n  got: 'z\\udcff'"):
        source_of(tmp_path, split)


@pytest.mark.parametrize("name", ["pictures", "list.txt"])
def test_a_data_set_that_is_a_fifo(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="neither a folder nor a regular file"):
        source_of(tmp_path / name)


def test_a_data_set_named_in_the_other_unicode_form(tmp_path):
    tree(tmp_path / NFD)
    with pytest.raises(UserError, match="different Unicode normalization"):
        source_of(tmp_path / NFC)


@pytest.mark.parametrize("label", [20_000_000, 100_000, 2**31 - 1])
def test_labels_that_are_ids_are_refused(tmp_path, label):
    pytest.importorskip("pyarrow")
    shard(tmp_path / "tars/train/0.tar", ["a", "b"], [label, 0])
    parquet_file(tmp_path / "pq/train/x.parquet", [0, label])
    for root in (tmp_path / "tars", tmp_path / "pq"):
        with pytest.raises(UserError, match="larger than the maximum class index") as error:
            source_of(root)
        assert f"label {label} at position" in str(error.value)


@pytest.mark.parametrize("label", [-1, -100, 2])
def test_no_source_has_labels_outside_its_classes(label):
    samples = SampleList(["a", "b"], np.array([0, label]))
    with pytest.raises(UserError, match=f"(?s)outside the class list.*label {label} at position 1"):
        ListedSource(name="mine", class_names=("x", "y"), samples=samples, reader=lambda _: b"")


def test_the_demo_in_another_order():
    source = open_source(DataConfig(classes="natural"), "val")
    assert source.class_names == tuple("0123456789")
    assert set(ORDERS) == {"sorted", "natural", "caseless"}


def write_list(path, names):
    write(path, "".join(f"{name}\n" for name in names).encode())
    return path


@pytest.mark.parametrize(
    ("expected", "count", "text"),
    [
        (sorted(FOLDERS), 4, None),
        (["n10", "n2", "Zebra", "ant"], 4, "classes in a different order"),
        (["Zebra", "ant", "n10"], 3, "different classes"),
        ([*sorted(FOLDERS), "x"], 5, "different classes"),
        (["Zebra", "ant", "n1", "n2"], 4, "different classes"),
        ([], 4, None),  # unknown names
        ([], 5, "different classes"),
        (["0", "1", "2", "3"], 4, None),  # of tars or parquet without names
        (["0", "1", "2"], 3, "different classes"),
    ],
)
def test_images_of_other_classes_are_not_for_this_model(tmp_path, expected, count, text):
    source = source_of(tree(tmp_path), "val")
    if text is None:
        check_classes(source, expected, count)
        return
    with pytest.raises(UserError, match=text):
        check_classes(source, expected, count)


def test_numbered_classes_in_another_order_or_unicode_form(tmp_path):
    numbers = [str(number) for number in range(11)]
    with pytest.raises(UserError, match="a different order"):
        check_classes(source_of(tree(tmp_path / "a", numbers), "val"), numbers, 11)  # folders: 0, 1, 10, 2, ...
    check_classes(source_of(tree(tmp_path / "b", (NFC, "x")), "val"), (NFD, "x"), 2)
    with pytest.raises(UserError, match="no labels"):
        check_classes(source_of(folder_tree(tmp_path / "c", ["1.png", "2.png"], ["3.png"]), "val"), "ab", 2)
