import itertools
import math
import subprocess
import sys
import tracemalloc

from ch11lib import initializers as init
from ch11lib.backend import keras, tf
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

IN_KERAS = [name for name in init.names() if name not in ("pytorch_default", "unit_normal")]
UNIFORM = [name for name in IN_KERAS if name.endswith("uniform")]


def relu(z):
    return np.maximum(z, 0)


def step(z):
    return z > 0


def tanh_slope(z):
    return 1 - np.tanh(z) ** 2


def erf_slope(z):
    return 2 / math.sqrt(math.pi) * np.exp(-(z**2))


def sigmoid_slope(z):
    return special.expit(z) * special.expit(-z)


@pytest.fixture
def x():
    return np.random.default_rng(7).standard_normal((500, 100))


def test_does_not_import_tensorflow():
    code = "import sys, ch11lib.initializers; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# -------------------------------------------------------------------------------- weights


def test_truncated_normal_std():
    assert pytest.approx(stats.truncnorm.std(-2, 2), rel=1e-12) == init.TRUNCATED_NORMAL_STD
    # The literal in Keras's source; a sample of Keras's has the right variance only with it.
    assert pytest.approx(0.87962566103423978, rel=1e-14) == init.TRUNCATED_NORMAL_STD


def keras_fan(shape, mode):
    """Recover n from Keras: the same seed draws U(-1, 1) and U(-sqrt(3/n), sqrt(3/n))."""
    unit = keras.initializers.RandomUniform(-1, 1, seed=3)(shape).numpy()
    scaled = keras.initializers.VarianceScaling(1.0, mode, "uniform", seed=3)(shape).numpy()
    return 3 * np.sum(unit * unit) / np.sum(scaled * scaled)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 7), max_size=5))
def test_fans_are_those_of_keras(shape):
    fan_in, fan_out = init.fans(shape)
    assert keras_fan(shape, "fan_in") == pytest.approx(fan_in, rel=1e-4)
    assert keras_fan(shape, "fan_out") == pytest.approx(fan_out, rel=1e-4)


def test_fans_by_hand():
    assert init.fans((784, 300)) == (784, 300)
    assert init.fans((5, 3, 16, 32)) == (240, 480)
    assert init.fans((9,)) == (9, 9)
    assert init.fans(()) == (1, 1)
    with pytest.raises(ValueError, match=r"shape .* received \(3, 0\)"):
        init.fans((3, 0))


@pytest.mark.parametrize("shape", [(784, 300), (300, 784), (5, 5, 32, 48)])
@pytest.mark.parametrize("name", IN_KERAS)
def test_variance_and_limit_of_what_keras_draws(name, shape):
    weights = keras.initializers.get({"class_name": name, "config": {"seed": 5}})(shape).numpy()
    fans = init.fans(shape)
    variance, limit = init.variance(name, *fans), init.limit(name, *fans)
    # At most 5 standard errors for 38,400 to 235,200 samples.
    assert np.var(weights) == pytest.approx(variance, rel=5 * math.sqrt(1.4 / weights.size))
    assert abs(weights.mean()) < 4 * math.sqrt(variance / weights.size)
    assert 0.999 * limit < np.abs(weights).max() <= limit * (1 + 1e-6)
    kurtosis = stats.kurtosis(weights, axis=None, fisher=False)
    expected = 1.8 if name in UNIFORM else stats.truncnorm.stats(-2, 2, moments="k") + 3
    assert kurtosis == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("name", init.names())
def test_sample_has_the_announced_distribution(name):
    weights = init.sample(name, (400, 150), rng=0)
    std, limit = math.sqrt(init.variance(name, 400, 150)), init.limit(name, 400, 150)
    if name.endswith("uniform") or name == "pytorch_default":
        law = stats.uniform(-limit, 2 * limit)
    elif name == "unit_normal":
        law = stats.norm()
    else:
        law = stats.truncnorm(-2, 2, scale=limit / 2)
    assert law.std() == pytest.approx(std, rel=1e-12)
    assert stats.kstest(weights.ravel(), law.cdf).pvalue > 0.01
    assert np.var(weights) == pytest.approx(std**2, rel=0.02)


