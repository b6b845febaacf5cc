"""Settings for all tests: quiet, repeatable, without a screen.

The environment is inherited by the kernels that nbval and the tests of `ch11lib.notebooks` start,
so whatever only unit tests need is set in this process and not in the environment.
"""

import contextlib
import os
import random
import sys
import threading

import matplotlib
import numpy as np
import psutil
import pytest

# The same as in ch11lib.notebooks: what the committed outputs were made with.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# Kernels must draw inline figures: with this variable set, every figure cell would differ.
os.environ.pop("MPLBACKEND", None)
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _clean_slate(monkeypatch):
    """Start each test from the same random state and leave no figures behind."""
    monkeypatch.delenv("CH11_SEED", raising=False)
    monkeypatch.delenv("CH11_CLAIMS_LOG", raising=False)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (Keras and SciPy fall back on NumPy's global state)
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


class IgnoreStderr:
    """Make nbval accept new text on stderr, for stacks other than the one that is pinned.

    It is registered as a plugin of its own, because hooks of a conftest.py apply only to files
    below its folder, and the notebooks are elsewhere.
    """

    def pytest_collectstart(self, collector):
        compared = getattr(collector, "skip_compare", None)
        if compared is not None:
            collector.skip_compare = (*compared, "stderr")


class MemoryLimit(threading.Thread):
    """Kill kernels that take more memory than Binder leaves them, as Binder would.

    It grants 2 GB, of which JupyterLab itself takes less than 0.2. What a kernel shares with its
    children, such as TensorFlow's libraries, takes memory once.
    """

    def __init__(self, limit):
        super().__init__(daemon=True)
        self.limit, self.killed, self._over = limit, 0, threading.Event()

    def run(self):
        while not self._over.wait(0.2):
            for kernel in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    children = kernel.children(recursive=True)
                    own = sum(child.memory_full_info().uss for child in children)
                    if kernel.memory_info().rss + own > self.limit:
                        kernel.kill()
                        self.killed += 1

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self):
        report = (yield).get_result()
        if self.killed and report.failed:
            limit = f"{self.limit / 1e9:g} GB"
            report.sections.append(("memory", f"a kernel took more than {limit} and was killed"))

    def pytest_unconfigure(self):
        self._over.set()


def pytest_configure(config):
    if os.environ.get("CH11_IGNORE_STDERR") == "1":
        config.pluginmanager.register(IgnoreStderr(), "ch11-ignore-stderr")
    distributes = getattr(config.option, "numprocesses", None) and not hasattr(
        config, "workerinput"
    )
    if config.getoption("nbval", default=False) and not distributes:
        watch = MemoryLimit(float(os.environ.get("CH11_KERNEL_MEMORY", 1.8e9)))
        config.pluginmanager.register(watch, "ch11-memory-limit")
        watch.start()


def pytest_terminal_summary(terminalreporter):
    """Print what tests noted by `record_property("summary", text)`, whichever process ran them."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    for report in reports:
        for name, text in report.user_properties if report.when == "call" else ():
            if name == "summary":
                terminalreporter.write_line(text)
