"""Compare ways of training fairly: arms x seeds, with equal data, order, steps and tuning.

An *arm* is one way of doing it: a function of a seed that returns a compiled model. `compare`
trains every arm with every seed; the runs of one seed see the same batches in the same order in
every arm, so that arms can be compared seed by seed. If hyperparameters are tuned, every arm gets
the same number of trials, and on other seeds than those that are reported: a choice that was made
on the reported runs would flatter whoever had the most luck.

The runs of an arm share one compiled graph (see `ch11lib.training`), and run in threads, one per
core, because TensorFlow computes outside Python's lock. `joblib.parallel_config` sends them to
other processes or a Dask cluster instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
from dataclasses import dataclass, replace
import functools
import hashlib
import itertools
import json
import math
import numbers
import os
from pathlib import Path
import random
import threading
import time
from typing import Any, NamedTuple
import warnings

from ch11lib import training
from ch11lib.backend import keras, tf, trim_memory
from ch11lib.claims import number
from ch11lib.fleets import Fleet, per_core
import joblib
import numpy as np
import pandas as pd
from scipy import stats
from tqdm import tqdm

__all__ = [
    "DenseNet",
    "Difference",
    "Interrupted",
    "Results",
    "compare",
    "compare_fleets",
    "interval",
    "seeds",
]

Arm = Callable[..., keras.Model]


def seeds(n: int) -> list[int]:
    """Return the `n` seeds of a notebook: 0 ... n-1, or another block when claims are re-measured.

    ``python -m ch11lib run --seeds 0-9`` sets the environment variable ``CH11_SEED`` to 0 ... 9;
    block k holds the seeds 1000k, 1000k + 1, and so on.

    Examples
    --------
    >>> [seed % 1000 for seed in seeds(3)]
    [0, 1, 2]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, received {n}")
    first = 1000 * int(os.environ.get("CH11_SEED", "0"))
    return [first + i for i in range(n)]


