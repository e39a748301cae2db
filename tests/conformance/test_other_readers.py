"""Readers in other languages, written from docs/FORMAT.md alone, pass the conformance kit."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from commands import LIMIT_S
from golden_codes import GOLDEN
from run_kit import CASES, case_names, check_case

SOURCE = CASES.parent / "readers" / "cpp" / "reader.cpp"


@pytest.fixture(scope="module")
def cpp_reader(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++)")
    program = tmp_path_factory.mktemp("reader") / "reader"
    subprocess.run([compiler, "-std=c++17", "-o", program, SOURCE, "-ldl"], check=True, timeout=LIMIT_S)
    return program


@pytest.mark.parametrize("name", case_names())
def test_the_cpp_reader_passes(cpp_reader, name):
    result = check_case(name, [str(cpp_reader)])
    if result.startswith("skipped"):
        pytest.skip(result)
    assert result == "passed"


@pytest.mark.parametrize("name", sorted(file.name for file in GOLDEN.glob("codec_*.json")))
def test_the_cpp_reader_decodes_the_golden_rows(cpp_reader, name):
    """Rows of shapes and forms that the small caches do not have: predicted channels of the transform coder."""
    command = [cpp_reader, "--rows", GOLDEN / name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if run.returncode == 3:
        pytest.skip(run.stderr.strip())
    found = "".join(json.loads(line) for line in run.stdout.splitlines())
    golden = json.loads((GOLDEN / name).read_text())
    one_each = [golden] if "config" in golden else [golden[form] for form in sorted(golden)]
    expected = "".join(one.get("decoded_float32") or "".join(row["decoded"] for row in one["rows"]) for one in one_each)
    if name == "codec_transform.json":  # sums of floats
        ours, theirs = (np.frombuffer(bytes.fromhex(text), "<f4") for text in (found, expected))
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    else:
        assert found == expected
