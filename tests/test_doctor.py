"""The installation check: a healthy machine, and one simulated fault after the other."""

import gzip
from importlib import metadata
import json
import re
import subprocess
import sys
from types import SimpleNamespace

from ch11lib import datasets, doctor
import pytest

posix = pytest.mark.skipif(sys.platform == "win32", reason="uses shell scripts")


def _one(checks, name):
    (found,) = [check for check in checks if check.name == name]
    assert found.ok == (found.remedy == "")
    return found


# ---------------------------------------------------------------------------- a healthy machine


def test_everything_required_works_here(capsys):
    assert doctor.main() == 0
    out = capsys.readouterr().out
    for name in ("Python", "tensorflow", "keras", "numpy", "TensorFlow runs", "processor cores"):
        assert f"OK       {name}: " in out
    assert f"OK       keras: {metadata.version('keras')}\n" in out
    assert "OK       embedded data: fashion-mnist-12k, checksum verified\n" in out
    assert "OK       notebook kernel: python3, " in out
    assert "BROKEN" not in out
    assert out.endswith("\nEverything that the notebooks need works.\n")


def test_import_needs_the_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import ch11lib.doctor;"
        "print({m.partition('.')[0] for m in set(sys.modules) - before})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert eval(out.stdout) <= {*sys.stdlib_module_names, "ch11lib"}


@pytest.mark.parametrize("required", [True, False])
def test_only_what_is_required_decides(monkeypatch, capsys, required):
    checks = [doctor.Check("a", True, "1"), doctor.Check("b", False, "gone", "get b", required)]
    monkeypatch.setattr(doctor, "_CHECKS", (lambda: checks[:1], lambda: checks[1:]))
    assert doctor.report() == checks
    assert doctor.main() == int(required)
    out = capsys.readouterr().out
    word = "BROKEN  " if required else "missing "
    assert out.startswith(f"OK       a: 1\n{word} b: gone\n         -> get b\n\n")
    assert ("mended before the notebooks can run: b." in out) == required


# ------------------------------------------------------------------------------- Python, packages


def test_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 14, "final", 0))
    check = _one(doctor._python(), "Python")
    assert not check.ok
    assert check.required
    assert check.detail.startswith("3.10.14, ")
    assert "3.11" in check.remedy


@pytest.fixture
def installed(monkeypatch):
    """Return a dictionary of made-up versions; None takes a distribution away."""
    changed = {}
    real = metadata.version

    def version(name):
        found = changed[name] if name in changed else real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    return changed


@pytest.mark.parametrize(
    ("name", "version", "detail"),
    [
        ("keras", None, "not installed"),
        ("keras", "2.15.0", "2.15.0, but the project needs <4,>=3.15"),
        ("numpy", "1.26.4", "1.26.4, but the project needs <3,>=2"),
        ("ipywidgets", None, "not installed"),
        ("pooch", "1.0", "1.0, but the project needs >=1.8"),
    ],
)
def test_missing_or_unsuitable_package(installed, name, version, detail):
    installed[name] = version
    check = _one(doctor._packages(), name)
    assert (check.ok, check.required, check.detail) == (False, True, detail)
    assert check.remedy.endswith("pip install -e .")


def test_release_candidates_count(installed):
    installed["keras"] = "3.99.0rc1"
    assert _one(doctor._packages(), "keras").ok


def test_either_tensorflow_wheel_will_do(installed):
    installed |= {"tensorflow": None, "tensorflow-cpu": "2.21.0"}
    assert _one(doctor._packages(), "tensorflow").ok
    installed["tensorflow-cpu"] = None
    assert _one(doctor._packages(), "tensorflow").detail == "not installed"


def test_packages_of_extras_are_not_required(installed):
    installed |= {"torch": None, "nbgrader": None, "jupyterlab": None}
    assert all(check.ok for check in doctor._packages())


