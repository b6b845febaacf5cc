"""Wrong answers to assignment 4. The name says to which question, then what is wrong."""

import numpy as np

# ----------------------------------------------------------------------------------- question 1


def prune__by_layer(weights, s):
    """Rank the weights of each layer by themselves."""
    pruned = []
    for w in weights:
        order = np.argsort(np.abs(w).ravel())
        keep = np.ones(w.size, dtype=bool)
        keep[order[: round(s * w.size)]] = False
        pruned.append(np.where(keep.reshape(w.shape), w, 0.0))
    return pruned


def prune__by_value(weights, s):
    """Rank by value: large negative weights go first."""
    flat = np.concatenate([w.ravel() for w in weights])
    keep = np.ones(len(flat), dtype=bool)
    keep[np.argsort(flat)[: round(s * len(flat))]] = False
    parts = np.split(np.where(keep, flat, 0.0), np.cumsum([w.size for w in weights])[:-1])
    return [part.reshape(w.shape) for part, w in zip(parts, weights, strict=True)]


def prune__share_that_stays(weights, s):
    """Keep the share s."""
    flat = np.concatenate([w.ravel() for w in weights])
    keep = np.ones(len(flat), dtype=bool)
    keep[np.argsort(np.abs(flat))[: round((1 - s) * len(flat))]] = False
    parts = np.split(np.where(keep, flat, 0.0), np.cumsum([w.size for w in weights])[:-1])
    return [part.reshape(w.shape) for part, w in zip(parts, weights, strict=True)]


def prune__fraction_of_the_largest(weights, s):
    """Take s times the largest size for the threshold."""
    limit = s * max(np.max(np.abs(w)) for w in weights)
    return [np.where(np.abs(w) > limit, w, 0.0) for w in weights]


def prune__mask(weights, s):
    """Return masks of ones and zeros."""
    sizes = np.concatenate([np.abs(w).ravel() for w in weights])
    limit = np.sort(sizes)[max(round(s * len(sizes)) - 1, 0)]
    return [(np.abs(w) > limit).astype(float) for w in weights]


def prune__quantile(weights, s):
    """Cut at the quantile and take it along: one weight too many goes at the ends of the range."""
    sizes = np.concatenate([np.abs(w).ravel() for w in weights])
    limit = np.quantile(sizes, s)
    return [np.where(np.abs(w) <= limit, 0.0, w) for w in weights]


def prune__in_place(weights, s):
    """Change the weights that were passed in."""
    sizes = np.concatenate([np.abs(w).ravel() for w in weights])
    limit = np.append(np.sort(sizes), np.inf)[round(s * len(sizes))]
    for w in weights:
        w[np.abs(w) < limit] = 0
    return weights


# ----------------------------------------------------------------------------------- question 2


def sparsity_at__linear(step, s0, s1, t0, t1):
    """Follow a straight line."""
    left = 1 - np.clip((np.asarray(step) - t0) / (t1 - t0), 0, 1)
    return np.where(np.asarray(step) < t0, 0.0, s1 + (s0 - s1) * left)


def sparsity_at__third_power_of_the_time(step, s0, s1, t0, t1):
    """Take the power of the time that has passed: slow at first, where it should be fast."""
    time = np.clip((np.asarray(step) - t0) / (t1 - t0), 0, 1)
    return np.where(np.asarray(step) < t0, 0.0, s0 + (s1 - s0) * time**3)


def sparsity_at__constant_before(step, s0, s1, t0, t1):
    """Start with the sparsity s0 at step 0."""
    left = 1 - np.clip((np.asarray(step) - t0) / (t1 - t0), 0, 1)
    return s1 + (s0 - s1) * left**3


def sparsity_at__goes_on_after(step, s0, s1, t0, t1):
    """Let the formula run on after the end."""
    step = np.asarray(step)
    return np.where(step < t0, 0.0, s1 + (s0 - s1) * (1 - (step - t0) / (t1 - t0)) ** 3)


def sparsity_at__from_step_zero(step, s0, s1, t0, t1):
    """Divide by the last step, not by the duration."""
    step = np.asarray(step)
    left = 1 - np.clip((step - t0) / t1, 0, 1)
    return np.where(step < t0, 0.0, np.where(step >= t1, s1, s1 + (s0 - s1) * left**3))


