"""Builds a report's HTML page from templates, embedded images and charts, and writes it to a file.

In: a template and values. Out: one HTML file. Invariant: the page loads no external resources and runs a single script
(Bokeh with `page.js`), which does not depend on the data. Its content security policy allows only that script, by its
hash. The template engine escapes all text, and the page size is limited.
"""

import base64
import functools
import hashlib
import io
import re
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from bokeh.resources import Resources
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from scalekd_cache.errors import UserError
from scalekd_cache.reports.charts import Chart
from scalekd_cache.store.checked_files import open_file
from scalekd_cache.store.durable_files import check_replaceable, disk_errors, write_atomically

MAX_BYTES = 5_000_000
"""Maximum report size."""
START = b"<!DOCTYPE html>"
SIDE = 160
"""Approximate display size of images in pixels. Browsers enlarge smaller images; larger ones are downscaled here."""


class Picture(NamedTuple):
    """An image for a template."""

    source: str
    """The image as a data URI."""
    alt: str
    """Alternative text for screen readers."""


def picture(pixels: NDArray[np.uint8], alt: str) -> Picture:
    """Encode uint8 pixels (H, W, 3) as PNG if small, otherwise as JPEG with side length `SIDE`."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if max(image.size) <= SIDE // 2:
        image.save(buffer, "PNG", optimize=True)
        return Picture(data_uri(buffer.getvalue(), "image/png"), alt)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    image.save(buffer, "JPEG", quality=88)
    return Picture(data_uri(buffer.getvalue(), "image/jpeg"), alt)


def data_uri(data: bytes, kind: str) -> str:
    """Encode bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@functools.cache
def page_script() -> str:
    """The script in every report: the Bokeh library, followed by `page.js`, which draws charts and sorts tables."""
    library = Path(Resources(mode="server", minified=True, components=["bokeh"]).base_dir, "js", "bokeh.min.js")
    own = files(__package__).joinpath("templates/page.js")
    script = f"{library.read_text(encoding='utf-8')}\n{own.read_text(encoding='utf-8')}"
    assert not re.search(r"</script|<!--|\r", script), "the script would close its HTML element or change its hash"
    return script


def script_hash(script: str) -> str:
    """A script's hash in content security policy notation."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def breakable(text: object) -> Markup:
    """Add optional line breaks after separators, so that browsers do not break inside words."""
    return Markup(re.sub(r"([/_])(?=\w)", r"\1<wbr>", str(escape(text))))


def render(template: str, **values: Any) -> str:
    """Fill in one of this package's templates."""
    charts: list[dict[str, Any]] = []

    def place(chart: Chart) -> str:
        """The element ID for a chart."""
        charts.append({**chart.item, "target_id": f"chart-{len(charts)}"})
        return str(charts[-1]["target_id"])

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # no key sorting: Bokeh needs definitions before references
    environment.filters["breakable"] = breakable
    environment.globals["place"] = place
    script = page_script()
    return environment.get_template(template).render(
        **values, charts=charts, script=Markup(script), script_hash=script_hash(script)
    )


def check_page_place(path: Path) -> None:
    """Raise `UserError` if a report at this path would replace anything but an HTML page."""
    if path.is_dir():
        raise UserError("the report's output path is a folder", where=path, expected="a file name", fix="correct --out")
    check_replaceable(path)
    if not path.exists() or path.stat().st_size == 0:
        return
    with open_file(path, "the output path of the report") as file:
        is_page = file.read(len(START)) == START
    if not is_page:
        raise UserError(
            "the report would replace a file that is not a report",
            expected="a new file or an earlier report",
            where=path,
            fix="choose a different --out",
        )


def write_page(path: Path, html: str) -> int:
    """Write a report atomically and return its size in bytes."""
    data = html.encode()
    assert len(data) <= MAX_BYTES, f"a report of {len(data)} bytes"
    check_page_place(path)
    with disk_errors(path.parent, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    return len(data)
