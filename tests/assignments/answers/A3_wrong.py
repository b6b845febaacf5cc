"""Wrong answers to assignment 3. The name says to which question, then what is wrong."""

import numpy as np

# ----------------------------------------------------------------------------------- question 1


def momentum_step__moving_average(theta, m, g, eta, beta):
    """Weight the gradient by 1 - beta: another form, with other step sizes."""
    m = beta * m - eta * (1 - beta) * g
    return theta + m, m


def momentum_step__old_m(theta, m, g, eta, beta):
    """Move theta by the m of the step before."""
    return theta + m, beta * m - eta * g


def momentum_step__uphill(theta, m, g, eta, beta):
    """Add the gradient to m, and m to theta."""
    m = beta * m + eta * g
    return theta + m, m


def momentum_step__rate_twice(theta, m, g, eta, beta):
    """Multiply by the rate once more when theta moves."""
    m = beta * m - eta * g
    return theta + eta * m, m


def momentum_step__nesterov(theta, m, g, eta, beta):
    """Do the step of Nesterov's method."""
    m = beta * m - eta * g
    return theta + beta * m - eta * g, m


def momentum_step__in_place(theta, m, g, eta, beta):
    """Change the arrays that were passed in."""
    m *= beta
    m -= eta * g
    theta += m
    return theta, m


# ----------------------------------------------------------------------------------- question 2


def nesterov_step__heavy_ball(theta, m, gradient, eta, beta):
    """Measure the gradient where one is."""
    m = beta * m - eta * gradient(theta)
    return theta + m, m


def nesterov_step__whole_momentum(theta, m, gradient, eta, beta):
    """Look ahead by m, not by beta m."""
    m = beta * m - eta * gradient(theta + m)
    return theta + m, m


def nesterov_step__looks_back(theta, m, gradient, eta, beta):
    """Look in the direction from which one comes."""
    m = beta * m - eta * gradient(theta - beta * m)
    return theta + m, m


def nesterov_step__stays_ahead(theta, m, gradient, eta, beta):
    """Start the step from the point ahead, so that momentum counts twice."""
    ahead = theta + beta * m
    m = beta * m - eta * gradient(ahead)
    return ahead + m, m


def nesterov_step__keras_form(theta, m, gradient, eta, beta):
    """Use the re-parametrized form, in which theta is the point ahead."""
    g = gradient(theta)
    m = beta * m - eta * g
    return theta + beta * m - eta * g, m


# ----------------------------------------------------------------------------------- question 3


