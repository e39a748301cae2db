"""Image folders, their keys, and ImageNet's flat val/ with its devkit."""

import errno
import hashlib
import os
import re
from urllib.parse import unquote

import numpy as np
import pytest
import scipy.io
from image_files import (
    assert_readable,
    encoded,
    folder_tree,
    picture,
    source_of,
    write,
)
from PIL import features

from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.data.base import SampleRef, encode_key
from scalekd_cache.data.image_formats import IMAGE_SUFFIXES
from scalekd_cache.data.images import decode_image
from scalekd_cache.data.source import describe_source, open_cache_source, open_source
from scalekd_cache.errors import UserError
from scalekd_cache.store.base import check_key


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


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.tif", "TIFF"), ("a.TIFF", "TIFF"), ("a.gif", "GIF"), ("a.ppm", "PPM"), ("a.jfif", "JPEG"), ("a.jpe", "JPEG"),
     ("a", "JPEG"), ("a", "TIFF"), ("v1.0002", "PNG"), ("a.jpg?w=300&h=2", "JPEG"), ("a.php?id=7", "WEBP"),
     ("a.image", "GIF"), ("a.bmp", "DIB")],
)  # fmt: skip
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_image_that_can_be_decoded_is_taken(tmp_path, name, kind, split):
    folder_tree(tmp_path)
    write(tmp_path / split / "ant/more" / name, encoded(picture(5), kind))
    source = source_of(tmp_path, split)
    taken = [index for index, sample in enumerate(source.samples) if sample.key.startswith("ant/more/")]
    assert len(taken) == 1
    assert decode_image(source.read(taken[0]), "k").shape == (9, 12, 3)
    assert source.ignored == ()


def test_messages_name_the_suffixes_that_are_decoded(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError) as error:
        source_of(tmp_path)
    named = re.search(r"\(or (.*)\)", str(error.value))[1].split(", ")
    assert {"png", "webp", "tif", "gif"} <= set(named)
    assert "jp2" not in named
    for suffix in named:
        kind = {"tif": "TIFF"}.get(suffix, suffix.upper())
        assert decode_image(encoded(picture(), kind), suffix).shape == (9, 12, 3)
        assert f".{suffix}" in IMAGE_SUFFIXES


def test_avif_images_are_taken(tmp_path):
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    write(folder_tree(tmp_path) / "train/ant/a.avif", encoded(picture(5), "AVIF"))
    assert_readable(source_of(tmp_path))
    assert len(source_of(tmp_path).samples) == 5


def test_what_is_not_taken_is_counted_and_named(tmp_path):
    root = folder_tree(tmp_path)
    for name, data in (
        ("notes.txt", b"Python is a language"), ("more.txt", b""), ("README", b"P6 is not an image"),
         ("raw.nef", encoded(picture(), "TIFF")),
        ("x.jp2", encoded(picture(), "JPEG2000")), (".DS_Store", b""), ("._1.png", b""), ("Thumbs.db", b""),
        ("@eaDir/1.png", encoded(picture())),
    ):  # fmt: skip
        write(root / "train/ant" / name, data)
    write(root / "train/__MACOSX/ant/._1.png", b"")
    (root / "train/bee/gone").symlink_to(root / "nowhere")
    os.mkfifo(root / "train/bee/pipe")
    source = source_of(root)
    assert len(source.samples) == 4
    text = "\n".join(source.ignored)
    assert "5 files that are not in a known image format (2 .txt, " in text
    assert "5 hidden or system files and folders" in text
    assert "2 broken links or special files (2 without suffix), such as bee/" in text
    assert source_of(root, "val").ignored == ()


def test_keys_of_files_without_an_image_suffix_keep_their_whole_name(tmp_path):
    write(folder_tree(tmp_path) / "train/ant/v1.0001", encoded(picture()))
    write(tmp_path / "train/ant/v1.0002", encoded(picture(1)))
    assert {"ant/v1%2E0001", "ant/v1%2E0002"} <= {s.key for s in source_of(tmp_path).samples}


def test_long_names_give_keys_that_a_cache_can_store(tmp_path):
    folder = tmp_path / "train/ant" / ("\u5f88" * 40)
    names = ["\u56fe" * 80 + end for end in ("", "a", "b")]
    folder_tree(tmp_path)
    for name in names:
        write(folder / f"{name}.jpg", encoded(picture(), "JPEG"))
    keys = [s.key for s in source_of(tmp_path).samples]
    assert len(set(keys)) == 7
    assert all(check_key(key, "") == key for key in keys)
    assert max(map(len, keys)) <= 1024
    assert keys == [s.key for s in source_of(tmp_path).samples]


