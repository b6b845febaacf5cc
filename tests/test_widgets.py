"""ch11lib.widgets: every control moved without a browser, and the same in nbclient and nbval.

`test_a_notebooks_widget` is the pattern for the widgets of the notebooks: build it, call
`exercise`, and ask that every control changed the picture, quickly and without an error.
"""

from base64 import b64decode
import html
import re
import subprocess
import sys

from ch11lib import notebooks, plotting, widgets
import ipywidgets
from nbclient import NotebookClient
from nbformat import v4, write
import numpy as np
import pytest

ALT = "Histograms of the activations of ten layers, narrower for small initial weights."


def compute(scale, depth, activation):
    rng = np.random.default_rng(0)
    f = {"tanh": np.tanh, "relu": lambda z: np.maximum(z, 0)}[activation]
    h, layers = rng.normal(size=(100, 50)), {}
    for layer in range(1, depth + 1):
        h = f(h @ rng.normal(0, scale / np.sqrt(50), (50, 50)))
        layers[layer] = h
    return layers


def draw(layers, ax):
    plotting.histograms(ax, layers, xlabel="activation")


CONTROLS = {
    "scale": (0.5, 2.0, 0.1, 1.0),
    "depth": (2, 8, 1),
    "activation": ["tanh", "relu"],
}
STATIC = [{"scale": 0.5}, {"scale": 1.0}, {"scale": 2.0, "activation": "relu"}]


def make(**changes):
    arguments = {
        "compute": compute,
        "draw": draw,
        "controls": CONTROLS,
        "static": STATIC,
        "alt": ALT,
        "title": "Which scale keeps the signal alive?",
    }
    return widgets.explore(**(arguments | changes))


def line(**changes):
    """Make a widget that is quick to draw."""
    arguments = {
        "compute": lambda slope: [0.0, slope],
        "draw": lambda data, ax: ax.plot(data),
        "controls": {"slope": (0, 4, 1)},
        "static": [{"slope": 1}],
        "title": "",
    }
    return make(**(arguments | changes))


# ------------------------------------------------------------------ moving the controls


def test_a_notebooks_widget(caplog):
    explorer = make()
    moves = explorer.exercise()
    assert list(moves["control"].unique()) == list(CONTROLS)
    assert moves.groupby("control")["changed"].any().all()
    assert not moves.loc[moves["position"] == "default", "changed"].any()  # repeatable
    assert explorer.errors == []
    assert caplog.records == []
    # Below 0.2 s on an idle machine; this bound also holds when others use it.
    assert moves["draw_seconds"].median() < 1.0
    rng = np.random.default_rng(0)
    for _ in range(3):
        explorer.set(
            scale=float(rng.choice([0.6, 1.3, 1.9])),
            depth=int(rng.integers(2, 9)),
            activation=str(rng.choice(["tanh", "relu"])),
        )


def test_exercise_returns_to_where_it_was_and_reports_positions():
    explorer = make()
    explorer.set(scale=1.5)
    picture = explorer.png
    moves = explorer.exercise()
    assert explorer.params == {"scale": 1.5, "depth": 5, "activation": "tanh"}
    assert explorer.png == picture
    positions = moves.groupby("control")["position"].agg(list).to_dict()
    assert positions["scale"] == positions["depth"] == ["default", "min", "max"]
    assert positions["activation"] == ["default", "first", "last"]
    values = moves.set_index(["control", "position"])["value"]
    assert values["scale", "min"] == 0.5
    assert values["depth", "max"] == 8
    assert values["activation", "last"] == "relu"


def test_a_control_without_effect_and_an_impure_function_show():
    def careless(slope, idle):
        careless.calls += 1
        return [0.0, slope + careless.calls]

    careless.calls = 0
    controls = {"slope": (0, 4, 1), "idle": True}
    explorer = line(compute=lambda slope, idle: [0.0, slope], controls=controls)
    changed = explorer.exercise().groupby("control")["changed"].any()
    assert changed.to_dict() == {"slope": True, "idle": False}
    moves = line(compute=careless, controls=controls).exercise()
    assert moves.loc[moves["position"] == "default", "changed"].any()


def test_settings_seen_before_are_not_computed_again():
    calls = []

    def counted(slope):
        calls.append(slope)
        return [0.0, slope]

    explorer = line(compute=counted)
    assert calls == [2, 1]  # the default, then the static setting
    explorer.set(slope=3)
    explorer.set(slope=2)
    explorer.set(slope=3)
    assert calls == [2, 1, 3]


