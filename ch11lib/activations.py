"""Activation functions: definitions, derivatives, gains, and a randomized leaky ReLU for Keras.

Every elementwise function of `keras.activations` is here in NumPy under Keras's name and with its
defaults, and `derivative` gives its derivative. The definitions keep the type of a floating-point
array, compute integers in float64, and are accurate for large arguments, where a formula copied
from a paper overflows or cancels. At a corner, where there is no derivative, `derivative` returns
what Keras on TensorFlow backpropagates.

`gain` and `moment_map` say what a function does to the scale of a normally distributed signal.
`RReLU` is the one variant of leaky ReLU that Keras lacks. `time_per_call` measures what a function
costs.
"""

from collections.abc import Callable, Iterable, Mapping
import functools
import inspect
from itertools import pairwise
import math
from timeit import Timer
from typing import NamedTuple

from ch11lib.backend import keras, tf
import numpy as np
from numpy.typing import ArrayLike
import pandas as pd
from scipy import integrate, special

__all__ = [
    "GALLERY",
    "SELU_ALPHA",
    "SELU_SCALE",
    "Gain",
    "RReLU",
    "celu",
    "derivative",
    "elu",
    "exponential",
    "gain",
    "gelu",
    "get",
    "hard_shrink",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "leaky_relu",
    "linear",
    "log_sigmoid",
    "mish",
    "moment_fixed_point",
    "moment_jacobian",
    "moment_map",
    "names",
    "prelu",
    "relu",
    "relu6",
    "rrelu",
    "selu",
    "sigmoid",
    "silu",
    "soft_shrink",
    "softplus",
    "softsign",
    "sparse_plus",
    "sparse_sigmoid",
    "squareplus",
    "swish",
    "tanh",
    "tanh_shrink",
    "time_per_call",
]


class _Entry(NamedTuple):
    function: Callable
    derivative: Callable


_REGISTRY: dict[str, _Entry] = {}
_ALIASES = {"swish": "silu", "hard_swish": "hard_silu"}


def _floating(z) -> np.ndarray:
    z = np.asarray(z)
    if z.dtype.kind in "biu":
        return z.astype(np.float64)
    if z.dtype.kind != "f":
        raise TypeError(f"z must hold real numbers; received an array of type {z.dtype}")
    return z


def _elementwise(function: Callable) -> Callable:
    """Let a function of a float array take any real input and keep its floating-point type.

    float16 is computed in float32, because squares and exponentials leave its range at once.
    """

    @functools.wraps(function)
    def wrapper(z, *args, **kwargs):
        z = _floating(z)
        wide = z.astype(np.float32) if z.dtype == np.float16 else z
        return np.asarray(function(wide, *args, **kwargs)).astype(z.dtype, copy=False)[()]

    return wrapper


def _derivative_of(function: Callable) -> Callable:
    """Register the decorated function as the derivative of `function`."""

    def register(prime: Callable) -> Callable:
        _REGISTRY[function.__name__] = _Entry(function, _elementwise(prime))
        return prime

    return register


# ------------------------------------------------------------------------------ saturating, bounded


@_elementwise
def sigmoid(z: ArrayLike) -> np.ndarray:
    """Logistic sigmoid, ``σ(z) = 1 / (1 + exp(-z))``.

    Examples
    --------
    >>> [round(float(s), 4) for s in sigmoid([-5, 0, 5])]
    [0.0067, 0.5, 0.9933]
    """
    return special.expit(z)


@_derivative_of(sigmoid)
def _(z):
    return special.expit(z) * special.expit(-z)  # σ(1-σ), without the cancellation of 1-σ


@_elementwise
def tanh(z: ArrayLike) -> np.ndarray:
    """Hyperbolic tangent, ``tanh(z) = 2 σ(2z) - 1``.

    Examples
    --------
    >>> tanh([-1, 0, 1]).round(4)
    array([-0.7616,  0.    ,  0.7616])
    """
    return np.tanh(z)


@_derivative_of(tanh)
def _(z):
    return 4 * special.expit(2 * z) * special.expit(-2 * z)  # 1 - tanh²


@_elementwise
def softsign(z: ArrayLike) -> np.ndarray:
    """Softsign, ``z / (1 + |z|)``: saturates like tanh, but slowly.

    Examples
    --------
    >>> softsign([-1, 0, 4])
    array([-0.5,  0. ,  0.8])
    """
    return z / (1 + np.abs(z))


