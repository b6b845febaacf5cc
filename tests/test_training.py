"""The compiled epoch against `model.fit`: same numbers, same callbacks, same errors or clearer.

Everything numerical is compared with Keras's own `model.fit`, which gets the same batches through a
`tf.data.Dataset`. On the CPUs that we tried the two agree bit for bit; `RTOL` leaves room for other
hardware, where a compiler may order additions differently.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
import gc
import json
import os
import random
import signal
import threading
import time
import weakref

from ch11lib import training
from ch11lib.backend import keras, tf, trim_memory
from ch11lib.training import DivergenceError, batch_order, describe, evaluate, fingerprint, fit
import numpy as np
import pandas as pd
import psutil
import pytest

# Keras 3.15 converts variables in a way that NumPy 2.4 announces to change.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RTOL, ATOL = 1e-4, 1e-6

layers, optimizers, losses = keras.layers, keras.optimizers, keras.losses
Dense = layers.Dense

rng = np.random.default_rng(0)
N, BATCH, STEPS = 26, 8, 4  # three full batches and one of two samples
X = rng.normal(size=(N, 6)).astype("float32")
Y = (X[:, :3] + rng.normal(0, 0.5, (N, 3))).argmax(1).astype("int32")
X_VALID = rng.normal(size=(13, 6)).astype("float32")
Y_VALID = X_VALID[:, :3].argmax(1).astype("int32")
WEIGHT = rng.uniform(0.2, 2, N).astype("float32")


@pytest.fixture
def programs():
    """The shared programs, none at first."""
    training.clear_programs()
    return training._shared_programs


def seeded(make, seed=1):
    """Call `make` with the two generators seeded from which Keras draws its seeds.

    `keras.utils.set_random_seed` does more than that: TensorFlow then prepares all its graphs anew.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    return make()


def network(*hidden, optimizer="sgd", loss=None, metrics=("accuracy",), **options):
    """A classifier of the data above.

    Without `hidden` layers there is one, and the same initial weights each time.
    """
    if not hidden:
        random.seed(1)
        hidden = [Dense(8, "tanh")]
    model = keras.Sequential([keras.Input((6,)), *hidden, Dense(3)])
    loss = loss or losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = optimizer() if callable(optimizer) else optimizer
    model.compile(optimizer, loss=loss, metrics=list(metrics), **options)
    return model


