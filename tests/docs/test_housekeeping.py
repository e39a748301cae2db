"""Files that maintainers and users expect: they exist, and their statements are true."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from commands import ENV, LIMIT_S, ROOT, execute

from benchmarks import harness as measure
from scalekd_cache import __version__
from scalekd_cache.config.plain_names import PLAIN_NAMES
from scalekd_cache.config.recipes import RECIPES


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_license_citation_and_version():
    assert "Apache License" in text_of("LICENSE")
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["version"] == __version__
    assert citation["references"][0]["url"] in text_of("README.md")
    assert f"## {__version__}" in text_of("CHANGELOG.md")
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_pre_commit_runs_the_checks_of_make_lint():
    hooks = [hook for repo in yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    lint = re.search(r"^lint:.*\n\t(.*)", text_of("Makefile"), re.MULTILINE)[1]
    assert [hook["entry"].split()[0:2][0] for hook in hooks] == re.findall(r"-m (\w+)", lint)


def test_test_files_have_different_names():
    """Two of one name in different rooms cannot be collected together."""
    names = [file.name for file in (ROOT / "tests").rglob("*.py") if file.name not in ("conftest.py", "__init__.py")]
    assert sorted(set(names)) == sorted(names)


def test_every_benchmark_has_its_place(monkeypatch, tmp_path):
    scripts = (ROOT / "benchmarks").rglob("*.py")
    names = {
        name
        for file in scripts
        for argument in re.findall(r"publish_table\(\s*([^,]+),", file.read_text(encoding="utf-8"))
        for name in re.findall(r'"([a-z0-9-]+)"', argument)
    } - {"cuda"}
    assert {"store", "heads-gpu", "codec-decode", "peers-reading"} <= names
    pages = [shutil.copyfile(page, tmp_path / page.name) for page in measure.PAGES]
    monkeypatch.setattr(measure, "PAGES", pages)
    for name in names:
        measure._put_table(name, f"the table of {name}")
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert all(f"the table of {name}\n<!-- end -->" in text for name in names)


@pytest.mark.parametrize(
    "page", ["CONTRIBUTING.md", "CHANGELOG.md", "README.md", *map(str, (ROOT / "docs").rglob("*.md"))]
)
def test_files_and_links_of_the_pages_exist(page):
    file = ROOT / page
    text = file.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    for link in links:
        assert (file.parent / link).exists(), f"{page}: {link}"
    if file.name == "CONTRIBUTING.md":
        names = re.findall(r"`((?:scalekd_cache|tests|docs)/[\w/.]+)`", text)
        assert len(names) > 12
        for name in names:
            assert (ROOT / name).exists(), name
    assert file.name == "LOG.md" or links or len(text) > 200


def _own_limits(tree):
    """Lines with calls that wait for another process or thread with a hard-coded number of seconds."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = [keyword.value for keyword in call.keywords if keyword.arg == "timeout"]
        given += call.args[:1] if name in ("wait", "communicate") else []
        if name != "urlopen" and any(
            isinstance(one, ast.Constant) and type(one.value) in (int, float) for one in given
        ):
            yield call.lineno


def test_what_the_tests_wait_for_has_one_limit():
    """Timeouts only end hangs: they are `commands.LIMIT_S`, at least ten minutes, so that a loaded machine passes."""
    assert list(_own_limits(ast.parse("process.wait(60); run(x, timeout=100)"))) == [1, 1]
    files = (ROOT / "tests").rglob("*.py")
    own = [f"{file.name}:{line}" for file in files for line in _own_limits(ast.parse(file.read_text(encoding="utf-8")))]
    assert own == []
    code = "import commands, os, conftest; print(commands.LIMIT_S, os.environ['PYTEST_TIMEOUT'])"
    raised = execute(
        "env", "-u", "PYTEST_TIMEOUT", "TEST_LIMIT_S=900", "PYTHONPATH=tests:tests/support", sys.executable, "-c", code
    )
    assert raised.split() == ["900.0", "2700.0"]
    assert LIMIT_S >= 600


@pytest.mark.slow
def test_a_built_package_holds_its_data_and_works_outside_of_the_repository(tmp_path, cache):
    source = tmp_path / "source"
    for name in ("scalekd_cache", "pipelines"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    words = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path), str(source)]
    subprocess.run([sys.executable, "-m", *words], check=True, timeout=LIMIT_S)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    for name in ("scalekd_cache/py.typed", "scalekd_cache/reports/templates/cache.html", "pipelines/recipes/demo.yaml"):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") or name.endswith("LICENSE") for name in names)
    words = ["pip", "install", "--no-deps", "--quiet", "--target", str(tmp_path / "site"), wheel.filename]
    subprocess.run([sys.executable, "-m", *words], check=True, timeout=LIMIT_S)
    (tmp_path / "home").mkdir()
    for words in (
        ("--help",),
        (
            "cache-teacher",
            "--pretrained",
            "false",
            "--data.max_samples",
            "64",
            "--teacher.check_classes=0",
            "--dry-run",
        ),
        ("distill", "--student", "test_resnet", "--cache", str(cache), "--dry-run"),
    ):
        subprocess.run(
            [tmp_path / "site" / "bin" / "scalekd", *words],
            check=True,
            timeout=LIMIT_S,
            cwd=tmp_path / "home",
            env={**ENV, "PYTHONPATH": str(tmp_path / "site")},
        )
    assert not list((tmp_path / "home").iterdir())


def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere():
    execute("make", "docs", "VENV=none", f"PYTHON={sys.executable}")
    site = ROOT / "build" / "docs"
    assert "Iteration resumes at" in (site / "reference" / "python.html").read_text(encoding="utf-8")
    command_line = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert all(f"scalekd {name}" in command_line for name in PLAIN_NAMES)
    assert "--train.epochs" in command_line
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*", page.read_text())
        assert not loaded, (page, loaded)


def test_every_page_is_in_the_navigation():
    nav = text_of("mkdocs.yml").partition("\nnav:\n")[2]
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r": ([\w/-]+\.md)$", nav, re.MULTILINE)) == pages | {"index.md"}


def test_documents_that_code_and_messages_name_exist():
    files = [
        file for room in ("scalekd_cache", "pipelines", "benchmarks", "tests") for file in (ROOT / room).rglob("*.*")
    ]
    texts = {file: file.read_text(encoding="utf-8") for file in files if file.suffix in (".py", ".yaml", ".sh")}
    named = [(name, file) for file, text in texts.items() for name in re.findall(r"\bdocs/[\w/-]+\.md\b", text)]
    assert len(named) > 30
    assert [(name, str(file)) for name, file in named if not (ROOT / name).is_file()] == []


def test_every_recipe_is_in_the_reference():
    page = text_of("docs/reference/recipes.md")
    assert set(re.findall(r"recipes/([\w-]+)\.yaml", page)) == {recipe.stem for recipe in RECIPES.glob("*.yaml")}
