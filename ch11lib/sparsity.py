"""Sparse models: pruning by magnitude, the proximal l1 step, and what zeros are worth in bytes.

A weight counts as sparse if it is *exactly* zero. The functions here deal with *kernels*: weights
of a model that have two axes or more and are not biases (matrices of dense layers, filters,
embeddings). Biases and the scales of normalization are few, and many start at zero anyway.

`prune` cuts once, `MagnitudePruning` step by step during training, and `ProximalSGD` drives weights
to zero by itself. Whatever made the zeros, `keep_zeros` holds them in later training, with every
optimizer.

S. Han, J. Pool, J. Tran and W. Dally (2015), Learning both weights and connections for efficient
neural networks, arXiv:1506.02626.
"""

from collections.abc import Sequence
import gzip
import math
from numbers import Integral, Real
from typing import Any, NamedTuple

from ch11lib.backend import keras, tf
import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "MagnitudePruning",
    "ProximalSGD",
    "Sizes",
    "compressed_size",
    "fleet_masks",
    "fraction_zero",
    "keep_zeros",
    "kernels",
    "magnitude_masks",
    "polynomial_decay",
    "proximal_l1",
    "prune",
    "rewind",
]

# ----------------------------------------------------------------------------- definitions


def polynomial_decay(
    step: ArrayLike,
    initial: float,
    final: float,
    begin: int,
    end: int,
    power: float = 3.0,
) -> np.ndarray:
    """Return the sparsity to be reached at a step of gradual pruning.

    ``s(t) = s₁ + (s₀ - s₁)(1 - (t - t₀)/(t₁ - t₀))^p``, constant before t₀ and after t₁. With p = 3
    most weights go early, while many can be spared.

    Zhu, Gupta (2017), To prune, or not to prune, arXiv:1710.01878; `PolynomialDecay` in the
    TensorFlow Model Optimization Toolkit.

    Parameters
    ----------
    step : int or array of ints
        t, counted from 0.
    initial, final : float
        s₀ and s₁, from 0 to below 1.
    begin, end : int
        t₀ and t₁.
    power : float
        p, above 0.

    Returns
    -------
    numpy.float64 or numpy.ndarray
        Of the shape of `step`.

    Examples
    --------
    >>> polynomial_decay([0, 10, 20, 30, 40], initial=0.0, final=0.8, begin=10, end=30)
    array([0. , 0. , 0.7, 0.8, 0.8])
    """
    _check_sparsity("initial", initial)
    _check_sparsity("final", final)
    _check_whole("begin", begin, 0)
    _check_whole("end", end, begin + 1)
    if isinstance(power, bool) or not isinstance(power, Real) or not 0 < power < math.inf:
        raise ValueError(f"power must be a positive number; received {power!r}")
    t = np.asarray(step)
    if t.dtype.kind not in "iuf" or not (t >= 0).all():
        raise ValueError(f"step must be a number or array of numbers, 0 or more; received {step!r}")
    progress = np.clip((t - begin) / (end - begin), 0, 1)
    return final + (initial - final) * (1 - progress) ** power


def magnitude_masks(weights: Sequence[ArrayLike], sparsity: float) -> list[np.ndarray]:
    """Return which weights to keep so that the smallest ones go, ranked over all arrays together.

    ``round((1 - sparsity) n)`` of the n weights stay, exactly. Among equals the first ones stay.

    Parameters
    ----------
    weights : list of arrays
        To rank within each array, give one array at a time.
    sparsity : float
        From 0 to below 1.

    Returns
    -------
    list of numpy.ndarray
        Booleans in the shapes of `weights`, True for those to keep.

    Examples
    --------
    >>> magnitude_masks([np.array([3.0, -1.0]), np.array([0.5, -4.0])], sparsity=0.5)
    [array([ True, False]), array([False,  True])]
    """
    _check_sparsity("sparsity", sparsity)
    arrays = [np.asarray(w) for w in weights]
    if not arrays:
        raise ValueError("weights must hold one array at least; received none")
    size = np.abs(np.concatenate([a.ravel() for a in arrays]))
    if not np.isfinite(size).all():
        raise ValueError("weights must be finite; received infinity or NaN")
    keep = np.zeros(len(size), bool)
    keep[np.argsort(-size, kind="stable")[: _kept(len(size), sparsity)]] = True
    parts = np.split(keep, np.cumsum([a.size for a in arrays])[:-1])
    return [part.reshape(a.shape) for part, a in zip(parts, arrays, strict=True)]


