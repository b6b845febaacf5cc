import itertools

from ch11lib import pretraining, training
from ch11lib.backend import keras
from ch11lib.datasets import load_fashion_mnist
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import ndimage

layers = keras.layers

# Keras 3.15 hands a variable to np.array in a way that NumPy 2 will no longer accept one day.
saves = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def x():
    return np.random.default_rng(0).random((50, 8, 8)).astype("float32")


def dense_encoder(shape=(8, 8)):
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Flatten(),
            layers.Dense(12, "relu", name="low"),
            layers.BatchNormalization(),
            layers.Dense(5, "relu", name="code"),
        ],
        name="encoder",
    )


def conv_encoder():
    inputs = keras.Input((8, 8))
    h = layers.Reshape((8, 8, 1))(inputs)
    h = layers.Conv2D(3, 3, strides=2, padding="same", activation="relu")(h)
    return keras.Model(inputs, h, name="conv_encoder")


# ---------------------------------------------------------------------------------------- rotations


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(1, 13), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_rotations_invert(n, side, colour, seed):
    shape = (n, side, side, 3) if colour else (n, side, side)
    x = np.arange(np.prod(shape), dtype="int64").reshape(shape)
    turned, labels = pretraining.rotations(x, seed)
    assert (turned.dtype, labels.dtype, turned.shape) == (x.dtype, np.int32, shape)
    for image, label, original in zip(turned, labels, x, strict=True):
        back = ndimage.rotate(image, -90 * label, axes=(1, 0), reshape=False, order=0)
        np.testing.assert_array_equal(np.rot90(image, -label), original)
        if side % 2:  # SciPy turns about the same centre
            np.testing.assert_array_equal(back, original)
    assert np.ptp(np.bincount(labels, minlength=4)) <= 1


def test_rotations_by_hand():
    x = np.tile([[1, 2], [3, 4]], (4, 1, 1))
    turned, labels = pretraining.rotations(x, 0)
    expected = {
        0: [[1, 2], [3, 4]],
        1: [[2, 4], [1, 3]],
        2: [[4, 3], [2, 1]],
        3: [[3, 1], [4, 2]],
    }
    assert sorted(labels) == [0, 1, 2, 3]
    for image, label in zip(turned.tolist(), labels, strict=True):
        assert image == expected[label]


def test_a_network_can_learn_rotations():
    data = load_fashion_mnist().take(3000, 500)
    model = keras.Sequential([keras.Input((28, 28)), layers.Flatten(), layers.Dense(100, "relu")])
    model.add(layers.Dense(4))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.002), loss, metrics=["accuracy"])
    history = training.fit(
        model,
        *pretraining.rotations(data.x_train, 0),
        validation_data=pretraining.rotations(data.x_valid, 1),
        epochs=4,
        seed=0,
    )
    assert history.engine == "graph"
    assert history.history["val_accuracy"][-1] > 0.7  # chance is 0.25


# ---------------------------------------------------------------------------------- masked patches


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(2, 3),
    st.integers(1, 3),
    st.floats(0.3, 0.7),
    st.booleans(),
)
def test_masks_cover_whole_patches(n, rows, columns, patch, fraction, colour):
    shape = (n, rows * patch, columns * patch) + ((3,) if colour else ())
    x = np.random.default_rng(0).normal(size=shape)
    before = x.copy()
    covered, mask = pretraining.masked_patches(x, fraction, 7, patch=patch, fill=-9.0)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(covered[~mask], x[~mask])
    assert (covered[mask] == -9).all()
    cells = mask.reshape(n, rows, patch, columns, patch).transpose(0, 1, 3, 2, 4)
    cells = cells.reshape(n, rows * columns, patch**2)
    assert (cells.all(axis=2) == cells.any(axis=2)).all()
    assert set(cells.all(axis=2).sum(axis=1)) == {round(fraction * rows * columns)}


def test_masks_are_exact_and_independent():
    x = np.ones((2000, 28, 28), "float32")
    covered, mask = pretraining.masked_patches(x, 0.75, 0)
    assert covered.dtype == np.float32
    assert (mask.mean(axis=(1, 2)) == 0.75).all()
    corners = mask[:, ::7, ::7].reshape(2000, 16)
    np.testing.assert_allclose(corners.mean(axis=0), 0.75, atol=5 * np.sqrt(0.75 * 0.25 / 2000))
    # Two cells of 16 with 12 covered: correlation -1/15.
    correlation = np.corrcoef(corners.T)[~np.eye(16, dtype=bool)]
    np.testing.assert_allclose(correlation, -1 / 15, atol=5 / np.sqrt(2000))