def test_variance_by_hand():
    assert init.variance("glorot_normal", 784, 300) == pytest.approx(1 / 542)
    assert init.variance("he_uniform", 784, 300) == pytest.approx(2 / 784)
    assert init.variance("lecun_normal", 784, 300) == pytest.approx(1 / 784)
    assert init.variance("pytorch_default", 784, 300) == pytest.approx(1 / (3 * 784))
    assert init.variance("unit_normal", 784, 300) == 1
    assert init.limit("pytorch_default", 784, 300) == pytest.approx(1 / math.sqrt(784))
    assert init.limit("unit_normal", 784, 300) == math.inf
    assert init.limit("he_normal", 2, 9) == pytest.approx(2.2737, abs=1e-4)


def test_names_that_share_a_distribution_are_proportional():
    for family in ("normal", "uniform"):
        he, lecun, glorot = (
            init.sample(f"{name}_{family}", (30, 50), rng=4) for name in ("he", "lecun", "glorot")
        )
        np.testing.assert_allclose(he, math.sqrt(2) * lecun, rtol=1e-14)
        np.testing.assert_allclose(glorot, math.sqrt(30 / 40) * lecun, rtol=1e-14)


def test_sample_is_a_function_of_the_random_state_only():
    first = init.sample("he_normal", (20, 10), rng=1)
    np.testing.assert_array_equal(first, init.sample("he_normal", (20, 10), 1))
    generator = np.random.default_rng(1)
    np.testing.assert_array_equal(first, init.sample("he_normal", (20, 10), generator))
    assert not np.array_equal(first, init.sample("he_normal", (20, 10), generator))
    assert first.dtype == np.float64
    assert init.sample("he_normal", (20, 10), 1, dtype="float32").dtype == np.float32


@pytest.mark.parametrize("distribution", ["truncated_normal", "untruncated_normal", "uniform"])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
def test_variance_scaling_agrees_with_keras(mode, distribution):
    arguments = ((600, 200), 1.7, mode, distribution)
    ours = init.variance_scaling(*arguments, rng=0)
    theirs = keras.initializers.VarianceScaling(*arguments[1:], seed=0)(arguments[0]).numpy()
    assert np.var(ours) == pytest.approx(np.var(theirs), rel=0.03)
    assert stats.ks_2samp(ours.ravel(), theirs.ravel()).pvalue > 0.01
    widest = {"truncated_normal": 2.2737, "untruncated_normal": 4.5, "uniform": math.sqrt(3)}
    for weights in (ours, theirs):
        beyond = np.abs(weights).max() / weights.std()
        assert beyond == pytest.approx(widest[distribution], rel=0.1)


def test_variance_scaling_has_the_defaults_of_keras():
    defaults = keras.initializers.VarianceScaling().get_config()
    explicit = {key: defaults[key] for key in ("scale", "mode", "distribution")}
    np.testing.assert_array_equal(
        init.variance_scaling((9, 5), rng=2), init.variance_scaling((9, 5), **explicit, rng=2)
    )
    np.testing.assert_array_equal(
        init.variance_scaling((9, 5), rng=2), init.sample("lecun_normal", (9, 5), rng=2)
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: init.variance("xavier", 2, 2), ValueError, "name must be one of .*'xavier'"),
        (lambda: init.variance(3, 2, 2), ValueError, "name must be one of .*3"),
        (lambda: init.variance("he_normal", 0, 2), ValueError, "fan_in .* received 0"),
        (lambda: init.limit("he_normal", 2, -1), ValueError, "fan_out .* received -1"),
        (lambda: init.sample("he_normal", (2, 2), None), TypeError, "rng .* received None"),
        (lambda: init.sample("he_normal", (2, 2), 0, dtype=int), TypeError, "dtype .* int64"),
        (lambda: init.variance_scaling((2, 2), 0.0, rng=0), ValueError, "scale .* received 0.0"),
        (lambda: init.variance_scaling((2, 2), mode="fan", rng=0), ValueError, "mode .*'fan'"),
        (
            lambda: init.variance_scaling((2, 2), distribution="normal", rng=0),
            ValueError,
            "distribution .*'normal'",
        ),
    ],
)
def test_wrong_arguments_of_the_draw(call, error, words):
    with pytest.raises(error, match=words):
        call()


# -------------------------------------------------------------------------- through depth: measured


