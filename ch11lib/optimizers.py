"""Optimizers in a few lines of NumPy, the theory of momentum, and curvature of Keras models.

The first part defines the optimizers that Keras has, under the names, arguments and defaults of
`keras.optimizers`; use Keras's to train a model, and these to read, to change and to test against.
The second part runs them on a surface. The third predicts how fast momentum converges on a
quadratic. The last asks a Keras model for its curvature without ever forming the Hessian.

The symbols are the same everywhere: ``g`` is the gradient at the parameters ``θ``, ``η`` the
learning rate, ``t`` the number of the step, which starts at 1; products, squares and roots are
taken element by element, and all sums start from 0 unless something else is said.
"""

from collections.abc import Callable, Sequence
import copy
from dataclasses import dataclass, field
import math
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

from ch11lib.backend import keras, tf
import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse.linalg import LinearOperator, eigsh

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Ftrl",
    "Lion",
    "Nadam",
    "Optimizer",
    "RMSprop",
    "Run",
    "Tuning",
    "convergence_factor",
    "follow",
    "hessian_vector_product",
    "momentum_matrix",
    "optimal_tuning",
    "run",
    "sharpness",
    "spectral_radius",
    "step_gap",
    "top_eigenvalue",
]

# ------------------------------------------------------------------------------ what they all share

_TINY, _HUGE = np.finfo(np.float64).tiny, np.finfo(np.float64).max


@dataclass(eq=False)
class Optimizer:
    """What the optimizers share: the rate, clipping, weight decay, counting and checking.

    A subclass writes two methods. ``_start(zeros)`` returns the initial state for one array of
    parameters as a dict; ``_update(theta, g, s, eta, t)`` returns the new parameters, and keeps in
    ``s`` what it wants to remember.

    In this order, as in Keras, a step clips the gradient, decays the weights by
    ``θ ← θ - η · weight_decay · θ``, and then applies the update.

    Parameters
    ----------
    learning_rate : float or callable
        A callable receives the number of steps done so far (0 before the first) and returns the
        rate; a Keras schedule is one. It may return an array that broadcasts against the
        parameters: if their rows are independent problems, each has a rate of its own.
    weight_decay : float, optional
        Decoupled weight decay, which does not enter the gradient; Loshchilov, Hutter (2019),
        arXiv:1711.05101.
    clipnorm, clipvalue, global_clipnorm : float, optional
        At most one of them: largest norm of the gradient of each array, largest absolute value of
        each entry, largest norm of all gradients together.

    Attributes
    ----------
    iterations : int
        Steps done so far.
    state : list of types.SimpleNamespace
        What the optimizer remembers, for each array of parameters.

    Notes
    -----
    Keras's arguments for averaging weights, scaling losses and accumulating gradients (``use_ema``,
    ``loss_scale_factor``, ``gradient_accumulation_steps`` ...) are left out.

    Examples
    --------
    >>> class SignDescent(Optimizer):
    ...     def _update(self, theta, g, s, eta, t):
    ...         return theta - eta * np.sign(g)
    >>> SignDescent(learning_rate=0.5).step([3.0, 1.0], [0.1, -7.0])
    array([2.5, 1.5])
    """

    learning_rate: float | Callable[[int], float] = 0.001
    weight_decay: float | None = field(default=None, kw_only=True)
    clipnorm: float | None = field(default=None, kw_only=True)
    clipvalue: float | None = field(default=None, kw_only=True)
    global_clipnorm: float | None = field(default=None, kw_only=True)

    iterations: int = field(default=0, init=False, repr=False)
    state: list[SimpleNamespace] = field(default_factory=list, init=False, repr=False)

    _CLIPS: ClassVar = ("clipnorm", "clipvalue", "global_clipnorm")
    _NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (
        "weight_decay",
        "epsilon",
        "beta",
        "initial_accumulator_value",
    )
    _BELOW_ONE: ClassVar[tuple[str, ...]] = ("rho", "beta_1", "beta_2")

    def __post_init__(self):
        if not callable(self.learning_rate):
            self._check("learning_rate", "a number of 0 or more, or a function of the step")
        for name in self._NOT_NEGATIVE:
            self._check(name, "a number of 0 or more")
        for name in self._BELOW_ONE:
            self._check(name, "a number from 0 to below 1", high=np.nextafter(1.0, 0.0))
        self._check("momentum", "a number from 0 to 1", high=1.0)
        for name in self._CLIPS:
            self._check(name, "a positive number", low=_TINY)
        clips = {name: getattr(self, name) for name in self._CLIPS}
        if sum(clip is not None for clip in clips.values()) > 1:
            raise ValueError(f"at most one of {', '.join(clips)} can be set; received {clips}")

    def _check(self, name, expected, low=0.0, high=_HUGE):
        value = getattr(self, name, low)  # not every optimizer has every argument
        if value is None and getattr(type(self), name) is None:  # the default
            return
        if not (isinstance(value, Real) and low <= value <= high):
            raise ValueError(f"{name} must be {expected}; received {value!r}")

    def step(self, theta: Any, grad: Any) -> Any:
        """Return new parameters, one step downhill. What is passed in stays as it is.

        Parameters
        ----------
        theta : array or list of arrays
            Parameters, of any shape; a list of `numpy.ndarray`, such as the weights and biases of a
            network, is updated together. Floating-point types are kept, other numbers become
            float64.
        grad : array or list of arrays
            Gradient of the loss with respect to `theta`.

        Returns
        -------
        numpy.ndarray or list of numpy.ndarray
            Like `theta`. Overflow gives inf or NaN without a warning.

        Examples
        --------
        >>> optimizer = SGD(learning_rate=0.1, momentum=0.9)
        >>> theta = optimizer.step([1.0, 1.0], [1.0, 2.0])
        >>> optimizer.step(theta, [1.0, 2.0])
        array([0.71, 0.42])
        """
        several = isinstance(theta, list | tuple) and any(isinstance(p, np.ndarray) for p in theta)
        with np.errstate(all="ignore"):
            new = self._step(
                *self._arrays(theta, grad) if several else self._arrays([theta], [grad])
            )
        return new if several else new[0]

    def _arrays(self, thetas, grads):
        """Check everything before anything changes."""
        if len(thetas) != len(grads):
            raise ValueError(
                f"grad must list one array for each of the {len(thetas)} of theta; "
                f"received {len(grads)}"
            )
        thetas = [_floating("theta", p) for p in thetas]
        grads = [
            _floating("grad", g).astype(p.dtype, copy=False)
            for g, p in zip(grads, thetas, strict=True)
        ]
        shapes = [p.shape for p in thetas]
        if [g.shape for g in grads] != shapes:
            raise ValueError(
                f"grad must have theta's shapes {shapes}; received {[g.shape for g in grads]}"
            )
        if self.state and shapes != self._shapes:
            raise ValueError(
                f"theta must keep the shapes of the first step, {self._shapes}; received {shapes}"
            )
        return thetas, grads

    def _step(self, thetas, grads):
        rate = self.learning_rate
        eta = rate(self.iterations) if callable(rate) else rate
        eta = eta if np.ndim(eta) else float(eta)  # a number leaves single precision single
        if not self.state:
            self._shapes = [theta.shape for theta in thetas]
            self.state = [SimpleNamespace(**self._start(np.zeros_like(p))) for p in thetas]
        self.iterations += 1
        grads = self._clip(grads)
        if self.weight_decay is not None:
            thetas = [theta - eta * self.weight_decay * theta for theta in thetas]
        return [
            np.asarray(self._update(theta, g, s, eta, self.iterations))
            for theta, g, s in zip(thetas, grads, self.state, strict=True)
        ]

    def _clip(self, grads):
        if self.clipvalue is not None:
            return [np.clip(g, -self.clipvalue, self.clipvalue) for g in grads]
        if self.clipnorm is not None:
            return [g * (self.clipnorm / max(_norm([g]), self.clipnorm)) for g in grads]
        if self.global_clipnorm is not None:
            norm = _norm(grads)
            # One infinite gradient makes all of them NaN, in Keras as here.
            factor = self.global_clipnorm / max(norm, self.global_clipnorm) + (norm - norm)
            return [g * factor for g in grads]
        return grads

    def _start(self, zeros: np.ndarray) -> dict[str, Any]:
        """Return the state before the first step, from zeros of the parameters' shape."""
        return {}

    def _update(
        self, theta: np.ndarray, g: np.ndarray, s: SimpleNamespace, eta: float | np.ndarray, t: int
    ) -> np.ndarray:
        """Return the new parameters of one array; the state `s` may be changed by assignment."""
        raise NotImplementedError(f"{type(self).__name__} must define _update")


