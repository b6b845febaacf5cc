import inspect
import itertools
import math
import time

from ch11lib import activations as act
from ch11lib.backend import keras, tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
import numpy as np
import pytest
from scipy import special, stats

# Functions of keras.activations that do not act element by element on one array, and tools.
NOT_ELEMENTWISE = {"glu", "softmax", "log_softmax", "sparsemax"}
TOOLS = {"get", "serialize", "deserialize"}
# Of this one the parameters have no defaults, and it is hard_shrink without them.
NO_DEFAULTS = {"threshold"}

PARAMETERS = [
    ("leaky_relu", {"negative_slope": 0.01}),
    ("leaky_relu", {"negative_slope": 1.5}),
    ("elu", {"alpha": 0.5}),
    ("elu", {"alpha": 2.0}),
    ("celu", {"alpha": 0.5}),
    ("celu", {"alpha": 2.0}),
    ("gelu", {"approximate": True}),
    ("squareplus", {"b": 0.25}),
    ("hard_shrink", {"threshold": 2.0}),
    ("soft_shrink", {"threshold": 2.0}),
]
CASES = [(name, {}) for name in act.names()] + PARAMETERS
IDS = [name + "".join(f"-{value}" for value in parameters.values()) for name, parameters in CASES]

CORNERS = np.array([-6.0, -3.0, -2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0, 3.0, 6.0])
TAILS = np.geomspace(6.1, 1e4, 60)
GRID = np.concatenate([-TAILS[::-1], np.linspace(-8, 8, 1601), CORNERS, TAILS])


def in_keras(name, parameters, z):
    """Value and gradient of Keras's function."""
    z = tf.constant(z)
    with tf.GradientTape() as tape:
        tape.watch(z)
        y = getattr(keras.activations, name)(z, **parameters)
    return y.numpy(), tape.gradient(y, z).numpy()


def assert_close(name, ours, theirs, z):
    """Agree to some 30 roundings of a number as large as the argument.

    It cannot be had closer: Keras's squareplus cancels for large negative z.
    """
    # TensorFlow holds the slope of leaky_relu and the constants of gelu in float32, always.
    coarse = name in ("leaky_relu", "gelu")
    eps = np.finfo("float32" if coarse else theirs.dtype).eps
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[~finite], theirs[~finite])
    ours, theirs, z = (np.asarray(array[finite], np.float64) for array in (ours, theirs, z))
    allowed = 32 * eps * (1 + np.maximum(np.abs(z), np.abs(theirs)))
    wrong = np.abs(ours - theirs) > allowed
    assert not wrong.any(), (z[wrong], ours[wrong], theirs[wrong])


# -------------------------------------------------------------------------- values and derivatives


def test_all_elementwise_functions_of_keras_are_here():
    public = {name for name in dir(keras.activations) if not name.startswith("_")}
    public = {name for name in public if callable(getattr(keras.activations, name))}
    expected = public - NOT_ELEMENTWISE - TOOLS - NO_DEFAULTS
    assert set(act.names()) | {"swish", "hard_swish"} == expected
    assert all(getattr(act, name) is act.get(name) for name in expected)
    assert set(act.GALLERY) <= set(act.names())
    assert len(set(act.GALLERY)) == len(act.GALLERY) == 16


@pytest.mark.parametrize("name", act.names())
def test_defaults_are_those_of_keras(name):
    ours = list(inspect.signature(getattr(act, name)).parameters.values())
    theirs = inspect.signature(getattr(keras.activations, name)).parameters
    for parameter in ours[1:]:
        assert parameter.default == theirs[parameter.name].default


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "parameters"), CASES, ids=IDS)
def test_value_and_derivative_agree_with_keras(name, parameters, dtype):
    z = GRID.astype(dtype)
    value, slope = in_keras(name, parameters, z)
    assert_close(name, act.get(name, **parameters)(z), value, z)
    keep = z != 0 if name == "celu" else np.full(z.shape, True)  # see the next test
    assert_close(name, act.derivative(name, **parameters)(z)[keep], slope[keep], z[keep])


