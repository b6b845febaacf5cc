"""A course in a temporary folder, graded by nbgrader as a lecturer would do it."""

import ast
from dataclasses import dataclass
import importlib.util
import os
from pathlib import Path
import re
import shutil
import time

import nbformat
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from traitlets.config.loader import PyFileConfigLoader

ROOT = Path(__file__).parents[2] / "notebooks" / "assignments"
NAMES = tuple(sorted(path.name for path in (ROOT / "source").iterdir()))
ANSWERS = Path(__file__).parent / "answers"


def grading():
    """Return the module of the assignments that works on submissions."""
    spec = importlib.util.spec_from_file_location("ch11_grading", ROOT / "grading.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name, kind="source"):
    return nbformat.read(ROOT / kind / name / f"{name}.ipynb", as_version=4)


def about(cell):
    return cell.metadata.get("nbgrader", {})


def cell_of(nb, grade_id):
    [cell] = [cell for cell in nb.cells if about(cell).get("grade_id") == grade_id]
    return cell


@dataclass(frozen=True)
class Question:
    """An answer that tests decide about: a function, in one cell, with its tests in another."""

    name: str  # of the function
    answer: str  # ids of the two cells
    test: str
    points: float
    solution: str


def questions(name):
    """Return the questions of an assignment that are graded by tests, by the function's name."""
    found, answer = {}, None
    for cell in read(name).cells:
        meta = about(cell)
        if cell.cell_type == "code" and meta.get("solution"):
            answer = cell
        if cell.cell_type == "code" and meta.get("grade"):
            function = about(answer)["grade_id"].removeprefix(f"{name}-")
            found[function] = Question(
                function,
                about(answer)["grade_id"],
                meta["grade_id"],
                float(meta["points"]),
                answer.source,
            )
    return found


def written(name):
    """Return the points of the answers in words, by cell id."""
    return {
        about(cell)["grade_id"]: float(about(cell)["points"])
        for cell in read(name).cells
        if cell.cell_type == "markdown" and about(cell).get("grade")
    }


def answers(name, kind):
    """Return {function: {what: source of a cell}} from a file in answers/."""
    text = (ANSWERS / f"{name}_{kind}.py").read_text(encoding="utf-8")
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            function, what = node.name.split("__")
            source = ast.get_source_segment(text, node)
            source = source.replace(f"def {node.name}(", f"def {function}(", 1)
            assert what not in found.setdefault(function, {}), node.name
            found[function][what] = source.replace("  # noqa: F821", "")
    return found


def submission(name, sources=()):
    """Return the handed-out notebook with these sources of answers, by function."""
    nb = read(name, "release")
    for function, source in dict(sources).items():
        cell_of(nb, f"{name}-{function}").source = source
    return nb


def solved(name):
    """Return the handed-out notebook with all answers right, in words as well."""
    nb = submission(name, {q.name: q.solution for q in questions(name).values()})
    for grade_id in written(name):
        cell_of(nb, grade_id).source = "Because of the slope."
    return nb


@dataclass(frozen=True)
class Graded:
    """What became of one submission."""

    points: dict  # of each graded cell, None if a person has to decide
    manual: set  # cells that a person has to look at
    errors: dict  # the kind of error in each graded cell that failed
    report: str  # the first cell, if it says what was done before grading
    nb: nbformat.NotebookNode


class Course:
    """A folder with the assignments, configured as in the project."""

    def __init__(self, folder, timeout=None):
        self.folder, self.seconds = folder, 0.0
        shutil.copytree(ROOT / "source", folder / "source")
        for file in ("nbgrader_config.py", "grading.py"):
            shutil.copy(ROOT / file, folder)
        config = PyFileConfigLoader("nbgrader_config.py", path=str(folder)).load_config()
        config.CourseDirectory.root = str(folder)
        if timeout is not None:
            config.ExecutePreprocessor.timeout = timeout
        self.api = NbGraderAPI(config=config)
        self.config = config

    def release(self, name):
        outcome = self.api.generate_assignment(name)
        assert outcome["success"], outcome["log"] + str(outcome.get("error"))
        return self.folder / "release" / name / f"{name}.ipynb"

    def grade(self, name, submissions):
        """Grade a dict of notebooks in one run, and return a dict of what became of them.

        A notebook that could not be graded is missing there.
        """
        # Set by pytest, it would let the kernels hide what is written to the C-level stderr.
        os.environ.pop("PYTEST_CURRENT_TEST", None)
        for student, nb in submissions.items():
            path = self.folder / "submitted" / student / name / f"{name}.ipynb"
            path.parent.mkdir(parents=True)
            nbformat.write(nb, path)
        start = time.perf_counter()
        outcome = self.api.autograde(name, "*", force=False)
        self.seconds = (time.perf_counter() - start) / len(submissions)
        self.log = outcome["log"] or ""
        return {s: graded for s in submissions if (graded := self._graded(name, s)) is not None}

    def _graded(self, name, student):
        path = self.folder / "autograded" / student / name / f"{name}.ipynb"
        if not path.exists():
            return None
        nb = nbformat.read(path, as_version=4)
        with Gradebook(f"sqlite:///{self.folder}/gradebook.db") as gradebook:
            [notebook] = gradebook.find_submission(name, student).notebooks
            grades = {g.name: (g.auto_score, g.needs_manual_grade) for g in notebook.grades}
        errors = {}
        for cell in nb.cells:
            if about(cell).get("grade") and cell.cell_type == "code":
                kinds = [o.ename for o in cell.outputs if o.output_type == "error"]
                if kinds:
                    errors[about(cell)["grade_id"]] = kinds[-1]
        first = nb.cells[0].source
        return Graded(
            {grade_id: points for grade_id, (points, _) in grades.items()},
            {grade_id for grade_id, (_, manual) in grades.items() if manual},
            errors,
            first if first.startswith("## Before grading") else "",
            nb,
        )

    def feedback(self, name, student):
        outcome = self.api.generate_feedback(name, student)
        assert outcome["success"], outcome["log"] + str(outcome.get("error"))
        return (self.folder / "feedback" / student / name / f"{name}.html").read_text("utf-8")


HIDDEN = re.compile(r"^\s*### BEGIN HIDDEN TESTS$.*?^\s*### END HIDDEN TESTS$", re.M | re.S)
SOLUTION = re.compile(r"^\s*### BEGIN SOLUTION$.*?^\s*### END SOLUTION$", re.M | re.S)