def _floating(name, values) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind in "biu":
        return values.astype(np.float64)
    if values.dtype.kind != "f":
        raise TypeError(f"{name} must hold real numbers; received type {values.dtype}")
    return values


def _norm(arrays) -> float:
    return math.sqrt(sum(float(np.sum(np.square(a))) for a in arrays))


# ---------------------------------------------------------------------------------- the optimizers


@dataclass(eq=False)
class SGD(Optimizer):
    """Gradient descent, with momentum if asked for.

    ``θ ← θ - ηg``; with momentum β ``m ← βm - ηg, θ ← θ + m``; with Nesterov momentum
    ``m ← βm - ηg, θ ← θ + βm - ηg``.

    The last is Nesterov's method in other coordinates: where that keeps θ and measures the gradient
    ahead of it, this keeps the point ahead, ``θ + βm``.

    Cauchy (1847); Polyak (1964), Some methods of speeding up the convergence of iteration methods,
    doi:10.1016/0041-5553(64)90137-5; Nesterov (1983), A method of solving a convex programming
    problem with convergence rate O(1/k²), Soviet Mathematics Doklady 27:372-376; Sutskever,
    Martens, Dahl, Hinton (2013), On the importance of initialization and momentum in deep learning,
    PMLR 28(3):1139-1147.

    Parameters
    ----------
    learning_rate : float or callable
    momentum : float
        β, from 0 to 1.
    nesterov : bool
    weight_decay, clipnorm, clipvalue, global_clipnorm
        See `Optimizer`.

    Examples
    --------
    >>> SGD(learning_rate=0.5, momentum=0.9, nesterov=True).step(1.0, 1.0)
    array(0.05)
    """

    learning_rate: float | Callable[[int], float] = 0.01
    momentum: float = 0.0
    nesterov: bool = False

    def _start(self, zeros):
        return {"m": zeros}

    def _update(self, theta, g, s, eta, t):
        s.m = self.momentum * s.m - eta * g
        if self.nesterov:
            return theta + self.momentum * s.m - eta * g
        return theta + s.m


