"""A browser, a JupyterLab and the pages to read, for the tests of ``make test-browser``."""

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

from ch11lib import notebooks
import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome")
# As root, which many containers are, Chromium has no sandbox; the rest keeps it off the network.
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="session")
def browser():
    """Start the Chromium of the system, or else the one that playwright has installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=SWITCHES)
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def console():
    """Collect what pages complain about; a test ends with ``assert console == []``."""
    return []


@pytest.fixture
def page(browser, console):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("console", lambda m: console.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: console.append(str(error)))
    yield page
    page.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Serve copies of the notebooks in JupyterLab, with settings of its own; return its address."""
    root = tmp_path_factory.mktemp("lab")
    ignored = shutil.ignore_patterns("assignments", ".ipynb_checkpoints")
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=ignored)
    settings = root / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}  # else it asks at the first start
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "CH11"))}
    variables |= {
        "JUPYTER_CONFIG_DIR": str(root / "config"),
        "JUPYTER_RUNTIME_DIR": str(root / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"),
    }
    options = ["--no-browser", "--port=0", f"--ServerApp.root_dir={root}", "--allow-root"]
    options += ["--IdentityProvider.token=x", "--LabApp.expose_app_in_browser=True"]
    with (root / "log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
    try:
        for _ in range(300):
            running = list((root / "runtime").glob("jpserver-*.json"))
            if running or server.poll() is not None:
                break
            time.sleep(0.2)
        assert running, (root / "log").read_text()
        url = json.loads(running[0].read_text())["url"]
        yield SimpleNamespace(url=url, root=root)
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Write the pages of all notebooks as `run` does, of the stored outputs instead of new ones."""
    out = tmp_path_factory.mktemp("site")

    def stored(path, **_):
        return notebooks.Execution(Path(path), notebooks.read(path), 1.0, 1e6, (), ())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebooks, "execute", stored)
        list(notebooks.run(notebooks.discover([ROOT / "notebooks"]), out))
    return out / "html"
