"""The machinery on small notebooks, most of them broken on purpose; none imports TensorFlow."""

import asyncio
import json
import math
import os
from pathlib import Path
import re
import sys
from types import SimpleNamespace

from bs4 import BeautifulSoup
from ch11lib import claims, notebooks
from ch11lib.notebooks import NotebookError
from latex2mathml.converter import convert
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
import numpy as np
import pandas as pd
import pytest

CLAIM, OTHER, THIRD = list(claims.catalogue())[:3]
IMPORT = "from ch11lib import claims\n"


def code(source, *tags, **fields):
    return new_code_cell(source, metadata={"tags": list(tags)} if tags else {}, **fields)


def write(path, *cells, **metadata):
    """Write a notebook; strings are code cells, or markdown cells if they start with #."""
    made = [
        (new_markdown_cell if cell.startswith("# ") else new_code_cell)(cell)
        if isinstance(cell, str)
        else cell
        for cell in cells
    ]
    for number, cell in enumerate(made):
        cell["id"] = f"cell-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=made, metadata=metadata), path)
    return path


def printed(execution):
    return "".join(
        output.text
        for cell in execution.notebook.cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stdout"
    )


# -------------------------------------------------------------------- finding and reading


def test_discover(tmp_path, monkeypatch):
    b, a, solution, assignment = (
        write(tmp_path / name, "# T")
        for name in ("b.ipynb", "a.ipynb", "solutions/a.ipynb", "assignments/x.ipynb")
    )
    assert notebooks.discover([tmp_path]) == [a, b, solution]
    assert notebooks.discover([b, tmp_path, a]) == [b, a, solution]
    assert notebooks.discover([assignment]) == [assignment]
    (tmp_path / "text.md").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for paths, message in (
        ([tmp_path / "text.md"], r"text\.md: not a notebook"),
        ([tmp_path / "empty"], "empty: no notebooks in this folder"),
        ([tmp_path / "none.ipynb"], r"none\.ipynb: no such file"),
        (["notebooks"], "notebooks: no such file or folder; run this from the folder"),
    ):
        with pytest.raises(NotebookError, match=message):
            notebooks.discover(paths)


def test_read_refuses_what_it_would_have_to_repair(tmp_path):
    path = write(tmp_path / "x.ipynb", "# T", "1")
    assert notebooks.read(path).cells[0].source == "# T"
    good = json.loads(path.read_text())

    def bad(message, **changes):
        path.write_text(json.dumps(good | changes))
        with pytest.raises(NotebookError, match=message):
            notebooks.read(path)

    bad(r"x\.ipynb: notebook format must be 4\.5, found 4\.4", nbformat_minor=4)
    bad("format must be 4.5, found 3.5", nbformat=3)
    bad("every cell must have an id of its own", cells=[good["cells"][0]] * 2)
    bad("every cell must have an id", cells=[{**good["cells"][0], "id": None}])
    bad("not a valid notebook", cells=[{**good["cells"][0], "cell_type": "poem"}])
    bad("not a notebook", cells=3)
    path.write_text("{")
    with pytest.raises(NotebookError, match="not a notebook"):
        notebooks.read(path)
    path.write_text("[]")
    with pytest.raises(NotebookError, match="not a notebook"):
        notebooks.read(path)


def test_title():
    cells = [
        new_code_cell("# no"),
        new_markdown_cell("## no\n"),
        new_markdown_cell("x\n# Yes! "),
    ]
    assert notebooks.title(new_notebook(cells=cells)) == "Yes!"
    assert notebooks.title(new_notebook(cells=cells[:2])) == ""


def test_checked_claims():
    sources = [
        "claims.check('a', True)\nch11lib.claims.check('b', f(x), 'e')",
        "# claims.check('comment', 1)\n'claims.check(\"text\", 1)'",
        "for i in ids:\n    claims.check(i, True)",
        "other.check('c'); claims.number(1)",
        "%magic\nclaims.check('d', True)",
    ]
    cells = [new_markdown_cell("claims.check('m', True)"), *map(new_code_cell, sources)]
    found = notebooks.checked_claims(new_notebook(cells=cells))
    assert found == [("a", 1), ("b", 1), (None, 3)]


# ------------------------------------------------------------------------------ executing


