"""The embedded images (`ch11lib.datasets` reads them) and the script that makes the file."""
