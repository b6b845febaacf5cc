"""What Binder reads: files that agree with the project's, and that repo2docker itself accepts."""

import os
from pathlib import Path
import shutil
import stat
import subprocess
import sys
import tomllib
import venv

from packaging.requirements import Requirement
import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "binder" / "environment.yml").read_text())
PYTHON, _, LISTED = ENVIRONMENT["dependencies"]


@pytest.fixture
def repository(tmp_path):
    """Copy what is committed of the project, without notebooks."""
    for name in ("binder", "ch11lib"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-TEXT"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_packages_are_those_of_the_project():
    def named(requirements):
        return {r.name: r for r in map(Requirement, requirements)}

    wanted = named(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["lab"])
    listed = named(LISTED["pip"])
    # On Binder there is no GPU and little disk: the wheel for CPUs, and nothing that asks for
    # `tensorflow`, which would be a second one; the script installs that without dependencies.
    listed["tensorflow"] = listed.pop("tensorflow-cpu")
    script = (ROOT / "binder" / "postBuild").read_text()
    listed |= named(r for r in PROJECT["dependencies"] if f'--no-deps "{r}"' in script)
    for needed in ("absl-py", "dm-tree", "mock", "six"):  # by the toolkit, see the script
        assert not listed.pop(needed).specifier
    assert {n: r.specifier for n, r in listed.items()} == {
        n: r.specifier for n, r in wanted.items()
    }
    assert "tf-keras" not in named(LISTED["pip"])


def test_python_is_that_of_the_conda_environment():
    root = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert root["dependencies"][0] == PYTHON
    assert ENVIRONMENT["channels"] == root["channels"]


@pytest.mark.filterwarnings("ignore:pythonjsonlogger.jsonlogger:DeprecationWarning")
def test_repo2docker_takes_it_for_a_conda_environment(repository, monkeypatch):
    from repo2docker.buildpacks import CondaBuildPack

    monkeypatch.chdir(repository)
    pack = CondaBuildPack("ubuntu:24.04")
    assert pack.detect()
    assert pack.python_version == PYTHON.removeprefix("python=")
    assert pack.get_post_build_scripts() == ["binder/postBuild"]
    assert pack.get_start_script().endswith("binder/start")


@pytest.mark.skipif(sys.platform == "win32", reason="Binder runs Linux")
@pytest.mark.parametrize("name", ["postBuild", "start"])
def test_scripts_can_be_executed(name):
    path = ROOT / "binder" / name
    assert path.stat().st_mode & stat.S_IXUSR
    assert path.read_text().startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Binder runs Linux")
def test_start_sets_what_the_notebooks_were_made_with():
    shown = subprocess.run(
        [ROOT / "binder" / "start", "env"], check=True, capture_output=True, text=True
    ).stdout
    variables = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    makefile = (ROOT / "Makefile").read_text()
    block = makefile.partition("NOTEBOOK_ENV :=")[2].partition("# A notebook's")[0]
    wanted = dict(word.split("=") for word in block.replace("\\", " ").split() if "=" in word)
    assert len(wanted) == 4
    assert wanted.items() <= variables.items()
    assert variables["TF_NUM_INTRAOP_THREADS"] == "2"


@pytest.mark.skipif(sys.platform == "win32", reason="Binder runs Linux")
def test_post_build_runs_in_a_fresh_environment(repository):
    """The dependencies are lent by the environment of the tests, the project is not."""
    folder = repository / "venv"
    venv.create(folder, with_pip=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    lent = next(path for path in sys.path if path.endswith("site-packages"))
    # At the end of the path, and without what .pth files there would add: the project itself.
    (site / "lent.pth").write_text(lent)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "PYTHONPATH": "", "PIP_RETRIES": "0"}
    result = subprocess.run(
        [repository / "binder" / "postBuild"],
        cwd=repository,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if "No matching distribution found" in result.stderr:
        pytest.skip("without an index of packages there is no setuptools to build with")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("smoke test: loss ")
    found = subprocess.run(
        [folder / "bin" / "python", "-c", "import ch11lib; print(ch11lib.__file__)"],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert Path(found.strip()).is_relative_to(site)
