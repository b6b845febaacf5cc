"""Fleets against Keras models with the same weights, and against the definitions in `signals`."""

from ch11lib import fleets, signals, training
from ch11lib.backend import keras, tf
from ch11lib.fleets import Fleet
import numpy as np
import pytest

RNG = np.random.default_rng(0)
X = RNG.standard_normal((96, 12)).astype("float32")
Y = (X[:, :3].argmax(axis=1)).astype("int32")
SMALL = {"inputs": 12, "classes": 3, "rates": [0.1]}
KINDS = {
    "plain": {},
    "tanh": {"activation": "tanh", "gain": 1.0},
    "own activation": {"activation": lambda z: tf.maximum(0.1 * z, z)},
    "batch norm": {"norm": "batch"},
    "batch norm after": {"norm": "batch", "after": True},
    "layer norm": {"norm": "layer"},
    "skip": {"skip": True},
    "skip and batch norm": {"skip": True, "norm": "batch"},
}


@keras.saving.register_keras_serializable("tests")
class Gate(keras.layers.Layer):
    """Multiplies each unit by a learned number that starts at 0."""

    def build(self, shape):
        self.gate = self.add_weight(shape=(shape[-1],), initializer="zeros")

    def call(self, h):
        return self.gate * h


def keras_twin(
    seed, depth=4, width=6, activation="relu", gain=2.0, norm=None, after=False, skip=False
):
    """Return the Keras model that a network of a fleet must equal."""
    rng = np.random.default_rng(seed)
    shapes = [(12, width), (depth - 1, width, width), (width, 3)]
    draws = [rng.standard_normal(shape) / np.sqrt(shape[-2]) for shape in shapes]
    hidden = [gain**0.5 * w for w in (draws[0], *draws[1])]
    make = {"batch": keras.layers.BatchNormalization, "layer": keras.layers.LayerNormalization}
    options = {"epsilon": 1e-3} | ({"momentum": 0.9} if norm == "batch" else {})
    h = inputs = keras.Input((12,))
    for i, w in enumerate(hidden):
        before = h
        dense = keras.layers.Dense(width, use_bias=norm is None)
        parts = [keras.layers.Activation(activation)]
        if norm:
            parts.insert(1 if after else 0, make[norm](**options))
        for layer in (dense, *parts):
            h = layer(h)
        dense.kernel.assign(w)
        if skip and i > 0:
            h = before + Gate()(h)
    output = keras.layers.Dense(3)
    model = keras.Model(inputs, output(h))
    output.kernel.assign(draws[2])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    return model


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_network_trains_like_its_keras_model(kind):
    fleet = Fleet(4, 6, seeds=[3, 8], **SMALL, **kind)
    losses = fleet.train(X, Y, steps=12, batch_size=16)
    found = fleet.evaluate(X, Y)
    options = {k: tf.nn.tanh if v == "tanh" else v for k, v in kind.items()}
    for i, seed in enumerate([3, 8]):
        twin = keras_twin(seed, **options)
        order = np.concatenate([training.batch_order(96, seed, e) for e in range(2)])
        expected = []
        for rows in order.reshape(12, 16):
            with tf.GradientTape() as tape:
                loss = twin.loss(Y[rows], twin(X[rows], training=True))
            gradients = tape.gradient(loss, twin.trainable_variables)
            twin.optimizer.apply(gradients, twin.trainable_variables)
            expected.append(float(loss))
        np.testing.assert_allclose(losses[:, i], expected, rtol=2e-5, atol=1e-6)
        loss, accuracy = twin.evaluate(X, Y, verbose=0)
        assert found.loss[i] == pytest.approx(loss, rel=1e-4)
        assert found.accuracy[i] == pytest.approx(accuracy, abs=1e-6)
        outputs = fleet.outputs(X)[i]
        np.testing.assert_allclose(outputs, twin.predict(X, verbose=0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("adam", [False, True])
def test_rates_and_momenta_of_each_step(adam):
    """Keras's optimizer, given the rate and the momentum of each step by hand."""

    def momentum(t):
        return 0.95 - 0.3 * t / 12

    factors = np.array([[1.0, 2.0]]) / (1 + np.arange(12))[:, None]  # per step and network
    options = {"adam": True} if adam else {"inertia": momentum}
    fleet = Fleet(4, 6, seeds=[3, 8], schedule=lambda t: factors[t], **options, **SMALL)
    losses = np.concatenate([fleet.train(X, Y, steps=n, batch_size=16) for n in (5, 7)])
    for i, seed in enumerate([3, 8]):
        twin = keras_twin(seed)
        twin.optimizer = keras.optimizers.Adam() if adam else keras.optimizers.SGD(momentum=0.9)
        order = np.concatenate([training.batch_order(96, seed, e) for e in range(2)])
        expected = []
        for t, rows in enumerate(order.reshape(12, 16)):
            with tf.GradientTape() as tape:
                loss = twin.loss(Y[rows], twin(X[rows], training=True))
            gradients = tape.gradient(loss, twin.trainable_variables)
            twin.optimizer.learning_rate = 0.1 * factors[t, i]
            if not adam:
                twin.optimizer.momentum = momentum(t)
            twin.optimizer.apply(gradients, twin.trainable_variables)
            expected.append(float(loss))
        np.testing.assert_allclose(losses[:, i], expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"inertia": 0.9}, {"adam": True}], ids=repr)