@dataclass(eq=False)
class Adagrad(Optimizer):
    """A rate for each parameter, which falls with the sum of its squared gradients.

    ``s ← s + g²,  θ ← θ - ηg / sqrt(s + ε)``, with s starting at `initial_accumulator_value`.

    Duchi, Hazan, Singer (2011), Adaptive subgradient methods for online learning and stochastic
    optimization, JMLR 12:2121-2159.

    Parameters
    ----------
    learning_rate : float or callable
    initial_accumulator_value : float
        The paper has 0, Keras 0.1.
    epsilon : float
        ε, here inside the root.
    weight_decay, clipnorm, clipvalue, global_clipnorm
        See `Optimizer`.

    Examples
    --------
    >>> textbook = Adagrad(learning_rate=0.5, initial_accumulator_value=0, epsilon=0)
    >>> textbook.step([1.0, 1.0], [1e-3, -1e3])
    array([0.5, 1.5])
    """

    initial_accumulator_value: float = 0.1
    epsilon: float = 1e-7

    def _start(self, zeros):
        return {"s": zeros + self.initial_accumulator_value}

    def _update(self, theta, g, s, eta, t):
        s.s = s.s + g**2
        return theta - eta * g / np.sqrt(s.s + self.epsilon)


@dataclass(eq=False)
class RMSprop(Optimizer):
    """Adagrad that forgets: a running mean of squared gradients in place of their sum.

    ``s ← ρs + (1-ρ)g²,  θ ← θ - ηg / sqrt(s + ε)``. Centered, s is reduced by the square of the
    running mean of g, which leaves the variance. With momentum β, ``m ← βm + ηg/sqrt(...),
    θ ← θ - m``.

    Tieleman, Hinton (2012), Lecture 6.5, Neural networks for machine learning (Coursera); centered:
    Graves (2013), Generating sequences with recurrent neural networks, arXiv:1308.0850.

    Parameters
    ----------
    learning_rate : float or callable
    rho : float
        ρ, how much of the running means is kept at each step.
    momentum : float
    epsilon : float
        ε, here inside the root.
    centered : bool
    weight_decay, clipnorm, clipvalue, global_clipnorm
        See `Optimizer`.

    Examples
    --------
    >>> RMSprop(learning_rate=0.1, rho=0.75, epsilon=0).step(1.0, 123.0)
    array(0.8)
    """

    rho: float = 0.9
    momentum: float = 0.0
    epsilon: float = 1e-7
    centered: bool = False

    def _start(self, zeros):
        return {"s": zeros, "mean": zeros, "m": zeros}

    def _update(self, theta, g, s, eta, t):
        s.s = self.rho * s.s + (1 - self.rho) * g**2
        spread = s.s
        if self.centered:
            s.mean = self.rho * s.mean + (1 - self.rho) * g
            spread = s.s - s.mean**2
        s.m = self.momentum * s.m + eta * g / np.sqrt(spread + self.epsilon)
        return theta - s.m


@dataclass(eq=False)
class Adam(Optimizer):
    """Running means of gradient and squared gradient, both corrected for their start at 0.

    ``m ← β₁m + (1-β₁)g,  v ← β₂v + (1-β₂)g²,  θ ← θ - η c m / (sqrt(v) + ε)`` with
    ``c = sqrt(1-β₂ᵗ) / (1-β₁ᵗ)``. AMSGrad replaces v in the last formula by its largest value so
    far.

    This is the paper's ε̂ form, which Keras uses: ε is added to the *uncorrected* root. The paper's
    Algorithm 1 adds it to the corrected one, which is the same as ε sqrt(1-β₂ᵗ) here.

    Kingma, Ba (2015), arXiv:1412.6980; AMSGrad: Reddi, Kale, Kumar (2018), arXiv:1904.09237.

    Parameters
    ----------
    learning_rate : float or callable
    beta_1, beta_2 : float
        β₁, β₂, how much of the running means is kept at each step.
    epsilon : float
        ε, here outside the root.
    amsgrad : bool
    weight_decay, clipnorm, clipvalue, global_clipnorm
        See `Optimizer`.

    Examples
    --------
    The first step has the size of the learning rate, whatever the gradient.

    >>> Adam(learning_rate=0.1).step([1.0, 1.0, 1.0], [1e-2, 1.0, -1e4]).round(4)
    array([0.9, 0.9, 1.1])
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    amsgrad: bool = False

    def _start(self, zeros):
        return {"m": zeros, "v": zeros, "v_max": zeros}

    def _update(self, theta, g, s, eta, t):
        s.m = self.beta_1 * s.m + (1 - self.beta_1) * g
        s.v = self.beta_2 * s.v + (1 - self.beta_2) * g**2
        v = s.v
        if self.amsgrad:
            v = s.v_max = np.maximum(s.v_max, v)
        correction = math.sqrt(1 - self.beta_2**t) / (1 - self.beta_1**t)
        return theta - eta * correction * s.m / (np.sqrt(v) + self.epsilon)


@dataclass(eq=False)
class AdamW(Adam):
    """Adam with weight decay beside the gradient, not in it: first ``θ ← θ - ηλθ``, then Adam.

    Loshchilov, Hutter (2019), Decoupled weight decay regularization, arXiv:1711.05101.

    Parameters
    ----------
    learning_rate : float or callable
    weight_decay : float
        λ.
    beta_1, beta_2, epsilon, amsgrad
        See `Adam`.
    clipnorm, clipvalue, global_clipnorm
        See `Optimizer`.

    Examples
    --------
    >>> AdamW(learning_rate=0.1, weight_decay=0.5).step([8.0, -2.0], [0.0, 0.0])
    array([ 7.6, -1.9])
    """

    weight_decay: float = 0.004


@dataclass(eq=False)
class Adamax(Optimizer):
    """Adam with a decaying maximum of gradient magnitudes in place of the root mean square.

    ``m ← β₁m + (1-β₁)g,  u ← max(β₂u, |g|),  θ ← θ - η/(1-β₁ᵗ) · m / (u + ε)``

    Kingma, Ba (2015), arXiv:1412.6980, section 7.1 (which has no ε).

    Parameters
    ----------
    learning_rate : float or callable
    beta_1, beta_2, epsilon : float
    weight_decay, clipnorm, clipvalue, global_clipnorm
        See `Optimizer`.

    Examples
    --------
    >>> Adamax(learning_rate=0.1, epsilon=0).step([1.0, 1.0], [1e-9, -1e9])
    array([0.9, 1.1])
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7

    def _start(self, zeros):
        return {"m": zeros, "u": zeros}

    def _update(self, theta, g, s, eta, t):
        s.m = self.beta_1 * s.m + (1 - self.beta_1) * g
        s.u = np.maximum(self.beta_2 * s.u, np.abs(g))
        return theta - eta / (1 - self.beta_1**t) * s.m / (s.u + self.epsilon)


