"""Sparsity: closed forms, brute force, Keras, SciPy, and the Model Optimization Toolkit."""

import gzip
import itertools
import math

from ch11lib import sparsity, training
from ch11lib.backend import keras, tf
from ch11lib.fleets import Fleet
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
import numpy as np
import pytest
from scipy import optimize

layers = keras.layers
saves = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def _tidy():
    yield
    training.clear_programs()


def data(n=96):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 6)).astype("float32")
    return x, (x[:, :1] * x[:, 1:2] - x[:, 2:3]).astype("float32")


def network(optimizer="sgd", **compile_options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(20, "relu", name="one"),
            layers.Dense(10, "relu", name="two"),
            layers.Dense(1, name="three"),
        ],
        name="net",
    )
    model.compile(optimizer, "mse", **compile_options)
    return model


SIZES = (120, 200, 10)


def weights_of(model):
    return [v.numpy() for v in sparsity.kernels(model)]


def zeros_of(model):
    return [w == 0 for w in weights_of(model)]


def counts_of(model):
    return [int(zero.sum()) for zero in zeros_of(model)]


def fit(model, how, epochs=3, callbacks=()):
    """Train for three steps an epoch."""
    x, y = data()
    if how == "model.fit":
        return model.fit(x, y, epochs=epochs, verbose=0, shuffle=False, callbacks=list(callbacks))
    history = training.fit(
        model, x, y, epochs=epochs, shuffle=False, callbacks=callbacks, jit_compile=how == "XLA"
    )
    assert history.engine == "graph"
    return history


class EachStep(keras.callbacks.Callback):
    """Look at the zeros that a step begins with."""

    def on_train_batch_begin(self, batch, logs=None):
        self.seen = [*getattr(self, "seen", []), zeros_of(self.model)]


# ----------------------------------------------------------------------------- definitions


def test_polynomial_decay_in_closed_form():
    t = np.arange(200)
    ours = sparsity.polynomial_decay(t, 0.25, 0.75, 20, 120)
    np.testing.assert_allclose(ours[:21], 0.25)
    np.testing.assert_allclose(ours[120:], 0.75)
    np.testing.assert_allclose(ours[70], 0.75 - 0.5 * 0.5**3)
    # The rate at which weights go falls like the square of the time that is left.
    np.testing.assert_allclose(
        np.gradient(ours)[21:119], 0.5 * 3 * (1 - (t[21:119] - 20) / 100) ** 2 / 100, atol=1e-6
    )
    linear = sparsity.polynomial_decay(t, 0.0, 0.5, 0, 100, power=1)
    np.testing.assert_allclose(linear[:101], t[:101] / 200)
    assert sparsity.polynomial_decay(70, 0.25, 0.75, 20, 120) == ours[70]


finite = st.floats(-10, 10, width=32)


@settings(deadline=None)
@given(
    st.lists(
        arrays(np.float32, st.sampled_from([(1,), (3, 2), (2, 2, 2)]), elements=finite),
        min_size=1,
        max_size=3,
    ),
    st.floats(0, 1, exclude_max=True),
)
def test_masks_by_brute_force(weights, s):
    masks = sparsity.magnitude_masks(weights, s)
    assert [m.shape for m in masks] == [w.shape for w in weights]
    keep = np.concatenate([m.ravel() for m in masks])
    size = np.abs(np.concatenate([w.ravel() for w in weights]))
    assert keep.sum() == round(size.size * (1 - s))
    if 0 < keep.sum() < size.size:
        assert size[keep].min() >= size[~keep].max()
        ties = keep[size == size[keep].min()]
        assert (np.diff(ties.astype(int)) <= 0).all()  # the first ones stay


@settings(max_examples=30)
@given(arrays(np.float64, 4, elements=st.floats(-3, 3)), st.floats(0, 2))
def test_proximal_step_minimizes(w, threshold):
    v = sparsity.proximal_l1(w, threshold)
    for wi, vi in zip(w, v, strict=True):

        def objective(u, wi=wi):
            return (u - wi) ** 2 / 2 + threshold * abs(u)

        best = min(
            optimize.minimize_scalar(objective, bounds=(-4, 4), method="bounded").fun, objective(0)
        )
        assert objective(vi) <= best + 1e-8
    assert (v[np.abs(w) <= threshold] == 0).all()


