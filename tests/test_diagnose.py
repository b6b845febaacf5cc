"""signals.diagnose: every rule fires on a made-up case and is silent on its healthy twin."""

import random

from ch11lib import clinic, datasets, signals, training
from ch11lib.backend import keras, tf
import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

layers = keras.layers
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
rng = np.random.default_rng(0)
Y = rng.permutation(np.repeat(np.arange(4), 60))
X = (rng.normal(size=(4, 10))[Y] * 1.5 + 0.5 * rng.normal(size=(240, 10))).astype("float32")
HISTORY = {"loss": [1.2, 0.4, 0.05], "val_loss": [1.0, 0.5, 0.2]}
LN4 = np.log(4)


def net(*top, scale=1.0, depth=3, norm=False, activation="relu"):
    """Return hidden layers of 16 units with He weights, times `scale`, and an output layer."""
    random.seed(3)  # Keras draws its seeds from here
    he = keras.initializers.VarianceScaling(2 * scale**2, "fan_in", "untruncated_normal")
    stack = [keras.Input((10,))]
    for i in range(depth):
        stack.append(layers.Dense(16, activation, kernel_initializer=he, name=f"h{i}"))
        if norm:
            stack.append(layers.BatchNormalization(name=f"n{i}"))
    return keras.Sequential([*stack, layers.Dense(4, name="out"), *top])


@pytest.fixture(scope="module")
def learned():
    """Return the weights of a net that has learned its task."""
    model = compiled(net())
    training.fit(model, X, Y, epochs=15, seed=0, jit_compile=False)
    return [w.copy() for w in model.get_weights()]


def compiled(model, loss=LOGITS, optimizer=None, steps=100):
    model.compile(optimizer or keras.optimizers.Adam(0.01), loss)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(steps)
    return model


def healthy(learned, *top, **options):
    model = net(*top, **options)
    model.set_weights(learned)
    return model


def rules(model, history=HISTORY, probe=(X, Y)):
    return [finding.rule for finding in signals.diagnose(model, history, probe)]


def test_nothing_is_found_in_a_healthy_run(learned):
    assert rules(compiled(healthy(learned))) == []
    assert rules(compiled(healthy(learned)), {}) == []
    assert rules(compiled(healthy(learned)), HISTORY, (X, Y[:, None])) == []


# ------------------------------------------------------------------ set-up


def test_a_loss_that_does_not_fit(learned):
    probabilities = "sparse_categorical_crossentropy"
    (finding,) = signals.diagnose(compiled(healthy(learned), probabilities), HISTORY, (X, Y))[:1]
    assert finding.rule == "loss does not fit"
    assert "probabilities, but they reach from ~-" in finding.evidence
    assert "from_logits=True" in finding.remedy
    softmax = [layers.Softmax(name=f"s{i}") for i in (1, 2)]
    assert rules(compiled(healthy(learned, softmax[0]), probabilities)) == []
    # Keras looks behind one softmax whatever the loss was told, and warns; no harm is done.
    with pytest.warns(UserWarning, match="does not represent logits"):
        assert rules(compiled(healthy(learned, softmax[0]), LOGITS)) == []
    twice = compiled(healthy(learned, *softmax), probabilities)
    assert rules(twice)[0] == "loss does not fit"


def test_one_hot_labels_and_other_losses(learned):
    one_hot = np.eye(4, dtype="float32")[Y]
    for from_logits in (True, False):
        loss = keras.losses.CategoricalCrossentropy(from_logits=from_logits)
        found = rules(compiled(healthy(learned), loss), HISTORY, (X, one_hot))
        assert ("loss does not fit" in found) != from_logits
    assert rules(compiled(healthy(learned), "mse"), HISTORY, (X, one_hot)) == []


def test_one_output_for_two_classes():
    y = (X[:, 0] > 0).astype(int)
    for activation, from_logits, expected in (
        (None, False, True),
        (None, True, False),
        ("sigmoid", False, False),
    ):
        one = layers.Dense(1, activation)
        model = keras.Sequential([keras.Input((10,)), one])
        one.set_weights([20 * np.eye(10)[:, :1], np.zeros(1)])
        compiled(model, keras.losses.BinaryCrossentropy(from_logits=from_logits))
        assert rules(model, HISTORY, (X, y)) == ["loss does not fit"] * expected


@pytest.mark.parametrize(("factor", "expected"), [(100, 1), (1e-2, 1), (4, 0), (0.25, 0)])
def test_inputs_not_scaled(learned, factor, expected):
    model = healthy(learned)
    model.layers[0].kernel.assign(learned[0] / factor)  # the outputs stay as they are
    assert rules(compiled(model), HISTORY, (X * factor, Y))[:1] == ["inputs not scaled"] * expected


def test_inputs_may_be_scaled_by_the_model(learned):
    model = keras.Sequential([keras.Input((10,)), layers.Rescaling(0.01), *net().layers])
    model.set_weights(learned)
    assert rules(compiled(model), HISTORY, (X * 100, Y)) == []


def test_missing_numbers_in_the_input(learned):
    x = X.copy()
    x[3, 2] = np.nan
    assert rules(compiled(healthy(learned)), HISTORY, (x, Y))[0] == "inputs not scaled"


