"""Pretraining: learn an encoder without labels, or from labels that cost nothing.

Three ways to make a task out of images alone, or out of images with few labels:

* an *autoencoder* puts out what came in, ``||d(e(x)) - x||² -> min``, through a narrow code e(x);
* *pairs*: the same encoder looks at two images, ``p(same) = sigmoid(w · |e(a) - e(b)| + c)``, and
  learns whether they belong together, such as to one class;
* *self-supervised labels*: how far an image was turned, or what stood where it was covered.

Whatever learns here is an ordinary Keras model, the *encoder*; the models built around it hold this
very object, so training them trains it. It then goes where labels are few, with a new head.

`examples` makes the data of each of these `TASKS`, `learner` the model that trains on them. What
makes data is NumPy, and a function of its arguments only.
"""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

from ch11lib.backend import keras
import numpy as np

__all__ = [
    "TASKS",
    "Masked",
    "autoencoder",
    "examples",
    "filters",
    "learner",
    "masked_patches",
    "rotations",
    "same_class_pairs",
    "twins",
]

# ----------------------------------------------------------------------------- labels from the data


def rotations(x: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Turn each image by 0, 90, 180 or 270 degrees; the label says how far.

    Pixels change places and nothing else, so that no trace of interpolation gives the answer away.
    The images themselves do: a classifier has to know which way up shoes stand.

    Parameters
    ----------
    x : array of shape (n, side, side) or (n, side, side, channels)
        Square images.
    seed : int
        Which image gets which label.

    Returns
    -------
    turned : numpy.ndarray
        Same shape and type; image i is ``numpy.rot90(x[i], labels[i])``, so anticlockwise.
    labels : numpy.ndarray, shape (n,), int32
        Quarter turns, 0 to 3; each as often as any other, up to one.

    Notes
    -----
    S. Gidaris, P. Singh and N. Komodakis, "Unsupervised Representation Learning by Predicting
    Image Rotations", ICLR 2018, arXiv:1803.07728. There each image appears in all four positions.

    Examples
    --------
    >>> turned, labels = rotations(np.arange(16).reshape(4, 2, 2), seed=1)
    >>> labels
    array([0, 1, 2, 3], dtype=int32)
    >>> turned[:2].tolist()
    [[[0, 1], [2, 3]], [[5, 7], [4, 6]]]
    """
    x = _images(x)
    if x.shape[1] != x.shape[2]:
        raise ValueError(f"x must hold square images, received shape {x.shape}")
    labels = np.random.default_rng(seed).permutation(len(x)).astype(np.int32) % 4
    turned = np.empty_like(x)
    for turns in range(4):
        turned[labels == turns] = np.rot90(x[labels == turns], turns, axes=(1, 2))
    return turned, labels


class Masked(NamedTuple):
    """Images with covered patches.

    Attributes
    ----------
    x : numpy.ndarray
        The images, with `fill` where they are covered.
    mask : numpy.ndarray of bool, shape (n, height, width)
        True where an image is covered.
    """

    x: np.ndarray
    mask: np.ndarray


def masked_patches(
    x: np.ndarray, fraction: float, seed: int, *, patch: int = 7, fill: float = 0.0
) -> Masked:
    """Cover square patches of each image; the originals are the targets.

    The image is divided into a grid of patches. In each image the same number of them is covered,
    chosen independently.

    Parameters
    ----------
    x : array of shape (n, height, width) or (n, height, width, channels)
        Images of which both sides are multiples of `patch`.
    fraction : float
        Share of the patches to cover, rounded to whole patches; some stay covered and some free.
    seed : int
        Which patches are covered.
    patch : int
        Side of a patch, in pixels.
    fill : float
        What covered pixels are set to; 0 is the mean of standardized images.

    Returns
    -------
    Masked

    Notes
    -----
    K. He, X. Chen, S. Xie, Y. Li, P. Dollár and R. Girshick, "Masked Autoencoders Are Scalable
    Vision Learners", CVPR 2022, arXiv:2111.06377, cover 75 %.

    Examples
    --------
    >>> covered = masked_patches(np.ones((1, 4, 4)), 0.5, seed=0, patch=2)
    >>> covered.x[0].astype(int).tolist()
    [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    """
    x = _images(x)
    patch = _count("patch", patch, 1)
    n, height, width = x.shape[:3]
    if height % patch or width % patch:
        raise ValueError(
            f"patch must divide the sides of the images, {height} and {width}, received {patch}"
        )
    rows, columns = height // patch, width // patch
    covered = round(fraction * rows * columns) if 0 < fraction < 1 else 0
    if not 0 < covered < rows * columns:
        raise ValueError(
            f"fraction must cover some of the {rows * columns} patches and leave some, "
            f"received {fraction!r}"
        )
    rank = np.random.default_rng(seed).random((n, rows * columns)).argsort(axis=1).argsort(axis=1)
    mask = (rank < covered).reshape(n, rows, columns)
    mask = mask.repeat(patch, axis=1).repeat(patch, axis=2)
    x = x.copy()
    x[mask] = fill
    return Masked(x, mask)


# ------------------------------------------------------------------------------------------- pairs


def same_class_pairs(
    x: np.ndarray, y: np.ndarray, n: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw pairs of different images: half of them of the same class, half of different classes.

    Parameters
    ----------
    x : array of shape (images, ...)
    y : array of shape (images,)
        Class of each image.
    n : int
        Number of pairs. A pair may be drawn more than once.
    seed : int

    Returns
    -------
    pairs : numpy.ndarray, shape (n, 2, ...)
        Two images each; an image is never paired with itself.
    same : numpy.ndarray, shape (n,), int32
        1 for the same class, 0 for different ones; both equally often, up to one.

    Raises
    ------
    ValueError
        If there is only one class, or no class with two images.

    Examples
    --------
    >>> x, y = np.array([10, 11, 20, 21]), np.array([1, 1, 2, 2])
    >>> pairs, same = same_class_pairs(x, y, 4, seed=0)
    >>> sorted(same.tolist()), bool((same == (pairs[:, 0] // 10 == pairs[:, 1] // 10)).all())
    ([0, 0, 1, 1], True)
    """
    x, y = np.asarray(x), np.asarray(y)
    n = _count("n", n, 1)
    if x.ndim < 1 or y.shape != x.shape[:1]:
        raise ValueError(
            "x and y must have shapes (images, ...) and (images,), "
            f"received {x.shape} and {y.shape}"
        )
    order = np.argsort(y, kind="stable")  # classes side by side
    _, begin, count = np.unique(y[order], return_index=True, return_counts=True)
    if len(begin) < 2 or count.max() < 2:
        raise ValueError(
            "y must hold two classes at least, and two images of a class, "
            f"received {len(begin)} classes with {count.max(initial=0)} images at most"
        )
    begin, count = begin.repeat(count), count.repeat(count)  # of the class of each place in order
    rng = np.random.default_rng(seed)
    same = _half(n, rng)
    # Only images that have company in their class can start a pair of the same class.
    social = np.flatnonzero(count > 1)
    first = np.where(same, rng.choice(social, n), rng.integers(len(y), size=n))
    # With the class as a circle, any step but a full turn ends at another image of the class; with
    # all images as a circle, a step past the end of the class ends in another one.
    steps = rng.random(n)
    begin, count = begin[first], count[first]
    within = begin + (first - begin + 1 + np.floor(steps * (count - 1)).astype(int)) % count
    outside = (begin + count + np.floor(steps * (len(y) - count)).astype(int)) % len(y)
    second = np.where(same, within, outside)
    return x[np.stack([order[first], order[second]], axis=1)], same


def _half(n, rng):
    """Return zeros and ones, equally many up to one, in random order."""
    return rng.permutation(n).astype(np.int32) % 2


# ------------------------------------------------------------------------------------------ models


def autoencoder(encoder: keras.Model, decoder: keras.Layer | None = None) -> keras.Model:
    """Put a decoder on an encoder, so that the whole can learn to put out its own input.

    Train it on ``(x, x)``, or on ``(masked.x, x)``.

    Parameters
    ----------
    encoder : keras.Model
        Built, with one input and one output. The same object becomes part of the result.
    decoder : keras.Model or layer, optional
        Turns codes into inputs again. By default the encoder's dense layers in reverse: for
        784-100-50 dense layers 50-100-784, then the shape of the input. The last one is linear, so
        that any range of values can be reached, such as that of standardized images; the others
        are ReLU with He weights.

    Returns
    -------
    keras.Model
        Functional, not compiled; its layers are the input, the encoder and the decoder.

    Raises
    ------
    TypeError
        If encoder or decoder is something else.
    ValueError
        If the encoder is not built, or has layers with weights other than dense layers and batch
        normalization, which the default decoder cannot mirror; or if the decoder does not take
        codes or does not return the encoder's input shape.

    Notes
    -----
    G. E. Hinton and R. R. Salakhutdinov, "Reducing the Dimensionality of Data with Neural
    Networks", Science 313 (2006), doi:10.1126/science.1127647.

    Examples
    --------
    >>> layers = [keras.layers.Dense(100, "relu"), keras.layers.Dense(50, "relu")]
    >>> model = autoencoder(keras.Sequential([keras.Input((784,)), *layers]))
    >>> [layer.units for layer in model.get_layer("decoder").layers], model.output_shape
    ([100, 784], (None, 784))
    """
    inputs, code = _encoded(encoder)
    if decoder is None:
        decoder = _mirrored(encoder)
    elif not isinstance(decoder, keras.Layer):
        raise TypeError(f"decoder must be a model or layer, received {type(decoder).__name__}")
    try:
        outputs = decoder(code)
    except ValueError as error:
        raise ValueError(
            f"decoder must take the codes of the encoder, of shape {code.shape}: {error}"
        ) from None
    if outputs.shape != inputs.shape:
        raise ValueError(
            f"decoder must return the encoder's input shape {inputs.shape}, "
            f"received {outputs.shape}"
        )
    return keras.Model(inputs, outputs, name="autoencoder")


def twins(encoder: keras.Model) -> keras.Model:
    """Let one encoder look at two inputs, and say whether they belong together.

    ``logit(same) = w · |e(a) - e(b)| + c``: which order the two have does not matter. Train it on
    what `same_class_pairs` returns, with binary cross-entropy from logits.

    Parameters
    ----------
    encoder : keras.Model
        Built, with one input and one output. The same object becomes part of the result, once, so
        both inputs meet the same weights.

    Returns
    -------
    keras.Model
        Functional, not compiled; it maps pairs of shape (n, 2, ...) to logits of shape (n, 1).

    Raises
    ------
    TypeError, ValueError
        If the encoder is not a model or not built.

    Notes
    -----
    J. Bromley, I. Guyon, Y. LeCun, E. Säckinger and R. Shah, "Signature Verification using a
    'Siamese' Time Delay Neural Network", NIPS 1993.

    Examples
    --------
    >>> encoder = keras.Sequential([keras.Input((28, 28)), keras.layers.Flatten()])
    >>> model = twins(encoder)
    >>> model.input_shape, model.output_shape
    ((None, 2, 28, 28), (None, 1))
    """
    one, _ = _encoded(encoder)
    pairs = keras.Input((2, *one.shape[1:]), dtype=one.dtype, name="pairs")
    first, second = encoder(pairs[:, 0]), encoder(pairs[:, 1])
    apart = keras.layers.Flatten()(keras.ops.abs(first - second))
    return keras.Model(pairs, keras.layers.Dense(1, name="same")(apart), name="twins")


def _encoded(encoder):
    """Return an input and the encoder's output for it."""
    if not isinstance(encoder, keras.Model):
        raise TypeError(f"encoder must be a keras.Model, received {type(encoder).__name__}")
    if not encoder.built or not getattr(encoder, "inputs", None):
        raise ValueError(f"encoder {encoder.name!r} must be built: give it a keras.Input")
    if len(encoder.inputs) != 1 or len(encoder.outputs) != 1:
        raise ValueError(
            f"encoder {encoder.name!r} must have one input and one output, "
            f"received {len(encoder.inputs)} and {len(encoder.outputs)}"
        )
    [tensor] = encoder.inputs
    inputs = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype)
    return inputs, encoder(inputs)


def _mirrored(encoder):
    layers = [layer for layer in encoder.layers if layer.weights]
    dense = [layer for layer in layers if isinstance(layer, keras.layers.Dense)]
    others = [
        layer.name
        for layer in layers
        if not isinstance(layer, (keras.layers.Dense, keras.layers.BatchNormalization))
    ]
    if others or not dense:
        raise ValueError(
            f"decoder must be given for encoder {encoder.name!r}: only dense layers can be "
            f"mirrored, received {others or 'none'}"
        )
    shape = encoder.inputs[0].shape[1:]
    if None in shape:
        raise ValueError(f"encoder must have a fixed input shape, received {(None, *shape)}")
    hidden = [
        keras.layers.Dense(layer.units, "relu", kernel_initializer="he_normal")
        for layer in dense[-2::-1]
    ]
    back = [keras.layers.Dense(math.prod(shape))]
    if len(shape) > 1:
        back.append(keras.layers.Reshape(shape))
    code = keras.Input(encoder.outputs[0].shape[1:])
    return keras.Sequential([code, *hidden, *back], name="decoder")


# ------------------------------------------------------------------------------------------- tasks

TASKS = ("autoencoder", "masked", "rotation", "pairs")


def examples(
    task: str,
    x: np.ndarray,
    seed: int,
    y: np.ndarray | None = None,
    *,
    fraction: float = 0.5,
    patch: int = 7,
) -> tuple[np.ndarray, np.ndarray]:
    """Make the data of a pretraining task: what the network sees, and the right answers.

    Parameters
    ----------
    task : str
        One of `TASKS`: the image itself; the whole image behind covered patches; the number of
        quarter turns; whether two images belong together.
    x : array of shape (n, height, width) or (n, height, width, channels)
        Images.
    seed : int
        Decides what is covered, turned or paired.
    y : array of shape (n,), optional
        What "pairs" have in common or not; no other task looks at it.
    fraction, patch : float, int
        For "masked", see `masked_patches`.

    Returns
    -------
    inputs, targets : numpy.ndarray
        n of each; for "pairs" the inputs have shape (n, 2, height, width).

    Raises
    ------
    ValueError
        For an unknown task, "pairs" without y, or what the function for the task refuses.

    Examples
    --------
    >>> x = np.arange(32.0).reshape(2, 4, 4)
    >>> inputs, targets = examples("masked", x, seed=0, patch=2)
    >>> bool(((inputs == targets) | (inputs == 0)).all())
    True
    """
    _known(task)
    x = _images(x)
    if task == "autoencoder":
        return x, x
    if task == "masked":
        return masked_patches(x, fraction, seed, patch=patch).x, x
    if task == "rotation":
        return rotations(x, seed)
    if y is None:
        raise ValueError("y must be given for the task 'pairs': it says what belongs together")
    return same_class_pairs(x, y, len(x), seed)


def learner(
    task: str, encoder: keras.Model, optimizer: str | keras.optimizers.Optimizer = "adam"
) -> keras.Model:
    """Build the model that learns a task, around an encoder, and compile it.

    Parameters
    ----------
    task : str
        One of `TASKS`. The first two get `autoencoder` and the squared error, "rotation" a dense
        layer with four logits and cross-entropy, "pairs" `twins` and binary cross-entropy; the
        last two report the metric ``accuracy``.
    encoder : keras.Model
        Built, with one input and one output. The same object becomes part of the result: after
        training, use it.
    optimizer : str or keras.optimizers.Optimizer

    Returns
    -------
    keras.Model
        For `examples` of this task.

    Raises
    ------
    TypeError, ValueError
        For an unknown task, or as for `autoencoder` and `twins`.

    Examples
    --------
    >>> encoder = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "relu")])
    >>> model = learner("rotation", encoder)
    >>> model.output_shape, model.layers[0] is encoder
    ((None, 4), True)
    """
    _known(task)
    if task in ("autoencoder", "masked"):
        model, loss, metrics = autoencoder(encoder), "mse", []
    elif task == "rotation":
        _, code = _encoded(encoder)
        flat = [keras.layers.Flatten()] if len(code.shape) > 2 else []
        model = keras.Sequential([encoder, *flat, keras.layers.Dense(4, name="turns")])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        metrics = ["accuracy"]
    else:
        model, loss = twins(encoder), keras.losses.BinaryCrossentropy(from_logits=True)
        metrics = [keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)]
    model.compile(optimizer, loss, metrics=metrics)
    return model


