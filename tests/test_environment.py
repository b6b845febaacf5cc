"""The files around the package agree with each other, and their commands exist and work."""

import os
from pathlib import Path
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib

from ch11lib import __main__, __version__
import nbformat
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCUMENTS = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")}


def _blocks(text, *languages):
    """Return the contents of the fenced code blocks in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [content for language, content in found if language in languages]


needs_make = pytest.mark.skipif(
    shutil.which("make") is None or sys.platform == "win32", reason="make is not installed"
)


def _make(folder, *arguments, python="./fake-python"):
    """Run make as if from a shell, although these tests may have been started by a make."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", f"PYTHON={python}", *arguments],
        cwd=folder,
        env=variables | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# ------------------------------------------------------------------------------------- versions


def test_conda_environment_agrees_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    python, pip, listed = environment["dependencies"]
    assert pip == "pip"
    assert python.startswith("python=3.")
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    *listed, project = listed["pip"]
    assert project == "-e ."
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["lab"]
    assert sorted(listed) == sorted(wanted)


def test_gpu_variant_is_the_same_version():
    (comment,) = re.findall(r"# .*(tensorflow\[and-cuda\]\S*)", _text("environment.yml"))
    (wanted,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "tensorflow"]
    assert Requirement(comment).specifier == wanted.specifier


def _text(name):
    return (ROOT / name).read_text()


def test_one_version_everywhere():
    assert PROJECT["version"] == __version__
    assert yaml.safe_load(_text("CITATION.cff"))["version"] == __version__
    assert re.search(r"^## (\S+)", _text("CHANGELOG.md"), re.MULTILINE)[1] == __version__


def test_lowest_python_is_the_same_everywhere():
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert f"Python {lowest} or newer" in _text("README.md")
    assert f"Python {lowest} or newer" in _text("Makefile")
    assert f"version_info < ({lowest.replace('.', ', ')})" in _text("Makefile")


def test_licences():
    declared = set(PROJECT["license"].split(" AND "))
    assert declared == set(yaml.safe_load(_text("CITATION.cff"))["license"])
    for name in PROJECT["license-files"]:
        assert (ROOT / name).is_file()
    assert _text("LICENSE").startswith("MIT License")
    assert "https://creativecommons.org/licenses/by/4.0/legalcode" in _text("LICENSE-TEXT")
    assert "Copyright (c) 2017 Zalando SE" in _text("ch11lib/data/LICENSE-fashion-mnist")


def test_ci_runs_make_test_in_an_environment_of_its_own():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert lines.index("rm -rf .venv") < lines.index("make test")
    assert lines[-1] == "make test"
    subprocess.run(["bash", "-n", script], check=True)


def test_workflow_runs_make_test_and_nothing_else():
    (job,) = yaml.safe_load(_text(".github/workflows/test.yml"))["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test"]
    (python,) = [step["with"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert python == {"python-version": PROJECT["requires-python"].removeprefix(">=")}


# ------------------------------------------------------------------------------------- documents


def _commands():
    """Return every command in a shell block and every command between backquotes."""
    for name, text in DOCUMENTS.items():
        blocks = "".join(_blocks(text, "sh", "bat")).splitlines()
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        inline = re.findall(r"`([^`]+)`", prose.replace("\n", " "))
        for command in blocks + [i for i in inline if i.startswith(("make ", "python -m "))]:
            for part in command.split(" && "):
                yield pytest.param(part, id=f"{name}: {part}")


@pytest.mark.parametrize("command", list(_commands()))
def test_commands_in_the_documents_exist(command):
    words = shlex.split(re.sub(r"^(\w+=\S+ )+", "", command).replace("\\", "/"))
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", _text("Makefile"), flags=re.MULTILINE)
        assert words[1] in targets
    elif words[0] in ("py", "python3"):
        assert words[1:] == ["-m", "venv", ".venv"]
    elif words[0] == "conda":
        environment = yaml.safe_load(_text("environment.yml"))
        assert words[1:] in (
            ["env", "create", "-f", "environment.yml"],
            ["activate", environment["name"]],
        )
    elif words[0] == "python":
        _check_module(words[1], words[2], words[3:])
    else:
        assert words in ([".", ".venv/bin/activate"], [".venv/Scripts/activate"])


def _check_module(flag, module, arguments):
    assert flag == "-m"
    if module == "ch11lib":
        __main__._parser().parse_args(arguments)  # exits with status 2 if it does not exist
    elif module == "pip":
        assert arguments[0] == "install"
        requirement = arguments[-1]
        if arguments[1] == "-e":
            extra = re.fullmatch(r"\.(?:\[(\w+)\])?", requirement)[1]
            assert extra is None or extra in PROJECT["optional-dependencies"]
        else:
            assert Requirement(requirement).name in {
                Requirement(r).name for r in PROJECT["dependencies"]
            }
    elif module == "ch11lib.data.build":
        assert arguments == []
    else:
        extras = PROJECT["optional-dependencies"]
        assert module in {Requirement(r).name for r in extras["test"] + extras["lab"]}
        for word in arguments:
            path = word.removeprefix("--nbval-sanitize-with=")
            if "/" in path and not path.startswith("notebooks/"):
                assert (ROOT / path).exists()


@needs_make
def test_plain_commands_do_what_make_does():
    """The README's list for those without make is the recipe of ``make test``."""
    recipe = _make(ROOT, "-n", "test", "VENV=none", "NOTEBOOKS=one").stdout
    recipe = recipe.replace("\\\n", " ")
    (block,) = [b for b in _blocks(DOCUMENTS["README.md"], "sh") if "--nbval" in b]
    for command in block.splitlines():
        words = set(shlex.split(command)) - {"python"}
        assert any(words <= set(shlex.split(line)) for line in recipe.splitlines()), command


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)]+)\)", DOCUMENTS[name]):
        if not target.startswith(("https://", "notebooks/")):
            assert (ROOT / target).exists(), target