def test_labels_do_not_fit(learned):
    wrong, guessing = np.random.default_rng(1).permutation(Y), {"val_loss": [LN4, LN4, 1.01 * LN4]}
    model = compiled(net(), LOGITS, keras.optimizers.SGD(1e-3))
    assert rules(model, HISTORY | guessing, (X, wrong)) == ["labels do not fit"]
    assert rules(model, {}, (X, wrong)) == ["labels do not fit"]  # judged by the batch itself
    assert "labels do not fit" not in rules(model, HISTORY | guessing)
    assert "labels do not fit" not in rules(model, HISTORY, (X, wrong))


def test_not_shuffled(learned):
    model, order = compiled(healthy(learned)), np.argsort(Y)
    blocks, off = (X[order], Y[order]), HISTORY | {"loss": [1.2, 0.4, 0.3]}
    assert rules(model, off, blocks) == ["not shuffled"]
    assert rules(model, HISTORY, blocks) == []
    assert rules(model, off) == []
    model.layers[-1].bias.assign([0, 0, 0, 30.0])
    found = rules(model, {"loss": [float(signals.probe(model, X, Y).loss)]}, blocks)
    assert found[0] == "not shuffled"


def test_frozen_at_the_start(learned):
    model = net()
    model.layers[1].trainable = False
    (finding, *_) = signals.diagnose(compiled(model), HISTORY, (X, Y))
    assert finding.rule == "frozen at the start"
    assert finding.evidence.endswith(": h1")
    model.set_weights(learned)  # frozen with trained weights: that is transfer learning
    assert rules(model) == []


# ------------------------------------------------------------------ signals and steps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scale": 6}, ["exploding"]),
        ({"scale": 1 / 6}, ["vanishing"]),
        ({"scale": 1.5}, []),
        ({"activation": "sigmoid", "depth": 2}, []),
    ],
)
def test_signals_of_a_fresh_copy(learned, options, expected):
    def drifts(model):
        return [rule for rule in rules(compiled(model)) if rule in ("exploding", "vanishing")]

    assert drifts(net(**options)) == expected
    if "depth" not in options:
        assert drifts(healthy(learned, **options)) == []  # it has learned its task all the same


def test_gradients_vanish_in_deep_sigmoid_nets():
    (finding, *_) = signals.diagnose(compiled(net(depth=8, activation="sigmoid")), HISTORY, (X, Y))
    assert finding.rule == "vanishing"
    assert "gradient" in finding.evidence


def test_width_alone_is_no_drift():
    random.seed(0)
    stack = [layers.Dense(n, "relu", kernel_initializer="he_normal") for n in (400, 20, 400, 20)]
    model = keras.Sequential([keras.Input((10,)), *stack, layers.Dense(4)])
    assert not {"exploding", "vanishing"} & {*rules(compiled(model))}


def test_stale_statistics():
    model = compiled(net(norm=True), LOGITS, keras.optimizers.SGD(1e-3))
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    model(X, training=True)  # the statistics are those of the batch
    assert "stale statistics" not in rules(model)
    mean = model.get_layer("n2").moving_mean
    mean.assign(mean + 3.0)
    assert rules(model)[0] == "stale statistics"


def test_rate_too_high(learned):
    model = healthy(learned)
    model.layers[1].kernel.assign(np.full((16, 16), np.nan))
    (finding,) = signals.diagnose(compiled(model), {"loss": []}, (X, Y))
    assert finding.rule == "rate too high"
    assert finding.evidence == "not finite: a signal in layer h1"
    model = healthy(learned)
    model.layers[-1].bias.assign([np.inf, 0, 0, 0])  # and no warning of NumPy's
    assert rules(compiled(model))[0] == "rate too high"

    start = net()  # nothing learned
    for losses, rate, expected in (
        ([1.6, 1.2, 1.5], 1e-4, "rose from ~1.2 to"),
        ([4.0, 2.0, 1.7], 1e-4, "an untrained copy has"),
        ([1.8, 1.7, 1.6], 0.1, "one step still changes"),
    ):
        sgd = keras.optimizers.SGD(rate) if rate < 0.1 else keras.optimizers.Adam(rate)
        (finding,) = signals.diagnose(compiled(start, LOGITS, sgd), {"loss": losses}, (X, Y))
        assert finding.rule == "rate too high"
        assert expected in finding.evidence
        assert rules(compiled(healthy(learned), LOGITS, sgd), {"loss": losses}) == []


@pytest.mark.parametrize(("dead", "expected"), [(9, ["dead units"]), (8, [])])
def test_dead_units(learned, dead, expected):
    model = net(activation="elu")  # which has none of its own
    model.get_layer("h1").bias.assign(np.where(np.arange(16) < dead, -100.0, 0.0))
    found = rules(compiled(model, LOGITS, keras.optimizers.SGD(0.01)))
    assert [rule for rule in found if rule == "dead units"] == expected
    model = healthy(learned)
    model.get_layer("h2").bias.assign(np.full(16, -100.0))
    model.layers[-1].bias.assign([0, 0, 0, 0])
    assert rules(compiled(model))[0] == "dead units"


