"""Put times and memory of the last run into the tables of notebooks: python docs/tables.py CSV.

The file is what ``python -m ch11lib run`` writes to ``build/notebooks.csv``. Columns ``run`` and
``memory`` of the README and of notebook 00 are renewed, in rows whose notebook was run.
"""

import csv
from pathlib import Path
import re
import sys

import nbformat

ROOT = Path(__file__).parents[1]


def filled(text: str, measured: dict[str, tuple[str, str]]) -> str:
    """Return Markdown with the last two cells of each row that links to a measured notebook."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        link = re.search(r"\]\((?:notebooks/)?([^/)]+\.ipynb)\)", line)
        if line.startswith("|") and link and link[1] in measured:
            cells = line.split(" | ")
            cells[-2:] = measured[link[1]][0], f"{measured[link[1]][1]} |"
            lines[i] = " | ".join(cells)
    return "\n".join(lines)


def rounded(seconds: float, megabytes: float) -> tuple[str, str]:
    """Return both as they are printed: to five seconds and to a tenth of a gigabyte, upwards."""
    return f"{-(-seconds // 5) * 5:.0f} s", f"{-(-megabytes // 100) / 10:.1f} GB"


def main(measurements: Path, root: Path = ROOT) -> None:
    """Renew both tables."""
    with measurements.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if "solutions" not in row["notebook"]]
    measured = {
        Path(row["notebook"]).name: rounded(float(row["seconds"]), float(row["peak_mb"]))
        for row in rows
    }
    readme = root / "README.md"
    readme.write_text(filled(readme.read_text("utf-8"), measured), encoding="utf-8")
    start = root / "notebooks" / "00_start_here.ipynb"
    notebook = nbformat.read(start, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = filled(cell.source, measured)
    start.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