def keras_copy(layers, n_inputs, activation):
    """The same stack as a Keras model in float64, which returns every z."""
    inputs = h = keras.Input((n_inputs,), dtype="float64")
    zs = []
    for layer in layers:
        dense = keras.layers.Dense(layer.w.shape[1], dtype="float64")
        zs.append(dense(h))
        dense.set_weights([layer.w, layer.b])
        h = keras.layers.Activation(activation, dtype="float64")(zs[-1])
    return keras.Model(inputs, [*zs, h])


WIDTHS = [30, 20, 40, 5]


def test_propagate_agrees_with_keras(x):
    layers = list(
        init.propagate(x, WIDTHS, np.tanh, "glorot_normal", rng=1, biases="pytorch_default")
    )
    assert [layer.w.shape for layer in layers] == [(100, 30), (30, 20), (20, 40), (40, 5)]
    *zs, h = keras_copy(layers, 100, "tanh")(x)
    for layer, z in zip(layers, zs, strict=True):
        np.testing.assert_allclose(layer.z, z.numpy(), atol=1e-13)
    np.testing.assert_allclose(layers[-1].h, h.numpy(), atol=1e-13)


def test_backpropagate_agrees_with_gradient_tape(x):
    g = np.random.default_rng(3).standard_normal((500, 5))
    layers = init.backpropagate(
        x, WIDTHS, relu, "he_uniform", derivative=step, rng=1, biases=0.1, output_gradient=g
    )
    model = keras_copy(layers, 100, "relu")
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        *zs, h = model(inputs)
        loss = tf.reduce_sum(g * h)
    kernels = [weight for weight in model.trainable_variables if weight.name == "kernel"]
    *dzs, dx = tape.gradient(loss, [*zs, inputs])
    for layer, dz in zip(layers, dzs, strict=True):
        np.testing.assert_allclose(layer.dz, dz.numpy(), atol=1e-12)
    np.testing.assert_allclose(layers[0].dz @ layers[0].w.T, dx.numpy(), atol=1e-12)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(g * model(inputs)[-1])
    for layer, dw in zip(layers, tape.gradient(loss, kernels), strict=True):
        np.testing.assert_allclose(layer.dw, dw.numpy(), atol=1e-10)


def test_backpropagate_passes_through_the_layers_of_propagate(x):
    arguments = (x[:7], [6, 5], np.tanh, ["unit_normal", 0.3])
    forward = list(init.propagate(*arguments, rng=9, biases=0.5))
    backward = init.backpropagate(*arguments, derivative=tanh_slope, rng=9, biases=0.5)
    for up, down in zip(forward, backward, strict=True):
        for field in ("w", "b", "z", "h"):
            np.testing.assert_array_equal(getattr(up, field), getattr(down, field))
        assert up.dz is None


def test_random_output_gradient_is_standard_normal(x):
    [layer] = init.backpropagate(
        x, [200], lambda z: z, "lecun_normal", derivative=np.ones_like, rng=5
    )
    assert stats.kstest(layer.dz.ravel(), stats.norm.cdf).pvalue > 0.01


def test_layers_are_made_one_at_a_time():
    x = np.ones((100, 100))
    tracemalloc.start()
    try:
        for layer in init.propagate(x, [100] * 200, np.tanh, "lecun_normal", rng=0):
            last = layer.h
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert last.shape == (100, 100)
    assert peak < 20 * x.nbytes  # keeping them would take 600 arrays of this size


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(1, 4), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans())
def test_odd_shapes_and_types(n_examples, widths, single):
    dtype = np.float32 if single else np.float64
    x = np.linspace(-1, 1, 3 * n_examples).reshape(n_examples, 3).astype(dtype)
    layers = init.backpropagate(
        x, widths, np.tanh, np.float64(0.7), derivative=tanh_slope, rng=1, biases="lecun_normal"
    )
    assert [layer.h.shape for layer in layers] == [(n_examples, n) for n in widths]
    for layer in layers:
        for field in ("w", "b", "z", "h", "dz", "dw"):
            assert getattr(layer, field).dtype == dtype
        assert layer.dw.shape == layer.w.shape


def test_integers_are_computed_in_float64():
    [layer] = init.propagate([[1, 2]], (3,), np.tanh, 1, rng=0)
    assert layer.z.dtype == np.float64


def test_biases_that_are_left_out_have_the_type_of_the_input():
    [layer] = init.propagate(np.ones((2, 2), "float32"), [3], np.tanh, 1.0, rng=0)
    assert layer.b.dtype == layer.z.dtype == np.float32


