"""WebDataset tars: order, unit boundaries, keys, and every kind of invalid tar."""

import os
import tarfile

import pytest
from image_files import PNG, encoded, picture, shard, source_of, tar_bytes, write

from scalekd_cache.data.images import decode_image
from scalekd_cache.data.patterns import expand_braces
from scalekd_cache.errors import UserError


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
    with pytest.raises(UserError, match=r"(?s)is missing.*001\.tar"):
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
    source = source_of(tmp_path)
    assert [s.key for s in source.samples] == ["a"]
    assert "3 tar members: links, sparse or special files" in " ".join(source.ignored)
    assert "3 tar members: hidden" in " ".join(source.ignored)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PPM", "BMP"])
def test_images_of_every_format_are_taken(tmp_path, kind):
    suffix = {"TIFF": "tif"}.get(kind, kind.lower())
    write(tmp_path / "train/0.tar", tar_bytes([(f"a.{suffix}", encoded(picture(), kind)), ("a.cls", b"0")]))
    assert decode_image(source_of(tmp_path).read(0), "a").shape == (9, 12, 3)


@pytest.mark.parametrize(
    "names",
    [("img.v1.01.jpg", "img.v1.01.cls"), ("a/b.1.png", "a/b.1.cls"), ("x.jpg", "x.cls", "x.v2.jpg", "x.v2.cls")],
)
def test_keys_with_dots_are_refused_as_such(tmp_path, names):
    members = [(name, b"0" if name.endswith("cls") else PNG) for name in names]
    write(tmp_path / "train/0.tar", tar_bytes(members))
    with pytest.raises(UserError, match=r"(?s)keys in a shard contain dots.*0\.tar.*instead of dots"):
        source_of(tmp_path)


def test_more_data_of_a_sample_is_no_key_with_dots(tmp_path):
    write(tmp_path / "train/0.tar", tar_bytes([("a.jpg", PNG), ("a.cls", b"0"), ("a.seg.png", PNG), ("a.json", b"{}")]))
    assert [s.key for s in source_of(tmp_path).samples] == ["a"]


def test_a_fifo_in_the_place_of_a_tar_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    os.mkfifo(tmp_path / "train/0.tar")
    with pytest.raises(UserError, match="a FIFO"):
        source_of(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k1.png", PNG), ("k2.png", PNG), ("k2.cls", b"0")], r"(?s)k1.*no \.cls \(1 of 2 samples"),
        ([("k1.cls", b"0")], "(?s)k1.*0 images"),
        ([("k1.png", PNG), ("k1.jpg", PNG), ("k1.cls", b"0")], "(?s)k1.*2 images"),
        ([("k1.png", PNG), ("k1.cls", b"-1")], "(?s)k1.*label"),
        ([("k1.png", PNG), ("k1.cls", b"")], "(?s)k1.*label"),
        ([("k1.png", PNG), ("k1.cls", b"\xb2")], "(?s)k1.*label"),
        ([("k1.png", PNG), ("k1.cls", b"1" * 5000)], "(?s)k1.*label"),
        ([("k1.png", PNG), ("k1.png", PNG), ("k1.cls", b"0")], "(?s)k1.*two members"),
        (
            [("k1.png", PNG), ("k1.cls", b"0"), ("k2.png", PNG), ("k2.cls", b"0"), ("k1.png", PNG), ("k1.cls", b"0")],
            "same key: k1",
        ),
        ([], "no samples"),
    ],
)
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
    with pytest.raises(UserError, match=r"(?s)last sample found is b\n.*no end-of-archive marker.*cut\.tar"):
        source_of(tmp_path)


def test_concatenated_or_damaged_tars_are_errors(tmp_path):
    path = tmp_path / "train/0.tar"
    shard(path, ["a", "b"], [0, 1])
    whole = path.read_bytes()
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match="after the end marker"):
        source_of(tmp_path)
    second = whole.index(b"b.png")
    path.write_bytes(whole[:second] + b"X" + whole[second + 1 :])  # the header's checksum fails
    with pytest.raises(UserError, match="damaged"):
        source_of(tmp_path)
    path.write_bytes(b"not a tar" * 100)
    with pytest.raises(UserError, match="truncated or damaged"):
        source_of(tmp_path)


@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"g"])
@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\0" * 3 + b"\x10" + b"\0" * 7, b"\xff" * 12])
def test_absurd_sizes_in_headers(tmp_path, size, kind):
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157], header[148:156] = size, kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    write(tmp_path / "train/0.tar", bytes(header) + b"\0" * 10240)
    with pytest.raises(UserError, match="truncated or damaged"):
        source_of(tmp_path)


def test_shard_that_changes_later(tmp_path):
    path = tmp_path / "train/0.tar"
    shard(path, ["a"], [0])
    source = source_of(tmp_path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match="changed since"):
        source.read(0)
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        source.read(0)