def fleet_masks(weights: Sequence[np.ndarray], sparsity: ArrayLike) -> list[np.ndarray]:
    """Return `magnitude_masks` of every network of a fleet, ranked over all its layers together.

    Parameters
    ----------
    weights : list of arrays, each ``(networks, inputs, units)``
        As from `Fleet.kernels`, or other scores of these shapes.
    sparsity : float or array of shape (networks,)
        The same for all, or one for each network.

    Returns
    -------
    list of numpy.ndarray
        Booleans in the shapes of `weights`, for `Fleet.mask`.

    Examples
    --------
    >>> [mask] = fleet_masks([np.array([[[3.0, -1.0]], [[0.5, -4.0]]])], sparsity=[0.5, 0.0])
    >>> mask.tolist()
    [[[True, False]], [[True, True]]]
    """
    n, each = len(weights[0]), np.atleast_1d(sparsity)
    if each.shape not in {(1,), (n,)}:
        raise ValueError(
            f"sparsity must be one number, or one for each of {n} networks; received shape "
            f"{each.shape}"
        )
    masks = [
        magnitude_masks([w[i] for w in weights], float(s))
        for i, s in enumerate(np.broadcast_to(each, n))
    ]
    return [np.stack(layer) for layer in zip(*masks, strict=True)]


def _kept(n: int, sparsity: ArrayLike) -> Any:
    return np.round(n * (1 - np.asarray(sparsity))).astype(int)


def proximal_l1(weights: ArrayLike, threshold: float) -> np.ndarray:
    """Move weights towards zero by a threshold, and stop there: the soft threshold.

    ``sign(w) max(|w| - threshold, 0)`` is the v that minimizes ``(v - w)²/2 + threshold |v|``. A
    gradient step with rate η on the loss, followed by the soft threshold ηλ, is a proximal gradient
    step on ``loss + λ Σ|w|``. It yields exact zeros, which a step along the subgradient
    ``λ sign(w)`` jumps over.

    Parikh, Boyd (2014), Proximal algorithms, doi:10.1561/2400000003.

    Parameters
    ----------
    weights : array
    threshold : float
        0 or more.

    Returns
    -------
    numpy.ndarray
        In the shape and floating type of `weights`.

    Examples
    --------
    >>> proximal_l1([1.0, -0.25, 0.1, -2.0], threshold=0.25)
    array([ 0.75, -0.  ,  0.  , -1.75])
    """
    w = np.asarray(weights)
    if w.dtype.kind not in "iuf":
        raise TypeError(f"weights must be numbers; received an array of type {w.dtype}")
    _check_strength("threshold", threshold)
    w = w if w.dtype.kind == "f" else w.astype(np.float64)
    return np.sign(w) * np.maximum(np.abs(w) - w.dtype.type(threshold), 0)


def _check_sparsity(name, value):
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number from 0 to below 1; received {value!r}")


def _check_strength(name, value):
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number of 0 or more; received {value!r}")


def _check_whole(name, value, low):
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(f"{name} must be a whole number of {low} or more; received {value!r}")


# ------------------------------------------------------------------------ zeros in a model


def kernels(model: keras.Model | keras.Layer) -> list[keras.Variable]:
    """Return the kernels of a model or layer: weights with two axes or more that are not biases.

    Raises
    ------
    TypeError
        If `model` is neither a model nor a layer.
    ValueError
        If there are none, because the model is not built or has no such layers.

    Examples
    --------
    >>> model = keras.Sequential(
    ...     [keras.Input((2,)), keras.layers.Dense(3), keras.layers.BatchNormalization()]
    ... )
    >>> [tuple(kernel.shape) for kernel in kernels(model)]
    [(2, 3)]
    """
    if not isinstance(model, keras.Layer):
        raise TypeError(f"model must be a Keras model or layer; received {type(model).__name__}")
    found = [v for v in model.weights if _is_kernel(v)]
    if not found:
        raise ValueError(
            f"model must be built and have a layer with a kernel; {model.name!r} has none, with "
            f"layers {[type(part).__name__ for part in getattr(model, 'layers', [model])]}"
        )
    return found


def _is_kernel(variable) -> bool:
    return len(variable.shape) >= 2 and "bias" not in variable.name


def fraction_zero(model: keras.Model | keras.Layer) -> float:
    """Return the fraction of the kernels of a model or layer that is exactly zero.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> model.layers[0].set_weights([np.array([[1.0, 0.0], [1e-30, 2.0]]), np.zeros(2)])
    >>> fraction_zero(model)
    0.25
    """
    zero = np.concatenate([v.numpy().ravel() == 0 for v in kernels(model)])
    return float(zero.mean())


class Sizes(NamedTuple):
    """Bytes of all weights of a model: as they are, and compressed by gzip."""

    raw: int
    gzip: int


