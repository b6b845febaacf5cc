"""What flows through a network: activations upwards, error signals downwards, layer by layer.

The definition comes first: `forward` and `backward` compute the signals of a stack of dense layers
in NumPy. The rest is for Keras models of any kind: `probe` measures the same quantities, `Recorder`
does so during training, `dead_units` finds the units that never answer, `diagnose` says what is
wrong with a run. They look and do not touch: weights, moving averages, optimizer state, metrics and
random state are afterwards what they were.
Last, `input_gradient` shows how the gradient of a deep network loses its structure.

The symbols are the same everywhere: a layer computes ``z = h_below @ w + b`` and ``h = f(z)``;
``dz`` and ``dw`` are the gradients of the loss with respect to z and w.

References
----------
Rumelhart, Hinton, Williams (1986), Learning representations by back-propagating errors,
doi:10.1038/323533a0.
Glorot, Bengio (2010), Understanding the difficulty of training deep feedforward neural networks,
AISTATS, PMLR 9:249-256.
Balduzzi, Frean, Leary, Lewis, Ma, McWilliams (2017), The shattered gradients problem: if resnets
are the answer, then what is the question?, arXiv:1702.08591.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import copy
from dataclasses import dataclass, field
import functools
import math
import random
import threading
from typing import NamedTuple

from ch11lib.backend import keras, tf
from ch11lib.claims import number
import numpy as np
import pandas as pd
from scipy.special import entr, expit, softmax

# TensorFlow has no public way to save its own random state; these two modules hold it.
from tensorflow.python.eager import context as tf_context
from tensorflow.python.ops import stateful_random_ops as tf_generators

__all__ = [
    "Backward",
    "Distribution",
    "Finding",
    "Forward",
    "LayerSignals",
    "Probe",
    "Recorder",
    "autocorrelation",
    "backward",
    "dead_units",
    "diagnose",
    "forward",
    "half_correlation_lag",
    "input_gradient",
    "layer_updates",
    "probe",
]

# ------------------------------------------------------------------ the definition, in NumPy

Function = Callable[[np.ndarray], np.ndarray]

# name -> (f, f')
_ACTIVATIONS: dict[str, tuple[Function, Function]] = {
    "linear": (lambda z: z, np.ones_like),
    "sigmoid": (expit, lambda z: expit(z) * expit(-z)),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(z.dtype)),
}

Activation = str | tuple[Function, Function]


class Forward(NamedTuple):
    """Signals of a forward pass, one array ``(examples, units)`` for each layer.

    Attributes
    ----------
    z, h : list of numpy.ndarray
        Pre-activations and outputs.
    """

    z: list[np.ndarray]
    h: list[np.ndarray]


class Backward(NamedTuple):
    """Signals of a forward and a backward pass, one array for each layer.

    Attributes
    ----------
    z, h, dz : list of numpy.ndarray
        Pre-activations, outputs and error signals dL/dz, ``(examples, units)``.
    dw, db : list of numpy.ndarray
        Gradients of weights ``(inputs, units)`` and biases ``(units,)``, summed over the examples.
    dx : numpy.ndarray
        Gradient of the loss with respect to the input.
    """

    z: list[np.ndarray]
    h: list[np.ndarray]
    dz: list[np.ndarray]
    dw: list[np.ndarray]
    db: list[np.ndarray]
    dx: np.ndarray


def _pairs(activation: Activation | Sequence[Activation], depth: int):
    """Return one pair (f, f') for each layer."""
    is_pair = isinstance(activation, tuple) and len(activation) == 2 and callable(activation[0])
    each = [activation] * depth if isinstance(activation, str) or is_pair else list(activation)
    if len(each) != depth:
        raise ValueError(
            f"activation must be one for all layers or one for each of the {depth}; "
            f"received {len(each)}"
        )
    for one in each:
        if isinstance(one, str) and one not in _ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(_ACTIVATIONS)} or a pair (f, derivative of f); "
                f"received {one!r}"
            )
    return [_ACTIVATIONS[one] if isinstance(one, str) else one for one in each]


def _stack(x, weights, biases):
    """Check the shapes; return x and the weights and biases as lists of arrays."""
    x = np.asarray(x)
    weights = [np.asarray(w) for w in weights]
    if x.ndim != 2 or not weights or any(w.ndim != 2 for w in weights):
        raise ValueError(
            "x must have shape (examples, features) and weights must list matrices; received "
            f"x of shape {x.shape} and weights of shapes {[w.shape for w in weights]}"
        )
    widths = [x.shape[1], *(w.shape[1] for w in weights)]
    if any(w.shape[0] != n for w, n in zip(weights, widths[:-1], strict=True)):
        raise ValueError(
            f"weights must fit each other and the {x.shape[1]} features of x; "
            f"received shapes {[w.shape for w in weights]}"
        )
    if biases is None:
        biases = [np.zeros(n, w.dtype) for w, n in zip(weights, widths[1:], strict=True)]
    biases = [np.asarray(b) for b in biases]
    if [b.shape for b in biases] != [(n,) for n in widths[1:]]:
        raise ValueError(
            f"biases must be None or one vector for each layer, of {widths[1:]} units; "
            f"received shapes {[b.shape for b in biases]}"
        )
    return x, weights, biases


def forward(
    x: np.ndarray,
    weights: Sequence[np.ndarray],
    biases: Sequence[np.ndarray] | None,
    activation: Activation | Sequence[Activation],
) -> Forward:
    """Send data through a stack of dense layers: ``z = h_below @ w + b``, ``h = f(z)``.

    Parameters
    ----------
    x : array of shape (examples, features)
        Input.
    weights : sequence of arrays of shape (inputs, units)
        One matrix for each layer; an array ``(layers, units, units)`` will do.
    biases : sequence of arrays of shape (units,), or None
        None stands for zeros.
    activation : str or pair of callables, or one for every layer
        ``"linear"``, ``"sigmoid"``, ``"tanh"``, ``"relu"``, or a pair (f, derivative of f).

    Returns
    -------
    Forward

    Raises
    ------
    ValueError
        If shapes do not fit or an activation is unknown.

    Examples
    --------
    >>> signals = forward([[1.0, -2.0]], [np.eye(2), np.ones((2, 1))], None, ["relu", "linear"])
    >>> [h.tolist() for h in signals.h]
    [[[1.0, 0.0]], [[1.0]]]
    """
    x, weights, biases = _stack(x, weights, biases)
    zs, hs = [], []
    h = x
    for w, b, (f, _) in zip(weights, biases, _pairs(activation, len(weights)), strict=True):
        z = h @ w + b
        h = f(z)
        zs.append(z)
        hs.append(h)
    return Forward(zs, hs)


def backward(
    x: np.ndarray,
    weights: Sequence[np.ndarray],
    biases: Sequence[np.ndarray] | None,
    activation: Activation | Sequence[Activation],
    dh: np.ndarray,
) -> Backward:
    """Send data up through a stack of dense layers and an error signal back down.

    The recursion is ``dz = dh * f'(z)``, ``dw = h_below.T @ dz`` and, for the layer below,
    ``dh = dz @ w.T``. Nothing is divided among units: the signal is multiplied by the transposed
    weights and by the slope of the activation.

    Parameters
    ----------
    x, weights, biases, activation
        As for `forward`.
    dh : array
        Gradient of the loss with respect to the last layer's output; anything that broadcasts to
        ``(examples, units)``. For the mean cross-entropy of logits that is
        ``(softmax(logits) - one_hot) / examples`` under a linear last layer.

    Returns
    -------
    Backward

    Examples
    --------
    >>> signals = backward([[1.0, -2.0]], [np.eye(2), np.ones((2, 1))], None, ["relu", "linear"], 1)
    >>> signals.dz[0].tolist(), signals.dw[1].tolist(), signals.dx.tolist()
    ([[1.0, 0.0]], [[1.0], [0.0]], [[1.0, 0.0]])
    """
    x, weights, biases = _stack(x, weights, biases)
    z, h = forward(x, weights, biases, activation)
    try:
        dh = np.broadcast_to(np.asarray(dh, h[-1].dtype), h[-1].shape)
    except ValueError:
        raise ValueError(
            f"dh must broadcast to the shape of the last output, {h[-1].shape}; "
            f"received shape {np.shape(dh)}"
        ) from None
    pairs = _pairs(activation, len(weights))
    dzs, dws, dbs = [], [], []
    for layer in reversed(range(len(weights))):
        dz = dh * pairs[layer][1](z[layer])
        below = h[layer - 1] if layer else x
        dzs.append(dz)
        dws.append(below.T @ dz)
        dbs.append(dz.sum(axis=0))
        dh = dz @ weights[layer].T
    return Backward(z, h, dzs[::-1], dws[::-1], dbs[::-1], dh)


