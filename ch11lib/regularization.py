"""Regularization: penalties, dropout and its relatives, max-norm, calibration, fair comparisons.

First the definitions in NumPy. Then the Monte Carlo layers for Keras, with the conversion of
trained models. Last a fleet of networks that differ in their regularization and in nothing else:
every method is a number of the same graph, so that data, order, steps and code are common to all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
import itertools
import numbers
from typing import Any

from ch11lib import datasets, training
from ch11lib.backend import keras, tf
import numpy as np
from numpy.typing import ArrayLike
import pandas as pd
from scipy import optimize, special, stats

__all__ = [
    "MCAlphaDropout",
    "MCDropout",
    "RegularizedFleet",
    "alpha_dropout",
    "auroc",
    "calibration",
    "calibration_error",
    "compare",
    "crossed_interval",
    "dropout",
    "entropy",
    "max_norm",
    "mc_model",
    "mc_predict",
    "mutual_information",
    "negative_log_likelihood",
    "penalty",
    "temperature",
]

# ------------------------------------------------------------------------------ the definitions

# SELU's value far to the left, -scale * alpha, to which alpha dropout sets what it drops.
_SELU_FLOOR = -1.0507009873554805 * 1.6732632423543772


def penalty(weights: ArrayLike | Sequence[ArrayLike], *, l1: float = 0.0, l2: float = 0.0) -> float:
    """Return ``l1 * sum(abs(w)) + l2 * sum(w**2)``, without a factor of one half.

    Parameters
    ----------
    weights : array or list of arrays
    l1, l2 : float
        Strengths, at least 0.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If a strength is negative or not finite.

    Examples
    --------
    >>> penalty([[3.0, -4.0]], l2=0.5), penalty([[3.0, -4.0]], l1=0.5)
    (12.5, 3.5)
    """
    l1, l2 = _strength("l1", l1), _strength("l2", l2)
    parts = weights if isinstance(weights, list | tuple) else [weights]
    arrays = [np.asarray(w, np.float64) for w in parts]
    if any(np.isnan(w).any() for w in arrays):
        raise ValueError("weights must be numbers, received NaN or None")
    return float(sum(l1 * np.abs(w).sum() + l2 * np.square(w).sum() for w in arrays))


def dropout(x: ArrayLike, p: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Drop each element with probability p, and divide the others by 1 - p.

    Parameters
    ----------
    x : array
        Activations, any shape.
    p : float
        Probability to drop, in [0, 1).
    rng : numpy.random.Generator

    Returns
    -------
    out, mask : arrays of the shape of `x`
        ``out = x * mask / (1 - p)``, whose mean over the masks is `x`.

    Raises
    ------
    ValueError
        If `p` is outside [0, 1).

    References
    ----------
    Srivastava et al. (2014), Dropout: A Simple Way to Prevent Neural Networks from Overfitting,
    JMLR 15, 1929-1958.

    Examples
    --------
    >>> out, mask = dropout(np.ones(4), 0.5, np.random.default_rng(0))
    >>> out, mask
    (array([2., 0., 0., 0.]), array([ True, False, False, False]))
    """
    p, x = _probability(p), np.asarray(x)
    mask = rng.random(x.shape) >= p
    return x * mask / (1 - p), mask


def alpha_dropout(x: ArrayLike, p: float, rng: np.random.Generator) -> np.ndarray:
    """Set each element to SELU's floor with probability p; then restore mean 0 and variance 1.

    Parameters
    ----------
    x : array
        Activations, any shape, with mean 0 and variance 1 for the restoring to be exact.
    p : float
        Probability to drop, in [0, 1).
    rng : numpy.random.Generator

    Returns
    -------
    numpy.ndarray
        ``a * (x * mask + floor * (1 - mask)) + b`` with ``floor = -scale * alpha`` of SELU.

    Raises
    ------
    ValueError
        If `p` is outside [0, 1).

    References
    ----------
    Klambauer et al. (2017), Self-Normalizing Neural Networks, arXiv:1706.02515.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> out = alpha_dropout(rng.standard_normal(100_000), 0.2, rng)
    >>> bool(abs(out.mean()) < 0.02), bool(abs(out.std() - 1) < 0.02)
    (True, True)
    """
    p, x = _probability(p), np.asarray(x)
    mask = rng.random(x.shape) >= p
    a, b = _alpha_affine(p)
    return a * np.where(mask, x, _SELU_FLOOR) + b


def _alpha_affine(p):
    """Return the factor and the shift after which mean 0 and variance 1 are as before."""
    a = ((1 - p) * (1 + p * _SELU_FLOOR**2)) ** -0.5
    return a, -a * p * _SELU_FLOOR


def max_norm(w: ArrayLike, r: float, axis: int | Sequence[int] = 0) -> np.ndarray:
    """Scale incoming weights down to l2 norm `r`, where they exceed it.

    Parameters
    ----------
    w : array
        A kernel. Dense: ``(inputs, units)``.
    r : float
        Largest norm allowed, above 0.
    axis : int or sequence of int
        The axes over which a unit's incoming weights extend: 0 for Dense, ``(0, 1, 2)`` for Conv2D.

    Returns
    -------
    numpy.ndarray
        ``w * min(1, r / norm)``; what keeps the limit is not changed.

    Raises
    ------
    ValueError
        If `r` is not above 0, or an axis does not exist.

    References
    ----------
    Srivastava et al. (2014), as for `dropout`, section 5.1.

    Examples
    --------
    >>> max_norm([[3.0, 0.3], [4.0, 0.4]], r=1.0)
    array([[0.6, 0.3],
           [0.8, 0.4]])
    """
    r = _number("r", r)
    if not r > 0:
        raise ValueError(f"r must be above 0, received {r}")
    w, axis = np.asarray(w), tuple(np.atleast_1d(axis))
    if any(not -w.ndim <= a < w.ndim for a in axis):
        raise ValueError(f"axis must name axes of w, whose shape is {w.shape}, received {axis}")
    norm = np.sqrt(np.square(w).sum(axis=axis, keepdims=True))
    return w * np.where(norm > r, r / np.where(norm > r, norm, 1), 1)