def test_celu_has_slope_one_at_zero_where_keras_says_two():
    """If this fails because Keras has become right, delete the note in celu's docstring."""
    assert in_keras("celu", {}, np.zeros(1))[1].tolist() == [2.0]
    assert act.derivative("celu")(0.0) == 1.0
    nearby = in_keras("celu", {}, np.array([-1e-9, 1e-9]))[1]
    np.testing.assert_allclose(nearby, 1, atol=1e-8)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    st.sampled_from([np.float32, np.float64]).flatmap(
        lambda dtype: npst.arrays(
            dtype,
            npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
            # TensorFlow flushes subnormal numbers to zero.
            elements=st.floats(
                -(2.0**13),
                2.0**13,
                width=8 * np.dtype(dtype).itemsize,
                allow_subnormal=False,
            ),
        )
    )
)
def test_any_array_agrees_with_keras(z):
    for name in act.names():
        ours, slope = act.get(name)(z), act.derivative(name)(z)
        assert ours.shape == slope.shape == z.shape
        assert ours.dtype == slope.dtype == z.dtype
        theirs, their_slope = in_keras(name, {}, z)
        if name == "celu":
            their_slope = np.where(z == 0, 1, their_slope)
        flat = np.ravel(z)
        if flat.size:
            assert_close(name, np.ravel(ours), np.ravel(theirs), flat)
            assert_close(name, np.ravel(slope), np.ravel(their_slope), flat)


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=IDS)
def test_derivative_is_the_limit_of_differences(name, parameters):
    f, prime = act.get(name, **parameters), act.derivative(name, **parameters)
    z = np.linspace(-7.987, 7.987, 800)
    h = 1e-5
    assert np.abs(z[:, None] - CORNERS).min() > h
    differences = (f(z + h) - f(z - h)) / (2 * h)
    np.testing.assert_allclose(prime(z), differences, rtol=1e-8, atol=1e-9)
    if name != "hard_shrink":  # it jumps, and so has an infinite slope on one side
        # At a corner the convention is one of the two one-sided slopes.
        right, left = (f(CORNERS + h) - f(CORNERS)) / h, (f(CORNERS) - f(CORNERS - h)) / h
        slope = prime(CORNERS)
        error = np.minimum(np.abs(slope - right), np.abs(slope - left))
        assert (error <= 2e-5 * (1 + np.abs(slope))).all()


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
def test_prelu_agrees_with_the_layer(alpha):
    z = np.array([[-3.0, -0.5, 0.0, 0.5, 3.0]])
    slopes = alpha * np.arange(1, 6)
    layer = keras.layers.PReLU(dtype="float64")
    layer.build(z.shape)
    layer.set_weights([slopes])
    inputs = tf.constant(z)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = layer(inputs)
    np.testing.assert_allclose(act.prelu(z, slopes), outputs.numpy(), rtol=1e-14)
    expected = tape.gradient(outputs, inputs).numpy()
    np.testing.assert_array_equal(act.derivative("prelu", alpha=slopes)(z), expected)
    with pytest.raises(TypeError, match=r"parameters do not fit prelu: .*alpha"):
        act.derivative("prelu")


