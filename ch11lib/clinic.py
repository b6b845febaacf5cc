"""Training runs that are healthy, or sick in a known way: cases on which a diagnosis can be tested.

`patient` draws a sound recipe (architecture, optimizer, learning rate), spoils one thing, trains
the network for a few epochs and hands over what a doctor gets to see: the model, its history and a
part of the training data, just as the model was fed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
import functools
from typing import NamedTuple
import zlib

from ch11lib import training
from ch11lib.backend import keras
from ch11lib.datasets import Dataset
from ch11lib.experiments import DenseNet
import joblib
import numpy as np

__all__ = ["DISEASES", "Patient", "patient", "patients"]


class Patient(NamedTuple):
    """A training run.

    Attributes
    ----------
    disease : str
        ``"healthy"`` or one of `DISEASES`.
    model : keras.Model
        As training left it, also if it diverged.
    history : dict of str to list of float
        What Keras logged, by epoch.
    probe : tuple (x, y)
        Up to 400 examples from all over the training set, in its order.
    """

    disease: str
    model: keras.Model
    history: dict[str, list[float]]
    probe: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Run:
    """All that decides a run; a disease replaces a part of it."""

    net: DenseNet
    data: Dataset
    rng: np.random.Generator
    images: int = 1500
    epochs: int = 8
    shuffle: bool = True
    treat: Callable[[keras.Model], keras.Model] = lambda model: model
    schedule: Callable[[int, float], float] | None = None

    def with_net(self, **changes) -> _Run:
        return replace(self, net=replace(self.net, **changes))

    def with_rate(self, factor: float) -> _Run:
        return self.with_net(learning_rate=factor * self.net.learning_rate)

    def with_weights(self, factor: float) -> _Run:
        """Multiply the standard deviation of He's weights."""
        start = keras.initializers.VarianceScaling(2 * factor**2, "fan_in", "untruncated_normal")
        return self.with_net(kernel_initializer=start)

    def with_data(self, **arrays: np.ndarray) -> _Run:
        return replace(self, data=replace(self.data, **arrays))  # type: ignore[arg-type]


_SGD, _ADAM = functools.partial(keras.optimizers.SGD, momentum=0.9), keras.optimizers.Adam
_RELU = (
    DenseNet((50,) * 3, optimizer=_SGD, learning_rate=0.01),
    DenseNet((50,) * 5, optimizer=_ADAM, learning_rate=0.001),
)
_SMOOTH = (
    DenseNet((50,) * 4, "elu", optimizer=_SGD, learning_rate=0.005),
    DenseNet((50,) * 3, "tanh", "glorot_uniform", optimizer=_SGD, learning_rate=0.01),
    DenseNet((40,) * 6, "selu", "lecun_normal", optimizer=_SGD, learning_rate=0.003),
)
_NORMALIZED = (
    DenseNet((50,) * 4, optimizer=_SGD, learning_rate=0.02, batch_norm=True),
    DenseNet((50,) * 3, "elu", optimizer=_ADAM, learning_rate=0.002, batch_norm=True),
)
_PLAIN = (*_RELU, *_SMOOTH[:1])


# ------------------------------------------------------------------ what can go wrong


