"""The data: what is in it, that it is what its authors published, and every way to fail."""

import contextlib
import dataclasses
import errno
import functools
import gzip
import hashlib
import http.server
import math
import os
from pathlib import Path
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import zlib

from ch11lib import datasets
from ch11lib.data import build
from ch11lib.datasets import DataError, Dataset, load_fashion_mnist
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import numpy as np
import pytest
from zlib_ng import zlib_ng

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
needs_originals = pytest.mark.skipif(
    not all((DEBIAN_FOLDER / f"{name}.gz").is_file() for name in NAMES),
    reason="Debian's package dataset-fashion-mnist is not installed",
)


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Let no test see the user's folders or reach a network."""
    monkeypatch.delenv("CH11_DATA_DIR", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("CH11_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "_DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(datasets, "_MIRRORS", ("http://127.0.0.1:9/a/", "http://127.0.0.1:9/b/"))


@pytest.fixture(scope="module")
def data():
    return load_fashion_mnist()


# ------------------------------------------------------------------------ the embedded images


def test_12k_has_the_promised_shapes_types_and_values(data):
    for split, n in (("train", 8000), ("valid", 2000), ("test", 2000)):
        x, y = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
        assert (x.shape, x.dtype) == ((n, 28, 28), np.float32)
        assert (y.shape, y.dtype) == ((n,), np.int32)
        assert x.flags.c_contiguous
        assert x.min() == 0
        assert x.max() == 1
        # 8-bit grey levels, nothing else: each value is k / 255 for an integer k.
        assert np.array_equal(np.round(x * 255).astype(np.uint8) / np.float32(255), x)
    assert len(data.class_names) == 10
    assert data.name == "fashion-mnist-12k"
    assert data.source == "ch11lib/data/fashion-mnist-12k-idx2-ubyte.gz"


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_every_prefix_is_class_balanced(data, split):
    counts = np.cumsum(np.eye(10, dtype=int)[getattr(data, f"y_{split}")], axis=0)
    assert np.all(counts.max(axis=1) - counts.min(axis=1) <= 1)
    assert np.all(counts[9::10] == np.arange(1, len(counts) // 10 + 1)[:, None])


def test_labels_are_not_periodic(data):
    assert len({tuple(block) for block in data.y_train.reshape(-1, 10)}) > 700


def test_no_image_occurs_twice(data):
    images = [x.tobytes() for s in ("train", "valid", "test") for x in getattr(data, f"x_{s}")]
    assert len(set(images)) == 12000


def test_loading_is_fast():
    """Processor time, not the clock: other tests may run beside this one."""
    code = (
        "import time; from ch11lib.datasets import load_fashion_mnist as f;"
        "t = time.process_time(); f(); print(time.process_time() - t)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(2)
    ]
    assert min(seconds) < 0.3


def test_module_needs_no_tensorflow():
    code = (
        "import sys; import ch11lib.datasets as d; d.load_fashion_mnist();"
        "sys.exit(bool({'tensorflow', 'keras'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------- what the authors published


@needs_originals
def test_build_gives_the_committed_file_byte_for_byte():
    assert build.build(DEBIAN_FOLDER) == datasets.EMBEDDED.read_bytes()


@needs_originals
def test_checksums_belong_to_the_published_files():
    """Debian's files become the authors' own by putting back the names and times in the headers.

    The MD5 sums are those in the README of the authors' repository.
    """
    published = {
        NAMES[0]: ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", 1504176606),
        NAMES[1]: ("25c81989df183df01b3e8a0aad5dffbe", 1504176606),
        NAMES[2]: ("bef4ecab320f06d8554ea6380940ec79", 1504176627),
        NAMES[3]: ("bb300cfdad3c16e7a12a480ee83cd310", 1504176627),
    }
    for name, (md5, time) in published.items():
        packed = _as_published(name, time)
        assert hashlib.md5(packed).hexdigest() == md5
        assert hashlib.sha256(packed).hexdigest() == datasets._ORIGINALS[name].gz_sha256


def _as_published(name, time):
    header = b"\x1f\x8b\x08\x08" + time.to_bytes(4, "little") + b"\0\3" + name.encode() + b"\0"
    return header + (DEBIAN_FOLDER / f"{name}.gz").read_bytes()[10:]


@needs_originals
def test_both_sizes_agree_with_keras(tmp_path):
    """`keras.datasets` reads the same files with its own code."""
    folder = tmp_path / "keras" / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / f"{name}.gz").symlink_to(DEBIAN_FOLDER / f"{name}.gz")
    code = """
import numpy as np
from ch11lib.backend import keras
from ch11lib.datasets import load_fashion_mnist
(x, y), (x_test, y_test) = keras.datasets.fashion_mnist.load_data()
full, small = load_fashion_mnist("full"), load_fashion_mnist()
assert full.source.startswith("Keras's cache"), full.source
assert full.name == "fashion-mnist-full"
one = np.float32(255)
for ours, theirs in (
    (full.x_train, x[:55000] / one), (full.y_train, y[:55000]),
    (full.x_valid, x[55000:] / one), (full.y_valid, y[55000:]),
    (full.x_test, x_test / one), (full.y_test, y_test),
):
    assert np.array_equal(ours, theirs)
# The small parts come from the parts of the same name, so nothing leaks between the sizes.
for part, n in (("train", 800), ("valid", 200), ("test", 200)):
    theirs_x, theirs_y = getattr(full, "x_" + part), getattr(full, "y_" + part)
    chosen = np.sort(np.concatenate([np.flatnonzero(theirs_y == c)[:n] for c in range(10)]))
    ours = sorted((int(c), i.tobytes()) for i, c in
                  zip(getattr(small, "x_" + part), getattr(small, "y_" + part)))
    assert ours == sorted((int(theirs_y[i]), theirs_x[i].tobytes()) for i in chosen)
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}
    )


def test_file_does_not_depend_on_the_compression_library():
    """Builds of Python with zlib-ng in place of zlib must give the same bytes."""
    content = gzip.decompress(datasets.EMBEDDED.read_bytes())
    deflate = zlib_ng.compressobj(9, zlib_ng.DEFLATED, -15, 8, zlib_ng.Z_RLE)
    assert deflate.compress(content) + deflate.flush() == datasets.EMBEDDED.read_bytes()[10:-8]
    # With the usual strategy they differ, so this test can fail.
    some = content[:500_000]
    assert len(zlib.compress(some, 6)) != len(zlib_ng.compress(some, 6))


def test_select_refuses_too_few_images():
    with pytest.raises(ValueError, match="each class 2 times"):
        build.select(np.zeros((10, 1), np.uint8), np.arange(10), 2)


def test_build_script_writes_only_what_the_checksum_expects(tmp_path, monkeypatch, capsys):
    module_folder = tmp_path / "package"
    module_folder.mkdir()
    monkeypatch.setattr(build, "__file__", str(module_folder / "build.py"))
    monkeypatch.setattr(build, "build", lambda source: b"made of " + os.fsencode(source))
    assert build.main(["--source", "x"]) == 1
    assert "Nothing written" in capsys.readouterr().err
    assert list(module_folder.iterdir()) == []

    monkeypatch.setattr(datasets, "EMBEDDED_SHA256", hashlib.sha256(b"made of x").hexdigest())
    assert build.main(["--source", "x"]) == 0
    assert [(p.name, p.read_bytes()) for p in module_folder.iterdir()] == [
        (datasets.EMBEDDED.name, b"made of x")
    ]


def test_build_script_says_what_is_missing(tmp_path, capsys):
    assert build.main(["--source", str(tmp_path)]) == 1
    assert "has no file train-images-idx3-ubyte.gz" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        build.main([])
    assert "python -m ch11lib data" in capsys.readouterr().err


# ----------------------------------------------------------------------------- the Dataset class


def test_arrays_are_read_only_and_the_callers_stay_as_they_were():
    arrays = _arrays()
    small = Dataset(**arrays, class_names=["a", "b"], name="toy")
    for field, array in arrays.items():
        with pytest.raises(ValueError, match="read-only"):
            getattr(small, field)[...] = 0
        assert array.flags.writeable
        assert np.shares_memory(array, getattr(small, field))
    assert small.class_names == ("a", "b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        small.name = "other"


def test_derived_data_sets_are_read_only_too(data):
    for derived in (data.take(10), data.take(10).standardized(), data.flattened(), data.halved()):
        with pytest.raises(ValueError, match="read-only"):
            derived.x_train *= 2
        with pytest.raises(ValueError, match="read-only"):
            derived.y_valid += 1


def test_repr_is_short_and_stable(data):
    assert repr(data.take(5000).standardized().flattened()) == (
        "Dataset('fashion-mnist-12k', train=5000, valid=2000, test=2000, shape=(784,), "
        "standardized)"
    )


def test_a_data_set_survives_pickling(data):
    """Worker processes get it that way."""
    small = data.take(20, 10).standardized()
    again = pickle.loads(pickle.dumps(small))
    assert repr(again) == repr(small)
    assert np.array_equal(again.x_train, small.x_train)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(n_train=st.integers(1, 8000), n_valid=st.none() | st.integers(1, 2000))
def test_take_keeps_the_first(n_train, n_valid):
    whole = _loaded_once()
    part = whole.take(n_train, n_valid)
    n_valid = 2000 if n_valid is None else n_valid
    assert (len(part.y_train), len(part.y_valid), len(part.y_test)) == (n_train, n_valid, 2000)
    assert np.array_equal(part.x_train, whole.x_train[:n_train])
    assert np.array_equal(part.y_valid, whole.y_valid[:n_valid])
    assert np.shares_memory(part.x_train, whole.x_train)
    counts = np.bincount(part.y_train, minlength=10)
    assert counts.max() - counts.min() <= 1


@functools.cache
def _loaded_once():
    return load_fashion_mnist()


@pytest.mark.parametrize("wrong", [0, -1, 8001])
def test_take_refuses_numbers_out_of_range(data, wrong):
    with pytest.raises(ValueError, match=re.escape(f"n_train must lie in 1..8000, got {wrong}")):
        data.take(wrong)
    with pytest.raises(ValueError, match=re.escape("n_valid must lie in 1..2000")):
        data.take(10, wrong)


@pytest.mark.parametrize("wrong", [2.0, "5000", True, None])
def test_take_refuses_what_is_no_integer(data, wrong):
    with pytest.raises(TypeError, match=r"n_train must be an integer, got "):
        data.take(wrong)


def test_take_accepts_numpy_integers(data):
    assert len(data.take(np.int64(7)).y_train) == 7


def test_standardized_uses_the_training_pixels_only(data):
    part = data.take(300)
    done = part.standardized()
    pixels = part.x_train.astype(np.float64)
    assert done.mean == pytest.approx(pixels.mean(), rel=1e-12)
    assert done.std == pytest.approx(pixels.std(), rel=1e-12)
    for field in ("x_train", "x_valid", "x_test"):
        expected = (getattr(part, field).astype(np.float64) - pixels.mean()) / pixels.std()
        assert getattr(done, field).dtype == np.float32
        np.testing.assert_allclose(getattr(done, field), expected, rtol=0, atol=1e-6)
    assert abs(done.x_valid.mean(dtype=np.float64)) > 1e-4  # its own mean was not used
    assert data.standardized().mean != done.mean  # nor that of images that were left out


def test_standardized_twice_still_leads_back(data):
    part = data.take(500)
    twice = part.standardized().take(100).standardized()
    np.testing.assert_allclose(
        twice.x_train * twice.std + twice.mean, part.x_train[:100], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_standardized_refuses_constant_or_infinite_images(value):
    arrays = _arrays()
    arrays["x_train"][:] = value
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="x_train must be finite"):
        Dataset(**arrays, class_names=("a", "b"), name="toy").standardized()


def test_flattened_reshapes_without_copying(data):
    flat = data.flattened()
    assert flat.x_test.shape == (2000, 784)
    assert np.shares_memory(flat.x_train, data.x_train)
    assert np.array_equal(flat.x_valid[3].reshape(28, 28), data.x_valid[3])
    assert flat.flattened().x_train.shape == (8000, 784)


def test_halved_means_squares_of_four(data):
    half = data.halved()
    assert (half.x_train.shape, half.x_train.dtype) == ((8000, 14, 14), np.float32)
    image, small = data.x_valid[7], half.x_valid[7]
    for row, column in ((0, 0), (5, 9), (13, 13)):
        square = image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert small[row, column] == pytest.approx(square.mean())
    with pytest.raises(ValueError, match="even height and width, have shape"):
        data.flattened().halved()
    with pytest.raises(ValueError, match=r"have shape \(7, 7\)"):
        half.halved().halved()


def _arrays(n=4, shape=(2, 3)):
    arrays = {}
    for split in ("train", "valid", "test"):
        arrays[f"x_{split}"] = np.arange(n * np.prod(shape), dtype=np.float32).reshape(n, *shape)
        arrays[f"y_{split}"] = np.arange(n, dtype=np.int32) % 2
    return arrays


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("x_train", np.zeros((4, 2, 3)), TypeError, "x_train .* float32, got float64"),
        ("x_valid", [[0.0]] * 4, TypeError, "x_valid .* got list"),
        ("y_test", np.zeros(4, np.int64), TypeError, "y_test .* int32, got int64"),
        ("y_train", np.zeros(3, np.int32), ValueError, r"x_train and y_train .* \(3,\)"),
        ("y_train", np.zeros((4, 1), np.int32), ValueError, "x_train and y_train"),
        ("x_test", np.zeros((4, 3, 2), np.float32), ValueError, "example shape of x_train"),
        ("x_train", np.zeros(4, np.float32), ValueError, "x_train and y_train"),
        ("y_valid", np.full(4, 2, np.int32), ValueError, r"y_valid must lie in 0\.\.1.*2\.\.2"),
        ("y_valid", np.full(4, -1, np.int32), ValueError, r"y_valid must lie in 0\.\.1"),
    ],
)
def test_wrong_arrays_are_refused(field, value, error, message):
    arrays = _arrays() | {field: value}
    with pytest.raises(error, match=message):
        Dataset(**arrays, class_names=("a", "b"), name="toy")


def test_empty_parts_are_refused():
    with pytest.raises(ValueError, match="n > 0"):
        Dataset(**_arrays(n=0), class_names=("a", "b"), name="toy")


@pytest.mark.parametrize("size", ["12K", "", 12000, None])
def test_bad_size(size):
    with pytest.raises(ValueError, match=re.escape(f'"12k" or "full", got {size!r}')):
        load_fashion_mnist(size)


def tiny(labels):
    x = np.arange(len(labels), dtype="float32")[:, None]
    y = np.array(labels, "int32")
    return Dataset(x, y, x, y, x, y, tuple("abc"), "tiny")


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.permutations([0, 1, 2] * 5), st.integers(1, 15), st.integers(0, 9))
def test_few_labels_are_balanced_and_nested(labels, n, seed):
    data = tiny(labels)
    few = data.few_labels(n, seed)
    np.testing.assert_array_equal(few.x_train, data.x_train[data.few_rows(n, seed)])
    assert np.ptp(np.bincount(few.y_train, minlength=3)) <= 1
    chosen = few.x_train[:, 0].astype(int)
    assert len(set(chosen)) == n
    np.testing.assert_array_equal(few.y_train, np.array(labels)[chosen])
    more = data.few_labels(min(n + 4, 15), seed)
    np.testing.assert_array_equal(more.x_train[:n], few.x_train)
    np.testing.assert_array_equal(few.x_valid, data.x_valid)


def test_few_labels_depend_on_the_seed():
    data = tiny([0, 1, 2] * 50)
    sets = [tuple(data.few_labels(6, seed).x_train.ravel()) for seed in range(20)]
    assert len(set(sets)) == 20
    # Every image has the same chance: 6 of 150.
    hits = np.bincount(
        np.concatenate([data.few_labels(6, s).x_train[:, 0] for s in range(300)]).astype(int),
        minlength=150,
    )
    assert hits.min() > 0
    assert hits.max() < 12 + 5 * math.sqrt(12)


def test_few_labels_that_cannot_be_had():
    with pytest.raises(ValueError, match="received 7 with 1 of 'c' only"):
        tiny([0, 0, 0, 0, 1, 1, 1, 1, 2]).few_labels(7, 0)
    with pytest.raises(ValueError, match=r"n must lie in 1\.\.3, got 4"):
        tiny([0, 1, 2]).few_labels(4, 0)
    with pytest.raises(TypeError, match=r"n must be an integer, got 2\.0"):
        tiny([0, 1, 2]).few_labels(2.0, 0)


# ---------------------------------------------------------------------- damage to the embedded file


def _truncated(content):
    return content[:-1]


def _altered(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [_truncated, _altered, lambda content: b""])
def test_damaged_embedded_file(tmp_path, monkeypatch, damage):
    file = tmp_path / "embedded.gz"
    file.write_bytes(damage(datasets.EMBEDDED.read_bytes()))
    monkeypatch.setattr(datasets, "EMBEDDED", file)
    with pytest.raises(DataError, match=r"damaged.*What to do: reinstall"):
        load_fashion_mnist()


def test_missing_embedded_file(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "EMBEDDED", tmp_path / "nothing.gz")
    with pytest.raises(DataError, match=r"cannot be read.*What to do: reinstall"):
        load_fashion_mnist()


# ---------------------------------------------------------------------------------- IDX files


@settings(max_examples=40, deadline=None, derandomize=True)
@given(array=hnp.arrays(np.uint8, hnp.array_shapes(max_dims=4, max_side=5)))
def test_idx_round_trip_and_strictness(array):
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content += array.tobytes()
    assert np.array_equal(datasets.parse_idx(content, array.shape), array)
    for wrong in (content[:-1], content + b"\0"):
        with pytest.raises(DataError, match="values"):
            datasets.parse_idx(wrong, array.shape)
    for position in range(4 + 4 * array.ndim):
        wrong = bytearray(content)
        wrong[position] ^= 1
        with pytest.raises(DataError, match="not the content of an IDX file"):
            datasets.parse_idx(bytes(wrong), array.shape)


def test_idx_of_nothing():
    with pytest.raises(DataError, match="begins with nothing"):
        datasets.parse_idx(b"", (3,))


# ----------------------------------------------------------------- the full data set, on stand-ins


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Make small files of the same kind, with their checksums in place of the real ones."""
    folder = tmp_path / "published"
    folder.mkdir()
    table = {}
    for i, name in enumerate(NAMES):
        shape = (6, 28, 28) if "images" in name else (6,)
        content = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        content += np.random.default_rng(i).integers(0, 10, shape, np.uint8).tobytes()
        packed = gzip.compress(content, mtime=0)
        (folder / f"{name}.gz").write_bytes(packed)
        table[name] = datasets._Original(
            shape, hashlib.sha256(content).hexdigest(), hashlib.sha256(packed).hexdigest()
        )
    monkeypatch.setattr(datasets, "_ORIGINALS", table)
    return folder


def _copy(source, target, *, decompress=False):
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if decompress:
            (target / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        else:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def _load():
    """Load like ``size="full"``, up to the split, which needs all 70,000 images."""
    arrays, source = datasets._load_originals(progressbar=False)
    assert list(arrays) == list(NAMES)
    return source


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


@pytest.fixture
def mirror(fakes, monkeypatch):
    """Serve the stand-ins from this machine, as the second mirror; the first one is down."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(fakes))
    with _Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(datasets, "_MIRRORS", ("http://127.0.0.1:9/", url))
        yield asked
        server.shutdown()


def test_the_order_of_places(fakes, mirror, tmp_path, monkeypatch):
    assert datasets.find_originals() is None
    assert _load() == f"download: {tmp_path / 'cache' / 'fashion-mnist'}"
    assert datasets.find_originals()[0] == "earlier download"
    debian = _copy(fakes, tmp_path / "debian")
    assert _load() == f"Debian's package dataset-fashion-mnist: {debian}"
    keras = _copy(fakes, tmp_path / "keras" / "datasets" / "fashion-mnist")
    assert _load() == f"Keras's cache: {keras}"
    assert datasets.find_originals() == ("Keras's cache", keras)
    chosen = _copy(fakes, tmp_path / "mine", decompress=True)
    monkeypatch.setenv("CH11_DATA_DIR", str(chosen))
    assert _load() == f"CH11_DATA_DIR: {chosen}"
    assert datasets.find_originals() == ("CH11_DATA_DIR", chosen)
    assert len(mirror) == 4  # each file was downloaded once


def test_default_folders(monkeypatch, tmp_path):
    for variable in ("KERAS_HOME", "CH11_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets._places()[0][1] == tmp_path / ".keras" / "datasets" / "fashion-mnist"
    assert tmp_path in datasets.cache_folder().parents


def test_recompressed_files_are_fine(fakes, tmp_path, monkeypatch):
    for file in fakes.iterdir():
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()), 1, mtime=12345))
    monkeypatch.setenv("CH11_DATA_DIR", str(fakes))
    assert _load() == f"CH11_DATA_DIR: {fakes}"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("damage", [_truncated, _altered, lambda c: c + b"more", lambda c: b"no"])
def test_damage_in_the_folder_that_the_user_named(fakes, tmp_path, monkeypatch, damage, packed):
    _copy(fakes, tmp_path / "debian")  # an intact copy elsewhere must not be used instead
    chosen = _copy(fakes, tmp_path / "mine", decompress=not packed)
    file = chosen / (NAMES[2] + ".gz" * packed)
    file.write_bytes(damage(file.read_bytes()))
    monkeypatch.setenv("CH11_DATA_DIR", str(chosen))
    with pytest.raises(DataError, match=re.escape(str(file))) as caught:
        load_fashion_mnist("full")
    assert "What to do: put intact copies" in str(caught.value)


def test_content_of_the_right_shape_but_not_the_published_one(fakes, monkeypatch):
    file = fakes / f"{NAMES[1]}.gz"
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[-1] ^= 1
    file.write_bytes(gzip.compress(bytes(content)))
    monkeypatch.setenv("CH11_DATA_DIR", str(fakes))
    with pytest.raises(DataError, match="SHA-256 of its decompressed content"):
        load_fashion_mnist("full")


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_in_the_folder_that_the_user_named(fakes, tmp_path, monkeypatch, exists):
    _copy(fakes, tmp_path / "debian")
    chosen = tmp_path / "mine"
    if exists:
        chosen.mkdir()
    monkeypatch.setenv("CH11_DATA_DIR", str(chosen))
    with pytest.raises(DataError, match=r"has no file train-images.*What to do"):
        load_fashion_mnist("full")
    with pytest.raises(DataError, match=r"has not got the four files.*What to do"):
        datasets.find_originals()


def test_damage_in_a_place_that_was_only_found_is_reported_and_left_aside(fakes, tmp_path):
    keras = _copy(fakes, tmp_path / "keras" / "datasets" / "fashion-mnist")
    (keras / f"{NAMES[0]}.gz").write_bytes(b"an interrupted download")
    _copy(fakes, tmp_path / "debian")
    with pytest.warns(UserWarning, match=r"Left aside Keras's cache.*train-images"):
        assert _load().startswith("Debian")


def test_damaged_download_is_fetched_again(fakes, mirror, tmp_path):
    _load()
    file = tmp_path / "cache" / "fashion-mnist" / f"{NAMES[3]}.gz"
    intact = file.read_bytes()
    file.write_bytes(_altered(intact))
    mirror.clear()
    _load()
    assert file.read_bytes() == intact
    assert mirror == [f"/{NAMES[3]}.gz"]


def test_damaged_download_without_a_network(fakes, mirror, tmp_path, monkeypatch):
    _load()
    file = tmp_path / "cache" / "fashion-mnist" / f"{NAMES[3]}.gz"
    file.write_bytes(_altered(file.read_bytes()))
    monkeypatch.setattr(datasets, "_MIRRORS", ("http://127.0.0.1:9/",))
    with pytest.raises(DataError, match="could not be downloaded"):
        load_fashion_mnist("full")


def test_no_network(fakes, tmp_path):
    with pytest.raises(DataError, match=r'What to do:.*size="12k".*CH11_DATA_DIR') as caught:
        load_fashion_mnist("full")
    assert all(f"[{mirror}: " in str(caught.value) for mirror in datasets._MIRRORS)
    assert list((tmp_path / "cache" / "fashion-mnist").iterdir()) == []


def test_a_mirror_that_serves_something_else(fakes, mirror, tmp_path):
    (fakes / f"{NAMES[0]}.gz").write_bytes(b"<html>please log in to this network</html>")
    with pytest.raises(DataError, match=r"could not be downloaded.*SHA256|hash"):
        load_fashion_mnist("full")
    assert list((tmp_path / "cache" / "fashion-mnist").iterdir()) == []


def test_full_disk(fakes, mirror, tmp_path, monkeypatch):
    import pooch

    def write_to_a_full_disk(self, url, output_file, pooch, check_only=False):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"some content")  # raises the very error of a full disk

    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", write_to_a_full_disk)
    with pytest.raises(DataError, match=r"free 31 MB there, or set CH11_CACHE_DIR") as caught:
        load_fashion_mnist("full")
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert list((tmp_path / "cache" / "fashion-mnist").iterdir()) == []


@contextlib.contextmanager
def _without_privileges():
    """Let permissions count for root, too."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions work differently")
def test_read_only_cache_folder(fakes, monkeypatch):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        monkeypatch.setenv("CH11_CACHE_DIR", folder)
        with (
            _without_privileges(),
            pytest.raises(DataError, match=r"cannot be stored .*What to do: set CH11_CACHE_DIR"),
        ):
            load_fashion_mnist("full")


def test_a_file_in_the_way_of_the_cache_folder(fakes, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CH11_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be stored .*What to do: set CH11_CACHE_DIR"):
        load_fashion_mnist("full")


def test_download_shows_its_progress(fakes, mirror, capsys):
    datasets._load_originals(progressbar=True)
    assert "100%" in capsys.readouterr().err


# ----------------------------------------------------------------------------- command line


def test_data_command(capsys):
    assert datasets.main(["--size", "12k"]) == 0
    assert capsys.readouterr().out == (
        "Dataset('fashion-mnist-12k', train=8000, valid=2000, test=2000, shape=(28, 28))\n"
        "    verified, from ch11lib/data/fashion-mnist-12k-idx2-ubyte.gz\n"
    )
    assert datasets.main([]) == 1
    assert "could not be downloaded" in capsys.readouterr().err


@needs_originals
def test_data_command_with_the_full_data_set(capsys, monkeypatch):
    monkeypatch.setattr(datasets, "_DEBIAN_FOLDER", DEBIAN_FOLDER)
    assert datasets.main([]) == 0
    out = capsys.readouterr().out
    assert "train=55000, valid=5000, test=10000" in out
    assert f"dataset-fashion-mnist: {DEBIAN_FOLDER}" in out
