"""What `ch11lib.backend` does beyond importing Keras and TensorFlow."""

import os
import platform
import subprocess
import sys

from ch11lib.backend import quiet_stderr, trim_memory
import numpy as np
import psutil
import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries trim themselves")
def test_trim_memory_gives_freed_blocks_back():
    blocks = [np.ones(20_000) for _ in range(600)]  # 96 MB in blocks too small for a mapping each
    last = np.ones(20_000)  # on top of the heap, so that nothing below is returned by itself
    before = psutil.Process().memory_info().rss
    del blocks
    trim_memory()
    assert before - psutil.Process().memory_info().rss > 60e6
    assert last.sum() == 20_000


LARGE = """
import ch11lib.backend
import numpy as np
import psutil

for _ in range(3):  # glibc by itself would keep such blocks from the second time on
    large, last = np.ones(4_000_000), np.ones(20_000)
    before = psutil.Process().memory_info().rss
    del large
    print(before - psutil.Process().memory_info().rss)
    del last
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_large_arrays_go_back_without_being_asked():
    """In a process of its own: where a hole of that size is free, the block is put there."""
    done = subprocess.run([sys.executable, "-c", LARGE], check=True, capture_output=True, text=True)
    assert min(map(int, done.stdout.split())) > 25e6


def test_quiet_stderr_discards_and_restores(capfd):
    with quiet_stderr():
        os.write(2, b"noise\n")
    os.write(2, b"news\n")
    assert capfd.readouterr().err == "news\n"
