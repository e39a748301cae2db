"""Sources read real files on disk, and the decoder either gives the whole image or says why not."""

import collections
import hashlib
import io
import json
import multiprocessing
import pickle
import struct
import sys
import tarfile
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
from PIL import Image, ImageFile

from scalekd_cache.config import DataConfig
from scalekd_cache.errors import UserError
from scalekd_cache.images import SampleRef, UnreadableImage, decode_image, listing_digest, open_source
from scalekd_cache.sources import builtin
from scalekd_cache.sources.base import encode_key
from scalekd_cache.sources.patterns import expand_braces


def picture(number=0, size=(12, 9)):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def folder_tree(root, train=("ant/1.png", "ant/2.png", "bee/1.png", "bee/sub/x.png"), val=("ant/9.png", "bee/9.png")):
    for split, names in (("train", train), ("val", val)):
        for number, name in enumerate(names):
            write(root / split / name, encoded(picture(number)))
    return root


def tar_bytes(members, end=True, kind=tarfile.USTAR_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        members_end = tar.offset
    return buffer.getvalue() if end else buffer.getvalue()[:members_end]


def shard(path, keys, labels, **options):
    members = []
    for key, label in zip(keys, labels):
        members += [(f"{key}.png", encoded(picture(label))), (f"{key}.cls", b"%d\n" % label)]
    write(path, tar_bytes(members, **options))


def config(source, **options):
    return DataConfig(source=str(source), **options)


def source_of(root, split="train", **options):
    return open_source(config(root, **options), split)


def assert_readable(source):
    for index in range(len(source.samples)):
        assert decode_image(source.read(index), "k").ndim == 3
    with pytest.raises(IndexError):
        source.read(len(source.samples))


# ---------------------------------------------------------------- demo


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


# ---------------------------------------------------------------- order, ranges, digest, pickling


def test_order_is_a_permutation_keyed_by_group():
    source = open_source(DataConfig(max_samples=300), "train")
    assert source.order(0).tolist() == list(range(300))
    orders = [source.order(group) for group in (1, 2)]
    for order in orders:
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(300))
    assert orders[0].tolist() != orders[1].tolist()
    smaller = open_source(DataConfig(max_samples=100), "train")
    position = {source.samples[i].key: rank for rank, i in enumerate(orders[0])}
    ranks = [position[smaller.samples[i].key] for i in smaller.order(1)]
    assert ranks == sorted(ranks)  # the order of two samples depends on their keys alone


def test_max_samples_takes_the_first_of_the_canonical_order():
    whole, part = open_source(DataConfig(), "train"), open_source(DataConfig(max_samples=10), "train")
    assert list(part.samples) == whole.samples[:10]
    assert part.read(3) == whole.read(3)
    assert len(open_source(DataConfig(max_samples=10**6), "train").samples) == len(whole.samples)


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_ranges_cover_everything_once(size):
    source = open_source(DataConfig(max_samples=100), "train")
    ranges = source.ranges(size)
    assert [i for r in ranges for i in r] == list(range(100))
    assert max(map(len, ranges)) <= size


def test_listing_digest_is_sha256_over_keys_and_labels(tmp_path):
    source = source_of(folder_tree(tmp_path))
    text = "".join(f"{key}\0{label}\n" for key, label in source.samples)
    assert listing_digest(source) == hashlib.sha256(text.encode()).hexdigest()


def test_sources_pickle_small_and_read_in_a_spawned_process(tmp_path):
    pytest.importorskip("pyarrow")
    folder_tree(tmp_path / "folder")
    shard(tmp_path / "tars/train/0.tar", ["a", "b"], [0, 1])
    parquet_file(tmp_path / "pq/data/train-0.parquet", [0, 1, 1])
    sources = [open_source(DataConfig(max_samples=50), "train")]
    sources += [source_of(tmp_path / kind) for kind in ("folder", "tars", "pq")]
    expected = [source.read(1) for source in sources]  # readers are warm now: nothing of that may travel
    assert all(len(pickle.dumps(source)) < 200_000 for source in sources)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert [pool.apply(source.read, (1,)) for source in sources] == expected
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert [pool.apply(source.read, (1,)) for source in sources] == expected


# ---------------------------------------------------------------- keys


