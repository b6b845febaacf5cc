"""Fashion-MNIST, always there: 12,000 images inside the package, all 70,000 on request.

`load_fashion_mnist` returns a `Dataset` whose arrays are read-only and whose ``name`` and
``source`` say what was loaded and from where. No file is used before its checksum has been
verified, and nothing is ever replaced by other data: what cannot be had raises `DataError`, whose
message says what to do next.

Primary source: H. Xiao, K. Rasul and R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for
Benchmarking Machine Learning Algorithms", 2017, arXiv:1708.07747. The images are Zalando SE's,
under the MIT licence (``ch11lib/data/LICENSE-fashion-mnist``).
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
import errno
import gzip
import hashlib
from importlib import resources
import math
import operator
import os
from pathlib import Path
import sys
from typing import NamedTuple, Self
import warnings
import zlib

import numpy as np

__all__ = [
    "CLASS_NAMES",
    "DataError",
    "Dataset",
    "cache_folder",
    "find_originals",
    "load_fashion_mnist",
    "parse_idx",
    "read_originals",
]

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class DataError(RuntimeError):
    """Data that is missing, damaged or out of reach; the message says what to do next."""


# ----------------------------------------------------------------------------- the data set


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images and labels in three parts, checked when it is made and read-only from then on.

    The arrays are read-only views, so one data set can be handed to any number of models, threads
    and plots: an accidental ``data.x_train /= 2`` raises instead of changing everyone's data.
    Whoever wants to write takes a copy: ``data.x_train.copy()``. Methods return a new `Dataset`
    and share memory with the old one where nothing was computed.

    Attributes
    ----------
    x_train, x_valid, x_test : numpy.ndarray
        float32, shapes (n, ...) with the same trailing shape, here (n, 28, 28) with values in
        [0, 1], or (n, 784) after `flattened`.
    y_train, y_valid, y_test : numpy.ndarray
        int32, shapes (n,): positions in ``class_names``.
    class_names : tuple of str
        One name per class.
    name : str
        What was loaded, for example ``"fashion-mnist-12k"``.
    source : str
        Where it was loaded from.
    mean, std : float
        What `standardized` subtracted and divided by: ``original = x * std + mean``. 0 and 1 when
        it has not been called.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_valid: np.ndarray
    y_valid: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]
    name: str
    source: str = ""
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "class_names", tuple(self.class_names))
        for split in ("train", "valid", "test"):
            x, y = getattr(self, f"x_{split}"), getattr(self, f"y_{split}")
            _check_array(f"x_{split}", x, np.float32)
            _check_array(f"y_{split}", y, np.int32)
            if y.ndim != 1 or x.ndim < 2 or len(x) != len(y) or len(y) == 0:
                raise ValueError(
                    f"x_{split} and y_{split} must have shapes (n, ...) and (n,) with n > 0, "
                    f"got {x.shape} and {y.shape}"
                )
            if x.shape[1:] != self.x_train.shape[1:]:
                raise ValueError(
                    f"x_{split} must have the example shape of x_train, "
                    f"{self.x_train.shape[1:]}, got {x.shape[1:]}"
                )
            if y.min() < 0 or y.max() >= len(self.class_names):
                raise ValueError(
                    f"y_{split} must lie in 0..{len(self.class_names) - 1}, one number for each "
                    f"of class_names, got {y.min()}..{y.max()}"
                )
            for field, array in ((f"x_{split}", x), (f"y_{split}", y)):
                view = array.view()  # the caller's own array keeps its flags
                view.flags.writeable = False
                object.__setattr__(self, field, view)

    def __repr__(self) -> str:
        """One stable line: name, sizes, shape of an example, whether it is standardized."""
        sizes = ", ".join(f"{s}={len(getattr(self, f'y_{s}'))}" for s in ("train", "valid", "test"))
        done = "" if (self.mean, self.std) == (0.0, 1.0) else ", standardized"
        return f"Dataset({self.name!r}, {sizes}, shape={self.x_train.shape[1:]}{done})"

    def take(self, n_train: int, n_valid: int | None = None) -> Self:
        """Keep the first images only; the test images stay.

        Any prefix of ``"fashion-mnist-12k"`` is class-balanced: the counts of two classes differ
        by one at most. A prefix of the full data set is an arbitrary sample.

        Parameters
        ----------
        n_train : int
            Number of training images to keep, 1 to ``len(y_train)``.
        n_valid : int, optional
            Number of validation images to keep; all of them by default.

        Returns
        -------
        Dataset
            Views of the same memory, without copying.

        Raises
        ------
        TypeError
            If a number is not an integer.
        ValueError
            If a number is smaller than 1 or larger than what is there.

        Examples
        --------
        >>> load_fashion_mnist().take(5000)
        Dataset('fashion-mnist-12k', train=5000, valid=2000, test=2000, shape=(28, 28))
        """
        n_train = _check_count("n_train", n_train, len(self.y_train))
        if n_valid is None:
            n_valid = len(self.y_valid)
        n_valid = _check_count("n_valid", n_valid, len(self.y_valid))
        return replace(
            self,
            x_train=self.x_train[:n_train],
            y_train=self.y_train[:n_train],
            x_valid=self.x_valid[:n_valid],
            y_valid=self.y_valid[:n_valid],
        )

    def few_labels(self, n: int, seed: int) -> Self:
        """Keep n training images, equally many of each class, chosen by a seed.

        Any number of images chosen with one seed contains every smaller number: a label-efficiency
        curve then measures what *more* labels do, not what others do. Validation and test images
        stay.

        Parameters
        ----------
        n : int
            Number of training images to keep. Counts of two classes differ by one at most.
        seed : int

        Returns
        -------
        Dataset

        Raises
        ------
        TypeError, ValueError
            If n is not an integer from 1 to ``len(y_train)``, or a class has too few images.

        Examples
        --------
        >>> few = load_fashion_mnist().few_labels(25, seed=1)
        >>> sorted(np.bincount(few.y_train).tolist())
        [2, 2, 2, 2, 2, 3, 3, 3, 3, 3]
        """
        rows = self.few_rows(n, seed)
        return replace(self, x_train=self.x_train[rows], y_train=self.y_train[rows])

    def few_rows(self, n: int, seed: int) -> np.ndarray:
        """Return the numbers of the training images that `few_labels` keeps, in its order."""
        n = _check_count("n", n, len(self.y_train))
        order = np.random.default_rng(seed).permutation(len(self.y_train))
        labels = self.y_train[order]
        turn = np.empty(len(order), int)  # how many of the same class come before
        for label in range(len(self.class_names)):
            turn[labels == label] = np.arange(np.count_nonzero(labels == label))
        order = order[np.argsort(turn, kind="stable")[:n]]
        counts = np.bincount(self.y_train[order], minlength=len(self.class_names))
        if np.ptp(counts) > 1:
            rarest = self.class_names[counts.argmin()]
            raise ValueError(
                f"n must leave equally many training images of each class, received {n} "
                f"with {counts.min()} of {rarest!r} only"
            )
        return order

    def standardized(self) -> Self:
        """Shift and scale all three parts so that the training pixels have mean 0 and std 1.

        One number each, taken over all pixels of all *training* images: the statistics of
        validation and test images must not leak into what a model is fed. ``take`` before
        ``standardized`` therefore uses the images that were taken, and no others.

        Returns
        -------
        Dataset
            With new arrays, and with ``mean`` and ``std`` set for the way back.

        Raises
        ------
        ValueError
            If all training pixels are equal, or one is not finite.

        Examples
        --------
        >>> data = load_fashion_mnist().take(1000).standardized()
        >>> bool(abs(data.x_train.mean()) < 1e-4), bool(abs(data.x_train.std() - 1) < 1e-4)
        (True, True)
        """
        mean = float(self.x_train.mean(dtype=np.float64))
        std = float(self.x_train.std(dtype=np.float64))
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(
                f"x_train must be finite and not constant to be standardized, "
                f"got mean {mean} and standard deviation {std}"
            )
        scaled = {}
        for field in ("x_train", "x_valid", "x_test"):
            x = getattr(self, field) - np.float32(mean)
            x /= np.float32(std)
            scaled[field] = x
        # Composed, so that x * std + mean is the original also after a second call.
        return replace(self, **scaled, mean=self.mean + self.std * mean, std=self.std * std)

    def halved(self) -> Self:
        """Halve height and width: every pixel becomes the mean of a square of four.

        Returns
        -------
        Dataset
            With arrays of shape (n, height // 2, width // 2), for a quarter of the computation.

        Raises
        ------
        ValueError
            If the images are flattened, or height or width is odd.

        Examples
        --------
        >>> load_fashion_mnist().halved()
        Dataset('fashion-mnist-12k', train=8000, valid=2000, test=2000, shape=(14, 14))
        """
        shape = self.x_train.shape[1:]
        if len(shape) != 2 or any(side % 2 for side in shape):
            raise ValueError(f"images must have an even height and width, have shape {shape}")
        height, width = (side // 2 for side in shape)
        arrays = {f: getattr(self, f).reshape(-1, height, 2, width, 2) for f in _IMAGE_FIELDS}
        return replace(self, **{f: x.mean(axis=(2, 4)) for f, x in arrays.items()})

    def flattened(self) -> Self:
        """Give every image the shape of one row.

        Returns
        -------
        Dataset
            With arrays of shape (n, 784) for images of 28 by 28 pixels.

        Examples
        --------
        >>> load_fashion_mnist().flattened()
        Dataset('fashion-mnist-12k', train=8000, valid=2000, test=2000, shape=(784,))
        """
        return replace(
            self,
            **{f: (x := getattr(self, f)).reshape(len(x), -1) for f in _IMAGE_FIELDS},
        )


_IMAGE_FIELDS = ("x_train", "x_valid", "x_test")


def _check_array(name, value, dtype):
    if not isinstance(value, np.ndarray) or value.dtype != dtype:
        got = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name} must be a NumPy array of {np.dtype(dtype)}, got {got}")


def _check_count(name, value, largest):
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not 1 <= count <= largest:
        raise ValueError(f"{name} must lie in 1..{largest}, got {count}")
    return count


def load_fashion_mnist(size: str = "12k", *, progressbar: bool = True) -> Dataset:
    """Load Fashion-MNIST: 28 by 28 grey-scale images of ten kinds of clothing.

    Parameters
    ----------
    size : {"12k", "full"}
        ``"12k"``: 8,000 training, 2,000 validation and 2,000 test images from a file inside the
        package, equally many of each class in every part and, up to one, in every prefix of a
        part. ``"full"``: 55,000, 5,000 and 10,000, in the order of the original files, from the
        first of these places: the folder that the environment variable ``CH11_DATA_DIR`` names,
        Keras's cache, Debian's package ``dataset-fashion-mnist``, the cache of earlier downloads
        (see `cache_folder`), a download of 31 MB.
    progressbar : bool
        Whether a download shows its progress, on stderr.

    Returns
    -------
    Dataset
        Images float32 in [0, 1], shape (n, 28, 28); labels int32, shape (n,). In both sizes the
        training images are among the first 55,000 of the original training set, the validation
        images among its last 5,000, and the test images come from the original test set: so
        ``"12k"`` never trains on what ``"full"`` validates or tests on.

    Raises
    ------
    ValueError
        If ``size`` is neither of the two.
    DataError
        If the data is missing or damaged, or cannot be downloaded. A damaged file in a folder
        that ``CH11_DATA_DIR`` names is an error; one in a place that was only found is reported
        by a warning and left aside; one among earlier downloads is fetched again.

    Examples
    --------
    >>> data = load_fashion_mnist()
    >>> data
    Dataset('fashion-mnist-12k', train=8000, valid=2000, test=2000, shape=(28, 28))
    >>> data.class_names[data.y_train[0]]
    'Sneaker'
    """
    if size == "12k":
        table, source = _read_embedded(), f"ch11lib/data/{EMBEDDED.name}"
        images, labels = table[:, 1:].reshape(-1, 28, 28), table[:, 0]
        parts = [(images[a:b], labels[a:b]) for a, b in ((0, 8000), (8000, 10000), (10000, 12000))]
    elif size == "full":
        originals, source = _load_originals(progressbar)
        x, y = originals["train-images-idx3-ubyte"], originals["train-labels-idx1-ubyte"]
        test = originals["t10k-images-idx3-ubyte"], originals["t10k-labels-idx1-ubyte"]
        parts = [(x[:55000], y[:55000]), (x[55000:], y[55000:]), test]
    else:
        raise ValueError(f'size must be "12k" or "full", got {size!r}')
    arrays = [a for x, y in parts for a in (x / np.float32(255), y.astype(np.int32))]
    name = f"fashion-mnist-{size}"
    return Dataset(*arrays, CLASS_NAMES, name, source)  # type: ignore[call-arg, arg-type]


# --------------------------------------------------------------------------- embedded images

# Written by `python -m ch11lib.data.build`, which also explains the format.
EMBEDDED = resources.files("ch11lib.data") / "fashion-mnist-12k-idx2-ubyte.gz"
EMBEDDED_SHA256 = "1a0cf9a11c876135a6eadb5adaca20bb91b669f018c1fae6c4b3e6e81cb0c85a"
_EMBEDDED_SHAPE = (12000, 1 + 28 * 28)  # a row: the label, then the pixels


def _read_embedded() -> np.ndarray:
    """Return the verified table of labels and pixels."""
    repair = (
        "What to do: reinstall the package (`pip install --force-reinstall --no-deps .` in its "
        "folder; in a clone, `git checkout ch11lib/data` first)."
    )
    try:
        packed = EMBEDDED.read_bytes()
    except OSError as error:
        raise DataError(f"The embedded data set cannot be read: {error}. {repair}") from error
    digest = hashlib.sha256(packed).hexdigest()
    if digest != EMBEDDED_SHA256:
        raise DataError(
            f"The embedded data set is damaged: {EMBEDDED} has {len(packed)} bytes with SHA-256 "
            f"{digest}, not {EMBEDDED_SHA256}. {repair}"
        )
    return parse_idx(gzip.decompress(packed), _EMBEDDED_SHAPE)


# ---------------------------------------------------------------------------- original files


class _Original(NamedTuple):
    shape: tuple[int, ...]
    sha256: str  # of the IDX content, however it is compressed
    gz_sha256: str  # of the .gz file as its authors and their mirrors publish it


_ORIGINALS = {
    "train-images-idx3-ubyte": _Original(
        (60000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ),
    "train-labels-idx1-ubyte": _Original(
        (60000,),
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ),
    "t10k-images-idx3-ubyte": _Original(
        (10000, 28, 28),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ),
    "t10k-labels-idx1-ubyte": _Original(
        (10000,),
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
}

# The first serves `keras.datasets`, the second is the authors' own repository.
_MIRRORS = (
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)

_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def parse_idx(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Read an array of unsigned bytes from the content of an IDX file.

    The format: two zero bytes, the type (8 stands for unsigned bytes), the number of dimensions,
    each length as a big-endian 32-bit integer, then the values in C order.

    Parameters
    ----------
    data : bytes
        The whole file, decompressed.
    shape : tuple of int
        The shape that the file must declare.

    Returns
    -------
    numpy.ndarray
        uint8, read-only, of the given shape.

    Raises
    ------
    DataError
        If the header is not that of an array of this shape, or values are missing or left over.

    Examples
    --------
    >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]), (3,))
    array([7, 8, 9], dtype=uint8)
    """
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
    if data[: len(header)] != header:
        raise DataError(
            f"This is not the content of an IDX file of unsigned bytes with shape {shape}: it "
            f"begins with {data[: len(header)].hex(' ') or 'nothing'}, not {header.hex(' ')}."
        )
    if len(data) != len(header) + math.prod(shape):
        raise DataError(
            f"An IDX file of shape {shape} has {math.prod(shape)} values after its header; "
            f"this one has {len(data) - len(header)}."
        )
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)


