"""Gradient clipping: three rules, what they do to the direction, and how to choose the threshold.

The first part defines the rules in NumPy, on one array or on the list of a model's gradients. Keras
has them as arguments of every optimizer, and the tests hold Keras against these definitions:

================================  ============================  ===================================
function                          in Keras                      keeps the direction of
================================  ============================  ===================================
`clip_by_value`                   ``clipvalue``                 nothing
`clip_by_norm`                    ``clipnorm``                  each variable's gradient
`clip_by_global_norm`             ``global_clipnorm``           the whole gradient
`adaptive_clip`                   none                          each unit's gradient
================================  ============================  ===================================

The second part is what Keras does not have: `gradient_norms` measures how large the gradients of a
model are, and `record_norms` makes an optimizer note it at every step of training, so that a
threshold can be chosen from what was seen.

References
----------
Pascanu, Mikolov, Bengio (2013), On the difficulty of training recurrent neural networks,
arXiv:1211.5063.
Brock, De, Smith, Simonyan (2021), High-performance large-scale image recognition without
normalization, arXiv:2102.06171.
"""

from collections.abc import Callable, Sequence
import functools
import math
from numbers import Real
from typing import Any

from ch11lib.backend import keras, tf
import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "adaptive_clip",
    "angle",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "global_norm",
    "gradient_norms",
    "record_norms",
]

#: One gradient, or the gradients of several variables. None stands for a variable without one.
Gradients = ArrayLike | Sequence[ArrayLike | None]

# ------------------------------------------------------------------------------ the definition


def _array(gradient: ArrayLike | None, name: str = "gradients") -> np.ndarray | None:
    """Return an array of a floating type; whole numbers become float64, None stays None."""
    if gradient is None:
        return None
    try:
        array = np.asarray(gradient)
    except ValueError:
        raise ValueError(
            f"{name} must be one array, or a list of arrays; received nested lists of unequal "
            "lengths: turn each gradient into an array"
        ) from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be numeric; received an array of dtype {array.dtype}")
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _is_list(gradients) -> bool:
    """Tell a list of gradients from one gradient that is written as a list of numbers."""
    if not isinstance(gradients, list | tuple):
        return False
    if not gradients:
        raise ValueError("gradients must hold at least one gradient; received an empty list")
    return any(
        item is None or (hasattr(item, "shape") and not isinstance(item, np.generic))
        for item in gradients
    )


def _arrays(gradients: Gradients, name: str = "gradients") -> list[np.ndarray | None]:
    items: list = list(gradients) if _is_list(gradients) else [gradients]  # type: ignore[arg-type]
    arrays = [_array(item, name) for item in items]
    if all(array is None for array in arrays):
        raise ValueError(f"{name} must hold at least one gradient; received None only")
    return arrays


def _each(function: Callable, gradients: Gradients):
    """Apply a function to one gradient, or to each of a list."""
    arrays = [
        None if array is None else np.asarray(function(array)) for array in _arrays(gradients)
    ]
    return arrays if _is_list(gradients) else arrays[0]


def _check_threshold(name: str, value: float) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and value > 0):  # also refuses NaN
        raise ValueError(f"{name} must be a positive number; received {value!r}")


def _norm(array: np.ndarray) -> float:
    """Return the Euclidean norm. In float64, where squares of float32 do not overflow."""
    return float(np.linalg.norm(array.astype(np.float64)))


def _rescaled(array: np.ndarray, norm: float, limit: float) -> np.ndarray:
    """Shrink an array by ``limit / norm`` if that is below 1."""
    if norm <= limit:
        return array.copy()
    with np.errstate(invalid="ignore"):  # an infinite norm: inf * 0 is NaN
        return (array * np.float64(limit / norm)).astype(array.dtype)


