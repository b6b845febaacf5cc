"""Transfer learning: reuse the lower layers of a trained network for another task.

A network for task A computes ``A(x) = head_A(f_n(... f_1(x)))``. Transfer keeps copies of
``f_1 ... f_n``, puts a new head on top and trains on task B: with the copies frozen, or fine-tuned,
at the same learning rate or at smaller ones. `reuse_layers` makes the new network, `freeze` sets
which layers learn, `LayerRates` gives layers learning rates of their own, `features` runs the
frozen part once and for all, `distance` says how far the weights have moved since.

Which layers transfer, and how well: J. Yosinski, J. Clune, Y. Bengio and H. Lipson, "How
transferable are features in deep neural networks?", NIPS 2014, arXiv:1411.1792.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
import functools
import math
import operator
from typing import Any, NamedTuple

from ch11lib.backend import keras
from ch11lib.datasets import Dataset
import numpy as np
import pandas as pd

__all__ = [
    "LayerRates",
    "Tasks",
    "distance",
    "features",
    "freeze",
    "reuse_layers",
    "split_tasks",
]

# ------------------------------------------------------------------------------------------- tasks


class Tasks(NamedTuple):
    """Two tasks made of one data set: `a` to learn first, `b` to transfer to."""

    a: Dataset
    b: Dataset


def split_tasks(
    data: Dataset,
    classes_b: Sequence[str | int] = ("T-shirt/top", "Pullover"),
    *,
    n: int | None = None,
    seed: int = 0,
) -> Tasks:
    """Split a data set by classes: task A gets all classes that task B does not.

    No image belongs to both tasks. Labels are numbered anew from 0, in the order of `classes_b` for
    B and in the old order for A.

    Parameters
    ----------
    data : Dataset
    classes_b : sequence of str or int
        Classes of task B, by name or by number.
    n : int, optional
        Number of training images of B, chosen by `Dataset.few_labels`; all of them by default.
        Validation and test images are all kept.
    seed : int
        For `Dataset.few_labels`.

    Returns
    -------
    Tasks
        The data sets ``a`` and ``b``, images as they are in `data`.

    Raises
    ------
    ValueError
        For a class that is unknown or named twice, or if no class is left for A.

    Examples
    --------
    >>> from ch11lib.datasets import load_fashion_mnist
    >>> a, b = split_tasks(load_fashion_mnist(), n=200)
    >>> a
    Dataset('fashion-mnist-12k without T-shirt/top, Pullover', train=6400, valid=1600, ...)
    >>> b
    Dataset('fashion-mnist-12k: T-shirt/top, Pullover', train=200, valid=400, test=400, ...)
    >>> b.class_names, np.bincount(b.y_train).tolist()
    (('T-shirt/top', 'Pullover'), [100, 100])
    """
    if isinstance(classes_b, (str, int)):
        raise TypeError(f"classes_b must be a list of classes, received {classes_b!r}")
    of_b = [_class_number(data, name) for name in classes_b]
    of_a = [number for number in range(len(data.class_names)) if number not in of_b]
    if not of_b or not of_a or len(set(of_b)) != len(of_b):
        raise ValueError(
            "classes_b must be distinct classes, at least one of them and not all that there are, "
            f"received {list(classes_b)}"
        )
    names = ", ".join(data.class_names[number] for number in of_b)
    a = _only(data, of_a, f"{data.name} without {names}")
    b = _only(data, of_b, f"{data.name}: {names}")
    return Tasks(a, b if n is None else b.few_labels(n, seed))


def _class_number(data, name):
    if isinstance(name, str) and name in data.class_names:
        return data.class_names.index(name)
    if not isinstance(name, (str, bool)) and name in range(len(data.class_names)):
        return int(name)
    raise ValueError(
        f"classes_b must hold names or numbers of {list(data.class_names)}, received {name!r}"
    )


def _only(data, classes, name):
    """Keep the images of some classes, and number these from 0."""
    number = np.full(len(data.class_names), -1, np.int32)
    number[classes] = np.arange(len(classes))
    arrays = {}
    for part in ("train", "valid", "test"):
        x, y = getattr(data, f"x_{part}"), number[getattr(data, f"y_{part}")]
        arrays |= {f"x_{part}": x[y >= 0], f"y_{part}": y[y >= 0]}
    return replace(
        data, **arrays, class_names=tuple(data.class_names[i] for i in classes), name=name
    )


# ------------------------------------------------------------------------------------ reused layers


def reuse_layers(
    model: keras.Model, n: int | str, head: Any, *, frozen: bool = False
) -> keras.Model:
    """Build a new model from copies of a model's lowest layers and a new head.

    Layers and weights are copied: nothing is shared with `model`, and training the new model does
    not change it. Copied weights include those that are not trained, such as the moving statistics
    of batch normalization. Optimizer, loss and metrics are not taken over: compile the new model.

    Parameters
    ----------
    model : keras.Model
        Sequential or functional, built. Models inside it count as one layer.
    n : int or str
        How many layers to keep, counted from the bottom in ``model.layers`` (what
        ``model.summary()`` lists). *Every* layer counts, also `Flatten`, `Activation`, `Dropout`,
        `BatchNormalization`; only input layers do not. Or the name of the topmost layer to keep;
        with branches, this keeps all that leads to it.
    head : int, layer or list of layers
        What to put on top. An int k stands for ``Dense(k, name="head")``, the logits of k classes.
        A layer that already has weights is copied too; an empty list leaves the features.
    frozen : bool
        Whether the copied layers are set to ``trainable = False`` (see `freeze`) or to True.

    Returns
    -------
    keras.Model
        Sequential if `model` is, else functional; not compiled.

    Raises
    ------
    TypeError
        If `model` is subclassed, so that it has no known order of layers, or an argument is of
        another type.
    ValueError
        If the model is not built, if it has fewer layers than n or no layer of that name, if the
        first n layers end in more than one branch, or if the head does not fit on top of them.

    Examples
    --------
    >>> layers = [keras.layers.Dense(8, "relu", name=f"hidden_{i}") for i in (1, 2, 3)]
    >>> a = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(5, name="output")])
    >>> b = reuse_layers(a, 2, [keras.layers.Dense(6, "relu", name="new"), keras.layers.Dense(1)])
    >>> [layer.name for layer in b.layers[:3]]
    ['hidden_1', 'hidden_2', 'new']
    >>> b.layers[1] is a.layers[1]
    False
    >>> bool((b.layers[1].get_weights()[0] == a.layers[1].get_weights()[0]).all())
    True
    """
    bottom = _bottom(model, n)
    added = _head_layers(head)
    if not bottom and not added:
        raise ValueError("n and head must leave a layer at least, received n=0 and an empty head")
    names = [layer.name for layer in [*bottom, *added]]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            "head must have layers with names of their own, different from those that are kept; "
            f"received {sorted(repeated)} twice"
        )
    if isinstance(model, keras.Sequential):
        new = _copied_sequential(model, bottom, added)
    else:
        new = _copied_functional(model, bottom, added)
    for layer in bottom:
        copy = new.get_layer(layer.name)
        _copy_weights(layer, copy)
        copy.trainable = not frozen
    return new


def freeze(model: keras.Model, n: int | str) -> None:
    """Freeze the lowest n layers of a model in place, and let all others learn.

    Compile the model afterwards. Keras reads the flags when it builds the training function, so
    without it `model.fit` silently goes on as before (and `ch11lib.training.fit` raises an error).
    After unfreezing, the optimizer must be a new one.

    A frozen `BatchNormalization` layer runs in inference mode: it normalizes with its moving
    statistics and leaves them alone, also inside ``model(x, training=True)``. So a frozen network
    computes the same function in training as afterwards, and unfreezing brings batch statistics
    back.

    Parameters
    ----------
    model : keras.Model
        As for `reuse_layers`.
    n : int or str
        Counted as in `reuse_layers`. 0 unfreezes everything, models inside it included.

    Raises
    ------
    TypeError, ValueError
        As for `reuse_layers`.

    Examples
    --------
    >>> layers = [keras.layers.Dense(2, name=name) for name in ("one", "two", "three")]
    >>> model = keras.Sequential([keras.Input((2,)), *layers])
    >>> freeze(model, 2)
    >>> [layer.trainable for layer in model.layers]
    [False, False, True]
    >>> freeze(model, "one")
    >>> [layer.trainable for layer in model.layers]
    [False, True, True]
    """
    bottom = {id(layer) for layer in _bottom(model, n)}
    model.trainable = True
    for layer in _layers(model):
        layer.trainable = id(layer) not in bottom


def features(model: keras.Model, n: int | str, x: Any, *, batch_size: int = 256) -> np.ndarray:
    """Return what the lowest n layers of a model make of x.

    Training a head on these features gives what training it on top of the frozen layers gives, but
    runs these layers once instead of once an epoch. That holds as long as they compute the same in
    every epoch: features come from inference mode, so dropout or augmentation among those layers
    is left out here, while in training a frozen dropout layer still drops.

    Parameters
    ----------
    model : keras.Model
        As for `reuse_layers`; it is left as it was.
    n : int or str
        As for `reuse_layers`, 1 at least.
    x : array
        Inputs; a list or dictionary of arrays if the model takes one.
    batch_size : int
        Examples at a time; it only matters for memory.

    Returns
    -------
    numpy.ndarray
        Shape (examples, ...).

    Examples
    --------
    >>> model = keras.Sequential(
    ...     [keras.Input((3,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(1)]
    ... )
    >>> features(model, 1, np.ones((5, 3))).shape
    (5, 4)
    """
    n_examples = len(keras.tree.flatten(x)[0])
    if not n_examples:
        raise ValueError("x must hold one example at least, received none")
    bottom = reuse_layers(model, n, [])  # called as it is: `predict` would compile it every time

    def batch(start):
        rows = slice(start, start + batch_size)
        return keras.tree.map_structure(lambda part: np.asarray(part)[rows], x)

    parts = [bottom(batch(i), training=False) for i in range(0, n_examples, batch_size)]
    return np.concatenate([keras.ops.convert_to_numpy(part) for part in parts])


def distance(model_a: keras.Model, model_b: keras.Model) -> pd.Series:
    """Say how far the weights of each layer in model_b are from those in model_a.

    ``||w_b - w_a|| / ||w_a||`` with Euclidean norms over all weights of a layer together: kernel,
    bias, and what is not trained, such as moving statistics.

    Parameters
    ----------
    model_a : keras.Model
        The reference, for example the network before fine-tuning.
    model_b : keras.Model
        A model with some layers of the same names and shapes.

    Returns
    -------
    pandas.Series
        Indexed by the names of those layers that both models have, in the order of `model_a`. A
        layer that went from zero to something is infinitely far away. Layers without weights are
        left out, models inside a model count as one layer.

    Raises
    ------
    ValueError
        If no layer is common to both, or if weights of the same layer differ in shape.

    Examples
    --------
    >>> a = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="hidden")])
    >>> b = reuse_layers(a, 1, 2)
    >>> b.get_layer("hidden").set_weights([1.5 * w for w in a.get_layer("hidden").get_weights()])
    >>> distance(a, b).round(6).to_dict()
    {'hidden': 0.5}
    """
    for name, model in (("model_a", model_a), ("model_b", model_b)):
        if not isinstance(model, keras.Model):
            raise TypeError(f"{name} must be a keras.Model, received {type(model).__name__}")
    others = {layer.name: layer.get_weights() for layer in model_b.layers}
    found = {}
    for layer in model_a.layers:
        ours, theirs = layer.get_weights(), others.get(layer.name)
        if theirs is None or not ours:
            continue
        shapes = [[weight.shape for weight in weights] for weights in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"layer {layer.name!r} must have weights of equal shapes in both models, "
                f"received {shapes[0]} and {shapes[1]}"
            )
        ours, theirs = (
            np.concatenate([w.ravel() for w in ws], dtype=np.float64) for ws in (ours, theirs)
        )
        moved, size = np.linalg.norm(theirs - ours), np.linalg.norm(ours)
        found[layer.name] = moved / size if size else (math.inf if moved else 0.0)
    if not found:
        raise ValueError(
            "model_a and model_b must have a layer with weights in common, by name; received "
            f"{[layer.name for layer in model_a.layers]} and {list(others)}"
        )
    return pd.Series(found, name="distance").rename_axis("layer")


# --- copying --------------------------------------------------------------------------------------


def _layers(model):
    """List what n counts: the layers of a model without its input layers."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, received {type(model).__name__}")
    if not isinstance(model, (keras.Sequential, keras.Function)):
        raise TypeError(
            "model must be Sequential or functional, so that the order of its layers is known; "
            f"received the subclassed model {model.name!r} ({type(model).__name__})"
        )
    if not model.built:
        raise ValueError(f"model {model.name!r} must be built: give it an Input, or call it once")
    return [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]


