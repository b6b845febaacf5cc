"""Learning-rate schedules as functions of the step, and the learning-rate range test.

The first part defines the schedules: pure functions ``name(step, ...)``, vectorised over the step,
which starts at 0. Given NumPy arrays or numbers they compute in NumPy; given a tensor, the same
lines run inside a graph. So `Schedule` can hand any of them to a Keras optimizer, and the rate that
is used is the rate that was plotted. All are defined for every step: past their end they keep their
last value.

The second part is what Keras does not have: `OneCycle` with its momentum (`ScheduledSGD`), a
recorder of the rates that were really used (`record_rates`), `PerformanceScheduling`, which says at
once what `ReduceLROnPlateau` finds out late, and `find_learning_rate`, which leaves no trace.

The first comparison of such schedules: A. Senior, G. Heigold, M. Ranzato and K. Yang, "An empirical
study of learning rates in deep neural networks for speech recognition", ICASSP 2013,
doi:10.1109/ICASSP.2013.6638963.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
from dataclasses import dataclass, field
import functools
import math
from numbers import Integral, Real
import random
from typing import Any

from ch11lib import training
from ch11lib.backend import keras, tf
import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "OneCycle",
    "PerformanceScheduling",
    "Plateau",
    "RangeTest",
    "Schedule",
    "ScheduledSGD",
    "cosine",
    "cosine_restarts",
    "exponential",
    "find_learning_rate",
    "one_cycle",
    "one_cycle_momentum",
    "piecewise",
    "piecewise_linear",
    "plateau",
    "polynomial",
    "power",
    "record_rates",
    "suggest_rates",
    "warmup",
    "wsd",
]

# ------------------------------------------------------------------------------ the definition

#: The schedules of this module by name; `Schedule` finds them here when it is loaded from a file.
_FUNCTIONS: dict[str, Callable] = {}


def _is_symbolic(step) -> bool:
    return tf.is_tensor(step) or isinstance(step, keras.Variable)


def _schedule(function: Callable) -> Callable:
    """Let a function of a float64 step take numbers, arrays and tensors, and register it."""

    @functools.wraps(function)
    def wrapper(step, *arguments, **parameters):
        if _is_symbolic(step):
            return function(keras.ops.cast(step, "float64"), *arguments, **parameters)
        return np.asarray(function(_checked_step(step), *arguments, **parameters))[()]

    _FUNCTIONS[function.__name__] = wrapper
    return wrapper


def _checked_step(step) -> np.ndarray:
    t = np.asarray(step)
    if t.dtype.kind not in "iuf":
        raise TypeError(f"step must be a number or an array of numbers; received {step!r}")
    if not (t >= 0).all():  # also refuses NaN
        raise ValueError(f"step must be 0 or more; received {t[~(t >= 0)].min()}")
    return t.astype(np.float64)


def _ops(t):
    """Return the library for a step: NumPy for arrays, Keras for tensors."""
    return keras.ops if tf.is_tensor(t) else np


def _check(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    positive: bool = False,
    whole: bool = False,
) -> None:
    kind = Integral if whole else Real
    good = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if not (good and low <= value <= high and (value > 0 or not positive)):
        what = ("a whole number" if whole else "a number") + (" above 0" if positive else "")
        bounds = "" if positive else f" of {low:g} or more"
        bounds += "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{name} must be {what}{bounds}; received {value!r}")


def _check_numbers(name: str, values: Any) -> None:
    if not (isinstance(values, Iterable) and np.asarray(values).dtype.kind in "iuf"):
        raise TypeError(f"{name} must be a list of numbers; received {values!r}")
    if not np.isfinite(np.asarray(values)).all():
        raise ValueError(f"{name} must be finite; received {list(values)}")


@_schedule
def power(step: ArrayLike, initial: float, steps: float, exponent: float = 1.0) -> Any:
    """Power scheduling: ``η(t) = η₀ / (1 + t/s)^c``.

    With c = 1 the rate is a half after s steps, a third after 2s, a quarter after 3s: it falls ever
    more slowly. Keras has this case as `InverseTimeDecay`. Rates like 1/t go back to Robbins, Monro
    (1951), A stochastic approximation method, doi:10.1214/aoms/1177729586; in networks to Senior et
    al. (2013).

    Parameters
    ----------
    step : number, array or tensor
        t, the number of steps done before, 0 or more. All schedules take it.
    initial : float
        η₀.
    steps : float
        s.
    exponent : float
        c.

    Returns
    -------
    numpy.float64, array or tensor
        The rate, in the shape of `step`.

    Raises
    ------
    TypeError, ValueError
        For a negative step or a parameter out of its range, as all schedules do.

    Examples
    --------
    >>> power([0, 100, 300], initial=0.8, steps=100)
    array([0.8, 0.4, 0.2])
    """
    _check("initial", initial)
    _check("steps", steps, positive=True)
    _check("exponent", exponent)
    return initial / (1 + step / steps) ** float(exponent)


@_schedule
def exponential(step: ArrayLike, initial: float, steps: float, factor: float = 0.1) -> Any:
    """Exponential scheduling: ``η(t) = η₀ · factor^(t/s)``.

    With a factor of 0.1 the rate falls to a tenth every s steps. Keras's `ExponentialDecay`.
    Senior et al. (2013), doi:10.1109/ICASSP.2013.6638963.

    Parameters
    ----------
    step : number, array or tensor
    initial : float
        η₀.
    steps : float
        s.
    factor : float
        Above 0.

    Examples
    --------
    >>> exponential([0, 100, 200], initial=0.1, steps=100)
    array([0.1  , 0.01 , 0.001])
    """
    _check("initial", initial)
    _check("steps", steps, positive=True)
    _check("factor", factor, positive=True)
    return initial * float(factor) ** (step / steps)


@_schedule
def polynomial(
    step: ArrayLike, initial: float, steps: float, end: float = 0.0, exponent: float = 1.0
) -> Any:
    """Polynomial decay: ``η(t) = η₁ + (η₀ - η₁)(1 - t/T)^p`` up to T, then η₁.

    With p = 1 a straight line. Keras's `PolynomialDecay`.

    Parameters
    ----------
    step : number, array or tensor
    initial, end : float
        η₀ and η₁.
    steps : float
        T.
    exponent : float
        p, above 0.

    Examples
    --------
    >>> polynomial([0, 50, 100, 150], initial=0.2, steps=100)
    array([0.2, 0.1, 0. , 0. ])
    """
    _check("initial", initial)
    _check("steps", steps, positive=True)
    _check("end", end)
    _check("exponent", exponent, positive=True)
    return end + (initial - end) * (1 - _ops(step).minimum(step / steps, 1.0)) ** float(exponent)


@_schedule
def piecewise(step: ArrayLike, boundaries: Sequence[float], values: Sequence[float]) -> Any:
    """Piecewise constant scheduling: one rate up to the first boundary, another one up to the next.

    As in Keras's `PiecewiseConstantDecay`, the old value still holds *at* a boundary, that is, for
    ``boundary + 1`` steps in all, as steps count from 0. Boundaries are steps, not epochs: one
    beyond the end of training is never reached, and nothing tells you.

    Parameters
    ----------
    step : number, array or tensor
    boundaries : list of numbers
        Steps, 0 or more, in rising order.
    values : list of floats
        One more than there are boundaries.

    Examples
    --------
    >>> piecewise([0, 10, 11, 99], boundaries=[10], values=[0.1, 0.001])
    array([0.1  , 0.1  , 0.001, 0.001])
    """
    _check_numbers("boundaries", boundaries)
    _check_numbers("values", values)
    if len(values) != len(boundaries) + 1:
        raise ValueError(
            f"values must be one more than the {len(boundaries)} boundaries; received {len(values)}"
        )
    if any(b < 0 for b in boundaries) or not all(np.diff(boundaries) > 0):
        raise ValueError(
            f"boundaries must be 0 or more, in rising order; received {list(boundaries)}"
        )
    ops, rate = _ops(step), step * 0.0 + float(values[0])
    for boundary, value in zip(boundaries, values[1:], strict=True):
        rate = ops.where(step > float(boundary), float(value), rate)
    return rate


@_schedule
def piecewise_linear(step: ArrayLike, knots: Sequence[float], values: Sequence[float]) -> Any:
    """Straight lines between given points; constant before the first and after the last.

    No value is ever outside of the given ones. Two knots at the same step make a jump, and the
    later one counts at that step.

    Parameters
    ----------
    step : number, array or tensor
    knots : list of numbers
        Steps, 0 or more, never falling.
    values : list of floats
        The rate at each knot.

    Examples
    --------
    >>> piecewise_linear([0, 50, 100, 150, 200], knots=[0, 100, 200], values=[0.0, 0.4, 0.0])
    array([0. , 0.2, 0.4, 0.2, 0. ])
    """
    _check_numbers("knots", knots)
    _check_numbers("values", values)
    if not len(values) == len(knots) > 0:
        raise ValueError(
            f"values must be one for each of the knots, 1 or more; received {len(values)} values "
            f"and {len(knots)} knots"
        )
    if any(k < 0 for k in knots) or not all(np.diff(knots) >= 0):
        raise ValueError(f"knots must be 0 or more, never falling; received {list(knots)}")
    return _lines(step, [float(k) for k in knots], [float(v) for v in values])


def _lines(step, knots, values):
    ops, rate = _ops(step), step * 0.0 + values[0]
    for i in range(len(knots) - 1):
        width = knots[i + 1] - knots[i]
        if width == 0:
            rate = ops.where(step >= knots[i], values[i + 1], rate)
            continue
        u = ops.clip((step - knots[i]) / width, 0.0, 1.0)
        line = values[i] * (1 - u) + values[i + 1] * u
        line = ops.clip(line, *sorted(values[i : i + 2]))  # no rounding leaves the range
        rate = ops.where(step > knots[i], line, rate)
    return rate


@_schedule
def cosine(step: ArrayLike, initial: float, steps: float, end: float = 0.0) -> Any:
    """Half a cosine, from initial to end: ``η(t) = η₁ + (η₀ - η₁)(1 + cos(π t/T))/2``, then η₁.

    Keras's `CosineDecay`, whose ``alpha`` is ``end / initial``. Loshchilov, Hutter (2017), SGDR:
    stochastic gradient descent with warm restarts, arXiv:1608.03983.

    Parameters
    ----------
    step : number, array or tensor
    initial, end : float
        η₀ and η₁.
    steps : float
        T.

    Examples
    --------
    >>> cosine([0, 50, 100, 150], initial=0.2, steps=100).round(6)
    array([0.2, 0.1, 0. , 0. ])
    """
    _check("initial", initial)
    _check("steps", steps, positive=True)
    _check("end", end)
    ops = _ops(step)
    return end + (initial - end) * (1 + ops.cos(math.pi * ops.minimum(step / steps, 1.0))) / 2


@_schedule
def cosine_restarts(
    step: ArrayLike,
    initial: float,
    steps: float,
    end: float = 0.0,
    period_factor: float = 2.0,
    peak_factor: float = 1.0,
) -> Any:
    """Cosine decay that starts again and again, by default in ever longer periods.

    Period i = 0, 1, 2 ... takes ``T · period_factorⁱ`` steps and falls along half a cosine from
    ``η₁ + (η₀ - η₁) peak_factorⁱ`` to η₁. Keras's `CosineDecayRestarts`, whose ``t_mul`` and
    ``m_mul`` are the two factors. Loshchilov, Hutter (2017), arXiv:1608.03983.

    Parameters
    ----------
    step : number, array or tensor
    initial, end : float
        η₀ and η₁.
    steps : float
        T, the length of the first period.
    period_factor : float
        1 or more.
    peak_factor : float
        Above 0.

    Examples
    --------
    >>> cosine_restarts([0, 99, 100, 299, 300], initial=0.2, steps=100).round(3)
    array([0.2, 0. , 0.2, 0. , 0.2])
    """
    _check("initial", initial)
    _check("steps", steps, positive=True)
    _check("end", end)
    _check("period_factor", period_factor, low=1.0)
    _check("peak_factor", peak_factor, positive=True)
    ops, x, g = _ops(step), step / steps, float(period_factor)
    if g == 1:
        i = ops.floor(x)
        u = x - i
    else:

        def start(i):
            return (g**i - 1) / (g - 1)

        i = ops.floor(ops.log(1 + x * (g - 1)) / math.log(g))
        # At a restart the logarithm can be wrong by a rounding, and so i by one.
        i = ops.where(x >= start(i + 1), i + 1, i)
        i = ops.where(x < start(i), i - 1, i)
        u = (x - start(i)) / g**i
    return end + (initial - end) * float(peak_factor) ** i * (1 + ops.cos(math.pi * u)) / 2


@_schedule
def warmup(step: ArrayLike, steps: float, after: Callable[[Any], Any], start: float = 0.0) -> Any:
    """Put a linear warm-up in front of a schedule: from start to ``after(0)``, then ``after(t-s)``.

    Goyal et al. (2017), Accurate, large minibatch SGD: training ImageNet in 1 hour,
    arXiv:1706.02677.

    Parameters
    ----------
    step : number, array or tensor
    steps : float
        s, the length of the warm-up. With ``start=0`` the very first step changes nothing.
    after : callable
        Any function of the step, such as a `Schedule` or one of Keras's. To put it into a
        `Schedule`, which can be saved, it must be one of these two.
    start : float

    Examples
    --------
    >>> warmup([0, 5, 10, 110], 10, lambda t: exponential(t, initial=0.1, steps=100))
    array([0.  , 0.05, 0.1 , 0.01])
    """
    _check("steps", steps, positive=True)
    _check("start", start)
    if not callable(after):
        raise TypeError(f"after must be a function of the step; received {after!r}")
    ops, u = _ops(step), step / steps

    def later(t):
        value = after(t)
        return np.asarray(value, np.float64) if ops is np else ops.cast(value, "float64")

    rising = start * (1 - u) + later(ops.zeros_like(step)) * u
    return ops.where(u < 1, rising, later(ops.maximum(step - float(steps), 0.0)))


@_schedule
def wsd(step: ArrayLike, peak: float, steps: int, warmup: int, decay: int, end: float = 0.0) -> Any:
    """Warm-up, stable, decay: a trapezium, which reaches `end` at the last of the steps.

    Linear from 0 to the peak in `warmup` steps, constant, linear to the end in `decay` steps. Up to
    the decay it doesn't depend on `steps`, so that a run can be prolonged. Hu et al. (2024),
    MiniCPM, arXiv:2404.06395; Hägele et al. (2024), Scaling laws and compute-optimal training
    beyond fixed training durations, arXiv:2405.18392.

    Parameters
    ----------
    step : number, array or tensor
    peak, end : float
    steps : int
        Length of training; its last step is ``steps - 1``.
    warmup, decay : int
        0 or more, together below `steps`.

    Examples
    --------
    >>> wsd([0, 5, 10, 80, 90, 100], peak=0.2, steps=101, warmup=10, decay=20)
    array([0. , 0.1, 0.2, 0.2, 0.1, 0. ])
    """
    _check("peak", peak)
    _check("steps", steps, low=1, whole=True)
    _check("warmup", warmup, whole=True)
    _check("decay", decay, whole=True)
    _check("end", end)
    if warmup + decay >= steps:
        raise ValueError(
            f"warmup and decay must together be below the {steps} steps; "
            f"received {warmup} and {decay}"
        )
    last = steps - 1.0
    knots = [0.0, float(warmup), last - decay, last]
    return _lines(step, knots, [0.0, float(peak), float(peak), float(end if decay else peak)])


@_schedule
def one_cycle(
    step: ArrayLike,
    peak: float,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    final: float = 0.1,
) -> Any:
    """1cycle: up to the peak, down again over as many steps, then down by orders of magnitude.

    Three straight lines, over the steps 0 ... T = steps - 1: from `start` at 0 to `peak` at h, back
    to `start` at 2h, to `end` at T, with ``h = round((1 - final) T / 2)`` (and at T at the latest).
    The rate reaches the end exactly at the last step, whatever the number of steps, and stays
    there.

    Smith, Topin (2017), Super-convergence, arXiv:1708.07120; Smith (2018), A disciplined approach
    to neural network hyper-parameters: part 1, arXiv:1803.09820.

    Parameters
    ----------
    step : number, array or tensor
    peak : float
    steps : int
        Length of training, 1 or more.
    start : float, optional
        A tenth of the peak by default.
    end : float, optional
        A thousandth of the start by default; 0 means 0.
    final : float
        Fraction of the steps for the last line, from 0 to below 1.

    Examples
    --------
    >>> one_cycle([0, 45, 90, 100, 1000], peak=0.4, steps=101)
    array([4.e-02, 4.e-01, 4.e-02, 4.e-05, 4.e-05])
    """
    _check("peak", peak)
    start = peak / 10 if start is None else start
    _check("start", start)
    end = start / 1000 if end is None else end
    _check("end", end)
    return _lines(step, _cycle(steps, final), [float(v) for v in (start, peak, start, end)])


@_schedule
def one_cycle_momentum(
    step: ArrayLike, steps: int, high: float = 0.95, low: float = 0.85, final: float = 0.1
) -> Any:
    """Momentum along a 1cycle: low where the rate is high, high where it is low.

    Straight lines between the same steps as in `one_cycle`: high, low, high, high. Smith (2018),
    arXiv:1803.09820.

    Parameters
    ----------
    step : number, array or tensor
    steps, final
        As in `one_cycle`.
    high, low : float
        From 0 to 1.

    Examples
    --------
    >>> one_cycle_momentum([0, 45, 90, 100], steps=101)
    array([0.95, 0.85, 0.95, 0.95])
    """
    _check("high", high, high=1.0)
    _check("low", low, high=1.0)
    return _lines(step, _cycle(steps, final), [float(v) for v in (high, low, high, high)])


def _cycle(steps, final):
    """Return the steps at which 1cycle turns. They are whole, so that it reaches its peak."""
    _check("steps", steps, low=1, whole=True)
    _check("final", final, high=np.nextafter(1.0, 0.0))
    last = steps - 1
    half = round((1 - final) * last / 2)
    return [0.0, float(half), float(min(2 * half, last)), float(last)]


# ------------------------------------------------------------------------- performance scheduling


@dataclass
class Plateau:
    """Performance scheduling as a state machine: multiply the rate when a value stops improving.

    After each check, `update` takes the new value and returns the rate from then on. A value counts
    as better if it beats the best one by more than `min_delta`. After `patience` checks in a row
    without a better one, the rate is multiplied by `factor`; the next `cooldown` checks do not
    count. Keras's `ReduceLROnPlateau` does the same, once per epoch. Senior et al. (2013),
    doi:10.1109/ICASSP.2013.6638963.

    Parameters
    ----------
    rate : float
        The rate to begin with.
    factor : float
        Above 0 and below 1.
    patience, cooldown : int
    min_delta : float
    min_rate : float
        The rate is never lowered below it.
    mode : {"min", "max"}
        Whether low or high values are good.

    Attributes
    ----------
    best : float or None
    wait : int
        Checks without improvement so far.
    resting : int
        Checks of the cooldown that are left.

    Examples
    --------
    >>> state = Plateau(rate=0.5, factor=0.25, patience=2)
    >>> [state.update(loss) for loss in (1.0, 0.8, 0.8, 0.9, 0.9)]
    [0.5, 0.5, 0.5, 0.125, 0.125]
    """

    rate: float
    factor: float = 0.1
    patience: int = 10
    min_delta: float = 1e-4
    cooldown: int = 0
    min_rate: float = 0.0
    mode: str = "min"
    best: float | None = field(default=None, init=False)
    wait: int = field(default=0, init=False)
    resting: int = field(default=0, init=False)

    def __post_init__(self):
        _check("rate", self.rate)
        _check("factor", self.factor, positive=True, high=np.nextafter(1.0, 0.0))
        _check("patience", self.patience, whole=True)
        _check("min_delta", self.min_delta)
        _check("cooldown", self.cooldown, whole=True)
        _check("min_rate", self.min_rate)
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max'; received {self.mode!r}")

    def update(self, value: float) -> float:
        """Take the value of a new check, NaN included, and return the rate from now on."""
        if self.resting:
            self.resting -= 1
            self.wait = 0
        sign = 1 if self.mode == "min" else -1
        if self.best is None or sign * value + self.min_delta < sign * self.best:
            self.best, self.wait = value, 0
        elif not self.resting:
            self.wait += 1
            if self.wait >= self.patience and self.rate > self.min_rate:
                self.rate = max(self.rate * self.factor, self.min_rate)
                self.wait, self.resting = 0, self.cooldown
        return self.rate


def plateau(values: Iterable[float], initial: float, **options: Any) -> np.ndarray:
    """Return the rate during each epoch, given the value that was measured at its end.

    Parameters
    ----------
    values : sequence of floats
        Such as the validation losses of a training.
    initial : float
        The first rate.
    **options
        The other parameters of `Plateau`.

    Returns
    -------
    numpy.ndarray
        As long as `values`: what ``history.history["learning_rate"]`` holds.

    Examples
    --------
    >>> plateau([1.0, 0.8, 0.8, 0.9, 0.7], initial=0.1, patience=2)
    array([0.1 , 0.1 , 0.1 , 0.1 , 0.01])
    """
    state, rates = Plateau(initial, **options), []
    for value in values:
        rates.append(state.rate)
        state.update(value)
    return np.array(rates, dtype=np.float64)


class PerformanceScheduling(keras.callbacks.Callback):
    """Performance scheduling for Keras: `Plateau`, with a check at the end of each epoch.

    It does what Keras's `ReduceLROnPlateau` does, with two differences. That one raises an error
    when it first tries to lower a rate which is a schedule, and only warns if what it monitors does
    not exist; here the first is an error before training, the second after the first epoch.

    As it acts between epochs, `training.fit` keeps its speed. To check every N steps, make epochs
    of N steps.

    Parameters
    ----------
    monitor : str
        A loss or metric as it is named in the history.
    mode : {"min", "max"}, optional
        Needed unless `monitor` is a loss, which is to fall.
    **options
        Parameters of `Plateau`: factor, patience, min_delta, cooldown, min_rate.

    Examples
    --------
    >>> x = np.ones((8, 1))
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.SGD(0.0625), "mse")
    >>> halving = PerformanceScheduling(monitor="loss", factor=0.5, patience=1, min_delta=1e6)
    >>> training.fit(model, x, x, epochs=4, callbacks=[halving]).history["learning_rate"]
    [0.0625, 0.0625, 0.03125, 0.015625]
    """

    def __init__(self, monitor: str = "val_loss", mode: str | None = None, **options: Any):
        super().__init__()
        if mode is None and not monitor.endswith("loss"):
            raise ValueError(f"mode must be 'min' or 'max' for monitor={monitor!r}; received None")
        self.monitor, self.options = monitor, options | {"mode": mode or "min"}
        Plateau(1.0, **self.options)

    def on_train_begin(self, logs=None):
        """Check that the rate can be changed, and start anew."""
        optimizers = _inner_optimizers(self.model.optimizer)
        kinds = [type(optimizer._learning_rate).__name__ for optimizer in optimizers]
        if len(optimizers) > 1 or not isinstance(optimizers[0]._learning_rate, keras.Variable):
            raise TypeError(
                "the optimizer must have one number as its learning rate, because a schedule "
                f"cannot be changed; received {', '.join(kinds)}"
            )
        self.state = Plateau(self._rate(), **self.options)

    def on_epoch_end(self, epoch, logs=None):
        """Check whether there was progress, and lower the rate if it is time."""
        if self.monitor not in (logs or {}):
            raise ValueError(
                f"monitor must be one of {sorted(logs or {})}; received {self.monitor!r}"
            )
        logs["learning_rate"] = self.state.rate = self._rate()
        self.model.optimizer.learning_rate = self.state.update(logs[self.monitor])

    def _rate(self) -> float:
        return float(self.model.optimizer.learning_rate.numpy())


def _inner_optimizers(optimizer) -> list:
    """Return the optimizers that have a rate of their own."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return [optimizer.inner_optimizer]
    return list(getattr(optimizer, "optimizers", [optimizer]))