@_derivative_of(softsign)
def _(z):
    return 1 / np.square(1 + np.abs(z))


@_elementwise
def hard_sigmoid(z: ArrayLike) -> np.ndarray:
    """Sigmoid in three straight pieces, ``clip(z/6 + 1/2, 0, 1)``.

    Examples
    --------
    >>> hard_sigmoid([-4, 0, 1.5, 4])
    array([0.  , 0.5 , 0.75, 1.  ])
    """
    return np.clip(z / 6 + 0.5, 0, 1)


@_derivative_of(hard_sigmoid)
def _(z):
    return (np.abs(z) < 3) / 6


@_elementwise
def sparse_sigmoid(z: ArrayLike) -> np.ndarray:
    """Sigmoid in three straight pieces, steeper: ``clip((z + 1)/2, 0, 1)``.

    Examples
    --------
    >>> sparse_sigmoid([-2, 0, 0.5, 2])
    array([0.  , 0.5 , 0.75, 1.  ])
    """
    return np.clip((z + 1) / 2, 0, 1)


@_derivative_of(sparse_sigmoid)
def _(z):
    return (np.abs(z) < 1) / 2


@_elementwise
def hard_tanh(z: ArrayLike) -> np.ndarray:
    """Tanh in three straight pieces, ``clip(z, -1, 1)``.

    Examples
    --------
    >>> hard_tanh([-2, 0.5, 2])
    array([-1. ,  0.5,  1. ])
    """
    return np.clip(z, -1, 1)


@_derivative_of(hard_tanh)
def _(z):
    return np.abs(z) <= 1


# ---------------------------------------------------------------------------- ReLU and its variants


@_elementwise
def relu(z: ArrayLike) -> np.ndarray:
    """Rectified linear unit, ``max(z, 0)``. Its derivative at 0 is taken as 0.

    Examples
    --------
    >>> relu(np.array([-2, 0, 3])), derivative("relu")([-2, 0, 3])
    (array([0., 0., 3.]), array([0., 0., 1.]))
    """
    return np.maximum(z, 0)


@_derivative_of(relu)
def _(z):
    return z > 0


@_elementwise
def relu6(z: ArrayLike) -> np.ndarray:
    """ReLU that stops at 6, ``clip(z, 0, 6)``.

    Examples
    --------
    >>> relu6([-2, 3, 8])
    array([0., 3., 6.])
    """
    return np.clip(z, 0, 6)


@_derivative_of(relu6)
def _(z):
    return (z > 0) & (z < 6)


@_elementwise
def leaky_relu(z: ArrayLike, negative_slope: float = 0.2) -> np.ndarray:
    """Leaky ReLU, z above 0 and ``negative_slope * z`` below.

    The default is that of `keras.activations.leaky_relu`; the layer `keras.layers.LeakyReLU` has
    another, 0.3, and the paper used 0.01 (Maas, Hannun, Ng 2013, Rectifier nonlinearities improve
    neural network acoustic models).

    Examples
    --------
    >>> leaky_relu(-1.0), leaky_relu(-1.0, negative_slope=0.01)
    (np.float64(-0.2), np.float64(-0.01))
    """
    return np.where(z > 0, z, negative_slope * z)


@_derivative_of(leaky_relu)
def _(z, negative_slope=0.2):
    return np.where(z > 0, 1, negative_slope)


@_elementwise
def prelu(z: ArrayLike, alpha: ArrayLike) -> np.ndarray:
    """Parametric ReLU: z above 0, ``alpha * z`` below, with one learned slope for each unit.

    He, Zhang, Ren, Sun (2015), arXiv:1502.01852; `keras.layers.PReLU`.

    Parameters
    ----------
    z : array
        Pre-activations.
    alpha : float or array
        Slopes, of a shape that broadcasts against z.

    Examples
    --------
    >>> prelu([[-4, 4], [-4, -4]], alpha=[0.25, 0.5])
    array([[-1.,  4.],
           [-1., -2.]])
    """
    return np.where(z > 0, z, np.asarray(alpha) * z)


@_derivative_of(prelu)
def _(z, alpha):
    # Keras writes relu(z) - alpha * relu(-z), of which neither term has a slope at 0.
    return np.where(z == 0, 0, np.where(z > 0, 1, np.asarray(alpha)))


