"""Optimizers against Keras, TensorFlow's own kernels, published values and closed forms.

Keras keeps variables, and so the state of its optimizers, in the type it is asked for, and float64
is asked for here. But some of its constants pass through float32 even then: 0.999 becomes
0.99900001, which changes 1 - 0.999 by 1.3e-5 and Adam's first step by half of that. With constants
that float32 represents exactly both agree to 1e-12; with Keras's defaults to 1e-6 of the size of
the parameters after 100 steps.
"""

import copy
import dataclasses
import inspect
import math
import random

from ch11lib import optimizers
from ch11lib.backend import keras, tf
from ch11lib.landscapes import GALLERY, Bowl, Rosenbrock
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
import numpy as np
import pytest
from scipy import optimize, sparse

NAMES = ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "Adamax", "Nadam", "Ftrl", "Lion"]
every_optimizer = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def float64():
    """Let Keras create everything in double precision."""
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


def steps_of_keras(optimizer, theta, grads, dtype="float64"):
    """Yield the parameters after each step; theta and each of grads are lists of arrays."""
    variables = [keras.Variable(p, dtype=dtype) for p in theta]
    optimizer.build(variables)
    apply = tf.function(optimizer.apply) if len(grads) > 20 else optimizer.apply
    for gradient in grads:
        apply([tf.constant(g, dtype) for g in gradient])
        yield [v.numpy() for v in variables]


def random_problem(steps=100, shapes=((3, 4), ()), seed=0):
    """Parameters, and gradients whose scale differs from entry to entry; some are exactly 0."""
    rng = np.random.default_rng(seed)
    theta = [np.asarray(rng.standard_normal(shape)) for shape in shapes]
    scales = [np.exp(2 * rng.standard_normal(shape)) for shape in shapes]
    grads = [
        [np.asarray(s * rng.standard_normal(s.shape) * (rng.random(s.shape) < 0.9)) for s in scales]
        for _ in range(steps)
    ]
    return theta, grads


def deviation(ours, theirs, theta, grads, dtype="float64"):
    """Return the largest deviation over all steps, relative to the size of each array."""
    worst, sizes = 0.0, [np.max(np.abs(p)) for p in theta]
    for gradient, expected in zip(grads, steps_of_keras(theirs, theta, grads, dtype), strict=True):
        theta = ours.step(theta, [g.astype(dtype) for g in gradient])
        for p, q, size in zip(theta, expected, sizes, strict=True):
            assert p.dtype == q.dtype == dtype
            assert p.shape == q.shape
            assert np.isfinite(p).all()  # max() would pass over NaN
            worst = max(worst, np.max(np.abs(p - q)) / max(size, np.max(np.abs(q))))
    return worst


# -------------------------------------------------------------------------------------- like Keras


@every_optimizer
def test_arguments_and_defaults_are_those_of_keras(name):
    ours = inspect.signature(getattr(optimizers, name)).parameters
    theirs = dict(inspect.signature(getattr(keras.optimizers, name)).parameters)
    left_out = {
        *("use_ema", "ema_momentum", "ema_overwrite_frequency", "loss_scale_factor"),
        *("gradient_accumulation_steps", "name", "kwargs"),
    }
    assert left_out == set(theirs) - set(ours)
    expected = {key: p.default for key, p in theirs.items() if key not in left_out}
    assert {key: p.default for key, p in ours.items()} == expected
    assert list(ours) == list(expected)


@every_optimizer
def test_defaults_against_keras_over_100_steps(name, float64):
    ours, theirs = getattr(optimizers, name)(), getattr(keras.optimizers, name)()
    assert deviation(ours, theirs, *random_problem()) < 1e-6


# Constants with few binary digits, so that passing through float32 does not change them.
RATE, BETAS = 2.0**-5, {"beta_1": 1 - 2.0**-3, "beta_2": 1 - 2.0**-10}
EPSILON = {"epsilon": 2.0**-20}
FTRL = {"learning_rate": RATE, "initial_accumulator_value": 0.25}
VARIANTS = [
    ("SGD", {"learning_rate": RATE}),
    ("SGD", {"learning_rate": RATE, "momentum": 0.875}),
    ("SGD", {"learning_rate": RATE, "momentum": 0.875, "nesterov": True}),
    ("SGD", {"learning_rate": RATE, "momentum": 1.0}),
    ("Adagrad", {"learning_rate": RATE, "initial_accumulator_value": 0.25, **EPSILON}),
    ("Adagrad", {"learning_rate": RATE, "initial_accumulator_value": 0.0, **EPSILON}),
    ("RMSprop", {"learning_rate": RATE, "rho": 0.875, **EPSILON}),
    ("RMSprop", {"learning_rate": RATE, "centered": True, **EPSILON}),
    ("RMSprop", {"learning_rate": RATE, "momentum": 0.75, **EPSILON}),
    ("RMSprop", {"learning_rate": RATE, "momentum": 0.75, "centered": True, **EPSILON}),
    ("Adam", {"learning_rate": RATE, **BETAS, **EPSILON}),
    ("Adam", {"learning_rate": RATE, **BETAS, "epsilon": 2.0}),
    ("Adam", {"learning_rate": RATE, "amsgrad": True, "beta_1": 0.5, "beta_2": 0.5, **EPSILON}),
    ("AdamW", {"learning_rate": RATE, "weight_decay": 0.125, **BETAS, **EPSILON}),
    ("Adamax", {"learning_rate": RATE, **BETAS, **EPSILON}),
    ("Adamax", {"learning_rate": RATE, "beta_1": 0.5, "beta_2": 0.5, "epsilon": 0.5}),
    ("Nadam", {"learning_rate": RATE, **BETAS, **EPSILON}),
    ("Nadam", {"learning_rate": RATE, "beta_1": 0.5, "beta_2": 0.5, "epsilon": 0.5}),
    ("Ftrl", FTRL),
    ("Ftrl", {**FTRL, "l1_regularization_strength": 4.0}),
    ("Ftrl", {**FTRL, "l2_regularization_strength": 0.5, "beta": 0.75}),
    ("Ftrl", {**FTRL, "l2_shrinkage_regularization_strength": 0.125}),
    ("Ftrl", {**FTRL, "learning_rate_power": -0.25, "l1_regularization_strength": 0.5}),
    ("Ftrl", {**FTRL, "learning_rate_power": 0.0}),
    ("Lion", {"learning_rate": RATE}),
    ("Lion", {"learning_rate": RATE, "beta_1": 0.5, "beta_2": 0.75}),
]