def test_proximal_step_keeps_the_type():
    assert sparsity.proximal_l1(np.float32([1, -2]), 0.1).dtype == np.float32
    assert sparsity.proximal_l1([1, -3], 1).tolist() == [0.0, -2.0]


# ------------------------------------------------------------------------ zeros in a model


def test_kernels_of_layers_of_many_kinds():
    inputs = keras.Input((8, 8, 4))
    h = layers.Conv2D(3, 3)(inputs)
    h = layers.SeparableConv2D(5, 2)(layers.DepthwiseConv2D(2)(h))
    h = layers.BatchNormalization()(layers.Reshape((-1, 5))(h))
    h = layers.MultiHeadAttention(2, 3)(layers.LayerNormalization()(h), h)
    h = layers.GRU(4)(h)
    model = keras.Model(inputs, layers.PReLU()(layers.Dense(2)(h)))
    names = [v.path.split("/")[-1] for v in sparsity.kernels(model)]
    assert names == [
        *("kernel", "kernel", "depthwise_kernel", "pointwise_kernel"),
        *("kernel",) * 4,
        *("kernel", "recurrent_kernel", "kernel"),
    ]
    embedding = layers.Embedding(3, 2)
    embedding.build(None)
    assert [v.name for v in sparsity.kernels(embedding)] == ["embeddings"]


def test_zeros_are_counted_exactly():
    model = network()
    assert sparsity.fraction_zero(model) == 0  # although biases are zero
    kernel = model.layers[0].kernel.numpy()
    kernel[0, :7], kernel[1, 0], kernel[2, 0] = 0, -0.0, 1e-30
    model.layers[0].kernel.assign(kernel)
    assert sparsity.fraction_zero(model) == 8 / (120 + 200 + 10)
    assert sparsity.fraction_zero(model.layers[0]) == 8 / 120


def test_sizes():
    model = network()
    raw = b"".join(w.astype("float32").tobytes() for w in model.get_weights())
    before = sparsity.compressed_size(model)
    assert before == (4 * model.count_params(), len(gzip.compress(raw, mtime=0)))
    sparsity.prune(model, 0.9)
    after = sparsity.compressed_size(model)
    assert after.raw == before.raw
    assert after.gzip < before.gzip / 2


# ---------------------------------------------------------------------------- cutting once