# ------------------------------------------------------------------ looking without touching

_tracking = keras.src.utils.tracking
_CONTAINERS = {
    **{kind: kind for kind in (list, dict, set)},
    _tracking.TrackedList: list,
    _tracking.TrackedDict: dict,
    _tracking.TrackedSet: set,
}


@contextlib.contextmanager
def _attributes_kept(objects: Sequence[object]) -> Iterator[None]:
    """Put attributes, and the lists, dicts and sets among them, back to what they were."""
    saved = []
    for thing in objects:
        attributes = dict(vars(thing))
        containers = [
            (_CONTAINERS[type(value)], value, _CONTAINERS[type(value)](value))
            for value in attributes.values()
            if type(value) in _CONTAINERS
        ]
        saved.append((thing, attributes, containers))
    try:
        yield
    finally:
        for thing, attributes, containers in saved:
            for name in vars(thing).keys() - attributes.keys():
                del vars(thing)[name]
            vars(thing).update(attributes)
            for kind, container, contents in containers:
                # The built-in methods, past the tracking that Keras adds to its own.
                kind.clear(container)
                (kind.extend if kind is list else kind.update)(container, contents)  # type: ignore[union-attr]


@contextlib.contextmanager
def _global_state_kept() -> Iterator[None]:
    """Keep the random state of Python, NumPy, Keras and TensorFlow, and Keras's name counters."""
    keras_state = keras.src.backend.common.global_state
    context = tf_context.context()
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    keras_generator = keras_state.get_global_attribute("global_seed_generator")
    keras_seed = None if keras_generator is None else keras_generator.state.numpy()
    # The twin of an optimizer must not make the next one "adam_1".
    names = copy.copy(keras_state.get_global_attribute("object_name_uids"))
    tf_rng, tf_generator = vars(context).get("_rng"), tf_generators.global_generator
    tf_seed = None if tf_generator is None else tf_generator.state.numpy()
    # TensorFlow numbers its unseeded operations with this; a stand-in leaves the original alone.
    context._rng = random.Random(0)
    try:
        yield
    finally:
        context._rng = tf_rng
        tf_generators.global_generator = tf_generator
        if tf_generator is not None:
            tf_generator.state.assign(tf_seed)
        keras_state.set_global_attribute("global_seed_generator", keras_generator)
        if keras_generator is not None:
            keras_generator.state.assign(keras_seed)
        keras_state.set_global_attribute("object_name_uids", names)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


@contextlib.contextmanager
def _variables_kept(variables: Sequence) -> Iterator[None]:
    saved = [(variable, variable.numpy()) for variable in variables]
    try:
        yield
    finally:
        for variable, value in saved:
            variable.assign(value)


@contextlib.contextmanager
def _run_eagerly() -> Iterator[None]:
    """Run tensor functions of the model step by step: no signal can be read inside a graph."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def _layers(model: keras.Model) -> list[keras.layers.Layer]:
    return model._flatten_layers(include_self=False, recursive=True)


def _state_variables(model: keras.Model) -> list:
    """List all variables that a training step of the model might change, each once."""
    values: list = []
    for layer in [model, *_layers(model)]:
        for value in vars(layer).values():
            if isinstance(value, dict):
                values.extend(value.values())
            else:
                values.extend(value if isinstance(value, list | tuple) else [value])
    raw = [value for value in values if isinstance(value, tf.Variable)]
    raw += [value.state for value in values if isinstance(value, tf.random.Generator)]
    variables = [
        *model.variables,
        *model.metrics_variables,
        *(model.optimizer.variables if getattr(model, "optimizer", None) is not None else ()),
        *raw,
    ]
    return list({id(variable): variable for variable in variables}.values())


_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def _untouched(model: keras.Model) -> Iterator[None]:
    """Undo whatever happens to the model and to the random state inside the ``with`` block."""
    parts = [getattr(model, "optimizer", None), getattr(model, "_compile_loss", None)]
    objects = [model, *_layers(model), *(part for part in parts if part is not None)]
    with (
        _one_at_a_time,  # two threads would restore what the other one had set
        _global_state_kept(),
        _variables_kept(_state_variables(model)),
        _attributes_kept(objects),
        _run_eagerly(),
    ):
        yield


# ------------------------------------------------------------------ tapping the layers

# Keras's layers that are an activation function and nothing else.
_ACTIVATION_LAYERS = (
    keras.layers.ReLU,
    keras.layers.LeakyReLU,
    keras.layers.PReLU,
    keras.layers.ELU,
)
# Functions whose every output depends on all inputs of an example: they have no slope f'(z).
_NOT_ELEMENTWISE = {"softmax", "log_softmax", "sparsemax", "glu", "Softmax"}


@dataclass(eq=False)
class _Tap:
    """What went through one layer; the lists have an entry for each time it was called.

    `f` is the activation function, or None where a layer has none that can be told apart.
    """

    layer: keras.layers.Layer
    name: str
    f: Callable | None = None
    z: list = field(default_factory=list)
    h: list = field(default_factory=list)

    @property
    def nonlinear(self) -> bool:
        return self.f is not None and self.f is not keras.activations.linear

    @property
    def elementwise(self) -> bool:
        name = getattr(self.f, "__name__", type(self.f).__name__)
        return self.nonlinear and name not in _NOT_ELEMENTWISE

    def clear(self) -> None:
        self.z.clear()
        self.h.clear()


def _distinct(tensor, watch):
    """Return the tensor as one of its own, so that its gradient is that of this place only."""
    own = tf.identity(tensor)
    if hasattr(tensor, "_keras_logits"):  # softmax leaves them here for the loss to find
        own._keras_logits = tensor._keras_logits
    if watch is not None:
        watch(own)
    return own


def _is_signal(value) -> bool:
    return isinstance(value, tf.Tensor) and value.dtype.is_floating


def _install(layer: keras.layers.Layer, name: str, taps: list[_Tap], watch) -> None:
    """Wrap a layer's call and activation for as long as its attributes are not restored."""
    call = layer.call
    activation = vars(layer).get("activation")
    tap = _Tap(layer, name)

    def tapped_activation(z, *args, **kwargs):
        z = _distinct(z, watch)
        tap.z.append(z)
        return activation(z, *args, **kwargs)

    @functools.wraps(call)
    def tapped_call(*args, **kwargs):
        if tap not in taps:
            taps.append(tap)
        if isinstance(layer, _ACTIVATION_LAYERS):
            args = (_distinct(args[0], watch), *args[1:])
            tap.z.append(args[0])
        outputs = call(*args, **kwargs)
        if _is_signal(outputs) and any(outputs is a for a in keras.tree.flatten((args, kwargs))):
            outputs = _distinct(outputs, watch)
        signals = [value for value in keras.tree.flatten(outputs) if _is_signal(value)]
        tap.h.extend(signals[:1])
        return outputs

    # Written past Keras's attribute tracking, which would see new sublayers and variables in it.
    vars(layer)["call"] = tapped_call
    if isinstance(layer, _ACTIVATION_LAYERS):
        tap.f = call
    elif callable(activation):
        tap.f = activation
        vars(layer)["activation"] = tapped_activation


def _install_taps(model: keras.Model, watch=None) -> list[_Tap]:
    """Tap every layer; the list fills in the order in which the layers are called."""
    layers = [
        layer
        for layer in _layers(model)
        if not isinstance(layer, keras.Model | keras.layers.InputLayer)
    ]
    inside = {id(vars(layer).get("activation")) for layer in layers}
    layers = [layer for layer in layers if id(layer) not in inside]
    names, paths = Counter(layer.name for layer in layers), Counter(layer.path for layer in layers)
    taps: list[_Tap] = []
    for index, layer in enumerate(layers):
        name = layer.name
        if names[name] > 1:
            name = layer.path if paths[layer.path] == 1 else f"{layer.path}#{index}"
        _install(layer, name, taps, watch)
    return taps


def _own_weights(layer: keras.layers.Layer) -> tuple[list, bool]:
    """Return a layer's kernels, else its other weights made to be trained; and whether kernels.

    Frozen weights count, sublayers' weights and other state do not.
    """
    own = layer._trainable_variables
    kernels = [weight for weight in own if len(weight.shape) > 1]
    return kernels or own, bool(kernels)


# ------------------------------------------------------------------ measuring


class _Step(NamedTuple):
    """One training step of a layer's weights, Euclidean norms."""

    w_norm: float
    dw_norm: float
    update_norm: float
    has_kernel: bool