def test_factors_of_the_layers(how):
    """Keras's optimizer, of whose step every layer makes its share: for all three the same."""
    factors = [0.0, 0.1, 0.5, 2.0, 1.0]
    fleet = Fleet(4, 6, seeds=[3], factors=factors, **how, **SMALL)
    losses = fleet.train(X, Y, steps=6, batch_size=16)[:, 0]
    twin = keras_twin(3)
    momentum = how.get("inertia", 0.0)
    adam = keras.optimizers.Adam(0.1)
    twin.optimizer = adam if "adam" in how else keras.optimizers.SGD(0.1, momentum=momentum)
    expected = []
    for rows in training.batch_order(96, 3, 0).reshape(6, 16):
        before = [v.numpy() for v in twin.trainable_variables]
        with tf.GradientTape() as tape:
            loss = twin.loss(Y[rows], twin(X[rows], training=True))
        gradients = tape.gradient(loss, twin.trainable_variables)
        twin.optimizer.apply(gradients, twin.trainable_variables)
        for i, (old, v) in enumerate(zip(before, twin.trainable_variables, strict=True)):
            v.assign(old + factors[i // 2] * (v.numpy() - old))
        expected.append(float(loss))
    np.testing.assert_allclose(losses, expected, rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(fleet.kernels()[0][0], before[0])


def test_a_schedule_must_fit():
    fleet = Fleet(2, 5, seeds=[4], schedule=lambda t: np.ones(3), **SMALL)
    with pytest.raises(ValueError, match=r"received shape \(3,\) for 12 steps and 1 networks"):
        fleet.train(X, Y, steps=12, batch_size=16)


def test_networks_do_not_influence_each_other():
    many = Fleet(
        3, 5, seeds=[1, 2], scales=[0.5, 1.0], norm="batch", **SMALL | {"rates": [0.1, 50]}
    )
    many.train(X, Y, steps=8, batch_size=16)
    alone = Fleet(3, 5, seeds=[2], scales=[0.5], norm="batch", **SMALL)
    alone.train(X, Y, steps=8, batch_size=16)
    which = many.settings.query("seed == 2 and scale == 0.5 and rate == 0.1").index[0]
    np.testing.assert_allclose(many.outputs(X)[which], alone.outputs(X)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "batch norm", "skip"])
def test_any_number_of_threads_trains_the_same_networks(monkeypatch, kind):
    found = []
    for cores in (1, 4):  # all at once, or in three parts of two
        monkeypatch.setattr(fleets.joblib, "cpu_count", lambda cores=cores: cores)
        fleet = Fleet(3, 6, seeds=range(5), **SMALL, **KINDS[kind])
        fleet.mask([np.abs(w) > 0.1 for w in fleet.kernels()])
        found.append([fleet.train(X, Y, steps=30, batch_size=16), *fleet.kernels()])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_an_interruption_leaves_the_networks_as_they_were(monkeypatch):
    fleet, twin = (Fleet(2, 6, seeds=range(4), **SMALL) for _ in range(2))
    real, calls = fleets._compiled_steps(fleet._kind), []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fleets, "_compiled_steps", lambda kind: interrupted)
        with pytest.raises(KeyboardInterrupt):
            fleet.train(X, Y, steps=1_000, batch_size=32)
    assert len(calls) < 1_000 / fleets._STEPS_AT_ONCE  # the other thread has stopped, too
    losses = [f.train(X, Y, steps=30, batch_size=32) for f in (fleet, twin)]
    np.testing.assert_array_equal(*losses)


def test_training_goes_on_where_it_ended():
    at_once, in_parts = (Fleet(2, 5, seeds=[4], norm="batch", **SMALL) for _ in range(2))
    losses = at_once.train(X, Y, steps=15, batch_size=20)
    parts = [in_parts.train(X, Y, steps=n, batch_size=20) for n in (1, 6, 8)]
    np.testing.assert_array_equal(losses, np.concatenate(parts))
    assert losses.shape == (15, 1)


def test_statistics_over_groups():
    fleet = Fleet(1, 5, seeds=[0], norm="batch", group=8, **SMALL)
    whole = Fleet(1, 5, seeds=[0], norm="batch", **SMALL)
    parts = [whole.outputs(X[i : i + 8], training=True) for i in range(0, 96, 8)]
    np.testing.assert_allclose(fleet.outputs(X, training=True), np.concatenate(parts, 1), rtol=1e-4)
    # Averaged over the groups, the means are those of the whole batch; the variances are less.
    for each in (fleet, whole):
        each.train(X[:16], Y[:16], steps=1, batch_size=16)
    np.testing.assert_allclose(fleet._moving["first"][0], whole._moving["first"][0], atol=1e-6)
    assert np.all(fleet._moving["first"][1] < whole._moving["first"][1])


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_error_signals_are_those_of_the_definition(scale):
    fleet = Fleet(5, 6, seeds=[7, 9], scales=[scale], **SMALL)
    weights = fleet._parameters
    for i, found in enumerate(fleet.error_signals(X, Y)):
        hidden = [weights["first"]["w"][i], *weights["hidden"]["w"][:, i], weights["last"]["w"][i]]
        model = keras.Sequential([keras.Input((12,))])
        for w in hidden[:-1]:
            model.add(keras.layers.Dense(w.shape[1], "relu"))
        model.add(keras.layers.Dense(3))
        model.set_weights([a for w in hidden for a in (w, np.zeros(w.shape[1]))])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss)
        layers = signals.probe(model, X, Y).layers[:-1]
        expected = [layer.dz.rms for layer in layers]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("kind", ["plain", "batch norm", "layer norm"])
