"""Train many small dense networks at once: a fleet, in one compiled graph.

A comparison needs many runs, and deep networks take seconds to compile, however small they are.
Here the weights of layer l of all networks are one array of shape (networks, inputs, units): a
step of a hundred networks is a few large operations instead of a hundred times as many small ones,
and one compilation serves all seeds, learning rates and scales of the weights. A call makes many
steps, and each core has its share of the networks.

The price is generality: dense classifiers, gradient descent with or without momentum, and Adam.
Whatever needs a Keras model (other layers, optimizers, callbacks) is for `experiments.compare`;
`experiments.compare_fleets` makes the same comparison with fleets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import functools
import itertools
import threading
from typing import NamedTuple

from ch11lib import training
from ch11lib.backend import tf, trim_memory, xla_allowed
import joblib
import numpy as np
from numpy.typing import ArrayLike
import pandas as pd
from scipy import special

__all__ = ["Fleet", "per_core"]


class Fleet:
    """Many small dense classifiers of one architecture, which train side by side in one graph.

    The networks do not influence each other: each has a seed, a learning rate, a scale of its
    weights and a momentum of its moving statistics, in all combinations of what is given. Networks
    of the same seed start from the same weights, up to the scale, and see the same batches in the
    same order, also in another fleet. They learn by gradient descent on the cross-entropy, plain or
    with momentum, or by Adam. Weights can be held at zero: `mask`.

    Hidden weights are normal with standard deviation ``scale * sqrt(gain / inputs)``; the output
    layer has gain 1, and no scale. Biases and beta start at 0, gamma at 1. A normalized layer has
    no other bias than beta.

    Parameters
    ----------
    depth, width : int
        Number of hidden layers, and units of each.
    seeds, rates, scales, momenta : sequence of numbers
        See above.
    activation : str or callable
        Name of a function of `tf.nn`, or a function of a tensor.
    gain : float
        2 for He weights, 1 for LeCun weights.
    norm : None, "batch" or "layer"
        Batch normalization and its two kinds of statistics, or layer normalization, or none.
    after : bool
        Normalize after the activation instead of before it.
    group : int, optional
        In training, take the statistics over groups of so many examples instead of the whole batch,
        whose size it must divide. So the size of the normalized batch can be changed and that of
        the training batch kept (Hoffer et al. 2017, arXiv:1705.08741).
    skip : bool
        Add the input of each hidden layer but the first to its output, which is multiplied by a
        learned gate per unit that starts at 0 (De and Smith 2020, arXiv:2002.10444).
    inputs, classes : int
    epsilon : float
        Added to the variance in the normalizations.
    schedule : callable, optional
        ``schedule(t)`` returns what the rates are multiplied by at the steps t, an array of ints
        that counts from 0: of shape ``t.shape``, or ``(len(t), networks)``.
    inertia : float or callable
        Momentum of the steps, ``m ← β m - η g, w ← w + m``, or a function of the steps that returns
        it. 0, the default, is plain gradient descent.
    adam : bool
        Take the steps of Keras's Adam with its default betas and epsilon; `inertia` has no effect.
    factors : sequence of float, optional
        What the rates are multiplied by in each layer from the bottom, ``depth + 1`` numbers: 0
        freezes a layer, small ones keep it near its start (Howard and Ruder 2018,
        arXiv:1801.06146).

    Attributes
    ----------
    settings : pandas.DataFrame
        One row per network: ``scale``, ``rate``, ``momentum``, ``seed``.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((200, 4))
    >>> y = (x[:, 0] > 0).astype(int)
    >>> fleet = Fleet(2, 8, seeds=[0, 1], rates=[0.1, 1.0], norm="batch", inputs=4, classes=2)
    >>> losses = fleet.train(x, y, steps=40, batch_size=20)
    >>> losses.shape  # (steps, networks)
    (40, 4)
    >>> table = fleet.evaluate(x, y)
    >>> table[["rate", "seed"]].values.tolist()
    [[0.1, 0.0], [0.1, 1.0], [1.0, 0.0], [1.0, 1.0]]
    >>> bool((table.accuracy > 0.8).all())
    True
    """

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        seeds: Sequence[int],
        rates: Sequence[float],
        scales: Sequence[float] = (1.0,),
        momenta: Sequence[float] = (0.9,),
        activation: str | Callable = "relu",
        gain: float = 2.0,
        norm: str | None = None,
        after: bool = False,
        group: int | None = None,
        skip: bool = False,
        inputs: int = 784,
        classes: int = 10,
        epsilon: float = 1e-3,
        schedule: Callable | None = None,
        inertia: float | Callable = 0.0,
        adam: bool = False,
        factors: Sequence[float] | None = None,
    ):
        if norm not in (None, "batch", "layer"):
            raise ValueError(f"norm must be None, 'batch' or 'layer', received {norm!r}")
        if not callable(activation if callable(activation) else getattr(tf.nn, activation, None)):
            raise ValueError(
                "activation must be a function or the name of one of tf.nn, "
                f"received {activation!r}"
            )
        for name, value in {"depth": depth, "width": width}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, received {value}")
        if factors is not None and len(factors) != depth + 1:
            raise ValueError(
                f"factors must be one number for each of the {depth + 1} layers, received {factors}"
            )
        settings = {"scale": scales, "rate": rates, "momentum": momenta, "seed": seeds}
        for name, values in settings.items():
            if not len(values):
                raise ValueError(f"each network needs a {name}, received none")
        grid = itertools.product(*settings.values())
        self.settings = pd.DataFrame(grid, columns=list(settings))
        self._kind = _Kind(norm, after, group, activation, epsilon, adam)
        self._steps, self._schedule = 0, schedule
        self._inertia = inertia if callable(inertia) else lambda t: np.full(len(t), inertia)
        starts = {seed: _start(inputs, width, depth, classes, gain, seed) for seed in seeds}
        starts = [starts[seed] for seed in self.settings.seed]
        first, hidden, last = (np.stack(w, axis=-3) for w in zip(*starts, strict=True))
        networks, scale = len(starts), self._each("scale")

        def layers(weights, *shape, gates=False):
            vector = (*shape, networks, 1, width)
            layer = {"w": weights * scale, "shift": np.zeros(vector)}
            layer |= {"gamma": np.ones(vector)} if norm else {}
            return layer | ({"gate": np.zeros(vector)} if gates else {})

        def tensors(arrays):
            return tf.nest.map_structure(lambda a: tf.constant(a, tf.float32), arrays)

        self._parameters = tensors(
            {
                "first": layers(first),
                "hidden": layers(hidden, depth - 1, gates=skip),
                "last": {"w": last, "shift": np.zeros((networks, 1, classes))},
            }
        )
        self._moving = {}
        if norm == "batch":
            shapes = {"first": (networks, 1, width), "hidden": (depth - 1, networks, 1, width)}
            self._moving = tensors({k: (np.zeros(s), np.ones(s)) for k, s in shapes.items()})
        self._velocity = {}
        if adam or callable(inertia) or inertia:
            self._velocity = tf.nest.map_structure(tf.zeros_like, self._parameters)
        self._squares = self._velocity if adam else {}
        self._masks: dict[str, tf.Tensor] = {}
        self._factors: dict[str, tf.Tensor] = {}
        if factors is not None:
            first, *hidden, last = np.reshape(factors, (-1, 1, 1, 1))
            hidden = np.reshape(hidden, (-1, 1, 1, 1))
            self._factors = tensors({"first": first, "hidden": hidden, "last": last})

    def _each(self, column: str) -> np.ndarray:
        """Return a setting of every network so that it broadcasts against their weights."""
        return self.settings[column].to_numpy(np.float32).reshape(-1, 1, 1)

    def start_from(self, weights: Mapping[int, Sequence[np.ndarray]]) -> None:
        """Let networks start from given weights, such as those of a pretrained Keras model.

        Call it before `train`. Rates, seeds and batches stay as they are.

        Parameters
        ----------
        weights : mapping of int to list of arrays
            Seed to kernel and bias of the lowest layers, as ``get_weights()`` returns them: of as
            many as there are, the same number for all seeds. The layers above stay as they were
            drawn.

        Raises
        ------
        ValueError
            If the fleet has normalization or gates, a seed is missing or a shape is wrong.

        Examples
        --------
        >>> fleet = Fleet(1, 2, seeds=[0], rates=[0.1], inputs=2, classes=2)
        >>> fleet.start_from({0: [np.eye(2), np.zeros(2), np.ones((2, 2)), np.zeros(2)]})
        >>> fleet.outputs([[3.0, -1.0]]).tolist()
        [[[3.0, 3.0]]]
        """
        parts = self._parameters
        if "gamma" in parts["first"] or "gate" in parts["hidden"]:
            raise ValueError("start_from must be used with plain layers: no norm, no skip")
        expected = [shape for w in self.kernels() for shape in (w.shape[1:], w.shape[2:])]
        networks = []
        for seed in self.settings.seed:
            if seed not in weights:
                raise ValueError(f"weights must have every seed of the fleet, {seed} is missing")
            networks.append([np.asarray(w, np.float32) for w in weights[seed]])
            found = [w.shape for w in networks[-1]]
            if len(found) % 2 or len(found) != len(networks[0]) or found != expected[: len(found)]:
                raise ValueError(
                    f"weights must have shapes {expected}, or the first of them, and equally many "
                    f"for all seeds; received {found} for seed {seed}"
                )
        arrays = tf.nest.map_structure(np.array, parts)
        layers = [("first", ...), *(("hidden", i) for i in range(len(expected) // 2 - 2))]
        layers.append(("last", ...))
        for i, given in enumerate(zip(*networks, strict=True)):
            part, at = layers[i // 2]
            if i % 2:
                arrays[part]["shift"][at] = np.stack(given)[:, None]
            else:
                arrays[part]["w"][at] = np.stack(given)
        self._parameters = tf.nest.map_structure(tf.constant, arrays)

    def kernels(self) -> list[np.ndarray]:
        """Return the weights of all layers from the bottom, each ``(networks, inputs, units)``."""
        parts = self._parameters
        return [w.numpy() for w in (parts["first"]["w"], *parts["hidden"]["w"], parts["last"]["w"])]

    def mask(self, masks: Sequence[ArrayLike]) -> None:
        """Set weights to zero, and hold these zeros in later training.

        Parameters
        ----------
        masks : list of arrays
            For every layer from the bottom, what to keep: booleans in the shapes of `kernels`. They
            replace the masks of an earlier call, whose zeros may then change again.

        Examples
        --------
        >>> fleet = Fleet(1, 2, seeds=[0, 1], rates=[0.1], inputs=2, classes=2)
        >>> fleet.mask([abs(w) > 0.5 for w in fleet.kernels()])
        >>> all((abs(w[w != 0]) > 0.5).all() for w in fleet.kernels())
        True
        """
        expected, found = [w.shape for w in self.kernels()], [np.shape(m) for m in masks]
        if found != expected:
            raise ValueError(f"masks must have shapes {expected}, received {found}")
        first, *hidden, last = (np.asarray(m, np.float32) for m in masks)
        hidden = np.stack(hidden) if hidden else self._parameters["hidden"]["w"]
        self._masks = {
            n: tf.constant(m) for n, m in zip(_PARTS, (first, hidden, last), strict=True)
        }
        self._parameters = _masked(self._parameters, self._masks)

    def train(
        self,
        x: ArrayLike | Mapping[int, ArrayLike],
        y: ArrayLike | Mapping[int, ArrayLike],
        *,
        steps: int,
        batch_size: int = 32,
        rows: Mapping[int, ArrayLike] | None = None,
        at_once: int | None = None,
    ) -> np.ndarray:
        """Train all networks for some steps; a later call goes on where this one ended.

        Parameters
        ----------
        x : array of shape (n, inputs), or mapping of seed to such an array
            The data of all networks; or of each seed, equally many.
        y : array of int, shape (n,), or mapping of seed to such an array
        steps, batch_size : int
            In every epoch the ``n // batch_size`` full batches of `training.batch_order` are used.
        rows : mapping of int to array of int, optional
            The examples that each seed learns from, by their numbers in `x`: n of them for every
            seed, of which some may occur repeatedly. Without it, all of `x`.
        at_once : int, optional
            How many networks one compiled function trains; by default `per_core` of all. Fleets of
            one architecture that train equally many at once need to be compiled only once.

        Returns
        -------
        numpy.ndarray, shape (steps, networks)
            The loss on every batch, before the step that it led to.
        """
        at_once = per_core(len(self.settings)) if at_once is None else at_once
        for name, value in {"steps": steps, "at_once": at_once}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, received {value}")
        x, y, n, offset = self._joined(x, y)
        if rows is not None:
            own = {seed: np.asarray(rows[seed]) for seed in self.settings.seed if seed in rows}
            all_rows, n = range(n), len(next(iter(own.values()), ()))
            for seed in self.settings.seed:
                found = own.get(seed, np.empty(0))
                if found.shape != (n,) or not np.isin(found, all_rows).all() or not n:
                    raise ValueError(
                        f"rows must have equally many numbers below {len(all_rows)} for every seed "
                        f"of the fleet, received {rows.get(seed)} for seed {seed}"
                    )
        per_epoch = n // batch_size
        if per_epoch < 1 or batch_size % (self._kind.group or 1):
            raise ValueError(
                f"batch_size must be at most the number of examples, {n}, and a multiple of "
                f"group, {self._kind.group}, received {batch_size}"
            )
        epochs = range(self._steps // per_epoch, -(-(self._steps + steps) // per_epoch))
        start = self._steps - epochs.start * per_epoch

        def batches(seed):
            orders = [training.batch_order(n, seed, epoch) for epoch in epochs]
            chosen = np.concatenate([order[: per_epoch * batch_size] for order in orders])
            chosen = chosen if rows is None else own[seed][chosen].astype(np.int32)
            return chosen.reshape(-1, batch_size)[start : start + steps] + offset.get(seed, 0)

        of_seed = {seed: batches(seed) for seed in set(self.settings.seed)}
        order = np.stack([of_seed[seed] for seed in self.settings.seed], axis=1)
        t = np.arange(self._steps, self._steps + steps)
        of_steps = self._of_steps(t)
        if self._kind.adam:  # the correction of the bias of both averages
            of_steps *= (np.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1)))[:, None, None, None]
        rates = np.asarray(self._each("rate") * of_steps, np.float32)
        betas = np.asarray(self._inertia(t), np.float32)
        state = self._parameters, self._moving, self._velocity, self._squares
        fixed = self._masks, tf.constant(self._each("momentum"))
        compiled, stop = _compiled_steps(self._kind), threading.Event()
        losses = np.empty((steps, len(self.settings)), np.float32)

        def run(part):
            """Train some of the networks; return their state."""
            own, (masks, momenta) = _some((state, fixed), part)
            with _setting_on_error(stop):
                for i in range(0, steps, _STEPS_AT_ONCE):
                    now = slice(i, i + _STEPS_AT_ONCE)
                    count = len(betas[now])
                    per_step = (
                        _filled(a) for a in (order[now, part], rates[now, part], betas[now])
                    )
                    arguments = own, x, y, *per_step, tf.constant(count), momenta, masks
                    loss, own = compiled(*arguments, self._factors)
                    losses[now, part] = loss.numpy()[:count]
                    if stop.is_set():
                        break
            return own

        parts = _equal_parts(len(self.settings), at_once)
        with ThreadPoolExecutor(min(len(parts), _cores())) as threads, _setting_on_error(stop):
            ended = list(threads.map(run, parts))
        n = len(self.settings)
        joined = tf.nest.map_structure(lambda *a: tf.concat(a, axis=-3)[..., :n, :, :], *ended)
        self._parameters, self._moving, self._velocity, self._squares = joined
        self._steps += steps
        trim_memory()
        return losses

    def _of_steps(self, t):
        """Return what multiplies the rates at the steps t, ``(len(t), networks or 1, 1, 1)``."""
        given = np.ones(len(t)) if self._schedule is None else self._schedule(t)
        given = np.array(given, np.float64)
        if given.shape not in ((len(t),), (len(t), len(self.settings))):
            raise ValueError(
                f"schedule must return one number per step (and network), received shape "
                f"{given.shape} for {len(t)} steps and {len(self.settings)} networks"
            )
        return given.reshape(len(t), -1, 1, 1)

    def _joined(self, x, y):
        """Return all data as tensors, the number of examples, and where each seed's own begin."""
        offset = {}
        if isinstance(x, Mapping) or isinstance(y, Mapping):
            seeds = list(dict.fromkeys(self.settings.seed))
            if not (isinstance(x, Mapping) and isinstance(y, Mapping)):
                raise ValueError("x and y must both be arrays or both mappings of seeds to arrays")
            if missing := [seed for seed in seeds if seed not in x or seed not in y]:
                raise ValueError(
                    f"x and y must have every seed of the fleet, {missing} are missing"
                )
            sizes = {len(part[seed]) for part in (x, y) for seed in seeds}
            if len(sizes) > 1:
                raise ValueError(f"x and y must have equally many examples, received {sizes}")
            offset = {seed: i * len(x[seed]) for i, seed in enumerate(seeds)}
            n = len(x[seeds[0]])
            x, y = (np.concatenate([part[seed] for seed in seeds]) for part in (x, y))
        else:
            n = len(x)
        return tf.constant(x, tf.float32), tf.constant(y, tf.int32), n, offset

    def outputs(self, x: ArrayLike, *, training: bool = False) -> np.ndarray:
        """Return the logits of all networks, ``(networks, n, classes)``.

        Parameters
        ----------
        x : array of shape (n, inputs)
        training : bool
            Whether batch normalization uses the statistics of `x` (in groups, if there is a
            `group`) instead of its moving ones.
        """
        x = tf.constant(x, tf.float32)[None]
        return _forward(self._kind, self._parameters, self._moving, x, training)[0].numpy()

    def evaluate(self, x: ArrayLike, y: ArrayLike, *, training: bool = False) -> pd.DataFrame:
        """Return ``loss`` and ``accuracy`` of every network, beside its settings.

        A network whose outputs are no longer finite has an infinite loss and accuracy 0.
        """
        x, y = np.asarray(x), np.asarray(y)
        part = len(x) if training else self._that_fit(len(self.settings))
        losses, right, finite = [], [], True
        for i in range(0, len(x), part):
            outputs = self.outputs(x[i : i + part], training=training)
            finite &= np.isfinite(outputs).all(axis=(1, 2))
            own = y[None, i : i + part, None]
            likelihood = special.log_softmax(np.nan_to_num(outputs), axis=-1)
            losses.append(-np.take_along_axis(likelihood, own, axis=-1)[..., 0])
            right.append(outputs.argmax(axis=-1) == own[..., 0])
        loss, accuracy = (np.concatenate(v, axis=1).mean(axis=1) for v in (losses, right))
        return self.settings.assign(
            loss=np.where(finite, loss, np.inf), accuracy=np.where(finite, accuracy, 0.0)
        )

    def _that_fit(self, others, layers=1):
        """Return how many examples (or networks) to treat at once beside so many of the others."""
        units = self._parameters["first"]["w"].shape[-1]
        return max(1, _ACTIVATIONS_AT_ONCE // (units * others * layers))

    def error_signals(self, x: ArrayLike, y: ArrayLike) -> np.ndarray:
        """Return the root mean square of dL/dz of every hidden layer, ``(networks, layers)``.

        In training mode; z is what the activation receives, and L the mean loss over the batch.
        """
        x, y = tf.constant(x, tf.float32)[None], tf.constant(y, tf.int32)[None]
        # The tape holds every layer of so many networks.
        part = self._that_fit(len(x[0]), layers=1 + len(self._parameters["hidden"]["w"]))
        numbers = np.arange(len(self.settings))
        errors = [self._error_signals(x, y, numbers[i : i + part]) for i in numbers[::part]]
        trim_memory()
        return np.concatenate(errors)

    def _error_signals(self, x, y, networks):
        """Return `error_signals` of some of the networks."""
        parameters, moving = _some((self._parameters, self._moving), networks)
        nudges = [
            tf.repeat(tf.zeros_like(parameters[name]["shift"]), len(x[0]), axis=-2)
            for name in ("first", "hidden")
        ]
        with tf.GradientTape() as tape:
            tape.watch(nudges)  # something that is added to z has the gradient of z
            for name, nudge in zip(("first", "hidden"), nudges, strict=True):
                parameters[name] = parameters[name] | {"nudge": nudge}
            logits, _ = _forward(self._kind, parameters, moving, x, True)
            loss = tf.reduce_sum(_cross_entropy(y, logits))
        first, hidden = tape.gradient(loss, nudges, unconnected_gradients="zero")
        errors = np.concatenate([first[None], hidden])
        return np.sqrt(np.mean(errors**2, axis=(2, 3))).T


_PARTS = ("first", "hidden", "last")

# A layer's outputs take 4 bytes each, and a step of it makes several arrays of that size.
_ACTIVATIONS_AT_ONCE = 2_000_000


class _Kind(NamedTuple):
    """What is built into the graph of a fleet."""

    norm: str | None
    after: bool
    group: int | None
    activation: str | Callable
    epsilon: float
    adam: bool

    def layer(self, h, parameters, moving):
        """Return what a hidden layer makes of h, and the statistics it normalized by, if any."""
        z, statistics = h @ parameters["w"], ()
        if self.norm is None:
            z += parameters["shift"]
        elif not self.after:
            z, statistics = self._normalized(z, parameters, moving)
        f = self.activation if callable(self.activation) else getattr(tf.nn, self.activation)
        out = f(z + parameters.get("nudge", 0.0))
        if self.norm is not None and self.after:
            out, statistics = self._normalized(out, parameters, moving)
        return (h + parameters["gate"] * out if "gate" in parameters else out), statistics

    def _normalized(self, z, parameters, moving):
        shape, axis = tf.shape(z), 1 if self.norm == "batch" else 2
        if not moving and self.norm == "batch" and self.group:
            z, axis = tf.reshape(z, (shape[0], -1, self.group, z.shape[2])), 2
        mean = moving[0] if moving else tf.reduce_mean(z, axis, keepdims=True)
        z -= mean
        variance = moving[1] if moving else tf.reduce_mean(z * z, axis, keepdims=True)
        z = tf.reshape(z * tf.math.rsqrt(variance + self.epsilon), shape)
        statistics = ()
        if self.norm == "batch":
            by_group = len(mean.shape) == 4
            statistics = tuple(tf.reduce_mean(s, 1) if by_group else s for s in (mean, variance))
        return z * parameters["gamma"] + parameters["shift"], statistics


def _start(inputs, width, depth, classes, gain, seed):
    """Return the initial weights of one network: first layer, other hidden layers, output layer."""
    shapes = (inputs, width), (depth - 1, width, width), (width, classes)
    rng = np.random.default_rng(seed)
    first, hidden, last = (rng.standard_normal(shape) / np.sqrt(shape[-2]) for shape in shapes)
    return np.sqrt(gain) * first, np.sqrt(gain) * hidden, last


@contextlib.contextmanager
def _setting_on_error(event):
    """Set an event if the ``with`` block is left by an error or by Ctrl-C."""
    try:
        yield
    except BaseException:
        event.set()
        raise


def _some(arrays, networks):
    """Return the arrays, which may be nested, of some of the networks, by their numbers."""
    return tf.nest.map_structure(lambda array: tf.gather(array, networks, axis=-3), arrays)


def _cores():
    return 1 if tf.config.list_physical_devices("GPU") else joblib.cpu_count()


def per_core(networks: int) -> int:
    """Return how many of so many networks each core has to train.

    Examples
    --------
    >>> per_core(1)
    1
    """
    return -(-networks // _cores())


def _equal_parts(networks, at_once):
    """Return the numbers of the networks that train at once, equally many in all parts.

    Parts train in threads: the operations of one step are too small to keep several cores busy. To
    make the parts equal, so that one compiled function serves all, some networks train twice.
    """
    size = min(at_once, networks)
    return [np.arange(i, i + size) % networks for i in range(0, networks, size)]


def _masked(parameters, masks):
    """Return the parameters with weights of zero where a mask is zero."""
    return parameters | {
        part: parameters[part] | {"w": parameters[part]["w"] * mask} for part, mask in masks.items()
    }


def _cross_entropy(y, logits):
    """Return the mean over the batch, per network."""
    y = tf.broadcast_to(y, tf.shape(logits)[:2])
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits), axis=1)


