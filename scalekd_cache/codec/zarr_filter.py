"""Any feature codec as a numcodecs codec, so that a Zarr array of maps can carry it.

In: chunks (n, C, H, W) float32. Out: bytes, and back. Invariant: what numcodecs' contract says: `from_config` of
`get_config` decodes what was encoded. Caches do not use this: they keep records, which are read one at a time.
"""

import hashlib
import itertools
import struct
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numcodecs.abc import Codec
from numcodecs.compat import ensure_bytes, ensure_contiguous_ndarray_like, ndarray_copy
from numcodecs.registry import register_codec

from scalekd_cache.codec import codec_from_config
from scalekd_cache.codec.base import damaged_record


class FeatureMaps(Codec):  # type: ignore[misc]  # numcodecs has no types
    """`codec` is the config of a feature codec, `folder` where a fitted one has its codec.safetensors."""

    codec_id = "scalekd_cache.features"

    def __init__(self, codec: dict[str, Any], folder: str | None = None) -> None:
        self.codec, self.folder = dict(codec), folder
        self._codec = codec_from_config(codec, None if folder is None else Path(folder))

    def encode(self, buf: Any) -> bytes:
        """A chunk of float32 maps -> number and lengths of records as uint32, then the records.

        A chunk has no keys: the dither of a map is seeded by a hash of its values.
        """
        chunk = np.asarray(ensure_contiguous_ndarray_like(buf)).view(np.float32).reshape(-1, *self._codec.shape)
        digests = [hashlib.blake2b(row.tobytes(), digest_size=4).digest() for row in chunk]
        seeds = torch.tensor([int.from_bytes(digest, "little") for digest in digests])
        records = self._codec.pack(self._codec.encode(torch.from_numpy(chunk.copy()), seeds).numpy())
        head = struct.pack(f"<{len(records) + 1}I", len(records), *map(len, records))
        return head + b"".join(records)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Bytes -> (n, C, H, W) float32. UserError for bytes of another codec."""
        data = ensure_bytes(buf)
        count = struct.unpack_from("<I", data)[0] if len(data) >= 4 else -1
        start = 4 * (count + 1)
        if not 0 <= count <= len(data) // 4 - 1:
            raise damaged_record(f"{count} records in {len(data)} bytes", "a chunk of records")
        lengths = struct.unpack_from(f"<{count}I", data, 4)
        if start + sum(lengths) != len(data):
            raise damaged_record(f"{len(data)} bytes", start + sum(lengths))
        cuts = np.cumsum([start, *lengths]).tolist()
        records = [data[a:b] for a, b in itertools.pairwise(cuts)]
        maps = self._codec.decode(torch.from_numpy(self._codec.unpack(records))).features.contiguous().numpy()
        return ndarray_copy(maps, out)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes."""
        return {"id": self.codec_id, "codec": self.codec, "folder": self.folder}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The codec of a config, without its id."""
        return cls(config["codec"], config.get("folder"))


register_codec(FeatureMaps)
