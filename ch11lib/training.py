"""Train a compiled Keras model with each epoch as one compiled graph.

On small networks `model.fit` spends most of its time between the steps: fetching a batch,
entering a graph, reporting to callbacks. `fit` keeps `model.fit`'s arguments, callbacks and
numbers, but holds the data in memory and runs all the steps of an epoch inside one graph.

How it works, in three ideas:

*The step is Keras's own.* The graph calls ``model.train_step`` in a loop, so losses, metrics,
regularizers, batch-normalization statistics, dropout and optimizers are exactly Keras's.

*A program borrows its variables.* The compiled epoch (a *program*) takes the model's variables as
arguments. While it is traced, the model's Keras variables point to those arguments. A second model
of the same architecture, with other weights, seeds or learning rate, therefore runs the same
program and compiles nothing: this is what makes five seeds cheap.

*Whatever does not fit is handed on.* Generators, batch-level callbacks, an overridden
``train_step`` and the like go to ``model.fit``, with the same batch order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
import contextlib
from dataclasses import dataclass
import functools
import gc
import inspect
import json
import threading
from types import CodeType, FunctionType, MethodType
from typing import Any
import weakref

from ch11lib.backend import keras, tf, trim_memory, xla_allowed
import numpy as np

__all__ = [
    "DivergenceError",
    "batch_order",
    "clear_programs",
    "describe",
    "evaluate",
    "fingerprint",
    "fit",
    "xla_pays",
]

#: Number of training steps from which compiling with XLA repays its time on two CPU cores: it takes
#: 1 to 4 s more than tracing and saves 0.2 to 2 ms a step (`benchmarks/engine.py` measures it).
XLA_BREAK_EVEN_STEPS = 5_000


class DivergenceError(ArithmeticError):
    """The training loss became infinite or not a number.

    Attributes
    ----------
    epoch, step : int
        Where it happened; both count from 0, `step` within the epoch.
    history : keras.callbacks.History
        The epochs that were completed before.
    """

    def __init__(self, message: str, epoch: int, step: int, history: keras.callbacks.History):
        super().__init__(message)
        self.epoch, self.step, self.history = epoch, step, history


def batch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which `fit` visits `n` samples in one epoch.

    Parameters
    ----------
    n : int
        Number of training samples.
    seed, epoch : int
        The `seed` given to `fit`, and the epoch, counted from 0.

    Returns
    -------
    numpy.ndarray, shape (n,), int32
        A permutation of 0 ... n-1.

    Examples
    --------
    >>> batch_order(6, seed=1, epoch=0)
    array([4, 0, 2, 1, 5, 3], dtype=int32)
    """
    return np.random.default_rng([seed, epoch]).permutation(n).astype(np.int32)


