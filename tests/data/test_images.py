"""The decoder returns a complete image or a reason; sources have a fixed order and can be pickled."""

import hashlib
import io
import multiprocessing
import pickle
import struct
import zlib

import numpy as np
import pytest
from image_files import encoded, folder_tree, parquet_file, picture, shard, source_of
from PIL import Image, ImageFile, features

from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.data.base import sample_indices
from scalekd_cache.data.images import UnreadableImage, decode_image
from scalekd_cache.data.source import listing_digest, open_source


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
    assert ranks == sorted(ranks)  # the order of two samples depends only on their keys


@pytest.mark.parametrize(("total", "count"), [(1000, 512), (10, 9), (5, 8), (5, 5), (1, 16), (0, 3), (10_001, 5000)])
def test_a_sample_covers_all_of_its_items(total, count):
    chosen = sample_indices(total, count)
    steps = np.diff([*chosen, total])
    assert len(chosen) == len(set(chosen)) == min(total, count)
    assert list(chosen) == sorted(chosen)
    assert not total or (chosen[0] == 0 and steps.max() - steps.min() <= 1)


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
    expected = [source.read(1) for source in sources]  # readers have open state now, which must not be pickled
    assert all(len(pickle.dumps(source)) < 200_000 for source in sources)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert [pool.apply(source.read, (1,)) for source in sources] == expected
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert [pool.apply(source.read, (1,)) for source in sources] == expected


def decoded(image, kind="PNG", **options):
    return decode_image(encoded(image, kind, **options), "k")


def test_decode_rgb_is_exact_and_writable():
    pixels = decoded(picture())
    assert pixels.shape == (9, 12, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == np.asarray(picture())).all()
    assert pixels.flags.writeable


def test_decode_gray_and_bilevel():
    gray = picture().convert("L")
    assert (decoded(gray) == np.asarray(gray)[..., None]).all()
    assert set(np.unique(decoded(gray.convert("1")))) <= {0, 255}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_decode_16_bit_gray(kind):
    values = np.array([[0, 257, 128 * 257, 65535, 65406]], dtype=np.uint16)
    assert decoded(Image.fromarray(values), kind)[0, :, 0].tolist() == [0, 1, 128, 255, 254]


@pytest.mark.parametrize("key", [0, 3000, 65535])
def test_decode_16_bit_gray_with_a_transparent_value(key):
    values = np.array([[0, 3000, 3001, 65535]], dtype=np.uint16)
    expected = np.where(values == key, 255, [0, 12, 12, 255])
    assert decoded(Image.fromarray(values), transparency=key)[..., 1].tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_decode_tiff_whose_zero_is_white(dtype):
    """As in radiographs. Pillow inverts only those of 8 bits."""
    most = np.iinfo(dtype).max
    file = bytearray(encoded(Image.fromarray(np.array([[0, most // 5, most]], dtype=dtype)), "TIFF"))
    entry = struct.pack("<HHIH", 262, 3, 1, 1)
    assert file.count(entry) == 1
    file[file.index(entry) + 8] = 0  # PhotometricInterpretation: WhiteIsZero
    assert decode_image(bytes(file), "x")[0, :, 0].tolist() == [255, 204, 0]


def test_decode_png_of_16_bits_with_a_transparent_color():
    rows = b"\0" + np.array([[[0x1234] * 3, [0x3400] * 3, [0x1200] * 3]], dtype=">u2").tobytes()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 16, 2, 0, 0, 0)), (b"tRNS", struct.pack(">HHH", *[0x3400] * 3)),
             (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]  # fmt: skip
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    found = decode_image(b"\x89PNG\r\n\x1a\n" + b"".join(chunks), "x")
    assert found[0, :, 0].tolist() == [0x12, 255, 0x12]


@pytest.mark.parametrize(
    ("values", "mode"),
    [(np.ones((3, 3), np.float32), "F"), (np.arange(240, dtype=np.int32)[None], "I"),
     (np.array([[0, 65535]], np.int32), "I"), (np.array([[-5, 1 << 20]], np.int32), "I")],
)  # fmt: skip
def test_decode_values_whose_white_level_is_unknown_are_refused(values, mode):
    with pytest.raises(UnreadableImage, match=f"mode {mode} in TIFF, expected 8 or 16 bits"):
        decoded(Image.fromarray(values), "TIFF")


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
    color_key = Image.new("RGB", (1, 1), (1, 2, 3))
    assert decoded(color_key, transparency=(1, 2, 3)).tolist() == [[[255, 255, 255]]]


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


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_image():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert decode_image(data, "k").shape == (9, 12, 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "DIB", "AVIF"])
def test_truncated_images_are_refused_or_whole(kind, monkeypatch):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # another library may have set this
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


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_never_crashes():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        data = np.frombuffer(encoded(picture(size=(20, 20)), kind), np.uint8)
        for _ in range(60):
            damaged = data.copy()
            damaged[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
            try:
                pixels = decode_image(damaged.tobytes(), "k")
            except UnreadableImage:
                continue
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
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(UnreadableImage, match="(?i)size" if size[0] else "."):
        decode_image(bytes(data), "k")
