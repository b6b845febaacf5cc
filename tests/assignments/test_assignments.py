"""The assignments, graded by nbgrader itself: right answers get their points, wrong ones none.

Wrong and right answers are in answers/. One graded notebook holds answers to all questions, some
of them wrong: as a test uses nothing but its own answer (there is a test for this), one run of
nbgrader tries wrong answers to several questions, and shows that the others keep their points.
"""

import ast
import builtins
from collections import Counter
from copy import deepcopy
import json
import re

from ch11lib import activations, batch_norm, clipping, initializers, optimizers
from course import (
    HIDDEN,
    NAMES,
    ROOT,
    SOLUTION,
    Course,
    about,
    answers,
    cell_of,
    grading,
    questions,
    read,
    solved,
    submission,
    written,
)
from nbformat.v4 import new_code_cell, new_markdown_cell
from nbgrader.validator import Validator
import numpy as np
import pytest

# nbgrader's libraries warn about their own ways with databases, event loops and templates.
pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = {name: questions(name) for name in NAMES}


def expected(name, lost=()):
    """Return the points of the tests if these questions are lost."""
    return {q.test: 0.0 if q.name in lost else q.points for q in QUESTIONS[name].values()}


def points_of(name, graded):
    return {q.test: graded.points[q.test] for q in QUESTIONS[name].values()}


# ------------------------------------------------------------------------------- what is committed


def test_number_of_questions_and_points():
    assert sum(map(len, QUESTIONS.values())) >= 20
    for name in NAMES:
        total = sum(expected(name).values()) + sum(written(name).values())
        assert 20 <= total <= 40
        assert f"**{total:g} points:**" in read(name).cells[0].source
        headings = [
            re.match(r"## Question \d+: .* \((\d+) points?\)\n", cell.source)
            for cell in read(name).cells
            if cell.source.startswith("## Question")
        ]
        announced = [float(heading[1]) for heading in headings]
        assert announced == [*expected(name).values(), *written(name).values()]


def test_every_question_has_wrong_and_other_right_answers():
    for name in NAMES:
        wrong, right = answers(name, "wrong"), answers(name, "right")
        assert list(wrong) == list(right) == list(QUESTIONS[name])
        assert min(map(len, wrong.values())) >= 3
        assert min(map(len, right.values())) >= 1