def fit(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    epochs: int,
    batch_size: int = 32,
    validation_data: tuple | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    shuffle: bool = True,
    seed: int | None = None,
    verbose: int = 0,
    class_weight: Mapping[int, float] | None = None,
    sample_weight: Any = None,
    validation_split: float = 0.0,
    validation_freq: int | Sequence[int] = 1,
    initial_epoch: int = 0,
    jit_compile: bool | str = "auto",
    **fit_options: Any,
) -> keras.callbacks.History:
    """Train a compiled model, like `model.fit` but several times faster on small networks.

    Parameters
    ----------
    model : keras.Model
        Any compiled Keras 3 model.
    x, y : array-like or nested structure of arrays, first dimension n
        Training data; whatever else `model.fit` takes (a `tf.data.Dataset`, a generator) is
        handed to it.
    epochs, batch_size, initial_epoch, class_weight, sample_weight
        As in `model.fit`. A partial last batch is used, not dropped.
    validation_data : tuple (x, y) or (x, y, sample_weight), optional
        Evaluated after each epoch chosen by `validation_freq`; `validation_split` takes the last
        fraction of the training data instead, as in `model.fit`.
    callbacks : sequence of keras.callbacks.Callback
        Epoch-level callbacks run unchanged. If one of them acts on batches, training is handed to
        `model.fit` as a whole.
    shuffle : bool
        Visit the samples in a new random order in each epoch.
    seed : int, optional
        Fixes these orders, see `batch_order`. By default they follow NumPy's global seed, which
        `keras.utils.set_random_seed` sets.
    verbose : int
        0 is silent, anything else prints a line per epoch.
    jit_compile : bool or "auto"
        Whether to compile the epoch with XLA; "auto" asks `xla_pays`.
    **fit_options
        Any other argument of `model.fit`; its presence hands training to `model.fit`.

    Returns
    -------
    keras.callbacks.History
        As from `model.fit`. Its attribute ``engine`` is ``"graph"``, or ``"model.fit: <why>"``.

    Raises
    ------
    DivergenceError
        If the loss becomes infinite or not a number, unless a `TerminateOnNaN` callback is there to
        deal with it. It says where, and holds the history up to there.
    ValueError, TypeError
        If the model is not compiled, was frozen or unfrozen after `compile` and a first training,
        or if the data do not fit together.

    Notes
    -----
    After a `KeyboardInterrupt`, ``model.history`` holds the completed epochs.

    Examples
    --------
    >>> x = np.linspace(-1, 1, 64, dtype="float32")[:, None]
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.SGD(0.1), loss="mse")
    >>> history = fit(model, x, 3 * x + 1, epochs=50, seed=0)
    >>> history.history["loss"][-1] < 1e-3
    True
    """
    _check_arguments(model, epochs, batch_size, initial_epoch)
    _check_validation_freq(validation_freq)
    callbacks = _as_list(callbacks)
    if model.optimizer is None and type(model).train_step is keras.Model.train_step:
        raise ValueError("model must be compiled with an optimizer, received none")
    common = {
        "epochs": epochs,
        "callbacks": callbacks,
        "verbose": 2 if verbose else 0,
        "validation_freq": validation_freq,
        "initial_epoch": initial_epoch,
    }
    if fit_options or _is_stream(x):
        why = f"option {', '.join(fit_options)}" if fit_options else f"x is a {type(x).__name__}"
        if not _is_stream(x):
            common.update(batch_size=batch_size)
        return _model_fit(
            model,
            why,
            None,
            x,
            y,
            # Keras shuffles the batches of a PyDataset, and warns about a Dataset or a generator.
            shuffle=shuffle and (not _is_stream(x) or isinstance(x, keras.utils.PyDataset)),
            class_weight=class_weight,
            sample_weight=sample_weight,
            validation_split=validation_split,
            validation_data=validation_data,
            **common,
            **fit_options,
        )

    data = _Arrays.of(x, y, sample_weight)
    validation = _validation(validation_data)
    if validation_split and validation is None:
        data, validation = data.split(validation_split)
    if class_weight is not None:
        data = data.weighted(class_weight)
    if seed is None:
        seed = int(np.random.randint(2**31))  # noqa: NPY002  (what set_random_seed seeds)

    def order(epoch):
        return batch_order(data.n, seed, epoch) if shuffle else np.arange(data.n, dtype=np.int32)

    reason = _reason_for_model_fit(model, callbacks)
    if _is_stream(validation):
        reason = f"validation_data is a {type(validation).__name__}"
    if reason is not None:
        batches = _SameOrder(data, batch_size, order)
        begin = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: batches.begin(epoch)
        )
        if isinstance(validation, _Arrays):
            validation = validation.as_tuple()
            common.update(validation_batch_size=batch_size)
        common.update(callbacks=[begin, *callbacks], shuffle=False)
        return _model_fit(model, reason, data, batches, validation_data=validation, **common)

    with _readable_errors(model):
        _build(model, data)
    steps = -(-data.n // batch_size)
    if jit_compile == "auto":
        jit_compile = xla_pays(model, steps * (epochs - initial_epoch))
    programs = None
    callback_list = keras.callbacks.CallbackList(
        callbacks, add_history=True, model=model, epochs=epochs, steps=steps, verbose=verbose
    )
    model.history.engine = "graph"
    model.stop_training = False
    callback_list.on_train_begin()
    logs: dict[str, float] = {}
    for epoch in range(initial_epoch, epochs):
        model.reset_metrics()
        callback_list.on_epoch_begin(epoch)
        # As in Keras, what callbacks change before the first batch counts; later it is too late.
        programs = programs or _Programs(model, bool(jit_compile))
        bad_step, logs = programs.train(data, order(epoch), batch_size)
        if bad_step is not None:
            if not _handles_divergence(callbacks):
                raise _divergence(model, data, epoch, bad_step, steps, logs["loss"])
            for callback in callbacks:
                if isinstance(callback, keras.callbacks.TerminateOnNaN):
                    callback.on_train_batch_end(bad_step, logs)
        if validation is not None and _is_due(epoch, validation_freq):
            callback_list.on_test_begin()
            model.reset_metrics()
            val_logs = programs.evaluate(validation, batch_size)
            callback_list.on_test_end(val_logs)
            logs.update({f"val_{name}": value for name, value in val_logs.items()})
        callback_list.on_epoch_end(epoch, logs)
        if verbose:
            values = " - ".join(f"{name}: {np.round(value, 4)}" for name, value in logs.items())
            print(f"Epoch {epoch + 1}/{epochs} - {values}")
        if model.stop_training:
            break
    if epochs > 0:
        model.optimizer.finalize_variable_values(model.trainable_weights)
    callback_list.on_train_end(logs)
    return model.history


def evaluate(
    model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None, batch_size: int = 32
) -> dict[str, float]:
    """Return loss and metrics of a compiled model, like ``model.evaluate(return_dict=True)``.

    The compiled graph is shared with other models of the same architecture, see `fit`.

    Parameters
    ----------
    model : keras.Model
        A compiled model.
    x, y, sample_weight, batch_size
        As in `model.evaluate`.

    Returns
    -------
    dict
        Name of the loss or metric to its value.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> sorted(evaluate(model, np.zeros((4, 2)), np.ones((4, 1))).items())
    [('loss', 1.0)]
    """
    _check_arguments(model, 1, batch_size, 0)
    if _is_stream(x) or _reason_for_model_fit(model, ()) is not None:
        options = (
            {} if _is_stream(x) else {"sample_weight": sample_weight, "batch_size": batch_size}
        )
        return model.evaluate(x, y, return_dict=True, verbose=0, **options)
    data = _Arrays.of(x, y, sample_weight)
    with _readable_errors(model):
        _build(model, data)
    model.reset_metrics()
    return _Programs(model, jit_compile=False).evaluate(data, batch_size)


def xla_pays(model: keras.Model, steps: int) -> bool:
    """Say whether compiling with XLA is worth its time for so many training steps.

    It is once the steps repay the compilation, unless the model draws random numbers as it trains
    (dropout): XLA is slow at that on a CPU. The environment variable ``CH11_XLA=0`` turns it off
    everywhere.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> xla_pays(model, steps=100), xla_pays(model, steps=1_000_000)
    (False, True)
    """
    draws = any(v.name == "seed_generator_state" for v in model.variables)
    return xla_allowed() and steps >= XLA_BREAK_EVEN_STEPS and not draws


def describe(model: keras.Model) -> str:
    """Return what shapes the training of a compiled model, as JSON.

    Two models with equal descriptions may differ in initial values, seeds, names and those
    hyperparameters that optimizers hold in variables. For a subclassed model, where Keras knows no
    architecture, the description holds the code of the class and the shapes of the variables.
    """
    signature = _signature(model)
    return json.dumps([signature.description, [fingerprint(part) for part in signature.code]])


def fingerprint(code: Any) -> str:
    """Return a text that changes with the code of a function or class.

    It covers the byte code, the defaults, and what the code refers to: plain values (numbers,
    strings ...) and functions of the same module.

    Parameters
    ----------
    code : function, class or functools.partial

    Examples
    --------
    >>> def make(slope):
    ...     return lambda z: slope * z
    >>> fingerprint(make(0.1)) == fingerprint(make(0.1))
    True
    >>> fingerprint(make(0.1)) == fingerprint(make(0.2))
    False
    """
    seen: set[int] = set()

    def text(part):
        if isinstance(part, CodeType):
            return [part.co_code.hex(), part.co_names, [text(item) for item in part.co_consts]]
        if isinstance(part, functools.partial):
            return [text(part.func), text(part.args), text(part.keywords)]
        if isinstance(part, (staticmethod, classmethod, MethodType)):
            return text(part.__func__)
        if isinstance(part, property):
            return [text(part.fget), text(part.fset)]
        if isinstance(part, Mapping):
            return [[str(key), text(value)] for key, value in part.items()]
        if isinstance(part, (tuple, list)):
            return [text(item) for item in part]
        if isinstance(part, (type, FunctionType)):
            name = f"{part.__module__}.{part.__qualname__}"
            if id(part) in seen or (seen and part.__module__ != module):
                return name
            seen.add(id(part))
            if isinstance(part, type):
                members = {k: v for k, v in vars(part).items() if k != "__doc__"}
                return [name, [text(base) for base in part.__bases__], text(members)]
            used = inspect.getclosurevars(part)
            values = [part.__defaults__, part.__kwdefaults__, used.nonlocals, used.globals]
            return [name, text(part.__code__), text(values)]
        plain = isinstance(part, (str, bytes, int, float, complex, type(None)))
        return repr(part) if plain else type(part).__name__

    module = getattr(code, "__module__", None)
    return json.dumps(text(code))


# Modules that compile programs of their own add what `clear_programs` calls for them.
forget_elsewhere: list[Callable[[], None]] = []


def clear_programs() -> None:
    """Forget all compiled programs, and release their memory."""
    with _lock:
        _shared_programs.clear()
        _own_programs.clear()
        _signatures.clear()
    for forget in forget_elsewhere:
        forget()
    gc.collect()  # programs and models refer to each other
    trim_memory()


# --- arguments ------------------------------------------------------------------------------------


def _check_arguments(model, epochs, batch_size, initial_epoch):
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, received {type(model).__name__}")
    if not model.compiled:
        raise ValueError("model must be compiled: call model.compile(...) first")
    for name, value, low in (
        ("epochs", epochs, 0),
        ("batch_size", batch_size, 1),
        ("initial_epoch", initial_epoch, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an integer, received {value!r}")
        if value < low:
            raise ValueError(f"{name} must be at least {low}, received {value}")


def _check_validation_freq(validation_freq):
    if isinstance(validation_freq, (int, np.integer)) and not isinstance(validation_freq, bool):
        if validation_freq < 1:
            raise ValueError(f"validation_freq must be at least 1, received {validation_freq}")
    elif not isinstance(validation_freq, Collection) or isinstance(validation_freq, str):
        raise TypeError(
            f"validation_freq must be an integer or a list of epochs, received {validation_freq!r}"
        )


def _as_list(callbacks):
    if callbacks is None:
        return []
    if isinstance(callbacks, keras.callbacks.Callback):
        return [callbacks]
    return list(callbacks)


def _is_due(epoch, validation_freq):
    if isinstance(validation_freq, (int, np.integer)):
        return (epoch + 1) % validation_freq == 0
    return epoch + 1 in validation_freq


@dataclass(frozen=True)
class _Arrays:
    """Training data in memory: (nested) tensors with the same first dimension n."""

    x: Any
    y: Any
    sample_weight: Any
    n: int

    @classmethod
    def of(cls, x, y=None, sample_weight=None, where=""):
        parts = {}
        for name, value in (("x", x), ("y", y), ("sample_weight", sample_weight)):
            parts[name] = keras.tree.map_structure(
                lambda array, name=name: _tensor(name, array), value
            )
        leaves = [
            (name, leaf)
            for name, value in parts.items()
            for leaf in keras.tree.flatten(value)
            if leaf is not None
        ]
        if parts["x"] is None or not leaves:
            raise ValueError(f"x must hold training data{where}, received {x!r}")
        n = int(leaves[0][1].shape[0])
        if any(int(leaf.shape[0]) != n for _, leaf in leaves):
            received = ", ".join(f"{name}: {leaf.shape[0]}" for name, leaf in leaves)
            raise ValueError(
                f"x, y and sample_weight must have one length{where}, received {received}"
            )
        if n == 0:
            raise ValueError(f"x must hold at least one sample{where}, received none")
        return cls(parts["x"], parts["y"], parts["sample_weight"], n)

    def split(self, fraction):
        """Split off the last `fraction` of the samples, as `model.fit` does."""
        if not 0 < fraction < 1:
            raise ValueError(f"validation_split must lie between 0 and 1, received {fraction}")
        at = int(np.floor(self.n * (1 - fraction)))
        if at == 0:
            raise ValueError(f"validation_split={fraction} leaves no training data of {self.n}")
        head = self.map(lambda array: array[:at])
        tail = self.map(lambda array: array[at:])
        return _Arrays(*head, at), _Arrays(*tail, self.n - at)

    def weighted(self, class_weight):
        """Weight the samples by their class; as in Keras, a class without an entry has weight 1."""
        if self.sample_weight is not None:
            raise ValueError("class_weight and sample_weight cannot be given together")
        if not tf.is_tensor(self.y):
            raise ValueError("class_weight needs a model with one output, and y as one array")
        labels = self.y.numpy()
        if labels.ndim > 1:
            labels = labels.argmax(-1) if labels.shape[-1] > 1 else labels[..., 0]
        weights = np.ones(labels.shape, keras.config.floatx())
        for label, weight in class_weight.items():
            weights[np.round(labels) == label] = weight
        return _Arrays(self.x, self.y, tf.convert_to_tensor(weights), self.n)

    def as_tuple(self):
        """Return (x, y) or (x, y, sample_weight)."""
        if self.sample_weight is None:
            return self.x, self.y
        return self.x, self.y, self.sample_weight

    def map(self, function: Callable):
        """Apply `function` to every array of (x, y, sample_weight)."""
        parts = (self.x, self.y, self.sample_weight)
        return keras.tree.map_structure(lambda a: None if a is None else function(a), parts)


def _tensor(name, array):
    if array is None:
        return None
    if not tf.is_tensor(array):
        array = np.asarray(array)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{name} must be numeric, received an array of dtype {array.dtype}")
    if len(array.shape) == 0:
        raise ValueError(f"{name} must have a sample dimension, received a scalar (a list?)")
    array = tf.convert_to_tensor(array)
    # Floats become Keras's default float type, as in model.fit.
    return tf.cast(array, keras.config.floatx()) if array.dtype.is_floating else array


def _validation(validation_data):
    if validation_data is None or _is_stream(validation_data):
        return validation_data
    if not isinstance(validation_data, (tuple, list)) or len(validation_data) not in (2, 3):
        raise TypeError(
            "validation_data must be a tuple (x, y) or (x, y, sample_weight), received "
            f"{type(validation_data).__name__}"
        )
    return _Arrays.of(*validation_data, where=" in validation_data")


def _divergence(model, data, epoch, step, steps, loss):
    of = f" of {steps}" if steps else ""
    message = f"the loss became {loss} at epoch {epoch + 1}, step {step + 1}{of}"
    arrays = [] if data is None else keras.tree.flatten((data.x, data.y, data.sample_weight))
    bad_input = any(
        array is not None
        and array.dtype.is_floating
        and not bool(tf.reduce_all(tf.math.is_finite(array)))
        for array in arrays
    )
    if bad_input:
        message += "; x, y or sample_weight contains values that are not finite"
    else:
        rate = float(tf.convert_to_tensor(model.optimizer.learning_rate))
        message += f"; the usual remedy is a learning rate below the present {rate:.3g}"
    return DivergenceError(message, epoch, step, model.history)


# --- what model.fit has to do ---------------------------------------------------------------------

_BATCH_HOOKS = (
    "on_batch_begin",
    "on_batch_end",
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_test_batch_begin",
    "on_test_batch_end",
)


#: Methods of a model that the compiled epoch takes for Keras's own.
_STEPS = (
    "train_step",
    "test_step",
    "compute_metrics",
    "get_metrics_result",
    "make_train_function",
    "make_test_function",
)


def _is_stream(x) -> bool:
    """Whether `x` is something other than arrays in memory."""
    return isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)) or hasattr(x, "__next__")


def _reason_for_model_fit(model, callbacks) -> str | None:
    """Say why training has to be left to `model.fit`, or return None."""
    if model.run_eagerly:
        return "the model runs eagerly"
    for name in _STEPS:
        if getattr(type(model), name) is not getattr(keras.Model, name) or name in vars(model):
            return f"the model has its own {name}"
    if any(getattr(layer, "stateful", False) for layer in model._flatten_layers()):
        return "a layer keeps its state from batch to batch"
    if isinstance(model.optimizer, keras.optimizers.MultiOptimizer):
        return "the model has several optimizers"
    if model.optimizer is None:
        return "the model has no optimizer"
    if tf.distribute.has_strategy() or model.distribute_strategy.num_replicas_in_sync > 1:
        return "the model is distributed"
    for callback in callbacks:
        if _acts_on_batches(callback):
            return f"{type(callback).__name__} acts on batches"
    return None


def _acts_on_batches(callback) -> bool:
    known = [keras.callbacks.Callback, keras.callbacks.TerminateOnNaN]
    if getattr(callback, "save_freq", None) == "epoch":
        known.append(keras.callbacks.ModelCheckpoint)
    for hook in _BATCH_HOOKS:
        owner = next(c for c in type(callback).__mro__ if hook in vars(c))
        if owner not in known or hook in vars(callback):
            return True
    return False


def _model_fit(model, why, data, *arguments, callbacks, **options):
    """Train with `model.fit`, under the same rules for the history and for divergence."""
    callbacks = [*callbacks, _InModelFit(why, data, raises=not _handles_divergence(callbacks))]
    return model.fit(*arguments, callbacks=callbacks, **options)


def _handles_divergence(callbacks) -> bool:
    return any(isinstance(callback, keras.callbacks.TerminateOnNaN) for callback in callbacks)


class _InModelFit(keras.callbacks.Callback):
    """Label the history of a `model.fit`, and raise `DivergenceError`."""

    def __init__(self, why, data, raises):
        super().__init__()
        self.why, self.data, self.raises = why, data, raises

    def on_train_begin(self, logs=None):
        self.model.history.engine = f"model.fit: {self.why}"

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        loss = (logs or {}).get("loss", 0.0)
        if self.raises and not np.isfinite(loss):
            steps = self.params["steps"]
            raise _divergence(self.model, self.data, self.epoch, batch, steps, loss)


class _SameOrder(keras.utils.PyDataset):
    """Batches for `model.fit` in the order that the compiled epoch would have used."""

    def __init__(self, data, batch_size, order):
        super().__init__()
        self.data = _Arrays(*data.map(lambda array: array.numpy()), data.n)
        self.batch_size, self.order = batch_size, order
        self.begin(0)

    def begin(self, epoch):
        """Take up the order of `epoch`; Keras's own epoch hooks also run between epochs."""
        self.rows = self.order(epoch)

    def __len__(self):
        return -(-self.data.n // self.batch_size)

    def __getitem__(self, i):
        rows = self.rows[i * self.batch_size : (i + 1) * self.batch_size]
        return _Arrays(*self.data.map(lambda array: array[rows]), len(rows)).as_tuple()


# --- programs -------------------------------------------------------------------------------------


def _build(model, data):
    """Create all variables, so that none is born inside a graph."""
    parts = [model, model.optimizer, model._compile_loss, *model.metrics]
    if not all(part is None or getattr(part, "built", True) for part in parts):
        x, y, sample_weight = data.map(lambda array: array[:2])
        y_pred = model(x, training=False)
        model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=False)
        model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        model.reset_metrics()
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def _variables(model) -> list[keras.Variable]:
    """All state of a model in a fixed order, each variable once."""
    groups = (model.variables, model.optimizer.variables, model.metrics_variables)
    return list({id(v): v for group in groups for v in group}.values())


def _optimizers(model):
    """Return the optimizer and, for loss scaling, the one inside it."""
    inner = getattr(model.optimizer, "inner_optimizer", None)
    return [model.optimizer] if inner is None else [model.optimizer, inner]


class _Hyperparameter:
    """A number of an optimizer that enters the graph as an argument.

    Optimizers branch on such a number (``if self.momentum != 0``), so that comparisons are answered
    from the value at tracing; the sign is part of a program's signature. Everything else sees the
    tensor.
    """

    #: Left out are the decay rates of Adam and its relatives: they enter as ``1 - beta``, which
    #: Python computes in double precision and a float32 argument could not reproduce.
    NAMES = ("weight_decay", "clipnorm", "clipvalue", "global_clipnorm")
    WITH_MOMENTUM = (keras.optimizers.SGD, keras.optimizers.RMSprop)

    def __init__(self, value, tensor):
        self.value, self.tensor, self.dtype = value, tensor, "float32"

    def __tf_tensor__(self, dtype=None, name=None):
        return self.tensor if dtype is None else tf.cast(self.tensor, dtype)

    def __bool__(self):
        return bool(self.value)

    def __eq__(self, other):
        return self.value == other

    def __gt__(self, other):
        return self.value > other

    def __mul__(self, other):
        return self.tensor * other

    def __neg__(self):
        return -self.tensor

    def __rtruediv__(self, other):
        return other / self.tensor

    __rmul__ = __mul__
    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of(cls, model) -> dict[str, float]:
        """Return the hyperparameters of the model's optimizer that can be lifted, by name."""
        optimizer = model.optimizer
        if not _is_keras(optimizer) or any(v.dtype != "float32" for v in model.trainable_variables):
            return {}  # a custom optimizer may compute anything with its numbers
        names = [*cls.NAMES, *(["momentum"] if type(optimizer) in cls.WITH_MOMENTUM else [])]
        found = {name: getattr(optimizer, name, None) for name in names}
        return {name: value for name, value in found.items() if type(value) is float and value}


@contextlib.contextmanager
def _borrowed(model, variables, values, numbers, tensors):
    """Let the model's variables and hyperparameters stand for the arguments of a graph."""
    own = [v._value for v in variables]
    optimizers = _optimizers(model)
    indices = [o._trainable_variables_indices for o in optimizers]
    try:
        for variable, value in zip(variables, values, strict=True):
            variable._value = value
        for optimizer in optimizers:
            # An optimizer finds the slots of a variable by the identity of its tf.Variable.
            optimizer._trainable_variables_indices = {
                optimizer._var_key(v): i for i, v in enumerate(optimizer._trainable_variables)
            }
        for (name, number), tensor in zip(numbers.items(), tensors, strict=True):
            setattr(model.optimizer, name, _Hyperparameter(number, tensor))
        yield
    finally:
        for name, number in numbers.items():
            setattr(model.optimizer, name, number)
        for variable, value in zip(variables, own, strict=True):
            variable._value = value
        for optimizer, index in zip(optimizers, indices, strict=True):
            optimizer._trainable_variables_indices = index


@contextlib.contextmanager
def _readable_errors(model):
    """Turn TensorFlow's pages about a failed graph into one error."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        # The cause is the last line that speaks neither of files nor of nodes.
        lines = [line.strip() for line in str(error.message).splitlines()]
        said = [line for line in lines if line and not line.startswith(("File ", "[[", "Detected"))]
        raise ValueError(
            f"model {model.name!r} cannot be trained on these data: {said[-1]}"
        ) from None


class _Programs:
    """The compiled graphs of one model: an epoch of training, and an evaluation.

    A graph is made for a signature, which names all that is built into it; models with equal
    signatures share it. A model whose parts cannot be compared safely (a subclassed model, a
    function from a notebook) has graphs of its own, which hold its variables as usual.
    """

    def __init__(self, model, jit_compile):
        self.model, self.jit_compile = model, jit_compile
        self.signature = signature = _signature(model)
        compiled = model._loss_tracker  # a new object after each call of compile()
        with _lock:
            before = _signatures.get(model)
            if before is not None and before[0] is not compiled:
                _own_programs.pop(model, None)
            elif before is not None and before[1] != signature:
                raise ValueError(
                    "model was changed after compile() (for example layers were frozen or "
                    "unfrozen); Keras takes that into account after the next compile(): call it"
                )
            _signatures[model] = (compiled, signature)
            self._share(signature.shareable)

    def _share(self, shared):
        self.shared = shared
        if shared:
            self.cache = _shared_programs
            self.variables = _variables(self.model)
            self.numbers = _Hyperparameter.of(self.model)
        else:
            self.cache = _own_programs.setdefault(self.model, OrderedDict())
            self.variables, self.numbers = [], {}

    def train(self, data, order, batch_size):
        """Run one epoch; return the first step with a non-finite loss, if any, and the logs."""
        first_bad, logs = self._run("train", data, order, batch_size)
        return (None if first_bad < 0 else first_bad), logs

    def evaluate(self, data, batch_size):
        """Return loss and metrics over `data`."""
        return self._run("evaluate", data, np.arange(data.n, dtype=np.int32), batch_size)[1]

    def _run(self, task, data, order, batch_size):
        with _readable_errors(self.model):
            program = self._program(task, data, batch_size)
            first_bad, logs = program(
                [v.value for v in self.variables],
                [tf.constant(number, tf.float32) for number in self.numbers.values()],
                data.x,
                data.y,
                data.sample_weight,
                tf.constant(order),
                tf.constant(batch_size),
            )
        return int(first_bad), {
            name: float(value) if value.shape.rank == 0 else value.numpy()
            for name, value in logs.items()
        }

    def _program(self, task, data, batch_size):
        # XLA compiles for exact sizes; a plain graph serves any number of samples, in any batches.
        sizes = (data.n, batch_size) if self.jit_compile else None
        specs = data.map(
            lambda array: tf.TensorSpec((sizes and data.n, *array.shape[1:]), array.dtype)
        )
        # A dictionary finds its inputs by their names, which a signature does not hold.
        names = [i.name for i in self.model.inputs] if isinstance(data.x, Mapping) else None
        key = (self.signature, task, repr(specs), repr(names), sizes)
        with _lock:
            if key in self.cache:
                self.cache.move_to_end(key)
                return self.cache[key]
            if self.shared and _signature(self.model) != self.signature:
                self._share(False)  # a callback has changed the model since
            program = self._trace(task, specs, sizes)
            if self.shared and program.captured_inputs:
                self._share(False)  # it depends on something that is not in the signature
                program = self._trace(task, specs, sizes)
            self.cache[key] = program
            while len(self.cache) > MAX_PROGRAMS:
                self.cache.popitem(last=False)
            return program

    def _trace(self, task, specs, sizes):
        model, variables, numbers = self.model, self.variables, self.numbers

        def program(values, tensors, x, y, sample_weight, order, batch_size):
            arrays = _Arrays(x, y, sample_weight, None)

            def step(rows, i, first_bad):
                batch = arrays.map(lambda array: tf.gather(array, rows))
                if task == "evaluate":
                    model.test_step(batch)
                    return first_bad
                loss = model.train_step(batch).get("loss", 0.0)
                return tf.where((first_bad < 0) & ~tf.math.is_finite(loss), i, first_bad)

            with _borrowed(model, variables, values, numbers, tensors):
                first_bad = _over_batches(step, order, batch_size, sizes)
                return first_bad, model.get_metrics_result()

        return tf.function(
            program, jit_compile=sizes is not None, autograph=False
        ).get_concrete_function(
            [v.value for v in variables],
            [tf.TensorSpec((), tf.float32)] * len(numbers),
            *specs,
            tf.TensorSpec((sizes and sizes[0],), tf.int32),
            tf.TensorSpec((), tf.int32),
        )


def _over_batches(step, order, batch_size, sizes):
    """Call ``step(rows, i, first_bad)`` for the rows of each batch, until one is bad.

    With given `sizes` (n, batch size) the last, smaller batch stands outside of the loop, since
    XLA needs the size of all arrays.
    """
    begin = (tf.constant(0), tf.constant(-1))
    if sizes is None:
        steps = -(-tf.shape(order)[0] // batch_size)
        return tf.while_loop(
            lambda i, first_bad: (i < steps) & (first_bad < 0),
            lambda i, first_bad: (
                i + 1,
                step(order[i * batch_size : (i + 1) * batch_size], i, first_bad),
            ),
            begin,
        )[1]

    n, size = sizes
    steps, rest = divmod(n, size)

    def sized_step(count, i, first_bad):
        rows = tf.slice(order, [i * size], [count])
        # Keras counts on a batch size that is unknown in Python, as it is in model.fit.
        return step(tf.compat.v1.placeholder_with_default(rows, (None,)), i, first_bad)

    i, first_bad = begin
    if steps:
        i, first_bad = tf.while_loop(
            lambda i, first_bad: (i < steps) & (first_bad < 0),
            lambda i, first_bad: (i + 1, sized_step(size, i, first_bad)),
            begin,
        )
    if rest:
        first_bad = tf.cond(
            first_bad < 0, lambda: sized_step(rest, i, first_bad), lambda: first_bad
        )
    return first_bad


# --- which models can share a program -------------------------------------------------------------

#: A traced epoch takes a few megabytes.
MAX_PROGRAMS = 16

_lock = threading.RLock()
_shared_programs: OrderedDict = OrderedDict()
_own_programs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_signatures: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Signature:
    """All that is built into a program, as comparable values."""

    description: str
    code: tuple
    shareable: bool


def _signature(model) -> _Signature:
    code, shareable = _custom_code(model)
    known = {getattr(part, "__name__", None) for part in code}
    describer = _Describer(known, drop_from_optimizer=_Hyperparameter.of(model))
    try:
        if "<lambda>" in known:
            raise TypeError("Keras serializes a lambda only with a warning")
        compiled = {k: v for k, v in model._compile_config.config.items() if k != "optimizer"}
        parts = [
            describer.architecture(model.get_config()),
            describer.optimizer(keras.saving.serialize_keras_object(model.optimizer)),
            describer.compiled(keras.saving.serialize_keras_object(compiled)),
            model.output_names if len(model.outputs) > 1 else [],
        ]
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        parts, shareable = [], False
    description = json.dumps(
        [
            f"{type(model).__module__}.{type(model).__name__}",
            parts,
            [[list(v.shape), str(v.dtype), bool(v.trainable)] for v in _variables(model)],
            [
                None if part is None else [type(part).__name__, part.get_config()]
                for v in model.trainable_variables
                for part in (v.regularizer, v.constraint)
                if part is None or _is_keras(part)
            ],
            [number > 0 for number in _Hyperparameter.of(model).values()],
            keras.config.epsilon(),
        ],
        sort_keys=True,
        default=repr,
    )
    return _Signature(description, code, shareable and describer.complete)


def _is_keras(part) -> bool:
    """Whether an object, a class or a function is Keras's own."""
    return str(getattr(part, "__module__", "")).startswith("keras.")


def _custom_code(model) -> tuple[tuple, bool]:
    """Return all code in a model that is not Keras's, and whether models with equal code can share.

    Custom classes and functions appear in a configuration by name only. A name can stand for
    different code over time (a notebook cell that is edited and run again), and a function called
    ``relu`` passes for Keras's own, so that code is compared by identity. Code from a notebook or
    script is never shared: it often depends on global variables, which change.
    """
    shareable = _is_keras(type(model))
    layers = model._flatten_layers()
    leaves = keras.tree.flatten(model._compile_config.config)
    leaves += [part for v in model.trainable_variables for part in (v.regularizer, v.constraint)]
    leaves = [leaf for leaf in leaves if not isinstance(leaf, (str, int, float, type(None)))]
    code: list = []
    for part in [*layers, *_optimizers(model), *leaves]:
        if not _is_keras(part):
            code.append(part if isinstance(part, FunctionType) else type(part))
            # A layer's configuration is complete; that of other custom objects need not be,
            # unless they say so.
            complete = getattr(part, "programs_can_be_shared", False)
            shareable &= complete or isinstance(part, (FunctionType, keras.Layer))
        for name, value in getattr(part, "__dict__", {}).items():
            if name in ("build", "quantize", "_losses") or name.endswith("_initializer"):
                continue  # these two methods are wrapped by Keras in each layer
            if isinstance(value, (keras.Variable, keras.Layer)):
                continue
            if isinstance(part, keras.Layer) and isinstance(value, (tf.Tensor, np.ndarray)):
                shareable = False  # such as the statistics of a Normalization layer
            elif callable(value) and not _is_keras(value):
                code.append(value if isinstance(value, FunctionType) else type(value))
                shareable &= isinstance(value, FunctionType)
    if any(hasattr(optimizer, "_exclude_from_weight_decay") for optimizer in _optimizers(model)):
        shareable = False  # it names variables
    shareable &= all(part.__module__ != "__main__" and part.__name__ != "<lambda>" for part in code)
    return tuple(code), shareable


class _Describer:
    """Turns configurations into comparable ones, without what does not shape the graph."""

    def __init__(self, known, drop_from_optimizer):
        self.known, self.drop_from_optimizer = known, drop_from_optimizer
        self.names: dict[str, str] = {}
        self.complete = True

    def architecture(self, part, key=None, seeded=False):
        """Replace names by the order in which they appear; drop seeds and initial values."""
        if isinstance(part, Mapping):
            self._note_custom(part)
            keras_own = part.get("registered_name") is None
            return {
                k: self.architecture(v, k, seeded=keras_own and k == "config")
                for k, v in part.items()
                if not str(k).endswith("_initializer") and not (seeded and k == "seed")
            }
        if isinstance(part, (list, tuple)):
            if key in ("input_layers", "output_layers", "keras_history"):
                return [self._position(item) for item in part]
            return [self.architecture(item) for item in part]
        return self._position(part) if key == "name" else part

    def optimizer(self, part):
        """Drop what the optimizer holds in variables, and its name."""
        if not isinstance(part, Mapping):
            return part
        self._note_custom(part)
        return {
            k: self.optimizer(v)
            for k, v in part.items()
            if not (k in ("name", "learning_rate") and not isinstance(v, Mapping))
            and k not in self.drop_from_optimizer
        }

    def compiled(self, part):
        """Keep everything: names of losses and metrics appear in the history."""
        if isinstance(part, Mapping):
            self._note_custom(part)
            return {k: self.compiled(v) for k, v in part.items()}
        return [self.compiled(item) for item in part] if isinstance(part, (list, tuple)) else part

    def _position(self, item):
        if isinstance(item, (list, tuple)):
            return [self._position(i) for i in item]
        return self.names.setdefault(item, f"#{len(self.names)}") if isinstance(item, str) else item

    def _note_custom(self, part):
        if part.get("registered_name") is None:
            return
        if part.get("class_name") == "function":
            self.complete &= part["config"] in self.known
        elif not str(part.get("module")).startswith("keras."):  # else Keras's, though not exported
            self.complete &= part["class_name"] in self.known