@pytest.mark.parametrize("s", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_prune_within_layers_and_over_all(s, scope):
    model = network()
    model.layers[1].kernel.assign(10 * model.layers[1].kernel)  # so that the scope matters
    before = weights_of(model)
    sparsity.prune(model, s, scope=scope)

    def cut(values):  # a limit instead of ranks
        kept = round((1 - s) * values.size)
        limit = np.sort(np.abs(values).ravel())[::-1][kept - 1] if kept else np.inf
        return np.where(np.abs(values) >= limit, values, 0)

    expected = [cut(w) for w in before]
    if scope == "global":
        flat = cut(np.concatenate([w.ravel() for w in before]))
        assert s == 0 or any((a != b).any() for a, b in zip(expected, _like(flat), strict=True))
        expected = _like(flat)
    for a, b in zip(weights_of(model), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def _like(flat):
    parts = np.split(flat, np.cumsum(SIZES)[:-1])
    shapes = [(6, 20), (20, 10), (10, 1)]
    return [p.reshape(shape) for p, shape in zip(parts, shapes, strict=True)]


def test_rewind_gives_early_weights_with_late_zeros():
    model = network()
    early = model.get_weights()
    model.set_weights([w + 1 for w in early])
    sparsity.prune(model, 0.5)
    zeros = zeros_of(model)
    sparsity.rewind(model, early)
    for old, new in zip(early[1::2], model.get_weights()[1::2], strict=True):
        np.testing.assert_array_equal(new, old)
    for old, new, zero in zip(early[::2], weights_of(model), zeros, strict=True):
        np.testing.assert_array_equal(new, np.where(zero, 0, old))


# ------------------------------------------------------------------------- zeros that stay

OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.02, clipnorm=1.0),
    "amsgrad": lambda: keras.optimizers.Adam(0.02, amsgrad=True),
    "adamw": lambda: keras.optimizers.AdamW(0.02, weight_decay=0.1),
    "average": lambda: keras.optimizers.AdamW(0.02, use_ema=True),
    "average put in": lambda: keras.optimizers.SGD(0.05, use_ema=True, ema_overwrite_frequency=3),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "adamax": lambda: keras.optimizers.Adamax(0.02),
    "adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "adafactor": lambda: keras.optimizers.Adafactor(0.02),
    "ftrl": lambda: keras.optimizers.Ftrl(0.1),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "lamb": lambda: keras.optimizers.Lamb(0.02),
    "accumulated": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05, momentum=0.9)),
    "proximal": lambda: sparsity.ProximalSGD(0.05, l1=1e-3, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_momentum_revives_a_weight(name):
    """Steps of optimizers that were at work before the cut, and move all other weights."""
    start = np.array([[0.5, -0.1, 0.2, -0.7], [0.05, 0.3, -0.4, 0.6]], "float32")
    kernel, optimizer = keras.Variable(start, name="kernel"), OPTIMIZERS[name]()
    optimizer.build([kernel])
    rng = np.random.default_rng(0)

    def steps():
        for _ in range(4):
            optimizer.apply([tf.constant(rng.uniform(0.5, 1, (2, 4)), tf.float32)], [kernel])

    steps()
    masks = sparsity._masks(None, [kernel])
    masks[0].plan([2], [5])
    before = kernel.numpy()
    steps()
    dropped = ~masks[0].keep.numpy()
    assert dropped.sum() == 3
    np.testing.assert_array_equal(kernel.numpy() == 0, dropped)
    assert (kernel.numpy() != before).all()


def test_average_of_the_last_steps_is_masked_too():
    model = network(OPTIMIZERS["average"](), run_eagerly=True)
    fit(model, "model.fit", 2, [sparsity.MagnitudePruning(0.6, end=4, frequency=2)])
    assert sparsity.fraction_zero(model) == pytest.approx(0.6)


def test_sparsity_of_each_step_is_that_of_the_schedule():
    model, watch = network("adam"), EachStep()
    pruning = sparsity.MagnitudePruning(0.9, initial=0.2, begin=2, end=14, frequency=5)
    fit(model, "model.fit", epochs=6, callbacks=[pruning, watch])
    assert len(watch.seen) == 18
    for step, zeros in enumerate(watch.seen):
        cut = 2 + 5 * ((step - 2) // 5) if step < 14 else 14  # 2, 7, 12, and the last
        s = 0 if step < 2 else sparsity.polynomial_decay(cut, 0.2, 0.9, 2, 14)
        assert [z.sum() for z in zeros] == [n - round(n * (1 - s)) for n in SIZES]
    for earlier, later in itertools.pairwise(watch.seen):
        assert all((b >= a).all() for a, b in zip(earlier, later, strict=True))


def test_initial_sparsity_is_there_in_the_first_step():
    model, watch = network(run_eagerly=True), EachStep()
    fit(model, "model.fit", 1, [sparsity.MagnitudePruning(0.5, initial=0.5, end=2), watch])
    assert [z.sum() for z in watch.seen[0]] == [60, 100, 5]


@pytest.mark.parametrize("how", ["graph", "XLA"])
def test_pruning_by_hand(how):
    """Ordinary steps of Keras, and between them zeros by `prune`, give the same weights."""
    x, y = data()
    model = network("adam")
    fit(model, how, callbacks=[sparsity.MagnitudePruning(0.8, end=6, frequency=3)])
    expected = network("adam", run_eagerly=True)
    for step in range(10):
        if step in (0, 3, 6):
            sparsity.prune(expected, float(sparsity.polynomial_decay(step, 0.0, 0.8, 0, 6)))
            zeros = zeros_of(expected)
        if step < 9:
            at = 32 * (step % 3)
            expected.train_on_batch(x[at : at + 32], y[at : at + 32])
            for v, zero in zip(sparsity.kernels(expected), zeros, strict=True):
                v.assign(np.where(zero, 0, v.numpy()))
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a == 0, b == 0)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_default_end_leaves_a_quarter_to_recover():
    model, watch = network(run_eagerly=True), EachStep()
    fit(model, "model.fit", 2, [sparsity.MagnitudePruning(0.5, frequency=1), watch])
    reached = [zeros[1].sum() for zeros in watch.seen]
    s = sparsity.polynomial_decay(np.arange(6), 0, 0.5, 0, 4)
    assert reached == (200 - np.round(200 * (1 - s))).tolist()


def test_some_layers_only_and_the_history():
    model = network(run_eagerly=True)
    pruning = sparsity.MagnitudePruning(0.5, end=2, layers=[model.layers[1]])
    history = fit(model, "model.fit", 1, [pruning])
    assert counts_of(model) == [0, 100, 0]
    assert history.history["sparsity"] == [0.5]
    model.layers[0].trainable = False
    model.compile("sgd", "mse", run_eagerly=True)
    fit(model, "model.fit", 1, [sparsity.MagnitudePruning(0.5, end=2)])
    assert counts_of(model) == [0, 100, 5]


def test_other_constraints_stay():
    model = network(run_eagerly=True)
    kernel = model.layers[0].kernel
    kernel.constraint = keras.constraints.MaxNorm(0.3)
    fit(model, "model.fit", 1, [sparsity.MagnitudePruning(0.5, end=2)])
    assert (np.linalg.norm(kernel.numpy(), axis=0) < 0.3 + 1e-6).all()
    assert np.mean(kernel.numpy() == 0) == 0.5


@pytest.mark.parametrize("how", ["model.fit", "graph"])
def test_a_second_run_inherits_the_zeros_of_the_first(how):
    model = network("adam", run_eagerly=how == "model.fit")
    fit(model, how, callbacks=[sparsity.MagnitudePruning(0.5, end=2, frequency=1)])
    zeros = [zeros_of(model)]
    fit(model, how, epochs=1)  # without the callback: zeros are held
    zeros.append(zeros_of(model))
    assert sparsity.fraction_zero(model) == 0.5
    # The first cut of the second run comes late, and asks for less than there is.
    again = sparsity.MagnitudePruning(0.8, initial=0.3, begin=3, end=7, frequency=2)
    look = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: zeros.append(zeros_of(model))
    )
    history = fit(model, how, callbacks=[again, look])
    zeros.append(zeros_of(model))
    for earlier, later in itertools.pairwise(zeros):
        assert all((b >= a).all() for a, b in zip(earlier, later, strict=True))
    middle = sparsity.polynomial_decay(5, 0.3, 0.8, 3, 7)  # 0.74
    assert history.history["sparsity"] == pytest.approx([0.5, middle, 0.8], abs=0.003)
    assert counts_of(model) == [96, 160, 8]


