"""Schedules against Keras, TensorFlow's older functions, closed forms and replayed trainings."""

import json
import math
import random

from ch11lib import schedules, training
from ch11lib.backend import keras, tf
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

layers, theirs = keras.layers, keras.optimizers.schedules
# Keras 3.15 hands a variable to np.array in a way that NumPy 2 will no longer accept one day.
old_copy = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
STEPS = np.arange(0, 400)
SOME = np.r_[0:45:9, 45:70, 70:195:12, 195:205, 205:400:17, 298:303]


@pytest.fixture(autouse=True, scope="module")
def _fresh():
    yield
    training.clear_programs()


def of_keras(schedule):
    return np.array([float(schedule(tf.constant(int(t), tf.int64))) for t in SOME])


# ------------------------------------------------------------------------------------- like Keras

SAME = {
    "power": (
        lambda t: schedules.power(t, 0.1, 50),
        theirs.InverseTimeDecay(0.1, 50, 1.0),
    ),
    "exponential": (
        lambda t: schedules.exponential(t, 0.1, 100, 0.3),
        theirs.ExponentialDecay(0.1, 100, 0.3),
    ),
    "polynomial": (
        lambda t: schedules.polynomial(t, 0.1, 300, 0.01, exponent=2),
        theirs.PolynomialDecay(0.1, 300, 0.01, power=2.0),
    ),
    "piecewise": (
        lambda t: schedules.piecewise(t, [50, 200], [0.1, 0.05, 0.2]),
        theirs.PiecewiseConstantDecay([50, 200], [0.1, 0.05, 0.2]),
    ),
    "cosine": (
        lambda t: schedules.cosine(t, 0.1, 300, end=0.01),
        theirs.CosineDecay(0.1, 300, alpha=0.1),
    ),
    "restarts": (
        lambda t: schedules.cosine_restarts(t, 0.1, 32, end=0.01, peak_factor=0.5),
        theirs.CosineDecayRestarts(0.1, 32, t_mul=2.0, m_mul=0.5, alpha=0.1),
    ),
    "equal restarts": (
        lambda t: schedules.cosine_restarts(t, 0.1, 64, period_factor=1),
        theirs.CosineDecayRestarts(0.1, 64, t_mul=1.0),
    ),
    "warm-up": (
        lambda t: schedules.warmup(
            t, 64, lambda u: schedules.cosine(u, 0.1, 200, end=0.01), start=0.02
        ),
        theirs.CosineDecay(0.02, 200, alpha=0.1, warmup_target=0.1, warmup_steps=64),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_same_as_keras(name):
    ours, keras_schedule = SAME[name]
    np.testing.assert_allclose(ours(SOME), of_keras(keras_schedule), rtol=1e-5, atol=1e-7)


def test_same_as_tensorflow_1():
    """The functions that took a global_step; in TensorFlow 2 they return a function."""
    old, step = tf.compat.v1.train, tf.Variable(0, dtype=tf.int64)
    decayed = {
        "exponential": old.exponential_decay(0.1, step, 100, 0.3),
        "power": old.inverse_time_decay(0.1, step, 50, 1.0),
        "polynomial": old.polynomial_decay(0.1, step, 300, 0.01, power=2.0),
    }
    for t in range(0, 400, 7):
        step.assign(t)
        for name, rate in decayed.items():
            assert SAME[name][0](t) == pytest.approx(float(rate()), rel=1e-5)


# ----------------------------------------------------------------------------------- closed forms


def test_power_and_exponential():
    t = np.array([0.0, 1, 10, 1000])
    np.testing.assert_allclose(schedules.power(t, 0.3, 20, 0.5), 0.3 / np.sqrt(1 + t / 20))
    np.testing.assert_allclose(
        schedules.exponential(t, 0.3, 20), 0.3 * np.exp(-t / 20 * np.log(10))
    )


def test_boundaries():
    values = schedules.piecewise([9, 10, 10.5, 11, 20, 21], [10, 20], [3, 2, 1])
    assert values.tolist() == [3, 3, 2, 2, 2, 1]
    assert schedules.piecewise([0, 5], [], [2]).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("factor", "restarts"), [(3.0, [7, 28, 91, 280, 847]), (5, [7, 42, 217, 1092])]
)
def test_restarts_are_where_they_belong(factor, restarts):
    """Where a restart falls on a step, the logarithm of a float is often wrong by a rounding."""
    t = np.arange(restarts[-1] + 1)
    rate = schedules.cosine_restarts(t, 1.0, 7, period_factor=factor)
    assert (np.flatnonzero(np.diff(rate) > 0) + 1).tolist() == restarts
    np.testing.assert_allclose(rate[restarts], 1)
    np.testing.assert_allclose(rate[0], 1)


@given(
    st.integers(1, 3000),
    st.floats(0, 0.95),
    st.floats(1e-6, 100),
    st.sampled_from([None, 0.0, 1e-9]),
)
def test_one_cycle_ends_where_it_says(steps, final, peak, end):
    t = np.arange(2 * steps + 10)
    rate = schedules.one_cycle(t, peak, steps, end=end, final=final)
    expected = peak / 10_000 if end is None else end
    assert (rate >= 0).all()
    np.testing.assert_allclose(rate[steps - 1 :], expected, rtol=1e-12)
    momentum = schedules.one_cycle_momentum(t, steps, final=final)
    assert momentum.min() >= 0.85 - 1e-12
    np.testing.assert_allclose(momentum[steps - 1 :], 0.95)
    if steps >= 40:
        assert rate.max() == peak
        assert momentum[rate.argmax()] == 0.85
        assert rate[0] == pytest.approx(peak / 10)
        top, bottom = rate.argmax(), min(2 * rate.argmax(), steps - 1)
        assert abs(bottom - (1 - final) * (steps - 1)) <= 1.5
        np.testing.assert_allclose(rate[: top + 1], np.linspace(peak / 10, peak, top + 1))
        down = rate[top : min(bottom, steps - 2) + 1]  # without the jump to the end, if final is 0
        np.testing.assert_allclose(np.diff(down), -(peak - peak / 10) / (bottom - top), rtol=1e-6)


def test_one_cycle_takes_zero_for_zero():
    rate = schedules.one_cycle(np.arange(101), 0.4, 101, start=0.0, end=0.0)
    assert rate[[0, 45, 90, 100]].tolist() == [0, 0.4, 0, 0]


def test_warm_up_stable_decay():
    t = np.arange(100)
    rate = schedules.wsd(t, 0.3, 100, warmup=10, decay=20, end=0.03)
    np.testing.assert_allclose(rate, np.interp(t, [0, 10, 79, 99], [0, 0.3, 0.3, 0.03]))
    longer = schedules.wsd(t, 0.3, 500, warmup=10, decay=20)
    np.testing.assert_array_equal(rate[:80], longer[:80])
    assert schedules.wsd(t, 0.3, 100, warmup=0, decay=0).tolist() == [0.3] * 100


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.floats(0, 1)),
        min_size=1,
        max_size=5,
        unique_by=lambda k: k[0],
    )
)
def test_straight_lines(points):
    knots, values = zip(*sorted(points), strict=True)
    t = np.arange(60)
    ours = schedules.piecewise_linear(t, knots, values)
    np.testing.assert_allclose(ours, np.interp(t, knots, values), atol=1e-12)
    assert ours.min() >= min(values)
    assert ours.max() <= max(values)


