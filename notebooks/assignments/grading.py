"""What happens to a submission before nbgrader runs it: repair, then a look at the code.

nbgrader restores locked cells that were changed. It stops, with a message that does not help, when
cells were copied, when answer and test were both deleted, or when the metadata of a cell is
damaged; and it grades whatever the kernel says, even if a student's cell has replaced the functions
that the tests use. The two steps here close these gaps. Each writes down what it did, and the notes
become the first cell of the graded notebook, for the lecturer and for the student.
"""

import ast
from pathlib import Path
import warnings

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell
from nbgrader.api import Gradebook
from nbgrader.preprocessors import (
    CheckCellMetadata,
    ClearOutput,
    DeduplicateIds,
    NbGraderPreprocessor,
    OverwriteCells,
    OverwriteKernelspec,
)

__all__ = ["PREPROCESSORS", "Repair", "Report", "Review", "objection"]


def _fitting(nb, cell):
    """Return the cell without its id if the notebook is of an older format, which has none."""
    if (nb.nbformat, nb.nbformat_minor) < (4, 5):
        cell.pop("id", None)
    return cell


class Repair(NbGraderPreprocessor):
    """Give a submission the cells of the assignment, each of them once, and in their order.

    Of an answer, the student's text is kept; all else comes from the gradebook. Cells that are not
    part of the assignment stay where they are.
    """

    def preprocess(self, nb, resources):
        """Return the notebook with its cells put right, and the notes in the resources."""
        notes = resources["ch11_notes"] = []
        parts = self._assignment(resources["nbgrader"])  # in the order of the assignment
        places = {}
        for position, cell in enumerate(nb.cells):
            meta = cell.metadata.pop("nbgrader", None)
            name = meta.get("grade_id") if isinstance(meta, dict) else None
            if name in places:
                notes.append(f"There are several cells `{name}`: the last of them is graded.")
            if name in parts:
                places[name] = position
            elif name is not None:
                notes.append(f"Cell `{name}` is not part of the assignment: it is not graded.")

        cells, ordered = list(nb.cells), [name for name in parts if name in places]
        if sorted(places, key=places.get) != ordered:
            notes.append("Cells were not in the order of the assignment, and have been moved back.")
        where = dict(zip(ordered, sorted(places.values()), strict=True))
        for name, position in where.items():
            restored = self._restored(parts[name], cells[places[name]], notes)
            nb.cells[position] = _fitting(nb, restored)

        next_position = 0
        for name, part in parts.items():
            if name not in where:
                notes.append(f"Cell `{name}` was missing, and has been added as it was handed out.")
                where = {n: p + (p >= next_position) for n, p in where.items()}
                where[name] = next_position
                nb.cells.insert(next_position, _fitting(nb, self._restored(part, None, notes)))
            next_position = where[name] + 1
        return nb, resources

    def _assignment(self, about):
        """Return what the gradebook knows about each cell, in the order of the source notebook."""
        course = self.parent.parent.coursedir
        folder = course.format_path(course.source_directory, ".", about["assignment"])
        source = nbformat.read(Path(folder) / f"{about['notebook']}.ipynb", as_version=4)
        order = [c.metadata.nbgrader.grade_id for c in source.cells if "nbgrader" in c.metadata]
        with Gradebook(about["db_url"]) as gradebook:
            notebook = gradebook.find_notebook(about["notebook"], about["assignment"])
            points = {cell.name: cell.max_score for cell in notebook.grade_cells}
            answers = {cell.name for cell in notebook.solution_cells}
            parts = {
                cell.name: {
                    "name": cell.name,
                    "type": cell.cell_type,
                    "source": cell.source,
                    "checksum": cell.checksum,
                    "locked": cell.locked,
                    "points": points.get(cell.name),
                    "answer": cell.name in answers,
                }
                for cell in notebook.source_cells
            }
        return {name: parts[name] for name in order if name in parts}

    def _restored(self, part, cell, notes):
        """Return a cell with the gradebook's metadata, and with the student's text if it may."""
        new = new_code_cell if part["type"] == "code" else new_markdown_cell
        restored = new(part["source"])
        if cell is not None:
            if cell.cell_type != part["type"]:
                notes.append(f"Cell `{part['name']}` has its type back: {part['type']}.")
            if part["answer"]:
                restored.source = cell.source
            elif cell.source.strip() != self._released(part["source"]).strip():
                notes.append(f"Cell `{part['name']}` was changed, and is again as it was.")
        restored.metadata["nbgrader"] = {
            "grade": part["points"] is not None,
            "grade_id": part["name"],
            "locked": part["locked"],
            "schema_version": 3,
            "solution": part["answer"],
            "task": False,
            "checksum": part["checksum"],
        }
        if part["points"] is not None:
            restored.metadata["nbgrader"]["points"] = part["points"]
        return restored

    @staticmethod
    def _released(source):
        """Return a cell as it is handed out: without hidden tests."""
        lines, hidden = [], False
        for line in source.splitlines():
            if "BEGIN HIDDEN TESTS" in line:
                hidden = True
            elif "END HIDDEN TESTS" in line:
                hidden = False
            elif not hidden:
                lines.append(line)
        return "\n".join(lines)