def test_encode_key():
    assert encode_key("a b/c.d/é%") == "a%20b/c%2Ed/%C3%A9%25"
    assert encode_key("./x//y") == "x/y"
    assert encode_key("../x") == "%2E%2E/x"
    assert encode_key("__meta__/_y") == "%5F_meta__/_y"


def test_folder_keys(tmp_path):
    names = ("ant/a b.png", "ant/v1.0.jpg.png", "ant/same.png", "ant/same.jpeg", "ant/UP.JPEG", "ant/tab\there.webp")
    source = source_of(folder_tree(tmp_path, train=names))
    assert sorted(s.key for s in source.samples) == sorted(
        ["ant/a%20b", "ant/v1%2E0%2Ejpg", "ant/same%2Epng", "ant/same%2Ejpeg", "ant/UP", "ant/tab%09here"]
    )


def test_colliding_keys_are_an_error(tmp_path):
    folder_tree(tmp_path, train=("ant/x.jpg.png", "ant/x.jpg", "ant/x.png"))
    with pytest.raises(UserError, match="same sample key"):
        source_of(tmp_path)


def test_file_names_that_are_not_utf8(tmp_path):
    folder_tree(tmp_path)
    (tmp_path / "train/ant/1.png").rename(str(tmp_path / "train/ant/") + "/\udcff.png")
    source = source_of(tmp_path)
    assert "ant/%FF" in {s.key for s in source.samples}
    assert_readable(source)


# ---------------------------------------------------------------- image folder


def test_folder_labels_order_and_bytes(tmp_path):
    root = folder_tree(tmp_path)
    write(root / "train/ant/._1.png", b"junk")
    write(root / "train/ant/notes.txt", b"junk")
    source, val = source_of(root), source_of(root, "val")
    assert source.class_names == val.class_names == ("ant", "bee")
    assert {s.key: s.label for s in source.samples} == {"ant/1": 0, "ant/2": 0, "bee/1": 1, "bee/sub/x": 1}
    assert [s.label for s in sorted(val.samples)] == [0, 1]
    keys = [s.key for s in source.samples]
    keyed = {k: hashlib.blake2b(k.encode(), digest_size=8, key=b"scalekd-cache canonical order") for k in keys}
    assert keys == sorted(keys, key=lambda k: int.from_bytes(keyed[k].digest(), "little"))
    for index, sample in enumerate(source.samples):
        assert source.read(index) == (root / "train" / f"{sample.key}.png").read_bytes()
    assert isinstance(source.samples[0], SampleRef)
    assert source.samples[-1] == source.samples[len(keys) - 1]


def test_folder_follows_links_and_refuses_loops(tmp_path):
    root = folder_tree(tmp_path / "data")
    write(tmp_path / "elsewhere/7.png", encoded(picture()))
    (root / "train/cat").symlink_to(tmp_path / "elsewhere")
    assert "cat/7" in {s.key for s in source_of(root).samples}
    (root / "train/bee/loop").symlink_to(root / "train/bee")
    with pytest.raises(UserError, match="link leads back"):
        source_of(root)


def break_nothing_there(root):
    (root / "train").rename(root / "training")


def break_empty_class(root):
    (root / "train/cat").mkdir()