# ------------------------------------------------------------------------------------------- pairs


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-1, 2), min_size=4, max_size=9).filter(lambda y: 1 < len(set(y)) < len(y)),
    st.integers(1, 41),
    st.integers(0, 99),
)
def test_pairs_of_classes(y, n, seed):
    y = np.array(y)
    x = np.arange(len(y)) * 10 + y  # every image is its own
    pairs, same = pretraining.same_class_pairs(x, y, n, seed)
    assert (pairs.shape, same.shape, same.dtype) == ((n, 2), (n,), np.int32)
    assert abs(2 * same.sum() - n) <= 1
    assert (pairs[:, 0] != pairs[:, 1]).all()
    classes = y[np.rint(pairs / 10).astype(int)]
    np.testing.assert_array_equal(classes[:, 0] == classes[:, 1], same)


def test_all_pairs_of_classes_are_drawn():
    y = np.array([0, 0, 0, 1, 1, 2])
    pairs, same = pretraining.same_class_pairs(np.arange(6), y, 4000, 1)
    drawn = {label: {tuple(p) for p in pairs[same == label]} for label in (0, 1)}
    every = set(itertools.permutations(range(6), 2))
    assert drawn[1] == {(a, b) for a, b in every if y[a] == y[b]}
    assert drawn[0] == {(a, b) for a, b in every if y[a] != y[b]}
    counts = np.unique(pairs[same == 1], axis=0, return_counts=True)[1]
    # From 5 images, with 2 or 1 partners each: 2000/5/2 six times and 2000/5 twice.
    np.testing.assert_allclose(np.sort(counts), [200] * 6 + [400] * 2, rtol=0.25)


def test_data_depend_on_the_seed_alone(x):
    y = np.arange(50) % 3
    calls = [
        lambda seed: pretraining.rotations(x, seed),
        lambda seed: pretraining.masked_patches(x, 0.5, seed, patch=2),
        lambda seed: pretraining.same_class_pairs(x, y, 30, seed),
    ]
    before = x.copy()
    for call in calls:
        first = call(3)
        np.random.default_rng(0).random()
        for a, b in zip(first, call(3), strict=True):
            np.testing.assert_array_equal(a, b)
        assert not all(np.array_equal(a, b) for a, b in zip(first, call(4), strict=True))
    np.testing.assert_array_equal(x, before)


