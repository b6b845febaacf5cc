"""Other right answers to assignment 3. The name says to which question, then how it is done."""

import math

import numpy as np


def momentum_step__velocity(theta, m, g, eta, beta):
    """With the velocity of the opposite sign, turned back at the end."""
    velocity = eta * g - beta * m
    return theta - velocity, -velocity


def nesterov_step__point_ahead(theta, m, gradient, eta, beta):
    """A plain gradient step from the point ahead; m is what was moved."""
    ahead = theta + beta * m
    new = ahead - eta * gradient(ahead)
    return new, new - theta


def adam_step__corrected_rate(theta, m, v, g, t, eta=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """Both corrections in the rate, and epsilon made to fit."""
    m = m + (1 - beta_1) * (g - m)
    v = v + (1 - beta_2) * (g * g - v)
    root = math.sqrt(1 - beta_2**t)
    rate = eta * root / (1 - beta_1**t)
    return [theta - rate * m / (np.sqrt(v) + epsilon * root), m, v]


def two_decays__conditions(theta, g, eta, lam):
    """The sign by conditions; the decay as a factor."""
    whole = g + 2 * lam * theta
    step = np.where(whole > 0, 1.0, np.where(whole < 0, -1.0, 0.0))
    return theta - eta * step, (1 - eta * lam) * theta - eta * np.sign(g)


def largest_rate__spectral_norm(hessian):
    """The largest eigenvalue of a positive definite matrix is its spectral norm."""
    return 2 / np.linalg.norm(hessian, 2)


def largest_rate__power_iteration(hessian):
    """The largest eigenvalue by repeated multiplication."""
    vector = np.linspace(1, 2, len(hessian))
    for _ in range(20_000):
        vector = hessian @ vector
        vector = vector / np.linalg.norm(vector)
    return 2 / float(vector @ hessian @ vector)


def warmup_exponential__minimum(step, eta, w, s):
    """Both parts clipped where the other one rules."""
    rising = np.clip(np.asarray(step) / w, 0, 1)
    after = np.maximum(np.asarray(step) - w, 0)
    return eta * rising * np.exp(-after / s * np.log(10))


def warmup_exponential__loop(step, eta, w, s):
    """One step at a time."""

    def rate(t):
        return eta * t / w if t <= w else eta / 10 ** ((t - w) / s)

    if np.ndim(step) == 0:
        return rate(float(step))
    return np.array([rate(float(t)) for t in step])


def one_cycle__pieces(step, total, p, eta):
    """Each piece by its own formula."""
    t = np.asarray(step, dtype=float)
    distance = np.minimum(np.abs(t - p) / p, 1)
    tail = 0.1 + (0.001 - 0.1) * (t - 2 * p) / (total - 1 - 2 * p)
    return eta * np.where(t <= 2 * p, 1 - 0.9 * distance, tail), 0.85 + 0.1 * distance