@_elementwise
def elu(z: ArrayLike, alpha: float = 1.0) -> np.ndarray:
    """Exponential linear unit, z above 0 and ``alpha * (exp(z) - 1)`` below.

    Clevert, Unterthiner, Hochreiter (2016), arXiv:1511.07289.

    Examples
    --------
    >>> elu([-50.0, 0.0, 2.0], alpha=0.5).tolist()
    [-0.5, 0.0, 2.0]
    """
    return np.maximum(z, 0) + alpha * np.expm1(np.minimum(z, 0))


@_derivative_of(elu)
def _(z, alpha=1.0):
    return np.where(z > 0, 1, alpha * np.exp(np.minimum(z, 0)))


def _selu_constants() -> tuple[float, float]:
    """Return (alpha, scale) for which mean 0 and variance 1 reproduce themselves.

    For z ~ N(0, 1) write ``a = E[exp(z); z<0] - 1/2`` and ``b = E[(exp(z) - 1)²; z<0]``. Mean 0
    demands ``E[z; z>0] + alpha * a = 0``, variance 1 then ``scale² * (1/2 + alpha² * b) = 1``.
    """
    e_one, e_two = (math.exp(k**2 / 2) * math.erfc(k / math.sqrt(2)) / 2 for k in (1, 2))
    alpha = 1 / math.sqrt(2 * math.pi) / (0.5 - e_one)
    scale = 1 / math.sqrt(0.5 + alpha**2 * (e_two - 2 * e_one + 0.5))
    return alpha, scale


#: The two constants of SELU (Klambauer et al. 2017), from the conditions that define them.
SELU_ALPHA, SELU_SCALE = _selu_constants()


@_elementwise
def selu(z: ArrayLike) -> np.ndarray:
    """Scaled ELU, ``SELU_SCALE * elu(z, SELU_ALPHA)``: mean 0 and variance 1 are its fixed point.

    Klambauer, Unterthiner, Mayr, Hochreiter (2017), arXiv:1706.02515.

    Examples
    --------
    >>> round(SELU_ALPHA, 6), round(SELU_SCALE, 6)
    (1.673263, 1.050701)
    """
    return SELU_SCALE * (np.maximum(z, 0) + SELU_ALPHA * np.expm1(np.minimum(z, 0)))


@_derivative_of(selu)
def _(z):
    return SELU_SCALE * np.where(z < 0, SELU_ALPHA * np.exp(np.minimum(z, 0)), 1)


@_elementwise
def celu(z: ArrayLike, alpha: float = 1.0) -> np.ndarray:
    """ELU that is smooth for every alpha: z above 0, ``alpha * (exp(z/alpha) - 1)`` below.

    Its slope at 0 is 1. (Keras on TensorFlow backpropagates 2 at exactly 0, because it adds up the
    slopes of both pieces.)

    Barron (2017), arXiv:1704.07483.

    Examples
    --------
    >>> celu([-50, 0, 3], alpha=2)
    array([-2.,  0.,  3.])
    """
    return np.maximum(z, 0) + alpha * np.expm1(np.minimum(z, 0) / alpha)


@_derivative_of(celu)
def _(z, alpha=1.0):
    return np.exp(np.minimum(z, 0) / alpha)


@_elementwise
def sparse_plus(z: ArrayLike) -> np.ndarray:
    """ReLU with a parabola for a corner: 0 below -1, ``(z + 1)²/4`` up to 1, z above.

    Examples
    --------
    >>> sparse_plus([-2, 0, 3])
    array([0.  , 0.25, 3.  ])
    """
    return np.where(z < 1, np.square(np.clip(z, -1, 1) + 1) / 4, z)


@_derivative_of(sparse_plus)
def _(z):
    return (np.clip(z, -1, 1) + 1) / 2


@_elementwise
def softplus(z: ArrayLike) -> np.ndarray:
    """Smooth ReLU, ``log(1 + exp(z))``; its derivative is the sigmoid.

    Examples
    --------
    >>> softplus([-1000, 0, 1000]).round(4)
    array([0.000e+00, 6.931e-01, 1.000e+03])
    """
    return np.logaddexp(0, z)


@_derivative_of(softplus)
def _(z):
    return special.expit(z)