TAIL_VALUES = [
    # function, argument, value that needs no subtraction of nearly equal numbers
    ("sigmoid", -100.0, math.exp(-100)),
    ("silu", -50.0, -50 * math.exp(-50)),
    ("mish", -50.0, -50 * math.exp(-50)),
    ("gelu", -10.0, -5 * math.erfc(10 / math.sqrt(2))),
    ("softplus", -100.0, math.exp(-100)),
    ("log_sigmoid", 100.0, -math.exp(-100)),
    ("squareplus", -1e4, 2 / (1e4 + math.sqrt(1e8 + 4))),
    ("elu", -1e-12, math.expm1(-1e-12)),
    ("selu", -1e-12, math.expm1(-1e-12) * 1.0507009873554805 * 1.6732632423543772),
    ("celu", -1e-12, math.expm1(-1e-12)),
]
TAIL_SLOPES = [
    ("sigmoid", 100.0, math.exp(-100)),
    ("sigmoid", -100.0, math.exp(-100)),
    ("tanh", 50.0, 4 * math.exp(-100)),
    ("tanh", -50.0, 4 * math.exp(-100)),
    ("softsign", 1e4, 1 / 10001**2),
    ("silu", -50.0, -49 * math.exp(-50)),
    ("log_sigmoid", 100.0, math.exp(-100)),
    ("squareplus", -1e4, 2 / (1e4 + math.sqrt(1e8 + 4)) / math.sqrt(1e8 + 4)),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tails_keep_their_relative_accuracy(dtype):
    # Ill-conditioned: a rounding of z = -10 changes gelu by a hundred roundings of its value.
    accuracy = 200 * float(np.finfo(dtype).eps)
    tiny = float(np.finfo(dtype).tiny)  # smaller numbers have fewer digits
    for table, find in ((TAIL_VALUES, act.get), (TAIL_SLOPES, act.derivative)):
        for name, z, expected in table:
            value = float(find(name)(np.array(z, dtype)))
            assert value == pytest.approx(expected, rel=accuracy, abs=tiny), name


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_large_arguments_give_finite_values_of_the_same_type(dtype):
    z = np.array([-1e4, -300, 300, 1e4], dtype)
    for name in act.names():
        value, slope = act.get(name)(z), act.derivative(name)(z)
        assert value.dtype == slope.dtype == z.dtype
        if name == "exponential":  # Keras returns infinity too; there is no such number
            assert value[0] == 0
            assert value[-1] == np.inf
        else:
            assert np.isfinite(value).all(), name
            assert np.isfinite(slope).all(), name


def test_input_types():
    for z in ([-1, 0, 2], (True, False), np.array([[3]], dtype="uint8")):
        assert act.gelu(z).dtype == np.float64
        assert act.derivative("gelu")(z).dtype == np.float64
        np.testing.assert_array_equal(act.gelu(z), act.gelu(np.asarray(z, dtype=float)))
    assert isinstance(act.relu(-2.0), np.float64)
    half = act.silu(np.linspace(-5, 5, 11, dtype="float16"))
    np.testing.assert_array_equal(
        half, act.silu(np.linspace(-5, 5, 11, dtype="float32")).astype("float16")
    )
    for bad in (1j, "relu", np.array([None])):
        with pytest.raises(TypeError, match="z must hold real numbers; received an array of type"):
            act.tanh(bad)


def test_input_is_not_changed():
    z = np.linspace(-3, 3, 7)
    z.setflags(write=False)
    for name in act.names():
        assert name == "linear" or not np.shares_memory(act.get(name)(z), z)
        assert not np.shares_memory(act.derivative(name)(z), z)


def test_finding_by_name():
    assert act.get("swish") is act.silu is act.swish
    assert act.get("hard_swish") is act.hard_silu is act.hard_swish
    assert act.get("elu", alpha=0.5)(-50.0) == -0.5
    for find in (act.get, act.derivative, act.gain):
        with pytest.raises(ValueError, match=r"name must be one of .*'RELU'"):
            find("RELU")
        with pytest.raises(ValueError, match=r"name must be one of .*None"):
            find(None)
        with pytest.raises(TypeError, match=r"parameters do not fit relu: .*alpha"):
            find("relu", alpha=1.0)


# ---------------------------------------------------------------------------------- SELU's numbers


def test_selu_constants():
    # The numbers published with the paper's code, and the closed form that the paper gives.
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    assert pytest.approx(alpha, rel=1e-15) == act.SELU_ALPHA
    assert pytest.approx(scale, rel=1e-15) == act.SELU_SCALE
    c1, c2, e, pi = special.erfc(1 / math.sqrt(2)), special.erfc(math.sqrt(2)), math.e, math.pi
    root = math.sqrt(e)
    assert pytest.approx(-math.sqrt(2 / pi) / (c1 * root - 1), rel=1e-14) == act.SELU_ALPHA
    inner = 2 * c2 * e**2 + pi * c1**2 * e - 2 * (2 + pi) * c1 * root + pi + 2
    expected = (1 - c1 * root) * math.sqrt(2 * pi) / math.sqrt(inner)
    assert pytest.approx(expected, rel=1e-14) == act.SELU_SCALE


def selu_moments(m, v):
    """Mean and variance of selu(z), z ~ N(m, v), in closed form."""
    s = math.sqrt(v)
    below = special.ndtr(-m / s)
    e1, e2 = (math.exp(k * m + k * k * v / 2 + special.log_ndtr(-m / s - k * s)) for k in (1, 2))
    density = math.exp(-m * m / (2 * v)) / math.sqrt(2 * math.pi)
    plus1 = m * special.ndtr(m / s) + s * density
    plus2 = (m * m + v) * special.ndtr(m / s) + m * s * density
    scale, alpha = act.SELU_SCALE, act.SELU_ALPHA
    first = scale * (plus1 + alpha * (e1 - below))
    second = scale**2 * (plus2 + alpha**2 * (e2 - 2 * e1 + below))
    return first, second - first**2


@pytest.mark.parametrize(
    ("mean", "variance"), [(0, 1), (1, 0.5), (-2, 3), (0.1, 1e-4), (3, 40), (-5, 0.3)]
)
@pytest.mark.parametrize(("omega", "tau"), [(0, 1), (0.1, 1.2), (-1, 0.8)])
def test_moment_map_of_selu_in_closed_form(mean, variance, omega, tau):
    mapped = act.moment_map("selu", mean, variance, omega=omega, tau=tau)
    assert mapped == pytest.approx(selu_moments(omega * mean, tau * variance), rel=1e-7, abs=1e-9)
    jacobian = act.moment_jacobian("selu", mean, variance, omega=omega, tau=tau)
    h = 1e-4 * min(variance, 1)
    expected = np.transpose(
        [
            np.subtract(
                selu_moments(omega * (mean + dm), tau * (variance + dv)),
                selu_moments(omega * (mean - dm), tau * (variance - dv)),
            )
            / (2 * h)
            for dm, dv in ((h, 0), (0, h))
        ]
    )
    np.testing.assert_allclose(jacobian, expected, rtol=1e-4, atol=1e-6)


def test_moment_map_of_wide_and_narrow_distributions():
    assert act.moment_map("selu", 73, 74**2, omega=0.5) == pytest.approx(
        selu_moments(36.5, 74**2), rel=1e-8
    )
    mean, variance = act.moment_map("relu", 0.0, 1e6)
    assert mean == pytest.approx(1000 / math.sqrt(2 * math.pi), rel=1e-9)
    assert variance == pytest.approx(1e6 * (0.5 - 1 / (2 * math.pi)), rel=1e-9)
    # In a distribution this wide the slope is a spike; its integral is the function's rise.
    peak = 1 / math.sqrt(2 * math.pi * 1e6)
    for name, rise in (("sigmoid", 1), ("tanh", 2), ("hard_tanh", 2), ("hard_sigmoid", 1)):
        slope = act.moment_jacobian(name, 0.0, 1e6, omega=1.0)[0, 0]
        assert slope == pytest.approx(rise * peak, rel=1e-5)
    assert act.moment_map("sigmoid", 5.0, 0.0, omega=1.0) == (pytest.approx(special.expit(5)), 0.0)
    assert act.moment_map("elu", 2.0, 3.0, omega=1.0, alpha=0.5) != pytest.approx(
        act.moment_map("elu", 2.0, 3.0, omega=1.0), rel=1e-3
    )


def test_fixed_point_of_selu():
    """Klambauer et al. (2017): the Jacobian at (0, 1) and its spectral norm."""
    jacobian = act.moment_jacobian("selu", 0.0, 1.0)
    np.testing.assert_allclose(jacobian, [[0, 0.088834], [0, 0.782648]], atol=1e-6)
    assert np.linalg.norm(jacobian, 2) == pytest.approx(0.7877, abs=1e-4)
    for start in ((0.5, 2.0), (-1.0, 0.1), (0.0, 30.0)):
        assert act.moment_fixed_point("selu", start) == pytest.approx((0, 1), abs=1e-8)
    shifted = act.moment_fixed_point("selu", omega=0.1, tau=1.1)
    assert shifted == pytest.approx(selu_moments(0.1 * shifted[0], 1.1 * shifted[1]), abs=1e-8)
    assert shifted != pytest.approx((0, 1), abs=0.01)


def test_other_functions_have_no_fixed_point_of_scale_one():
    assert act.moment_fixed_point("gelu") == pytest.approx((0, 0), abs=1e-9)
    with pytest.raises(ValueError, match="start must lead to a fixed point within max_layers = 50"):
        act.moment_fixed_point("tanh", max_layers=50)  # fades like 1 / (2 * depth)


def test_wrong_moments():
    with pytest.raises(ValueError, match=r"variance must be .* received -1"):
        act.moment_map("selu", 0.0, -1)
    with pytest.raises(ValueError, match=r"tau must be .* received inf"):
        act.moment_map("selu", 0.0, 1.0, tau=math.inf)
    with pytest.raises(ValueError, match=r"mean must be .* received nan"):
        act.moment_jacobian("selu", math.nan, 1.0)
    with pytest.raises(ValueError, match=r"tau \* variance must be positive; received 1.0 \* 0.0"):
        act.moment_jacobian("selu", 0.0, 0.0)
    with pytest.raises(ValueError, match="continuous function; received 'hard_shrink'"):
        act.moment_jacobian("hard_shrink", 0.0, 1.0)


# ------------------------------------------------------------------------------------------- gains


def sum_over_a_grid(g):
    """Integrate g over N(0, 1) with the midpoint rule; no point of its grid is a corner."""
    step = 2e-4
    z = np.arange(-12, 12, step) + step / 2
    return np.sum(g(z) * np.exp(-(z**2) / 2)) * step / math.sqrt(2 * math.pi)


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=IDS)
def test_gain_against_a_plain_sum(name, parameters):
    f, prime = act.get(name, **parameters), act.derivative(name, **parameters)
    gain = act.gain(name, **parameters)
    assert gain.mean == pytest.approx(sum_over_a_grid(f), rel=1e-6, abs=1e-9)
    assert gain.mean_square == pytest.approx(sum_over_a_grid(lambda z: f(z) ** 2), rel=1e-6)
    slope = sum_over_a_grid(lambda z: prime(z) ** 2)
    assert gain.slope_mean_square == pytest.approx(slope, rel=1e-6)
    assert gain.init == pytest.approx(gain.mean_square**-0.5)