@pytest.mark.parametrize(("name", "arguments"), VARIANTS, ids=str)
def test_variants_against_keras_over_100_steps(name, arguments, float64):
    ours = getattr(optimizers, name)(**arguments)
    theirs = getattr(keras.optimizers, name)(**arguments)
    # Nadam's 0.96 is rounded to float32 whatever one does.
    assert deviation(ours, theirs, *random_problem()) < (1e-7 if name == "Nadam" else 1e-12)


@every_optimizer
def test_single_precision_is_kept_and_equals_that_of_keras(name):
    theta, grads = random_problem()
    theta = [p.astype("float32") for p in theta]
    ours, theirs = getattr(optimizers, name)(0.05), getattr(keras.optimizers, name)(0.05)
    # A rounding is 6e-8; Adam's 1 - 0.999 makes 1.3e-5 of it in the first step, of size 0.05.
    assert deviation(ours, theirs, theta, grads, "float32") < 1e-5


CLIPS = [{"clipnorm": 0.75}, {"clipvalue": 0.5}, {"global_clipnorm": 1.5}, {"clipnorm": 1e6}]


@pytest.mark.parametrize(
    ("name", "clip"), [(n, CLIPS[0]) for n in NAMES] + [("SGD", c) for c in CLIPS[1:]], ids=str
)
def test_clipping_and_decay_against_keras(name, clip, float64):
    arguments = {"learning_rate": RATE, "weight_decay": 0.25, **clip}
    ours = getattr(optimizers, name)(**arguments)
    theirs = getattr(keras.optimizers, name)(**arguments)
    assert deviation(ours, theirs, *random_problem(5)) < 1e-5


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("bad", [0.0, np.inf, np.nan])
def test_clipping_of_zero_and_of_what_is_not_finite(clip, bad, float64):
    grads = [[np.array([1.0, bad]), np.array([0.0, 2.0])]]
    theta = [np.ones(2), np.ones(2)]
    [expected] = steps_of_keras(keras.optimizers.SGD(0.5, **clip), theta, grads)
    np.testing.assert_allclose(optimizers.SGD(0.5, **clip).step(theta, grads[0]), expected)


@every_optimizer
def test_schedules_of_keras_and_functions_of_the_step(name, float64):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2, 5], [0.25, 0.125, 0.5])
    theta, grads = random_problem(8)
    rates = [0.25] * 3 + [0.125] * 3 + [0.5] * 2
    for rate in (schedule, rates.__getitem__):
        ours = getattr(optimizers, name)(learning_rate=rate)
        theirs = getattr(keras.optimizers, name)(learning_rate=schedule)
        assert deviation(ours, theirs, theta, grads) < 1e-5


def test_a_schedule_sees_the_steps_done_so_far():
    seen = []
    optimizer = optimizers.SGD(lambda step: seen.append(step) or 0.5)
    theta = 1.0
    for _ in range(3):
        theta = optimizer.step(theta, 1.0)
    assert seen == [0, 1, 2]
    assert theta == -0.5
    assert optimizer.iterations == 3


# ------------------------------------------------------------------ like TensorFlow's older classes


class RMSpropOfTF1(optimizers.RMSprop):
    """Its running mean of squares starts at 1, not 0, so that its first steps are short."""

    def _start(self, zeros):
        return super()._start(zeros) | {"s": zeros + 1}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("GradientDescentOptimizer", {}), optimizers.SGD(RATE)),
        (("MomentumOptimizer", {"momentum": 0.875}), optimizers.SGD(RATE, 0.875)),
        (
            ("MomentumOptimizer", {"momentum": 0.875, "use_nesterov": True}),
            optimizers.SGD(RATE, 0.875, nesterov=True),
        ),
        (("AdagradOptimizer", {}), optimizers.Adagrad(RATE, epsilon=0)),
        (
            ("RMSPropOptimizer", {"decay": 0.875, "momentum": 0.5}),
            RMSpropOfTF1(RATE, rho=0.875, momentum=0.5, epsilon=1e-10),
        ),
        (
            ("RMSPropOptimizer", {"decay": 0.875, "centered": True}),
            RMSpropOfTF1(RATE, rho=0.875, centered=True, epsilon=1e-10),
        ),
        (("AdamOptimizer", {}), optimizers.Adam(RATE, epsilon=1e-8)),
        (
            ("FtrlOptimizer", {"l1_regularization_strength": 0.5}),
            optimizers.Ftrl(RATE, l1_regularization_strength=0.5),
        ),
        (
            ("FtrlOptimizer", {"l2_regularization_strength": 0.5, "beta": 0.25}),
            optimizers.Ftrl(RATE, l2_regularization_strength=0.5, beta=0.25),
        ),
    ],
    ids=str,
)
def test_against_the_kernels_behind_tf_compat_v1(theirs, ours):
    name, arguments = theirs
    theirs = getattr(tf.compat.v1.train, name)(RATE, **arguments)
    theta, grads = random_problem()
    variables = [tf.Variable(p) for p in theta]
    for gradient in grads:
        theirs.apply_gradients(zip(map(tf.constant, gradient), variables, strict=True))
        theta = ours.step(theta, gradient)
    for p, v in zip(theta, variables, strict=True):
        # These, too, hand some constants through float32.
        np.testing.assert_allclose(p, v.numpy(), rtol=1e-6, atol=1e-6 * np.abs(p).max())


# -------------------------------------------------------------------------------- published values