@contextlib.contextmanager
def _seeded(seed):
    """Seed what Keras draws its seeds from, Python's and NumPy's generators, and put them back.

    `keras.utils.set_random_seed` would also set TensorFlow's seed, which no Keras layer uses, and
    at which TensorFlow forgets how it had prepared its graphs: a quarter of a second for each.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@dataclass(frozen=True)
class DenseNet:
    """Recipe of a dense classifier: call it with a seed to get a compiled model.

    Parameters
    ----------
    hidden : tuple of int
        Units of each hidden layer.
    activation : str or callable
        A Keras activation; or a layer class or other function without arguments that makes a layer,
        for activations with weights or randomness (``keras.layers.PReLU``).
    kernel_initializer, bias_initializer : str
        Of the hidden layers. The output layer starts from Glorot uniform weights in every arm.
    optimizer : callable
        Called with ``learning_rate=``; a class such as `keras.optimizers.SGD`, or a partial of one.
    learning_rate : float
    batch_norm : bool
        Normalize each hidden layer before its activation (which then needs no bias).
    inputs, classes : int

    Examples
    --------
    >>> net = DenseNet(hidden=(30, 20), activation="tanh", kernel_initializer="glorot_normal")
    >>> model = net(seed=1, learning_rate=0.1)
    >>> [layer.name for layer in model.layers]
    ['hidden_1', 'hidden_2', 'output']
    """

    hidden: tuple[int, ...] = (100, 100, 100)
    activation: Any = "relu"
    kernel_initializer: str = "he_normal"
    bias_initializer: Any = "zeros"
    optimizer: Callable = keras.optimizers.SGD
    learning_rate: float = 0.01
    batch_norm: bool = False
    inputs: int = 784
    classes: int = 10

    def __call__(self, seed: int, **changes: Any) -> keras.Model:
        """Return the compiled model; `changes` replace fields of the recipe."""
        if changes:
            return replace(self, **changes)(seed)
        layers = [keras.Input((self.inputs,))]
        with _seeded(seed):
            for i, units in enumerate(self.hidden, start=1):
                layers += self._hidden(f"hidden_{i}", units)
            model = keras.Sequential([*layers, keras.layers.Dense(self.classes, name="output")])
        model.compile(
            optimizer=self.optimizer(learning_rate=self.learning_rate),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        return model

    def _hidden(self, name, units):
        inside = isinstance(self.activation, str) and not self.batch_norm
        yield keras.layers.Dense(
            units,
            activation=self.activation if inside else None,
            use_bias=not self.batch_norm,
            kernel_initializer=self.kernel_initializer,
            bias_initializer=self.bias_initializer,
            name=name,
        )
        if self.batch_norm:
            yield keras.layers.BatchNormalization(name=f"{name}_norm")
        if isinstance(self.activation, str) and not inside:
            yield keras.layers.Activation(self.activation, name=f"{name}_activation")
        elif not isinstance(self.activation, str):
            yield self.activation()


class Interrupted(KeyboardInterrupt):
    """A comparison was interrupted; `results` holds the runs that were finished."""

    def __init__(self, results: Results):
        done = len(results.runs) + len(results.tuning)
        super().__init__(f"interrupted after {done} runs; they are in this exception's `results`")
        self.results = results


def compare(
    arms: Mapping[str, Arm],
    data: Any,
    *,
    seeds: Sequence[int],
    epochs: int,
    batch_size: int = 32,
    validation_freq: int = 1,
    tune: Mapping[str, Any] | None = None,
    tuning_seeds: Sequence[int] | None = None,
    metric: str = "val_accuracy",
    measure: Callable[[keras.Model], Mapping[str, float]] | None = None,
    callbacks: Callable[[], Sequence[keras.callbacks.Callback]] | None = None,
    resume: str | os.PathLike | None = None,
    n_jobs: int | None = None,
) -> Results:
    """Train every arm with every seed under equal conditions.

    Parameters
    ----------
    arms : mapping of str to callable
        Name of the arm to a function ``arm(seed, **hyperparameters)`` that returns a compiled
        model.
        Python's and NumPy's generators, from which Keras draws its seeds, are seeded for the call.
    data : Dataset or ((x, y), (x_valid, y_valid)), or callable
        The same for all runs; or a function of a seed that returns such data, the same for all arms
        of this seed: ``lambda seed: data.few_labels(50, seed)``.
    seeds : sequence of int
        One run of every arm for each; a seed fixes initial weights and batch order.
    epochs, batch_size : int
        The same for all runs.
    validation_freq : int
        Validate after every so many epochs, and after the last. Where there is little to train on,
        validation after every epoch takes most of the time.
    tune : mapping, optional
        Hyperparameter to the values to try (a grid, if there are several), for example
        ``{"learning_rate": [0.01, 0.03, 0.1]}``; or name of the arm to such a mapping, if arms have
        different ranges. The number of trials must be the same for all arms.
    tuning_seeds : sequence of int, optional
        Seeds on which the best point of the grid is chosen, by the median of `metric`; default two
        that are not in `seeds`.
    metric : str
        A column of the history; largest is best for names that contain "acc" or "auc", smallest
        for all others.
    measure : callable, optional
        Called with each trained model; the numbers that it returns, a mapping, become columns of
        the runs. A model whose training diverged is not measured.
    callbacks : callable, optional
        Makes the callbacks of one run.
    resume : path, optional
        File that keeps each finished run. A later call skips the runs that it finds there, provided
        that data, initial weights, configuration and protocol are the same.
    n_jobs : int, optional
        Runs at a time: threads by default, one per core (one in all on a GPU). Inside
        `joblib.parallel_config` its back end and its `n_jobs` are used.

    Returns
    -------
    Results

    Raises
    ------
    ValueError, TypeError
        For unequal numbers of trials, repeated or missing seeds, an arm that is not callable.
    Interrupted
        On Ctrl-C, with the finished runs.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
    >>> y = (x[:, 0] > 0).astype("int32")
    >>> small = DenseNet(hidden=(8,), inputs=4, classes=2, learning_rate=0.1)
    >>> results = compare({"8 units": small}, ((x, y), (x, y)), seeds=[0, 1, 2], epochs=5)
    >>> results.runs[["arm", "seed"]].values.tolist()
    [['8 units', 0], ['8 units', 1], ['8 units', 2]]
    """
    _check_callables(measure=measure, callbacks=callbacks)
    for name, value in {"epochs": epochs, "validation_freq": validation_freq}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, received {value}")
    grids = _grids(arms, tune)
    seeds = _distinct(seeds, "seeds")
    if tuning_seeds is None:
        others = (seed for seed in itertools.count(seeds[0] + 500) if seed not in seeds)
        tuning_seeds = itertools.islice(others, 2)
    tuning_seeds = _distinct(tuning_seeds, "tuning_seeds")
    if tune and set(seeds) & set(tuning_seeds):
        raise ValueError("tuning_seeds must not share a seed with seeds")
    splits = _splits(data)
    trials_per_arm = len(next(iter(grids.values()))) * len(tuning_seeds) if tune else 0
    protocol = _Protocol(
        epochs=epochs,
        batch_size=batch_size,
        measure=measure,
        callbacks=callbacks,
        runs_per_arm=trials_per_arm + len(seeds),
        validated=(*range(validation_freq, epochs, validation_freq), epochs),
    )
    # A trial is judged by its end; callbacks may want to see the validation after every epoch.
    trial = replace(protocol, validated=protocol.validated if callbacks else (epochs,))
    store = _Store(resume)
    results = Results(metric)
    try:
        best = {arm: grid[0] for arm, grid in grids.items()}
        if tune:
            trials = [
                _Trial(arm, point, seed)
                for arm, grid in grids.items()
                for point in grid
                for seed in tuning_seeds
            ]
            for i, run in _run_all(arms, trials, splits, trial, store, n_jobs, "tuning"):
                results._add(trials[i], run, tuning=True)
            best = {arm: results._best_point(arm, grid) for arm, grid in grids.items()}
        results.best.update(best)
        trials = [_Trial(arm, point, seed) for arm, point in best.items() for seed in seeds]
        for i, run in _run_all(arms, trials, splits, protocol, store, n_jobs, "runs"):
            results._add(trials[i], run, tuning=False)
    except KeyboardInterrupt:
        results._finish(list(arms))
        raise Interrupted(results) from None
    results._finish(list(arms))
    trim_memory()
    return results


def compare_fleets(
    arms: Mapping[str, Callable[..., Fleet]],
    data: Any,
    *,
    seeds: Sequence[int],
    epochs: int,
    rates: Sequence[float] | Mapping[str, Sequence[float]],
    tuning_seeds: Sequence[int],
    tuning_epochs: int | None = None,
    batch_size: int = 32,
) -> Results:
    """Compare dense architectures as `compare` does, all runs of an arm at once.

    Parameters
    ----------
    arms : mapping of str to callable
        Name of the arm to a function ``arm(seeds=..., rates=...)`` that returns a fleet, such as
        ``functools.partial(Fleet, 2, 100)``.
    data : Dataset or ((x, y), (x_valid, y_valid))
        With flat images.
    seeds : sequence of int
        One network of every arm for each.
    epochs, batch_size : int
        The same for all; batches that would not be full are left out.
    rates : sequence of float, or mapping of arm to such a sequence
        Learning rates to choose from, equally many for every arm.
    tuning_seeds : sequence of int
        Seeds on which the rate is chosen: that with the least median loss in the last epoch.
    tuning_epochs : int, optional
        Length of a trial; default `epochs`.

    Returns
    -------
    Results
        With ``loss``, the mean over the batches of an epoch, ``val_loss`` and ``val_accuracy``.

    Examples
    --------
    >>> from ch11lib import datasets
    >>> data = datasets.load_fashion_mnist().take(320).standardized().flattened()
    >>> arms = {f: functools.partial(Fleet, 1, 20, activation=f) for f in ("relu", "tanh")}
    >>> results = compare_fleets(
    ...     arms, data, seeds=[0, 1, 2], epochs=3, rates=[0.001, 0.1], tuning_seeds=[9]
    ... )
    >>> results.best
    {'relu': {'learning_rate': 0.1}, 'tanh': {'learning_rate': 0.1}}
    """
    tuning_epochs = epochs if tuning_epochs is None else tuning_epochs
    for name, value in {"epochs": epochs, "tuning_epochs": tuning_epochs}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, received {value}")
    grids = _grids(arms, _rates_of(rates))
    seeds, tuning_seeds = _distinct(seeds, "seeds"), _distinct(tuning_seeds, "tuning_seeds")
    if set(seeds) & set(tuning_seeds):
        raise ValueError("tuning_seeds must not share a seed with seeds")
    split = _split(data)
    at_once = per_core(len(seeds))  # for both, so that one compilation serves both
    trials = _FleetRuns(split, tuning_seeds, tuning_epochs, batch_size, at_once)
    runs = _FleetRuns(split, seeds, epochs, batch_size, at_once)
    results = Results("loss")
    try:
        for arm in tqdm(arms, desc="arms", disable=None, leave=False):
            for trial, run in trials.of(arm, arms[arm], grids[arm]):
                results._add(trial, run, tuning=True)
            results.best[arm] = results._best_point(arm, grids[arm])
            for trial, run in runs.of(arm, arms[arm], [results.best[arm]]):
                results._add(trial, run, tuning=False)
    except KeyboardInterrupt:
        results._finish(list(arms))
        raise Interrupted(results) from None
    results._finish(list(arms))
    trim_memory()
    return results


@dataclass(frozen=True)
class _FleetRuns:
    """What fleets have in common that are compared."""

    split: tuple
    seeds: Sequence[int]
    epochs: int
    batch_size: int
    at_once: int

    def of(self, arm, make, points) -> Iterator[tuple[_Trial, dict]]:
        """Train one fleet; yield for each of its networks what `_run` returns of a model."""
        x, y, x_valid, y_valid = self.split
        rates = [point["learning_rate"] for point in points]
        fleet, steps = make(seeds=self.seeds, rates=rates), len(x) // self.batch_size
        start = time.perf_counter()
        many = {"steps": steps * self.epochs, "batch_size": self.batch_size}
        losses = fleet.train(x, y, **many, at_once=self.at_once)
        seconds = (time.perf_counter() - start) / losses.shape[1]
        by_epoch = losses.reshape(self.epochs, steps, -1).mean(axis=1).T
        valid = fleet.evaluate(x_valid, y_valid)
        for network, loss in zip(valid.itertuples(), by_epoch, strict=True):
            bad = np.flatnonzero(~np.isfinite(loss))
            run = {"diverged_at": f"epoch {bad[0] + 1}" if len(bad) else None, "seconds": seconds}
            run["history"] = {"loss": loss[: bad[0]] if len(bad) else loss}
            if not len(bad):
                run |= {
                    "loss": loss[-1],
                    "val_loss": network.loss,
                    "val_accuracy": network.accuracy,
                }
            yield _Trial(arm, points[rates.index(network.rate)], network.seed), run


def _rates_of(rates):
    if isinstance(rates, Mapping):
        return {arm: {"learning_rate": values} for arm, values in rates.items()}
    return {"learning_rate": rates}


# --- arguments ------------------------------------------------------------------------------------


def _grids(arms, tune) -> dict[str, list[dict]]:
    if not isinstance(arms, Mapping) or not arms:
        raise TypeError(f"arms must map names to functions, one at least, received {arms!r}")
    for name, arm in arms.items():
        if not callable(arm):
            raise TypeError(f"arms[{name!r}] must be a function of a seed, received {arm!r}")
    tune = tune or {}
    if not isinstance(tune, Mapping):
        raise TypeError(f"tune must map hyperparameters to values to try, received {tune!r}")
    each = any(isinstance(ranges, Mapping) for ranges in tune.values())
    if each and set(tune) != set(arms):
        raise ValueError(f"tune must name the arms {list(arms)}, received {list(tune)}")
    grids = {}
    for arm in arms:
        ranges = tune[arm] if each else tune
        for name, values in ranges.items():
            if isinstance(values, str) or not isinstance(values, Iterable):
                raise TypeError(f"tune[{name!r}] must be a list of values, received {values!r}")
        points = itertools.product(*(list(values) for values in ranges.values()))
        grids[arm] = [dict(zip(ranges, point, strict=True)) for point in points]
    sizes = {arm: len(grid) for arm, grid in grids.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"tune must give every arm the same number of trials, received {sizes}")
    return grids


def _check_callables(**arguments):
    for name, value in arguments.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be a function, received {value!r}")


def _distinct(values, name) -> list[int]:
    values = list(values)
    if any(isinstance(v, bool) or not isinstance(v, (int, np.integer)) for v in values):
        raise TypeError(f"{name} must be integers, received {values}")
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{name} must be distinct and at least one, received {values}")
    return [int(v) for v in values]


def _splits(data) -> Callable[[int], tuple]:
    """Return a function of a seed that gives the arrays of its runs."""
    if callable(data):
        return functools.cache(lambda seed: _split(data(seed)))
    split = _split(data)
    return lambda seed: split


def _split(data):
    if hasattr(data, "x_train"):
        return data.x_train, data.y_train, data.x_valid, data.y_valid
    try:
        (x, y), (x_valid, y_valid) = data
    except (TypeError, ValueError):
        raise TypeError(
            "data must be a Dataset or ((x, y), (x_valid, y_valid)), or a function of a seed that "
            f"returns one of these, received {type(data).__name__}"
        ) from None
    return x, y, x_valid, y_valid


# --- running --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Protocol:
    """What all runs of a comparison have in common, apart from the data."""

    epochs: int
    batch_size: int
    measure: Callable | None
    callbacks: Callable | None
    runs_per_arm: int
    validated: tuple[int, ...]  # epochs after which there is a validation

    def digest(self, splits):
        """Hash the data and what of the protocol shapes a run."""
        code = [training.fingerprint(f) for f in (self.measure, self.callbacks) if f is not None]
        shape = (self.epochs, self.batch_size, self.validated, code)
        digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
        for array in map(np.asarray, keras.tree.flatten(splits)):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
        return digest


class _Trial(NamedTuple):
    """Which run: the arm, its hyperparameters, the seed."""

    arm: str
    point: dict
    seed: int


#: Building a model uses global state (the seed, the counters of layer names); what measures one may
#: set and restore such state, as `signals.probe` does.
_global_state_lock = threading.Lock()


def _run(i, build, point, seed, protocol, x, y, x_valid, y_valid) -> tuple[int, dict]:
    """Train one model; return `i` and what is kept of the run.

    The arrays are arguments of their own so that joblib can share them between processes.
    """
    with _global_state_lock, _seeded(seed):
        model = build(seed, **point)
    n = len(keras.tree.flatten(x)[0])
    steps = -(-n // protocol.batch_size) * protocol.epochs * protocol.runs_per_arm
    run: dict[str, Any] = {"diverged_at": None}
    start = time.perf_counter()
    try:
        history = training.fit(
            model,
            x,
            y,
            epochs=protocol.epochs,
            batch_size=protocol.batch_size,
            validation_data=(x_valid, y_valid),
            validation_freq=protocol.validated,
            callbacks=protocol.callbacks() if protocol.callbacks else (),
            seed=seed,
            jit_compile=training.xla_pays(model, steps),  # the runs of an arm share one graph
        )
    except training.DivergenceError as error:
        history = error.history
        run["diverged_at"] = f"epoch {error.epoch + 1}, step {error.step + 1}"
    run["seconds"] = time.perf_counter() - start
    run["history"] = {
        name: _at(protocol.validated, values, len(history.epoch))
        if name.startswith("val_")
        else values
        for name, values in history.history.items()
    }
    if run["diverged_at"] is None:
        run.update({name: values[-1] for name, values in history.history.items()})
        if protocol.measure is not None:
            with _global_state_lock:
                values = protocol.measure(model)
            run.update(_measured(values, {*run, *_Trial._fields, *point}))
    return i, run


def _at(due, values, epochs):
    """Return `values`, which were taken after the epochs that were `due`, as one per epoch."""
    known = dict(zip(due, values, strict=False))
    return [known.get(epoch + 1, math.nan) for epoch in range(epochs)]


def _measured(values, taken):
    if not isinstance(values, Mapping):
        raise TypeError(f"measure must return a mapping of names to numbers, received {values!r}")
    if taken & set(values):
        raise ValueError(f"measure must not return {sorted(taken & set(values))}: columns already")
    return values


def _run_all(arms, trials, splits, protocol, store, n_jobs, title) -> Iterator[tuple[int, dict]]:
    """Yield index and run of all trials as they finish; those that `store` holds come first."""
    keys = {}
    if store.path is not None:
        digest = {seed: protocol.digest(splits(seed)) for seed in {t.seed for t in trials}}
        keys = {
            i: _key(arms[trial.arm], trial, digest[trial.seed]) for i, trial in enumerate(trials)
        }
    missing = []
    with tqdm(total=len(trials), desc=title, disable=None, leave=False) as bar:
        for i in range(len(trials)):
            run = store.find(keys.get(i))
            if run is None:
                missing.append(i)
            else:
                bar.update()
                yield i, run
        parallel = joblib.Parallel(
            n_jobs=_runs_at_a_time(n_jobs), prefer="threads", return_as="generator_unordered"
        )
        jobs = [
            joblib.delayed(_run)(
                i,
                arms[trials[i].arm],
                trials[i].point,
                trials[i].seed,
                protocol,
                *splits(trials[i].seed),
            )
            for i in missing
        ]
        with _closing(parallel(jobs)) as runs:
            for i, run in runs:
                store.keep(keys.get(i), run)
                bar.update()
                yield i, run


@contextlib.contextmanager
def _closing(runs):
    """Give up the runs that are still to be made when something fails outside of them."""
    try:
        yield runs
    finally:
        with warnings.catch_warnings():  # joblib's, that runs were given up
            warnings.simplefilter("ignore")
            runs.close()


def _runs_at_a_time(n_jobs):
    """Return `n_jobs` for joblib; None leaves it to the back end that the user has configured."""
    # Where no back end is configured, joblib takes the preferred kind.
    (threads, _), (processes, configured) = (
        joblib.parallel.get_active_backend(prefer=kind) for kind in ("threads", "processes")
    )
    if n_jobs is not None or type(threads) is type(processes):
        return n_jobs
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    return configured or (1 if on_gpu else min(4, os.cpu_count() or 1))


def _key(build, trial, digest) -> str:
    """Identify a run by all that determines it: data, protocol, configuration, initial state."""
    with _global_state_lock, _seeded(trial.seed):
        model = build(trial.seed, **trial.point)
    digest = digest.copy()
    digest.update(json.dumps([trial.arm, trial.seed]).encode())
    digest.update(training.describe(model).encode())
    optimizer = model.optimizer.get_config() | {"name": None}  # Keras counts the names up
    digest.update(json.dumps(optimizer, sort_keys=True, default=repr).encode())
    for variable in model.variables:
        digest.update(np.ascontiguousarray(variable.value))
    return digest.hexdigest()


class _Store:
    """Finished runs in a file, one line of JSON each."""

    def __init__(self, path):
        self.path = None if path is None else Path(path)
        self.runs: dict[str, dict] = {}
        if self.path is None:
            return
        try:
            with self.path.open("a+", encoding="utf-8") as file:  # to find out now if it cannot be
                file.seek(0)
                lines = file.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OSError(f"cannot use resume={str(self.path)!r}: {error}") from error
        for line in lines:
            try:
                entry = json.loads(line)
                self.runs[entry["key"]] = entry["run"]
            except (ValueError, KeyError, TypeError):
                continue  # a line that an interruption cut off: that run is simply repeated

    def find(self, key):
        return self.runs.get(key)

    def keep(self, key, run):
        if self.path is None:
            return
        entry = json.dumps({"key": key, "run": run}, default=lambda number: number.tolist())
        try:
            with self.path.open("a", encoding="utf-8") as file:
                # The line break comes first, so that a cut-off line cannot swallow this one.
                file.write("\n" + entry)
        except OSError as error:
            raise OSError(
                f"cannot keep a finished run in resume={str(self.path)!r}: "
                f"{error.strerror or error}"
            ) from error


# --- results --------------------------------------------------------------------------------------


def interval(values: Any, level: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap interval of the median (percentile method).

    Parameters
    ----------
    values : array-like, shape (n,)
        One value per seed.
    level : float

    Returns
    -------
    (low, high) : tuple of float
        With fewer than about eight values such an interval is somewhat too narrow; with one value
        it is that value.

    Examples
    --------
    >>> low, high = interval([1, 2, 3, 4, 5])
    >>> float(low), float(high)
    (1.0, 5.0)
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"values must be a non-empty list of numbers, received {values!r}")
    if not np.isfinite(values).all() or np.ptp(values) == 0 or len(values) == 1:
        return float(values.min()), float(values.max())
    result = stats.bootstrap(
        (values,), np.median, confidence_level=level, method="percentile", rng=0
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


class Results:
    """What `compare` measured.

    Attributes
    ----------
    runs : pandas.DataFrame
        One row per arm and seed: ``arm``, ``seed``, hyperparameters, the last value of every
        metric, ``seconds``, and ``diverged_at``, which is None or says where the loss ceased to be
        finite (the metrics are then missing).
    tuning : pandas.DataFrame
        The same for the trials of the tuning.
    histories : pandas.DataFrame
        One row per run of `runs` and epoch (``epoch`` counts from 1).
    best : dict
        The chosen hyperparameters of every arm.
    metric : str
        What was tuned for.
    """

    def __init__(self, metric: str):
        self.metric = metric
        self.best: dict[str, dict] = {}
        self._rows: dict[bool, list[dict]] = {True: [], False: []}
        self._finish([])

    def _add(self, trial, run, tuning):
        if tuning and run["diverged_at"] is None and self.metric not in run:
            known = list(run["history"])
            raise ValueError(f"metric must be one of {known}, received {self.metric!r}")
        row = {"arm": trial.arm, "seed": trial.seed, **trial.point, **run}
        self._rows[tuning].append(row)

    def _finish(self, arms):
        def table(rows):
            rows = [{k: v for k, v in row.items() if k != "history"} for row in rows]
            return pd.DataFrame(rows, columns=None if rows else ["arm", "seed", "diverged_at"])

        def in_order(rows):
            return sorted(rows, key=lambda row: (arms.index(row["arm"]), row["seed"]))

        runs, trials = in_order(self._rows[False]), in_order(self._rows[True])
        self.runs, self.tuning = table(runs), table(trials)
        self.histories = pd.DataFrame(
            [
                {"arm": run["arm"], "seed": run["seed"], "epoch": epoch + 1}
                | {name: values[epoch] for name, values in run["history"].items()}
                for run in runs
                for epoch in range(len(next(iter(run["history"].values()), [])))
            ]
        )

    def _best_point(self, arm, grid):
        def median(point):
            rows = [
                row
                for row in self._rows[True]
                if row["arm"] == arm and all(row[name] is point[name] for name in point)
            ]
            return np.median(_with_worst([row.get(self.metric) for row in rows], self.metric))

        choose = max if _larger_is_better(self.metric) else min
        return choose(grid, key=median)

    def values(self, arm: str, metric: str | None = None) -> np.ndarray:
        """Return `metric` of one arm by seed, shape (seeds,).

        A run that diverged counts as the worst there is: 0 where large is good, else infinity.
        """
        return self._by_seed(arm, metric).to_numpy()

    def _by_seed(self, arm, metric):
        metric = metric or self.metric
        rows = self.runs[self.runs.arm == arm].sort_values("seed")
        if rows.empty:
            raise ValueError(f"arm must be one of {self.arms}, received {arm!r}")
        if metric not in self.runs and self.runs.diverged_at.isna().any():
            known = list(self.runs.columns)
            raise ValueError(f"metric must be one of {known}, received {metric!r}")
        values = [None] * len(rows) if metric not in rows else rows[metric]
        return pd.Series(_with_worst(values, metric), index=rows.seed)

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in the order given."""
        return list(dict.fromkeys(self.runs.arm))

    def summary(self, metric: str | None = None, level: float = 0.95) -> pd.DataFrame:
        """Return median and bootstrap interval over seeds, one row per arm."""
        rows = {}
        for arm in self.arms:
            values = self.values(arm, metric)
            low, high = interval(values, level)
            rows[arm] = {
                "median": float(np.median(values)),
                "low": low,
                "high": high,
                "seeds": len(values),
                "diverged": int(self.runs[self.runs.arm == arm].diverged_at.notna().sum()),
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")

    def difference(self, a: str, b: str, metric: str | None = None, level: float = 0.95):
        """Return the paired difference a - b over seeds, with an interval.

        The interval is Student's for the mean of the paired differences: it is honest for five
        seeds too, where a bootstrap interval is too narrow.

        Returns
        -------
        Difference
            ``values`` by seed, their ``mean``, and the interval ``low`` ... ``high``.
        """
        # After an interruption the arms may have different seeds: those in common are paired.
        both = pd.concat([self._by_seed(a, metric), self._by_seed(b, metric)], axis=1, join="inner")
        with np.errstate(invalid="ignore"):  # two runs that diverged: infinity - infinity
            values = both[0].to_numpy() - both[1].to_numpy()
        if len(values) < 2:
            raise ValueError(f"a difference needs at least two seeds in common, not {len(values)}")
        mean = float(values.mean())
        if not np.isfinite(values).all():
            return Difference(values, mean, -np.inf, np.inf)
        half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values))
        return Difference(values, mean, mean - half, mean + half)

    def epochs_to(self, metric: str, target: float) -> pd.DataFrame:
        """Return per run the first epoch at which `metric` reaches `target` (infinity if never)."""
        if metric not in self.histories and not self.histories.empty:
            known = list(self.histories.columns)
            raise ValueError(f"metric must be one of {known}, received {metric!r}")
        reached = self.histories.get(metric, pd.Series(dtype=float))
        reached = reached >= target if _larger_is_better(metric) else reached <= target
        first = self.histories[reached].groupby(["arm", "seed"]).epoch.min().astype(float)
        index = pd.MultiIndex.from_frame(self.runs[["arm", "seed"]])
        return first.reindex(index, fill_value=np.inf).reset_index()

    def report(self, metric: str | None = None) -> str:
        """Return a text table of `summary`, with the tuned hyperparameters, for printing."""
        metric = metric or self.metric
        summary = self.summary(metric)
        width = max(len(arm) for arm in self.arms)
        lines = [f"{'':{width}}  {metric}: median (95 % interval), {summary.seeds.max()} seeds"]
        for arm, row in summary.iterrows():
            text = f"{number(row['median'], 3)} ({number(row.low, 3)} to {number(row.high, 3)})"
            tuned = ", ".join(f"{name} {_text(value)}" for name, value in self.best[arm].items())
            diverged = f", ~{int(row.diverged)} diverged" if row.diverged else ""
            lines.append(f"{arm:{width}}  {text}{', ' + tuned if tuned else ''}{diverged}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Difference:
    """A paired difference: values by seed, their mean, and an interval of the mean."""

    values: np.ndarray
    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{number(self.mean)} (95 % interval {number(self.low)} to {number(self.high)})"


def _text(value) -> str:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return number(float(value))
    return str(getattr(value, "__name__", value))


def _larger_is_better(metric: str) -> bool:
    return "acc" in metric or "auc" in metric.lower()


def _with_worst(values, metric) -> np.ndarray:
    values = np.array([np.nan if value is None else value for value in values], dtype=float)
    values[np.isnan(values)] = 0.0 if _larger_is_better(metric) else np.inf
    return values
