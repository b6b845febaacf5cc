"""Wrong answers to assignment 2. The name says to which question, then what is wrong."""

import numpy as np

# ----------------------------------------------------------------------------------- question 1


def bn_forward__epsilon_outside(x, gamma, beta, epsilon):
    """Add epsilon to the standard deviation."""
    return gamma * (x - x.mean(axis=0)) / (x.std(axis=0) + epsilon) + beta


def bn_forward__unbiased_variance(x, gamma, beta, epsilon):
    """Divide the squares by m - 1."""
    return gamma * (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0, ddof=1) + epsilon) + beta


def bn_forward__by_example(x, gamma, beta, epsilon):
    """Normalize each example over its features: that is layer normalization."""
    centred = x - x.mean(axis=1, keepdims=True)
    return gamma * centred / np.sqrt(x.var(axis=1, keepdims=True) + epsilon) + beta


def bn_forward__whole_batch(x, gamma, beta, epsilon):
    """Take one mean and variance for all features."""
    return gamma * (x - x.mean()) / np.sqrt(x.var() + epsilon) + beta


def bn_forward__variance_not_rooted(x, gamma, beta, epsilon):
    """Divide by the variance."""
    return gamma * (x - x.mean(axis=0)) / (x.var(axis=0) + epsilon) + beta


# ----------------------------------------------------------------------------------- question 2


def bn_backward__statistics_fixed(dy, x, gamma, epsilon):
    """Treat mean and variance as constants."""
    inverse_std = 1 / np.sqrt(x.var(axis=0) + epsilon)
    x_hat = (x - x.mean(axis=0)) * inverse_std
    return gamma * inverse_std * dy, (dy * x_hat).sum(axis=0), dy.sum(axis=0)


def bn_backward__variance_fixed(dy, x, gamma, epsilon):
    """Let the mean move and forget the variance: dx still sums to zero."""
    inverse_std = 1 / np.sqrt(x.var(axis=0) + epsilon)
    x_hat = (x - x.mean(axis=0)) * inverse_std
    dbeta, dgamma = dy.sum(axis=0), (dy * x_hat).sum(axis=0)
    return gamma * inverse_std * (dy - dbeta / len(x)), dgamma, dbeta


def bn_backward__gamma_forgotten(dy, x, gamma, epsilon):
    """Leave gamma out of dx."""
    inverse_std = 1 / np.sqrt(x.var(axis=0) + epsilon)
    x_hat = (x - x.mean(axis=0)) * inverse_std
    dbeta, dgamma = dy.sum(axis=0), (dy * x_hat).sum(axis=0)
    return inverse_std * (dy - (dbeta + x_hat * dgamma) / len(x)), dgamma, dbeta


def bn_backward__means(dy, x, gamma, epsilon):
    """Average dgamma and dbeta over the batch."""
    inverse_std = 1 / np.sqrt(x.var(axis=0) + epsilon)
    x_hat = (x - x.mean(axis=0)) * inverse_std
    dbeta, dgamma = dy.mean(axis=0), (dy * x_hat).mean(axis=0)
    return gamma * inverse_std * (dy - dbeta - x_hat * dgamma), dgamma, dbeta


def bn_backward__dgamma_with_x(dy, x, gamma, epsilon):
    """Multiply by x, not by the normalized x, in dgamma."""
    inverse_std = 1 / np.sqrt(x.var(axis=0) + epsilon)
    x_hat = (x - x.mean(axis=0)) * inverse_std
    dx = dy - dy.mean(axis=0) - x_hat * (dy * x_hat).mean(axis=0)
    return gamma * inverse_std * dx, (dy * x).sum(axis=0), dy.sum(axis=0)


def bn_backward__variance_twice(dy, x, gamma, epsilon):
    """Forget that the factor 2 of the square cancels the 1/2 of the root."""
    inverse_std = 1 / np.sqrt(x.var(axis=0) + epsilon)
    x_hat = (x - x.mean(axis=0)) * inverse_std
    dbeta, dgamma = dy.sum(axis=0), (dy * x_hat).sum(axis=0)
    dx = gamma * inverse_std * (dy - (dbeta + 2 * x_hat * dgamma) / len(x))
    return dx, dgamma, dbeta


def bn_backward__epsilon_forgotten(dy, x, gamma, epsilon):
    """Drop epsilon, which a small one hides."""
    inverse_std = 1 / np.sqrt(x.var(axis=0))
    x_hat = (x - x.mean(axis=0)) * inverse_std
    dbeta, dgamma = dy.sum(axis=0), (dy * x_hat).sum(axis=0)
    return gamma * inverse_std * (dy - (dbeta + x_hat * dgamma) / len(x)), dgamma, dbeta