@pytest.mark.parametrize("name", NAMES)
def test_form_of_the_source(name):
    nb, ids = read(name), Counter()
    assert nb.nbformat_minor == 5
    assert nb.metadata == {
        "kernelspec": {
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    setup = [cell for cell in nb.cells if about(cell).get("grade_id") == f"{name}-setup"]
    assert [cell.source for cell in setup] == [cell_of(read("A1"), "A1-setup").source]
    for cell in nb.cells:
        ids[cell.id] += 1
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert set(cell.metadata) <= {"nbgrader"}
        assert cell.cell_type == "markdown" or about(cell), "every code cell is known to nbgrader"
        if cell.cell_type == "code" and about(cell)["solution"]:
            assert len(SOLUTION.findall(cell.source)) == 1
    assert set(ids.values()) == {1}


@pytest.mark.parametrize("name", NAMES)
def test_tests_use_their_own_answer_and_nothing_else(name):
    for q in QUESTIONS[name].values():
        source = cell_of(read(name), q.test).source
        tree = ast.parse(source)
        body = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
        assert [ast.unparse(node) for node in body] == ["start_test()", f"test_{q.name}()"]
        stored, loaded = set(), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                (loaded if isinstance(node.ctx, ast.Load) else stored).add(node.id)
            elif isinstance(node, ast.arg):
                stored.add(node.arg)
            elif isinstance(node, ast.FunctionDef):
                stored.add(node.name)
            elif isinstance(node, ast.Assert):
                assert node.msg is not None, "every assertion says what to look at"
        assert loaded - stored - set(dir(builtins)) <= {"np", "math", "close", "start_test", q.name}
        assert q.name in loaded
        assert len(HIDDEN.findall(source)) == 1
        assert "assert" in HIDDEN.sub("", source), "some tests can be seen"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_a_release_gives_it_away(name):
    text = json.dumps(json.loads((ROOT / "release" / name / f"{name}.ipynb").read_text("utf-8")))
    secret = []
    for cell in read(name).cells:
        if cell.cell_type == "markdown" and about(cell).get("solution"):
            secret += cell.source.splitlines()
        for region in (SOLUTION, HIDDEN):
            secret += [line for found in region.findall(cell.source) for line in found.splitlines()]
    public = {
        line.strip()
        for cell in read(name).cells
        if not (cell.cell_type == "markdown" and about(cell).get("solution"))
        for line in HIDDEN.sub("", SOLUTION.sub("", cell.source)).splitlines()
    }
    secret = {line.strip() for line in secret} - {""}
    assert len(secret) > 100
    for line in secret - public:
        assert json.dumps(line)[1:-1] not in text, line
    # Lines that stand in both, because a hidden test begins as a shown one does, are no secret.
    assert {line for line in secret & public if "return" in line} == set()
    for word in ("SOLUTION", "HIDDEN", "Model answer", "Mark scheme"):
        assert word not in text


def test_solutions_agree_with_the_library():
    """What the series teaches, and tests against Keras, is what counts as right here."""
    space = prepared()
    for name in NAMES:
        for q in QUESTIONS[name].values():
            exec(q.solution, space)
    rng = np.random.default_rng(0)
    close, (x, dy) = space["close"], rng.standard_normal((2, 7, 3))
    gamma, beta = rng.standard_normal((2, 3))
    y, cache = batch_norm.forward(x, gamma, beta, epsilon=0.1)
    assert close(space["bn_forward"](x, gamma, beta, 0.1), y)
    ours, theirs = space["bn_backward"](dy, x, gamma, 0.1), batch_norm.backward(dy, cache)
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))
    mean, variance = space["moving_statistics"]([x], 0.9)
    assert close(mean, batch_norm.moving_average(np.zeros(3), cache.mean, momentum=0.9))
    assert close(variance, batch_norm.moving_average(np.ones(3), cache.variance, momentum=0.9))
    w, b = space["fold"](np.eye(3), beta, gamma, beta, mean, variance, 0.1)
    inferred = batch_norm.infer(x + beta, mean, variance, gamma, beta, epsilon=0.1)
    assert close(x @ w + b, inferred)

    gradients = [x, 3 * dy]
    for rule in ("value", "norm", "global_norm"):
        theirs = getattr(clipping, f"clip_by_{rule}")(gradients, 2.0)
        ours = space["clip"](gradients, 2.0, rule)
        assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))
    assert close(space["turn"](x, 0.5), clipping.angle(x, clipping.clip_by_value(x, 0.5)), 1e-6)

    sgd, m, theta = optimizers.SGD(0.1, momentum=0.9), np.zeros((7, 3)), x
    adam, state = optimizers.Adam(0.1, epsilon=0), (x, m, m)
    for t, g in enumerate((dy, x, dy), 1):
        theta, m = space["momentum_step"](theta, m, g, 0.1, 0.9)
        state = space["adam_step"](*state, g, t, eta=0.1, epsilon=0)
    for start, optimizer, end in ((x, sgd, theta), (x, adam, state[0])):
        for g in (dy, x, dy):
            start = optimizer.step(start, g)
        assert close(start, end)

    up, down = space["glorot_factors"](30, 50)
    variance = initializers.variance("glorot_uniform", 30, 50)
    assert close((up, down), (30 * variance, 50 * variance))
    assert close(space["leaky_limit"](30, 0), initializers.limit("he_uniform", 30, 50))
    alpha, s = space["self_normalizing"](1.0)
    assert close(activations.selu(-(dy**2)), s * alpha * np.expm1(-(dy**2)), 1e-7)


# ------------------------------------------------------------------------------ what nbgrader does


def mixtures(name):
    """Return notebooks with other answers, and for each question which answer it has.

    The wrong and the other right answers to a question stand in a circle; where there are fewer
    than to other questions, the solution fills the gap. Notebook number r has, for question number
    i, the answer number r + i. So every answer is in one notebook, beside right and wrong ones.
    """
    wrong, right = answers(name, "wrong"), answers(name, "right")
    candidates = {
        function: [("wrong", what, source) for what, source in wrong[function].items()]
        + [("right", what, source) for what, source in right[function].items()]
        for function in wrong
    }
    rounds = max(map(len, candidates.values()))
    for r in range(rounds):
        chosen = {}
        for i, q in enumerate(QUESTIONS[name].values()):
            circle = dict(enumerate(candidates[q.name]))
            chosen[q.name] = circle.get((r + i) % rounds, ("right", "solution", q.solution))
        yield chosen, submission(name, {q: source for q, (_, _, source) in chosen.items()})


