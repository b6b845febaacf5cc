"""Keras and TensorFlow, imported once and quietly.

Every module of the package takes both from here. The CUDA-capable wheel of TensorFlow writes
several lines to the process's stderr while it loads on a machine without a GPU; no setting stops
them, so the file descriptor points to the null device for that moment, and only for that moment.
"""

import contextlib
import os
import sys

import ch11lib  # noqa: F401  (sets the environment defaults that TensorFlow reads)

__all__ = ["keras", "quiet_stderr", "tf"]


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


with quiet_stderr():
    import keras
    import tensorflow as tf

    # Without this TensorFlow reserves a whole GPU for itself, and a second notebook fails.
    for _gpu in tf.config.list_physical_devices("GPU"):
        with contextlib.suppress(RuntimeError):  # devices are already in use: keep their setting
            tf.config.experimental.set_memory_growth(_gpu, True)
