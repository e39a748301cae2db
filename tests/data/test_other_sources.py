"""The demo set, parquet files, downloads and names."""

import collections
import pickle
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from image_files import (
    PNG,
    encoded,
    folder_tree,
    parquet_file,
    picture,
    source_of,
    write,
)
from small_cache import CPU, options, shared_cache, shared_weights

from scalekd_cache.caching.job import dry_run
from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.data import builtin
from scalekd_cache.data.images import decode_image
from scalekd_cache.data.source import listing_digest, open_source
from scalekd_cache.errors import UserError


def test_demo_splits_are_stratified_disjoint_and_stable():
    train, val = open_source(DataConfig(), "train"), open_source(DataConfig(), "val")
    assert len(train.samples) + len(val.samples) == 1797
    assert not {s.key for s in train.samples} & {s.key for s in val.samples}
    assert train.class_names == val.class_names == tuple("0123456789")
    counts = collections.Counter(s.label for s in val.samples)
    assert all(33 <= counts[label] <= 38 for label in range(10))
    assert listing_digest(train) == listing_digest(open_source(DataConfig(), "train"))
    assert listing_digest(train) != listing_digest(val)


def test_demo_images_are_the_digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    source = open_source(DataConfig(), "val")
    for index in (0, 7, len(source.samples) - 1):
        key, label = source.samples[index]
        number = int(key.removeprefix("digits/"))
        pixels = decode_image(source.read(index), key)
        assert pixels.shape == (64, 64, 3)
        assert label == labels[number]
        small = pixels[..., 0].reshape(8, 8, 8, 8).mean((1, 3)) / 255 * 16
        assert np.corrcoef(small.ravel(), images[number])[0, 1] > 0.97


@pytest.mark.parametrize("struct_column", [True, False])
def test_parquet_in_data_folder(tmp_path, struct_column):
    pytest.importorskip("pyarrow")
    names = ["cat", "dog", "owl"]
    parquet_file(tmp_path / "data/train-0-of-2.parquet", [0, 1, 0, 1, 1], names, struct_column)
    parquet_file(tmp_path / "data/train-1-of-2.parquet", [1, 0, 0], names, struct_column)
    parquet_file(tmp_path / "data/validation-0-of-1.parquet", [1], names, struct_column)
    source, val = source_of(tmp_path), source_of(tmp_path, "val")
    assert source.class_names == val.class_names == ("cat", "dog", "owl")
    assert [s.label for s in source.samples] == [0, 1, 0, 1, 1, 1, 0, 0]
    assert source.samples[5].key == "data/train-1-of-2/0000000"
    for index in (7, 0, 4, 5, 1):
        assert source.read(index) == encoded(picture(index % 5))
    assert source.ranges(4) == [range(0, 4), range(4, 5), range(5, 8)]


def test_parquet_in_split_folders_without_names(tmp_path):
    pytest.importorskip("pyarrow")
    parquet_file(tmp_path / "train/a.parquet", [0, 3], kind="uint8")
    parquet_file(tmp_path / "test/a.parquet", [1])
    assert source_of(tmp_path, "val").class_names == ("0", "1", "2", "3")
    parquet_file(tmp_path / "test/a.parquet", [-1])
    with pytest.raises(UserError, match="outside the class list"):
        source_of(tmp_path, "val")


