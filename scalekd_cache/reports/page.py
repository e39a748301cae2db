"""The HTML page of a report: templates, embedded images, and the output file.

In: a template and values. Out: HTML in one file. Invariant: the page has no script and loads nothing (its content
security policy enforces this), the template engine escapes all text, and the size is bounded.
"""

import base64
import io
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scalekd_cache.errors import UserError
from scalekd_cache.store.durable_files import write_atomically

MAX_BYTES = 5_000_000
"""Maximum size of a report."""
SIDE = 160
"""Images are shown at about this side length, pixels. Browsers enlarge smaller ones; larger ones are reduced here."""


class Picture(NamedTuple):
    """An image for a template."""

    source: str
    """A data URI."""
    alt: str
    """Alternative text for screen readers."""
    caption: str = ""
    """Caption; may be empty."""


def picture(pixels: NDArray[np.uint8], alt: str) -> Picture:
    """(H, W, 3) uint8 pixels as PNG if small, else as JPEG of side `SIDE`."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if max(image.size) <= SIDE // 2:
        image.save(buffer, "PNG", optimize=True)
        return Picture(data_uri(buffer.getvalue(), "image/png"), alt)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    image.save(buffer, "JPEG", quality=88)
    return Picture(data_uri(buffer.getvalue(), "image/jpeg"), alt)


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def write_page(path: Path, html: str) -> int:
    """Write a report atomically; returns its size in bytes."""
    data = html.encode()
    assert len(data) <= MAX_BYTES, f"a report of {len(data)} bytes"
    if path.is_dir():
        raise UserError(
            "the output path of the report is a folder", where=path, expected="a file name", fix="correct OUT="
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    return len(data)