def _norm(arrays: Sequence[np.ndarray]) -> float:
    """Return the Euclidean norm of all arrays together; NaN if there are none."""
    if not arrays:
        return math.nan
    return math.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in arrays))


def _tensors(model: keras.Model, x, y=None):
    """Check what was passed in; return x and y as tensors."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {type(model).__name__}")
    if not model.built:
        raise ValueError(f"model {model.name!r} must be built: give it an Input or call it once")
    sizes = set()
    for argument, value in (("x", x), ("y", y)):
        for part in [] if value is None else keras.tree.flatten(value):
            if not getattr(part, "shape", ()):
                raise TypeError(
                    f"{argument} must be an array with one entry for each example, or a structure "
                    f"of such arrays; it contains {type(part).__name__}"
                )
            sizes.add(int(part.shape[0]))
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"x and y must have the same number of examples, at least one; received {sorted(sizes)}"
        )
    # float64 arrays arrive as float32, as they do in fit.
    convert = functools.partial(keras.tree.map_structure, keras.ops.convert_to_tensor)
    return convert(x), None if y is None else convert(y)


def _twin(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Return an optimizer of the same configuration, not built yet."""
    schedule = vars(optimizer).get("_learning_rate")
    if not isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        return type(optimizer).from_config(optimizer.get_config())
    # A schedule of one's own may have no configuration: hand over the object instead.
    try:
        vars(optimizer)["_learning_rate"] = 0.0
        config = optimizer.get_config()
    finally:
        vars(optimizer)["_learning_rate"] = schedule
    return type(optimizer).from_config(config | {"learning_rate": schedule})


def _next_updates(model: keras.Model, gradients: list, dtype: str | None = "float64") -> list:
    """Compute by how much the optimizer's next step changes each trainable variable.

    A twin of the optimizer, in its present state, takes the step on replicas: neither the model nor
    the optimizer is involved. The replicas are float64, so that a step too small for float32
    weights to register is measured all the same; an optimizer that cannot do that (Muon) gets the
    variables' own type.
    """
    optimizer, variables = model.optimizer, model.trainable_variables
    replicas = []
    for variable in variables:
        kind = dtype or variable.dtype
        replica = keras.Variable(variable.numpy(), dtype=kind, name=variable.name)
        replica._path, replica.constraint = variable.path, variable.constraint
        replicas.append(replica)
    twin = _twin(optimizer)
    excluded: set = getattr(optimizer, "_exclude_from_weight_decay", set())
    twin._exclude_from_weight_decay = {
        twin._var_key(replica)
        for variable, replica in zip(variables, replicas, strict=True)
        if excluded and optimizer._var_key(variable) in excluded
    }
    twin._exclude_from_weight_decay_pattern = getattr(
        optimizer, "_exclude_from_weight_decay_pattern", None
    )
    twin.build(replicas)
    # An optimizer that has not been built yet has only the first few: iterations, learning rate.
    for state, twin_state in zip(optimizer.variables, twin.variables, strict=False):
        twin_state.assign(state.numpy())
    scale = optimizer.scale_loss(tf.constant(1.0))  # mixed precision expects scaled gradients
    pairs = [
        (tf.cast(gradient, replica.dtype) * tf.cast(scale, replica.dtype), replica)
        for gradient, replica in zip(gradients, replicas, strict=True)
        if gradient is not None
    ]
    before = [replica.numpy() for replica in replicas]
    if pairs:
        try:
            twin.apply(*map(list, zip(*pairs, strict=True)))
        except (TypeError, ValueError, tf.errors.InvalidArgumentError):
            if dtype is None:
                raise
            return _next_updates(model, gradients, dtype=None)
    return [replica.numpy() - value for replica, value in zip(replicas, before, strict=True)]


def _measure(model: keras.Model, x, y, training: bool):
    """Run one training step, undo it, and return what was seen of it.

    Returns the loss, the taps, for each tap the error signals (dz where the layer has an
    activation function, else the gradient at its output; None where the loss does not see them)
    and the slopes f'(z) (None unless f works elementwise), and the step of its weights.
    """
    x, y = _tensors(model, x, y)
    if not getattr(model, "compiled", False):
        raise ValueError(f"model {model.name!r} must be compiled: the loss decides the gradients")
    with _untouched(model):
        with tf.GradientTape() as tape:
            taps = _install_taps(model, tape.watch)
            y_pred = model(x, training=training)
            loss = model._compute_loss(x=x, y=y, y_pred=y_pred, training=training)
        taps = [tap for tap in taps if tap.h]
        variables = model.trainable_variables
        errors, gradients = tape.gradient(
            loss, ([tap.z or tap.h for tap in taps], [variable.value for variable in variables])
        )
        gradients = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
        slopes = [_slopes(tap) if tap.elementwise else None for tap in taps]

        of_variable = {
            id(variable): (gradient, update)
            for variable, gradient, update in zip(
                variables, gradients, _next_updates(model, gradients), strict=True
            )
        }
        steps = [_step(tap.layer, of_variable) for tap in taps]
    return float(loss), taps, errors, slopes, steps


def _step(layer: keras.layers.Layer, of_variable: dict) -> _Step:
    """Collect the norms of a layer's weights from the gradient and update of each variable."""
    weights, has_kernel = _own_weights(layer)
    found = [of_variable[id(weight)] for weight in weights if id(weight) in of_variable]
    gradients = [gradient for gradient, _ in found if gradient is not None]
    return _Step(
        w_norm=_norm([weight.numpy() for weight in weights]),
        dw_norm=_norm([gradient.numpy() for gradient in gradients]),
        # Frozen weights do not move.
        update_norm=_norm([update for _, update in found]) if found else 0.0,
        has_kernel=has_kernel,
    )


def _slopes(tap: _Tap) -> list:
    """Return f'(z) for every call of a layer with an elementwise activation."""
    slopes: list = []
    if tap.f is None:
        return slopes
    for z in tap.z:
        with tf.GradientTape() as tape:
            tape.watch(z)
            h = tap.f(z)
        slopes.append(tape.gradient(h, z) if h.shape == z.shape else None)
    return [slope for slope in slopes if slope is not None]


def _array(tensors) -> np.ndarray:
    """Join what several calls saw: along the examples if the shapes allow it."""
    arrays = [tf.cast(tensor, tf.float64).numpy() for tensor in tensors]
    if len({array.shape[1:] for array in arrays}) > 1:
        arrays = [array.reshape(-1, 1) for array in arrays]
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def _all_examples(condition: np.ndarray) -> np.ndarray:
    """Return for each unit or channel (last axis) whether a condition always holds."""
    return np.all(condition, axis=tuple(range(max(condition.ndim - 1, 1))))


@dataclass(frozen=True, eq=False)
class Distribution:
    """How the values of one signal are distributed, over all examples and units.

    Attributes
    ----------
    mean, std, rms : float
        Mean, standard deviation and root mean square.
    counts, edges : numpy.ndarray
        Histogram of the finite values: 50 counts, 51 edges.
    """

    mean: float
    std: float
    rms: float
    counts: np.ndarray
    edges: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Distribution":
        """Summarize an array of any shape."""
        values = np.asarray(values, dtype=np.float64)
        counts, edges = np.histogram(values[np.isfinite(values)], bins=50)
        with np.errstate(invalid="ignore", over="ignore"):
            return cls(
                mean=float(values.mean()),
                std=float(values.std()),
                rms=float(np.sqrt(np.mean(np.square(values)))),
                counts=counts,
                edges=edges,
            )


@dataclass(frozen=True, eq=False)
class LayerSignals:
    """What `probe` saw in one layer.

    Attributes
    ----------
    name, kind : str
        Name and class of the layer.
    calls : int
        How often the model called it; a shared layer's signals are pooled.
    z : Distribution or None
        Pre-activations; None if the layer has no activation function.
    h : Distribution
        Outputs.
    dz : Distribution or None
        Gradient of the loss with respect to z, or to h where there is no z; None where the loss
        does not depend on it. As the loss is a mean, an example has ``1 / examples`` of the weight.
    inactive : float
        Share of the outputs that are exactly 0: about 0.5 for ReLU.
    saturated : float
        Share of the other outputs' places where the activation is flat: less than 1 % of the
        error signal passes (``|f'(z)| < 0.01``; sigmoid beyond ``|z| = 4.6``, tanh beyond 3.0).
    dead : float
        Share of the units (channels) that are inactive or saturated for every example.
    w_norm, dw_norm : float
        Euclidean norm of the layer's kernels and their gradient; of its other trainable weights if
        it has no kernel, such as batch normalization.
    grad_to_weight : float
        ``dw_norm / w_norm``.
    update_to_weight : float
        Relative change ``||Δw|| / ||w||`` in the step that the optimizer would take next, computed
        in float64; below about 1e-8 float32 weights would not notice.
    has_kernel : bool
        Whether the layer has weights that multiply its input.
    """

    name: str
    kind: str
    calls: int
    z: Distribution | None
    h: Distribution
    dz: Distribution | None
    inactive: float
    saturated: float
    dead: float
    w_norm: float
    dw_norm: float
    grad_to_weight: float
    update_to_weight: float
    has_kernel: bool


