"""ch11lib.signals against GradientTape, Keras's own training step, finite differences and NumPy."""

from concurrent.futures import ThreadPoolExecutor
import itertools
import random

from ch11lib import signals, training
from ch11lib.backend import keras, tf
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

layers = keras.layers


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(7)


def data(n=32, features=6, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, features)).astype("float32"), rng.integers(0, classes, n)


def relative(measured, expected):
    return np.max(np.abs(measured - expected)) / np.max(np.abs(expected))


# ------------------------------------------------------------------ the NumPy definition


@pytest.mark.parametrize("activation", ["linear", "sigmoid", "tanh", "relu"])
@given(
    widths=st.lists(st.integers(1, 7), min_size=2, max_size=6),
    n=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=8, derandomize=True, deadline=None)
def test_forward_and_backward_equal_gradient_tape(activation, widths, n, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, widths[0]))
    weights = [rng.normal(size=shape) for shape in itertools.pairwise(widths)]
    biases = [rng.normal(size=units) for units in widths[1:]]
    dh = rng.normal(size=(n, widths[-1]))

    f = getattr(keras.activations, activation)
    tensors = [tf.Variable(w) for w in weights], [tf.Variable(b) for b in biases]
    tz, th = [], [tf.Variable(x)]
    with tf.GradientTape() as tape:
        for w, b in zip(*tensors, strict=True):
            tz.append(th[-1] @ w + b)
            th.append(f(tz[-1]))
        loss = tf.reduce_sum(th[-1] * dh)
    tdz, tdw, tdb, tdx = tape.gradient(loss, (tz, *tensors, th[0]))

    mine = signals.backward(x, weights, biases, activation, dh)
    only_forward = signals.forward(x, weights, biases, activation)
    assert len(mine.z) == len(weights)
    for name, expected in {"z": tz, "h": th[1:], "dz": tdz, "dw": tdw, "db": tdb}.items():
        for value, tensor in zip(getattr(mine, name), expected, strict=True):
            np.testing.assert_allclose(value, tensor, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(mine.dx, tdx, rtol=1e-10, atol=1e-10)
    for z, h, mz, mh in zip(*only_forward, mine.z, mine.h, strict=True):
        assert (z == mz).all()
        assert (h == mh).all()


def test_activations_can_be_given_as_pairs_and_per_layer():
    x, weights = np.array([[1.0, -2.0]]), [np.eye(2), np.eye(2)]
    cube = (lambda z: z**3, lambda z: 3 * z**2)
    for activation in (cube, [cube, cube]):
        seen = signals.backward(x, weights, None, activation, np.ones((1, 2)))
        assert seen.h[1].tolist() == [[1.0, -512.0]]  # x**9
        np.testing.assert_allclose(seen.dx, [[9.0, 9 * 256.0]])
    mixed = signals.forward(x, weights, None, ["relu", cube])
    assert mixed.h[1].tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones(3)}, "x must have shape"),
        ({"x": np.ones((2, 4))}, "weights must fit"),
        ({"weights": []}, "weights must list"),
        ({"weights": [np.ones((3, 2)), np.ones((3, 1))]}, "weights must fit"),
        ({"biases": [np.ones(2), np.ones(2)]}, "biases must be None"),
        ({"activation": "swoosh"}, "activation must be one of"),
        ({"activation": ["relu"]}, "activation must be one for all"),
        ({"dh": np.ones((2, 5))}, "dh must broadcast"),
    ],
)
def test_stack_arguments_are_checked(change, message):
    good = {"x": np.ones((2, 3)), "weights": [np.ones((3, 2)), np.ones((2, 1))], "biases": None}
    with pytest.raises(ValueError, match=message):
        signals.backward(**(good | {"activation": "tanh", "dh": 1.0} | change))


# ------------------------------------------------------------------ probe against that definition


def random_normal(std):
    return lambda shape, dtype=None: std * keras.random.normal(shape, dtype=dtype)