# Keras's unit tests (Apache 2.0), test_correctness_with_golden: parameters 1, a first gradient of
# 0.01, then 0.1 (first column) and 1 (last column), after steps 1 to 5, to four decimals.
GOLDEN = [
    (
        optimizers.SGD(nesterov=True),
        [0.9999, 0.9989, 0.9979, 0.9969, 0.9959],
        [0.9999, 0.9899, 0.9799, 0.9699, 0.9599],
    ),
    (
        optimizers.Adagrad(0.2, initial_accumulator_value=0.3, epsilon=1e-6),
        [0.9963, 0.9604, 0.9251, 0.8903, 0.856],
        [0.9963, 0.8209, 0.6891, 0.579, 0.4825],
    ),
    (
        optimizers.Adamax(0.2, beta_1=0.85, beta_2=0.95, epsilon=1e-6),
        [0.8, 0.6827, 0.5333, 0.368, 0.1933],
        [0.8, 0.691, 0.5466, 0.3848, 0.2126],
    ),
    (
        optimizers.Nadam(0.5, beta_1=0.5, beta_2=0.67, epsilon=1e-5),
        [0.4281, -0.1738, -0.7115, -1.2335, -1.7492],
        [0.4281, -0.1717, -0.7084, -1.2299, -1.7454],
    ),
    (
        optimizers.AdamW(1.0, weight_decay=0.5, epsilon=2),
        [0.4998, 0.2486, 0.1223, 0.0586, 0.0263],
        [0.4998, 0.2382, 0.1003, 0.0258, -0.0159],
    ),
    (
        optimizers.Ftrl(
            learning_rate=0.05,
            learning_rate_power=-0.2,
            initial_accumulator_value=0.4,
            l1_regularization_strength=0.05,
            l2_regularization_strength=0.15,
            l2_shrinkage_regularization_strength=0.01,
            beta=0.3,
        ),
        [0.0, -0.0034, -0.0078, -0.0121, -0.0164],
        [0.0, -0.0354, -0.0685, -0.0999, -0.1299],
    ),
]


@pytest.mark.parametrize(("optimizer", "small", "large"), GOLDEN, ids=str)
def test_golden_values_of_keras(optimizer, small, large):
    optimizer, theta, seen = copy.deepcopy(optimizer), np.ones(2), []
    for gradient in ([0.01, 0.01], *[[0.1, 1.0]] * 4):
        theta = optimizer.step(theta, gradient)
        seen.append(theta)
    np.testing.assert_allclose(seen, np.transpose([small, large]), rtol=0, atol=5.1e-5)


def test_golden_single_steps_of_keras():
    theta, g = [1.0, 2.0, 3.0, 4.0], [1.0, 6.0, 7.0, 2.0]
    ftrl = optimizers.Ftrl(0.5).step(theta, g)
    np.testing.assert_allclose(ftrl, [0.2218, 1.3954, 2.3651, 2.8814], rtol=0, atol=1e-4)
    rmsprop = optimizers.RMSprop(0.5).step(theta, g)
    np.testing.assert_allclose(rmsprop, [-0.5811, 0.4189, 1.4189, 2.4189], rtol=0, atol=5.1e-5)


# ------------------------------------------------------------------------------------ closed forms


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.floats(1e-3, 1e3), st.floats(0.0, 0.99), st.integers(1, 60))
def test_momentum_under_a_constant_gradient(g, beta, steps):
    optimizer, theta = optimizers.SGD(0.1, beta), np.zeros(1)
    for _ in range(steps):
        before, theta = theta, optimizer.step(theta, [g])
    velocity = 0.1 * g * (1 - beta**steps) / (1 - beta)
    np.testing.assert_allclose(before - theta, velocity, rtol=1e-9)


def test_nesterov_is_his_method_in_other_coordinates():
    surface, eta, beta = Rosenbrock(), 1e-3, 0.9
    optimizer, ahead = optimizers.SGD(eta, beta, nesterov=True), np.array([-1.2, 1.0])
    theta, m = ahead, np.zeros(2)
    for _ in range(100):
        ahead = optimizer.step(ahead, surface.gradient(ahead))
        m = beta * m - eta * surface.gradient(theta + beta * m)
        theta = theta + m
        np.testing.assert_allclose(ahead, theta + beta * m, rtol=0, atol=1e-12)
    assert np.abs(beta * m).max() > 1e-3  # the two points do differ


def test_averaged_momentum_is_the_same_path_at_another_rate():
    theta, grads = random_problem(50, shapes=((4,),))
    optimizer, ema, path = optimizers.SGD(0.05, 0.9), np.zeros(4), theta[0]
    for [g] in grads:
        theta = optimizer.step(theta, [g])
        ema = 0.9 * ema + 0.1 * g
        path = path - 0.05 / (1 - 0.9) * ema
    np.testing.assert_allclose(theta[0], path, rtol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.floats(1e-100, 1e100), st.booleans())
def test_first_steps_do_not_depend_on_the_size_of_the_gradient(g, negative):
    g = -g if negative else g
    for optimizer, size in [
        (optimizers.Adam(0.25, epsilon=0), 1.0),
        (optimizers.Adam(0.25, epsilon=0, amsgrad=True), 1.0),
        (optimizers.Adamax(0.25, epsilon=0), 1.0),
        (optimizers.Lion(0.25), 1.0),
        (optimizers.Adagrad(0.25, initial_accumulator_value=0, epsilon=0), 1.0),
        (optimizers.RMSprop(0.25, epsilon=0), 1 / math.sqrt(0.1)),
        (optimizers.RMSprop(0.25, epsilon=0, centered=True), 1 / 0.3),
    ]:
        assert optimizer.step(0.0, g) == pytest.approx(-0.25 * size * np.sign(g))


def test_adam_of_the_paper_differs_by_where_epsilon_stands():
    """Algorithm 1 of arXiv:1412.6980, with ε beside the corrected root."""
    theta, grads = random_problem(30, shapes=((6,),))
    m = v = np.zeros(6)
    path = here = theta[0]
    optimizer = optimizers.Adam(0.1, epsilon=1e-3)
    for t, [g] in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        path = path - 0.1 * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-3)
        optimizer.epsilon = 1e-3 * math.sqrt(1 - 0.999**t)
        here = optimizer.step(here, g)
        np.testing.assert_allclose(here, path, rtol=1e-11, atol=1e-13)
    [same] = optimizers.Adam(0.1, epsilon=1e-3).step(theta, grads[0])
    paper = theta[0] - 0.1 * grads[0][0] / (np.abs(grads[0][0]) + 1e-3)
    assert np.abs(same - paper).max() > 1e-4


def test_amsgrad_solves_the_problem_on_which_adam_fails():
    """Reddi, Kale, Kumar (2018), section 3: gradient C, -1, -1 in turn on [-1, 1], β₁ = 0."""
    ends = {}
    for amsgrad in (False, True):
        optimizer = optimizers.Adam(
            lambda step: 0.5 / math.sqrt(step + 1),
            beta_1=0.0,
            beta_2=1 / (1 + 4**2),
            epsilon=0,
            amsgrad=amsgrad,
        )
        theta = 0.0
        for t in range(3000):
            theta = np.clip(optimizer.step(theta, 4.0 if t % 3 == 0 else -1.0), -1, 1)
        ends[amsgrad] = float(theta)
    assert ends[False] > 0.9  # the worst point
    assert ends[True] < -0.9  # the best


