"""How nbgrader makes, grades and returns the assignments; GUIDE.md says how to use it."""

import os
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parent))
from grading import PREPROCESSORS

# nbgrader starts a program called alembic, which is beside this Python, activated or not.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

c = get_config()  # noqa: F821  (nbgrader provides it)

c.CourseDirectory.course_id = "ch11"
c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE\nraise NotImplementedError()"}

# Seconds for each cell. Every test takes well below one; an endless loop costs all of them.
c.ExecutePreprocessor.timeout = 15

# By default, any text on stderr costs the points of the cell: a warning of NumPy, say, or a message
# of a library. It shall never decide: whatever is there is removed before the points are counted.
c.IgnorePattern.enabled = True
c.IgnorePattern.pattern = "^"

# Lost, doubled, moved or changed cells are put right, and cells that could change the tests do not
# run. What was done stands at the top of the graded notebook.
c.OverwriteCells.add_missing_cells = True
c.Autograde.sanitize_preprocessors = PREPROCESSORS