# ----------------------------------------------------------------------------------- question 3


def moving_statistics__exchanged(batches, rho):
    """Keep 1 - rho of the old value: the meaning that momentum has in PyTorch."""
    mean, variance = np.zeros(batches[0].shape[1]), np.ones(batches[0].shape[1])
    for batch in batches:
        mean = (1 - rho) * mean + rho * batch.mean(axis=0)
        variance = (1 - rho) * variance + rho * batch.var(axis=0)
    return mean, variance


def moving_statistics__variance_from_zero(batches, rho):
    """Let the variance start at 0."""
    mean, variance = np.zeros(batches[0].shape[1]), np.zeros(batches[0].shape[1])
    for batch in batches:
        mean = rho * mean + (1 - rho) * batch.mean(axis=0)
        variance = rho * variance + (1 - rho) * batch.var(axis=0)
    return mean, variance


def moving_statistics__unbiased(batches, rho):
    """Divide the squares by m - 1."""
    mean, variance = np.zeros(batches[0].shape[1]), np.ones(batches[0].shape[1])
    for batch in batches:
        mean = rho * mean + (1 - rho) * batch.mean(axis=0)
        variance = rho * variance + (1 - rho) * batch.var(axis=0, ddof=1)
    return mean, variance


def moving_statistics__last_batch(batches, rho):
    """Start afresh with each batch: right for one."""
    mean = (1 - rho) * batches[-1].mean(axis=0)
    return mean, rho + (1 - rho) * batches[-1].var(axis=0)


def moving_statistics__all_data(batches, rho):
    """Compute the statistics of all the data together, at once."""
    x = np.concatenate(batches)
    return (1 - rho) * x.mean(axis=0), rho + (1 - rho) * x.var(axis=0)


def moving_statistics__standard_deviation(batches, rho):
    """Average the standard deviation."""
    mean, spread = np.zeros(batches[0].shape[1]), np.ones(batches[0].shape[1])
    for batch in batches:
        mean = rho * mean + (1 - rho) * batch.mean(axis=0)
        spread = rho * spread + (1 - rho) * batch.std(axis=0)
    return mean, spread**2


# ----------------------------------------------------------------------------------- question 4


def fold__rows_scaled(w, b, gamma, beta, mean, variance, epsilon):
    """Scale the inputs of the layer: no error message if it is square."""
    scale = gamma / np.sqrt(variance + epsilon)
    return w * scale[:, None], (b - mean) * scale + beta


def fold__bias_not_scaled(w, b, gamma, beta, mean, variance, epsilon):
    """Add the old bias as it is."""
    scale = gamma / np.sqrt(variance + epsilon)
    return w * scale, b - mean * scale + beta


def fold__bias_lost(w, b, gamma, beta, mean, variance, epsilon):
    """Forget the bias of the dense layer."""
    scale = gamma / np.sqrt(variance + epsilon)
    return w * scale, beta - mean * scale


def fold__epsilon_lost(w, b, gamma, beta, mean, variance, epsilon):
    """Drop epsilon."""
    scale = gamma / np.sqrt(variance)
    return w * scale, (b - mean) * scale + beta


def fold__beta_scaled(w, b, gamma, beta, mean, variance, epsilon):
    """Multiply beta by the scale as well."""
    scale = gamma / np.sqrt(variance + epsilon)
    return w * scale, (b - mean + beta) * scale


def fold__in_place(w, b, gamma, beta, mean, variance, epsilon):
    """Change the weights of the layer that was passed in."""
    scale = gamma / np.sqrt(variance + epsilon)
    w *= scale
    return w, (b - mean) * scale + beta


# ----------------------------------------------------------------------------------- question 5


def clip__global_is_sum_of_norms(gradients, c, rule):
    """Add norms up, where their squares add up."""
    if rule == "value":
        return [np.clip(g, -c, c) for g in gradients]
    norms = [np.linalg.norm(g) for g in gradients]
    if rule == "global_norm":
        norms = [sum(norms)] * len(gradients)
    return [g * (c / max(norm, c)) for g, norm in zip(gradients, norms, strict=True)]


def clip__always_rescaled(gradients, c, rule):
    """Bring every gradient to the norm c, short ones too."""
    if rule == "value":
        return [np.clip(g, -c, c) for g in gradients]
    norms = [max(np.linalg.norm(g), 1e-12) for g in gradients]
    if rule == "global_norm":
        norms = [np.linalg.norm(norms)] * len(gradients)
    return [g * (c / norm) for g, norm in zip(gradients, norms, strict=True)]