def test_steps_too_small(learned):
    fading = {"loss": [1.6, 1.5, 1.5], "learning_rate": [0.1, 1e-3, 1e-6]}
    tiny = keras.optimizers.SGD(1e-6)
    (finding,) = signals.diagnose(compiled(net(), LOGITS, tiny), fading, (X, Y))
    assert finding.rule == "steps too small"
    assert "the rate fell from ~0.10 to ~1.0e-06" in finding.evidence
    assert rules(compiled(healthy(learned), LOGITS, tiny), fading) == []
    # Many small steps are not too small.
    patient_one = compiled(net(), LOGITS, keras.optimizers.SGD(1e-6), steps=10**8)
    assert rules(patient_one, {"loss": [1.6]}) == ["underfitting"]


def test_overfitting_and_underfitting(learned):
    model = compiled(healthy(learned))
    assert rules(model, {"val_loss": [1.0, 0.5, np.nan, 0.5 + 0.12 * LN4]}) == ["overfitting"]
    assert rules(model, {"val_loss": [1.0, 0.5, np.nan, 0.5 + 0.08 * LN4]}) == []
    assert rules(compiled(net(), LOGITS, keras.optimizers.SGD(1e-3)), {}) == ["underfitting"]


# ------------------------------------------------------------------ looking without touching


def test_nothing_is_changed():
    def trained(ask):
        keras.utils.set_random_seed(5)
        stack = [layers.Dense(16, "relu"), layers.BatchNormalization(), layers.Dropout(0.3)]
        model = keras.Sequential([keras.Input((10,)), *stack, layers.Dense(4)])
        model.compile("adam", LOGITS, metrics=["accuracy"])
        history = model.fit(X, Y, epochs=1, verbose=0)
        logs = {k: [*v] for k, v in history.history.items()}
        state = [v.numpy() for v in (*model.variables, *model.optimizer.variables)]
        metrics = [v.numpy() for v in model.metrics_variables]
        if ask:
            assert signals.diagnose(model, history, (X, Y))
        for before, variable in zip(
            state + metrics,
            [*model.variables, *model.optimizer.variables, *model.metrics_variables],
            strict=True,
        ):
            np.testing.assert_array_equal(before, variable.numpy())
        assert logs == history.history
        draws = [random.random(), np.random.random(), float(tf.random.normal(()))]  # noqa: NPY002
        draws.append(float(keras.random.normal(())))
        names = layers.Dense(1).name, keras.optimizers.Adam().name
        after = model.fit(X, Y, epochs=1, verbose=0).history
        return draws, names[1], after, [w.tolist() for w in model.get_weights()]

    asked, not_asked = trained(True), trained(False)
    assert asked[0] == not_asked[0]
    assert asked[2:] == not_asked[2:]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "net"}, TypeError, "model must be a keras.Model"),
        ({"history": [1.0]}, TypeError, "history must be a History or a mapping, got list"),
        ({"probe": X}, TypeError, "probe must be a pair"),
        ({"probe": (X, Y[:5])}, ValueError, "same number of examples"),
        ({"probe": (X, Y + 0.5)}, ValueError, "y must hold class numbers"),
        ({"probe": (X, 0 * Y)}, ValueError, "two classes or more"),
    ],
)
def test_arguments_are_checked(change, error, message):
    good = {"model": compiled(net()), "history": HISTORY, "probe": (X, Y)}
    with pytest.raises(error, match=message):
        signals.diagnose(**(good | change))


def test_models_that_are_no_classifiers_are_refused():
    random.seed(0)
    inputs = keras.Input((10,))
    two = keras.Model(inputs, [layers.Dense(4)(inputs), layers.Dense(4)(inputs)])
    two.compile("sgd", [LOGITS, LOGITS])
    with pytest.raises((TypeError, ValueError), match=r"y|output"):
        signals.diagnose(two, HISTORY, (X, Y))
    few = compiled(keras.Sequential([keras.Input((10,)), layers.Dense(3)]), "mse")
    with pytest.raises(ValueError, match="y must be below 3"):
        signals.diagnose(few, HISTORY, (X, np.stack([Y] * 1, axis=1)))


# ------------------------------------------------------------------ the clinic


@pytest.fixture(scope="module")
def images():
    return datasets.load_fashion_mnist().take(1500, 200).standardized().halved().flattened()


def test_every_disease_has_its_rule():
    assert set(clinic.DISEASES) == set(signals._RULES)


def test_patients(images):
    well, sick = clinic.patients([("healthy", 1002), ("frozen at the start", 1002)], images)
    assert rules(*well[1:]) == []
    assert rules(*sick[1:]) == ["frozen at the start"]
    again = clinic.patient("healthy", 1002, images)
    assert well.history == again.history
    np.testing.assert_array_equal(well.probe[0], again.probe[0])


def test_arguments_of_patients_are_checked(images):
    with pytest.raises(ValueError, match="disease must be"):
        clinic.patient("flu", 0, images)
    with pytest.raises(ValueError, match="data must be standardized"):
        clinic.patient("healthy", 0, datasets.load_fashion_mnist())
