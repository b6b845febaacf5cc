"""Time one training step: the engine, `model.fit`, a bare compiled loop and fleets, interleaved.

    python benchmarks/engine.py [--rounds N] [--net NAME] [--torch] [--jax]

All contenders train the same network on the same 8,000 random samples in this process, one after
the other in every round, so that a busy machine slows all of them down.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
import functools
import itertools
import os
from pathlib import Path
import platform
import statistics
import time

from ch11lib import training
from ch11lib.backend import keras, tf
from ch11lib.fleets import Fleet
import numpy as np

SAMPLES, INPUTS, CLASSES, BATCH, EPOCHS = 8_000, 784, 10, 32, 2
STEPS = EPOCHS * SAMPLES // BATCH
RATE = 0.01
NETS = {"3 x 100": (100,) * 3, "50 x 50": (50,) * 50}

rng = np.random.default_rng(0)
X = rng.normal(size=(SAMPLES, INPUTS)).astype("float32")
Y = rng.integers(0, CLASSES, SAMPLES).astype("int32")


def orders():
    return [training.batch_order(SAMPLES, 0, epoch) for epoch in range(EPOCHS)]


def keras_model(hidden):
    layers = [keras.layers.Dense(n, "relu", kernel_initializer="he_normal") for n in hidden]
    model = keras.Sequential([keras.Input((INPUTS,)), *layers, keras.layers.Dense(CLASSES)])
    model.compile(
        keras.optimizers.SGD(RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


# Each contender takes the hidden layers and returns a function that trains EPOCHS epochs.


def model_fit(hidden):
    model = keras_model(hidden)
    return lambda: model.fit(X, Y, batch_size=BATCH, epochs=EPOCHS, verbose=0)


def engine(hidden, xla=False):
    model = keras_model(hidden)
    return lambda: training.fit(
        model, X, Y, batch_size=BATCH, epochs=EPOCHS, seed=0, jit_compile=xla
    )


def bare_loop(hidden, xla=False):
    """Make a loop by hand: no metrics, no callbacks, plain SGD on variables in place."""
    sizes = [INPUTS, *hidden, CLASSES]
    weights = [
        tf.Variable(tf.random.normal((a, b), stddev=(2 / a) ** 0.5))
        for a, b in itertools.pairwise(sizes)
    ]
    biases = [tf.Variable(tf.zeros(n)) for n in sizes[1:]]
    variables = [*weights, *biases]
    x, y = tf.constant(X), tf.constant(Y)

    def step(rows):
        with tf.GradientTape() as tape:
            a = tf.gather(x, rows)
            for w, b in zip(weights[:-1], biases[:-1], strict=True):
                a = tf.nn.relu(a @ w + b)
            logits = a @ weights[-1] + biases[-1]
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(tf.gather(y, rows), logits)
            )
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(RATE * gradient)
        return loss

    @tf.function(jit_compile=xla, autograph=False)
    def epoch(order):
        batches = tf.reshape(order, (SAMPLES // BATCH, BATCH))
        return tf.while_loop(
            lambda i, total: i < SAMPLES // BATCH,
            lambda i, total: (i + 1, total + step(batches[i])),
            (tf.constant(0), tf.constant(0.0)),
        )[1]

    return lambda: [float(epoch(tf.constant(order))) for order in orders()]


def fleet(hidden, networks):
    (width,) = set(hidden)
    seeds = range(networks)
    trained = Fleet(len(hidden), width, seeds=seeds, rates=[RATE], inputs=INPUTS, classes=CLASSES)
    return lambda: trained.train(X, Y, steps=STEPS, batch_size=BATCH)


def torch_loop(hidden):
    import torch

    layers, size = [], INPUTS
    for n in hidden:
        layers += [torch.nn.Linear(size, n), torch.nn.ReLU()]
        torch.nn.init.kaiming_normal_(layers[-2].weight)
        size = n
    model = torch.nn.Sequential(*layers, torch.nn.Linear(size, CLASSES))
    # By hand: `torch.optim` loads PyTorch's compiler, which crashes in one process with TensorFlow.
    parameters = list(model.parameters())
    detached = [parameter.detach() for parameter in parameters]
    loss_function = torch.nn.CrossEntropyLoss()
    x, y = torch.from_numpy(X), torch.from_numpy(Y).long()

    def train():
        for order in orders():
            for rows in torch.from_numpy(order).long().split(BATCH):
                gradients = torch.autograd.grad(loss_function(model(x[rows]), y[rows]), parameters)
                torch._foreach_add_(detached, gradients, alpha=-RATE)

    return train


def jax_scan(hidden):
    import jax
    import jax.numpy as jnp

    sizes = [INPUTS, *hidden, CLASSES]
    parameters = [
        (jnp.asarray(rng.normal(0, (2 / a) ** 0.5, (a, b)), "float32"), jnp.zeros(b))
        for a, b in itertools.pairwise(sizes)
    ]
    x, y = jnp.asarray(X), jnp.asarray(Y)

    def loss(parameters, x, y):
        for w, b in parameters[:-1]:
            x = jax.nn.relu(x @ w + b)
        w, b = parameters[-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(x @ w + b), y[:, None], axis=1).mean()

    def step(parameters, rows):
        value, gradient = jax.value_and_grad(loss)(parameters, x[rows], y[rows])
        return jax.tree.map(lambda p, g: p - RATE * g, parameters, gradient), value

    @jax.jit
    def epoch(parameters, order):
        return jax.lax.scan(step, parameters, order.reshape(-1, BATCH))

    def train():
        nonlocal parameters
        for order in orders():
            parameters, losses = epoch(parameters, order)
            losses.block_until_ready()

    return train


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(hidden, contenders, rounds):
    """Time all contenders in every round; return ms per step and the seconds of the first call."""
    trains, first = {}, {}
    for name, make in contenders.items():
        train = make(hidden)
        trains[name], first[name] = train, seconds(train)
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, train in trains.items():
            times[name].append(seconds(train) / STEPS * 1e3)
    # What the first call took more than a usual one is tracing and compiling.
    compiling = {name: first[name] - min(times[name]) * STEPS / 1e3 for name in contenders}
    return times, compiling


def report(title, times, compiling):
    def ratio(a, b):
        return statistics.median(p / q for p, q in zip(times[a], times[b], strict=True))

    print(f"\n{title}: ms per step over {len(next(iter(times.values())))} rounds")
    print(f"{'':24}{'min':>8}{'median':>8}{'compile s':>11}{'fit : it':>10}{'it : bare':>11}")
    for name, values in times.items():
        bare = "bare loop, XLA" if name.endswith("XLA") else "bare loop"
        print(
            f"{name:24}{min(values):8.3f}{statistics.median(values):8.3f}"
            f"{compiling[name]:11.2f}{ratio('model.fit', name):10.1f}{ratio(name, bare):11.2f}"
        )
    saved = min(times["engine"]) - min(times["engine, XLA"])
    extra = compiling["engine, XLA"] - compiling["engine"]
    if saved > 0:
        print(f"XLA repays its compile time after about {extra / saved * 1e3:,.0f} steps")
    else:
        print("XLA does not repay its compile time")


def two_threads(hidden, rounds):
    """Compare two trainings in two threads with the same two one after the other."""
    pair = [engine(hidden), engine(hidden)]
    for train in pair:
        train()
    with ThreadPoolExecutor(2) as pool:

        def together():
            for future in [pool.submit(train) for train in pair]:
                future.result()

        ratios = [
            seconds(lambda: [train() for train in pair]) / seconds(together) for _ in range(rounds)
        ]
    print(f"two trainings in two threads: {statistics.median(ratios):.2f} times as fast as in turn")


def machine():
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.partition(":")[2] for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = models[0].strip() if models else cpu
    gpus = len(tf.config.list_physical_devices("GPU"))
    return (
        f"{platform.system()} {platform.machine()}, {cpu}, {os.cpu_count()} CPUs, {gpus} GPUs; "
        f"Python {platform.python_version()}, TensorFlow {tf.__version__}, "
        f"Keras {keras.__version__}; "
        f"TF_ENABLE_ONEDNN_OPTS={os.environ.get('TF_ENABLE_ONEDNN_OPTS', 'default')}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--net", choices=NETS, action="append", help="default: all")
    parser.add_argument("--torch", action="store_true", help="add a PyTorch eager loop")
    parser.add_argument("--jax", action="store_true", help="add a JAX scan")
    arguments = parser.parse_args()
    contenders = {
        "model.fit": model_fit,
        "engine": engine,
        "engine, XLA": lambda hidden: engine(hidden, xla=True),
        "bare loop": bare_loop,
        "bare loop, XLA": lambda hidden: bare_loop(hidden, xla=True),
        **{f"fleet of {n}": functools.partial(fleet, networks=n) for n in (1, 5, 25)},
    }
    for name, wanted, make in (
        ("torch", arguments.torch, torch_loop),
        ("jax", arguments.jax, jax_scan),
    ):
        if wanted:
            try:
                __import__(name)
            except ImportError as error:
                print(f"{name} is left out: {error}")
            else:
                contenders[f"{name}"] = make
    print(machine())
    print(f"{SAMPLES:,} random samples, batch {BATCH}, {EPOCHS} epochs a round, plain SGD")
    for title in arguments.net or NETS:
        hidden = NETS[title]
        report(title, *compare(hidden, contenders, arguments.rounds))
        two_threads(hidden, arguments.rounds)


if __name__ == "__main__":
    main()