def test_rules_of_weights_and_biases():
    x = np.zeros((1, 400))

    def make(rule):
        return next(init.propagate(x, [300], np.tanh, "he_normal", rng=0, biases=rule)).b

    assert make(0.5).std() == pytest.approx(0.5, rel=0.15)
    assert np.abs(make("pytorch_default")).max() == pytest.approx(1 / 20, rel=0.05)
    np.testing.assert_array_equal(make(lambda shape, rng: np.full(shape, -1.0)), -np.ones(300))
    np.testing.assert_array_equal(make(0.0), np.zeros(300))
    # Biases are drawn after the weights of their layer, and none are drawn for 0.
    one, two = (
        list(init.propagate(x, [300, 300], np.tanh, ["he_normal", 2.0], rng=0, biases=rule))
        for rule in (0.0, [0.0, 1.0])
    )
    for one_layer, two_layer in zip(one, two, strict=True):
        np.testing.assert_array_equal(one_layer.w, two_layer.w)
    assert one[1].w.std() == pytest.approx(2.0, rel=0.02)


def test_connect_sees_what_came_in_and_what_came_out(x):
    plain = next(init.propagate(x, [100], np.tanh, 0.1, rng=0))
    skip, last = init.propagate(
        x, [100, 100], np.tanh, 0.1, rng=0, connect=lambda below, h: (below + h) / 2
    )
    np.testing.assert_allclose(skip.h, (x + plain.h) / 2, rtol=1e-14)
    np.testing.assert_allclose(last.z, skip.h @ last.w, rtol=1e-12)


def test_statistics(x):
    layers = init.backpropagate(x, [50, 8], relu, "he_normal", derivative=step, rng=3, biases=1.0)
    dead = np.zeros((500, 8))
    dead[:, 5:] = 1.0
    layers[1] = init.Layer(layers[1].w, layers[1].b, layers[1].z, dead, layers[1].dz, layers[1].dw)
    table = init.statistics(layers, largest=lambda layer: np.max(layer.z))
    assert table.index.tolist() == [1, 2]
    for row, layer in zip(table.itertuples(), layers, strict=True):
        assert row.z_mean == pytest.approx(np.mean(layer.z))
        assert row.z_std == pytest.approx(np.std(layer.z))
        assert row.h_mean == pytest.approx(np.mean(layer.h))
        assert row.h_std == pytest.approx(np.std(layer.h))
        assert row.h_mean_square == pytest.approx(np.mean(layer.h**2))
        assert row.dz_rms == pytest.approx(np.sqrt(np.mean(layer.dz**2)))
        assert row.w_norm == pytest.approx(np.sqrt(np.sum(layer.w**2)))
        assert row.dw_norm == pytest.approx(np.sqrt(np.sum(layer.dw**2)))
        assert row.largest == layer.z.max()
    assert table.dead.tolist() == [0, 5 / 8]
    forward = init.statistics(init.propagate(x, [50], relu, "he_normal", rng=3))
    assert list(forward.columns) == ["z_mean", "z_std", "h_mean", "h_std", "h_mean_square", "dead"]


def test_simulate_is_statistics_of_each_seed():
    table = init.simulate(relu, "he_normal", seeds=[4, 2], width=30, depth=3, examples=20)
    for seed in (4, 2):
        rng = np.random.default_rng(seed)
        layers = init.propagate(rng.standard_normal((20, 30)), [30] * 3, relu, "he_normal", rng=rng)
        assert table.loc[seed].equals(init.statistics(layers))
    assert table.index.names == ["seed", "layer"]
    assert not table.loc[4].equals(table.loc[2])
    same_layers = init.simulate(
        relu, "he_normal", seeds=[4, 2], width=30, depth=3, examples=20,
        derivative=step, biases=0.0, peak=lambda layer: layer.h.max(),
    )  # fmt: skip
    assert same_layers.h_std.equals(table.h_std)
    assert (same_layers.peak > same_layers.h_std).all()
    assert (same_layers.dz_rms > 0).all()
    with pytest.raises(ValueError, match="seeds must hold at least one seed"):
        init.simulate(relu, "he_normal", seeds=[])