def caught_by_shown_tests(name):
    """Count the wrong answers that the student sees failing."""
    caught = 0
    for q in QUESTIONS[name].values():
        shown = HIDDEN.sub("", cell_of(read(name), q.test).source)
        for source in answers(name, "wrong")[q.name].values():
            space = prepared()
            exec(source, space)
            try:
                exec(shown, space)
            except Exception:
                caught += 1
    return caught


@pytest.mark.parametrize("name", NAMES)
def test_grading(name, tmp_path, record_property):
    course, problems = Course(tmp_path), []
    failed = Validator(config=course.config).validate(str(ROOT / "source" / name / f"{name}.ipynb"))
    assert failed == {}

    fresh, committed = course.release(name), ROOT / "release" / name / f"{name}.ipynb"
    assert fresh.read_bytes() == committed.read_bytes(), "out of date: run `make assignments`"

    mixed = {f"mixed-{r}": mixture for r, mixture in enumerate(mixtures(name))}
    graded = course.grade(
        name,
        {"solved": solved(name), "untouched": submission(name)}
        | {student: nb for student, (_, nb) in mixed.items()},
    )

    assert points_of(name, graded["solved"]) == expected(name)
    assert graded["solved"].manual == set(written(name)), "people read what is written"
    assert graded["untouched"].points == dict.fromkeys(expected(name) | written(name), 0.0)
    assert graded["untouched"].manual == set()
    assert set(graded["untouched"].errors.values()) == {"NotImplementedError"}
    assert len(graded["untouched"].errors) == len(expected(name))
    assert not any(found.report for found in graded.values()), "nothing to repair or to object to"

    seen = Counter()
    for student, (chosen, _) in mixed.items():
        result = graded[student]
        for q in QUESTIONS[name].values():
            kind, what, _ = chosen[q.name]
            points, error = result.points[q.test], result.errors.get(q.test)
            if points != (q.points if kind == "right" else 0):
                problems.append(f"{q.name}: {kind} answer {what} gets {points}: {error}")
            elif error in ("NameError", "SyntaxError", "NotImplementedError"):
                problems.append(f"{q.name}: {what} is broken, not wrong")
            elif what != "solution":
                seen[kind] += 1
    counts = {kind: sum(map(len, answers(name, kind).values())) for kind in ("wrong", "right")}
    record_property(
        "summary",
        f"{name}: {len(QUESTIONS[name])} questions; wrong answers caught: {seen['wrong']} of "
        f"{counts['wrong']} ({seen['wrong'] / counts['wrong']:.0%}), {caught_by_shown_tests(name)} "
        f"of them by tests that are shown; other right answers accepted: {seen['right']} of "
        f"{counts['right']}; {course.seconds:.1f} s per notebook",
    )
    assert problems == []
    assert seen == counts
    assert course.seconds < 60


# ------------------------------------------------------------------------ submissions gone astray

TRICKS = (
    {
        "forward": "np.abs = np.max = np.all = np.array = lambda *a, **k: 0",
        "error_signals": "def close(*a):\n    return True\n\n\nabs = all = bool = len = close",
        "glorot_factors": "import importlib\n\nimportlib.import_module('os')._exit(0)",
        "leaky_limit": "import numpy.linalg as la\n\nla.norm = None",
        "self_normalizing": "def start_test():\n    globals()['close'] = lambda *a: True",
        "prelu_backward": "import sys\n\nsys._getframe(0).f_globals['close'] = lambda *a: True",
        "dead_fraction": "get_ipython().set_custom_exc((Exception,), lambda *a: None)",
    },
    {
        "forward": "get_ipython().input_transformers_post.append(lambda lines: ['pass'])",
        "error_signals": "close.__code__ = (lambda *a: True).__code__",
        "glorot_factors": "__builtins__.AssertionError = Warning",
        "leaky_limit": "_GIVEN['close'] = lambda *a: True",
        "self_normalizing": "%%capture",
        "prelu_backward": "exit()",
        "dead_fraction": "setattr(np, 'all', lambda *a: True)",
    },
)
"""What stands before wrong answers to A1, so that they might get points all the same."""


def without(nb, *grade_ids):
    nb.cells = [cell for cell in nb.cells if about(cell).get("grade_id") not in grade_ids]
    return nb