def test_project_not_installed(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert _one(doctor._packages(), "ch11lib").detail == "imported, but not installed"


def test_without_packaging(monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert not _one(doctor._packages(), "packaging").ok


@pytest.mark.parametrize("name", [name for name, _, _ in doctor._OPTIONAL])
def test_optional_parts(installed, name):
    installed[name] = None
    check = _one(doctor._optional_parts(), name)
    assert (check.ok, check.required) == (False, False)
    assert "python -m pip install " in check.remedy
    installed[name] = "1.2.3"
    assert _one(doctor._optional_parts(), name).detail == "1.2.3"


def test_extras_in_the_advice_exist():
    extras = metadata.metadata("ch11lib").get_all("Provides-Extra")
    named = re.findall(r'-e "\.\[(\w+)\]"', " ".join(install for _, _, install in doctor._OPTIONAL))
    assert set(named) == {"lab", "test", "course"}
    assert set(named) <= set(extras)


# ----------------------------------------------------------------------------- TensorFlow and GPUs


def _script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def fake_python(tmp_path, monkeypatch):
    """Let a shell script answer in place of the Python that tries TensorFlow."""
    return lambda text: monkeypatch.setattr(sys, "executable", _script(tmp_path / "python", text))


def _answer(**changes):
    answer = {"sum": 6.0, "backend": "tensorflow", "gpus": [], "cuda": True} | changes
    return f"echo some notice\necho '{json.dumps(answer)}'"


@posix
@pytest.mark.parametrize(
    ("script", "detail", "remedy"),
    [
        ("kill -ILL $$", "this processor lacks instructions", "AVX"),
        ("kill -SEGV $$", "exit status -11", "pip install"),
        ("echo Traceback >&2; echo 'ImportError: no' >&2; exit 1", "ImportError: no", "pip"),
        (_answer(backend="jax"), "Keras uses jax instead", "KERAS_BACKEND"),
        (_answer(sum=5.0), "computes 6 ones as 5.0", "pip install"),
    ],
)
def test_tensorflow_does_not_run(fake_python, script, detail, remedy):
    fake_python(script)
    check = _one(doctor._tensorflow(), "TensorFlow runs")
    assert not check.ok
    assert check.required
    assert detail in check.detail
    assert remedy in check.remedy


def test_tensorflow_hangs(monkeypatch):
    def run(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired(args, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert "no answer" in _one(doctor._tensorflow(), "TensorFlow runs").detail


@posix
def test_gpu_that_tensorflow_sees(fake_python):
    fake_python(_answer(gpus=["NVIDIA L4"]))
    assert _one(doctor._tensorflow(), "GPU").detail == "NVIDIA L4"


@posix
@pytest.mark.parametrize(
    ("cuda", "visible", "remedy"),
    [
        (True, None, 'pip install "tensorflow[and-cuda]"'),
        (False, None, "uninstall tensorflow-cpu"),
        (True, "", "unset"),
        (True, "-1", "unset"),
        (True, "0", 'pip install "tensorflow[and-cuda]"'),
    ],
)
def test_gpu_that_tensorflow_does_not_see(tmp_path, monkeypatch, cuda, visible, remedy):
    _script(tmp_path / "nvidia-smi", '[ "$1" = -L ] && echo "GPU 0: NVIDIA L4 (UUID: GPU-1)"')
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check = doctor._gpu([], cuda)
    assert (check.ok, check.required) == (False, False)
    assert "NVIDIA" in check.detail
    assert remedy in check.remedy


def test_gpu_on_windows(monkeypatch):
    monkeypatch.setattr(doctor, "_has_nvidia_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert "WSL 2" in doctor._gpu([], built_with_cuda=False).remedy


@posix
@pytest.mark.parametrize("script", ["echo 'No devices found'", "echo 'GPU 0'; exit 9", None])
def test_no_gpu(tmp_path, monkeypatch, script):
    if script:
        _script(tmp_path / "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._gpu([], True).ok


@posix
def test_nvidia_tool_that_cannot_be_started(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/no/such/interpreter\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._gpu([], True).ok


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("available", "limit", "used", "detail", "ok"),
    [
        (8e9, None, None, "8.0 GB", True),
        (8e9, "max", "1000000000", "8.0 GB", True),
        (8e9, "2000000000", "500000000", "1.5 GB", False),
        (1.2e9, "9000000000", "0", "1.2 GB", False),
        (2e9, None, None, "2.0 GB", True),
    ],
)
def test_memory(tmp_path, monkeypatch, available, limit, used, detail, ok):
    free = SimpleNamespace(available=int(available))
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(virtual_memory=lambda: free))
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
    check = _one(doctor._memory(tmp_path), "free memory")
    assert (check.ok, check.required) == (ok, False)
    assert check.detail.startswith(detail)


def test_memory_without_psutil(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert doctor._memory() == []


# -------------------------------------------------------------------------------------------- data


def test_damaged_embedded_data(tmp_path, monkeypatch):
    file = tmp_path / "embedded.gz"
    file.write_bytes(gzip.compress(b"nonsense"))
    monkeypatch.setattr(datasets, "EMBEDDED", file)
    check = _one(doctor._data(), "embedded data")
    assert (check.ok, check.required) == (False, True)
    assert "damaged" in check.detail
    assert check.remedy.startswith("reinstall")


def test_full_data_set_by_download_only(tmp_path, monkeypatch):
    monkeypatch.delenv("CH11_DATA_DIR", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("CH11_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(datasets, "_DEBIAN_FOLDER", tmp_path)
    check = _one(doctor._data(), "all 70,000 images")
    assert (check.ok, check.required) == (False, False)
    assert "python -m ch11lib data --full" in check.remedy


def test_full_data_set_in_a_folder_that_has_not_got_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CH11_DATA_DIR", str(tmp_path))
    check = _one(doctor._data(), "all 70,000 images")
    assert not check.ok
    assert str(tmp_path) in check.detail
    assert check.remedy.startswith("put intact copies")


def test_full_data_set_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("CH11_DATA_DIR", str(tmp_path))
    for name in datasets._ORIGINALS:
        (tmp_path / name).write_bytes(b"")
    check = _one(doctor._data(), "all 70,000 images")
    assert (check.ok, check.detail) == (True, f"CH11_DATA_DIR: {tmp_path}")


def test_data_without_numpy_or_pooch(monkeypatch, tmp_path):
    monkeypatch.delenv("CH11_DATA_DIR", raising=False)
    monkeypatch.delenv("CH11_CACHE_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert [check.name for check in doctor._data()] == ["embedded data"]
    monkeypatch.delattr("ch11lib.datasets")
    monkeypatch.setitem(sys.modules, "ch11lib.datasets", None)  # as if an import of it failed
    check = _one(doctor._data(), "embedded data")
    assert not check.ok
    assert check.detail.startswith("cannot be checked")


# ---------------------------------------------------------------------------------- notebook kernel


def _install_kernel(folder, program):
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [program, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    return kernel


@pytest.mark.parametrize("program", ["python", "python3", sys.executable])
def test_kernel_of_this_python(tmp_path, monkeypatch, program):
    kernel = _install_kernel(tmp_path, program)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert _one(doctor._kernel(), "notebook kernel").detail == f"python3, {kernel}"


def test_kernel_of_another_python(tmp_path, monkeypatch):
    kernel = _install_kernel(tmp_path, "/somewhere/else/python")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    check = _one(doctor._kernel(), "notebook kernel")
    assert (check.ok, check.required) == (False, True)
    assert "/somewhere/else/python" in check.detail
    assert str(kernel) in check.detail
    assert "ipykernel install" in check.remedy


def test_no_kernel(monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    def get_kernel_spec(self, name):
        raise NoSuchKernel(name)

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", get_kernel_spec)
    check = _one(doctor._kernel(), "notebook kernel")
    assert (check.ok, check.detail) == (False, "no kernel is called python3")
    monkeypatch.setitem(sys.modules, "jupyter_client.kernelspec", None)
    assert not _one(doctor._kernel(), "notebook kernel").ok
