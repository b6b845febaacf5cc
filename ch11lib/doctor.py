"""Check an installation: ``python -m ch11lib doctor``.

Every line is either ``OK`` or says what to do. Only what the notebooks cannot do without counts as
broken. Nothing but the standard library is imported before its check, and TensorFlow is tried in
a process of its own: a wheel that does not suit the processor kills the process that imports it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys

__all__ = ["Check", "main", "report"]

_INSTALL = "in the project's folder: python -m pip install -e ."
_NEEDED_GB = 2.0

# What can be added: distribution, what for, what pip installs.
_OPTIONAL = (
    ("jupyterlab", "to read and run the notebooks in JupyterLab", '-e ".[lab]"'),
    ("nbval", "for the tests", '-e ".[test]"'),
    ("nbgrader", "for the assignments", '-e ".[course]"'),
)


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes
    ----------
    name : str
        What was checked.
    ok : bool
        Whether it is as it should be.
    detail : str
        What was found.
    remedy : str
        What to do; empty if and only if it is as it should be.
    required : bool
        Whether the notebooks cannot do without it.

    Examples
    --------
    >>> print(Check("nbval", False, "not installed", "pip install nbval", required=False))
    missing  nbval: not installed
             -> pip install nbval
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    required: bool = True

    def __str__(self) -> str:
        """One line, and a second one with what to do."""
        verdict = "OK" if self.ok else "BROKEN" if self.required else "missing"
        line = f"{verdict:<8} {self.name}: {self.detail}"
        return line if self.ok else f"{line}\n{'':8} -> {self.remedy}"


# ------------------------------------------------------------------------------ the checks


def _python() -> list[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info >= (3, 11)
    remedy = "" if ok else "install Python 3.11 or newer, and the project with it"
    return [Check("Python", ok, f"{version}, {sys.executable}", remedy)]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> list[Check]:
    """Compare what is installed with what the package's own metadata ask for."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [Check("packaging", False, "not installed", _INSTALL)]
    try:
        requirements = [Requirement(text) for text in metadata.requires("ch11lib") or ()]
    except metadata.PackageNotFoundError:
        return [Check("ch11lib", False, "imported, but not installed", _INSTALL)]

    checks, others = [], 0
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None and requirement.name == "tensorflow":
            version = _version("tensorflow-cpu")  # the same without the parts for GPUs
        if version is None:
            checks.append(Check(requirement.name, False, "not installed", _INSTALL))
        elif not requirement.specifier.contains(version, prereleases=True):
            detail = f"{version}, but the project needs {requirement.specifier}"
            checks.append(Check(requirement.name, False, detail, _INSTALL))
        elif requirement.name in ("tensorflow", "keras", "numpy"):
            checks.append(Check(requirement.name, True, version))
        else:
            others += 1
    return [*checks, Check("other packages", True, f"{others} installed")]


_PROBE = """
import json
from ch11lib.backend import keras, tf
print(json.dumps({
    "sum": float(tf.reduce_sum(keras.ops.ones((2, 3)))),
    "backend": keras.backend.backend(),
    "gpus": [tf.config.experimental.get_device_details(d).get("device_name", d.name)
             for d in tf.config.list_physical_devices("GPU")],
    "cuda": tf.test.is_built_with_cuda(),
}))
"""


def _tensorflow() -> list[Check]:
    """Let TensorFlow compute something, and see which GPUs it finds."""
    name = "TensorFlow runs"
    try:
        process = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        return [Check(name, False, "no answer within 5 minutes", "restart the computer")]
    if process.returncode == -getattr(signal, "SIGILL", 0):
        remedy = "use another machine, for example Binder: the wheel needs a processor with AVX"
        return [Check(name, False, "this processor lacks instructions that it uses", remedy)]
    if process.returncode:
        last = (process.stderr.strip() or f"exit status {process.returncode}").splitlines()[-1]
        return [Check(name, False, last, _INSTALL)]
    found = json.loads(process.stdout.splitlines()[-1])
    if found["backend"] != "tensorflow":
        remedy = "unset KERAS_BACKEND, or set it to tensorflow"
        return [Check(name, False, f"Keras uses {found['backend']} instead", remedy)]
    if found["sum"] != 6.0:
        return [Check(name, False, f"but computes 6 ones as {found['sum']}", _INSTALL)]
    return [Check(name, True, "with Keras on top"), _gpu(found["gpus"], found["cuda"])]