@_elementwise
def squareplus(z: ArrayLike, b: float = 4) -> np.ndarray:
    """Smooth ReLU without exponentials, ``(z + sqrt(z² + b)) / 2``.

    Barron (2021), arXiv:2112.11687.

    Examples
    --------
    >>> squareplus([-1.5, 0, 1.5])
    array([0.5, 1. , 2. ])
    """
    # The sum of the absolute values is safe on both sides; z itself would cancel where it is
    # negative, and b/4 is the product of the two roots.
    root = (np.abs(z) + np.sqrt(np.square(z) + b)) / 2
    return np.where(z < 0, b / 4 / root, root)


@_derivative_of(squareplus)
def _(z, b=4):
    return squareplus(z, b) / np.sqrt(np.square(z) + b)


# ------------------------------------------------------------------ gated: z times a soft threshold


@_elementwise
def gelu(z: ArrayLike, approximate: bool = False) -> np.ndarray:
    """Gaussian error linear unit, ``z * Φ(z)`` with the normal distribution function Φ.

    Hendrycks, Gimpel (2016), arXiv:1606.08415.

    Parameters
    ----------
    z : array
        Pre-activations.
    approximate : bool
        Use ``Φ(z) ≈ (1 + tanh(sqrt(2/π) * (z + 0.044715 z³))) / 2``, off by less than 5e-4 in the
        product.

    Examples
    --------
    >>> round(float(gelu(1.0)), 4), round(float(gelu(1.0, approximate=True)), 4)
    (0.8413, 0.8412)
    """
    return z * (_tanh_gate(z)[0] if approximate else special.ndtr(z))


@_derivative_of(gelu)
def _(z, approximate=False):
    if approximate:
        gate, slope = _tanh_gate(z)
        return gate + z * slope
    return special.ndtr(z) + z * np.exp(-np.square(z) / 2) / math.sqrt(2 * math.pi)


def _tanh_gate(z):
    """Approximate Φ(z) by a sigmoid of a cubic; return it and its derivative."""
    inner = 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    inner_slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
    gate = special.expit(inner)
    return gate, gate * special.expit(-inner) * inner_slope


@_elementwise
def silu(z: ArrayLike) -> np.ndarray:
    """Sigmoid linear unit or Swish, ``z * σ(z)``.

    Elfwing, Uchibe, Doya (2018), arXiv:1702.03118; Ramachandran, Zoph, Le (2017), arXiv:1710.05941.

    Examples
    --------
    >>> silu([-1, 0, 1]).round(4)
    array([-0.2689,  0.    ,  0.7311])
    """
    return z * special.expit(z)


@_derivative_of(silu)
def _(z):
    return special.expit(z) * (1 + z * special.expit(-z))


@_elementwise
def hard_silu(z: ArrayLike) -> np.ndarray:
    """Swish with the sigmoid in straight pieces, ``z * hard_sigmoid(z)``.

    Howard et al. (2019), Searching for MobileNetV3, arXiv:1905.02244.

    Examples
    --------
    >>> hard_silu([-4, -1.5, 4])
    array([-0.   , -0.375,  4.   ])
    """
    return z * hard_sigmoid(z)


@_derivative_of(hard_silu)
def _(z):
    return np.where(np.abs(z) < 3, z / 3 + 0.5, z > 0)


@_elementwise
def mish(z: ArrayLike) -> np.ndarray:
    """Mish, ``z * tanh(softplus(z))``.

    Misra (2019), arXiv:1908.08681.

    Examples
    --------
    >>> mish([-1, 0, 1]).round(4)
    array([-0.3034,  0.    ,  0.8651])
    """
    return z * np.tanh(softplus(z))


@_derivative_of(mish)
def _(z):
    gate = np.tanh(softplus(z))
    return gate + z * special.expit(z) * (1 - np.square(gate))


swish = silu
hard_swish = hard_silu

# ------------------------------------------------------------------------------------------- others


@_elementwise
def linear(z: ArrayLike) -> np.ndarray:
    """Identity, z: the activation of a layer without one.

    Examples
    --------
    >>> linear([-1, 2])
    array([-1.,  2.])
    """
    return np.asarray(z)


@_derivative_of(linear)
def _(z):
    return np.ones_like(z)


@_elementwise
def exponential(z: ArrayLike) -> np.ndarray:
    """Exponential, ``exp(z)``; infinite where the type has no number that large.

    Examples
    --------
    >>> exponential([0, 1, 1000]).round(4)
    array([1.    , 2.7183,    inf])
    """
    with np.errstate(over="ignore"):
        return np.exp(z)


