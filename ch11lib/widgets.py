"""Figures with sliders, which lose nothing where there is no kernel and hide no error.

A widget consists of a pure function that computes and a function that draws. `explore` shows a few
settings side by side as an ordinary figure, for pages without a kernel, and below it the same
picture with controls. An error in either function is raised when the widget is made; one that
appears only when a control is moved is shown in place of the picture, kept in `Explorer.errors`,
and raised by `Explorer.set` and `Explorer.exercise`, with which tests work every control without a
browser.
"""

from base64 import b64encode
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
import math
import time

from ch11lib import plotting
import ipywidgets
import numpy as np
import pandas as pd
from traitlets import TraitError

__all__ = ["Explorer", "explore"]

_VIEW = "application/vnd.jupyter.widget-view+json"
_REMEMBERED = 200  # pictures, some 20 kB each


@dataclass(frozen=True)
class _Picture:
    png: bytes
    text: str
    compute_seconds: float
    draw_seconds: float


def _label(name: str) -> str:
    return name.replace("_", " ")


def _caption(params: Mapping[str, object]) -> str:
    def written(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{_label(name)} = {written(value)}" for name, value in params.items())


def _slider(name: str, spec: tuple) -> ipywidgets.Widget:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in spec)
    if len(spec) not in (3, 4) or not numbers or not spec[0] < spec[1] or not spec[2] > 0:
        raise ValueError(
            f"controls[{name!r}] must be (min, max, step) or (min, max, step, default) with "
            f"min < max and step > 0, got {spec!r}"
        )
    low, high, step = spec[:3]
    steps = round((high - low) / step)
    default = spec[3] if len(spec) == 4 else low + step * (steps // 2)
    if not low <= default <= high:
        raise ValueError(f"controls[{name!r}] has its default outside its range, got {spec!r}")
    if all(isinstance(v, int) for v in spec):
        return ipywidgets.IntSlider(default, low, high, step)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return ipywidgets.FloatSlider(
        default, min=low, max=high, step=step, readout_format=f".{decimals}f"
    )


def _control(name: str, spec) -> ipywidgets.Widget:
    """Make the control that a short description stands for."""
    if isinstance(spec, ipywidgets.ValueWidget):
        control = spec
    elif isinstance(spec, bool):
        control = ipywidgets.Checkbox(spec, indent=False)
    elif isinstance(spec, tuple):
        control = _slider(name, spec)
    elif isinstance(spec, list) and spec:
        control = ipywidgets.Dropdown(options=spec, value=spec[0])
    else:
        raise ValueError(
            f"controls[{name!r}] must be a tuple (min, max, step), a list of choices, a bool or a "
            f"widget with a value, got {spec!r}"
        )
    control.description = control.description or _label(name)
    control.style.description_width = "initial"
    if hasattr(control, "continuous_update"):
        control.continuous_update = False  # draw when the slider is let go, not on its way
    return control


def _corners(control: ipywidgets.Widget) -> dict[str, object]:
    """Return the smallest and the largest value of a control, or the first and the last choice."""
    if isinstance(control, ipywidgets.Checkbox):
        return {"first": False, "last": True}
    if hasattr(control, "options"):
        values = [choice[1] for choice in control._options_full]
        return {"first": values[0], "last": values[-1]}
    if isinstance(control, ipywidgets.FloatLogSlider):
        return {"min": control.base**control.min, "max": control.base**control.max}
    return {"min": control.min, "max": control.max}


def _same(one, other) -> bool:
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    return bool(np.all(one == other))


class Explorer:
    """A widget made by `explore`; it shows itself at the end of a cell.

    Attributes
    ----------
    controls : dict of str to ipywidgets.Widget
        The controls, by parameter.
    view : ipywidgets.VBox
        Controls and picture.
    errors : list of Exception
        What went wrong when controls were moved.
    png : bytes
        The picture as it is.
    """

    def __init__(self, compute, draw, controls, static, alt, title, panels, panel, describe):
        self._compute, self._draw, self._describe = compute, draw, describe
        self._alt, self._title = alt, title
        self._panels, self._panel = panels, panel
        self._pictures: OrderedDict[tuple, _Picture] = OrderedDict()
        self._held = False
        self.errors: list[Exception] = []
        self.controls = {name: _control(name, spec) for name, spec in controls.items()}
        self._frame = ipywidgets.HTML()
        heading = [ipywidgets.HTML(f"<strong>{escape(title)}</strong>")] if title else []
        self.view = ipywidgets.VBox([*heading, *self.controls.values(), self._frame])
        self._show_picture(self._picture())
        self._static = self._draw_static(static)
        for control in self.controls.values():
            control.observe(self._moved, names="value")

    # -------------------------------------------------------------- pictures

    @property
    def params(self) -> dict[str, object]:
        """The present setting."""
        return {name: control.value for name, control in self.controls.items()}

    def _picture(self, *, anew: bool = False) -> _Picture:
        """Return the picture of the present setting, remembered or made anew."""
        key = tuple(self.params.items())
        if anew or key not in self._pictures:
            self._pictures[key] = self._render(self.params)
        self._pictures.move_to_end(key)
        while len(self._pictures) > _REMEMBERED:
            self._pictures.popitem(last=False)
        return self._pictures[key]

    def _render(self, params: Mapping[str, object]) -> _Picture:
        start = time.perf_counter()
        data = self._compute(**params)
        computed = time.perf_counter()
        figure, axes = plotting.subplots(1, self._panels, panel=self._panel)
        with plotting.style():
            self._draw(data, axes)
        png = plotting.png(figure, dpi=96, compact=False)
        drawn = time.perf_counter()
        text = self._describe(data) if self._describe else ""
        return _Picture(png, text, computed - start, drawn - computed)

    def _draw_static(self, static: Sequence[Mapping[str, object]]):
        """Draw some settings side by side; settings of several panels below each other."""
        single = self._panels == 1
        rows, columns = (1, len(static)) if single else (len(static), self._panels)
        figure, axes = plotting.subplots(
            rows, columns, panel=self._panel if not single else None, title=self._title or None
        )
        axes = np.reshape(np.asarray(axes), (len(static), self._panels))
        for setting, own in zip(static, axes, strict=True):
            data = self._compute(**(self.params | dict(setting)))
            with plotting.style():
                self._draw(data, own[0] if single else own)
            plotting.title(own[0], _caption(setting))
        return figure

    def _show_picture(self, picture: _Picture) -> None:
        self.png = picture.png
        alt = f"{self._alt} Here: {_caption(self.params)}. {picture.text}".strip()
        self._frame.value = (
            f'<img src="data:image/png;base64,{b64encode(picture.png).decode()}" '
            f'alt="{escape(alt)}" style="max-width: 100%; height: auto;">'
            f'<p role="status">{escape(picture.text)}</p>'
        )

    # -------------------------------------------------------------- moving

    def _moved(self, _change) -> None:
        """Redraw after a move; ipywidgets would lose an exception, so show and keep it."""
        if self._held:
            return
        try:
            self._show_picture(self._picture())
        except Exception as error:
            self.errors.append(error)
            self.png = b""
            message = f"{type(error).__name__}: {error}"
            self._frame.value = (
                f'<p role="alert">This setting failed ({escape(_caption(self.params))}): '
                f"<code>{escape(message)}</code></p>"
            )

    def set(self, **params) -> None:
        """Move controls, as a reader would, and raise what a reader would only see.

        Parameters
        ----------
        **params
            Values for some of the controls; one redraw for all.

        Raises
        ------
        ValueError
            If there is no such control or it cannot take the value.
        Exception
            Whatever computing and drawing raise.
        """
        unknown = set(params) - set(self.controls)
        if unknown:
            raise ValueError(f"no control {sorted(unknown)}; there are {sorted(self.controls)}")
        before, self._held = self.params, True
        try:
            for name, value in params.items():
                control = self.controls[name]
                try:
                    control.value = value
                except TraitError as error:
                    raise ValueError(f"control {name!r} cannot take {value!r}: {error}") from error
                if not _same(control.value, value):
                    raise ValueError(f"control {name!r} made {control.value!r} of {value!r}")
        except ValueError:
            for name, value in before.items():
                self.controls[name].value = value
            raise
        finally:
            self._held = False
        failures = len(self.errors)
        self._moved(None)
        if len(self.errors) > failures:
            raise self.errors[-1]

    def exercise(self) -> pd.DataFrame:
        """Move every control to its ends and back, the others where they are.

        Returns
        -------
        pandas.DataFrame
            A row for each move: ``control``, ``position`` (``"default"``, ``"min"``, ``"max"``, or
            ``"first"`` and ``"last"`` choice), ``value``, ``changed`` (whether the picture differs
            from the one before all moves), ``compute_seconds`` and ``draw_seconds``. The row
            ``"default"`` is computed and drawn anew: a change there means that the same setting
            does not always give the same picture.

        Raises
        ------
        Exception
            Whatever computing and drawing raise.
        """
        start, reference = self.params, self.png
        rows = []
        for name, control in self.controls.items():
            moves = {"default": start[name], **_corners(control)}
            for position, value in moves.items():
                self.set(**{name: value})
                picture = self._picture(anew=position == "default")
                rows.append(
                    {
                        "control": name,
                        "position": position,
                        "value": value,
                        "changed": picture.png != reference,
                        "compute_seconds": picture.compute_seconds,
                        "draw_seconds": picture.draw_seconds,
                    }
                )
            self.set(**start)
        return pd.DataFrame(rows)

    # -------------------------------------------------------------- showing

    def _ipython_display_(self) -> None:
        from IPython.display import display

        plotting.show(self._static, alt=self._alt)
        names = ", ".join(_label(name) for name in self.controls)
        # Not ipywidgets' own text, which begins with the bytes of the picture.
        data = {"text/plain": f"Interactive figure. Run the notebook to move: {names}."}
        data[_VIEW] = self.view._repr_mimebundle_()[_VIEW]
        display(data, raw=True)


def explore(
    compute: Callable,
    draw: Callable,
    controls: Mapping[str, object],
    *,
    static: Sequence[Mapping[str, object]],
    alt: str,
    title: str = "",
    panels: int = 1,
    panel: tuple[float, float] | None = None,
    describe: Callable | None = None,
) -> Explorer:
    """Make a figure that can be explored; as the last line of a cell it shows itself.

    First comes a figure of the settings in `static`, side by side, then the controls and the
    picture for the present setting. Everything is computed and drawn once here, so that errors
    surface in the cell. Settings seen once are remembered.

    Parameters
    ----------
    compute : callable
        ``compute(**params)`` returns data. It must be pure: the same setting, the same data.
    draw : callable
        ``draw(data, ax)`` draws into an Axes, or into an array of them if there are several
        `panels`. The title of the first one is left to the widget, which names the setting there.
    controls : mapping of str to control
        For each parameter ``(min, max, step)`` or ``(min, max, step, default)``, a slider; a list
        of choices, the first being the default; a bool, a check box; or a widget of ipywidgets.
    static : sequence of mappings
        The settings to show without a kernel, three or four. Parameters not named there have their
        default.
    alt : str
        Text alternative of the figures, a sentence at least, see `plotting.show`. The setting is
        added to that of the moving one.
    title : str
        Heading: what there is to find out.
    panels : int
        Number of panels of a picture.
    panel : (width, height), optional
        Size of a panel in inches, see `plotting.subplots`.
    describe : callable, optional
        ``describe(data)`` returns a sentence about the picture, shown below it and read out.

    Returns
    -------
    Explorer

    Raises
    ------
    ValueError
        If the controls, the static settings or the text alternative are not as described.

    Examples
    --------
    >>> explorer = explore(
    ...     compute=lambda slope: [0, slope],
    ...     draw=lambda data, ax: ax.plot(data),
    ...     controls={"slope": (0, 4, 1)},
    ...     static=[{"slope": 0}, {"slope": 4}],
    ...     alt="A straight line through the origin, steeper for larger slopes.",
    ... )
    >>> explorer.set(slope=3)
    >>> explorer.params
    {'slope': 3}
    >>> explorer.exercise()[["position", "value", "changed"]].values.tolist()
    [['default', 3, False], ['min', 0, True], ['max', 4, True]]
    """
    plotting.check_alt(alt)
    if not controls:
        raise ValueError("controls must have at least one entry, got none")
    if not static:
        raise ValueError("static must list at least one setting: it is all some readers see")
    for setting in static:
        unknown = set(setting) - set(controls)
        if unknown or not setting:
            raise ValueError(
                f"static must hold settings of {sorted(controls)}, got {dict(setting)!r}"
            )
    return Explorer(compute, draw, controls, static, alt, title, panels, panel, describe)