def break_no_classes(root):
    for path in sorted((root / "train").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def break_stray(root):
    write(root / "train/stray.jpg", b"x")


def break_link(root):
    (root / "train/ant/3.png").symlink_to(root / "gone")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing_there, "has no train/"),
        (break_empty_class, "empty class folders"),
        (break_no_classes, "no class folders"),
        (break_stray, "outside of class folders"),
        (break_link, "not a file"),
    ],
)
def test_damaged_train_folder(tmp_path, damage, message):
    damage(folder_tree(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        source_of(tmp_path)
    assert "what to do:" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_missing_train_says_what_is_there_instead(tmp_path):
    break_nothing_there(folder_tree(tmp_path))
    with pytest.raises(UserError, match="training, val"):
        source_of(tmp_path)


def test_folder_without_val(tmp_path):
    folder_tree(tmp_path, val=())
    assert len(source_of(tmp_path).samples) == 4
    with pytest.raises(UserError, match="no val/"):
        source_of(tmp_path, "val")


def test_val_class_unknown_to_train(tmp_path):
    folder_tree(tmp_path, val=("ant/1.png", "beee/1.png"))
    with pytest.raises(UserError, match=r"(?s)beee.*such as bee"):
        source_of(tmp_path, "val")


def test_image_removed_after_listing(tmp_path):
    source = source_of(folder_tree(tmp_path))
    (tmp_path / "train" / f"{source.samples[0].key}.png").unlink()
    with pytest.raises(UserError, match=source.samples[0].key):
        source.read(0)


# ---------------------------------------------------------------- ImageNet's flat val/


def devkit(folder, truth, synsets=((1, "n02", 0), (2, "n01", 0), (3, "n00", 2), (4, "n03", 0))):
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O"),
             ("children", "O"), ("wordnet_height", "O"), ("num_train_images", "O")]  # fmt: skip
    rows = np.zeros((len(synsets), 1), dtype=kinds)
    for row, (number, wnid, children) in enumerate(synsets):
        below = np.arange(1, children + 1, dtype=np.uint8).reshape(1, -1)
        rows[row, 0] = (number, wnid, f"thing {wnid}", "a thing", children, below, 0, 1300)
    (folder / "data").mkdir(parents=True)
    scipy.io.savemat(folder / "data/meta.mat", {"synsets": rows})
    lines = "".join(f"{n}\n" for n in truth)
    (folder / "data/ILSVRC2012_validation_ground_truth.txt").write_text(lines)


def imagenet_tree(root, numbers=(1, 2, 4)):
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in numbers]
    return folder_tree(root, train=("n01/a.JPEG", "n02/a.JPEG", "n03/a.JPEG"), val=names)


@pytest.mark.parametrize("beside", [True, False])
def test_flat_val_takes_labels_from_the_devkit(tmp_path, beside):
    root = imagenet_tree(tmp_path / "in1k")
    place = root / "ILSVRC2012_devkit_t12" if beside else tmp_path / "kit"
    devkit(place, [1, 2, 1, 4])
    source = source_of(root, "val", devkit=None if beside else str(place))
    found = {s.key: source.class_names[s.label] for s in source.samples}
    stem = "ILSVRC2012_val_0000000"
    assert found == {f"{stem}1": "n02", f"{stem}2": "n01", f"{stem}4": "n03"}
    assert_readable(source)


def test_flat_val_errors(tmp_path):
    root = imagenet_tree(tmp_path)
    with pytest.raises(UserError, match="devkit that would label"):
        source_of(root, "val")
    kit = root / "ILSVRC2012_devkit_t12"
    devkit(kit, [1, 2, 1])
    with pytest.raises(UserError, match="no line in the ground truth"):
        source_of(root, "val")
    truth = kit / "data/ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n2\n1\n3\n")  # 3 has children: not a class
    with pytest.raises(UserError, match="id 3, not in meta.mat"):
        source_of(root, "val")
    truth.write_text("1\nx\n")
    with pytest.raises(UserError, match="ground truth cannot be read"):
        source_of(root, "val")
    (kit / "data/meta.mat").write_bytes(b"MATLAB" * 40)
    with pytest.raises(UserError, match=r"meta\.mat cannot be read"):
        source_of(root, "val")
    write(root / "val/n01/x.JPEG", b"x")
    with pytest.raises(UserError, match="both class folders and images"):
        source_of(root, "val")


# ---------------------------------------------------------------- WebDataset shards


def test_shards_keep_tar_order_and_tar_borders(tmp_path):
    shard(tmp_path / "train/0.tar", ["z", "a", "m"], [2, 0, 1])
    shard(tmp_path / "train/1.tar", ["k", "b"], [1, 1], kind=tarfile.PAX_FORMAT)
    shard(tmp_path / "val/0.tar", ["v"], [0])
    source, val = source_of(tmp_path), source_of(tmp_path, "val")
    assert list(source.samples) == [("z", 2), ("a", 0), ("m", 1), ("k", 1), ("b", 1)]
    assert source.class_names == val.class_names == ("0", "1", "2")
    assert source.ranges(2) == [range(0, 2), range(2, 3), range(3, 5)]
    assert source.ranges(100) == [range(0, 3), range(3, 5)]
    assert source.order(3).tolist() == [0, 1, 2, 3, 4]
    assert source_of(tmp_path, max_samples=3).ranges(100) == [range(0, 3)]
    assert source_of(tmp_path, max_samples=4).ranges(100) == [range(0, 3), range(3, 4)]
    for index, (_, label) in enumerate(source.samples):
        assert source.read(index) == encoded(picture(label))


