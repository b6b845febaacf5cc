"""Execute the notebooks of the series: renew their outputs, publish them, re-measure their claims.

`execute` runs one notebook in a fresh kernel and reports what went wrong instead of raising.
`refresh` writes the outputs back into the file and is the only way in which committed outputs are
made. `run` writes pages to read, `measure` repeats the claims over seeds; both leave the
notebooks as they are. ``python -m ch11lib refresh`` and ``run`` are thin wrappers around them.

What counts as a notebook of the series: ``NAME.ipynb`` in the folder and in its ``solutions``.
"""

import ast
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
from dataclasses import dataclass
from functools import cached_property
import hashlib
from html import escape
from importlib import metadata
import itertools
import json
import math
import os
from pathlib import Path
import platform
import re
import tempfile
import threading
import time
from typing import Any, BinaryIO

from ch11lib import claims
import joblib
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
import nbformat
from nbformat import NotebookNode
import pandas as pd
import psutil
from traitlets import default

__all__ = [
    "Execution",
    "NotebookError",
    "by_claim",
    "checked_claims",
    "clean",
    "discover",
    "execute",
    "fingerprint",
    "measure",
    "page",
    "read",
    "refresh",
    "run",
    "title",
]

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
CELL_TIMEOUT = 600.0


class NotebookError(Exception):
    """A notebook, or a list of notebooks, that cannot be used; the message says which and why."""


# ------------------------------------------------------------------------ finding and reading


