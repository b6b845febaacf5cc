import io
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import ch11lib
from ch11lib import claims, notebooks
from ch11lib.__main__ import _progress, main
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
import psutil
import pytest

CLAIM, OTHER = list(claims.catalogue())[:2]


def write(path, *sources):
    cells = [new_markdown_cell("# T"), *map(new_code_cell, sources)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)
    return path


def check(id, holds):
    return f"from ch11lib import claims\nclaims.check('{id}', {holds})"


def status(*args):
    """Run the command line in this process; return its exit status."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as end:
        return end.code


def test_help_names_the_commands(capsys):
    assert status() == 0
    assert capsys.readouterr().out.startswith("usage: python -m ch11lib")
    assert status("--help") == 0
    text = capsys.readouterr().out
    for command in ("doctor", "data", "run", "refresh"):
        assert f"\n    {command}" in text
        assert status(command, "--help") == 0
        assert capsys.readouterr().out.startswith(f"usage: python -m ch11lib {command}")
    assert status("--version") == 0
    assert capsys.readouterr().out == f"ch11lib {ch11lib.__version__}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["dance"], "invalid choice: 'dance'"),
        (["run", "--seeds", "5-3"], "expected a range such as 0-9, got '5-3'"),
        (["run", "--seeds", "a"], "expected a range such as 0-9, got 'a'"),
        (["run", "--seeds", "0-9", "--jobs", "0"], "expected a positive integer, got '0'"),
        (["refresh", "--timeout", "-1"], "expected a positive integer, got '-1'"),
        (["refresh", "--seeds", "1"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(capsys, args, message):
    assert status(*args) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "none.ipynb"], "none.ipynb: no such file or folder"),
        (["refresh"], "notebooks: no such file or folder; run this from the folder that holds"),
        (["run", "bad.ipynb"], "bad.ipynb: not a notebook"),
        (["run", "good.ipynb", "--jobs", "2"], "--jobs goes with --seeds"),
        (["run", "good.ipynb", "--seeds", "0"], "none of these notebooks checks a claim"),
        (["run", "good.ipynb", "--out", "bad.ipynb"], "bad.ipynb"),
    ],
)
def test_failures_are_one_line_without_a_traceback(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.ipynb", "1")
    (tmp_path / "bad.ipynb").write_text("{")
    assert status(*args) == 1
    captured = capsys.readouterr()
    (line,) = [s for s in captured.err.splitlines() if not s.startswith("running ")]
    assert line.startswith("ch11lib: ")
    assert message in line


def test_errors_of_the_program_itself_are_not_hidden(monkeypatch):
    def fail(paths):
        raise ZeroDivisionError

    monkeypatch.setattr(notebooks, "discover", fail)
    with pytest.raises(ZeroDivisionError):
        main(["run"])


def test_doctor_and_data_are_passed_on(monkeypatch):
    from ch11lib import datasets, doctor

    calls = []
    monkeypatch.setattr(doctor, "main", lambda *args: calls.append(("doctor", *args)) or 3)
    monkeypatch.setattr(datasets, "main", lambda argv: calls.append(("data", *argv)) or 4)
    assert status("doctor") == 3
    assert status("data") == 4
    assert status("data", "--full") == 4
    assert calls == [("doctor",), ("data", "--size", "12k"), ("data", "--size", "full")]


def test_refresh_prints_a_table_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad = write(tmp_path / "notebooks/01_bad.ipynb", "1 / 0")
    good = write(tmp_path / "notebooks/02_good.ipynb", "print(1)")
    before = bad.read_bytes()
    assert status("refresh") == 1
    captured = capsys.readouterr()
    head, *rows = captured.out.splitlines()
    assert head.split() == ["notebook", "seconds", "peak", "MB", "kB"]
    assert [row.split()[0] for row in rows] == [str(Path("notebooks/02_good.ipynb"))]
    assert "01_bad.ipynb, cell [1] `1 / 0`: ZeroDivisionError" in captured.err
    assert "1 of 2 notebooks failed and were left as they were" in captured.err
    assert bad.read_bytes() == before
    assert nbformat.read(good, 4).cells[1].outputs[0].text == "1\n"


def test_run_ends_with_a_table_and_says_what_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "notebooks/01_a.ipynb", check(CLAIM, True), check(OTHER, False))
    write(tmp_path / "notebooks/02_b.ipynb", "1 / 0")
    assert status("run", "--out", "o") == 1
    captured = capsys.readouterr()
    head, one, two, _, where = captured.out.splitlines()
    assert head.split("  ")[0] == "notebook"
    assert one.endswith("1 of 2")
    assert two.endswith("-")
    assert where == "pages to read: o/html/index.html"
    assert (tmp_path / "o/html/index.html").exists()
    assert f"01_a.ipynb: claim does not hold: {OTHER}" in captured.err
    assert "02_b.ipynb, cell [1] `1 / 0`: ZeroDivisionError" in captured.err
    # Off a terminal, progress is plain lines.
    assert captured.err.splitlines()[:2] == [
        f"running {Path('notebooks/01_a.ipynb')}",
        f"running {Path('notebooks/02_b.ipynb')}",
    ]


def test_on_a_terminal_a_bar_counts_the_cells(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    path = write(tmp_path / "a.ipynb", "1", "2")
    with _progress([path]) as (begin, tick):
        begin(path)
        tick()
    shown = sys.stderr.getvalue()
    assert shown.rpartition("\r")[2].startswith("a:  50%")
    assert "1/2" in shown


def test_run_succeeds(tmp_path, capsys):
    path = write(tmp_path / "a.ipynb", check(CLAIM, True))
    assert status("run", path, "--out", tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("1 of 1")


def test_run_over_seeds_in_two_processes(tmp_path, capsys):
    seed = "int(__import__('os').environ['CH11_SEED'])"
    path = write(tmp_path / "a.ipynb", check(CLAIM, True), check(OTHER, f"claims.below({seed}, 1)"))
    args = ("run", path, "--seeds", "0-1", "--out", tmp_path, "--jobs", "2")
    assert status(*args) == 1
    out = capsys.readouterr().out
    assert f"{OTHER}  " in out
    assert out.splitlines()[-1].startswith("1 of 2 claims held in every run (seeds 0-1)")
    (row,) = [line.split() for line in out.splitlines() if line.startswith(f"{OTHER} ")]
    assert row[-3:] == ["50%", "0", "0.5"]
    assert not (tmp_path / "html").exists()


def test_the_command_line_starts_without_tensorflow():
    program = (
        "import sys; from ch11lib.__main__ import main; main([]); import ch11lib.notebooks; "
        "sys.exit(any(name in sys.modules for name in ('tensorflow', 'keras')))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    result = subprocess.run([sys.executable, "-m", "ch11lib"], check=True, capture_output=True)
    assert b"usage: python -m ch11lib" in result.stdout
    assert result.stderr == b""


@pytest.mark.skipif(os.name == "nt", reason="signals of this kind are POSIX")
def test_ctrl_c_ends_everything_at_once(tmp_path):
    marker = tmp_path / "pid"
    slow = f"import os, pathlib, time\npathlib.Path({str(marker)!r}).write_text(str(os.getpid()))"
    path = write(tmp_path / "slow.ipynb", slow, "time.sleep(100)")
    other = write(tmp_path / "other.ipynb", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "ch11lib", "run", path, other, "--out", tmp_path / "o"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (marker.exists() and marker.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines() == [f"running {path}", "ch11lib: interrupted"]
    kernel = int(marker.read_text())
    assert not psutil.pid_exists(kernel) or psutil.Process(kernel).status() == "zombie"
