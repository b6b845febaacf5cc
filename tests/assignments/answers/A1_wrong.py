"""Wrong answers to assignment 1. The name says to which question, then what is wrong."""

import math

import numpy as np

# ----------------------------------------------------------------------------------- question 1


def forward__pre_activations(x, weights):
    """Return z of each layer in place of h, although h goes up."""
    outputs, h = [x], x
    for w in weights:
        outputs.append(h @ w)
        h = np.tanh(outputs[-1])
    return outputs


def forward__last_layer_linear(x, weights):
    """Leave out the activation of the top layer, as one does for a softmax."""
    outputs = [x]
    for w in weights[:-1]:
        outputs.append(np.tanh(outputs[-1] @ w))
    return [*outputs, outputs[-1] @ weights[-1]]


def forward__input_missing(x, weights):
    """Begin the list with h^1."""
    outputs, h = [], x
    for w in weights:
        h = np.tanh(h @ w)
        outputs.append(h)
    return outputs


def forward__always_from_the_input(x, weights):
    """Feed the input to every layer: right for one layer."""
    return [x] + [np.tanh(x @ w) for w in weights]


def forward__sigmoid(x, weights):
    """Use the other S-shaped function."""
    outputs = [x]
    for w in weights:
        outputs.append(1 / (1 + np.exp(-outputs[-1] @ w)))
    return outputs


# ----------------------------------------------------------------------------------- question 2


def error_signals__slope_forgotten(outputs, weights, delta_top):
    """Send the signal through the weights only."""
    deltas = [delta_top]
    for w in weights[:0:-1]:
        deltas.insert(0, deltas[0] @ w.T)
    return deltas


def error_signals__not_transposed(outputs, weights, delta_top):
    """Multiply by W: no error message as long as layers are square."""
    deltas = [delta_top]
    for w, h in zip(weights[:0:-1], outputs[-2:0:-1], strict=True):
        deltas.insert(0, (deltas[0] @ w) * (1 - h**2))
    return deltas


def error_signals__slope_of_z(outputs, weights, delta_top):
    """Treat h as z, and apply tanh once more."""
    deltas = [delta_top]
    for w, h in zip(weights[:0:-1], outputs[-2:0:-1], strict=True):
        deltas.insert(0, (deltas[0] @ w.T) * (1 - np.tanh(h) ** 2))
    return deltas


def error_signals__slope_not_squared(outputs, weights, delta_top):
    """Take 1 - h for the slope."""
    deltas = [delta_top]
    for w, h in zip(weights[:0:-1], outputs[-2:0:-1], strict=True):
        deltas.insert(0, (deltas[0] @ w.T) * (1 - h))
    return deltas


def error_signals__slope_of_the_layer_above(outputs, weights, delta_top):
    """Multiply by the slope before the weights: of the wrong layer."""
    deltas = [delta_top]
    for w, h in zip(weights[:0:-1], outputs[:1:-1], strict=True):
        deltas.insert(0, (deltas[0] * (1 - h**2)) @ w.T)
    return deltas


def error_signals__top_down(outputs, weights, delta_top):
    """Return the list from the top to the bottom."""
    deltas = [delta_top]
    for w, h in zip(weights[:0:-1], outputs[-2:0:-1], strict=True):
        deltas.append((deltas[-1] @ w.T) * (1 - h**2))
    return deltas


# ----------------------------------------------------------------------------------- question 3


def glorot_factors__exchanged(n_in, n_out):
    """Count the outputs on the way up and the inputs on the way down."""
    return 2 * n_out / (n_in + n_out), 2 * n_in / (n_in + n_out)


def glorot_factors__rms(n_in, n_out):
    """Return factors of the root mean square."""
    return math.sqrt(2 * n_in / (n_in + n_out)), math.sqrt(2 * n_out / (n_in + n_out))


def glorot_factors__both_kept(n_in, n_out):
    """Believe that Glorot's weights keep both signals."""
    return 1.0, 1.0


def glorot_factors__lecun(n_in, n_out):
    """Use a variance of 1 / n_in."""
    return 1.0, n_out / n_in


# ----------------------------------------------------------------------------------- question 4


def leaky_limit__relu(n_in, alpha):
    """Give He's limit, whatever the slope."""
    return np.sqrt(6 / n_in)


def leaky_limit__standard_deviation(n_in, alpha):
    """Return the standard deviation, not the limit of the uniform distribution."""
    return np.sqrt(2 / ((1 + alpha**2) * n_in))


def leaky_limit__alpha_not_squared(n_in, alpha):
    """Average slopes in place of their squares."""
    return np.sqrt(6 / ((1 + alpha) * n_in))


