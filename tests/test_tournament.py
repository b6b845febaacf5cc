"""Many runs at once against the same runs one by one, and the judges against closed forms."""

from functools import partial

from ch11lib import tournament, training
from ch11lib.backend import keras, tf
import numpy as np
import pytest

RATES = [0.003, 0.03]
ENTRANTS = {
    "nesterov": partial(keras.optimizers.SGD, momentum=0.9, nesterov=True),
    "adagrad": keras.optimizers.Adagrad,
    "nadam": keras.optimizers.Nadam,
    "adamw": keras.optimizers.AdamW,
}


@pytest.fixture(scope="module")
def nets():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 4)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    return tournament.DenseRows((4, 6, 5, 2), x, y, seeds=[3, 4], rates=RATES, steps=8), x, y


def keras_model(nets, row, make):
    """Return the Keras model whose weights are one row of the start."""
    layers = [keras.layers.Dense(6, "relu"), keras.layers.Dense(5, "relu"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    sizes = np.cumsum([w.size for w in model.get_weights()])[:-1]
    parts = np.split(nets.theta[row], sizes)
    model.set_weights([p.reshape(w.shape) for p, w in zip(parts, model.get_weights(), strict=True)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(make(learning_rate=float(nets.rates[row])), loss)
    return model


@pytest.mark.parametrize("name", ENTRANTS)
def test_a_row_is_the_run_of_a_keras_model(name, nets):
    rows, x, y = nets
    run = tournament.train_rows(
        {name: ENTRANTS[name]}, rows.gradient, rows.theta, rows.rates, steps=6
    )[name]
    for row, seed in ((1, 4), (2, 3)):  # rates one after another, all seeds of each
        model = keras_model(rows, row, ENTRANTS[name])
        batches = np.concatenate([training.batch_order(96, seed, epoch) for epoch in range(2)])
        for step, batch in enumerate(batches.reshape(6, 32)):
            loss = model.train_on_batch(x[batch], y[batch])
            assert run.losses[step, row] == pytest.approx(float(loss), rel=1e-4)
        end = np.concatenate([w.ravel() for w in model.get_weights()])
        np.testing.assert_allclose(run.theta[row], end, atol=1e-4)
        right = np.mean(np.argmax(model(x), axis=1) == y)
        assert rows.accuracy(run.theta, x, y)[divmod(row, 2)] == pytest.approx(right)


def test_divergence_stays_in_its_row_and_is_silent(recwarn):
    def gradient(theta, step):
        return tf.reduce_sum(theta**2, axis=1), 2 * theta

    run = tournament.train_rows(
        {"sgd": keras.optimizers.SGD}, gradient, np.ones((2, 3)), rates=[0.1, 1e3], steps=20
    )["sgd"]
    np.testing.assert_allclose(run.theta[0], 0.8**20, rtol=1e-5)
    assert not np.isfinite(run.theta[1]).any()
    assert not recwarn.list


def test_a_diverged_network_has_accuracy_0(nets):
    rows, x, y = nets
    theta = rows.theta.copy()
    theta[3, 0] = np.nan
    accuracy = rows.accuracy(theta, x, y)
    assert accuracy[1, 1] == 0
    assert (accuracy.ravel()[:3] > 0).all()


def test_steps_to_target():
    losses = np.array([[5.0, 5.0, np.nan], [1.0, 5.0, np.nan], [1.0, 5.0, 0.0], [9.0, 5.0, 0.0]])
    assert tournament.steps_to_target(losses, 2.0).tolist() == [2, np.inf, 3]
    assert tournament.steps_to_target(losses, 2.0, window=2).tolist() == [3, np.inf, 4]
    for window in (0, 5):
        with pytest.raises(ValueError, match="window must"):
            tournament.steps_to_target(losses, 2.0, window)


def test_rank_intervals():
    rng = np.random.default_rng(0)
    apart = np.array([[1.0], [3.0], [2.0]]) + rng.normal(0, 1e-3, (3, 5))
    assert tournament.rank_intervals(apart, rng).tolist() == [[3] * 3, [1] * 3, [2] * 3]
    alike = tournament.rank_intervals(rng.normal(size=(2, 6)), rng)
    assert (alike[:, 0] == 1).all()
    assert (alike[:, 2] == 2).all()
    never = tournament.rank_intervals([[-np.inf, -np.inf], [-5.0, -6.0]], rng)
    assert never.tolist() == [[2] * 3, [1] * 3]


def test_good_decades_of_a_triangle_and_of_a_plateau():
    rates = np.geomspace(1e-4, 1, 5)
    assert tournament.good_decades(rates, [0, 0, 1, 0, 0], 0.25) == pytest.approx(0.5, abs=0.01)
    assert tournament.good_decades(rates, np.ones(5), 0.1) == pytest.approx(4)


def test_bad_input_is_named(nets):
    rows, x, y = nets

    def train(theta=rows.theta, rates=rows.rates, steps=2, optimizers=ENTRANTS):
        return tournament.train_rows(optimizers, rows.gradient, theta, rates, steps)

    def make(sizes=(4, 2), y=y, rates=RATES, seeds=(1,), steps=2, **more):
        return tournament.DenseRows(sizes, x, y, seeds=seeds, rates=rates, steps=steps, **more)

    rng = np.random.default_rng(0)
    for name, call in (
        ("optimizers", lambda: train(optimizers={})),
        ("theta", lambda: train(theta=rows.theta[0])),
        ("rates", lambda: train(rates=rows.rates[:-1])),
        ("steps", lambda: train(steps=0)),
        ("sizes", lambda: make(sizes=(4,))),
        ("sizes", lambda: make(sizes=(4, 0, 2))),
        ("x", lambda: make(sizes=(5, 2))),
        ("y", lambda: make(y=y[:-1])),
        ("rates", lambda: make(rates=[0.1, -0.1])),
        ("rates", lambda: make(rates=[])),
        ("seeds", lambda: make(seeds=())),
        ("steps", lambda: make(steps=0)),
        ("batch_size", lambda: make(batch_size=97)),
        ("batch_size", lambda: make(batch_size=0)),
        ("scores", lambda: tournament.rank_intervals([1.0, 2.0], rng)),
        ("scores", lambda: tournament.rank_intervals([[1.0, np.nan]], rng)),
        ("level", lambda: tournament.rank_intervals([[1.0, 2.0]], rng, level=95)),
        ("rates", lambda: tournament.good_decades([0.1, 0.01], [1, 2], 0.1)),
        ("rates", lambda: tournament.good_decades([0.0, 0.1], [1, 2], 0.1)),
        ("scores", lambda: tournament.good_decades([0.1, 1.0], [1, 2, 3], 0.1)),
    ):
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            call()