def test_treating_a_part_at_a_time_changes_nothing(monkeypatch, depth, kind):
    fleet = Fleet(depth, 6, seeds=[7, 9, 11], **SMALL, **KINDS[kind])
    whole = fleet.evaluate(X, Y), fleet.error_signals(X, Y)
    monkeypatch.setattr(fleets, "_ACTIVATIONS_AT_ONCE", 100)
    np.testing.assert_allclose(fleet.evaluate(X, Y), whole[0], rtol=1e-5)
    np.testing.assert_allclose(fleet.error_signals(X, Y), whole[1], rtol=1e-5)
    assert whole[1].shape == (3, depth)
    assert (whole[1] > 0).all()


def test_layers_start_with_the_announced_scale():
    fleet = Fleet(3, 200, seeds=[0], scales=[1.0, 2.0], gain=2.0, **SMALL)
    stds = fleet._parameters["hidden"]["w"].numpy().std(axis=(0, 2, 3))
    np.testing.assert_allclose(stds, [0.1, 0.2], rtol=0.02)
    last = fleet._parameters["last"]["w"].numpy()
    np.testing.assert_array_equal(last[0], last[1])


def test_a_network_that_diverged_counts_as_the_worst():
    fleet = Fleet(3, 20, seeds=[0], **SMALL | {"rates": [0.1, 1e6]})
    fleet.train(X, Y, steps=20)
    fine, lost = fleet.evaluate(X, Y).itertuples()
    assert np.isfinite(fine.loss)
    assert fine.accuracy > 0.5
    assert (lost.loss, lost.accuracy) == (np.inf, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "group"}, "norm must be"),
        ({"activation": "reluu"}, "activation must be"),
        ({"depth": 0}, "depth must be at least 1, received 0"),
        ({"seeds": []}, "each network needs a seed"),
        ({"factors": (1, 0.5)}, r"each of the 3 layers, received \(1, 0.5\)"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        Fleet(**{"depth": 2, "width": 3, "seeds": [0], **SMALL, **changes})


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
def test_any_number_of_networks_can_train_at_once(at_once):
    pair, whole = (Fleet(2, 5, seeds=range(5), norm="batch", **SMALL) for _ in range(2))
    losses = pair.train(X, Y, steps=5, batch_size=16, at_once=at_once)
    expected = whole.train(X, Y, steps=5, batch_size=16)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(pair.outputs(X), whole.outputs(X), rtol=1e-3, atol=1e-5)


def test_bad_batch_sizes():
    fleet = Fleet(1, 3, seeds=[0], norm="batch", group=3, **SMALL)
    for batch_size in (97, 16):
        with pytest.raises(ValueError, match=f"batch_size must be .* received {batch_size}"):
            fleet.train(X, Y, steps=1, batch_size=batch_size)
    with pytest.raises(ValueError, match="steps must be at least 1, received 0"):
        fleet.train(X, Y, steps=0)
    with pytest.raises(ValueError, match="at_once must be at least 1, received -2"):
        fleet.train(X, Y, steps=1, batch_size=6, at_once=-2)


@pytest.mark.parametrize("end", [None, -2, 2, 0], ids=["all", "hidden", "lowest", "none"])
@pytest.mark.parametrize("depth", [1, 3])
def test_fleets_start_from_the_weights_of_keras_models(depth, end):
    fleet = Fleet(depth, 6, seeds=[3, 8], **SMALL | {"rates": [0.1, 0.2]})
    drawn = fleet.kernels()
    twins = {seed: keras_twin(seed + 50, depth=depth) for seed in (3, 8)}
    for twin in twins.values():
        twin.set_weights([w + 0.1 for w in twin.get_weights()])
    fleet.start_from({seed: twin.get_weights()[:end] for seed, twin in twins.items()})
    for i, seed in enumerate(fleet.settings.seed):
        twin = twins[seed]
        fresh = [w for kernel in drawn for w in (kernel[i], np.zeros(kernel.shape[2]))]
        given = twin.get_weights()[:end]
        twin.set_weights([*given, *fresh[len(given) :]])
        expected = twin.predict(X, verbose=0)
        np.testing.assert_allclose(fleet.outputs(X)[i], expected, rtol=1e-4, atol=1e-5)


def test_every_seed_can_have_data_of_its_own():
    own = {1: (X[:32], Y[:32]), 2: (X[40:72], Y[40:72])}
    x, y = ({seed: part[i] for seed, part in own.items()} for i in (0, 1))
    both = Fleet(2, 5, seeds=[1, 2], **SMALL)
    losses = [both.train(x, y, steps=n, batch_size=16) for n in (3, 2)]  # goes on within an epoch
    for i, seed in enumerate(own):
        alone = Fleet(2, 5, seeds=[seed], **SMALL)
        expected = alone.train(*own[seed], steps=5, batch_size=16)
        np.testing.assert_allclose(np.concatenate(losses)[:, i], expected[:, 0], rtol=1e-5)


def test_every_seed_can_learn_from_rows_of_its_own():
    rows = {1: np.arange(40, 72), 2: np.resize([5, 7, 9], 32)}
    both = Fleet(2, 5, seeds=[1, 2], **SMALL)
    losses = both.train(X, Y, steps=5, batch_size=16, rows=rows)
    copies = Fleet(2, 5, seeds=[1, 2], **SMALL)
    x, y = ({seed: part[own] for seed, own in rows.items()} for part in (X, Y))
    np.testing.assert_array_equal(losses, copies.train(x, y, steps=5, batch_size=16))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f: f.start_from({1: []}), "every seed of the fleet, 0 is missing"),
        (lambda f: f.start_from({0: [np.ones((12, 5))]}), r"received \[\(12, 5\)\] for seed 0"),
        (
            lambda f: f.start_from({0: [np.ones((5, 5)), np.ones(5)]}),
            r"\[\(5, 5\), \(5,\)\] for seed 0",
        ),
        (lambda f: f.train({0: X}, Y, steps=1), "both be arrays or both mappings"),
        (lambda f: f.train(X, Y, steps=1, rows={1: [0]}), "received None for seed 0"),
        (lambda f: f.train(X, Y, steps=1, rows={0: [0, 96]}), r"below 96 .* \[0, 96\] for seed 0"),
        (lambda f: f.train({1: X}, {0: Y}, steps=1), r"every seed of the fleet, \[0\]"),
        (lambda f: f.train({0: X}, {0: Y[:9]}, steps=1), "equally many examples"),
    ],
)
def test_wrong_weights_and_data(call, words):
    with pytest.raises(ValueError, match=words):
        call(Fleet(2, 5, seeds=[0], **SMALL))


def test_start_from_is_for_plain_layers():
    with pytest.raises(ValueError, match="no norm, no skip"):
        Fleet(2, 5, seeds=[0], norm="batch", **SMALL).start_from({})


def test_fleets_of_many_shapes_are_no_reason_to_warn(caplog):
    for n in range(1, 8):
        Fleet(1, 3, seeds=range(n), **SMALL).train(X, Y, steps=2)
    assert caplog.records == []


def test_clear_programs_forgets_what_fleets_have_compiled():
    fleet = Fleet(1, 4, seeds=[0], rates=[0.1], inputs=3, classes=2)
    fleet.train(np.ones((8, 3)), np.zeros(8), steps=1, batch_size=4)
    assert fleets._compiled_steps.cache_info().currsize > 0
    training.clear_programs()
    assert fleets._compiled_steps.cache_info().currsize == 0
    fleet.train(np.ones((8, 3)), np.zeros(8), steps=1, batch_size=4)
