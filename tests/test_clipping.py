import math

from ch11lib import clipping, training
from ch11lib.backend import keras, tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
import numpy as np
import pytest

SHAPES = [(3, 4), (4,), (), (2, 2, 3, 5)]
EXAMPLE = np.array([0.9, 100.0])


def gradients(dtype="float32", scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return [(scale * np.asarray(rng.standard_normal(s))).astype(dtype) for s in SHAPES]


def through_keras(arrays, **clip):
    """Let an SGD step of rate 1, from zero, show what an optimizer makes of the gradients."""
    variables = [keras.Variable(np.zeros(g.shape), dtype=g.dtype.name) for g in arrays]
    optimizer = keras.optimizers.SGD(1.0, **clip)
    optimizer.apply([tf.constant(g) for g in arrays], variables)
    return [-v.numpy() for v in variables]


def assert_same(ours, theirs, rtol=2e-6):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        b = np.asarray(b)
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol)


# ---------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("limit", [0.01, 1.0, 30.0])
def test_keras_and_tensorflow(limit, scale, dtype):
    g = gradients(dtype, scale)
    tensors = [tf.constant(array) for array in g]
    by_value = clipping.clip_by_value(g, limit)
    assert_same(by_value, through_keras(g, clipvalue=limit))
    assert_same(by_value, [tf.clip_by_value(t, -limit, limit) for t in tensors])
    by_norm = clipping.clip_by_norm(g, limit)
    assert_same(by_norm, through_keras(g, clipnorm=limit))
    assert_same(by_norm, [tf.clip_by_norm(t, limit) for t in tensors])
    by_global_norm = clipping.clip_by_global_norm(g, limit)
    theirs, norm = tf.clip_by_global_norm(tensors, limit)
    assert_same(by_global_norm, through_keras(g, global_clipnorm=limit))
    assert_same(by_global_norm, theirs)
    assert clipping.global_norm(g) == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_non_finite_gradients_are_those_of_keras(bad):
    g = gradients()
    g[0][1, 2] = bad
    assert_same(clipping.clip_by_value(g, 0.5), through_keras(g, clipvalue=0.5))
    assert_same(clipping.clip_by_norm(g, 0.5), through_keras(g, clipnorm=0.5))
    ours = clipping.clip_by_global_norm(g, 0.5)
    assert_same(ours, through_keras(g, global_clipnorm=0.5))
    assert all(np.isnan(array).all() for array in ours)
    first = clipping.clip_by_norm(g, 0.5)[0]
    assert np.isnan(first[1, 2])
    assert np.isnan(first[0, 0]) if np.isnan(bad) else first[0, 0] == 0
    norm = clipping.global_norm(g)
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf


def test_squares_beyond_float32_overflow_in_keras_only():
    g = [np.float32([3e20, 4e20])]
    assert clipping.global_norm(g) == pytest.approx(5e20, rel=1e-6)
    np.testing.assert_allclose(clipping.clip_by_norm(g[0], 1.0), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(clipping.clip_by_global_norm(g, 1.0)[0], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(through_keras(g, clipnorm=1.0)[0], 0)
    assert np.isnan(through_keras(g, global_clipnorm=1.0)[0]).all()
    # The limit stated in the docstring is the root of the largest float32.
    below, above = np.float32([1.8e19]), np.float32([1.9e19])
    assert through_keras([below], clipnorm=1.0)[0] == pytest.approx(1)
    assert through_keras([above], clipnorm=1.0)[0] == 0


def test_the_example():
    assert clipping.clip_by_value(EXAMPLE, 1.0).tolist() == [0.9, 1.0]
    np.testing.assert_allclose(clipping.clip_by_norm(EXAMPLE, 1.0), [0.00899964, 0.9999595], 1e-6)
    turned = math.degrees(math.atan2(100, 0.9) - math.atan2(1, 0.9))
    after = clipping.clip_by_value(EXAMPLE, 1.0)
    assert clipping.angle(EXAMPLE, after) == pytest.approx(turned, rel=1e-12)
    assert clipping.angle(EXAMPLE, clipping.clip_by_norm(EXAMPLE, 1.0)) < 1e-12


@pytest.mark.parametrize("size", [0.95, 1.0, 1.05])
def test_a_gradient_near_the_limit(size):
    g = size * np.array([0.6, 0.8])
    expected = g if size <= 1 else [0.6, 0.8]
    np.testing.assert_allclose(clipping.clip_by_norm(g, 1.0), expected, rtol=1e-15)
    np.testing.assert_allclose(clipping.clip_by_global_norm([g], 1.0), [expected], rtol=1e-15)


def test_per_variable_and_global_norm_on_two_variables():
    g = [np.array([3.0, 4.0]), np.array([0.3, 0.4])]
    each, whole = clipping.clip_by_norm(g, 1.0), clipping.clip_by_global_norm(g, 1.0)
    assert clipping.global_norm(each) == pytest.approx(math.sqrt(1.25))
    assert clipping.angle(g, each) == pytest.approx(
        math.degrees(math.atan(0.5) - math.atan(0.1)), rel=1e-9
    )
    assert clipping.global_norm(whole) == pytest.approx(1)
    assert clipping.angle(g, whole) < 1e-9


FLOATS = npst.arrays(
    np.float64, npst.array_shapes(min_dims=0, max_dims=3, max_side=4), elements=st.floats(-1e6, 1e6)
)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(FLOATS, min_size=1, max_size=4), st.floats(1e-3, 1e3))
def test_invariants(g, limit):
    before = [array.copy() for array in g]
    value = clipping.clip_by_value(g, limit)
    norm = clipping.clip_by_norm(g, limit)
    whole = clipping.clip_by_global_norm(g, limit)
    total = clipping.global_norm(g)
    assert total == pytest.approx(np.sqrt(sum((a**2).sum() for a in g)), rel=1e-9, abs=1e-150)
    assert clipping.global_norm(whole) == pytest.approx(min(total, limit), rel=1e-12)
    for original, a, b, c in zip(g, value, norm, whole, strict=True):
        assert np.abs(a).max() <= limit
        own = clipping.global_norm([original])
        assert clipping.global_norm([b]) == pytest.approx(min(own, limit), rel=1e-12)
        np.testing.assert_array_equal(np.sign(original) * np.sign(c) >= 0, True)
        if own <= limit:
            np.testing.assert_array_equal(b, original)
    if total <= limit:
        assert_same(whole, g, rtol=0)
    elif total > 1e-300:
        assert clipping.angle(g, whole) < 1e-5
    for array, was, results in zip(g, before, zip(value, norm, whole, strict=True), strict=True):
        np.testing.assert_array_equal(array, was)
        assert not any(np.shares_memory(array, result) for result in results)


RULES = [clipping.clip_by_value, clipping.clip_by_norm, clipping.clip_by_global_norm]


@pytest.mark.parametrize("rule", RULES)
def test_one_array_or_a_list(rule):
    one = rule(EXAMPLE, 1.0)
    assert isinstance(one, np.ndarray)
    for same in ([0.9, 100.0], (0.9, 100.0), list(EXAMPLE), tf.constant(EXAMPLE)):
        np.testing.assert_array_equal(rule(same, 1.0), one)
    for listed in ([EXAMPLE], (EXAMPLE,), [tf.constant(EXAMPLE)], [keras.Variable(EXAMPLE)]):
        result = rule(listed, 1.0)
        assert isinstance(result, list)
        np.testing.assert_allclose(result, [one], rtol=1e-6)
    with_none = rule([None, EXAMPLE, None], 1.0)
    assert with_none[0] is with_none[2] is None
    np.testing.assert_array_equal(with_none[1], one)
    assert rule([[3, 4], [0, 0]], 1).shape == (2, 2)
    assert rule(np.array([3, 4]), 1).dtype == np.float64
    assert rule(np.ones(2, "float16"), 0.1).dtype == np.float16
    assert rule(np.zeros((0, 3)), 1.0).shape == (0, 3)


@pytest.mark.parametrize("rule", RULES)
def test_bad_input_of_the_rules(rule):
    for bad in (0, -1.0, np.nan, True, np.ones(2)):
        with pytest.raises(ValueError, match=r"(clip|max_norm) must be a positive number"):
            rule(EXAMPLE, bad)
    np.testing.assert_array_equal(rule(EXAMPLE, math.inf), EXAMPLE)  # no limit
    with pytest.raises(ValueError, match=r"gradients must hold at least one .* empty list"):
        rule([], 1.0)
    with pytest.raises(ValueError, match=r"gradients must hold at least one .* None only"):
        rule([None, None], 1.0)
    with pytest.raises(ValueError, match="nested lists of unequal lengths"):
        rule([[1.0, 2.0], [3.0]], 1.0)
    with pytest.raises(TypeError, match="gradients must be numeric"):
        rule(["a"], 1.0)


def test_angle():
    assert clipping.angle([1, 0], [0, 2]) == pytest.approx(90, rel=1e-15)
    assert clipping.angle([1, 0], [-3, 0]) == 180
    assert clipping.angle([1, 1], [5, 5]) == 0
    small = 1e-9  # the arc cosine would give 0
    assert clipping.angle([1, 0], [1, small]) == pytest.approx(math.degrees(small), rel=1e-9)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 7))
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert clipping.angle(a, b) == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-12)
    as_list = clipping.angle([a[:3], None, a[3:]], [b[:3], None, b[3:]])
    assert as_list == pytest.approx(clipping.angle(a, b), rel=1e-12)
    for other in ([0.0, 0.0], [np.inf, 1.0], [np.nan, 1.0]):
        assert math.isnan(clipping.angle([1.0, 2.0], other))
    with pytest.raises(ValueError, match=r"b must have the shapes of a, \[\(2,\)\]"):
        clipping.angle([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="b must have the shapes of a"):
        clipping.angle([np.ones(2), np.ones(2)], np.ones(4))


@pytest.mark.parametrize("shape", [(5, 3), (3, 3, 2, 4), (6,), (2, 3, 4)])
def test_adaptive_clip_is_a_norm_clip_of_each_unit(shape):
    rng = np.random.default_rng(0)
    g, w = rng.standard_normal((2, *shape))
    w[..., 0] = 0  # epsilon decides
    axes = list(range(len(shape) - 1)) or None
    size = np.sqrt((w**2).sum(None if axes is None else tuple(axes), keepdims=True))
    for clip in (0.01, 0.5, 100.0):
        limit = tf.constant(clip * np.maximum(size, 1e-3))
        theirs = tf.clip_by_norm(tf.constant(g), limit, axes)
        np.testing.assert_allclose(clipping.adaptive_clip(g, w, clip), theirs, rtol=1e-12)
    assert clipping.adaptive_clip(np.float32(g), w).dtype == np.float32
    np.testing.assert_array_equal(clipping.adaptive_clip(np.zeros(shape), w), 0)


def test_bad_input_of_adaptive_clip():
    with pytest.raises(ValueError, match=r"gradient and weight .*\[\(2,\), \(3,\)\]"):
        clipping.adaptive_clip(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="gradient and weight must have one shape"):
        clipping.adaptive_clip(None, np.ones(3))
    with pytest.raises(ValueError, match="clip must be a positive number; received 0"):
        clipping.adaptive_clip(np.ones(2), np.ones(2), 0)
    with pytest.raises(ValueError, match="epsilon must be a positive number"):
        clipping.adaptive_clip(np.ones(2), np.ones(2), epsilon=-1)


# ---------------------------------------------------------------------------- norms of a model


def data(n=100):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 6)).astype("float32")
    return x, (x[:, :1] * x[:, 1:2]).astype("float32")


