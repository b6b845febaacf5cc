"""The pages that `make run` writes, for readers without scripts, on a telephone, or blind."""

import pytest


def all_pages(site):
    return sorted(site.rglob("*.html"))


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_and_need_no_scripts(browser, site, width):
    context = browser.new_context(
        java_script_enabled=False, viewport={"width": width, "height": 844}, offline=True
    )
    page = context.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    for path in all_pages(site):
        page.goto(path.as_uri())
        # Without scripts in the page the driver can still measure it.
        client = context.new_cdp_session(page)
        size = client.send("Page.getLayoutMetrics")["cssContentSize"]
        assert size["width"] <= width, (path.name, "scrolls sideways")
        assert page.locator("h1").count() == 1, path.name
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    context.close()


def test_no_serious_violation_of_the_accessibility_rules(page, site):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = {}
    for path in all_pages(site):
        page.goto(path.as_uri())
        for violation in axe.run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                nodes = [node["html"][:200] for node in violation["nodes"]]
                found.setdefault(violation["id"], []).append((path.name, len(nodes), nodes[0]))
    assert found == {}


def test_answers_unfold_with_the_keyboard(page, site):
    page.goto((site / "01_vanishing_and_exploding_gradients.html").as_uri())
    answer = page.locator("details").first
    assert not answer.evaluate("element => element.open")
    answer.locator("summary").focus()
    page.keyboard.press("Enter")
    assert answer.evaluate("element => element.open")