def _bottom(model, n):
    """Return the layers that n stands for."""
    layers = _layers(model)
    names = [layer.name for layer in layers]
    if isinstance(n, str):
        if n not in names:
            raise ValueError(f"n must be a layer of model {model.name!r}: {names}; received {n!r}")
        count = names.index(n) + 1
    else:
        count = _count("n", n, 0, len(layers), f" for the layers of model {model.name!r}: {names}")
    if isinstance(model, keras.Sequential) or not count:
        return layers[:count]
    below = {id(node.operation) for node in _nodes([_output(model, layers[count - 1])])}
    if isinstance(n, int) and (
        aside := [layer.name for layer in layers[:count] if id(layer) not in below]
    ):
        raise ValueError(
            f"n must end in one branch, but of the first {count} layers {aside} do not lead to "
            f"{names[count - 1]!r}; give the name of the topmost layer to keep instead"
        )
    return [layer for layer in layers if id(layer) in below]


def _nodes(tensors):
    """List all calls of layers and operations that lead to symbolic tensors, in any order."""
    found, waiting = {}, list(tensors)
    while waiting:
        operation, index, _ = waiting.pop()._keras_history
        node = operation._inbound_nodes[index]
        if id(node) not in found:
            found[id(node)] = node
            waiting += node.input_tensors
    return list(found.values())


