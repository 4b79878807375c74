"""The report of an evaluation in a real headless Chromium."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.end_to_end.conftest import needs_axe, needs_chromium, violations
from tests.support import tiny_bundle, write_dataset
from tests.vlm.evaluation.test_run import config
from vlm.evaluation import evaluate_with_evidence, subject_of_encoder, write_report
from vlm.inference import Encoder

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds of tasks on one page."""
    folder = tmp_path_factory.mktemp("report")
    tiny_bundle(folder / "bundle")
    write_dataset(folder / "shards", 40)
    subject, settings = subject_of_encoder(Encoder.load(folder / "bundle")), config(folder)
    with evaluate_with_evidence(subject, settings) as (evaluation, evidence):
        write_report(folder / "report.html", evaluation, settings, evidence)
    return folder / "report.html"


@needs_axe
def test_a_report_is_read_on_a_phone_without_moving_it_sideways(
    browser: Browser, report: Path
) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(report.as_uri())
    wide = "all => all.map(e => [e.ariaLabel, e.scrollWidth - e.clientWidth]).filter(w => w[1] > 0)"
    assert page.locator(".scroll").evaluate_all(wide) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shown = "getComputedStyle(document.querySelectorAll('.wide td')[1], '::before').content"
    assert page.evaluate(shown) == '"top-5"'
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert violations(page) == [], scheme
    page.set_viewport_size({"width": 1280, "height": 800})
    assert violations(page) == []
    page.close()