def dense_model(activation, depth=4, width=30, optimizer="sgd", **kwargs):
    hidden = [layers.Dense(width, activation, name=f"h{i}", **kwargs) for i in range(depth)]
    model = keras.Sequential(
        [keras.Input((6,)), *hidden, layers.Dense(4, "softmax", name="out")], name="dense_net"
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", run_eagerly=True)
    return model


def by_hand(model, x, y, activation):
    weights, biases = model.get_weights()[::2], model.get_weights()[1::2]
    each = [activation] * (len(weights) - 1) + ["linear"]
    logits = signals.forward(x, weights, biases, each).z[-1]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    onehot = np.eye(logits.shape[1])[y]
    loss = -np.mean(np.log(p[np.arange(len(y)), y]))
    return loss, weights, signals.backward(x, weights, biases, each, (p - onehot) / len(y)), p


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_probe_equals_the_handwritten_pass(activation):
    model = dense_model(
        activation, optimizer=keras.optimizers.SGD(0.1), kernel_initializer="he_normal"
    )
    x, y = data(200)
    seen = signals.probe(model, x, y)
    table = seen.table()
    loss, weights, hand, p = by_hand(model, x.astype(float), y, activation)
    hand.h[-1] = p  # the output layer is softmax; its z and dz are those of the linear layer

    assert seen.loss == pytest.approx(loss, rel=1e-5)
    assert list(table.index) == ["h0", "h1", "h2", "h3", "out"]
    for name in ("z", "h", "dz"):
        arrays = getattr(hand, name)
        scale = np.array([np.sqrt(np.mean(a**2)) for a in arrays])
        for moment, f in {
            "mean": np.mean,
            "std": np.std,
            "rms": lambda a: np.sqrt(np.mean(a**2)),
        }.items():
            expected = np.array([f(a) for a in arrays])
            error = np.abs(table[f"{name}_{moment}"] - expected) / scale
            assert error.max() < 1e-5, (name, moment)
        for layer, values in zip(seen.layers, arrays, strict=True):
            histogram = getattr(layer, name)
            counts, _ = np.histogram(values, bins=histogram.edges)
            assert np.abs(counts - histogram.counts).sum() <= 4 + 0.002 * values.size  # rounding
            assert histogram.counts.sum() == values.size
    norms = np.array([np.linalg.norm(dw) for dw in hand.dw])
    assert relative(table["dw_norm"].to_numpy(), norms) < 1e-5
    w_norms = np.array([np.linalg.norm(w) for w in weights])
    np.testing.assert_allclose(table["w_norm"], w_norms, rtol=1e-6)
    np.testing.assert_allclose(table["grad_to_weight"], norms / w_norms, rtol=1e-4)
    np.testing.assert_allclose(table["update_to_weight"], 0.1 * norms / w_norms, rtol=1e-4)
    np.testing.assert_allclose(
        signals.layer_updates(model, x, y), table["update_to_weight"], rtol=1e-6
    )
    rms = np.sqrt([np.mean(dz**2) for dz in hand.dz[:-1]])
    assert seen.gradient_factor == pytest.approx((rms[0] / rms[-1]) ** (1 / 3), rel=1e-5)


def test_flat_places_are_found():
    model = dense_model("sigmoid", kernel_initializer=random_normal(3.0))
    x, y = data(300)
    _, _, hand, _ = by_hand(model, x.astype(float), y, "sigmoid")
    seen = signals.probe(model, x, y)
    slope = [h * (1 - h) for h in hand.h]
    for layer, s in zip(seen.layers[:-1], slope, strict=False):
        assert layer.saturated == pytest.approx(np.mean(s < 0.01), abs=1e-3)
        assert layer.dead == pytest.approx(np.mean((s < 0.01).all(axis=0)), abs=1e-9)
        assert layer.inactive == 0
    assert np.isnan(seen["out"].saturated)  # softmax has no slope of its own

    model = dense_model("relu", kernel_initializer="he_normal", bias_initializer="he_normal")
    model.layers[1].bias.assign(np.where(np.arange(30) < 12, -100.0, 0.0))
    _, _, hand, _ = by_hand(model, x.astype(float), y, "relu")
    for layer, h in zip(signals.probe(model, x, y).layers[:-1], hand.h, strict=False):
        assert layer.inactive == pytest.approx(np.mean(h == 0), abs=1e-3)
        assert layer.saturated == 0
        assert layer.dead == pytest.approx(np.mean((h == 0).all(axis=0)), abs=1e-9)
    assert signals.probe(model, x, y)["h1"].dead >= 0.4


def test_error_signals_belong_to_their_place():
    # y = sum(relu(z) + 3 z), z = 2 x: at the activation dL/dz is relu'(z), at the layer relu' + 3.
    inputs = keras.Input((1,))
    dense = layers.Dense(1, kernel_initializer=keras.initializers.Constant(2), name="dense")
    z = dense(inputs)
    branch = layers.Activation("relu", name="relu")(z)
    skip = layers.Rescaling(3.0, name="skip")(z)
    idle = layers.Dropout(0.5, name="idle")(layers.Add(name="sum")([branch, skip]))
    model = keras.Model(inputs, idle)
    model.compile("sgd", loss=lambda y, y_pred: y_pred)
    x = np.array([[1.0], [-1.0]], "float32")
    seen = signals.probe(model, x, x, training=False)
    # The loss is a mean over two examples, hence the half. Means over relu'(z) = 1, 0.
    means = {layer.name: 2 * layer.dz.mean for layer in seen.layers}
    assert means == {"dense": 3.5, "relu": 0.5, "skip": 1.0, "sum": 1.0, "idle": 1.0}
    assert seen["dense"].dw_norm == pytest.approx(abs((1 * 4 + -1 * 3) / 2))
    assert 2 * seen["dense"].dz.std == pytest.approx(0.5)  # gradients 4 and 3


def test_activation_layers_and_layers_as_activations():
    x, y = data(64)
    forms = {
        "attribute": [layers.Dense(9, "leaky_relu", name="d")],
        "layer": [layers.Dense(9, name="d"), layers.LeakyReLU(0.2, name="act")],
        "layer object": [layers.Dense(9, activation=layers.LeakyReLU(0.2), name="d")],
        "activation layer": [
            layers.Dense(9, name="d"),
            layers.Activation("leaky_relu", name="act"),
        ],
    }
    seen = {}
    for form, stack in forms.items():
        model = keras.Sequential([keras.Input((6,)), *stack, layers.Dense(4, name="out")])
        model.set_weights(
            [np.random.default_rng(1).normal(size=w.shape) for w in model.get_weights()]
        )
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        seen[form] = signals.probe(model, x, y)
        assert [layer.name for layer in seen[form].layers] == [s.name for s in stack] + ["out"]
    reference = seen["attribute"]
    for form, probed in seen.items():
        last = probed.layers[-2]
        assert last.z.std == pytest.approx(reference["d"].z.std, rel=1e-6), form
        assert last.h.std == pytest.approx(reference["d"].h.std, rel=1e-6), form
        assert last.dz.rms == pytest.approx(reference["d"].dz.rms, rel=1e-5), form
        assert (last.inactive, last.saturated, last.dead) == (0, 0, 0), form


# ------------------------------------------------------------------ any model, left untouched


class Block(layers.Layer):
    """A composite layer, with a shared sublayer, a random element and a loss of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(6, "gelu", name="inner")
        self.norm = layers.BatchNormalization(name="norm")
        self.noise = keras.random.SeedGenerator(5)
        self.seen = keras.metrics.Mean(name="seen")
        self.counter = tf.Variable(0.0, trainable=False)
        self.calls, self.fail = 0, False

    def build(self, shape):
        self.inner.build(shape)
        self.norm.build(shape)
        self.scale = self.add_weight(shape=(6,), initializer="ones", name="scale")

    def call(self, x, training=False):
        self.calls += 1
        self.counter.assign_add(1.0)
        if self.fail:
            raise RuntimeError("on purpose")
        h = self.inner(self.inner(x))
        h = h + 0.1 * keras.random.normal(keras.ops.shape(h), seed=self.noise)
        h = h + 0.1 * keras.random.normal(keras.ops.shape(h))  # Keras's global generator
        h = h + 0.1 * tf.random.normal(tf.shape(h)) + 0.1 * random.random() + np.random.rand()  # noqa: NPY002
        self.add_loss(keras.ops.mean(h**2))
        self.seen.update_state(keras.ops.mean(h))
        return self.norm(h, training=training) * self.scale


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.block = Block(name="block")
        self.blocks = [layers.Dense(6, "elu", name="a"), layers.Dense(6, "silu", name="b")]
        for layer in self.blocks:
            layer.build((None, 6))  # here, because TensorFlow loses variables made in a tf.function
        self.head = layers.Dense(4, name="head")

    @tf.function
    def residual(self, x):
        for layer in self.blocks:
            x = x + layer(x)
        return x

    def call(self, x, training=False):
        return self.head(self.residual(self.block(x, training=training)))


def dense_case():
    return dense_model("relu", optimizer="adam"), *data()


def subclassed_case():
    model = Subclassed()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    x, y = data()
    model(x)
    return model, x, y


def functional_case():
    inputs = {"left": keras.Input((6,), name="left"), "right": keras.Input((6,), name="right")}
    shared = layers.Dense(8, "tanh", kernel_regularizer="l2", activity_regularizer="l2", name="s")
    nested = keras.Sequential([keras.Input((8,)), layers.Dense(8, "relu", name="s")], name="nested")
    left, right = shared(inputs["left"]), shared(inputs["right"])
    h = layers.Concatenate(name="cat")([nested(left), layers.Dropout(0.5, name="drop")(right)])
    h = layers.BatchNormalization(name="bn")(h)
    outputs = [layers.Dense(4, "softmax", name="one")(h), layers.Dense(1, name="two")(left + right)]
    model = keras.Model(inputs, outputs, name="functional")
    model.compile("rmsprop", ["sparse_categorical_crossentropy", "mse"], metrics=[["acc"], ["mae"]])
    x, y = data()
    return model, {"left": x, "right": 2 * x}, [y, x[:, :1]]


def convolutional_case():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.RandomFlip(),
            layers.Conv2D(4, 3, activation="relu", name="conv"),
            layers.SpatialDropout2D(0.2),
            layers.BatchNormalization(),
            layers.ReLU(name="relu"),
            layers.MaxPooling2D(),
            layers.SpectralNormalization(layers.Dense(5), name="spectral"),
            layers.PReLU(name="prelu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4, "softmax", kernel_constraint="unit_norm", name="out"),
        ],
        name="convolutional",
    )
    model.compile(keras.optimizers.AdamW(), "sparse_categorical_crossentropy")
    rng = np.random.default_rng(0)
    return model, rng.normal(size=(16, 8, 8, 1)), rng.integers(0, 4, 16)


def recurrent_case():
    ids = keras.Input((5,), dtype="int32")
    h = layers.Embedding(10, 8, mask_zero=True, name="embedding")(ids)
    h = layers.MultiHeadAttention(2, 4, name="attention")(h, h)
    h = layers.Bidirectional(layers.SimpleRNN(4, return_sequences=True), name="both")(h)
    h = layers.LSTM(4, name="lstm")(h)
    model = keras.Model(ids, layers.Dense(4, "softmax", name="out")(h), name="recurrent")
    model.compile(keras.optimizers.SGD(momentum=0.9), "sparse_categorical_crossentropy")
    rng = np.random.default_rng(0)
    return model, rng.integers(1, 10, (12, 5)), rng.integers(0, 4, 12)


def mixed_precision_case():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "relu", dtype="mixed_float16", name="h"),
            layers.Dense(4, "softmax", dtype="float32", name="out"),
        ],
        name="mixed",
    )
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
    model.compile(optimizer, "sparse_categorical_crossentropy")
    return model, *data()


CASES = [
    dense_case,
    subclassed_case,
    functional_case,
    convolutional_case,
    recurrent_case,
    mixed_precision_case,
]


def state_of(model):
    """Everything that a training step may change, as bytes and plain values."""
    parts = [model, *model._flatten_layers(include_self=False)]
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    python = {
        (index, name): value
        for index, part in enumerate(parts)
        for name, value in vars(part).items()
        if isinstance(value, int | float | str | type(None))
    }
    globals_ = keras.src.backend.common.global_state.GLOBAL_STATE_TRACKER
    return {
        "variables": [(v.path, v.numpy().tobytes()) for v in variables],
        "raw": [part.counter.numpy() for part in parts if hasattr(part, "counter")],
        "losses": [[id(loss) for loss in part._losses] for part in parts],
        "metrics": [metric.name for metric in model.metrics],
        "attributes": [sorted(vars(part)) for part in parts],
        "activations": [vars(part).get("activation") for part in parts],
        "python": python,
        "built": (model.optimizer.built, model._compile_loss.built),
        "names": dict(getattr(globals_, "object_name_uids", {})),
        "call_context": getattr(globals_, "current_call_ctx", None),
        "eager": tf.config.functions_run_eagerly(),
        "random": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],  # noqa: NPY002
    }


def later_draws():
    """What the global random generators give next."""
    return [
        random.random(),
        float(np.random.rand()),  # noqa: NPY002
        tf.random.normal((3,)).numpy().tobytes(),
        keras.random.normal((3,)).numpy().tobytes(),
        keras.random.uniform((3,), seed=keras.random.SeedGenerator()).numpy().tobytes(),
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_probing_leaves_everything_as_it_was(case, trained):
    model, x, y = case()
    if trained:
        model.run_eagerly = True
        for _ in range(2):
            model.train_on_batch(x, y)
    keras.utils.set_random_seed(11)
    keras.random.normal((1,))  # so that Keras's global generator exists and is mid-sequence
    tf.random.normal((1,))
    before = state_of(model)
    seen = signals.probe(model, x, y)
    signals.layer_updates(model, x, y, training=False)
    signals.dead_units(model, x, batch_size=10)
    assert state_of(model) == before
    after = later_draws()

    keras.utils.set_random_seed(11)
    keras.random.normal((1,))
    tf.random.normal((1,))
    assert later_draws() == after

    assert np.isfinite(seen.loss)
    assert all(np.isfinite(layer.h.rms) for layer in seen.layers)
    assert all(layer.dz is None or np.isfinite(layer.dz.rms) for layer in seen.layers)
    weighted = [layer for layer in seen.layers if layer.has_kernel]
    assert weighted
    assert all(layer.update_to_weight > 0 for layer in weighted)
    assert seen.table().index.is_unique
    assert len(seen.verdict()) >= 1


def test_rows_of_shared_nested_and_composite_layers():
    model, x, y = functional_case()
    table = signals.probe(model, x, y).table()
    assert table.loc["s", "calls"] == 2
    assert {"nested/s", "drop", "bn", "one", "two"} <= set(table.index)
    assert "nested" not in table.index
    # Two calls, pooled: tanh of the same layer on x and on 2 x.
    w, b = model.get_layer("s").get_weights()
    z = np.concatenate([x["left"] @ w + b, x["right"] @ w + b])
    assert table.loc["s", "z_std"] == pytest.approx(z.std(), rel=1e-5)

    model, x, y = subclassed_case()
    table = signals.probe(model, x, y).table()
    assert list(table.index) == ["block", "inner", "norm", "a", "b", "head"]
    assert table.loc["inner", "calls"] == 2
    assert table.loc["block", "w_norm"] == pytest.approx(np.sqrt(6))  # its own scale, not `inner`


def test_training_argument_decides_about_batch_statistics_and_dropout():
    model, x, y = functional_case()
    model.get_layer("bn").moving_variance.assign(np.full(16, 100.0))
    training = signals.probe(model, x, y)
    inference = signals.probe(model, x, y, training=False)
    assert training["bn"].h.std == pytest.approx(1, abs=0.2)
    assert inference["bn"].h.std < 0.3
    zeros = {p: layer.h for p, layer in [("t", training["drop"]), ("i", inference["drop"])]}
    assert zeros["t"].rms > 1.2 * zeros["i"].rms  # kept units are doubled


def test_probe_uses_the_random_numbers_of_the_next_step():
    keras.utils.set_random_seed(0)
    dropout = layers.Dropout(0.5, seed=3, name="drop")
    model = keras.Sequential([keras.Input((6,)), dropout, layers.Dense(1, name="out")])
    model.compile("sgd", "mse")
    x, _ = data()
    seen = [signals.probe(model, x, x[:, :1]) for _ in range(2)]
    assert seen[0].loss == seen[1].loss
    assert seen[0].loss == pytest.approx(float(model.train_on_batch(x, x[:, :1])), rel=1e-6)


def test_everything_is_restored_when_the_model_raises():
    model, x, y = subclassed_case()
    model.block.fail = True
    before = state_of(model)
    with pytest.raises(Exception, match="on purpose"):
        signals.probe(model, x, y)
    with pytest.raises(Exception, match="on purpose"):
        signals.dead_units(model, x)
    assert state_of(model) == before
    with pytest.raises(ValueError, match=r"labels|logits|[Ss]hape|rank"):
        signals.probe(dense_model("tanh"), x, np.ones((len(x), 7, 3)))


# ------------------------------------------------------------------ updates


OPTIMIZERS = {
    "SGD": {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "clipnorm": 0.5},
    "Adagrad": {},
    "Adadelta": {"learning_rate": 1.0},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adam": {"amsgrad": True},
    "Adamax": {},
    "Nadam": {},
    "AdamW": {"weight_decay": 0.1, "learning_rate": 0.01},
    "Ftrl": {},
    "Lion": {},
    "Lamb": {},
    "Adafactor": {},
    "Muon": {},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_is_the_one_that_training_makes(name):
    schedule = keras.optimizers.schedules.ExponentialDecay
    options = {"learning_rate": schedule(0.05, 2, 0.5)} | OPTIMIZERS[name]
    model = dense_model("tanh", depth=1, optimizer=getattr(keras.optimizers, name)(**options))
    x, y = data(64)
    for step in range(3):  # the optimizer is not built before the first
        told = signals.layer_updates(model, x, y)
        before = [layer.kernel.numpy().astype(float) for layer in model.layers]
        model.train_on_batch(x, y)
        after = [layer.kernel.numpy().astype(float) for layer in model.layers]
        pairs = zip(before, after, strict=True)
        done = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in pairs]
        assert min(done) > 0
        np.testing.assert_allclose(told, done, rtol=2e-3, err_msg=f"step {step}")  # float32 weights


def test_unregistered_schedules_constraints_and_exclusions_count():
    class Halving(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1 * 0.5 ** tf.cast(step, "float32")

    x, y = data(64)
    model = dense_model("tanh", depth=1, optimizer=keras.optimizers.SGD(Halving()))
    first = signals.layer_updates(model, x, y)
    model.optimizer.iterations.assign(1)
    np.testing.assert_allclose(signals.layer_updates(model, x, y), first / 2, rtol=1e-6)

    model = dense_model("tanh", depth=1, optimizer="sgd", kernel_constraint="unit_norm")
    told = signals.layer_updates(model, x, y)["h0"]
    before = model.layers[0].kernel.numpy()
    model.train_on_batch(x, y)
    done = np.linalg.norm(model.layers[0].kernel.numpy() - before) / np.linalg.norm(before)
    assert told == pytest.approx(done, rel=1e-4)

    optimizer = keras.optimizers.SGD(0.1, weight_decay=1.0)
    model = dense_model("tanh", depth=1, optimizer=optimizer)
    optimizer.exclude_from_weight_decay([model.layers[0].kernel])
    told = signals.layer_updates(model, x, y)
    assert told["h0"] < 0.05 < told["out"]


def test_a_step_below_float32_resolution_is_measured():
    model = dense_model("sigmoid", depth=12, optimizer=keras.optimizers.SGD(0.01))
    x, y = data(64)
    told = signals.layer_updates(model, x, y)
    assert 0 < told["h0"] < 1e-9 < told["h11"]
    table = signals.probe(model, x, y).table()
    np.testing.assert_allclose(told, 0.01 * table["grad_to_weight"], rtol=1e-5)


def test_frozen_and_unused_layers():
    model, x, y = functional_case()
    model.get_layer("s").trainable = False
    model.compile("sgd", [None, "mse"])
    seen = signals.probe(model, x, y)
    assert seen["s"].update_to_weight == 0
    assert np.isnan(seen["s"].grad_to_weight)
    assert seen["one"].dz is None
    assert np.isnan(seen["one"].dw_norm)
    assert seen["one"].update_to_weight == 0
    assert seen["two"].update_to_weight > 0


# ------------------------------------------------------------------ verdicts


@pytest.mark.parametrize(
    ("activation", "std", "depth", "rate", "words"),
    [
        ("tanh", 0.1, 10, 0.01, ["healthy"]),
        ("relu", np.sqrt(0.02), 6, 0.01, ["healthy"]),
        ("sigmoid", 0.1, 10, 0.01, ["vanishing", "different speeds"]),
        ("tanh", 1.0, 10, 1e-6, ["exploding", "saturated"]),
        ("sigmoid", 1.0, 4, 0.01, ["saturated"]),
        ("relu", 0.05, 10, 0.01, ["vanishing", "fades", "small steps"]),
        ("relu", 0.4, 10, 1e-9, ["exploding", "grows"]),
        ("tanh", 0.1, 3, 10.0, ["large steps"]),
        ("tanh", 0.1, 3, 1e-7, ["small steps"]),
    ],
)
def test_verdict_names_what_is_wrong(activation, std, depth, rate, words):
    hidden = [
        layers.Dense(100, activation, kernel_initializer=random_normal(std), name=f"h{i}")
        for i in range(depth)
    ]
    out = layers.Dense(4, name="out")
    model = keras.Sequential([keras.Input((100,)), *hidden, out])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate), loss)
    verdict = signals.probe(model, *data(200, features=100)).verdict()
    text = " | ".join(verdict)
    for word in words:
        assert word in text, text
    for word in ("vanishing", "exploding", "large steps", "small steps", "dead", "not a finite"):
        assert word in words or word not in text, text


def test_verdict_on_dead_units_silence_and_overflow():
    x, y = data(100)
    model = dense_model("relu", depth=3, kernel_initializer="he_normal")
    bias = np.zeros(30, "float32")
    bias[:12] = -100
    model.layers[1].bias.assign(bias)
    assert signals.probe(model, x, y).verdict() == ["dead units: ~40 % in layer h1"]

    model.layers[1].bias.assign(np.full(30, -100.0))
    text = " | ".join(signals.probe(model, x, y).verdict())
    assert "no gradient at all reaches h0 ... h2 (3 layers)" in text
    assert "inactive outputs: ~100 % in layer h1" in text

    model.layers[1].kernel.assign(np.full((30, 30), np.nan))
    assert signals.probe(model, x, y).verdict() == ["not finite: a signal in layer h1"]

    inputs = keras.Input((1,))
    h = layers.Dense(1, kernel_initializer="ones", name="below")(inputs)
    h = layers.Dense(1, kernel_initializer="ones", name="above")(keras.ops.sqrt(h))
    model = keras.Model(inputs, h)
    model.compile("sgd", "mse")
    zero = np.zeros((2, 1), "float32")
    assert signals.probe(model, zero, zero + 1).verdict() == ["not finite: a signal in layer below"]


def test_a_verdict_needs_no_depth():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, name="only")])
    model.compile("sgd", "mse")
    x = np.ones((4, 2), "float32")
    seen = signals.probe(model, x, 100 * x[:, :1])
    assert np.isnan(seen.gradient_factor)
    assert seen.verdict()[0].startswith("large steps: one step changes only by ~")
    with pytest.raises(KeyError, match="there are \\['only'\\]"):
        seen["other"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "net"}, TypeError, "model must be a keras.Model, got str"),
        ({"x": np.ones((3, 6))}, ValueError, r"same number of examples.*\[3, 32\]"),
        ({"x": np.ones((0, 6)), "y": np.ones(0)}, ValueError, "at least one"),
        ({"x": [[1.0, 2.0]]}, TypeError, "x must be an array"),
    ],
)
def test_probe_checks_its_arguments(change, error, message):
    x, y = data()
    with pytest.raises(error, match=message):
        signals.probe(**({"model": dense_model("tanh"), "x": x, "y": y} | change))


def test_probe_needs_a_built_and_compiled_model():
    x, y = data()
    unbuilt = keras.Sequential([layers.Dense(2)], name="u")
    unbuilt.compile("sgd", "mse")
    with pytest.raises(ValueError, match="'u' must be built"):
        signals.probe(unbuilt, x, y)
    uncompiled = keras.Sequential([keras.Input((6,)), layers.Dense(2)], name="c")
    with pytest.raises(ValueError, match="'c' must be compiled"):
        signals.layer_updates(uncompiled, x, y)
    assert signals.dead_units(uncompiled, x) == {}  # that needs no loss


# ------------------------------------------------------------------ over time


@pytest.mark.parametrize("engine", ["keras", "ch11lib"])
def test_recorder_follows_training_without_disturbing_it(engine):
    x, y = data(96)

    def fit(model, epochs, callbacks):
        options = {"epochs": epochs, "batch_size": 16, "verbose": 0, "callbacks": callbacks}
        if engine == "keras":
            return model.fit(x, y, **options).history
        return training.fit(model, x, y, seed=3, **options).history

    runs = {}
    for watched in (False, True):
        keras.utils.set_random_seed(5)
        stack = [
            keras.Input((6,)),
            layers.Dense(12, name="a"),
            layers.BatchNormalization(name="bn"),
            layers.Activation("relu", name="relu"),
            layers.Dropout(0.3, name="drop"),
            layers.Dense(4, "softmax", name="out"),
        ]
        model = keras.Sequential(stack)
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        recorder = signals.Recorder(x[:40], y[:40], every=2)
        history = fit(model, 5, [recorder] if watched else [])
        runs[watched] = history, [w.tobytes() for w in model.get_weights()]
    assert runs[True] == runs[False]
    assert recorder.epochs == [0, 2, 4]
    ratios = recorder.table("update_to_weight")
    assert list(ratios.index) == [0, 2, 4]
    assert list(ratios.columns) == ["a", "bn", "out"]
    assert (ratios > 0).all(axis=None)
    fit(model, 1, [recorder])
    assert recorder.epochs == [0, 2, 4, 6]
    now = signals.probe(model, x[:40], y[:40]).table()["grad_to_weight"]
    assert recorder.table("grad_to_weight").loc[6, "out"] == now["out"]


def test_recorder_checks_its_arguments():
    x, y = data()
    for every in (0, 1.5, True):
        with pytest.raises(ValueError, match="every must be a positive integer"):
            signals.Recorder(x, y, every=every)
    recorder = signals.Recorder(x, y)
    with pytest.raises(ValueError, match="nothing has been recorded"):
        recorder.table("dead")
    dense_model("tanh").fit(x, y, epochs=1, verbose=0, callbacks=[recorder])
    with pytest.raises(ValueError, match=r"column must be one of .*got 'kind'"):
        recorder.table("kind")


# ------------------------------------------------------------------ dead units


def test_dead_units_are_those_of_numpy_in_any_batch_size():
    x, _ = data(500)
    model = dense_model("relu", depth=5, kernel_initializer=random_normal(0.5))
    for layer in model.layers[:-1]:
        layer.bias.assign(np.random.default_rng(1).normal(-1.5, 1.5, 30))
    weights, biases = model.get_weights()[::2], model.get_weights()[1::2]
    h = signals.forward(x, weights, biases, ["relu"] * 5 + ["linear"]).h
    for size in (500, 64, 1):
        part = x if size > 1 else x[:20]
        masks = signals.dead_units(model, part, batch_size=size)
        assert list(masks) == ["h0", "h1", "h2", "h3", "h4", "out"]
        for mask, values in zip(list(masks.values())[:-1], h, strict=False):
            assert (mask == (values[: len(part)] == 0).all(axis=0)).all()
    assert 0 < masks["h3"].sum() < 30


def test_dead_channels_and_activation_layers():
    conv = layers.Conv2D(3, 3, name="conv")
    model = keras.Sequential([keras.Input((8, 8, 1)), conv, layers.ReLU(name="relu")])
    conv.bias.assign([0.0, -100.0, 0.0])
    x = np.random.default_rng(0).normal(size=(10, 8, 8, 1))
    masks = signals.dead_units(model, x)
    assert {name: mask.tolist() for name, mask in masks.items()} == {"relu": [False, True, False]}
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        signals.dead_units(model, x, batch_size=0)


# ------------------------------------------------------------------ shattered gradients


GRID = np.linspace(-2, 2, 500)


@pytest.mark.parametrize("variant", ["plain", "batch_norm", "residual"])
def test_input_gradient_equals_finite_differences(variant):
    grid, step = np.linspace(-1.99, 2.01, 61), 1e-7
    # Both ends of every difference in one call: they share weights and, in batch norm, statistics.
    points = np.concatenate([grid - step, grid + step])
    y, _ = signals._relu_network(
        points, 6, np.random.default_rng(3), (40, 2), (1.0, 0.3, 0.2), variant, 0.7
    )
    difference = (y[:, 61:] - y[:, :61]) / (2 * step)
    told = signals.input_gradient(
        points,
        6,
        rng=3,
        width=40,
        outputs=2,
        weight_variance=0.09 * 40,
        bias_variance=0.04,
        variant=variant,
        branch=0.7,
    )
    assert told.shape == (2, 122)
    smooth = np.isclose(told[:, :61], told[:, 61:], rtol=1e-9)  # no kink in between
    assert smooth.mean() > 0.9
    error = np.abs(difference - told[:, :61])[smooth] / np.abs(told).max()
    assert error.max() < 1e-6


def test_residual_branch_of_weight_zero_is_a_single_layer():
    shallow = signals.input_gradient(GRID, 1, rng=0)
    idle = signals._relu_network(
        GRID, 5, np.random.default_rng(0), (200, 1), (1.0, 0.1, 0), "residual", 0.0
    )[1]
    # Other draws in between, so other output weights; the kinks are those of the first layer.
    kinks = [np.flatnonzero(np.diff(g[0])) for g in (shallow, idle)]
    assert (kinks[0] == kinks[1]).all()


@pytest.mark.parametrize("shape", [(50,), (3, 64), (2, 3, 33)])
def test_autocorrelation_equals_numpy_correlate(shape):
    signal = np.random.default_rng(0).normal(size=shape).cumsum(axis=-1)
    told = signals.autocorrelation(signal)
    assert told.shape == shape
    for row, values in zip(told.reshape(-1, shape[-1]), signal.reshape(-1, shape[-1]), strict=True):
        centred = values - values.mean()
        full = np.correlate(centred, centred, "full")[len(values) - 1 :]
        np.testing.assert_allclose(row, full / full[0], atol=1e-12)
    np.testing.assert_allclose(signals.autocorrelation(1e-250 * signal), told, atol=1e-9)


def test_half_correlation_lag_of_known_processes():
    # First-order autoregression: r(k) = a**k, so the half lag is log(1/2) / log(a).
    rng, a = np.random.default_rng(0), 0.95
    noise = rng.normal(size=(200, 4000))
    x = np.zeros_like(noise)
    for i in range(1, noise.shape[1]):
        x[:, i] = a * x[:, i - 1] + noise[:, i]
    lag = signals.half_correlation_lag(x, spacing=0.5)
    assert lag == pytest.approx(0.5 * np.log(0.5) / np.log(a), rel=0.03)
    assert signals.half_correlation_lag(noise, 1.0) == pytest.approx(0.5, abs=0.01)
    several = signals.half_correlation_lag(x.reshape(4, 50, -1), 0.5)
    assert several.shape == (4,)
    assert several == pytest.approx([lag] * 4, rel=0.1)


def test_gradients_shatter_with_depth_and_skips_delay_it():
    tame = {"first_variance": 1 / 200, "weight_variance": 1.0, "bias_variance": 1 / 200}

    def lag(depth, **options):
        runs = [signals.input_gradient(GRID, depth, rng=s, outputs=20, **options) for s in range(3)]
        return float(np.median(signals.half_correlation_lag(np.array(runs), GRID[1] - GRID[0])))

    shallow, medium, deep = (lag(depth) for depth in (1, 10, 40))
    assert shallow > 1.3 * medium > 2 * deep
    assert shallow > 4 * deep
    assert lag(40, variant="residual", branch=0.3) > 2 * deep
    assert lag(40, **tame) > 2 * deep
    assert signals.input_gradient(GRID, 40, rng=0, **tame).std() < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((3, 1))}, "x must be a vector"),
        ({"depth": 0}, "depth must be a positive integer, got 0"),
        ({"outputs": 1.0}, "outputs must be a positive integer"),
        ({"variant": "dense"}, "variant must be one of"),
    ],
)
def test_input_gradient_checks_its_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        signals.input_gradient(**({"x": GRID, "depth": 2, "rng": 0} | change))


def test_signals_without_correlation_are_refused():
    with pytest.raises(ValueError, match="not constant"):
        signals.autocorrelation(np.ones(5))
    with pytest.raises(ValueError, match="two or more points"):
        signals.autocorrelation(np.ones((5, 1)))
    with pytest.raises(ValueError, match="spacing must be positive"):
        signals.half_correlation_lag(np.arange(5.0), 0.0)


def test_probes_in_several_threads_leave_the_global_state_as_it_was():
    models = [dense_model("relu", depth=2 + i) for i in range(4)]
    x, y = np.ones((8, 6), "float32"), np.zeros(8, "int32")
    state = random.getstate()
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            list(threads.map(lambda model: signals.dead_units(model, x), models))
            list(threads.map(lambda model: signals.probe(model, x, y), models))
    assert not tf.config.functions_run_eagerly()
    assert random.getstate() == state