def clip_by_value(g: Gradients, clip: float):
    """Limit every component to the range from ``-clip`` to ``clip``.

    Components that are too large change and the others do not, so the direction changes.

    Parameters
    ----------
    g : array, or list of arrays
        A gradient, or the gradients of several variables (entries None stay None).
    clip : float
        Positive limit.

    Returns
    -------
    numpy.ndarray or list
        Of the shape and floating type of `g`. Infinity becomes ``clip``, NaN stays NaN.

    Raises
    ------
    ValueError
        If `clip` is not positive, or the list is empty.

    Examples
    --------
    >>> clip_by_value([0.9, 100.0], 1.0)
    array([0.9, 1. ])
    """
    _check_threshold("clip", clip)
    return _each(lambda array: np.clip(array, -clip, clip), g)


def clip_by_norm(g: Gradients, max_norm: float):
    """Shrink each gradient whose norm exceeds a limit: ``g * max_norm / max(norm(g), max_norm)``.

    In a list, each array has a norm of its own. So the directions of the single arrays stay, but
    that of all together changes if some are shrunk and others are not.

    Parameters
    ----------
    g : array, or list of arrays
        A gradient, or the gradients of several variables (entries None stay None).
    max_norm : float
        Positive limit of the Euclidean norm.

    Returns
    -------
    numpy.ndarray or list
        Of the shape and floating type of `g`. Zero stays zero. If a gradient holds an infinity, its
        infinities become NaN and the rest 0; if it holds a NaN, it becomes NaN throughout.

    Raises
    ------
    ValueError
        If `max_norm` is not positive, or the list is empty.

    Notes
    -----
    Norms are computed in float64 here. TensorFlow squares in the gradient's own type, in float32
    therefore, where the squares overflow for norms from about 1.8e19 on; ``clipnorm`` then turns
    the gradient into 0, and ``global_clipnorm`` into NaN.

    Examples
    --------
    >>> clip_by_norm([0.9, 100.0], 1.0).round(6)
    array([0.009  , 0.99996])
    """
    _check_threshold("max_norm", max_norm)
    return _each(lambda array: _rescaled(array, _norm(array), max_norm), g)


def clip_by_global_norm(gradients: Gradients, max_norm: float):
    """Shrink all gradients by one factor, so that their common norm does not exceed a limit.

    ``g * max_norm / max(norm, max_norm)`` for each g, with ``norm`` as in `global_norm`. This keeps
    the direction of the whole gradient.

    Parameters
    ----------
    gradients : list of arrays, or one array
        The gradients of several variables (entries None stay None).
    max_norm : float
        Positive limit of the Euclidean norm of all together.

    Returns
    -------
    list or numpy.ndarray
        As `gradients`, with the floating type of each. Zero stays zero. If any component is not
        finite, all become NaN: what is left to learn from such a gradient is that it is useless.

    Raises
    ------
    ValueError
        If `max_norm` is not positive, or the list is empty.

    Notes
    -----
    Keras's ``global_clipnorm`` computes in float32 and overflows earlier, see `clip_by_norm`.

    Examples
    --------
    >>> [g.tolist() for g in clip_by_global_norm([np.array([3.0]), np.array([[4.0]])], 1.0)]
    [[0.6...], [[0.8]]]
    """
    _check_threshold("max_norm", max_norm)
    norm = global_norm(gradients)
    if not math.isfinite(norm):
        return _each(lambda array: np.full_like(array, np.nan), gradients)
    return _each(lambda array: _rescaled(array, norm, max_norm), gradients)


def global_norm(gradients: Gradients) -> float:
    """Return the Euclidean norm of several gradients, taken as one long vector.

    Parameters
    ----------
    gradients : list of arrays, or one array
        Entries None count nothing.

    Returns
    -------
    float
        Infinite or NaN if a component is.

    Examples
    --------
    >>> global_norm([np.array([3.0, 0.0]), np.array([[4.0]])])
    5.0
    """
    return _norm(np.array([_norm(g) for g in _arrays(gradients) if g is not None]))


