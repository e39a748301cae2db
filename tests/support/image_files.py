"""Small real image files, folders and tars for tests of image sources."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.data.images import decode_image
from scalekd_cache.data.source import open_source


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


PNG = encoded(picture())


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