_NUMBERS = (
    "inactive",
    "saturated",
    "dead",
    "w_norm",
    "dw_norm",
    "grad_to_weight",
    "update_to_weight",
)


def _ratio(numerator: float, denominator: float) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.divide(numerator, denominator))


def _layer_signals(tap: _Tap, errors: list, slopes: list | None, step: _Step) -> LayerSignals:
    h = _array(tap.h)
    errors = [error for error in errors if error is not None]
    inactive = saturated = dead = math.nan
    if tap.nonlinear:
        zero = h == 0
        inactive = float(zero.mean())
        flat = np.zeros_like(zero)
        # A recurrent cell calls its activation several times in one call: no common shape.
        if slopes and (slope := _array(slopes)).shape == h.shape:
            flat = np.abs(slope) < 0.01
            saturated = float(np.mean(flat & ~zero))
        dead = float(_all_examples(zero | flat).mean())
    return LayerSignals(
        name=tap.name,
        kind=type(tap.layer).__name__,
        calls=len(tap.h),
        z=Distribution.of(_array(tap.z)) if tap.z else None,
        h=Distribution.of(h),
        dz=Distribution.of(_array(errors)) if errors else None,
        inactive=inactive,
        saturated=saturated,
        dead=dead,
        w_norm=step.w_norm,
        dw_norm=step.dw_norm,
        grad_to_weight=_ratio(step.dw_norm, step.w_norm),
        update_to_weight=_ratio(step.update_norm, step.w_norm),
        has_kernel=step.has_kernel,
    )


@dataclass(frozen=True, eq=False)
class Probe:
    """What `probe` saw: ``probe["name"]`` is one layer, `table` all of them, `verdict` the gist.

    Attributes
    ----------
    loss : float
        The loss of the batch, penalties included.
    layers : tuple of LayerSignals
        In the order in which the model called them.
    """

    loss: float
    layers: tuple[LayerSignals, ...]

    def __getitem__(self, name: str) -> LayerSignals:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; there are {[layer.name for layer in self.layers]}")

    def table(self) -> pd.DataFrame:
        """Return one row for each layer; columns as in `LayerSignals`, missing values NaN.

        The three numbers of z, h and dz are called ``z_mean``, ``z_std``, ``z_rms`` and so on.
        """
        rows = []
        for layer in self.layers:
            row = {"kind": layer.kind, "calls": layer.calls}
            for signal in ("z", "h", "dz"):
                for moment in ("mean", "std", "rms"):
                    value = getattr(layer, signal)
                    row[f"{signal}_{moment}"] = (
                        math.nan if value is None else getattr(value, moment)
                    )
            rows.append(row | {name: getattr(layer, name) for name in _NUMBERS})
        names = [layer.name for layer in self.layers]
        return pd.DataFrame(rows, index=pd.Index(names, name="layer"))

    @property
    def gradient_factor(self) -> float:
        """Factor by which the size of dL/dz changes from one hidden layer to the one below.

        The geometric mean over the layers with kernels, the output layer left out; NaN if there
        are fewer than two of them or a gradient is 0 or missing.
        """
        sizes = [layer.dz.rms for layer in self._hidden() if layer.dz is not None]
        return _geometric_factor(sizes[::-1])

    def _hidden(self) -> list[LayerSignals]:
        return [layer for layer in self.layers if layer.has_kernel][:-1]

    def verdict(self) -> list[str]:
        """Say in a few sentences what is wrong; ``["healthy"]`` if nothing is.

        Rules of thumb, not theorems. *Hidden layers* are those with kernels, without the last.

        ============================ ============================================================
        says                         when
        ============================ ============================================================
        not finite                   a signal or the loss is not a finite number (no more is said)
        no gradient                  dL/dz of a hidden layer is exactly 0 everywhere
        vanishing, exploding         the size of dL/dz changes by a factor below 0.5 or above 2 per
                                     hidden layer, or beyond 100 from the top one to the bottom one
        signal fades, signal grows   the same of z, upwards
        saturated                    the activation is flat for more than half of a layer's values
        inactive                     more than 90 % of a layer's outputs are exactly 0
        dead                         more than 20 % of a layer's units pass no gradient at all
        different speeds             relative updates of hidden layers differ by more than 100
        large steps, small steps     one step changes a layer by more than 10 % of its size, or no
                                     layer by more than a millionth
        ============================ ============================================================
        """
        broken = self._broken_layer()
        if broken or not math.isfinite(self.loss):
            return [f"not finite: a signal in layer {broken}" if broken else "not finite: the loss"]
        sentences = [
            *self._gradient_sentences(),
            *self._signal_sentences(),
            *self._unit_sentences(),
            *self._speed_sentences(),
        ]
        return sentences or ["healthy"]

    def _broken_layer(self) -> str | None:
        """Name the layer where numbers stop being finite: upwards first, then downwards."""
        for layer in self.layers:
            forward = [signal.rms for signal in (layer.z, layer.h) if signal is not None]
            if not np.isfinite(forward).all():
                return layer.name
        for layer in reversed(self.layers):
            if layer.dz is not None and not math.isfinite(layer.dz.rms):
                return layer.name
        return None

    def _gradient_sentences(self) -> Iterator[str]:
        hidden = [(layer.name, layer.dz.rms) for layer in self._hidden() if layer.dz is not None]
        zero = [name for name, rms in hidden if rms == 0]
        if zero:
            yield f"no gradient at all reaches {_listed(zero)}"
            return
        change = _change([rms for _, rms in hidden][::-1])
        if change < 0:
            yield (
                f"the gradient falls by a factor {number(self.gradient_factor)} per layer "
                "on its way down: vanishing"
            )
        if change > 0:
            yield (
                f"the gradient grows by a factor {number(self.gradient_factor)} per layer "
                "on its way down: exploding"
            )

    def _signal_sentences(self) -> Iterator[str]:
        sizes = [layer.z.rms for layer in self._hidden() if layer.z is not None]
        change = _change(sizes)
        if change:
            verb = "grows" if change > 0 else "fades"
            yield (
                f"the forward signal {verb} by a factor {number(_geometric_factor(sizes))} "
                "per layer on its way up"
            )

    def _unit_sentences(self) -> Iterator[str]:
        for trouble, column, limit in (
            ("saturated activations", "saturated", 0.5),
            ("inactive outputs", "inactive", 0.9),
            ("dead units", "dead", 0.2),
        ):
            shares = {layer.name: getattr(layer, column) for layer in self.layers}
            hit = {name: share for name, share in shares.items() if share > limit}
            if hit:
                worst = max(hit, key=hit.__getitem__)
                sentence = f"{trouble}: {number(100 * hit[worst])} % in layer {worst}"
                if len(hit) > 1:
                    sentence += f", more than {100 * limit:.0f} % in ~{len(hit)} layers"
                yield sentence

    def _speed_sentences(self) -> Iterator[str]:
        rates = {
            layer.name: layer.update_to_weight
            for layer in self.layers
            if layer.has_kernel and math.isfinite(layer.update_to_weight)
        }
        trained = {name: rate for name, rate in rates.items() if self[name].dw_norm > 0}
        if not trained:
            return
        fastest = max(trained, key=trained.__getitem__)
        hidden = {
            layer.name: trained[layer.name] for layer in self._hidden() if layer.name in trained
        }
        if hidden and max(hidden.values()) > 100 * min(hidden.values()):
            slow, fast = min(hidden, key=hidden.__getitem__), max(hidden, key=hidden.__getitem__)
            yield (
                f"layers learn at different speeds: one step changes {slow} by "
                f"{number(hidden[slow])} of its size, {fast} by {number(hidden[fast])}"
            )
        if trained[fastest] > 0.1:
            yield (
                f"large steps: one step changes {fastest} by "
                f"{number(100 * trained[fastest])} % of its size"
            )
        if trained[fastest] < 1e-6:
            yield (
                "small steps: one step changes no layer by more than "
                f"{number(trained[fastest])} of its size"
            )