def test_jumps():
    assert schedules.piecewise_linear([0, 4, 5, 6], [0, 5, 5], [1, 1, 3]).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("name", SAME)
def test_any_shape_and_numbers(name):
    function = SAME[name][0]
    grid = function(STEPS.reshape(4, 10, 10))
    assert grid.shape == (4, 10, 10)
    np.testing.assert_array_equal(grid.ravel(), function(STEPS))
    assert isinstance(function(7), np.float64)
    assert function(7) == function([7])[0]
    assert function(np.zeros(0)).shape == (0,)


# ---------------------------------------------------------------------------------- in a graph

FORMS = [
    (schedules.power, {"initial": 0.1, "steps": 30, "exponent": 0.5}),
    (schedules.exponential, {"initial": 0.1, "steps": 30}),
    (schedules.polynomial, {"initial": 0.1, "steps": 30, "exponent": 3}),
    (schedules.piecewise, {"boundaries": [5, 9], "values": [0.1, 0.3, 0.2]}),
    (schedules.piecewise_linear, {"knots": [3, 9, 20], "values": [0.1, 0.3, 0.0]}),
    (schedules.cosine, {"initial": 0.1, "steps": 30}),
    (schedules.cosine_restarts, {"initial": 0.1, "steps": 3, "period_factor": 3}),
    (schedules.cosine_restarts, {"initial": 0.1, "steps": 5, "period_factor": 1}),
    (schedules.warmup, {"steps": 5, "after": schedules.Schedule("cosine", initial=0.1, steps=30)}),
    (schedules.warmup, {"steps": 5, "after": theirs.ExponentialDecay(0.1, 30, 0.1)}),
    (schedules.wsd, {"peak": 0.1, "steps": 40, "warmup": 5, "decay": 10}),
    (schedules.one_cycle, {"peak": 0.1, "steps": 40}),
    (schedules.one_cycle_momentum, {"steps": 40}),
]


