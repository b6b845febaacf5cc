from ch11lib import batch_norm as bn
from ch11lib import training
from ch11lib.backend import keras, tf
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

L = keras.layers
BatchNorm = L.BatchNormalization

# Shape of the input, axis of the features.
LAYOUTS = [
    ((16, 5), -1),
    ((16, 5), 1),
    ((6, 4, 3, 2), -1),
    ((6, 4, 3, 2), 1),
    ((6, 4, 3, 2), 2),
    ((5, 7, 3), -2),
    ((2, 3, 2, 3, 4), -1),
]


def draw(shape, axis, dtype="float64", seed=0):
    """Return x, gamma, beta and a gradient, none of them centred or of unit scale."""
    rng = np.random.default_rng(seed)
    features = [shape[a] for a in np.atleast_1d(axis)]
    x = 3 + 2 * rng.standard_normal(shape)
    gamma, beta = rng.uniform(0.5, 2, features), rng.standard_normal(features)
    return [a.astype(dtype) for a in (x, gamma, beta, rng.standard_normal(shape))]


def others(shape, axis):
    kept = {a % len(shape) for a in np.atleast_1d(axis)}
    return tuple(a for a in range(len(shape)) if a not in kept)


def finite_differences(f, at, step=1e-5):
    """Fourth-order central differences of a scalar function of an array."""
    at = at.copy()
    slopes = np.empty_like(at)
    for i in np.ndindex(at.shape):
        value, terms = at[i], []
        for k in (-2, -1, 1, 2):
            at[i] = value + k * step
            terms.append(f(at))
        at[i] = value
        slopes[i] = np.dot([1, -8, 8, -1], terms) / (12 * step)
    return slopes


def relative(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


# ------------------------------------------------------------------------------ forward, backward


@pytest.mark.parametrize("epsilon", [1e-3, 0.5])
@pytest.mark.parametrize(("shape", "axis"), [*LAYOUTS, ((5, 3, 4), (1, 2))])
def test_gradients_against_finite_differences(shape, axis, epsilon):
    x, gamma, beta, dout = draw(shape, axis)

    def loss(x, gamma, beta):
        return (bn.forward(x, gamma, beta, epsilon=epsilon, axis=axis)[0] * dout).sum()

    _, cache = bn.forward(x, gamma, beta, epsilon=epsilon, axis=axis)
    ours = bn.backward(dout, cache)
    theirs = (
        finite_differences(lambda value: loss(value, gamma, beta), x, step=1e-3),
        finite_differences(lambda value: loss(x, value, beta), gamma, step=1e-2),
        finite_differences(lambda value: loss(x, gamma, value), beta, step=1e-2),
    )
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert a.dtype == np.float64
        assert a.shape == b.shape
        assert relative(a, b) < 1e-7, name


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_keras_in_training_and_inference(shape, axis, dtype):
    tolerance = 1e-12 if dtype == "float64" else 3e-6
    layer = BatchNorm(axis=axis, momentum=0.8, epsilon=1e-2, dtype=dtype)
    layer.build(shape)
    _, gamma, beta, dout = draw(shape, axis, dtype)
    mean, variance = np.zeros_like(gamma), np.ones_like(gamma)
    layer.set_weights([gamma, beta, mean, variance])

    for seed in range(4):
        x = draw(shape, axis, dtype, seed)[0]
        with tf.GradientTape() as tape:
            inputs = tf.constant(x)
            tape.watch(inputs)
            theirs = layer(inputs, training=True)
        gradients = tape.gradient(theirs, [inputs, *layer.trainable_weights], tf.constant(dout))
        out, cache = bn.forward(x, gamma, beta, epsilon=1e-2, axis=axis)
        assert out.dtype == dtype
        assert relative(out, theirs.numpy()) < tolerance
        for a, b in zip(bn.backward(dout, cache), gradients, strict=True):
            assert a.dtype == dtype
            assert relative(a, b.numpy()) < 10 * tolerance

        mean = bn.moving_average(mean, cache.mean, momentum=0.8)
        variance = bn.moving_average(variance, cache.variance, momentum=0.8)
        assert relative(mean, layer.moving_mean.numpy()) < tolerance
        assert relative(variance, layer.moving_variance.numpy()) < tolerance
        ours = bn.infer(x, mean, variance, gamma, beta, epsilon=1e-2, axis=axis)
        assert ours.dtype == dtype
        assert relative(ours, layer(x, training=False).numpy()) < tolerance


def test_without_scale_or_shift_and_the_defaults():
    x = draw((8, 3), -1, "float32")[0]
    layer = BatchNorm(scale=False, center=False)
    np.testing.assert_allclose(bn.forward(x)[0], layer(x, training=True), atol=2e-6)
    mean, variance = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    np.testing.assert_allclose(bn.infer(x, mean, variance), layer(x), rtol=1e-5)
    np.testing.assert_allclose(
        bn.moving_average(np.zeros(3), bn.forward(x)[1].mean), mean, rtol=1e-6
    )
    gamma, beta = np.float32([2, 3, 4]), np.float32([5, 6, 7])
    plain = bn.forward(x)[0]
    np.testing.assert_allclose(bn.forward(x, gamma)[0], plain * gamma, rtol=1e-6)
    np.testing.assert_allclose(bn.forward(x, beta=beta)[0], plain + beta, rtol=1e-6)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.data())
