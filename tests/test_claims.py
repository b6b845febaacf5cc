import json
import math
from pathlib import Path
import tomllib

import ch11lib
from ch11lib import claims
from ch11lib.claims import Bound, above, below, between, interval, number
from hypothesis import example, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

TRUE_ID = "step-size-stability-threshold"
WRONG_ID = "weights-frozen-during-forward-pass"
FINITE = st.floats(-1e6, 1e6, allow_nan=False)
FAST = settings(derandomize=True, deadline=None, max_examples=50)

VALID = """
[[claim]]
id = "a-b"
topic = "gradients"
notebook = "01"
sources = ["1e", "folklore"]
statement = "A is B."
verdict = "wrong"
correction = "A is C."
kind = "exact"
"""


# --------------------------------------------------------------------------- the catalogue


def test_catalogue_is_a_faithful_copy_of_the_file():
    path = Path(ch11lib.__file__).with_name("claims.toml")
    tables = tomllib.loads(path.read_text(encoding="utf-8"))["claim"]
    catalogue = claims.catalogue()
    assert list(catalogue) == [table["id"] for table in tables]
    for table in tables:
        claim = catalogue[table["id"]]
        assert {name: getattr(claim, name) for name in table} == {
            **table,
            "sources": tuple(table["sources"]),
        }


def test_catalogue_is_in_the_order_of_the_notebooks_and_ascii():
    catalogue = claims.catalogue()
    numbers = [claim.notebook for claim in catalogue.values()]
    assert numbers == sorted(numbers)
    assert set(numbers) == {f"{n:02}" for n in range(1, 13)} | {"08b", "08c", "08d", "11b", "12b"}
    for claim in catalogue.values():
        assert claim.statement.isascii(), claim.id
        assert claim.correction.isascii(), claim.id


def test_catalogue_cannot_be_changed_by_its_users():
    claims.catalogue().clear()
    claim = claims.catalogue()[TRUE_ID]
    with pytest.raises(AttributeError):
        claim.verdict = "wrong"


def test_in_fact_is_the_correction_or_the_statement():
    catalogue = claims.catalogue()
    assert catalogue[TRUE_ID].in_fact == catalogue[TRUE_ID].statement
    assert catalogue[WRONG_ID].in_fact == catalogue[WRONG_ID].correction