def test_ftrl_minimizes_what_it_says():
    """The point after each step minimizes the sum that McMahan et al. define, found by SciPy."""
    eta, l1, l2, beta, n0 = 0.3, 0.4, 0.2, 0.5, 0.1
    optimizer = optimizers.Ftrl(
        eta,
        initial_accumulator_value=n0,
        l1_regularization_strength=l1,
        l2_regularization_strength=l2,
        beta=beta,
    )
    rng, theta, terms, total, n = np.random.default_rng(3), 0.7, [], 0.0, n0
    for _ in range(25):
        g = rng.standard_normal()
        terms.append(((math.sqrt(n + g * g) - math.sqrt(n)) / eta, float(theta)))
        total, n = total + g, n + g * g

        def objective(w, total=total):
            anchored = sum(sigma * (w - point) ** 2 for sigma, point in terms) / 2
            ridge = (l2 + (beta + math.sqrt(n0)) / eta / 2) * w * w
            return total * w + anchored + l1 * abs(w) + ridge

        theta = optimizer.step(theta, g)
        best = optimize.minimize_scalar(objective, bounds=(-5, 5), options={"xatol": 1e-10}).x
        assert float(theta) == pytest.approx(best, abs=1e-6)


def test_ftrl_without_regularization_is_adagrad():
    _, grads = random_problem(40, shapes=((7,),))
    ftrl, adagrad = optimizers.Ftrl(0.1), optimizers.Adagrad(0.1, epsilon=0)
    one = two = np.zeros(7)
    for [g] in grads:
        one, two = ftrl.step(one, g), adagrad.step(two, g)
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)


def test_ftrl_gives_exact_zeros_and_forgets_initial_weights(float64):
    theta, g = np.array([3.0, 3.0, 3.0]), np.array([0.0, 1e-3, 0.5])
    [[keras_too]] = steps_of_keras(keras.optimizers.Ftrl(), [theta], [[g]])
    for after in (optimizers.Ftrl().step(theta, g), keras_too):
        assert after[0] == 0
        assert abs(after[1]) < 1e-4
        assert 1 < after[2] < 2
    sparse_one = optimizers.Ftrl(0.1, l1_regularization_strength=1.0).step(np.zeros(3), g)
    assert (sparse_one == 0).all()


def test_decay_and_l2_penalty_are_the_same_for_sgd_and_differ_for_adam():
    theta, grads = random_problem(20, shapes=((4,),))
    for cls, same in ((optimizers.SGD, True), (optimizers.Adam, False)):
        decayed, penalized = cls(0.1, weight_decay=0.5), cls(0.1)
        one = two = theta[0]
        for [g] in grads:
            one, two = decayed.step(one, g), penalized.step(two, g + 0.5 * two)
        assert np.allclose(one, two, rtol=1e-12) == same


# ------------------------------------------------------------------------------ arrays of all kinds


@every_optimizer
@settings(derandomize=True, deadline=None, max_examples=10)
@given(shape=array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3))
def test_any_shape_and_nothing_is_modified(name, shape):
    rng = np.random.default_rng(0)
    theta, flat = np.asarray(rng.standard_normal(shape)), None
    one, other = getattr(optimizers, name)(), getattr(optimizers, name)()
    flat = theta.ravel()
    for _ in range(3):
        g = np.asarray(rng.standard_normal(shape))
        copies = theta.copy(), g.copy()
        theta.flags.writeable = g.flags.writeable = False
        new = one.step(theta, g)
        np.testing.assert_array_equal(theta, copies[0])
        np.testing.assert_array_equal(g, copies[1])
        assert isinstance(new, np.ndarray)
        assert new.shape == shape
        assert not np.shares_memory(new, theta)
        # Every entry goes its own way.
        flat = other.step(flat, g.ravel())
        np.testing.assert_allclose(new.ravel(), flat, rtol=1e-13)
        theta = new


@every_optimizer
def test_an_earlier_result_may_be_overwritten(name):
    """The state shares no memory with what was passed in or given out."""
    theta, grads = random_problem(5, shapes=((4,),))
    careful, careless = getattr(optimizers, name)(), getattr(optimizers, name)()
    one, two = theta[0], theta[0].copy()
    for [g] in grads:
        one, mine = careful.step(one, g), g.copy()
        new = careless.step(two, mine)
        two[...] = mine[...] = np.nan
        two = new
    np.testing.assert_array_equal(one, two)


@every_optimizer
def test_a_list_is_each_of_its_arrays(name):
    theta, grads = random_problem(10)
    together, alone = getattr(optimizers, name)(), [getattr(optimizers, name)() for _ in theta]
    one, two = list(theta), list(theta)
    for gradient in grads:
        one = together.step(one, gradient)
        two = [o.step(p, g) for o, p, g in zip(alone, two, gradient, strict=True)]
    assert isinstance(one, list)
    for p, q in zip(one, two, strict=True):
        np.testing.assert_array_equal(p, q)
    assert together.iterations == 10
    assert len(together.state) == len(theta)


def test_integers_and_lists_of_numbers():
    new = optimizers.SGD(0.5).step([3, 4], [1, 2])
    assert new.tolist() == [2.5, 3.0]
    assert optimizers.SGD(0.5).step(np.ones(2, "float16"), [1.0, 2.0]).dtype == np.float16


@every_optimizer
def test_state_lives_in_the_instance(name):
    theta, grads = random_problem(6, shapes=((3,),))
    optimizer = getattr(optimizers, name)()
    theta = optimizer.step(theta, grads[0])
    other, path = copy.deepcopy(optimizer), theta
    for gradient in grads[1:]:
        path = optimizer.step(path, gradient)
    again = theta
    for gradient in grads[1:]:
        again = other.step(again, gradient)
    np.testing.assert_array_equal(path[0], again[0])


@every_optimizer
def test_divergence_is_silent(name):
    optimizer = getattr(optimizers, name)()
    for g in (1e300, -1e300, np.inf, np.nan):
        theta = optimizer.step([1.0, 1.0], [g, 1.0])
    assert np.isnan(theta[0])
    assert np.isfinite(theta[1])