def _geometric_factor(sizes: Sequence[float]) -> float:
    """Return the constant factor that leads from the first size to the last, step by step."""
    if len(sizes) < 2 or not sizes[0] > 0 or not sizes[-1] > 0:
        return math.nan
    return (sizes[-1] / sizes[0]) ** (1 / (len(sizes) - 1))


def _change(sizes: Sequence[float]) -> int:
    """Return -1 if sizes fall badly, 1 if they grow badly, else 0; see `Probe.verdict`."""
    factor = _geometric_factor(sizes)
    if math.isnan(factor):
        return 0
    total = sizes[-1] / sizes[0]
    return int(factor > 2 or total > 100) - int(factor < 0.5 or total < 0.01)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} layers)"


def probe(model: keras.Model, x, y, *, training: bool = True) -> Probe:
    """Measure the signals of a Keras model in one training step, without taking the step.

    Works on any built and compiled Keras 3 model: sequential, functional with branches, skip
    connections, shared or nested layers, subclassed. The loss is the model's own, penalties
    included. Everything that a training step would change is put back, bit for bit, also if the
    model raises: weights, moving averages, optimizer, metrics, losses, random state. (Beyond reach
    is only what a layer keeps outside its attributes, such as a file or a ``seed=`` of a
    ``tf.random`` operation, whose counter TensorFlow hides.)

    An activation function is seen where a layer keeps it in an attribute ``activation``, as
    Keras's layers do, or is one of Keras's activation layers such as ReLU. Layers that are not
    called have no row.

    Parameters
    ----------
    model : keras.Model
        Built and compiled.
    x, y : array, or what the model takes
        One batch; a few hundred examples are plenty. All of it is in memory at once, with all
        signals.
    training : bool
        True, the default, sees what training sees: batch statistics in batch normalization,
        dropout at work, with the very random numbers that the next step would use. False sees
        the same gradients for the network as it is used afterwards.

    Returns
    -------
    Probe

    Raises
    ------
    TypeError
        If `model` is no Keras model or `x` or `y` is not made of arrays.
    ValueError
        If the model is not built or not compiled, or `x` and `y` differ in length.

    Examples
    --------
    >>> keras.utils.set_random_seed(0)
    >>> layers = [keras.layers.Dense(100, "sigmoid", name=f"h{i}") for i in range(1, 11)]
    >>> model = keras.Sequential([keras.Input((100,)), *layers, keras.layers.Dense(1, name="out")])
    >>> model.compile("sgd", "mse")
    >>> x = np.random.default_rng(0).normal(size=(200, 100))
    >>> seen = probe(model, x, x[:, :1])
    >>> 0.2 < seen.gradient_factor < 0.27
    True
    >>> seen.table()[["z_std", "dz_rms", "update_to_weight"]].shape
    (11, 3)
    >>> print(seen.verdict()[0])
    the gradient falls by a factor ~0.23 per layer on its way down: vanishing
    """
    loss, *columns = _measure(model, x, y, training)
    layers = tuple(_layer_signals(*row) for row in zip(*columns, strict=True))
    return Probe(loss, layers)


def layer_updates(model: keras.Model, x, y, *, training: bool = True) -> pd.Series:
    """Return how much the optimizer's next step would change each layer, relative to its size.

    ``||Δw|| / ||w||`` of the kernels, computed by the model's own optimizer with its present state
    and then undone: `probe` without the signals, and faster.

    Parameters
    ----------
    model, x, y, training
        As for `probe`.

    Returns
    -------
    pandas.Series
        Index ``layer``, for the layers with weights, in the order of calls.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="out")])
    >>> model.compile(keras.optimizers.SGD(0.0), "mse")
    >>> layer_updates(model, np.ones((4, 2)), np.ones((4, 1))).to_dict()
    {'out': 0.0}
    """
    _, taps, _, _, steps = _measure(model, x, y, training)
    updates = {
        tap.name: _ratio(step.update_norm, step.w_norm)
        for tap, step in zip(taps, steps, strict=True)
        if not math.isnan(step.w_norm)
    }
    series = pd.Series(updates, name="update_to_weight", dtype=np.float64)
    return series.rename_axis("layer")


class Recorder(keras.callbacks.Callback):
    """Probe a model before training and after epochs.

    An epoch-level callback: it works with `training.fit` as with ``model.fit``, and training with
    it gives bit for bit the numbers of training without.

    Parameters
    ----------
    x, y : array, or what the model takes
        The batch to probe, the same every time.
    every : int
        Probe after every so many epochs.
    training : bool
        As for `probe`.

    Attributes
    ----------
    epochs : list of int
        Epochs finished when each probe was taken; the first is 0, before training.
    probes : list of Probe
        One for each of them.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="out")])
    >>> model.compile("sgd", "mse")
    >>> recorder = Recorder(np.ones((4, 2)), np.ones((4, 1)), every=2)
    >>> _ = model.fit(recorder.x, recorder.y, epochs=4, verbose=0, callbacks=[recorder])
    >>> recorder.table("update_to_weight").index.tolist()
    [0, 2, 4]
    """

    def __init__(self, x, y, *, every: int = 1, training: bool = True):
        super().__init__()
        if not isinstance(every, int | np.integer) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be a positive integer, got {every!r}")
        self.x, self.y, self.every, self.training = x, y, int(every), training
        self.epochs: list[int] = []
        self.probes: list[Probe] = []
        self._finished = 0

    def on_train_begin(self, logs=None):
        """Take the probe of epoch 0; a later call of fit continues the record."""
        if not self.epochs:
            self._record()

    def on_epoch_end(self, epoch, logs=None):
        """Take a probe if it is time."""
        self._finished += 1
        if self._finished % self.every == 0:
            self._record()

    def _record(self) -> None:
        self.epochs.append(self._finished)
        self.probes.append(probe(self.model, self.x, self.y, training=self.training))

    def table(self, column: str) -> pd.DataFrame:
        """Return one column of `Probe.table` over time: a row for each epoch, a column per layer.

        Layers for which it is never a number, such as the weights of an activation, are left out.
        """
        if not self.probes:
            raise ValueError(
                "nothing has been recorded yet: pass the recorder to fit as a callback"
            )
        tables = [seen.table() for seen in self.probes]
        numeric = tables[0].select_dtypes("number").columns
        if column not in numeric:
            raise ValueError(f"column must be one of {list(numeric)}, got {column!r}")
        over_time = pd.DataFrame(
            [table[column] for table in tables], index=pd.Index(self.epochs, name="epoch")
        )
        return over_time.dropna(axis="columns", how="all").rename_axis(columns="layer")


def dead_units(
    model: keras.Model, x, *, training: bool = False, batch_size: int = 1024
) -> dict[str, np.ndarray]:
    """Find the units that output exactly 0 for every example, layer by layer.

    Like `probe` it leaves the model as it was; it needs no labels and no compiled model.

    Parameters
    ----------
    model : keras.Model
        Built.
    x : array, or what the model takes
        As many examples as it takes to call a unit dead: all of the training set.
    training : bool
        Whether to run the model as in training. False by default: what the model does with `x`
        as it is.
    batch_size : int
        Examples processed at a time.

    Returns
    -------
    dict of str to numpy.ndarray
        For each layer with an activation function (other than linear) a boolean array, one entry
        for each unit or channel (the last axis).

    Examples
    --------
    >>> dense = keras.layers.Dense(3, "relu", name="hidden")
    >>> model = keras.Sequential([keras.Input((2,)), dense])
    >>> dense.bias.assign([0.0, -100.0, 0.0])  # doctest: +ELLIPSIS
    <...
    >>> dead_units(model, np.random.default_rng(0).normal(size=(500, 2)))["hidden"].tolist()
    [False, True, False]
    """
    x, _ = _tensors(model, x)
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    size = keras.tree.flatten(x)[0].shape[0]
    silent: dict[str, np.ndarray] = {}
    with _untouched(model):
        taps = _install_taps(model)
        for start in range(0, size, batch_size):
            part = slice(start, start + batch_size)
            model(keras.tree.map_structure(lambda t, part=part: t[part], x), training=training)
            for tap in taps:
                if tap.nonlinear and tap.h:
                    mask = _all_examples(_array(tap.h) == 0)
                    silent[tap.name] = silent.get(tap.name, True) & mask
                tap.clear()
    return silent


# ------------------------------------------------------------------ a diagnosis


class Finding(NamedTuple):
    """What one rule of `diagnose` has found.

    Attributes
    ----------
    rule : str
        Its name.
    evidence : str
        What was measured.
    remedy : str
        What to try first.
    """

    rule: str
    evidence: str
    remedy: str