@dataclass(eq=False)
class Nadam(Optimizer):
    """Adam with Nesterov momentum, whose factor grows from about β₁/2 towards β₁.

    With ``μₜ = β₁ (1 - 0.96ᵗ/2)`` and ``Πₜ = μ₁ μ₂ ⋯ μₜ``,
    ``m ← β₁m + (1-β₁)g,  v ← β₂v + (1-β₂)g²,
    m̂ = μₜ₊₁ m / (1-Πₜ₊₁) + (1-μₜ) g / (1-Πₜ),  v̂ = v / (1-β₂ᵗ),  θ ← θ - η m̂ / (sqrt(v̂) + ε)``.

    This is Keras's form: the schedule μ acts on m̂ only, while m itself decays by β₁; and ε stands
    beside the corrected root, unlike in `Adam`.

    Dozat (2016), Incorporating Nesterov momentum into Adam, ICLR workshop.

    Parameters
    ----------
    learning_rate : float or callable
    beta_1, beta_2, epsilon : float
    weight_decay, clipnorm, clipvalue, global_clipnorm
        See `Optimizer`.

    Examples
    --------
    >>> Nadam(learning_rate=0.1).step([1.0, 1.0], [1e-2, -1e4]).round(4)
    array([0.8937, 1.1063])
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7

    def _start(self, zeros):
        return {"m": zeros, "v": zeros, "product": 1.0}

    def _update(self, theta, g, s, eta, t):
        mu, mu_next = (self.beta_1 * (1 - 0.5 * 0.96**k) for k in (t, t + 1))
        s.product *= mu
        s.m = self.beta_1 * s.m + (1 - self.beta_1) * g
        s.v = self.beta_2 * s.v + (1 - self.beta_2) * g**2
        m_hat = mu_next * s.m / (1 - s.product * mu_next) + (1 - mu) * g / (1 - s.product)
        v_hat = s.v / (1 - self.beta_2**t)
        return theta - eta * m_hat / (np.sqrt(v_hat) + self.epsilon)


@dataclass(eq=False)
class Ftrl(Optimizer):
    """Follow the regularized leader: the best point for all gradients so far, with exact zeros.

    ``n' = n + g²,  σ = (n'^-p - n^-p) / η,  z ← z + g + 2λₛθ - σθ,  n ← n'``, and then
    ``θ ← 0 where |z| ≤ λ₁, (sign(z) λ₁ - z) / ((β + n^-p) / η + 2λ₂) elsewhere``.

    This minimizes ``z·θ + λ₁|θ| + ½ ((β + n^-p)/η + 2λ₂) θ²``. Without any λ, β and n₀ it is
    Adagrad. The first step does not start from θ: all that is kept of it is the part that -σθ
    leaves in z, none at all where the gradient is 0.

    McMahan et al. (2013), Ad click prediction: a view from the trenches,
    doi:10.1145/2487575.2488200 (whose λ₂ is twice Keras's).

    Parameters
    ----------
    learning_rate : float or callable
        η; it must be above 0.
    learning_rate_power : float
        p, 0 or less.
    initial_accumulator_value : float
        n at the start.
    l1_regularization_strength, l2_regularization_strength : float
        λ₁, λ₂.
    l2_shrinkage_regularization_strength : float
        λₛ, an ℓ₂ penalty in the loss.
    beta : float
        β.
    weight_decay, clipnorm, clipvalue, global_clipnorm
        See `Optimizer`.

    Examples
    --------
    >>> optimizer = Ftrl(learning_rate=0.1, l1_regularization_strength=1.0)
    >>> optimizer.step([0.0, 0.0], [0.5, 3.0]).round(3)
    array([ 0.   , -0.066])
    """

    learning_rate_power: float = -0.5
    initial_accumulator_value: float = 0.1
    l1_regularization_strength: float = 0.0
    l2_regularization_strength: float = 0.0
    l2_shrinkage_regularization_strength: float = 0.0
    beta: float = 0.0

    _NOT_NEGATIVE: ClassVar = (
        *Optimizer._NOT_NEGATIVE,
        "l1_regularization_strength",
        "l2_regularization_strength",
        "l2_shrinkage_regularization_strength",
    )

    def __post_init__(self):
        super().__post_init__()
        self._check("learning_rate_power", "a number of 0 or less", low=-math.inf, high=0.0)
        if self.learning_rate == 0:
            raise ValueError("learning_rate must be above 0; received 0")

    def _start(self, zeros):
        return {"n": zeros + self.initial_accumulator_value, "z": zeros}

    def _update(self, theta, g, s, eta, t):
        l1, l2 = self.l1_regularization_strength, self.l2_regularization_strength
        n, p = s.n, -self.learning_rate_power
        s.n = n + g**2
        sigma = (s.n**p - n**p) / eta
        s.z = s.z + g + 2 * self.l2_shrinkage_regularization_strength * theta - sigma * theta
        return (np.clip(s.z, -l1, l1) - s.z) / ((self.beta + s.n**p) / eta + 2 * l2)


@dataclass(eq=False)
class Lion(Optimizer):
    """Steps of one size: the sign of a mixture of momentum and gradient.

    ``θ ← θ - η sign(β₁m + (1-β₁)g),  m ← β₂m + (1-β₂)g``

    Chen et al. (2023), Symbolic discovery of optimization algorithms, arXiv:2302.06675.

    Parameters
    ----------
    learning_rate : float or callable
    beta_1 : float
        β₁, above 0 and at most 1.
    beta_2 : float
    weight_decay, clipnorm, clipvalue, global_clipnorm
        See `Optimizer`.

    Examples
    --------
    >>> Lion(learning_rate=0.1).step([1.0, 1.0, 1.0], [1e-9, 0.0, -1e9])
    array([0.9, 1. , 1.1])
    """

    beta_1: float = 0.9
    beta_2: float = 0.99

    _BELOW_ONE: ClassVar = ("beta_2",)

    def __post_init__(self):
        super().__post_init__()
        expected = "a number above 0 and at most 1"
        self._check("beta_1", expected, low=_TINY, high=1.0)

    def _start(self, zeros):
        return {"m": zeros}

    def _update(self, theta, g, s, eta, t):
        direction = np.sign(self.beta_1 * s.m + (1 - self.beta_1) * g)
        s.m = self.beta_2 * s.m + (1 - self.beta_2) * g
        return theta - eta * direction


# ---------------------------------------------------------------------------- along given gradients


def follow(optimizer: Any, gradients: ArrayLike, start: ArrayLike | None = None, **options: Any):
    """Return the points that an optimizer visits when its gradients are given.

    So optimizers of any kind can be compared step by step, in float64.

    Parameters
    ----------
    optimizer : Optimizer, keras.optimizers.Optimizer, tf.compat.v1.train.Optimizer or callable
        A new one: it keeps what it remembers. A callable is a rule,
        ``rule(theta, g, s, t, **options) -> new theta``, which keeps its memory in the dict `s`,
        empty at first; t counts from 1.
    gradients : array of shape (steps, ...)
        One step or more.
    start : array of shape (...), optional
        Default: ones.

    Returns
    -------
    numpy.ndarray
        Shape (steps + 1, ...), the first of the points the start.

    Examples
    --------
    >>> follow(SGD(0.1, momentum=0.5), [1.0, 1.0], start=0.0)
    array([ 0.  , -0.1 , -0.25])
    >>> follow(keras.optimizers.SGD(0.1, momentum=0.5), [1.0, 1.0], start=0.0).round(6)
    array([ 0.  , -0.1 , -0.25])
    >>> follow(lambda theta, g, s, t, eta: theta - eta * g / t, [1.0, 1.0], start=0.0, eta=0.1)
    array([ 0.  , -0.1 , -0.15])
    """
    gradients = np.asarray(gradients, dtype=np.float64)
    if not gradients.ndim or not gradients.size:
        raise ValueError(
            f"gradients must hold one gradient or more; received shape {gradients.shape}"
        )
    shape = gradients.shape[1:]
    theta = np.ones(shape) if start is None else np.asarray(start, dtype=np.float64)
    if theta.shape != shape:
        raise ValueError(
            f"start must have the shape of one gradient, {shape}; received shape {theta.shape}"
        )
    path: list[np.ndarray] = [theta]
    memory: dict = {}
    if isinstance(optimizer, keras.optimizers.Optimizer | tf.compat.v1.train.Optimizer):
        return _follow_tensorflow(optimizer, gradients, theta)
    for t, g in enumerate(gradients, start=1):
        if isinstance(optimizer, Optimizer):
            theta = optimizer.step(theta, g)
        else:
            theta = optimizer(theta, g, memory, t, **options)
        path.append(theta)
    return np.array(path)


def _follow_tensorflow(optimizer, gradients, theta):
    is_keras, path = isinstance(optimizer, keras.optimizers.Optimizer), [theta]
    variable = keras.Variable(theta, dtype="float64") if is_keras else tf.Variable(theta)
    for g in gradients:
        optimizer.apply_gradients([(tf.constant(g), variable)])
        path.append(variable.numpy())
    return np.array(path)


def step_gap(one: ArrayLike, other: ArrayLike) -> float:
    """Return the largest difference between the steps of two paths.

    It is relative to the longest step of each parameter in the second path, so that long paths and
    large parameters do not hide a difference.

    Parameters
    ----------
    one, other : array of shape (steps + 1, ...)
        Points, such as `follow` returns.

    Examples
    --------
    >>> round(step_gap([0.0, 1.0, 2.0], [0.0, 1.0, 2.1]), 3)
    0.091
    """
    if np.shape(one) != np.shape(other) or not np.ndim(one) or np.shape(one)[0] < 2:
        raise ValueError(
            "one and other must be paths of one shape with two points or more; "
            f"received shapes {np.shape(one)} and {np.shape(other)}"
        )
    a, b = np.diff(one, axis=0), np.diff(other, axis=0)
    return float(np.max(np.abs(a - b) / np.abs(b).max(axis=0)))


# ------------------------------------------------------------------------------------ on a surface


class Run(NamedTuple):
    """The way that an optimizer took.

    Attributes
    ----------
    path : numpy.ndarray
        Points, shape (steps + 1, d), the first of them the start; NaN after a divergence.
    values : numpy.ndarray
        Heights along the path, shape (steps + 1,).
    diverged_at : int or None
        The first step whose point was not finite or out of bounds.
    """

    path: np.ndarray
    values: np.ndarray
    diverged_at: int | None

    @property
    def outcome(self) -> str:
        """A phrase to print: ``"finished"`` or ``"diverged at step 12"``."""
        return "finished" if self.diverged_at is None else f"diverged at step {self.diverged_at}"


def run(
    optimizer: Optimizer, surface: Any, start: ArrayLike, steps: int, *, bound: float = 1e6
) -> Run:
    """Let an optimizer walk down a surface.

    Divergence is a result: the walk stops, says at which step, and gives no warning.

    Parameters
    ----------
    optimizer : Optimizer
        A copy of it takes the steps, so that it can be used again.
    surface : object
        With methods ``value(points)`` and ``gradient(point)``, such as those of `landscapes`.
    start : array of shape (d,)
    steps : int
        0 or more.
    bound : float
        A coordinate beyond this counts as diverged.

    Returns
    -------
    Run
        A named tuple of path, values and the step of divergence.

    Examples
    --------
    >>> from ch11lib.landscapes import Bowl
    >>> run(SGD(0.1), Bowl(condition=10), start=[1.0, 1.0], steps=2).path
    array([[1.  , 1.  ],
           [0.9 , 0.  ],
           [0.81, 0.  ]])
    >>> run(SGD(0.3), Bowl(condition=10), start=[1.0, 1.0], steps=50).outcome
    'diverged at step 20'
    """
    theta = _floating("start", start).astype(np.float64)
    if theta.ndim != 1 or not theta.size or not (np.abs(theta) <= bound).all():
        raise ValueError(
            f"start must be a vector of finite numbers of at most {bound:g}; received {start!r}"
        )
    if not isinstance(steps, Integral) or steps < 0:
        raise ValueError(f"steps must be an int of 0 or more; received {steps!r}")
    optimizer, diverged_at = copy.deepcopy(optimizer), None
    path = np.full((steps + 1, *theta.shape), np.nan)
    path[0] = theta
    with np.errstate(all="ignore"):
        for k in range(1, steps + 1):
            path[k] = theta = optimizer.step(theta, surface.gradient(theta))
            if not np.abs(theta).max() <= bound:  # also true for NaN
                diverged_at = k
                break
        return Run(path, surface.value(path), diverged_at)


# -------------------------------------------------------------------- momentum, predicted by theory


def momentum_matrix(
    eta: ArrayLike, beta: ArrayLike, eigenvalue: ArrayLike, nesterov: bool = False
) -> np.ndarray:
    """Return the matrix by which one step of momentum multiplies (θ, m) on a quadratic.

    Along an eigenvector of the Hessian with eigenvalue λ the gradient is λθ, and `SGD` becomes
    ``(θ, m) ← M (θ, m)``. Its eigenvalues have sum and product ``(1 + β - ηλ, β)``; with Nesterov
    momentum ``((1 + β)(1 - ηλ), β(1 - ηλ))``.

    Parameters
    ----------
    eta, beta, eigenvalue : array
        η, β and λ, of shapes that broadcast against each other.
    nesterov : bool

    Returns
    -------
    numpy.ndarray
        Shape (..., 2, 2).

    Examples
    --------
    >>> momentum_matrix(eta=0.1, beta=0.9, eigenvalue=2.0)
    array([[ 0.8,  0.9],
           [-0.2,  0.9]])
    """
    h, beta = np.broadcast_arrays(np.multiply(eta, eigenvalue), np.asarray(beta, dtype=np.float64))
    rows = [[1 - (1 + beta) * h, beta**2], [-h, beta]] if nesterov else [[1 - h, beta], [-h, beta]]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def spectral_radius(
    eta: ArrayLike, beta: ArrayLike, eigenvalues: ArrayLike, nesterov: bool = False
) -> np.ndarray:
    """Return the factor by which momentum on a quadratic shrinks the distance at each step.

    It is the largest absolute eigenvalue of `momentum_matrix` over all eigenvalues of the Hessian.
    Above 1 the distance grows.

    Parameters
    ----------
    eta, beta : array
        η and β, of shapes that broadcast against each other: numbers, or a grid.
    eigenvalues : array of shape (n,)
        Eigenvalues of the Hessian; the smallest and the largest suffice.
    nesterov : bool

    Returns
    -------
    numpy.ndarray
        Of the shape of `eta` and `beta` together.

    Examples
    --------
    >>> float(spectral_radius(eta=0.1, beta=0.0, eigenvalues=[1.0, 10.0]))
    0.9
    >>> float(spectral_radius(eta=0.1, beta=0.81, eigenvalues=[1.0, 10.0]).round(12))
    0.9
    """
    eigenvalues = np.asarray(eigenvalues, dtype=np.float64)
    if eigenvalues.ndim != 1 or not eigenvalues.size:
        raise ValueError(
            f"eigenvalues must be a vector of one or more; received shape {eigenvalues.shape}"
        )
    eta, beta = (np.asarray(a, dtype=np.float64)[..., np.newaxis] for a in (eta, beta))
    h = eta * eigenvalues
    total = (1 + beta) * (1 - h) if nesterov else 1 + beta - h
    product = beta * (1 - h) if nesterov else beta
    # Roots of r² - total r + product: a real pair, or a complex one whose product is |r|².
    discriminant = total**2 - 4 * product
    real = (np.abs(total) + np.sqrt(np.maximum(discriminant, 0))) / 2
    return np.where(discriminant >= 0, real, np.sqrt(np.abs(product))).max(axis=-1)


class Tuning(NamedTuple):
    """Rate η, momentum β, and the factor by which the distance shrinks at each step."""

    eta: float
    beta: float
    factor: float


def optimal_tuning(smallest: float, largest: float, method: str = "momentum") -> Tuning:
    """Return the best rate and momentum for a quadratic.

    With μ and L the smallest and largest eigenvalue of the Hessian and κ = L/μ:

    - gradient: ``η = 2/(L+μ)``, factor ``(κ-1)/(κ+1)``;
    - momentum: ``η = (2/(√L+√μ))²``, ``β = ((√κ-1)/(√κ+1))²``, factor ``(√κ-1)/(√κ+1)``;
    - nesterov: ``η = 4/(3L+μ)``, ``β = (√(3κ+1)-2)/(√(3κ+1)+2)``, factor ``1 - 2/√(3κ+1)``.

    Polyak (1964), doi:10.1016/0041-5553(64)90137-5; Lessard, Recht, Packard (2016),
    arXiv:1408.3595, proposition 1.

    Parameters
    ----------
    smallest, largest : float
        μ and L, ``0 < μ ≤ L``.
    method : {"gradient", "momentum", "nesterov"}

    Examples
    --------
    >>> optimal_tuning(1.0, 25.0, "gradient").factor.__round__(4)
    0.9231
    >>> [round(number, 4) for number in optimal_tuning(1.0, 25.0)]
    [0.1111, 0.4444, 0.6667]
    """
    if not 0 < smallest <= largest < math.inf:
        raise ValueError(
            "smallest and largest must be positive and in this order; "
            f"received {smallest!r} and {largest!r}"
        )
    kappa = largest / smallest
    if method == "gradient":
        return Tuning(2 / (largest + smallest), 0.0, (kappa - 1) / (kappa + 1))
    if method == "momentum":
        factor = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
        return Tuning((2 / (math.sqrt(largest) + math.sqrt(smallest))) ** 2, factor**2, factor)
    if method == "nesterov":
        root = math.sqrt(3 * kappa + 1)
        return Tuning(4 / (3 * largest + smallest), (root - 2) / (root + 2), 1 - 2 / root)
    raise ValueError(f"method must be 'gradient', 'momentum' or 'nesterov'; received {method!r}")


def convergence_factor(distances: ArrayLike) -> float:
    """Measure the factor by which distances shrink at each step.

    It comes from a straight line through the logarithms of the second half of them, so that the
    beginning, where several modes compete, does not count.

    Parameters
    ----------
    distances : array of shape (n,)
        Four or more positive numbers, such as distances to the minimum after each step.

    Examples
    --------
    >>> round(convergence_factor([5.0, 3.0, 1.0, 0.5, 0.25, 0.125]), 12)
    0.5
    """
    distances = np.asarray(distances, dtype=np.float64)
    late = distances[distances.size // 2 :] if distances.ndim == 1 else distances
    if distances.ndim != 1 or distances.size < 4 or not ((late > 0) & np.isfinite(late)).all():
        raise ValueError(
            "distances must be a vector of four or more numbers, positive and finite in its second "
            f"half; received shape {distances.shape}, last {distances.ravel()[-3:].tolist()}"
        )
    return float(np.exp(np.polynomial.polynomial.polyfit(np.arange(len(late)), np.log(late), 1)[1]))


# ------------------------------------------------------------------------------ second derivatives


def hessian_vector_product(
    loss_function: Callable[[], Any], variables: Sequence, vector: ArrayLike
) -> np.ndarray:
    """Multiply the Hessian of a loss by a vector, for the price of a few gradients.

    ``H v = ∇(∇L · v)``: the gradient of the gradient's component along v. The matrix, with its n²
    entries, is never formed.

    Pearlmutter (1994), Fast exact multiplication by the Hessian, doi:10.1162/neco.1994.6.1.147.

    Parameters
    ----------
    loss_function : callable
        Without arguments; computes the loss (a scalar tensor) from the variables.
    variables : list of keras.Variable or tf.Variable
        The n parameters. Those that the loss does not depend on have zero second derivatives.
    vector : array of shape (n,)
        One number for each parameter, in the order of the variables.

    Returns
    -------
    numpy.ndarray
        Shape (n,), float64 (computed in the type of the variables).

    Examples
    --------
    >>> x = keras.Variable([1.0, 2.0])
    >>> hessian_vector_product(lambda: tf.reduce_sum(x.value**3), [x], [1.0, 10.0])
    array([  6., 120.])
    """
    tensors = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    sizes = [math.prod(v.shape) for v in tensors]
    vector = np.asarray(vector)
    if not tensors or vector.shape != (sum(sizes),):
        raise ValueError(
            f"vector must hold one number for each of the {sum(sizes)} parameters, shape "
            f"({sum(sizes)},); received shape {vector.shape}"
        )
    parts = [
        tf.constant(part.reshape(v.shape), dtype=v.dtype)
        for v, part in zip(tensors, np.split(vector, np.cumsum(sizes)[:-1]), strict=True)
    ]
    with tf.GradientTape(watch_accessed_variables=False) as outer:
        outer.watch(tensors)
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(tensors)
            loss = loss_function()
        gradients = inner.gradient(loss, tensors, unconnected_gradients="zero")
        # An embedding's gradient is sparse, and variables may differ in type.
        dense = map(tf.convert_to_tensor, gradients)
        slopes = [tf.reduce_sum(g * part) for g, part in zip(dense, parts, strict=True)]
        slope = tf.add_n([tf.cast(term, tf.float64) for term in slopes])
    products = outer.gradient(slope, tensors, unconnected_gradients="zero")
    return np.concatenate([np.ravel(tf.convert_to_tensor(p)).astype(np.float64) for p in products])


def top_eigenvalue(
    loss_function: Callable[[], Any], variables: Sequence, *, tolerance: float = 1e-3
) -> float:
    """Return the largest eigenvalue of the Hessian of a loss, by Lanczos iteration.

    `scipy.sparse.linalg.eigsh` finds it from ten to twenty products with vectors. It starts from
    a fixed vector, so that equal questions have equal answers.

    Lanczos (1950), An iteration method for the solution of the eigenvalue problem of linear
    differential and integral operators, doi:10.6028/jres.045.026.

    Parameters
    ----------
    loss_function, variables
        As in `hessian_vector_product`.
    tolerance : float
        Relative accuracy at which the iteration stops.

    Returns
    -------
    float
        NaN if the loss has no finite second derivatives.

    Raises
    ------
    scipy.sparse.linalg.ArpackNoConvergence
        If some 2,000 products do not suffice, as in a Hessian of which only rounding is left.

    Examples
    --------
    >>> x = keras.Variable([1.0, 2.0, -4.0])
    >>> round(top_eigenvalue(lambda: tf.reduce_sum(x.value**3), [x]), 3)
    12.0
    """
    n = sum(math.prod(v.shape) for v in variables)
    start = np.random.default_rng(0).standard_normal(n)  # an axis could miss the top eigenvector

    def product(vector):
        return hessian_vector_product(loss_function, variables, np.ravel(vector))

    first = product(start)
    if not np.isfinite(first).all():
        return math.nan
    if n == 1 or not first.any():  # ARPACK refuses a single parameter and a Hessian of zeros
        return float(first[0] / start[0])
    operator = LinearOperator((n, n), matvec=product, dtype=np.float64)
    # A basis of ten vectors is enough for one eigenvalue, and half the price of SciPy's default.
    [value] = eigsh(
        operator,
        k=1,
        which="LA",
        v0=start,
        ncv=min(n, 10),
        tol=tolerance,
        maxiter=200,
        return_eigenvectors=False,
    )
    return float(value)


def sharpness(model: keras.Model, x: Any, y: Any, *, tolerance: float = 1e-3) -> float:
    """Return the largest eigenvalue of the Hessian of a compiled model's loss on a batch.

    Gradient descent with rate η is stable where this is below 2/η. The loss is that of inference,
    penalties included: dropout is off, batch normalization uses its moving statistics. The model
    is afterwards what it was.

    Cohen, Kaur, Li, Kolter, Talwalkar (2021), Gradient descent on neural networks typically occurs
    at the edge of stability, arXiv:2103.00065.

    Parameters
    ----------
    model : keras.Model
        Built and compiled with a loss.
    x, y : arrays
        One batch of examples and targets, which must fit into memory with all signals.
    tolerance : float
        See `top_eigenvalue`.

    Returns
    -------
    float
        NaN if the loss has no finite second derivatives.

    Examples
    --------
    The loss of a linear unit without bias is mean((w x - y)²), its curvature 2 mean(x²).

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.compile(loss="mse")
    >>> round(sharpness(model, np.array([[1.0], [2.0]]), np.array([[0.0], [0.0]])), 4)
    5.0
    """
    if not getattr(model, "compiled", False) or not model.built:
        raise ValueError("model must be built and compiled with a loss before its sharpness exists")
    if not model.trainable_variables:
        raise ValueError("model must have trainable weights; received one without")
    x, y = (keras.tree.map_structure(tf.convert_to_tensor, part) for part in (x, y))
    # The losses of several outputs are tracked as metrics, and a custom layer may count its calls.
    state = [*model.non_trainable_variables, *model.metrics_variables]
    before = [v.numpy() for v in state]
    try:
        return top_eigenvalue(
            lambda: model.compute_loss(x, y, model(x, training=False), training=False),
            model.trainable_variables,
            tolerance=tolerance,
        )
    finally:
        for variable, value in zip(state, before, strict=True):
            variable.assign(value)
