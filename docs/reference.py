"""Write the reference of the library, from its docstrings: python docs/reference.py FOLDER."""

from pathlib import Path
import sys

import numpy.typing


class ArrayLike:
    """Stands for the dozen types that pdoc would print in its place."""

    __module__ = "numpy.typing"


numpy.typing.ArrayLike = ArrayLike  # before the library takes it

import pdoc  # noqa: E402

pdoc.render.configure(docformat="numpy", show_source=False)
pdoc.pdoc("ch11lib", "!ch11lib.__main__", output_directory=Path(sys.argv[1]))