# ---------------------------------------------------------------------------------------- in Keras


@keras.saving.register_keras_serializable(package="ch11lib")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """One of the schedules of this module, as the learning rate of a Keras optimizer.

    It works per step in `model.fit` and in the compiled epochs of `training.fit`, is saved with the
    model, and can be called with NumPy steps: ``plt.plot(t, schedule(t))`` shows what will be used.

    Parameters
    ----------
    function : callable or str
        A schedule of this module, or its name.
    **parameters
        Its parameters other than the step, by name.

    Raises
    ------
    ValueError, TypeError
        At once, if the function or a parameter is wrong.

    Notes
    -----
    Computed in float64 and rounded to Keras's default type at the end; Keras's own schedules
    compute in float32.

    Examples
    --------
    >>> schedule = Schedule(exponential, initial=0.1, steps=100)
    >>> schedule(np.array([0, 100]))
    array([0.1 , 0.01])
    >>> optimizer = keras.optimizers.SGD(schedule, momentum=0.9)
    >>> optimizer.iterations.assign(100)
    <...>
    >>> float(optimizer.learning_rate)
    0.00999...
    """

    def __init__(self, function: Callable | str, **parameters: Any):
        name = function if isinstance(function, str) else getattr(function, "__name__", None)
        if name not in _FUNCTIONS or function not in (name, _FUNCTIONS[name]):
            raise ValueError(
                f"function must be one of {', '.join(sorted(_FUNCTIONS))}; received {function!r}"
            )
        self.function, self.parameters = name, parameters
        self(0)

    def __call__(self, step):
        """Return the rate at a step, as a tensor for a tensor, in NumPy for anything else."""
        rate = _FUNCTIONS[self.function](step, **self.parameters)
        return keras.ops.cast(rate, keras.config.floatx()) if tf.is_tensor(rate) else rate

    def get_config(self):
        """Return what `from_config` needs."""
        return {
            "function": self.function,
            **{name: _to_config(value) for name, value in self.parameters.items()},
        }

    @classmethod
    def from_config(cls, config):
        """Create a schedule from its configuration."""
        return cls(**{name: _from_config(value) for name, value in config.items()})