def _wrong_loss(run):
    def softmax_twice(model):
        top = [keras.layers.Softmax(name=f"softmax_{i}") for i in (1, 2)]
        return keras.Sequential([keras.Input((run.net.inputs,)), *model.layers, *top])

    change = softmax_twice if run.rng.random() < 0.5 else lambda model: model

    def treat(model):
        new = change(model)  # in both cases the loss takes for probabilities what it gets
        new.compile(model.optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
        return new

    return replace(run, treat=treat)


def _raw_inputs(run):
    data, scale = run.data, 255 if run.rng.random() < 0.5 else 1 / 255
    arrays = {name: getattr(data, name) * data.std + data.mean for name in ("x_train", "x_valid")}
    return run.with_data(**{name: np.float32(scale * x) for name, x in arrays.items()})


def _shuffled_labels(run):
    return run.with_data(y_train=run.rng.permutation(run.data.y_train))


def _sorted_labels(run):
    data = run.data.take(run.images)
    order = np.argsort(data.y_train, kind="stable")
    data = replace(data, x_train=data.x_train[order], y_train=data.y_train[order])
    return replace(run, data=data, shuffle=False)


def _frozen_layers(run):
    def treat(model):
        for layer in model.layers[:-1]:
            layer.trainable = False
        model.compile(model.optimizer, model.loss, metrics=["accuracy"])
        return model

    return replace(run, treat=treat)


def _large_weights(run):
    return run.with_weights(run.rng.uniform(4, 8))


def _fading_signals(run):
    if run.rng.random() < 0.5:
        return run.with_weights(run.rng.uniform(0.15, 0.3))
    return run.with_net(hidden=(50,) * 6, activation="sigmoid", kernel_initializer="glorot_normal")


def _slow_statistics(run):
    def treat(model):
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.momentum = 0.9999
        return model

    return replace(run, treat=treat)


def _high_rate(run):
    return run.with_rate(run.rng.uniform(30, 100))


def _negative_biases(run):
    return run.with_net(bias_initializer=keras.initializers.Constant(-run.rng.uniform(1, 3)))


def _small_steps(run):
    if run.rng.random() < 0.5:
        return run.with_rate(10 ** run.rng.uniform(-4, -2.5))
    first = 0.1 * run.net.learning_rate
    return replace(run, schedule=lambda epoch, rate: first * 0.1**epoch)


def _few_images(run):
    return replace(run, images=int(run.rng.integers(150, 300)), epochs=80)


def _bottleneck(run):
    return run.with_net(hidden=(50, 2))


# name, as `signals.diagnose` calls it -> what it does to a run, and recipes that it can befall
_SICK = {
    "loss does not fit": (_wrong_loss, _RELU[:1]),
    "inputs not scaled": (_raw_inputs, _PLAIN),
    "labels do not fit": (_shuffled_labels, _PLAIN),
    "not shuffled": (_sorted_labels, (*_PLAIN, *_NORMALIZED)),
    "frozen at the start": (_frozen_layers, _PLAIN[::2]),
    "exploding": (_large_weights, _PLAIN),
    "vanishing": (_fading_signals, _PLAIN[1:]),
    "stale statistics": (_slow_statistics, _NORMALIZED),
    "rate too high": (_high_rate, (*_PLAIN, *_SMOOTH[1:])),
    "dead units": (_negative_biases, _RELU),
    "steps too small": (_small_steps, (*_PLAIN, *_NORMALIZED)),
    "overfitting": (_few_images, _PLAIN),
    "underfitting": (_bottleneck, _SMOOTH[:2]),
}
_HEALTHY = (lambda run: run, (*_RELU, *_SMOOTH, *_NORMALIZED))
DISEASES = tuple(_SICK)


def patient(disease: str, seed: int, data: Dataset) -> Patient:
    """Train a network that is healthy or has a disease.

    Parameters
    ----------
    disease : str
        ``"healthy"`` or one of `DISEASES`, which have the names of the rules of `signals.diagnose`.
    seed : int
        Decides recipe, learning rate, how bad it is, initial weights and order of the batches.
    data : Dataset
        Standardized and flat, with 1,500 training images or more.

    Returns
    -------
    Patient

    Raises
    ------
    ValueError
        For an unknown disease, or data that do not fit.

    Examples
    --------
    >>> from ch11lib import datasets
    >>> data = datasets.load_fashion_mnist().take(1500, 100).standardized().halved().flattened()
    >>> well = patient("healthy", seed=1, data=data)
    >>> len(well.history["loss"]), well.probe[0].shape
    (8, (400, 196))
    """
    return patients([(disease, seed)], data)[0]


def patients(cases: Iterable[tuple[str, int]], data: Dataset) -> list[Patient]:
    """Train many, two at a time.

    Parameters
    ----------
    cases : iterable of (disease, seed)
        As for `patient`.
    data : Dataset

    Returns
    -------
    list of Patient
        In the order of the cases.

    Examples
    --------
    >>> patients([], data=None)
    []
    """
    # Models are built one after the other, for that uses global state.
    ready = [_admitted(disease, seed, data) for disease, seed in cases]
    jobs = (joblib.delayed(_trained)(*one) for one in ready)
    return joblib.Parallel(n_jobs=2, prefer="threads")(jobs)


def _admitted(disease, seed, data):
    """Check the arguments; return the run with its model, not trained yet."""
    if disease != "healthy" and disease not in _SICK:
        raise ValueError(f"disease must be 'healthy' or one of {DISEASES}, received {disease!r}")
    if data.x_train.ndim != 2 or len(data.x_train) < _Run.images or data.std == 1:
        raise ValueError(
            f"data must be standardized and flat, with {_Run.images} training images, got {data}"
        )
    spoil, nets = _SICK.get(disease, _HEALTHY)
    rng = np.random.default_rng([seed, zlib.crc32(disease.encode())])
    net = replace(nets[rng.integers(len(nets))], inputs=data.x_train.shape[1])
    run = spoil(_Run(net, data, rng).with_rate(2 ** rng.uniform(-1, 1)))
    return disease, seed, run, run.treat(run.net(seed))


def _trained(disease, seed, run, model) -> Patient:
    x, y = run.data.x_train[: run.images], run.data.y_train[: run.images]
    callbacks = [keras.callbacks.LearningRateScheduler(run.schedule)] if run.schedule else []
    try:
        history = training.fit(
            model,
            x,
            y,
            epochs=run.epochs,
            shuffle=run.shuffle,
            seed=seed,
            validation_data=(run.data.x_valid, run.data.y_valid),
            callbacks=callbacks,
            jit_compile=False,
        )
    except training.DivergenceError as error:
        history = error.history
    seen = np.sort(run.rng.permutation(len(x))[:400])
    return Patient(disease, model, history.history, (x[seen], y[seen]))