def test_load_reads_a_valid_file(tmp_path):
    (tmp_path / "c.toml").write_text(VALID)
    (claim,) = claims.load(tmp_path / "c.toml").values()
    assert claim == claims.Claim(
        "a-b", "gradients", "01", ("1e", "folklore"), "A is B.", "wrong", "A is C.", "exact"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "exact"', 'kind = "exact"\nnote = "x"', r"'a-b'.*unknown fields \['note'\]"),
        ('kind = "exact"', "", r"'a-b'.*missing fields \['kind'\]"),
        ('kind = "exact"', 'kind = "vague"', "kind must be one of .*'vague'"),
        ('verdict = "wrong"', 'verdict = "false"', "verdict must be one of .*'false'"),
        ('topic = "gradients"', 'topic = "magic"', "topic must be one of .*'magic'"),
        ('correction = "A is C."', 'correction = " "', "verdict 'wrong' does not go with"),
        ('verdict = "wrong"', 'verdict = "true"', "verdict 'true' does not go with"),
        ('notebook = "01"', 'notebook = "1"', "notebook must be two digits.*'1'"),
        ('notebook = "01"', "notebook = 1", "notebook must be a string, found 1"),
        ('["1e", "folklore"]', "[]", "sources must be a non-empty list"),
        ('["1e", "folklore"]', '["4e"]', "sources must be .*'4e'"),
        ('id = "a-b"', 'id = "A b"', "id must be lower-case words"),
        ('statement = "A is B."', 'statement = ""', "statement must not be empty"),
        ("[[claim]]", "[[claims]]", r"expected \[\[claim\]\] tables only, found \['claims'\]"),
        ("[[claim]]", "[claim]", "expected .* tables only"),
        ("[[claim]]", "claim = [1]\n[x]", "tables only"),
        ('"A is B."', '"A is B.', "not a valid TOML file"),
    ],
)
def test_load_says_what_is_wrong(tmp_path, old, new, message):
    assert old in VALID
    path = tmp_path / "c.toml"
    path.write_text(VALID.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as caught:
        claims.load(path)
    assert str(path) in str(caught.value)


def test_load_refuses_an_id_used_twice(tmp_path):
    (tmp_path / "c.toml").write_text(VALID + VALID)
    with pytest.raises(ValueError, match=r"claim 2 \('a-b'\): this id is used twice"):
        claims.load(tmp_path / "c.toml")


# -------------------------------------------------------------------------------- bounds


@given(value=FINITE, limit=FINITE)
@example(value=1.0, limit=1.0)
@example(value=0.0, limit=0.0)
@FAST
def test_below_and_above_agree_with_python(value, limit):
    low, high = below(value, limit), above(value, limit)
    assert bool(low) is (value < limit)
    assert bool(high) is (value > limit)
    scale = abs(limit) or 1.0
    assert low.margin == pytest.approx((limit - value) / scale)
    assert high.margin == pytest.approx((value - limit) / scale)
    assert bool(low) == (low.margin > 0)


@given(value=FINITE, low=FINITE, width=st.floats(1e-3, 1e6))
@FAST
def test_between_agrees_with_python(value, low, width):
    high = low + width
    bound = between(value, low, high)
    assert bool(bound) is (low <= value <= high)
    middle, half = (low + high) / 2, (high - low) / 2
    assert bound.margin == pytest.approx(1 - abs(value - middle) / half, abs=1e-6, rel=1e-6)


def test_between_includes_its_ends():
    assert between(1.0, 1, 2)
    assert between(2.0, 1, 2)
    assert between(1.0, 1, 2).margin == 0
    assert between(1.5, 1, 2).margin == 1


@given(values=st.lists(FINITE, min_size=1, max_size=8), limit=FINITE)
@FAST
def test_arrays_are_judged_by_their_worst_element(values, limit):
    assert below(np.array(values), limit) == below(max(values), limit)
    assert above(values, limit) == above(min(values), limit)


def test_limits_are_compared_element_by_element():
    assert below([1, 5], [2, 6])
    assert not below([1, 5], [2, 4])
    assert below([1, 5], [2, 6]).margin == pytest.approx(1 / 6)
    assert between([[1.0], [2.0]], 0, [4.0, 8.0]).margin == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"shapes do not fit.*: value \(2,\), limit \(3,\)"):
        below([1, 2], [1, 2, 3])


@pytest.mark.parametrize("bound", [below, above])
@pytest.mark.parametrize("value", [math.nan, [0.0, math.nan]])
def test_nan_never_satisfies(bound, value):
    for limit in (1.0, -1.0, math.inf, -math.inf):
        assert bound(value, limit) == Bound(False, -math.inf)
    assert bound(0.0, math.nan) == Bound(False, -math.inf)
    assert between(value, -1, 1) == Bound(False, -math.inf)


def test_infinite_values():
    assert below(1.0, math.inf) == Bound(True, math.inf)
    assert below(math.inf, 1.0) == Bound(False, -math.inf)
    assert below(math.inf, math.inf) == Bound(False, -math.inf)
    assert above(math.inf, 1.0) == Bound(True, math.inf)
    assert between(math.inf, 0, 1) == Bound(False, -math.inf)


