"""Make the embedded file: ``python -m ch11lib.data.build [--source DIR]``.

Which images. No random numbers, so nothing depends on a generator: the first 800 images of each
class among the first 55,000 of the original training set (train), the first 200 of each class
among its last 5,000 (valid), the first 200 of each class of the original test set (test). They are
stored in blocks of ten, one image of each class in a block, so that every prefix is balanced;
inside a block they are sorted by the CRC-32 of their pixels, which is as good as a shuffle, so that
the labels do not repeat with period ten.

Which format. One IDX array of unsigned bytes, 12,000 rows of a label and 784 pixels, in a gzip
file: the format of the original files, readable in any language and free of pickles. The file must
come out the same, byte for byte, on every machine. An .npz file does not: its header text depends
on the version of NumPy, its compressed bytes on the compression library (zlib and zlib-ng differ,
because they search for repetitions differently). Here the header is written by hand, and the
compressor runs with ``Z_RLE``, where a repetition may only be a run of one byte, so there is
nothing to search for: zlib 1.2.13, zlib-ng 2.3.3 and the zlib 1.3.1 of Chromium and Node gave equal
bytes. It costs 1.5 % in size (5.33 MB, not 5.25), and unpacks in 0.04 s; xz would save 0.8 MB and
bzip2 0.5 MB, but both take eight times as long to unpack.
"""

import argparse
from collections.abc import Sequence
import hashlib
import os
from pathlib import Path
import sys
import tempfile
import zlib

from ch11lib import datasets
import numpy as np

__all__ = ["build", "main", "select"]


def select(images: np.ndarray, labels: np.ndarray, n_per_class: int) -> np.ndarray:
    """Choose the first images of each of the ten classes, in blocks of one image per class.

    Parameters
    ----------
    images : numpy.ndarray
        uint8, shape (n, ...).
    labels : numpy.ndarray
        Class numbers 0 to 9, shape (n,).
    n_per_class : int
        How many of each class.

    Returns
    -------
    numpy.ndarray
        Positions, shape (10 * n_per_class,). Block b of ten holds the b-th image of every class,
        in ascending order of the CRC-32 of the pixels.

    Raises
    ------
    ValueError
        If a class has fewer images than that.

    Examples
    --------
    >>> labels = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 0])
    >>> images = np.arange(16, dtype=np.uint8).reshape(16, 1)
    >>> select(images, labels, 1)
    array([ 6,  2, 15, 11,  7,  5,  1, 13,  0,  4])
    """
    rows = [np.flatnonzero(labels == c)[:n_per_class] for c in range(10)]
    if min(map(len, rows)) < n_per_class:
        found = [len(row) for row in rows]
        raise ValueError(f"labels must hold each class {n_per_class} times, got {found}")
    blocks = np.stack(rows, axis=1)
    keys = np.array([[zlib.crc32(images[i].tobytes()) for i in block] for block in blocks])
    return np.take_along_axis(blocks, keys.argsort(axis=1, kind="stable"), axis=1).ravel()


def build(source: str | os.PathLike) -> bytes:
    """Make the content of the embedded file from the original ones.

    Parameters
    ----------
    source : path
        Folder of the four original files; their checksums are verified.

    Returns
    -------
    bytes
        A gzip file that holds an IDX array of shape (12000, 785).

    Raises
    ------
    ch11lib.datasets.DataError
        If an original file is missing or damaged.
    """
    originals = datasets.read_originals(source)
    rows = []
    for prefix, start, stop, n_per_class in (
        ("train", 0, 55000, 800),
        ("train", 55000, 60000, 200),
        ("t10k", 0, 10000, 200),
    ):
        labels = originals[f"{prefix}-labels-idx1-ubyte"][start:stop]
        images = originals[f"{prefix}-images-idx3-ubyte"][start:stop]
        chosen = select(images, labels, n_per_class)
        rows.append(np.column_stack([labels[chosen], images[chosen].reshape(len(chosen), -1)]))
    table = np.concatenate(rows)
    idx = bytes([0, 0, 8, 2]) + np.array(table.shape, ">u4").tobytes() + table.tobytes()

    # gzip, RFC 1952: no time, no name, "unknown" operating system, all of which would vary.
    header = bytes([0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 255])
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 8, zlib.Z_RLE)
    body = deflate.compress(idx) + deflate.flush()
    return header + body + np.array([zlib.crc32(idx), len(idx)], "<u4").tobytes()


def main(argv: Sequence[str] | None = None) -> int:
    """Write the embedded file; see the module's docstring.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments of the command line; those of the process by default.

    Returns
    -------
    int
        Exit status: 0, or 1 if nothing was written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ch11lib.data.build",
        description="Rebuild the embedded Fashion-MNIST images from the original files.",
    )
    parser.add_argument("--source", help="folder of the original files (default: where they are)")
    source = parser.parse_args(argv).source
    try:
        if source is None:
            found = datasets.find_originals()
            if found is None:
                parser.error("no original files here: run `python -m ch11lib data --full` first")
            source = found[1]
        packed = build(source)
    except datasets.DataError as error:
        print(error, file=sys.stderr)
        return 1
    digest = hashlib.sha256(packed).hexdigest()
    if digest != datasets.EMBEDDED_SHA256:
        print(
            f"Nothing written: SHA-256 {digest}, expected {datasets.EMBEDDED_SHA256}. If the "
            "choice of images was changed on purpose, put the new checksum into datasets.py; if "
            "not, this machine's zlib compresses differently, and the committed file stays.",
            file=sys.stderr,
        )
        return 1
    target = Path(__file__).with_name(datasets.EMBEDDED.name)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # a rename is all or nothing
        part = Path(folder, target.name)
        part.write_bytes(packed)
        part.replace(target)
    print(f"{target}: {len(packed)} bytes, SHA-256 {digest}, from {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