def discover(paths: Iterable[str | os.PathLike] = ("notebooks",)) -> list[Path]:
    """List notebooks.

    Parameters
    ----------
    paths : iterable of path-like
        Notebook files, and folders that stand for their ``*.ipynb`` and ``solutions/*.ipynb``.

    Returns
    -------
    list of Path
        Without duplicates; the contents of a folder are sorted by name, solutions last.

    Raises
    ------
    NotebookError
        If a path does not exist, is not a notebook, or a folder holds none.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            here = sorted(path.glob("*.ipynb")) + sorted(path.glob("solutions/*.ipynb"))
            if not here:
                raise NotebookError(f"{path}: no notebooks in this folder")
            found.update(dict.fromkeys(here))
        elif path.is_file() and path.suffix == ".ipynb":
            found[path] = None
        elif path.exists():
            raise NotebookError(f"{path}: not a notebook (.ipynb)")
        else:
            raise NotebookError(
                f"{path}: no such file or folder; run this from the folder that holds notebooks/, "
                "or name the notebooks"
            )
    return list(found)


def read(path: str | os.PathLike) -> NotebookNode:
    """Read a notebook of format 4.5 whose cells have unique ids.

    Parameters
    ----------
    path : path-like
        The file.

    Returns
    -------
    NotebookNode
        The notebook, validated.

    Raises
    ------
    NotebookError
        If the file is not such a notebook. Nothing is repaired silently: an id that is made up
        anew at each reading would make every refresh a change.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        version = (document["nbformat"], document["nbformat_minor"])
        ids = [cell.get("id") for cell in document["cells"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotebookError(f"{path}: not a notebook: {error!r}") from error
    if version != (4, 5):
        raise NotebookError(f"{path}: notebook format must be 4.5, found {version[0]}.{version[1]}")
    if None in ids or len(set(ids)) != len(ids):
        raise NotebookError(f"{path}: every cell must have an id of its own")
    notebook = nbformat.from_dict(document)
    _rejoin_lines(notebook)
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        raise NotebookError(f"{path}: not a valid notebook: {error.message}") from error
    return notebook


def _rejoin_lines(notebook: NotebookNode) -> None:
    nbformat.v4.rwbase.rejoin_lines(notebook)


def title(notebook: NotebookNode) -> str:
    """Return the text of a notebook's first level-1 heading.

    Parameters
    ----------
    notebook : NotebookNode
        The notebook.

    Returns
    -------
    str
        The title, or an empty string if there is none.

    Examples
    --------
    >>> cell = nbformat.v4.new_markdown_cell("# Weight initialization")
    >>> title(nbformat.v4.new_notebook(cells=[cell]))
    'Weight initialization'
    """
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = re.search(r"^# +(.+?)\s*$", cell.source, flags=re.MULTILINE)
            if found:
                return found[1]
    return ""


def checked_claims(notebook: NotebookNode) -> list[tuple[str | None, int]]:
    """Find the calls of ``claims.check`` in a notebook without running it.

    Parameters
    ----------
    notebook : NotebookNode
        The notebook.

    Returns
    -------
    list of (str or None, int)
        The id and the position of the cell for each call; None where the id is not written out.
        Cells that are not valid Python are passed over.

    Examples
    --------
    >>> cell = nbformat.v4.new_code_cell("claims.check('some-claim', claims.below(x, 1))")
    >>> checked_claims(nbformat.v4.new_notebook(cells=[cell]))
    [('some-claim', 0)]
    """
    found: list[tuple[str | None, int]] = []
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        with contextlib.suppress(SyntaxError):
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Call) and re.fullmatch(
                    r"(ch11lib\.)?claims\.check", ast.unparse(node.func)
                ):
                    first = node.args[0] if node.args else None
                    literal = first.value if isinstance(first, ast.Constant) else None
                    found.append((literal if isinstance(literal, str) else None, position))
    return found


# ---------------------------------------------------------------------------------- executing


@dataclass(frozen=True)
class Execution:
    """What came out of executing a notebook.

    Attributes
    ----------
    path : Path
        The file that was read.
    notebook : NotebookNode
        Its cells with the new outputs, as the kernel sent them; see `clean`.
    seconds : float
        Wall time, with the start of the kernel.
    peak_mb : float
        Largest memory of the kernel and its child processes, in units of 10**6 bytes.
    errors : tuple of str
        What makes the results unusable: an exception that is not announced by the tag
        ``raises-exception``, an announced one that did not come, a dead kernel, a timeout, an
        exception in a widget's callback. Each names the notebook and the cell.
    warnings : tuple of str
        What must not be committed but does not harm a reader: text on stderr, empty cells.
    claims : tuple of dict
        The records that ``claims.check`` logged, if `execute` was asked for them.
    """

    path: Path
    notebook: NotebookNode
    seconds: float
    peak_mb: float
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    claims: tuple[dict, ...] = ()

    @property
    def failed_claims(self) -> list[str]:
        """The ids of the claims that were contradicted, or checked nowhere because of an error."""
        return [id for id, holds in self._outcomes.items() if not holds]

    @property
    def n_claims(self) -> int:
        """Number of claims that the notebook's cells check."""
        return len(self._outcomes)

    @cached_property
    def _outcomes(self) -> dict[str, bool]:
        outcomes = {id: False for id, _ in checked_claims(self.notebook) if id is not None}
        for id in {record["id"] for record in self.claims}:
            outcomes[id] = all(r["holds"] for r in self.claims if r["id"] == id)
        return outcomes


class _KernelManager(AsyncKernelManager):
    """Starts the kernel of the running Python, whatever kernels this user has installed."""

    @default("kernel_spec_manager")
    def _this_environment(self) -> KernelSpecManager:
        return KernelSpecManager(parent=self, kernel_dirs=[])


class _Client(NotebookClient):
    async def _async_poll_kernel_alive(self) -> None:
        # On Ctrl-C nbclient lets go of the kernel that this task still looks after.
        with contextlib.suppress(AssertionError):
            await super()._async_poll_kernel_alive()


class _Memory:
    """Watches the memory of a process and its children, from a thread and when asked to look."""

    def __init__(self) -> None:
        self.peak = 0
        self._process: psutil.Process | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._thread.start()

    def look(self) -> None:
        with contextlib.suppress(psutil.Error, OSError):  # the process may have ended
            self.peak = max(self.peak, _peak(self._process), _now(self._process))

    def stop(self) -> None:
        self._stop.set()
        if self._process is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self.look()


def _now(process: psutil.Process) -> int:
    """Memory of a process and its children at this moment, in bytes.

    Of the children, what they share with no other process: TensorFlow's libraries take 0.4 GB, but
    only once.
    """
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may have ended since it was listed
            total += child.memory_full_info().uss
    return total


def _peak(process: psutil.Process) -> int:
    """Largest memory of a process so far, in bytes, or 0 where the system does not record it."""
    status = Path(f"/proc/{process.pid}/status")
    if status.exists():  # Linux
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        return int(found[1]) * 1024 if found else 0
    return getattr(process.memory_info(), "peak_wset", 0)  # Windows; macOS has neither


def _environment(changes: dict[str, str]) -> dict[str, str]:
    """Return the environment in which notebooks are executed, here and in the tests alike."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MPLBACKEND", "CH11_SEED", "CH11_CLAIMS_LOG")
    }
    environment |= {
        # Under this variable, which nbval's kernels have too, a kernel does not capture what C
        # and C++ code prints; such text would differ between machines.
        "PYTEST_CURRENT_TEST": "refresh",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "PYTHONHASHSEED": "0",
        "OPENBLAS_NUM_THREADS": "1",  # small products: threads only get in each other's way
    }
    return environment | changes


def execute(
    path: str | os.PathLike,
    *,
    env: dict[str, str] | None = None,
    log_claims: bool = False,
    timeout: float = CELL_TIMEOUT,
    on_cell: Callable[[], object] | None = None,
) -> Execution:
    """Run a notebook from top to bottom in a fresh kernel, in its own folder.

    Parameters
    ----------
    path : path-like
        The notebook. The file is not changed.
    env : dict of str to str, optional
        Environment variables to add.
    log_claims : bool
        Collect the outcome of every ``claims.check``; a contradicted claim is then printed, and
        recorded, instead of raised.
    timeout : float
        Seconds that a single cell may take.
    on_cell : callable, optional
        Called without arguments after each code cell.

    Returns
    -------
    Execution
        Also when the notebook fails: see its `errors`.

    Raises
    ------
    NotebookError
        If the file is not a notebook as described at `read`.
    """
    path = Path(path)
    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    memory, position, errors = _Memory(), [0], []

    def started(notebook: NotebookNode) -> None:
        manager: Any = client.km
        memory.start(manager.provisioner.pid)

    def begins(cell: NotebookNode, cell_index: int) -> None:
        position[0] = cell_index

    def ended(cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        memory.look()
        if on_cell is not None:
            on_cell()

    def fail(what: str) -> None:
        errors.append(f"{_where(path, notebook, position[0])}: {what}")

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as terminal:
        log = Path(folder, "claims.jsonl")
        changes = dict(env or {})
        if log_claims:
            changes["CH11_CLAIMS_LOG"] = str(log)
        client = _Client(
            notebook,
            timeout=timeout,
            startup_timeout=180,
            kernel_name="python3",
            kernel_manager_class=_KernelManager,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent)}},
            on_notebook_start=started,
            on_cell_execute=begins,
            on_cell_executed=ended,
        )
        try:
            client.execute(env=_environment(changes), stdout=terminal, stderr=terminal)
        except CellExecutionError as error:
            fail(f"{error.ename}: {error.evalue}")
        except CellTimeoutError:
            fail(f"no end after {timeout:g} seconds")
        except (DeadKernelError, RuntimeError, AssertionError) as error:
            # nbclient answers Ctrl-C by ending the kernel, after which anything may be missing.
            if hasattr(client, "_async_cleanup_kernel_future"):
                raise KeyboardInterrupt from None
            if not isinstance(error, DeadKernelError):
                raise
            fail("the kernel died, perhaps for lack of memory" + _last_words(terminal))
        finally:
            memory.stop()
        seconds = time.perf_counter() - start
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    if not errors:
        errors += _widget_errors(path, notebook) + _missing_errors(path, notebook)
    return Execution(
        path=path,
        notebook=notebook,
        seconds=seconds,
        peak_mb=memory.peak / 1e6,
        errors=tuple(errors),
        warnings=tuple(_blemishes(path, notebook)),
        claims=tuple(json.loads(line) for line in lines),
    )


def _where(path: Path, notebook: NotebookNode, position: int) -> str:
    """Name a cell as a reader finds it: by its number in brackets and its first line."""
    count = sum(
        cell.cell_type == "code" and bool(cell.source.strip())
        for cell in notebook.cells[: position + 1]
    )
    first = (notebook.cells[position].source.strip().splitlines() or [""])[0]
    return f"{path}, cell [{count}] `{first[:60]}`"


def _last_words(terminal: BinaryIO) -> str:
    """Return what the kernel's process wrote to the terminal, shortened."""
    terminal.seek(0)
    text = terminal.read().decode(errors="replace")
    lines = [line for line in text.splitlines() if "without encryption" not in line]
    return "; its last words: " + " / ".join(lines[-3:]) if lines else ""


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _widget_errors(path: Path, notebook: NotebookNode) -> list[str]:
    """Find exceptions that an output widget swallowed."""
    state = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    found = []
    for model in state.values():
        for output in model.get("state", {}).get("outputs", ()):
            if output.get("output_type") == "error":
                found.append(f"{path}, in a widget: {output['ename']}: {output['evalue']}")
            elif output.get("name") == "stderr":
                found.append(f"{path}, in a widget: text on stderr: {output['text'].strip()}")
    return found


def _missing_errors(path: Path, notebook: NotebookNode) -> list[str]:
    """Find cells that announce an exception and raise none."""
    return [
        f"{_where(path, notebook, position)}: tagged raises-exception, but nothing was raised"
        for position, cell in enumerate(notebook.cells)
        if "raises-exception" in _tags(cell)
        and not any(output.output_type == "error" for output in cell.get("outputs", ()))
    ]


def _blemishes(path: Path, notebook: NotebookNode) -> Iterator[str]:
    """Find what must not be committed although the notebook ran."""
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        where = _where(path, notebook, position)
        if not cell.source.strip():
            yield f"{where}: empty code cell"
        if "skip-execution" in _tags(cell):
            yield f"{where}: tagged skip-execution"
        for output in cell.outputs:
            if output.get("name") == "stderr":
                yield f"{where}: text on stderr: {output.text.strip()}"


# ---------------------------------------------------------------------------------- refreshing


def clean(notebook: NotebookNode) -> None:
    """Remove, in place, what differs from one execution to the next or from machine to machine.

    That is: the state and the random view names of widgets (their text stays), the times of
    execution, and all of the kernel's description but its name. Nothing else is touched.

    Parameters
    ----------
    notebook : NotebookNode
        An executed notebook.
    """
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = nbformat.from_dict(KERNELSPEC)
    notebook.metadata["language_info"] = nbformat.from_dict({"name": "python"})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop(WIDGET_VIEW, None)


def refresh(
    path: str | os.PathLike,
    *,
    timeout: float = CELL_TIMEOUT,
    on_cell: Callable[[], object] | None = None,
) -> Execution:
    """Execute a notebook and write the outputs into its file.

    Refreshing twice changes nothing: the same notebook gives the same bytes.

    Parameters
    ----------
    path : path-like
        The notebook.
    timeout : float
        Seconds that a single cell may take.
    on_cell : callable, optional
        Called without arguments after each code cell.

    Returns
    -------
    Execution
        Measurements of the execution.

    Raises
    ------
    NotebookError
        If there was any error or warning (see `Execution`); the file is then left as it was.
    OSError
        If the file cannot be written.
    """
    execution = execute(path, timeout=timeout, on_cell=on_cell)
    problems = execution.errors + execution.warnings
    if problems:
        raise NotebookError("\n".join(problems))
    clean(execution.notebook)
    nbformat.validate(execution.notebook)
    text = nbformat.writes(execution.notebook, version=4).rstrip("\n") + "\n"
    # The replacement is atomic, so an interruption leaves either the old file or the new one.
    part = execution.path.with_suffix(".part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, execution.path)
    except OSError as error:
        raise OSError(f"{path} could not be written, and is as it was: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return execution


# ---------------------------------------------------------------------------------- publishing

# JupyterLab's page as nbconvert knows it, without scripts (formulas become MathML), with text
# alternatives (which that template forgets) and a line that fits the eye.
_PAGE = """\
{%- extends 'index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_css -%}
<style>
  main { max-width: 60rem; margin: 0 auto; padding: 0 1rem; }
  .jp-InputPrompt, .jp-OutputPrompt { display: none; }
  .jp-RenderedImage img { max-width: 100%; height: auto; }
  .jp-RenderedText pre { word-break: normal; overflow-wrap: anywhere; }
  .jp-RenderedHTMLCommon a:link { text-decoration: underline; }
  div.highlight .m, div.highlight [class^="m"] { color: #007000; }  /* the theme's are too pale */
  div.highlight .o, div.highlight .ow { color: #8a1bd1; }
  div.highlight [class^="c"] { color: #306a6a; }
  math { font: 1.1em "STIX Two Math", "Cambria Math", "Latin Modern Math", math; }
  nav.series { font-family: system-ui, sans-serif; padding: 1rem 0; }
  nav.series { display: flex; justify-content: space-between; gap: 1rem; }
</style>
{%- endblock -%}
{%- block body_header -%}
{{ super() }}{{ resources.navigation | replace("@", "above") }}
{%- endblock -%}
{%- block body_footer -%}
{{ resources.navigation | replace("@", "below") }}{{ super() }}
{%- endblock -%}
{%- block data_png scoped -%}
<div class="jp-RenderedImage jp-OutputArea-output {{ extra_class }}">
<img src="data:image/png;base64,{{ output.data['image/png'] | escape_html }}"
{%- set alt = output | get_metadata('alt', 'image/png') -%}
{%- if alt %} alt="{{ alt | escape_html }}"{% endif %}>
</div>
{%- endblock -%}
"""

_LIST_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: {width}; margin: 2rem auto; padding: 0 1rem; }}
  div[role=region] {{ overflow-x: auto; }}
  td, th {{ padding: 0.2rem 1rem 0.2rem 0; text-align: left; vertical-align: top; }}
  td.number, th.number {{ text-align: right; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""  # noqa: E501

# What `measure` found over many seeds (`make margins`), a line per claim as `by_claim` returns it.
_MARGINS = Path(__file__).with_name("margins.csv")

_NOTEBOOK_LINK = re.compile(r'(<a\b[^>]*\bhref="(?![a-z]+:|/)[^"#?]*)\.ipynb(?=["#])')


def page(path: str | os.PathLike) -> Path:
    """Return where the page of a notebook goes, relative to the folder of all pages.

    Parameters
    ----------
    path : path-like
        The notebook.

    Returns
    -------
    Path
        ``NAME.html``, or ``solutions/NAME.html``, so that links between notebooks keep their form.

    Examples
    --------
    >>> page("notebooks/solutions/01_gradients.ipynb").as_posix()
    'solutions/01_gradients.html'
    """
    path = Path(path)
    folder = Path("solutions") if path.resolve().parent.name == "solutions" else Path()
    return folder / f"{path.stem}.html"


def _html(execution: Execution, navigation: str) -> str:
    """Convert an executed notebook to a page that needs neither a kernel nor JavaScript."""
    from latex2mathml.converter import convert
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str) -> str:
            return convert(body)

        def block_math(self, body: str) -> str:
            return convert(body, display="block")

    class Exporter(HTMLExporter):
        def default_filters(self) -> Iterator[tuple[str, Callable]]:
            yield from super().default_filters()
            yield "markdown2html", self.text

        def text(self, source: str) -> str:
            renderer = Renderer(escape=False, anchor_link_text=self.anchor_link_text)
            text = MarkdownWithMath(renderer=renderer).render(source)
            return _NOTEBOOK_LINK.sub(r"\1.html", text)

    notebook = nbformat.from_dict(execution.notebook)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["title"] = title(notebook) or execution.path.stem
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if WIDGET_VIEW in output.get("data", {}):
                # Its text is a Python repr; a page without a kernel has nothing to move.
                note = "<p><em>Here stand controls to move; run the notebook to use them.</em></p>"
                output["data"] = nbformat.from_dict({"text/html": note})
    # Not embed_images: it would close every HTML tag of the text, and so unfold the answers.
    exporter = Exporter(raw_template=_PAGE, embed_images=False)
    resources = {
        "metadata": {"path": str(execution.path.parent), "name": execution.path.stem},
        "navigation": navigation,
    }
    return exporter.from_notebook_node(notebook, resources)[0]


def _navigation(path: Path, pages: dict[Path, str]) -> str:
    """Return links to the page before, the index and the page after, among `pages`."""
    here = page(path)
    shelf = sorted(other for other in pages if other.parent == here.parent)
    position = shelf.index(here)
    before, after = shelf[:position][-1:], shelf[position + 1 :][:1]
    root = "../" if here.parent.name else ""
    parts = [
        "".join(f'<a rel="prev" href="{p.name}">&larr; {escape(pages[p])}</a>' for p in before),
        f'<a href="{root}index.html">All notebooks</a>',
        "".join(f'<a rel="next" href="{p.name}">{escape(pages[p])} &rarr;</a>' for p in after),
    ]
    spans = "".join(f"<span>{part}</span>" for part in parts)
    return f'<nav class="series" aria-label="Notebooks, @">{spans}</nav>\n'


def _index(pages: dict[Path, str], executions: dict[Path, Execution], html: Path) -> str:
    rows, reference = [], "api/ch11lib.html"  # which `make docs` writes
    for target in sorted(pages, key=lambda p: (p.parent.name != "", p)):
        cells = ["", "", ""]
        remarks = "from an earlier run"
        if target in executions:
            one = executions[target]
            holding = one.n_claims - len(one.failed_claims)
            cells = [
                f"{one.seconds:.0f}",
                f"{one.peak_mb:.0f}",
                f"{holding} of {one.n_claims}" if one.n_claims else "",
            ]
            remarks = "<br>".join(map(escape, _remarks(one)))
        link = f'<a href="{target.as_posix()}">{escape(pages[target])}</a>'
        rows.append([link, *cells, remarks])
    head = ["Notebook", "Seconds", "Peak memory, MB", "Claims that hold", "Remarks"]
    body = [_html_table("Notebooks", head, rows, numbers=(1, 2, 3))]
    body.append('<p><a href="claims.html">All claims, with verdicts and margins</a></p>')
    if (html / reference).exists():
        body.append(f'<p><a href="{reference}">Reference of the library</a></p>')
    title = "Training deep neural networks"
    return _LIST_PAGE.format(title=title, width="60rem", body="\n".join(body))


def _html_table(label: str, head: list[str], rows: list[list[str]], numbers: Sequence[int]) -> str:
    """Return a table of cells that are HTML; `numbers` are the columns that hold numbers."""

    def row(kind: str, cells: list[str]) -> str:
        classes = [' class="number"' if i in numbers else "" for i in range(len(cells))]
        parts = zip(classes, cells, strict=True)
        return "<tr>" + "".join(f"<{kind}{c}>{cell}</{kind[:2]}>" for c, cell in parts) + "</tr>"

    lines = [f'<div role="region" aria-label="{label}" tabindex="0">', "<table>"]
    lines += ["<thead>", row('th scope="col"', head), "</thead>", "<tbody>"]
    lines += [*(row("td", cells) for cells in rows), "</tbody>", "</table>", "</div>"]
    return "\n".join(lines)


def _claims_page(pages: dict[Path, str], executions: dict[Path, Execution]) -> str:
    """Return a page with all claims: what is said, what is right, and what was measured."""
    measured = {c["id"]: c["evidence"] for one in executions.values() for c in one.claims}
    margins = pd.read_csv(_MARGINS, index_col="id") if _MARGINS.exists() else pd.DataFrame()
    head = ["Said", "Verdict", "In fact", "Measured in this run", "Held", "Worst margin"]
    catalogue = claims.catalogue().values()
    body = [
        f"<p>{len(catalogue)} statements from books, notes and courses, and what the notebooks "
        "find. <em>Held</em> and <em>Worst margin</em> are from earlier runs with other seeds "
        "(<code>make margins</code>): in how many of them the check held, and how far the worst "
        "measurement was from its bound, as a share of that bound or of half the interval.</p>",
        '<p><a href="index.html">All notebooks</a></p>',
    ]
    for number, group in itertools.groupby(catalogue, lambda claim: claim.notebook):
        rows = []
        for claim in group:
            said = f'<span id="{claim.id}">{escape(claim.statement)}</span>'
            cells = [f"{said}<br><code>{claim.id}</code>", claim.verdict, escape(claim.correction)]
            cells += [escape(measured.get(claim.id, "")), "", ""]
            if claim.id in margins.index:
                line = margins.loc[claim.id]
                cells[4] = f"{round(line.pass_rate * line.runs)} of {line.runs:.0f}"
                cells[5] = "" if math.isnan(line.margin_worst) else f"{line.margin_worst:.2g}"
            rows.append(cells)
        names = {t: name for t, name in pages.items() if t.name.startswith(f"{number}_")}
        target = next((t for t in names if not t.parent.name), None)
        heading = f'<a href="{target.name}">{escape(names[target])}</a>' if target else "not run"
        body += [f"<h2>{number} {heading}</h2>"]
        body += [_html_table(f"Claims of notebook {number}", head, rows, numbers=(4, 5))]
    return _LIST_PAGE.format(title="Claims", width="90rem", body="\n".join(body))


def _remarks(execution: Execution) -> list[str]:
    failed = [f"claim does not hold: {id}" for id in execution.failed_claims]
    return [*execution.errors, *failed]


def run(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike = "build",
    *,
    timeout: float = CELL_TIMEOUT,
    on_cell: Callable[[], object] | None = None,
) -> Iterator[Execution]:
    """Execute notebooks and write pages to read to ``out/html``, with an index and all claims.

    What was measured of each goes to ``out/notebooks.csv``. The notebooks are not changed. A
    notebook that fails gets a page too, up to the failure, and the others go on.

    Parameters
    ----------
    paths : sequence of path-like
        The notebooks, as `discover` lists them.
    out : path-like
        Folder for results.
    timeout : float
        Seconds that a single cell may take.
    on_cell : callable, optional
        Called without arguments after each code cell.

    Yields
    ------
    Execution
        One for each notebook, as soon as its page is written.

    Raises
    ------
    NotebookError
        If a file is not a notebook, or two notebooks would get the same page.
    """
    targets = {page(path): Path(path) for path in paths}
    if len(targets) != len(paths):
        raise NotebookError("two of the notebooks have the same name, so their pages would clash")
    html = Path(out, "html")
    # Pages of earlier runs stay reachable when only some of the notebooks are run again.
    folders = {path.resolve().parent for path in targets.values()}
    folders = {folder.parent if folder.name == "solutions" else folder for folder in folders}
    shelf = {page(path): path for folder in folders for path in _all(folder)} | targets
    pages = {
        target: title(read(path)) or path.stem
        for target, path in shelf.items()
        if target in targets or (html / target).exists()
    }
    executions: dict[Path, Execution] = {}
    try:
        for target, path in targets.items():
            execution = execute(path, log_claims=True, timeout=timeout, on_cell=on_cell)
            (html / target).parent.mkdir(parents=True, exist_ok=True)
            text = _html(execution, _navigation(path, pages))
            (html / target).write_text(text, encoding="utf-8")
            executions[target] = execution
            yield execution
    finally:
        written = {t: name for t, name in pages.items() if (html / t).exists()}
        if written:
            (html / "claims.html").write_text(_claims_page(written, executions), encoding="utf-8")
            (html / "index.html").write_text(_index(written, executions, html), encoding="utf-8")
            rows = [
                {
                    "notebook": one.path.as_posix(),
                    "seconds": round(one.seconds, 1),
                    "peak_mb": round(one.peak_mb),
                    "claims": one.n_claims,
                    "holding": one.n_claims - len(one.failed_claims),
                }
                for one in executions.values()
            ]
            pd.DataFrame(rows).to_csv(Path(out, "notebooks.csv"), index=False)


def _all(folder: Path) -> list[Path]:
    return [*folder.glob("*.ipynb"), *folder.glob("solutions/*.ipynb")]


# -------------------------------------------------------------------------------- re-measuring


def fingerprint(path: str | os.PathLike) -> str:
    """Return a digest of all that a notebook's measurements depend on.

    Parameters
    ----------
    path : path-like
        The notebook.

    Returns
    -------
    str
        It changes with the notebook's code, with the package (apart from the catalogue of claims
        and the tools that no notebook uses), and with the versions of Python, NumPy, Keras and
        TensorFlow; not with prose and outputs.
    """
    digest = hashlib.sha256(_package_state(Path(__file__).parent))
    for name in ("numpy", "keras", "tensorflow", "tensorflow-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            digest.update(f"{name}{metadata.version(name)}".encode())
    digest.update(platform.python_version().encode())
    for cell in read(path).cells:
        if cell.cell_type == "code":
            digest.update(cell.source.encode() + b"\0")
    return digest.hexdigest()


def _package_state(package: Path) -> bytes:
    """Return a digest of the modules and data that notebooks use."""
    digest = hashlib.sha256()
    for file in sorted([*package.glob("*.py"), *package.glob("data/*.*")]):
        if file.name not in ("notebooks.py", "doctor.py", "__main__.py"):
            digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.digest()


def _measure(path: Path, seed: int, file: Path, mark: str, threads: int, timeout: float) -> dict:
    """Run a notebook with one seed and store the outcome of its claims in `file`."""
    env = {"CH11_SEED": str(seed)}
    if threads:
        env |= {"OMP_NUM_THREADS": str(threads), "TF_NUM_INTRAOP_THREADS": str(threads)}
    execution = execute(path, env=env, log_claims=True, timeout=timeout)
    reached = {record["id"] for record in execution.claims}
    reason = (execution.errors or ("the check was not executed",))[0].splitlines()[0]
    unreached = [
        {"id": id, "seed": seed, "holds": False, "margin": None, "evidence": f"no result: {reason}"}
        for id in execution.failed_claims
        if id not in reached
    ]
    result = {
        "notebook": str(path),
        "seed": seed,
        "fingerprint": mark,
        "seconds": round(execution.seconds, 1),
        "peak_mb": round(execution.peak_mb),
        "errors": list(execution.errors),
        "claims": [*execution.claims, *unreached],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1), encoding="utf-8")
    os.replace(part, file)
    return result


def measure(
    paths: Sequence[str | os.PathLike],
    seeds: Sequence[int],
    out: str | os.PathLike = "build",
    *,
    jobs: int = 1,
    timeout: float = CELL_TIMEOUT,
    say: Callable[[str], object] = print,
) -> pd.DataFrame:
    """Check the claims of notebooks again with other seeds.

    Each notebook that checks claims is run once per seed, with ``CH11_SEED`` set. Every run is
    stored in ``out/measurements`` as soon as it ends: what was measured without an error, from an
    unchanged `fingerprint`, is not measured again, so an interrupted call can be repeated. The
    tables are written at the end, also of an interrupted call.

    Parameters
    ----------
    paths : sequence of path-like
        The notebooks, as `discover` lists them.
    seeds : sequence of int
        Values of ``CH11_SEED``.
    out : path-like
        Folder for results: ``claims.csv`` with every check, ``claims_by_id.csv`` and
        ``claims_by_id.md`` with a line per claim.
    jobs : int
        Number of notebooks to run at the same time; the cores are divided among them.
    timeout : float
        Seconds that a single cell may take.
    say : callable
        Gets a line of text for each run that ends.

    Returns
    -------
    pandas.DataFrame
        Every check: columns id, seed, holds, margin (NaN if unknown) and evidence. A check that an
        error kept from being executed counts as one that does not hold.

    Raises
    ------
    NotebookError
        If none of the notebooks checks a claim.
    ValueError
        If `seeds` is empty or `jobs` is not positive.
    """
    if not seeds or jobs < 1:
        raise ValueError(f"seeds must not be empty and jobs be positive, got {seeds!r} and {jobs}")
    checking = [Path(path) for path in paths if checked_claims(read(path))]
    if not checking:
        raise NotebookError("none of these notebooks checks a claim")
    store = Path(out, "measurements")
    done: list[dict] = []
    todo = []
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else 0
    for path in checking:
        mark = fingerprint(path)
        for seed in seeds:
            file = store / f"{path.stem}-seed{seed}.json"
            known = _stored(file)
            if known.get("fingerprint") == mark and not known["errors"]:
                done.append(known)
            else:
                todo.append((path, seed, file, mark, threads, timeout))
    if done:
        say(f"{len(done)} runs were measured before, {len(todo)} remain")
    try:
        parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
        for result in parallel(joblib.delayed(_measure)(*job) for job in todo):
            done.append(result)
            failed = [record["id"] for record in result["claims"] if not record["holds"]]
            say(
                f"[{len(done)}/{len(checking) * len(seeds)}] {result['notebook']}, "
                f"seed {result['seed']}: {result['seconds']:.0f} s, "
                f"{len(result['claims']) - len(failed)} of {len(result['claims'])} claims hold"
                + "".join(f"\n    {text}" for text in (*failed, *result["errors"]))
            )
    finally:
        table = _table(done)
        if done:
            summary = by_claim(table)
            table.to_csv(Path(out, "claims.csv"), index=False)
            summary.to_csv(Path(out, "claims_by_id.csv"), index=False)
            Path(out, "claims_by_id.md").write_text(_markdown(summary), encoding="utf-8")
    return table


def _stored(file: Path) -> dict:
    """Return an earlier measurement, or an empty dictionary if there is none that can be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _table(results: list[dict]) -> pd.DataFrame:
    columns = ["id", "seed", "holds", "margin", "evidence"]
    rows = [record for result in results for record in result["claims"]]
    table = pd.DataFrame(rows, columns=columns)
    table["margin"] = table["margin"].astype(float)
    order = {id: position for position, id in enumerate(claims.catalogue())}
    return table.sort_values(
        ["id", "seed"], key=lambda s: s.map(order) if s.name == "id" else s, ignore_index=True
    )


def by_claim(table: pd.DataFrame) -> pd.DataFrame:
    """Summarise repeated checks, one line per claim.

    Parameters
    ----------
    table : pandas.DataFrame
        What `measure` returns.

    Returns
    -------
    pandas.DataFrame
        Columns id, notebook, verdict, kind, runs, pass_rate, margin_worst, margin_median, in the
        order of the table. A margin of a claim without a bound is NaN.

    Examples
    --------
    >>> id = "step-size-stability-threshold"
    >>> table = pd.DataFrame({"id": [id] * 2, "holds": [True, False], "margin": [0.5, 0.25]})
    >>> by_claim(table)[["runs", "pass_rate", "margin_worst", "margin_median"]].values.tolist()
    [[2.0, 0.5, 0.25, 0.375]]
    """
    catalogue = claims.catalogue()
    rows = []
    for id, group in table.groupby("id", sort=False):
        claim = catalogue[id]
        rows.append(
            {
                "id": id,
                "notebook": claim.notebook,
                "verdict": claim.verdict,
                "kind": claim.kind,
                "runs": len(group),
                "pass_rate": group["holds"].mean(),
                "margin_worst": group["margin"].min(),
                "margin_median": group["margin"].median(),
            }
        )
    columns = ["id", "notebook", "verdict", "kind", "runs"]
    return pd.DataFrame(rows, columns=[*columns, "pass_rate", "margin_worst", "margin_median"])


def _markdown(summary: pd.DataFrame) -> str:
    lines = [
        "| claim | notebook | verdict | kind | runs | holds | worst margin | median margin |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for row in summary.itertuples():
        margins = [
            "" if math.isnan(margin) else f"{margin:.2g}"
            for margin in (row.margin_worst, row.margin_median)
        ]
        lines.append(
            f"| {row.id} | {row.notebook} | {row.verdict} | {row.kind} | {row.runs} "
            f"| {row.pass_rate:.0%} | {margins[0]} | {margins[1]} |"
        )
    return "\n".join(lines) + "\n"