@_derivative_of(exponential)
def _(z):
    return exponential(z)


@_elementwise
def log_sigmoid(z: ArrayLike) -> np.ndarray:
    """Logarithm of the sigmoid, ``-log(1 + exp(-z))``.

    Examples
    --------
    >>> log_sigmoid([-1000, 0, 1000]).round(4)
    array([-1.000e+03, -6.931e-01, -0.000e+00])
    """
    return -np.logaddexp(0, -z)


@_derivative_of(log_sigmoid)
def _(z):
    return special.expit(-z)


@_elementwise
def tanh_shrink(z: ArrayLike) -> np.ndarray:
    """Subtract tanh, ``z - tanh(z)``: flat at 0, a straight line far from it.

    Examples
    --------
    >>> tanh_shrink([0, 1]).round(4)
    array([0.    , 0.2384])
    """
    return z - np.tanh(z)


@_derivative_of(tanh_shrink)
def _(z):
    return np.square(np.tanh(z))


@_elementwise
def hard_shrink(z: ArrayLike, threshold: float = 0.5) -> np.ndarray:
    """Z itself where ``|z| > threshold``, else 0: it jumps at both ends.

    Examples
    --------
    >>> hard_shrink([-2, 0.25, 2])
    array([-2.,  0.,  2.])
    """
    return np.where(np.abs(z) > threshold, z, 0)


@_derivative_of(hard_shrink)
def _(z, threshold=0.5):
    return np.abs(z) > threshold


@_elementwise
def soft_shrink(z: ArrayLike, threshold: float = 0.5) -> np.ndarray:
    """Shrink towards 0 by `threshold`: ``sign(z) * max(|z| - threshold, 0)``.

    Examples
    --------
    >>> soft_shrink([-2, 0.25, 2])
    array([-1.5,  0. ,  1.5])
    """
    return np.sign(z) * np.maximum(np.abs(z) - threshold, 0)


@_derivative_of(soft_shrink)
def _(z, threshold=0.5):
    return np.abs(z) > threshold


# ---------------------------------------------------------------------------------- finding by name

#: Sixteen functions that are in use for hidden layers, by family; a figure of 4 x 4.
GALLERY = (
    "sigmoid",
    "hard_sigmoid",
    "tanh",
    "softsign",
    "relu",
    "relu6",
    "leaky_relu",
    "softplus",
    "elu",
    "celu",
    "selu",
    "squareplus",
    "gelu",
    "silu",
    "hard_silu",
    "mish",
)


def names() -> tuple[str, ...]:
    """Return the names of all elementwise functions of `keras.activations`, without aliases.

    Examples
    --------
    >>> set(GALLERY) <= set(names())
    True
    """
    return tuple(name for name in _REGISTRY if name != "prelu")  # prelu needs its learned slopes


def _entry(name: str) -> _Entry:
    entry = _REGISTRY.get(_ALIASES.get(name, name)) if isinstance(name, str) else None
    if entry is None:
        raise ValueError(
            f"name must be one of {', '.join([*_REGISTRY, *_ALIASES])}; received {name!r}"
        )
    return entry


def _bind(function: Callable, name: str, parameters: dict) -> Callable:
    try:
        inspect.signature(function).bind(None, **parameters)
    except TypeError as error:
        raise TypeError(f"parameters do not fit {name}: {error}") from None
    return functools.partial(function, **parameters) if parameters else function


def get(name: str, **parameters: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return an activation function by name, with its parameters set.

    Parameters
    ----------
    name : str
        One of `names()`, ``"prelu"``, or an alias: ``"swish"``, ``"hard_swish"``.
    **parameters
        Such as ``alpha=0.5`` for elu.

    Returns
    -------
    callable
        Function of an array.

    Examples
    --------
    >>> float(get("elu", alpha=0.5)(-50.0))
    -0.5
    """
    return _bind(_entry(name).function, name, parameters)


def derivative(name: str, **parameters: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return the derivative of an activation function by name.

    Where the function has a corner, it has the value that Keras on TensorFlow backpropagates.

    Parameters
    ----------
    name, **parameters
        As for `get`.

    Returns
    -------
    callable
        Function of an array, with the same input and output types as the activation.

    Examples
    --------
    >>> float(derivative("sigmoid")(0.0)), float(derivative("leaky_relu")(-3.0))
    (0.25, 0.2)
    """
    return _bind(_entry(name).derivative, name, parameters)


# -------------------------------------------------------------- what a function does to a scale


def _normal_mean(g: Callable, mean: float, variance: float) -> float:
    """Integrate g over N(mean, variance) by adaptive quadrature."""
    std = math.sqrt(variance)
    if std == 0:
        return float(g(mean))

    def integrand(t):
        return float(g(mean + std * t)) * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)

    # Activations bend around z = 0. In a wide distribution that is a spike, which an adaptive rule
    # only sees if it is told where to look.
    cuts = sorted(
        {-12.0, 12.0} | {min(max((z - mean) / std, -12.0), 12.0) for z in (-40, -8, 0, 8, 40)}
    )
    return sum(
        integrate.quad(integrand, low, high, epsabs=1e-10, epsrel=1e-9, limit=200)[0]
        for low, high in pairwise(cuts)
    )