def test_gains_in_closed_form():
    half = 1 / math.sqrt(2 * math.pi)
    assert act.gain("relu") == pytest.approx((half, 0.5, 0.5, math.sqrt(2)), rel=1e-10)
    leaky = act.gain("leaky_relu", negative_slope=0.1)
    assert leaky[1:] == pytest.approx((0.505, 0.505, 0.505**-0.5), rel=1e-10)
    assert act.gain("selu").init == pytest.approx(1, rel=1e-10)
    inside = special.erf(1 / math.sqrt(2))  # hard_tanh: P(|z| < 1) and its partial second moment
    square = inside - 2 * stats.norm.pdf(1) + (1 - inside)
    assert act.gain("hard_tanh")[1:3] == pytest.approx((square, inside), rel=1e-10)
    assert act.gain("exponential")[:2] == pytest.approx((math.exp(0.5), math.exp(2)), rel=1e-9)
    assert act.gain("gelu").mean == pytest.approx(1 / (2 * math.sqrt(math.pi)), rel=1e-10)
    assert act.gain("softplus").slope_mean_square == act.gain("sigmoid").mean_square


# ------------------------------------------------------------------------------------------- RReLU

Z = np.array([[-48.0, -1.0, 0.0, 2.0]], "float32")


def test_rrelu_in_numpy():
    np.testing.assert_allclose(act.rrelu(Z), [[-11, -11 / 48, 0, 2]], rtol=1e-6)
    assert act.rrelu(Z).dtype == np.float32
    slopes = -act.rrelu(np.full(20_000, -1.0), 0.2, 0.6, rng=0)
    assert stats.kstest(slopes, stats.uniform(0.2, 0.4).cdf).pvalue > 0.01
    np.testing.assert_array_equal(slopes, -act.rrelu(np.full(20_000, -1.0), 0.2, 0.6, rng=0))
    for bad in ((0.5, 0.2), (-0.1, 0.2), (0.1, math.nan)):
        with pytest.raises(ValueError, match="lower and upper must be two slopes in order"):
            act.rrelu(Z, *bad)
        with pytest.raises(ValueError, match="lower and upper must be two slopes in order"):
            act.RReLU(*bad)


