"""ch11lib.plotting: looks, style, file sizes, text alternatives, and what the functions draw."""

import io
import itertools
import os
import subprocess
import sys

from ch11lib import plotting
import matplotlib
from matplotlib.figure import Figure
import numpy as np
from PIL import Image
import pytest

ALT = "Two lines that cross: what is drawn here rises with the layer for one method only."


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# ------------------------------------------------------------------ looks


def test_methods_of_a_family_differ_and_neighbours_differ_in_everything():
    for family in plotting._FAMILIES:
        looks = [plotting.look(name) for name in family]
        assert len({tuple(look.values()) for look in looks}) == len(family)
        for one, other in itertools.pairwise(looks):
            assert all(one[key] != other[key] for key in one)
        if len(family) <= len(plotting._COLORS):
            assert len({look["color"] for look in looks}) == len(family)
        for one, other in itertools.combinations(looks, 2):  # never by colour alone
            assert (one["marker"], one["linestyle"]) != (other["marker"], other["linestyle"])


def test_every_method_has_one_place_and_aliases_lead_to_a_method():
    names = [name for family in plotting._FAMILIES for name in family]
    assert len(names) == len(set(names))
    assert set(plotting._ALIASES.values()) <= set(names)
    assert not set(plotting._ALIASES) & set(names)


def test_spelling_does_not_matter():
    for name, other in [("relu", "ReLU"), ("leaky_relu", "Leaky ReLU"), ("silu", "Swish")]:
        assert plotting.look(name) == plotting.look(other)
    assert plotting.look("N(0,1)") == plotting.look("unit_normal")
    assert plotting.color("Batch normalization") == plotting.color("batch_norm")


def test_pairs_tell_their_first_by_colour_and_marker_and_their_second_by_dash():
    arms = ["sigmoid + Glorot", "tanh + Glorot", "ReLU + He", "tanh + N(0,1)", "sigmoid + N(0,1)"]
    looks = {arm: plotting.look(arm) for arm in arms}
    assert len({tuple(look.values()) for look in looks.values()}) == len(arms)
    for arm, look in looks.items():
        first, second = arm.split(" + ")
        assert look["color"] == plotting.color(first)
        assert look["marker"] == plotting.look(first)["marker"]
        assert look["linestyle"] == plotting.look(second)["linestyle"]


def test_unknown_names_get_the_same_look_in_every_process():
    names = ["mine", "yours", "leaky 0.01", "ReLU + something else"]
    code = f"from ch11lib.plotting import look; print([look(n) for n in {names!r}])"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    seen = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert seen.stdout.strip() == str([plotting.look(name) for name in names])
    for bad in ("", " ", None, 3):
        with pytest.raises(TypeError, match="name must be the name of a method"):
            plotting.look(bad)


# Machado, Oliveira, Fernandes (2009), doi:10.1109/TVCG.2009.113, severity 1, on linear RGB.
VISION = {
    "normal": "1 0 0  0 1 0  0 0 1",
    "protan": ".152286 1.052583 -.204868  .114503 .786281 .099216  -.003882 -.048116 1.051998",
    "deutan": ".367322 .860646 -.227968  .280085 .672501 .047413  -.011820 .042940 .968881",
    "tritan": "1.255528 -.076749 -.178779  -.078411 .930809 .147602  .004733 .691367 .303900",
}
VISION = {name: np.array(text.split(), float).reshape(3, 3) for name, text in VISION.items()}