class Gain(NamedTuple):
    """What an activation makes of a standard normal pre-activation z.

    Attributes
    ----------
    mean : float
        ``E[f(z)]``.
    mean_square : float
        ``E[f(z)²]``: the forward signal's mean square is multiplied by it.
    slope_mean_square : float
        ``E[f'(z)²]``: the same for the error signal.
    init : float
        ``1 / sqrt(E[f(z)²])``: weights of variance ``init² / fan_in`` keep the forward scale.
    """

    mean: float
    mean_square: float
    slope_mean_square: float
    init: float


def gain(name: str, **parameters: float) -> Gain:
    """Compute by quadrature what an activation does to the scale of a standard normal signal.

    Parameters
    ----------
    name, **parameters
        As for `get`.

    Returns
    -------
    Gain

    Examples
    --------
    >>> relu_gain = gain("relu")  # He: variance 2 / fan_in
    >>> round(relu_gain.mean_square, 9), round(relu_gain.slope_mean_square, 9)
    (0.5, 0.5)
    >>> round(gain("selu").init, 9)  # LeCun: variance 1 / fan_in
    1.0
    """
    f, prime = get(name, **parameters), derivative(name, **parameters)
    mean, mean_square, slope = (
        _normal_mean(g, 0.0, 1.0) for g in (f, lambda z: f(z) ** 2, lambda z: prime(z) ** 2)
    )
    return Gain(mean, mean_square, slope, 1 / math.sqrt(mean_square))


