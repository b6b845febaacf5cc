"""Batch normalization: its equations forwards and backwards, moving statistics, and its removal.

The first part is the definition in NumPy. `forward` normalizes by the statistics of the batch, as
in training, and `backward` is its gradient; `infer` normalizes by given statistics, as afterwards;
`moving_average` is the rule that makes the one set of statistics from the other, and `steps_until`
says how slow it is. Keras has all this (`keras.layers.BatchNormalization`), and the tests hold it
against these definitions. `layer_norm` stands beside it for comparison.

The second part is what Keras does not have: `fold` merges the normalization layers of a trained
model into their neighbours, because with fixed statistics each is only ``scale * x + shift``.

The symbols are those of the paper: ``x_hat = (x - mean) / sqrt(variance + epsilon)`` and
``out = gamma * x_hat + beta``.

References
----------
Ioffe, Szegedy (2015), Batch normalization: accelerating deep network training by reducing internal
covariate shift, arXiv:1502.03167.
Ba, Kiros, Hinton (2016), Layer normalization, arXiv:1607.06450.
Yang, Pennington, Rao, Sohl-Dickstein, Schoenholz (2019), A mean field theory of batch
normalization, arXiv:1902.08129.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
import math
from numbers import Real
from typing import Any, NamedTuple

from ch11lib.backend import keras
import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "Cache",
    "Gradients",
    "backward",
    "fold",
    "forward",
    "gradient_factor",
    "infer",
    "layer_norm",
    "moving_average",
    "steps_until",
]

# ------------------------------------------------------------------------------ the definition


class Cache(NamedTuple):
    """What `backward` needs from `forward`.

    Attributes
    ----------
    x_hat : numpy.ndarray
        The normalized input, of the input's shape.
    mean, variance : numpy.ndarray
        Statistics of the batch, one for each feature. The variance is the biased one: the squared
        deviations are divided by their number, not by one less.
    inverse_std : numpy.ndarray
        ``1 / sqrt(variance + epsilon)``.
    gamma : numpy.ndarray or None
        The scale that was applied.
    axes : tuple of int
        Axes of the features; mean and variance are taken over all the others.
    """

    x_hat: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    inverse_std: np.ndarray
    gamma: np.ndarray | None
    axes: tuple[int, ...]


class Gradients(NamedTuple):
    """Gradients of the loss with respect to the input, gamma and beta."""

    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray


def _floating(array: ArrayLike, name: str) -> np.ndarray:
    """Return an array of float32 or float64; other numbers become float64."""
    array = np.asarray(array)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be numeric; received an array of dtype {array.dtype}")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)


def _input(x: ArrayLike, epsilon: float) -> np.ndarray:
    x = _floating(x, "x")
    if x.size == 0:
        raise ValueError(f"x must hold at least one value; received shape {x.shape}")
    if not (isinstance(epsilon, Real) and 0 <= epsilon < math.inf):
        raise ValueError(f"epsilon must be finite and at least 0; received {epsilon!r}")
    return x


def _axes(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Return the axes of the features, counted from the front and in order."""
    given = tuple(int(a) for a in np.atleast_1d(axis))
    axes = sorted({a % ndim for a in given if -ndim <= a < ndim})
    if not given or len(axes) != len(given):
        raise ValueError(f"axis must name distinct axes of x, which has {ndim}; received {axis!r}")
    if len(axes) == ndim:
        raise ValueError(f"axis must leave an axis of x to average over; received {axis!r}")
    return tuple(axes)


def _spread(value: ArrayLike | None, name: str, x: np.ndarray, axes: tuple[int, ...]):
    """Shape one value per feature so that it broadcasts against `x`; None stays None."""
    if value is None:
        return None
    value, expected = _floating(value, name), tuple(x.shape[a] for a in axes)
    if value.shape != expected:
        raise ValueError(
            f"{name} must have shape {expected}, one value per feature; received {value.shape}"
        )
    wide = [size if a in axes else 1 for a, size in enumerate(x.shape)]
    return value.astype(x.dtype, copy=False).reshape(wide)


