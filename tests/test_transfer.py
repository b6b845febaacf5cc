import dataclasses
import math

from ch11lib import training, transfer
from ch11lib.backend import keras
from ch11lib.datasets import load_fashion_mnist
import numpy as np
import pytest

layers = keras.layers

# Keras 3.15 hands a variable to np.array in a way that NumPy 2 will no longer accept one day.
saves = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(60, 6)).astype("float32")


@pytest.fixture
def y(x):
    return (x[:, 0] > 0).astype("int32")


def dense_net():
    return keras.Sequential(
        [
            keras.Input((6,)),
            *(layers.Dense(5, "tanh", name=f"hidden_{i}") for i in (1, 2, 3)),
            layers.Dense(4, name="output"),
        ],
        name="dense_net",
    )


def with_everything():
    """A Sequential model with layers of every kind that has state."""
    inner = keras.Sequential(
        [keras.Input((5,)), layers.Dense(5, "relu"), layers.BatchNormalization()], name="inner"
    )
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Activation("relu", name="relu"),
            layers.Dropout(0.3, name="drop"),
            inner,
            layers.Dense(4, name="output"),
        ]
    )


def branching():
    """Two inputs, a layer that is called twice, a shortcut, operations that are not layers."""
    one, two = keras.Input((6,), name="one"), keras.Input((6,), name="two")
    shared = layers.Dense(5, name="shared")
    left, right = shared(one), shared(two)
    left = layers.Dense(5, "relu", name="left")(left)
    right = layers.Dense(5, "relu", name="right")(right)
    both = layers.Add(name="both")([left, keras.ops.abs(right - 1.0)])
    return keras.Model([one, two], layers.Dense(2, name="output")(both), name="branching")


def residual():
    inputs = keras.Input((6,))
    h = layers.Dense(6, "relu", name="block")(inputs)
    h = layers.Add(name="sum")([h, inputs])
    return keras.Model(inputs, layers.Dense(3, name="output")(h), name="residual")


def trained(model, x, y, optimizer="adam"):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Two steps without a graph, which would take longer to build.
    model.compile(optimizer, loss, metrics=["accuracy"], run_eagerly=True)
    model.fit(x, y, epochs=2, batch_size=len(x), verbose=0)
    return model


def state(model):
    """Everything that a model consists of, bit by bit."""
    seeds = [v for v in model.variables if v.name == "seed_generator_state"]
    assert len(seeds) == len({id(v) for v in seeds})
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    return (
        [v.numpy().tobytes() for v in variables],
        [layer.trainable for layer in model._flatten_layers()],
        model.to_json(),
        model.optimizer.get_config(),
        id(model.optimizer),
    )


# ------------------------------------------------------------------------------------------- tasks


def test_tasks_partition_the_images():
    data = load_fashion_mnist().take(300)
    a, b = transfer.split_tasks(data, ["Bag", 3])
    assert b.class_names == ("Bag", "Dress")
    assert a.class_names == tuple(c for c in data.class_names if c not in b.class_names)
    for part in ("train", "valid", "test"):
        names = np.array(data.class_names)[getattr(data, f"y_{part}")]
        images = getattr(data, f"x_{part}")
        for task in (a, b):
            mine = np.isin(names, task.class_names)
            np.testing.assert_array_equal(getattr(task, f"x_{part}"), images[mine])
            labels = getattr(task, f"y_{part}")
            np.testing.assert_array_equal(np.array(task.class_names)[labels], names[mine])
            assert labels.dtype == np.int32
    assert len(a.y_train) + len(b.y_train) == 300
    assert (a.mean, a.std) == (data.mean, data.std)
    assert transfer.split_tasks(data.standardized(), [0])[1].std == data.standardized().std


def test_tasks_with_few_labels():
    data = load_fashion_mnist()
    _, b = transfer.split_tasks(data, ["Coat", "Shirt"], n=21, seed=4)
    _, whole = transfer.split_tasks(data, ["Coat", "Shirt"])
    np.testing.assert_array_equal(b.x_train, whole.few_labels(21, 4).x_train)
    np.testing.assert_array_equal(b.x_test, whole.x_test)
    assert sorted(np.bincount(b.y_train)) == [10, 11]