def test_several_moves_make_one_picture():
    calls = []

    def counted(scale, depth, activation):
        calls.append((scale, depth, activation))
        return compute(scale, depth, activation)

    explorer = make(compute=counted)
    calls.clear()
    explorer.set(scale=2.0, depth=3, activation="relu")
    assert calls == [(2.0, 3, "relu")]


def test_a_move_by_the_reader_redraws():
    explorer = line()
    before = explorer.png
    explorer.controls["slope"].value = 4
    assert explorer.png != before
    assert explorer.params == {"slope": 4}


# ------------------------------------------------------------------ errors


def fragile(slope):
    if slope == 4:
        raise ZeroDivisionError("too <steep>")
    return [0.0, slope]


def test_an_error_at_construction_is_raised():
    for changes in (
        {"controls": {"slope": (0, 4, 1, 4)}},  # in the live picture
        {"static": [{"slope": 4}]},  # in the static figure
    ):
        with pytest.raises(ZeroDivisionError, match="too <steep>"):
            line(compute=fragile, **changes)
    with pytest.raises(TypeError):
        line(draw=lambda data: None)


def test_an_error_while_moving_is_shown_kept_and_raised_by_set():
    explorer = line(compute=fragile)
    explorer.controls["slope"].value = 4  # as a browser would: nothing may be raised
    [error] = explorer.errors
    assert isinstance(error, ZeroDivisionError)
    text = explorer.view.children[-1].value
    assert 'role="alert"' in text
    assert "slope = 4" in text
    assert "ZeroDivisionError: too &lt;steep&gt;" in text
    assert "<img" not in text
    explorer.controls["slope"].value = 3
    assert "<img" in explorer.view.children[-1].value
    with pytest.raises(ZeroDivisionError):
        explorer.set(slope=4)
    with pytest.raises(ZeroDivisionError):
        explorer.exercise()
    assert len(explorer.errors) == 3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"slop": 1}, r"no control \['slop'\]; there are \['slope'\]"),
        ({"slope": 9}, "control 'slope' made 4 of 9"),
        ({"slope": "steep"}, "control 'slope' cannot take 'steep'"),
    ],
)
def test_set_refuses_what_controls_cannot_do(params, message):
    explorer = line()
    with pytest.raises(ValueError, match=message):
        explorer.set(**params)
    assert explorer.params == {"slope": 2}


# ------------------------------------------------------------------ controls


def test_descriptions_become_controls_with_labels():
    own = ipywidgets.FloatLogSlider(0.1, min=-3, max=0, description="rate")
    explorer = line(
        compute=lambda **params: [0.0, params["hidden_units"]],
        controls={
            "hidden_units": (10, 100, 10),
            "noise": (0.0, 0.5, 0.05),
            "fine": (0.0, 0.01, 0.001, 0.002),
            "kind": ["one", "two"],
            "biased": True,
            "rate": own,
        },
        static=[{"hidden_units": 10}],
    )
    controls = explorer.controls
    assert {name: type(control).__name__ for name, control in controls.items()} == {
        "hidden_units": "IntSlider",
        "noise": "FloatSlider",
        "fine": "FloatSlider",
        "kind": "Dropdown",
        "biased": "Checkbox",
        "rate": "FloatLogSlider",
    }
    assert explorer.params == {
        "hidden_units": 50,
        "noise": 0.25,
        "fine": 0.002,
        "kind": "one",
        "biased": True,
        "rate": 0.1,
    }
    assert (controls["noise"].readout_format, controls["fine"].readout_format) == (".2f", ".3f")
    assert controls["rate"] is own
    for control in controls.values():
        assert control.description  # a name for screen readers
        assert control.tabbable is not False
        assert not getattr(control, "continuous_update", False)
    assert controls["hidden_units"].description == "hidden units"
    corners = explorer.exercise().set_index(["control", "position"])["value"]
    assert corners["rate", "min"] == pytest.approx(1e-3)
    assert corners["biased", "first"] is False
    explorer.set(noise=0.1 + 0.2, biased=False)  # 0.30000000000000004


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controls": {}}, "controls must have at least one"),
        ({"controls": {"slope": (0, 4)}}, r"controls\['slope'\] must be \(min, max, step\)"),
        ({"controls": {"slope": (4, 0, 1)}}, "min < max"),
        ({"controls": {"slope": (0, 4, 0)}}, "step > 0"),
        ({"controls": {"slope": (0, "4", 1)}}, "must be"),
        ({"controls": {"slope": (0, 4, 1, 5)}}, "default outside its range"),
        ({"controls": {"slope": []}}, "a list of choices"),
        ({"controls": {"slope": 3}}, "a list of choices"),
        ({"static": []}, "static must list at least one setting"),
        ({"static": [{"depth": 3}]}, "static must hold settings of"),
        ({"static": [{}]}, "static must hold settings of"),
        ({"alt": "A line."}, "alt must say in a sentence"),
    ],
)
def test_arguments_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        line(**changes)