def network(optimizer="sgd", dropout=0.0, **compile_options):
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, "tanh"), keras.layers.BatchNormalization()]
    layers += [keras.layers.Dropout(dropout, seed=3)] if dropout else []
    l2 = keras.regularizers.L2(0.1)
    layers += [keras.layers.Dense(1, kernel_regularizer=l2)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    model.compile(optimizer, **({"loss": "mse"} | compile_options))
    return model


def norms_by_hand(model, x, y):
    """Norms for each variable: of the gradient of the loss, with its regularization."""
    with tf.GradientTape() as tape:
        y_pred = model(x, training=True)
        loss = keras.ops.mean(keras.losses.mean_squared_error(y, y_pred)) + sum(model.losses)
    return [float(tf.norm(g)) for g in tape.gradient(loss, model.trainable_weights)]


def whole_state(model):
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    return [v.numpy() for v in variables]


def test_gradient_norms_by_hand_and_without_a_trace():
    x, y = data()
    model = network(dropout=0.3, metrics=["mae"])
    model.fit(x, y, verbose=0)
    before = whole_state(model)
    norms = clipping.gradient_norms(model, x, y, batch_size=32)
    assert norms.shape == (4,)
    for a, b in zip(before, whole_state(model), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(clipping.gradient_norms(model, x, y, batch_size=32), norms)
    theirs = [
        np.linalg.norm(norms_by_hand(model, x[i : i + 32], y[i : i + 32]))
        for i in range(0, 100, 32)
    ]
    np.testing.assert_allclose(norms, theirs, rtol=1e-5)


def test_gradient_norms_of_a_model_with_two_outputs_and_fresh_sums():
    x, y = data(20)
    inputs = keras.Input((6,))
    outputs = {name: keras.layers.Dense(1, name=name)(inputs) for name in ("a", "b")}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss={"a": "mse", "b": "mae"}, metrics={"a": ["mae"]})
    norms = clipping.gradient_norms(model, x, {"a": y, "b": y}, batch_size=7)
    assert norms.shape == (3,)
    assert (norms > 0).all()
    assert all(not v.numpy().any() for v in model.metrics_variables)


def test_gradient_norms_of_a_subclassed_model_with_an_unused_and_a_sparse_weight():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.table, self.dense = keras.layers.Embedding(5, 3), keras.layers.Dense(1)
            self.idle = self.add_weight(shape=(4,), name="idle")

        def call(self, x):
            return self.dense(keras.ops.sum(self.table(x), 1))

    x, y = np.array([[1, 1, 2], [3, 4, 4]]), np.ones((2, 1))
    model = Model()
    model.compile("sgd", "mse")
    [norm] = clipping.gradient_norms(model, x, y)
    with tf.GradientTape() as tape:
        loss = keras.ops.mean(keras.ops.square(model(x) - y))
    variables = [model.table.embeddings, *model.dense.weights]
    dense = [np.asarray(tf.convert_to_tensor(g)) for g in tape.gradient(loss, variables)]
    assert norm == pytest.approx(clipping.global_norm(dense), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x, y: (keras.layers.Dense(1), x, y, 32), TypeError, "model must be a keras"),
        (lambda m, x, y: (m, x, y, 0), ValueError, "batch_size .* received 0"),
        (lambda m, x, y: (m, x, y, 2.5), ValueError, "batch_size .* received 2.5"),
        (lambda m, x, y: (m, x, y[1:], 32), ValueError, "lengths 19, 20"),
        (lambda m, x, y: (m, x[:0], y[:0], 32), ValueError, "at least 1; received lengths 0"),
        (lambda m, x, y: (m, np.array(["a"]), y, 32), TypeError, "x and y must be numeric"),
        (lambda m, x, y: (keras.Sequential(), x, y, 32), ValueError, "model must be compiled"),
    ],
)
def test_bad_input_of_gradient_norms(call, error, message):
    model, x, y, size = call(network(), *data(20))
    with pytest.raises(error, match=message):
        clipping.gradient_norms(model, x, y, batch_size=size)


