"""Every widget of every notebook: all controls work, change the picture, and answer quickly.

A widget cell must run with nothing before it but the notebook's imports and the functions that it
names, so that it can be tested here without a kernel, and read by itself.
"""

import ast
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"


def widget_cells():
    for path in sorted(FOLDER.glob("*.ipynb")):
        cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        nodes = [node for source in cells for node in ast.parse(source).body]
        for i, source in enumerate(s for s in cells if "widgets.explore(" in s):
            names = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
            before = [
                ast.unparse(node)
                for node in nodes
                if isinstance(node, ast.Import | ast.ImportFrom)
                or (isinstance(node, ast.FunctionDef) and node.name in names)
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