@pytest.mark.parametrize("val", ["val", "validation"])
def test_shards_by_name_pattern_and_class_names(tmp_path, val):
    for number in range(3):
        shard(tmp_path / f"in-train-{number:03d}.tar", [f"t{number}"], [number])
    shard(tmp_path / f"in-{val}-007.tar", ["v"], [1])
    for root in (tmp_path, tmp_path / "in-train-{000..002}.tar"):
        assert [s.key for s in source_of(root).samples] == ["t0", "t1", "t2"]
        assert [s.key for s in source_of(root, "val").samples] == ["v"]
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\nyak\n")
    assert source_of(tmp_path, "val").class_names == ("cat", "dog", "owl", "yak")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match="sample t2 has a label outside"):
        source_of(tmp_path)


def test_class_names_above_the_split_folder(tmp_path):
    shard(tmp_path / "train/0.tar", ["a"], [0])
    shard(tmp_path / "val/0.tar", ["b"], [1])
    with pytest.raises(UserError, match="sample b has a label outside"):
        source_of(tmp_path, "val")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert source_of(tmp_path, "val").class_names == source_of(tmp_path).class_names == ("cat", "dog")


def test_brace_patterns(tmp_path):
    assert expand_braces("a{08..10}{x,y}") == ["a08x", "a08y", "a09x", "a09y", "a10x", "a10y"]
    for bad in ("{3..1}.tar", "{a}.tar", "{0..999999999}.tar", "{0..9999}{0..9999}.tar"):
        with pytest.raises(UserError, match="pattern"):
            expand_braces(bad)
    shard(tmp_path / "000.tar", ["a"], [0])
    assert len(source_of(tmp_path / "{000..000}.tar").samples) == 1
    with pytest.raises(UserError, match=r"(?s)cannot be opened.*001\.tar"):
        source_of(tmp_path / "{000..001}.tar")
    with pytest.raises(UserError, match="no tars for val"):
        source_of(tmp_path / "{000..000}.tar", "val")


def test_keys_of_tar_members_are_made_safe(tmp_path):
    shard(tmp_path / "train/0.tar", ["./dir.v1/a b", "../../etc/x", "/abs/y"], [0, 0, 0])
    assert [s.key for s in source_of(tmp_path).samples] == ["dir%2Ev1/a%20b", "%2E%2E/%2E%2E/etc/x", "abs/y"]


def test_links_and_foreign_members_are_left_out(tmp_path):
    path = tmp_path / "train/0.tar"
    shard(path, ["a"], [0])
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("b.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("._a.png", "__meta__.json", "README"):
            tar.addfile(tarfile.TarInfo(name))
    assert [s.key for s in source_of(tmp_path).samples] == ["a"]


PNG = encoded(picture())


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k1.png", PNG)], r"(?s)k1.*no \.cls"),
        ([("k1.cls", b"0")], "(?s)k1.*0 images"),
        ([("k1.png", PNG), ("k1.jpg", PNG), ("k1.cls", b"0")], "(?s)k1.*2 images"),
        ([("k1.png", PNG), ("k1.cls", b"-1")], "(?s)k1.*label"),
        ([("k1.png", PNG), ("k1.cls", b"")], "(?s)k1.*label"),
        ([("k1.png", PNG), ("k1.cls", b"\xb2")], "(?s)k1.*label"),
        ([("k1.png", PNG), ("k1.cls", b"1" * 5000)], "(?s)k1.*label"),
        ([("k1.png", PNG), ("k1.png", PNG), ("k1.cls", b"0")], "(?s)k1.*two members"),
        ([("k1.png", PNG), ("k1.cls", b"0"), ("k2.png", PNG), ("k2.cls", b"0"), ("k1.png", PNG), ("k1.cls", b"0")],
         "same key: k1"),
        ([], "no samples"),
    ],
)  # fmt: skip
def test_bad_samples_name_tar_and_key(tmp_path, members, message):
    write(tmp_path / "train/bad-7.tar", tar_bytes(members))
    with pytest.raises(UserError, match=message) as caught:
        source_of(tmp_path)
    assert ("bad-7.tar" in str(caught.value)) == bool(members)


def test_duplicate_keys_over_tars(tmp_path):
    shard(tmp_path / "train/0.tar", ["a", "b"], [0, 0])
    shard(tmp_path / "train/1.tar", ["c", "b"], [0, 0])
    with pytest.raises(UserError, match=r"(?s)same key: b.*0\.tar.*1\.tar"):
        source_of(tmp_path)