def test_gradient_norms_without_weights():
    model = network()
    model.trainable = False
    with pytest.raises(ValueError, match="must have trainable weights"):
        clipping.gradient_norms(model, *data(10))


# ---------------------------------------------------------------------------- norms in training

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5),
    "adamw": lambda: keras.optimizers.AdamW(0.01, clipnorm=0.1, use_ema=True),
    "value": lambda: keras.optimizers.RMSprop(
        keras.optimizers.schedules.ExponentialDecay(0.01, 5, 0.9), clipvalue=0.01
    ),
}


def train(model, how):
    """Three epochs of four steps, in the order of the data."""
    x, y = data()
    if how == "model.fit":
        model.fit(x, y, epochs=3, shuffle=False, verbose=0)
    else:
        xla = how.endswith("XLA")
        history = training.fit(model, x, y, epochs=3, shuffle=False, jit_compile=xla)
        assert history.engine == "graph"
    return model


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("sgd", "model.fit"),
        ("sgd", "training.fit"),
        ("value", "training.fit"),
        ("adamw", "training.fit"),
    ],
)
def test_recording_changes_nothing(kind, how):
    plain = train(network(OPTIMIZERS[kind]()), how)
    recorded = train(network(clipping.record_norms(OPTIMIZERS[kind](), steps=50)), how)
    for a, b in zip(plain.get_weights(), recorded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    slots = recorded.optimizer.variables
    assert len(slots) == len(plain.optimizer.variables) + 1


@pytest.mark.parametrize("how", ["model.fit", "training.fit", "training.fit, XLA"])
def test_every_step_is_recorded_as_by_hand(how):
    x, y = data()
    optimizer = clipping.record_norms(OPTIMIZERS["sgd"](), steps=50)
    train(network(optimizer), how)
    model = network(OPTIMIZERS["sgd"]())
    theirs = []
    for start in [0, 32, 64, 96] * 3:
        batch = x[start : start + 32], y[start : start + 32]
        moving = [v.numpy() for v in model.non_trainable_weights]
        theirs.append(norms_by_hand(model, *batch))
        for v, value in zip(model.non_trainable_weights, moving, strict=True):
            v.assign(value)
        model.train_on_batch(*batch)
    np.testing.assert_allclose(optimizer.variable_norms, theirs, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(optimizer.gradient_norms, np.linalg.norm(theirs, axis=1), rtol=1e-3)


def test_a_full_record_keeps_the_last_steps():
    x, y = data()
    long, short = (
        network(clipping.record_norms(keras.optimizers.SGD(0.1), steps)) for steps in (100, 5)
    )
    for model in (long, short):
        training.fit(model, x, y, epochs=1, seed=0)
        training.fit(model, x, y, epochs=2, seed=1)
    assert len(long.optimizer.gradient_norms) == 12
    np.testing.assert_allclose(
        short.optimizer.variable_norms, long.optimizer.variable_norms[-5:], rtol=1e-6
    )


def test_models_of_one_architecture_share_what_was_traced():
    training.clear_programs()
    for steps, seed in ((50, 0), (50, 1), (60, 0)):
        model = network(clipping.record_norms(keras.optimizers.SGD(0.1), steps))
        training.fit(model, *data(), epochs=1, seed=seed)
        assert len(model.optimizer.gradient_norms) == 4
    plain = network(keras.optimizers.SGD(0.1))
    training.fit(plain, *data(), epochs=1, seed=0)
    assert len(training._shared_programs) == 3  # 50 steps, 60 steps, and no record at all


def test_percentile_and_fraction_of_clipped_steps():
    """The fraction that is read off the record is that of the steps that the rule has shortened."""
    x, y = data()
    free = network(clipping.record_norms(keras.optimizers.SGD(0.05), 100))
    training.fit(free, x, y, epochs=10, seed=0)
    threshold = np.percentile(free.optimizer.gradient_norms, 75)
    model = network(clipping.record_norms(keras.optimizers.SGD(0.05, clipnorm=threshold), 100))
    shortened = []
    for start in range(0, 96, 8):
        before = [v.numpy() for v in model.trainable_weights]
        model.train_on_batch(x[start : start + 8], y[start : start + 8])
        steps = [
            np.linalg.norm(v.numpy() - b)
            for v, b in zip(model.trainable_weights, before, strict=True)
        ]
        shortened.append(max(steps) > 0.05 * threshold * (1 - 1e-4))
    over = (model.optimizer.variable_norms > threshold).any(axis=1)
    assert over.tolist() == shortened
    assert 0 < over.mean() < 1


def test_large_norms_survive_where_float32_squares_overflow():
    optimizer = clipping.record_norms(keras.optimizers.SGD(1.0), 2)
    variable = keras.Variable(np.zeros(2, "float32"))
    optimizer.apply([tf.constant([3e20, 4e20])], [variable])
    assert optimizer.gradient_norms.tolist() == pytest.approx([5e20], rel=1e-6)


def test_some_variables_without_gradient_or_left_out():
    optimizer = clipping.record_norms(keras.optimizers.SGD(1.0), 4)
    a, b = (keras.Variable(np.zeros(2, "float32")) for _ in "ab")
    optimizer.build([a, b])
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([tf.constant([3.0, 4.0]), None], [a, b])
    optimizer.apply([tf.constant([6.0, 8.0])], [b])
    optimizer.apply([tf.constant([0.0, 1.0]), tf.constant([2.0, 0.0])])
    optimizer.apply([])
    assert optimizer.variable_norms.tolist() == [[5.0, 0.0], [0.0, 10.0], [1.0, 2.0]]
    with pytest.raises(ValueError, match="must already be built"):
        clipping.record_norms(keras.optimizers.SGD(1.0), 4).apply([tf.constant([1.0])])


def test_loss_scaling_is_taken_out():
    optimizer = clipping.record_norms(keras.optimizers.SGD(1.0, loss_scale_factor=8.0), 4)
    optimizer.apply([tf.constant([24.0, 32.0])], [keras.Variable(np.zeros(2, "float32"))])
    assert optimizer.gradient_norms.tolist() == [5.0]
    # A mixed-precision model wraps its optimizer, which then gets the gradients without the scale.
    inner = clipping.record_norms(keras.optimizers.SGD(1.0), 4)
    outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    outer.apply([tf.constant([24.0, 32.0])], [keras.Variable(np.zeros(2, "float32"))])
    assert inner.gradient_norms.tolist() == [5.0]


def test_the_given_optimizer_is_only_copied():
    optimizer = keras.optimizers.Adam(0.02, clipnorm=0.5, name="mine")
    recording = clipping.record_norms(optimizer, 10)
    assert isinstance(recording, keras.optimizers.Adam)
    assert recording.get_config() == optimizer.get_config()
    network(recording).fit(*data(10), verbose=0)
    assert not optimizer.built
    assert int(optimizer.iterations) == 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_clones_and_saved_models_have_a_plain_optimizer(tmp_path):
    optimizer = clipping.record_norms(keras.optimizers.SGD(0.1, clipnorm=0.5), 10)
    model = network(optimizer)
    model.fit(*data(10), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for copy in (loaded, keras.models.clone_model(model)):
        assert type(copy.optimizer) is keras.optimizers.SGD
        assert copy.optimizer.clipnorm == 0.5
        copy.fit(*data(10), verbose=0)


def test_bad_input_of_record_norms():
    sgd = keras.optimizers.SGD
    for bad in ("sgd", sgd, None):
        with pytest.raises(TypeError, match="optimizer must be a Keras optimizer"):
            clipping.record_norms(bad, 10)
    for bad in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="steps must be a positive integer"):
            clipping.record_norms(sgd(), bad)
    with pytest.raises(ValueError, match="must not record already"):
        clipping.record_norms(clipping.record_norms(sgd(), 1), 1)
    with pytest.raises(TypeError, match="LossScaleOptimizer: wrap the result"):
        clipping.record_norms(keras.optimizers.LossScaleOptimizer(sgd()), 1)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4"):
        clipping.record_norms(sgd(gradient_accumulation_steps=4), 1)
    used = sgd()
    used.build([keras.Variable(1.0)])
    with pytest.raises(ValueError, match="optimizer must be new"):
        clipping.record_norms(used, 1)
    with pytest.raises(ValueError, match="nothing has been recorded yet"):
        _ = clipping.record_norms(sgd(), 1).gradient_norms
