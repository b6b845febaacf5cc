"""Claims that are checked: a catalogue of statements, and the function that tests them.

``claims.toml`` lists what books, notes and courses say about training deep networks, with a
verdict and, unless the verdict is *true*, what is right instead. A notebook measures something and
calls `check`, which prints the verdict with the evidence and raises `ClaimError` when the
measurement contradicts the catalogue.

Measured numbers are printed through `number`. Its leading tilde means *about* to the reader and
*do not compare* to the notebook tests (``tests/nbval_sanitize.cfg``); everything else in an output
is compared exactly.
"""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from html import escape
from importlib import resources
import json
import math
import os
from pathlib import Path
import re
import tomllib

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "KINDS",
    "SOURCES",
    "TOPICS",
    "VERDICTS",
    "Bound",
    "Claim",
    "ClaimError",
    "above",
    "below",
    "between",
    "catalogue",
    "check",
    "interval",
    "load",
    "number",
    "summary",
]

VERDICTS = ("true", "qualified", "outdated", "wrong", "contested", "to-measure")
KINDS = ("exact", "numeric", "statistical", "cost")
SOURCES = ("1e", "1e-zh", "2e-notes", "3e-table", "3e-slides", "folklore")
TOPICS = (
    "gradients",
    "initialization",
    "activations",
    "batch-normalization",
    "clipping",
    "transfer",
    "pretraining",
    "optimizers",
    "sparsity",
    "schedules",
    "regularization",
)


class ClaimError(AssertionError):
    """A measurement that contradicts the catalogue of claims."""


# ---------------------------------------------------------------------------- the catalogue


@dataclass(frozen=True)
class Claim:
    """One statement from the sources, with the verdict on it.

    Attributes
    ----------
    id : str
        Stable name, in lower case with hyphens. It does not say whether the claim holds.
    topic : str
        One of `TOPICS`.
    notebook : str
        Number of the notebook that checks the claim: two digits, and a letter for a part
        (``"08"``, ``"08b"``).
    sources : tuple of str
        Who says it: a selection of `SOURCES`.
    statement : str
        The claim as the sources mean it, right or wrong.
    verdict : str
        One of `VERDICTS`.
    correction : str
        What is right; empty if and only if the verdict is ``"true"``.
    kind : str
        One of `KINDS`: an exact fact, a number with a tolerance, a statement about many seeds, or
        one about time or memory.
    """

    id: str
    topic: str
    notebook: str
    sources: tuple[str, ...]
    statement: str
    verdict: str
    correction: str
    kind: str

    @property
    def in_fact(self) -> str:
        """What is right: the correction, or the statement itself if the verdict is true."""
        return self.correction or self.statement


_FIELDS = tuple(field.name for field in fields(Claim))
_ALLOWED = {"topic": TOPICS, "verdict": VERDICTS, "kind": KINDS}


def load(path: str | os.PathLike) -> dict[str, Claim]:
    """Read and validate a catalogue file.

    Parameters
    ----------
    path : str or path-like
        A TOML file with one ``[[claim]]`` table per claim and exactly the fields of `Claim`.

    Returns
    -------
    dict of str to Claim
        Keyed by id, in the order of the file.

    Raises
    ------
    ValueError
        If the file is not valid: the message names the claim, what was expected and what was found.
    """
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a valid TOML file: {error}") from error
    tables = document.get("claim")
    if set(document) != {"claim"} or not isinstance(tables, list):
        raise ValueError(f"{path}: expected [[claim]] tables only, found {sorted(document)}")
    result: dict[str, Claim] = {}
    for position, table in enumerate(tables, start=1):
        try:
            claim = _claim(table)
            if claim.id in result:
                raise ValueError("this id is used twice")
        except ValueError as error:
            name = table.get("id", "") if isinstance(table, dict) else ""
            raise ValueError(f"{path}: claim {position} ({name!r}): {error}") from None
        result[claim.id] = claim
    return result