def test_mismatches_change_nothing():
    optimizer = optimizers.SGD(0.5, momentum=0.5)
    with pytest.raises(
        ValueError, match=r"grad must have theta's shapes \[\(2,\)\]; received \[\(3"
    ):
        optimizer.step([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="grad must list one array for each of the 2 of theta"):
        optimizer.step([np.ones(2), np.ones(3)], [np.ones(2)])
    with pytest.raises(TypeError, match="theta must hold real numbers; received type complex128"):
        optimizer.step([1j], [1.0])
    with pytest.raises(TypeError, match="grad must hold real numbers; received type <U1"):
        optimizer.step([1.0], ["a"])
    assert optimizer.iterations == 0
    optimizer.step([1.0, 2.0], [1.0, 1.0])
    with pytest.raises(
        ValueError, match=r"theta must keep the shapes of the first step, \[\(2,\)\]"
    ):
        optimizer.step([1.0], [1.0])
    assert optimizer.iterations == 1


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("SGD", {"learning_rate": -0.1}, "learning_rate must be a number of 0 or more.*-0.1"),
        ("SGD", {"learning_rate": None}, "learning_rate must be .* received None"),
        ("SGD", {"learning_rate": "0.1"}, "learning_rate must be .* received '0.1'"),
        ("SGD", {"learning_rate": np.inf}, "learning_rate must be .* received inf"),
        ("SGD", {"momentum": 1.1}, "momentum must be a number from 0 to 1; received 1.1"),
        ("RMSprop", {"momentum": -0.1}, "momentum must be"),
        ("RMSprop", {"rho": 1}, "rho must be a number from 0 to below 1; received 1"),
        ("Adagrad", {"initial_accumulator_value": -1}, "initial_accumulator_value must be"),
        ("Adam", {"beta_1": 1.0}, "beta_1 must be a number from 0 to below 1"),
        ("Adam", {"beta_2": np.nan}, "beta_2 must be .* received nan"),
        ("Adam", {"epsilon": None}, "epsilon must be a number of 0 or more; received None"),
        ("Adam", {"weight_decay": -1}, "weight_decay must be a number of 0 or more"),
        ("AdamW", {"weight_decay": None}, "weight_decay must be .* received None"),
        ("Ftrl", {"learning_rate_power": 0.5}, "learning_rate_power must be a number of 0 or less"),
        ("Ftrl", {"l1_regularization_strength": -1}, "l1_regularization_strength must be"),
        ("Ftrl", {"l2_regularization_strength": -1}, "l2_regularization_strength must be"),
        ("Ftrl", {"l2_shrinkage_regularization_strength": -1}, "l2_shrinkage_regularization_st"),
        ("Ftrl", {"beta": -1}, "beta must be"),
        ("Ftrl", {"learning_rate": 0}, "learning_rate must be above 0"),
        ("Lion", {"beta_1": 0}, "beta_1 must be a number above 0 and at most 1; received 0"),
        ("SGD", {"clipnorm": 0}, "clipnorm must be a positive number; received 0"),
        ("SGD", {"clipvalue": -1}, "clipvalue must be a positive number"),
        ("SGD", {"global_clipnorm": np.nan}, "global_clipnorm must be a positive number"),
        ("SGD", {"clipnorm": 1, "clipvalue": 1}, "at most one of clipnorm, clipvalue, global"),
    ],
)
def test_bad_arguments(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        getattr(optimizers, name)(**arguments)


@every_optimizer
def test_arguments_are_shown_and_can_be_replaced(name):
    optimizer = getattr(optimizers, name)(learning_rate=0.125, clipnorm=2.0)
    assert repr(optimizer).startswith(f"{name}(learning_rate=0.125, ")
    optimizer.step([1.0], [1.0])
    fresh = dataclasses.replace(optimizer, learning_rate=0.25)
    assert (fresh.learning_rate, fresh.clipnorm, fresh.iterations) == (0.25, 2.0, 0)
    assert fresh.state == []


def test_a_subclass_must_define_its_update():
    with pytest.raises(NotImplementedError, match="Optimizer must define _update"):
        optimizers.Optimizer().step(1.0, 1.0)


# ---------------------------------------------------------------------------- given gradients


@pytest.mark.parametrize("name", NAMES)
def test_follow_gives_the_same_path_for_keras_and_for_ours(name):
    gradients = np.random.default_rng(0).standard_normal((20, 3))
    ours = optimizers.follow(getattr(optimizers, name)(0.01), gradients)
    theirs = optimizers.follow(getattr(keras.optimizers, name)(0.01), gradients)
    assert ours.shape == theirs.shape == (21, 3)
    assert (ours[0] == 1).all()
    assert np.abs(np.diff(ours, axis=0)).max(axis=0).min() > 1e-4  # they move
    assert optimizers.step_gap(ours, theirs) < 1e-4


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (tf.compat.v1.train.GradientDescentOptimizer(0.1), optimizers.SGD(0.1)),
        (tf.compat.v1.train.MomentumOptimizer(0.1, 0.9), optimizers.SGD(0.1, momentum=0.9)),
    ],
)
def test_follow_gives_the_same_path_for_tf_compat_v1_and_for_ours(theirs, ours):
    gradients = np.random.default_rng(1).standard_normal((20, 2, 3))
    start = np.arange(6.0).reshape(2, 3)
    one, other = (optimizers.follow(o, gradients, start) for o in (ours, theirs))
    np.testing.assert_array_equal(other[0], start)
    assert optimizers.step_gap(one, other) < 1e-6


def test_follow_a_rule_with_memory_and_options():
    def rule(theta, g, s, t, eta, beta):
        assert t == s.setdefault("calls", 0) + 1
        s["calls"], s["m"] = t, beta * s.get("m", 0.0) - eta * g
        return theta + s["m"]

    gradients = np.random.default_rng(2).standard_normal((10, 4))
    path = optimizers.follow(rule, gradients, eta=0.1, beta=0.5)
    expected = optimizers.follow(keras.optimizers.SGD(0.1, momentum=0.5), gradients)
    np.testing.assert_allclose(path, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("gradients", "start", "words"),
    [
        ([], None, "gradients must"),
        (np.zeros((0, 3)), None, "gradients must"),
        (1.0, None, "gradients must"),
        (np.ones((5, 3)), [1.0, 2.0], "start must"),
        (np.ones((5, 3)), 0.0, "start must"),
        (np.ones(5), [0.0], "start must"),
    ],
)
def test_follow_names_the_bad_argument(gradients, start, words):
    with pytest.raises(ValueError, match=words):
        optimizers.follow(optimizers.SGD(), gradients, start)


