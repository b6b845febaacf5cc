"""What is done survives Ctrl-C, killed processes, a full disk and two runs that share a file.

Faults that need no other process are in the tests of the modules.
"""

import contextlib
import importlib
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

from ch11lib import notebooks
import joblib
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError
import nbformat
import pandas as pd
import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")

# Slow enough to be stopped in the middle.
COMPARISON = """
import os, signal, time
from ch11lib.experiments import DenseNet, Interrupted, compare
import numpy as np

X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
NET = DenseNet(hidden=(8,), inputs=4, classes=2, learning_rate=0.1)

def slow(model):
    time.sleep(0.5)
    return {}

def results(file, seeds=range(5), net=NET, **options):
    data = (X, Y), (X, Y)
    return compare({"a": net}, data, seeds=seeds, epochs=2, measure=slow, resume=file, **options)

def main(file, seeds):
    try:
        results(file, seeds, n_jobs=1)
    except Interrupted as interruption:
        print(len(interruption.results.runs))

def deadly(seed):
    if seed == 3 and os.environ["MAIN"] != str(os.getpid()):
        os.kill(os.getpid(), signal.SIGKILL)
    return NET(seed)
"""


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    """Return a module that makes a comparison; other processes can import it, too."""
    (tmp_path / "comparison.py").write_text(COMPARISON)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield importlib.import_module("comparison")
    del sys.modules["comparison"]


def start(file, seeds):
    code = f"import comparison; comparison.main({str(file)!r}, {seeds})"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def kept(file):
    """Return the finished runs in a file; a line of anything else is an error."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line)["run"] for line in text.splitlines() if line]


def wait_for_runs(file, n, process):
    end = time.monotonic() + 120
    while len(kept(file)) < n:
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < end, "the process is too slow"
        time.sleep(0.02)


def table(results):
    return results.runs.drop(columns="seconds")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
def test_a_comparison_goes_on_where_it_was_stopped(comparison, tmp_path, how):
    file = tmp_path / "runs.jsonl"
    with start(file, range(5)) as process:
        wait_for_runs(file, 2, process)
        process.send_signal(how)
        printed = process.communicate(timeout=60)[0]
    done = len(kept(file))
    assert 2 <= done < 5
    if how == signal.SIGINT:
        assert done - int(printed) in (0, 1)  # it may have come right after a run was kept
    else:
        assert process.returncode == -signal.SIGKILL
    pd.testing.assert_frame_equal(table(comparison.results(file)), table(comparison.results(None)))
    assert len(kept(file)) == 5  # the runs of the other process were not made again


def test_two_comparisons_share_a_file(comparison, tmp_path):
    file = tmp_path / "runs.jsonl"
    with start(file, range(4)) as one, start(file, range(2, 6)) as other:
        assert (one.wait(120), other.wait(120)) == (0, 0)
    assert 6 <= len(kept(file)) <= 8
    all_of_both = table(comparison.results(file, range(6)))
    pd.testing.assert_frame_equal(all_of_both, table(comparison.results(None, range(6))))


# See test_experiments.py for the warning.
@pytest.mark.filterwarnings("default:A worker stopped while some jobs:UserWarning")
def test_a_worker_is_killed(comparison, tmp_path, monkeypatch):
    file = tmp_path / "runs.jsonl"
    monkeypatch.setenv("MAIN", str(os.getpid()))
    # Workers that another test has left know neither the module nor the variable.
    get_reusable_executor().shutdown(wait=True)
    with joblib.parallel_config("loky", n_jobs=2), pytest.raises(TerminatedWorkerError):
        comparison.results(file, net=comparison.deadly)
    assert len(kept(file)) < 5
    results = comparison.results(file, net=comparison.deadly)  # now without other processes
    pd.testing.assert_frame_equal(table(results), table(comparison.results(None)))
    assert len(kept(file)) == 5


@contextlib.contextmanager
def disk_full_at(size):
    """Let files grow to so many bytes only."""
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_in_a_comparison(comparison, tmp_path):
    file = tmp_path / "runs.jsonl"
    comparison.results(file, range(2))
    before = table(comparison.results(file, range(2)))
    with (
        disk_full_at(file.stat().st_size + 10),
        pytest.raises(OSError, match=r"cannot keep a finished run in resume=.*runs\.jsonl"),
    ):
        comparison.results(file)
    pd.testing.assert_frame_equal(table(comparison.results(file, range(2))), before)
    pd.testing.assert_frame_equal(table(comparison.results(file)), table(comparison.results(None)))


def test_a_full_disk_when_outputs_are_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    path = tmp_path / "long.ipynb"
    cell = nbformat.v4.new_code_cell("'x' * 300_000", id="long")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    before = path.read_bytes()
    with disk_full_at(200_000), pytest.raises(OSError, match=r"long\.ipynb could not be written"):
        notebooks.refresh(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in Path(tmp_path).glob("long*")) == ["long.ipynb"]
    notebooks.refresh(path)
    assert len(path.read_bytes()) > 300_000


def test_a_home_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    code = """
from ch11lib import datasets, training
from ch11lib.backend import keras
data = datasets.load_fashion_mnist().take(200).standardized()
model = keras.Sequential([keras.Input((28, 28)), keras.layers.Flatten(), keras.layers.Dense(10)])
model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
print(training.fit(model, data.x_train, data.y_train, epochs=2).epoch)
"""
    home = str(tmp_path / "file" / "home")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HOME": home, "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("[0, 1]\n", "")