def _affine(x_hat, gamma, beta):
    out = x_hat if gamma is None else gamma * x_hat
    return out if beta is None else out + beta


def _inverse_std(variance: np.ndarray, epsilon: float) -> np.ndarray:
    if epsilon == 0 and not (variance > 0).all():
        raise ValueError("epsilon must be positive, because a variance is 0; received 0")
    return 1 / np.sqrt(variance + variance.dtype.type(epsilon))


def forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    epsilon: float = 1e-3,
    axis: int | Sequence[int] = -1,
) -> tuple[np.ndarray, Cache]:
    """Normalize each feature by its mean and variance over the batch, as Keras does in training.

    ``x_hat = (x - mean) / sqrt(variance + epsilon)``, ``out = gamma * x_hat + beta``.

    Parameters
    ----------
    x : array
        The batch. With shape (examples, features) the defaults are right; images (examples,
        height, width, channels) then have one mean and variance for each channel.
    gamma, beta : array, one value per feature, optional
        Scale and shift; None leaves one out, as Keras's ``scale=False`` and ``center=False`` do.
    epsilon : float
        Added to the variance. Keras's default; the paper's experiments use a smaller one.
    axis : int or sequence of int
        Which axes count the features. Keras takes one only; with several, gamma and beta have the
        shape of these axes: ``axis=(1, 2)`` treats every pixel for itself.

    Returns
    -------
    out : numpy.ndarray
        Of the shape of `x`. Computed in float32 if `x` is float32, otherwise in float64.
    cache : Cache
        For `backward`; it also holds the statistics of the batch, for `moving_average`.

    Raises
    ------
    ValueError
        If shapes do not fit, or if `epsilon` is 0 and a feature is constant.

    Examples
    --------
    >>> out, cache = forward([[1.0, 10.0], [3.0, 50.0]], epsilon=0)
    >>> out.tolist(), cache.mean.tolist(), cache.variance.tolist()
    ([[-1.0, -1.0], [1.0, 1.0]], [2.0, 30.0], [1.0, 400.0])
    """
    x = _input(x, epsilon)
    axes = _axes(axis, x.ndim)
    gamma, beta = _spread(gamma, "gamma", x, axes), _spread(beta, "beta", x, axes)
    others = tuple(a for a in range(x.ndim) if a not in axes)
    mean = x.mean(others, keepdims=True)
    variance = np.square(x - mean).mean(others, keepdims=True)
    inverse_std = _inverse_std(variance, epsilon)
    x_hat = (x - mean) * inverse_std

    mean, variance = mean.squeeze(others), variance.squeeze(others)
    return _affine(x_hat, gamma, beta), Cache(x_hat, mean, variance, inverse_std, gamma, axes)


def backward(dout: ArrayLike, cache: Cache) -> Gradients:
    """Backpropagate through `forward`.

    ``dgamma = sum(dout * x_hat)``, ``dbeta = sum(dout)``, both over the batch, and ::

        dx = gamma / sqrt(variance + epsilon)
             * (dout - average(dout) - x_hat * average(dout * x_hat))

    The two averages are there because mean and variance depend on every x of the batch. They take
    out of the gradient what would only shift or stretch a feature. So `dx` sums to 0 over the
    batch, and its product with x_hat sums to 0 too if epsilon is 0; otherwise a part of
    ``epsilon / (variance + epsilon)`` of the latter remains.

    Parameters
    ----------
    dout : array
        Gradient of the loss with respect to the output of `forward`, of the same shape.
    cache : Cache
        From `forward`.

    Returns
    -------
    Gradients
        ``dx``, ``dgamma``, ``dbeta``; the latter two also if `forward` had no gamma or beta.

    Examples
    --------
    >>> out, cache = forward([[0.0], [1.0], [4.0]])
    >>> dx, dgamma, dbeta = backward([[1.0], [0.0], [0.0]], cache)
    >>> abs(float(dx.sum())) < 1e-15, dbeta.tolist()
    (True, [1.0])
    """
    x_hat, axes = cache.x_hat, cache.axes
    dout = _floating(dout, "dout")
    if dout.shape != x_hat.shape:
        raise ValueError(f"dout must have the output's shape {x_hat.shape}; received {dout.shape}")
    others = tuple(a for a in range(x_hat.ndim) if a not in axes)
    dbeta = dout.sum(others, keepdims=True)
    dgamma = (dout * x_hat).sum(others, keepdims=True)
    count = x_hat.size // dbeta.size
    dx = cache.inverse_std * (dout - dbeta / count - x_hat * (dgamma / count))
    if cache.gamma is not None:
        dx = dx * cache.gamma
    return Gradients(dx, dgamma.squeeze(others), dbeta.squeeze(others))