def test_step_gap_is_relative_to_each_parameter():
    other = np.cumsum([[0.0, 0.0], [1.0, 1000.0], [0.5, -500.0]], axis=0)
    assert optimizers.step_gap(other, other) == 0
    for column, size in ((0, 1.0), (1, 1000.0)):
        one = other.copy()
        one[2, column] += 0.01 * size
        assert optimizers.step_gap(one, other) == pytest.approx(0.01)
    assert optimizers.step_gap(other + 7, other) == pytest.approx(0)  # steps, not points


@pytest.mark.parametrize(
    ("one", "other"), [([1.0], [1.0]), (1.0, 1.0), (np.ones((3, 2)), np.ones((4, 2)))]
)
def test_step_gap_refuses_what_is_not_a_pair_of_paths(one, other):
    with pytest.raises(ValueError, match="one and other must"):
        optimizers.step_gap(one, other)


# ------------------------------------------------------------------------------------ on a surface


@every_optimizer
def test_run_is_a_loop_of_steps(name):
    surface, optimizer = GALLERY["Beale"], getattr(optimizers, name)(0.01)
    walk = optimizers.run(optimizer, surface, surface.start, 20)
    assert optimizer.iterations == 0
    assert optimizer.state == []
    theta, path = np.array(surface.start), [surface.start]
    for _ in range(20):
        theta = optimizer.step(theta, surface.gradient(theta))
        path.append(theta)
    np.testing.assert_array_equal(walk.path, path)
    np.testing.assert_array_equal(walk.values, surface.value(path))
    assert walk.diverged_at is None
    assert walk.outcome == "finished"


def test_divergence_is_data():
    surface = Bowl(condition=10)
    walk = optimizers.run(optimizers.SGD(1.0), surface, [0.0, 1.0], 20)
    # Each step multiplies by 1 - 10 = -9, and 9⁶ < 10⁶ < 9⁷.
    assert walk.diverged_at == 7
    assert walk.outcome == "diverged at step 7"
    np.testing.assert_allclose(walk.path[:8, 1], (-9.0) ** np.arange(8))
    assert walk.path.shape == (21, 2)
    assert np.isnan(walk.path[8:]).all()
    assert np.isnan(walk.values[8:]).all()
    tight = optimizers.run(optimizers.SGD(1.0), surface, [0.0, 1.0], 20, bound=100)
    assert tight.diverged_at == 3


def test_nan_and_overflow_are_divergence_too():
    class Cliff:
        def value(self, points):
            return np.sum(points, axis=-1)

        def gradient(self, point):
            return np.array([1.0]) if point[0] > -1.9 else np.array([np.nan])

    assert optimizers.run(optimizers.SGD(1.0), Cliff(), [0.0], 9).diverged_at == 3
    walk = optimizers.run(optimizers.SGD(1e300), GALLERY["Beale"], [4.0, 2.0], 9)
    assert walk.diverged_at == 1


def test_run_of_no_steps_and_bad_arguments():
    walk = optimizers.run(optimizers.SGD(), Bowl(), [1, 2], 0)
    assert walk.path.tolist() == [[1.0, 2.0]]
    for bad in ([np.nan, 0], [1e7, 0], 3.0, []):
        with pytest.raises(ValueError, match="start must be a vector of finite numbers"):
            optimizers.run(optimizers.SGD(), Bowl(), bad, 1)
    for bad in (-1, 2.0, "3"):
        with pytest.raises(ValueError, match="steps must be an int of 0 or more"):
            optimizers.run(optimizers.SGD(), Bowl(), [1, 2], bad)