def _known(task):
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, received {task!r}")


def filters(model: keras.Model, layer: str, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Return the weights that lead to each unit of a dense layer as images.

    Parameters
    ----------
    model : keras.Model
    layer : str
        Name of a dense layer that sees flattened images.
    shape : tuple of int, optional
        Height and width of the images; by default they are square.

    Returns
    -------
    numpy.ndarray, shape (units, height, width)

    Raises
    ------
    ValueError
        If the model has no dense layer of that name, or its inputs do not make such an image.

    Examples
    --------
    >>> dense = keras.layers.Dense(5, name="hidden_1")
    >>> model = keras.Sequential([keras.Input((6, 6)), keras.layers.Flatten(), dense])
    >>> filters(model, "hidden_1").shape
    (5, 6, 6)
    """
    dense = [each.name for each in model.layers if isinstance(each, keras.layers.Dense)]
    if layer not in dense:
        raise ValueError(
            f"layer must be a dense layer of model {model.name!r}, one of {dense}, "
            f"received {layer!r}"
        )
    kernel = model.get_layer(layer).get_weights()[0]
    side = math.isqrt(len(kernel))
    height, width = shape or (side, side)
    if height * width != len(kernel):
        raise ValueError(
            f"shape must have {len(kernel)} pixels, as many as layer {layer!r} has inputs, "
            f"received {(height, width)}"
        )
    return kernel.T.reshape(-1, height, width)


# --- arguments ------------------------------------------------------------------------------------


def _images(x):
    x = np.asarray(x)
    if x.ndim not in (3, 4) or not x.size:
        raise ValueError(
            "x must hold images, shape (n, height, width) or (n, height, width, channels), "
            f"received shape {x.shape}"
        )
    return x


def _count(name, value, low):
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, received {value!r}") from None
    if count < low:
        raise ValueError(f"{name} must be at least {low}, received {count}")
    return count