def _forward(kind, parameters, moving, x, training):
    """Return the logits and the batch statistics of all layers."""
    used = {"first": (), "hidden": ()} if training or not moving else moving
    h, first = kind.layer(x, parameters["first"], used["first"])
    depth = parameters["hidden"]["w"].shape[0]
    seen = tuple(tf.TensorArray(tf.float32, depth, element_shape=s.shape) for s in first)

    def layer(i, h, seen):
        own, own_moving = tf.nest.map_structure(
            lambda v: v[i], (parameters["hidden"], used["hidden"])
        )
        h, statistics = kind.layer(h, own, own_moving)
        return i + 1, h, tuple(a.write(i, s) for a, s in zip(seen, statistics, strict=True))

    if depth:  # XLA cannot take a slice of nothing, not even never
        _, h, seen = tf.while_loop(
            lambda i, *_: i < depth, layer, (0, h, seen), maximum_iterations=depth
        )
    logits = h @ parameters["last"]["w"] + parameters["last"]["shift"]
    if not moving:
        return logits, {}
    hidden = tuple(array.stack() for array in seen) if depth else moving["hidden"]
    return logits, {"first": first, "hidden": hidden}


# Calling a compiled function takes longer than a step of a small fleet.
_STEPS_AT_ONCE = 31


