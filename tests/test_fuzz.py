"""Public functions of arrays: the same answer for every form of an input, and clear errors.

`CALLS` has a valid call of each. Every array argument is then given in other forms, every number
is made bad: the answer must stay the same, or an error must name the argument.
"""

import importlib
import inspect

from ch11lib import activations
from ch11lib.backend import tf
from hypothesis import example, given, settings
from hypothesis import strategies as st
import numpy as np
import pandas as pd
import pytest

RNG = np.random.default_rng(0)
Z = RNG.standard_normal((6, 4))
W = RNG.standard_normal((4, 3))
P = RNG.dirichlet(np.ones(3), 5)
Y = np.array([0, 1, 2, 0, 1])
STEP = np.arange(12.0)
EXTREMES = {"NaN": np.nan, "infinite": np.inf, "huge": 1e300, "tiny": 1e-300}

# Called with cases of their own in the tests of their modules: lists of arrays, models, callables.
OTHERS = {
    "batch_norm.backward",
    *("optimizers.follow", "optimizers.hessian_vector_product", "optimizers.run"),
    *("regularization.mc_predict", "schedules.warmup", "sparsity.fleet_masks"),
    *("sparsity.magnitude_masks", "tournament.train_rows"),
}

# Arguments of a valid call, for each function with an array among them.
CALLS = {
    "activations.prelu": {"z": Z, "alpha": np.full(4, 0.2)},
    "batch_norm.forward": {"x": Z, "gamma": np.ones(4), "beta": np.zeros(4), "epsilon": 1e-3},
    "batch_norm.infer": {
        "x": Z,
        "moving_mean": np.zeros(4),
        "moving_variance": np.ones(4),
        "gamma": np.ones(4),
        "beta": np.zeros(4),
        "epsilon": 1e-3,
    },
    "batch_norm.layer_norm": {"x": Z, "gamma": np.ones(4), "beta": np.zeros(4), "epsilon": 1e-3},
    "batch_norm.moving_average": {"moving": np.zeros(4), "batch": np.ones(4), "momentum": 0.9},
    "clipping.adaptive_clip": {"gradient": W, "weight": W, "clip": 0.01, "epsilon": 1e-3},
    "clipping.angle": {"a": Z[0], "b": Z[1]},
    "clipping.clip_by_norm": {"g": W, "max_norm": 1.0},
    "clipping.clip_by_value": {"g": W, "clip": 0.5},
    "optimizers.convergence_factor": {"distances": 0.9**STEP},
    "optimizers.momentum_matrix": {"eta": 0.1, "beta": 0.9, "eigenvalue": 2.0},
    "optimizers.spectral_radius": {"eta": 0.1, "beta": 0.9, "eigenvalues": np.array([1.0, 2.0])},
    "optimizers.step_gap": {"one": Z, "other": Z + 0.1},
    "regularization.alpha_dropout": {"x": Z, "p": 0.3},
    "regularization.auroc": {"inside": Z[0], "outside": Z[1]},
    "regularization.calibration": {"probabilities": P, "y": Y},
    "regularization.calibration_error": {"probabilities": P, "y": Y},
    "regularization.crossed_interval": {"values": Z, "level": 0.9},
    "regularization.dropout": {"x": Z, "p": 0.3},
    "regularization.entropy": {"probabilities": P},
    "regularization.max_norm": {"w": W, "r": 1.0},
    "regularization.mutual_information": {"passes": np.stack([P, P[::-1]])},
    "regularization.negative_log_likelihood": {"probabilities": P, "y": Y},
    "regularization.penalty": {"weights": W, "l1": 0.1, "l2": 0.1},
    "regularization.temperature": {"logits": Z[:5, :3], "y": Y},
    "schedules.cosine": {"step": STEP, "initial": 0.1, "steps": 10.0, "end": 0.0},
    "schedules.cosine_restarts": {"step": STEP, "initial": 0.1, "steps": 3.0, "end": 0.0},
    "schedules.exponential": {"step": STEP, "initial": 0.1, "steps": 10.0, "factor": 0.1},
    "schedules.one_cycle": {"step": STEP, "peak": 0.1, "steps": 12},
    "schedules.one_cycle_momentum": {"step": STEP, "steps": 12, "high": 0.95, "low": 0.85},
    "schedules.piecewise": {"step": STEP, "boundaries": [3, 6], "values": [1.0, 0.1, 0.01]},
    "schedules.piecewise_linear": {"step": STEP, "knots": [0, 6], "values": [1.0, 0.1]},
    "schedules.polynomial": {"step": STEP, "initial": 0.1, "steps": 10.0, "exponent": 2.0},
    "schedules.power": {"step": STEP, "initial": 0.1, "steps": 10.0, "exponent": 1.0},
    "schedules.suggest_rates": {
        "rates": np.geomspace(1e-4, 1, 12),
        "losses": 3 - 0.1 * STEP,
        "smoothed": 3 - 0.1 * STEP,
    },
    "schedules.wsd": {"step": STEP, "peak": 0.1, "steps": 12, "warmup": 2, "decay": 4},
    "sparsity.polynomial_decay": {
        "step": STEP,
        "initial": 0.1,
        "final": 0.9,
        "begin": 2,
        "end": 8,
        "power": 3.0,
    },
    "sparsity.proximal_l1": {"weights": W, "threshold": 0.1},
    "tournament.good_decades": {
        "rates": np.geomspace(0.001, 1, 4),
        "scores": np.array([0.5, 0.8, 0.79, 0.1]),
        "tolerance": 0.05,
    },
    "tournament.rank_intervals": {"scores": Z},
    "tournament.steps_to_target": {"losses": Z + STEP[:6, None][::-1], "target": 1.0},
}
CALLS |= {
    f"activations.{name}": {"z": Z}
    for name in activations.__all__
    if inspect.isfunction(function := getattr(activations, name))
    and next(iter(inspect.signature(function).parameters), None) == "z"
    and name != "prelu"
}


