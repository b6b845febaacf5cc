"""The form of the committed notebooks.

Each rule is a function that yields what is wrong with a notebook. The first half of the file holds
the rules, and the names and numbers that authors need to know; then every rule is shown to fire on
a sample that was spoilt for it, and all rules are applied to the notebooks of the series.
"""

import ast
from collections import Counter
from dataclasses import dataclass
from functools import cache
import io
from itertools import pairwise
import json
from pathlib import Path
import re
import tokenize
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup
from ch11lib import claims, notebooks
from nbconvert.filters import markdown2html
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"

# Headings of level 2 that every teaching notebook (01 and up) has, in this order. Between the
# first two stand the ideas; "Said elsewhere" and "Older code you will meet" come before the recap.
SECTIONS = (
    "What you will be able to do",
    "Recap",
    "Common mistakes",
    "Exercises",
    "References",
)
TAGS = {
    "nbval-check-output",  # a verdict: compared in strict and in lax mode
    "nbval-ignore-output",  # differs by machine: only with an entry in IGNORED
    "raises-exception",  # an error that teaches: together with nbval-check-output
    "exercise",
    "solution",
    "extra",
}
# Cells whose output is not compared: (notebook, cell id) -> reason.
IGNORED: dict[tuple[str, str], str] = {
    ("00_start_here.ipynb", "00-start-here-02"): "what is installed on the reader's machine",
}
LIGHT = {"claims", "datasets", "plotting"}  # modules of ch11lib that do not load TensorFlow


# -------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Book:
    path: Path
    nb: nbformat.NotebookNode

    @property
    def number(self):
        return self.path.name.partition("_")[0]

    @property
    def is_solution(self):
        return self.path.parent.name == "solutions"

    @property
    def teaches(self):
        return not self.is_solution and self.number != "00"

    def cells(self, kind):
        return [cell for cell in self.nb.cells if cell.cell_type == kind]

    def code(self):
        return self.cells("code")

    def outputs(self):
        for cell in self.code():
            for output in cell.outputs:
                yield cell, output


def first_line(cell):
    return repr(cell.source.strip().partition("\n")[0][:60])


def tags(cell):
    return set(cell.metadata.get("tags", []))


