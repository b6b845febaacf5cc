"""A tournament of optimizers: many runs at once, and how to judge them.

The runs of a tournament are many small problems that differ in their seed and their learning rate.
`train_rows` makes each a row of one matrix, which an optimizer of Keras updates as a whole. The
second part turns the runs into steps to a target, intervals of ranks and widths of good ranges.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import itertools
import math
from numbers import Real
from typing import NamedTuple

from ch11lib import training
from ch11lib.backend import keras, tf, xla_allowed
import joblib
import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

__all__ = [
    "DenseRows",
    "RatePerRow",
    "Rows",
    "good_decades",
    "rank_intervals",
    "steps_to_target",
    "train_rows",
]

# ---------------------------------------------------------------------------- many runs, row by row


def _rates(rates) -> np.ndarray:
    rates = np.asarray(rates, dtype=np.float32)
    if rates.ndim != 1 or not rates.size or not (np.isfinite(rates) & (rates >= 0)).all():
        raise ValueError(
            f"rates must be one or more finite numbers of 0 or more; received {rates.tolist()}"
        )
    return rates


class RatePerRow(keras.optimizers.schedules.LearningRateSchedule):
    """A constant learning rate for each row of the variables, which thus train independently.

    Keras multiplies updates by the rate, and all optimizers whose updates are element by element
    (`keras.optimizers.SGD`, ``Adagrad``, ``RMSprop``, ``Adam``, ``AdamW``, ``Adamax``, ``Nadam``,
    ``Lion``) take an array of rates as well as a number. So one optimizer trains many problems.

    Parameters
    ----------
    rates : array of shape (rows,)

    Examples
    --------
    >>> theta = keras.Variable([[1.0, 1.0], [1.0, 1.0]])
    >>> keras.optimizers.SGD(RatePerRow([0.1, 0.2])).apply([tf.ones((2, 2))], [theta])
    >>> theta.numpy().round(3)
    array([[0.9, 0.9],
           [0.8, 0.8]], dtype=float32)
    """

    def __init__(self, rates: ArrayLike):
        self.rates = _rates(rates).reshape(-1, 1)

    def __call__(self, step):
        """Return the rates, shape (rows, 1), at any step."""
        return tf.constant(self.rates)

    def get_config(self):
        """Return what makes the schedule again."""
        return {"rates": self.rates.ravel().tolist()}


class Rows(NamedTuple):
    """What `train_rows` returns of one optimizer.

    Attributes
    ----------
    losses : numpy.ndarray
        The loss of every row before each step, shape (steps, rows); not finite once it diverged.
    theta : numpy.ndarray
        The parameters at the end, shape (rows, parameters).
    """

    losses: np.ndarray
    theta: np.ndarray


def train_rows(
    optimizers: Mapping[str, Callable],
    gradient: Callable,
    theta: ArrayLike,
    rates: ArrayLike,
    steps: int,
    *,
    n_jobs: int | None = None,
) -> dict[str, Rows]:
    """Train many independent problems at once by each of several optimizers of Keras.

    Each row of a matrix is one problem: a seed with a learning rate. A step of all of them is two
    compiled calls, one for the gradients, which all optimizers share, and one for the update.

    Parameters
    ----------
    optimizers : mapping of str to callable
        Called with ``learning_rate=``; see `RatePerRow` for those that fit.
    gradient : callable
        ``gradient(theta, step)`` returns the losses, shape (rows,), and their gradients, shape
        (rows, parameters), as tensors.
    theta : array of shape (rows, parameters)
        The start.
    rates : array of shape (rows,)
    steps : int
    n_jobs : int, optional
        Optimizers at a time, in threads; default one per core.

    Returns
    -------
    dict of str to Rows

    Raises
    ------
    ValueError
        If there is no optimizer, `theta` is no matrix, there is not one rate for each of its rows,
        or `steps` is below 1.

    Examples
    --------
    >>> curvatures = np.array([1.0, 10.0], dtype="float32")
    >>> def gradient(theta, step):
    ...     return tf.reduce_sum(curvatures * theta**2, axis=1) / 2, curvatures * theta
    >>> runs = train_rows(
    ...     {"sgd": keras.optimizers.SGD}, gradient, np.ones((2, 2)), rates=[0.1, 0.3], steps=20
    ... )
    >>> runs["sgd"].losses.shape, runs["sgd"].theta.shape
    ((20, 2), (2, 2))
    >>> [f"{loss:.1g}" for loss in runs["sgd"].losses[-1]]
    ['0.009', '1e+12']
    """
    if not optimizers:
        raise ValueError("optimizers must hold at least one, received none")
    if np.ndim(theta) != 2 or np.shape(theta)[:1] != np.shape(rates):
        raise ValueError(
            "theta must have shape (rows, parameters), and rates one number for each row; "
            f"received shapes {np.shape(theta)} and {np.shape(rates)}"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, received {steps}")
    entries = []
    for make in optimizers.values():  # in one thread: Keras names things by global counters
        variable = keras.Variable(np.asarray(theta), dtype="float32")
        optimizer = make(learning_rate=RatePerRow(rates))
        optimizer.build([variable])
        entries.append((variable, optimizer))

    def train(variable, optimizer):
        @functools.partial(tf.function, autograph=False, jit_compile=xla_allowed())
        def update(g):
            optimizer.apply([g], [variable])

        losses = np.empty((steps, variable.shape[0]), np.float32)
        for step in range(steps):
            loss, g = gradient(variable.value, step)
            update(g)
            losses[step] = loss.numpy()  # a copy: kept tensors would fragment the memory
        return Rows(losses, variable.numpy())

    jobs = n_jobs or joblib.cpu_count()
    runs = joblib.Parallel(jobs, backend="threading")(joblib.delayed(train)(*e) for e in entries)
    return dict(zip(optimizers, runs, strict=True))


class DenseRows:
    """Dense ReLU classifiers as rows for `train_rows`: seeds x rates, He weights, zero biases.

    Rows of one seed start from the same weights and see the same batches.

    Parameters
    ----------
    sizes : sequence of int
        Inputs, units of each hidden layer, classes.
    x, y : arrays of shape (n, inputs) and (n,)
        What they are trained on.
    seeds : sequence of int
    rates : sequence of float
    steps : int
        For which batches are prepared.
    batch_size : int

    Attributes
    ----------
    theta : numpy.ndarray
        The start, shape (rows, parameters): the rates one after another, all seeds of each; in a
        row kernel and bias of the first layer, of the second, and so on.
    rates : numpy.ndarray
        The rate of each row.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
    >>> y = (x[:, 0] > 0).astype("int32")
    >>> nets = DenseRows((4, 8, 2), x, y, seeds=[0, 1, 2], rates=[0.001, 0.1], steps=50)
    >>> runs = train_rows(
    ...     {"adam": keras.optimizers.Adam}, nets.gradient, nets.theta, nets.rates, steps=50
    ... )
    >>> accuracy = nets.accuracy(runs["adam"].theta, x, y)
    >>> accuracy.shape, bool((accuracy[1] > 0.9).all())
    ((2, 3), True)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        x: ArrayLike,
        y: ArrayLike,
        *,
        seeds: Sequence[int],
        rates: Sequence[float],
        steps: int,
        batch_size: int = 32,
    ):
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes must be two or more positive numbers, received {sizes}")
        if np.ndim(x) != 2 or np.shape(x)[1] != sizes[0] or np.shape(y) != np.shape(x)[:1]:
            raise ValueError(
                f"x must have shape (n, {sizes[0]}), as sizes begin, and y shape (n,); "
                f"received {np.shape(x)} and {np.shape(y)}"
            )
        n = np.shape(x)[0]
        if not 1 <= batch_size <= n:
            raise ValueError(
                f"batch_size must be from 1 to {n}, the examples; received {batch_size}"
            )
        if steps < 1 or not len(seeds):
            raise ValueError(
                f"steps must be at least 1, and seeds not empty; received {steps} and {seeds}"
            )
        self._sizes = list(itertools.pairwise(sizes))
        self._shape = len(rates), len(seeds)
        self.theta = np.tile([self._start(seed) for seed in seeds], (len(rates), 1))
        self.rates = np.repeat(_rates(rates), len(seeds))
        per_epoch = n // batch_size
        orders = [self._batches(n, seed, steps, per_epoch, batch_size) for seed in seeds]
        self._rows = np.tile(np.stack(orders, axis=1), (1, len(rates), 1)).astype(np.int32)
        x, y = tf.constant(x, tf.float32), tf.constant(y, tf.int32)

        @functools.partial(tf.function, autograph=False, jit_compile=xla_allowed())
        def compiled(theta, rows):
            with tf.GradientTape() as tape:
                tape.watch(theta)
                outputs = self._logits(theta, tf.gather(x, rows))
                loss = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.gather(y, rows), outputs)
                loss = tf.reduce_mean(loss, axis=1)
            return loss, tape.gradient(loss, theta)

        self._gradient = compiled

    def _start(self, seed):
        rng, parts = np.random.default_rng(seed), []
        for i, (a, b) in enumerate(self._sizes, start=1):
            gain = 2.0 if i < len(self._sizes) else 1.0
            parts += [rng.normal(0, math.sqrt(gain / a), a * b), np.zeros(b)]
        return np.concatenate(parts).astype(np.float32)

    @staticmethod
    def _batches(n, seed, steps, per_epoch, batch_size):
        epochs = range(-(-steps // per_epoch))
        orders = [training.batch_order(n, seed, e)[: per_epoch * batch_size] for e in epochs]
        return np.concatenate(orders).reshape(-1, batch_size)[:steps]

    def _logits(self, theta, h):
        at = 0
        for i, (a, b) in enumerate(self._sizes, start=1):
            w = tf.reshape(theta[:, at : at + a * b], (-1, a, b))
            at += a * b
            h = h @ w + theta[:, None, at : at + b]
            at += b
            h = tf.nn.relu(h) if i < len(self._sizes) else h
        return h

    def gradient(self, theta, step: int):
        """Return losses and gradients of all rows on the batch of a step."""
        return self._gradient(theta, tf.constant(self._rows[step]))

    def accuracy(self, theta: ArrayLike, x: ArrayLike, y: ArrayLike) -> np.ndarray:
        """Return the accuracy of each network, (rates, seeds); 0 for one that diverged."""
        theta, right = np.asarray(theta), []
        x = tf.constant(x, tf.float32)[None]
        for part in np.array_split(theta, -(-len(theta) // 16)):  # a few at a time: memory
            outputs = self._logits(tf.constant(part), tf.repeat(x, len(part), axis=0))
            right.append(np.mean(tf.argmax(outputs, axis=-1).numpy() == np.asarray(y), axis=1))
        finite = np.isfinite(theta).all(axis=1)
        return np.where(finite, np.concatenate(right), 0.0).reshape(self._shape)


# ---------------------------------------------------------------------------- judging a tournament


def steps_to_target(losses: ArrayLike, target: float, window: int = 1) -> np.ndarray:
    """Return the first step at which the mean of the last losses is below a target.

    Parameters
    ----------
    losses : array of shape (steps, ...)
        What is not finite counts as infinite.
    target : float
    window : int
        Over how many steps to average; no step before this one counts.

    Returns
    -------
    numpy.ndarray
        Shape (...), counted from 1; inf if the target was not reached.

    Examples
    --------
    >>> steps_to_target([[4.0, 1.0], [2.0, 1.0], [0.0, np.nan]], target=1.5, window=2)
    array([3., 2.])
    """
    losses = np.asarray(losses, dtype=np.float64)
    if not (isinstance(target, Real) and np.isfinite(target)):
        raise ValueError(f"target must be a finite number, received {target!r}")
    if losses.ndim < 1 or not losses.size:
        raise ValueError(f"losses must have a step and a run, received shape {losses.shape}")
    if not 1 <= window <= len(losses):
        raise ValueError(f"window must be from 1 to {len(losses)}, the steps; received {window}")
    windows = np.lib.stride_tricks.sliding_window_view(losses, window, axis=0)
    below = windows.mean(axis=-1) < target  # False for NaN
    return np.where(below.any(axis=0), below.argmax(axis=0) + float(window), np.inf)


def rank_intervals(
    scores: ArrayLike, rng: np.random.Generator, *, draws: int = 2000, level: float = 0.95
) -> np.ndarray:
    """Return an interval for the rank of each competitor, by bootstrap over the runs.

    Runs of one column belong together (the same seed), so columns are drawn, with replacement; the
    competitors are ranked by their means over the drawn columns. Equal means share a rank.

    Efron (1979), Bootstrap methods: another look at the jackknife, doi:10.1214/aos/1176344552.

    Parameters
    ----------
    scores : array of shape (competitors, runs)
        The largest is best; infinite scores are taken as very large numbers.
    rng : numpy.random.Generator
    draws : int
    level : float

    Returns
    -------
    numpy.ndarray
        Shape (competitors, 3): low end, median and high end; rank 1 is best.

    Examples
    --------
    >>> rank_intervals([[1.0, 1.0, 1.0], [0.0, 3.0, 0.0]], np.random.default_rng(0)).tolist()
    [[1.0, 1.5, 2.0], [1.0, 1.5, 2.0]]
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not scores.size or np.isnan(scores).any():
        raise ValueError(
            "scores must have shape (competitors, runs), without NaN; "
            f"received shape {scores.shape} with {np.isnan(scores).sum()} NaN"
        )
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, received {level}")
    scores = np.nan_to_num(scores, posinf=1e9, neginf=-1e9)
    columns = rng.integers(0, scores.shape[1], (draws, scores.shape[1]))
    ranks = stats.rankdata(-scores[:, columns].mean(axis=2), axis=0)
    tail = 50 * (1 - level)
    return np.percentile(ranks, [tail, 50, 100 - tail], axis=1).T


def good_decades(rates: ArrayLike, scores: ArrayLike, tolerance: float) -> float:
    """Return how many decades of learning rates score within a tolerance of the best.

    Between the rates that were tried, scores are interpolated on the logarithmic axis.

    Parameters
    ----------
    rates : array of shape (n,)
        Increasing.
    scores : array of shape (n,)
        The largest is best.
    tolerance : float

    Examples
    --------
    >>> round(good_decades([0.01, 0.1, 1.0], [0.0, 1.0, 0.0], tolerance=0.5), 2)
    1.0
    """
    rates = _rates(rates)
    if len(rates) < 2 or rates[0] <= 0 or (np.diff(rates) <= 0).any():
        raise ValueError(f"rates must be positive and increasing, received {rates.tolist()}")
    if np.shape(scores) != rates.shape:
        raise ValueError(
            f"scores must have one number for each of the {len(rates)} rates; "
            f"received shape {np.shape(scores)}"
        )
    if not (isinstance(tolerance, Real) and 0 <= tolerance < np.inf):
        raise ValueError(f"tolerance must be a number of 0 or more, received {tolerance!r}")
    decades = np.log10(rates.astype(np.float64))
    fine = np.linspace(decades[0], decades[-1], 2001)
    values = np.interp(fine, decades, scores)
    return float(np.mean(values > np.max(scores) - tolerance) * (decades[-1] - decades[0]))