def clip__upper_limit_only(gradients, c, rule):
    """Forget negative entries in the rule by value."""
    if rule == "value":
        return [np.minimum(g, c) for g in gradients]
    norms = [np.linalg.norm(g) for g in gradients]
    if rule == "global_norm":
        norms = [np.linalg.norm(norms)] * len(gradients)
    return [g * (c / max(norm, c)) for g, norm in zip(gradients, norms, strict=True)]


def clip__norms_exchanged(gradients, c, rule):
    """Use the one norm where the other is asked for."""
    if rule == "value":
        return [np.clip(g, -c, c) for g in gradients]
    norms = [np.linalg.norm(g) for g in gradients]
    if rule == "norm":
        norms = [np.linalg.norm(norms)] * len(gradients)
    return [g * (c / max(norm, c)) for g, norm in zip(gradients, norms, strict=True)]


def clip__spectral_norm(gradients, c, rule):
    """Measure matrices by their largest singular value, as np.linalg.norm(g, 2) does."""
    if rule == "value":
        return [np.clip(g, -c, c) for g in gradients]
    norms = [np.linalg.norm(g.reshape(-1, g.shape[-1]), 2) for g in gradients]
    if rule == "global_norm":
        norms = [np.linalg.norm(norms)] * len(gradients)
    return [g * (c / max(norm, c)) for g, norm in zip(gradients, norms, strict=True)]


def clip__in_place(gradients, c, rule):
    """Change the gradients that were passed in."""
    norms = [np.linalg.norm(g) for g in gradients]
    if rule == "global_norm":
        norms = [np.linalg.norm(norms)] * len(gradients)
    for g, norm in zip(gradients, norms, strict=True):
        if rule == "value":
            np.clip(g, -c, c, out=g)
        else:
            g *= c / max(norm, c)
    return gradients


def clip__by_column(gradients, c, rule):
    """Clip each column of a matrix by itself."""
    if rule == "value":
        return [np.clip(g, -c, c) for g in gradients]
    if rule == "norm":
        return [g * (c / np.maximum(np.sqrt(np.sum(g**2, axis=0)), c)) for g in gradients]
    norm = np.sqrt(sum(np.sum(g**2) for g in gradients))
    return [g * (c / max(norm, c)) for g in gradients]


# ----------------------------------------------------------------------------------- question 6


def turn__radians(g, c):
    """Return radians."""
    clipped = np.clip(g, -c, c)
    cosine = np.sum(g * clipped) / np.sqrt(np.sum(g**2) * np.sum(clipped**2))
    return np.arccos(np.clip(cosine, -1, 1))


def turn__clipped_by_norm(g, c):
    """Clip by norm: no angle at all."""
    return 0.0


def turn__cosine(g, c):
    """Stop at the cosine."""
    clipped = np.clip(g, -c, c)
    return np.sum(g * clipped) / np.sqrt(np.sum(g**2) * np.sum(clipped**2))


def turn__two_dimensions(g, c):
    """Take the angle in the plane of the first two entries."""
    clipped = np.clip(g, -c, c)
    before, after = np.arctan2(g[1], g[0]), np.arctan2(clipped[1], clipped[0])
    return np.degrees(np.abs(before - after))


def turn__not_normalized(g, c):
    """Divide by one of the lengths only."""
    clipped = np.clip(g, -c, c)
    cosine = np.sum(g * clipped) / np.sum(g**2)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


# ----------------------------------------------------------------------------------- question 7


def threshold__wrong_end(norms, s):
    """Take the share s from below."""
    return np.percentile(norms, 100 * s)


def threshold__fraction_as_percent(norms, s):
    """Pass a fraction to a function that wants per cent."""
    return np.percentile(norms, 1 - s)


def threshold__share_of_maximum(norms, s):
    """Take a fraction of the largest norm, as if they were spread evenly."""
    return (1 - s) * np.max(norms)


def threshold__normal_distribution(norms, s):
    """Assume that the norms are normally distributed."""
    from scipy import stats

    return float(stats.norm.ppf(min(1 - s, 0.999), np.mean(norms), np.std(norms)))


def threshold__sorts_in_place(norms, s):
    """Sort the array that was passed in."""
    norms.sort()
    return norms[max(round((1 - s) * len(norms)) - 1, 0)]


def threshold__one_too_many(norms, s):
    """Be off by one: the step at the threshold is clipped, too."""
    ordered = np.sort(norms)
    return ordered[max(round((1 - s) * len(norms)) - 2, 0)]