def compressed_size(model: keras.Model) -> Sizes:
    """Return the size of a model's weights in bytes, raw and compressed by gzip.

    Zeros are as long as other numbers, but many of them compress well. Weights only: architecture
    and optimizer, which a ``.keras`` file holds as well, are left out.

    Parameters
    ----------
    model : keras.Model
        Built. All weights count, not only kernels.

    Returns
    -------
    Sizes
        A named tuple ``(raw, gzip)``.

    Examples
    --------
    >>> zeros = keras.layers.Dense(100, kernel_initializer="zeros")
    >>> compressed_size(keras.Sequential([keras.Input((99,)), zeros]))
    Sizes(raw=40000, gzip=...)
    """
    if not isinstance(model, keras.Layer) or not model.weights:
        raise ValueError(f"model must be a Keras model with weights; received {model!r}")
    raw = b"".join(np.ascontiguousarray(v.numpy()).tobytes() for v in model.weights)
    return Sizes(len(raw), len(gzip.compress(raw, mtime=0)))


# --------------------------------------------------------------------------- cutting once


def prune(model: keras.Model | keras.Layer, sparsity: float, *, scope: str = "layer") -> None:
    """Set the smallest weights of a model's kernels to zero, in place and once.

    Nothing keeps these zeros in later training; `keep_zeros` does.

    Parameters
    ----------
    model : keras.Model or keras.Layer
        Built.
    sparsity : float
        Fraction to be zero, from 0 to below 1. Weights that are zero already count.
    scope : {"layer", "global"}
        Whether each kernel loses this fraction, or all kernels together.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10)])
    >>> prune(model, 0.9)
    >>> round(fraction_zero(model), 3)
    0.9
    """
    _check_sparsity("sparsity", sparsity)
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global'; received {scope!r}")
    found = kernels(model)
    for group in [found] if scope == "global" else [[v] for v in found]:
        values = [v.numpy() for v in group]
        for v, value, mask in zip(group, values, magnitude_masks(values, sparsity), strict=True):
            v.assign(np.where(mask, value, 0))


def rewind(model: keras.Model, weights: Sequence[np.ndarray]) -> None:
    """Set a pruned model back to earlier weights, but leave its zeros zero: a lottery ticket.

    Frankle, Carbin (2019), The lottery ticket hypothesis, arXiv:1803.03635.

    Parameters
    ----------
    model : keras.Model
    weights : list of arrays
        What ``model.get_weights()`` gave at an earlier time, for example before training.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> start = model.get_weights()
    >>> model.layers[0].set_weights([np.array([[5.0, 0.0], [0.0, 5.0]]), np.ones(2)])
    >>> rewind(model, start)
    >>> bool((model.get_weights()[0] == np.eye(2) * start[0]).all()), model.get_weights()[1]
    (True, array([0., 0.], dtype=float32))
    """
    zero = [(v, v.numpy() == 0) for v in kernels(model)]
    model.set_weights(weights)
    for v, mask in zero:
        v.assign(np.where(mask, 0, v.numpy()))


# ---------------------------------------------------------------------- zeros that are kept


class _Mask:
    """A constraint that holds zeros, and cuts further weights at given steps.

    Keras applies it inside the graph, after each step. A variable keeps its mask for life, and all
    that can change is in TensorFlow's variables: a compiled graph never grows stale. A constraint
    that the variable had before is applied first.
    """

    @classmethod
    def of(cls, variable: keras.Variable) -> "_Mask":
        """Return the mask of a variable, after giving it one if it has none."""
        if not isinstance(variable.constraint, cls):
            variable.constraint = cls(variable)
        return variable.constraint

    def __init__(self, variable):
        self.inner = variable.constraint
        self.keep = tf.Variable(tf.ones(variable.shape, tf.bool), trainable=False)
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
        # Steps at which to cut, and how many weights to keep then.
        self.times, self.counts = (
            tf.Variable([], dtype=tf.int64, shape=[None], trainable=False) for _ in "12"
        )

    def plan(self, times, counts):
        """Count steps from 0 again; cut at these."""
        self.step.assign(0)
        self.times.assign(times)
        self.counts.assign(counts)

    def __call__(self, value):
        value = tf.convert_to_tensor(value if self.inner is None else self.inner(value))
        self.step.assign_add(1)
        tf.cond(tf.reduce_any(self.times == self.step), lambda: self._cut(value), lambda: None)
        return self.masked(value)

    def _cut(self, value):
        size = tf.abs(tf.reshape(value, [-1]))
        count = tf.reduce_sum(tf.where(self.times == self.step, self.counts, 0))
        # The largest first, and among equals the first ones; all, since XLA needs fixed sizes.
        order = tf.math.top_k(size, size.shape[0]).indices
        large = tf.cast(tf.range(size.shape[0], dtype=tf.int64) < count, tf.int32)
        large = tf.reshape(tf.scatter_nd(order[:, None], large, size.shape), value.shape)
        self.keep.assign(self.keep & (large > 0))

    def masked(self, value):
        # Not a product: that would keep NaN and the sign of zero.
        return tf.where(self.keep, value, tf.zeros((), value.dtype))

    def start(self, variable):
        """Do what is due before the first step."""
        if tf.reduce_any(self.times == self.step):
            self._cut(tf.convert_to_tensor(variable))
        self.apply(variable)

    def apply(self, variable):
        variable.assign(self.masked(tf.convert_to_tensor(variable)))