def copied(nb, grade_id):
    copy = deepcopy(cell_of(nb, grade_id))
    copy.id = "copied"
    return copy


def astray():
    """Return submissions, with the questions they lose and what the report says."""
    cases = {}

    def case(name, lost=(), report=None):
        nb = solved("A1")
        cases[name] = (nb, set(lost), report)
        return nb

    nb = case("deleted", ["error_signals"], "`A1-error_signals` was missing")
    without(nb, "A1-forward-test", "A1-error_signals")
    nb = case("many-deleted", ["forward"], "`A1-setup` was missing")
    without(nb, "A1-setup", "A1-forward", "A1-forward-test", "A1-dead_fraction-test", "A1-sigmoid")

    nb = case("copied", report="several cells `A1-forward`")
    position = nb.cells.index(cell_of(nb, "A1-forward"))
    nb.cells.insert(position + 3, copied(nb, "A1-forward"))
    nb.cells[position].source = "def forward(x, weights):\n    return []\n"
    nb.cells.append(copied(nb, "A1-error_signals-test"))

    nb = case("reversed", report="moved back")  # and in the format before cells had ids
    without(nb, "A1-dead_fraction-test").cells.reverse()
    nb.nbformat_minor = 4
    for cell in nb.cells:
        cell.pop("id")

    nb = case("tampered", ["forward", "error_signals", "glorot_factors"], "is again as it was")
    for function in ("forward", "error_signals", "glorot_factors"):
        cell_of(nb, f"A1-{function}").source = f"{function} = None"
    cell_of(nb, "A1-setup").source += "\n\n\ndef close(*a):\n    return True\n"
    cell_of(nb, "A1-forward-test").source = "pass"
    cell_of(nb, "A1-error_signals-test").metadata.nbgrader.points = 100
    cell_of(nb, "A1-glorot_factors-test").metadata.nbgrader |= {"grade": False, "locked": False}
    test = cell_of(nb, "A1-leaky_limit-test")
    test.cell_type = "markdown"
    del test["outputs"], test["execution_count"]
    nb.cells.append(copied(nb, "A1-dead_fraction-test"))
    nb.cells[-1].metadata.nbgrader |= {"grade_id": "more", "points": 50}

    nb = case("metadata-stripped", QUESTIONS["A1"], "`A1-forward` was missing")
    for cell in nb.cells:
        cell.metadata = {}

    wrong = {name: next(iter(kinds.values())) for name, kinds in answers("A1", "wrong").items()}
    for number, tricks in enumerate(TRICKS):
        nb = case(f"tricks-{number}", tricks, "was not run, because it")
        for function, trick in tricks.items():
            cell_of(nb, f"A1-{function}").source = f"{trick}\n\n\n{wrong[function]}"

    broken = {
        "forward": "def forward(x, weights):\nreturn [x]\n",
        "error_signals": "1 / 0",
        "glorot_factors": "def glorot_factors(n_in, n_out):\n    while True:\n        pass\n",
        "leaky_limit": "raise SystemExit",
    }
    nb = case("broken", broken, "not plain Python (line 2")
    for function, source in broken.items():
        cell_of(nb, f"A1-{function}").source = source
    nb.cells.insert(1, new_code_cell("raise RuntimeError('left over')"))

    nb = case("noisy")
    cell_of(nb, "A1-forward").source = (
        "import warnings\n\n\n"
        + SOLUTION.sub("", cell_of(nb, "A1-forward").source)
        + "    warnings.warn('a warning')\n    np.log(np.zeros(1))\n"
        "    print()\n    outputs = [x]\n    for w in weights:\n"
        "        outputs.append(np.tanh(outputs[-1] @ w))\n    return outputs\n"
    )
    nb.cells.insert(0, new_markdown_cell("My notes."))
    nb.cells.insert(4, new_code_cell("import matplotlib\n\nmax = sum = close = 3\nprint(max)"))
    return cases