# What students may import: what the assignments allow, and some that cannot do harm. The rest can
# reach the files, the kernel, and so the tests.
MODULES = {
    *("functools", "itertools", "math", "numpy", "scipy"),
    *("collections", "dataclasses", "matplotlib", "numbers", "random", "statistics", "time"),
    *("typing", "warnings"),
}
NAMES = {
    *("breakpoint", "compile", "delattr", "eval", "exec", "exit", "get_ipython", "getattr"),
    *("globals", "locals", "open", "quit", "setattr", "start_test", "vars"),
    *("_GIVEN", "_MODULES", "_ORIGINAL"),
}
ATTRIBUTES = {"builtins", "ctypeslib", "f2py", "gi_frame", "modules", "os", "subprocess", "sys"}


def objection(source):
    """Say why a student's cell is not to be run, or return None if nothing speaks against it.

    This finds accidents and simple tricks. It cannot find everything: see GUIDE.md.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except SyntaxError as error:
        return f"is not plain Python (line {error.lineno}: {error.msg})"
    except (ValueError, RecursionError) as error:
        return f"cannot be read ({error})"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            wanted = [node.module or "."]
            if any(alias.name in ATTRIBUTES | {"*"} for alias in node.names):
                return f"imports {', '.join(alias.name for alias in node.names)}"
        else:
            wanted = []
        for name in wanted:
            if name.partition(".")[0] not in MODULES or set(name.split(".")) & ATTRIBUTES:
                return f"imports {name}"
        if isinstance(node, ast.Name) and (node.id in NAMES or node.id.startswith("__")):
            return f"uses the name {node.id}"
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in NAMES:
            return f"defines {node.name}"
        if isinstance(node, ast.Attribute):
            if node.attr.startswith("_") or node.attr in ATTRIBUTES:
                return f"uses the attribute {node.attr}"
            inside = isinstance(node.value, ast.Name) and node.value.id == "self"
            if not isinstance(node.ctx, ast.Load) and not inside and node.attr != "shape":
                return f"gives {ast.unparse(node)} another value"
    return None


class Review(NbGraderPreprocessor):
    """Take out of the run what could change the tests; the code stays visible, as comments."""

    def preprocess_cell(self, cell, resources, index):
        """Replace a student's cell by an error that says why, if something speaks against it."""
        meta = cell.metadata.get("nbgrader", {})
        if cell.cell_type != "code" or meta.get("locked") or meta.get("grade"):
            return cell, resources
        reason = objection(cell.source)
        if reason is not None:
            name = f"Answer `{meta['grade_id']}`" if "grade_id" in meta else "A cell of your own"
            resources["ch11_notes"].append(f"{name} was not run, because it {reason}.")
            code = "".join(f"\n# {line}".rstrip() for line in cell.source.splitlines())
            cell.source = f"raise RuntimeError({f'Not run, because this cell {reason}.'!r}){code}"
        return cell, resources


class Report(NbGraderPreprocessor):
    """Put the notes at the top of the notebook, and into the log."""

    def preprocess(self, nb, resources):
        """Return the notebook with a first cell that lists what was done to it."""
        notes = list(dict.fromkeys(resources.pop("ch11_notes")))
        for note in notes:
            self.log.warning("%s: %s", resources["nbgrader"]["student"], note)
        if notes:
            text = "\n".join(f"- {note}" for note in notes)
            nb.cells.insert(0, _fitting(nb, new_markdown_cell(f"## Before grading\n\n{text}")))
        return nb, resources


PREPROCESSORS = [
    ClearOutput,
    Repair,
    DeduplicateIds,
    OverwriteKernelspec,
    OverwriteCells,
    CheckCellMetadata,
    Review,
    Report,
]