def angle(a: Gradients, b: Gradients) -> float:
    """Return the angle between two gradients, in degrees.

    Computed from the unit vectors as ``2 atan2(|a - b|, |a + b|)``, which is precise for the
    smallest angles too, where the arc cosine is not.

    Parameters
    ----------
    a, b : array, or list of arrays
        Gradients of the same shapes; a list counts as one long vector.

    Returns
    -------
    float
        From 0 to 180. NaN if one of them is zero or not finite, and so has no direction.

    Examples
    --------
    >>> g = np.array([0.9, 100.0])
    >>> round(angle(g, clip_by_value(g, 1.0)), 1), round(angle(g, clip_by_norm(g, 1.0)), 1)
    (41.5, 0.0)
    """
    first, second = _arrays(a, "a"), _arrays(b, "b")
    shapes = [[None if g is None else g.shape for g in gradients] for gradients in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"b must have the shapes of a, {shapes[0]}; received {shapes[1]}")
    units = []
    for gradients in (first, second):
        vector = np.concatenate([g.astype(np.float64).ravel() for g in gradients if g is not None])
        largest = np.abs(vector).max(initial=0.0)
        if largest == 0 or not np.isfinite(largest):
            return math.nan
        vector /= largest  # whose squares neither vanish nor overflow
        units.append(vector / np.linalg.norm(vector))
    u, v = units
    return math.degrees(2 * math.atan2(np.linalg.norm(u - v), np.linalg.norm(u + v)))


def adaptive_clip(
    gradient: ArrayLike, weight: ArrayLike, clip: float = 0.01, epsilon: float = 1e-3
) -> np.ndarray:
    """Limit the norm of each unit's gradient to a fraction of the norm of its weights.

    ``g * limit / max(norm(g), limit)`` with ``limit = clip * max(norm(w), epsilon)``, unit by unit.
    A unit is one entry of the last axis, which counts the outputs of Keras's dense and convolution
    kernels; a vector (biases, gamma) is one unit as a whole.

    Parameters
    ----------
    gradient, weight : array
        A gradient and the variable that it belongs to, of the same shape.
    clip : float
        Largest ratio of the two norms.
    epsilon : float
        Smallest norm that counts for a unit's weights, so that zero weights can begin to learn.

    Returns
    -------
    numpy.ndarray
        Of the gradient's shape and floating type.

    Notes
    -----
    Adaptive gradient clipping of Brock et al. (2021), arXiv:2102.06171. They leave out the last
    layer of the network.

    Examples
    --------
    >>> weight = np.array([[3.0, 0.0], [4.0, 1.0]])
    >>> adaptive_clip(np.ones((2, 2)), weight, clip=0.1).round(3).tolist()
    [[0.354, 0.071], [0.354, 0.071]]
    """
    for name, value in {"clip": clip, "epsilon": epsilon}.items():
        _check_threshold(name, value)
        if math.isinf(value):
            raise ValueError(f"{name} must be finite; received {value!r}")
    g, w = _array(gradient, "gradient"), _array(weight, "weight")
    if g is None or w is None or g.shape != w.shape:
        shapes = [None if array is None else array.shape for array in (g, w)]
        raise ValueError(f"gradient and weight must have one shape; received {shapes}")
    axes = tuple(range(g.ndim - 1)) if g.ndim > 1 else None

    def norms(array):
        return np.sqrt(np.square(array.astype(np.float64)).sum(axes, keepdims=True))

    limit = clip * np.maximum(norms(w), epsilon)
    return (g * (limit / np.maximum(norms(g), limit))).astype(g.dtype)


# ------------------------------------------------------------------ how large are the gradients?