@pytest.mark.parametrize(("function", "parameters"), FORMS)
def test_the_keras_form_computes_the_same(function, parameters):
    schedule, t = schedules.Schedule(function, **parameters), np.arange(60)
    expected = function(t, **parameters)
    np.testing.assert_array_equal(schedule(t), expected)
    inside = tf.function(schedule)(tf.constant(t))
    assert inside.dtype == tf.float32
    # Keras's own schedules compute in float32.
    exact = not isinstance(parameters.get("after"), theirs.ExponentialDecay)
    np.testing.assert_allclose(inside, expected, rtol=6e-8 if exact else 1e-6, atol=1e-12)
    config = json.loads(json.dumps(theirs.serialize(schedule)))
    again = theirs.deserialize(config)
    assert type(again) is schedules.Schedule
    np.testing.assert_array_equal(again(t), expected)


def test_all_functions_have_a_keras_form():
    names = {name for name in schedules.__all__ if name in schedules._FUNCTIONS}
    assert names == {function.__name__ for function, _ in FORMS} == set(schedules._FUNCTIONS)


def data(n=100):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 4)).astype("float32")
    return x, (x[:, :1] * x[:, 1:2]).astype("float32")


def network(optimizer, metrics=(), dropout=0.0):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, "tanh"),
            *([layers.BatchNormalization(), layers.Dropout(dropout)] if dropout else []),
            layers.Dense(1),
        ]
    )
    model.compile(optimizer, "mse", metrics=list(metrics))
    return model


def fit(model, how, epochs=10, **options):
    x, y = data()
    if how == "model.fit":
        return model.fit(x, y, epochs=epochs, shuffle=False, verbose=0, **options)
    history = training.fit(
        model, x, y, epochs=epochs, shuffle=False, jit_compile=how == "XLA", **options
    )
    assert history.engine == "graph"
    return history


@pytest.mark.parametrize("how", ["model.fit", "XLA"])
def test_the_rate_that_was_used_is_the_rate_that_was_plotted(how):
    cycle = schedules.OneCycle(peak=0.1, steps=12)
    plotted = cycle(np.arange(12))
    optimizer = schedules.record_rates(
        schedules.ScheduledSGD(cycle, momentum=cycle.momentum), steps=60
    )
    fit(network(optimizer), how, epochs=3)
    np.testing.assert_array_equal(optimizer.rates, plotted.astype("float32"))