def _to_config(value):
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return keras.saving.serialize_keras_object(value)
    if callable(value):
        raise TypeError(f"only schedules of Keras or this module can be saved; received {value!r}")
    return np.asarray(value).tolist() if value is not None else None


def _from_config(value):
    return keras.saving.deserialize_keras_object(value) if isinstance(value, dict) else value


@keras.saving.register_keras_serializable(package="ch11lib")
class OneCycle(Schedule):
    """1cycle for Keras: the rate, and in its attribute `momentum` the momentum.

    Parameters
    ----------
    peak, steps, start, end, final
        As in `one_cycle`; ``steps = epochs * math.ceil(n / batch_size)``.

    Attributes
    ----------
    momentum : Schedule
        `one_cycle_momentum` from 0.95 to 0.85 and back, for `ScheduledSGD`. For other limits write
        ``Schedule(one_cycle_momentum, steps=steps, high=..., low=...)``.

    Examples
    --------
    >>> cycle = OneCycle(peak=0.4, steps=101)
    >>> cycle([0, 45, 100]), cycle.momentum([0, 45, 100])
    (array([4.e-02, 4.e-01, 4.e-05]), array([0.95, 0.85, 0.95]))
    >>> optimizer = ScheduledSGD(cycle, momentum=cycle.momentum)
    """

    def __init__(
        self,
        peak: float,
        steps: int,
        start: float | None = None,
        end: float | None = None,
        final: float = 0.1,
    ):
        super().__init__(one_cycle, peak=peak, steps=steps, start=start, end=end, final=final)
        self.momentum = Schedule(one_cycle_momentum, steps=steps, final=final)

    def get_config(self):
        """Return what `from_config` needs."""
        return {name: value for name, value in super().get_config().items() if name != "function"}