# ------------------------------------------------------------------ what is shown


def test_the_picture_has_a_text_alternative_and_a_sentence():
    explorer = line(describe=lambda data: f'It rises by "{data[1]}".')
    explorer.set(slope=3)
    value = explorer.view.children[-1].value
    [alt] = re.findall(r'<img [^>]*alt="([^"]*)"', value)
    assert html.unescape(alt) == f'{ALT} Here: slope = 3. It rises by "3".'
    assert '<p role="status">It rises by &quot;3&quot;.</p>' in value
    [data] = re.findall(r"data:image/png;base64,([^\"]+)", value)
    assert b64decode(data) == explorer.png


def test_the_heading_is_text_and_not_markup():
    explorer = line(title="Is a < b?")
    assert explorer.view.children[0].value == "<strong>Is a &lt; b?</strong>"
    assert len(line().view.children) == 2  # control and picture


@pytest.mark.parametrize(("panels", "axes", "size"), [(1, 3, (990, 270)), (2, 6, (880, 930))])
def test_the_static_figure_shows_every_setting(panels, axes, size):
    def draw_all(data, ax):
        for one in np.ravel(ax):
            one.plot(data)
            one.set(xlabel="x", ylabel="y")

    static = [{"slope": 0}, {"slope": 2}, {"slope": 4}]
    explorer = line(draw=draw_all, static=static, panels=panels)
    figure = explorer._static
    assert repr(figure) == f"<Figure size {size[0]}x{size[1]} with {axes} Axes>"
    titled = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert [ax.get_title(loc="left") for ax in titled] == [f"slope = {s}" for s in (0, 2, 4)]
    assert [ax.lines[0].get_ydata()[1] for ax in titled] == [0, 2, 4]


# ------------------------------------------------------------------ in notebooks

CELLS = [
    """
from ch11lib import plotting, widgets

def compute(slope):
    return [0, 1 / (5 - slope)]

def draw(data, ax):
    ax.plot(data)
    ax.set(xlabel="x", ylabel="y")

explorer = widgets.explore(
    compute, draw, {"slope": (0, 5, 1)}, static=[{"slope": 0}, {"slope": 4}],
    alt="A straight line through the origin, steeper for larger slopes.",
)
explorer
""",
    "explorer.controls['slope'].value = 5\nprint(type(explorer.errors[0]).__name__)",
    "explorer.set(slope=3)\nprint(explorer.params)",
]


def notebook(cells):
    made = v4.new_notebook(cells=[v4.new_code_cell(cell.strip()) for cell in cells])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    return made


def test_a_widget_in_a_notebook_passes_strict_nbval(tmp_path, monkeypatch):
    made = notebook([*CELLS, CELLS[0].replace('"slope": 4', '"slope": 5')])
    made.cells[3].metadata.tags = ["raises-exception", "nbval-check-output"]
    with monkeypatch.context() as patch:
        patch.setenv("PYTEST_CURRENT_TEST", "refresh")  # as notebooks.refresh does
        NotebookClient(made, timeout=120, kernel_name="python3").execute()

    figure, view = made.cells[0].outputs
    assert figure.data["text/plain"] == "<Figure size 880x310 with 2 Axes>"
    assert figure.metadata["image/png"]["alt"].startswith("A straight line through")
    assert view.data["text/plain"] == "Interactive figure. Run the notebook to move: slope."
    assert "application/vnd.jupyter.widget-view+json" in view.data
    texts = [cell.outputs[0].text for cell in made.cells[1:3]]
    assert texts == ["ZeroDivisionError\n", "{'slope': 3}\n"]
    assert made.cells[3].outputs[-1].ename == "ZeroDivisionError"

    notebooks.clean(made)
    path = tmp_path / "widget.ipynb"
    write(made, path)
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q", str(path)]
    seen = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "4 passed" in seen.stdout, seen.stdout + seen.stderr