def text_of(output):
    """Return what nbval compares of an output, apart from the kind of an error."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    texts = {kind: data for kind, data in output.data.items() if kind.startswith("text/")}
    return "\n".join(texts.values())


def parsed(cell):
    """Return the syntax tree of a code cell, or an empty one if it is not Python."""
    try:
        return ast.parse(cell.source)
    except SyntaxError:
        return ast.Module([], [])


@cache
def render(source):
    return BeautifulSoup(markdown2html(source), "html.parser")


@cache
def anchors(path):
    """Return the names that a link into a notebook may end with."""
    found = set()
    for cell in notebooks.read(path).cells:
        if cell.cell_type == "markdown":
            found |= {unquote(tag["id"]) for tag in render(cell.source).find_all(id=True)}
            found |= {
                tag["name"] for tag in render(cell.source).find_all("a", attrs={"name": True})
            }
    return found


def headings(book):
    """Yield (level, text) of all headings."""
    for cell in book.cells("markdown"):
        for tag in render(cell.source).find_all(re.compile("^h[1-6]$")):
            yield int(tag.name[1]), tag.text.removesuffix("\u00b6").strip()


# ---------------------------------------------------------------------------------- rules

RULES = {}


def rule(function):
    RULES[function.__name__] = function
    return function


@rule
def name_is_canonical(book):
    if not re.fullmatch(r"\d\d[a-z]?_[a-z0-9_]+\.ipynb", book.path.name):
        yield f"{book.path.name}: expected a name such as 01_vanishing_gradients.ipynb"
    elif book.is_solution and not (book.path.parents[1] / book.path.name).exists():
        yield f"{book.path.name}: solutions have the name of the notebook with the exercises"


@rule
def file_is_as_refresh_writes_it(book):
    text = book.path.read_text(encoding="utf-8")
    if text != nbformat.writes(book.nb, version=4).rstrip("\n") + "\n":
        yield "not in the form that `python -m ch11lib refresh` writes"
    plain = {"kernelspec": notebooks.KERNELSPEC, "language_info": {"name": "python"}}
    if dict(book.nb.metadata) != plain:
        yield f"metadata must be {plain}, found {dict(book.nb.metadata)}"
    for cell in book.nb.cells:
        if set(cell.metadata) - {"tags"}:
            yield f"cell {first_line(cell)}: metadata other than tags: {sorted(cell.metadata)}"
        if "attachments" in cell:
            yield f"cell {first_line(cell)}: attachment"
    for cell, output in book.outputs():
        if notebooks.WIDGET_VIEW in output.get("data", {}):
            yield f"cell {first_line(cell)}: stored view of a widget"


@rule
def file_is_small(book):
    size = book.path.stat().st_size
    if size >= 500_000:
        yield f"{size / 1000:.0f} kB; the limit is 500 kB"


@rule
def cells_were_run_in_order(book):
    counts = [cell.execution_count for cell in book.code()]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}"


@rule
def no_cell_is_empty(book):
    for position, cell in enumerate(book.nb.cells):
        if not cell.source.strip():
            yield f"cell {position} (counted from 0) is empty"


@rule
def no_text_on_stderr(book):
    for cell, output in book.outputs():
        if output.get("name") == "stderr":
            yield f"cell {first_line(cell)}: {output.text[:80]!r}"


@rule
def errors_are_announced(book):
    for cell in book.code():
        raised = any(output.output_type == "error" for output in cell.outputs)
        announced = "raises-exception" in tags(cell)
        if raised != announced:
            yield f"cell {first_line(cell)}: error stored: {raised}, announced by tag: {announced}"
        if announced and "nbval-check-output" not in tags(cell):
            yield f"cell {first_line(cell)}: raises-exception goes with nbval-check-output"


@rule
def tags_are_known(book):
    for cell in book.nb.cells:
        if tags(cell) - TAGS:
            yield f"cell {first_line(cell)}: unknown tags {sorted(tags(cell) - TAGS)}"
        if re.search(r"#\s*(NBVAL_|PYTEST_VALIDATE)", cell.source):
            yield f"cell {first_line(cell)}: use tags instead of comments that control nbval"


@rule
def ignored_cells_have_a_reason(book):
    for cell in book.code():
        if "nbval-ignore-output" in tags(cell) and (book.path.name, cell.id) not in IGNORED:
            yield f"cell {cell.id} {first_line(cell)}: not in IGNORED (tests/notebooks)"
        if {"nbval-ignore-output", "nbval-check-output"} <= tags(cell):
            yield f"cell {first_line(cell)}: checked and ignored at the same time"


@rule
def verdicts_are_compared_in_both_modes(book):
    checked = [cell for cell in book.code() if "nbval-check-output" in tags(cell)]
    for cell in checked:
        if not any(text_of(output).strip() for output in cell.outputs):
            yield f"cell {first_line(cell)}: nbval-check-output, but no text is stored"
    if book.teaches and len(checked) < 3:
        yield f"{len(checked)} cells are tagged nbval-check-output; at least 3 are needed"
    for _, position in notebooks.checked_claims(book.nb):
        cell = book.nb.cells[position]
        if "nbval-check-output" not in tags(cell):
            yield f"cell {first_line(cell)}: checks a claim, so it is tagged nbval-check-output"


@rule
def cells_are_short(book):
    for cell in book.code():
        lines = len(cell.source.splitlines())
        if lines > 25:
            yield f"cell {first_line(cell)}: {lines} lines; aim at 12, never more than 25"


@rule
def number_of_cells(book):
    if book.teaches and not 25 <= len(book.nb.cells) <= 45:
        yield f"{len(book.nb.cells)} cells; a teaching notebook has 25 to 45"


@rule
def headings_form_an_outline(book):
    levels = [level for level, _ in headings(book)]
    if levels.count(1) != 1 or levels[0] != 1:
        yield f"expected exactly one level-1 heading, the first; levels are {levels}"
    for before, after in pairwise(levels):
        if after > before + 1:
            yield f"a heading of level {after} follows one of level {before}"
    if not (book.nb.cells[0].cell_type == "markdown" and notebooks.title(book.nb)):
        yield "the first cell must hold the title"


@rule
def sections_are_there(book):
    if not book.teaches:
        return
    found = [text for level, text in headings(book) if level == 2 and text in SECTIONS]
    if found != list(SECTIONS):
        yield f"expected the level-2 headings {SECTIONS} in this order, found {found}"
    for cell in book.cells("markdown"):
        html = render(cell.source)
        heading = html.find("h2")
        if heading is not None and SECTIONS[0] in heading.text:
            goals = len(html.find_all("li"))
            if not 3 <= goals <= 6:
                yield f"{goals} goals in the list below {SECTIONS[0]!r}; expected 3 to 6"


@rule
def last_cell_leads_on(book):
    if not book.teaches:
        return
    later = sorted(p.name for p in book.path.parent.glob("*.ipynb") if p.name > book.path.name)
    following = later[0] if later else "00_start_here.ipynb"
    last = book.nb.cells[-1]
    links = render(last.source).find_all("a") if last.cell_type == "markdown" else []
    if following not in {a["href"].partition("#")[0] for a in links}:
        yield f"the last cell must link to {following}"


@rule
def images_have_alternative_texts(book):
    for cell, output in book.outputs():
        for kind in output.get("data", {}):
            if kind.startswith("image/"):
                alt = output.metadata.get(kind, {}).get("alt", "")
                if kind != "image/png":
                    yield f"cell {first_line(cell)}: {kind}; figures are PNG"
                elif len(alt.split()) < 5:
                    yield f"cell {first_line(cell)}: alternative text {alt!r} says too little"
        html = output.get("data", {}).get("text/html", "")
        for image in BeautifulSoup(html, "html.parser").find_all("img"):
            if not image.get("alt"):
                yield f"cell {first_line(cell)}: image without alternative text in HTML output"
    for cell in book.cells("markdown"):
        for image in render(cell.source).find_all("img"):
            if not image.get("alt"):
                yield f"cell {first_line(cell)}: image without alternative text"


@rule
def links_resolve(book):
    for cell in book.cells("markdown"):
        for link in render(cell.source).find_all("a", href=True):
            url = urlsplit(link["href"])
            target = book.path.parent / unquote(url.path) if url.path else book.path
            if url.scheme in ("http", "https"):
                continue
            if url.scheme or target.suffix != ".ipynb":
                yield f"link to {link['href']!r}: only notebooks and web addresses"
            elif not target.is_file():
                yield f"link to {link['href']!r}: no such notebook"
            elif url.fragment and unquote(url.fragment) not in anchors(target.resolve()):
                yield f"link to {link['href']!r}: no such heading"


@rule
def code_is_plain_python(book):
    for cell in book.code():
        where = f"cell {first_line(cell)}"
        try:
            tree = ast.parse(cell.source)
        except SyntaxError as error:
            if "raises-exception" not in tags(cell):
                yield f"{where}: not Python (a magic or a shell line?): {error.msg}"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
                yield f"{where}: wildcard import"
            if isinstance(node, ast.Attribute):
                if ast.unparse(node) == "sys.path":
                    yield f"{where}: sys.path"
                if re.match(r"_(?!_)", node.attr):
                    yield f"{where}: private name {node.attr}"
            if isinstance(node, ast.Name) and node.id in ("get_ipython", "input"):
                yield f"{where}: {node.id}"
        tokens = tokenize.generate_tokens(io.StringIO(cell.source).readline)
        if any(token.type == tokenize.OP and token.string == ";" for token in tokens):
            yield f"{where}: semicolon (assign to _ to silence a result)"


@rule
def tensorflow_starts_quietly(book):
    quiet = False
    for cell in book.code():
        for node in ast.walk(parsed(cell)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] in ("keras", "tensorflow") and not quiet:
                    yield f"cell {first_line(cell)}: first `from ch11lib.backend import keras`"
                quiet |= parts[0] == "ch11lib" and len(parts) > 1 and parts[1] not in LIGHT


ABSOLUTE = re.compile(
    r"(?<![\w.:/~-])/(home|tmp|usr|root|Users|work|mnt|var|opt|etc)/|\b[A-Z]:\\\\?\w"
)


@rule
def no_absolute_paths(book):
    for cell in book.nb.cells:
        texts = [cell.source, *(text_of(output) for output in cell.get("outputs", ()))]
        for text in texts:
            if found := ABSOLUTE.search(text):
                yield f"cell {first_line(cell)}: absolute path {text[found.start() :][:30]!r}"


BARE = re.compile(r"(?<![\w.~+-])[+-]?(?:\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+)(?![\w.])")


@rule
def claim_lines_are_current_and_measured_numbers_carry_a_tilde(book):
    catalogue = claims.catalogue()
    for id, position in notebooks.checked_claims(book.nb):
        cell = book.nb.cells[position]
        if id not in catalogue:
            yield f"cell {first_line(cell)}: unknown claim {id!r} (ids are written out)"
            continue
        claim = catalogue[id]
        printed = "".join(o.text for o in cell.outputs if o.get("name") == "stdout").splitlines()
        start = f"{claim.verdict}  {id}"
        lines = [line for line in printed if line == start or line.startswith(f"{start}: ")]
        if len(lines) != 1:
            yield f"cell {first_line(cell)}: expected one line {start!r}, found {len(lines)}"
        for line in lines:
            # A number that the code spells out is a setting and not a measurement.
            measured = [n for n in BARE.findall(line) if n.lstrip("+-") not in cell.source]
            if measured and claim.kind != "exact":
                yield f"{id}: print {measured} through claims.number"


@rule
def claims_are_checked_by_their_plain_name(book):
    for cell in book.code():
        for node in ast.walk(parsed(cell)):
            aliased = (
                isinstance(node, ast.ImportFrom)
                and node.module == "ch11lib.claims"
                and any(alias.name == "check" for alias in node.names)
            )
            renamed = isinstance(node, ast.Import | ast.ImportFrom) and any(
                alias.name.endswith("claims") and alias.asname for alias in node.names
            )
            if aliased or renamed:
                yield f"cell {first_line(cell)}: write `from ch11lib import claims`"


def claim_problems(books, catalogue):
    """Yield what is wrong with the checks of all notebooks together."""
    checked = Counter()
    teaching = {book.number: book for book in books if not book.is_solution}
    if len(teaching) != sum(not book.is_solution for book in books):
        yield "two notebooks have the same number"
    for book in books:
        for id, _ in notebooks.checked_claims(book.nb):
            if id in catalogue:
                checked[id] += 1
                if book.is_solution or catalogue[id].notebook != book.number:
                    place = f"notebook {catalogue[id].notebook}"
                    yield f"{id}: belongs to {place}, but is checked in {book.path.name}"
    for id, claim in catalogue.items():
        if claim.notebook in teaching:
            if checked[id] != 1:
                yield f"{id}: checked {checked[id]} times in notebook {claim.notebook}, not once"
            if claim.verdict == "to-measure":
                yield f"{id}: its notebook exists, so it must have a verdict"


def exercise_problems(book, solution):
    """Yield the checks of exercises that the solutions do not run as they are."""
    both = [
        {
            node.name: ast.unparse(node)
            for cell in one.code()
            for node in parsed(cell).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
        }
        for one in (book, solution)
    ]
    called = {
        node.func.id
        for cell in solution.code()
        for node in ast.walk(parsed(cell))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    for name, source in both[0].items():
        if both[1].get(name) != source:
            yield f"{name}: not the same function in {solution.path}"
        elif name not in called:
            yield f"{name}: not called in {solution.path}"


# ------------------------------------------------------- every rule fires on a spoilt sample

FIRST, SECOND, THIRD = [
    id
    for id, claim in claims.catalogue().items()
    if claim.notebook == "01" and claim.kind == "numeric"
][:3]
PNG = "iVBORw0KGgo="


def checking(id, number="~0.5", **more):
    """Return an executed cell that checks a claim."""
    verdict = claims.catalogue()[id].verdict
    return new_code_cell(
        f"claims.check({id!r}, True, f'at rate 0.1: {{claims.number(x)}}')",
        outputs=[new_output("stream", text=f"{verdict}  {id}: at rate 0.1: {number}\n")],
        metadata={"tags": ["nbval-check-output"]},
        **more,
    )


@pytest.fixture
def sample(tmp_path):
    """Return a notebook that keeps all rules, beside the files that it links to."""
    goals = "\n".join(f"- goal {n}" for n in range(4))
    figure = new_output(
        "display_data",
        data={"image/png": PNG, "text/plain": "<Figure size 300x200 with 1 Axes>"},
        metadata={"image/png": {"alt": "A line that rises from 1 to 9"}},
    )
    error = new_output("error", ename="ValueError", evalue="bad")
    cells = [
        new_markdown_cell("# Sample\n\nWhy it matters."),
        new_markdown_cell(f"## What you will be able to do\n\n{goals}"),
        new_code_cell("from ch11lib import claims\nfrom ch11lib.backend import keras"),
        new_code_cell("import tensorflow as tf\nfrom ch11lib import plotting\nx = 0.5"),
        new_markdown_cell("## An idea\n\n### A part $x^2$\n\n[jump](#An-idea)"),
        new_code_cell("plotting.show(plotting.draw(x), alt='A line ...')", outputs=[figure]),
        *map(checking, (FIRST, SECOND, THIRD)),
        new_code_cell(
            "raise ValueError('bad')",
            outputs=[error],
            metadata={"tags": ["raises-exception", "nbval-check-output"]},
        ),
        *(new_markdown_cell(f"Words {n}.") for n in range(10)),
        *(new_markdown_cell(f"## {name}\n\n- one") for name in SECTIONS[1:]),
        new_markdown_cell(
            "[Next](02_next.ipynb), [part](02_next.ipynb#Some-Part), "
            "[solutions](solutions/01_sample.ipynb), [web](https://keras.io)"
        ),
    ]
    folder = tmp_path / "notebooks"
    (folder / "solutions").mkdir(parents=True)
    save(folder / "01_sample.ipynb", cells)
    save(folder / "02_next.ipynb", [new_markdown_cell("# Next\n\n## Some Part")])
    save(folder / "solutions/01_sample.ipynb", [new_markdown_cell("# Solutions")])
    return load(folder / "01_sample.ipynb")


def save(path, cells, **metadata):
    counter = 0
    for position, cell in enumerate(cells):
        cell["id"] = f"c{position}"
        if cell.cell_type == "code":
            cell.execution_count = counter = counter + 1
    notebook = new_notebook(cells=cells, metadata=metadata)
    notebooks.clean(notebook)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def load(path):
    return Book(path, notebooks.read(path))


def findings(book):
    return {name: found for name, check in RULES.items() if (found := list(check(book)))}


def test_the_sample_keeps_all_rules(sample):
    assert findings(sample) == {}
    for other in ("02_next.ipynb", "solutions/01_sample.ipynb"):
        found = findings(load(sample.path.parent / other))
        assert set(found) <= {"number_of_cells", "sections_are_there", "last_cell_leads_on"} | {
            "verdicts_are_compared_in_both_modes"
        }


CODE, IMPORTS, IDEA, FIGURE, CHECK, ERROR, WORDS, LAST = 3, 2, 4, 5, 6, 9, 10, -1


def at(position, **changes):
    """Return a function that sets fields of a cell."""
    return lambda nb: nb.cells[position].update(nbformat.from_dict(changes))


def source(position, text):
    """Return a function that replaces a source, or a part of it given as 'old -> new'."""

    def change(nb):
        old, arrow, new = text.partition(" -> ")
        assert not arrow or old in nb.cells[position].source
        nb.cells[position].source = nb.cells[position].source.replace(old, new) if arrow else text

    return change


def tagged(position, *names):
    return at(position, metadata={"tags": list(names)})


def printed(text, name="stdout"):
    return [{"output_type": "stream", "name": name, "text": text}]


def displayed(data, **metadata):
    return [{"output_type": "display_data", "data": data, "metadata": metadata}]


SPOILT = [
    ("file_is_as_refresh_writes_it", lambda nb: nb.metadata.update(widgets={})),
    ("file_is_as_refresh_writes_it", lambda nb: nb.metadata.kernelspec.update(name="conda")),
    ("file_is_as_refresh_writes_it", lambda nb: nb.metadata.language_info.update(version="3")),
    ("file_is_as_refresh_writes_it", at(CODE, metadata={"collapsed": True})),
    ("file_is_as_refresh_writes_it", at(CODE, outputs=displayed({notebooks.WIDGET_VIEW: {}}))),
    ("file_is_as_refresh_writes_it", at(WORDS, attachments={"a.png": {"image/png": PNG}})),
    ("file_is_small", at(CODE, outputs=printed("x" * 500_000))),
    ("cells_were_run_in_order", at(CODE, execution_count=7)),
    ("cells_were_run_in_order", at(CODE, execution_count=None)),
    ("no_cell_is_empty", source(CODE, " \n")),
    ("no_cell_is_empty", source(WORDS, "")),
    ("no_text_on_stderr", at(CODE, outputs=printed("UserWarning", "stderr"))),
    ("errors_are_announced", at(ERROR, metadata={})),
    ("errors_are_announced", at(ERROR, outputs=[])),
    ("errors_are_announced", tagged(ERROR, "raises-exception")),
    ("tags_are_known", tagged(CODE, "nbval-skip")),
    ("tags_are_known", tagged(WORDS, "skip-execution")),
    ("tags_are_known", source(CODE, "# NBVAL_IGNORE_OUTPUT\nx = 1")),
    ("ignored_cells_have_a_reason", tagged(CODE, "nbval-ignore-output")),
    ("ignored_cells_have_a_reason", tagged(CHECK, "nbval-ignore-output", "nbval-check-output")),
    ("verdicts_are_compared_in_both_modes", tagged(CODE, "nbval-check-output")),
    ("verdicts_are_compared_in_both_modes", at(CHECK, metadata={})),
    ("cells_are_short", source(CODE, "x = 1\n" * 26)),
    ("number_of_cells", lambda nb: nb.cells.pop(WORDS)),
    ("number_of_cells", lambda nb: nb.cells.extend(new_markdown_cell("x") for _ in range(21))),
    ("headings_form_an_outline", source(WORDS, "# Second title")),
    ("headings_form_an_outline", source(WORDS, "Title\n=====")),
    ("headings_form_an_outline", source(0, "## Sample")),
    ("headings_form_an_outline", source(IDEA, "### A part -> #### A part")),
    ("headings_form_an_outline", lambda nb: nb.cells.insert(0, nb.cells.pop(CODE))),
    ("sections_are_there", source(1, "be able -> know how")),
    ("sections_are_there", source(-2, "## References -> ### References")),
    ("sections_are_there", lambda nb: nb.cells.insert(-2, nb.cells.pop(-5))),
    ("sections_are_there", source(1, "- goal 1\n- goal 2 -> and")),
    ("last_cell_leads_on", source(LAST, "[solutions](solutions/01_sample.ipynb)")),
    ("last_cell_leads_on", lambda nb: nb.cells.append(new_markdown_cell("The end."))),
    ("images_have_alternative_texts", at(FIGURE, outputs=displayed({"image/png": PNG}))),
    ("images_have_alternative_texts", at(FIGURE, outputs=displayed({"image/svg+xml": "<svg/>"}))),
    ("images_have_alternative_texts", at(CODE, outputs=displayed({"text/html": "<img src='a'>"}))),
    ("images_have_alternative_texts", source(WORDS, "![](https://x.org/a.png)")),
    ("images_have_alternative_texts", source(WORDS, '<img src="https://x.org/a.png">')),
    ("links_resolve", source(WORDS, "[a](03_none.ipynb)")),
    ("links_resolve", source(WORDS, "[a](02_next.ipynb#Other-Part)")),
    ("links_resolve", source(WORDS, "[a](#Nowhere)")),
    ("links_resolve", source(WORDS, "[a](../README.md)")),
    ("links_resolve", source(WORDS, "[a](file:///x.ipynb)")),
    ("code_is_plain_python", source(CODE, "%matplotlib inline")),
    ("code_is_plain_python", source(CODE, "!ls")),
    ("code_is_plain_python", source(CODE, "x = 1;")),
    ("code_is_plain_python", source(CODE, "from numpy import *")),
    ("code_is_plain_python", source(CODE, "import sys\nsys.path.append('..')")),
    ("code_is_plain_python", source(CODE, "x = claims._packaged()")),
    ("code_is_plain_python", source(CODE, "x = input()")),
    (
        "tensorflow_starts_quietly",
        source(IMPORTS, "from ch11lib.backend import keras -> import keras"),
    ),
    ("tensorflow_starts_quietly", source(IMPORTS, "\nfrom ch11lib.backend import keras -> ")),
    ("no_absolute_paths", source(CODE, "x = open('/home/me/x')")),
    ("no_absolute_paths", source(CODE, "x = 'C:\\\\data'")),
    ("no_absolute_paths", at(CODE, outputs=printed("saved to /tmp/x"))),
    (
        "claim_lines_are_current_and_measured_numbers_carry_a_tilde",
        lambda nb: nb.cells.__setitem__(CHECK, checking(FIRST, "0.53", execution_count=4)),
    ),
    (
        "claim_lines_are_current_and_measured_numbers_carry_a_tilde",
        lambda nb: nb.cells.__setitem__(CHECK, checking(FIRST, "3e-07", execution_count=4)),
    ),
    (
        "claim_lines_are_current_and_measured_numbers_carry_a_tilde",
        at(CHECK, outputs=printed(f"contested  {FIRST}: at rate 0.1: ~0.5\n")),
    ),
    (
        "claim_lines_are_current_and_measured_numbers_carry_a_tilde",
        source(CHECK, f"{FIRST!r} -> name"),
    ),
    ("claims_are_checked_by_their_plain_name", source(CODE, "from ch11lib.claims import check")),
    ("claims_are_checked_by_their_plain_name", source(CODE, "import ch11lib.claims as c")),
    ("claims_are_checked_by_their_plain_name", source(CODE, "from ch11lib import claims as c")),
]


@pytest.mark.parametrize(("name", "spoil"), SPOILT, ids=[name for name, _ in SPOILT])
def test_rule_fires(sample, name, spoil):
    spoil(sample.nb)
    sample.path.write_text(nbformat.writes(sample.nb) + "\n", encoding="utf-8")
    assert name in findings(Book(sample.path, sample.nb))


def test_rules_about_the_file_itself_fire(sample):
    for name in ("Untitled.ipynb", "1_a.ipynb", "01 a.ipynb", "solutions/02_orphan.ipynb"):
        assert list(RULES["name_is_canonical"](Book(sample.path.parent / name, sample.nb)))
    sample.path.write_text(json.dumps(sample.nb), encoding="utf-8")
    assert list(RULES["file_is_as_refresh_writes_it"](sample))


def test_every_rule_was_seen_to_fire():
    assert {name for name, _ in SPOILT} | {"name_is_canonical"} == set(RULES)


def test_rules_about_claims_fire(sample):
    def claim(id, number, verdict="wrong"):
        return claims.Claim(id, "gradients", number, ("1e",), "S.", verdict, "C.", "exact")

    catalogue = {id: claim(id, "01") for id in (FIRST, SECOND, THIRD)} | {"p": claim("p", "09")}
    solution = Book(sample.path.parent / "solutions/01_sample.ipynb", sample.nb)
    twin = Book(sample.path.with_name("01_twin.ipynb"), new_notebook())
    assert list(claim_problems([sample], catalogue)) == []
    for books, changes, message in (
        ([sample], {"q": claim("q", "01")}, "q: checked 0 times in notebook 01"),
        ([sample], {FIRST: claim(FIRST, "02")}, f"{FIRST}: belongs to notebook 02"),
        ([sample], {FIRST: claim(FIRST, "01", "to-measure")}, "must have a verdict"),
        ([sample, solution], {}, f"{FIRST}: checked 2 times"),
        ([sample, solution], {}, f"{FIRST}: belongs to notebook 01, but is checked in"),
        ([sample, twin], {}, "two notebooks have the same number"),
    ):
        assert any(message in found for found in claim_problems(books, catalogue | changes))


# ----------------------------------------------------------------- the committed notebooks

PATHS = [*sorted(FOLDER.glob("*.ipynb")), *sorted(FOLDER.glob("solutions/*.ipynb"))]


def test_unused_and_altered_exercise_checks_are_found(sample, tmp_path):
    check = "def check_1(answer):\n    assert answer(2) == {}\n"
    sample.nb.cells.append(new_code_cell(check.format(4)))

    def found(source):
        nb = new_notebook(cells=[new_code_cell(source)])
        return [*exercise_problems(sample, Book(tmp_path / "s.ipynb", nb))]

    assert found(check.format(4) + "\ncheck_1(abs)") == []
    assert "not called" in found(check.format(4))[0]
    assert "not the same" in found(check.format(5) + "\ncheck_1(abs)")[0]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(FOLDER)))
@pytest.mark.parametrize("name", RULES)
def test_notebook(path, name):
    assert list(RULES[name](load(path))) == []


def test_claims_are_checked_once_each_in_their_notebook(capsys):
    books, catalogue = [load(path) for path in PATHS], claims.catalogue()
    numbers = {book.number for book in books}
    planned = sum(claim.notebook not in numbers for claim in catalogue.values())
    with capsys.disabled():
        print(f"\n{len(catalogue)} claims, {planned} of them for notebooks yet to come")
    assert list(claim_problems(books, catalogue)) == []


@pytest.mark.parametrize("path", sorted(FOLDER.glob("solutions/*.ipynb")), ids=lambda p: p.name)
def test_exercise_checks_are_run_in_the_solutions(path):
    assert list(exercise_problems(load(FOLDER / path.name), load(path))) == []


def test_no_reason_is_left_behind():
    cells = {
        (path.name, cell.id)
        for path in PATHS
        for cell in load(path).code()
        if "nbval-ignore-output" in tags(cell)
    }
    assert set(IGNORED) <= cells
    assert all(IGNORED.values())


def test_all_notebooks_together_are_small():
    assert sum(path.stat().st_size for path in PATHS) < 5_000_000


def test_start_page_lists_every_notebook_and_all_older_code():
    texts = {path.name: path.read_text(encoding="utf-8") for path in PATHS if path.parent == FOLDER}
    (start,) = [texts.pop(name) for name in list(texts) if name.startswith("00_")]
    older = {name for name, text in texts.items() if "## Older code you will meet" in text}
    assert set(re.findall(r"\(([^()#]+)#Older-code-you-will-meet\)", start)) == older
    assert set(re.findall(r"\| \w+ \[[^]]+\]\(([^()]+\.ipynb)\)", start)) == set(texts)
