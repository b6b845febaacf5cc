"""Initial weights, and how their scale carries a signal through a deep stack.

The first half defines the initializers of the Glorot, He and LeCun families in NumPy: the variance
that each one asks for, and weights drawn from it. Keras has all of them
(`keras.initializers.VarianceScaling`), so there is no Keras part here; the tests hold Keras against
these definitions.

The second half asks what a scale does. `propagate` and `backpropagate` send data and error signals
through random dense layers, `statistics` condenses what they yield into a table, and `mean_field`
predicts that table from integrals alone. The symbols are the same everywhere: a layer computes
``z = h_below @ w + b`` and ``h = f(z)``; ``q`` is the mean square of ``z``, ``sigma_w2`` the number
of inputs times the variance of a weight, ``sigma_b2`` the variance of a bias.

Nothing in this module needs TensorFlow.

References
----------
LeCun, Bottou, Orr, Müller (1998), Efficient BackProp, doi:10.1007/3-540-49430-8_2.
Glorot, Bengio (2010), Understanding the difficulty of training deep feedforward neural networks,
AISTATS, PMLR 9:249-256.
He, Zhang, Ren, Sun (2015), Delving deep into rectifiers, arXiv:1502.01852.
Poole, Lahiri, Raghu, Sohl-Dickstein, Ganguli (2016), Exponential expressivity in deep neural
networks through transient chaos, arXiv:1606.05340.
Schoenholz, Gilmer, Ganguli, Sohl-Dickstein (2017), Deep information propagation, arXiv:1611.01232.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
import functools
import math
from numbers import Real
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, special

__all__ = [
    "TRUNCATED_NORMAL_STD",
    "FixedPoint",
    "Layer",
    "backpropagate",
    "factor_per_layer",
    "fans",
    "fixed_points",
    "gaussian_mean",
    "gradient_factor",
    "limit",
    "mean_correlation",
    "mean_field",
    "names",
    "propagate",
    "sample",
    "simulate",
    "statistics",
    "variance",
    "variance_map",
    "variance_scaling",
]

# ------------------------------------------------------------------ the variance of the weights


class _Scheme(NamedTuple):
    scale: float
    mode: str  # "fan_in", "fan_out", "fan_avg", or "constant" for a variance without a fan in it
    distribution: str


_SCHEMES = {
    "glorot_normal": _Scheme(1.0, "fan_avg", "truncated_normal"),
    "glorot_uniform": _Scheme(1.0, "fan_avg", "uniform"),
    "he_normal": _Scheme(2.0, "fan_in", "truncated_normal"),
    "he_uniform": _Scheme(2.0, "fan_in", "uniform"),
    "lecun_normal": _Scheme(1.0, "fan_in", "truncated_normal"),
    "lecun_uniform": _Scheme(1.0, "fan_in", "uniform"),
    "pytorch_default": _Scheme(1.0 / 3.0, "fan_in", "uniform"),
    "unit_normal": _Scheme(1.0, "constant", "untruncated_normal"),
}

_CUT = 2.0  # Keras's truncated normal redraws whatever lies beyond two standard deviations


def _truncated_normal_std(cut: float) -> float:
    """Return the standard deviation of a standard normal variable kept within ``±cut``.

    With density φ and distribution function Φ the variance is ``1 - 2 c φ(c) / (Φ(c) - Φ(-c))``.
    """
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    inside = special.ndtr(cut) - special.ndtr(-cut)
    return math.sqrt(1 - 2 * cut * density / inside)


#: Standard deviation that is left of a standard normal variable once it is cut off at ±2: 0.8796.
#: A truncated draw is divided by it, so that the variance comes out as announced.
TRUNCATED_NORMAL_STD = _truncated_normal_std(_CUT)


def names() -> tuple[str, ...]:
    """Return the names that `variance`, `limit` and `sample` know.

    ``pytorch_default`` is what ``torch.nn.Linear`` starts from, uniform with variance
    1/(3 fan_in); ``unit_normal`` is N(0, 1), whatever the size of the layer.

    Examples
    --------
    >>> [name for name in names() if name.endswith("_uniform")]
    ['glorot_uniform', 'he_uniform', 'lecun_uniform']
    """
    return tuple(_SCHEMES)


def _scheme(name: str) -> _Scheme:
    if not isinstance(name, str) or name not in _SCHEMES:
        raise ValueError(f"name must be one of {', '.join(_SCHEMES)}; received {name!r}")
    return _SCHEMES[name]


def _scaled_variance(scale: float, mode: str, fan_in: float, fan_out: float) -> float:
    for label, fan in (("fan_in", fan_in), ("fan_out", fan_out)):
        if not fan >= 1:
            raise ValueError(f"{label} must be at least 1; received {fan!r}")
    counts = {
        "fan_in": fan_in,
        "fan_out": fan_out,
        "fan_avg": (fan_in + fan_out) / 2,
        "constant": 1,
    }
    return scale / counts[mode]


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """Count the inputs and outputs that one weight array of this shape connects.

    For a dense kernel ``(inputs, units)`` these are its two sizes. For a convolution kernel
    ``(*window, channels_in, channels_out)`` both channel counts are multiplied by the number of
    positions in the window, because that many inputs feed one output, and the other way round.
    A vector counts its length for both; a scalar counts as 1.

    Parameters
    ----------
    shape : sequence of int
        Shape of the weight array, in Keras's order.

    Returns
    -------
    tuple of int
        ``(fan_in, fan_out)``.

    Examples
    --------
    >>> fans((784, 300)), fans((3, 3, 16, 32))
    ((784, 300), (144, 288))
    """
    shape = tuple(int(size) for size in shape)
    if any(size < 1 for size in shape):
        raise ValueError(f"shape must contain positive sizes only; received {shape}")
    if len(shape) < 2:
        size = shape[0] if shape else 1
        return size, size
    window = math.prod(shape[:-2])
    return window * shape[-2], window * shape[-1]


def variance(name: str, fan_in: float, fan_out: float) -> float:
    """Return the variance of a weight under a named initializer.

    Glorot: ``1 / fan_avg`` with ``fan_avg = (fan_in + fan_out) / 2``. He: ``2 / fan_in``.
    LeCun: ``1 / fan_in``. The normal and the uniform form of a name have the same variance.

    Parameters
    ----------
    name : str
        One of `names()`.
    fan_in, fan_out : int
        Number of inputs and outputs of the layer, see `fans`.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If the name is unknown or a fan is smaller than 1.

    Examples
    --------
    >>> variance("he_normal", 100, 300), variance("glorot_uniform", 100, 300)
    (0.02, 0.005)
    """
    scheme = _scheme(name)
    return _scaled_variance(scheme.scale, scheme.mode, fan_in, fan_out)


def limit(name: str, fan_in: float, fan_out: float) -> float:
    """Return the largest absolute weight that a named initializer can draw.

    A uniform distribution on ``[-r, r]`` has variance ``r² / 3``, hence ``r = sqrt(3 σ²)``. A
    normal distribution that is truncated at two standard deviations and rescaled to variance σ²
    ends at ``2 σ / 0.8796``. Without truncation there is no limit.

    Parameters
    ----------
    name : str
        One of `names()`.
    fan_in, fan_out : int
        Number of inputs and outputs of the layer, see `fans`.

    Returns
    -------
    float
        The limit, ``inf`` for ``unit_normal``.

    Examples
    --------
    >>> round(limit("glorot_uniform", 784, 300), 4), round(limit("pytorch_default", 100, 10), 4)
    (0.0744, 0.1)
    """
    std = math.sqrt(variance(name, fan_in, fan_out))
    widest = {
        "uniform": math.sqrt(3),
        "truncated_normal": _CUT / TRUNCATED_NORMAL_STD,
        "untruncated_normal": math.inf,
    }
    return std * widest[_scheme(name).distribution]


# ---------------------------------------------------------------------------- drawing the weights


def _generator(rng) -> np.random.Generator:
    if rng is None:
        raise TypeError(
            "rng must be an int or a numpy.random.Generator, so that the draw can be repeated; "
            "received None"
        )
    return np.random.default_rng(rng)


def _unit_draw(distribution: str, shape, rng: np.random.Generator, dtype) -> np.ndarray:
    """Draw from one of the three distributions, at mean 0 and variance 1.

    The scale is applied afterwards. So initializers that share a distribution turn the same random
    state into proportional weights, which lets an experiment change the scale and nothing else.
    """
    if distribution == "uniform":
        return math.sqrt(3) * (2 * rng.random(shape, dtype=dtype) - 1)
    draw = rng.standard_normal(shape, dtype=dtype)
    if distribution == "untruncated_normal":
        return draw
    flat = draw.reshape(-1)
    beyond = np.flatnonzero(np.abs(flat) > _CUT)
    while beyond.size:
        flat[beyond] = rng.standard_normal(beyond.size, dtype=dtype)
        beyond = beyond[np.abs(flat[beyond]) > _CUT]
    return draw / TRUNCATED_NORMAL_STD


def _draw_dtype(dtype) -> np.dtype:
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"dtype must be float32 or float64; received {dtype}")
    return dtype


def variance_scaling(
    shape: Sequence[int],
    scale: float = 1.0,
    mode: str = "fan_in",
    distribution: str = "truncated_normal",
    *,
    rng: int | np.random.Generator,
    dtype="float64",
) -> np.ndarray:
    """Draw weights of variance ``scale / n``, where `mode` says what n counts.

    The general form of all the named initializers, with the arguments and defaults of
    `keras.initializers.VarianceScaling`. The defaults are therefore LeCun normal; He needs
    ``scale=2``.

    Parameters
    ----------
    shape : sequence of int
        Shape of the weight array, see `fans`.
    scale : float
        Positive factor.
    mode : {"fan_in", "fan_out", "fan_avg"}
        Whether n is the number of inputs, of outputs, or the mean of both.
    distribution : {"truncated_normal", "untruncated_normal", "uniform"}
        Shape of the distribution; mean 0 and the variance are the same for all three.
    rng : int or numpy.random.Generator
        Source of randomness.
    dtype : {"float64", "float32"}
        Type of the weights.

    Returns
    -------
    numpy.ndarray
        Weights of the given shape.

    Examples
    --------
    >>> w = variance_scaling((784, 50), 2.0, "fan_avg", "uniform", rng=0)
    >>> bool(np.isclose(np.abs(w).max(), (6 / 417) ** 0.5, rtol=1e-3))
    True
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive; received {scale!r}")
    modes = ("fan_in", "fan_out", "fan_avg")
    if mode not in modes:
        raise ValueError(f"mode must be one of {', '.join(modes)}; received {mode!r}")
    distributions = ("truncated_normal", "untruncated_normal", "uniform")
    if distribution not in distributions:
        raise ValueError(
            f"distribution must be one of {', '.join(distributions)}; received {distribution!r}"
        )
    std = math.sqrt(_scaled_variance(scale, mode, *fans(shape)))
    return std * _unit_draw(distribution, shape, _generator(rng), _draw_dtype(dtype))


