"""Packaging: the extras named in messages and pages, the container image, the supported Python versions."""

import ast
import configparser
import re

from commands import ROOT

from scalekd_cache.store.remote.url_transfer import SCHEMES
from scalekd_cache.training.trackers import LIBRARIES

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
EXTRAS = set(SETUP["options.extras_require"])


def sources(*patterns):
    for pattern in patterns:
        for file in ROOT.glob(pattern):
            yield file, file.read_text(encoding="utf-8")


def calls_of(name, tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) == name:
            yield node


def test_extras_in_messages_and_pages_exist():
    named = set()
    for _, text in sources("scalekd_cache/**/*.py", "pipelines/*.py", "docs/**/*.md", "*.md", "Makefile"):
        found = re.findall(r"(?:scalekd-cache|-e '?\.)\[([a-z0-9,]+)\]", text)
        named |= {extra for words in found for extra in words.split(",")}
    for _, text in sources("scalekd_cache/**/*.py"):
        for call in calls_of("import_optional", ast.parse(text)):
            if isinstance(extra := call.args[2], ast.Constant):
                named.add(extra.value)
    assert {"export", "remote", "gcs", "test"} <= named
    assert named <= EXTRAS


def test_extras_chosen_at_run_time_exist():

    assert set(SCHEMES.values()) <= EXTRAS
    assert set(LIBRARIES) <= EXTRAS


def test_the_claimed_pythons_are_those_of_the_readme():
    claimed = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    assert claimed[0] == SETUP["options"]["python_requires"].removeprefix(">=")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {', '.join(claimed[:-1])} or {claimed[-1]}" in readme


def test_the_image_is_installed_as_the_readme_says():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", text)).strip().splitlines()
    words = [line.split()[0] for line in lines if line]
    assert words == ["ARG", "FROM", "RUN", "ARG", "COPY", "WORKDIR", "RUN", "ENV", "WORKDIR", "CMD"]
    assert "FROM ${BASE}" in lines
    assert "pip install --no-cache-dir ." in text
    assert "pip install ." in (ROOT / "README.md").read_text(encoding="utf-8")
    admitted = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "pipelines", "scalekd_cache"} <= set(admitted)
    assert all((ROOT / name).exists() for name in admitted)