def test_any_shape_and_axes(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    axes = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1, max_size=len(shape) - 1))
    x, _, _, dout = draw(shape, 0)
    out, cache = bn.forward(x, axis=tuple(axes))
    rest = others(shape, tuple(axes))
    np.testing.assert_allclose(cache.mean, x.mean(rest), rtol=1e-12)
    np.testing.assert_allclose(cache.variance, x.var(rest), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(out.mean(rest), 0, atol=1e-11)
    np.testing.assert_allclose(
        out.var(rest), cache.variance / (cache.variance + 1e-3), rtol=1e-9, atol=1e-12
    )
    gradients = bn.backward(dout, cache)
    assert gradients.dx.shape == shape
    assert gradients.dgamma.shape == gradients.dbeta.shape == cache.mean.shape


def test_several_axes_treat_every_pixel_for_itself():
    x, gamma, beta, dout = draw((9, 4, 3), (1, 2))
    out, cache = bn.forward(x, gamma, beta, axis=(1, 2))
    flat, flat_cache = bn.forward(x.reshape(9, 12), gamma.ravel(), beta.ravel())
    np.testing.assert_array_equal(out.reshape(9, 12), flat)
    dx, dgamma, _ = bn.backward(dout, cache)
    flat_dx, flat_dgamma, _ = bn.backward(dout.reshape(9, 12), flat_cache)
    np.testing.assert_array_equal(dx.reshape(9, 12), flat_dx)
    np.testing.assert_array_equal(dgamma.ravel(), flat_dgamma)
    np.testing.assert_array_equal(bn.forward(x, gamma, beta, axis=[-1, 1])[0], out)


def detached(dout, cache):
    """Backward as if mean and variance did not depend on x: the mistake to be caught."""
    return cache.gamma * cache.inverse_std * dout


def projections(dx, cache, shape, axis):
    """Return |<dx, 1>| and |<dx, x_hat>| for each feature, as cosines."""
    rest = others(shape, axis)
    size = np.sqrt((dx**2).sum(rest))
    ones = np.abs(dx.sum(rest)) / size / np.sqrt(dx.size / size.size)
    x_hat = np.abs((dx * cache.x_hat).sum(rest)) / size / np.sqrt((cache.x_hat**2).sum(rest))
    return ones.max(), x_hat.max()


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_input_gradient_is_orthogonal_to_ones_and_to_the_normalized_input(shape, axis):
    x, gamma, beta, dout = draw(shape, axis)
    _, cache = bn.forward(x, gamma, beta, epsilon=0, axis=axis)
    dout = dout + 1 + cache.x_hat  # so that there is something to take out
    assert max(projections(bn.backward(dout, cache).dx, cache, shape, axis)) < 1e-13
    assert min(projections(detached(dout, cache), cache, shape, axis)) > 0.1

    # With epsilon, exactly the announced part of the second product is left.
    _, cache = bn.forward(x, gamma, beta, epsilon=0.7, axis=axis)
    dx, dgamma, _ = bn.backward(dout, cache)
    rest = others(shape, axis)
    left = (dx * cache.x_hat).sum(rest) / (dgamma * gamma / np.sqrt(cache.variance + 0.7))
    np.testing.assert_allclose(dx.sum(rest), 0, atol=1e-12)
    np.testing.assert_allclose(left, 0.7 / (cache.variance + 0.7), rtol=1e-9)


def test_constant_feature():
    x = np.full((4, 2), 7.0)
    out, cache = bn.forward(x, beta=[1.0, 2.0])
    np.testing.assert_array_equal(out, [[1.0, 2.0]] * 4)
    assert np.isfinite(bn.backward(x, cache).dx).all()
    with pytest.raises(ValueError, match="epsilon must be positive"):
        bn.forward(x, epsilon=0)


def test_number_types():
    assert bn.forward(np.arange(6).reshape(3, 2))[0].dtype == np.float64
    assert bn.forward(np.ones((3, 2), "float16"))[0].dtype == np.float64
    x = draw((8, 3), -1, "float32")[0]
    assert bn.forward(x, np.ones(3), [0, 0, 0])[0].dtype == np.float32
    assert bn.layer_norm(x, np.ones(3)).dtype == np.float32


def test_moving_average_reaches_its_share_on_time():
    for momentum in (0.0, 0.5, 0.9, 0.99, 0.999):
        for fraction in (0.05, 0.5, 0.75, 0.95, 0.999):
            value, steps = np.zeros(1), 0
            while value < fraction * (1 - 1e-12):
                value, steps = bn.moving_average(value, np.ones(1), momentum), steps + 1
            assert bn.steps_until(fraction, momentum) == steps, (fraction, momentum)


def test_gradient_factor_in_closed_form():
    def relu(z):
        return np.maximum(z, 0)

    # Var relu(z) = 1/2 - 1/(2 pi) and E[relu'(z)^2] = 1/2, for z standard normal. Gauss-Hermite
    # quadrature is slow at ReLU's corner: it misses E[relu] by a thousandth.
    ours = bn.gradient_factor(relu, lambda z: (z > 0).astype(float))
    assert ours == pytest.approx(np.sqrt(np.pi / (np.pi - 1)), rel=2e-3)
    # f(z) = sin z: E[cos^2] = (1 + e^-2) / 2, E[sin^2] = (1 - e^-2) / 2, E[sin] = 0
    exact = np.sqrt((1 + np.exp(-2)) / (1 - np.exp(-2)))
    assert bn.gradient_factor(np.sin, np.cos) == pytest.approx(exact, rel=1e-12)
    # f(z) = z^2 + z: E[f'^2] = 4 + 1, Var f = 2 + 1
    squares = bn.gradient_factor(lambda z: z**2 + z, lambda z: 2 * z + 1)
    assert squares == pytest.approx(np.sqrt(5 / 3), rel=1e-12)
    assert bn.gradient_factor(lambda z: 3 * z + 1, lambda z: np.full_like(z, 3)) == pytest.approx(1)
    with pytest.raises(ValueError, match="activation must not be constant"):
        bn.gradient_factor(np.ones_like, np.zeros_like)


def test_layer_norm_is_keras():
    for shape in ((6, 5), (2, 3, 4, 5)):
        x, gamma, beta, _ = draw(shape, -1)
        layer = L.LayerNormalization(dtype="float64")
        layer.build(shape)
        layer.set_weights([gamma, beta])
        np.testing.assert_allclose(bn.layer_norm(x, gamma, beta), layer(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: bn.forward(x, np.ones(4)), ValueError, r"gamma .*\(3,\).* received \(4,\)"),
        (lambda x: bn.forward(x, beta=1.0), ValueError, r"beta must have shape \(3,\)"),
        (lambda x: bn.forward(x, axis=2), ValueError, "axis must name .* has 2; received 2"),
        (lambda x: bn.forward(x, axis=(1, -1)), ValueError, "axis must name distinct"),
        (lambda x: bn.forward(x, axis=()), ValueError, "axis must name"),
        (lambda x: bn.forward(x, axis=(0, 1)), ValueError, "axis must leave"),
        (lambda x: bn.forward(x[0]), ValueError, "axis must leave"),
        (lambda x: bn.forward(x[:0]), ValueError, r"x must hold .* \(0, 3\)"),
        (lambda x: bn.forward(3.0), ValueError, "axis must name"),
        (lambda x: bn.forward([["a"]]), TypeError, "x must be numeric"),
        (lambda x: bn.forward(x, epsilon=-1), ValueError, "epsilon .* received -1"),
        (lambda x: bn.forward(x, epsilon=np.nan), ValueError, "epsilon .* received nan"),
        (lambda x: bn.backward(x[1:], bn.forward(x)[1]), ValueError, "dout must have"),
        (lambda x: bn.infer(x, [0, 0], [1, 1, 1]), ValueError, "moving_mean must have shape"),
        (lambda x: bn.infer(x, [0, 0, 0], [1, 1]), ValueError, "moving_variance must have"),
        (lambda x: bn.infer(x, [0, 0, 0], [1, -1, 1]), ValueError, "not be negative"),
        (lambda x: bn.infer(x, None, [1, 1, 1]), TypeError, "moving_mean must be"),
        (lambda x: bn.moving_average([1], [1, 2]), ValueError, "batch must have moving's shape"),
        (lambda x: bn.moving_average([1], [1], 1.5), ValueError, "momentum .* received 1.5"),
        (lambda x: bn.steps_until(1.0), ValueError, "fraction .* received 1.0"),
        (lambda x: bn.steps_until(momentum=1), ValueError, "momentum .* received 1"),
        (lambda x: bn.steps_until(momentum=np.nan), ValueError, "momentum .* received nan"),
        (lambda x: bn.layer_norm(x, [1.0]), ValueError, "gamma must have shape"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(np.random.default_rng(0).random((5, 3)))


# ---------------------------------------------------------------------------------------- folding


def norms_in(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, BatchNorm)]


def scramble(model, seed=0):
    """Give every weight a value as after training: nothing is zero, one or centred."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers(include_self=False):
        for v in layer._trainable_variables + layer._non_trainable_variables:
            if v.name in ("gamma", "moving_variance"):
                sign = -1 if v.name == "gamma" else 1  # some scales are negative after training
                value = rng.uniform(0.3, 2, v.shape) * np.where(rng.random(v.shape) < 0.3, sign, 1)
            elif "kernel" in v.name:
                value = rng.standard_normal(v.shape) / np.sqrt(np.prod(v.shape[:-1]))
            elif v.dtype == "float32":
                value = rng.standard_normal(v.shape)
            else:
                continue
            v.assign(value)
    return model


def data_for(model, n=6, seed=1):
    rng = np.random.default_rng(seed)

    def one(tensor):
        return rng.normal(0.5, 2, (n, *tensor.shape[1:])).astype("float32")

    inputs = model.inputs
    return one(inputs[0]) if len(inputs) == 1 else [one(tensor) for tensor in inputs]


def check(model, left=0):
    """Fold, compare the outputs, and see that the model itself has not changed at all."""
    x = data_for(model)
    before = [v.numpy() for v in model.variables]
    nodes = [len(layer._inbound_nodes) for layer in model._flatten_layers()]
    config = model.get_config()
    expected = model(x, training=False)

    folded = bn.fold(model, partial=left > 0)

    assert nodes == [len(layer._inbound_nodes) for layer in model._flatten_layers()]
    assert config == model.get_config()
    for v, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(v, value)
    assert not {id(v) for v in model.variables} & {id(v) for v in folded.variables}
    assert len(norms_in(folded)) == left
    assert isinstance(folded, keras.Sequential) == isinstance(model, keras.Sequential)
    ours = keras.tree.flatten(folded(x, training=False))
    theirs = keras.tree.flatten(expected)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert relative(a.numpy(), b.numpy()) < 1e-5
    return folded


def sequential(shape, *layers):
    return scramble(keras.Sequential([keras.Input(shape), *layers]))


def norm(**options):
    return BatchNorm(epsilon=options.pop("epsilon", 1e-2), **options)


PLAIN = {"use_bias": False}
STACKS = {
    "dense": ((6,), [L.Dense(5), norm(), L.ReLU(), L.Dense(3)]),
    "no bias": ((6,), [L.Dense(5, **PLAIN), norm(), L.ReLU(), L.Dense(3)]),
    "no scale": ((6,), [L.Dense(5, **PLAIN), norm(scale=False), L.ReLU(), L.Dense(3)]),
    "no center": ((6,), [L.Dense(5, **PLAIN), norm(center=False), L.ReLU(), L.Dense(3)]),
    "neither": ((6,), [L.Dense(5), norm(scale=False, center=False)]),
    "renorm": ((6,), [L.Dense(5), norm(renorm=True), L.ReLU()]),
    "first": ((6,), [norm(), L.Dense(5, activation="tanh"), L.Dense(3)]),
    "first, no bias": ((6,), [norm(), L.Dense(5, **PLAIN)]),
    "after activation": ((6,), [L.Dense(5, "relu"), norm(), L.Dense(4, "softmax")]),
    "classic": (
        (4, 5),
        [L.Flatten(), norm(), L.Dense(7, "elu"), norm(), L.Dense(6, "elu"), norm(), L.Dense(3)],
    ),
    "two in a row": ((6,), [L.Dense(5), norm(), norm(), L.ReLU()]),
    "two first": ((6,), [norm(), norm(), L.Dense(5)]),
    "both sides": ((6,), [norm(), L.Dense(5), norm(), L.ReLU(), norm(), L.Dense(2), norm()]),
    "dropout": ((6,), [L.Dense(5), L.Dropout(0.5), norm(), L.ReLU(), L.Dense(3)]),
    "noise": ((6,), [norm(), L.Dropout(0.5), L.GaussianNoise(1.0), L.Dense(3), L.ReLU()]),
    "steps": ((7, 3), [norm(), L.Dense(5), norm(), L.ReLU()]),
    "before Flatten": ((4, 5), [norm(), L.Flatten(), L.Dense(3)]),
    "other axis, Flatten": ((4, 5, 2), [norm(axis=2), L.Dropout(0.1), L.Flatten(), L.Dense(3)]),
    "conv1d": ((9, 3), [L.Conv1D(4, 3, padding="causal"), norm(), L.ReLU(), L.Flatten()]),
    "conv2d": ((8, 7, 3), [L.Conv2D(4, 3, padding="same", **PLAIN), norm(), L.ReLU()]),
    "conv2d strides": ((8, 7, 3), [L.Conv2D(4, 3, strides=2), norm(axis=3), L.MaxPooling2D()]),
    "conv3d": ((5, 4, 6, 2), [L.Conv3D(3, 2), norm(), L.ReLU(), norm(), L.Conv3D(2, 2)]),
    "groups": ((6, 6, 4), [norm(), L.Conv2D(6, 3, groups=2), norm(), L.ReLU()]),
    "depthwise1d": ((9, 3), [norm(), L.DepthwiseConv1D(3, depth_multiplier=2), norm()]),
    "depthwise2d": ((8, 7, 3), [norm(), L.DepthwiseConv2D(3, depth_multiplier=2), norm()]),
    "separable1d": ((9, 3), [norm(), L.SeparableConv1D(5, 3, depth_multiplier=2), norm()]),
    "separable2d": ((8, 7, 3), [norm(), L.SeparableConv2D(5, 3, **PLAIN), norm(), L.ReLU()]),
    "transpose1d": ((5, 3), [L.Conv1DTranspose(4, 3, strides=2, padding="same"), norm()]),
    "transpose2d": ((5, 4, 3), [L.Conv2DTranspose(4, 3, strides=2), norm(), L.ReLU()]),
    "transpose3d": ((3, 3, 2, 3), [L.Conv3DTranspose(4, 2), norm(), L.ReLU()]),
    "into conv": ((8, 7, 3), [L.Conv2D(4, 3, activation="relu"), norm(), L.Conv2D(2, 3)]),
    "into same 1x1": ((6, 7, 3), [norm(), L.Conv2D(4, 1, padding="same")]),
    "dilated": ((9, 9, 2), [norm(), L.Conv2D(3, 3, dilation_rate=2), norm()]),
    "mobile": ((9, 9, 2), [
        *(L.Conv2D(4, 3, padding="same", **PLAIN), norm(), L.ReLU()),
        *(L.DepthwiseConv2D(3, padding="same", **PLAIN), norm(), L.ReLU()),
        *(L.Conv2D(6, 1, **PLAIN), norm(), L.GlobalAveragePooling2D(), L.Dense(3)),
    ]),
    "no norm": ((6,), [L.Dense(5), L.LayerNormalization(), L.Dense(3)]),
    "unit norm": ((6,), [L.UnitNormalization(), norm(), L.Dense(3)]),
}  # fmt: skip


@pytest.mark.parametrize("stack", STACKS)
def test_fold_sequential(stack):
    shape, layers = STACKS[stack]
    configs = [(type(layer), layer.get_config()) for layer in layers]
    model = sequential(shape, *[kind.from_config(config) for kind, config in configs])
    folded = check(model)
    kept = [layer.name for layer in model.layers if not isinstance(layer, BatchNorm)]
    assert [layer.name for layer in folded.layers] == kept


@pytest.mark.parametrize("shape", [(9, 3), (8, 7, 3)])
def test_scale_alone_folds_into_padded_and_transposed_convolutions(shape):
    kind = {2: (L.Conv1D, L.Conv1DTranspose), 3: (L.Conv2D, L.Conv2DTranspose)}[len(shape)]
    for convolution in (kind[0](4, 3, padding="same"), kind[1](4, 3, padding="same")):
        model = sequential(shape, norm(center=False), convolution)
        model.layers[0].moving_mean.assign(np.zeros(3))
        check(model)


def test_channels_first():
    first = {"data_format": "channels_first"}
    for layers in (
        [norm(axis=1), L.Conv2D(4, 3, **first), norm(axis=1), L.ReLU()],
        [norm(axis=1), L.DepthwiseConv2D(2, **first), norm(axis=1), L.Flatten(), L.Dense(2)],
    ):
        model = sequential((3, 8, 7), *layers)
        folded, x = bn.fold(model), data_for(model)
        assert not norms_in(folded)
        # Without XLA there are no such convolutions on a CPU.
        ours, theirs = (
            tf.function(m, jit_compile=True, autograph=False)(x).numpy() for m in (folded, model)
        )
        assert relative(ours, theirs) < 1e-5

    # Flatten mixes the channels differently when they come first.
    flat = sequential((3, 4), norm(axis=1), L.Flatten(**first), L.Dense(2))
    with pytest.raises(ValueError, match=r"\(Flatten\) is neither Dense"):
        bn.fold(flat)


def test_after_real_training():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 5, (256, 6, 6, 2)).astype("float32")
    y = (x.mean((1, 2, 3)) > 3).astype("int32")
    layers = [
        *(BatchNorm(momentum=0.9), L.Conv2D(4, 3, use_bias=False), BatchNorm(momentum=0.9)),
        *(L.ReLU(), L.Dropout(0.2), L.Flatten(), L.Dense(8, "relu"), BatchNorm(momentum=0.9)),
        L.Dense(2, "softmax"),
    ]
    model = keras.Sequential([keras.Input((6, 6, 2)), *layers])
    model.compile("adam", "sparse_categorical_crossentropy")
    training.fit(model, x, y, epochs=3, seed=0)
    slots = [v.numpy() for v in model.optimizer.variables]
    folded = check(model)
    assert not folded.compiled
    for v, value in zip(model.optimizer.variables, slots, strict=True):
        np.testing.assert_array_equal(v, value)
    np.testing.assert_allclose(folded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)


def functional(build, *shapes):
    inputs = [keras.Input(shape) for shape in shapes]
    return scramble(keras.Model(inputs if len(inputs) > 1 else inputs[0], build(*inputs)))


def test_residual_network():
    def build(x):
        for units in (5, 5):
            h = L.ReLU()(norm()(L.Dense(units)(x)))
            x = L.Add()([x, norm()(L.Dense(5, **PLAIN)(h))])
        return L.Dense(2)(x)

    check(functional(build, (5,)))


def test_operations_several_inputs_and_outputs():
    def build(a, b):
        h = norm()(L.Dense(4)(a)) * 2.0 + keras.ops.tanh(norm()(L.Dense(4)(b)))
        return {"first": L.Dense(2)(h), "second": norm()(L.Dense(3)(h))}

    model = functional(build, (3,), (2,))
    assert set(check(model)(data_for(model))) == {"first", "second"}


def test_norm_with_several_users_folds_forward_into_all():
    def build(x):
        h = norm()(L.Dense(4, "tanh")(x))
        return L.Concatenate()([L.Dense(2)(h), L.Dense(3)(L.Dropout(0.5)(h))])

    check(functional(build, (3,)))


def test_output_used_elsewhere_does_not_fold_backward():
    def build(x):
        z = L.Dense(4, name="z")(x)
        return L.Add()([z, norm(name="bn")(z)])

    model = functional(build, (3,))
    with pytest.raises(ValueError, match=r"'bn' .*backward, the output of 'z' is used elsewhere"):
        bn.fold(model)
    check(model, left=1)

    def also_an_output(x):
        z = L.Dense(4, name="z")(x)
        return [z, L.ReLU()(norm(name="bn")(z))]

    with pytest.raises(ValueError, match=r"'z' is used elsewhere too.*'re_lu.* is neither Dense"):
        bn.fold(functional(also_an_output, (3,)))

    def forward_only(x):
        z = L.Dense(4)(x)
        return L.Add()([z, L.Dense(4)(norm()(z))])

    check(functional(forward_only, (3,)))


def test_one_user_that_cannot_take_it_blocks_the_others():
    def build(x):
        h = norm(name="bn")(x)
        return L.Concatenate()([L.Dense(2)(h), L.ReLU(name="relu")(h)])

    model = functional(build, (3,))
    with pytest.raises(ValueError, match=r"'bn' .*forward, 'relu' \(ReLU\) is neither"):
        bn.fold(model)
    check(model, left=1)


def test_shared_layers():
    dense, shared = L.Dense(4, name="dense"), norm(name="shared")

    def dense_twice(x):
        return L.Add()([norm(name="bn")(dense(x)), dense(L.ReLU()(x))])

    def norm_twice(x):
        return L.Add()([shared(L.Dense(4)(x)), shared(L.Dense(4)(x))])

    for build, why in ((dense_twice, "calls 'dense' 2 times"), (norm_twice, "calls it 2 times")):
        model = functional(build, (3,))
        with pytest.raises(ValueError, match=f"cannot be folded: .*{why}"):
            bn.fold(model)
        check(model, left=1)

    # Calls of a layer in other models do not count.
    keras.Sequential([keras.Input((3,)), dense])
    check(functional(lambda x: norm()(L.Dense(4)(x)), (3,)))


@pytest.mark.parametrize("nested_in", ["functional", "sequential"])
def test_models_inside_models(nested_in):
    inner = keras.Sequential([keras.Input((4,)), L.Dense(5), norm(), L.ReLU(), L.Dense(4)])
    x = keras.Input((4,))
    branch = keras.Model(x, L.Add()([x, norm()(L.Dense(4)(x))]))
    if nested_in == "functional":

        def build(x):
            h = norm()(L.Dense(4)(x))
            return L.Dense(2)(L.Add()([inner(h), inner(branch(h))]))

        model = functional(build, (3,))
    else:
        model = sequential((3,), L.Dense(4), norm(), inner, branch)
    folded = check(model)
    assert folded.get_layer(inner.name).name == inner.name

    # At the border of a model inside, the neighbours are not seen.
    first = keras.Sequential([keras.Input((4,)), norm(name="edge"), L.ReLU()])
    model = sequential((3,), L.Dense(4), first)
    with pytest.raises(ValueError, match="'edge' cannot be folded: backward, there is only the"):
        bn.fold(model)
    check(model, left=1)


def test_state_of_other_layers_is_copied():
    standardize = L.Normalization()
    standardize.adapt(np.random.default_rng(0).normal(5, 3, (100, 4)).astype("float32"))
    model = keras.Sequential([keras.Input((4,)), standardize, L.Dense(3), norm()])
    scramble(keras.Sequential(model.layers[1:]))
    check(model)
    wrapped = L.Bidirectional(L.SimpleRNN(3, return_sequences=True))
    check(sequential((5, 4), norm(), L.Dense(4), wrapped, norm(), L.Dense(2)))


def test_mixed_precision_keeps_its_policy():
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, dtype="mixed_float16"), norm()])
    folded = bn.fold(scramble(model))
    assert folded.layers[0].dtype_policy.name == "mixed_float16"
    assert folded.layers[0].kernel.dtype == "float32"


class MyNorm(BatchNorm):
    pass


def in_training_mode(layer):
    def build(x):
        return layer(L.Dense(4)(x), training=True)

    return build


class Block(L.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = norm(name="hidden")

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x)


REFUSED = {
    "activation": (lambda x: norm(name="bn")(L.Dense(4, "relu", name="d")(x)),
        "backward, an activation function stands between, that of 'd'; forward, its output is an"),
    "alone": (lambda x: norm(name="bn")(x),
        "'bn' cannot be folded: backward, there is only the model's input"),
    "other layer": (lambda x: L.Dense(2)(L.ReLU()(norm(name="bn")(L.LayerNormalization()(x)))),
        r"\(LayerNormalization\) is neither Dense nor a convolution; forward, .*\(ReLU\)"),
    "subclass": (lambda x: MyNorm(name="bn")(L.Dense(4)(x)), "MyNorm may compute anything else"),
    "training": (in_training_mode(norm(name="bn")), "called with training=True"),
    "inside": (lambda x: Block(name="block")(L.Dense(4)(x)),
        r"'hidden' cannot be folded: it is inside 'block' \(Block\)"),
    "monte carlo": (lambda x: norm(name="bn")(L.Dropout(0.5)(L.Dense(4)(x), training=True)),
        r"\(Dropout\) is neither"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded_is_named_with_the_reason(case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        bn.fold(functional(build, (4,)))


IMAGES = {
    "same": ([norm(), L.Conv2D(2, 3, padding="same", name="c")],
        r"forward, 'c' \(Conv2D, padding='same'\) pads with zeros|'c' \(Conv2D\) pads with zeros"),
    "transpose": ([norm(), L.Conv2DTranspose(2, 3, name="c")], "'c' .*sums fewer terms"),
    "axis": ([L.Conv2D(2, 3, name="c"), norm(axis=1)], "axis 1 does not count the channels of 'c'"),
    "axis forward": ([norm(axis=1), L.Conv2D(2, 3, name="c")], "forward, axis 1 does not count"),
    "pooling": ([norm(), L.MaxPooling2D()], r"\(MaxPooling2D\) is neither Dense"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMAGES)
def test_convolutions_that_cannot_take_it(case):
    layers, message = IMAGES[case]
    model = sequential((6, 5, 3), *layers)
    with pytest.raises(ValueError, match=message):
        bn.fold(model)
    check(model, left=1)


def test_padding_is_refused_for_a_reason():
    """What a forward fold into a padding convolution would give differs at the border only."""
    model = sequential((6, 6, 1), norm(), L.Conv2D(1, 3, padding="same"))
    layer, convolution = model.layers
    x = data_for(model)
    scale, shift = (np.asarray(a, "float32") for a in bn._scale_and_shift(layer))
    wrong = keras.ops.conv(x * scale, convolution.kernel, padding="same")
    wrong += convolution.bias + shift * np.sum(convolution.kernel)
    difference = np.abs(wrong - model(x)).max((0, 3))
    assert difference[1:-1, 1:-1].max() < 1e-5
    assert difference[[0, -1]].min() > 1e-3


def test_unknown_length_before_flatten():
    inputs = keras.Input((None, 3))
    h = norm(name="bn")(inputs)
    dense = L.Dense(2)
    dense.build((None, 12))
    model = keras.Model(inputs, dense(L.Flatten()(h)))
    with pytest.raises(ValueError, match=r"the shape \(None, 3\) before Flatten is not known"):
        bn.fold(model)


def test_every_reason_is_named_at_once():
    model = sequential((3,), norm(name="one"), L.ReLU(), norm(name="two"), L.ReLU())
    with pytest.raises(ValueError, match=r"'one' cannot be folded: .*; 'two' cannot be folded"):
        bn.fold(model)
    check(model, left=2)


def test_models_without_a_graph():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.norm = L.Dense(3), norm()

        def call(self, x, training=None):
            return self.norm(self.dense(x), training=training)

    model = Subclassed()
    model(np.zeros((1, 2)))
    with pytest.raises(TypeError, match=r"model must be Sequential or functional.*Subclassed"):
        bn.fold(model)
    with pytest.raises(TypeError, match=r"model must be a keras.Model; received Dense"):
        bn.fold(L.Dense(3))
    with pytest.raises(ValueError, match=r"model must know its input shape"):
        bn.fold(keras.Sequential([L.Dense(3), norm()]))


def test_functional_model_of_a_class_of_its_own():
    class Mine(keras.Model):
        pass

    inputs = keras.Input((4,))
    check(scramble(Mine(inputs, norm()(L.Dense(3)(inputs)))))


def test_sequential_built_by_a_first_call():
    model = keras.Sequential([L.Dense(3), norm()])
    model(np.zeros((2, 4), "float32"))
    check(scramble(model))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_folded_model_can_be_saved_and_folded_again(tmp_path):
    model = sequential((4,), L.Dense(3), norm(), L.ReLU(), norm(), L.Dense(2))
    folded = bn.fold(model)
    folded.save(tmp_path / "folded.keras")
    loaded = keras.models.load_model(tmp_path / "folded.keras")
    x = data_for(model)
    np.testing.assert_array_equal(loaded(x), folded(x))
    np.testing.assert_array_equal(bn.fold(folded)(x), folded(x))
