"""Other right answers to assignment 2. The name says to which question, then how it is done."""

import math

import numpy as np


def bn_forward__one_scale(x, gamma, beta, epsilon):
    """One multiplication and one addition for each feature."""
    m = x.shape[0]
    mean = np.sum(x, axis=0) / m
    scale = gamma * (np.sum((x - mean) ** 2, axis=0) / m + epsilon) ** -0.5
    return x * scale + (beta - mean * scale)


def bn_backward__step_by_step(dy, x, gamma, epsilon):
    """Backpropagate through every step of the computation, without a simplification."""
    m = len(x)
    centred = x - x.mean(axis=0)
    variance = np.mean(centred**2, axis=0)
    std = np.sqrt(variance + epsilon)
    dx_hat = dy * gamma
    dstd = -np.sum(dx_hat * centred, axis=0) / std**2
    dvariance = dstd / (2 * std)
    dcentred = dx_hat / std + dvariance * 2 * centred / m
    dmean = -np.sum(dcentred, axis=0)
    dx = dcentred + dmean / m
    return [dx, np.sum(dy * centred / std, axis=0), np.sum(dy, axis=0)]


def bn_backward__jacobian(dy, x, gamma, epsilon):
    """Build the Jacobian matrix of each feature."""
    m, n = x.shape
    dx = np.zeros((m, n))
    std = np.sqrt(x.var(axis=0) + epsilon)
    x_hat = (x - x.mean(axis=0)) / std
    for j in range(n):
        jacobian = np.eye(m) - 1 / m - np.outer(x_hat[:, j], x_hat[:, j]) / m
        dx[:, j] = gamma[j] / std[j] * (jacobian @ dy[:, j])
    return dx, np.einsum("ij,ij->j", dy, x_hat), np.ones(m) @ dy


def moving_statistics__updates(batches, rho):
    """Move towards each batch by a part of the distance."""
    mean, variance = 0.0, 1.0
    for batch in batches:
        mean = mean + (1 - rho) * (np.mean(batch, 0) - mean)
        variance = variance + (1 - rho) * (np.mean(batch**2, 0) - np.mean(batch, 0) ** 2 - variance)
    return mean, variance


def fold__matrix(w, b, gamma, beta, mean, variance, epsilon):
    """Multiply by a diagonal matrix."""
    diagonal = np.diag(gamma) @ np.diag((variance + epsilon) ** -0.5)
    return w @ diagonal, b @ diagonal + (beta - mean @ diagonal)


def clip__loops(gradients, c, rule):
    """Each rule by itself, with conditions."""
    if rule == "value":
        return [np.maximum(np.minimum(g, c), -c) for g in gradients]

    def shrink(g, norm):
        return g.copy() if norm <= c else c * g / norm

    if rule == "norm":
        return [shrink(g, math.sqrt((g * g).sum())) for g in gradients]
    total = math.sqrt(sum((g * g).sum() for g in gradients))
    return [shrink(g, total) for g in gradients]


def clip__one_vector(gradients, c, rule):
    """The global norm from one long vector."""
    if rule == "global_norm":
        norm = np.linalg.norm(np.concatenate([g.ravel() for g in gradients]))
        return [g * np.minimum(1, c / np.maximum(norm, 1e-300)) for g in gradients]
    if rule == "norm":
        return [g if np.linalg.norm(g) < c else g / np.linalg.norm(g) * c for g in gradients]
    return [np.where(g > c, c, np.where(g < -c, -c, g)) for g in gradients]


def turn__from_unit_vectors(g, c):
    """From the sum and the difference of unit vectors: precise for small angles, too."""
    clipped = np.clip(g, -c, c)
    u, v = g / np.linalg.norm(g), clipped / np.linalg.norm(clipped)
    return math.degrees(2 * math.atan2(np.linalg.norm(u - v), np.linalg.norm(u + v)))


def threshold__sorted(norms, s):
    """The largest norm that is not to be clipped."""
    ordered = sorted(norms.tolist())
    return ordered[round((1 - s) * len(ordered)) - 1]
