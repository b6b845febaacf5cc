"""Settings for all tests: quiet, repeatable, without a screen.

The environment is inherited by the kernels that nbval and the tests of `ch11lib.notebooks` start,
so whatever only unit tests need is set in this process and not in the environment.
"""

import os
import random
import sys

import matplotlib
import numpy as np
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


def pytest_configure(config):
    if os.environ.get("CH11_IGNORE_STDERR") == "1":
        config.pluginmanager.register(IgnoreStderr(), "ch11-ignore-stderr")


def pytest_terminal_summary(terminalreporter):
    """Print what tests noted by `record_property("summary", text)`, whichever process ran them."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    for report in reports:
        for name, text in report.user_properties if report.when == "call" else ():
            if name == "summary":
                terminalreporter.write_line(text)