def _output(model, layer):
    """Return the symbolic output of a layer inside a functional model."""
    outputs = [
        tensor
        for node in _nodes(model.outputs)
        if node.operation is layer
        for tensor in node.output_tensors
    ]
    if len(outputs) != 1:
        raise ValueError(
            f"n must end at a layer with one output, but {layer.name!r} has {len(outputs)} in "
            f"model {model.name!r}, because it is called more than once or returns several tensors"
        )
    return outputs[0]


def _head_layers(head):
    if isinstance(head, keras.Layer):
        head = [head]
    elif not isinstance(head, (list, tuple)):
        try:
            classes = _count("head", head, 1, math.inf)
        except TypeError:
            raise TypeError(
                f"head must be a number of classes, a layer or a list of layers, received {head!r}"
            ) from None
        head = [keras.layers.Dense(classes, name="head")]
    for layer in head:
        if not isinstance(layer, keras.Layer) or isinstance(layer, keras.layers.InputLayer):
            raise TypeError(f"head must consist of layers, received {layer!r}")
    return [_copied(layer) if layer.built and layer.weights else layer for layer in head]


def _new(operation):
    return operation.__class__.from_config(operation.get_config())


def _copied(layer):
    """Copy a layer that is not part of the model, with its weights."""
    copy = _new(layer)
    if not copy.built:
        copy.build_from_config(layer.get_build_config())
    _copy_weights(layer, copy)
    return copy