@pytest.mark.parametrize("how", ["model.fit", "graph"])
def test_stopping_early_ends_the_pruning(how):
    model = network(run_eagerly=how == "model.fit")
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True)
    )
    fit(model, how, callbacks=[stop, sparsity.MagnitudePruning(0.8, end=8, frequency=1)])
    reached = sparsity.fraction_zero(model)
    assert 0.3 < reached < 0.8
    fit(model, how, epochs=2)
    assert sparsity.fraction_zero(model) == reached


def test_a_model_that_was_trained_before_must_be_compiled_again():
    model = network()
    fit(model, "graph", epochs=1)
    pruning = sparsity.MagnitudePruning(0.5, end=2)
    with pytest.raises(ValueError, match="changed after compile"):
        fit(model, "graph", callbacks=[pruning])
    trained = network()
    fit(trained, "model.fit", epochs=1)  # a graph without masks: Keras is told to make another
    fit(trained, "model.fit", callbacks=[pruning])
    assert sparsity.fraction_zero(trained) == 0.5


@saves
def test_zeros_survive_saving_and_cloning(tmp_path):
    model = network("adam", run_eagerly=True)
    fit(model, "model.fit", callbacks=[sparsity.MagnitudePruning(0.7, end=3)])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")  # needs no custom objects
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    zeros = zeros_of(loaded)
    sparsity.keep_zeros(loaded)
    loaded.compile("adam", "mse", run_eagerly=True)
    fit(loaded, "model.fit", epochs=2)
    for zero, weights, w in zip(zeros, weights_of(model), weights_of(loaded), strict=True):
        np.testing.assert_array_equal(w == 0, zero)
        assert (w != weights)[~zero].any()
    clone = keras.models.clone_model(model)
    assert all(v.constraint is None for v in sparsity.kernels(clone))