def model_fit(model, x=X, y=Y, *, epochs=3, batch_size=BATCH, seed=0, shuffle=True, **options):
    """Train with `model.fit` on the batches that `fit` should use."""
    options.pop("verbose", None)
    sample_weight = options.pop("sample_weight", None)
    if "class_weight" in options:
        class_weight = options.pop("class_weight")
        sample_weight = np.array([class_weight.get(int(label), 1) for label in y], "float32")
    data = (x, y) if sample_weight is None else (x, y, sample_weight)
    n = len(keras.tree.flatten(x)[0])
    first = options.get("initial_epoch", 0)

    def batches():
        for epoch in range(first, epochs):
            order = batch_order(n, seed, epoch) if shuffle else np.arange(n)
            for i in range(0, n, batch_size):
                rows = order[i : i + batch_size]
                yield keras.tree.map_structure(lambda array, rows=rows: array[rows], data)

    signature = keras.tree.map_structure(
        lambda array: tf.TensorSpec((None, *array.shape[1:]), array.dtype), data
    )
    return model.fit(
        tf.data.Dataset.from_generator(batches, output_signature=signature),
        epochs=epochs,
        steps_per_epoch=-(-n // batch_size),
        validation_batch_size=batch_size,
        shuffle=False,
        verbose=0,
        **options,
    )


def assert_same_state(a, b):
    for name in ("variables", "optimizer.variables"):
        ours, theirs = (eval(f"model.{name}", {"model": model}) for model in (a, b))
        assert len(ours) == len(theirs)
        for u, v in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(u.numpy(), v.numpy(), RTOL, ATOL, err_msg=v.path)


def assert_same_history(ours, theirs):
    assert ours.epoch == theirs.epoch
    assert list(ours.history) == list(theirs.history)
    for name, values in theirs.history.items():
        np.testing.assert_allclose(ours.history[name], values, RTOL, ATOL, err_msg=name)


def assert_same_training(
    make, x=X, y=Y, *, engine="graph", epochs=2, eager=True, reference=None, **options
):
    """Train two equal models, with `fit` and with `model.fit`, and compare all that they hold.

    `model.fit` runs eagerly where that makes no difference: it saves compiling.
    """
    ours, theirs = seeded(make), seeded(make)
    for model in (ours, theirs):
        if not model.built:
            model(keras.tree.map_structure(lambda array: array[:2], x))
        # ScheduleFreeAdamW starts its slots from the weights, and would do so inside model.fit's
        # graph, after the first step.
        model.optimizer.build(model.trainable_variables)
    theirs.run_eagerly = eager
    options.setdefault("batch_size", BATCH)
    history = fit(ours, x, y, epochs=epochs, seed=0, **options)
    expected = model_fit(theirs, x, y, epochs=epochs, **(reference or options))
    assert history.engine == engine
    assert_same_history(history, expected)
    assert_same_state(ours, theirs)
    return history


# ------------------------------------------------------------------------- same numbers

SCHEDULE = partial(optimizers.schedules.ExponentialDecay, 0.1, decay_steps=3, decay_rate=0.7)
OPTIMIZERS = {
    "sgd": lambda: optimizers.SGD(0.1),
    "momentum": lambda: optimizers.SGD(0.1, momentum=0.9),
    "nesterov": lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "weight decay": lambda: optimizers.SGD(0.1, weight_decay=0.03),
    "clipnorm": lambda: optimizers.SGD(0.1, momentum=0.8, clipnorm=0.3),
    "clipvalue": lambda: optimizers.SGD(0.1, clipvalue=0.03),
    "global clipnorm": lambda: optimizers.Adam(0.01, global_clipnorm=0.3),
    "integer clipnorm": lambda: optimizers.SGD(1.0, clipnorm=1),
    "schedule": lambda: optimizers.SGD(SCHEDULE(), momentum=0.9),
    "callable rate": lambda: optimizers.SGD(lambda: 0.05),
    "moving average": lambda: optimizers.SGD(0.1, use_ema=True, ema_momentum=0.8),
    "overwriting average": lambda: optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=4),
    "accumulation": lambda: optimizers.SGD(0.1, gradient_accumulation_steps=3),
    "adam": lambda: optimizers.Adam(0.01),
    "amsgrad": lambda: optimizers.Adam(0.01, amsgrad=True, beta_2=0.9),
    "adamw": lambda: optimizers.AdamW(0.01, weight_decay=0.1),
    "adamax": lambda: optimizers.Adamax(0.01),
    "nadam": lambda: optimizers.Nadam(0.01),
    "rmsprop": lambda: optimizers.RMSprop(0.01, momentum=0.9, centered=True),
    "adagrad": lambda: optimizers.Adagrad(0.1),
    "adadelta": lambda: optimizers.Adadelta(1.0),
    "ftrl": lambda: optimizers.Ftrl(0.1, l1_regularization_strength=0.01),
    "lion": lambda: optimizers.Lion(0.003),
    "lamb": lambda: optimizers.Lamb(0.01),
    "adafactor": lambda: optimizers.Adafactor(0.01),
    "muon": lambda: optimizers.Muon(0.01),
    "schedule-free": lambda: optimizers.ScheduleFreeAdamW(0.01),
    "loss scale": lambda: optimizers.LossScaleOptimizer(
        optimizers.SGD(0.1, momentum=0.9), dynamic_growth_steps=5
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_numbers_with_every_optimizer(name):
    assert_same_training(lambda: network(layers.Identity(), optimizer=OPTIMIZERS[name]))


def excluding(**what):
    optimizer = optimizers.AdamW(0.01, weight_decay=0.3)
    optimizer.exclude_from_weight_decay(**what)
    return optimizer


def test_same_numbers_when_biases_do_not_decay():
    assert_same_training(lambda: network(optimizer=lambda: excluding(var_names=["bias"])))
    # The exclusion is no part of the optimizer's configuration, so that it must not be shared.
    assert_same_training(
        lambda: network(optimizer=lambda: optimizers.AdamW(0.01, weight_decay=0.3))
    )


class OwnOptimizer(optimizers.SGD):
    """Does with its momentum what Keras's own does not, and finds slots by the variable."""

    def build(self, variables):
        super().build(variables)
        self.factor = {self._var_key(v): i + 1.0 for i, v in enumerate(variables)}

    def update_step(self, gradient, variable, learning_rate):
        factor = self.factor[self._var_key(variable)] ** (1 + self.momentum**2)
        variable.assign_sub(learning_rate * gradient / factor)


def test_same_numbers_with_a_custom_optimizer():
    assert_same_training(lambda: network(optimizer=lambda: OwnOptimizer(0.1, momentum=0.5)))


def conv():
    return [layers.Reshape((6, 1)), layers.Conv1D(4, 3, activation="relu"), layers.Flatten()]


class Noisy(layers.Layer):
    """A custom layer with a loss, a metric and its own randomness."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seed_generator = keras.random.SeedGenerator(3)
        self.mean = keras.metrics.Mean(name="level")

    def call(self, x, training=False):
        self.add_loss(0.1 * keras.ops.mean(x**2))
        self.mean.update_state(keras.ops.mean(x))
        if training:
            x += keras.random.normal(keras.ops.shape(x), stddev=0.1, seed=self.seed_generator)
        return x


class Unseeded(layers.Layer):
    """Draws from Keras's global generator, which no model owns."""

    def call(self, x, training=False):
        return x + keras.random.normal(keras.ops.shape(x)) if training else x


def frozen():
    model = network(Dense(8, "tanh"), layers.BatchNormalization(), Dense(5))
    model.layers[0].trainable = model.layers[1].trainable = False
    model.compile("adam", losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


NETS = {
    "deep": lambda: network(*(Dense(5, "relu") for _ in range(4)), optimizer="adam"),
    "batch norm": lambda: network(Dense(8), layers.BatchNormalization(momentum=0.7)),
    "frozen batch norm": frozen,
    "dropout": lambda: network(Dense(16, "relu"), layers.Dropout(0.3), layers.GaussianNoise(0.1)),
    "l2": lambda: network(
        Dense(8, kernel_regularizer="l2", bias_regularizer=keras.regularizers.L1())
    ),
    "activity": lambda: network(Dense(8, "relu", activity_regularizer=keras.regularizers.L2(0.1))),
    "constraint": lambda: network(Dense(8, kernel_constraint=keras.constraints.MaxNorm(0.5))),
    "convolution": lambda: network(*conv(), optimizer="adam"),
    "recurrent": lambda: network(layers.Reshape((6, 1)), layers.LSTM(4)),
    "own layer": lambda: network(Dense(8, "relu"), Noisy()),
    "lambda layer": lambda: network(
        layers.Lambda(lambda x: 2 * x), Dense(4, activation=lambda z: z * z)
    ),
    "bfloat16": lambda: network(Dense(8, "relu", dtype="mixed_bfloat16")),
    "pure bfloat16": lambda: network(
        Dense(8, dtype="bfloat16"),
        optimizer=lambda: optimizers.SGD(0.1, momentum=0.9, clipnorm=0.5),
    ),
    "float64": lambda: network(
        Dense(8, dtype="float64"), optimizer=lambda: optimizers.SGD(0.1, momentum=0.9)
    ),
    "nested": lambda: network(keras.Sequential([Dense(6, "relu"), layers.LayerNormalization()])),
    "no trainable bias": lambda: network(Dense(8, use_bias=False), layers.PReLU()),
}


@pytest.mark.parametrize("name", NETS)
def test_same_numbers_with_every_kind_of_layer(name):
    assert_same_training(NETS[name])


def test_same_numbers_as_the_graph_of_model_fit():
    def make():
        norm = layers.BatchNormalization()
        return network(Dense(8), norm, layers.Dropout(0.2), Noisy(), optimizer="adam")

    history = assert_same_training(make, eager=False, validation_data=(X_VALID, Y_VALID))
    assert np.ptp(history.history["val_loss"]) > 0


def test_random_layers_without_a_seed_follow_the_global_seed():
    def run():
        keras.utils.set_random_seed(3)
        keras.utils.clear_session()  # forget the global generator
        return fit(network(Unseeded()), X, Y, epochs=2, seed=0).history["loss"]

    assert run() == run()


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = Dense(6, "relu"), Dense(3)
        self.drop = layers.Dropout(0.2)

    def call(self, x, training=False):
        return self.out(self.drop(self.hidden(x), training=training))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + 0.1 * keras.ops.mean(y_pred**2)


def subclassed():
    model = Subclassed()
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizers.SGD(0.1, momentum=0.9), loss=loss, metrics=["accuracy"])
    return model


def test_same_numbers_with_a_subclassed_model():
    assert_same_training(subclassed, validation_data=(X_VALID, Y_VALID))
    unbuilt = subclassed()
    fit(unbuilt, X, Y, epochs=1)
    assert unbuilt.built


def two_in_two_out(names=("a", "b"), **compile_options):
    a, b = (keras.Input((6,), name=name) for name in names)
    both = layers.concatenate([Dense(4, "relu")(a), 0.1 * Dense(4, "tanh")(b)])
    outputs = [Dense(3, name="label")(both), Dense(1, name="value")(both)]
    model = keras.Model([a, b], outputs)
    options = {
        "loss": [losses.SparseCategoricalCrossentropy(from_logits=True), "mse"],
        "loss_weights": [1.0, 0.3],
        "metrics": [["accuracy"], ["mae"]],
    }
    model.compile(optimizers.Adam(0.01), **options | compile_options)
    return model


TWO_X, TWO_Y = (X, X[::-1].copy()), (Y, X[:, 3].copy())


def test_same_numbers_with_two_inputs_and_outputs():
    weights = (WEIGHT, WEIGHT[::-1].copy())
    # Outside of a graph Keras knows the size of each batch, and weights by it.
    assert_same_training(two_in_two_out, TWO_X, TWO_Y, eager=False)
    assert_same_training(two_in_two_out, TWO_X, TWO_Y, batch_size=13, sample_weight=weights)


def test_same_numbers_with_dictionaries():
    def make():
        a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
        both = layers.concatenate([Dense(4, "relu")(a), Dense(4, "tanh")(b)])
        model = keras.Model({"a": a, "b": b}, {"label": Dense(3)(both), "value": Dense(1)(both)})
        label_loss = losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(
            "adam",
            loss={"value": "mae", "label": label_loss},
            loss_weights={"value": 2.0, "label": 1.0},
            metrics={"label": "accuracy"},
        )
        return model

    x, y = dict(zip("ab", TWO_X, strict=True)), dict(zip(["label", "value"], TWO_Y, strict=True))
    assert_same_training(make, x, y, batch_size=13, validation_data=(x, y))


def test_the_names_of_inputs_count_where_a_dictionary_is_given():
    x = dict(zip("ab", TWO_X, strict=True))
    options = {"batch_size": 13, "epochs": 1}
    assert_same_training(lambda: two_in_two_out(("a", "b")), x, TWO_Y, **options)
    assert_same_training(lambda: two_in_two_out(("b", "a")), x, TWO_Y, **options)
    # A list is matched by position: the same architecture, but not the same call.
    assert_same_training(lambda: two_in_two_out(("b", "a")), TWO_X, TWO_Y, **options)


def test_losses_without_targets():
    class Endpoint(layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.mean((x - 1) ** 2))
            return x

    def make():
        model = keras.Sequential([keras.Input((6,)), Dense(2), Dense(2), Endpoint()])
        model.compile("sgd")
        return model

    ours, theirs = seeded(make), seeded(make)
    history = fit(ours, X, epochs=2, batch_size=N, shuffle=False)
    assert_same_history(history, theirs.fit(X, epochs=2, batch_size=N, shuffle=False, verbose=0))
    ours.layers[0].trainable = False
    ours.compile("sgd")
    assert fit(ours, X, epochs=1).engine == "graph"


def test_recompiling_with_the_same_optimizer_builds_the_new_loss():
    model = two_in_two_out()
    fit(model, TWO_X, TWO_Y, epochs=1)
    model.compile(model.optimizer, loss=["mae", "mse"], metrics=[])
    y = (X[:, :3], X[:, 3])
    history = fit(model, TWO_X, y, epochs=1).history
    assert list(history) == ["label_loss", "loss", "value_loss"]


# ------------------------------------------------------------------------- data


class Confidence(keras.metrics.Metric):
    """A custom metric, weighted by the samples."""

    def __init__(self, name="confidence", power=1.0):
        super().__init__(name=name)
        self.power = power
        self.total = self.add_weight(name="total", initializer="zeros")
        self.count = self.add_weight(name="count", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        values = keras.ops.max(keras.ops.softmax(y_pred), axis=-1) ** self.power
        weights = keras.ops.ones_like(values) if sample_weight is None else sample_weight
        self.total.assign_add(keras.ops.sum(values * weights))
        self.count.assign_add(keras.ops.sum(weights))

    def result(self):
        return self.total / self.count


THREE = (X_VALID, Y_VALID, np.linspace(0, 2, len(X_VALID), dtype="float32"))
OPTIONS = {
    "sample_weight": {"sample_weight": WEIGHT},
    "class_weight": {"class_weight": {0: 2.0, 2: 0.1}},
    "validation": {"validation_data": (X_VALID, Y_VALID)},
    "weighted validation": {"validation_data": THREE},
    "every second epoch": {"validation_data": (X_VALID, Y_VALID), "validation_freq": 2},
    "some epochs": {"validation_data": (X_VALID, Y_VALID), "validation_freq": [1, 4]},
    "in order": {"shuffle": False},
    "one batch": {"batch_size": 64},
    "whole batches": {"batch_size": 25},
    "single samples": {"batch_size": 1},
    "later epochs": {"initial_epoch": 2},
    "no epochs": {"initial_epoch": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_same_numbers_with_every_option(name):
    def make():
        weighted = [keras.metrics.SparseCategoricalAccuracy(name="weighted")]
        return network(weighted_metrics=weighted)

    assert_same_training(make, epochs=4, **OPTIONS[name])


def test_same_numbers_with_custom_metrics():
    def make():
        loss = losses.CategoricalCrossentropy(from_logits=True)
        metrics = [Confidence("squared", 2.0), "mae"]
        return network(loss=loss, metrics=metrics, weighted_metrics=[Confidence()])

    y = np.eye(3, dtype="float32")
    options = {"validation_data": (X_VALID, y[Y_VALID], THREE[2]), "sample_weight": WEIGHT}
    assert_same_training(make, X, y[Y], **options)


def test_validation_split_is_the_end_and_not_weighted_by_class():
    for options in ({"class_weight": {0: 5.0}}, {"sample_weight": WEIGHT}):
        ours, theirs = (network(weighted_metrics=["accuracy"], metrics=()) for _ in range(2))
        common = {
            "epochs": 2,
            "batch_size": N,
            "shuffle": False,
            "validation_split": 0.31,
            **options,
        }
        history = fit(ours, X, Y, **common)
        assert_same_history(history, theirs.fit(X, Y, verbose=0, **common))


def test_metrics_that_are_more_than_a_mean():
    def make():
        model = keras.Sequential([keras.Input((6,)), Dense(1, "sigmoid")])
        metrics = [keras.metrics.AUC(name="auc"), keras.metrics.F1Score(name="f1", threshold=0.5)]
        model.compile("adam", "binary_crossentropy", metrics=metrics)
        return model

    y = (Y > 0).astype("float32")[:, None]
    history = assert_same_training(make, X, y, validation_data=(X, y), verbose=1)
    assert history.history["f1"][0].shape == (1,)


@pytest.mark.parametrize(
    "loss",
    [
        losses.MeanSquaredError(reduction="sum"),
        losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        losses.Dice(),
    ],
    ids=lambda loss: f"{loss.name}-{loss.reduction}",
)
def test_validation_losses_that_depend_on_the_batches(loss):
    y = np.eye(3, dtype="float32")
    valid = (X_VALID, y[Y_VALID], THREE[2])
    assert_same_training(lambda: network(loss=loss), X, y[Y], epochs=1, validation_data=valid)


def test_evaluate_gives_the_numbers_of_model_evaluate():
    model = network(metrics=["accuracy", Confidence()])
    for weight in (None, WEIGHT):
        expected = model.evaluate(X, Y, sample_weight=weight, verbose=0, return_dict=True)
        found = evaluate(model, X, Y, sample_weight=weight)
        assert found == pytest.approx(expected, rel=RTOL)
    stream = tf.data.Dataset.from_tensor_slices((X, Y)).batch(32)
    assert evaluate(model, stream)["loss"] == pytest.approx(evaluate(model, X, Y)["loss"], rel=RTOL)
    assert model.optimizer.iterations.numpy() == 0


DATA = {
    "float64": lambda: (X.astype("float64"), Y.astype("int64")),
    "float64 tensors": lambda: (tf.constant(X, tf.float64), tf.constant(Y)),
    "variables": lambda: (tf.Variable(X), tf.Variable(Y)),
    "pandas": lambda: (pd.DataFrame(X), pd.Series(Y)),
    "column": lambda: (X, Y[:, None]),
    "fortran": lambda: (np.asfortranarray(X), Y.astype("float32")),
    "uint8": lambda: (X, Y.astype("uint8")),
    "read-only": lambda: (np.broadcast_to(X, X.shape), Y),
}


@pytest.mark.parametrize("name", DATA)
def test_kinds_of_arrays(name):
    expected = fit(network(), X, Y, epochs=2, seed=0).history
    history = fit(network(), *DATA[name](), epochs=2, seed=0)
    assert history.engine == "graph"
    assert history.history["loss"] == pytest.approx(expected["loss"], rel=RTOL)


def test_integer_images():
    images = (rng.uniform(size=(N, 6)) * 255).astype("uint8")
    assert_same_training(lambda: network(layers.Rescaling(1 / 255), Dense(4)), images)


def test_x_as_a_pandas_series():
    def make():
        model = keras.Sequential([keras.Input((1,)), Dense(1)])
        model.compile("sgd", "mse")
        return model

    x = pd.Series(X[:, 0])
    ours, theirs = seeded(make), seeded(make)
    history = fit(ours, x, 2 * x, epochs=2, batch_size=N, shuffle=False)
    assert_same_history(
        history, theirs.fit(x, 2 * x, epochs=2, batch_size=N, shuffle=False, verbose=0)
    )


# ------------------------------------------------------------------------- orders and seeds


def test_batch_order():
    orders = [batch_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert order.dtype == "int32"
        assert sorted(order) == list(range(100))
    assert len({tuple(order) for order in orders}) == 4
    np.testing.assert_array_equal(orders[3], batch_order(100, 1, 1))


def test_the_seed_fixes_the_order():
    def losses_of(seed):
        return fit(network(), X, Y, epochs=2, seed=seed).history["loss"]

    assert losses_of(1) == losses_of(1) != losses_of(2)


def test_without_a_seed_the_order_follows_the_global_seed():
    def losses_of(seed):
        model = network()
        return seeded(lambda: fit(model, X, Y, epochs=2), seed).history["loss"]

    assert losses_of(1) == losses_of(1) != losses_of(2)


def test_dropout_follows_its_seed(programs):
    def losses_of(seed):
        model = seeded(lambda: network(layers.Dropout(0.5, seed=seed)))
        return fit(model, X, Y, epochs=2, seed=0).history["loss"]

    assert losses_of(1) == losses_of(1) != losses_of(2)
    assert len(programs) == 1


def test_training_goes_on_where_it_stopped():
    once, twice = (network(optimizer=lambda: optimizers.SGD(SCHEDULE())) for _ in range(2))
    fit(once, X, Y, epochs=4, seed=0)
    fit(twice, X, Y, epochs=2, seed=0)
    fit(twice, X, Y, epochs=4, initial_epoch=2, seed=0)
    assert_same_state(once, twice)


def test_model_fit_can_go_on_afterwards():
    ours, theirs = network(optimizer="adam"), network(optimizer="adam")
    fit(ours, X, Y, epochs=2, seed=0, batch_size=BATCH)
    model_fit(theirs, epochs=2)
    for model in (ours, theirs):
        model.fit(X, Y, epochs=1, shuffle=False, verbose=0)
    assert_same_state(ours, theirs)
    np.testing.assert_allclose(ours.predict(X, verbose=0), theirs.predict(X, verbose=0), RTOL, ATOL)


# ------------------------------------------------------------------------- callbacks


class Recorder(keras.callbacks.Callback):
    """Writes down every hook that is called, with what it is told."""

    def __init__(self):
        super().__init__()
        self.events = []

    def __getattribute__(self, name):
        return super().__getattribute__(name)

    def note(self, event, logs, *numbers):
        keys = None if logs is None else {k: round(v, 4) for k, v in logs.items()}
        self.events.append((event, *numbers, keys))

    def on_train_begin(self, logs=None):
        self.note("train begin", logs, self.params["epochs"], self.params["steps"])

    def on_train_end(self, logs=None):
        self.note("train end", logs)

    def on_epoch_begin(self, epoch, logs=None):
        self.note("epoch begin", logs, epoch)

    def on_epoch_end(self, epoch, logs=None):
        self.note("epoch end", logs, epoch)

    def on_test_begin(self, logs=None):
        self.note("test begin", logs)

    def on_test_end(self, logs=None):
        self.note("test end", logs)


class OwnRule(keras.callbacks.Callback):
    """Reads and changes weights, changes the rate, looks at the history, stops by itself."""

    def on_epoch_end(self, epoch, logs=None):
        kernel = self.model.layers[0].kernel
        kernel.assign(0.9 * kernel)
        self.model.optimizer.learning_rate = 0.1 / (epoch + 2)
        assert len(self.model.history.epoch) == epoch  # History comes after the user's callbacks
        predicted = self.model.predict(X_VALID, verbose=0)
        self.model.stop_training = bool(epoch == 3 and np.isfinite(predicted).all())


class FreezesAtOnce(keras.callbacks.Callback):
    """Keras compiles at the first batch, so that a change before it counts."""

    def on_train_begin(self, logs=None):
        self.model.layers[0].trainable = False


class FreezesLate(keras.callbacks.Callback):
    """Keras has compiled by then: without effect until the next compile()."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.layers[0].trainable = False


def switching_ema():
    return [keras.callbacks.SwapEMAWeights()]


CALLBACKS = {
    "recorder": lambda: [Recorder()],
    "early stopping": lambda: [
        keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True, start_from_epoch=1)
    ],
    "early stopping on training loss": lambda: [
        keras.callbacks.EarlyStopping(monitor="loss", min_delta=0.05, restore_best_weights=True)
    ],
    "plateau": lambda: [
        keras.callbacks.ReduceLROnPlateau(factor=0.3, patience=1, min_delta=0.05, cooldown=1)
    ],
    "scheduler": lambda: [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.7)],
    "own rule": lambda: [OwnRule(), Recorder()],
    "lambda": lambda: [
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(own=epoch))
    ],
    "several": lambda: [
        keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=1),
        keras.callbacks.EarlyStopping(patience=3),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.History(),
    ],
    "freezes at once": lambda: [FreezesAtOnce()],
    "freezes late": lambda: [FreezesLate()],
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_work_unchanged(name):
    ours, theirs = (network(optimizer=lambda: optimizers.SGD(1.5, momentum=0.9)) for _ in range(2))
    theirs.optimizer.build(theirs.trainable_variables)
    theirs.run_eagerly = not name.startswith("freezes")
    our_callbacks, their_callbacks = CALLBACKS[name](), CALLBACKS[name]()
    options = {"epochs": 6, "validation_data": (X_VALID, Y_VALID)}
    history = fit(ours, X, Y, seed=0, batch_size=BATCH, callbacks=our_callbacks, **options)
    expected = model_fit(theirs, callbacks=their_callbacks, **options)
    assert history.engine == "graph"
    assert_same_history(history, expected)
    assert_same_state(ours, theirs)
    for a, b in zip(our_callbacks, their_callbacks, strict=True):
        if isinstance(a, Recorder):
            assert [event[:-1] for event in a.events] == [event[:-1] for event in b.events]
            for (*_, logs), (*_, expected) in zip(a.events, b.events, strict=True):
                assert logs == (expected if expected is None else pytest.approx(expected, abs=2e-4))


def test_a_callback_that_freezes_does_not_spoil_the_shared_program():
    fit(network(), X, Y, epochs=1, callbacks=[FreezesAtOnce()])
    assert_same_training(network)


def test_switching_to_the_moving_average():
    assert_same_training(
        lambda: network(optimizer=lambda: optimizers.SGD(0.3, use_ema=True, ema_momentum=0.9)),
        validation_data=(X_VALID, Y_VALID),
        callbacks=switching_ema(),
        reference={"validation_data": (X_VALID, Y_VALID), "callbacks": switching_ema()},
    )


def test_no_epochs_leave_the_weights_alone():
    model = network(optimizer=lambda: optimizers.SGD(0.1, use_ema=True))
    before = model.get_weights()
    history = fit(model, X, Y, epochs=0)
    assert history.history == {}
    for u, v in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(u, v)


def test_files_written_by_callbacks(tmp_path):
    def callbacks(folder):
        return [
            keras.callbacks.CSVLogger(folder / "log.csv"),
            keras.callbacks.ModelCheckpoint(folder / "{epoch}.weights.h5", save_weights_only=True),
            keras.callbacks.ModelCheckpoint(folder / "best.keras", save_best_only=True),
        ]

    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    ours, theirs = network(), network()
    options = {"epochs": 3, "validation_data": (X_VALID, Y_VALID)}
    history = fit(
        ours, X, Y, seed=0, batch_size=BATCH, callbacks=callbacks(tmp_path / "ours"), **options
    )
    model_fit(theirs, callbacks=callbacks(tmp_path / "theirs"), **options)
    assert history.engine == "graph"
    logs = [pd.read_csv(tmp_path / who / "log.csv") for who in ("ours", "theirs")]
    pd.testing.assert_frame_equal(*logs, rtol=RTOL)
    names = [sorted(p.name for p in (tmp_path / who).iterdir()) for who in ("ours", "theirs")]
    assert names[0] == names[1]
    assert "3.weights.h5" in names[0]
    best = [keras.saving.load_model(tmp_path / who / "best.keras") for who in ("ours", "theirs")]
    assert_same_state(*best)


class CountsBatches(keras.callbacks.Callback):
    batches = 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1


class BatchwiseRate(keras.callbacks.Callback):
    """A one-cycle schedule in small: the reason why batch-level callbacks exist."""

    def on_train_batch_begin(self, batch, logs=None):
        self.model.optimizer.learning_rate = 0.01 * (1 + batch)


@pytest.mark.parametrize("kind", [CountsBatches, BatchwiseRate])
def test_batch_level_callbacks_see_the_same_batches_in_model_fit(kind):
    ours, theirs = network(optimizer="adam"), network(optimizer="adam")
    theirs.run_eagerly = True
    options = {"epochs": 2, "class_weight": {0: 3.0}, "validation_data": THREE}
    history = fit(ours, X, Y, seed=0, batch_size=BATCH, callbacks=[kind()], **options)
    assert_same_history(history, model_fit(theirs, callbacks=[kind()], **options))
    assert history.engine == f"model.fit: {kind.__name__} acts on batches"
    assert_same_state(ours, theirs)


def test_which_callbacks_act_on_batches(tmp_path):
    nothing = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None)
    begin = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: None)
    every_10 = keras.callbacks.ModelCheckpoint(tmp_path / "a.keras", save_freq=10)
    assigned = keras.callbacks.Callback()
    assigned.on_test_batch_end = lambda batch, logs: None
    acting = {nothing: False, begin: True, every_10: True, assigned: True}
    for callback, expected in acting.items():
        reason = training._reason_for_model_fit(network(), [callback])
        assert (reason is not None) == expected


# ------------------------------------------------------------------------- handed to model.fit


def stream(kind):
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)
    if kind == "generator":
        return ((x, y) for _ in range(9) for x, y in dataset.as_numpy_iterator())
    return dataset


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return STEPS

    def __getitem__(self, i):
        rows = slice(BATCH * i, BATCH * (i + 1))
        return X[rows], Y[rows]


@pytest.mark.parametrize("kind", ["dataset", "generator", "PyDataset"])
def test_streams_go_to_model_fit(kind):
    make = Batches if kind == "PyDataset" else partial(stream, kind)
    options = {"epochs": 2, "shuffle": False}
    options |= {"steps_per_epoch": STEPS} if kind == "generator" else {}
    ours, theirs = network(), network()
    x = make()
    history = fit(ours, x, **options)
    assert_same_history(history, theirs.fit(make(), verbose=0, **options))
    expected = "option steps_per_epoch" if kind == "generator" else f"x is a {type(x).__name__}"
    assert history.engine == f"model.fit: {expected}"


def test_validation_data_as_a_stream():
    valid = tf.data.Dataset.from_tensor_slices((X_VALID, Y_VALID)).batch(BATCH)
    history = assert_same_training(
        network,
        validation_data=valid,
        reference={"validation_data": (X_VALID, Y_VALID)},
        engine=f"model.fit: validation_data is a {type(valid).__name__}",
    )
    assert "val_loss" in history.history


def test_other_options_of_model_fit():
    history = fit(network(), X, Y, epochs=2, validation_split=0.2, validation_steps=1, verbose=0)
    assert history.engine == "model.fit: option validation_steps"
    assert "val_loss" in history.history
    with pytest.raises(TypeError, match="no_such_option"):
        fit(network(), X, Y, epochs=2, no_such_option=1)


class OwnStep(Subclassed):
    def train_step(self, data):
        return super().train_step(data)


class OwnMetrics(Subclassed):
    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return super().compute_metrics(x, y, y_pred, sample_weight) | {"extra": 1.0}


@pytest.mark.parametrize("kind", [OwnStep, OwnMetrics])
def test_models_with_their_own_steps(kind):
    model = kind()
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"])
    history = fit(model, X, Y, epochs=1)
    own = "train_step" if kind is OwnStep else "compute_metrics"
    assert history.engine == f"model.fit: the model has its own {own}"
    assert ("extra" in history.history) == (kind is OwnMetrics)


def test_a_step_that_was_replaced_on_the_model():
    model = network()
    model.test_step = model.test_step
    assert fit(model, X, Y, epochs=1).engine == "model.fit: the model has its own test_step"


def several_optimizers():
    return optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(default_optimizer=optimizers.SGD(0.1))
    )


def test_reasons_for_model_fit():
    assert (
        fit(network(run_eagerly=True), X, Y, epochs=1).engine == "model.fit: the model runs eagerly"
    )
    model = keras.Sequential(
        [keras.Input(batch_shape=(13, 6, 1)), layers.GRU(3, stateful=True), Dense(3)]
    )
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
    history = fit(model, X[:, :, None], Y, epochs=1, batch_size=13)
    assert history.engine == "model.fit: a layer keeps its state from batch to batch"


# ------------------------------------------------------------------------- shared programs


def assert_same_training_for_each(*makes, **options):
    for make in makes:
        assert_same_training(make, **options)


def test_models_that_differ_in_numbers_only_share_one_program_and_keep_their_own(programs):
    def model(rate, momentum, clipnorm, seed, init, name):
        optimizer = optimizers.SGD(rate, momentum=momentum, clipnorm=clipnorm, name=f"sgd_{name}")
        random.seed(seed)
        hidden = Dense(8, "tanh", kernel_initializer=init, name=f"hidden_{name}")
        return network(hidden, layers.Dropout(0.2, seed=seed), optimizer=optimizer)

    assert_same_training_for_each(
        lambda: model(0.1, 0.9, 0.5, 1, "he_normal", "a"),
        lambda: model(0.03, 0.5, 0.1, 2, "lecun_uniform", "b"),
        lambda: model(0.3, 0.99, 2.0, 3, keras.initializers.Constant(0.1), "a"),
    )
    assert len(programs) == 1


def test_decay_and_values_of_clipping_are_arguments_too(programs):
    assert_same_training_for_each(
        lambda: network(optimizer=optimizers.AdamW(0.01, weight_decay=0.1, clipvalue=0.1)),
        lambda: network(optimizer=optimizers.AdamW(0.03, weight_decay=0.5, clipvalue=0.01)),
    )
    assert len(programs) == 1


def test_one_program_serves_all_batch_sizes_and_lengths(programs):
    for n, size in ((26, 8), (16, 8), (26, 64), (7, 1)):
        assert_same_training(network, X[:n], Y[:n], batch_size=size, epochs=1)
    assert len(programs) == 1
    fit(network(), X, Y, epochs=1, validation_data=(X_VALID, Y_VALID))
    evaluate(network(), X, Y)
    assert len(programs) == 2


def functional(wiring, names="abc"):
    """Three equal layers; `wiring` tells the input of the second and of the third."""
    x = keras.Input((6,), name="x")
    outputs = [x]
    for name, source in zip(names, (0, *wiring), strict=True):
        outputs.append(Dense(6, "relu", name=name)(outputs[source]))
    out = Dense(3, name="out")(layers.add([outputs[2], outputs[3]]))
    model = keras.Model(x, out)
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def own_activation(slope):
    def leaky(z):
        return keras.ops.where(z > 0, z, slope * z)

    return leaky


def relu(z):
    """Not Keras's: Keras serializes it by its name, as if it were."""
    return keras.ops.abs(z)


def own_loss(power):
    def squares(y_true, y_pred):
        return keras.ops.mean(keras.ops.abs(y_pred) ** power, axis=-1)

    return squares


def own_layer(slope):
    class Slope(layers.Layer):
        def call(self, x):
            return slope * x

    return Slope


def adapted(shift):
    layer = layers.Normalization()
    layer.adapt(X + shift)
    return layer


def with_frozen(index):
    model = network(Dense(4), Dense(4))
    model.layers[index].trainable = False
    return model


def with_regularizer_set_too_late(when):
    model = network(Dense(4, kernel_regularizer="l2" if when == "before" else None))
    model.layers[0].kernel_regularizer = keras.regularizers.L2(0.01)
    return model


class OwnRegularizer(keras.regularizers.Regularizer):
    def __init__(self, strength):
        self.strength = strength

    def __call__(self, x):
        return self.strength * keras.ops.sum(x**2)

    def get_config(self):
        return {}


def accuracy(name):
    return [keras.metrics.SparseCategoricalAccuracy(name=name)]


def momentum_of_both(batch_norm):
    return network(
        layers.BatchNormalization(momentum=batch_norm), optimizer=optimizers.SGD(0.1, momentum=0.9)
    )


DIFFERENT = {
    "activation": (lambda: network(Dense(4, "relu")), lambda: network(Dense(4, "tanh"))),
    "layer named like an activation": (
        lambda: network(Dense(4, "relu", name="tanh")),
        lambda: network(Dense(4, "tanh", name="relu")),
    ),
    "function named like an activation": (
        lambda: network(Dense(4, "relu")),
        lambda: network(Dense(4, relu)),
    ),
    "equal name": (
        lambda: network(Dense(4, own_activation(0.1))),
        lambda: network(Dense(4, own_activation(0.5))),
    ),
    "lambdas": (lambda: network(Dense(4, lambda z: z)), lambda: network(Dense(4, lambda z: -z))),
    "lambda layers": (
        lambda: network(layers.Lambda(lambda z: z)),
        lambda: network(layers.Lambda(lambda z: -z)),
    ),
    "custom layers": (lambda: network(own_layer(1)()), lambda: network(own_layer(3)())),
    "custom layers in another order": (
        lambda: network(own_layer(1)(), own_layer(3)()),
        lambda: network(own_layer(3)(), own_layer(1)()),
    ),
    "rate of dropout": (lambda: network(layers.Dropout(0.1)), lambda: network(layers.Dropout(0.2))),
    "regularizer": (
        lambda: network(Dense(4, kernel_regularizer=keras.regularizers.L2(0.1))),
        lambda: network(Dense(4, kernel_regularizer=keras.regularizers.L2(0.2))),
    ),
    "custom regularizer": (
        lambda: network(Dense(4, kernel_regularizer=OwnRegularizer(0.1))),
        lambda: network(Dense(4, kernel_regularizer=OwnRegularizer(1.0))),
    ),
    "regularizer without effect": (
        lambda: with_regularizer_set_too_late("before"),
        lambda: with_regularizer_set_too_late("after"),
    ),
    "constraint": (
        lambda: network(Dense(4, kernel_constraint=keras.constraints.MaxNorm(0.1))),
        lambda: network(Dense(4, kernel_constraint=keras.constraints.MaxNorm(1.0))),
    ),
    "frozen layer": (lambda: with_frozen(0), lambda: with_frozen(1)),
    "adapted layer": (lambda: network(adapted(0)), lambda: network(adapted(5))),
    "momentum of batch norm": (lambda: momentum_of_both(0.9), lambda: momentum_of_both(0.1)),
    "epsilon": (
        lambda: network(layers.BatchNormalization(epsilon=0.1)),
        lambda: network(layers.BatchNormalization(epsilon=1.0)),
    ),
    "loss": (lambda: network(), lambda: network(loss="poisson")),
    "loss argument": (
        lambda: network(loss=losses.SparseCategoricalCrossentropy(from_logits=True)),
        lambda: network(loss=losses.SparseCategoricalCrossentropy()),
    ),
    "custom loss": (lambda: network(loss=own_loss(1)), lambda: network(loss=own_loss(2))),
    "loss weights": (lambda: network(loss_weights=[1.0]), lambda: network(loss_weights=[2.0])),
    "metrics": (lambda: network(metrics=["accuracy"]), lambda: network(metrics=["mae"])),
    "name of a metric": (
        lambda: network(metrics=accuracy("a")),
        lambda: network(metrics=accuracy("b")),
    ),
    "custom metric": (
        lambda: network(metrics=[Confidence(power=1.0)]),
        lambda: network(metrics=[Confidence(power=2.0)]),
    ),
    "dtype policy": (
        lambda: network(Dense(4)),
        lambda: network(Dense(4, dtype="mixed_bfloat16")),
    ),
    "optimizer": (
        lambda: network(optimizer=optimizers.Adam(0.1)),
        lambda: network(optimizer=optimizers.Nadam(0.1)),
    ),
    "custom optimizer": (
        lambda: network(optimizer=optimizers.SGD(0.1, momentum=0.5)),
        lambda: network(optimizer=OwnOptimizer(0.1, momentum=0.5)),
    ),
    "nesterov": (
        lambda: network(optimizer=optimizers.SGD(0.1, momentum=0.5)),
        lambda: network(optimizer=optimizers.SGD(0.1, momentum=0.5, nesterov=True)),
    ),
    "no momentum": (
        lambda: network(optimizer=optimizers.SGD(0.1, momentum=0.5)),
        lambda: network(optimizer=optimizers.SGD(0.1)),
    ),
    "clipping": (
        lambda: network(optimizer=optimizers.SGD(0.1, clipnorm=0.1)),
        lambda: network(optimizer=optimizers.SGD(0.1, clipvalue=0.1)),
    ),
    "beta": (
        lambda: network(optimizer=optimizers.Adam(0.1, beta_1=0.9)),
        lambda: network(optimizer=optimizers.Adam(0.1, beta_1=0.5)),
    ),
    "schedule": (
        lambda: network(optimizer=optimizers.SGD(SCHEDULE())),
        lambda: network(optimizer=optimizers.SGD(0.1)),
    ),
    "rate of a schedule": (
        lambda: network(optimizer=optimizers.SGD(SCHEDULE())),
        lambda: network(optimizer=optimizers.SGD(SCHEDULE(decay_rate=0.1))),
    ),
    "excluded from decay": (
        lambda: network(optimizer=optimizers.AdamW(0.01, weight_decay=0.3)),
        lambda: network(optimizer=excluding(var_names=["bias"])),
    ),
    "skip connections": (lambda: functional((1, 1)), lambda: functional((1, 2))),
    "skips in another order": (lambda: functional((0, 1)), lambda: functional((1, 0))),
    "names of outputs": (
        lambda: two_in_two_out(),
        lambda: network(),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_models_that_differ_never_share(name):
    a, b = (seeded(make) for make in DIFFERENT[name])
    signatures = [training._signature(model) for model in (a, b)]
    assert signatures[0] != signatures[1] or not signatures[0].shareable
    # Their equal is found equal, unless it comes with code that was made anew.
    again = training._signature(seeded(DIFFERENT[name][0]))
    assert again == signatures[0] or again.code or not again.shareable


#: The differences that are easiest to miss, trained.
TREACHEROUS = [
    "function named like an activation",
    "custom layers in another order",
    "adapted layer",
    "momentum of batch norm",
    "name of a metric",
]


@pytest.mark.parametrize("name", TREACHEROUS)
def test_models_that_differ_keep_their_own_numbers(name):
    assert_same_training_for_each(*DIFFERENT[name], epochs=1)


def test_names_do_not_matter_in_a_functional_model():
    described = {describe(functional((1, 2), names)) for names in ("abc", "bca", "uvw")}
    assert len(described) == 1


def test_redefined_code_is_not_taken_for_the_old(programs):
    @keras.saving.register_keras_serializable("test", "redefined")
    def redefined(z):
        return 2 * z

    first = seeded(lambda: network(Dense(4, redefined)))

    @keras.saving.register_keras_serializable("test", "redefined")
    def redefined(z):  # noqa: F811
        return keras.ops.square(z)

    # The first model is trained after its function's name has come to mean another.
    second = seeded(lambda: network(Dense(4, redefined)))
    found = [fit(model, X, Y, epochs=1, seed=0).history["loss"] for model in (first, second)]
    twice = seeded(lambda: network(Dense(4), layers.Rescaling(2.0)))
    square = seeded(lambda: network(Dense(4), layers.Lambda(keras.ops.square)))
    expected = [fit(model, X, Y, epochs=1, seed=0).history["loss"] for model in (twice, square)]
    np.testing.assert_allclose(found, expected, RTOL)


def test_code_of_a_notebook_is_never_shared(programs):
    """A function that reads a global variable is the same function when the variable changes."""
    cell = {"__name__": "__main__", "keras": keras, "SLOPE": 0.1}
    exec("def leaky(z): return keras.ops.where(z > 0, z, SLOPE * z)", cell)
    found = []
    for cell["SLOPE"] in (0.1, 0.9):
        model = seeded(lambda: network(Dense(4, cell["leaky"])))
        found.append(fit(model, X, Y, epochs=1, seed=0).history["loss"])
        expected = seeded(lambda: network(Dense(4), layers.LeakyReLU(cell["SLOPE"])))
        expected = fit(expected, X, Y, epochs=1, seed=0).history["loss"]
        np.testing.assert_allclose(found[-1], expected, RTOL)
    assert found[0] != found[1]


def test_custom_layers_of_a_module_share(programs):
    for seed in (1, 2):
        seeded(lambda: fit(network(Noisy()), X, Y, epochs=1), seed)
    assert len(programs) == 1


def test_describe():
    plain = json.loads(describe(network()))
    assert isinstance(plain, list)
    assert describe(network()) == describe(network(optimizer=optimizers.SGD(0.9)))
    assert describe(network(Dense(4, relu))) != describe(network(Dense(4, "relu")))
    assert describe(network(Dense(4, lambda z: z))) != describe(network(Dense(4, lambda z: -z)))
    assert describe(subclassed())


def test_fingerprint_changes_with_the_code():
    def scaled(factor, plus=0):
        def helper(x):
            return x + plus

        def function(x, *, y=1):
            return helper(x) * y * factor

        return function

    def layer_class(rate):
        class Layer(layers.Layer):
            slope = rate

            @property
            def double(self):
                return rate * self.slope

        return Layer

    def others():
        class Other(layer_class(1)):
            @property
            def double(self):
                return 3

        yield scaled(1).__code__
        yield Other
        yield partial(scaled(1), y=1)
        yield partial(scaled(1), y=2)
        yield lambda x: x
        yield lambda x: -x

    def prints():
        kinds = [scaled(1), scaled(2), scaled(1, plus=1), layer_class(1), layer_class(2), *others()]
        return [fingerprint(kind) for kind in kinds]

    assert prints() == prints()
    assert len(set(prints())) == len(prints())


# ------------------------------------------------------------------------- changes after compile


def test_freezing_after_compile_is_an_error_once_trained():
    model = network(Dense(4), Dense(4))
    model.layers[0].trainable = False  # after compile(), but before Keras has compiled anything
    before = model.layers[0].kernel.numpy()
    fit(model, X, Y, epochs=1)
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), before)
    model.layers[0].trainable = True
    with pytest.raises(ValueError, match=r"changed after compile\(\).*call it"):
        fit(model, X, Y, epochs=1)
    model.compile("sgd", model.loss)
    fit(model, X, Y, epochs=1)
    assert np.abs(model.layers[0].kernel.numpy() - before).max() > 0


@pytest.mark.parametrize("make", [network, subclassed])
def test_compiling_again_starts_with_a_new_optimizer(make):
    ours, theirs = seeded(make), seeded(make)
    for rate in (0.1, 0.01):
        for model in (ours, theirs):
            loss = losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(optimizers.Adam(rate), loss=loss, metrics=["accuracy"])
            model(X[:2])
            model.optimizer.build(model.trainable_variables)
        history = fit(ours, X, Y, epochs=2, seed=0, batch_size=BATCH)
        assert_same_history(history, model_fit(theirs, epochs=2))
        assert_same_state(ours, theirs)


def test_changing_the_rate_or_momentum_between_trainings(programs):
    model = network(optimizer=optimizers.SGD(0.1, momentum=0.9))
    fit(model, X, Y, epochs=1)
    model.optimizer.learning_rate = 0.01
    model.optimizer.momentum = 0.5
    fit(model, X, Y, epochs=1)
    assert model.optimizer.momentum == 0.5
    assert len(programs) == 1


# ------------------------------------------------------------------------- stops


class Interrupts(keras.callbacks.Callback):
    def __init__(self, how):
        super().__init__()
        self.how, self.completed = how, []

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            self.how()

    def on_epoch_end(self, epoch, logs=None):
        self.completed.append(epoch)


def raise_interrupt():
    raise KeyboardInterrupt


def signal_now():
    os.kill(os.getpid(), signal.SIGINT)


def signal_soon():
    threading.Timer(0.05, signal_now).start()


@pytest.mark.parametrize("how", [raise_interrupt, signal_now, signal_soon])
def test_an_interruption_keeps_the_history(how):
    model, callback = network(), Interrupts(how)
    with pytest.raises(KeyboardInterrupt):
        fit(model, X, Y, epochs=100_000, seed=0, callbacks=[callback])
    history = model.history
    assert history.epoch == callback.completed
    assert len(history.history["loss"]) == len(callback.completed) >= 2
    assert how is signal_soon or len(callback.completed) == 2
    fit(model, X, Y, epochs=1)  # the model is in order


def linear(rate):
    model = keras.Sequential([keras.Input((6,)), Dense(1, kernel_initializer="ones")])
    model.compile(optimizers.SGD(rate), "mse", metrics=["mae"])
    return model


def first_bad_step(model, y):
    """Where the running mean of the loss ceases to be finite, batch by batch."""
    for epoch in range(100):
        order = batch_order(N, 0, epoch)
        model.reset_metrics()
        for step, i in enumerate(range(0, N, BATCH)):
            rows = order[i : i + BATCH]
            if not np.isfinite(model.train_on_batch(X[rows], y[rows])[0]):
                return epoch, step
    return None


@pytest.mark.parametrize("rate", [2.0, 100.0, 1e30])
@pytest.mark.parametrize("xla", [False, True])
def test_divergence_says_where(rate, xla):
    y = X[:, :1]
    epoch, step = first_bad_step(linear(rate), y)
    model = linear(rate)
    with pytest.raises(DivergenceError, match="learning rate below the present") as caught:
        fit(model, X, y, epochs=100, seed=0, batch_size=BATCH, jit_compile=xla)
    error = caught.value
    assert (error.epoch, error.step) == (epoch, step)
    assert f"epoch {epoch + 1}, step {step + 1} of {STEPS}" in str(error)
    assert error.history is model.history
    assert error.history.epoch == list(range(epoch))
    # The step that went wrong was the last, as with TerminateOnNaN.
    assert model.optimizer.iterations.numpy() == STEPS * epoch + step + 1


@pytest.mark.parametrize("name", ["x", "y", "sample_weight"])
def test_divergence_names_bad_input(name):
    data = {"x": X.copy(), "y": X[:, 0].copy(), "sample_weight": WEIGHT.copy()}
    data[name][17] = np.nan if name == "x" else np.inf
    with pytest.raises(DivergenceError, match="contains values that are not finite"):
        fit(linear(0.01), **data, epochs=1)


def test_divergence_in_model_fit_too():
    y = X[:, :1]
    epoch, step = first_bad_step(linear(2.0), y)
    with pytest.raises(
        DivergenceError, match=f"epoch {epoch + 1}, step {step + 1} of {STEPS}"
    ) as caught:
        fit(linear(2.0), X, y, epochs=100, seed=0, batch_size=BATCH, callbacks=[CountsBatches()])
    assert (caught.value.epoch, caught.value.step) == (epoch, step)
    assert caught.value.history.engine == "model.fit: CountsBatches acts on batches"
    with pytest.raises(DivergenceError, match="step 1"):
        fit(linear(2.0), ((X, y * np.nan) for _ in range(3)), epochs=1)


def test_terminate_on_nan_deals_with_divergence(capsys):
    y = X[:, :1]
    ours, theirs = linear(2.0), linear(2.0)
    options = {"epochs": 100, "validation_data": (X_VALID, X_VALID[:, :1])}
    stop = keras.callbacks.TerminateOnNaN
    history = fit(ours, X, y, seed=0, batch_size=BATCH, callbacks=[stop()], **options)
    assert "Invalid loss, terminating training" in capsys.readouterr().out
    assert_same_history(history, model_fit(theirs, X, y, callbacks=[stop()], **options))
    assert_same_state(ours, theirs)
    with pytest.raises(RuntimeError, match="NaN or Inf loss"):
        fit(linear(2.0), X, y, epochs=100, callbacks=[stop(raise_error=True)])


def test_an_infinite_validation_loss_is_a_result():
    history = fit(linear(0.01), X, X[:, 0], epochs=2, validation_data=(X, X[:, 0] * np.inf))
    assert history.history["val_loss"] == [np.inf, np.inf]


# ------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": -1}, ValueError, "epochs must be at least 0, received -1"),
        ({"epochs": 1.5}, TypeError, "epochs must be an integer, received 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, received 0"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer, received True"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer, received 2.5"),
        ({"initial_epoch": -1}, ValueError, "initial_epoch must be at least 0"),
        ({"validation_freq": 0}, ValueError, "validation_freq must be at least 1, received 0"),
        ({"validation_freq": "all"}, TypeError, "validation_freq must be an integer or a list"),
        ({"y": Y[:-1]}, ValueError, "one length, received x: 26, y: 25"),
        ({"sample_weight": WEIGHT[:7]}, ValueError, "received x: 26, y: 26, sample_weight: 7"),
        ({"x": X[:0], "y": Y[:0]}, ValueError, "x must hold at least one sample, received none"),
        ({"x": None}, ValueError, "x must hold training data, received None"),
        ({"x": X.astype(str)}, TypeError, "x must be numeric, received an array of dtype <U"),
        (
            {"y": Y.astype(object)},
            TypeError,
            "y must be numeric, received an array of dtype object",
        ),
        ({"x": pd.DataFrame({"a": ["b"] * N})}, TypeError, "x must be numeric"),
        ({"x": X.tolist()}, ValueError, "x must have a sample dimension, received a scalar"),
        ({"x": 3.0}, ValueError, "x must have a sample dimension, received a scalar"),
        (
            {"class_weight": {0: 1.0}, "sample_weight": WEIGHT},
            ValueError,
            "class_weight and sample",
        ),
        ({"class_weight": {0: 1.0}, "y": None}, ValueError, "class_weight needs a model with one"),
        ({"validation_data": X}, TypeError, r"validation_data must be a tuple \(x, y\).*ndarray"),
        ({"validation_data": (X,)}, TypeError, r"validation_data must be a tuple \(x, y\)"),
        (
            {"validation_data": (X, Y[:9])},
            ValueError,
            "one length in validation_data, received x: 26",
        ),
        ({"validation_split": 1.0}, ValueError, "validation_split must lie between 0 and 1"),
        ({"validation_split": 0.99}, ValueError, "validation_split=0.99 leaves no training data"),
        ({"model": None}, TypeError, "model must be a keras.Model, received NoneType"),
        ({"model": keras.Sequential([Dense(3)])}, ValueError, "model must be compiled"),
        ({"y": Y + 5}, ValueError, "cannot be trained on these data: .*label value of"),
        ({"x": X[:, :4]}, ValueError, "expected"),
    ],
    ids=str,
)
def test_wrong_arguments(change, error, message):
    arguments = {"model": network(), "x": X, "y": Y, "epochs": 1} | change
    if change == {"validation_split": 0.99}:
        arguments |= {"x": X[:9], "y": Y[:9]}
    with pytest.raises(error, match=message):
        fit(**arguments)


def test_a_label_out_of_range_is_found_during_training_too():
    y = Y.copy()
    y[-1] = 7  # not among the samples that the model is built with
    with pytest.raises(ValueError, match="label value of 7") as caught:
        fit(network(), X, y, epochs=1)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_without_an_optimizer():
    model = network()
    model.compile(optimizer=None, loss="mse")
    with pytest.raises(ValueError, match="optimizer"):
        fit(model, X, X[:, :3], epochs=1)
    assert evaluate(model, X, X[:, :3])["loss"] > 0


# ------------------------------------------------------------------------- cost


@pytest.mark.parametrize("make", [network, subclassed], ids=["shared", "own"])
def test_models_are_released(make):
    model = make()
    fit(model, X, Y, epochs=1, validation_data=(X_VALID, Y_VALID), callbacks=[Recorder()])
    alive = [weakref.ref(model), weakref.ref(model.layers[0]), weakref.ref(model.optimizer)]
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    assert not training._own_programs


def test_memory_does_not_grow_with_the_number_of_models():
    def run(n):
        for seed in range(n):
            model = network(Dense(1000, "relu"), Dense(1000, "relu"))  # 4 MB, with gradients more
            fit(model, X, Y, epochs=1, seed=seed)
        gc.collect()
        trim_memory()
        return psutil.Process().memory_info().rss

    before = run(20)  # until the allocator has what it keeps
    assert run(40) - before < 50e6  # a third of what the weights of 40 models take


def test_the_number_of_kept_programs_is_bounded(programs, monkeypatch):
    monkeypatch.setattr(training, "MAX_PROGRAMS", 3)
    for units in range(1, 6):
        fit(network(Dense(units)), X, Y, epochs=1)
    assert len(programs) == 3
    fit(network(Dense(5)), X, Y, epochs=1)
    assert len(programs) == 3
    training.clear_programs()
    assert not programs


def test_threads_give_the_numbers_of_one_after_the_other(programs):
    def models():
        training.clear_programs()
        makes = [NETS["dropout"], NETS["batch norm"], NETS["dropout"], subclassed]
        return [seeded(make, seed) for seed, make in enumerate(makes)]

    def train(job):
        seed, model = job
        history = fit(model, X, Y, epochs=20, seed=seed, validation_data=(X_VALID, Y_VALID))
        return history.history, model.get_weights()

    alone = [train(job) for job in enumerate(models())]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(train, enumerate(models())))
    np.testing.assert_equal(together, alone)
    assert len(programs) == 4


def test_xla_gives_the_same_numbers():
    def make():
        norm = layers.BatchNormalization()
        optimizer = optimizers.Adam(SCHEDULE())
        return network(Dense(4, "relu", activity_regularizer="l2"), norm, optimizer=optimizer)

    options = {"validation_data": (X_VALID, Y_VALID)}
    assert_same_training(make, jit_compile=True, reference=options, **options)


def test_xla_with_two_outputs_and_one_batch():
    options = {"epochs": 1, "jit_compile": True, "eager": False}
    assert_same_training(two_in_two_out, TWO_X, TWO_Y, reference={"batch_size": BATCH}, **options)
    whole = {"batch_size": 64}
    assert_same_training(network, reference=whole, **options | {"eager": True}, **whole)


def test_xla_is_used_where_it_pays(monkeypatch):
    asked = []

    class Asked(training._Programs):
        def __init__(self, model, jit_compile):
            asked.append(jit_compile)
            super().__init__(model, jit_compile=False)

    monkeypatch.setattr(training, "_Programs", Asked)
    monkeypatch.setattr(training, "XLA_BREAK_EVEN_STEPS", 2 * STEPS)
    for epochs, hidden in ((1, Dense(4)), (2, Dense(4)), (2, layers.Dropout(0.1))):
        fit(network(hidden), X, Y, epochs=epochs, batch_size=BATCH)
    fit(network(), X, Y, epochs=1, jit_compile=True)
    monkeypatch.setenv("CH11_XLA", "0")
    fit(network(), X, Y, epochs=2, batch_size=BATCH)
    assert asked == [False, True, False, True, False]


def test_output(capsys):
    fit(network(), X, Y, epochs=2)
    assert capsys.readouterr().out == ""
    fit(network(), X, Y, epochs=2, validation_data=(X_VALID, Y_VALID), verbose=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" - ")[0] for line in lines] == ["Epoch 1/2", "Epoch 2/2"]
    assert all("val_accuracy: 0." in line for line in lines)


def test_it_is_faster_than_model_fit():
    """A guard against losing the point of it all; `benchmarks/engine.py` measures."""
    x, y = np.tile(X, (20, 1)), np.tile(Y, 20)
    ours, theirs = network(), network()
    fit(ours, x, y, epochs=1, batch_size=4)
    theirs.fit(x, y, epochs=1, batch_size=4, verbose=0)

    def seconds(train):
        start = time.perf_counter()
        train()
        return time.perf_counter() - start

    ratios = [
        seconds(lambda: theirs.fit(x, y, epochs=2, batch_size=4, verbose=0))
        / seconds(lambda: fit(ours, x, y, epochs=2, batch_size=4))
        for _ in range(3)
    ]
    assert np.median(ratios) > 2