def sparsity_at__one_step_late(step, s0, s1, t0, t1):
    """Begin after the step t0."""
    step = np.asarray(step)
    left = 1 - np.clip((step - t0) / (t1 - t0), 0, 1)
    return np.where(step <= t0, 0.0, s1 + (s0 - s1) * left**3)


# ----------------------------------------------------------------------------------- question 3


def proximal_step__subgradient(w, g, eta, lam):
    """Step along the subgradient of the penalty: never exactly zero."""
    return w - eta * (g + lam * np.sign(w))


def proximal_step__hard_threshold(w, g, eta, lam):
    """Cut small weights, and leave large ones unshrunk."""
    u = w - eta * g
    return np.where(np.abs(u) <= eta * lam, 0.0, u)


def proximal_step__rate_forgotten(w, g, eta, lam):
    """Take lambda for the threshold, in place of eta lambda."""
    u = w - eta * g
    return np.sign(u) * np.maximum(np.abs(u) - lam, 0)


def proximal_step__threshold_first(w, g, eta, lam):
    """Apply the threshold before the gradient step."""
    return np.sign(w) * np.maximum(np.abs(w) - eta * lam, 0) - eta * g


def proximal_step__sign_of_the_old(w, g, eta, lam):
    """Take the sign before the step, which the gradient may have turned."""
    u = w - eta * g
    return np.sign(w) * np.maximum(np.abs(u) - eta * lam, 0)


def proximal_step__ridge(w, g, eta, lam):
    """Minimize with a square in place of the absolute value."""
    return (w - eta * g) / (1 + eta * lam)


# ----------------------------------------------------------------------------------- question 4


def dropout__not_scaled(h, dout, p, u, training):
    """Forget to divide by 1 - p."""
    if not training:
        return h.copy(), dout.copy()
    return h * (u >= p), dout * (u >= p)


def dropout__keeps_the_dropped(h, dout, p, u, training):
    """Keep the share p: the same for p = 1/2 in expectation only."""
    if not training:
        return h.copy(), dout.copy()
    factor = (u < p) / max(p, 1e-9)
    return h * factor, dout * factor


def dropout__scaled_by_the_rate(h, dout, p, u, training):
    """Divide by p: the same for p = 1/2."""
    if not training:
        return h.copy(), dout.copy()
    factor = (u >= p) / (p if p else 1)
    return h * factor, dout * factor


def dropout__gradient_not_masked(h, dout, p, u, training):
    """Send the gradient to all entries."""
    if not training:
        return h.copy(), dout.copy()
    return h * (u >= p) / (1 - p), dout / (1 - p)


def dropout__gradient_not_scaled(h, dout, p, u, training):
    """Mask the gradient only."""
    if not training:
        return h.copy(), dout.copy()
    return h * (u >= p) / (1 - p), dout * (u >= p)


def dropout__scaled_in_inference(h, dout, p, u, training):
    """Multiply by 1 - p in inference: the older form of dropout."""
    if not training:
        return h * (1 - p), dout * (1 - p)
    return h * (u >= p), dout * (u >= p)


def dropout__always_on(h, dout, p, u, training):
    """Ignore the last argument."""
    factor = (u >= p) / (1 - p)
    return h * factor, dout * factor


# ----------------------------------------------------------------------------------- question 5


def max_norm__rows(w, r):
    """Limit the outgoing weights of each input."""
    norms = np.sqrt(np.sum(w**2, axis=1, keepdims=True))
    return w * (r / np.maximum(norms, r))


def max_norm__whole_matrix(w, r):
    """Limit the norm of the whole matrix."""
    return w * (r / max(np.sqrt(np.sum(w**2)), r))


def max_norm__always(w, r):
    """Bring every unit to the norm r, small ones too."""
    return w * (r / np.maximum(np.sqrt(np.sum(w**2, axis=0)), 1e-12))


def max_norm__entries(w, r):
    """Clip single weights."""
    return np.clip(w, -r, r)


def max_norm__in_place(w, r):
    """Change the weights that were passed in."""
    w *= r / np.maximum(np.sqrt(np.sum(w**2, axis=0)), r)
    return w