def _masks(model, variables) -> list[_Mask]:
    """Return the masks of variables; new ones take effect in a new training function."""
    new = not all(isinstance(v.constraint, _Mask) for v in variables)
    masks = [_Mask.of(v) for v in variables]
    if new and getattr(model, "compiled", False):
        model.make_train_function(force=True)
    return masks


def keep_zeros(model: keras.Model) -> None:
    """Let the zeros that a model's kernels have now stay zero in later training.

    Each trainable kernel gets a constraint, which Keras applies after every step, whatever the
    optimizer: no momentum can revive a weight. Constraints that are there already stay.

    Call it before `compile`, or compile again. A saved model holds its zeros but not this
    constraint: call it again after loading. One thing passes by: after the last step, an optimizer
    with ``use_ema`` puts in averages, which may not be zero.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5)])
    >>> prune(model, 0.5)
    >>> keep_zeros(model)
    >>> model.compile("adam", "mse")
    >>> _ = model.fit(np.ones((8, 4)), np.ones((8, 5)), epochs=3, verbose=0)
    >>> fraction_zero(model)
    0.5
    """
    trainable = [v for v in kernels(model) if v.trainable]
    for v, mask in zip(trainable, _masks(model, trainable), strict=True):
        mask.keep.assign(v.numpy() != 0)