def test_a_tar_cut_anywhere_is_an_error(tmp_path):
    path = tmp_path / "train/cut.tar"
    shard(path, ["a", "b"], [0, 1])
    whole = path.read_bytes()
    ends = tar_bytes([], end=False), len(tar_bytes([("a.png", PNG)], end=False))
    assert ends[1] % 512 == 0
    for size in [*range(0, 2048, 512), ends[1], 100, 700, 1023, len(whole) - 10240 + 600]:
        path.write_bytes(whole[:size])
        if any(whole[size:]):
            with pytest.raises(UserError, match=r"cut\.tar"):
                source_of(tmp_path)
    path.write_bytes(tar_bytes([("a.png", PNG), ("a.cls", b"0"), ("b.png", PNG)], end=False))
    with pytest.raises(UserError, match=r"(?s)last sample found is b\n.*without its end.*cut\.tar"):
        source_of(tmp_path)


def test_concatenated_or_damaged_tars_are_errors(tmp_path):
    path = tmp_path / "train/0.tar"
    shard(path, ["a", "b"], [0, 1])
    whole = path.read_bytes()
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match="behind the end mark"):
        source_of(tmp_path)
    second = whole.index(b"b.png")
    path.write_bytes(whole[:second] + b"X" + whole[second + 1 :])  # the header's checksum fails
    with pytest.raises(UserError, match="damaged"):
        source_of(tmp_path)
    path.write_bytes(b"not a tar" * 100)
    with pytest.raises(UserError, match="cut short or damaged"):
        source_of(tmp_path)


@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"g"])
@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\0" * 3 + b"\x10" + b"\0" * 7, b"\xff" * 12])
def test_absurd_sizes_in_headers(tmp_path, size, kind):
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157], header[148:156] = size, kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    write(tmp_path / "train/0.tar", bytes(header) + b"\0" * 10240)
    with pytest.raises(UserError, match="cut short or damaged"):
        source_of(tmp_path)


def test_shard_that_changes_later(tmp_path):
    path = tmp_path / "train/0.tar"
    shard(path, ["a"], [0])
    source = source_of(tmp_path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match="changed since"):
        source.read(0)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        source.read(0)


# ---------------------------------------------------------------- parquet