def _copy_weights(layer, copy):
    """Copy all state the way a file would: some layers compute things from it when it is loaded."""
    for old, new in zip(layer._flatten_layers(), copy._flatten_layers(), strict=True):
        store = {}
        old.save_own_variables(store)
        new.load_own_variables(store)


def _copied_sequential(model, bottom, added):
    [tensor] = model.inputs
    inputs = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)
    copies = [_new(layer) for layer in bottom]
    try:
        return keras.Sequential([inputs, *copies, *added])
    except ValueError as error:
        shape = bottom[-1].output.shape if bottom else tensor.shape
        raise _does_not_fit(error, shape) from None


def _copied_functional(model, bottom, added):
    if bottom:
        end = _output(model, bottom[-1])
        nodes = {id(node.operation) for node in _nodes([end])}
        needed = [t for t in model.inputs if id(t._keras_history.operation) in nodes]
        if len(needed) == len(model.inputs):
            inputs = model.input  # in the structure that the model takes
        else:
            inputs = needed[0] if len(needed) == 1 else needed
        trunk = keras.models.clone_model(keras.Model(inputs, end), clone_function=_new)
        inputs, outputs = trunk.input, trunk.output
    else:
        if len(model.inputs) != 1:
            raise ValueError(
                f"n must be at least 1 for a model with {len(model.inputs)} inputs, received 0"
            )
        [tensor] = model.inputs
        inputs = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)
        outputs = inputs
    shape = outputs.shape
    try:
        for layer in added:
            outputs = layer(outputs)
    except ValueError as error:
        raise _does_not_fit(error, shape) from None
    return keras.Model(inputs, outputs)