class MagnitudePruning(keras.callbacks.Callback):
    """Prune the smallest weights of each kernel step by step during training.

    At the steps ``begin, begin + frequency, ... , end``, counted from 0 at the start of this
    training, the smallest weights are set to zero, so that their fraction follows
    `polynomial_decay`; from then on they stay zero. The forward pass of step t sees the sparsity of
    step t. At `end` the final sparsity is reached, also if the frequency does not divide the time.
    (The TensorFlow Model Optimization Toolkit counts steps from 1, and needs a frequency that
    divides.) The history gets a column ``sparsity``.

    All of that happens inside the compiled graph, as a constraint on each kernel. So it works with
    every optimizer, in `model.fit` and at full speed in the compiled epochs of `training.fit`.

    Zhu, Gupta (2017), arXiv:1710.01878.

    Parameters
    ----------
    final : float
        The sparsity to reach, from 0 to below 1.
    initial : float
        The sparsity at `begin`.
    begin : int
        Step of the first cut.
    end : int, optional
        Step of the last cut. By default three quarters of the training, so that the rest is left
        to recover.
    frequency : int
        Steps between two cuts. Each cut sorts the weights.
    power : float
        See `polynomial_decay`.
    layers : list of keras.Layer, optional
        Which layers to prune; by default all that have a trainable kernel.

    Raises
    ------
    ValueError
        For a parameter out of its range. At the beginning of training: for a model or a layer
        without trainable kernels, or if `end` is not a step of this training.

    Notes
    -----
    After training the zeros are held as by `keep_zeros`, and a second callback of this kind prunes
    further. A saved model holds its zeros, and no trace of the callback; call `keep_zeros` to train
    it further after loading.

    Examples
    --------
    >>> from ch11lib import training
    >>> model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10)])
    >>> model.compile("adam", "mse")
    >>> pruning = MagnitudePruning(0.9, end=12, frequency=2)
    >>> history = training.fit(
    ...     model, np.ones((64, 10)), np.ones((64, 10)), epochs=8, callbacks=[pruning]
    ... )
    >>> np.round(history.history["sparsity"], 2).tolist()
    [0.38, 0.63, 0.79, 0.87, 0.9, 0.9, 0.9, 0.9]
    """

    def __init__(
        self,
        final: float,
        *,
        initial: float = 0.0,
        begin: int = 0,
        end: int | None = None,
        frequency: int = 100,
        power: float = 3.0,
        layers: Sequence[keras.Layer] | None = None,
    ):
        super().__init__()
        polynomial_decay(0, initial, final, begin, begin + 1 if end is None else end, power)
        if not initial <= final:
            raise ValueError(f"final must be at least initial; received {final} and {initial}")
        _check_whole("frequency", frequency, 1)
        self.final, self.initial, self.begin, self.end = final, initial, begin, end
        self.frequency, self.power, self.layers = frequency, power, layers

    def on_train_begin(self, logs=None):
        """Set up the masks, and cut what is to be cut before the first step."""
        layers = [self.model] if self.layers is None else self.layers
        chosen = {id(v): v for layer in layers for v in kernels(layer)}
        trained = {id(v) for v in self.model.trainable_variables}
        self._pruned = [v for key, v in chosen.items() if key in trained]
        if not self._pruned or (self.layers is not None and len(self._pruned) < len(chosen)):
            raise ValueError(
                f"layers must be trainable layers of the model; of {len(chosen)} kernels received, "
                f"{len(self._pruned)} are trained"
            )
        end = self._last_cut()
        times = np.append(np.arange(self.begin, end, self.frequency), end)
        sparsity = polynomial_decay(times, self.initial, self.final, self.begin, end, self.power)
        for v, mask in zip(self._pruned, _masks(self.model, self._pruned), strict=True):
            mask.plan(times, _kept(math.prod(v.shape), sparsity))
            mask.start(v)

    def _last_cut(self) -> int:
        """Return the step of the last cut, and make sure that it will be reached."""
        steps, epochs = self.params.get("steps"), self.params.get("epochs")
        total = steps * epochs if steps and epochs else None
        if self.end is not None:
            end = self.end
        elif total is not None:
            end = max(3 * total // 4, self.begin + 1)
        else:
            raise ValueError("end must be given for data of unknown length; received None")
        if total is not None and end >= total:
            raise ValueError(
                f"end must be a step of this training, at most {total - 1} with {steps} steps in "
                f"each of {epochs} epochs; received {self.end}"
            )
        return end

    def on_epoch_end(self, epoch, logs=None):
        """Put the sparsity into the history."""
        if logs is not None:
            zero = np.concatenate([v.numpy().ravel() == 0 for v in self._pruned])
            logs["sparsity"] = float(zero.mean())

    def on_train_end(self, logs=None):
        """Mask the weights, which an optimizer may just have averaged, and plan no more cuts."""
        for v in self._pruned:
            v.constraint.plan([], [])
            v.constraint.apply(v)


# -------------------------------------------------------------------------- proximal training


@keras.saving.register_keras_serializable(package="ch11lib")
class ProximalSGD(keras.optimizers.SGD):
    """Keras's SGD for ``loss + λ Σ|w|`` over all kernels, with the l1 part done by `proximal_l1`.

    Each step is one of SGD on the loss, and then the soft threshold ηλ on the kernels. Give no l1
    regularizer to the layers: the penalty is in the optimizer, and does not show in the loss.

    Zeros appear where the gradient of the loss, noise included, stays below λ. With momentum β the
    step along a persistent gradient grows to ``η/(1-β)`` but the threshold does not: it takes
    ``λ/(1-β)`` for the same balance.

    Parameters
    ----------
    learning_rate, momentum, nesterov, **options
        As in Keras's SGD.
    l1 : float
        λ, 0 or more.

    Examples
    --------
    >>> optimizer = ProximalSGD(0.5, l1=0.5)
    >>> w = keras.Variable([[1.0, 0.125, -1.0]])
    >>> optimizer.apply([tf.constant([[1.0, 0.0, 0.0]])], [w])
    >>> w.numpy().tolist()
    [[0.25, 0.0, -0.75]]
    """

    programs_can_be_shared = True  # its configuration is complete, see `training`

    def __init__(
        self,
        learning_rate: Any = 0.01,
        l1: float = 0.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        **options: Any,
    ):
        _check_strength("l1", l1)
        super().__init__(learning_rate, momentum=momentum, nesterov=nesterov, **options)
        self.l1 = float(l1)

    def update_step(self, gradient, variable, learning_rate):
        """Do the step for one variable."""
        super().update_step(gradient, variable, learning_rate)
        if _is_kernel(variable):
            w = tf.convert_to_tensor(variable)
            threshold = tf.cast(learning_rate, w.dtype) * tf.cast(self.l1, w.dtype)
            self.assign(variable, tf.sign(w) * tf.maximum(tf.abs(w) - threshold, 0))

    def get_config(self):
        """Return what `from_config` needs."""
        return super().get_config() | {"l1": self.l1}
