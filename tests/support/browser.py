"""Headless Chromium, if installed: page measurements and screenshots."""

import html
import json
import re
import shutil
import subprocess

import pytest
from commands import LIMIT_S

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")

MEASURE = """
<script>
const frame = document.querySelector("iframe");
const later = ms => new Promise(done => setTimeout(done, ms));
const deep = (node, wanted) => [...node.querySelectorAll("*")].flatMap(one =>
  [...(one.matches(wanted) ? [one] : []), ...(one.shadowRoot ? deep(one.shadowRoot, wanted) : [])]);
const tooltip = async (page, plot) => {
  const canvas = deep(plot, ".bk-events")[0];
  const box = canvas.getBoundingClientRect();
  const at = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true, composed: true,
               pointerType: "mouse", pointerId: 1, isPrimary: true };
  canvas.dispatchEvent(new frame.contentWindow.PointerEvent("pointerenter", at));
  canvas.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
  await later(300);
  return deep(page.body, ".bk-tooltip-content").map(one => one.textContent).join(" ");
};
frame.onload = async () => {
  await later(1500);
  const page = frame.contentDocument;
  const images = [...page.images], plots = [...page.querySelectorAll(".plot")], sorted = {}, by_last = {};
  for (const table of page.querySelectorAll("table.sortable")) {
    const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
    [...table.tHead.rows[0].cells].at(-1).querySelector("button").click();
    by_last[table.tHead.innerText] = names();
    table.tHead.rows[0].cells[0].querySelector("button").click();
    sorted[table.tHead.innerText] = names();
  }
  const found = {
    width: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight, images: images.length,
    broken: images.filter(image => image.naturalWidth === 0).length,
    without_alt: images.filter(image => !image.alt.trim()).length,
    hacked: Boolean(frame.contentWindow.hacked), small: images.filter(image => image.clientWidth < 60).length,
    fetched: performance.getEntriesByType("resource").length, text: page.body.innerText,
    plots: plots.length, undrawn: plots.filter(plot => !deep(plot, "canvas").some(one => one.width > 100)).length,
    clipped: [...page.querySelectorAll(".scroll, td, th, dd, section, .plot")]
      .filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.outerHTML.slice(0, 200)),
    sorted, by_last, tooltip: plots.length ? await tooltip(page, plots[0]) : "",
  };
  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = JSON.stringify(found);
  document.body.append(answer);
};
</script>
"""


def _frame(page, width, folder):
    """A page that embeds another one at a given width; phones are narrower than a browser's minimum window."""
    file = folder / "frame.html"
    frame = f'<iframe style="width:{width}px;height:2000px;border:0" srcdoc="{html.escape(page)}"></iframe>'
    file.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">{frame}{MEASURE}</body>', encoding="utf-8"
    )
    return file


def _chromium(*options, folder):
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run([*words, profile, *options], capture_output=True, timeout=LIMIT_S, check=True)
    return done.stdout.decode()


def measure(page, width, folder):
    """Measurements of a page at a width in pixels."""
    file = _frame(page, width, folder)
    dom = _chromium("--virtual-time-budget=5000", "--dump-dom", file.as_uri(), folder=folder)
    answer = re.search(r'<pre id="answer">(.*?)</pre>', dom, re.DOTALL)
    assert answer is not None, dom[-2000:]
    return json.loads(html.unescape(answer[1]))


def screenshot(page, width, height, file, folder, *, dark=False):
    """A PNG of the page's top."""
    options = (f"--window-size={width},{height}", f"--screenshot={file}", "--virtual-time-budget=5000")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    _chromium(*options, *scheme, _frame(page, width, folder).as_uri(), folder=folder)
    return file