def sample(
    name: str,
    shape: Sequence[int],
    rng: int | np.random.Generator,
    dtype="float64",
) -> np.ndarray:
    """Draw weights with a named initializer.

    Names that share a distribution give proportional weights from the same `rng`: he_normal is
    sqrt(2) times lecun_normal, number by number.

    Parameters
    ----------
    name : str
        One of `names()`.
    shape : sequence of int
        Shape of the weight array, see `fans`.
    rng : int or numpy.random.Generator
        Source of randomness.
    dtype : {"float64", "float32"}
        Type of the weights.

    Returns
    -------
    numpy.ndarray
        Weights of the given shape.

    Examples
    --------
    >>> he, lecun = (sample(name, (5, 4), rng=0) for name in ("he_normal", "lecun_normal"))
    >>> np.allclose(he, 2**0.5 * lecun)
    True
    """
    std = math.sqrt(variance(name, *fans(shape)))
    return std * _unit_draw(_scheme(name).distribution, shape, _generator(rng), _draw_dtype(dtype))


# ------------------------------------------------------ how a scale travels through depth: measured

#: How the weights (or biases) of one layer are made: a name of `names()`, a number (the standard
#: deviation of a normal distribution), or a function of (shape, rng) that returns the array.
Rule = str | float | Callable[[tuple[int, ...], np.random.Generator], np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One dense layer of a random stack, with the signals that passed through it.

    Attributes
    ----------
    w, b : numpy.ndarray
        Weights ``(inputs, units)`` and biases ``(units,)``.
    z, h : numpy.ndarray
        Pre-activations and outputs, ``(examples, units)``. `h` is what the next layer receives.
    dz, dw : numpy.ndarray or None
        Gradients of the loss with respect to `z` and `w`; None after a forward pass.
    """

    w: np.ndarray
    b: np.ndarray
    z: np.ndarray
    h: np.ndarray
    dz: np.ndarray | None = None
    dw: np.ndarray | None = None


def _inputs(x) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (examples, features); received shape {x.shape}")
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float64)


def _widths(widths) -> list[int]:
    if np.ndim(widths) != 1 or not len(widths) or any(n != int(n) or n < 1 for n in widths):
        raise ValueError(
            "widths must list the number of units of every layer, such as [100] * 10; "
            f"received {widths!r}"
        )
    return [int(n) for n in widths]


def _rules(rules, depth: int, argument: str) -> list[Rule]:
    """One rule for each layer, from one for all or a sequence of them."""
    per_layer = not (isinstance(rules, (str, Real)) or callable(rules))
    rules = list(rules) if per_layer else [rules] * depth
    if len(rules) != depth:
        raise ValueError(
            f"{argument} must be one rule, or one for each of the {depth} layers; "
            f"received {len(rules)}"
        )
    for rule in rules:
        if isinstance(rule, str):
            _scheme(rule)
        elif not callable(rule) and not (isinstance(rule, Real) and 0 <= float(rule) < math.inf):
            raise ValueError(
                f"{argument} must be the name of an initializer, a standard deviation of at least "
                f"0, or a function of (shape, rng); received {rule!r}"
            )
    return rules


def _draw(rule: Rule, shape, fan_in: int, fan_out: int, rng, dtype) -> np.ndarray:
    if isinstance(rule, str):
        std = math.sqrt(variance(rule, fan_in, fan_out))
        return std * _unit_draw(_scheme(rule).distribution, shape, rng, dtype)
    if callable(rule):
        array = np.asarray(rule(shape, rng), dtype)
        if array.shape != shape:
            raise ValueError(
                f"a rule must return an array of the shape that it is given, {shape}; "
                f"received {array.shape}"
            )
        return array
    # A scale of 0 draws nothing, so that leaving the biases out leaves the weights as they are.
    if rule == 0:
        return np.zeros(shape, dtype)
    return float(rule) * _unit_draw("untruncated_normal", shape, rng, dtype)


def propagate(
    x: np.ndarray,
    widths: Sequence[int],
    activation: Callable[[np.ndarray], np.ndarray],
    weights: Rule | Sequence[Rule],
    *,
    rng: int | np.random.Generator,
    biases: Rule | Sequence[Rule] = 0.0,
    connect: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Iterator[Layer]:
    """Send data through a stack of random dense layers, one layer at a time.

    The layers are yielded as they are computed and nothing is kept, so a thousand layers need no
    more memory than one. Wrap the call in ``list`` to keep them, in `statistics` for a table.

    Parameters
    ----------
    x : array of shape (examples, features)
        Input. float32 stays float32, which is faster; everything else is computed in float64.
    widths : sequence of int
        Number of units of each layer: ``[100] * 10`` is ten layers of a hundred.
    activation : callable
        Elementwise function f in ``h = f(z)``, such as `numpy.tanh`.
    weights : rule, or one for every layer
        A name of `names()`, the standard deviation of a normal distribution, or a function of
        ``(shape, rng)`` that returns the weights.
    rng : int or numpy.random.Generator
        Source of randomness. The same seed gives the same random numbers whatever the scale.
    biases : rule, or one for every layer
        As for `weights`, where a name means the distribution that it would give the layer's
        weights. 0, the default, leaves them out.
    connect : callable, optional
        ``connect(below, h)`` returns what a layer passes on, given what it received and computed:
        ``lambda below, h: below + h`` adds a skip connection, a function of `h` alone can drop
        units. Default: h itself.

    Yields
    ------
    Layer
        With `w`, `b`, `z` and `h` set.

    Raises
    ------
    ValueError
        If an argument has the wrong shape or names an unknown initializer.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((500, 100))
    >>> [round(float(layer.h.std()), 1) for layer in propagate(x, [100] * 3, np.tanh, 1.0, rng=1)]
    [1.0, 1.0, 1.0]
    """
    x, widths, rng = _inputs(x), _widths(widths), _generator(rng)
    w_rules, b_rules = (
        _rules(weights, len(widths), "weights"),
        _rules(biases, len(widths), "biases"),
    )

    def layers() -> Iterator[Layer]:
        h = x
        for n_out, w_rule, b_rule in zip(widths, w_rules, b_rules, strict=True):
            below, n_in = h, h.shape[1]
            w = _draw(w_rule, (n_in, n_out), n_in, n_out, rng, x.dtype)
            b = _draw(b_rule, (n_out,), n_in, n_out, rng, x.dtype)
            z = below @ w + b
            h = activation(z) if connect is None else connect(below, activation(z))
            yield Layer(w, b, z, h)

    return layers()


def backpropagate(
    x: np.ndarray,
    widths: Sequence[int],
    activation: Callable[[np.ndarray], np.ndarray],
    weights: Rule | Sequence[Rule],
    *,
    derivative: Callable[[np.ndarray], np.ndarray],
    rng: int | np.random.Generator,
    biases: Rule | Sequence[Rule] = 0.0,
    output_gradient: np.ndarray | None = None,
) -> list[Layer]:
    """Send data up through a stack of random dense layers and an error signal back down.

    With ``δ = dL/dz`` of a layer, the recursion is ``δ_below = (δ @ w.T) * f'(z_below)`` and the
    weights receive ``dL/dw = h_below.T @ δ``, summed over the examples.

    Parameters
    ----------
    x, widths, activation, weights, rng, biases
        As for `propagate`; the same arguments give the same layers.
    derivative : callable
        The derivative f' of `activation`, elementwise.
    output_gradient : array, optional
        Gradient of the loss with respect to the last layer's output; anything that broadcasts to
        ``(examples, widths[-1])``. Default: standard normal random numbers, which is the loss
        ``sum(g * h)`` with random g.

    Returns
    -------
    list of Layer
        From the first layer to the last, with `dz` and `dw` set. All of them are kept, which takes
        ``depth * (3 * examples * width + 2 * width**2)`` numbers. The gradient with respect to
        the input is ``layers[0].dz @ layers[0].w.T``.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((50, 20))
    >>> relu, step = lambda z: np.maximum(z, 0), lambda z: z > 0
    >>> layers = backpropagate(x, [20, 30, 10], relu, "he_normal", derivative=step, rng=1)
    >>> [layer.dz.shape for layer in layers], layers[1].dw.shape
    ([(50, 20), (50, 30), (50, 10)], (20, 30))
    """
    rng = _generator(rng)
    x = _inputs(x)
    layers = list(propagate(x, widths, activation, weights, rng=rng, biases=biases))
    top = layers[-1].h
    if output_gradient is None:
        gradient = rng.standard_normal(top.shape, dtype=top.dtype)
    else:
        try:
            gradient = np.broadcast_to(np.asarray(output_gradient, top.dtype), top.shape)
        except ValueError:
            raise ValueError(
                f"output_gradient must broadcast to (examples, units) = {top.shape}; "
                f"received shape {np.shape(output_gradient)}"
            ) from None
    done = []
    for below, layer in zip([x, *(lower.h for lower in layers)][-2::-1], layers[::-1], strict=True):
        dz = gradient * derivative(layer.z)
        done.append(Layer(layer.w, layer.b, layer.z, layer.h, dz, below.T @ dz))
        gradient = dz @ layer.w.T
    return done[::-1]


def statistics(layers: Iterable[Layer], **extra: Callable[[Layer], float]) -> pd.DataFrame:
    """Condense a stack into a table with one row for each layer.

    Parameters
    ----------
    layers : iterable of Layer
        From `propagate` or `backpropagate`.
    **extra : callable
        More columns: each is called with a `Layer` and returns a number.

    Returns
    -------
    pandas.DataFrame
        Index ``layer``, counted from 1. Mean and standard deviation over all examples and units:
        ``z_mean``, ``z_std``, ``h_mean``, ``h_std``; the mean square of h, ``h_mean_square``; the
        share of units that output exactly 0 for every example, ``dead``. After a backward pass
        also the root mean square of dL/dz, ``dz_rms``, and the Euclidean norms of the weights and
        their gradient, ``w_norm`` and ``dw_norm``.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((500, 100))
    >>> table = statistics(
    ...     propagate(x, [100] * 10, np.tanh, 1.0, rng=1),
    ...     saturated=lambda layer: np.mean(np.abs(layer.z) > 2),
    ... )
    >>> table[["h_std", "saturated"]].round(1).drop_duplicates().values.tolist()
    [[1.0, 0.8]]
    """
    rows = []
    for layer in layers:
        row = {
            "z_mean": layer.z.mean(dtype=np.float64),
            "z_std": layer.z.std(dtype=np.float64),
            "h_mean": layer.h.mean(dtype=np.float64),
            "h_std": layer.h.std(dtype=np.float64),
        }
        row["h_mean_square"] = row["h_mean"] ** 2 + row["h_std"] ** 2
        row["dead"] = np.mean(~layer.h.any(axis=0))
        if layer.dz is not None and layer.dw is not None:
            row["dz_rms"] = np.linalg.norm(layer.dz) / math.sqrt(layer.dz.size)
            row["w_norm"] = np.linalg.norm(layer.w)
            row["dw_norm"] = np.linalg.norm(layer.dw)
        rows.append(row | {name: function(layer) for name, function in extra.items()})
    table = pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="layer"))
    return table.astype(np.float64)


def simulate(
    activation: Callable[[np.ndarray], np.ndarray],
    weights: Rule | Sequence[Rule],
    *,
    seeds: Iterable[int],
    width: int = 100,
    depth: int = 10,
    examples: int = 100,
    biases: Rule | Sequence[Rule] = 0.0,
    derivative: Callable[[np.ndarray], np.ndarray] | None = None,
    **extra: Callable[[Layer], float],
) -> pd.DataFrame:
    """Measure one kind of random network with several seeds, on standard normal inputs.

    Parameters
    ----------
    activation, weights, biases
        As for `propagate`.
    seeds : iterable of int
        Each gives other inputs and other weights; the same in every call.
    width, depth, examples : int
        Units of each layer (and features of the input), layers, rows of the input.
    derivative : callable, optional
        Derivative of the activation; with it an error signal is sent back, see `backpropagate`.
    **extra : callable
        More columns, as for `statistics`.

    Returns
    -------
    pandas.DataFrame
        The tables of `statistics`, index ``(seed, layer)``: ``table.h_std.unstack()`` has a row
        for each seed and a column for each layer.

    Examples
    --------
    >>> table = simulate(np.tanh, "glorot_normal", seeds=range(3), depth=20)
    >>> table.h_mean_square.unstack().shape
    (3, 20)
    """
    tables = {}
    for seed in seeds:
        rng = _generator(seed)
        x, widths = rng.standard_normal((examples, width)), [width] * depth
        if derivative is None:
            layers = propagate(x, widths, activation, weights, rng=rng, biases=biases)
        else:
            layers = backpropagate(
                x, widths, activation, weights, rng=rng, biases=biases, derivative=derivative
            )
        tables[seed] = statistics(layers, **extra)
    if not tables:
        raise ValueError("seeds must hold at least one seed, got none")
    return pd.concat(tables, names=["seed"])


def factor_per_layer(values: Sequence[float] | np.ndarray) -> float | np.ndarray:
    """Return the constant factor that leads from the first value to the last, step by step.

    The geometric mean of the ratios of neighbours. For a quantity that travels downwards, such as
    ``dz_rms``, pass it in the order of travel: ``factor_per_layer(table.dz_rms[::-1])``, or
    ``factor_per_layer(table.dz_rms.unstack().iloc[:, ::-1])`` for the seeds of `simulate`.

    Parameters
    ----------
    values : array of shape (..., layers)
        Positive numbers, of at least two layers.

    Returns
    -------
    float or numpy.ndarray
        One factor for each leading index.

    Examples
    --------
    >>> factor_per_layer([8.0, 3.0, 2.0])
    0.5
    >>> factor_per_layer([[8.0, 3.0, 2.0], [1.0, 7.0, 9.0]])
    array([0.5, 3. ])
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim < 1 or values.shape[-1] < 2 or not values.size or not (values > 0).all():
        raise ValueError(
            "values must be two or more positive numbers, along the last axis; "
            f"received {values.tolist()}"
        )
    factors = (values[..., -1] / values[..., 0]) ** (1 / (values.shape[-1] - 1))
    return float(factors) if values.ndim == 1 else factors


def mean_correlation(h: np.ndarray) -> float:
    """Return the mean correlation between the signals of different examples.

    Near 0 the layer tells its inputs apart, near 1 they all look alike.

    Parameters
    ----------
    h : array of shape (examples, units)
        Signals of one layer, two or more examples.

    Returns
    -------
    float
        Mean of the correlation coefficients over all pairs of different rows.

    Examples
    --------
    >>> round(mean_correlation(np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 2.0, 1.0]])), 3)
    -0.333
    """
    h = _inputs(h)
    if len(h) < 2:
        raise ValueError(f"h must hold two or more examples; received shape {h.shape}")
    correlations = np.corrcoef(h)
    return float(correlations[~np.eye(len(h), dtype=bool)].mean())


# ----------------------------------------------------- how a scale travels through depth: predicted

# Where the activations in use have their corners. Panels that end there integrate them exactly.
_CORNERS = (0.5, 1.0, 3.0, 6.0)


@functools.cache
def _legendre(order: int = 20) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(order)


def gaussian_mean(g: Callable[[np.ndarray], np.ndarray], q: float | np.ndarray) -> np.ndarray:
    """Integrate g over normal distributions of mean 0 and variance q: ``E[g(z)], z ~ N(0, q)``.

    Gauss-Legendre quadrature on panels that double in width away from 0. They resolve both scales,
    that of g and that of the distribution, and 0 is an end point, so ReLU's corner costs nothing;
    Gauss-Hermite would lose several digits there. Corners at ±1/2, ±1, ±3 and ±6 are end points
    too; at any other corner or jump of g a few digits are lost. Far from 0 g must be smooth, as
    activations are: oscillations there are not resolved.

    Parameters
    ----------
    g : callable
        Elementwise function of an array. It is evaluated once, for all q together.
    q : float or array
        Variances, positive or 0.

    Returns
    -------
    float or numpy.ndarray
        Of the shape of q.

    Examples
    --------
    >>> np.round(gaussian_mean(lambda z: np.maximum(z, 0) ** 2, np.array([1.0, 6.0])), 12)
    array([0.5, 3. ])
    """
    q = np.asarray(q, dtype=np.float64)
    if not ((q >= 0) & np.isfinite(q)).all():
        raise ValueError(f"q must be finite and not negative; received {q}")
    # Variance 0 is a point mass; it is set apart because it has no density.
    std = np.sqrt(q[q > 0])
    result = np.empty(q.shape)
    result[q == 0] = np.asarray(g(np.zeros(1)), dtype=np.float64)[0]
    if std.size:
        reach = 12 * std.max()  # beyond it the density is below 1e-31 of its peak
        doublings = math.ceil(math.log2(reach / (min(std.min(), 1.0) / 8)))
        edges = reach * 0.5 ** np.arange(doublings + 1)
        edges = np.unique([0.0, *edges, *(c for c in _CORNERS if c < reach)])
        nodes, node_weights = _legendre()
        half = np.diff(edges) / 2
        z = (edges[:-1, None] + half[:, None] * (nodes + 1)).ravel()
        dz = (half[:, None] * node_weights).ravel()
        both_sides = (np.asarray(g(z), np.float64) + np.asarray(g(-z), np.float64)) * dz
        scaled = z / std[:, None]
        density = np.exp(-(scaled**2) / 2) / (math.sqrt(2 * math.pi) * std[:, None])
        result[q > 0] = density @ both_sides
    return result[()]


def variance_map(
    activation: Callable[[np.ndarray], np.ndarray],
    q: float | np.ndarray,
    sigma_w2: float,
    sigma_b2: float = 0.0,
) -> float | np.ndarray:
    """Return the variance of a layer's pre-activations from that of the layer below.

    ``q -> sigma_w2 * E[f(z)²] + sigma_b2`` with ``z ~ N(0, q)``: exact in the limit of wide layers
    (Poole et al. 2016).

    Parameters
    ----------
    activation : callable
        Elementwise function f.
    q : float or array
        Variance of the pre-activations z of one layer.
    sigma_w2 : float
        Number of inputs times variance of a weight: ``n * variance(name, n, n)``.
    sigma_b2 : float
        Variance of a bias.

    Returns
    -------
    float or numpy.ndarray
        Variance of the pre-activations one layer up, of the shape of q.

    Examples
    --------
    >>> relu = lambda z: np.maximum(z, 0)
    >>> round(float(variance_map(relu, 3.0, sigma_w2=2.0)), 12)  # He weights keep any variance
    3.0
    """
    _check_variances(sigma_w2, sigma_b2)
    return sigma_w2 * gaussian_mean(lambda z: np.square(activation(z)), q) + sigma_b2


def gradient_factor(
    derivative: Callable[[np.ndarray], np.ndarray],
    q: float | np.ndarray,
    sigma_w2: float,
) -> float | np.ndarray:
    """Return the factor by which the size of dL/dz changes from one layer to the one below.

    ``sqrt(sigma_w2 * E[f'(z)²])`` with ``z ~ N(0, q)`` (Schoenholz et al. 2017, where its square is
    called χ). Below 1 gradients vanish, above 1 they explode.

    Parameters
    ----------
    derivative : callable
        Elementwise derivative f' of the activation.
    q : float or array
        Variance of the pre-activations.
    sigma_w2 : float
        Number of units that the error signal comes from, times variance of a weight.

    Returns
    -------
    float or numpy.ndarray
        Of the shape of q.

    Examples
    --------
    >>> round(float(gradient_factor(lambda z: z > 0, 1.0, sigma_w2=2.0)), 12)
    1.0
    """
    _check_variances(sigma_w2, 0.0)
    slope = gaussian_mean(lambda z: np.square(np.asarray(derivative(z), np.float64)), q)
    return np.sqrt(sigma_w2 * slope)


def _check_variances(sigma_w2: float, sigma_b2: float) -> None:
    for label, value in (("sigma_w2", sigma_w2), ("sigma_b2", sigma_b2)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{label} must be finite and not negative; received {value!r}")


class FixedPoint(NamedTuple):
    """A variance that `variance_map` returns unchanged.

    Attributes
    ----------
    q : float
        The variance.
    slope : float
        Derivative of the map there. Variances near q approach it with depth if it is below 1 and
        leave it if it is above.
    """

    q: float
    slope: float


def fixed_points(
    activation: Callable[[np.ndarray], np.ndarray],
    sigma_w2: float,
    sigma_b2: float = 0.0,
    *,
    between: tuple[float, float] = (1e-6, 1e6),
) -> list[FixedPoint]:
    """Find the variances at which a deep stack can settle.

    Searches for isolated crossings of `variance_map` with the diagonal. There need not be any:
    with Glorot weights tanh fades towards 0 for ever, and for ReLU with He weights *every* variance
    is kept, so that none is isolated.

    Parameters
    ----------
    activation, sigma_w2, sigma_b2
        As for `variance_map`.
    between : tuple of float
        Search range, both ends positive.

    Returns
    -------
    list of FixedPoint
        In ascending order, possibly empty.

    Examples
    --------
    >>> [point] = fixed_points(np.tanh, sigma_w2=2.0)
    >>> round(point.q, 3), point.slope < 1
    (0.618, True)
    """
    low, high = between
    if not 0 < low < high < math.inf:
        raise ValueError(f"between must be two positive numbers in order; received {between!r}")

    def growth(log_q):
        q = np.exp(log_q)
        return variance_map(activation, q, sigma_w2, sigma_b2) / q - 1

    grid = np.linspace(math.log(low), math.log(high), 241)
    at_grid = growth(grid)
    # What lies within the accuracy of the quadrature has no sign: He weights keep ReLU's variance.
    signed = np.flatnonzero(np.abs(at_grid) > 1e-9)
    crossings = np.flatnonzero(np.diff(np.sign(at_grid[signed])))
    points, step = [], 1e-4
    for left, right in zip(signed[crossings], signed[crossings + 1], strict=True):
        log_q = optimize.brentq(growth, grid[left], grid[right], xtol=1e-13)
        slope = 1 + (growth(log_q + step) - growth(log_q - step)) / (2 * step)
        points.append(FixedPoint(math.exp(log_q), float(slope)))
    return points


def mean_field(
    x: np.ndarray,
    widths: Sequence[int],
    activation: Callable[[np.ndarray], np.ndarray],
    weights: str | float | Sequence[str | float],
    *,
    derivative: Callable[[np.ndarray], np.ndarray] | None = None,
    biases: str | float | Sequence[str | float] = 0.0,
) -> pd.DataFrame:
    """Predict what `statistics` will measure, without drawing a single weight.

    Takes the arguments of `propagate` and iterates `variance_map` from the mean square of the
    input upwards; with the derivative, also the size of dL/dz from the top downwards, for the
    standard normal output gradient that `backpropagate` uses by default. Valid for wide layers.

    Parameters
    ----------
    x : array of shape (examples, features)
        Input; only its mean square and number of features matter.
    widths : sequence of int
        Number of units of each layer.
    activation : callable
        Elementwise function f.
    weights, biases
        As for `propagate`, but only names and numbers: a function has no known variance.
    derivative : callable, optional
        Elementwise derivative f'.

    Returns
    -------
    pandas.DataFrame
        Index ``layer``, counted from 1, with columns named as in `statistics`: ``z_mean`` (0),
        ``z_std``, ``h_mean``, ``h_std``, ``h_mean_square`` and, given the derivative, ``dz_rms``.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((500, 400))
    >>> told = mean_field(x, [400] * 5, np.tanh, "glorot_normal")
    >>> seen = statistics(propagate(x, [400] * 5, np.tanh, "glorot_normal", rng=0))
    >>> bool(np.allclose(told.h_std, seen.h_std, rtol=0.03))
    True
    """
    x, widths = _inputs(x), _widths(widths)
    depth = len(widths)
    fan_ins = [x.shape[1], *widths[:-1]]

    def variances(rules, argument):
        rules = _rules(rules, depth, argument)
        if any(callable(rule) for rule in rules):
            raise ValueError(
                f"{argument} must be names or numbers here; a function has no known variance"
            )
        return [
            variance(rule, *sizes) if isinstance(rule, str) else rule**2
            for rule, *sizes in zip(rules, fan_ins, widths, strict=True)
        ]

    w_variances, b_variances = variances(weights, "weights"), variances(biases, "biases")
    q, rows = [], []
    mean_square = np.mean(np.square(x, dtype=np.float64))
    for fan_in, w_variance, b_variance in zip(fan_ins, w_variances, b_variances, strict=True):
        q.append(fan_in * w_variance * mean_square + b_variance)
        mean = float(gaussian_mean(activation, q[-1]))
        mean_square = float(variance_map(activation, q[-1], 1.0))
        # Rounding can leave a variance just below 0 where f is flat.
        h_std = math.sqrt(max(mean_square - mean**2, 0.0))
        rows.append((0.0, math.sqrt(q[-1]), mean, h_std, mean_square))
    columns = ["z_mean", "z_std", "h_mean", "h_std", "h_mean_square"]
    index = pd.RangeIndex(1, depth + 1, name="layer")
    table = pd.DataFrame(rows, columns=columns, index=index, dtype=np.float64)
    if derivative is not None:
        # dL/dh is the output gradient at the top and dz @ w.T below, summed over the units above.
        above = [n * w for n, w in zip(widths[1:], w_variances[1:], strict=True)] + [1.0]
        factors = [float(gradient_factor(derivative, *pair)) for pair in zip(q, above, strict=True)]
        table["dz_rms"] = np.cumprod(factors[::-1])[::-1]
    return table