def test_factor_per_layer():
    assert init.factor_per_layer([3.0, 100.0, 0.3 * 2.5**2]) == pytest.approx(2.5 * math.sqrt(0.1))
    values = np.exp(np.random.default_rng(0).standard_normal(9))
    ratios = values[1:] / values[:-1]
    assert init.factor_per_layer(values) == pytest.approx(stats.gmean(ratios))
    several = np.exp(np.random.default_rng(1).standard_normal((2, 3, 4)))
    expected = stats.gmean(several[..., 1:] / several[..., :-1], axis=-1)
    np.testing.assert_allclose(init.factor_per_layer(several), expected)
    for bad in ([1.0], 1.0, [1.0, 0.0], [1.0, np.nan], [[1.0], [2.0]], np.ones((0, 3))):
        with pytest.raises(ValueError, match="values must be two or more positive"):
            init.factor_per_layer(bad)


def test_mean_correlation(x):
    pairs = [stats.pearsonr(x[i], x[j])[0] for i, j in itertools.combinations(range(6), 2)]
    assert init.mean_correlation(x[:6]) == pytest.approx(np.mean(pairs))
    assert init.mean_correlation(x[0] + 1e-9 * x) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"two or more examples; received shape \(1, 100\)"):
        init.mean_correlation(x[:1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": np.ones(3)}, r"x must have shape .* received shape \(3,\)"),
        ({"widths": 10}, "widths must list .* received 10"),
        ({"widths": []}, "widths must list"),
        ({"widths": [4, 0]}, "widths must list"),
        ({"widths": [4, 2.5]}, "widths must list"),
        ({"weights": "he"}, "name must be one of .*'he'"),
        ({"weights": -1.0}, "weights must be .* received -1.0"),
        ({"weights": [1.0]}, "weights must be one rule, or one for each of the 2 .* received 1"),
        ({"biases": [0.0, None]}, "biases must be .* received None"),
        ({"biases": math.nan}, "biases must be .* received nan"),
    ],
)
def test_propagate_refuses_at_once(changes, words):
    arguments = {"x": np.ones((2, 3)), "widths": [4, 5], "weights": 1.0, "biases": 0.0} | changes
    with pytest.raises(ValueError, match=words):
        init.propagate(activation=np.tanh, rng=0, **arguments)


def test_wrong_shapes_that_show_later():
    x = np.ones((2, 3))
    with pytest.raises(TypeError, match="rng must be an int"):
        init.propagate(x, [4], np.tanh, 1.0, rng=None)
    with pytest.raises(ValueError, match=r"shape that it is given, \(3, 4\); received \(4, 3\)"):
        list(init.propagate(x, [4], np.tanh, lambda shape, rng: np.ones(shape[::-1]), rng=0))
    with pytest.raises(ValueError, match=r"output_gradient .* \(2, 4\); received shape \(3,\)"):
        init.backpropagate(x, [4], relu, 1.0, derivative=step, rng=0, output_gradient=np.ones(3))


# ------------------------------------------------------------- facts that the notebooks build upon


def test_scale_of_a_bias_free_relu_net_cancels_in_the_weight_gradients(x):
    """Positive homogeneity: z of layer l scales like c^l, dz like c^(L-l), dw alike everywhere."""
    table = {}
    for scale in (0.35, 1.0, 7.0):
        layers = init.backpropagate(
            x, [100] * 20, relu, scale * math.sqrt(2 / 100), derivative=step, rng=0
        )
        table[scale] = init.statistics(layers)
    ratios = [t.dw_norm.iloc[0] / t.dw_norm.iloc[-1] for t in table.values()]
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-9)
    decays = [t.dz_rms.iloc[0] / t.dz_rms.iloc[-1] for t in table.values()]
    assert decays[0] / decays[1] == pytest.approx(0.35**19)
    assert decays[2] / decays[1] == pytest.approx(7.0**19)


def test_scale_without_biases_does_not_change_which_units_are_dead(x):
    masks = [
        [(layer.h == 0).all(axis=0) for layer in init.propagate(x, [100] * 10, relu, name, rng=0)]
        for name in ("he_normal", "glorot_normal", "lecun_normal")
    ]
    assert np.sum(masks[0]) > 0
    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(masks[0], masks[2])


# ------------------------------------------------------------------------- through depth: predicted