def test_table_of_notebooks_is_complete():
    there = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    if not there:
        pytest.skip("no notebook is written yet")
    assert set(re.findall(r"\]\(notebooks/([^)/]+\.ipynb)\)", DOCUMENTS["README.md"])) == there


def _times(text):
    """Return the last two cells of the rows that link to a notebook, by its name."""
    rows = re.findall(r"\]\((?:notebooks/)?([^/)]+\.ipynb)\).* \| (.*) \| (.*) \|$", text, re.M)
    return {name: (run, memory) for name, run, memory in rows}


def test_tables_of_notebooks_show_the_same_times():
    tables = _times(DOCUMENTS["README.md"])
    start = nbformat.read(ROOT / "notebooks/00_start_here.ipynb", as_version=4)
    words = "\n".join(cell.source for cell in start.cells if cell.cell_type == "markdown")
    assert {"00_start_here.ipynb": tables["00_start_here.ipynb"]} | _times(words) == tables
    for run, memory in tables.values():
        assert re.fullmatch(r"\d+ s", run)
        assert re.fullmatch(r"\d\.\d GB", memory)


def test_times_come_from_a_run(tmp_path):
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copy(ROOT / "notebooks/00_start_here.ipynb", tmp_path / "notebooks")
    name = "01_vanishing_and_exploding_gradients.ipynb"
    measured = f"notebook,seconds,peak_mb\nnotebooks/{name},40.1,909\n"
    (tmp_path / "times.csv").write_text(measured, encoding="utf-8")
    tables = runpy.run_path(str(ROOT / "docs/tables.py"))
    tables["main"](tmp_path / "times.csv", tmp_path)
    before, after = _times(DOCUMENTS["README.md"]), _times((tmp_path / "README.md").read_text())
    assert after == before | {name: ("45 s", "1.0 GB")}
    start = nbformat.read(tmp_path / "notebooks/00_start_here.ipynb", as_version=4)
    old = nbformat.read(ROOT / "notebooks/00_start_here.ipynb", as_version=4)
    (changed,) = [a.source for a, b in zip(start.cells, old.cells, strict=True) if a != b]
    assert ("45 s", "1.0 GB") in _times(changed).values()


def test_modules_in_the_readme_exist():
    table = DOCUMENTS["README.md"].partition("| module | for |")[2].partition("\n\n")[0]
    for name in re.findall(r"`(\w+)`", table):
        assert (ROOT / "ch11lib" / f"{name}.py").is_file(), name


def test_example_in_the_readme_runs(capsys):
    (code,) = _blocks(DOCUMENTS["README.md"], "python")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["history"].history["val_accuracy"]) == 2
    assert capsys.readouterr().out.strip()


# -------------------------------------------------------------------------------------- Makefile


