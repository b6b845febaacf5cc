"""The tests of the assignments against many small changes of the solutions.

The wrong answers in answers/ are mistakes that people make. Those here are made by a machine: one
operator, comparison, number or argument is changed at a time. What survives must be listed, with
the reason why it is no mistake.
"""

import ast
from copy import deepcopy
import warnings

from course import NAMES, cell_of, questions, read
import numpy as np
import pytest

SAME = {
    "error_signals": {"strict=True": "lengths are equal anyway"},
    "prelu_backward": {"z <= 0 -> z < 0": "at 0 either slope will do"},
    "moving_statistics": {
        "0 -> -1": "all batches have the same features",
        "1 -> -1": "the last of two axes",
    },
    "clip": {
        "rule == 'value' -> rule >= 'value'": "no other rule is later in the alphabet",
        "rule == 'global_norm' -> rule <= 'global_norm'": "no other rule is earlier in it",
        "strict=True": "lengths are equal anyway",
    },
    "turn": {
        "np.clip(cosine, -1, 1) -> cosine": "it depends on rounding",
        "1 -> 2": "the upper limit: it depends on rounding; the lower one: no angle is that wide",
        "1 -> 0": "the lower limit: no angle is wider than 90 degrees",
    },
    "warmup_exponential": {
        "np.asarray(step, dtype=float) -> step": "arrays are arrays",
        "dtype=float": "division makes numbers of a floating type",
        "step < w -> step <= w": "both parts meet at the peak",
    },
    "prune": {
        "dtype=int": "whole numbers, whatever their type",
        "strict=True": "lengths are equal anyway",
    },
    "sparsity_at": {
        "np.asarray(step) -> step": "arrays are arrays",
        "0 -> -1": "what is before the start has a case of its own",
    },
    "freezing_plan": {"kind != 'batch_norm' -> kind > 'batch_norm'": "there are two kinds"},
}
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)
COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def changed(node):
    """Yield what could stand in place of an expression."""

    def with_(**fields):
        new = deepcopy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    if isinstance(node, ast.BinOp):
        yield from (with_(op=op()) for op in OPERATORS if not isinstance(node.op, op))
        yield from (node.left, node.right)
    elif isinstance(node, ast.Compare):
        yield from (with_(ops=[op()]) for op in COMPARISONS if not isinstance(node.ops[0], op))
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        others = (node.value + 1, node.value - 1, -node.value, 2 * node.value)
        yield from (ast.Constant(value) for value in others if value != node.value)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.BoolOp):
        yield with_(op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
    elif isinstance(node, ast.Call):
        yield from node.args
        if node.keywords:
            yield with_(keywords=[])


class Replace(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old, new):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else self.generic_visit(node)


def mutants(source):
    """Return {changed source: what was changed} for all single changes in a function's body."""
    tree, found = ast.parse(source), {}
    for old in [node for part in tree.body[0].body for node in ast.walk(part)]:
        for new in changed(old):
            twins = {}
            copy = deepcopy(tree, twins)  # also notes which node has become which
            copy = Replace(twins[id(old)], new).visit(copy)
            what = f"{ast.unparse(old)} -> {ast.unparse(new)}"
            if isinstance(old, ast.Call) and new not in old.args:
                what = ", ".join(map(ast.unparse, old.keywords))
            found.setdefault(ast.unparse(ast.fix_missing_locations(copy)), what)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_small_changes_of_the_solutions_are_noticed(name, record_property):
    setup, survivors, count = cell_of(read(name), f"{name}-setup").source, {}, 0
    for q in questions(name).values():
        test = compile(cell_of(read(name), q.test).source, q.test, "exec")
        found = mutants(q.solution)
        count += len(found)
        for source, what in found.items():
            space = {}
            exec(setup, space)
            with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
                try:
                    exec(source, space)
                    exec(test, space)
                except Exception:
                    continue
            survivors.setdefault(q.name, set()).add(what)
    left = sum(map(len, survivors.values()))
    record_property(
        "summary",
        f"{name}: {count - left} of {count} small changes of the solutions noticed; the other "
        f"{left} are listed, as they change nothing",
    )
    unlisted = {q: changes - SAME.get(q, {}).keys() for q, changes in survivors.items()}
    assert {q: changes for q, changes in unlisted.items() if changes} == {}