def parquet_file(path, labels, names=None, struct_column=True, rows=2, column="image", kind="int64"):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = [encoded(picture(number)) for number in range(len(labels))]
    images = [{"bytes": one, "path": None} for one in data] if struct_column else data
    table = pa.table({column: images, "label": pa.array(labels, kind)})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


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
    with pytest.raises(UserError, match="no parquet files for val"):
        source_of(tmp_path, "val")
    source = source_of(tmp_path)
    parquet_file(train, [0, 1, 0, 1], ["a", "b"], rows=1)
    with pytest.raises(UserError, match="1 rows, 2 when it was opened"):
        source.read(0)
    parquet_file(tmp_path / "data/val-0.parquet", [0], ["a", "c"])
    with pytest.raises(UserError, match="different class names"):
        source_of(tmp_path, "val")
    parquet_file(train, [0, None])
    with pytest.raises(UserError, match="without a label"):
        source_of(tmp_path)
    parquet_file(train, [0, 1], column="picture")
    with pytest.raises(UserError, match="does not have the columns"):
        source_of(tmp_path)
    parquet_file(train, [0.0, 1.0], kind="float32")
    with pytest.raises(UserError, match="label: float"):
        source_of(tmp_path)
    train.write_bytes(train.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        source_of(tmp_path)


def test_parquet_null_image_is_unreadable_not_a_crash(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (tmp_path / "train").mkdir()
    table = pa.table({"image": [{"bytes": PNG}, {"bytes": None}, None], "label": [0, 0, 0]})
    pq.write_table(table, tmp_path / "train/x.parquet")
    source = source_of(tmp_path)
    assert [len(source.read(index)) for index in range(3)] == [len(PNG), 0, 0]


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    write(tmp_path / "train/x.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"scalekd-cache\[remote\]"):
        source_of(tmp_path)


# ---------------------------------------------------------------- downloads and names


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
        return SimpleNamespace(data=pixels, targets=[0, 1, 0, 1, 0, 1], classes=["plane", "car"])

    monkeypatch.setattr(builtin, "_torchvision_datasets", lambda: SimpleNamespace(CIFAR10=load))
    source = pickle.loads(pickle.dumps(source_of("cifar10", "val", download_dir=str(tmp_path))))  # noqa: S301
    for index, (key, label) in enumerate(source.samples):
        number = int(key.removeprefix("cifar10/"))
        assert label == number % 2
        assert (decode_image(source.read(index), key) == pixels[number]).all()
    assert calls == [(False, True), (False, False)]
    assert source.class_names == ("plane", "car")


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
    with pytest.raises(UserError, match="expected: cifar10"):
        source_of("cifar")
    with pytest.raises(UserError, match="cifar10, demo, imagenette"):
        source_of("/no/such/place")
    for url in ("https://example.org/{0..1}.tar", "pipe:cat x.tar"):
        with pytest.raises(UserError, match="URL"):
            source_of(url)


# ---------------------------------------------------------------- decode_image


def decoded(image, kind="PNG", **options):
    return decode_image(encoded(image, kind, **options), "k")


def test_decode_rgb_is_exact_and_writable():
    pixels = decoded(picture())
    assert pixels.shape == (9, 12, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == np.asarray(picture())).all()
    assert pixels.flags.writeable


def test_decode_grey_and_bilevel():
    grey = picture().convert("L")
    assert (decoded(grey) == np.asarray(grey)[..., None]).all()
    assert set(np.unique(decoded(grey.convert("1")))) <= {0, 255}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_decode_16_bit_grey(kind):
    values = np.array([[0, 257, 128 * 257, 65535, 65406]], dtype=np.uint16)
    assert decoded(Image.fromarray(values), kind)[0, :, 0].tolist() == [0, 1, 128, 255, 254]


def test_decode_floats_are_refused():
    with pytest.raises(UnreadableImage, match="mode F"):
        decoded(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF")


def test_decode_cmyk():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = decoded(cmyk, "JPEG", quality=100)
    assert red[..., 0].min() > 240
    assert red[..., 1:].max() < 15


def test_decode_alpha_over_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 255, 51
    assert decoded(Image.fromarray(rgba))[0, :, 0].tolist() == [255, 0, 204]
    grey_alpha = Image.fromarray(rgba).convert("LA")
    assert decoded(grey_alpha)[0, :, 1].tolist() == [255, 0, 204]
    assert decoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)[0, :, 0].tolist() == [255, 0, 204]


def test_decode_palette_with_and_without_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert decoded(palette).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert decoded(palette, transparency=0).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    assert decoded(palette, "GIF", transparency=1).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    colour_key = Image.new("RGB", (1, 1), (1, 2, 3))
    assert decoded(colour_key, transparency=(1, 2, 3)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_applies_exif_orientation(kind, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(picture(size=(24, 16)), kind, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert expected.shape[0] == (16 if orientation <= 4 else 24)
    assert (decode_image(data, "k") == expected).all()


def test_damaged_exif_does_not_cost_the_image():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert decode_image(data, "k").shape == (9, 12, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_images_are_refused_or_whole(kind, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # what another library may have done
    data = encoded(picture(size=(40, 30)), kind)
    whole = decode_image(data, "k")
    refused = 0
    for size in range(0, len(data), max(1, len(data) // 150)):
        try:
            assert (decode_image(data[:size], "k") == whole).all(), size
        except UnreadableImage:
            refused += 1
    assert refused >= 140
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_random_damage_never_crashes():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        data = np.frombuffer(encoded(picture(size=(20, 20)), kind), np.uint8)
        for _ in range(60):
            damaged = data.copy()
            damaged[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
            try:
                pixels = decode_image(damaged.tobytes(), "k")
            except UnreadableImage as error:
                assert error.reason
            else:
                assert pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "zero bytes"), (b"hello" * 100, "not a known"), (b"%!PS-Adobe-3.0 EPSF", "not a known")]
)
def test_not_an_image(data, reason):
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode_image(data, "some/key")
    assert "some/key" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (again.key, again.reason) == ("some/key", caught.value.reason)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(20_000, 20_000), (2**31 - 1, 1), (0, 5), (13_400, 13_400)])
def test_absurd_sizes(size):
    data = bytearray(encoded(picture()))
    data[16:24] = struct.pack(">II", *size)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(UnreadableImage):
        decode_image(bytes(data), "k")