def _claim(table: object) -> Claim:
    """Turn one table of the file into a `Claim`, or say what is wrong with it."""
    if not isinstance(table, dict):
        raise ValueError(f"expected a table, found {table!r}")
    if set(table) != set(_FIELDS):
        missing, unknown = set(_FIELDS) - set(table), set(table) - set(_FIELDS)
        raise ValueError(f"missing fields {sorted(missing)}, unknown fields {sorted(unknown)}")
    for field in _FIELDS:
        if field != "sources" and not isinstance(table[field], str):
            raise ValueError(f"{field} must be a string, found {table[field]!r}")
    for field, allowed in _ALLOWED.items():
        if table[field] not in allowed:
            raise ValueError(f"{field} must be one of {allowed}, found {table[field]!r}")
    sources = table["sources"]
    if not isinstance(sources, list) or not sources or not all(s in SOURCES for s in sources):
        raise ValueError(f"sources must be a non-empty list from {SOURCES}, found {sources!r}")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", table["id"]):
        raise ValueError(f"id must be lower-case words joined by hyphens, found {table['id']!r}")
    if not re.fullmatch(r"\d\d[a-z]?", table["notebook"]):
        raise ValueError(
            "notebook must be two digits such as '01', or these and a letter, "
            f"found {table['notebook']!r}"
        )
    if not table["statement"].strip():
        raise ValueError("statement must not be empty")
    if (table["verdict"] == "true") != (not table["correction"].strip()):
        raise ValueError(
            f"verdict {table['verdict']!r} does not go with correction {table['correction']!r}: "
            "the correction is empty if, and only if, the verdict is 'true'"
        )
    return Claim(**{**table, "sources": tuple(sources)})


@cache
def _packaged() -> dict[str, Claim]:
    with resources.as_file(resources.files("ch11lib") / "claims.toml") as path:
        return load(path)


def catalogue() -> dict[str, Claim]:
    """Return the claims of the series, by id, in the order of the notebooks.

    Returns
    -------
    dict of str to Claim
        A new dictionary each time; the claims themselves cannot be changed.

    Examples
    --------
    >>> claim = catalogue()["sigmoid-derivative-at-most-a-quarter"]
    >>> claim.notebook, claim.topic
    ('01', 'gradients')
    """
    return dict(_packaged())