def test_recording_changes_nothing_and_keeps_the_last_steps():
    def make(rate):
        return keras.optimizers.Adam(rate, weight_decay=0.01)

    rate = schedules.Schedule("exponential", initial=0.01, steps=10)
    plain, recording = make(rate), schedules.record_rates(make(rate), steps=15)
    models = [network(optimizer) for optimizer in (plain, recording)]
    for model in models:
        fit(model, "graph")
    for a, b in zip(*(m.get_weights() for m in models), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(recording.rates, rate(np.arange(25, 40)), rtol=1e-6)


def test_recorded_rates_of_a_variable():
    optimizer = schedules.record_rates(keras.optimizers.SGD(0.0625), steps=20)
    scheduler = schedules.PerformanceScheduling("loss", factor=0.5, patience=1, min_delta=9.0)
    history = fit(network(optimizer), "graph", epochs=4, callbacks=[scheduler])
    expected = [0.0625, 0.0625, 0.03125, 0.015625]
    assert history.history["learning_rate"] == expected
    assert optimizer.rates.tolist() == np.repeat(expected, 4).tolist()


@pytest.mark.parametrize(("how", "nesterov"), [("graph", False), ("XLA", True)])
def test_momentum_of_each_step_by_hand(how, nesterov):
    x, y = data()
    cycle = schedules.OneCycle(peak=0.05, steps=12)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    w, b, m = np.zeros((4, 1)), np.zeros(1), [0, 0]
    model.set_weights([w, b])
    model.compile(schedules.ScheduledSGD(cycle, cycle.momentum, nesterov=nesterov), "mse")
    fit(model, how, epochs=3)
    for t in range(12):
        rate, beta, at = cycle(t), cycle.momentum(t), 32 * (t % 4)
        xs, ys = x[at : at + 32], y[at : at + 32]
        error = 2 * (xs @ w + b - ys) / len(xs)
        change = [rate * g for g in (xs.T @ error, error.sum(0))]
        m = [beta * mi - c for mi, c in zip(m, change, strict=True)]
        move = [beta * mi - c for mi, c in zip(m, change, strict=True)] if nesterov else m
        w, b = w + move[0], b + move[1]
    np.testing.assert_allclose(model.get_weights()[0], w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.get_weights()[1], b, rtol=1e-4, atol=1e-6)


def test_a_constant_momentum_is_keras_s():
    constant = schedules.Schedule("piecewise", boundaries=[], values=[0.9])
    ours = network(schedules.ScheduledSGD(0.05, constant, clipnorm=1.0))
    reference = network(keras.optimizers.SGD(0.05, 0.9, clipnorm=1.0))
    for model in (ours, reference):
        fit(model, "graph")
    for a, b in zip(ours.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@old_copy
def test_a_cycle_goes_on_where_it_was_after_loading(tmp_path):
    cycle = schedules.OneCycle(peak=0.1, steps=40, end=0.0)
    model = network(schedules.ScheduledSGD(cycle, cycle.momentum, nesterov=True))
    fit(model, "graph", epochs=4)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is schedules.ScheduledSGD
    assert type(loaded.optimizer._learning_rate) is schedules.OneCycle
    assert float(loaded.optimizer.learning_rate) == np.float32(cycle(16))
    for m in (model, loaded):
        fit(m, "graph", epochs=4)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------------- performance scheduling


@old_copy
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([0.5, 0.7, 0.75, 1.0, math.nan]), min_size=1, max_size=25),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 0.03]),
    st.sampled_from(["min", "max"]),
)
def test_plateau_is_reduce_lr_on_plateau(values, patience, cooldown, min_delta, min_rate, mode):
    options = {"factor": 0.5, "patience": patience, "cooldown": cooldown, "min_delta": min_delta}
    callback = keras.callbacks.ReduceLROnPlateau("v", mode=mode, min_lr=min_rate, **options)
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.5))
    callback.set_model(model)
    callback.on_train_begin()
    expected = []
    for epoch, value in enumerate(values):
        expected.append(float(model.optimizer.learning_rate.numpy()))
        callback.on_epoch_end(epoch, {"v": value})
    ours = schedules.plateau(values, 0.5, mode=mode, min_rate=min_rate, **options)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@old_copy
def test_performance_scheduling_trains_as_keras_does():
    x, y = data()
    histories = []
    for kind in (schedules.PerformanceScheduling, keras.callbacks.ReduceLROnPlateau):
        callback = kind("val_loss", factor=0.5, patience=2)
        model = network(keras.optimizers.SGD(0.05, momentum=0.9))
        history = fit(
            model, "graph", epochs=15, callbacks=[callback], validation_data=(x[:20], -y[:20])
        )
        histories.append(history.history)
    assert len(set(histories[0]["learning_rate"])) > 2
    for name, values in histories[1].items():
        np.testing.assert_allclose(histories[0][name], values, rtol=1e-5)


def test_performance_scheduling_fails_early():
    schedule = schedules.Schedule("power", initial=0.1, steps=10)
    with pytest.raises(TypeError, match=r"one number as its learning rate, .* received Schedule"):
        fit(
            network(keras.optimizers.SGD(schedule)),
            "graph",
            callbacks=[schedules.PerformanceScheduling("loss")],
        )
    with pytest.raises(ValueError, match=r"monitor must be one of \['loss'\]; received 'val_loss'"):
        fit(network("sgd"), "graph", callbacks=[schedules.PerformanceScheduling()])
    with pytest.raises(ValueError, match="mode must be 'min' or 'max' for monitor='val_accuracy'"):
        schedules.PerformanceScheduling("val_accuracy")
    with pytest.raises(ValueError, match=r"factor must be .* received 1.0"):
        schedules.PerformanceScheduling(factor=1.0)