def test_and_keeps_the_smallest_margin():
    wide, narrow, broken = below(1, 10), below(1, 1.1), below(2, 1)
    assert (wide & narrow) == (narrow & wide) == narrow
    assert not (wide & broken)
    assert (wide & broken).margin == -1
    assert (wide & True) == (True & wide) == (np.True_ & wide) == (wide & np.True_) == wide
    assert (wide & False) == (np.False_ & wide) == Bound(False, -math.inf)
    with pytest.raises(TypeError):
        wide & 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: below("3", 4), TypeError, "value must be a real number.*got str"),
        (lambda: below(True, 4), TypeError, "value must be a real number.*bool"),
        (lambda: below([], 4), ValueError, "value must not be empty"),
        (lambda: above(1, 1j), TypeError, "limit must be a real number.*complex"),
        (lambda: between(1, 2, 2), ValueError, "low must be smaller than high"),
        (lambda: between(1, 0, math.inf), ValueError, "both finite"),
        (lambda: between(1, math.nan, 2), ValueError, "both finite"),
    ],
)
def test_bounds_refuse_what_they_cannot_compare(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("x", "digits", "text"),
    [
        (0.96813, 2, "~0.97"),
        (0.25, 2, "~0.25"),
        (0.5, 2, "~0.50"),
        (0.999, 2, "~1.0"),
        (9.99, 2, "~10"),
        (-12.34, 3, "~-12.3"),
        (1234.5, 2, "~1200"),
        (999_999, 2, "~1.0e+06"),
        (0.00123, 2, "~0.0012"),
        (0.000999, 2, "~0.0010"),
        (0.000123, 2, "~1.2e-04"),
        (3.2e-7, 2, "~3.2e-07"),
        (0, 2, "~0"),
        (-0.0, 2, "~0"),
        (7, 1, "~7"),
        (np.float32(0.1), 3, "~0.100"),
        (np.array(2.5), 2, "~2.5"),
        (math.nan, 2, "~nan"),
        (-math.inf, 2, "~-inf"),
    ],
)
def test_number(x, digits, text):
    assert number(x, digits) == text


@given(x=st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False))
@FAST
def test_number_is_correct_to_half_a_unit_in_the_last_digit(x):
    assert float(number(x, 3)[1:]) == pytest.approx(x, rel=0.5e-2, abs=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: number("1"), TypeError, "x must be a real number"),
        (lambda: number(True), TypeError, "x must be a real number"),
        (lambda: number([1.0]), TypeError, r"x must be a single number, got list of shape \(1,\)"),
        (lambda: number(1.0, 0), ValueError, "digits must be a positive integer, got 0"),
        (lambda: number(1.0, 1.5), ValueError, "digits must be a positive integer, got 1.5"),
    ],
)
def test_number_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_interval():
    assert interval(0.1234, 0.3456, digits=3) == "~0.123 to ~0.346"


# ------------------------------------------------------------------------------ checking


@pytest.mark.parametrize("holds", [True, np.True_, below(1, 2)])
def test_check_prints_one_line(capsys, holds):
    assert claims.check(TRUE_ID, holds, "grew by ~1.3") is None
    claims.check(WRONG_ID, holds)
    captured = capsys.readouterr()
    assert captured.out == f"true  {TRUE_ID}: grew by ~1.3\nwrong  {WRONG_ID}\n"
    assert captured.err == ""


@pytest.mark.parametrize("holds", [False, np.False_, below(2, 1)])
def test_check_raises_on_contradiction(capsys, holds):
    with pytest.raises(claims.ClaimError) as caught:
        claims.check(WRONG_ID, holds, "weights moved by ~0.1")
    claim, message = claims.catalogue()[WRONG_ID], str(caught.value)
    for part in (WRONG_ID, claim.statement, "wrong", claim.correction, "weights moved by ~0.1"):
        assert part in message
    assert ("margin -1" in message) == isinstance(holds, Bound)
    assert capsys.readouterr().out == ""