def test_zeros_are_not_kept_by_themselves():
    model = network("adam", run_eagerly=True)
    sparsity.prune(model, 0.5)
    fit(model, "model.fit", epochs=1)
    assert sparsity.fraction_zero(model) < 0.2


def test_a_subclassed_model_with_an_embedding():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.table, self.dense = layers.Embedding(5, 4), layers.Dense(1)

        def call(self, x):
            return self.dense(keras.ops.sum(self.table(x), 1))

    x, y = np.array([[1, 1, 2], [3, 4, 4]] * 4), np.ones((8, 1))
    model = Model()
    model.compile("adam", "mse", run_eagerly=True)
    model(x)
    pruning = sparsity.MagnitudePruning(0.5, end=1)
    model.fit(x, y, epochs=3, batch_size=2, verbose=0, callbacks=[pruning])
    assert counts_of(model) == [10, 2]


@pytest.mark.parametrize("depth", [1, 3])
def test_fleets_hold_zeros(depth):
    """In each network of a fleet the smallest weights go, and stay away; the others learn."""
    x, y = data()
    y = (y[:, 0] > 0).astype("int32")
    fleet = Fleet(depth, 8, seeds=[0, 1], rates=[0.1], inputs=6, classes=2, inertia=0.9)
    dense = fleet.kernels()
    fleet.mask(sparsity.fleet_masks(dense, [0.2, 0.5]))
    start = fleet.kernels()
    fleet.train(x, y, steps=6)
    for i, s in enumerate((0.2, 0.5)):
        own = [w[i] for w in dense]
        masks = sparsity.magnitude_masks(own, s)
        for w, mask, before, after in zip(own, masks, start, fleet.kernels(), strict=True):
            np.testing.assert_array_equal(before[i], w * mask)
            np.testing.assert_array_equal(after[i] == 0, ~mask)
            assert (after[i] != before[i])[mask].any()
    fresh = Fleet(depth, 8, seeds=[0, 1], rates=[0.1], inputs=6, classes=2)
    fresh.mask([np.zeros_like(w) for w in dense])
    assert (fresh.outputs(x) == 0).all()
    with pytest.raises(ValueError, match=r"masks must have shapes .* received \[\(2, 6, 7\)\]"):
        fleet.mask([np.ones((2, 6, 7))])
    with pytest.raises(ValueError, match=r"sparsity must be one number, or .* shape \(3,\)"):
        sparsity.fleet_masks(dense, [0.1] * 3)


# ----------------------------------------------------------------------------- the toolkit


@pytest.mark.filterwarnings("ignore:distutils Version classes:DeprecationWarning")
def test_same_sparsity_at_each_step_as_the_toolkit(monkeypatch):
    # Importing it sets this variable for the whole process, and for all that it starts.
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    import tensorflow_model_optimization as toolkit
    import tf_keras

    toolkit = toolkit.sparsity.keras
    theirs = toolkit.PolynomialDecay(0.2, 0.9, 2, 14, power=3, frequency=4)
    for step in range(20):
        due, s = theirs(tf.constant(step, tf.int64))
        assert bool(due) == (step in (2, 6, 10, 14))
        assert float(s) == pytest.approx(sparsity.polynomial_decay(step, 0.2, 0.9, 2, 14), abs=1e-6)

    model = network("adam", run_eagerly=True)
    with pytest.raises(ValueError, match="can only prune an object of the following types"):
        toolkit.prune_low_magnitude(model)
    watch = EachStep()
    pruning = sparsity.MagnitudePruning(0.9, initial=0.2, begin=2, end=14, frequency=4)
    fit(model, "model.fit", epochs=5, callbacks=[pruning, watch])

    class Masks(tf_keras.callbacks.Callback):
        seen = ()

        def on_train_batch_end(self, batch, logs=None):  # the masks that the step has used
            masks = [layer.pruning_vars[0][1].numpy() for layer in self.model.layers]
            self.seen = (*self.seen, [int((mask == 0).sum()) for mask in masks])

    twin = tf_keras.Sequential(
        [
            tf_keras.layers.Dense(20, "relu", input_shape=(6,)),
            tf_keras.layers.Dense(10, "relu"),
            tf_keras.layers.Dense(1),
        ]
    )
    twin.set_weights(network().get_weights())
    twin = toolkit.prune_low_magnitude(twin, pruning_schedule=theirs)
    twin.compile("adam", "mse", run_eagerly=True)
    masks = Masks()
    callbacks = [toolkit.UpdatePruningStep(), masks]
    twin.fit(*data(), epochs=5, verbose=0, shuffle=False, callbacks=callbacks)
    # They count steps from 1.
    assert [[z.sum() for z in zeros] for zeros in watch.seen[1:]] == list(masks.seen)[:-1]
    stripped = toolkit.strip_pruning(twin)
    assert [int((w == 0).sum()) for w in stripped.get_weights()[::2]] == counts_of(model)