# --------------------------------------------------------------------------------- the range test


def everything(model):
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    return [v.numpy() for v in variables]


def randomness():
    """Draw from all sources, some of which come to life only now."""
    return [
        random.random(),
        np.random.random(),  # noqa: NPY002
        float(keras.random.normal(())),
        float(tf.random.normal(())),
        float(tf.random.get_global_generator().normal(())),
    ]


FOUND = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "schedule": lambda: keras.optimizers.Adam(theirs.ExponentialDecay(0.1, 10, 0.5), use_ema=True),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
}


@pytest.mark.parametrize("name", FOUND)
def test_finding_a_rate_leaves_no_trace(name):
    model = network(FOUND[name](), ["mae"], dropout=0.3)
    model.fit(*data(), verbose=0)
    before, rate = everything(model), model.optimizer.learning_rate
    before_rate = float(rate if tf.is_tensor(rate) else rate.numpy())
    keras.utils.set_random_seed(5)
    tf.random.set_global_generator(tf.random.Generator.from_seed(5))
    expected = randomness()
    keras.utils.set_random_seed(5)
    tf.random.set_global_generator(tf.random.Generator.from_seed(5))
    test = schedules.find_learning_rate(model, *data(), steps=30)
    assert randomness() == expected
    assert len(test.rates) > 10
    for a, b in zip(before, everything(model), strict=True):
        np.testing.assert_array_equal(a, b)
    rate = model.optimizer.learning_rate
    assert float(rate if tf.is_tensor(rate) else rate.numpy()) == before_rate


def test_training_afterwards_is_what_it_would_have_been():
    weights = []
    for find in (False, True):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([layers.Dense(8, "tanh"), layers.Dropout(0.3), layers.Dense(1)])
        model.compile("adam", "mse", metrics=["mae"])  # not built yet
        if find:
            schedules.find_learning_rate(model, *data(), steps=40)
        fit(model, "graph", epochs=2)
        weights.append(model.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_also_after_an_error():
    class Fails(layers.Layer):
        fail = False

        def call(self, x):
            if self.fail:
                raise RuntimeError("no")
            return x

    layer = Fails()
    model = keras.Sequential([keras.Input((4,)), layer, layers.Dense(1)])
    model.compile("adam", "mse", run_eagerly=True)
    model.fit(*data(), verbose=0)
    before, rate = everything(model), model.optimizer._learning_rate
    layer.fail = True
    with pytest.raises(RuntimeError, match="no"):
        schedules.find_learning_rate(model, *data(), steps=40)
    assert model.optimizer._learning_rate is rate
    for a, b in zip(before, everything(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_losses_are_those_of_single_batches():
    x, y = data(70)
    model = network(keras.optimizers.SGD(0.1, momentum=0.5))
    test = schedules.find_learning_rate(
        model, x, y, lowest=1e-3, highest=0.5, steps=25, batch_size=20, seed=3
    )
    rows = np.concatenate([training.batch_order(70, 3, epoch) for epoch in range(8)])
    for i in range(25):
        rate = 1e-3 * 500 ** (i / 24)
        assert test.rates[i] == pytest.approx(rate)
        model.optimizer.learning_rate = rate
        chosen = rows[20 * i : 20 * i + 20]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x[chosen], training=True) - y[chosen]) ** 2)
        model.optimizer.apply(
            tape.gradient(loss, [v.value for v in model.trainable_variables]),
            model.trainable_variables,
        )
        assert test.losses[i] == pytest.approx(float(loss), rel=1e-4)
        weights = 0.9 ** np.arange(i, -1, -1)
        expected = (weights * test.losses[: i + 1]).sum() / weights.sum()
        assert test.smoothed[i] == pytest.approx(expected)