def test_keras_has_no_rrelu_yet():
    assert not hasattr(keras.layers, "RReLU")
    assert not hasattr(keras.activations, "rrelu")


def test_rrelu_in_inference_is_a_leaky_relu_with_the_mean_slope():
    layer = act.RReLU()
    expected = keras.layers.LeakyReLU(negative_slope=11 / 48)(Z).numpy()
    for outputs in (layer(Z), layer(Z, training=False)):
        np.testing.assert_allclose(outputs.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(layer(Z).numpy(), act.rrelu(Z), rtol=1e-6)


def test_rrelu_in_training_draws_a_slope_for_each_element():
    layer = act.RReLU(seed=0)
    z = np.full((200, 100), -1.0, "float32")
    first, second = -layer(z, training=True).numpy(), -layer(z, training=True).numpy()
    for slopes in (first, second):
        assert stats.kstest(slopes.ravel(), stats.uniform(1 / 8, 5 / 24).cdf).pvalue > 0.01
        standard_error = (5 / 24) / math.sqrt(12 * slopes.size)
        assert slopes.mean() == pytest.approx(11 / 48, abs=3 * standard_error)
    assert np.abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / math.sqrt(z.size)
    # The same seed repeats the sequence, whatever the layer's name.
    again = act.RReLU(seed=0, name="another")
    np.testing.assert_array_equal(-again(z, training=True).numpy(), first)
    np.testing.assert_array_equal(-again(z, training=True).numpy(), second)
    positive = np.abs(z) * 3
    np.testing.assert_array_equal(layer(positive, training=True).numpy(), positive)


def test_rrelu_backpropagates_the_slope_that_it_drew():
    layer, z = act.RReLU(seed=1), tf.random.stateless_normal((50, 3), (1, 2))
    with tf.GradientTape() as tape:
        tape.watch(z)
        outputs = layer(z, training=True)
    np.testing.assert_allclose(tape.gradient(outputs, z).numpy(), (outputs / z).numpy(), rtol=1e-5)


def small_model(**arguments):
    inputs = keras.Input((4,))
    h = keras.layers.Dense(8)(inputs)
    h = act.RReLU(0.1, 0.5, seed=3, name="noisy", **arguments)(h)
    return keras.Model(inputs, keras.layers.Dense(1)(h))


# Keras 3.15 hands a variable to np.array in a way that NumPy 2 will no longer accept one day.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_rrelu_survives_saving(tmp_path):
    model = small_model()
    noisy = model(Z, training=True).numpy()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(model(Z).numpy(), loaded(Z).numpy())
    layer = loaded.get_layer("noisy")
    assert isinstance(layer, act.RReLU)
    assert (layer.lower, layer.upper, layer.seed) == (0.1, 0.5, 3)
    # As with dropout, a seeded layer begins its sequence anew.
    np.testing.assert_array_equal(loaded(Z, training=True).numpy(), noisy)
    sequential = keras.Sequential([keras.Input((4,)), act.RReLU(seed=5)])
    clone = keras.models.clone_model(sequential)
    assert clone.layers[0].get_config() == sequential.layers[0].get_config()
    assert keras.saving.get_registered_name(act.RReLU) == "ch11lib>RReLU"


def test_rrelu_trains_in_compiled_graphs():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 4)).astype("float32")
    y = x[:, :1] - np.abs(x[:, 1:2])
    for jit in (False, True):
        model = small_model()
        model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=jit)
        losses = model.fit(x, y, epochs=15, verbose=0).history["loss"]
        assert losses[-1] < 0.7 * losses[0]
    train = tf.function(lambda z: model(z, training=True), autograph=False)
    assert not np.array_equal(train(x).numpy(), train(x).numpy())