X = np.zeros((4, 6, 6))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: pretraining.rotations(X[:, 0], 0), ValueError, r"images, .*received shape \(4, 6"),
        (lambda: pretraining.rotations(X[:0], 0), ValueError, r"received shape \(0, 6, 6\)"),
        (lambda: pretraining.rotations(X[:, :4], 0), ValueError, r"square .*\(4, 4, 6\)"),
        (lambda: pretraining.masked_patches(X, 0.5, 0), ValueError, "patch must divide.* 7"),
        (
            lambda: pretraining.masked_patches(X, 0.5, 0, patch=0),
            ValueError,
            "patch must be at least 1, received 0",
        ),
        *(
            (
                lambda bad=bad: pretraining.masked_patches(X, bad, 0, patch=3),
                ValueError,
                "fraction must cover some of the 4 patches",
            )
            for bad in (0.0, 0.1, 0.9, 1.0, 75, -0.5, np.nan)
        ),
        (
            lambda: pretraining.same_class_pairs(X, np.zeros(3), 2, 0),
            ValueError,
            r"\(4, 6, 6\) and \(3,\)",
        ),
        (
            lambda: pretraining.same_class_pairs(X, np.zeros(4), 2, 0),
            ValueError,
            "two classes .* received 1 classes with 4 images",
        ),
        (
            lambda: pretraining.same_class_pairs(X, np.arange(4), 2, 0),
            ValueError,
            "two images of a class, received 4 classes with 1 images",
        ),
        (
            lambda: pretraining.same_class_pairs(X, np.zeros(4), 0, 0),
            ValueError,
            "n must be at least 1, received 0",
        ),
        (
            lambda: pretraining.same_class_pairs(X, np.zeros(4), 2.0, 0),
            TypeError,
            r"n must be an integer, received 2\.0",
        ),
        (
            lambda: pretraining.same_class_pairs(X, np.zeros(4), True, 0),
            TypeError,
            "n must be an integer, received True",
        ),
    ],
)
def test_wrong_data(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ------------------------------------------------------------------------------------------ models


def test_autoencoder_by_hand(x):
    encoder = dense_encoder()
    model = pretraining.autoencoder(encoder)
    decoder = model.get_layer("decoder")
    assert [a.get_config()["activation"] for a in decoder.layers[:2]] == ["relu", "linear"]
    assert model.get_layer("encoder") is encoder
    assert model.output_shape == (None, 8, 8)
    (w1, b1), (w2, b2) = (layer.get_weights() for layer in decoder.layers[:2])
    assert (w1.shape, w2.shape) == ((5, 12), (12, 64))
    expected = np.maximum(encoder(x).numpy() @ w1 + b1, 0) @ w2 + b2
    np.testing.assert_allclose(model(x), expected.reshape(50, 8, 8), rtol=1e-4, atol=1e-5)


def test_autoencoder_of_linear_layers_finds_the_principal_components():
    """Without activations the best code of size k is the span of k principal components."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(200, 6)) * [3, 2, 1, 0.3, 0.2, 0.1]).astype("float32")
    x = (x - x.mean(axis=0)).astype("float32")
    encoder = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    model = pretraining.autoencoder(encoder)
    model.compile(keras.optimizers.Adam(0.03), "mse")
    history = training.fit(model, x, x, epochs=200, batch_size=200, seed=0)
    assert history.engine == "graph"
    best = np.sum(np.linalg.svd(x, compute_uv=False)[2:] ** 2) / x.size
    assert best * 0.999 < model.evaluate(x, x, verbose=0) < best * 1.05


def test_autoencoder_with_a_decoder_of_ones_own(x):
    encoder = conv_encoder()
    decoder = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            layers.Conv2DTranspose(1, 3, strides=2, padding="same"),
            layers.Reshape((8, 8)),
        ]
    )
    model = pretraining.autoencoder(encoder, decoder)
    np.testing.assert_array_equal(model(x), decoder(encoder(x)))
    with pytest.raises(ValueError, match="decoder must be given for encoder 'conv_encoder'"):
        pretraining.autoencoder(encoder)
    with pytest.raises(ValueError, match=r"input shape \(None, 8, 8\), received \(None, 4, 4, 7\)"):
        pretraining.autoencoder(encoder, layers.Dense(7))
    with pytest.raises(ValueError, match=r"decoder must take the codes .* \(None, 4, 4, 3\): "):
        pretraining.autoencoder(encoder, keras.Sequential([keras.Input((9,)), layers.Dense(4)]))
    with pytest.raises(TypeError, match="decoder must be a model or layer, received str"):
        pretraining.autoencoder(encoder, "mirror")


@pytest.mark.parametrize("make", [dense_encoder, conv_encoder])
def test_twins_by_hand(make, x):
    encoder = make()
    model = pretraining.twins(encoder)
    pairs = np.stack([x[:20], x[20:40]], axis=1)
    w, b = model.get_layer("same").get_weights()
    a, b_ = (encoder(pairs[:, i]).numpy().reshape(20, -1) for i in (0, 1))
    np.testing.assert_allclose(model(pairs), np.abs(a - b_) @ w + b, atol=1e-5)
    np.testing.assert_allclose(model(pairs[:, ::-1]), model(pairs), atol=1e-6)
    assert len(model.trainable_variables) == len(encoder.trainable_variables) + 2


def test_training_twins_trains_the_encoder():
    data = load_fashion_mnist().take(1500, 300)
    encoder = dense_encoder((28, 28))
    before = encoder.get_layer("low").get_weights()[0]
    model = pretraining.twins(encoder)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    accuracy = keras.metrics.BinaryAccuracy(threshold=0.0)
    model.compile(keras.optimizers.Adam(0.003), loss, metrics=[accuracy])
    history = training.fit(
        model,
        *pretraining.same_class_pairs(data.x_train, data.y_train, 3000, 0),
        validation_data=pretraining.same_class_pairs(data.x_valid, data.y_valid, 600, 1),
        epochs=6,
        seed=0,
    )
    assert history.engine == "graph"
    assert history.history["val_binary_accuracy"][-1] > 0.7  # chance is 0.5
    assert np.abs(encoder.get_layer("low").get_weights()[0] - before).max() > 0.01
    # The encoder is an ordinary model: its weights go anywhere.
    copy = dense_encoder((28, 28))
    copy.set_weights(encoder.get_weights())
    np.testing.assert_array_equal(copy(data.x_valid), encoder(data.x_valid))


@saves
@pytest.mark.parametrize("build", [pretraining.autoencoder, pretraining.twins])
def test_models_survive_saving(build, tmp_path, x):
    model = build(dense_encoder())
    inputs = np.stack([x, x[::-1]], axis=1) if build is pretraining.twins else x
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(inputs), model(inputs))
    encoder = loaded.get_layer("encoder")
    np.testing.assert_array_equal(encoder(x), model.get_layer("encoder")(x))


@pytest.mark.parametrize("build", [pretraining.autoencoder, pretraining.twins])
def test_wrong_encoders(build):
    with pytest.raises(TypeError, match=r"encoder must be a keras\.Model, received Dense"):
        build(layers.Dense(3))
    with pytest.raises(ValueError, match="encoder 'late' must be built"):
        build(keras.Sequential([layers.Dense(3)], name="late"))
    pair = [keras.Input((3,)), keras.Input((3,))]
    with pytest.raises(ValueError, match="one input and one output, received 2 and 1"):
        build(keras.Model(pair, layers.Add()(pair)))


def test_encoders_that_cannot_be_mirrored():
    plain = keras.Sequential([keras.Input((3,)), layers.ReLU()], name="plain")
    with pytest.raises(ValueError, match=r"for encoder 'plain': .* received none"):
        pretraining.autoencoder(plain)
    free = keras.Sequential([keras.Input((None, 3)), layers.Dense(2)])
    with pytest.raises(ValueError, match=r"fixed input shape, received \(None, None, 3\)"):
        pretraining.autoencoder(free)


# ------------------------------------------------------------------------------------------- tasks


def test_examples_are_those_of_each_task(x):
    y = np.arange(50) % 3
    expected = {
        "autoencoder": (x, x),
        "masked": (pretraining.masked_patches(x, 0.25, 5, patch=4).x, x),
        "rotation": pretraining.rotations(x, 5),
        "pairs": pretraining.same_class_pairs(x, y, 50, 5),
    }
    assert tuple(expected) == pretraining.TASKS
    for task, arrays in expected.items():
        made = pretraining.examples(task, x, 5, y, fraction=0.25, patch=4)
        for a, b in zip(made, arrays, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", [dense_encoder, conv_encoder])
@pytest.mark.parametrize("task", pretraining.TASKS)
def test_learners_fit_their_examples(make, task, x):
    if task in ("autoencoder", "masked") and make is conv_encoder:
        pytest.skip("needs a decoder of its own")
    encoder = make()
    before = encoder.get_weights()[0]
    model = pretraining.learner(task, encoder, keras.optimizers.Adam(0.01))
    inputs, targets = pretraining.examples(task, x, 0, np.arange(50) % 3, patch=4)
    result = model.evaluate(inputs, targets, verbose=0, return_dict=True)
    outputs = model.predict(inputs, verbose=0).astype("float64")
    if task == "rotation":
        log_p = outputs - np.log(np.exp(outputs).sum(axis=1, keepdims=True))
        expected = {
            "loss": -log_p[np.arange(50), targets].mean(),
            "accuracy": np.mean(outputs.argmax(axis=1) == targets),
        }
    elif task == "pairs":
        p = 1 / (1 + np.exp(-outputs[:, 0]))
        expected = {
            "loss": -np.log(np.where(targets == 1, p, 1 - p)).mean(),
            "accuracy": np.mean((p > 0.5) == targets),
        }
    else:
        expected = {"loss": np.mean((outputs - targets) ** 2)}
    assert result == pytest.approx(expected, rel=1e-4)
    model.train_on_batch(inputs, targets)
    assert np.abs(encoder.get_weights()[0] - before).max() > 1e-3


def test_filters_are_what_a_unit_responds_to(x):
    encoder = dense_encoder()
    found = pretraining.filters(encoder, "low")
    assert found.shape == (12, 8, 8)
    z = np.einsum("nij,uij->nu", x, found)
    np.testing.assert_allclose(
        encoder.get_layer("low")(x.reshape(50, 64)), np.maximum(z, 0), atol=1e-5
    )
    np.testing.assert_array_equal(
        pretraining.filters(encoder, "low", (4, 16)).reshape(12, 64), found.reshape(12, 64)
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: pretraining.examples("colour", X, 0),
            "task must be one of autoencoder, masked, rotation, pairs, received 'colour'",
        ),
        (lambda: pretraining.learner("colour", dense_encoder()), "one of .* received 'colour'"),
        (lambda: pretraining.examples("pairs", X, 0), "y must be given for the task 'pairs'"),
        (lambda: pretraining.examples("autoencoder", X[0], 0), r"images, .*received shape \(6, 6"),
        (
            lambda: pretraining.filters(dense_encoder(), "top"),
            r"dense layer of model 'encoder', one of \['low', 'code'\], received 'top'",
        ),
        (lambda: pretraining.filters(conv_encoder(), "conv2d"), r"one of \[\], received"),
        (
            lambda: pretraining.filters(dense_encoder(), "code"),
            r"12 pixels, as many as layer 'code' has inputs, received \(3, 3\)",
        ),
        (lambda: pretraining.filters(dense_encoder(), "low", (8, 9)), r"received \(8, 9\)"),
    ],
)
def test_wrong_tasks_and_layers(call, words):
    with pytest.raises(ValueError, match=words):
        call()