@pytest.mark.parametrize(
    ("classes", "error", "words"),
    [
        (["Hat"], ValueError, "classes_b .* received 'Hat'"),
        ([10], ValueError, "classes_b .* received 10"),
        ([-1], ValueError, "classes_b .* received -1"),
        ([True], ValueError, "classes_b .* received True"),
        ([], ValueError, r"classes_b must be distinct .* received \[\]"),
        (["Bag", 8], ValueError, r"distinct .* received \['Bag', 8\]"),
        (range(10), ValueError, "not all that there are"),
        ("Bag", TypeError, "classes_b must be a list .* received 'Bag'"),
    ],
)
def test_wrong_classes(classes, error, words):
    with pytest.raises(error, match=words):
        transfer.split_tasks(load_fashion_mnist().take(50), classes)


# ------------------------------------------------------------------------------------ reused layers


@pytest.mark.parametrize("make", [dense_net, with_everything, residual])
def test_copies_compute_what_the_original_computes(make, x, y):
    model = trained(make(), x, y)
    inner = [layer for layer in model.layers if not isinstance(layer, layers.InputLayer)]
    for n, layer in enumerate(inner, start=1):
        cut = keras.Model(model.inputs[0], layer.output)
        for key in (n, layer.name):
            new = transfer.reuse_layers(model, key, [])
            np.testing.assert_array_equal(new(x), cut(x))
            assert not {id(part) for part in new._flatten_layers()} & {
                id(part) for part in model._flatten_layers()
            }
            assert not {id(v) for v in new.variables} & {id(v) for v in model.variables}


@pytest.mark.parametrize(
    ("make", "frozen"), [(dense_net, True), (with_everything, False), (residual, False)]
)
def test_the_original_is_never_changed(make, frozen, x, y):
    model = trained(make(), x, y)
    before, predicted = state(model), model.predict(x, verbose=0)
    n = len([layer for layer in model.layers if not isinstance(layer, layers.InputLayer)]) - 1
    new = transfer.reuse_layers(model, n, 2, frozen=frozen)
    transfer.features(model, n, x)
    trained(new, x, y)
    transfer.freeze(new, 0)
    trained(new, x, y)
    transfer.distance(model, new)
    assert state(model) == before
    np.testing.assert_array_equal(model.predict(x, verbose=0), predicted)
    # It can also go on as if nothing had happened: optimizer, metrics and seeds are still its own.
    model.fit(x, y, epochs=1, verbose=0)


def test_a_head_from_the_model_itself_is_copied(x, y):
    model = trained(dense_net(), x, y)
    before = state(model)
    new = transfer.reuse_layers(model, 3, model.get_layer("output"))
    assert new.get_layer("output") is not model.get_layer("output")
    np.testing.assert_array_equal(new.predict(x, verbose=0), model.predict(x, verbose=0))
    trained(new, x, y)
    assert state(model) == before


def test_branches(x, y):
    model = branching()
    model.compile("sgd", "mse")
    model.fit([x, x[::-1]], np.eye(2)[y], verbose=0)
    before = state(model)
    new = transfer.reuse_layers(model, 4, 3)
    assert [i.name for i in new.inputs] == ["one", "two"]
    cut = keras.Model(model.inputs, model.get_layer("both").output)
    pair = [x, 2 * x]
    np.testing.assert_array_equal(
        transfer.features(model, "both", pair), cut.predict(pair, verbose=0)
    )
    # One branch only, with the input that it needs.
    left = transfer.reuse_layers(model, "left", [layers.Dense(1, name="new")])
    assert [i.name for i in left.inputs] == ["one"]
    kept = [a.name for a in left.layers if not isinstance(a, layers.InputLayer)]
    assert kept == ["shared", "left", "new"]
    expected = keras.Model(model.inputs, model.get_layer("left").output).predict(pair, verbose=0)
    np.testing.assert_array_equal(transfer.features(model, "left", x), expected)
    assert state(model) == before
    with pytest.raises(ValueError, match=r"one branch, but of the first 3 layers \['right'\]"):
        transfer.reuse_layers(model, 3, 1)
    with pytest.raises(ValueError, match="'shared' has 2 in model 'branching'"):
        transfer.reuse_layers(model, "shared", 1)
    with pytest.raises(ValueError, match="n must be at least 1 for a model with 2 inputs"):
        transfer.reuse_layers(model, 0, 1)