@pytest.mark.parametrize("q", [1e-8, 1e-3, 0.3, 1.0, 7.0, 400.0, 1e6])
@pytest.mark.parametrize(
    "g",
    [
        np.tanh,
        special.expit,
        sigmoid_slope,
        relu,
        step,
        lambda z: z * special.ndtr(z),
        lambda z: np.clip(z, 0, 6),
        lambda z: np.clip(z / 6 + 0.5, 0, 1),
        lambda z: np.where(np.abs(z) > 0.5, z, 0.0),
    ],
)
def test_gaussian_mean_against_adaptive_quadrature(g, q):
    std = math.sqrt(q)
    corners = [c / std for c in (-40, -6, -3, -0.5, 0, 0.5, 3, 6, 40) if abs(c) < 12 * std]

    def integrand(t):
        return float(g(np.array(std * t))) ** 2 * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)

    expected = sum(
        integrate.quad(integrand, low, high, epsabs=0, epsrel=1e-12, limit=200)[0]
        for low, high in itertools.pairwise([-14, *corners, 14])
    )
    assert init.gaussian_mean(lambda z: g(z) ** 2, q) == pytest.approx(expected, rel=1e-10)


def test_gaussian_mean_of_arrays():
    q = np.array([[0.0, 1e-6, 2.0], [5.0, 1e5, 1.0]])
    np.testing.assert_allclose(init.gaussian_mean(np.square, q), q, rtol=1e-12)
    np.testing.assert_allclose(init.gaussian_mean(lambda z: z**4, q), 3 * q**2, rtol=1e-12)
    q = np.array([0.0, 0.1, 9.0])
    np.testing.assert_allclose(init.gaussian_mean(np.cos, q), np.exp(-q / 2), atol=1e-11)
    assert init.gaussian_mean(np.ones_like, 3.0) == pytest.approx(1, rel=1e-13)
    assert init.gaussian_mean(special.expit, 0.0) == 0.5
    for bad in (-1.0, np.nan, [1.0, np.inf]):
        with pytest.raises(ValueError, match="q must be finite and not negative"):
            init.gaussian_mean(np.square, bad)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.floats(1e-6, 1e6), st.floats(0.01, 100.0), st.floats(0.0, 10.0))
def test_maps_of_the_error_function_in_closed_form(q, sigma_w2, sigma_b2):
    # Williams (1998), Computation with infinite neural networks.
    mean_square = 2 / math.pi * math.asin(2 * q / (1 + 2 * q))
    assert init.variance_map(special.erf, q, sigma_w2, sigma_b2) == pytest.approx(
        sigma_w2 * mean_square + sigma_b2, rel=1e-9
    )
    assert init.gradient_factor(erf_slope, q, sigma_w2) == pytest.approx(
        math.sqrt(sigma_w2 * 4 / math.pi / math.sqrt(1 + 4 * q)), rel=1e-9
    )


def test_maps_of_relu_and_the_identity():
    q = np.array([0.0, 0.1, 30.0])
    np.testing.assert_allclose(init.variance_map(relu, q, 2.0, 0.5), q + 0.5, rtol=1e-12)
    np.testing.assert_allclose(init.gradient_factor(step, q[1:], 2.0), 1.0, rtol=1e-12)
    np.testing.assert_allclose(init.variance_map(lambda z: z, q, 3.0), 3 * q, rtol=1e-12)
    with pytest.raises(ValueError, match=r"sigma_w2 .* received -1"):
        init.variance_map(relu, 1.0, -1)
    with pytest.raises(ValueError, match=r"sigma_b2 .* received inf"):
        init.variance_map(relu, 1.0, 1, math.inf)
    with pytest.raises(ValueError, match=r"sigma_w2 .* received nan"):
        init.gradient_factor(step, 1.0, math.nan)