def _lookup(id: str) -> Claim:
    claims = _packaged()
    if id not in claims:
        close = get_close_matches(str(id), claims, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "no id is similar."
        raise ValueError(f"id {id!r} is not in the catalogue of claims (claims.toml); {hint}")
    return claims[id]


# ------------------------------------------------------------------------------------ bounds


@dataclass(frozen=True)
class Bound:
    """The outcome of comparing measurements with a limit.

    It can be used wherever a truth value can, and knows by how much the limit was kept. Combine
    bounds (and plain booleans) with ``&``: the result holds if all hold, and has the smallest
    margin. The word ``and`` works too but keeps the margin of the last one only.

    Attributes
    ----------
    holds : bool
        Whether every element satisfied its limit.
    margin : float
        Signed relative distance of the worst element from its limit, positive on the good side:
        0.1 means that the worst element could move by 10 % of the limit (for `between`: of half
        the interval's width). ``-inf`` if an element is not a number or a plain ``False`` was
        combined with the bound.
    """

    holds: bool
    margin: float

    def __bool__(self) -> bool:
        return self.holds

    def __and__(self, other: "Bound | bool | np.bool_") -> "Bound":
        if isinstance(other, Bound):
            return Bound(self.holds and other.holds, min(self.margin, other.margin))
        if isinstance(other, bool | np.bool_):
            return Bound(self.holds, self.margin) if other else Bound(False, -math.inf)
        return NotImplemented

    __rand__ = __and__
    # Without this, NumPy would treat a bound as an array element in `np.True_ & bound`.
    __array_ufunc__ = None


def _real(name: str, value: ArrayLike) -> np.ndarray:
    """Return `value` as an array of floats, or say why that is impossible."""
    array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise TypeError(
            f"{name} must be a real number or an array of them, "
            f"got {type(value).__name__} with data type {array.dtype}"
        )
    if array.size == 0:
        raise ValueError(f"{name} must not be empty: a bound on nothing would always hold")
    return array.astype(float)


def _aligned(**arguments: ArrayLike) -> list[np.ndarray]:
    """Return the arguments as arrays of one shape."""
    arrays = [_real(name, value) for name, value in arguments.items()]
    try:
        return list(np.broadcast_arrays(*arrays))
    except ValueError:
        shapes = ", ".join(f"{n} {a.shape}" for n, a in zip(arguments, arrays, strict=True))
        raise ValueError(f"shapes do not fit each other: {shapes}") from None


def _bound(satisfied: np.ndarray, distance: np.ndarray, scale: np.ndarray) -> Bound:
    """Combine elementwise results; `distance` is positive where the limit is kept."""
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = distance / np.where(scale == 0, 1.0, scale)
    # An infinite value or limit has no finite relative distance, and NaN never satisfies a limit.
    relative = np.where(np.isnan(relative), np.where(satisfied, np.inf, -np.inf), relative)
    return Bound(bool(satisfied.all()), float(relative.min()))


def below(value: ArrayLike, limit: ArrayLike) -> Bound:
    """Test that every element of `value` is smaller than `limit`.

    Parameters
    ----------
    value : float or array_like
        Measured numbers.
    limit : float or array_like
        Their limit; an array is compared element by element, with broadcasting (paired seeds).

    Returns
    -------
    Bound
        Its margin is the minimum of ``(limit - value) / abs(limit)``, or of ``limit - value``
        where the limit is 0.

    Raises
    ------
    TypeError, ValueError
        If an argument is not made of real numbers, or is empty, or the shapes do not fit.

    Examples
    --------
    >>> below([0.7, 0.9], 1.0)
    Bound(holds=True, margin=0.09...)
    >>> bool(below(float("nan"), 1.0))
    False
    """
    value, limit = _aligned(value=value, limit=limit)
    with np.errstate(invalid="ignore"):
        return _bound(value < limit, limit - value, np.abs(limit))


def above(value: ArrayLike, limit: ArrayLike) -> Bound:
    """Test that every element of `value` is larger than `limit`.

    Parameters
    ----------
    value : float or array_like
        Measured numbers.
    limit : float or array_like
        Their limit; an array is compared element by element, with broadcasting (paired seeds).

    Returns
    -------
    Bound
        Its margin is the minimum of ``(value - limit) / abs(limit)``, or of ``value - limit``
        where the limit is 0.

    Raises
    ------
    TypeError, ValueError
        If an argument is not made of real numbers, or is empty, or the shapes do not fit.

    Examples
    --------
    >>> above(3.0, 2.0) & below(3.0, 4.0)
    Bound(holds=True, margin=0.25)
    """
    value, limit = _aligned(value=value, limit=limit)
    with np.errstate(invalid="ignore"):
        return _bound(value > limit, value - limit, np.abs(limit))


def between(value: ArrayLike, low: ArrayLike, high: ArrayLike) -> Bound:
    """Test that every element of `value` lies from `low` to `high`, both ends included.

    Parameters
    ----------
    value : float or array_like
        Measured numbers.
    low, high : float or array_like
        Finite ends with ``low < high``; arrays are compared element by element, with broadcasting.

    Returns
    -------
    Bound
        Its margin is the distance to the nearer end divided by half the interval's width: 1 in the
        middle, 0 at an end, negative outside.

    Raises
    ------
    TypeError, ValueError
        If an argument is not made of real numbers, is empty, the shapes do not fit, or the
        interval is empty or infinite.

    Examples
    --------
    >>> between(0.5, 0, 2)
    Bound(holds=True, margin=0.5)
    """
    value, low, high = _aligned(value=value, low=low, high=high)
    if not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
        raise ValueError(f"low must be smaller than high, both finite; got {low} and {high}")
    satisfied = (low <= value) & (value <= high)
    with np.errstate(invalid="ignore"):
        return _bound(satisfied, np.minimum(value - low, high - value), (high - low) / 2)


# ---------------------------------------------------------------------------------- printing


def number(x: float, digits: int = 2) -> str:
    """Format a measured number: rounded, with the leading tilde that means *about*.

    Parameters
    ----------
    x : float
        A real number; arrays without dimensions count as numbers.
    digits : int
        Significant digits.

    Returns
    -------
    str
        Plain notation from 0.001 up to a million, scientific notation otherwise. ``~nan`` and
        ``~inf`` are not hidden by the notebook tests: a run that diverged turns them red.

    Raises
    ------
    TypeError
        If `x` is not a real number.
    ValueError
        If `digits` is not a positive integer.

    Examples
    --------
    >>> number(0.96813), number(3.21e-7), number(1234.5, digits=3), number(2)
    ('~0.97', '~3.2e-07', '~1230', '~2.0')
    """
    if not isinstance(digits, int | np.integer) or isinstance(digits, bool) or digits < 1:
        raise ValueError(f"digits must be a positive integer, got {digits!r}")
    if np.ndim(x) != 0:
        raise TypeError(f"x must be a single number, got {type(x).__name__} of shape {np.shape(x)}")
    value = _real("x", x).item()
    if not math.isfinite(value):
        return f"~{value}"
    if value == 0:
        return "~0"
    scientific = f"{value:.{digits - 1}e}"
    exponent = int(scientific.partition("e")[2])  # after rounding, so that 0.999 becomes ~1.0
    if -3 <= exponent < 6:
        return f"~{float(scientific):.{max(0, digits - 1 - exponent)}f}"
    return f"~{scientific}"


def interval(low: float, high: float, digits: int = 2) -> str:
    """Format a measured interval.

    Parameters
    ----------
    low, high : float
        The ends.
    digits : int
        Significant digits of each.

    Returns
    -------
    str
        Both ends as by `number`.

    Examples
    --------
    >>> interval(0.1234, 0.34)
    '~0.12 to ~0.34'
    """
    return f"{number(low, digits)} to {number(high, digits)}"


# ---------------------------------------------------------------------------------- checking


def check(id: str, holds: "bool | np.bool_ | Bound", evidence: str = "") -> None:
    """Hold a measurement against the catalogue and print the outcome in one line.

    Parameters
    ----------
    id : str
        A claim of the catalogue. Each is checked in exactly one cell of the notebook that the
        catalogue names; a test sees to that, so running a cell again is free of consequences.
    holds : bool or Bound
        Whether what was measured agrees with the catalogue: with the statement if the verdict is
        *true*, otherwise with the correction.
    evidence : str
        What was measured, in one line of ASCII, numbers through `number`.

    Raises
    ------
    ClaimError
        If `holds` is false. With the environment variable ``CH11_CLAIMS_LOG`` set to a file name
        nothing is raised: one JSON line with id, holds, margin, evidence and seed (``CH11_SEED``)
        is appended to that file, and a claim that does not hold is printed as ``FAILED``. Margins
        that are infinite, and those of plain booleans, are logged as null.
    ValueError, TypeError
        If an argument is not of the described form.

    Examples
    --------
    >>> z = np.linspace(-5, 5, 1001)
    >>> slope = np.exp(-z) / (1 + np.exp(-z)) ** 2
    >>> check("sigmoid-derivative-at-most-a-quarter", below(slope, 0.2501),
    ...       f"largest slope {number(slope.max())}")
    qualified  sigmoid-derivative-at-most-a-quarter: largest slope ~0.25
    """
    claim = _lookup(id)
    if not isinstance(holds, bool | np.bool_ | Bound):
        raise TypeError(
            "holds must be True, False or a bound such as claims.below(value, limit), "
            f"got {type(holds).__name__}; for an array use .all()"
        )
    if not isinstance(evidence, str):
        raise TypeError(f"evidence must be a string, got {type(evidence).__name__}")
    if not evidence.isascii() or not all(c.isprintable() for c in evidence):
        raise ValueError(f"evidence must be one line of printable ASCII, got {evidence!r}")
    rest = f"{claim.id}: {evidence}" if evidence else claim.id
    log = os.environ.get("CH11_CLAIMS_LOG")
    if log:
        _append(log, claim, holds, evidence)
    if not holds and not log:
        raise ClaimError(_contradiction(claim, holds, evidence))
    print(f"{claim.verdict if holds else 'FAILED'}  {rest}")


def _append(log: str, claim: Claim, holds: "bool | np.bool_ | Bound", evidence: str) -> None:
    margin = holds.margin if isinstance(holds, Bound) and math.isfinite(holds.margin) else None
    record = {
        "id": claim.id,
        "holds": bool(holds),
        "margin": margin,
        "evidence": evidence,
        "seed": int(os.environ.get("CH11_SEED", "0")),
    }
    with open(log, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def _contradiction(claim: Claim, holds: "bool | np.bool_ | Bound", evidence: str) -> str:
    margin = f" (margin {holds.margin:.2g})" if isinstance(holds, Bound) else ""
    correction = f"\n  in fact:  {claim.correction}" if claim.correction else ""
    return (
        f"{claim.id}: the measurement contradicts the catalogue.\n"
        f"  said:     {claim.statement}\n"
        f"  verdict:  {claim.verdict}{correction}\n"
        f"  measured: {evidence or 'does not hold'}{margin}\n"
        "If you changed something (data, sizes, rates, seeds), you have found where this verdict "
        "ends: ask why. If you changed nothing, please report it with the versions that "
        "`python -m ch11lib doctor` prints."
    )


def summary(notebook: str) -> None:
    """Display the claims of a notebook: what is said, the verdict, and what is right.

    Parameters
    ----------
    notebook : str
        Its number, for example ``"01"`` or ``"08b"``.

    Raises
    ------
    ValueError
        If no claim belongs to that notebook.

    Examples
    --------
    >>> summary("00")
    Traceback (most recent call last):
    ...
    ValueError: notebook must be one of 01, 02, ...; got '00'
    """
    from IPython.display import display

    claims = [claim for claim in _packaged().values() if claim.notebook == notebook]
    if not claims:
        known = ", ".join(sorted({claim.notebook for claim in _packaged().values()}))
        raise ValueError(f"notebook must be one of {known}; got {notebook!r}")
    display(
        {"text/html": _html_table(claims), "text/plain": _plain_table(claims)},
        raw=True,
    )


def _plain_table(claims: list[Claim]) -> str:
    lines = [f"{len(claims)} claims"]
    for claim in claims:
        lines += ["", f"{claim.id}", f"  said:    {claim.statement}", f"  verdict: {claim.verdict}"]
        if claim.correction:
            lines.append(f"  in fact: {claim.correction}")
    return "\n".join(lines)


def _html_table(claims: list[Claim]) -> str:
    # Jupyter aligns table cells to the right unless told otherwise.
    left = ' style="text-align: left; vertical-align: top"'
    head = "".join(f'<th scope="col"{left}>{name}</th>' for name in ("Said", "Verdict", "In fact"))
    rows = "\n".join(
        f"<tr><td{left}>{escape(claim.statement)}<br><code>{claim.id}</code></td>"
        f'<td style="text-align: left; vertical-align: top; white-space: nowrap">'
        f"{claim.verdict}</td>"
        f"<td{left}>{escape(claim.correction) or 'as said'}</td></tr>"
        for claim in claims
    )
    return (
        f"<table>\n<caption>{len(claims)} claims, checked in this notebook</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    )