def _does_not_fit(error, shape):
    return ValueError(
        f"head must fit on top of the layers that are kept, whose output has shape {shape}: {error}"
    )


def _count(name, value, low, high, what=""):
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer{what}, received {value!r}") from None
    if not low <= count <= high:
        raise ValueError(f"{name} must lie in {low}..{high}{what}, received {count}")
    return count


# ---------------------------------------------------------------------------------- learning rates


#: Attributes of optimizers that hold a weight decay.
_DECAYS = ("weight_decay", "adam_weight_decay")


@functools.cache
def _with_factors(kind):
    """Derive an optimizer class that multiplies its learning rate by a factor of each variable."""

    class WithFactors(kind):
        # Keras's optimizers are described by their configuration; others need not be.
        programs_can_be_shared = kind.__module__.startswith("keras.")

        def build(self, variables, factors):
            super().build(variables)
            # A variable, so that compiled programs take the factors as an argument.
            self.factors = self.add_variable(
                (len(factors),),
                lambda shape, dtype: keras.ops.array(factors, dtype),
                name="factors",
            )

        def _factor(self, variable):
            return self.factors[self._get_variable_index(variable)]

        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate * self._factor(variable))

        def _apply_weight_decay(self, variables):
            # One variable at a time; the decay is a rate times a number, so scale the number.
            numbers = {name: getattr(self, name, None) for name in _DECAYS}
            numbers = {name: number for name, number in numbers.items() if number is not None}
            try:
                for variable in variables:
                    for name, number in numbers.items():
                        setattr(self, name, number * self._factor(variable))
                    super()._apply_weight_decay([variable])
            finally:
                for name, number in numbers.items():
                    setattr(self, name, number)

        def without_factors(self):
            return kind.from_config(self.get_config())

    return WithFactors


