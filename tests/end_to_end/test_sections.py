"""Classification, the map and the health of the collection on the page, and who can read it all."""

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.end_to_end.conftest import drop, needs_axe, needs_chromium, violations
from tests.serving.conftest import Server
from tests.serving.wire import data_url
from tests.support import drawing, encoded

pytestmark = needs_chromium


def names(page: Page) -> list[str]:
    return page.locator("#results .name").all_text_contents()


def probabilities(bars: Locator) -> dict[str, float]:
    read = "bars => bars.map(bar => [bar.dataset.label, Number(bar.dataset.probability)])"
    return dict(bars.evaluate_all(read))


def test_labels_and_a_picture_give_bars_that_sum_to_one(page: Page) -> None:
    page.fill("#labels", "red circle\nblue square\n\nred circle\ngreen circle")
    drop(page, "#classify .drop", encoded(drawing("red", "circle")))
    bars = page.locator("#bars li")
    expect(bars).to_have_count(3)  # empty and repeated lines do not count
    read = "bars => bars.map(bar => Number(bar.dataset.probability))"
    probabilities = bars.evaluate_all(read)
    assert sum(probabilities) == pytest.approx(1, abs=1e-4)
    assert probabilities == sorted(probabilities, reverse=True)
    widths = page.locator("#bars .fill").evaluate_all("fills => fills.map(f => f.style.width)")
    assert [float(width.rstrip("%")) for width in widths] == pytest.approx(
        [100 * p for p in probabilities], abs=0.01
    )
    page.fill("#labels", "only one")
    expect(page.locator("#bars .value")).to_have_text(["100.0%"])


def test_the_first_result_can_be_classified_without_a_file_at_hand(page: Page) -> None:
    page.get_by_role("button", name="Use the first result").click()
    expect(page.locator("#drop-hint")).to_have_text(names(page)[0])
    expect(page.locator("#bars li")).to_have_count(5)


def test_the_wording_and_examples_of_labels_move_the_bars_at_once(
    page: Page, server: Server
) -> None:
    page.fill("#labels", "red\nblue")
    drop(page, "#classify .drop", encoded(drawing("red", "circle")))
    bars = page.locator("#bars li")
    expect(bars).to_have_count(2)
    words = probabilities(bars)
    page.get_by_label("Asked as").select_option("own")
    page.get_by_label("With {} for the label").fill("a {} circle")
    expect(page.locator("#bars li[data-label=red]")).not_to_have_attribute(
        "data-probability", str(words["red"])
    )
    page.get_by_label("With {} for the label").fill("no place")
    expect(page.locator("#classify-status.error")).to_contain_text("no {} where the label goes")
    page.get_by_label("Asked as").select_option("plain")
    page.locator("#few-shot summary").click()
    shown = {"red": encoded(drawing("red", "circle")), "blue": encoded(drawing("blue", "square"))}
    for label, example in shown.items():
        drop(page, f".shot[data-label={label}]", example)
    expect(page.locator(".example")).to_have_count(2)
    page.get_by_label("Examples against words").fill("1")
    expect(page.locator("#image-weight-shown")).to_have_text("examples alone")
    classes = [{"label": n, "images": [data_url(i)], "image_weight": 1} for n, i in shown.items()]
    body = {"images": [data_url(shown["red"])], "classes": classes}
    first = server.client.post("/v1/classify", json=body).json()["results"][0]["predictions"][0]
    expect(bars.first).to_have_attribute("data-label", first["label"])
    expect(bars.first).to_have_attribute("data-probability", str(first["probability"]))
    drop(page, ".shot[data-label=blue]", encoded(drawing("blue", "square", size=700)))
    expect(page.locator(".example")).to_have_count(3)
    assert page.locator(".example img").nth(2).evaluate("image => image.naturalWidth") == 512
    page.get_by_role("button", name="Remove example 1 of red").click()
    expect(page.locator(".example")).to_have_count(2)
    assert page.evaluate("document.activeElement.ariaLabel") == "Add examples of red"


def test_labels_are_kept_as_a_set_and_chosen_again(page: Page, server: Server) -> None:
    page.fill("#labels", "red\nblue")
    page.locator("#few-shot summary").click()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add examples of red").click()
    shown = encoded(drawing("red", "square"))
    chooser.value.set_files({"name": "x.png", "mimeType": "image/png", "buffer": shown})
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add examples of blue").click()
    shown = encoded(drawing("blue", "square"))
    chooser.value.set_files({"name": "x.png", "mimeType": "image/png", "buffer": shown})
    expect(page.locator(".example")).to_have_count(2)
    page.get_by_label("Name of a label set").fill("two colours")
    page.get_by_role("button", name="Keep as a label set").click()
    assert server.client.get("/v1/label-sets").json() == {"label_sets": []}  # no such name
    page.get_by_label("Name of a label set").fill("colours")
    page.get_by_role("button", name="Keep as a label set").click()
    expect(page.locator("#save-status")).to_contain_text("Kept as “colours”")
    kept = server.client.get("/v1/label-sets/colours").json()
    assert [each["num_images"] for each in kept["classes"]] == [1, 1]
    page.reload()
    page.get_by_label("Among").select_option("colours")
    expect(page.locator("#classify-status")).to_contain_text("2 labels, 2 examples.")
    expect(page.locator("#labels")).to_have_value("red\nblue")
    expect(page.locator("#few-shot")).to_be_hidden()
    page.get_by_role("button", name="Use the first result").click()
    expect(page.locator("#classify-status")).to_contain_text("among “colours”")
    expect(page.locator("#bars li")).to_have_count(2)
    page.get_by_label("Among").select_option("")
    expect(page.locator("#few-shot")).to_be_visible()


