"""The command line: ``python -m ch11lib doctor | data | run | refresh``."""

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import math
import re
import sys

from ch11lib import __version__

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ch11lib",
        description="Notebook series on training deep neural networks: check the installation, "
        "get the data, run the notebooks, renew their outputs.",
    )
    parser.add_argument("--version", action="version", version=f"ch11lib {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor",
        help="check the installation",
        description="Check that everything the notebooks need is installed and works.",
    )
    doctor.set_defaults(function=_doctor)

    data = commands.add_parser(
        "data",
        help="verify the embedded images; with --full, get all 70,000",
        description="Verify the Fashion-MNIST images inside the package.",
    )
    data.add_argument(
        "--full",
        action="store_true",
        help="also get and verify all 70,000 images: from a copy on this machine, else by download",
    )
    data.set_defaults(function=_data)

    run = commands.add_parser(
        "run",
        help="execute the notebooks and write pages to read",
        description="Execute notebooks, write pages to OUT/html and end with a table. The "
        "notebooks are not changed. The exit status is 1 if a notebook fails or a claim does "
        "not hold. With --seeds, repeat the claims over seeds and write tables instead of pages.",
    )
    _add_paths(run)
    run.add_argument("--out", default="build", metavar="OUT", help="results (default: build)")
    run.add_argument(
        "--seeds",
        type=_seeds,
        metavar="A-B",
        help="check the claims with these seeds (0-9, or a single number) and write "
        "OUT/claims.csv and OUT/claims_by_id.csv; what was measured before is not run again",
    )
    run.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="with --seeds: notebooks to run at the same time (default: 1)",
    )
    run.set_defaults(function=_run)

    refresh = commands.add_parser(
        "refresh",
        help="execute the notebooks and store their outputs in them",
        description="Execute notebooks and write the outputs into the files. A notebook that "
        "fails, or prints to stderr, is left as it was.",
    )
    _add_paths(refresh)
    refresh.set_defaults(function=_refresh)
    return parser


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="*",
        default=["notebooks"],
        metavar="PATH",
        help="notebooks, or folders with notebooks and their solutions (default: notebooks)",
    )
    parser.add_argument(
        "--timeout",
        type=_positive,
        default=600,
        metavar="SECONDS",
        help="longest time for a single cell (default: 600)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _seeds(text: str) -> list[int]:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not found or (found[2] is not None and int(found[2]) < int(found[1])):
        raise argparse.ArgumentTypeError(f"expected a range such as 0-9, got {text!r}")
    return list(range(int(found[1]), int(found[2] or found[1]) + 1))


# --------------------------------------------------------------------------------- commands


def _doctor(args: argparse.Namespace) -> int:
    from ch11lib import doctor

    return doctor.main()


def _data(args: argparse.Namespace) -> int:
    from ch11lib import datasets

    return datasets.main(["--size", "full" if args.full else "12k"])


def _refresh(args: argparse.Namespace) -> int:
    from ch11lib import notebooks

    paths = notebooks.discover(args.paths)
    failed, rows = 0, []
    with _progress(paths) as (begin, tick):
        for path in paths:
            begin(path)
            try:
                done = notebooks.refresh(path, timeout=args.timeout, on_cell=tick)
            except notebooks.NotebookError as error:
                failed += 1
                _complain(str(error))
            else:
                size = path.stat().st_size / 1000
                rows.append(
                    [str(path), f"{done.seconds:.1f}", f"{done.peak_mb:.0f}", f"{size:.0f}"]
                )
    if rows:
        _print_table(["notebook", "seconds", "peak MB", "kB"], rows)
    if failed:
        _complain(f"{failed} of {len(paths)} notebooks failed and were left as they were")
    return int(failed > 0)


def _run(args: argparse.Namespace) -> int:
    from ch11lib import notebooks

    paths = notebooks.discover(args.paths)
    if args.seeds is not None:
        return _measure(args, paths)
    if args.jobs is not None:
        raise notebooks.NotebookError("--jobs goes with --seeds")
    rows: list[list[str]] = []
    remarks: list[str] = []
    try:
        with _progress(paths) as (begin, tick):
            begin(paths[0])
            for done in notebooks.run(paths, args.out, timeout=args.timeout, on_cell=tick):
                holding = done.n_claims - len(done.failed_claims)
                rows.append(
                    [
                        str(done.path),
                        f"{done.seconds:.1f}",
                        f"{done.peak_mb:.0f}",
                        f"{holding} of {done.n_claims}" if done.n_claims else "-",
                    ]
                )
                remarks += done.errors
                remarks += [f"{done.path}: claim does not hold: {id}" for id in done.failed_claims]
                for path in paths[len(rows) : len(rows) + 1]:
                    begin(path)
    finally:
        if rows:
            _print_table(["notebook", "seconds", "peak MB", "claims that hold"], rows)
            print(f"\npages to read: {args.out}/html/index.html")
    for remark in remarks:
        _complain(remark)
    return int(bool(remarks))


def _measure(args: argparse.Namespace, paths: Sequence) -> int:
    from ch11lib import notebooks

    table = notebooks.measure(
        paths, args.seeds, args.out, jobs=args.jobs or 1, timeout=args.timeout
    )
    summary = notebooks.by_claim(table)
    below = summary[summary["pass_rate"] < 1]
    rows = [
        [
            row.id,
            row.notebook,
            row.verdict,
            f"{row.pass_rate:.0%}",
            *(
                "-" if math.isnan(margin) else f"{margin:.2g}"
                for margin in (row.margin_worst, row.margin_median)
            ),
        ]
        for row in below.itertuples()
    ]
    if rows:
        print()
        _print_table(
            ["claim", "notebook", "verdict", "holds", "worst margin", "median margin"], rows
        )
    print(
        f"\n{len(summary) - len(below)} of {len(summary)} claims held in every run "
        f"(seeds {args.seeds[0]}-{args.seeds[-1]}); tables: {args.out}/claims.csv, "
        f"{args.out}/claims_by_id.csv, {args.out}/claims_by_id.md"
    )
    return int(len(below) > 0)


# --------------------------------------------------------------------------------- printing


@contextlib.contextmanager
def _progress(paths: Sequence) -> Iterator[tuple[Callable, Callable]]:
    """Yield functions to call before each notebook and after each cell.

    On a terminal they move a bar; elsewhere (CI, a file) each notebook is a line.
    """
    if not sys.stderr.isatty():
        yield lambda path: print(f"running {path}", file=sys.stderr, flush=True), lambda: None
        return
    from ch11lib import notebooks
    from tqdm import tqdm

    cells = sum(cell.cell_type == "code" for path in paths for cell in notebooks.read(path).cells)
    with tqdm(total=cells, unit="cell", file=sys.stderr, dynamic_ncols=True) as bar:
        yield lambda path: bar.set_description(path.stem), bar.update


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]))


def _complain(text: str) -> None:
    print(f"ch11lib: {text}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process by default.

    Returns
    -------
    int
        Exit status: 0 if all is well, 1 if something failed, 130 if interrupted. A wrong
        argument ends the process with 2.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "function"):
        parser.print_help()
        return 0
    try:
        return args.function(args)
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except OSError as error:
        _complain(f"{error}")
        return 1
    except Exception as error:
        # Only after something failed is it worth loading the module that defines this class.
        from ch11lib.notebooks import NotebookError

        if not isinstance(error, NotebookError):
            raise
        _complain(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