def test_parquet_errors(tmp_path):
    pytest.importorskip("pyarrow")
    train = tmp_path / "data/train-0.parquet"
    parquet_file(train, [0, 1], ["a", "b"])
    with pytest.raises(UserError, match="no parquet files for the val split"):
        source_of(tmp_path, "val")
    source = source_of(tmp_path)
    parquet_file(train, [0, 1, 0, 1], ["a", "b"], rows=1)
    with pytest.raises(UserError, match="1 row, expected 2"):
        source.read(0)
    parquet_file(tmp_path / "data/val-0.parquet", [0], ["a", "c"])
    with pytest.raises(UserError, match="different class names"):
        source_of(tmp_path, "val")
    parquet_file(train, [0, None])
    with pytest.raises(UserError, match="without a label"):
        source_of(tmp_path)
    parquet_file(train, [0, 1], column="picture")
    with pytest.raises(UserError, match="lacks a valid image or label column"):
        source_of(tmp_path)
    parquet_file(train, [0.0, 1.0], kind="float32")
    with pytest.raises(UserError, match="label: float"):
        source_of(tmp_path)
    train.write_bytes(train.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot read"):
        source_of(tmp_path)


def test_parquet_null_image_is_unreadable_not_a_crash(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (tmp_path / "train").mkdir()
    table = pa.table({"image": [{"bytes": PNG}, {"bytes": None}, None], "label": [0, 0, 0]})
    pq.write_table(table, tmp_path / "train/x.parquet")
    source = source_of(tmp_path)
    assert [len(source.read(index)) for index in range(3)] == [len(PNG), 0, 0]


def path_rows(root, rows, kind="struct"):
    """A dataset of parquet rows (bytes, path)."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = pa.array([{"bytes": data, "path": path} for data, path in rows], struct)
    if kind == "string":
        values = pa.array([path for _, path in rows], pa.string())
    (root / "train").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": values, "label": [0] * len(rows)}), root / "train/x.parquet", row_group_size=2)
    return root


@pytest.mark.parametrize("kind", ["struct", "string"])
@pytest.mark.parametrize("place", ["", "train/", "img/"])
def test_parquet_rows_that_name_a_file(tmp_path, kind, place):
    write(tmp_path / place / "a.png", PNG)
    write(tmp_path / "absolute.png", encoded(picture(1)))
    name = "a.png" if place == "train/" else f"{place}a.png"
    embedded = encoded(picture(2)) if kind == "struct" else None
    path_rows(tmp_path, [(embedded, "a.png"), (None, name), (b"", str(tmp_path / "absolute.png"))], kind)
    if kind == "string" and place == "img/":
        write(tmp_path / "a.png", PNG)
    source = source_of(tmp_path)
    assert [source.read(index) for index in range(3)] == [embedded or PNG, PNG, encoded(picture(1))]
    assert source.ignored == ()


@pytest.mark.parametrize("kind", ["struct", "string"])
def test_parquet_rows_whose_file_is_gone_are_refused_at_opening(tmp_path, kind):
    write(tmp_path / "a.png", PNG)
    path_rows(tmp_path, [(None, "a.png"), (None, "gone.png"), (None, "a.png"), (None, "lost.png")], kind)
    with pytest.raises(
        UserError, match=r"lists image paths that do not exist(?s:.*)column image: 2 of 4 rows; the first is row 1"
    ):
        source_of(tmp_path)
    if kind == "struct":
        path_rows(tmp_path, [(PNG, "gone.png"), (PNG, None), (None, None)])
        assert source_of(tmp_path).ignored == ("ignored: 1 row without an image (neither bytes nor a path)",)


def test_a_broken_optional_package_is_named(tmp_path, monkeypatch):
    """Some packages fail on import with exceptions other than ImportError."""
    write(tmp_path / "data/train/x.parquet", b"PAR1")
    write(tmp_path / "broken/pyarrow/__init__.py", b"raise ValueError('invalid literal for int(): post0')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "broken"))
    with pytest.raises(UserError, match=r"cannot be imported(?s:.*)post0(?s:.*)pyarrow [0-9.]+") as error:
        source_of(tmp_path / "data")
    assert "scalekd-cache[remote]" in str(error.value)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    write(tmp_path / "train/x.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"scalekd-cache\[remote\]"):
        source_of(tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
def test_failed_download_says_what_to_do(tmp_path, monkeypatch, name):
    def fail(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(builtin, "_torchvision_datasets", lambda: SimpleNamespace(CIFAR10=fail, Imagenette=fail))
    with pytest.raises(UserError, match=r"(?s)no route.*train/<class>") as caught:
        source_of(name, download_dir=str(tmp_path / "d"))
    assert "what to do" in str(caught.value)
    assert not list((tmp_path / "d").glob(".tmp*"))


def test_cifar10(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    calls = []

    def load(root, train, download):
        calls.append((train, download))
        if not download and (False, True) not in calls:
            raise RuntimeError("Dataset not found or corrupted")
        return SimpleNamespace(data=pixels, targets=[0, 1, 0, 1, 0, 1], classes=["plane", "car"])

    monkeypatch.setattr(builtin, "_torchvision_datasets", lambda: SimpleNamespace(CIFAR10=load))
    monkeypatch.setattr(builtin, "lock", lambda _, path: calls.append(path.name))
    assert len(source_of("cifar10", "val", download_dir=str(tmp_path)).samples) == 6
    assert calls == [(False, False), ".cifar10.lock", (False, True)]
    (tmp_path / ".cifar10.lock").unlink()
    source = pickle.loads(pickle.dumps(source_of("cifar10", "val", download_dir=str(tmp_path))))  # noqa: S301
    for index, (key, label) in enumerate(source.samples):
        number = int(key.removeprefix("cifar10/"))
        assert label == number % 2
        assert (decode_image(source.read(index), key) == pixels[number]).all()
    assert calls[3:] == [(False, False), (False, False)]  # the second time by the unpickled reader; no lock
    assert not list(tmp_path.iterdir())
    assert source.class_names == ("plane", "car")


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_dry_run_downloads_nothing(tmp_path, capsys, name, shared):
    cache = {"pixels_from": str(shared_cache().root)} if shared else {}
    data = {"source": name, "download_dir": str(tmp_path / "data"), "max_samples": None}
    dry_run(options(tmp_path / "cache", shared_weights(), data=data, cache=cache), CPU)
    assert f"would first download the dataset: {name} is not in" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_imagenette_is_unpacked_once(tmp_path, monkeypatch):
    calls = []

    def download(root, split, size, download):
        calls.append(size)
        folder_tree(Path(root) / "imagenette2-320")

    monkeypatch.setattr(builtin, "_torchvision_datasets", lambda: SimpleNamespace(Imagenette=download))
    for split, count in (("train", 4), ("val", 2)):
        assert len(source_of("imagenette", split, download_dir=str(tmp_path)).samples) == count
    assert calls == ["320px"]


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="no dataset cifar: did you mean cifar10"):
        source_of("cifar")
    with pytest.raises(UserError, match="choose cifar10, demo or imagenette"):
        source_of("/no/such/place")
    for url in ("https://example.org/{0..1}.tar", "pipe:cat x.tar"):
        with pytest.raises(UserError, match="URL"):
            source_of(url)


def test_a_mistyped_folder_names_the_one_beside_it(tmp_path):
    (tmp_path / "imagenet" / "train" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match=f"did you mean {tmp_path / 'imagenet'}") as error:
        open_source(DataConfig(source=str(tmp_path / "imagnet")), "train")
    assert "\n" not in str(error.value)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file: pass a folder"):
        open_source(DataConfig(source=str(tmp_path / "file")), "train")