def of(name):
    """Return a function by its name, such as ``clipping.angle``."""
    module, function = name.split(".")
    return getattr(importlib.import_module(f"ch11lib.{module}"), function)


def run(name, arguments):
    function = of(name)
    if "rng" in inspect.signature(function).parameters:
        arguments = arguments | {"rng": np.random.default_rng(1)}
    return function(**arguments)


def flat(result):
    """Return all numbers of a result in one array."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, tuple | list):
        return np.concatenate([flat(part) for part in result])
    if isinstance(result, pd.DataFrame | pd.Series):
        return result.to_numpy(float).ravel()
    if isinstance(result, np.ndarray | float | int | np.generic):
        return np.ravel(result).astype(float)
    return np.ravel(result).astype(float) if tf.is_tensor(result) else np.zeros(0)


def test_every_function_of_arrays_is_called():
    modules = {name.split(".")[0] for name in CALLS}
    functions = {
        f"{module}.{name}"
        for module in modules
        for name in importlib.import_module(f"ch11lib.{module}").__all__
        if inspect.isfunction(function := of(f"{module}.{name}"))
        and "ArrayLike" in str(inspect.getsource(function).partition(":\n")[0])
    }
    assert functions - set(CALLS) == OTHERS


def forms(array):
    """Yield the same numbers as other objects: name, object."""
    yield "list", array.tolist()
    if np.issubdtype(array.dtype, np.floating):
        yield "float32", array.astype("float32")
    frozen = array.copy()
    frozen.flags.writeable = False
    yield "read-only", frozen
    wide = np.zeros([2 * n for n in array.shape], array.dtype)
    wide[tuple(slice(None, None, 2) for _ in array.shape)] = array
    yield "strided", wide[tuple(slice(None, None, 2) for _ in array.shape)]
    yield "Fortran", np.asfortranarray(array)
    yield "tensor", tf.constant(array)
    if array.ndim == 1:
        yield "series", pd.Series(array, index=range(5, 5 + len(array)))
    if array.ndim == 2:
        yield "frame", pd.DataFrame(array)


ARRAYS = [(n, a) for n, call in CALLS.items() for a, v in call.items() if isinstance(v, np.ndarray)]


@pytest.mark.parametrize(("name", "argument"), ARRAYS)
def test_other_forms_of_an_array_give_the_same_answer(name, argument):
    call = CALLS[name]
    before = {key: np.array(value) for key, value in call.items()}
    expected = flat(run(name, call))
    assert len(expected)
    for form, value in forms(call[argument]):
        found = flat(run(name, call | {argument: value}))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=form)
    for key, value in before.items():
        np.testing.assert_array_equal(call[key], value, err_msg=f"{key} was changed")


@pytest.mark.parametrize(("name", "argument"), ARRAYS)
@pytest.mark.parametrize(
    "bad", [np.array(["a", "b"]), None, {}, object()], ids=["text", "None", "dict", "object"]
)
def test_what_is_no_number_is_refused(name, argument, bad):
    if bad is None and inspect.signature(of(name)).parameters[argument].default is None:
        return
    with pytest.raises((ValueError, TypeError)):
        run(name, CALLS[name] | {argument: bad})


NUMBERS = [
    (name, argument)
    for name, call in CALLS.items()
    for argument, value in call.items()
    if isinstance(value, int | float)
    and "array" not in str(inspect.signature(of(name)).parameters[argument].annotation)
]


def refused_or_answered(name, argument, value, nan=False):
    """Say whether a call with another value has an error that names it, or an answer without NaN.

    NumPy's error for shapes that do not fit is clear enough; no suggestion is NaN, with a reason.
    """
    try:
        with np.errstate(all="ignore"):  # an overflow is an answer
            found = run(name, CALLS[name] | {argument: value})
    except (ValueError, TypeError) as error:
        return argument in str(error) or "broadcast" in str(error)
    return nan or name == "schedules.suggest_rates" or not np.isnan(flat(found)).any()


@pytest.mark.parametrize(("name", "argument"), NUMBERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, "a", None, [1.0, 2.0]], ids=repr)
def test_what_is_no_finite_number_is_refused_by_name_or_has_an_answer(name, argument, bad):
    assert refused_or_answered(name, argument, bad)


@pytest.mark.parametrize(("name", "argument"), NUMBERS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(value=st.floats(-100, 100))
@example(value=0.0)
@example(value=-1.0)
@example(value=1.0)
def test_any_number_is_refused_by_name_or_has_an_answer(name, argument, value):
    assert refused_or_answered(name, argument, value)


@pytest.mark.parametrize(("name", "argument"), ARRAYS)
@pytest.mark.parametrize("kind", ["empty", "NaN", "infinite", "huge", "tiny", "boolean"])
def test_an_extreme_array_is_refused_by_name_or_has_an_answer(name, argument, kind):
    good = CALLS[name][argument]
    bad = {
        "empty": good[:0],
        "boolean": good > 0,
        **{k: np.full(good.shape, v) for k, v in EXTREMES.items()},
    }[kind]
    assert refused_or_answered(name, argument, bad, nan=kind in ("NaN", "infinite", "huge"))
