"""Tools and checked claims behind the notebook series on training deep networks.

Importing the package is cheap: TensorFlow is loaded by the modules that need it, through
`ch11lib.backend`. What this file does is to set quiet defaults *before* TensorFlow can be
imported; a variable that you have set yourself is left alone.
"""

import os

__version__ = "0.1.0"

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