# -------------------------------------------------------------------------- proximal steps


def soft(w, threshold):
    return np.sign(w) * np.maximum(np.abs(w) - threshold, 0)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_proximal_sgd_by_hand(momentum):
    x, y = data()
    w, b, m = np.full((6, 1), 0.2), np.zeros(1), [0, 0]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([3], [0.125, 0.03125])
    model = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
    model.set_weights([w, b])
    optimizer = sparsity.ProximalSGD(schedule, l1=0.4, momentum=momentum)
    model.compile(optimizer, "mse", run_eagerly=True)
    fit(model, "model.fit", epochs=2)
    for step in range(6):
        rate, at = (0.125 if step <= 3 else 0.03125), 32 * (step % 3)
        xs, ys = x[at : at + 32], y[at : at + 32]
        error = 2 * (xs @ w + b - ys) / 32
        grads = [xs.T @ error, error.sum(0)]
        m = [momentum * mi - rate * g for mi, g in zip(m, grads, strict=True)]
        w, b = soft(w + m[0], rate * 0.4), b + m[1]
    np.testing.assert_allclose(model.layers[0].kernel.numpy(), w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.layers[0].bias.numpy(), b, rtol=1e-4, atol=1e-6)
    assert ((model.layers[0].kernel.numpy() == 0) == (w == 0)).all()
    assert (w == 0).any()


def test_proximal_sgd_solves_the_lasso_where_the_subgradient_makes_no_zero():
    """For columns that are orthogonal, the lasso is the soft threshold of least squares."""
    q = np.linalg.qr(np.random.default_rng(3).standard_normal((50, 8)))[0] * math.sqrt(50)
    y = q @ np.linspace(-1, 1, 8)[:, None]
    expected = soft(np.linspace(-1, 1, 8), 0.4)
    found = []
    for optimizer, penalty in (
        (sparsity.ProximalSGD(0.1, l1=0.8), None),
        (keras.optimizers.SGD(0.1), keras.regularizers.L1(0.8)),
    ):
        dense = layers.Dense(1, use_bias=False, kernel_regularizer=penalty)
        model = keras.Sequential([keras.Input((8,)), dense])
        model.compile(optimizer, "mse")
        training.fit(model, q, y, epochs=150, batch_size=50)
        found.append(model.get_weights()[0][:, 0])
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert ((found[0] == 0) == (expected == 0)).all()
    assert (expected == 0).sum() == 2
    # The other one gets near, up to its step of 0.1 * 0.8.
    np.testing.assert_allclose(found[1], expected, atol=0.08)
    assert (found[1] != 0).all()