@keras.saving.register_keras_serializable(package="ch11lib")
class LayerRates(keras.optimizers.Optimizer):
    """Any Keras optimizer with learning rates that differ between layers.

    A layer with rate factor r is trained as by an optimizer of its own with learning rate r times
    that of `optimizer`; all other settings are common. The factor multiplies the learning rate of
    each update, weight decay included, and not the gradient: Adam, RMSprop and their relatives
    divide by the gradient's size, so that a factor on the gradient would cancel.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Its configuration is copied; the object itself is not used. Schedules, clipping (over all
        layers, where it is global), averaging and accumulation work as ever.
    rates : mapping of str to float
        Name of a layer to its factor, 0 or more. Layers that are not named have factor 1. The name
        of a model inside the model stands for all layers in it, unless they are named as well.
    name : str, optional

    Raises
    ------
    TypeError, ValueError
        For an argument of another kind or a negative factor; when training starts, for a name that
        belongs to no layer with weights to train. So a frozen layer must not be named.

    Notes
    -----
    Rates that fall from the top layer to the bottom are called discriminative: J. Howard and
    S. Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018,
    arXiv:1801.06146. `keras.optimizers.MultiOptimizer` can do the same with one optimizer for each
    rate, but clips each group of layers by itself, has no common learning rate for schedules and
    callbacks to set, and `ch11lib.training.fit` has to leave it to `model.fit`.

    Optimizers that keep a copy of the weights (``use_ema``) or of the rate see the scaled updates.

    Examples
    --------
    >>> model = keras.Sequential(
    ...     [keras.Input((2,)), keras.layers.Dense(3, name="low"), keras.layers.Dense(1)]
    ... )
    >>> before = model.get_layer("low").get_weights()[0]
    >>> model.compile(LayerRates(keras.optimizers.Adam(0.01), {"low": 0.1}), "mse")
    >>> _ = model.fit(np.ones((1, 2)), np.ones((1, 1)), verbose=0)
    >>> step = abs(model.get_layer("low").get_weights()[0] - before).max()
    >>> round(float(step), 4)  # Adam's first step is as long as its rate
    0.001
    """

    #: The configuration says all that is built into a graph, see `ch11lib.training`.
    programs_can_be_shared = True

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        rates: Mapping[str, float],
        name: str | None = None,
    ):
        super().__init__(learning_rate=0.0, name=name)
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise TypeError(
                f"optimizer must be a Keras optimizer, received {type(optimizer).__name__}"
            )
        kinds = (LayerRates, keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer)
        if isinstance(optimizer, kinds):
            raise TypeError(
                "optimizer must update weights itself, received the wrapper "
                f"{type(optimizer).__name__}"
            )
        if not isinstance(rates, Mapping):
            raise TypeError(f"rates must map names of layers to factors, received {rates!r}")
        for layer, factor in rates.items():
            if isinstance(factor, bool) or not 0 <= factor < math.inf:
                raise ValueError(
                    f"rates[{layer!r}] must be a finite factor, 0 or more, received {factor!r}"
                )
        self.rates = {layer: float(factor) for layer, factor in rates.items()}
        self.inner_optimizer = _with_factors(type(optimizer)).from_config(optimizer.get_config())  # type: ignore[arg-type]

    def build(self, variables):
        """Find the factor of each variable, and create the optimizer's own variables."""
        if self.built:
            return
        parts = [variable.path.split("/")[:-1] for variable in variables]
        unknown = set(self.rates).difference(*parts)
        if unknown:
            known = dict.fromkeys(part[-1] for part in parts if part)
            raise ValueError(
                f"rates must name layers with weights to train, such as {list(known)}; "
                f"received {sorted(unknown)}"
            )
        # The innermost layer decides, then the model around it.
        factors = [
            next((self.rates[name] for name in reversed(part) if name in self.rates), 1.0)
            for part in parts
        ]
        self.inner_optimizer.build(variables, factors)
        self.built = True

    def apply(self, grads, trainable_variables=None):
        """Update the variables."""
        if not self.built and trainable_variables is not None:
            self.build(list(trainable_variables))
        self.inner_optimizer.apply(grads, trainable_variables)

    @property
    def variables(self):
        """Variables of the optimizer inside."""
        return self.inner_optimizer.variables

    @property
    def learning_rate(self):
        """The rate of a layer with factor 1."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self):
        """Number of updates so far."""
        return self.inner_optimizer.iterations

    def scale_loss(self, loss):
        """Scale the loss as the optimizer inside does."""
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        """Do what the optimizer inside does at the end of training."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self):
        """Return the arguments that rebuild the optimizer."""
        inner = keras.saving.serialize_keras_object(self.inner_optimizer.without_factors())
        return {"optimizer": inner, "rates": dict(self.rates), "name": self.name}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Rebuild the optimizer from `get_config`."""
        inner = keras.saving.deserialize_keras_object(config["optimizer"], custom_objects)
        return cls(**{**config, "optimizer": inner})