def gradient_norms(model: keras.Model, x: Any, y: Any, *, batch_size: int = 32) -> np.ndarray:
    """Measure the global norm of the gradient on each batch, at the weights as they are.

    Layers such as dropout and batch normalization work as in training. But nothing is trained, and
    the model stays as it is: its weights, moving averages, metrics and seeds are put back
    afterwards. For the norms along a training run see `record_norms`.

    Parameters
    ----------
    model : keras.Model
        A compiled model.
    x, y : array, or nested structure of arrays
        Data, taken in their order.
    batch_size : int
        The norm depends on it: the mean gradient of a larger batch has less noise in it.

    Returns
    -------
    numpy.ndarray, shape (batches,)
        A smaller last batch counts as one.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.compile(loss="mse")
    >>> model.set_weights([np.zeros((1, 1))])
    >>> gradient_norms(model, np.ones((4, 1)), np.array([[1.0], [1.0], [3.0], [3.0]]), batch_size=2)
    array([2., 6.])
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model; received {type(model).__name__}")
    if not model.compiled:
        raise ValueError("model must be compiled, because the loss is needed; received one without")
    if isinstance(batch_size, bool) or batch_size != int(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer; received {batch_size!r}")
    x, y = (keras.tree.map_structure(_data, part) for part in (x, y))
    lengths = {int(part.shape[0]) for part in keras.tree.flatten((x, y))}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "x and y must have one length of at least 1; received lengths "
            f"{', '.join(map(str, sorted(lengths)))}"
        )
    [n] = lengths
    if not model.built:
        model(keras.tree.map_structure(lambda part: part[:1], x))
    variables = model.trainable_variables
    if not variables:
        raise ValueError(f"model must have trainable weights; {model.name!r} has none")

    @functools.partial(tf.function, autograph=False, reduce_retracing=True)
    def norm(batch_x, batch_y):
        with tf.GradientTape() as tape:
            y_pred = model(batch_x, training=True)
            loss = model.compute_loss(x=batch_x, y=batch_y, y_pred=y_pred, training=True)
        return tf.norm(_norms(tape.gradient(loss, [v.value for v in variables])))

    def batch(part, start):
        return keras.tree.map_structure(lambda array: array[start : start + batch_size], part)

    before = {id(v): v.numpy() for v in _state(model)}
    try:
        return np.array(
            [float(norm(batch(x, i), batch(y, i))) for i in range(0, n, int(batch_size))]
        )
    finally:
        for v in _state(model):
            # The first call of a loss creates sums of its own, which start from zero.
            v.assign(before.get(id(v), np.zeros(v.shape)))


def _state(model) -> list[keras.Variable]:
    """Return what a forward pass and a loss may change."""
    return [*model.non_trainable_variables, *model.metrics_variables]


def _data(array):
    array = np.asarray(array)
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise TypeError(
            "x and y must be numeric arrays with an axis of examples; received an array of dtype "
            f"{array.dtype} and shape {array.shape}"
        )
    return tf.constant(array.astype(keras.config.floatx()) if array.dtype.kind == "f" else array)


def _norms(gradients) -> tf.Tensor:
    """Return one norm per gradient, 0 for None. In float64, where float32 has no overflow."""
    return tf.stack(
        [
            tf.zeros((), tf.float64)
            if g is None
            else tf.norm(tf.cast(tf.convert_to_tensor(g), tf.float64))
            for g in gradients
        ]
    )


class _RecordsNorms:
    """What `record_norms` adds to an optimizer class."""

    #: Set by `record_norms` before the optimizer is built.
    _norms_kept = 1

    # Of the optimizer.
    built: bool
    iterations: Any

    def build(self, variables):
        """Create the optimizer's variables and the record."""
        super().build(variables)
        # One of the optimizer's own variables, because only such a one is at home everywhere: in
        # model.fit, in the compiled epochs of `training.fit`, under XLA and in a saved model.
        self._record = self.add_variable(
            shape=(self._norms_kept, len(variables)),
            initializer="zeros",
            dtype="float32",
            name="gradient_norms",
        )

    def apply(self, grads, trainable_variables=None):
        """Do the step, and note the norms of the gradients that it was given."""
        grads, known = list(grads), trainable_variables
        super().apply(grads, known)
        if not grads:
            return
        row = [None] * len(self._trainable_variables)
        for gradient, variable in zip(grads, known or self._trainable_variables, strict=True):
            row[self._get_variable_index(variable)] = gradient
        norms = _norms(row) / (self.loss_scale_factor or 1)
        at = (self.iterations.value - 1) % self._norms_kept
        before = self._record.value
        self._record.assign(
            tf.tensor_scatter_nd_update(before, [[at]], tf.cast(norms, tf.float32)[None])
        )

    @property
    def variable_norms(self) -> np.ndarray:
        """Norms of the gradient of each variable: one row per step, one column per variable."""
        if not self.built:
            raise ValueError("nothing has been recorded yet: train the model first")
        steps, record = int(self.iterations.numpy()), self._record.numpy()
        if steps <= len(record):
            return record[:steps]
        return np.roll(record, -(steps % len(record)), axis=0)

    @property
    def gradient_norms(self) -> np.ndarray:
        """Norm of the whole gradient at each step."""
        return np.linalg.norm(self.variable_norms.astype(np.float64), axis=1)