def _filled(array):
    """Return what is needed in each step, for as many steps as one call makes."""
    missing = _STEPS_AT_ONCE - len(array)
    return tf.constant(np.concatenate([array, np.repeat(array[:1], missing, axis=0)]))


@functools.lru_cache(maxsize=4)  # a compiled function takes some 10 MB
def _compiled_steps(kind):
    """Return a function that makes some training steps of fleets of one kind.

    XLA compiles the loops over steps and layers once, however many there are.
    """
    each = tf.nest.map_structure

    @functools.partial(tf.function, autograph=False, jit_compile=xla_allowed())
    def run(state, x, y, rows, rates, betas, count, momenta, masks, factors):
        def step(i, losses, state):
            parameters, moving, velocity, squares = state
            with tf.GradientTape() as tape:
                tape.watch(parameters)
                logits, seen = _forward(kind, parameters, moving, tf.gather(x, rows[i]), True)
                loss = _cross_entropy(tf.gather(y, rows[i]), logits)
            # No network's loss depends on another; with depth 1 nothing depends on "hidden".
            slopes = tape.gradient(loss, parameters, unconnected_gradients="zero")

            def step_of(part, direction):
                rate = rates[i] * factors[part] if factors else rates[i]
                return each(lambda a: -rate * a, direction)

            if kind.adam:
                velocity = each(lambda m, g: m + 0.1 * (g - m), velocity, slopes)
                squares = each(lambda s, g: s + 0.001 * (g * g - s), squares, slopes)
                slopes = each(lambda m, s: m / (tf.sqrt(s) + 1e-7), velocity, squares)
            moves = {part: step_of(part, slopes[part]) for part in _PARTS}
            if velocity and not kind.adam:
                moves = velocity = each(lambda m, d: betas[i] * m + d, velocity, moves)
            parameters = each(tf.add, parameters, moves)
            parameters = _masked(parameters, masks)
            moving = each(lambda m, s: momenta * m + (1 - momenta) * s, moving, seen)
            return i + 1, losses.write(i, loss), (parameters, moving, velocity, squares)

        losses = tf.TensorArray(tf.float32, _STEPS_AT_ONCE, element_shape=momenta.shape[:1])
        begin = (0, losses, tuple(state))
        _, losses, state = tf.while_loop(lambda i, *_: i < count, step, begin)
        return losses.stack(), state

    run._omit_frequent_tracing_warning = True  # a comparison has fleets of many shapes
    return run


training.forget_elsewhere.append(_compiled_steps.cache_clear)