def test_inputs_by_name(x):
    inputs = {"a": keras.Input((6,), name="a"), "b": keras.Input((6,), name="b")}
    h = layers.Concatenate(name="join")([inputs["a"], inputs["b"]])
    model = keras.Model(inputs, layers.Dense(3, name="output")(h))
    new = transfer.reuse_layers(model, "join", 2)
    assert new({"b": x, "a": 2 * x}).shape == (60, 2)
    np.testing.assert_array_equal(
        transfer.features(model, 1, {"b": x, "a": 2 * x}), np.hstack([2 * x, x])
    )


def test_layers_that_another_model_uses_too(x):
    """Keras then knows several calls of a layer; only those in this model count."""
    model = residual()
    expected = keras.Model(model.inputs, model.get_layer("sum").output).predict(x, verbose=0)
    keras.Sequential([keras.Input((6,)), *model.layers[1:2], layers.Dense(2)])
    model.get_layer("sum")([model.input, model.input])
    np.testing.assert_array_equal(transfer.features(model, 2, x), expected)


def test_state_that_is_not_trained_is_copied(x):
    scale = layers.Normalization(name="scale")
    scale.adapt(3 * x + 5)
    model = keras.Sequential([keras.Input((6,)), scale, layers.Dense(2)])
    np.testing.assert_allclose(transfer.features(model, 1, 3 * x + 5), scale(3 * x + 5), rtol=1e-6)
    model = with_everything()
    model(50 * x, training=True)
    new = transfer.reuse_layers(model, 2, 1)
    for name in ("moving_mean", "moving_variance"):
        np.testing.assert_array_equal(
            getattr(new.get_layer("norm"), name), getattr(model.get_layer("norm"), name)
        )
    assert np.abs(new.get_layer("norm").moving_mean).max() > 0.01


def test_features_come_from_inference_mode(x):
    model = with_everything()
    cut = keras.Model(model.inputs[0], model.layers[4].output)
    expected = cut(x, training=False)
    assert np.abs(cut(x, training=True) - expected).max() > 0.1  # dropout, batch statistics
    np.testing.assert_array_equal(transfer.features(model, 5, x), cut(x, training=False))


def test_counting():
    model = with_everything()
    for n in range(7):
        kept = [layer.name for layer in transfer.reuse_layers(model, n, 7).layers[:-1]]
        assert kept == [layer.name for layer in model.layers[:n]]
    by_name = transfer.reuse_layers(model, "relu", 7)
    assert [layer.name for layer in by_name.layers] == ["first", "norm", "relu", "head"]
    assert isinstance(by_name, keras.Sequential)
    assert by_name.output_shape == (None, 7)
    assert not by_name.compiled
    assert by_name.get_layer("head").get_config()["activation"] == "linear"
    functional = transfer.reuse_layers(residual(), np.int64(2), 7)
    assert [a.name for a in functional.layers[1:]] == ["block", "sum", "head"]
    assert transfer.reuse_layers(residual(), 0, 7).count_params() == 7 * 7


def test_flags():
    model = dense_net()
    model.layers[0].trainable = False
    for frozen in (True, False):
        new = transfer.reuse_layers(model, 2, [layers.Dense(3), layers.Dense(1)], frozen=frozen)
        flags = [layer.trainable for layer in new.layers]
        assert flags == [not frozen, not frozen, True, True]
        assert len(new.trainable_variables) == (4 if frozen else 8)
    assert [layer.trainable for layer in model.layers] == [False, True, True, True]