def test_submissions_gone_astray(tmp_path):
    course, cases = Course(tmp_path, timeout=6), astray()
    course.release("A1")
    graded = course.grade("A1", {name: nb for name, (nb, *_) in cases.items()})
    problems = []
    for name, (_, lost, report) in cases.items():
        if name not in graded:
            problems.append(f"{name}: not graded")
            continue
        result = graded[name]
        if points_of("A1", result) != expected("A1", lost):
            problems.append(f"{name}: {result.points}, {result.errors}, {result.report}")
        if (report or "") not in result.report or (result.report and not report):
            problems.append(f"{name}: the report says {result.report!r}")
        if result.report and result.report.splitlines()[-1].removeprefix("- ") not in course.log:
            problems.append(f"{name}: the log does not have the report")
    assert problems == []
    assert graded["broken"].errors["A1-glorot_factors-test"] == "CellTimeoutError"
    noise = [o for c in graded["noisy"].nb.cells for o in c.get("outputs", ())]
    assert not any(output.get("name") == "stderr" for output in noise)

    page = course.feedback("A1", "broken")
    assert "Before grading" in page
    assert "not plain Python" in page
    assert "No reply from kernel before timeout" in page


def prepared():
    """Return names as they are after the first cell of an assignment."""
    space = {}
    exec(cell_of(read("A1"), "A1-setup").source, space)
    return space


def test_tests_that_pass_are_silent(capfd):
    space, q = prepared(), QUESTIONS["A1"]["dead_fraction"]
    exec(q.solution, space)
    exec(cell_of(read("A1"), q.test).source, space)
    assert capfd.readouterr() == ("", "")


def test_close():
    close = prepared()["close"]
    assert close([1, 2], [1.0, 2.0 + 1e-12])
    assert close(np.zeros((0, 2)), np.zeros((0, 2)))
    for wrong in ([1, 2.000001], [[1, 2]], [1], 1.5, [1, np.nan], [1, np.inf], None):
        assert not close(wrong, [1, 2])
    assert close([1, 2.001], [1, 2], 1e-3)


def test_names_get_their_meaning_back():
    space, before = prepared(), (np.abs, np.linalg.norm, builtins.sum)
    try:
        np.abs = np.linalg.norm = builtins.sum = None
        exec("sum = all = close = np = lambda *a: True", space)
        space["start_test"]()
        assert (np.abs, np.linalg.norm, builtins.sum) == before
        assert "sum" not in space
        assert not space["close"](1, 2)
        assert space["np"] is np
    finally:
        np.abs, np.linalg.norm, builtins.sum = before


def test_objections():
    objection = grading().objection
    harmless = (
        "import numpy as np",
        "from scipy import integrate",
        "import matplotlib.pyplot as plt\nplt.plot([1])",
        "sum = 3\nclose = print",
        "class A:\n    def __init__(self):\n        self.x = 1",
        "w.shape = (2, 3)\nw[0] = 1\nw.flat[0] = 2",
        "with np.errstate(all='ignore'):\n    np.random.seed(0)",
        "print(f'{x!r}', '\\d')",
        "_, y = 1, 2",
    )
    for source in harmless:
        assert objection(source) is None, source
    for source, reason in (
        ("import os", "imports os"),
        ("import numpy, sys", "imports sys"),
        ("from importlib import reload", "imports importlib"),
        ("from warnings import sys", "imports sys"),
        ("from numpy import *", "imports *"),
        ("from . import x", "imports ."),
        ("import numpy.ctypeslib", "imports numpy.ctypeslib"),
        ("%time f()", "is not plain Python (line 1"),
        ("!ls", "is not plain Python"),
        ("x = 'a\x00'", "is not plain Python"),
        ("open('x')", "uses the name open"),
        ("__builtins__", "uses the name __builtins__"),
        ("_ORIGINAL.clear()", "uses the name _ORIGINAL"),
        ("def start_test():\n    pass", "defines start_test"),
        ("start_test = 1", "uses the name start_test"),
        ("f.__code__ = g.__code__", "uses the attribute __code__"),
        ("np._core", "uses the attribute _core"),
        ("warnings.sys", "uses the attribute sys"),
        ("np.abs = 1", "gives np.abs another value"),
        ("for np.abs in [1]:\n    pass", "gives np.abs another value"),
        ("del np.abs", "gives np.abs another value"),
    ):
        assert (objection(source) or "").startswith(reason), (source, objection(source))


def test_copies_of_given_cells_are_not_run_and_solutions_are():
    for name in NAMES:
        objected = [
            about(cell)["grade_id"]
            for cell in read(name).cells
            if cell.cell_type == "code" and grading().objection(cell.source) is not None
        ]
        assert objected == [f"{name}-setup", *expected(name)]
