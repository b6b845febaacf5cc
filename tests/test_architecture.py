"""Which module may import which, what importing costs, and that it is silent."""

import ast
from graphlib import TopologicalSorter
import os
from pathlib import Path
import re
import subprocess
import sys

import ch11lib
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
import pytest

PACKAGE = Path(ch11lib.__file__).parent
BASE = {"__init__", "backend"}
SHARED = {"datasets", "training", "fleets", "experiments", "claims", "plotting", "widgets"}
TOPICS = {
    *("signals", "initializers", "activations", "batch_norm", "clipping", "transfer"),
    *("pretraining", "optimizers", "tournament", "landscapes", "sparsity"),
    *("schedules", "regularization", "clinic"),
}
TOOLS = {"__main__", "notebooks", "doctor"}
# Reached through `ch11lib.backend` everywhere else, which is what keeps their start silent. These
# exceptions are parts without a public name; each is explained where it is imported.
PRIVATE = {"signals": {"tensorflow.python.eager", "tensorflow.python.ops"}}
LIGHT = {"claims", "datasets", "plotting", "notebooks", "doctor", "__main__"}

TREES = {path.stem: ast.parse(path.read_text("utf-8")) for path in PACKAGE.glob("*.py")}
MODULES = sorted(TREES)


def imports(tree):
    """Yield the full dotted name of everything that a module imports, wherever it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def siblings(module):
    """Return the modules of the package that a module imports."""
    names = set()
    for name in imports(TREES[module]):
        root, _, rest = name.partition(".")
        if root == "ch11lib":
            first = rest.partition(".")[0]
            names.add(first if first in TREES else "__init__")
    return names


def run(*args, **environment):
    """Run Python in a plain process, without the settings of the tests."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, *args],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# ------------------------------------------------------------------------------- arrows


@pytest.mark.parametrize("module", MODULES)
def test_arrows(module):
    assert sum(module in group for group in (BASE, SHARED, TOPICS, TOOLS)) == 1
    allowed = BASE if module in BASE else (BASE | SHARED) - {"widgets"}
    if module in TOOLS:
        allowed |= TOOLS
    assert siblings(module) <= allowed - {module}


def test_the_imports_form_no_cycle():
    graph = {module: siblings(module) - {"__init__"} for module in MODULES}
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) >= set(MODULES) - {"__init__"}


@pytest.mark.parametrize("module", MODULES)
def test_keras_and_tensorflow_come_from_the_backend(module):
    heavy = {n for n in imports(TREES[module]) if n.split(".")[0] in ("keras", "tensorflow")}
    if module == "backend":
        assert heavy == {"keras", "tensorflow"}
    else:
        assert {name.rpartition(".")[0] for name in heavy} == PRIVATE.get(module, set())
        assert not heavy or "backend" in siblings(module)


# -------------------------------------------------------------------------- public names


def own_definitions(tree):
    """Return what a module defines at its top level, by name."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {
                t.id: node
                for target in node.targets
                for t in ast.walk(target)
                if isinstance(t, ast.Name)
            }
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = node
    return found


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__"}))
def test_public_names_are_listed_defined_and_documented(module):
    tree = TREES[module]
    assert ast.get_docstring(tree)
    definitions = own_definitions(tree)
    public = ast.literal_eval(definitions.pop("__all__").value)
    assert len(set(public)) == len(public)
    if module == "backend":
        public = [name for name in public if name not in ("keras", "tf")]
    assert set(public) <= set(definitions)
    for name in public:
        node = definitions[name]
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert ast.get_docstring(node), name
    # What is neither listed nor private would be public by accident.
    functions = {n for n, d in definitions.items() if isinstance(d, ast.FunctionDef | ast.ClassDef)}
    stray = {name for name in functions if not name.startswith("_")} - set(public)
    assert stray <= {"main"}


# ------------------------------------------------------------------- weight and silence


def test_importing_the_package_is_quick():
    costs = []
    for _ in range(3):
        result = run("-X", "importtime", "-c", "import ch11lib")
        (line,) = re.findall(r"\|\s*(\d+) \|\s*ch11lib\n", result.stderr)
        costs.append(int(line) / 1e6)
    assert min(costs) < 0.2


def test_light_modules_do_without_tensorflow_and_warnings():
    names = ["ch11lib", *(f"ch11lib.{name}" for name in sorted(LIGHT & set(MODULES)))]
    program = (
        f"import sys, {', '.join(names)}\n"
        "print([name for name in ('tensorflow', 'keras', 'torch', 'jax') if name in sys.modules])"
    )
    result = run("-W", "error", "-c", program)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_quiet_defaults_leave_the_users_choice_alone():
    program = "import os, ch11lib; print(os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    assert run("-c", program).stdout == "3\n"
    assert run("-c", program, TF_CPP_MIN_LOG_LEVEL="1").stdout == "1\n"


FIRST_OPERATION = """\
from ch11lib.backend import keras, tf
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
_ = model(tf.ones((1, 3))), tf.function(lambda x: x + 1, jit_compile=True)(tf.ones(2))
"""


def test_tensorflow_starts_silently_in_a_plain_process():
    result = run("-c", FIRST_OPERATION)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_tensorflow_starts_silently_in_a_kernel(tmp_path):
    # A kernel as Jupyter starts it captures even what C++ code writes; later text still arrives.
    later = "import os, sys\nos.write(2, b'from C')\nprint('from Python', file=sys.stderr)"
    notebook = new_notebook(cells=[new_code_cell(FIRST_OPERATION), new_code_cell(later)])
    hidden = ("TF_", "PYTEST_", "MPLBACKEND")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=120, resources={"metadata": {"path": tmp_path}}
    )
    client.execute(env=environment, stderr=subprocess.DEVNULL)
    first, second = notebook.cells
    assert first.outputs == []
    text = "".join(output.text for output in second.outputs if output.get("name") == "stderr")
    assert "from C" in text
    assert "from Python" in text