def _check_moments(mean: float, variance: float, tau: float) -> None:
    if not math.isfinite(mean):
        raise ValueError(f"mean must be a finite number; received {mean!r}")
    for label, value in (("variance", variance), ("tau", tau)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{label} must be finite and not negative; received {value!r}")


def moment_map(
    name: str,
    mean: float,
    variance: float,
    *,
    omega: float = 0.0,
    tau: float = 1.0,
    **parameters: float,
) -> tuple[float, float]:
    """Map mean and variance of a unit's inputs to mean and variance of its output.

    The pre-activation is a weighted sum of many inputs and so nearly normal,
    ``z ~ N(omega * mean, tau * variance)``, where `omega` is the sum of the unit's weights and
    `tau` the sum of their squares. LeCun initialization makes them 0 and 1 on average. Returned
    are ``E[f(z)]`` and ``E[f(z)²] - E[f(z)]²``, by quadrature (Klambauer et al. 2017).

    Parameters
    ----------
    name, **parameters
        As for `get`.
    mean, variance : float
        Moments of the inputs.
    omega, tau : float
        Sum of the weights and of their squares.

    Returns
    -------
    tuple of float
        ``(mean, variance)`` of the outputs.

    Examples
    --------
    >>> mean, variance = moment_map("selu", 0.0, 1.0)
    >>> abs(mean) < 1e-9, abs(variance - 1) < 1e-9
    (True, True)
    """
    _check_moments(mean, variance, tau)
    f = get(name, **parameters)
    first, second = (
        _normal_mean(g, omega * mean, tau * variance) for g in (f, lambda z: f(z) ** 2)
    )
    return first, max(second - first**2, 0.0)


def moment_jacobian(
    name: str,
    mean: float,
    variance: float,
    *,
    omega: float = 0.0,
    tau: float = 1.0,
    **parameters: float,
) -> np.ndarray:
    """Differentiate `moment_map` with respect to the mean and the variance of the inputs.

    With ``z ~ N(m, v)``, integration by parts gives ``d E[g]/dm = E[g'(z)]`` and
    ``d E[g]/dv = E[g'(z) (z - m)] / (2v)``, which only needs the first derivative of g = f and f².
    Continuous activations only.

    Parameters
    ----------
    name, mean, variance, omega, tau, **parameters
        As for `moment_map`; here variance and tau must be positive.

    Returns
    -------
    numpy.ndarray
        Shape (2, 2); row 0 belongs to the new mean, column 0 to the old mean. A fixed point
        attracts if the largest absolute eigenvalue there is below 1.

    Examples
    --------
    >>> jacobian = moment_jacobian("selu", 0.0, 1.0)
    >>> round(float(np.abs(np.linalg.eigvals(jacobian)).max()), 3)
    0.783
    """
    _check_moments(mean, variance, tau)
    m, v = omega * mean, tau * variance
    if v == 0:
        raise ValueError(f"tau * variance must be positive; received {tau!r} * {variance!r}")
    if name == "hard_shrink":
        raise ValueError("name must belong to a continuous function; received 'hard_shrink'")
    f, prime = get(name, **parameters), derivative(name, **parameters)

    def expect(g):
        return _normal_mean(g, m, v)

    first = expect(f)
    d_first = expect(prime), expect(lambda z: prime(z) * (z - m)) / (2 * v)
    d_second = (
        expect(lambda z: 2 * f(z) * prime(z)),
        expect(lambda z: f(z) * prime(z) * (z - m)) / v,
    )
    of_m_and_v = np.array(
        [d_first, [two - 2 * first * one for one, two in zip(d_first, d_second, strict=True)]]
    )
    return of_m_and_v * [omega, tau]


def moment_fixed_point(
    name: str,
    start: tuple[float, float] = (0.5, 2.0),
    *,
    omega: float = 0.0,
    tau: float = 1.0,
    tolerance: float = 1e-10,
    max_layers: int = 1000,
    **parameters: float,
) -> tuple[float, float]:
    """Iterate `moment_map` until mean and variance no longer change.

    Parameters
    ----------
    name, omega, tau, **parameters
        As for `moment_map`.
    start : tuple of float
        Mean and variance to start from.
    tolerance : float
        Largest change in a step that counts as none.
    max_layers : int
        Largest number of steps.

    Returns
    -------
    tuple of float
        ``(mean, variance)`` of the fixed point that attracts `start`.

    Raises
    ------
    ValueError
        If there is no convergence within `max_layers` steps.

    Examples
    --------
    >>> mean, variance = moment_fixed_point("selu")
    >>> abs(mean) < 1e-6, abs(variance - 1) < 1e-6
    (True, True)
    """
    moments = start
    for _ in range(max_layers):
        previous = moments
        moments = moment_map(name, *previous, omega=omega, tau=tau, **parameters)
        if max(abs(new - old) for new, old in zip(moments, previous, strict=True)) <= tolerance:
            return moments
    raise ValueError(
        f"start must lead to a fixed point within max_layers = {max_layers} steps; received "
        f"{start!r}, which has come to {moments!r} and still moves"
    )


# -------------------------------------------------------------------------- randomized leaky ReLU


def _check_slopes(lower: float, upper: float) -> None:
    if not 0 <= lower <= upper < math.inf:
        raise ValueError(
            "lower and upper must be two slopes in order, neither negative; "
            f"received {lower!r} and {upper!r}"
        )


def rrelu(
    z: np.ndarray,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    rng: int | np.random.Generator | None = None,
) -> np.ndarray:
    """Randomized leaky ReLU: a leaky ReLU with a random slope for every element.

    Parameters
    ----------
    z : array
        Pre-activations.
    lower, upper : float
        Ends of the uniform distribution that a slope is drawn from.
    rng : int or numpy.random.Generator, optional
        Source of the slopes, as in training. Without it every slope is the mean,
        ``(lower + upper) / 2``, as in testing.

    Returns
    -------
    numpy.ndarray
        Of the shape and floating-point type of z.

    Examples
    --------
    >>> rrelu(np.array([-48.0, 48.0])), float(rrelu(-48.0, rng=0)) != -11.0
    (array([-11.,  48.]), True)
    """
    _check_slopes(lower, upper)
    z = _floating(z)
    if rng is None:
        return leaky_relu(z, (lower + upper) / 2)
    return prelu(z, np.random.default_rng(rng).uniform(lower, upper, z.shape))


@keras.saving.register_keras_serializable(package="ch11lib")
class RReLU(keras.layers.Layer):
    """Randomized leaky ReLU as a Keras layer.

    In training each negative element is multiplied by a slope of its own, drawn from
    U(lower, upper); otherwise all are multiplied by the mean slope. Positive elements pass.

    Parameters
    ----------
    lower, upper : float
        Ends of the slope's distribution.
    seed : int, optional
        Seed of the slopes. As with Keras's dropout, None takes a random one, and a model that is
        loaded from a file begins its sequence anew.
    **kwargs
        Arguments of `keras.layers.Layer`, such as ``name`` and ``dtype``.

    Notes
    -----
    Xu, Wang, Chen, Li (2015), Empirical evaluation of rectified activations in convolutional
    network, arXiv:1505.00853. The paper's experiments draw the divisor, U(3, 8), and test with the
    mean divisor; here the slope itself is uniform between 1/8 and 1/3, as in other frameworks.

    Examples
    --------
    >>> layer, z = RReLU(seed=0), np.array([[-48.0, 48.0]], dtype="float32")
    >>> layer(z).numpy().tolist()
    [[-11.0, 48.0]]
    >>> bool((layer(z, training=True) == layer(z, training=True)).numpy().all())
    False
    """

    def __init__(
        self, lower: float = 1 / 8, upper: float = 1 / 3, seed: int | None = None, **kwargs
    ):
        super().__init__(**kwargs)
        _check_slopes(lower, upper)
        self.lower, self.upper, self.seed = lower, upper, seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True

    def call(self, inputs, training=False):
        """Apply the layer to a tensor of any shape."""
        slope = (self.lower + self.upper) / 2
        if training:
            slope = keras.random.uniform(
                keras.ops.shape(inputs),
                self.lower,
                self.upper,
                dtype=keras.backend.standardize_dtype(inputs.dtype),
                seed=self.seed_generator,
            )
        return keras.ops.where(inputs > 0, inputs, slope * inputs)

    def compute_output_shape(self, input_shape):
        """Return the input's shape."""
        return input_shape

    def get_config(self):
        """Return the arguments that rebuild the layer."""
        return super().get_config() | {"lower": self.lower, "upper": self.upper, "seed": self.seed}


# ------------------------------------------------------------------------------------------- speed


def time_per_call(
    functions: Iterable[str] | Mapping[str, Callable],
    x: np.ndarray,
    *,
    repeats: int = 7,
    calls: int = 10,
) -> pd.DataFrame:
    """Time functions of one tensor, each compiled into a graph.

    Repeats are interleaved: every repeat measures all the functions once, so that a slow spell of
    the machine hits all of them. Compare medians over the repeats, as ratios.

    Parameters
    ----------
    functions : iterable of str, or mapping from str to callable
        Names of `keras.activations`, or any functions of a tensor, Keras models included.
    x : array
        The argument; float64 is passed on as such, so choose float32 for realistic times.
    repeats : int
        Number of measurements of each function.
    calls : int
        Number of calls that a measurement averages over.

    Returns
    -------
    pandas.DataFrame
        Seconds per call: one row for each repeat, one column for each function.

    Examples
    --------
    >>> times = time_per_call(["relu", "gelu"], np.zeros(1000, "float32"), repeats=3)
    >>> times.shape, bool((times > 0).all(axis=None))
    ((3, 2), True)
    """
    for label, count in (("repeats", repeats), ("calls", calls)):
        if count < 1:
            raise ValueError(f"{label} must be at least 1; received {count!r}")
    if isinstance(functions, str):
        raise TypeError(f"functions must be a list of names or a mapping; received {functions!r}")
    if not isinstance(functions, Mapping):
        functions = {name: keras.activations.get(name) for name in functions}
    x = tf.convert_to_tensor(x)

    def timer(function):
        compiled = tf.function(function, autograph=False)

        def run():
            compiled(x)
            tf.test.experimental.sync_devices()  # a GPU returns before it has finished

        run()  # the first call builds the graph
        return Timer(run)

    timers = {name: timer(function) for name, function in functions.items()}
    rows = [
        {name: each.timeit(calls) / calls for name, each in timers.items()} for _ in range(repeats)
    ]
    return pd.DataFrame(rows, index=pd.RangeIndex(repeats, name="repeat"))
