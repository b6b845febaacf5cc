"""Keras and TensorFlow, imported once and quietly.

Every module of the package takes both from here. The CUDA-capable wheel of TensorFlow writes
several lines to the process's stderr while it loads on a machine without a GPU; no setting stops
them, so the file descriptor points to the null device for that moment, and only for that moment.
"""

import contextlib
import ctypes
import os
import sys

import ch11lib  # noqa: F401  (sets the environment defaults that TensorFlow reads)

__all__ = ["keras", "quiet_stderr", "tf", "trim_memory", "xla_allowed"]


@contextlib.contextmanager
def quiet_stderr():
    """Discard what C and C++ code writes to stderr inside the ``with`` block."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _glibc(function, *arguments):
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        getattr(ctypes.CDLL(None), function)(*arguments)


def trim_memory():
    """Give memory that was freed back to the system, where the C library is glibc."""
    _glibc("malloc_trim", 0)


def xla_allowed() -> bool:
    """Say whether graphs may be compiled by XLA: unless the variable ``CH11_XLA`` is 0."""
    return os.environ.get("CH11_XLA") != "0"


# glibc keeps much of what is freed: it gives every thread an arena of its own, and stops returning
# large blocks to the system once it has seen such blocks freed. Notebooks with many models took up
# to 300 MB more for that. The three settings are in malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_glibc("mallopt", _M_ARENA_MAX, 2)
_glibc("mallopt", _M_MMAP_THRESHOLD, 2 << 20)
_glibc("mallopt", _M_TRIM_THRESHOLD, 64 << 20)

with quiet_stderr():
    import keras
    import tensorflow as tf

    # Without this TensorFlow reserves a whole GPU for itself, and a second notebook fails.
    for _gpu in tf.config.list_physical_devices("GPU"):
        with contextlib.suppress(RuntimeError):  # devices are already in use: keep their setting
            tf.config.experimental.set_memory_growth(_gpu, True)