# -------------------------------------------------------------------------------- Monte Carlo


@keras.saving.register_keras_serializable("ch11lib")
class MCDropout(keras.layers.Dropout):
    """Dropout that stays active after training. Arguments as for `keras.layers.Dropout`.

    References
    ----------
    Gal, Ghahramani (2016), Dropout as a Bayesian Approximation, arXiv:1506.02142.

    Examples
    --------
    >>> bool((np.asarray(MCDropout(0.5, seed=1)(np.ones((1, 100)))) == 0).any())
    True
    """

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Drop, whether in training or not."""
        return super().call(inputs, training=True)


@keras.saving.register_keras_serializable("ch11lib")
class MCAlphaDropout(keras.layers.AlphaDropout):
    """Alpha dropout that stays active after training; see `MCDropout`.

    Examples
    --------
    >>> MCAlphaDropout(0.1).rate
    0.1
    """

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Drop, whether in training or not."""
        return super().call(inputs, training=True)


_MC_LAYERS = {keras.layers.Dropout: MCDropout, keras.layers.AlphaDropout: MCAlphaDropout}


def mc_model(model: keras.Model) -> keras.Model:
    """Return a copy of a trained model whose dropout stays active.

    Parameters
    ----------
    model : keras.Model
        Sequential or functional, and built. It is not changed. Models inside it are converted too.

    Returns
    -------
    keras.Model
        With layers, weights and random state of its own: later training of either model does not
        touch the other. It is not compiled.

    Raises
    ------
    TypeError
        If `model` is no Keras model, or a subclassed one.
    ValueError
        If it is not built, has no Dropout or AlphaDropout with a rate above 0, or has dropout that
        cannot be converted: another variant, or inside a recurrent, attention or wrapper layer.

    Examples
    --------
    >>> layers = [keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(2)]
    >>> [type(layer).__name__ for layer in mc_model(keras.Sequential(layers)).layers]
    ['MCDropout', 'Dense']
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, received {type(model).__name__}")
    _check_connected(model)
    if not model.built:
        raise ValueError(f"model must be built: begin {model.name!r} with keras.Input")
    copy = _converted(model)
    if not _noisy(copy):
        raise ValueError(
            f"model must have a Dropout or AlphaDropout layer with a rate above 0, {model.name!r} "
            "has none"
        )
    return copy


def _check_connected(model):
    if not (isinstance(model, keras.Sequential) or hasattr(model, "_nodes")):
        raise TypeError(
            "model must be Sequential or functional, because only these say how their layers are "
            f"connected; received the subclassed model {type(model).__name__}"
        )


def _converted(model):
    _check_connected(model)

    def clone(layer):
        if isinstance(layer, keras.Model):
            return _converted(layer)
        kind = _MC_LAYERS.get(type(layer), type(layer))
        if kind is type(layer):
            _check_silent(layer)
        # A function that is in memory already is no danger, as one from a file would be.
        known = {"safe_mode": False} if isinstance(layer, keras.layers.Lambda) else {}
        return kind.from_config(layer.get_config(), **known)

    copy = keras.models.clone_model(model, clone_function=clone)
    copy.set_weights(model.get_weights())
    return copy


def _check_silent(layer):
    """Raise ValueError if a layer that is copied as it is would drop in training only."""
    for part in (layer, *layer._flatten_layers(include_self=False)):
        if isinstance(part, MCDropout | MCAlphaDropout):
            continue
        named = "Dropout" in type(part).__name__ or isinstance(part, tuple(_MC_LAYERS))
        rates = [getattr(part, name, 0) for name in ("dropout", "recurrent_dropout")]
        if (named and getattr(part, "rate", 1)) or any(isinstance(r, float) and r for r in rates):
            raise ValueError(
                "model must have no dropout but layers Dropout and AlphaDropout, layer "
                f"{layer.name!r} ({type(layer).__name__}) has dropout of another kind, or inside"
            )


def _noisy(model):
    """Return the layers that stay active."""
    layers = model._flatten_layers(include_self=False)
    return [v for v in layers if isinstance(v, MCDropout | MCAlphaDropout) and v.rate > 0]


def mc_predict(
    model: keras.Model,
    x: ArrayLike,
    passes: int = 100,
    seed: int | None = None,
    *,
    logits: bool = False,
    rows: int = 8192,
) -> np.ndarray:
    """Return the outputs of many passes with active dropout.

    The passes are rows of the same batch: every row gets a mask of its own.

    Parameters
    ----------
    model : keras.Model
        With `MCDropout` or `MCAlphaDropout` layers, see `mc_model`; with one input and one output.
        All other layers, batch normalization too, are in inference mode. Model and random state
        are left as they were.
    x : array, shape (n, ...)
    passes : int
    seed : int, optional
        Of the masks, which also depend on `rows`; default a new one at each call.
    logits : bool
        Whether the model returns logits: then their softmax is returned.
    rows : int
        Most rows at a time, copies counted: it limits the memory beside that of the result.

    Returns
    -------
    numpy.ndarray, shape (passes, n, classes)
        In single precision at least, so that means over the passes can be trusted.

    Raises
    ------
    ValueError
        If `passes` or `rows` is not a positive integer, `x` is empty, no layer of the model is
        active in inference, or it has several inputs or outputs.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((4,)), MCDropout(0.5), keras.layers.Dense(2)])
    >>> mc_predict(model, np.ones((3, 4)), passes=5, seed=0).shape
    (5, 3, 2)
    """
    for name, value in {"passes": passes, "rows": rows}.items():
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} must be a positive integer, received {value!r}")
    if not (noisy := _noisy(model)):
        raise ValueError(
            "model must have an MCDropout or MCAlphaDropout layer with a rate above 0: convert it "
            "with mc_model"
        )
    ends = [getattr(model, name, None) or [x] for name in ("inputs", "outputs")]
    if max(map(len, ends)) > 1:
        raise ValueError(f"model must have one input and one output, has {[*map(len, ends)]}")
    x = np.asarray(x)
    if not len(x):
        raise ValueError("x must not be empty")
    rng, states = np.random.default_rng(seed), [layer.seed_generator.state for layer in noisy]
    kept = [state.numpy().copy() for state in states]
    try:
        for state, old in zip(states, kept, strict=True):
            state.assign(rng.integers(2**31, size=old.shape).astype(old.dtype))
        parts = [x[i : i + rows] for i in range(0, len(x), rows)]
        result = np.concatenate([_passes(model, part, passes, rows) for part in parts], axis=1)
    finally:
        for state, old in zip(states, kept, strict=True):
            state.assign(old)
    return special.softmax(result, axis=-1) if logits else result


def _passes(model, x, passes, rows):
    """Return the outputs of all passes for not more than `rows` examples."""
    outputs, at_once = [], rows // len(x)
    for start in range(0, passes, at_once):
        times = min(at_once, passes - start)
        out = keras.ops.convert_to_numpy(model(np.concatenate([x] * times), training=False))
        out = out.astype(np.result_type(out.dtype, np.float32))
        outputs.append(out.reshape(times, len(x), *out.shape[1:]))
    return np.concatenate(outputs)


# -------------------------------------------------------------------------------- calibration


def negative_log_likelihood(probabilities: ArrayLike, y: ArrayLike) -> float:
    """Return the mean of ``-log(probability of the true class)``; 0 is counted as 1e-12.

    Examples
    --------
    >>> round(negative_log_likelihood([[0.5, 0.5], [0.25, 0.75]], [0, 1]), 3)
    0.49
    """
    probabilities, y = _predictions(probabilities, y)
    return float(-np.log(np.maximum(probabilities[np.arange(len(y)), y], 1e-12)).mean())


def calibration(probabilities: ArrayLike, y: ArrayLike, bins: int = 10) -> pd.DataFrame:
    """Return the reliability diagram: for bins of equal width, how sure and how often right.

    Parameters
    ----------
    probabilities : array, shape (n, classes)
    y : array of int, shape (n,)
    bins : int

    Returns
    -------
    pandas.DataFrame
        ``confidence`` (mean of the highest probability), ``accuracy`` and ``count`` of the bins
        that are not empty.

    Raises
    ------
    ValueError
        If the rows are no probabilities, the shapes do not fit, or `bins` is below 1.

    Examples
    --------
    >>> calibration([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8]], [0, 1, 1], bins=2).values.tolist()
    [[0.833..., 0.666..., 3.0]]
    """
    if not isinstance(bins, numbers.Integral) or bins < 1:
        raise ValueError(f"bins must be a positive integer, received {bins!r}")
    probabilities, y = _predictions(probabilities, y)
    sure = probabilities.max(axis=1)
    table = pd.DataFrame({"confidence": sure, "accuracy": probabilities.argmax(axis=1) == y})
    index = np.clip(np.ceil(sure * bins).astype(int), 1, bins)  # bins are open on the left
    groups = table.astype(float).groupby(index)
    return groups.mean().assign(count=groups.size()).reset_index(drop=True)


def calibration_error(probabilities: ArrayLike, y: ArrayLike, bins: int = 10) -> float:
    """Return the expected calibration error: mean distance of accuracy from confidence.

    Arguments and errors as for `calibration`; the bins are weighted by their counts.

    References
    ----------
    Guo et al. (2017), On Calibration of Modern Neural Networks, arXiv:1706.04599.

    Examples
    --------
    >>> round(calibration_error([[0.9, 0.1], [0.9, 0.1]], [0, 1]), 3)
    0.4
    """
    table = calibration(probabilities, y, bins)
    return float(np.average(abs(table.accuracy - table.confidence), weights=table["count"]))


def temperature(logits: ArrayLike, y: ArrayLike) -> float:
    """Return the number T for which ``softmax(logits / T)`` has the lowest mean -log p(y).

    One number for all classes changes no ranking and no accuracy. Fit it on images that were not
    trained on, and measure on others.

    Parameters
    ----------
    logits : array, shape (n, classes)
    y : array of int, shape (n,)

    Returns
    -------
    float
        From 0.01 to 100; above 1 if the network was too sure.

    References
    ----------
    Guo et al. (2017), as for `calibration_error`.

    Examples
    --------
    >>> round(temperature([[2.0, 0.0]] * 4, [0, 0, 0, 1]), 2)  # 2 / T = log 3
    1.82
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or len(logits) != np.size(y) or not np.isfinite(logits).all():
        raise ValueError(
            f"logits must be finite, a row for each of the {np.size(y)} labels y, received shape "
            f"{logits.shape}, or infinite numbers"
        )
    _predictions(special.softmax(logits, axis=-1), y)

    def loss(log_t):
        return negative_log_likelihood(special.softmax(logits / np.exp(log_t), axis=-1), y)

    ends = (np.log(0.01), np.log(100))
    return float(np.exp(optimize.minimize_scalar(loss, bounds=ends, method="bounded").x))