def test_rrelu_stateless_call():
    layer = act.RReLU(seed=0)
    layer.build(Z.shape)
    state = [variable.value for variable in layer.non_trainable_variables]
    assert len(state) == 1
    one, new_state = layer.stateless_call([], state, Z, training=True)
    two, _ = layer.stateless_call([], state, Z, training=True)
    three, _ = layer.stateless_call([], new_state, Z, training=True)
    np.testing.assert_array_equal(one.numpy(), two.numpy())
    assert not np.array_equal(one.numpy(), three.numpy())
    assert layer.trainable_variables == []


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_rrelu_follows_the_dtype_policy(policy):
    layer = act.RReLU(seed=0, dtype=policy)
    compute = keras.dtype_policies.get(policy).compute_dtype
    for training in (False, True):
        outputs = layer(Z, training=training)
        assert keras.backend.standardize_dtype(outputs.dtype) == compute
    many = layer(-np.ones((100, 100), "float32"), training=True)
    slopes = -keras.ops.cast(many, "float32").numpy()
    assert slopes.mean() == pytest.approx(11 / 48, abs=0.005)
    assert slopes.min() >= 0.124
    assert slopes.max() <= 0.3345


def test_rrelu_takes_any_shape_and_mask():
    symbolic = act.RReLU()(keras.Input((None, 7)))
    assert symbolic.shape == (None, None, 7)
    assert act.RReLU()(np.ones((2, 3, 4, 5)), training=True).shape == (2, 3, 4, 5)
    layers = [
        keras.layers.Embedding(5, 2, mask_zero=True, embeddings_initializer="ones"),
        act.RReLU(),
        keras.layers.GlobalAveragePooling1D(),  # leaves masked steps out
    ]
    words = np.array([[1, 2, 0, 0]])
    layers[0].build(words.shape)
    layers[0].set_weights([np.arange(10.0).reshape(5, 2)])
    assert keras.Sequential(layers)(words).numpy().tolist() == [[3, 4]]