def infer(
    x: ArrayLike,
    moving_mean: ArrayLike,
    moving_variance: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    epsilon: float = 1e-3,
    axis: int | Sequence[int] = -1,
) -> np.ndarray:
    """Normalize by given statistics, as Keras does outside of training.

    Parameters
    ----------
    x, gamma, beta, epsilon, axis
        As in `forward`.
    moving_mean, moving_variance : array, one value per feature
        See `moving_average`.

    Returns
    -------
    numpy.ndarray
        ``gamma * (x - moving_mean) / sqrt(moving_variance + epsilon) + beta``.

    Examples
    --------
    >>> infer([[1.0, 10.0]], [0.0, 30.0], [4.0, 400.0], beta=[0.0, 5.0], epsilon=0)
    array([[0.5, 4. ]])
    """
    x = _input(x, epsilon)
    axes = _axes(axis, x.ndim)
    named = {"moving_mean": moving_mean, "moving_variance": moving_variance}
    for name, value in named.items():
        if value is None:
            raise TypeError(f"{name} must be an array with one value per feature; received None")
    mean, variance = (_spread(value, name, x, axes) for name, value in named.items())
    if not (variance >= 0).all():
        raise ValueError(f"moving_variance must not be negative; received {variance.min()}")
    x_hat = (x - mean) * _inverse_std(variance, epsilon)
    return _affine(x_hat, _spread(gamma, "gamma", x, axes), _spread(beta, "beta", x, axes))


def moving_average(moving: ArrayLike, batch: ArrayLike, momentum: float = 0.99) -> np.ndarray:
    """Return a moving statistic after one more batch.

    ``momentum * moving + (1 - momentum) * batch``, for the mean as for the variance. Keras starts
    from mean 0 and variance 1, and takes the biased variance of each batch.

    Parameters
    ----------
    moving, batch : array
        The statistic so far, and that of the new batch (`Cache.mean`, `Cache.variance`).
    momentum : float
        Share of the old value that stays, from 0 to 1.

    Examples
    --------
    >>> moving_average([0.0, 1.0], [10.0, 2.0], momentum=0.9).round(6).tolist()
    [1.0, 1.1]
    """
    if not (isinstance(momentum, Real) and 0 <= momentum <= 1):
        raise ValueError(f"momentum must lie between 0 and 1; received {momentum!r}")
    moving, batch = _floating(moving, "moving"), _floating(batch, "batch")
    if moving.shape != batch.shape:
        raise ValueError(f"batch must have moving's shape {moving.shape}; received {batch.shape}")
    return momentum * moving + (1 - momentum) * batch


