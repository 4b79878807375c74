"""A real headless Chromium, and a real server with drawings that it shows."""

import base64
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.serving.conftest import Server, running
from tests.serving.wire import data_url
from tests.support import COLOURS, SHAPES, drawing, encoded, give_means, tiny_bundle

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_chromium = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium found; on Debian: apt-get install chromium"
    ),
]

AXE = importlib.util.find_spec("axe_playwright_python")
needs_axe = pytest.mark.skipif(
    AXE is None, reason="axe-core comes with axe-playwright-python, of the extra dev"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    tiny_bundle(folder / "bundle")
    give_means(
        folder / "bundle",
        [drawing(colour, shape) for colour in COLOURS for shape in SHAPES],
        [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES],
    )
    with running(f"bundle={folder / 'bundle'}", f"index={folder / 'index'}") as found:
        items = [
            {
                "id": f"{colour}-{shape}",
                "image": data_url(encoded(drawing(colour, shape))),
                "text": f"a {colour} {shape}",
                "metadata": {"style": "drawn_flat", "shape": shape},
            }
            for colour in COLOURS
            for shape in SHAPES
        ]
        assert found.client.post("/v1/items", json={"items": items}).status_code == 201
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page after its first search; at the end, nothing strange may have happened on it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    complaints: list[str] = []
    foreign: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: foreign.append(request.url))
    page.goto(server.url)
    expect(page.locator("#results li")).to_have_count(16)
    yield page
    context.close()
    own = (server.url, "data:", f"blob:{server.url}")
    assert [url for url in foreign if not url.startswith(own)] == []
    assert complaints == []


def drop(page: Page, target: str, image: bytes) -> None:
    """Drop a file as a person would: a real DataTransfer with a real File."""
    transfer = page.evaluate_handle(
        """encoded => {
            const bytes = Uint8Array.from(atob(encoded), c => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            return transfer;
        }""",
        base64.b64encode(image).decode(),
    )
    page.dispatch_event(target, "drop", {"dataTransfer": transfer})


def violations(page: Page) -> list[tuple[str, list[str]]]:
    """What axe-core finds on a page as it is now: the rule, and the elements that break it."""
    assert AXE is not None
    assert AXE.origin is not None
    page.evaluate(Path(AXE.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
    return [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]