def diagnose(model: keras.Model, history, probe: tuple) -> list[Finding]:
    """Say what is wrong with the training of a classifier, and what to do about it.

    The rules measure in units that do not depend on the task: signals as factors per layer, steps
    relative to the weights, units as shares of a layer, and losses against the entropy of the
    labels, which is the loss of the best answer that ignores the input (ln 10 for ten classes,
    equally many of each). Causes come before their consequences. Rules with a dagger are silent if
    less than a fifth of the entropy is left on the batch: the run was a success all the same. Rules
    with a star are asked only if nothing else was found.

    ==================== ===========================================================================
    rule                 when
    ==================== ===========================================================================
    loss does not fit    the cross-entropy reads the outputs as probabilities and they are none, or
                         as logits and they are probabilities already
    inputs not scaled    what enters the lowest layer has a root mean square above 10 or below 0.1,
                         or is not finite; initializers count on about 1
    labels do not fit    no better than guessing on validation data, and an example's nearest
                         neighbour does not share its label more often than chance has it
    not shuffled         the labels come in blocks, and the last epoch's loss is not that of the
                         mixed batch right after it (7 % of the entropy apart), or the predictions
                         favour some classes (a quarter of the total probability is misplaced)
    frozen at the start  weights that are not trained and are still those that the initializer drew
    exploding†           on its way through an untrained copy the signal or the gradient grows
                         more than twofold per layer and tenfold in all, or a hundredfold in all
    vanishing†           the same downwards
    rate too high†       the loss ceased to be finite; or it rose by 10 % of the entropy above where
                         it had been or above that of an untrained copy; or one step changes a layer
                         by more than 1 % of its size
    stale statistics     with moving statistics the loss of the batch is higher by 10 % of the
                         entropy than with its own
    dead units†          more than half of a layer's units pass no gradient for any example
    steps too small*     a third of the entropy is left, and all the steps taken, were they as large
                         as the next one, would change no layer by more than 5 % of its size
    overfitting*         the validation loss has risen by 10 % of the entropy above its minimum
    underfitting*        a third of the entropy is left on training data
    ==================== ===========================================================================

    Rules of thumb: what is reachable on a task they cannot know, so that *underfitting* may be
    noise in the labels. The limits were chosen on small dense networks (see `ch11lib.clinic`).

    Parameters
    ----------
    model : keras.Model
        A compiled classifier with one output, as training left it. It is not changed.
    history : keras.callbacks.History or mapping of str to sequence of float
        ``loss`` by epoch; ``val_loss`` and ``learning_rate`` are used if they are there.
    probe : tuple (x, y)
        A few hundred examples taken from all over the training set, **in its order** and
        preprocessed as in training. `y` holds class numbers or one-hot rows.

    Returns
    -------
    list of Finding
        Most severe first; empty if nothing was found.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> keras.utils.set_random_seed(0)
    >>> x = np.random.default_rng(0).normal(size=(200, 20)).astype("float32")
    >>> y = (x[:, 0] > 0).astype(int)
    >>> layers = [keras.layers.Dense(20, "relu"), keras.layers.Dense(2)]
    >>> model = keras.Sequential([keras.Input((20,)), *layers])
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> history = model.fit(x, y, epochs=2, verbose=0)
    >>> print(diagnose(model, history, (x, y))[0].evidence)
    the loss takes outputs for probabilities, but they reach from ~-... to ~...
    """
    case = _examine(model, history, probe)
    findings: list[Finding] = []
    for rule, (look, remedy) in _RULES.items():
        if findings and rule in _LAST_RESORTS:
            continue
        if evidence := look(case):
            findings.append(Finding(rule, evidence, remedy))
    return findings