def test_a_failed_claim_that_was_true_shows_no_correction():
    with pytest.raises(claims.ClaimError) as caught:
        claims.check(TRUE_ID, False)
    assert "in fact" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (("step-size-stability-treshold", True), ValueError, f"did you mean '{TRUE_ID}'"),
        (("", True), ValueError, "id '' is not in the catalogue"),
        ((7, True), ValueError, "id 7 is not in the catalogue"),
        ((TRUE_ID, 1), TypeError, "holds must be True, False or a bound.*got int"),
        ((TRUE_ID, np.array([True])), TypeError, r"got ndarray; for an array use \.all\(\)"),
        ((TRUE_ID, None), TypeError, "got NoneType"),
        ((TRUE_ID, True, 0.5), TypeError, "evidence must be a string, got float"),
        ((TRUE_ID, True, "two\nlines"), ValueError, "one line of printable ASCII"),
        ((TRUE_ID, True, "\u03bb = 2"), ValueError, "one line of printable ASCII"),
    ],
)
def test_check_refuses_wrong_arguments_in_both_modes(monkeypatch, tmp_path, args, error, message):
    with pytest.raises(error, match=message):
        claims.check(*args)
    monkeypatch.setenv("CH11_CLAIMS_LOG", str(tmp_path / "log"))
    with pytest.raises(error, match=message):
        claims.check(*args)
    assert not (tmp_path / "log").exists()


def test_log_mode_records_and_does_not_raise(monkeypatch, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    monkeypatch.setenv("CH11_CLAIMS_LOG", str(log))
    claims.check(TRUE_ID, below(1, 2), "a ~1")
    monkeypatch.setenv("CH11_SEED", "3")
    claims.check(WRONG_ID, below(2, 1), "b ~2")
    claims.check(WRONG_ID, True)
    claims.check(WRONG_ID, below(math.nan, 1), "~nan")
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        {"id": TRUE_ID, "holds": True, "margin": 0.5, "evidence": "a ~1", "seed": 0},
        {"id": WRONG_ID, "holds": False, "margin": -1.0, "evidence": "b ~2", "seed": 3},
        {"id": WRONG_ID, "holds": True, "margin": None, "evidence": "", "seed": 3},
        {"id": WRONG_ID, "holds": False, "margin": None, "evidence": "~nan", "seed": 3},
    ]
    assert capsys.readouterr().out.splitlines() == [
        f"true  {TRUE_ID}: a ~1",
        f"FAILED  {WRONG_ID}: b ~2",
        f"wrong  {WRONG_ID}",
        f"FAILED  {WRONG_ID}: ~nan",
    ]


# ------------------------------------------------------------------------------- summary


@pytest.fixture
def shown(monkeypatch):
    """Collect what is displayed."""
    outputs = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, raw: outputs.append(data) if raw else None
    )
    return outputs


def test_summary_shows_every_claim_of_the_notebook_and_no_other(shown):
    claims.summary("05")
    (data,) = shown
    assert set(data) == {"text/html", "text/plain"}
    for claim in claims.catalogue().values():
        mine = claim.notebook == "05"
        assert (f"<code>{claim.id}</code>" in data["text/html"]) is mine
        assert (f"\n{claim.id}\n" in data["text/plain"]) is mine
        if mine:
            assert claim.statement in data["text/plain"]
            assert claim.in_fact in data["text/plain"]


def test_summary_is_well_formed_html(shown, monkeypatch):
    odd = claims.Claim("x", "clipping", "05", ("1e",), "a < b & c", "wrong", "<i>", "exact")
    monkeypatch.setattr(claims, "_packaged", lambda: {"x": odd})
    claims.summary("05")
    html = shown[0]["text/html"]
    assert "a &lt; b &amp; c" in html
    assert "&lt;i&gt;" in html
    from xml.etree import ElementTree

    cells = [cell.text for cell in ElementTree.fromstring(html.replace("<br>", "")).iter("td")]
    assert cells == ["a < b & c", "wrong", "<i>"]


@pytest.mark.parametrize("notebook", ["00", "1", "99", 5])
def test_summary_refuses_unknown_notebooks(notebook):
    with pytest.raises(ValueError, match="notebook must be one of 01, 02"):
        claims.summary(notebook)