def test_types_and_shapes_of_inputs_are_kept():
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="words"),
            layers.Embedding(9, 4, dtype="float64"),
            layers.GlobalAveragePooling1D(dtype="float64"),
        ]
    )
    new = transfer.reuse_layers(model, 1, [layers.Flatten()])
    assert (new.inputs[0].dtype, new.inputs[0].shape) == ("int32", (None, None))
    assert transfer.features(model, 2, np.zeros((3, 7), int)).dtype == np.float64
    late = keras.Sequential([layers.Dense(3), layers.Dense(2)])
    late(np.ones((2, 5)))
    assert transfer.reuse_layers(late, 1, 4).count_params() == 18 + 16


@saves
def test_the_new_model_survives_saving(tmp_path, x, y):
    for i, make in enumerate((with_everything, residual)):
        new = trained(transfer.reuse_layers(make(), 2, 2, frozen=True), x, y)
        new.save(tmp_path / f"{i}.keras")
        loaded = keras.models.load_model(tmp_path / f"{i}.keras")
        np.testing.assert_array_equal(loaded.predict(x, verbose=0), new.predict(x, verbose=0))
        flags = [[layer.trainable for layer in model.layers] for model in (new, loaded)]
        assert flags[0] == flags[1]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="own")
        self.dense = layers.Dense(2)

    def call(self, inputs):
        return self.dense(inputs)


@pytest.mark.parametrize(
    ("n", "head", "error", "words"),
    [
        (5, 1, ValueError, r"n must lie in 0\.\.4 for .*'dense_net'.*'output'\], received 5"),
        (-1, 1, ValueError, r"n must lie in 0\.\.4 .* received -1"),
        (2.0, 1, TypeError, r"n must be an integer .* received 2\.0"),
        (True, 1, TypeError, "n must be an integer .* received True"),
        (None, 1, TypeError, "n must be an integer .* received None"),
        ("hidden_9", 1, ValueError, "n must be a layer of model .* received 'hidden_9'"),
        (2, 0, ValueError, "head must lie in 1.* received 0"),
        (2, "softmax", TypeError, "head must be a number .* received 'softmax'"),
        (2, None, TypeError, "head must be a number .* received None"),
        (2, [layers.Dense], TypeError, "head must consist of layers"),
        (2, [keras.Input((5,))], TypeError, "head must consist of layers"),
        (0, [], ValueError, "n and head must leave a layer"),
    ],
)
def test_wrong_n_and_head(n, head, error, words):
    with pytest.raises(error, match=words):
        transfer.reuse_layers(dense_net(), n, head)


def test_heads_that_do_not_fit():
    built = layers.Dense(3, name="built")
    built.build((None, 17))
    conv = layers.Conv2D(3, 3, name="conv")
    for make in (dense_net, residual):
        width = make().layers[-2].output.shape[-1]
        with pytest.raises(
            ValueError, match=rf"head must fit .* \(None, {width}\): .*\'built\'.* value 17"
        ):
            transfer.reuse_layers(make(), 2, built)
        with pytest.raises(ValueError, match=rf"\(None, {width}\): .*'conv'.*expected min_ndim=4"):
            transfer.reuse_layers(make(), 2, conv)
    with pytest.raises(ValueError, match=r"names of their own.*received \['hidden_1'\] twice"):
        transfer.reuse_layers(dense_net(), 2, layers.Dense(2, name="hidden_1"))


@pytest.mark.parametrize(
    "call",
    [
        lambda model: transfer.reuse_layers(model, 1, 1),
        lambda model: transfer.freeze(model, 1),
        lambda model: transfer.features(model, 1, np.ones((2, 6))),
    ],
)
def test_models_that_cannot_be_cut(call):
    with pytest.raises(TypeError, match=r"subclassed model 'own' \(Subclassed\)"):
        call(Subclassed())
    with pytest.raises(ValueError, match="model 'late' must be built"):
        call(keras.Sequential([layers.Dense(2)], name="late"))
    with pytest.raises(TypeError, match=r"model must be a keras\.Model, received Dense"):
        call(layers.Dense(2))


