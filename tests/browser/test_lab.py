"""The notebooks in the real JupyterLab: they open, the first one runs, every widget moves."""

import json
from pathlib import Path
import re
import runpy

from ch11lib import notebooks
import nbformat
from nbformat.v4 import new_code_cell, new_notebook
import pytest

ROOT = Path(__file__).parents[2]
METADATA = {"kernelspec": notebooks.KERNELSPEC}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WIDGETS = runpy.run_path(str(ROOT / "tests" / "notebooks" / "test_notebook_widgets.py"))
# JupyterLab itself: a file that it looks for before there is one, and sourcemaps of its own.
HARMLESS = re.compile(r"404 \(Not Found\)|sourcemap|Source ?[mM]ap|workspaces|\[Violation\]")

CELLS = "window.jupyterapp.shell.currentWidget.content.widgets"
CODE = f"{CELLS}.filter(c => c.model.type == 'code')"


def complaints(console):
    return [text for text in console if not HARMLESS.search(text)]


def open_notebook(page, lab, path):
    page.goto(f"{lab.url}lab/tree/{path}?token=x&reset")
    page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell", timeout=60_000)
    page.wait_for_function(f"{CELLS}.length > 0", timeout=60_000)
    ready = "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status == 'idle'"
    page.wait_for_function(ready, timeout=90_000)


def run_all(page, seconds):
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    done = f"{CODE}.every(c => c.model.executionCount)"
    failed = f"{CODE}.some(c => c.model.outputs.toJSON().some(o => o.output_type == 'error'))"
    page.wait_for_function(f"{done} || {failed}", timeout=1e3 * seconds)
    assert [o for o in outputs(page) if o["output_type"] == "error"] == []


def outputs(page):
    """Return the outputs of all code cells, as a file would hold them."""
    return json.loads(
        page.evaluate(f"JSON.stringify({CODE}.map(c => c.model.outputs.toJSON()).flat())")
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_opens_without_a_word(page, lab, console, path):
    open_notebook(page, lab, f"notebooks/{path.name}")
    cells = nbformat.read(path, 4).cells
    assert page.evaluate(f"{CELLS}.length") == len(cells)
    heading = cells[0].source.splitlines()[0].removeprefix("# ")
    shown = page.locator(".jp-NotebookPanel h1").first
    assert shown.inner_text().removesuffix("¶").strip() == heading
    assert page.locator(".jp-Dialog").count() == 0
    assert complaints(console) == []


def test_the_first_one_runs_from_top_to_bottom(page, lab, console):
    open_notebook(page, lab, "notebooks/01_vanishing_and_exploding_gradients.ipynb")
    run_all(page, 240)
    kinds = {output["output_type"] for output in outputs(page)}
    assert kinds == {"stream", "display_data"}
    streams = [output for output in outputs(page) if output["output_type"] == "stream"]
    assert {output["name"] for output in streams} == {"stdout"}
    assert not any("FAILED" in "".join(output["text"]) for output in streams)
    assert page.locator(".jp-Dialog").count() == 0
    assert complaints(console) == []


def pieces():
    """Return the source of each widget of the series: what it needs, and its cell."""
    return [pytest.param(*p.values, id=p.id) for p in WIDGETS["widget_cells"]()]


def picture(page):
    """Return the address of the moving picture, which holds the picture itself."""
    return page.locator(".jupyter-widgets img").last.get_attribute("src")


def move(page, control):
    """Move a control with the keyboard alone, until the picture is another one, and go back."""
    before = picture(page)
    changed = f"[...document.querySelectorAll('.jupyter-widgets img')].at(-1).src != {before!r}"
    select, box, handle = (
        control.locator(s) for s in ("select", "input[type=checkbox]", ".noUi-handle")
    )
    target = next(t for t in (select, box, handle) if t.count())
    target.first.focus()
    chosen = select.evaluate("s => s.selectedIndex") if select.count() else None
    keys = {"End": "Home", "Home": "End"}
    if handle.count():
        keys = {"ArrowUp": "ArrowDown", "ArrowDown": "ArrowUp"} | keys
    for key, back in keys.items():
        page.keyboard.press("Space" if box.count() else key)
        try:
            page.wait_for_function(changed, timeout=10_000)
        except Exception as error:
            if "Timeout" not in type(error).__name__:
                raise
            continue
        # With another value of this control the next may have no effect.
        if select.count():
            select.select_option(index=chosen)
        else:
            page.keyboard.press("Space" if box.count() else back)
        page.wait_for_timeout(1_000)
        return True
    return False


@pytest.mark.parametrize(("before", "source"), pieces())
def test_widget_moves(page, lab, console, before, source, request):
    name = re.sub(r"\W+", "_", request.node.callspec.id) + ".ipynb"
    cells = [new_code_cell(before), new_code_cell(source)]
    nbformat.write(new_notebook(cells=cells, metadata=METADATA), lab.root / name)
    open_notebook(page, lab, name)
    run_all(page, 120)
    page.wait_for_selector(".jupyter-widgets img", timeout=30_000)
    controls = page.locator(".widget-slider, .widget-dropdown, .widget-checkbox").all()
    assert controls
    for control in controls:
        assert move(page, control), control.inner_text()
    assert page.locator(".jupyter-widgets [role=alert]").count() == 0
    assert complaints(console) == []