def linear(hexadecimal):
    c = np.array([int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def cielab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    t = xyz @ rgb / [0.9505, 1.0, 1.089]
    f = np.where(t > 0.008856, np.cbrt(np.clip(t, 0, None)), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_told_apart(vision):
    seen = [cielab(np.clip(VISION[vision] @ linear(color), 0, 1)) for color in plotting._COLORS]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 12  # a just noticeable difference is about 2


def test_colours_stand_out_from_white():
    for color in plotting._COLORS:  # WCAG 2.1, criterion 1.4.11: at least 3 to 1
        assert 1.05 / (linear(color) @ [0.2126, 0.7152, 0.0722] + 0.05) >= 3


# ------------------------------------------------------------------ style and figures


def draw_everything():
    rng = np.random.default_rng(0)
    figures = {}
    data = {name: 10 ** rng.normal(0, 0.1, (5, 20)).cumsum(1) for name in ("relu", "tanh", "selu")}
    figures["by_layer"], ax = plotting.subplots()
    plotting.by_layer(ax, data, ylabel="size", log=True, theory={"tanh": np.ones(20)})
    figures["curves"], axes = plotting.subplots(1, 2, title="Two findings")
    plotting.curves(axes[0], {name: runs[:, :8] for name, runs in data.items()}, ylabel="loss")
    many = {name: rng.random((5, 60)).cumsum(1) for name in plotting._FAMILIES[0][:10]}
    plotting.curves(axes[1], many, ylabel="loss")
    figures["histograms"], ax = plotting.subplots()
    plotting.histograms(ax, {i: rng.normal(0, i, 1000) for i in range(1, 6)}, xlabel="activation")
    figures["interval_plot"], ax = plotting.subplots()
    plotting.interval_plot(ax, {"relu": (0.1, 0.2, 0.4), "elu": (0, 0, 0)}, xlabel="x", reference=0)
    figures["heatmap"], ax = plotting.subplots()
    plotting.heatmap(ax, rng.normal(size=(4, 3)), rows="abcd", columns="xyz", label="log", center=0)
    return figures


def test_nothing_global_changes_and_other_settings_do_not_matter():
    before = dict(matplotlib.rcParams)
    reference = {name: plotting.png(figure) for name, figure in draw_everything().items()}
    assert dict(matplotlib.rcParams) == before
    hostile = {
        "font.size": 20,
        "axes.facecolor": "black",
        "savefig.dpi": 30,
        "savefig.bbox": "tight",
        "lines.linewidth": 7,
        "figure.constrained_layout.use": False,
        "font.family": "serif",
    }
    with matplotlib.rc_context(hostile):
        for name, figure in draw_everything().items():
            assert plotting.png(figure) == reference[name], name
        assert {key: matplotlib.rcParams[key] for key in hostile} == hostile | {
            "font.family": ["serif"]
        }


def test_figures_are_small_white_and_of_the_stated_size():
    for name, figure in draw_everything().items():
        data = plotting.png(figure)
        picture = pixels(data)
        assert len(data) < 60_000, (name, len(data))
        assert picture.shape[:2] == (
            int(figure.get_figheight() * 144),
            int(figure.get_figwidth() * 144),
        )
        assert len(plotting.png(figure, compact=False)) > len(data)
        for corner in (picture[0, 0], picture[0, -1], picture[-1, 0], picture[-1, -1]):
            assert corner.tolist() == [255, 255, 255]
        fonts = {
            text.get_fontname() for text in figure.findobj(matplotlib.text.Text) if text.get_text()
        }
        assert fonts == {"DejaVu Sans"}


def test_compacting_hardly_changes_a_pixel():
    for name, figure in draw_everything().items():
        compact = pixels(plotting.png(figure)).astype(int)
        exact = pixels(plotting.png(figure, compact=False)).astype(int)
        seen = np.abs(compact - exact).max(axis=-1) > 32  # an eighth of the way to white
        assert seen.mean() < 0.01, name


def test_importing_and_drawing_does_without_pyplot_and_tensorflow():
    code = (
        "import sys, numpy as np, ch11lib.plotting as p; f, ax = p.subplots();"
        "p.by_layer(ax, {'relu': np.ones(3)}, ylabel='y'); p.png(f); p.show(f, 'a b c d e');"
        "print([m for m in ('matplotlib.pyplot', 'tensorflow', 'IPython') if m in sys.modules])"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (seen.stdout.strip(), seen.stderr) == ("[]", "")


def test_subplots_shapes_sizes_and_titles():
    figure, ax = plotting.subplots()
    assert isinstance(ax, matplotlib.axes.Axes)
    assert repr(figure) == "<Figure size 620x340 with 1 Axes>"
    figure, axes = plotting.subplots(2, 3, panel=(2, 1), sharey=True, title="A finding")
    assert axes.shape == (2, 3)
    assert figure.get_size_inches().tolist() == [6, 2]
    assert figure._suptitle.get_text() == "A finding"
    assert plotting.subplots(1, 5)[1].shape == (5,)


def test_long_titles_are_broken_into_lines_that_fit():
    figure, axes = plotting.subplots(1, 2)
    plotting.title(axes[0], "With Glorot weights the sigmoid loses three quarters of it per layer")
    figure.draw_without_rendering()
    text = axes[0].title if axes[0].title.get_text() else axes[0]._left_title
    assert text.get_text().count("\n") == 1
    box = text.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= axes[1].get_window_extent().x0


# ------------------------------------------------------------------ show


class FakeShell:
    """What IPython's display publishes goes here."""

    def __init__(self, monkeypatch):
        self.published = []
        display = pytest.importorskip("IPython.display")
        monkeypatch.setattr(plotting, "_shell", lambda: self)
        monkeypatch.setattr(
            display, "display", lambda *args, **kw: self.published.append((args, kw))
        )


def test_show_publishes_picture_line_and_description(monkeypatch):
    shell = FakeShell(monkeypatch)
    figure, _ = plotting.subplots()
    assert plotting.show(figure, alt=ALT) is None
    [((data,), options)] = shell.published
    assert data["text/plain"] == "<Figure size 620x340 with 1 Axes>"
    assert data["image/png"] == plotting.png(figure)
    assert options == {"raw": True, "metadata": {"image/png": {"alt": ALT, "width": 595}}}


def test_show_closes_figures_of_pyplot(monkeypatch):
    import matplotlib.pyplot as plt

    FakeShell(monkeypatch)
    figure, ax = plt.subplots()
    ax.plot([0, 1], [0, 1])
    assert plt.get_fignums()
    plotting.show(figure, alt=ALT)
    assert not plt.get_fignums()


@pytest.mark.parametrize("alt", ["", "figure", "A plot of z.", None, "figure_1.png", 5])
def test_show_insists_on_a_description(alt):
    with pytest.raises(ValueError, match="alt must say in a sentence what the figure shows"):
        plotting.show(plotting.subplots()[0], alt=alt)


# ------------------------------------------------------------------ what is drawn


@pytest.mark.parametrize("draw", [plotting.by_layer, plotting.curves])
def test_lines_are_medians_and_bands_are_ranges(draw):
    runs = np.array([[1.0, 5.0, 2.0], [3.0, 4.0, 9.0], [2.0, 0.0, 4.0]])
    _, ax = plotting.subplots()
    assert draw(ax, {"relu": runs, "tanh": runs[0]}, ylabel="y", log=True) is ax
    median, single = ax.lines
    assert median.get_xdata().tolist() == [1, 2, 3]
    assert median.get_ydata().tolist() == [2, 4, 4]
    assert single.get_ydata().tolist() == [1, 5, 2]
    [band] = ax.collections
    corners = band.get_paths()[0].vertices
    for x, low, high in zip([1, 2, 3], runs.min(0), runs.max(0), strict=True):
        at = corners[corners[:, 0] == x][:, 1]
        assert (at.min(), at.max()) == (low, high)
    assert (median.get_color(), median.get_marker()) == (plotting.color("relu"), "o")
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == "y"
    assert ax.get_xlabel() in ("layer", "epoch")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["relu", "tanh"]


def test_theory_is_drawn_for_the_methods_it_is_for():
    _, ax = plotting.subplots()
    data = {"relu": np.ones(4), "tanh": np.zeros(4)}
    plotting.by_layer(ax, data, ylabel="y", theory={"relu": np.full(4, 1.5)}, x=[2, 4, 6, 8])
    assert ax.lines[-1].get_ydata().tolist() == [1.5] * 4
    assert ax.lines[-1].get_xdata().tolist() == [2, 4, 6, 8]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["relu", "tanh", "theory"]
    with pytest.raises(ValueError, match=r"theory must be for names in data.*elu"):
        plotting.by_layer(ax, data, ylabel="y", theory={"elu": np.ones(4)})


def test_curves_must_fit_together():
    _, ax = plotting.subplots()
    with pytest.raises(ValueError, match=r"one length, got \[2, 3\]"):
        plotting.curves(ax, {"relu": np.ones(2), "tanh": np.ones(3)}, ylabel="y")
    with pytest.raises(ValueError, match=r"data\['relu'\] must have shape"):
        plotting.curves(ax, {"relu": np.ones((2, 3, 4))}, ylabel="y")


def test_histograms_stand_in_rows_and_keep_their_counts():
    rng = np.random.default_rng(0)
    values = {1: rng.normal(size=500), "two": np.histogram(rng.normal(size=300), bins=20)}
    _, ax = plotting.subplots()
    plotting.histograms(ax, values, xlabel="z", name="tanh")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "two"]
    filled = [patch for patch in ax.patches if patch.get_fill()]
    counts = [np.histogram(values[1], bins=50)[0], values["two"][0]]
    for row, (patch, expected) in enumerate(zip(filled, counts, strict=True)):
        heights, edges, baseline = patch.get_data()
        assert baseline == row
        np.testing.assert_allclose(heights - row, 0.9 * expected / expected.max())
        assert len(edges) == len(heights) + 1
    broken = {1: np.array([np.nan, np.inf, 1.0])}
    plotting.histograms(ax, broken, xlabel="z")
    with pytest.raises(ValueError, match="at least one histogram"):
        plotting.histograms(ax, {}, xlabel="z")


def test_intervals_are_rows_from_the_top():
    _, ax = plotting.subplots()
    plotting.interval_plot(ax, {"relu": (1, 2, 4), "elu": (0, 1, 3)}, xlabel="x", reference=2.5)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["elu", "relu"]
    reference, *rest = ax.lines
    assert reference.get_xdata() == [2.5, 2.5]
    assert [line.get_xdata().tolist() for line in rest] == [[0, 3], [1], [1, 4], [2]]
    assert rest[3].get_color() == plotting.color("relu")
    with pytest.raises(ValueError, match=r"data\['relu'\] must be \(low, middle, high\) in order"):
        plotting.interval_plot(ax, {"relu": (2, 1, 3)}, xlabel="x")


@pytest.mark.parametrize("center", [None, 0.0])
def test_heatmap_writes_readable_numbers(center):
    values = np.array([[-3.0, 0.0, 3.0], [1.0, np.nan, -2.0]])
    figure, ax = plotting.subplots()
    plotting.heatmap(
        ax, values, rows=["a", "b"], columns="xyz", label="log", fmt="{:+.1f}", center=center
    )
    texts = {text.get_text(): text for text in ax.texts}
    assert set(texts) == {"-3.0", "+0.0", "+3.0", "+1.0", "-2.0"}
    image = ax.images[0]
    for text in texts.values():
        cell = linear(matplotlib.colors.to_hex(image.cmap(image.norm(float(text.get_text())))))
        light = cell @ [0.2126, 0.7152, 0.0722] + 0.05
        contrast = 1.05 / light if text.get_color() == "white" else light / 0.05
        assert contrast > 4, text.get_text()  # numbers can be read on their cells
    if center is not None:
        assert image.norm(0.0) == 0.5
        assert image.norm(3.0) - 0.5 == 0.5 - image.norm(-3.0)
    assert len(figure.axes) == 2  # the colour bar
    with pytest.raises(ValueError, match=r"values must have shape \(rows, columns\) = \(1, 3\)"):
        plotting.heatmap(ax, values, rows=["a"], columns="xyz", label="log")
    with pytest.raises(ValueError, match="at least one finite"):
        plotting.heatmap(ax, values * np.nan, rows="ab", columns="xyz", label="log")


def test_all_axes_are_named():
    for name, figure in draw_everything().items():
        assert isinstance(figure, Figure)
        for ax in figure.axes:
            bar = hasattr(ax, "_colorbar")
            assert bar or name == "heatmap" or ax.get_xlabel(), name
            assert bar or name in ("heatmap", "interval_plot") or ax.get_ylabel(), name