def test_another_collection_is_chosen_searched_and_judged(page: Page, server: Server) -> None:
    expect(page.locator("#collection-chooser")).to_be_hidden()  # there is one
    images = {name: data_url(encoded(drawing(name, "square"))) for name in ("red", "blue")}
    items = [{"id": f"only-{name}", "image": image} for name, image in images.items()]
    server.client.put("/v1/collections/other").raise_for_status()
    written = server.client.post("/v1/items?collection=other", json={"items": items})
    written.raise_for_status()
    try:
        page.reload()
        page.get_by_role("button", name="Add to the search: a yellow circle").click()
        page.get_by_label("In the collection").select_option("other")
        expect(page.locator("#results li")).to_have_count(2)
        expect(page.locator("#added")).to_be_hidden()  # the circle is none of this collection
        assert sorted(names(page)) == ["only-blue", "only-red"]
        page.wait_for_load_state("networkidle")
        loaded = "images => images.every(i => i.complete && i.naturalWidth > 0)"
        assert page.locator("#results img").evaluate_all(loaded)
        expect(page.locator("#health-facts dd").first).to_have_text("2")
        page.get_by_role("button", name="Draw the map").click()
        expect(page.locator("#map-status")).to_contain_text("2 items")
        assert page.url.endswith("/?q=red%20apple&collection=other")
        page.reload()
        expect(page.get_by_label("In the collection")).to_have_value("other")
        expect(page.locator("#results li")).to_have_count(2)
        page.locator(".hit").first.click()
        expect(page.locator("#status")).to_contain_text("the picture")
        page.get_by_label("In the collection").select_option("default")
        expect(page.locator("#results li")).to_have_count(0)  # it is none of this collection
        page.fill("#query", "a red circle")
        expect(page.locator("#results li")).to_have_count(16)
        expect(page.locator("#health-facts dd").first).to_have_text("16")
        assert violations(page) == []
    finally:
        server.client.delete("/v1/collections/other").raise_for_status()


def test_the_map_shows_both_kinds_as_stored_and_centred(page: Page) -> None:
    page.get_by_role("button", name="Draw the map").click()
    expect(page.locator("#map-status")).to_contain_text("16 pictures and 16 texts of 16 items")
    assert page.locator(".mark.image").count() == page.locator(".mark.text").count() == 16
    places = "marks => marks.map(mark => mark.style.transform)"
    stored = page.locator(".mark").evaluate_all(places)
    apart = page.locator("#map-status").text_content()
    page.get_by_label("centred").check()
    assert page.locator(".mark").evaluate_all(places) != stored
    assert page.locator("#map-status").text_content() != apart
    page.locator("#map-details summary").click()
    expect(page.locator("#map-body tr")).to_have_count(32)
    page.locator("#map-body button").first.click()
    name = page.locator("#map-body button").first.text_content()
    expect(page.locator("#map-point")).to_contain_text(str(name))
    expect(page.locator(".mark.chosen")).to_have_count(2)
    page.get_by_role("button", name="More like this", exact=True).click()
    expect(page.locator("#status")).to_contain_text(f"the picture “{name}”")


@needs_axe
def test_axe_finds_nothing_in_any_view_light_or_dark_wide_or_on_a_phone(
    browser: Browser, server: Server
) -> None:
    assert server.client.post("/v1/collections/default/measure").status_code == 200
    page = browser.new_page(reduced_motion="reduce")

    def everywhere() -> None:
        for scheme in ("light", "dark"):
            for width in (1280, 390):
                page.emulate_media(color_scheme=scheme)
                page.set_viewport_size({"width": width, "height": 900})
                assert violations(page) == [], (page.url, scheme, width)
                assert page.evaluate("document.documentElement.scrollWidth") <= width

    page.goto(server.url)
    expect(page.locator("#results li")).to_have_count(16)
    expect(page.locator("#health-curve")).to_be_visible()
    page.get_by_role("button", name="Use the first result").click()
    page.get_by_role("button", name="Draw the map").click()
    expect(page.locator("#map-body tr")).to_have_count(32)
    page.get_by_role("button", name="Add to the search: a red circle").click()
    page.get_by_label("Asked as").select_option("own")
    for details in ("#filters", "#few-shot", "#map-details"):
        page.locator(f"{details} summary").click()
    drop(page, ".shot >> nth=0", encoded(drawing("red", "circle")))
    expect(page.locator(".example")).to_have_count(1)
    expect(page.locator("#bars li")).to_have_count(5)
    page.locator("#map-body button").first.click()
    everywhere()
    page.get_by_role("button", name="Look closer: a blue square").click()
    everywhere()
    page.goto(f"{server.url}/docs")
    page.locator("summary", has_text="/v1/search").click()
    page.get_by_role("button", name="Send").locator("visible=true").click()
    expect(page.locator("details[open] pre")).to_contain_text("200 OK")
    everywhere()
    page.close()