# ----------------------------------------------------------------------------------------- freezing


def test_freeze(x, y):
    model = with_everything()
    transfer.freeze(model, 5)
    assert [layer.trainable for layer in model.layers] == [False] * 5 + [True]
    assert not any(part.trainable for part in model.get_layer("inner").layers)
    assert [v.path.split("/")[-2] for v in model.trainable_variables] == ["output"] * 2
    transfer.freeze(model, "norm")
    assert [layer.trainable for layer in model.layers] == [False] * 2 + [True] * 4
    transfer.freeze(model, 0)
    assert len(model.trainable_variables) == 2 + 2 + 4 + 2
    model.trainable = False
    transfer.freeze(model, 1)  # also after the whole was frozen
    assert len(model.trainable_variables) == 2 + 4 + 2
    branches = branching()
    transfer.freeze(branches, "left")
    frozen = {layer.name for layer in branches.layers if not layer.trainable}
    assert frozen == {"shared", "left"}
    with pytest.raises(ValueError, match=r"n must lie in 0\.\.6 .* received 7"):
        transfer.freeze(model, 7)


@pytest.mark.parametrize("engine", ["keras", "ch11lib"])
def test_frozen_layers_do_not_learn(engine, x, y):
    model = trained(with_everything(), 3 * x + 1, y)
    new = transfer.reuse_layers(model, 5, 2, frozen=True)
    new.compile(keras.optimizers.Adam(0.1), "sparse_categorical_crossentropy")
    before = new.get_weights()
    if engine == "keras":
        new.fit(x, y, epochs=3, verbose=0)
    else:
        training.fit(new, x, y, epochs=3, seed=0)
    same = [np.array_equal(a, b) for a, b in zip(before, new.get_weights(), strict=True)]
    assert same == [True] * (len(same) - 2) + [False] * 2
    # Frozen batch normalization is in inference mode: only dropout is left of the training mode.
    norm = new.get_layer("norm")
    assert np.array_equal(norm(x[:, :5], training=True), norm(x[:, :5]))
    transfer.freeze(new, 0)
    assert not np.array_equal(norm(x[:, :5], training=True), norm(x[:, :5]))


