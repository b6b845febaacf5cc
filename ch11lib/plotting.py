"""The figures of the series: one style, one look for each method, a text alternative for each.

Functions take data and Axes, draw, and return the Axes. The style is applied where something is
drawn and nowhere else: importing the module changes no setting, and figures do not go through
pyplot, so none stays open. `show` puts a figure into the notebook together with a description for
those who cannot see it.

Colours are told apart with each of the common colour-vision deficiencies, and every method has a
marker and a dash of its own beside its colour, the same in every notebook: `look`.

References
----------
Okabe, Ito (2008), Color Universal Design, https://jfly.uni-koeln.de/color/, where the first three
colours are from.
"""

from collections.abc import Mapping, Sequence
import contextlib
import io
import re
import sys
import textwrap
from typing import Any, Literal
import zlib

from cycler import cycler
import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
import matplotlib.style
from matplotlib.ticker import MaxNLocator
import numpy as np
from PIL import Image

__all__ = [
    "by_layer",
    "check_alt",
    "color",
    "curves",
    "heatmap",
    "histograms",
    "interval_plot",
    "look",
    "png",
    "show",
    "style",
    "subplots",
    "title",
]

# ------------------------------------------------------------------ style

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#AA3377", "#7A4F10", "#6C8CE8", "#222222")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p")
_DASHES = ("-", "--", "-.", ":")

# Small enough that a figure takes some 30 kB, fine enough for a high-resolution screen.
_DPI = 144
_CSS_DPI = 96