# ------------------------------------------------------------------------------------------- speed


def test_time_per_call_interleaves_compiled_calls():
    calls, traces = [], []

    def recorder(name):
        def function(z):
            traces.append(name)
            tf.numpy_function(lambda: calls.append(name), [], [])
            return z

        return function

    functions = {name: recorder(name) for name in "ab"}
    times = act.time_per_call(functions, np.ones(3), repeats=3, calls=2)
    assert list(times.columns) == ["a", "b"]
    assert times.shape == (3, 2)
    assert traces == ["a", "b"]  # each graph is built once
    assert "".join(calls) == "ab" + "aabb" * 3  # and run once before the clock starts


def test_time_per_call_sees_a_difference():
    def heavy(z):
        for _ in range(30):
            z = keras.activations.softplus(z)
        return z

    x = np.ones(100_000, "float32")
    times = act.time_per_call({"light": keras.activations.relu, "heavy": heavy}, x, calls=3)
    assert times.heavy.median() > 3 * times.light.median()


def test_time_per_call_is_in_seconds_and_for_one_call():
    def slow(z):
        tf.numpy_function(lambda: time.sleep(0.02), [], [])
        return z

    times = act.time_per_call({"slow": slow}, np.ones(3), repeats=2, calls=10)
    assert 0.02 <= times.slow.min() < 0.1  # ten calls take at least 0.2


def test_time_per_call_takes_names_and_models():
    x = np.ones((2, 4), "float32")
    times = act.time_per_call(itertools.chain(["relu", "swish"]), x, repeats=1, calls=1)
    assert list(times.columns) == ["relu", "swish"]
    assert (act.time_per_call({"net": small_model()}, x, repeats=2, calls=1) > 0).all(axis=None)
    with pytest.raises(TypeError, match=r"functions must be a list of names .* received 'relu'"):
        act.time_per_call("relu", x)
    with pytest.raises(ValueError, match=r"calls must be at least 1; received 0"):
        act.time_per_call(["relu"], x, calls=0)
    with pytest.raises(ValueError, match=r"repeats must be at least 1; received 0"):
        act.time_per_call(["relu"], x, repeats=0)