@pytest.mark.parametrize("length", range(335, 350))
def test_a_long_key_is_cut_between_characters(length):
    key = encode_key("\u56fe" * 113 + "x" * length)
    assert len(key) <= 1024
    assert "\u56fe" * 100 in unquote(key)
    assert "\ufffd" not in unquote(key[: key.rindex("-")]).rstrip("\ufffd")
    assert encode_key("a" * 1024) == "a" * 1024


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
    with pytest.raises(UserError, match="link points to one of its parent folders"):
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


def break_other_format(root):
    write(root / "train/cow/1.HEIC", b"x")


def break_link(root):
    (root / "train/ant/3.png").symlink_to(root / "gone")


def break_link_loop(root):
    (root / "train/ant/3.png").symlink_to("3.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing_there, "has no train/"),
        (break_empty_class, "class folders without images"),
        (break_other_format, r"cow \(1 of 3 folders\); ignored: 1 .*, such as cow/1.HEIC"),
        (break_no_classes, "no class folders"),
        (break_stray, "outside class folders"),
        (break_link, "not a file"),
        (break_link_loop, "not a file"),
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


@pytest.mark.parametrize(
    ("names", "fix"),
    [
        (("Train", "Validation"), "rename Train/ to train/ and rename Validation/ to val/"),
        (("training", "val"), "rename training/ to train/$"),
        (("train", "test"), "rename test/ to val/"),
        (("train", "Valid"), "rename Valid/ to val/"),
    ],
)
def test_a_split_with_another_name(tmp_path, names, fix):
    folder_tree(tmp_path)
    (tmp_path / "train").rename(tmp_path / "a")
    (tmp_path / "val").rename(tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / names[0])
    (tmp_path / "b").rename(tmp_path / names[1])
    with pytest.raises(UserError, match=fix):
        source_of(tmp_path, "val")


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


def devkit(folder, truth, synsets=((1, "n02", 0), (2, "n01", 0), (3, "n00", 2), (4, "n03", 0))):
    kinds = [
        ("ILSVRC2012_ID", "O"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "O"),
        ("children", "O"),
        ("wordnet_height", "O"),
        ("num_train_images", "O"),
    ]
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
    with pytest.raises(UserError, match="devkit with its labels"):
        source_of(root, "val")
    kit = root / "ILSVRC2012_devkit_t12"
    devkit(kit, [1, 2, 1])
    with pytest.raises(UserError, match="no label in the ground truth"):
        source_of(root, "val")
    truth = kit / "data/ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n2\n1\n3\n")  # 3 has children, so it is not a class
    with pytest.raises(UserError, match=r"id 3, not in meta\.mat"):
        source_of(root, "val")
    truth.write_text("1\nx\n")
    with pytest.raises(UserError, match="cannot read the devkit's ground truth"):
        source_of(root, "val")
    (kit / "data/meta.mat").write_bytes(b"MATLAB" * 40)
    with pytest.raises(UserError, match=r"cannot read the devkit's meta\.mat"):
        source_of(root, "val")
    write(root / "val/n01/x.JPEG", b"x")
    with pytest.raises(UserError, match="both class folders and images"):
        source_of(root, "val")


@pytest.mark.parametrize("option", ["source", "classes", "devkit"])
@pytest.mark.parametrize("name", ["~nosuchuser/photos", "~old photos", "n" * 300], ids=["user", "tilde", "long"])
def test_paths_that_cannot_exist_are_reported(tmp_path, monkeypatch, option, name):
    monkeypatch.chdir(tmp_path)
    places = {"source": str(imagenet_tree(tmp_path / "photos")), option: name}
    with pytest.raises(UserError, match=re.escape(name)):
        open_source(DataConfig(**places), "val" if option == "devkit" else "train")
    if option == "source":
        with pytest.raises(UserError, match=re.escape(name)):
            open_cache_source({"source": name}, None, "train")


def test_a_folder_whose_name_starts_with_a_tilde_can_be_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_tree(tmp_path / "~old photos")
    source = open_source(DataConfig(source="~old photos"), "train")
    assert "in ~old photos/" in describe_source(source)


@pytest.mark.parametrize("place", ["photos", "photos/train", "photos/val", "devkit/data/meta.mat"])
def test_folders_that_this_user_may_not_enter_are_reported(tmp_path, monkeypatch, place):
    """Root may enter everything, so the error is raised here."""
    root, stat = imagenet_tree(tmp_path / "photos"), os.stat
    devkit(tmp_path / "devkit", [1, 2, 1, 4])

    def refused(path, *args, **kwargs):
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(tmp_path / place)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refused)
    data = {"source": str(root), "devkit": str(tmp_path / "devkit")}
    for call in (lambda: open_source(DataConfig(**data), "val"), lambda: open_cache_source(data, None, "val")):
        with pytest.raises(UserError, match=rf"cannot read the dataset .*photos\n  got: Permission denied\n.*{place}"):
            call()