def adam_step__not_corrected(theta, m, v, g, t, eta=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """Leave out the bias correction."""
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g**2
    return theta - eta * m / (np.sqrt(v) + epsilon), m, v


def adam_step__epsilon_inside(theta, m, v, g, t, eta=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """Put epsilon under the root."""
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g**2
    m_hat, v_hat = m / (1 - beta_1**t), v / (1 - beta_2**t)
    return theta - eta * m_hat / np.sqrt(v_hat + epsilon), m, v


def adam_step__epsilon_hat(theta, m, v, g, t, eta=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """Add epsilon to the uncorrected root, as Keras does."""
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g**2
    rate = eta * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
    return theta - rate * m / (np.sqrt(v) + epsilon), m, v


def adam_step__counts_from_zero(
    theta, m, v, g, t, eta=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7
):
    """Correct by the power t + 1."""
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g**2
    m_hat, v_hat = m / (1 - beta_1 ** (t + 1)), v / (1 - beta_2 ** (t + 1))
    return theta - eta * m_hat / (np.sqrt(v_hat) + epsilon), m, v


def adam_step__first_step_only(
    theta, m, v, g, t, eta=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7
):
    """Correct by 1 - beta at every step: right at the first."""
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g**2
    m_hat, v_hat = m / (1 - beta_1), v / (1 - beta_2)
    return theta - eta * m_hat / (np.sqrt(v_hat) + epsilon), m, v


def adam_step__corrected_returned(
    theta, m, v, g, t, eta=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7
):
    """Hand the corrected averages on to the next step."""
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g**2
    m, v = m / (1 - beta_1**t), v / (1 - beta_2**t)
    return theta - eta * m / (np.sqrt(v) + epsilon), m, v


def adam_step__fixed_settings(theta, m, v, g, t, eta=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """Write the usual numbers in place of the arguments."""
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g**2
    m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
    return theta - eta * m_hat / (np.sqrt(v_hat) + 1e-7), m, v


# ----------------------------------------------------------------------------------- question 4


def two_decays__penalty_without_two(theta, g, eta, lam):
    """Take lambda theta for the gradient of lambda theta squared."""
    return theta - eta * np.sign(g + lam * theta), theta - eta * lam * theta - eta * np.sign(g)


def two_decays__penalty_beside(theta, g, eta, lam):
    """Add the penalty's gradient after the sign: decoupled as well."""
    penalized = theta - eta * (np.sign(g) + 2 * lam * theta)
    return penalized, theta - eta * lam * theta - eta * np.sign(g)


def two_decays__exchanged(theta, g, eta, lam):
    """Return the two in the other order."""
    penalized = theta - eta * np.sign(g + 2 * lam * theta)
    return theta - eta * lam * theta - eta * np.sign(g), penalized


def two_decays__decay_without_rate(theta, g, eta, lam):
    """Let the weights decay by lambda, not by eta lambda."""
    penalized = theta - eta * np.sign(g + 2 * lam * theta)
    return penalized, (1 - lam) * theta - eta * np.sign(g)


def two_decays__one_after_the_other(theta, g, eta, lam):
    """Let the new weights decay, those after the step."""
    penalized = theta - eta * np.sign(g + 2 * lam * theta)
    return penalized, (theta - eta * np.sign(g)) * (1 - eta * lam)


def two_decays__sign_of_the_penalty(theta, g, eta, lam):
    """Use the gradient of an l1 penalty."""
    penalized = theta - eta * np.sign(g + lam * np.sign(theta))
    return penalized, theta - eta * lam * theta - eta * np.sign(g)


# ----------------------------------------------------------------------------------- question 5


def largest_rate__without_oscillation(hessian):
    """Give the rate above which descent begins to oscillate."""
    return 1 / np.linalg.eigvalsh(hessian)[-1]


def largest_rate__smallest_eigenvalue(hessian):
    """Look at the flattest direction."""
    return 2 / np.linalg.eigvalsh(hessian)[0]


def largest_rate__diagonal(hessian):
    """Read the curvature from the diagonal: right if the rest is zero."""
    return 2 / np.max(np.diag(hessian))


def largest_rate__trace(hessian):
    """Add all the eigenvalues up."""
    return 2 / np.trace(hessian)


def largest_rate__fastest(hessian):
    """Give the rate of fastest convergence."""
    values = np.linalg.eigvalsh(hessian)
    return 2 / (values[0] + values[-1])


def largest_rate__last_in_the_list(hessian):
    """Rely on an order that np.linalg.eigvals does not promise."""
    return 2 / np.linalg.eigvals(hessian)[-1]


# ----------------------------------------------------------------------------------- question 6


def warmup_exponential__clock_not_reset(step, eta, w, s):
    """Count the fall from step 0: the rate jumps at the peak."""
    step = np.asarray(step, dtype=float)
    return np.where(step < w, eta * step / w, eta * 0.1 ** (step / s))


def warmup_exponential__natural_base(step, eta, w, s):
    """Fall by a factor e."""
    step = np.asarray(step, dtype=float)
    return np.where(step < w, eta * step / w, eta * np.exp(-(step - w) / s))


def warmup_exponential__one_step_early(step, eta, w, s):
    """Reach the peak one step before."""
    step = np.asarray(step, dtype=float)
    return np.where(step < w, eta * (step + 1) / w, eta * 0.1 ** ((step - w) / s))


def warmup_exponential__product(step, eta, w, s):
    """Multiply both parts, so that the rate falls while it rises."""
    step = np.asarray(step, dtype=float)
    return eta * np.minimum(step / w, 1) * 0.1 ** (step / s)


def warmup_exponential__stairs(step, eta, w, s):
    """Fall in stairs, at the end of every s steps."""
    step = np.asarray(step, dtype=float)
    return np.where(step < w, eta * step / w, eta * 0.1 ** ((step - w) // s))


def warmup_exponential__numbers_only(step, eta, w, s):
    """Compare by if, which an array cannot."""
    if step < w:
        return eta * step / w
    return eta * 0.1 ** ((step - w) / s)


# ----------------------------------------------------------------------------------- question 7


def one_cycle__one_step_late(step, total, p, eta):
    """Reach the end at step T, which never comes."""
    rate = np.interp(step, [0, p, 2 * p, total], [eta / 10, eta, eta / 10, eta / 1000])
    return rate, np.interp(step, [0, p, 2 * p], [0.95, 0.85, 0.95])


def one_cycle__momentum_in_phase(step, total, p, eta):
    """Let the momentum rise with the rate."""
    rate = np.interp(step, [0, p, 2 * p, total - 1], [eta / 10, eta, eta / 10, eta / 1000])
    return rate, np.interp(step, [0, p, 2 * p], [0.85, 0.95, 0.85])


def one_cycle__straight_to_the_end(step, total, p, eta):
    """Go from the peak to the end in one line."""
    rate = np.interp(step, [0, p, total - 1], [eta / 10, eta, eta / 1000])
    return rate, np.interp(step, [0, p, total - 1], [0.95, 0.85, 0.95])


def one_cycle__exponential(step, total, p, eta):
    """Draw lines on a logarithmic scale: the corners are right."""
    logs = np.log(np.array([eta / 10, eta, eta / 10, eta / 1000]))
    rate = np.exp(np.interp(step, [0, p, 2 * p, total - 1], logs))
    return rate, np.interp(step, [0, p, 2 * p], [0.95, 0.85, 0.95])


def one_cycle__slope_goes_on(step, total, p, eta):
    """Keep the slope after 2p: the rate becomes negative, and is cut off at the last value."""
    step = np.asarray(step, dtype=float)
    rate = np.where(step < p, eta / 10 + 0.9 * eta * step / p, eta - 0.9 * eta * (step - p) / p)
    rate = np.maximum(rate, eta / 1000)
    return rate, np.interp(step, [0, p, 2 * p], [0.95, 0.85, 0.95])


def one_cycle__end_of_a_hundredth(step, total, p, eta):
    """End at eta / 100."""
    rate = np.interp(step, [0, p, 2 * p, total - 1], [eta / 10, eta, eta / 10, eta / 100])
    return rate, np.interp(step, [0, p, 2 * p], [0.95, 0.85, 0.95])