# -------------------------------------------------------------------- momentum, predicted by theory


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.floats(1e-3, 3), st.floats(0, 1), st.floats(0.01, 10), st.booleans())
def test_momentum_matrix_is_a_step(eta, beta, eigenvalue, nesterov):
    optimizer = optimizers.SGD(eta, beta, nesterov=nesterov)
    theta, state = 1.5, np.array([1.5, 0.0])
    matrix = optimizers.momentum_matrix(eta, beta, eigenvalue, nesterov)
    for _ in range(5):
        theta = optimizer.step(theta, eigenvalue * theta)
        state = matrix @ state
        close = {"rtol": 1e-9, "atol": 1e-9 * np.abs(state).max()}
        np.testing.assert_allclose([theta, optimizer.state[0].m], state, **close)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.floats(0, 3),
    st.floats(0, 1),
    st.lists(st.floats(0, 10), min_size=1, max_size=4),
    st.booleans(),
)
def test_spectral_radius_against_numpy(eta, beta, eigenvalues, nesterov):
    matrices = optimizers.momentum_matrix(eta, beta, np.array(eigenvalues), nesterov)
    expected = np.abs(np.linalg.eigvals(matrices)).max()
    radius = optimizers.spectral_radius(eta, beta, eigenvalues, nesterov)
    # Where two eigenvalues coincide, rounding moves them by its square root.
    assert float(radius) == pytest.approx(expected, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("nesterov", [False, True])
def test_grids(nesterov):
    eta, beta = np.geomspace(0.01, 2, 4)[:, None], np.linspace(0, 1, 5)
    grid = optimizers.spectral_radius(eta, beta, [1.0, 5.0], nesterov)
    matrices = optimizers.momentum_matrix(eta, beta, 5.0, nesterov)
    assert grid.shape == (4, 5)
    assert matrices.shape == (4, 5, 2, 2)
    for i, j in np.ndindex(4, 5):
        one = optimizers.spectral_radius(eta[i, 0], beta[j], [1.0, 5.0], nesterov)
        assert grid[i, j] == one
        np.testing.assert_array_equal(
            matrices[i, j], optimizers.momentum_matrix(eta[i, 0], beta[j], 5.0, nesterov)
        )
    with pytest.raises(ValueError, match=r"eigenvalues must be a vector .* received shape \(\)"):
        optimizers.spectral_radius(0.1, 0.9, 1.0)


@pytest.mark.parametrize("condition", [1.0, 4.0, 30.0, 1000.0])
@pytest.mark.parametrize("method", ["gradient", "momentum", "nesterov"])
def test_optimal_tuning_is_optimal(method, condition):
    eigenvalues = [0.5, 0.5 * condition]
    eta, beta, factor = optimizers.optimal_tuning(*eigenvalues, method)
    nesterov = method == "nesterov"
    best = optimizers.spectral_radius(eta, beta, eigenvalues, nesterov)
    assert float(best) == pytest.approx(factor, rel=1e-6, abs=1e-6)
    # No point near or far does better.
    betas = np.array([0.0]) if method == "gradient" else np.linspace(0, 0.999, 200)
    for etas in (eta * np.geomspace(0.1, 3, 301), eta * np.linspace(0.98, 1.02, 101)):
        grid = optimizers.spectral_radius(etas[:, None], betas, eigenvalues, nesterov)
        assert grid.min() > factor - 1e-6
    if method != "gradient":
        near = optimizers.spectral_radius(
            eta * np.linspace(0.98, 1.02, 101)[:, None],
            np.clip(beta + np.linspace(-0.01, 0.01, 101), 0, 1),
            eigenvalues,
            nesterov,
        )
        assert near.min() > factor - 1e-6


def test_bad_tunings():
    for bad in ((0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="smallest and largest must be positive"):
            optimizers.optimal_tuning(*bad)
    with pytest.raises(ValueError, match=r"method must be .* received 'adam'"):
        optimizers.optimal_tuning(1.0, 2.0, "adam")


@pytest.mark.parametrize("condition", [5.0, 50.0])
@pytest.mark.parametrize(
    ("share", "beta", "nesterov"),
    [
        (0.3, 0.0, False),
        (0.9, 0.0, False),
        (0.3, 0.5, False),
        (0.3, 0.9, False),
        (1.5, 0.9, False),
        (0.3, 0.5, True),
        (0.3, 0.9, True),
        (0.6, 0.6, True),
        (1.1, 0.05, False),
        (2.05, 0.0, False),
    ],
)
def test_measured_factor_is_the_spectral_radius(condition, share, beta, nesterov):
    """`share` is the learning rate as a share of 1/L; the last of them diverges."""
    bowl, eta = Bowl(condition, angle=20), share / condition
    walk = optimizers.run(optimizers.SGD(eta, beta, nesterov), bowl, [1.0, 0.7], 1000, bound=1e100)
    predicted = float(optimizers.spectral_radius(eta, beta, bowl.eigenvalues, nesterov))
    assert (predicted > 1) == (share == 2.05)
    measured = optimizers.convergence_factor(np.linalg.norm(walk.path, axis=1))
    assert measured == pytest.approx(predicted, rel=0.002)
    assert math.log(measured) == pytest.approx(math.log(predicted), rel=0.02)


@pytest.mark.parametrize("method", ["gradient", "momentum", "nesterov"])
def test_measured_factor_at_the_optimum(method):
    # Two equal eigenvalues there, which add a factor t to the power: within 2 % all the same.
    bowl = Bowl(30.0)
    eta, beta, factor = optimizers.optimal_tuning(*bowl.eigenvalues, method)
    optimizer = optimizers.SGD(eta, beta, nesterov=method == "nesterov")
    walk = optimizers.run(optimizer, bowl, bowl.start, 400)
    measured = optimizers.convergence_factor(np.linalg.norm(walk.path, axis=1))
    assert measured == pytest.approx(factor, rel=0.02)


def test_convergence_factor():
    t = np.arange(100)
    assert optimizers.convergence_factor(7 * 0.93**t) == pytest.approx(0.93, rel=1e-12)
    assert optimizers.convergence_factor(0.9**t + 5 * 0.3**t) == pytest.approx(0.9, rel=1e-6)
    for bad in ([1.0, 0.5, 0.2], np.ones((4, 4)), [1, 1, 0, 0], [1, 1, 1, np.nan], 1.0):
        with pytest.raises(ValueError, match="distances must be a vector of four or more"):
            optimizers.convergence_factor(bad)


# ------------------------------------------------------------------------------ second derivatives


def dense_model(dropout=0.0, regularizer=None, outputs=3):
    layers = [
        keras.Input((4,)),
        keras.layers.Dense(5, activation="tanh", kernel_regularizer=regularizer),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(dropout),
        keras.layers.Dense(outputs),
    ]
    model = keras.Sequential(layers)
    model.compile(
        "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    return model


def batch(n=40, inputs=4, classes=3):
    rng = np.random.default_rng(1)
    return rng.standard_normal((n, inputs)).astype("float32"), rng.integers(0, classes, n)


def dense_hessian(model, x, y):
    """Every entry, through TensorFlow's Jacobian of the gradient."""
    variables = [v.value for v in model.trainable_variables]
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            loss = model.compute_loss(x, y, model(x, training=False), training=False)
        gradient = tf.concat([tf.reshape(g, -1) for g in inner.gradient(loss, variables)], axis=0)
    rows = outer.jacobian(gradient, variables, experimental_use_pfor=False)
    return np.concatenate([np.reshape(r, (len(gradient), -1)) for r in rows], axis=1)


def test_hessian_vector_product_and_sharpness_against_the_dense_hessian():
    model, (x, y) = dense_model(regularizer=keras.regularizers.L2(0.1)), batch()
    hessian = dense_hessian(model, x, y)
    assert np.abs(hessian - hessian.T).max() < 1e-6 * np.abs(hessian).max()

    def loss():
        return model.compute_loss(x, y, model(x, training=False), training=False)

    rng = np.random.default_rng(0)
    for vector in rng.standard_normal((3, len(hessian))):
        product = optimizers.hessian_vector_product(loss, model.trainable_variables, vector)
        assert product.dtype == np.float64
        expected = hessian @ vector
        np.testing.assert_allclose(product, expected, atol=1e-5 * np.abs(expected).max())
    expected = np.linalg.eigvalsh(hessian)[-1]
    assert optimizers.sharpness(model, x, y) == pytest.approx(expected, rel=1e-3)
    top = optimizers.top_eigenvalue(loss, model.trainable_variables, tolerance=1e-6)
    assert top == pytest.approx(expected, rel=1e-5)


class Counting(keras.layers.Layer):
    """A custom layer with state that changes whenever it is called."""

    def build(self, input_shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1.0)
        return x


def two_outputs():
    inputs = keras.Input((4,))
    h = Counting()(keras.layers.Dropout(0.5)(keras.layers.Dense(6, activation="gelu")(inputs)))
    outputs = {"a": keras.layers.Dense(1, name="a")(h), "b": keras.layers.Dense(2, name="b")(h)}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"a": "mse", "b": "mae"}, metrics={"a": ["mae"]})
    return model


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = keras.layers.Dense(5, activation="silu"), keras.layers.Dense(3)

    def call(self, x):
        return self.out(self.hidden(x))


def subclassed():
    model = Subclassed()
    model.compile("rmsprop", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.mark.parametrize("build", [lambda: dense_model(dropout=0.5), two_outputs, subclassed])
def test_sharpness_leaves_the_model_as_it_was(build):
    model, (x, y) = build(), batch()
    if build is two_outputs:
        y = {"a": x[:, :1], "b": x[:, :2]}
    model.fit(x, y, epochs=2, verbose=0)

    def everything():
        variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
        return [v.numpy().tobytes() for v in variables] + [
            random.getstate(),
            repr(np.random.get_state()),  # noqa: NPY002
            repr(model.get_metrics_result()),
        ]

    before = everything()
    first = optimizers.sharpness(model, x, y)
    assert everything() == before
    assert optimizers.sharpness(model, x, y) == first
    expected = np.linalg.eigvalsh(dense_hessian(model, x, y))[-1]
    assert first == pytest.approx(expected, rel=1e-3)


def test_sharpness_of_a_convolutional_model():
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(2, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    x = np.random.default_rng(0).random((10, 6, 6, 1))
    y = np.arange(10) % 2
    expected = np.linalg.eigvalsh(dense_hessian(model, x, y))[-1]
    assert optimizers.sharpness(model, x, y) == pytest.approx(expected, rel=1e-2)


def test_sharpness_with_an_embedding_and_several_types():
    model = keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            keras.layers.Embedding(5, 2),
            keras.layers.Flatten(dtype="float64"),
            keras.layers.Dense(2, activation="tanh", dtype="float64"),
            keras.layers.Dense(1, dtype="mixed_float16"),
        ]
    )
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, (20, 3)), rng.standard_normal((20, 1))
    types = {v.dtype for v in model.trainable_variables}
    assert types == {"float32", "float64"}

    def loss(vector):
        arrays, start = [], 0
        for v in model.trainable_variables:
            arrays.append(vector[start : start + math.prod(v.shape)].reshape(v.shape))
            start += math.prod(v.shape)
        table, w, b, out, bias = arrays
        h = np.tanh(table[x].reshape(20, 6) @ w + b)
        return np.mean((h @ out + bias - y) ** 2)

    theta = np.concatenate([np.ravel(v.numpy()) for v in model.trainable_variables])
    rows = [
        optimize.approx_fprime(theta, lambda t, i=i: optimize.approx_fprime(t, loss, 1e-5)[i], 1e-4)
        for i in range(len(theta))
    ]
    expected = np.linalg.eigvalsh((np.array(rows) + np.transpose(rows)) / 2)[-1]
    # float16 signals have three digits.
    assert optimizers.sharpness(model, x, y) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("n", [1, 2, 3, 30])