def steps_until(fraction: float = 0.95, momentum: float = 0.99) -> int:
    """Return after how many batches a moving average has taken up a fraction of a change.

    When the batch statistic jumps and stays, the average keeps ``momentum**n`` of the distance
    after n batches. So n is the smallest with ``momentum**n <= 1 - fraction``, which is
    ``log(1 - fraction) / log(momentum)``, rounded up.

    Parameters
    ----------
    fraction : float
        Between 0 and 1, both excluded.
    momentum : float
        From 0 to below 1.

    Examples
    --------
    >>> [steps_until(momentum=m) for m in (0.9, 0.99, 0.999)]
    [29, 299, 2995]
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1; received {fraction!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1; received {momentum!r}")
    if momentum == 0:
        return 1
    steps = math.log1p(-fraction) / math.log(momentum)
    # A quotient that is a whole number in exact arithmetic, such as log(1/4) / log(1/2), stays it.
    return max(1, math.ceil(steps * (1 - 1e-12)))


def layer_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    epsilon: float = 1e-3,
) -> np.ndarray:
    """Normalize each example (each position) over its features, the last axis.

    The same equation as in `forward`, along the other axis: no example depends on another, so that
    training and inference are the same, and there is nothing to average over batches or time steps.

    Parameters
    ----------
    x, gamma, beta, epsilon
        As in `forward`; gamma and beta hold one value per feature.

    Examples
    --------
    >>> layer_norm([[1.0, 3.0], [10.0, 50.0]], epsilon=0).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """
    x = _input(x, epsilon)
    features = _axes(-1, x.ndim)
    gamma, beta = _spread(gamma, "gamma", x, features), _spread(beta, "beta", x, features)
    mean = x.mean(-1, keepdims=True)
    variance = np.square(x - mean).mean(-1, keepdims=True)
    return _affine((x - mean) * _inverse_std(variance, epsilon), gamma, beta)


def gradient_factor(
    activation: Callable[[np.ndarray], np.ndarray],
    derivative: Callable[[np.ndarray], np.ndarray],
) -> float:
    """Return by how much a batch-normalized layer multiplies the error signal, at initialization.

    In wide layers with random weights and large batches, with z normalized before the activation
    f, the root mean square of dL/dz grows per layer, downwards, by ::

        sqrt(E[f'(z)**2] / Var[f(z)]),   z standard normal.

    The variance of the weights cancels. By Poincaré's inequality the factor is at least 1, and 1
    for linear functions only; for ReLU it is ``sqrt(pi / (pi - 1))`` = 1.21 (Yang et al. 2019).

    Parameters
    ----------
    activation, derivative : callable
        f and its derivative, elementwise functions of an array.

    Examples
    --------
    >>> round(gradient_factor(np.tanh, lambda z: 1 / np.cosh(z) ** 2), 3)
    1.085
    """
    # An even number of nodes, so that none lies on the corner of ReLU.
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    weights = weights / weights.sum()
    f, slope = (np.asarray(g(nodes), np.float64) for g in (activation, derivative))
    variance = weights @ (f - weights @ f) ** 2
    if not variance > 0:
        raise ValueError("activation must not be constant; its variance is 0")
    return float(np.sqrt(weights @ slope**2 / variance))


# ------------------------------------------------------------------ folding it away, for inference

_LAYERS = keras.layers
_DEPTHWISE = (_LAYERS.DepthwiseConv1D, _LAYERS.DepthwiseConv2D)
_SEPARABLE = (_LAYERS.SeparableConv1D, _LAYERS.SeparableConv2D)
_TRANSPOSED = (_LAYERS.Conv1DTranspose, _LAYERS.Conv2DTranspose, _LAYERS.Conv3DTranspose)
_CONVOLUTIONS = (_LAYERS.Conv1D, _LAYERS.Conv2D, _LAYERS.Conv3D)
_LINEAR = (_LAYERS.Dense, *_CONVOLUTIONS, *_DEPTHWISE, *_SEPARABLE, *_TRANSPOSED)
_PASSED_THROUGH = (  # without effect in inference
    _LAYERS.ActivityRegularization,
    _LAYERS.AlphaDropout,
    _LAYERS.Dropout,
    _LAYERS.GaussianDropout,
    _LAYERS.GaussianNoise,
    _LAYERS.Identity,
    _LAYERS.SpatialDropout1D,
    _LAYERS.SpatialDropout2D,
    _LAYERS.SpatialDropout3D,
)


def fold(model: keras.Model, *, partial: bool = False) -> keras.Model:
    """Return an equivalent model for inference, without batch normalization.

    With its moving statistics a batch-normalization layer computes ``scale * x + shift`` for each
    channel, with ``scale = gamma / sqrt(moving_variance + epsilon)`` and
    ``shift = beta - moving_mean * scale``. A dense layer or a convolution beside it can do this:

    - *before it* (backward), if it has no activation function: kernel and bias are multiplied by
      ``scale``, and ``shift`` is added to the bias;
    - *after it* (forward), also if the layer is the first, or follows an activation: each row of
      the kernel is multiplied by the scale of its input, and what ``shift`` adds to the output goes
      into the bias. A convolution must not pad with zeros then (``padding="valid"``), unless the
      shift is 0: those zeros come in after the normalization, so that the shift would be missing
      at the border only, which no bias can express. The same holds for transposed convolutions.

    Dropout and other layers that do nothing in inference may stand between, and a Flatten in the
    forward direction. Models inside the model are folded each for itself.

    Parameters
    ----------
    model : keras.Model
        A Sequential or functional model whose layers have their shapes. It is not changed.
    partial : bool
        What to do with a normalization that cannot be folded: raise an error, or, if True, leave it
        in the result.

    Returns
    -------
    keras.Model
        Sequential if `model` is, otherwise functional. It has layers and weights of its own, with
        the names of the originals, and is not compiled. Training it is not equivalent.

    Raises
    ------
    ValueError
        If a normalization cannot be folded, with its name and the reason; or if the shapes are not
        known yet.
    TypeError
        If `model` is subclassed: how it connects its layers is known to its code only.

    Notes
    -----
    The arithmetic is done in float64 and rounded once. Folded backward are: Dense, Conv, depthwise,
    separable and transposed convolutions; the layer must be called once, and only the normalization
    may use its output. Forward: the same ones, for every use of the normalization's output.

    Examples
    --------
    >>> layers = [keras.layers.Dense(3, use_bias=False), keras.layers.BatchNormalization()]
    >>> model = keras.Sequential([keras.Input((2,)), *layers, keras.layers.ReLU()])
    >>> [type(layer).__name__ for layer in fold(model).layers]
    ['Dense', 'ReLU']
    """
    graph = _Graph(_functional(model))
    obstacles = graph.fold_all()
    if obstacles and not partial:
        raise ValueError("; ".join(obstacles))

    clones: dict[int, Any] = {}

    def clone(layer):
        config = layer.get_config()
        if layer in graph.weights:
            config["use_bias"] = True
        if layer in graph.models:
            copy = fold(layer, partial=partial)
        else:
            copy = type(layer).from_config(config)
        clones[id(layer)] = copy
        return copy

    if isinstance(model, keras.Sequential):
        [x] = model.inputs
        start = keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name)
        stay = [clone(layer) for layer in model.layers if layer not in graph.removed]
        folded = keras.Sequential([start, *stay], name=model.name)
    else:
        gone = set()

        def clone_or_drop(layer):
            copy = clone(layer)
            if layer in graph.removed:
                gone.add(id(copy))
            return copy

        def call(layer, *args, **kwargs):
            if id(layer) in gone:
                return [*args, *kwargs.values()][0]
            return layer(*args, **kwargs)

        folded = keras.models.clone_model(
            graph.functional, clone_function=clone_or_drop, call_function=call
        )
    for layer in graph.layers:
        if layer not in graph.removed | graph.models:
            _copy_weights(layer, clones[id(layer)], graph.weights.get(layer))
    return folded


def _functional(model: keras.Model) -> keras.Model:
    """Return the model's graph of layers as a functional model that is not compiled."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model; received {type(model).__name__}")
    if not _has_graph(model):
        raise TypeError(
            "model must be Sequential or functional, because only these say how their layers are "
            f"connected; received the subclassed model {type(model).__name__}"
        )
    if not model.built:
        raise ValueError(
            f"model must know its input shape: begin {model.name!r} with keras.Input, or call it "
            "on data once; received a model that is not built"
        )
    if isinstance(model, keras.Sequential):
        # Inside another model, its attribute `input` would be the tensor that it gets there.
        return keras.Model(*model.inputs, *model.outputs, name=model.name)
    return keras.Model(model.input, model.output, name=model.name)


def _has_graph(layer) -> bool:
    # keras.Model is itself a function of the graph's ends only if Keras made it functional.
    return isinstance(layer, keras.Sequential) or (
        isinstance(layer, keras.Model) and hasattr(layer, "_nodes")
    )


def _is_norm(layer) -> bool:
    return isinstance(layer, _LAYERS.BatchNormalization)


def _in_training(node) -> bool:
    """Whether a layer is called with ``training=True`` whatever the model does."""
    return bool(node.arguments.kwargs.get("training"))


class _ObstacleError(Exception):
    """Why a fold is not possible."""


class _Graph:
    """The calls (Keras's nodes) of a functional model, and what has been folded so far.

    Attributes
    ----------
    weights : dict
        New weights of the layers that took up a normalization.
    removed : set
        Normalizations that were folded.
    models : set
        Models inside the model, which `fold` treats for themselves.
    """

    def __init__(self, functional):
        self.functional = functional
        self.nodes = [
            node
            for _, nodes in sorted(functional._nodes_by_depth.items(), reverse=True)
            for node in nodes
            if not node.is_input
        ]
        self.origin = {id(tensor): node for node in self.nodes for tensor in node.output_tensors}
        self.users = defaultdict(list)
        for node in self.nodes:
            for tensor in node.input_tensors:
                self.users[id(tensor)].append(node)
        for tensor in functional.outputs:
            self.users[id(tensor)].append(None)
        self.calls = Counter(node.operation for node in self.nodes)
        self.layers = [layer for layer in self.calls if isinstance(layer, keras.Layer)]
        self.weights: dict[Any, dict[str, np.ndarray]] = {}
        self.removed: set = set()
        trained = {node.operation for node in self.nodes if _in_training(node)}
        self.models = {layer for layer in self.layers if _has_graph(layer)} - trained

    def fold_all(self) -> list[str]:
        """Fold what can be folded; say of each other normalization why it cannot be."""
        norms = [node for node in self.nodes if _is_norm(node.operation)]
        while True:
            before, obstacles = len(self.removed), []
            for node in norms:
                if node.operation not in self.removed:
                    obstacles += self._fold(node)
            # What one normalization could not do may be possible once another one is gone.
            if len(self.removed) == before:
                break
        inside = [
            f"{part.name!r} cannot be folded: it is inside {layer.name!r} "
            f"({type(layer).__name__}), where its neighbours are not known"
            for layer in self.layers
            if layer not in self.models and not _is_norm(layer)
            for part in layer._flatten_layers(include_self=False)
            if _is_norm(part)
        ]
        return list(dict.fromkeys(obstacles + inside))

    def _fold(self, node) -> list[str]:
        norm = node.operation
        try:
            self._check(node)
        except _ObstacleError as obstacle:
            return [f"{norm.name!r} cannot be folded: {obstacle}"]
        reasons = []
        for way, fold_into_neighbour in (("backward", self._backward), ("forward", self._forward)):
            try:
                fold_into_neighbour(node, *_scale_and_shift(norm))
            except _ObstacleError as obstacle:
                reasons.append(f"{way}, {obstacle}")
            else:
                self.removed.add(norm)
                return []
        return [f"{norm.name!r} cannot be folded: {'; '.join(reasons)}"]

    def _check(self, node):
        norm = node.operation
        if type(norm) is not _LAYERS.BatchNormalization:
            raise _ObstacleError(f"{type(norm).__name__} may compute anything else")
        if self.calls[norm] > 1:
            raise _ObstacleError(f"the model calls it {self.calls[norm]} times")
        if _in_training(node):
            raise _ObstacleError("it is called with training=True, so it always uses the batch")

    def _passes(self, node) -> bool:
        layer = node.operation
        if layer in self.removed:
            return True
        return type(layer) in _PASSED_THROUGH and not _in_training(node)

    def _backward(self, norm_node, scale, shift):
        [tensor] = norm_node.input_tensors
        axis = norm_node.operation.axis % len(tensor.shape)
        while True:
            node = self.origin.get(id(tensor))
            if node is None:
                raise _ObstacleError("there is only the model's input")
            layer = node.operation
            if len(self.users[id(tensor)]) > 1:
                raise _ObstacleError(f"the output of {layer.name!r} is used elsewhere too")
            if not self._passes(node):
                break
            [tensor] = node.input_tensors
        self._check_linear(layer)
        if layer.activation not in (None, keras.activations.linear):
            raise _ObstacleError(f"an activation function stands between, that of {layer.name!r}")
        self._check_axis(layer, axis, len(tensor.shape))
        self.weights[layer] = _absorb_after(layer, self._weights_of(layer), scale, shift)

    def _forward(self, norm_node, scale, shift):
        [tensor] = norm_node.output_tensors
        axis = norm_node.operation.axis % len(tensor.shape)
        changed = {}
        for layer, flat in self._ends(tensor):
            self._check_linear(layer)
            here = scale, shift
            if flat:
                here = [_flattened(value, tensor.shape[1:], axis - 1) for value in here]
            else:
                self._check_axis(layer, axis, len(tensor.shape))
            if here[1].any() and _depends_on_place(layer):
                why = (
                    "sums fewer terms near the border"
                    if type(layer) in _TRANSPOSED
                    else f"pads with zeros (padding={layer.padding!r}), which get no shift"
                )
                raise _ObstacleError(
                    f"{layer.name!r} ({type(layer).__name__}) {why}, so that the shift would have "
                    "to differ between border and middle, and a bias cannot"
                )
            changed[layer] = _absorb_before(layer, self._weights_of(layer), *here)
        self.weights |= changed

    def _ends(self, tensor, flat=False) -> Iterator[tuple[keras.Layer, bool]]:
        """Yield the layers that take up a tensor, and whether it is flattened on the way."""
        for node in self.users[id(tensor)]:
            if node is None:
                raise _ObstacleError("its output is an output of the model")
            layer = node.operation
            if self._passes(node) or _flattens(layer):
                yield from self._ends(node.output_tensors[0], flat or _flattens(layer))
            else:
                yield layer, flat

    def _check_linear(self, layer):
        if type(layer) not in _LINEAR:
            raise _ObstacleError(
                f"{layer.name!r} ({type(layer).__name__}) is neither Dense nor a convolution"
            )
        if self.calls[layer] > 1:
            raise _ObstacleError(f"the model calls {layer.name!r} {self.calls[layer]} times")
        if not all(keras.backend.is_float_dtype(v.dtype) for v in layer.weights):
            raise _ObstacleError(f"{layer.name!r} has quantized weights")

    def _check_axis(self, layer, axis, ndim):
        first = getattr(layer, "data_format", None) == "channels_first"
        if axis != (1 if first else ndim - 1):
            raise _ObstacleError(f"axis {axis} does not count the channels of {layer.name!r}")

    def _weights_of(self, layer) -> dict[str, np.ndarray]:
        return self.weights.get(layer) or _read_weights(layer)


def _scale_and_shift(norm) -> tuple[np.ndarray, np.ndarray]:
    """Return what a normalization does in inference, ``scale * x + shift``, in float64."""
    parts = ("gamma", "beta", "moving_mean", "moving_variance")
    gamma, beta, mean, variance = (
        None if variable is None else np.asarray(variable, np.float64)
        for variable in (getattr(norm, part) for part in parts)
    )
    scale = 1 / np.sqrt(variance + norm.epsilon)
    scale = scale if gamma is None else gamma * scale
    return scale, (0 if beta is None else beta) - mean * scale


def _flattens(layer) -> bool:
    # With "channels_first", Flatten moves the channels to the end before it flattens.
    return type(layer) is _LAYERS.Flatten and layer.data_format == "channels_last"


def _flattened(value, shape, axis) -> np.ndarray:
    """Return one value per element of a flattened example, from one value per channel."""
    if None in shape:
        raise _ObstacleError(f"the shape {tuple(shape)} before Flatten is not known in full")
    wide = [-1 if a == axis else 1 for a in range(len(shape))]
    return np.broadcast_to(value.reshape(wide), shape).ravel()


def _depends_on_place(layer) -> bool:
    """Whether a constant input gives a constant output only away from the border."""
    if isinstance(layer, _LAYERS.Dense):
        return False
    pads = layer.padding != "valid" and any(size > 1 for size in layer.kernel_size)
    return pads or isinstance(layer, _TRANSPOSED)


def _read_weights(layer) -> dict[str, np.ndarray]:
    names = ("depthwise_kernel", "pointwise_kernel") if type(layer) in _SEPARABLE else ("kernel",)
    weights = {name: np.asarray(getattr(layer, name), np.float64) for name in names}
    bias = layer.bias if layer.use_bias else np.zeros(_channels_out(layer, weights))
    return weights | {"bias": np.asarray(bias, np.float64)}


def _channels_out(layer, weights) -> int:
    *_, last = weights.values()
    if type(layer) in _DEPTHWISE:
        return last.shape[-2] * last.shape[-1]
    return last.shape[-2 if type(layer) in _TRANSPOSED else -1]


def _absorb_after(layer, weights, scale, shift) -> dict[str, np.ndarray]:
    """Return the weights with which a layer gives ``scale * output + shift``."""
    *others, last = (name for name in weights if name != "bias")
    kernel = weights[last]
    if type(layer) in _DEPTHWISE:
        kernel = kernel * scale.reshape(kernel.shape[-2:])
    elif type(layer) in _TRANSPOSED:  # (..., channels out, channels in)
        kernel = kernel * scale[:, None]
    else:
        kernel = kernel * scale
    kept = {name: weights[name] for name in others}
    return kept | {last: kernel, "bias": weights["bias"] * scale + shift}


def _absorb_before(layer, weights, scale, shift) -> dict[str, np.ndarray]:
    """Return the weights with which a layer gives for x what it gave for ``scale * x + shift``."""
    first = next(iter(weights))
    kernel = weights[first]
    window = tuple(range(kernel.ndim - 2))
    if type(layer) in _CONVOLUTIONS:
        # Each group of outputs sees its own part of the inputs: one value for each (input, output).
        outputs = kernel.shape[-1] // layer.groups
        scale, shift = (
            np.repeat(value.reshape(layer.groups, -1).T, outputs, axis=1)
            for value in (scale, shift)
        )
    elif type(layer) not in _TRANSPOSED:
        scale, shift = scale[:, None], shift[:, None]
    added = (kernel * shift).sum(window)
    if type(layer) in _DEPTHWISE:
        added = added.ravel()
    elif type(layer) in _SEPARABLE:
        pointwise = weights["pointwise_kernel"]
        added = added.ravel() @ pointwise.reshape(-1, pointwise.shape[-1])
    elif type(layer) in _TRANSPOSED:
        added = 0  # the shift is 0 here
    else:
        added = added.sum(0)
    return weights | {first: kernel * scale, "bias": weights["bias"] + added}


def _copy_weights(layer, copy, new: dict[str, np.ndarray] | None) -> None:
    if new is not None:
        for name, value in new.items():
            getattr(copy, name).assign(value)
        return
    for old_part, new_part in zip(layer._flatten_layers(), copy._flatten_layers(), strict=True):
        # Unlike set_weights, this also renews what Normalization derives from its weights.
        store: dict[str, Any] = {}
        old_part.save_own_variables(store)
        new_part.load_own_variables({name: np.asarray(value) for name, value in store.items()})