def test_execute_reports_and_changes_nothing(tmp_path):
    path = write(
        tmp_path / "x.ipynb",
        "# T",
        code("x = 40", execution_count=7, outputs=[new_output("stream", text="old")]),
        "print(x + 2)",
    )
    before, ticks = path.read_bytes(), []
    execution = notebooks.execute(path, on_cell=lambda: ticks.append(1))
    assert path.read_bytes() == before
    assert (execution.errors, execution.warnings, execution.claims) == ((), (), ())
    assert [c.get("execution_count") for c in execution.notebook.cells] == [None, 1, 2]
    assert printed(execution) == "42\n"
    assert len(ticks) == 2
    assert 0.1 < execution.seconds < 60
    assert 20 < execution.peak_mb < 400


def test_environment_of_the_kernel(tmp_path, monkeypatch):
    # A kernel that the user installed under the usual name, for some other Python.
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    spec.joinpath("kernel.json").write_text('{"argv": ["false"], "display_name": "other"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    for name in ("MPLBACKEND", "CH11_SEED", "CH11_CLAIMS_LOG", "PYTHONHASHSEED", "KEPT"):
        monkeypatch.setenv(name, "5")
    path = write(
        tmp_path / "x.ipynb",
        "import json, os, sys\nprint(json.dumps([sys.executable, os.getcwd(), dict(os.environ)]))",
        "_ = os.write(1, b'C-level out'), os.write(2, b'C-level err')",
    )
    execution = notebooks.execute(path, env={"EXTRA": "e"})
    assert execution.errors == execution.warnings == ()
    python, folder, environment = json.loads(printed(execution))
    assert Path(python).samefile(sys.executable)
    assert Path(folder).samefile(tmp_path)
    assert environment["TF_CPP_MIN_LOG_LEVEL"] == "3"
    assert environment["TF_ENABLE_ONEDNN_OPTS"] == "0"
    assert environment["PYTHONHASHSEED"] == "0"
    assert environment["PYTEST_CURRENT_TEST"]
    assert (environment["KEPT"], environment["EXTRA"]) == ("5", "e")
    # The kernel itself sets the inline backend.
    assert "inline" in environment.get("MPLBACKEND", "inline")
    assert not {"CH11_SEED", "CH11_CLAIMS_LOG"} & set(environment)


def test_peak_memory_includes_what_was_freed_and_child_processes(tmp_path):
    child = "import time; x = b'1' * 300_000_000; time.sleep(1)"
    path = write(
        tmp_path / "x.ipynb",
        "x = b'1' * 200_000_000\ndel x",
        f'import subprocess, sys\n_ = subprocess.run([sys.executable, "-c", {child!r}])',
    )
    assert 300 < notebooks.execute(path).peak_mb < 600
    nothing = write(tmp_path / "nothing.ipynb", "x = 1")
    assert notebooks.execute(nothing).peak_mb < 200


KILL = "# dies here\nimport os, signal\nos.write(2, b'out of memory')\nos.kill(os.getpid(), 9)"
WIDGET = (
    "import ipywidgets\nfrom IPython.display import display\n"
    "display(ipywidgets.interactive(lambda x: 1 / x, x=0))"
)
BROKEN = {
    "raises": ("x = 1 / 0", r"cell \[2\] `x = 1 / 0`: ZeroDivisionError: division by zero"),
    "exits": ("import sys\nsys.exit(1)", r"cell \[2\] `import sys`: SystemExit"),
    "dies": (code(KILL), r"cell \[2\] `# dies here`: the kernel died.*out of memory"),
    "endless": ("while True: pass", r"cell \[2\] `while True: pass`: no end after 1 seconds"),
    "widget": (WIDGET, r"in a widget: ZeroDivisionError: division by zero"),
    "warning": ("import warnings\nwarnings.warn('new')", r"cell \[2\] .*UserWarning: new"),
    "magic": ("%nosuchmagic", r"cell \[2\] .*UsageError|text on stderr: UsageError"),
    "empty": (" \n", r"cell \[1\] ``: empty code cell"),
    "tame": (code("x = 2", "raises-exception"), r"cell \[2\] .*nothing was raised"),
    "skipped": (code("x = 2", "skip-execution"), r"cell \[2\] .*tagged skip-execution"),
    "claim": (IMPORT + f"claims.check('{CLAIM}', False)", rf"cell \[2\] .*ClaimError: {CLAIM}"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_notebook_is_named_and_left_as_it_was(tmp_path, kind):
    cell, message = BROKEN[kind]
    path = write(tmp_path / "sick.ipynb", "# T", "first = 1", cell, "later = 1")
    before = path.read_bytes()
    with pytest.raises(NotebookError, match=message) as caught:
        notebooks.refresh(path, timeout=1 if kind == "endless" else 60)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["sick.ipynb"]


# ----------------------------------------------------------------------------- refreshing

FIGURE = """\
import matplotlib.pyplot as plt
from IPython.display import display
fig, ax = plt.subplots(figsize=(3, 2))
ax.plot([1, 4, 9])
plt.close(fig)
display(fig, metadata={"image/png": {"alt": "a \\"rising\\" line"}})"""


def test_refresh_twice_gives_the_same_bytes(tmp_path):
    path = write(
        tmp_path / "x.ipynb",
        "# T \u03bb",
        code("print('a', end=' ')\nprint('b')", "nbval-check-output", execution_count=9),
        FIGURE,
        "import ipywidgets\nipywidgets.IntSlider()",
        code("1 / 0", "raises-exception", "nbval-check-output"),
        "print({'a', 'b', 'c', 'd'})",
        widgets={"stale": 1},
        kernelspec={"name": "conda-env", "display_name": "mine", "language": "python"},
        language_info={"name": "python", "version": "3.8"},
        authors=[{"name": "A"}],
    )
    notebooks.refresh(path)
    first = path.read_bytes()
    execution = notebooks.refresh(path)
    assert path.read_bytes() == first
    assert first.endswith(b"}\n")
    assert "\u03bb".encode() in first

    saved = nbformat.read(path, as_version=4)
    nbformat.validate(saved)
    assert [cell.id for cell in saved.cells] == [f"cell-{n}" for n in range(6)]
    assert [c.execution_count for c in saved.cells[1:]] == [1, 2, 3, 4, 5]
    assert saved.metadata == {
        "kernelspec": notebooks.KERNELSPEC,
        "language_info": {"name": "python"},
        "authors": [{"name": "A"}],
    }
    _, text, figure, slider, error, _ = saved.cells
    assert text.metadata == {"tags": ["nbval-check-output"]}
    assert [output.text for output in text.outputs] == ["a b\n"]
    assert figure.outputs[0].metadata["image/png"]["alt"] == 'a "rising" line'
    assert set(slider.outputs[0].data) == {"text/plain"}
    assert error.outputs[0].ename == "ZeroDivisionError"
    assert all("execution" not in cell.metadata for cell in saved.cells)
    # What was executed is what was saved.
    assert execution.notebook == saved


# ----------------------------------------------------------------------------- publishing


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Run three notebooks, the second of them failing, and return (folder, executions)."""
    root = tmp_path_factory.mktemp("site")
    links = (
        "[two](02_b.ipynb#A-part) [s](solutions/01_a.ipynb) [web](https://x.org/a.ipynb) `x.ipynb`"
    )
    write(
        root / "notebooks/01_a.ipynb",
        f"# One & only\n\n{links}\n\nA rate $\\eta$ and $$\\frac{{a}}{{b}}.$$",
        FIGURE,
        IMPORT + f"claims.check('{CLAIM}', True, 'good ~1')\nclaims.check('{OTHER}', False, 'bad')",
        "import ipywidgets\nipywidgets.IntSlider()",
    )
    write(
        root / "notebooks/02_b.ipynb",
        "# Two\n\n## A part",
        IMPORT + f"claims.check('{CLAIM}', True)",
        "raise KeyError('stop')",
        f"claims.check('{THIRD}', True)",
    )
    write(root / "notebooks/solutions/01_a.ipynb", "# Answers\n\n[up](../01_a.ipynb)", "print(1)")
    before = {path: path.read_bytes() for path in root.rglob("*.ipynb")}
    paths = notebooks.discover([root / "notebooks"])
    executions = list(notebooks.run(paths, root / "build"))
    assert {path: path.read_bytes() for path in root.rglob("*.ipynb")} == before
    return root, executions


def soup(path):
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def test_run_counts_claims_and_goes_on_after_a_failure(site):
    one, two, solution = site[1]
    assert (one.n_claims, one.failed_claims, one.errors) == (2, [OTHER], ())
    assert (two.n_claims, two.failed_claims) == (2, [THIRD])
    assert "KeyError: 'stop'" in two.errors[0]
    assert (solution.n_claims, solution.failed_claims, solution.errors) == (0, [], ())


def test_run_writes_down_what_it_measured(site):
    table = pd.read_csv(site[0] / "build/notebooks.csv")
    assert table.notebook.tolist() == [one.path.as_posix() for one in site[1]]
    np.testing.assert_allclose(table.seconds, [one.seconds for one in site[1]], atol=0.05)
    np.testing.assert_allclose(table.peak_mb, [one.peak_mb for one in site[1]], atol=0.5)
    assert table[["claims", "holding"]].values.tolist() == [[2, 1], [2, 1], [0, 0]]


def test_pages_show_outputs_and_alternative_texts(site):
    html = soup(site[0] / "build/html/01_a.html")
    assert html.title.text == "One & only"
    assert [image["alt"] for image in html.find_all("img")] == ['a "rising" line']
    text = html.text
    assert f"{claims.catalogue()[CLAIM].verdict}  {CLAIM}: good ~1\nFAILED  {OTHER}: bad" in text
    assert "run the notebook to use them" in text
    assert "IntSlider(value=0)" not in text
    assert html.find_all("script") == []
    inline, block = html.find_all("math")
    assert (inline.mi.text, inline["display"]) == ("η", "inline")
    assert (block.mfrac.text, block["display"]) == ("ab", "block")
    assert "KeyError" in soup(site[0] / "build/html/02_b.html").text


def test_every_local_link_of_the_pages_leads_somewhere(site):
    folder = site[0] / "build/html"
    pages = sorted(folder.rglob("*.html"))
    assert len(pages) == 5
    for page in pages:
        hrefs = [a["href"] for a in soup(page).find_all("a")]
        for href in hrefs:
            target, _, anchor = href.partition("#")
            if not target.startswith("https:"):
                linked = page.parent / target if target else page
                assert linked.exists(), (page, href)
                assert not anchor or soup(linked).find(id=anchor), (page, href)
    hrefs = {a["href"] for a in soup(folder / "01_a.html").find_all("a")}
    assert {"02_b.html#A-part", "solutions/01_a.html", "https://x.org/a.ipynb"} <= hrefs
    assert "x.ipynb" in soup(folder / "01_a.html").text


def test_pages_are_chained_and_listed(site):
    folder = site[0] / "build/html"
    following = soup(folder / "01_a.html").select("nav a[rel=next]")
    assert [(a["href"], a.text) for a in following] == [("02_b.html", "Two \u2192")] * 2
    assert soup(folder / "01_a.html").select("nav a[rel=prev]") == []
    assert soup(folder / "02_b.html").select_one("nav a[rel=prev]")["href"] == "01_a.html"
    assert soup(folder / "02_b.html").select("nav a[rel=next]") == []
    assert soup(folder / "solutions/01_a.html").select_one("nav a")["href"] == "../index.html"
    rows = [
        [cell.text for cell in row.find_all("td")]
        for row in soup(folder / "index.html").select("tbody tr")
    ]
    assert [(row[0], row[3]) for row in rows] == [
        ("One & only", "1 of 2"),
        ("Two", "1 of 2"),
        ("Answers", ""),
    ]
    assert rows[0][4] == f"claim does not hold: {OTHER}"
    assert "KeyError: 'stop'" in rows[1][4]


def test_every_formula_of_the_series_is_understood():
    """What the converter does not know stays in the text as a command."""
    formula = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)
    found = 0
    for path in notebooks.discover([Path(__file__).parents[1] / "notebooks"]):
        for cell in notebooks.read(path).cells:
            text = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.DOTALL)
            for block, inline in formula.findall(text) if cell.cell_type == "markdown" else ():
                found += 1
                assert "\\" not in convert(block or inline), (path.name, block or inline)
    assert found > 500


def test_the_page_of_claims_has_them_all_with_what_was_measured(tmp_path, monkeypatch):
    path = write(
        tmp_path / f"{claims.catalogue()[CLAIM].notebook}_x.ipynb",
        "# Fine",
        IMPORT + f"claims.check('{CLAIM}', True, '1 < 2')",
    )
    margins = tmp_path / "margins.csv"
    monkeypatch.setattr(notebooks, "_MARGINS", margins)
    folder = tmp_path / "build/html"

    def row():
        list(notebooks.run([path], tmp_path / "build"))
        page = soup(folder / "claims.html")
        assert {cell["id"] for cell in page.select("td span")} == set(claims.catalogue())
        assert page.select_one(f'h2 a[href="{path.stem}.html"]').text == "Fine"
        return [cell.text for cell in page.find(id=CLAIM).find_parent("tr").find_all("td")]

    claim = claims.catalogue()[CLAIM]
    said = [claim.statement + CLAIM, claim.verdict, claim.correction, "1 < 2"]
    assert row() == [*said, "", ""]
    table = pd.DataFrame({"id": [CLAIM] * 3, "holds": [True, True, False], "margin": [2, 1, -0.25]})
    notebooks.by_claim(table).to_csv(margins, index=False)
    assert row() == [*said, "2 of 3", "-0.25"]
    assert "claims.html" in [a["href"] for a in soup(folder / "index.html").find_all("a")]


def test_the_index_leads_to_the_reference_if_it_is_there(tmp_path):
    path = write(tmp_path / "01_a.ipynb", "# One")
    for there in (False, True):
        if there:
            (tmp_path / "build/html/api").mkdir()
            (tmp_path / "build/html/api/ch11lib.html").touch()
        list(notebooks.run([path], tmp_path / "build"))
        hrefs = [a["href"] for a in soup(tmp_path / "build/html/index.html").find_all("a")]
        assert hrefs == ["01_a.html", "claims.html", "api/ch11lib.html"][: 2 + there]


def test_a_partial_run_keeps_the_other_pages_in_reach(site):
    root = site[0]
    (execution,) = notebooks.run([root / "notebooks/solutions/01_a.ipynb"], root / "build")
    assert execution.errors == ()
    links = [a["href"] for a in soup(root / "build/html/index.html").select("tbody a")]
    assert links == ["01_a.html", "02_b.html", "solutions/01_a.html"]
    other = root / "elsewhere"
    list(notebooks.run([root / "notebooks/solutions/01_a.ipynb"], other))
    assert len(soup(other / "html/index.html").select("tbody a")) == 1


def test_run_refuses_two_notebooks_for_one_page(tmp_path):
    paths = [write(tmp_path / folder / "x.ipynb", "# T") for folder in "ab"]
    with pytest.raises(NotebookError, match="same name"):
        list(notebooks.run(paths, tmp_path / "build"))


# --------------------------------------------------------------------------- re-measuring

MEASURED = [
    "import os\nfrom ch11lib import claims\nseed = int(os.environ['CH11_SEED'])",
    f"claims.check('{OTHER}', claims.below(seed, 2.5), f'seed {{seed}}')",
    f"assert seed != 3, 'not this one'\nclaims.check('{CLAIM}', True)",
]


@pytest.fixture(autouse=True)
def _package_at_rest(monkeypatch):
    """Do not take an edit of the package during the tests for a reason to measure again."""
    monkeypatch.setattr(notebooks, "_package_state", lambda package: b"")


def test_measure_repeats_over_seeds(tmp_path):
    path = write(tmp_path / "x.ipynb", "# T", *MEASURED)
    write(tmp_path / "without.ipynb", "# no claims here", "1 / 0")
    paths, out, said = notebooks.discover([tmp_path]), tmp_path / "out", []
    table = notebooks.measure(paths, [2, 3], out, say=said.append)
    assert [line[:5] for line in said] == ["[1/2]", "[2/2]"]
    assert str(path) in said[1]
    assert table.drop(columns="margin").values.tolist() == [
        [CLAIM, 2, True, ""],
        [CLAIM, 3, False, table["evidence"][1]],
        [OTHER, 2, True, "seed 2"],
        [OTHER, 3, False, "seed 3"],
    ]
    assert table["evidence"][1].startswith("no result: ")
    assert "AssertionError: not this one" in table["evidence"][1]
    assert table["margin"].isna().tolist() == [True, True, False, False]
    assert table["margin"].tolist()[2:] == pytest.approx([0.2, -0.2])
    stored = pd.read_csv(out / "claims.csv", keep_default_na=False)
    assert stored["id"].tolist() == [CLAIM, CLAIM, OTHER, OTHER]
    summary = pd.read_csv(out / "claims_by_id.csv")
    assert summary["pass_rate"].tolist() == [0.5, 0.5]
    assert summary["margin_worst"].tolist()[1] == pytest.approx(-0.2)
    assert math.isnan(summary["margin_median"][0])
    assert f"| {OTHER} | 01 |" in (out / "claims_by_id.md").read_text()


@pytest.fixture
def executed(monkeypatch):
    """Replace `execute` by a quick stand-in; collect the seeds that it is called with."""
    seeds = []

    def execute(path, *, env, log_claims, timeout):
        assert log_claims
        seeds.append(seed := int(env["CH11_SEED"]))
        record = {"id": CLAIM, "seed": seed, "holds": seed < 5, "margin": 5.0 - seed}
        errors = ("broken",) if seed == 9 else ()
        logged = () if errors else ({**record, "evidence": ""},)
        return notebooks.Execution(path, notebooks.read(path), 1.0, 50.0, errors, (), logged)

    monkeypatch.setattr(notebooks, "execute", execute)
    return seeds


def test_measure_resumes(tmp_path, executed):
    path = write(tmp_path / "x.ipynb", "# T", f"claims.check('{CLAIM}', True)")
    said = []

    def measure(*seeds):
        executed.clear()
        said.clear()
        table = notebooks.measure([path], seeds, tmp_path / "out", say=said.append)
        assert table["seed"].tolist() == list(seeds)
        return executed

    assert measure(1, 2, 9) == [1, 2, 9]
    # What ended in an error is tried again, the rest is known.
    assert measure(1, 2, 3, 9) == [3, 9]
    assert said[0] == "2 runs were measured before, 2 remain"
    # Prose does not count as a change, code and damage do.
    nb = notebooks.read(path)
    nb.cells[0].source = "# Other words"
    nbformat.write(nb, path)
    assert measure(1, 2) == []
    (tmp_path / "out/measurements/x-seed2.json").write_text('{"finger')
    assert measure(1, 2) == [2]
    nb.cells[-1].source += "  # changed"
    nbformat.write(nb, path)
    assert measure(1, 2) == [1, 2]


def test_an_interrupted_measurement_keeps_what_it_has(tmp_path, executed):
    path = write(tmp_path / "x.ipynb", "# T", f"claims.check('{CLAIM}', True)")

    def interrupt(line):
        if line.startswith("[2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        notebooks.measure([path], [0, 1, 2], tmp_path / "out", say=interrupt)
    assert pd.read_csv(tmp_path / "out/claims.csv")["seed"].tolist() == [0, 1]
    executed.clear()
    notebooks.measure([path], [0, 1, 2], tmp_path / "out", say=print)
    assert executed == [2]


def test_fingerprint_depends_on_the_package(tmp_path, monkeypatch):
    monkeypatch.undo()
    path = write(tmp_path / "x.ipynb", "1")
    package = tmp_path / "package"
    (package / "data").mkdir(parents=True)
    (package / "a.py").write_text("a = 1")
    states = [notebooks._package_state(package)]
    for name in ("a.py", "b.py", "data/x.npz"):
        (package / name).write_text("new")
        states.append(notebooks._package_state(package))
    for name in ("doctor.py", "claims.toml"):  # used by no measurement
        (package / name).write_text("new")
    assert notebooks._package_state(package) == states[-1]
    assert len(set(states)) == 4
    marks = set()
    for state in states:
        monkeypatch.setattr(notebooks, "_package_state", lambda package, state=state: state)
        marks.add(notebooks.fingerprint(path))
    assert len(marks) == 4


def test_measure_refuses(tmp_path):
    path = write(tmp_path / "x.ipynb", "# T", "1")
    with pytest.raises(NotebookError, match="none of these notebooks checks a claim"):
        notebooks.measure([path], [0], tmp_path)
    with pytest.raises(ValueError, match="seeds must not be empty"):
        notebooks.measure([path], [], tmp_path)
    with pytest.raises(ValueError, match=r"jobs be positive, got \[0\] and 0"):
        notebooks.measure([path], [0], tmp_path, jobs=0)


def test_folded_text_stays_folded_in_a_page(tmp_path):
    folded = "<details><summary>Answer</summary>\n\nThe *answer* itself.\n</details>"
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(folded)])
    page = notebooks._html(SimpleNamespace(notebook=made, path=tmp_path / "01_a.ipynb"), "")
    inside = page.partition("<details>")[2].partition("</details>")[0]
    assert "The <em>answer</em> itself." in inside


def test_the_watch_over_a_kernel_ends_quietly_when_an_interruption_has_taken_the_kernel_away():
    client = notebooks._Client(new_notebook())
    assert client.kc is None
    asyncio.run(client._async_poll_kernel_alive())
    with pytest.raises(AssertionError):
        asyncio.run(super(notebooks._Client, client)._async_poll_kernel_alive())