@keras.saving.register_keras_serializable(package="ch11lib")
class ScheduledSGD(keras.optimizers.SGD):
    """Keras's SGD whose momentum follows a schedule, read anew at each step, inside the graph.

    ``m ← β(t) m - η(t) g, θ ← θ + m``; with Nesterov momentum ``θ ← θ + β(t) m - η(t) g``.

    Parameters
    ----------
    learning_rate : float or schedule
    momentum : keras.optimizers.schedules.LearningRateSchedule
        Such as ``OneCycle(...).momentum``.
    nesterov : bool
    **options
        Other arguments of Keras's SGD.

    Notes
    -----
    For SGD only, as in the papers on 1cycle. Adam's counterpart ``beta_1`` enters its bias
    correction too, which holds for a constant value; use Adam with the rate of `OneCycle` alone.

    Examples
    --------
    >>> constant = Schedule(piecewise, boundaries=[], values=[0.5])
    >>> optimizer, theta = ScheduledSGD(1.0, constant), keras.Variable([0.0])
    >>> for _ in range(2):
    ...     optimizer.apply([tf.constant([1.0])], [theta])
    >>> theta.numpy()
    array([-2.5], dtype=float32)
    """

    def __init__(
        self,
        learning_rate: float | Any = 0.01,
        momentum: Any = None,
        nesterov: bool = False,
        **options: Any,
    ):
        if not isinstance(momentum, keras.optimizers.schedules.LearningRateSchedule):
            raise TypeError(
                "momentum must be a schedule, such as OneCycle(...).momentum (for a number take "
                f"keras.optimizers.SGD); received {momentum!r}"
            )
        # The number only tells Keras that there is a momentum.
        super().__init__(learning_rate, momentum=1.0, nesterov=nesterov, **options)
        self.momentum_schedule = momentum

    def update_step(self, gradient, variable, learning_rate):
        """Do the step for one variable."""
        ops = keras.ops
        rate, beta = (
            ops.cast(number, variable.dtype)
            for number in (learning_rate, self.momentum_schedule(self._iterations))
        )
        change = ops.multiply(ops.cast(gradient, variable.dtype), rate)
        m = self.momentums[self._get_variable_index(variable)]
        self.assign(m, ops.subtract(ops.multiply(m, beta), change))
        self.assign_add(
            variable, ops.subtract(ops.multiply(m, beta), change) if self.nesterov else m
        )

    def get_config(self):
        """Return what `from_config` needs."""
        return super().get_config() | {
            "momentum": keras.saving.serialize_keras_object(self.momentum_schedule)
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Create an optimizer from its configuration."""
        config = config | {"momentum": _from_config(config["momentum"])}
        return super().from_config(config, custom_objects)


class _RecordsRates:
    """What `record_rates` adds to an optimizer class."""

    #: Set by `record_rates` before the optimizer is built.
    _rates_kept = 1

    # Of the optimizer.
    built: bool
    _iterations: Any

    def build(self, variables):
        """Create the optimizer's variables and the record."""
        super().build(variables)
        # One of the optimizer's own variables, which model.fit, `training.fit` and XLA all keep.
        self._record = self.add_variable(
            shape=(self._rates_kept,), initializer="zeros", dtype="float32", name="rates"
        )

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        """Note the rate with which the variables are updated."""
        at = tf.cast(self._iterations.value % self._rates_kept, tf.int32)
        self._record.assign(
            tf.tensor_scatter_nd_update(
                self._record.value, [[at]], [tf.cast(learning_rate, tf.float32)]
            )
        )
        super()._backend_update_step(grads, trainable_variables, learning_rate)

    @property
    def rates(self) -> np.ndarray:
        """The learning rate of each step, float32."""
        if not self.built:
            raise ValueError("nothing has been recorded yet: train the model first")
        steps, record = int(self._iterations.numpy()), self._record.numpy()
        return record[:steps] if steps <= len(record) else np.roll(record, -(steps % len(record)))


def record_rates(optimizer: keras.optimizers.Optimizer, steps: int) -> keras.optimizers.Optimizer:
    """Return an optimizer that does the same and notes the learning rate that each step used.

    The returned optimizer has an attribute ``rates``, an array of one rate per step.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Any Keras optimizer that has not been used yet. It is copied from its configuration.
    steps : int
        How many steps to keep: the last ones, if there are more.

    Returns
    -------
    keras.optimizers.Optimizer
        Of a subclass of the optimizer's class. Cloned and loaded models have a plain one.

    Raises
    ------
    TypeError, ValueError
        If `optimizer` is not a Keras optimizer, is in use already, accumulates gradients or wraps
        other optimizers (wrap the inner one instead); or if `steps` is not positive.

    Examples
    --------
    >>> schedule = Schedule(power, initial=0.5, steps=1)
    >>> optimizer = record_rates(keras.optimizers.SGD(schedule), steps=100)
    >>> theta = keras.Variable(0.0)
    >>> for _ in range(4):
    ...     optimizer.apply([tf.constant(1.0)], [theta])
    >>> optimizer.rates
    array([0.5       , 0.25      , 0.16666667, 0.125     ], dtype=float32)
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "optimizer must be a Keras optimizer, such as keras.optimizers.SGD(0.1); received "
            f"{optimizer!r}"
        )
    _check("steps", steps, low=1, whole=True)
    if _inner_optimizers(optimizer) != [optimizer]:
        raise TypeError(
            f"optimizer must not wrap another one; received a {type(optimizer).__name__}: wrap the "
            "result of record_rates instead"
        )
    if optimizer.built or isinstance(optimizer, _RecordsRates):
        raise ValueError("optimizer must be new; received one that is in use or records already")
    if optimizer.gradient_accumulation_steps:
        raise ValueError(
            "optimizer must update the weights at each step; received gradient_accumulation_steps="
            f"{optimizer.gradient_accumulation_steps}"
        )
    kind = type(optimizer)
    # Under the name of the plain class, so that clones and saved models find that one.
    recording: Any = type(kind.__name__, (_RecordsRates, kind), {"__module__": kind.__module__})
    copy = recording.from_config(optimizer.get_config())
    copy._rates_kept = int(steps)
    return copy


# -------------------------------------------------------------------------------- the range test

#: How many of the first losses, at rates that change nothing yet, make the loss at the start.
_START = 10


@dataclass(frozen=True)
class RangeTest:
    """What `find_learning_rate` has measured.

    Attributes
    ----------
    rates, losses : array, shape (k,)
        The rate of each step, and the loss of its batch before the step.
    smoothed : array, shape (k,)
        Exponential moving average of the losses, free of bias at its beginning.
    diverged_at : float
        The rate at which training diverged and the test stopped; NaN if it did not.
    suggestions : dict of str to float
        See `suggest_rates`; NaN where there is nothing to suggest.
    message : str
        Why there is nothing to suggest and what to change; empty if all went well.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    diverged_at: float
    suggestions: dict[str, float]
    message: str


def find_learning_rate(
    model: keras.Model,
    x: Any,
    y: Any,
    *,
    lowest: float = 1e-6,
    highest: float = 10.0,
    steps: int = 200,
    batch_size: int = 32,
    smoothing: float = 0.9,
    seed: int = 0,
) -> RangeTest:
    """Train for some steps with an exponentially growing rate, and undo it: the range test.

    Step i of k has the rate ``lowest · (highest/lowest)^(i/(k-1))``. The loss of each batch is that
    of this batch alone, computed before its step, not the running mean that Keras shows. The test
    stops when the loss is not finite, or when the smoothed loss exceeds four times the loss at the
    start. Afterwards everything is bit for bit as before: weights, optimizer slots, iterations, the
    rate (also if it is a schedule), metrics and random state.

    Smith (2017), Cyclical learning rates for training neural networks, arXiv:1506.01186.

    Parameters
    ----------
    model : keras.Model
        Compiled. If it or its optimizer is not built yet, it will be, as by a first `fit`.
    x, y : array, or nested structure of arrays
    lowest, highest : float
        The range of rates.
    steps : int
        20 or more, even if this is more than an epoch.
    batch_size : int
        Use that of the training to come: a good rate depends on it.
    smoothing : float
        Weight of the past in the moving average, from 0 to below 1. The average lags behind by
        ``smoothing / (1 - smoothing)`` steps, and so do the suggestions.
    seed : int
        For the order of the examples, that of `training.batch_order`.

    Returns
    -------
    RangeTest

    Examples
    --------
    >>> keras.utils.set_random_seed(0)
    >>> x = np.random.default_rng(0).standard_normal((256, 3))
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.SGD(), "mse")
    >>> test = find_learning_rate(model, x, x @ np.ones((3, 1)))
    >>> test.diverged_at > test.suggestions["minimum"]
    True
    """
    _check_model(model)
    _check("lowest", lowest, positive=True)
    _check("highest", highest, positive=True)
    if not lowest < highest:
        raise ValueError(f"highest must be above lowest; received {highest!r} and {lowest!r}")
    _check("steps", steps, low=2 * _START, whole=True)
    _check("batch_size", batch_size, low=1, whole=True)
    _check("smoothing", smoothing, high=np.nextafter(1.0, 0.0))
    x, y = (keras.tree.map_structure(_data, part) for part in (x, y))
    lengths = {len(part) for part in keras.tree.flatten((x, y))}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"x and y must have one length of at least 1; received lengths {sorted(lengths)}"
        )
    [n] = lengths
    size = min(batch_size, n)
    _build(model, *_examples((x, y), np.arange(min(2, n))))

    # All batches are full: where an epoch ends, the next one begins within the batch.
    epochs = -(-steps * size // n)
    rows = np.concatenate([training.batch_order(n, seed, epoch) for epoch in range(epochs)])
    rates = np.geomspace(lowest, highest, steps)
    losses, smoothed, mean, diverged_at = [], [], 0.0, math.nan
    with _restored(model), _rate_set_by_hand(model) as rate:
        step = _batch_loss(model)
        for i in range(steps):
            rate.assign(rates[i])
            loss = step(*_examples((x, y), rows[i * size : (i + 1) * size]))
            if not np.isfinite(loss):
                diverged_at = float(rates[i])
                break
            losses.append(float(loss))
            mean = smoothing * mean + (1 - smoothing) * losses[-1]
            smoothed.append(mean / (1 - smoothing ** (i + 1)))
            start = np.mean(losses[:_START])
            if i >= _START and smoothed[-1] > start + 3 * abs(start):
                diverged_at = float(rates[i])
                break
    rates = rates[: len(losses)]
    suggestions, message = suggest_rates(rates, losses, smoothed, diverged_at)
    return RangeTest(rates, np.array(losses), np.array(smoothed), diverged_at, suggestions, message)


def suggest_rates(
    rates: ArrayLike, losses: ArrayLike, smoothed: ArrayLike, diverged_at: float = math.nan
) -> tuple[dict[str, float], str]:
    """Read three suggestions off the curve of a range test.

    - ``"steepest"``: where the smoothed loss falls fastest, per factor of the rate.
    - ``"minimum"``: a tenth of the rate at which the smoothed loss is lowest.
    - ``"blow-up"``: a tenth of the rate just before divergence, that is, where the smoothed loss is
      back at its start after the minimum, or the test had to stop.

    They answer different questions. The steepest point is a rate that works at once, a tenth of the
    minimum one to keep, a tenth of the blow-up one to start from or to peak at when it decays.

    Parameters
    ----------
    rates, losses, smoothed, diverged_at
        As in `RangeTest`.

    Returns
    -------
    suggestions : dict of str to float
        NaN for what the curve does not show.
    message : str
        Empty, or what is wrong with the curve: it is flat, has no minimum because it still falls at
        its end, or rises from the beginning. A fall counts if it exceeds the noise of the batches
        one and a half times.

    Examples
    --------
    >>> rates = np.geomspace(1e-4, 1, 201)
    >>> losses = 1 - 0.5 * np.exp(-np.log10(rates / 0.1) ** 2) + np.maximum(0, rates - 0.1)
    >>> suggestions, message = suggest_rates(rates, losses, losses)
    >>> {name: round(rate, 4) for name, rate in suggestions.items()}, message
    ({'steepest': 0.0191, 'minimum': 0.01, 'blow-up': 0.0437}, '')
    """
    rates, losses, smoothed = (np.asarray(a, np.float64) for a in (rates, losses, smoothed))
    for name, array in {"rates": rates, "losses": losses, "smoothed": smoothed}.items():
        if array.ndim != 1 or np.isnan(array).any():
            raise ValueError(
                f"{name} must be a list of numbers; received shape {array.shape}, or NaN"
            )
    found = dict.fromkeys(("steepest", "minimum", "blow-up"), math.nan)
    if len(losses) < 2 * _START:
        return found, f"training diverged at once, at {diverged_at:.3g}: take a smaller lowest rate"
    start = losses[:_START].mean()
    # From differences, which a slow change does not touch, and the median, which no outlier does.
    noise = np.median(np.abs(np.diff(losses))) / (0.6745 * math.sqrt(2))
    bottom = _START + int(np.argmin(smoothed[_START:]))
    if not start - smoothed[bottom] > 1.5 * noise:
        rises = not math.isnan(diverged_at) or smoothed[-1] - start > 1.5 * noise
        return found, (
            "the loss never fell, it only rose: take a smaller lowest rate"
            if rises
            else "the loss hardly changed at any rate: take a larger highest rate, or more steps"
        )
    # Over some steps, because the slope between two neighbours is mostly noise.
    half = min(_START, bottom // 2)
    fall = smoothed[2 * half : bottom + 1] - smoothed[: bottom + 1 - 2 * half]
    found["steepest"] = float(rates[half + np.argmin(fall)])
    back = np.flatnonzero(smoothed[bottom:] >= start)
    blow_up = float(rates[bottom + back[0]]) if back.size else diverged_at
    if math.isnan(blow_up) and not smoothed[-1] - smoothed[bottom] > 1.5 * noise:
        return found, "the loss still fell at the highest rate: take a larger highest rate"
    found["minimum"] = float(rates[bottom]) / 10
    found["blow-up"] = blow_up / 10
    return found, ""


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model; received {type(model).__name__}")
    if not model.compiled or model.optimizer is None:
        raise ValueError("model must be compiled with an optimizer; received one without")
    if isinstance(model.optimizer, keras.optimizers.MultiOptimizer):
        raise ValueError("model must have one optimizer with one rate; received several")


def _data(array):
    array = np.asarray(array)
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise TypeError(
            "x and y must be numeric arrays with an axis of examples; received an array of dtype "
            f"{array.dtype} and shape {array.shape}"
        )
    return array.astype(keras.config.floatx()) if array.dtype.kind == "f" else array


def _examples(data, rows):
    return keras.tree.map_structure(lambda array: tf.constant(array[rows]), data)


def _build(model, x, y):
    """Create all variables, as a first `fit` would, so that there is something to restore."""
    parts = [model, model._compile_loss, *model.metrics]
    if not all(part is None or getattr(part, "built", True) for part in parts):
        y_pred = model(x, training=False)
        model.compute_loss(x=x, y=y, y_pred=y_pred, training=False)
        model.compute_metrics(x, y, y_pred)
        model.reset_metrics()
    if not model.trainable_variables:
        raise ValueError(f"model must have trainable weights; {model.name!r} has none")
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def _batch_loss(model) -> Callable:
    """Return a function that does a step and returns the loss of its batch."""

    def step(x, y):
        model.reset_metrics()  # so that the mean which Keras keeps is that of this batch
        return model.train_step((x, y))["loss"]

    if model.run_eagerly:
        return step
    return tf.function(step, autograph=False, reduce_retracing=True)


@contextlib.contextmanager
def _rate_set_by_hand(model) -> Iterator[tf.Variable]:
    """Let the optimizer read its rate from a variable, whatever it is otherwise."""
    [optimizer] = _inner_optimizers(model.optimizer)
    rate, before = tf.Variable(0.0), optimizer._learning_rate
    optimizer._learning_rate = lambda: rate
    try:
        yield rate
    finally:
        optimizer._learning_rate = before


@contextlib.contextmanager
def _restored(model) -> Iterator[None]:
    """Put back all variables and the random state of Python, NumPy, Keras and TensorFlow."""
    groups = (model.variables, model.optimizer.variables, model.metrics_variables)
    variables = {id(v): v for group in groups for v in group}.values()
    saved = [(v, v.numpy()) for v in variables]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    # Keras makes its generator, from Python's random state, when it first needs one.
    keras_state = keras.src.backend.common.global_state
    keras_generator = keras_state.get_global_attribute("global_seed_generator")
    generators = [tf.random.get_global_generator(), *([keras_generator] if keras_generator else [])]
    saved += [(generator.state, generator.state.numpy()) for generator in generators]
    try:
        yield
    finally:
        for variable, value in saved:
            variable.assign(value)
        keras_state.set_global_attribute("global_seed_generator", keras_generator)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
