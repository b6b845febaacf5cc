"""What nbval compares and what `nbval_sanitize.cfg` hides from it; what else our conftest adds."""

import os
from pathlib import Path
import re
import subprocess
import sys

from ch11lib.claims import number
from hypothesis import given, settings
from hypothesis import strategies as st
import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from nbval.plugin import get_sanitize_patterns
import pytest

CONFIG = Path(__file__).with_name("nbval_sanitize.cfg")
PATTERNS = get_sanitize_patterns(CONFIG.read_text(encoding="ascii"))


def sanitize(text):
    """Do what nbval does with the file."""
    for regex, replacement in dict(PATTERNS).items():
        text = re.sub(regex, replacement, text)
    return text


def test_no_rule_is_dropped():
    text = CONFIG.read_bytes()
    assert text.isascii()
    lines = [line for line in text.decode().splitlines() if line and line[0] not in "#["]
    assert len(PATTERNS) == 4
    assert len(lines) == 2 * len(PATTERNS)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("accuracy ~0.87", "accuracy ~0.9"),
        ("~0.87", "~-3.4e-07"),
        ("~12.5%", "~9%"),
        ("~1,234,567 bytes", "~999 bytes"),
        ("~9.9, ~32, ~100", "~12, ~3.1, ~0.1"),
        ("~+0.1", "~-0.1"),
        ("|   ~9.9|", "|  ~10.1|"),
        ("a  ~9.9  b", "a ~10.1  b"),
        ("<td>~0.87</td>", "<td>~0.1</td>"),
        (r"$\approx$ ~3", r"$\approx$ ~4.5"),
        ("~0.12 to ~0.34", "~0.1 to ~0.4"),
        ("    added\nx  ~0.87", "     added\nx  ~-0.87"),
        ("<f at 0x7f12ab34cd56>", "<f at 0x55aa11bb22cc>"),
        ("np.float64(0.5)", "0.5"),
        ("[np.float32(1.0), np.float64(2.0)]", "[1.0, 2.0]"),
    ],
)
def test_equal_after_sanitizing(one, other):
    assert sanitize(one) == sanitize(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("accuracy 0.87", "accuracy 0.88"),
        ("~0.87", "~nan"),
        ("~0.87", "~inf"),
        ("~0.87", "~-inf"),
        ("~0.87", "0.87"),
        ("~0.87", "~"),
        ("~0.87 better", "~0.87 worse"),
        ("~0.87%", "~0.87 s"),
        ("~1 of 3", "~1 of 4"),
        ("true  claim: ~0.5", "wrong  claim: ~0.5"),
        ("true  claim: ~0.5", "FAILED  claim: ~0.5"),
        ("0x10", "0x11"),
        ("np.float64(0.5)", "np.float64(0.6)"),
        ("np.float64(nan)", "np.float64(0.5)"),
        ("(784, 100)", "(784, 10)"),
        ("a\n~1", "a ~1"),
    ],
)
def test_different_after_sanitizing(one, other):
    assert sanitize(one) != sanitize(other)


def test_lines_without_marks_are_untouched():
    text = "PASS  784 weights, 0.25, 1e-07, 12 %, x ~ y, [1. 2.], float64, 3.1~, 100%"
    assert sanitize(text) == re.sub(" +", "_", text)


@given(x=st.floats(allow_nan=False, allow_infinity=False), digits=st.integers(1, 6))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_every_finite_number_is_hidden_completely(x, digits):
    assert sanitize(f"a {number(x, digits)} b") == "a~#b"


@pytest.mark.parametrize("x", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_stay_visible(x):
    assert sanitize(number(x)) == number(x)


def nbval(folder, *notebooks, seconds=60, **environment):
    """Run ``pytest --nbval`` as ``make test`` does; return the finished process."""
    root = Path(__file__).parents[1]
    options = [
        *("-q", "--nbval", "--nbval-current-env", f"--nbval-cell-timeout={seconds}"),
        *(f"--nbval-sanitize-with={CONFIG}", "-p", "no:cacheprovider"),
        *("-c", str(root / "pyproject.toml"), "--rootdir", str(root), "-o", "addopts="),
    ]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(root / "tests/conftest.py"), *notebooks],
        env=os.environ | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def write(path, source, *outputs):
    """Write a notebook of one executed cell with the given stored outputs."""
    cell = new_code_cell(source, execution_count=1, outputs=list(outputs))
    nbformat.write(new_notebook(cells=[cell]), path)


def stream(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def test_nbval_with_the_file_and_our_conftest(tmp_path):
    write(tmp_path / "same.ipynb", "print('claim: ~0.5')", stream("claim: ~0.123\n"))
    write(tmp_path / "diverged.ipynb", "print('claim: ~nan')", stream("claim: ~0.123\n"))
    write(tmp_path / "bare.ipynb", "print('claim: 0.5')", stream("claim: 0.6\n"))
    # Unit tests draw with Agg; the kernels must not, or every figure cell would differ.
    backend = "import matplotlib\nprint('inline' in matplotlib.get_backend())"
    write(tmp_path / "inline.ipynb", backend, stream("True\n"))
    write(tmp_path / "warns.ipynb", "import warnings\nwarnings.warn('new')")
    names = ["same", "diverged", "bare", "inline", "warns"]
    result = nbval(tmp_path, *(f"{name}.ipynb" for name in names), MPLBACKEND="Agg")
    assert result.stdout.startswith(".FF.F"), result.stdout + result.stderr
    # On a stack that is not the pinned one, a new warning may be let through, and only that.
    result = nbval(tmp_path, "warns.ipynb", "bare.ipynb", CH11_IGNORE_STDERR="1")
    assert result.stdout.startswith(".F"), result.stdout + result.stderr


def test_a_kernel_that_takes_too_much_memory_is_killed(tmp_path):
    write(tmp_path / "large.ipynb", "x = b'1' * 200_000_000\nimport time\ntime.sleep(2)")
    result = nbval(tmp_path, "large.ipynb", CH11_KERNEL_MEMORY="1e9")
    assert result.returncode == 0, result.stdout + result.stderr
    result = nbval(tmp_path, "large.ipynb", CH11_KERNEL_MEMORY="2e8", seconds=10)
    assert result.returncode == 1
    assert "a kernel took more than 0.2 GB and was killed" in result.stdout