def _gpu(gpus: list[str], built_with_cuda: bool) -> Check:
    if gpus:
        return Check("GPU", True, ", ".join(gpus))
    if not _has_nvidia_gpu():
        return Check("GPU", True, "none, and none is needed")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        detail = f"NVIDIA, hidden from TensorFlow by CUDA_VISIBLE_DEVICES={hidden!r}"
        return Check("GPU", False, detail, "unset that variable", required=False)
    if sys.platform == "win32":
        remedy = "TensorFlow has no GPU support on Windows itself: install the project under WSL 2"
    elif built_with_cuda:
        remedy = (
            'python -m pip install "tensorflow[and-cuda]"; if it is installed, '
            "`nvidia-smi` says whether the driver is recent enough"
        )
    else:
        remedy = (
            "python -m pip uninstall tensorflow-cpu, "
            'then python -m pip install "tensorflow[and-cuda]"'
        )
    return Check("GPU", False, "NVIDIA, but TensorFlow does not see it", remedy, required=False)


def _has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def _processors() -> list[Check]:
    # In a container or under a batch system a process may use fewer than there are.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [Check("processor cores", True, str(usable))]


def _memory(control_group: Path = Path("/sys/fs/cgroup")) -> list[Check]:
    try:
        import psutil
    except ImportError:
        return []  # `_packages` has said so
    free = psutil.virtual_memory().available
    try:  # in a container (Binder) less may be allowed than the machine has
        limit = int((control_group / "memory.max").read_text())
        free = min(free, limit - int((control_group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such file, or "max": no limit
        pass
    gb = free / 1e9
    ok = gb >= _NEEDED_GB
    detail = f"{gb:.1f} GB, a notebook needs up to {_NEEDED_GB:.0f} GB"
    remedy = "" if ok else "close other programs or notebooks, or run one notebook at a time"
    return [Check("free memory", ok, detail, remedy, required=False)]


def _data() -> list[Check]:
    try:
        from ch11lib import datasets
    except ImportError as error:
        return [Check("embedded data", False, f"cannot be checked: {error}", _INSTALL)]
    checks = []
    try:
        data = datasets.load_fashion_mnist()
        checks.append(Check("embedded data", True, f"{data.name}, checksum verified"))
    except datasets.DataError as error:
        checks.append(Check("embedded data", False, *_split(error)))
    name = "all 70,000 images"
    try:
        found = datasets.find_originals()
    except ImportError:  # pooch is missing: `_packages` has said so
        return checks
    except datasets.DataError as error:
        return [*checks, Check(name, False, *_split(error), required=False)]
    if found:
        return [*checks, Check(name, True, f"{found[0]}: {found[1]}", required=False)]
    remedy = "only if you want them: python -m ch11lib data --full (downloads 31 MB)"
    return [*checks, Check(name, False, "not here", remedy, required=False)]


def _split(error: Exception) -> tuple[str, str]:
    """Take what happened and what to do from the message of a `datasets.DataError`."""
    detail, _, remedy = str(error).partition(" What to do: ")
    return detail, remedy


def _kernel() -> list[Check]:
    """See whether the kernel that the notebooks name is this Python."""
    name = "notebook kernel"
    try:
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    except ImportError as error:
        return [Check(name, False, str(error), _INSTALL)]
    remedy = "python -m ipykernel install --sys-prefix"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        return [Check(name, False, "no kernel is called python3", remedy)]
    program = spec.argv[0]
    # Jupyter starts its own Python for these names, whatever the search path says.
    generic = {"python", "python3", "python{}.{}".format(*sys.version_info)}
    if program in generic or os.path.normcase(program) == os.path.normcase(sys.executable):
        return [Check(name, True, f"python3, {spec.resource_dir}")]
    detail = f"python3 is another Python, {program} ({spec.resource_dir})"
    return [Check(name, False, detail, f"{remedy}; if that is not enough, delete that folder")]


def _optional_parts() -> list[Check]:
    checks = []
    for distribution, purpose, install in _OPTIONAL:
        version = _version(distribution)
        if version is None:
            detail, remedy = "not installed", f"only {purpose}: python -m pip install {install}"
            checks.append(Check(distribution, False, detail, remedy, required=False))
        else:
            checks.append(Check(distribution, True, version, required=False))
    return checks


_CHECKS: tuple[Callable[[], list[Check]], ...] = (
    _python,
    _packages,
    _tensorflow,
    _processors,
    _memory,
    _data,
    _kernel,
    _optional_parts,
)


def report() -> list[Check]:
    """Check everything; it takes a few seconds, most of them TensorFlow's start.

    Returns
    -------
    list of Check
        In the order in which `main` prints them.
    """
    return [check for part in _CHECKS for check in part()]


def main() -> int:
    """Print all findings and a summary.

    Returns
    -------
    int
        Exit status: 0, or 1 if something that is required is broken.
    """
    checks = report()
    for check in checks:
        print(check)
    broken = [check.name for check in checks if check.required and not check.ok]
    print()
    if broken:
        print(f"To be mended before the notebooks can run: {', '.join(broken)}.")
        return 1
    print("Everything that the notebooks need works.")
    return 0