_STYLE = {
    "axes.edgecolor": "#555555",
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=_COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "figure.facecolor": "white",  # opaque: readable on a dark page too
    "font.family": "DejaVu Sans",  # comes with Matplotlib, so that it is the same everywhere
    "font.size": 10,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "mathtext.fontset": "dejavusans",
    "savefig.facecolor": "white",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


@contextlib.contextmanager
def style():
    """Apply the style of the series to whatever is drawn inside the ``with`` block.

    The drawing functions of this module do so themselves; use it around calls of Matplotlib's own,
    such as ``ax.legend()``, whose defaults are read at the time of the call.
    """
    with matplotlib.style.context(["default", _STYLE]):
        yield


# Neighbours differ in colour, marker and dash. Families share looks: they do not meet in a figure,
# except joined by a plus sign, see `look`. New names go to the end of a family.
_FAMILIES = (
    # activations
    (
        *("relu", "sigmoid", "tanh", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "prelu"),
        *("rrelu", "softplus", "linear", "hard_sigmoid", "hard_silu", "hard_tanh", "relu6"),
        *("softsign", "celu", "exponential"),
    ),
    # initializers
    (
        *("he_normal", "unit_normal", "glorot_normal", "lecun_normal", "he_uniform"),
        *("glorot_uniform", "lecun_uniform", "zeros", "orthogonal", "uniform_fan_in"),
    ),
    # architecture and normalization
    ("plain", "batch_norm", "residual", "layer_norm", "skip", "dropout", "alpha_dropout"),
    # optimizers
    (
        *("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamax", "nadam", "adamw"),
        *("ftrl", "lion", "adadelta", "muon", "newton", "lbfgs"),
    ),
    # schedules
    (
        *("constant", "power", "exponential_decay", "piecewise", "performance", "one_cycle"),
        *("cosine", "warmup", "restarts", "warmup_stable_decay"),
    ),
    # regularization
    (
        *("none", "l1", "l2", "early_stopping", "max_norm", "mc_dropout", "ensemble"),
        *("weight_decay", "augmentation", "input_dropout"),
    ),
    # clipping
    ("unclipped", "clip_by_value", "clip_by_norm", "clip_by_global_norm"),
    # transfer and pretraining
    ("scratch", "frozen", "fine_tuned", "per_layer", "autoencoder", "auxiliary", "self_supervised"),
    # sparsity
    ("dense", "magnitude", "random", "gradual", "one_shot", "rewind"),
    # what is measured
    ("train", "validation", "test"),
)
_PLACES = {name: place for family in _FAMILIES for place, name in enumerate(family)}
_ALIASES = {
    "swish": "silu",
    "logistic": "sigmoid",
    "leaky": "leaky_relu",
    "he": "he_normal",
    "glorot": "glorot_normal",
    "xavier": "glorot_normal",
    "lecun": "lecun_normal",
    "n_0_1": "unit_normal",
    "bn": "batch_norm",
    "batch_normalization": "batch_norm",
    "layer_normalization": "layer_norm",
    "nag": "nesterov",
    "1cycle": "one_cycle",
    "valid": "validation",
}


def _place(name: str) -> int:
    key = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    key = _ALIASES.get(key, key)
    # A checksum, because Python's own hash differs from run to run.
    return _PLACES[key] if key in _PLACES else zlib.crc32(key.encode())


def look(name: str) -> dict[str, str]:
    """Return colour, marker and dash of a method, the same in every notebook.

    Parameters
    ----------
    name : str
        A method such as ``"relu"``, ``"Batch norm"``, ``"N(0,1)"``; capitals and punctuation do
        not matter. Two joined by a plus sign, ``"tanh + Glorot"``, take colour and marker of the
        first and the dash of the second. A name that the series does not know always gets the same
        look, though perhaps one that another name has too.

    Returns
    -------
    dict
        ``color``, ``marker`` and ``linestyle``, for ``ax.plot(..., **look(name))``.

    Examples
    --------
    >>> look("relu")
    {'color': '#0072B2', 'marker': 'o', 'linestyle': '-'}
    >>> look("ReLU + BN")
    {'color': '#0072B2', 'marker': 'o', 'linestyle': '--'}
    """
    if not isinstance(name, str) or not name.strip():
        raise TypeError(f"name must be the name of a method, got {name!r}")
    first, _, second = name.partition("+")
    place = _place(first)
    return {
        "color": _COLORS[place % len(_COLORS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _DASHES[_place(second or first) % len(_DASHES)],
    }


def color(name: str) -> str:
    """Return the colour of a method, see `look`.

    Examples
    --------
    >>> color("tanh"), color("tanh + Glorot")
    ('#009E73', '#009E73')
    """
    return look(name)["color"]


# ------------------------------------------------------------------ figures

# Width and height of one panel in inches, by the number of columns.
_PANELS = {1: (6.2, 3.4), 2: (4.4, 3.1), 3: (3.3, 2.7)}


def subplots(
    nrows: int = 1,
    ncols: int = 1,
    *,
    panel: tuple[float, float] | None = None,
    title: str | None = None,
    sharex: bool | Literal["row", "col"] = False,
    sharey: bool | Literal["row", "col"] = False,
) -> tuple[Figure, "Axes | np.ndarray"]:
    """Create a figure in the style of the series, apart from pyplot.

    Parameters
    ----------
    nrows, ncols : int
        Number of panels.
    panel : (width, height), optional
        Size of one panel in inches. Default: as large as a page allows, given the columns.
    title : str, optional
        Title of the whole figure: the finding, in a few words.
    sharex, sharey : bool or str
        As in Matplotlib.

    Returns
    -------
    figure, axes
        A single Axes, or an array of them, ``(nrows, ncols)`` with axes of length 1 left out.

    Examples
    --------
    >>> figure, axes = subplots(1, 2)
    >>> figure
    <Figure size 880x310 with 2 Axes>
    """
    width, height = panel or _PANELS.get(ncols, (2.6, 2.3))
    with style():
        figure = Figure(figsize=(width * ncols, height * nrows), dpi=100, layout="constrained")
        axes = figure.subplots(nrows, ncols, sharex=sharex, sharey=sharey)
        for ax in np.ravel(axes):
            ax.set_axisbelow(True)
            # Ticks are made later, outside the style: tell the axes now.
            ax.tick_params(labelsize=_STYLE["xtick.labelsize"], color="#555555")
        if title:
            figure.suptitle(title, fontsize=11.5, x=0.01, ha="left")
    return figure, axes


def title(ax: Axes, text: str) -> None:
    """Write a title over one panel, at the left, in as many lines as it takes.

    Parameters
    ----------
    ax : Axes
        The panel.
    text : str
        The finding: what a reader should see.
    """
    inches = ax.get_position().width * ax.figure.figure.get_figwidth()
    with style():
        ax.set_title(textwrap.fill(text, width=max(int(14 * inches), 20)))


def png(figure: Figure, *, dpi: float = _DPI, compact: bool = True) -> bytes:
    """Render a figure.

    The bytes depend on nothing but the figure and the versions of Matplotlib and Pillow.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        What to render.
    dpi : float
        Pixels per inch.
    compact : bool
        Whether to spend time on a small file: 64 colours at most, a quarter of the size.

    Returns
    -------
    bytes
    """
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    if not compact:
        return buffer.getvalue()
    image = Image.open(buffer).convert("RGB")
    image = image.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _shell():
    """Return the running IPython, or None."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


def check_alt(alt: str) -> None:
    """Raise ValueError unless a text could replace a picture: a sentence, not a label."""
    if not isinstance(alt, str) or len(alt.split()) < 5:
        raise ValueError(
            "alt must say in a sentence what the figure shows, to those who cannot see it; "
            f"got {alt!r}"
        )


def show(figure: Figure, alt: str) -> None:
    """Display a figure with its text alternative, and close it.

    The output holds the picture, the line ``<Figure size ... with ... Axes>`` that notebook tests
    compare, and the description. The size on the page is that of the figure in inches, whatever the
    resolution. Outside IPython nothing is displayed.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        What to show.
    alt : str
        What a reader should take from it, in at least one sentence: what is drawn against what,
        and what comes out.

    Raises
    ------
    ValueError
        If `alt` is less than a sentence.

    Examples
    --------
    >>> figure, ax = subplots()
    >>> show(figure, alt="figure 1")
    Traceback (most recent call last):
        ...
    ValueError: alt must say in a sentence what the figure shows, ... got 'figure 1'
    """
    check_alt(alt)
    if _shell() is not None:
        from IPython.display import display

        # Made here and not by the notebook's own settings, which could choose another format or
        # resolution and make the outputs differ.
        data = {"image/png": png(figure), "text/plain": repr(figure)}
        width = round(figure.get_figwidth() * _CSS_DPI)
        display(data, raw=True, metadata={"image/png": {"alt": alt, "width": width}})
    if "matplotlib.pyplot" in sys.modules:  # a figure made with pyplot would be shown twice
        sys.modules["matplotlib.pyplot"].close(figure)


# ------------------------------------------------------------------ what the notebooks draw


def _runs(name: str, values) -> np.ndarray:
    runs = np.asarray(values, dtype=np.float64)
    if runs.ndim == 1:
        runs = runs[None]
    if runs.ndim != 2 or not runs.size:
        raise ValueError(
            f"data[{name!r}] must have shape (points,) or (seeds, points), got {np.shape(values)}"
        )
    return runs


def _bands(ax: Axes, data: Mapping, x, theory: Mapping | None, labels: dict) -> Axes:
    lengths = {_runs(name, values).shape[1] for name, values in data.items()}
    if len(lengths) != 1:
        raise ValueError(f"data must have curves of one length, got {sorted(lengths)}")
    points = np.arange(1, lengths.pop() + 1) if x is None else np.asarray(x)
    unknown = set(theory or {}) - set(data)
    if unknown:
        raise ValueError(f"theory must be for names in data, got {sorted(unknown)}")
    with style():
        for name, values in data.items():
            runs: np.ndarray = _runs(name, values)
            appearance: dict[str, Any] = look(name)
            if len(points) > 25:
                appearance["markevery"] = len(points) // 12
            ax.plot(points, np.median(runs, axis=0), label=name, **appearance)
            if len(runs) > 1:
                ax.fill_between(
                    points, runs.min(0), runs.max(0), color=appearance["color"], alpha=0.2, lw=0
                )
        if theory:
            for values in theory.values():
                ax.plot(points, values, color="black", lw=0.9, zorder=3)
            ax.lines[-1].set_label("theory")
        if len(data) + bool(theory) > 4:  # too many to find room among the lines
            ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        elif len(data) > 1 or theory:
            ax.legend()
        ax.set(**labels)
        if x is None:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return ax


def by_layer(
    ax: Axes,
    data: Mapping[str, object],
    *,
    ylabel: str,
    x: Sequence[float] | None = None,
    theory: Mapping[str, object] | None = None,
    log: bool = False,
    xlabel: str = "layer",
) -> Axes:
    """Draw a quantity against the layer, a line for each method.

    The line is the median over seeds, the band around it reaches from the smallest to the largest.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    data : mapping of str to array
        Method -> ``(layers,)`` or ``(seeds, layers)``. The names decide the looks, see `look`.
    ylabel, xlabel : str
        Names of the axes.
    x : sequence, optional
        Layer numbers. Default: 1, 2, 3, ...
    theory : mapping of str to array, optional
        Method -> predicted values, drawn as thin black lines.
    log : bool
        Whether the vertical axis is logarithmic.

    Returns
    -------
    Axes
    """
    labels = {"xlabel": xlabel, "ylabel": ylabel, "yscale": "log" if log else "linear"}
    return _bands(ax, data, x, theory, labels)


def curves(
    ax: Axes,
    data: Mapping[str, object],
    *,
    ylabel: str,
    x: Sequence[float] | None = None,
    log: bool = False,
    xlabel: str = "epoch",
) -> Axes:
    """Draw a quantity against time, a line for each method: median and range over seeds.

    Parameters
    ----------
    ax, data, ylabel, x, log, xlabel
        As for `by_layer`, with epochs in place of layers.

    Returns
    -------
    Axes
    """
    labels = {"xlabel": xlabel, "ylabel": ylabel, "yscale": "log" if log else "linear"}
    return _bands(ax, data, x, None, labels)


def histograms(
    ax: Axes,
    data: Mapping[object, object],
    *,
    xlabel: str,
    ylabel: str = "layer",
    name: str = "relu",
) -> Axes:
    """Draw a histogram for each layer, one above the other, the first at the bottom.

    Heights are scaled to the highest bar of each, so that shapes compare and sizes do not.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    data : mapping
        Label -> values of any shape, or a histogram ``(counts, edges)``.
    xlabel, ylabel : str
        Names of the axes.
    name : str
        Method whose colour to use.

    Returns
    -------
    Axes
    """
    if not data:
        raise ValueError("data must hold at least one histogram, got none")
    with style():
        for row, values in enumerate(data.values()):
            counts, edges = _histogram(values)
            heights = row + 0.9 * counts / max(counts.max(), 1)
            # From the top down, so that a peak covers the foot of the one behind it.
            order = len(data) - row
            ax.stairs(heights, edges, baseline=row, fill=True, color=color(name), alpha=0.35)
            ax.stairs(heights, edges, baseline=row, color=color(name), lw=1.0, zorder=2 + order)
        ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(-0.15, len(data) + 0.05))
        ax.set_yticks(range(len(data)), [str(label) for label in data])
        ax.grid(visible=False, axis="y")
    return ax


def _histogram(values) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(values, tuple) and len(values) == 2 and len(values[1]) == len(values[0]) + 1:
        return np.asarray(values[0]), np.asarray(values[1])
    values = np.asarray(values, dtype=np.float64)
    return np.histogram(values[np.isfinite(values)], bins=50)


def interval_plot(
    ax: Axes,
    data: Mapping[str, tuple[float, float, float]],
    *,
    xlabel: str,
    reference: float | None = None,
) -> Axes:
    """Draw a row for each method: a dot for the median, a line for the interval around it.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    data : mapping of str to (low, middle, high)
        Method -> lower end, median and upper end. The first is at the top.
    xlabel : str
        What is measured, and what the interval is.
    reference : float, optional
        A value to compare with, drawn as a vertical line.

    Returns
    -------
    Axes
    """
    rows = list(data.items())[::-1]
    with style():
        if reference is not None:
            ax.axvline(reference, color="#555555", lw=1.0, ls="--")
        for row, (name, (low, middle, high)) in enumerate(rows):
            if not low <= middle <= high:
                raise ValueError(
                    f"data[{name!r}] must be (low, middle, high) in order, "
                    f"got {(low, middle, high)}"
                )
            appearance = look(name)
            ax.plot([low, high], [row, row], color=appearance["color"], lw=2.2)
            ax.plot(
                middle, row, ls="", ms=7, color=appearance["color"], marker=appearance["marker"]
            )
        ax.set_yticks(range(len(rows)), [name for name, _ in rows])
        ax.set(xlabel=xlabel, ylim=(-0.6, len(rows) - 0.4))
        ax.grid(visible=False, axis="y")
    return ax


def heatmap(
    ax: Axes,
    values: np.ndarray,
    *,
    rows: Sequence[object],
    columns: Sequence[object],
    label: str,
    xlabel: str = "",
    ylabel: str = "",
    fmt: str = "{:.2f}",
    center: float | None = None,
) -> Axes:
    """Draw a table of numbers as coloured cells with the numbers written in them.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    values : array of shape (rows, columns)
        NaN leaves a cell grey.
    rows, columns : sequence
        Names of rows and columns.
    label : str
        What the numbers are, beside the colour bar.
    xlabel, ylabel : str
        Names of the axes.
    fmt : str
        How to write a number.
    center : float, optional
        Value where the colours turn from brown to purple; without it dark blue is low, yellow high.

    Returns
    -------
    Axes
    """
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(
            f"values must have shape (rows, columns) = {(len(rows), len(columns))}, "
            f"got {values.shape}"
        )
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("values must hold at least one finite number")
    norm = None
    if center is not None:
        reach = max(float(np.abs(finite - center).max()), 1e-12)
        norm = TwoSlopeNorm(center, center - reach, center + reach)
    with style():
        ax.grid(visible=False)
        ax.set_facecolor("#CCCCCC")
        cmap = "cividis" if center is None else "PuOr"
        image = ax.imshow(np.ma.masked_invalid(values), aspect="auto", norm=norm, cmap=cmap)
        for (row, column), value in np.ndenumerate(values):
            shade = image.cmap(image.norm(value))[:3]
            dark = np.dot(shade, (0.299, 0.587, 0.114)) < 0.5
            if np.isfinite(value):
                ink = "white" if dark else "black"
                text = fmt.format(value)
                ax.text(column, row, text, ha="center", va="center", color=ink, fontsize=8.5)
        ax.set_xticks(range(len(columns)), [str(name) for name in columns])
        ax.set_yticks(range(len(rows)), [str(name) for name in rows])
        ax.tick_params(length=0)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.spines[:].set_visible(False)
        ax.figure.colorbar(image, ax=ax, label=label).outline.set_visible(False)
    return ax