def crossed_interval(
    values: ArrayLike, level: float = 0.95, repeats: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return a bootstrap interval of a mean over networks *and* test images.

    Networks and images are drawn anew, with replacement, each independently of the other. An
    interval over networks alone says what other networks would do on the same images, and is too
    narrow for a statement about images in general.

    Parameters
    ----------
    values : array, shape (networks, images)
        For each network and image a number, such as the difference of two methods. With few
        networks (below ten) the interval is somewhat too narrow.
    level : float
        In (0, 1).
    repeats, seed : int
        How often to draw, and the seed of it.

    Returns
    -------
    (low, high) : tuple of float

    Raises
    ------
    ValueError
        If `values` is no matrix, or `level` is outside (0, 1).

    References
    ----------
    Owen (2007), The pigeonhole bootstrap, Annals of Applied Statistics 1(2), 386-411,
    doi:10.1214/07-AOAS122.

    Examples
    --------
    >>> low, high = crossed_interval(np.arange(40.0).reshape(4, 10) - 19.5)
    >>> low < 0 < high
    True
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values must have shape (networks, images), received {values.shape}")
    if not 0 < _number("level", level) < 1:
        raise ValueError(f"level must be in (0, 1), received {level}")
    rng, (rows, columns) = np.random.default_rng(seed), values.shape
    a = rng.multinomial(rows, np.full(rows, 1 / rows), size=repeats) / rows
    b = rng.multinomial(columns, np.full(columns, 1 / columns), size=repeats) / columns
    means = ((a @ values) * b).sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# ------------------------------------------------------------------------------- not knowing


def entropy(probabilities: ArrayLike) -> np.ndarray:
    """Return ``-sum(p * log(p))`` over the last axis, in nats; 0 for a prediction that is sure.

    Parameters
    ----------
    probabilities : array, shape (..., classes)

    Returns
    -------
    numpy.ndarray, shape (...)
        From 0 to the logarithm of the number of classes.

    Examples
    --------
    >>> entropy([[1.0, 0.0], [0.5, 0.5]]).round(3)
    array([0.   , 0.693])
    """
    probabilities = np.asarray(probabilities, np.float64)
    if np.isnan(probabilities).any() or not probabilities.ndim:
        raise ValueError("probabilities must be an array of numbers, received NaN or no array")
    return special.entr(probabilities).sum(axis=-1)


def mutual_information(passes: ArrayLike) -> np.ndarray:
    """Return how much the passes (or the members of an ensemble) disagree, in nats.

    Entropy of the mean prediction minus mean entropy of the predictions. It is 0 if all say the
    same, be it sure or unsure.

    Parameters
    ----------
    passes : array, shape (passes, ..., classes)
        Probabilities.

    Returns
    -------
    numpy.ndarray, shape (...)

    References
    ----------
    Houlsby et al. (2011), Bayesian Active Learning for Classification and Preference Learning,
    arXiv:1112.5745.

    Examples
    --------
    >>> agree, differ = [[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]
    >>> [round(float(mutual_information(p)), 3) for p in (agree, differ)]
    [0.0, 0.693]
    """
    passes = np.asarray(passes, np.float64)
    if passes.ndim < 2 or not len(passes) or np.isnan(passes).any():
        raise ValueError(
            f"passes must have shape (passes, ..., classes) and no NaN, received {passes.shape}"
        )
    return entropy(passes.mean(axis=0)) - entropy(passes).mean(axis=0)


def auroc(inside: ArrayLike, outside: ArrayLike) -> float:
    """Return how well a score tells two groups apart: the area under the ROC curve.

    Parameters
    ----------
    inside, outside : array, shapes (n,) and (m,)
        Scores of both groups, such as the entropy for images of known and of unknown classes.

    Returns
    -------
    float
        The probability that a score from outside is the higher one of a random pair, where ties
        count one half: 1 is perfect, 0.5 is guessing. It is Mann and Whitney's U over n * m.

    Raises
    ------
    ValueError
        If a group is empty, or has a score that is not a number.

    References
    ----------
    Hanley, McNeil (1982), The meaning and use of the area under a receiver operating
    characteristic (ROC) curve, Radiology 143, 29-36, doi:10.1148/radiology.143.1.7063747.

    Examples
    --------
    >>> auroc(inside=[0.1, 0.2, 0.3], outside=[0.3, 0.9])  # 5.5 of 6 pairs
    0.916...
    """
    inside, outside = np.ravel(inside), np.ravel(outside)
    scores = np.concatenate([inside, outside])
    if not inside.size or not outside.size or np.isnan(scores).any():
        raise ValueError("inside and outside must hold scores, at least one each, and no NaN")
    rank = stats.rankdata(scores)[inside.size :].mean()
    return float((rank - (outside.size + 1) / 2) / inside.size)


def _predictions(probabilities, y):
    probabilities, y = np.asarray(probabilities, np.float64), np.asarray(y)
    if probabilities.ndim != 2 or y.shape != probabilities.shape[:1] or not len(y):
        raise ValueError(
            "probabilities must have shape (n, classes) and y shape (n,), received "
            f"{probabilities.shape} and {y.shape}"
        )
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= probabilities.shape[1]:
        raise ValueError(f"y must be integers from 0 to {probabilities.shape[1] - 1}")
    # Written so that NaN does not pass.
    if not ((probabilities >= 0).all() and np.allclose(probabilities.sum(axis=1), 1, atol=1e-4)):
        raise ValueError("probabilities must not be negative, and every row must sum to 1")
    return probabilities, y


# ------------------------------------------------------------------------------------ a fleet


class RegularizedFleet:
    """Dense networks with two hidden layers, trained side by side, each regularized in its own way.

    Every method is a number in one graph: a network with all of them at 0 has none. Networks of the
    same seed start from the same weights (SELU networks from the same draw, scaled by
    sqrt(1/2)), see the same batches, and share their random numbers: of two of them, the one with
    the higher rate drops what the other drops and more. None notices its neighbours.

    Parameters
    ----------
    settings : sequence of mappings
        One for each network, with a ``seed`` and any of these, where the default means "off":

        - ``l1``, ``l2``: factor of sum(abs(w)) or sum(w**2) over all kernels, 0;
        - ``dropout``: rate after both hidden layers, or three rates, of inputs and both, 0;
        - ``alpha``: True for SELU, and alpha dropout after both hidden layers, instead of ReLU and
          dropout. What is dropped of the inputs is 0 in either case;
        - ``rescale``: False leaves out dropout's division by 1 - p;
        - ``max_norm``: largest norm of a unit's incoming weights, in all layers, infinite;
        - ``shift``: share of the training images, drawn anew in each epoch, that are moved by up to
          one pixel in both directions, 0;
        - ``stop``: number of steps after which the network stays as it is, infinite;
        - ``rate``: learning rate, 0.02, with momentum 0.9.
    width, inputs, classes : int
        `inputs` must be a square number if images are shifted.

    Examples
    --------
    >>> fleet = RegularizedFleet([{"seed": 0}, {"seed": 0, "l2": 0.01}], 8, inputs=4, classes=2)
    >>> losses = fleet.train(np.ones((32, 4)), np.zeros(32, int), epochs=2)
    >>> losses.shape
    (2, 2)
    """

    _DEFAULTS = {  # noqa: RUF012
        "l1": 0.0,
        "l2": 0.0,
        "dropout": 0.0,
        "alpha": False,
        "rescale": True,
        "max_norm": np.inf,
        "shift": 0.0,
        "stop": np.inf,
        "rate": 0.02,
    }

    def __init__(
        self,
        settings: Sequence[Mapping[str, Any]],
        width: int = 100,
        *,
        inputs: int = 196,
        classes: int = 10,
    ):
        self.settings = [self._checked(setting) for setting in settings]
        if not self.settings:
            raise ValueError("settings must name one network at least")
        for name, value in {"width": width, "inputs": inputs, "classes": classes}.items():
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name} must be a positive integer, received {value!r}")
        sizes = [inputs, width, width, classes]
        starts = []
        for setting in self.settings:
            rng, gain = np.random.default_rng(setting["seed"]), 1.0 if setting["alpha"] else 2.0
            starts.append(
                [
                    rng.standard_normal((a, b)) * np.sqrt((gain if i < 2 else 1.0) / a)
                    for i, (a, b) in enumerate(itertools.pairwise(sizes))
                ]
            )
        n = len(starts)
        self._weights = [tf.constant(np.stack(w), tf.float32) for w in zip(*starts, strict=True)]
        self._weights += [tf.zeros((n, 1, size)) for size in sizes[1:]]
        self._velocity = [tf.zeros_like(w) for w in self._weights]
        self._numbers = self._as_tensors()
        self._seeds = list(dict.fromkeys(s["seed"] for s in self.settings))
        places = [self._seeds.index(s["seed"]) for s in self.settings]
        self._numbers["seed"] = tf.constant(places, tf.int32)
        drops = [any(rates) for rates in zip(*(s["dropout"] for s in self.settings), strict=True)]
        self._dropping = [size if drop else 0 for size, drop in zip(sizes, drops, strict=False)]
        self._epochs = self._steps = 0

    def _checked(self, setting):
        unknown = set(setting) - {"seed", *self._DEFAULTS}
        if unknown or "seed" not in setting:
            raise ValueError(
                f"settings must have a seed and any of {list(self._DEFAULTS)}, received "
                f"{dict(setting)}"
            )
        full = self._DEFAULTS | dict(setting)
        for name in ("l1", "l2", "rate"):
            _strength(name, full[name])
        if not 0 <= full["shift"] <= 1:
            raise ValueError(f"shift must be in [0, 1], received {full['shift']}")
        if not full["stop"] >= 1:
            raise ValueError(f"stop must be at least 1, received {full['stop']}")
        rates = np.ravel(full["dropout"])
        if rates.size not in (1, 3):
            raise ValueError(f"dropout must be one rate or three, received {full['dropout']}")
        full["dropout"] = (0.0, rates[0], rates[0]) if rates.size == 1 else tuple(rates)
        for p in full["dropout"]:
            _probability(p, "dropout")
        if not full["max_norm"] > 0:
            raise ValueError(f"max_norm must be above 0, received {full['max_norm']}")
        return full

    def _as_tensors(self):
        """Return what the graph needs to know of the settings, one value per network."""
        table = {name: [s[name] for s in self.settings] for name in self._DEFAULTS}
        p, alpha = np.array(table["dropout"], np.float64), np.array(table["alpha"])[:, None]
        floored = alpha & np.array([False, True, True])  # a lost input is 0
        a, b = _alpha_affine(p)
        keep = np.where(np.array(table["rescale"])[:, None], 1 - p, 1.0)
        found = {
            "p": p,
            "factor": np.where(floored, a, 1 / keep),
            "offset": np.where(floored, b, 0.0),
            "floor": np.where(floored, _SELU_FLOOR, 0.0),
        }
        found = {k: v.T[:, :, None, None] for k, v in found.items()}
        found["alpha"] = alpha[:, :, None].astype(float)
        for name in ("l1", "l2", "max_norm", "rate", "stop"):
            found[name] = np.array(table[name], np.float64)[:, None, None]
        for name in ("max_norm", "stop"):
            found[name] = np.minimum(found[name], 1e9)
        return {name: tf.constant(value, tf.float32) for name, value in found.items()}

    def kernels(self) -> list[np.ndarray]:
        """Return the weights of the three layers, each ``(networks, inputs, units)``."""
        return [w.numpy() for w in self._weights[:3]]

    def weights(self, network: int) -> list[np.ndarray]:
        """Return kernels and biases of a network, in the order of Keras's `set_weights`."""
        arrays = [w[network].numpy() for w in self._weights]
        return [a for w, b in zip(arrays[:3], arrays[3:], strict=True) for a in (w, b[0])]

    def batches(self, n: int, network: int, epoch: int, batch_size: int = 32) -> np.ndarray:
        """Return the rows that a network sees in an epoch, ``(steps, batch_size)``."""
        order = training.batch_order(n, self.settings[network]["seed"], epoch)
        return order[: n // batch_size * batch_size].reshape(-1, batch_size)

    def train(
        self,
        x: ArrayLike,
        y: ArrayLike,
        *,
        epochs: int,
        batch_size: int = 32,
        rows: Mapping[int, ArrayLike] | None = None,
    ) -> np.ndarray:
        """Train all networks; a later call goes on where this one ended.

        Parameters
        ----------
        x : array, shape (n, inputs)
        y : array of int, shape (n,)
        epochs, batch_size : int
            An epoch is the ``n // batch_size`` full batches of `training.batch_order`.
        rows : mapping of seed to array of int, optional
            What the networks of a seed see of x and y, equally many rows for each. Then n is their
            number. Default: all.

        Returns
        -------
        numpy.ndarray, shape (epochs, networks)
            Mean cross-entropy over the batches, with noise and without the penalty.
        """
        x = np.asarray(x, np.float32)
        own = self._rows(len(x), rows)
        total, n = len(x), own.shape[1]
        if not 1 <= batch_size <= n:
            raise ValueError(f"batch_size must be from 1 to {n}, received {batch_size}")
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, received {epochs}")
        share = np.array([s["shift"] for s in self.settings])[:, None]
        views = tf.constant(_shifted(x) if share.any() else x)
        y, means, steps = tf.constant(y, tf.int32), [], n // batch_size
        run = _compiled_epoch()
        for epoch in range(self._epochs, self._epochs + epochs):
            order = self._by_seed(lambda s, epoch=epoch: training.batch_order(n, s, epoch))
            order = np.take_along_axis(own, order, axis=1)
            drawn = self._by_seed(lambda s, epoch=epoch: _rng(s, epoch, 3).random((2, n)))
            places = (9 * drawn[:, 0]).astype(int) * (drawn[:, 1] < share)
            # All uniforms of an epoch, (steps, seeds, batch, units), for every layer that drops.
            noise = [self._uniforms((steps, batch_size), i, epoch) for i in range(3)]
            loss, self._weights, self._velocity = run(
                self._weights,
                self._velocity,
                self._numbers,
                views,
                y,
                _in_steps(order, steps, batch_size),
                _in_steps(order + total * places, steps, batch_size),
                [None if u is None else tf.constant(u) for u in noise],
                tf.constant(self._steps),
            )
            self._steps += steps
            means.append(loss.numpy() / steps)
        self._epochs += epochs
        return np.array(means)

    def _rows(self, n, rows):
        """Return the rows of every network, ``(networks, rows)``."""
        if rows is None:
            return self._by_seed(lambda seed: np.arange(n))
        missing = [seed for seed in self._seeds if seed not in rows]
        if missing or len({len(rows[seed]) for seed in self._seeds}) > 1:
            raise ValueError(
                f"rows must have equally many rows for every seed, {self._seeds}, received "
                f"{ {seed: len(own) for seed, own in rows.items()} }"
            )
        return self._by_seed(lambda seed: np.asarray(rows[seed]))

    def _by_seed(self, of_seed):
        """Return ``of_seed(seed)`` of every network's seed, ``(networks, ...)``."""
        return np.stack([of_seed(seed) for seed in self._seeds])[self._numbers["seed"].numpy()]

    def _uniforms(self, shape, layer, epoch):
        """Return what decides on the masks, ``(*shape[:-1], seeds, shape[-1], units)``, or None."""
        if not (units := self._dropping[layer]):
            return None
        draws = [
            _rng(seed, epoch, layer).random((*shape, units), np.float32) for seed in self._seeds
        ]
        return np.stack(draws, axis=len(shape) - 1)

    def outputs(self, x: ArrayLike, seed: int | None = None) -> np.ndarray:
        """Return the logits, ``(networks, n, classes)``; with a seed, dropout is active."""
        x, noise = np.asarray(x, np.float32), [None] * 3
        if seed is not None:
            noise = [self._uniforms((len(x),), i, (2**32 + seed)) for i in range(3)]
        found = []
        for part in self._parts(len(x)):
            own = [None if u is None else u[:, part] for u in noise]
            found.append(_forward(self._weights, self._numbers, x[None, part], own).numpy())
        return np.concatenate(found, axis=1)

    def _parts(self, n):
        """Yield slices of n examples whose activations take little memory."""
        size = max(1, _ACTIVATIONS_AT_ONCE // self._weights[1][..., 0].shape.num_elements())
        for i in range(0, max(1, n), size):
            yield slice(i, i + size)

    def evaluate(
        self, x: ArrayLike, y: ArrayLike, rows: Mapping[int, ArrayLike] | None = None
    ) -> pd.DataFrame:
        """Return the settings with ``loss``, ``accuracy`` and ``norm``, that of all kernels.

        Rows as for `train`.
        """
        x, y = np.asarray(x, np.float32), np.asarray(y)
        own = self._rows(len(x), rows)
        found = []
        for some in self._parts(own.shape[1]):
            part = own[:, some]
            seen = x[None, some] if rows is None else x[part]
            outputs = _forward(self._weights, self._numbers, seen, [None] * 3).numpy()
            likelihood = special.log_softmax(outputs, axis=-1)
            own_class = np.take_along_axis(likelihood, y[part][..., None], axis=-1)[..., 0]
            found.append([-own_class, outputs.argmax(-1) == y[part]])
        loss, right = np.concatenate(found, axis=-1).mean(axis=-1)
        return pd.DataFrame(self.settings).assign(
            loss=loss,
            accuracy=right,
            norm=np.sqrt(sum(np.square(w).sum(axis=(1, 2)) for w in self.kernels())),
        )


# A layer's outputs take 4 bytes each, and a pass makes several arrays of that size.
_ACTIVATIONS_AT_ONCE = 1_000_000


def _shifted(x):
    """Return the images unmoved and in the other eight positions, ``(9 * n, pixels)``."""
    side = round(x.shape[1] ** 0.5)
    if side * side != x.shape[1]:
        raise ValueError(f"x must hold square images to shift them, received {x.shape[1]} pixels")
    padded = np.pad(x.reshape(-1, side, side), ((0, 0), (1, 1), (1, 1)), mode="edge")
    places = sorted(np.ndindex(3, 3), key=lambda place: place != (1, 1))
    views = [padded[:, i : i + side, j : j + side] for i, j in places]
    return np.concatenate(views).reshape(-1, x.shape[1])


def _rng(seed, epoch, use):
    """Return the generator of one network's seed, of an epoch, for a layer's masks or the shifts.

    So the noise of a network depends on nothing but these.
    """
    return np.random.default_rng([seed, epoch, use])


def _forward(weights, numbers_, x, noise):
    """Return the logits; `noise` has the uniforms of three layers, or None where none drops."""

    def drop(h, layer):
        if noise[layer] is None:
            return h
        mask = tf.gather(noise[layer], numbers_["seed"]) >= numbers_["p"][layer]
        kept = tf.where(mask, h, numbers_["floor"][layer])
        return numbers_["factor"][layer] * kept + numbers_["offset"][layer]

    h = drop(x, 0)
    for layer in (0, 1):
        z = h @ weights[layer] + weights[3 + layer]
        alpha = numbers_["alpha"]
        h = drop(alpha * tf.nn.selu(z) + (1 - alpha) * tf.nn.relu(z), layer + 1)
    return h @ weights[2] + weights[5]


def compare(
    arms: Mapping[str, Sequence[Mapping[str, Any]]],
    data: datasets.Dataset,
    *,
    n: int,
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
    epochs: int,
    width: int = 50,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare methods of regularization, each at its best of equally many strengths.

    Every seed draws a training set of its own, which all arms get, in the same order and for the
    same number of steps. The strength of an arm is the one with the lowest mean loss on the
    validation images over the tuning seeds; it is then used with the other seeds, and the test
    images decide.

    Parameters
    ----------
    arms : mapping of str to sequence of settings
        Method -> what to try, as for `RegularizedFleet` and without a seed. All arms have equally
        many trials; an arm without a strength has one.
    data : datasets.Dataset
        Flattened.
    n : int
        Training images per network, drawn from ``data.x_train``.
    seeds, tuning_seeds : sequence of int
        With no seed in common.
    epochs, width : int

    Returns
    -------
    tried : pandas.DataFrame
        A row per arm and trial: ``arm``, ``trial``, and means over the tuning seeds of ``loss`` on
        the validation images and ``gap``, this loss minus that on the training images.
    results : pandas.DataFrame
        A row per arm and seed: ``arm``, the settings, ``loss``, ``accuracy`` (test images),
        ``gap`` (test loss minus training loss, both without noise and penalty) and ``norm``.

    Raises
    ------
    ValueError
        If the arms have different numbers of trials, or the seeds overlap.

    Examples
    --------
    >>> data = datasets.load_fashion_mnist().take(100, 50).halved().flattened()
    >>> arms = {"none": [{}], "l2": [{"l2": 0.001}, {"l2": 0.1}]}
    >>> tried, results = compare(arms, data, n=64, seeds=[0, 1], tuning_seeds=[2], epochs=2)
    >>> results.groupby("arm").size().to_dict(), len(tried)
    ({'l2': 2, 'none': 2}, 3)
    """
    if len({len(trials) for trials in arms.values()} - {1}) > 1:
        raise ValueError(
            "arms must have equally many trials (or one), received "
            f"{ {name: len(trials) for name, trials in arms.items()} }"
        )
    if common := set(seeds) & set(tuning_seeds):
        raise ValueError(f"tuning_seeds must differ from seeds, both have {sorted(common)}")
    plan = [(arm, i) for arm, trials in arms.items() for i in range(len(trials))]
    fleet, rows, _ = _trained(plan, arms, data, n, tuning_seeds, epochs, width)
    loss = fleet.evaluate(data.x_valid, data.y_valid).loss
    gap = loss - fleet.evaluate(data.x_train, data.y_train, rows).loss
    tried = pd.DataFrame(plan, columns=["arm", "trial"])
    for name, values in {"loss": loss, "gap": gap}.items():
        tried[name] = values.to_numpy().reshape(len(plan), -1).mean(axis=1)
    best = tried.loc[tried.groupby("arm", sort=False).loss.idxmin()]
    plan = list(zip(best.arm, best.trial, strict=True))
    fleet, rows, names = _trained(plan, arms, data, n, seeds, epochs, width)
    results = fleet.evaluate(data.x_test, data.y_test)
    results["gap"] = results.loss - fleet.evaluate(data.x_train, data.y_train, rows).loss
    results.insert(0, "arm", names)
    return tried, results


def _trained(plan, arms, data, n, seeds, epochs, width):
    """Return a fleet of all (arm, trial) of a plan with all seeds, its rows and its arms."""
    fleet = RegularizedFleet(
        [{**arms[arm][trial], "seed": seed} for arm, trial in plan for seed in seeds],
        width,
        inputs=data.x_train.shape[1],
        classes=len(data.class_names),
    )
    size = len(data.x_train)
    rows = {s: np.random.default_rng([s, n]).choice(size, n, replace=False) for s in seeds}
    fleet.train(data.x_train, data.y_train, epochs=epochs, rows=rows)
    return fleet, rows, [arm for arm, _ in plan for _ in seeds]


def _in_steps(rows, steps, batch_size):
    """Return the rows of each step, ``(steps, networks, batch_size)``; a last part is left out."""
    batches = rows[:, : steps * batch_size].reshape(len(rows), steps, batch_size)
    return tf.constant(batches.transpose(1, 0, 2), tf.int32)


@functools.cache
def _compiled_epoch():
    # Not by XLA, which takes longer: most of the time is spent in large products.
    @functools.partial(tf.function, autograph=False, reduce_retracing=True)
    def run(weights, velocity, numbers_, views, y, rows, seen, noise, done):
        def step(i, total, weights, velocity):
            now = [None if u is None else u[i] for u in noise]
            with tf.GradientTape() as tape:
                tape.watch(weights)
                logits = _forward(weights, numbers_, tf.gather(views, seen[i]), now)
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
                    tf.gather(y, rows[i]), logits
                )
                loss = tf.reduce_mean(losses, axis=1)
            slopes = tape.gradient(loss, weights)
            moves = tf.cast(tf.cast(done + i, tf.float32) < numbers_["stop"], tf.float32)
            after = [
                _updated(k, *parts, numbers_, moves)
                for k, parts in enumerate(zip(weights, velocity, slopes, strict=True))
            ]
            return i + 1, total + loss, *map(list, zip(*after, strict=True))

        begin = 0, tf.zeros(tf.shape(rows)[1]), weights, velocity
        return tf.while_loop(lambda i, *_: i < tf.shape(rows)[0], step, begin)[1:]

    return run


def _updated(k, w, v, g, numbers_, moves):
    """Return weights and velocity after a step; the first three are kernels, the others biases."""
    if k < 3:
        g = g + numbers_["l1"] * tf.sign(w) + 2 * numbers_["l2"] * w
    v = moves * (0.9 * v - numbers_["rate"] * g)
    w = w + v
    if k < 3:
        norm = tf.sqrt(tf.reduce_sum(w * w, axis=1, keepdims=True))
        w = w * tf.minimum(1.0, numbers_["max_norm"] / tf.maximum(norm, 1e-12))
    return w, v


training.forget_elsewhere.append(_compiled_epoch.cache_clear)


# ---------------------------------------------------------------------------------- arguments


def _number(name, value) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, received {value!r}")
    return float(value)


def _strength(name, value) -> float:
    value = _number(name, value)
    if not 0 <= value < np.inf:
        raise ValueError(f"{name} must be at least 0 and finite, received {value}")
    return value


def _probability(p, name="p") -> float:
    p = _number(name, p)
    if not 0 <= p < 1:
        raise ValueError(f"{name} must be in [0, 1), received {p}")
    return p
