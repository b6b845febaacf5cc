"""Every widget of every notebook: all controls work, change the picture, and answer quickly.

A widget cell must run with nothing before it but the notebook's imports, the functions and the
constants (`RULES = ...`) that it names, and those that these name, so that it can be tested here
without a kernel, and read by itself.
"""

import ast
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"


def names_in(tree):
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def defines(node):
    """Return the name of the function or constant that a statement defines, else None."""
    if isinstance(node, ast.FunctionDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return name if (name := node.targets[0].id).isupper() else None
    return None


def widget_cells():
    for path in sorted(FOLDER.glob("*.ipynb")):
        cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        nodes = [node for source in cells for node in ast.parse(source).body]
        for i, source in enumerate(s for s in cells if "widgets.explore(" in s):
            needed = names_in(ast.parse(source))
            known = set()
            while needed != known:  # what is needed may need more
                known = needed
                needed = known.union(*(names_in(node) for node in nodes if defines(node) in known))
            before = [
                ast.unparse(node)
                for node in nodes
                if isinstance(node, ast.Import | ast.ImportFrom) or defines(node) in needed
            ]
            yield pytest.param("\n".join(before), source, id=f"{path.stem}-{i}")


def made_by(before, source):
    """Run a widget cell and return its `Explorer`, which the cell only displays."""
    tree = ast.parse(source)
    last = tree.body[-1]
    assert isinstance(last, ast.Expr), "a widget is the last expression of its cell"
    tree.body[-1] = ast.Assign([ast.Name("explorer", ast.Store())], last.value)
    space = {}
    exec(before, space)
    exec(compile(ast.fix_missing_locations(tree), "widget cell", "exec"), space)
    return space["explorer"]


@pytest.mark.parametrize(("before", "source"), list(widget_cells()))
def test_widget(before, source, caplog):
    explorer = made_by(before, source)
    moves = explorer.exercise()
    assert explorer.errors == []
    assert caplog.records == []
    assert not moves[moves.position == "default"].changed.any(), "the same setting, two pictures"
    for control, own in moves[moves.position != "default"].groupby("control"):
        assert own.changed.any(), f"moving {control} changes nothing"
    assert moves.compute_seconds.median() < 2  # on a loaded machine; 0.2 s on a quiet one