def leaky_limit__divided_by_square(n_in, alpha):
    """Correct for the leak alone, as if the positive half did not exist."""
    return np.sqrt(6 / n_in) * (1 - alpha**2 / 2)


# ----------------------------------------------------------------------------------- question 5


def self_normalizing__constants_of_selu(v):
    """Return the published constants, for every variance."""
    return 1.6732632423543772, 1.0507009873554805


def self_normalizing__one_alpha(v):
    """Let alpha be 1, as in ELU, and repair the variance only."""
    u = (np.arange(200_000) + 0.5) / 200_000 * 24 - 12
    weight, z = np.exp(-(u**2) / 2), u * math.sqrt(v)
    f = np.where(z > 0, z, np.expm1(np.minimum(z, 0)))
    mean = np.sum(weight * f) / np.sum(weight)
    return 1.0, math.sqrt(v / (np.sum(weight * (f - mean) ** 2) / np.sum(weight)))


def self_normalizing__v_is_the_standard_deviation(v):
    """Take v for the standard deviation of z: the same for v = 1."""

    def below(k):
        return math.exp(k * k * v**2 / 2) * math.erfc(k * v / math.sqrt(2)) / 2

    alpha = v / math.sqrt(2 * math.pi) / (below(0) - below(1))
    square = v**2 / 2 + alpha**2 * (below(2) - 2 * below(1) + below(0))
    return alpha, v / math.sqrt(square)


def self_normalizing__output_of_variance_one(v):
    """Let the outputs have variance 1 in place of v."""

    def below(k):
        return math.exp(k * k * v / 2) * math.erfc(k * math.sqrt(v / 2)) / 2

    alpha = math.sqrt(v / (2 * math.pi)) / (below(0) - below(1))
    square = v / 2 + alpha**2 * (below(2) - 2 * below(1) + below(0))
    return alpha, 1 / math.sqrt(square)


def self_normalizing__root_forgotten(v):
    """Return s squared."""

    def below(k):
        return math.exp(k * k * v / 2) * math.erfc(k * math.sqrt(v / 2)) / 2

    alpha = math.sqrt(v / (2 * math.pi)) / (below(0) - below(1))
    return alpha, v / (v / 2 + alpha**2 * (below(2) - 2 * below(1) + below(0)))


# ----------------------------------------------------------------------------------- question 6


def prelu_backward__mean_over_the_batch(z, alpha, dh):
    """Average over the examples, where the gradient of a shared slope is a sum."""
    negative = z <= 0
    return np.where(negative, alpha, 1.0) * dh, np.mean(np.where(negative, z, 0.0) * dh, axis=0)


def prelu_backward__all_z(z, alpha, dh):
    """Let positive z count in the gradient of the slope."""
    return np.where(z <= 0, alpha, 1.0) * dh, np.sum(z * dh, axis=0)


def prelu_backward__slope_is_one(z, alpha, dh):
    """Forget that z enters: count the gradient where z is negative."""
    negative = z <= 0
    return np.where(negative, alpha, 1.0) * dh, np.sum(np.where(negative, dh, 0.0), axis=0)


def prelu_backward__one_slope_for_all(z, alpha, dh):
    """Add the gradients of all units up, as for a single shared slope."""
    negative = z <= 0
    total = np.sum(np.where(negative, z, 0.0) * dh)
    return np.where(negative, alpha, 1.0) * dh, np.full(alpha.shape, total)


def prelu_backward__relu_below(z, alpha, dh):
    """Send nothing down where z is negative."""
    return (z > 0) * dh, np.sum(np.where(z <= 0, z, 0.0) * dh, axis=0)


def prelu_backward__maximum(z, alpha, dh):
    """Decide by max(z, alpha z), which is another function for slopes above 1 or below 0."""
    leaky = alpha * z > z
    return np.where(leaky, alpha, 1.0) * dh, np.sum(np.where(leaky, z, 0.0) * dh, axis=0)


# ----------------------------------------------------------------------------------- question 7


def dead_fraction__zeros(z):
    """Count single zeros in place of units."""
    return np.mean(z <= 0)


def dead_fraction__any(z):
    """Call a unit dead that is silent for some example."""
    return np.mean(np.any(z <= 0, axis=0))


def dead_fraction__examples(z):
    """Take rows for units."""
    return np.mean(np.all(z <= 0, axis=1))


def dead_fraction__strictly_negative(z):
    """Count a unit at exactly zero as alive."""
    return np.mean(np.all(z < 0, axis=0))


def dead_fraction__negative_mean(z):
    """Look at the mean of z."""
    return np.mean(z.mean(axis=0) <= 0)


def dead_fraction__number(z):
    """Return how many units are dead, not which fraction."""
    return np.sum(np.all(z <= 0, axis=0))