def max_norm__all_if_one(w, r):
    """Scale all units by the factor of the largest."""
    return w * (r / max(np.max(np.sqrt(np.sum(w**2, axis=0))), r))


# ----------------------------------------------------------------------------------- question 6


def penalized_step__without_two(w, b, dw, db, eta, lam):
    """Take lambda w for the gradient of lambda w squared."""
    return w - eta * (dw + lam * w), b - eta * db, lam


def penalized_step__biases_too(w, b, dw, db, eta, lam):
    """Penalize the biases as well."""
    return w - eta * (dw + 2 * lam * w), b - eta * (db + 2 * lam * b), 2 * lam


def penalized_step__kappa_with_rate(w, b, dw, db, eta, lam):
    """Put the rate into kappa, where it is already in the rule."""
    return w - eta * (dw + 2 * lam * w), b - eta * db, 2 * eta * lam


def penalized_step__kappa_is_lambda(w, b, dw, db, eta, lam):
    """Believe that the two strengths are one number."""
    return w - eta * (dw + 2 * lam * w), b - eta * db, lam


def penalized_step__l1(w, b, dw, db, eta, lam):
    """Use the gradient of the absolute values."""
    return w - eta * (dw + lam * np.sign(w)), b - eta * db, 2 * lam


def penalized_step__mean(w, b, dw, db, eta, lam):
    """Average the penalty over the weights, where it is a sum."""
    return w - eta * (dw + 2 * lam * w / w.size), b - eta * db, 2 * lam / w.size


# ----------------------------------------------------------------------------------- question 7


def freezing_plan__all_unfrozen(kinds, k, j, eta):
    """Unfreeze all of the reused layers."""
    first = [eta if i >= k else 0.0 for i in range(len(kinds))]
    second = [0.0 if i < k and kind == "batch_norm" else eta / 10 for i, kind in enumerate(kinds)]
    return first, second


def freezing_plan__same_rate(kinds, k, j, eta):
    """Keep the rate after unfreezing."""
    first = [eta if i >= k else 0.0 for i in range(len(kinds))]
    second = [
        eta if i >= k or (i >= k - j and kind != "batch_norm") else 0.0
        for i, kind in enumerate(kinds)
    ]
    return first, second


def freezing_plan__lowest_unfrozen(kinds, k, j, eta):
    """Unfreeze the lowest j layers."""
    first = [eta if i >= k else 0.0 for i in range(len(kinds))]
    second = [
        eta / 10 if i >= k or (i < j and kind != "batch_norm") else 0.0
        for i, kind in enumerate(kinds)
    ]
    return first, second


def freezing_plan__batch_norm_trained(kinds, k, j, eta):
    """Treat reused batch normalization as any other layer."""
    first = [eta if i >= k else 0.0 for i in range(len(kinds))]
    return first, [eta / 10 if i >= k - j else 0.0 for i in range(len(kinds))]


def freezing_plan__all_batch_norm_frozen(kinds, k, j, eta):
    """Freeze new layers of batch normalization, too."""
    frozen = [kind == "batch_norm" for kind in kinds]
    first = [eta if i >= k and not frozen[i] else 0.0 for i in range(len(kinds))]
    return first, [eta / 10 if i >= k - j and not frozen[i] else 0.0 for i in range(len(kinds))]


def freezing_plan__only_reused_lowered(kinds, k, j, eta):
    """Lower the rate of the reused layers only."""
    first = [eta if i >= k else 0.0 for i in range(len(kinds))]
    second = [
        eta if i >= k else eta / 10 if i >= k - j and kind != "batch_norm" else 0.0
        for i, kind in enumerate(kinds)
    ]
    return first, second


def freezing_plan__counts_dense_layers(kinds, k, j, eta):
    """Count j dense layers, and skip batch normalization in the count."""
    first = [eta if i >= k else 0.0 for i in range(len(kinds))]
    dense = [i for i in range(k) if kinds[i] != "batch_norm"]
    upper = set(dense[max(len(dense) - j, 0) :])
    return first, [eta / 10 if i >= k or i in upper else 0.0 for i in range(len(kinds))]