def test_top_eigenvalue_of_a_quadratic(n, float64):
    rng = np.random.default_rng(n)
    root = rng.standard_normal((n, n))
    matrix = (root + root.T) / 2  # of both signs
    x = keras.Variable(rng.standard_normal(n))

    def loss():
        return tf.reduce_sum(x.value * tf.linalg.matvec(matrix, x.value)) / 2

    expected = np.linalg.eigvalsh(matrix)[-1]
    assert optimizers.top_eigenvalue(loss, [x], tolerance=1e-9) == pytest.approx(expected, 1e-8)
    np.testing.assert_allclose(
        optimizers.hessian_vector_product(loss, [x], np.ones(n)), matrix.sum(axis=1), rtol=1e-9
    )


def test_hessian_of_several_variables_in_their_order(float64):
    surface = Rosenbrock()
    x, y, unused = (
        keras.Variable(-1.2, dtype="float64"),
        tf.Variable([[1.0]], dtype="float64"),
        keras.Variable([3.0], dtype="float64"),
    )

    def loss():
        return tf.reduce_sum((1 - x.value) ** 2 + 100 * (y - x.value**2) ** 2)

    columns = [optimizers.hessian_vector_product(loss, [x, y, unused], unit) for unit in np.eye(3)]
    expected = np.zeros((3, 3))
    expected[:2, :2] = optimize.rosen_hess([-1.2, 1.0])
    np.testing.assert_allclose(columns, expected, rtol=1e-12)
    np.testing.assert_allclose(surface.hessian([-1.2, 1.0]), expected[:2, :2])


def test_flat_and_broken_losses():
    x = keras.Variable([1.0, 2.0, 3.0])
    assert optimizers.top_eigenvalue(lambda: tf.reduce_sum(x.value), [x]) == 0
    assert math.isnan(optimizers.top_eigenvalue(lambda: tf.reduce_sum(x.value**2) * np.nan, [x]))
    one = keras.Variable([2.0])
    assert optimizers.top_eigenvalue(lambda: one.value[0] ** 4, [one]) == pytest.approx(48)


def test_second_derivatives_refuse():
    x = keras.Variable([1.0, 2.0])
    for bad in ([1.0], [[1.0, 2.0]], 1.0):
        with pytest.raises(ValueError, match="one number for each of the 2 parameters"):
            optimizers.hessian_vector_product(lambda: tf.reduce_sum(x.value**2), [x], bad)
    uncompiled = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="model must be built and compiled"):
        optimizers.sharpness(uncompiled, np.ones((1, 2)), np.ones((1, 1)))
    frozen = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    frozen.trainable = False
    frozen.compile(loss="mse")
    with pytest.raises(ValueError, match="model must have trainable weights"):
        optimizers.sharpness(frozen, np.ones((1, 2)), np.ones((1, 1)))


def test_gradient_descent_is_stable_below_two_over_the_sharpness():
    """On a quadratic the limit is exact."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    x = np.random.default_rng(0).standard_normal((20, 3)).astype("float32")
    sharpness = optimizers.sharpness(model, x, np.zeros((20, 1)), tolerance=1e-6)
    design = np.hstack([x, np.ones((20, 1))])
    largest = sparse.linalg.svds(design, k=1, return_singular_vectors=False)[0]
    assert sharpness == pytest.approx(2 * largest**2 / 20, rel=1e-5)
    for share, stable in ((1.98, True), (2.02, False)):
        theta, optimizer = np.ones(4), optimizers.SGD(share / sharpness)
        for _ in range(1000):
            theta = optimizer.step(theta, 2 * design.T @ (design @ theta) / 20)
        assert (np.linalg.norm(theta) < 1) == stable