def test_fixed_points():
    [relu_point] = init.fixed_points(relu, sigma_w2=1.0, sigma_b2=1.0)  # q = q/2 + 1
    assert relu_point == pytest.approx((2.0, 0.5), rel=1e-7)
    assert init.fixed_points(relu, sigma_w2=2.0) == []  # keeps everything
    assert init.fixed_points(relu, sigma_w2=1.9) == []  # keeps nothing
    assert init.fixed_points(np.tanh, sigma_w2=1.0) == []

    sigma_w2 = 2.0

    def closed(q):
        return sigma_w2 * 2 / math.pi * np.arcsin(2 * q / (1 + 2 * q)) - q

    q = optimize.brentq(closed, 0.01, 10)
    [point] = init.fixed_points(special.erf, sigma_w2)
    assert point.q == pytest.approx(q, rel=1e-9)
    assert point.slope == pytest.approx(1 + (closed(q + 1e-5) - closed(q - 1e-5)) / 2e-5, rel=1e-6)

    # E[z^4] = 3q² and a bias: q = 0.25 q² + 0.5 has two solutions, one on each side of slope 1.
    low, high = init.fixed_points(np.square, 1 / 12, 0.5)
    assert low == pytest.approx((2 - math.sqrt(2), (2 - math.sqrt(2)) / 2), rel=1e-6)
    assert high == pytest.approx((2 + math.sqrt(2), (2 + math.sqrt(2)) / 2), rel=1e-6)
    [only] = init.fixed_points(np.square, 1 / 12, 0.5, between=(1, 1e6))
    assert only == pytest.approx(high, rel=1e-9)
    for bad in ((0, 1), (2, 1), (1, math.inf)):
        with pytest.raises(ValueError, match="between must be two positive numbers"):
            init.fixed_points(relu, 1.0, between=bad)


def test_fixed_point_that_lies_on_the_search_grid():
    """SELU's is at exactly 1, the middle of the default range."""
    alpha, scale = 1.6732632423543772, 1.0507009873554805

    def selu(z):
        return scale * np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0)))

    [point] = init.fixed_points(selu, sigma_w2=1.0)
    assert point.q == pytest.approx(1.0, rel=1e-9)
    assert point.slope == pytest.approx(0.782648, abs=1e-5)  # Klambauer et al. 2017


STACKS = {
    "tanh, Glorot": (np.tanh, tanh_slope, "glorot_uniform", 0.0),
    "sigmoid, unit normal": (special.expit, sigmoid_slope, 1.0, 0.0),
    "sigmoid, Glorot": (special.expit, sigmoid_slope, "glorot_normal", 0.3),
    "ReLU, He": (relu, step, "he_normal", 0.0),
    "ReLU, PyTorch": (relu, step, "pytorch_default", "pytorch_default"),
}


@pytest.mark.parametrize("stack", STACKS)
def test_mean_field_predicts_what_statistics_measure(stack):
    f, slope, weights, biases = STACKS[stack]
    widths = [400, 500, 300, 400]
    x = np.random.default_rng(0).standard_normal((200, 350))
    told = init.mean_field(x, widths, f, weights, derivative=slope, biases=biases)
    tables = [
        init.statistics(
            init.backpropagate(x, widths, f, weights, derivative=slope, rng=seed, biases=biases)
        )
        for seed in range(5)
    ]
    columns = ["z_std", "h_mean_square", "dz_rms", "h_mean"]
    seen = np.mean([table[columns] for table in tables], axis=0)
    np.testing.assert_allclose(seen[:, :3], told[columns[:3]], rtol=0.05)
    # tanh has mean 0, which needs an absolute tolerance.
    np.testing.assert_allclose(seen[:, 3], told.h_mean, atol=0.03 * told.h_mean_square.max() ** 0.5)
    np.testing.assert_allclose(told.h_std**2 + told.h_mean**2, told.h_mean_square, rtol=1e-9)


def test_mean_field_of_a_layer_for_itself():
    """Each layer may have rules of its own; the factor backwards counts the units above."""
    x = 3 * np.ones((2, 50))
    table = init.mean_field(
        x, [10, 1000], relu, ["he_normal", 0.2], derivative=step, biases=[2.0, 0.0]
    )
    assert table.z_std.pow(2).tolist() == pytest.approx([2 * 9 + 4, 10 * 0.04 * 11])
    assert table.dz_rms.tolist() == pytest.approx(
        [math.sqrt(1 / 2) * math.sqrt(1000 * 0.04 / 2), math.sqrt(1 / 2)]
    )
    assert "dz_rms" not in init.mean_field(x, [10], relu, 1.0)
    with pytest.raises(ValueError, match="weights must be names or numbers here"):
        init.mean_field(x, [10], relu, lambda shape, rng: np.ones(shape))


def test_tanh_with_glorot_fades_like_one_over_twice_the_depth():
    table = init.mean_field(np.ones((1, 512)), [512] * 100, np.tanh, "glorot_normal")
    depth = table.index.to_numpy()
    # v' = v - 2v² + O(v³) has the solution 1/(2 depth) in leading order.
    assert (depth * table.h_mean_square)[100] == pytest.approx(0.5, abs=0.05)