@saves
def test_proximal_sgd_is_saved(tmp_path):
    model = network(sparsity.ProximalSGD(0.05, l1=0.02, momentum=0.5), run_eagerly=True)
    fit(model, "model.fit", epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is sparsity.ProximalSGD
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for m in (model, loaded):
        fit(m, "model.fit", epochs=1)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_proximal_sgd_equals_sgd_at_zero():
    found = []
    for optimizer in (
        sparsity.ProximalSGD(0.1, 0.0, 0.5, True),
        keras.optimizers.SGD(0.1, 0.5, True),
    ):
        w = keras.Variable([[1.0, -0.5]])
        for slope in ([[0.3, 2.0]], [[-1.0, 0.1]]):
            optimizer.apply([tf.constant(slope)], [w])
        found.append(w.numpy())
    np.testing.assert_array_equal(*found)


def test_programs_of_proximal_sgd_are_shared_only_at_equal_strength():
    counts = []
    for l1 in (0.4, 0.4, 0.1):
        model = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
        model.compile(sparsity.ProximalSGD(0.05, l1=l1), "mse")
        model.set_weights([np.full((6, 1), 0.2), np.zeros(1)])
        fit(model, "graph")
        counts.append(counts_of(model)[0])
    assert counts[0] == counts[1] > counts[2]


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [-0.1, 1.0, 1.5, math.nan, None, True, "0.5"])
def test_sparsity_outside_of_its_range(bad):
    for call in (
        lambda: sparsity.MagnitudePruning(bad),
        lambda: sparsity.polynomial_decay(0, 0.0, bad, 0, 1),
    ):
        with pytest.raises(ValueError, match="final must be a number from 0 to below 1; received"):
            call()
    for call in (
        lambda: sparsity.prune(layers.Dense(2), bad),
        lambda: sparsity.magnitude_masks([np.ones(3)], bad),
    ):
        with pytest.raises(ValueError, match="sparsity must be a number from 0 to below 1"):
            call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sparsity.MagnitudePruning(0.5, initial=0.6), "final must be at least initial"),
        (lambda: sparsity.MagnitudePruning(0.5, initial=-1), "initial must be .* received -1"),
        (lambda: sparsity.MagnitudePruning(0.5, begin=-1), "begin must be .* received -1"),
        (lambda: sparsity.MagnitudePruning(0.5, begin=4, end=4), "end must be .* 5 or more"),
        (lambda: sparsity.MagnitudePruning(0.5, frequency=0), "frequency must be .* received 0"),
        (lambda: sparsity.MagnitudePruning(0.5, power=0), "power must be .* received 0"),
        (lambda: sparsity.MagnitudePruning(0.5, power="3"), "power must be .* received '3'"),
        (lambda: sparsity.polynomial_decay(-1, 0, 0.5, 0, 1), "step must be .* received -1"),
        (lambda: sparsity.prune(network(), 0.5, scope="all"), "scope must be .* received 'all'"),
        (lambda: sparsity.magnitude_masks([], 0.5), "weights must hold one array"),
        (lambda: sparsity.magnitude_masks([[np.nan]], 0.5), "weights must be finite"),
        (lambda: sparsity.proximal_l1([1.0], -1), "threshold must be .* received -1"),
        (lambda: sparsity.ProximalSGD(l1=-0.1), "l1 must be .* received -0.1"),
        (lambda: sparsity.compressed_size(keras.Sequential()), "model must be .* with weights"),
    ],
)
def test_wrong_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_wrong_types():
    with pytest.raises(TypeError, match="weights must be numbers"):
        sparsity.proximal_l1(["a"], 1)
    with pytest.raises(TypeError, match="model must be a Keras model or layer; received list"):
        sparsity.fraction_zero([])


def test_models_and_layers_without_kernels():
    bare = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()], name="bare")
    unbuilt = keras.Sequential([layers.Dense(3)], name="late")
    for model, name in ((bare, "bare"), (unbuilt, "late")):
        for call in (sparsity.fraction_zero, sparsity.keep_zeros, lambda m: sparsity.prune(m, 0.5)):
            with pytest.raises(ValueError, match=f"with a kernel; '{name}' has none"):
                call(model)
    bare.compile("sgd", "mse")
    pruning = sparsity.MagnitudePruning(0.5)
    with pytest.raises(ValueError, match="'bare' has none"):
        training.fit(bare, np.ones((9, 3)), np.ones((9, 3)), epochs=1, callbacks=[pruning])
    flat = layers.Flatten(name="flat")
    pruning = sparsity.MagnitudePruning(0.5, layers=[flat])
    with pytest.raises(ValueError, match="'flat' has none"):
        fit(network(), "graph", callbacks=[pruning])
    foreign = sparsity.MagnitudePruning(0.5, end=1, layers=[network()])
    with pytest.raises(
        ValueError, match=r"layers must be trainable layers .* of 3 kernels .* 0 are"
    ):
        fit(network(), "graph", callbacks=[foreign])


@pytest.mark.parametrize("how", ["model.fit", "graph"])
def test_an_end_that_is_never_reached(how):
    for end in (9, 1000):
        pruning = sparsity.MagnitudePruning(0.5, end=end)
        with pytest.raises(ValueError, match=r"end must be a step .* at most 8 .* received"):
            fit(network(), how, callbacks=[pruning])