def linear(n=400, noise=0.1):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, 5))
    y = x @ np.ones((5, 1)) + noise * rng.standard_normal((n, 1))
    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.Input((5,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    return model, x, y


def test_stops_on_divergence_and_suggests_rates_that_work():
    model, x, y = linear()
    test = schedules.find_learning_rate(model, x, y)
    assert test.message == ""
    # The loss of a linear model has curvature about 2: from a rate of 1 on it diverges.
    assert 0.5 < test.diverged_at < 10
    assert len(test.rates) == len(test.losses) == len(test.smoothed) < 200
    assert np.isfinite(test.losses).all()
    found = test.suggestions
    assert found["minimum"] == pytest.approx(test.rates[test.smoothed.argmin()] / 10)
    # What theory says: rates below 2 by the largest curvature are stable. Of the excess loss
    # (1 - 2 rate)^(2 steps) remains, and the noise, whose variance is 0.01, is the floor.
    inputs = np.c_[x, np.ones(len(x))]
    stable = 2 / np.linalg.eigvalsh(2 * inputs.T @ inputs / len(x)).max()
    assert 0.05 * stable < found["blow-up"] < 0.5 * stable
    assert found["steepest"] < stable
    for name, rate in found.items():
        model, x, y = linear()
        model.optimizer.learning_rate = rate
        losses = training.fit(model, x, y, epochs=10, seed=0).history["loss"]
        # The steepest point promises no more than a fall.
        assert losses[-1] < (losses[0] if name == "steepest" else 0.02)


def test_clear_answers_when_there_is_no_minimum():
    answers = {
        "hardly changed": {"lowest": 1e-12, "highest": 1e-9},
        "still fell at the highest": {"lowest": 1e-5, "highest": 0.03},
        "diverged at once": {"lowest": 10.0, "highest": 100.0},
    }
    for answer, limits in answers.items():
        test = schedules.find_learning_rate(*linear(), **limits)
        assert answer in test.message
        assert math.isnan(test.suggestions["minimum"])
        assert math.isnan(test.suggestions["blow-up"])
    rising = np.geomspace(1, 10, 50)
    suggestions, message = schedules.suggest_rates(rising, rising, rising)
    assert "only rose: take a smaller lowest rate" in message
    assert all(math.isnan(rate) for rate in suggestions.values())


@pytest.mark.parametrize("shift", [0.01, 1.0])
def test_suggestions_of_a_known_curve(shift):
    rates = np.geomspace(1e-4 * shift, 10 * shift, 501)
    u = np.log(rates / shift)  # falls most steeply at -4, is lowest at -2, and back at e^0 = 1
    losses = np.where(
        u < -2, 1.5 + 0.5 * np.cos(np.pi * np.clip((u + 6) / 4, 0, 1)), 1 + (u + 2) ** 2 / 4
    )
    suggestions, message = schedules.suggest_rates(rates, losses, losses)
    assert message == ""
    expected = {"steepest": np.exp(-4), "minimum": np.exp(-2) / 10, "blow-up": 0.1}
    for name, rate in expected.items():
        assert suggestions[name] == pytest.approx(rate * shift, rel=0.05)
    cut = u < -1  # stopped before the loss is back
    suggestions, _ = schedules.suggest_rates(rates[cut], losses[cut], losses[cut], diverged_at=0.7)
    assert suggestions["blow-up"] == pytest.approx(0.07)


def test_small_data_and_several_inputs():
    one, two = keras.Input((2,), name="one"), keras.Input((3,), name="two")
    model = keras.Model([one, two], layers.Dense(1)(layers.Concatenate()([one, two])))
    model.compile("sgd", "mse")
    x = {"one": np.ones((7, 2)), "two": np.ones((7, 3))}
    test = schedules.find_learning_rate(model, x, np.ones((7, 1)), steps=20)
    assert len(test.losses) >= 10


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: schedules.power([0, -1], 0.1, 10), "step must be 0 or more; received -1"),
        (lambda: schedules.cosine(math.nan, 0.1, 10), "step must be 0 or more; received nan"),
        (lambda: schedules.power(0, -0.1, 10), "initial must be .* received -0.1"),
        (lambda: schedules.exponential(0, 0.1, 0), "steps must be .* above 0; received 0"),
        (lambda: schedules.exponential(0, 0.1, 9, 0), "factor must be .* received 0"),
        (lambda: schedules.polynomial(0, 0.1, 9, math.inf), "end must be .* received inf"),
        (lambda: schedules.piecewise(0, [5, 3], [1, 2, 3]), r"rising order; received \[5, 3\]"),
        (lambda: schedules.piecewise(0, [3, 3], [1, 2, 3]), r"rising order; received \[3, 3\]"),
        (lambda: schedules.piecewise(0, [-3], [1, 2]), "boundaries must be 0 or more"),
        (lambda: schedules.piecewise(0, [3], [1]), "values must be one more .* 1 b.* received 1"),
        (lambda: schedules.piecewise(0, [3], [1, math.nan]), "values must be finite"),
        (lambda: schedules.piecewise_linear(0, [], []), "values must be one for each"),
        (lambda: schedules.piecewise_linear(0, [5, 3], [1, 2]), "knots must be .* never falling"),
        (lambda: schedules.cosine_restarts(0, 0.1, 9, period_factor=0.5), "period_factor must"),
        (lambda: schedules.cosine_restarts(0, 0.1, 9, peak_factor=0), "peak_factor must"),
        (lambda: schedules.warmup(0, 0, np.sqrt), "steps must be .* received 0"),
        (lambda: schedules.wsd(0, 0.1, 10, 5, 5), "warmup and decay must together be below the 10"),
        (lambda: schedules.one_cycle(0, 0.1, 0), "steps must be a whole number .* received 0"),
        (lambda: schedules.one_cycle(0, 0.1, 9.5), "steps must be a whole number .* received 9.5"),
        (lambda: schedules.one_cycle(0, 0.1, 9, final=1.0), "final must be .* received 1.0"),
        (lambda: schedules.one_cycle(0, 0.1, 9, end=-1), "end must be .* received -1"),
        (lambda: schedules.one_cycle_momentum(0, 9, high=1.1), "high must be .* received 1.1"),
        (lambda: schedules.OneCycle(0.1, 0), "steps must be a whole number"),
        (lambda: schedules.Schedule("linear"), "function must be one of cosine, .* 'linear'"),
        (lambda: schedules.Schedule(np.sqrt), "function must be one of cosine"),
        (lambda: schedules.Plateau(0.1, mode="auto"), "mode must be 'min' or 'max'"),
        (lambda: schedules.Plateau(0.1, patience=-1), "patience must be .* received -1"),
        (lambda: schedules.record_rates(keras.optimizers.SGD(), 0), "steps must be .* received 0"),
    ],
)
def test_wrong_values(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: schedules.power("1", 0.1, 10), "step must be a number"),
        (lambda: schedules.piecewise(0, 3, [1, 2]), "boundaries must be a list of numbers"),
        (lambda: schedules.warmup(0, 5, 0.1), "after must be a function of the step"),
        (lambda: schedules.ScheduledSGD(0.1, 0.9), "momentum must be a schedule"),
        (lambda: schedules.record_rates("sgd", 5), "optimizer must be a Keras optimizer"),
        (
            lambda: schedules.record_rates(FOUND["scaled"](), 5),
            "optimizer must not wrap another one",
        ),
        (
            lambda: schedules.Schedule("warmup", steps=5, after=lambda t: 0.1).get_config(),
            "only schedules of Keras or this module can be saved",
        ),
    ],
)
def test_wrong_types(call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_optimizers_that_cannot_record():
    used = keras.optimizers.SGD()
    used.build([keras.Variable(1.0)])
    for bad in (used, schedules.record_rates(keras.optimizers.SGD(), 3)):
        with pytest.raises(ValueError, match="optimizer must be new"):
            schedules.record_rates(bad, 5)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4"):
        schedules.record_rates(keras.optimizers.SGD(gradient_accumulation_steps=4), 5)
    with pytest.raises(ValueError, match="nothing has been recorded yet"):
        _ = schedules.record_rates(keras.optimizers.SGD(), 3).rates


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lowest": 0.0}, ValueError, "lowest must be .* received 0.0"),
        ({"lowest": 1.0, "highest": 0.1}, ValueError, "highest must be above lowest"),
        ({"steps": 19}, ValueError, "steps must be .* 20 or more; received 19"),
        ({"batch_size": 0}, ValueError, "batch_size must be .* received 0"),
        ({"smoothing": 1.0}, ValueError, "smoothing must be .* received 1.0"),
        ({"x": np.ones((3, 4))}, ValueError, r"one length .* received lengths \[3, 100\]"),
        ({"x": np.ones((0, 4)), "y": np.ones((0, 1))}, ValueError, r"received lengths \[0\]"),
        ({"x": np.array(["a"])}, TypeError, "x and y must be numeric arrays"),
        ({"model": keras.Sequential()}, ValueError, "model must be compiled"),
        ({"model": "model"}, TypeError, "model must be a keras.Model; received str"),
    ],
)
def test_bad_input_of_the_range_test(change, error, words):
    x, y = data()
    with pytest.raises(error, match=words):
        schedules.find_learning_rate(**({"model": network("sgd"), "x": x, "y": y} | change))