def _locate(folder: Path, name: str) -> Path | None:
    """Return the path of an original file, compressed or not, if it is there."""
    for path in (folder / f"{name}.gz", folder / name):
        if os.path.isfile(path):
            return path
    return None


def _read_original(path: Path, name: str) -> np.ndarray:
    """Read one original file and verify its content."""
    original = _ORIGINALS[name]
    limit = 4 + 4 * len(original.shape) + math.prod(original.shape)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read(limit + 1)  # one more than there should be, never a bomb
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    try:
        array = parse_idx(data, original.shape)
    except DataError as error:
        raise DataError(f"{path} is damaged. {error}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != original.sha256:
        raise DataError(
            f"{path} is damaged: SHA-256 of its decompressed content is {digest}, "
            f"not {original.sha256}."
        )
    return array


def read_originals(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read and verify the four original files of Fashion-MNIST.

    Parameters
    ----------
    folder : path
        Where they are, as ``NAME.gz`` or decompressed as ``NAME``.

    Returns
    -------
    dict
        From NAME (``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
        ``t10k-images-idx3-ubyte``, ``t10k-labels-idx1-ubyte``) to the array, uint8, read-only.

    Raises
    ------
    DataError
        If a file is missing, unreadable, or its content is not the published one.
    """
    folder = Path(folder)
    arrays = {}
    for name in _ORIGINALS:
        path = _locate(folder, name)
        if path is None:
            raise DataError(f"{folder} has no file {name}.gz (or {name}).")
        arrays[name] = _read_original(path, name)
    return arrays


def cache_folder() -> Path:
    """Return the folder for downloads: ``CH11_CACHE_DIR``, or the system's usual place."""
    chosen = os.environ.get("CH11_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    import pooch

    return Path(pooch.os_cache("ch11lib"))


def _chosen_folder() -> Path | None:
    chosen = os.environ.get("CH11_DATA_DIR")
    return Path(chosen).expanduser() if chosen else None


_CHOSEN_HELP = (
    "What to do: put intact copies of the four files of Fashion-MNIST into the folder that "
    "CH11_DATA_DIR names, or unset that variable, so that they are looked for elsewhere and "
    "downloaded if need be."
)


def _is_complete(folder: Path) -> bool:
    return all(_locate(folder, name) for name in _ORIGINALS)


def _places() -> list[tuple[str, Path]]:
    """Return where the original files may be without having been named, in order."""
    keras_home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    return [
        ("Keras's cache", Path(keras_home, "datasets", "fashion-mnist")),
        ("Debian's package dataset-fashion-mnist", _DEBIAN_FOLDER),
    ]


def find_originals() -> tuple[str, Path] | None:
    """Say where ``load_fashion_mnist("full")`` would look first, without reading the data.

    Returns
    -------
    tuple of str and Path, or None
        A description and the folder; None if it would have to download.

    Raises
    ------
    DataError
        If ``CH11_DATA_DIR`` names a folder that has not got all the files.
    """
    chosen = _chosen_folder()
    if chosen:
        if not _is_complete(chosen):
            raise DataError(f"{chosen} has not got the four files of Fashion-MNIST. {_CHOSEN_HELP}")
        return "CH11_DATA_DIR", chosen
    for label, folder in (*_places(), ("earlier download", cache_folder() / "fashion-mnist")):
        if _is_complete(folder):
            return label, folder
    return None


def _load_originals(progressbar: bool) -> tuple[dict[str, np.ndarray], str]:
    """Return the four arrays and where they come from."""
    chosen = _chosen_folder()
    if chosen:
        try:
            return read_originals(chosen), f"CH11_DATA_DIR: {chosen}"
        except DataError as error:
            raise DataError(f"{error} {_CHOSEN_HELP}") from error
    for label, folder in _places():
        if _is_complete(folder):
            try:
                return read_originals(folder), f"{label}: {folder}"
            except DataError as error:
                warnings.warn(
                    f"Left aside {label}: {error} Delete or renew that file to stop this warning.",
                    stacklevel=3,
                )
    folder = cache_folder() / "fashion-mnist"
    for name in _ORIGINALS:
        _download(name, folder, progressbar)
    return read_originals(folder), f"download: {folder}"


def _download(name: str, folder: Path, progressbar: bool) -> None:
    """Put an intact ``NAME.gz`` into a folder, unless there is one.

    `pooch.retrieve` does it: it leaves a file alone whose checksum is right, and otherwise writes
    to a temporary file, which takes the place of the old one only after its checksum was verified.
    """
    import pooch
    from requests.exceptions import RequestException  # the library that pooch downloads with

    failures = []
    for mirror in _MIRRORS:
        try:
            pooch.retrieve(
                f"{mirror}{name}.gz",
                known_hash=f"sha256:{_ORIGINALS[name].gz_sha256}",
                fname=f"{name}.gz",
                path=folder,
                downloader=pooch.HTTPDownloader(progressbar=progressbar, chunk_size=2**16),
            )
        except (RequestException, ValueError) as error:  # ValueError: the checksum was wrong
            failures.append(f"{mirror}: {error}")
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise DataError(
                f"{name}.gz cannot be stored in {folder}: {error}. What to do: "
                + ("free 31 MB there, or set" if full else "set")
                + " CH11_CACHE_DIR to a folder with room that you may write to; "
                'or use size="12k", which needs no file of its own.'
            ) from error
        else:
            return
    raise DataError(
        f"{name}.gz could not be downloaded. "
        + " ".join(f"[{failure}]" for failure in failures)
        + ' What to do: try again with a network connection; or use size="12k", which needs none; '
        "or put the four files of Fashion-MNIST into a folder and set CH11_DATA_DIR to it."
    )


# ----------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m ch11lib data``: verify the embedded images and get the full data set.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after the subcommand; those of the process by default.

    Returns
    -------
    int
        Exit status: 0, or 1 if something is missing or damaged.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ch11lib data",
        description="Verify the embedded Fashion-MNIST images and get all 70,000: from a copy on "
        "this machine, else by a download of 31 MB.",
    )
    parser.add_argument("--size", choices=("12k", "full"), default="full", help="default: full")
    size = parser.parse_args(argv).size
    try:
        for wanted in ("12k", "full")[: 1 if size == "12k" else 2]:
            data = load_fashion_mnist(wanted)
            print(f"{data!r}\n    verified, from {data.source}")
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