@pytest.fixture
def project(tmp_path):
    """Copy what make reads, with a Python that makes environments which only write a log."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    stub = f'#!/bin/sh\necho "$*" "[${{MPLBACKEND-}}]" >> "{tmp_path}/log"\n'
    _program(
        tmp_path / "fake-python",
        f"""if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
            echo "$*" >> "{tmp_path}/log"
            mkdir -p .venv/bin
            printf '%s' {shlex.quote(stub)} > .venv/bin/python
            chmod +x .venv/bin/python
            touch .venv/pyvenv.cfg""",
    )
    return tmp_path


def _program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def _log(folder):
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [line.removesuffix(" [Agg]") for line in lines]


INSTALL = "-m pip --disable-pip-version-check install -e"


@needs_make
def test_make_alone_lists_its_targets(project):
    out = _make(project).stdout
    for target in ("help", "run", "test", "test-numerics", "lab", "refresh", "tables", "clean"):
        assert re.search(rf"^make {target} +\w", out, re.MULTILINE), target
    assert not (project / ".venv").exists()


@needs_make
def test_make_run_installs_once_and_again_after_a_change(project):
    assert _make(project, "run").returncode == 0
    assert _log(project) == ["-m venv --clear .venv", f"{INSTALL} .", "-m ch11lib run"]
    _make(project, "run", "ARGS=notebooks/01_a.ipynb")
    assert _log(project) == ["-m ch11lib run notebooks/01_a.ipynb"]
    later = (project / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(project / "pyproject.toml", (later, later))
    _make(project, "refresh")
    assert _log(project) == [f"{INSTALL} .", "-m ch11lib refresh"]


@needs_make
def test_make_tables_measures_first(project):
    assert _make(project, "tables").returncode == 0
    assert _log(project)[2:] == ["-m ch11lib run", "docs/tables.py build/notebooks.csv"]


@needs_make
def test_make_lab(project):
    assert _make(project, "lab").returncode == 0
    assert _log(project)[1:] == [
        f"{INSTALL} .[lab]",
        "-m jupyterlab notebooks/00_start_here.ipynb",
    ]


@needs_make
@pytest.mark.parametrize(
    ("target", "extra", "command"),
    [
        ("docs", "docs", "docs/reference.py build/html/api"),
        ("test-browser", "browser", "-m pytest -o addopts= -ra tests/browser"),
    ],
)
def test_make_of_one_command(project, target, extra, command):
    assert _make(project, target).returncode == 0
    assert _log(project)[1:] == [f"{INSTALL} .[{extra}]", command]


@needs_make
def test_make_test_numerics_varies_kernels_xla_threads_and_seeds(project):
    (project / "notebooks" / "01_a.ipynb").touch()
    python = project / ".venv" / "bin" / "python"
    _make(project, "test")
    names = ("CH11_SEED", "CH11_XLA", "TF_ENABLE_ONEDNN_OPTS", "OMP_NUM_THREADS")
    _program(python, " ".join(["echo", *(f'"${{{name}-}}"' for name in names), ">> varied"]))
    assert _make(project, "test-numerics").returncode == 0
    runs = [line.split(" ") for line in (project / "varied").read_text().splitlines()]
    assert runs == [["1", "", "1", ""], ["2", "0", "0", "1"]]
    _program(python, "exit 5")
    assert _make(project, "test-numerics").returncode != 0


@needs_make
def test_make_test_before_there_is_a_notebook(project):
    assert _make(project, "test").returncode == 0
    assert _log(project)[1:] == [
        f"{INSTALL} .[test]",
        "-m ruff check .",
        "-m ruff format --check .",
        "-m mypy",
        "-m pytest -n 2",
    ]


@needs_make
def test_make_test_compares_notebooks_as_they_were_made(project):
    (project / "notebooks" / "solutions").mkdir()
    (project / "notebooks" / "solutions" / "01_a.ipynb").touch()
    assert _make(project, "test").returncode == 0
    *_, nbval = _log(project)
    assert "--nbval " in nbval
    assert "loadscope" in nbval
    # An environment variable MPLBACKEND would take the figures out of the kernels.
    assert nbval.endswith(" tests/conftest.py notebooks []")


@needs_make
@pytest.mark.parametrize("failing", ["ruff check", "ruff format", "mypy", "pytest -n", "nbval"])
def test_make_test_fails_if_a_part_fails(project, failing):
    (project / "notebooks" / "01_a.ipynb").touch()
    _make(project, "test")
    _program(
        project / ".venv" / "bin" / "python", f'case "$*" in *{shlex.quote(failing)}*) exit 5; esac'
    )
    assert _make(project, "test").returncode != 0


@needs_make
def test_failed_installation_is_tried_again(project):
    broken = (project / "fake-python").read_text().replace(">> ", "; exit 1; : ")
    (project / "fake-python").write_text(broken)
    assert _make(project, "run").returncode != 0
    assert not (project / ".venv" / ".installed").exists()


@needs_make
def test_make_clean(project):
    _make(project, "run")
    for folder in ("build", "ch11lib/__pycache__", "ch11lib.egg-info"):
        (project / folder).mkdir(parents=True)
    assert _make(project, "clean").returncode == 0
    assert {path.name for path in project.iterdir()} == {
        *("Makefile", "pyproject.toml", "notebooks", "fake-python", "log", "ch11lib")
    }
    assert list((project / "ch11lib").iterdir()) == []


@needs_make
@pytest.mark.parametrize(
    ("forged", "message"),
    [
        (
            "sys.version_info = (3, 10, 14, 'final', 0); sys.version = '3.10.14 (main)'",
            "Python 3.11 or newer is needed, ./old-python is 3.10.14; "
            "name another: make PYTHON=python3.12",
        ),
        (
            "import importlib.util as u; f = u.find_spec; "
            "u.find_spec = lambda name: None if name == 'ensurepip' else f(name)",
            "./old-python cannot make virtual environments; "
            "on Debian and Ubuntu: sudo apt install python3-venv",
        ),
    ],
)
def test_make_with_an_unsuitable_python(project, forged, message):
    code = f"import sys; {forged}; exec(sys.argv[1])"
    _program(project / "old-python", f'exec {sys.executable} -c {shlex.quote(code)} "$2"')
    result = _make(project, "run", python="./old-python")
    assert result.returncode != 0
    first, *rest = result.stderr.splitlines()
    assert first == message
    assert all(line.startswith("make: ***") for line in rest)
    assert not (project / ".venv").exists()


@needs_make
def test_make_without_any_python(project):
    result = _make(project, "run", python="./no-python")
    assert result.returncode != 0
    assert result.stderr.startswith("There is no ./no-python: install Python 3.11 or newer, or ")