def record_norms(optimizer: keras.optimizers.Optimizer, steps: int) -> keras.optimizers.Optimizer:
    """Return an optimizer that does the same and notes the gradient norms at every step.

    Noted is what comes out of backpropagation, before any clipping. The returned optimizer has two
    attributes: ``gradient_norms``, the norm of the whole gradient at each step, and
    ``variable_norms``, one row per step and one column per variable, in the order of
    ``model.trainable_variables``. From these follow the usual numbers, by plain NumPy:

    - a threshold: ``np.percentile(optimizer.gradient_norms, 90)``;
    - the fraction of steps that ``global_clipnorm=c`` has clipped, or would clip:
      ``np.mean(optimizer.gradient_norms > c)``;
    - the same for ``clipnorm=c``: ``np.mean((optimizer.variable_norms > c).any(axis=1))``.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Any Keras optimizer that has not been used yet, with its clipping, schedule and so on. It is
        copied from its configuration and not changed.
    steps : int
        How many steps to keep: the last ones, if there are more.

    Returns
    -------
    keras.optimizers.Optimizer
        Of a subclass of the optimizer's class, to be passed to `model.compile`.

    Raises
    ------
    TypeError, ValueError
        If `optimizer` is not a Keras optimizer, is in use already, accumulates gradients over steps
        or wraps another optimizer (wrap the inner one instead); or if `steps` is not positive.

    Notes
    -----
    It works in `model.fit` and, at full speed, in the compiled epochs of `training.fit`, which are
    shared by all models of one architecture that record equally many steps. The norms are computed
    in float64 and stored in float32, four bytes for each variable and step.

    Models that are cloned or loaded from a file have a plain optimizer in its initial state.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.set_weights([np.zeros((1, 1))])
    >>> optimizer = record_norms(keras.optimizers.SGD(0.25, global_clipnorm=1.0), steps=100)
    >>> model.compile(optimizer, loss="mse")
    >>> _ = model.fit(np.ones((1, 1)), np.ones((1, 1)), epochs=4, verbose=0)
    >>> optimizer.gradient_norms.tolist()
    [2.0, 1.5, 1.0, 0.5]
    >>> float(np.mean(optimizer.gradient_norms > 1.0))
    0.5
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "optimizer must be a Keras optimizer, such as keras.optimizers.SGD(0.1); received "
            f"{optimizer!r}"
        )
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"steps must be a positive integer; received {steps!r}")
    if isinstance(optimizer, _RecordsNorms):
        raise ValueError("optimizer must not record already; received one from record_norms")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer | keras.optimizers.MultiOptimizer):
        raise TypeError(
            f"optimizer must not wrap another one; received a {type(optimizer).__name__}: wrap the "
            "result of record_norms instead"
        )
    if optimizer.built:
        raise ValueError("optimizer must be new; received one that has been used already")
    if optimizer.gradient_accumulation_steps:
        raise ValueError(
            "optimizer must not accumulate gradients, because the norm of a part says little about "
            "what is clipped; received gradient_accumulation_steps="
            f"{optimizer.gradient_accumulation_steps}"
        )
    kind = type(optimizer)
    # Under the name of the plain class, so that clones and saved models find that one.
    recording: Any = type(kind.__name__, (_RecordsNorms, kind), {"__module__": kind.__module__})
    copy = recording.from_config(optimizer.get_config())
    copy._norms_kept = int(steps)
    return copy