def test_training_on_features_is_training_through_the_frozen_layers(x, y):
    source = trained(dense_net(), x, y)
    through = transfer.reuse_layers(source, 2, 3, frozen=True)
    alone = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
    alone.set_weights(through.layers[-1].get_weights())
    cached = transfer.features(source, 2, x, batch_size=7)
    assert cached.shape == (60, 5)
    losses = []
    for model, inputs in ((through, x), (alone, cached)):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
        losses.append(model.fit(inputs, y, epochs=10, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, atol=1e-6)
    for a, b in zip(through.layers[-1].get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    with pytest.raises(ValueError, match="x must hold one example at least"):
        transfer.features(source, 2, x[:0])


# ---------------------------------------------------------------------------------------- distances


def test_distance_by_hand():
    a, b = dense_net(), dense_net()
    a.set_weights([np.ones_like(w) for w in a.get_weights()])
    b.set_weights([np.ones_like(w) for w in b.get_weights()])
    kernel, bias = a.layers[0].get_weights()
    b.layers[0].set_weights([kernel + 1, bias])  # 30 of 35 weights, from 1 to 2
    a.layers[1].set_weights([0 * w for w in a.layers[1].get_weights()])
    a.layers[2].set_weights([0 * w for w in a.layers[2].get_weights()])
    b.layers[2].set_weights([0 * w for w in b.layers[2].get_weights()])
    moved = transfer.distance(a, b)
    assert moved.to_dict() == {
        "hidden_1": pytest.approx(math.sqrt(30 / 35)),
        "hidden_2": math.inf,
        "hidden_3": 0.0,
        "output": 0.0,
    }
    assert (moved.name, moved.index.name) == ("distance", "layer")


def test_distance_looks_at_common_layers(x):
    model = with_everything()
    new = transfer.reuse_layers(model, 5, 2, frozen=True)
    assert transfer.distance(model, new).to_dict() == {"first": 0, "norm": 0, "inner": 0}
    transfer.freeze(new, 0)
    new(x, training=True)  # moving statistics move
    moved = transfer.distance(model, new)
    assert moved["first"] == 0
    assert moved["norm"] > 0
    other = keras.Sequential([keras.Input((6,)), layers.Dense(3, name="first")])
    with pytest.raises(ValueError, match=r"layer 'first' .* equal shapes .*\(6, 5\).*\(6, 3\)"):
        transfer.distance(model, other)
    with pytest.raises(ValueError, match="must have a layer with weights in common"):
        transfer.distance(model, transfer.reuse_layers(dense_net(), 2, 1))
    with pytest.raises(TypeError, match=r"model_b must be a keras\.Model, received list"):
        transfer.distance(model, [])


# ----------------------------------------------------------------------------------- learning rates

OPTIMIZERS = {
    "sgd": lambda rate: keras.optimizers.SGD(rate),
    "momentum": lambda rate: keras.optimizers.SGD(rate, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda rate: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
    "adam": lambda rate: keras.optimizers.Adam(rate),
    "amsgrad": lambda rate: keras.optimizers.Adam(rate, amsgrad=True, clipnorm=0.1),
    "adamw": lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.5),
    "nadam": lambda rate: keras.optimizers.Nadam(rate),
    "adamax": lambda rate: keras.optimizers.Adamax(rate),
    "rmsprop": lambda rate: keras.optimizers.RMSprop(rate, momentum=0.5, centered=True),
    "adagrad": lambda rate: keras.optimizers.Adagrad(rate),
    "adadelta": lambda rate: keras.optimizers.Adadelta(rate),
    "adafactor": lambda rate: keras.optimizers.Adafactor(rate),
    "ftrl": lambda rate: keras.optimizers.Ftrl(rate, l2_regularization_strength=0.01),
    "lion": lambda rate: keras.optimizers.Lion(rate, weight_decay=0.5),
    "lamb": lambda rate: keras.optimizers.Lamb(rate),
    "muon": lambda rate: keras.optimizers.Muon(rate, adam_weight_decay=0.3, weight_decay=0.2),
    "schedule_free": lambda rate: keras.optimizers.ScheduleFreeAdamW(rate, weight_decay=0.1),
    "ema": lambda rate: keras.optimizers.SGD(rate, use_ema=True, ema_momentum=0.5),
    "accumulated": lambda rate: keras.optimizers.Adam(rate, gradient_accumulation_steps=3),
}
RATES = {"hidden_1": 0.125, "hidden_2": 0.5}


def weights_after(optimizer, x, y, start, fit=None):
    model = dense_net()
    model.set_weights(start)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    if fit is None:
        model.fit(x, y, epochs=3, batch_size=10, shuffle=False, verbose=0)
    else:
        fit(model)
    return model.get_weights()


def applied(optimizer, steps=4):
    """Start from equal weights, apply equal gradients."""
    rng = np.random.default_rng(3)
    variables = dense_net().trainable_variables
    for variable in variables:
        variable.assign(rng.normal(size=variable.shape))
    for _ in range(steps):
        grads = [
            keras.ops.convert_to_tensor(rng.normal(size=v.shape), "float32") for v in variables
        ]
        optimizer.apply(grads, variables)
    optimizer.finalize_variable_values(variables)
    return [variable.numpy() for variable in variables]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layer_rates_are_optimizers_with_other_rates(name):
    make, rate = OPTIMIZERS[name], 0.02
    several = {layer: make(rate * factor) for layer, factor in RATES.items()}
    rest = make(rate)
    by_layer = keras.optimizers.MultiOptimizer(
        lambda variable: several.get(variable.path.split("/")[-2], rest)
    )
    own = applied(transfer.LayerRates(make(rate), RATES))
    for a, b in zip(own, applied(by_layer), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    plain = applied(make(rate))
    assert np.abs(own[0] - plain[0]).max() > 1e-4  # the factor matters, with each of them
    np.testing.assert_allclose(own[-1], plain[-1], rtol=1e-6)


def test_factors_of_one_change_nothing():
    for make in (OPTIMIZERS["adamw"], lambda rate: keras.optimizers.SGD(rate, global_clipnorm=0.1)):
        rated = transfer.LayerRates(make(0.02), {"output": 1.0})
        for a, b in zip(applied(make(0.02)), applied(rated), strict=True):
            np.testing.assert_array_equal(a, b)


def test_factor_zero_keeps_a_layer_bit_by_bit():
    rates = {"hidden_2": 0, "output": 2.0}
    optimizer = transfer.LayerRates(keras.optimizers.AdamW(0.1, weight_decay=0.5), rates)
    after, start = applied(optimizer), applied(keras.optimizers.SGD(0.0), steps=1)
    same = [np.array_equal(a, b) for a, b in zip(start, after, strict=True)]
    assert same == [False, False, True, True, False, False, False, False]
    assert optimizer.inner_optimizer.weight_decay == 0.5


def test_global_clipping_sees_all_layers(x, y):
    start = dense_net().get_weights()
    args = x, y, start, lambda model: model.train_on_batch(x, y)
    free = weights_after(transfer.LayerRates(keras.optimizers.SGD(1.0), RATES), *args)
    norm = (
        math.sqrt(
            sum(
                np.sum((a - b) ** 2)
                for a, b in zip(weights_after("sgd", *args), start, strict=True)
            )
        )
        / 0.01
    )  # the string stands for a learning rate of 0.01
    clipped = keras.optimizers.SGD(1.0, global_clipnorm=norm / 3)
    after = weights_after(transfer.LayerRates(clipped, RATES), *args)
    for a, b, s in zip(after, free, start, strict=True):
        np.testing.assert_allclose(a - s, (b - s) / 3, atol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_layer_rates_in_the_training_engine(jit, x, y):
    start = dense_net().get_weights()

    def ours(model):
        history = training.fit(model, x, y, epochs=3, batch_size=16, shuffle=False, jit_compile=jit)
        assert history.engine == "graph"

    def theirs(model):
        model.fit(x, y, epochs=3, batch_size=16, shuffle=False, verbose=0)

    make = OPTIMIZERS["adam" if jit else "momentum"]
    both = [
        weights_after(transfer.LayerRates(make(0.02), RATES), x, y, start, fit)
        for fit in (ours, theirs)
    ]
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_models_with_layer_rates_share_a_program_but_not_the_factors(x, y):
    """Programs know layers by their position: equal rates can mean other factors there."""
    training.clear_programs()
    for names in (("still", "fast"), ("fast", "still"), ("still", "fast")):
        hidden = [layers.Dense(6, "tanh", name=name) for name in names]
        model = keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(2, name="output")])
        start = transfer.reuse_layers(model, 3, [])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(transfer.LayerRates(keras.optimizers.SGD(0.1), {"still": 0.0}), loss)
        training.fit(model, x, y, epochs=1)
        moved = transfer.distance(start, model)
        assert moved["still"] == 0
        assert moved["fast"] > 1e-3
        assert len(training._shared_programs) == 1


class OwnSGD(keras.optimizers.SGD):
    """An optimizer whose configuration need not say all that it does."""


def test_a_program_with_an_optimizer_that_is_not_keras_s_own_is_not_shared(x, y):
    training.clear_programs()
    model = dense_net()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(transfer.LayerRates(OwnSGD(0.1), {"output": 0.5}), loss)
    assert training.fit(model, x, y, epochs=1).history.keys() == {"loss"}
    assert not training._shared_programs


@saves
def test_schedules_and_callbacks_set_the_common_rate(x, y):
    start = dense_net().get_weights()
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([5, 11], [0.1, 0.05, 0.02])
    scheduled = weights_after(
        transfer.LayerRates(keras.optimizers.SGD(schedule), RATES), x, y, start
    )

    def fit(model):
        by_epoch = keras.callbacks.LearningRateScheduler([0.1, 0.05, 0.02].__getitem__)
        model.fit(x, y, epochs=3, batch_size=10, shuffle=False, verbose=0, callbacks=[by_epoch])
        assert float(model.optimizer.learning_rate) == pytest.approx(0.02)
        assert int(model.optimizer.iterations) == 18

    optimizer = transfer.LayerRates(keras.optimizers.SGD(0.3), RATES)
    for a, b in zip(scheduled, weights_after(optimizer, x, y, start, fit), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@saves
def test_layer_rates_survive_saving(tmp_path, x, y):
    model = dense_net()
    optimizer = transfer.LayerRates(keras.optimizers.Adam(0.02), RATES, name="rates")
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=2, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, transfer.LayerRates)
    assert (loaded.optimizer.rates, loaded.optimizer.name) == (RATES, "rates")
    assert int(loaded.optimizer.iterations) == 4
    for each in (model, loaded):  # moments were saved too, or Adam would go another way
        each.fit(x, y, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert keras.saving.get_registered_name(transfer.LayerRates) == "ch11lib>LayerRates"


def test_rates_of_models_inside_a_model(x, y):
    model = with_everything()
    rates = {"inner": 0.0, model.get_layer("inner").layers[0].name: 1.0}
    before = model.get_layer("inner").get_weights()
    trained(model, x, y, transfer.LayerRates(keras.optimizers.SGD(0.1), rates))
    after = model.get_layer("inner").get_weights()
    moved = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    # kernel, bias; gamma, beta (rate 0); moving statistics, which no optimizer moves
    assert moved[:4] == [True, True, False, False]


def test_layer_rates_with_mixed_precision(x, y):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = dense_net()
        before = model.get_weights()
        trained(model, x, y, transfer.LayerRates(keras.optimizers.Adam(0.01), {"hidden_1": 0.0}))
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    same = [np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)]
    assert same == [True, True] + [False] * 6


def test_the_optimizer_that_was_given_is_not_used(x, y):
    given_one = keras.optimizers.Adam(0.01)
    trained(dense_net(), x, y, transfer.LayerRates(given_one, RATES))
    assert (given_one.built, int(given_one.iterations)) == (False, 0)
    assert "update_step" not in vars(given_one)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: transfer.LayerRates("adam", {}), TypeError, "optimizer must be .* received str"),
        (
            lambda: transfer.LayerRates(transfer.LayerRates(keras.optimizers.SGD(), {}), {}),
            TypeError,
            "received the wrapper LayerRates",
        ),
        (
            lambda: transfer.LayerRates(keras.optimizers.SGD(), [0.1]),
            TypeError,
            r"rates must map .* received \[0\.1\]",
        ),
        (
            lambda: transfer.LayerRates(keras.optimizers.SGD(), {"a": -1}),
            ValueError,
            r"rates\['a'\] must be a finite factor, 0 or more, received -1",
        ),
        (
            lambda: transfer.LayerRates(keras.optimizers.SGD(), {"a": math.nan}),
            ValueError,
            r"rates\['a'\] .* received nan",
        ),
    ],
)
def test_wrong_arguments_of_layer_rates(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_names_without_weights_to_train(x, y):
    model = dense_net()
    transfer.freeze(model, 1)
    for name in ("hidden_1", "hidden_9"):
        optimizer = transfer.LayerRates(keras.optimizers.SGD(), {name: 0.1, "output": 0.5})
        with pytest.raises(ValueError, match=rf"such as \['hidden_2', .*; received \['{name}'\]"):
            trained(model, x, y, optimizer)


def test_dataset_of_cached_features_can_be_made():
    """What a notebook does with `features`."""
    data = load_fashion_mnist().take(20, 10).flattened()
    model = keras.Sequential([keras.Input((784,)), layers.Dense(7), layers.Dense(2)])
    parts = ("x_train", "x_valid", "x_test")
    cached = dataclasses.replace(
        data, **{part: transfer.features(model, 1, getattr(data, part)) for part in parts}
    )
    assert cached.x_train.shape == (20, 7)
