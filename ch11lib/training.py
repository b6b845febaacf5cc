"""Train a compiled Keras model with each epoch as one compiled graph.

On small networks `model.fit` spends most of its time between the steps: fetching a batch,
entering a graph, reporting to callbacks. `fit` keeps `model.fit`'s arguments, callbacks and
numbers, but holds the data in memory and runs all the steps of an epoch inside one graph.

How it works, in three ideas:

*The step is Keras's own.* The graph calls ``model.train_step`` in a loop, so losses, metrics,
regularizers, batch-normalization statistics, dropout and optimizers are exactly Keras's.

*A program borrows its variables.* The compiled epoch (a *program*) takes the model's variables as
arguments. While it is traced, the model's Keras variables point to those arguments. A second model
of the same architecture, with other weights, seeds or learning rate, therefore runs the same program
and compiles nothing: this is what makes five seeds cheap.

*Whatever does not fit is handed on.* Generators, batch-level callbacks, an overridden
``train_step`` and the like go to ``model.fit``, with the same batch order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
import contextlib
from dataclasses import dataclass
import json
import threading
from typing import Any
import weakref

import numpy as np

from ch11lib.backend import keras, tf

__all__ = ["DivergenceError", "batch_order", "clear_programs", "describe", "evaluate", "fit"]

#: Number of training steps from which compiling with XLA repays its time on two CPU cores
#: (`benchmarks/engine.py` measures it).
XLA_BREAK_EVEN_STEPS = 20_000

#: Rows per validation batch. Inference does not depend on how rows are grouped, and large groups
#: are faster.
EVALUATION_BATCH = 1_000


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
    array([5, 2, 4, 3, 1, 0], dtype=int32)
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
        Whether to compile the epoch with XLA. "auto" does so for networks without random or
        normalization layers once the training is long enough to repay the compile time.
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
    >>> history = fit(model, x, 3 * x + 1, epochs=20, seed=0)
    >>> history.history["loss"][-1] < 1e-3
    True
    """
    _check_arguments(model, epochs, batch_size, initial_epoch)
    callbacks = _as_list(callbacks)
    if fit_options or _is_stream(x):
        why = f"option {', '.join(fit_options)}" if fit_options else f"a {type(x).__name__}"
        options = dict(fit_options, validation_split=validation_split)
        options.update({} if sample_weight is None else {"sample_weight": sample_weight})
        model.fit(
            x,
            y,
            epochs=epochs,
            batch_size=None if _is_stream(x) else batch_size,
            validation_data=validation_data,
            callbacks=callbacks,
            shuffle=shuffle,
            verbose=2 if verbose else 0,
            class_weight=class_weight,
            validation_freq=validation_freq,
            initial_epoch=initial_epoch,
            **options,
        )
        model.history.engine = f"model.fit: {why}"
        return model.history

    data = _Arrays.of(x, y, sample_weight, class_weight)
    validation = None if validation_data is None else _Arrays.of(*validation_data)
    if validation_split and validation is None:
        data, validation = data.split(validation_split)
    if seed is None:
        seed = int(np.random.randint(2**31))  # noqa: NPY002  (what set_random_seed seeds)

    def order(epoch):
        return batch_order(data.n, seed, epoch) if shuffle else np.arange(data.n, dtype=np.int32)

    reason = _reason_for_model_fit(model, callbacks)
    if reason is not None:
        batches = _SameOrder(data, batch_size, order)
        begin = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: batches.begin(epoch))
        model.fit(
            batches,
            epochs=epochs,
            validation_data=None if validation is None else validation.as_tuple(),
            validation_batch_size=EVALUATION_BATCH,
            callbacks=[begin, *callbacks],
            shuffle=False,
            verbose=2 if verbose else 0,
            validation_freq=validation_freq,
            initial_epoch=initial_epoch,
        )
        model.history.engine = f"model.fit: {reason}"
        return model.history

    _build(model, data)
    steps = -(-data.n // batch_size)
    if jit_compile == "auto":
        jit_compile = _xla_pays(model, steps * (epochs - initial_epoch))
    programs = _Programs(model, bool(jit_compile))
    terminates_on_nan = any(isinstance(c, keras.callbacks.TerminateOnNaN) for c in callbacks)

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
        bad_step, logs = programs.train(data, order(epoch), batch_size)
        if bad_step is not None:
            if not terminates_on_nan:
                raise _divergence(model, data, epoch, bad_step, steps, logs["loss"])
            for callback in callbacks:
                if isinstance(callback, keras.callbacks.TerminateOnNaN):
                    callback.on_train_batch_end(bad_step, logs)
        if validation is not None and _is_due(epoch, validation_freq):
            callback_list.on_test_begin()
            model.reset_metrics()
            val_logs = programs.evaluate(validation)
            callback_list.on_test_end(val_logs)
            logs.update({f"val_{name}": value for name, value in val_logs.items()})
        callback_list.on_epoch_end(epoch, logs)
        if verbose:
            values = " - ".join(f"{name}: {value:.4f}" for name, value in logs.items())
            print(f"Epoch {epoch + 1}/{epochs} - {values}")
        if model.stop_training:
            break
    model.optimizer.finalize_variable_values(model.trainable_weights)
    callback_list.on_train_end(logs)
    return model.history


def evaluate(model: keras.Model, x: Any, y: Any, sample_weight: Any = None) -> dict[str, float]:
    """Return loss and metrics of a compiled model, like ``model.evaluate(return_dict=True)``.

    The compiled graph is shared with other models of the same architecture, see `fit`.

    Parameters
    ----------
    model : keras.Model
        A compiled model.
    x, y, sample_weight : array-like, first dimension n
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
    _check_arguments(model, 1, 1, 0)
    if _is_stream(x) or _reason_for_model_fit(model, ()) is not None:
        return model.evaluate(x, y, sample_weight=sample_weight, return_dict=True, verbose=0)
    data = _Arrays.of(x, y, sample_weight)
    _build(model, data)
    model.reset_metrics()
    return _Programs(model, jit_compile=False).evaluate(data)


def describe(model: keras.Model) -> str:
    """Return what shapes the training of a compiled model, as JSON.

    Two models with equal descriptions differ in initial values, seeds, names and those
    hyperparameters that optimizers hold in variables, but in nothing else.
    """
    return _signature(model).description


def clear_programs() -> None:
    """Forget all compiled programs, and release their memory."""
    with _lock:
        _shared_programs.clear()
        _own_programs.clear()
        _signatures.clear()


# --- arguments -------------------------------------------------------------------------------------


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


def _as_list(callbacks):
    if callbacks is None:
        return []
    if isinstance(callbacks, keras.callbacks.Callback):
        return [callbacks]
    return list(callbacks)


def _is_due(epoch, validation_freq):
    if isinstance(validation_freq, int):
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
    def of(cls, x, y=None, sample_weight=None, class_weight=None):
        if class_weight is not None:
            if sample_weight is not None:
                raise ValueError("class_weight and sample_weight cannot be given together")
            sample_weight = _class_weights(y, class_weight)
        parts = {}
        for name, value in (("x", x), ("y", y), ("sample_weight", sample_weight)):
            parts[name] = keras.tree.map_structure(
                lambda array, name=name: _tensor(name, array), value
            )
        lengths = {
            f"{name}": int(leaf.shape[0])
            for name, value in parts.items()
            for leaf in keras.tree.flatten(value)
            if leaf is not None
        }
        if len(set(lengths.values())) != 1:
            received = ", ".join(f"{name}: {n}" for name, n in lengths.items())
            raise ValueError(f"x, y and sample_weight must have one length, received {received}")
        n = next(iter(lengths.values()))
        if n == 0:
            raise ValueError("x must hold at least one sample, received none")
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
    if array is None or tf.is_tensor(array):
        return array
    array = np.asarray(array)
    if array.dtype == object or array.dtype.kind in "USV":
        raise TypeError(f"{name} must be numeric, received an array of dtype {array.dtype}")
    if array.ndim == 0:
        raise ValueError(f"{name} must have a sample dimension, received a scalar")
    if array.dtype.kind == "f":
        array = array.astype(keras.config.floatx(), copy=False)  # as model.fit does
    return tf.convert_to_tensor(array)


def _class_weights(y, class_weight):
    """Return one weight per sample; as in Keras, a class without an entry has weight 1."""
    labels = np.asarray(y)
    labels = labels.argmax(-1) if labels.ndim > 1 and labels.shape[-1] > 1 else labels.reshape(-1)
    labels = np.round(labels).astype(int)
    return np.array([class_weight.get(int(label), 1.0) for label in labels], keras.config.floatx())


def _divergence(model, data, epoch, step, steps, loss):
    message = f"the loss became {loss} at epoch {epoch + 1}, step {step + 1} of {steps}"
    bad_input = any(
        leaf is not None and leaf.dtype.is_floating and not bool(tf.reduce_all(tf.math.is_finite(leaf)))
        for leaf in keras.tree.flatten((data.x, data.y))
    )
    if bad_input:
        message += "; x or y contains values that are not finite"
    else:
        rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
        message += f"; the usual remedy is a learning rate below the present {rate:.3g}"
    return DivergenceError(message, epoch, step, model.history)


# --- what model.fit has to do ----------------------------------------------------------------------

_BATCH_HOOKS = (
    "on_batch_begin",
    "on_batch_end",
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_test_batch_begin",
    "on_test_batch_end",
)


def _is_stream(x) -> bool:
    return isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)) or hasattr(x, "__next__")


def _reason_for_model_fit(model, callbacks) -> str | None:
    """Say why training has to be left to `model.fit`, or return None."""
    if model.run_eagerly:
        return "the model runs eagerly"
    if type(model).train_step is not keras.Model.train_step:
        return "the model has its own train_step"
    if type(model).test_step is not keras.Model.test_step:
        return "the model has its own test_step"
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


# --- programs --------------------------------------------------------------------------------------


def _build(model, data):
    """Create all variables, so that none is born inside a graph."""
    x, y, sample_weight = data.map(lambda array: array[:2])
    if not (model.built and model.optimizer.built and all(getattr(m, "built", True) for m in model.metrics)):
        y_pred = model(x, training=False)
        model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=False)
        model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        model.reset_metrics()
    model.optimizer.build(model.trainable_variables)


def _variables(model) -> list[keras.Variable]:
    """All state of a model in a fixed order, each variable once."""
    groups = (model.variables, model.optimizer.variables, model.metrics_variables)
    return list({id(v): v for group in groups for v in group}.values())


def _optimizers(model):
    """The optimizer and, for loss scaling, the one inside it."""
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
    NAMES = ("momentum", "weight_decay", "clipnorm", "clipvalue", "global_clipnorm")

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

    def __sub__(self, other):
        return self.tensor - other

    def __rtruediv__(self, other):
        return other / self.tensor

    __rmul__ = __mul__
    __hash__ = None

    @classmethod
    def of(cls, optimizer) -> dict[str, float]:
        """The hyperparameters of `optimizer` that can be lifted, by name."""
        found = {name: getattr(optimizer, name, None) for name in cls.NAMES}
        return {name: value for name, value in found.items() if type(value) is float and value}


@contextlib.contextmanager
def _borrowed(model, variables, values, hyperparameters):
    """Let the model's variables and hyperparameters stand for the arguments of a graph."""
    own = [v._value for v in variables]
    optimizers = _optimizers(model)
    indices = [o._trainable_variables_indices for o in optimizers]
    numbers = _Hyperparameter.of(model.optimizer)
    try:
        for variable, value in zip(variables, values, strict=True):
            variable._value = value
        for optimizer in optimizers:
            # An optimizer finds the slots of a variable by the identity of its tf.Variable.
            optimizer._trainable_variables_indices = {
                optimizer._var_key(v): i for i, v in enumerate(optimizer._trainable_variables)
            }
        for (name, number), tensor in zip(numbers.items(), hyperparameters, strict=True):
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
    """Turn TensorFlow's pages about a failed trace into one error."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(
            f"model {model.name!r} cannot be trained on these data: "
            f"{str(error.message).splitlines()[0]}"
        ) from None


class _Programs:
    """The compiled graphs of one model: an epoch of training, and an evaluation.

    A graph is made for a signature, which names all that is built into it; models with equal
    signatures share it. A model whose parts cannot be compared safely (an unregistered custom
    function, a subclassed model) has graphs of its own.
    """

    def __init__(self, model, jit_compile):
        self.model, self.jit_compile = model, jit_compile
        signature = _signature(model)
        with _lock:
            compiled = model._compile_loss  # a new object after each call of compile()
            before = _signatures.get(model)
            if before is not None and before[0] is compiled and before[1] != signature:
                raise ValueError(
                    "model was changed after compile() (for example layers were frozen or unfrozen); "
                    "Keras takes such a change into account only after the next compile(): call it"
                )
            _signatures[model] = (compiled, signature)
            if signature.shareable:
                self.cache = _shared_programs
            else:
                self.cache = _own_programs.setdefault(model, OrderedDict())
        self.signature = signature
        self.variables = _variables(model)
        self.hyperparameters = list(_Hyperparameter.of(model.optimizer).values())

    def train(self, data, order, batch_size):
        """Run one epoch; return the first step with a non-finite loss, if any, and the logs."""
        steps, rest = divmod(data.n, batch_size)
        full = order[: steps * batch_size].reshape(steps, batch_size)
        program = self._program("train", data, (batch_size, rest))
        first_bad, logs = program(
            [v.value for v in self.variables],
            [tf.constant(number, tf.float32) for number in self.hyperparameters],
            data.x,
            data.y,
            data.sample_weight,
            tf.constant(full),
            tf.constant(order[steps * batch_size :]),
        )
        first_bad = int(first_bad)
        return (None if first_bad < 0 else first_bad), _to_floats(logs)

    def evaluate(self, data):
        """Return loss and metrics over `data`."""
        steps, rest = divmod(data.n, EVALUATION_BATCH)
        rows = np.arange(data.n, dtype=np.int32)
        program = self._program("evaluate", data, (rest,))
        logs = program(
            [v.value for v in self.variables],
            [tf.constant(number, tf.float32) for number in self.hyperparameters],
            data.x,
            data.y,
            data.sample_weight,
            tf.constant(rows[: steps * EVALUATION_BATCH].reshape(steps, EVALUATION_BATCH)),
            tf.constant(rows[steps * EVALUATION_BATCH :]),
        )
        return _to_floats(logs)

    def _program(self, task, data, sizes):
        # XLA compiles for exact shapes; a plain graph serves any number of samples.
        specs = data.map(
            lambda array: tf.TensorSpec(
                array.shape if self.jit_compile else (None, *array.shape[1:]), array.dtype
            )
        )
        layout = json.dumps([str(leaf) for leaf in keras.tree.flatten(specs)])
        key = (self.signature, task, sizes, layout, data.n if self.jit_compile else None)
        key = (*key, self.jit_compile)
        with _lock:
            if key in self.cache:
                self.cache.move_to_end(key)
            else:
                self.cache[key] = self._trace(task, specs, data.n, sizes)
                while len(self.cache) > MAX_PROGRAMS:
                    self.cache.popitem(last=False)
            return self.cache[key]

    def _trace(self, task, specs, n, sizes):
        model, variables = self.model, self.variables
        rest = sizes[-1]
        size = sizes[0] if task == "train" else EVALUATION_BATCH

        def train(values, hyperparameters, x, y, sample_weight, full, last):
            arrays = _Arrays(x, y, sample_weight, n)

            def step(rows, i, first_bad):
                logs = model.train_step(arrays.map(lambda array: tf.gather(array, rows)))
                is_bad = (first_bad < 0) & ~tf.math.is_finite(logs["loss"])
                return tf.where(is_bad, i, first_bad)

            with _borrowed(model, variables, values, hyperparameters):
                steps = tf.shape(full)[0]
                i, first_bad = tf.while_loop(
                    lambda i, first_bad: (i < steps) & (first_bad < 0),
                    lambda i, first_bad: (i + 1, step(full[i], i, first_bad)),
                    (tf.constant(0), tf.constant(-1)),
                )
                if rest:
                    first_bad = step(last, i, first_bad)
                return first_bad, model.get_metrics_result()

        def evaluate(values, hyperparameters, x, y, sample_weight, full, last):
            arrays = _Arrays(x, y, sample_weight, n)

            def step(rows):
                model.test_step(arrays.map(lambda array: tf.gather(array, rows)))

            def body(i):
                step(full[i])
                return (i + 1,)

            with _borrowed(model, variables, values, hyperparameters):
                tf.while_loop(lambda i: i < tf.shape(full)[0], body, (tf.constant(0),))
                if rest:
                    step(last)
                return model.get_metrics_result()

        function = tf.function(
            train if task == "train" else evaluate, jit_compile=self.jit_compile, autograph=False
        )
        steps = n // size if self.jit_compile else None
        with _readable_errors(model):
            program = function.get_concrete_function(
                [v.value for v in variables],
                [tf.TensorSpec((), tf.float32)] * len(self.hyperparameters),
                *specs,
                tf.TensorSpec((steps, size), tf.int32),
                tf.TensorSpec((rest,), tf.int32),
            )
        if program.captured_inputs and self.signature.shareable:
            raise AssertionError(
                "a shared program must not hold on to variables of one model; please report this"
            )
        return program


def _to_floats(logs):
    return {
        name: float(value) if value.shape.rank == 0 else value.numpy()
        for name, value in logs.items()
    }


def _xla_pays(model, steps):
    """Whether compiling with XLA is worth its time.

    Random numbers and normalization statistics are slower under XLA on a CPU.
    """
    plain = all(v.trainable for v in model.variables)
    return plain and steps >= XLA_BREAK_EVEN_STEPS


# --- which models can share a program --------------------------------------------------------------

#: A traced epoch takes a few megabytes.
MAX_PROGRAMS = 64

_lock = threading.RLock()
_shared_programs: OrderedDict = OrderedDict()
_own_programs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_signatures: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Signature:
    """All that is built into a program, as comparable values."""

    description: str
    identities: tuple
    shareable: bool


def _signature(model) -> _Signature:
    try:
        parts = [
            keras.saving.serialize_keras_object(model.optimizer),
            {k: v for k, v in model.get_compile_config().items() if k != "optimizer"},
            model.output_names if len(model.outputs) > 1 else [],
        ]
        architecture = model.get_config()
        shareable = type(model).__module__.startswith("keras.")
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        parts, architecture, shareable = [], {}, False
    described = _Description(model)
    description = json.dumps(
        [
            type(model).__name__,
            described.of(architecture),
            described.of(parts),
            [[list(v.shape), str(v.dtype), bool(v.trainable)] for v in model.variables],
            [number > 0 for number in _Hyperparameter.of(model.optimizer).values()],
        ],
        sort_keys=True,
        default=repr,
    )
    return _Signature(description, tuple(described.identities), shareable and described.complete)


class _Description:
    """A configuration without what does not shape the graph: names, seeds, initial values.

    Custom classes and functions appear in a configuration by name only, and a name can stand for
    different code over time (a notebook cell that is edited and run again). They are compared by
    identity; where the object behind a name is not known, the description is not `complete`.
    """

    def __init__(self, model):
        self.lifted = _Hyperparameter.of(model.optimizer)
        self.types = {type(layer).__name__: type(layer) for layer in model._flatten_layers()}
        self.types[type(model.optimizer).__name__] = type(model.optimizer)
        self.names: dict[str, str] = {}
        self.identities: list = []
        self.complete = True

    def of(self, part, key=None):
        if isinstance(part, Mapping):
            self._note_custom_object(part)
            return {k: self.of(v, k) for k, v in part.items() if not self._is_irrelevant(k, v)}
        if isinstance(part, (list, tuple)):
            if key in ("input_layers", "output_layers", "keras_history"):
                return [self._position(item) for item in part]
            return [self.of(item) for item in part]
        if callable(part):
            self.identities.append(part)
            return "callable"
        return self._position(part) if key == "name" else part

    def _position(self, item):
        """Replace a layer's name by the order in which names appear."""
        if isinstance(item, (list, tuple)):
            return [self._position(i) for i in item]
        return self.names.setdefault(item, f"#{len(self.names)}") if isinstance(item, str) else item

    def _is_irrelevant(self, key, value):
        if key in ("seed", "learning_rate") and not isinstance(value, Mapping):
            return True
        return key in self.lifted or str(key).endswith("_initializer")

    def _note_custom_object(self, part):
        name = part.get("class_name")
        if name == "__lambda__" or (name == "function" and part.get("module") == "builtins"):
            known = keras.saving.get_registered_object(part.get("registered_name"))
        elif part.get("registered_name"):
            known = keras.saving.get_registered_object(part["registered_name"])
            known = known or self.types.get(name)
        else:
            return
        self.complete &= known is not None
        self.identities.append(known)
