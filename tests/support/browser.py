"""Headless Chromium, where there is one: what a page measures and what it looks like."""

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
frame.onload = () => {
  const page = frame.contentDocument;
  const images = [...page.images];
  const found = {
    width: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight, images: images.length,
    broken: images.filter(image => image.naturalWidth === 0).length,
    without_alt: images.filter(image => !image.alt.trim()).length,
    hacked: Boolean(frame.contentWindow.hacked), small: images.filter(image => image.clientWidth < 60).length,
    fetched: performance.getEntriesByType("resource").length, text: page.body.innerText,
  };
  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = JSON.stringify(found);
  document.body.append(answer);
};
</script>
"""


def _frame(page, width, folder):
    """A page that shows another one at a width; phones are narrower than a browser's smallest window."""
    file = folder / "frame.html"
    frame = f'<iframe style="width:{width}px;height:2000px;border:0" srcdoc="{html.escape(page)}"></iframe>'
    file.write_text(f'<!DOCTYPE html><body style="margin:0">{frame}{MEASURE}</body>', encoding="utf-8")
    return file


def _chromium(*options, folder):
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run([*words, profile, *options], capture_output=True, timeout=LIMIT_S, check=True)
    return done.stdout.decode()


def measure(page, width, folder):
    """What a browser says of a page at a width in pixels."""
    file = _frame(page, width, folder)
    dom = _chromium("--virtual-time-budget=5000", "--dump-dom", file.as_uri(), folder=folder)
    answer = re.search(r'<pre id="answer">(.*?)</pre>', dom, re.DOTALL)
    assert answer is not None, dom[-2000:]
    return json.loads(html.unescape(answer[1]))


def screenshot(page, width, height, file, folder):
    """A PNG of the page's top."""
    options = (f"--window-size={width},{height}", f"--screenshot={file}", "--virtual-time-budget=5000")
    _chromium(*options, _frame(page, width, folder).as_uri(), folder=folder)
    return file