@dataclass(frozen=True, eq=False)
class _Case:
    """What the rules of `diagnose` look at; losses in nats."""

    model: keras.Model
    x: np.ndarray | None  # a row for each example, if the input is one array
    labels: np.ndarray
    history: dict[str, np.ndarray]
    reads: str | None  # what the loss takes its input for: "logits", "probabilities", or unknown
    given: np.ndarray  # what the loss gets in inference, (examples, classes)
    in_use: float  # its value in inference
    now: Probe
    start: Probe | None  # the same before training
    frozen: list[str]  # layers that are not trained and still as they were drawn

    @property
    def shares(self) -> np.ndarray:
        return np.bincount(self.labels, minlength=self.given.shape[1]) / len(self.labels)

    @property
    def entropy(self) -> float:
        return float(entr(self.shares).sum())

    @property
    def distributions(self) -> bool:
        """Whether the loss gets numbers from 0 to 1 that sum to 1."""
        p = self.given
        return bool((p >= 0).all() and np.allclose(p.sum(axis=1), 1, atol=1e-3))

    @property
    def probabilities(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # infinite outputs have none: NaN
            return self.given if self.distributions else softmax(self.given, axis=1)

    @property
    def left(self) -> float:
        """Share of the entropy that is still there: 1 is guessing, 0 is certainty.

        Of outputs that are no probabilities, the same share of the errors.
        """
        if self.reads != "logits" and not self.distributions:
            wrong = np.mean(self.given.argmax(axis=1) != self.labels)
            return float(wrong / (1 - self.shares.max()))
        chosen = self.probabilities[np.arange(len(self.labels)), self.labels]
        return float(-np.log(np.maximum(chosen, 1e-30)).mean()) / self.entropy

    @property
    def struggles(self) -> bool:
        return not self.left < 0.2  # NaN struggles

    @property
    def updates(self) -> dict[str, float]:
        """Relative sizes of the next step, layer by layer."""
        return {
            layer.name: layer.update_to_weight
            for layer in self.now.layers
            if layer.has_kernel and math.isfinite(layer.update_to_weight)
        }


def _examine(model, history, batch) -> _Case:
    """Check the arguments of `diagnose` and measure what the rules need."""
    logs = getattr(history, "history", history)
    if not isinstance(logs, Mapping):
        raise TypeError(f"history must be a History or a mapping, got {type(history).__name__}")
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(f"probe must be a pair (x, y) of arrays, got {type(batch).__name__}")
    x, y = batch
    now = probe(model, x, y)
    labels = _class_numbers(y)
    x_tensor, y_tensor = _tensors(model, x, y)
    with _untouched(model):
        outputs = model(x_tensor, training=False)
        if not _is_signal(outputs) or len(outputs.shape) != 2:
            raise ValueError("model must have one output of shape (examples, classes)")
        loss = model._compute_loss(x=x_tensor, y=y_tensor, y_pred=outputs, training=False)
        # Where Keras's loss finds logits behind a softmax, it uses them, whatever it was told.
        given = getattr(outputs, "_keras_logits", outputs)
        reads = "logits" if given is not outputs else _reads(model, y_tensor, labels, outputs.shape)
        start, frozen = _fresh_copy(model, x_tensor, y_tensor), _as_drawn(model)
    given = given.numpy().astype(np.float64)
    if given.shape[1] == 1:  # of two classes
        given = np.hstack([np.zeros_like(given) if reads == "logits" else 1 - given, given])
    if labels.max() >= given.shape[1]:
        raise ValueError(f"y must be below {given.shape[1]}, as there are so many outputs")
    return _Case(
        model=model,
        x=np.asarray(x, np.float64).reshape(len(labels), -1) if hasattr(x, "shape") else None,
        labels=labels,
        history={k: np.ravel(np.asarray(v, np.float64)) for k, v in logs.items()},
        reads=reads,
        given=given,
        in_use=float(loss),
        now=now,
        start=start,
        frozen=frozen,
    )


def _class_numbers(y) -> np.ndarray:
    """Return class numbers, also of one-hot rows."""
    labels = np.asarray(y)
    if labels.ndim == 2 and labels.shape[1] > 1:
        return labels.argmax(axis=1)
    if labels.ndim not in (1, 2) or (labels != np.round(labels)).any() or labels.min() < 0:
        raise ValueError("y must hold class numbers or one-hot rows")
    labels = labels.reshape(-1).astype(int)
    if np.ptp(labels) == 0:
        raise ValueError("y must hold examples of two classes or more")
    return labels


def _reads(model, y, labels, shape) -> str | None:
    """Find out by trial what the loss is the cross-entropy of."""
    z = np.sin(np.arange(math.prod(shape))).reshape(shape).astype(np.float32)
    p = expit(z) if shape[1] == 1 else softmax(z, axis=1)
    both = np.hstack([1 - p, p]) if shape[1] == 1 else p
    if labels.max() >= both.shape[1]:
        return None
    expected = -np.log(both[np.arange(len(labels)), labels]).mean()
    for kind, values in (("logits", z), ("probabilities", p)):
        if math.isclose(float(model._compile_loss(y, tf.constant(values))), expected, rel_tol=1e-3):
            return kind
    return None


def _fresh_copy(model, x, y) -> Probe | None:
    """Probe a copy with weights as they were before training; None if it cannot be copied."""
    try:
        fresh = keras.models.clone_model(model)
    except (TypeError, ValueError, NotImplementedError):
        return None
    for layer, copied in zip(_layers(model), _layers(fresh), strict=True):
        if (drawn := _drawn(layer)) is not None:
            copied.kernel.assign(drawn)
    fresh.compile("sgd", model.loss)  # no step of it is looked at
    return probe(fresh, x, y)


def _as_drawn(model) -> list[str]:
    """Name the layers that are not trained and whose kernel is what its initializer draws."""
    trained = {id(weight) for weight in model.trainable_variables}
    return [
        layer.name
        for layer in _layers(model)
        if (drawn := _drawn(layer)) is not None
        and id(layer.kernel) not in trained
        and np.array_equal(drawn, layer.kernel.numpy())
    ]


def _drawn(layer) -> np.ndarray | None:
    """Return the initial kernel of a layer: Keras's initializers draw the same again."""
    kernel, draw = vars(layer).get("_kernel"), getattr(layer, "kernel_initializer", None)
    if kernel is None or draw is None or not isinstance(getattr(draw, "seed", None), int):
        return None
    return draw(kernel.shape, dtype=kernel.dtype).numpy()


def _loss_evidence(case: _Case) -> str:
    if case.reads == "probabilities" and not case.distributions:
        low, high = number(float(case.given.min())), number(float(case.given.max()))
        return f"the loss takes outputs for probabilities, but they reach from {low} to {high}"
    if case.reads == "logits" and case.distributions:
        return "the loss takes outputs for logits, but they are probabilities: each row sums to 1"
    return ""


def _input_evidence(case: _Case) -> str:
    entering = None if case.x is None else Distribution.of(case.x).rms
    for layer in case.now.layers:
        if layer.has_kernel:
            if entering is None or layer.kind == "Embedding" or 0.1 <= entering <= 10:
                return ""
            return f"what enters layer {layer.name} has a root mean square of {number(entering)}"
        entering = layer.h.rms
    return ""


def _label_evidence(case: _Case) -> str:
    validation = case.history.get("val_loss", np.array([case.in_use]))
    if case.x is None or not np.nanmin(validation, initial=np.inf) > 0.9 * case.entropy:
        return ""
    square = np.sum(case.x**2, axis=1)
    distance = square[:, None] + square - 2 * case.x @ case.x.T
    np.fill_diagonal(distance, np.inf)
    agree = float(np.mean(case.labels[distance.argmin(axis=1)] == case.labels))
    chance = float(np.sum(case.shares**2))
    if agree > chance + 3 * math.sqrt(chance * (1 - chance) / len(case.labels)):
        return ""
    return (
        f"validation is no better than guessing, and nearest neighbours share their label in "
        f"{number(100 * agree)} % of the cases; by chance {number(100 * chance)} % would"
    )


def _order_evidence(case: _Case) -> str:
    repeats = float(np.mean(case.labels[1:] == case.labels[:-1]))
    losses = case.history.get("loss", np.array([]))
    # With labels in random order the share of repeats is that of the pairs that agree.
    if not repeats > (1 + float(np.sum(case.shares**2))) / 2 or not len(losses):
        return ""
    jump = abs(losses[-1] - case.now.loss) > 0.07 * case.entropy
    lopsided = 0.5 * np.abs(case.probabilities.mean(axis=0) - case.shares).sum()
    if not jump and not lopsided > 0.25:
        return ""
    return (
        f"the labels come in blocks; the last epoch reports a loss of {number(losses[-1])}, the "
        f"mixed batch right after it has {number(case.now.loss)}, and {number(100 * lopsided)} % "
        "of the probability goes to the wrong classes on average"
    )


def _frozen_evidence(case: _Case) -> str:
    names = case.frozen
    return f"not trained, and still as drawn by the initializer: {_listed(names)}" if names else ""


def _drift(case: _Case) -> tuple[float, str]:
    """Return the exponent by which signals change in a fresh copy (0 if harmless), and how."""
    for seen in (case.start,) if case.start and case.struggles else ():
        both = [(layer.z, layer.dz) for layer in seen._hidden()]
        hidden = [(z, dz) for z, dz in both if z is not None and dz is not None]
        upwards = [z.rms for z, _ in hidden]
        # Norms over all units, which do not depend on how wide the layers are.
        downwards = [dz.rms * math.sqrt(dz.counts.sum()) for _, dz in hidden[::-1]]
        for what, sizes in (("forward signal", upwards), ("gradient", downwards)):
            factor = _geometric_factor(sizes)
            if not factor > 0:
                continue
            power, total = abs(math.log(factor)), abs(math.log(sizes[-1] / sizes[0]))
            if total > math.log(100) or (power > math.log(2) and total > math.log(10)):
                return math.log(factor), (
                    f"in an untrained copy the {what} changes by a factor "
                    f"{number(factor)} per layer, {number(sizes[-1] / sizes[0])} in all"
                )
    return 0.0, ""


def _exploding_evidence(case: _Case) -> str:
    exponent, evidence = _drift(case)
    return evidence if exponent > 0 else ""


def _vanishing_evidence(case: _Case) -> str:
    exponent, evidence = _drift(case)
    return evidence if exponent < 0 else ""


def _statistics_evidence(case: _Case) -> str:
    moving = any("moving" in variable.name for variable in case.model.non_trainable_variables)
    if not moving or not case.in_use - case.now.loss > 0.1 * case.entropy:
        return ""
    return (
        f"the batch has a loss of {number(case.now.loss)} with its own statistics, of "
        f"{number(case.in_use)} with the moving ones"
    )


def _high_evidence(case: _Case) -> str:
    losses = case.history.get("loss", np.array([]))
    broken = case.now._broken_layer()
    if broken or not np.isfinite([*losses, case.now.loss]).all():
        return f"not finite: {f'a signal in layer {broken}' if broken else 'the loss'}"
    if not case.struggles:
        return ""
    if len(losses):
        lowest = np.minimum.accumulate(losses)
        rise = int(np.argmax(losses - lowest))
        if losses[rise] - lowest[rise] > 0.1 * case.entropy:
            return f"the training loss rose from {number(lowest[rise])} to {number(losses[rise])}"
        if case.start and losses.max() > case.start.loss + 0.1 * case.entropy:
            return (
                f"the training loss rose to {number(losses.max())}; an untrained copy has "
                f"{number(case.start.loss)}"
            )
    fastest = max(case.updates, key=case.updates.__getitem__, default=None)
    if fastest and case.updates[fastest] > 0.01:
        return (
            f"after training, one step still changes {fastest} by "
            f"{number(100 * case.updates[fastest])} % of its size"
        )
    return ""


def _dead_evidence(case: _Case) -> str:
    dead = {layer.name: layer.dead for layer in case.now.layers if layer.dead > 0.5}
    if not dead or not case.struggles or not math.isfinite(case.now.loss):
        return ""
    worst = max(dead, key=dead.__getitem__)
    return f"{number(100 * dead[worst])} % of the units in {worst} pass no gradient for any example"


def _small_evidence(case: _Case) -> str:
    steps = int(case.model.optimizer.iterations.numpy())
    largest = max(case.updates.values(), default=math.nan)
    if not (case.left > 1 / 3 and steps * largest < 0.05):
        return ""
    evidence = f"{steps} steps of the present size change no layer by more than "
    evidence += f"{number(100 * steps * largest)} % of its size"
    rates = case.history.get("learning_rate", np.array([]))
    if len(rates) and rates[-1] < 0.01 * rates.max():
        evidence += f"; the rate fell from {number(rates.max())} to {number(rates[-1])}"
    return evidence


def _overfitting_evidence(case: _Case) -> str:
    losses = case.history.get("val_loss", np.array([]))
    losses = losses[~np.isnan(losses)]
    if not len(losses) or not losses[-1] - losses.min() > 0.1 * case.entropy:
        return ""
    return f"the validation loss rose from {number(losses.min())} to {number(losses[-1])}"


def _underfitting_evidence(case: _Case) -> str:
    if not case.left > 1 / 3:
        return ""
    return f"{number(100 * case.left)} % of the entropy of the labels is left on training data"


_RULES: dict[str, tuple[Callable[[_Case], str], str]] = {
    "loss does not fit": (
        _loss_evidence,
        "let the last layer put out logits, and tell the loss: from_logits=True",
    ),
    "inputs not scaled": (
        _input_evidence,
        "standardize the inputs: subtract the mean, divide by the standard deviation",
    ),
    "labels do not fit": (
        _label_evidence,
        "look at examples with their labels; shuffle x and y with the same permutation",
    ),
    "not shuffled": (_order_evidence, "shuffle the training data in every epoch"),
    "frozen at the start": (
        _frozen_evidence,
        "set trainable = True before compile, or load the weights that were meant to be there",
    ),
    "exploding": (
        _exploding_evidence,
        "smaller initial weights (He for ReLU, LeCun for SELU), or batch normalization",
    ),
    "vanishing": (
        _vanishing_evidence,
        "an activation that does not saturate with its initializer (ReLU and He), or batch "
        "normalization",
    ),
    "rate too high": (_high_evidence, "a tenth of the learning rate, or a warm-up; clip gradients"),
    "stale statistics": (
        _statistics_evidence,
        "a lower momentum of the moving statistics, or more steps",
    ),
    "dead units": (
        _dead_evidence,
        "biases that start at 0, a lower learning rate, or an activation that is never flat",
    ),
    "steps too small": (_small_evidence, "a higher learning rate, or a schedule that falls later"),
    "overfitting": (
        _overfitting_evidence,
        "stop at the minimum, more data or augmentation, dropout, weight decay",
    ),
    "underfitting": (_underfitting_evidence, "a wider or deeper network, more epochs"),
}
_LAST_RESORTS = {"steps too small", "overfitting", "underfitting"}


# ------------------------------------------------------------------ shattered gradients

_VARIANTS = ("plain", "batch_norm", "residual")


def input_gradient(
    x: np.ndarray,
    depth: int,
    *,
    rng: int | np.random.Generator,
    width: int = 200,
    variant: str = "plain",
    branch: float = 1.0,
    first_variance: float = 1.0,
    weight_variance: float = 2.0,
    bias_variance: float = 0.0,
    outputs: int = 1,
) -> np.ndarray:
    """Differentiate random ReLU networks of one number with respect to that number.

    Balduzzi et al. (2017) look at dy/dx as a function of x: smooth for a shallow network, it comes
    to resemble white noise in a deep one. The first layer is ``z = w x + b``; each further one is

    - plain: ``z = w relu(z)``
    - batch_norm: ``z = normalized(w relu(z))``, mean and variance taken over the points x, and
      then held fixed, as in inference; the first layer is left as it is, because normalizing it
      would give all its units the same kink
    - residual: ``z = (z + branch * w relu(z)) / sqrt(1 + branch**2)``

    and the outputs are ``y = v relu(z)``. As the slope of each unit along x is carried upwards with
    its value, one sweep gives the derivative at every x.

    Parameters
    ----------
    x : array of shape (points,)
        Where to differentiate.
    depth : int
        Number of hidden layers.
    rng : int or numpy.random.Generator
        Source of the weights.
    width : int
        Units of each hidden layer.
    variant : str
        ``"plain"``, ``"batch_norm"`` or ``"residual"``.
    branch : float
        Weight of the branch beside the skip connection; used by ``"residual"`` only.
    first_variance : float
        Variance of the weights and biases of the first layer. 1 spreads the kinks of its units
        over the range of x; without biases the network would be linear on either side of 0.
    weight_variance : float
        Variance of the other layers' weights, times `width`: 2 is He's.
    bias_variance : float
        Variance of their biases, not scaled.
    outputs : int
        Number of outputs, all on one network.

    Returns
    -------
    numpy.ndarray of shape (outputs, points)
        dy/dx.

    Examples
    --------
    >>> x = np.linspace(-2, 2, 101)
    >>> input_gradient(x, depth=3, rng=0).shape
    (1, 101)
    """
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 1 or x.size < 2:
        raise ValueError(f"x must be a vector of two or more points; received shape {x.shape}")
    for argument, value in (("depth", depth), ("width", width), ("outputs", outputs)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{argument} must be a positive integer, got {value!r}")
    if variant not in _VARIANTS:
        raise ValueError(f"variant must be one of {_VARIANTS}, got {variant!r}")
    first_std, std = math.sqrt(first_variance), math.sqrt(weight_variance / width)
    return _relu_network(
        x,
        depth,
        np.random.default_rng(rng),
        (width, outputs),
        (first_std, std, math.sqrt(bias_variance)),
        variant,
        branch,
    )[1]


def _relu_network(x, depth, rng, sizes, stds, variant, branch) -> tuple[np.ndarray, np.ndarray]:
    """Return the outputs of the network of `input_gradient` and their derivatives."""
    (width, outputs), (first_std, std, bias_std) = sizes, stds
    w, b = rng.normal(0, first_std, (2, width))
    z = x[:, None] * w + b
    dz = np.broadcast_to(w, z.shape)
    for _ in range(depth - 1):
        w = rng.normal(0, std, (width, width))
        b = rng.normal(0, bias_std, width) if bias_std else 0.0
        # One product for values and slopes: half the passes over the weights.
        new_z, new_dz = np.split(np.concatenate(_relu(z, dz)) @ w, 2)
        new_z += b
        if variant == "batch_norm":
            scale = new_z.std(axis=0) + 1e-12
            new_z, new_dz = (new_z - new_z.mean(axis=0)) / scale, new_dz / scale
        elif variant == "residual":
            scale = math.hypot(1, branch)
            new_z, new_dz = (z + branch * new_z) / scale, (dz + branch * new_dz) / scale
        z, dz = new_z, new_dz
    v = rng.normal(0, math.sqrt(1 / width), (width, outputs))
    h, dh = _relu(z, dz)
    return (h @ v).T, (dh @ v).T


def _relu(z: np.ndarray, dz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    active = z > 0
    return z * active, dz * active


def autocorrelation(signal: np.ndarray) -> np.ndarray:
    """Correlate a signal with itself, shifted by 0, 1, 2, ... points.

    The mean is removed first, and nothing is assumed beyond the ends (zeros are), so that long
    shifts, which rest on few points, tend to 0: ``r[k] = sum_i s[i] s[i+k] / sum_i s[i]**2``.

    Parameters
    ----------
    signal : array of shape (..., points)
        Evenly spaced samples, not all equal.

    Returns
    -------
    numpy.ndarray of the same shape
        Starts with 1.

    Examples
    --------
    >>> autocorrelation([1.0, -1.0, 1.0, -1.0]).round(2).tolist()
    [1.0, -0.75, 0.5, -0.25]
    """
    signal = np.asarray(signal, dtype=np.float64)
    if signal.ndim < 1 or signal.shape[-1] < 2:
        raise ValueError(f"signal must have two or more points; received shape {signal.shape}")
    centred = signal - signal.mean(axis=-1, keepdims=True)
    size = np.abs(centred).max(axis=-1, keepdims=True)
    if not (size > 0).all() or not np.isfinite(size).all():
        raise ValueError("signal must be finite and not constant")
    points = signal.shape[-1]
    # Scaled to 1 before squaring: a gradient that died at 1e-200 still has a shape.
    power = np.abs(np.fft.rfft(centred / size, n=2 * points)) ** 2
    sums = np.fft.irfft(power, n=2 * points)[..., :points]
    return sums / sums[..., :1]


def half_correlation_lag(gradient: np.ndarray, spacing: float) -> float | np.ndarray:
    """Return the distance over which a gradient forgets half of what it was.

    The shift at which the `autocorrelation` (mean removed) first falls below 0.5, interpolated
    between points. A single curve gives a noisy answer: rows are averaged before the shift is read.

    Parameters
    ----------
    gradient : array of shape (points,), (outputs, points) or (..., outputs, points)
        Gradients from `input_gradient`.
    spacing : float
        Distance between points.

    Returns
    -------
    float, or numpy.ndarray of shape (...)
        In the units of `spacing`.

    Examples
    --------
    >>> x = np.linspace(0, 200, 20001)
    >>> lag = half_correlation_lag(np.sin(x), spacing=0.01)
    >>> bool(abs(lag - np.pi / 3) < 0.01)
    True
    """
    if not spacing > 0:
        raise ValueError(f"spacing must be positive, got {spacing!r}")
    correlation = autocorrelation(gradient)
    if correlation.ndim > 1:
        correlation = correlation.mean(axis=-2)
    # The mean is removed, so the correlations sum to -1/2 beyond shift 0: some are below 0.5.
    after = np.argmax(correlation < 0.5, axis=-1, keepdims=True)
    high = np.take_along_axis(correlation, after - 1, axis=-1)
    low = np.take_along_axis(correlation, after, axis=-1)
    lag = ((after - 1) + (high - 0.5) / (high - low))[..., 0] * spacing
    return float(lag) if lag.ndim == 0 else lag
