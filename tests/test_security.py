"""What is read cannot run code: what ruff's rules "S" do not know."""

import ast
from pathlib import Path

from ch11lib import datasets
from ch11lib.backend import keras
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
MODULES = [p for part in ("ch11lib", "docs", "benchmarks") for p in (ROOT / part).rglob("*.py")]
NOTEBOOKS = [p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_" not in str(p)]
KEYWORDS = {("allow_pickle", "True"), ("safe_mode", "False"), ("shell", "True")}
NAMES = ("joblib.load", "keras.config.enable_unsafe_deserialization")


def dangers(code):
    """List what in a piece of code could run what it reads, or a shell."""
    lines = code.splitlines()
    found = [line for line in lines if line.lstrip().startswith(("!", "%"))]  # Jupyter's magics
    for node in ast.walk(ast.parse("\n".join(line for line in lines if line not in found))):
        if isinstance(node, ast.keyword):
            if (node.arg, ast.unparse(node.value)) in KEYWORDS:
                found.append(ast.unparse(node.value))
        elif isinstance(node, ast.Attribute) and ast.unparse(node).endswith(NAMES):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "code",
    [
        "np.load('a.npy', allow_pickle=True)",
        "keras.models.load_model('a.keras', safe_mode=False)",
        "if x:\n    tf.keras.config.enable_unsafe_deserialization()",
        "x = joblib.load(path)",
        "subprocess.run('ls', shell=True)",
        "x = 1\n!ls",
    ],
)
def test_a_danger_is_found(code):
    assert len(dangers(code)) == 1


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_free_of_them(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_notebooks_are_free_of_them(path):
    cells = nbformat.read(path, 4).cells
    assert [d for cell in cells if cell.cell_type == "code" for d in dangers(cell.source)] == []


def test_downloads_are_encrypted():
    # That altered files are refused is tested in test_datasets.py.
    assert all(url.startswith("https://") for url in datasets._MIRRORS)


def test_a_model_file_with_code_in_it_is_refused(tmp_path):
    inputs = keras.Input((2,))
    keras.Model(inputs, keras.layers.Lambda(lambda x: 2 * x)(inputs)).save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="safe_mode"):
        keras.models.load_model(tmp_path / "m.keras")
