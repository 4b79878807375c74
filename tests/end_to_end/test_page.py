"""The page in a real headless Chromium, against a real server process."""

import base64
import re

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.end_to_end.conftest import drop, needs_chromium
from tests.serving.conftest import Server
from tests.support import drawing, encoded

pytestmark = needs_chromium


def names(page: Page) -> list[str]:
    return page.locator("#results .name").all_text_contents()


def expected(server: Server, **query: object) -> list[str]:
    answer = server.client.post("/v1/search", json={"limit": 24, **query})
    return [hit["text"] for hit in answer.json()["results"]]


def test_the_first_paint_shows_the_results_of_an_example(page: Page, server: Server) -> None:
    assert page.input_value("#query") == "red apple"
    assert names(page) == expected(server, text="red apple")
    expect(page.locator("#results .score").first).to_have_text(re.compile(r"^-?0\.\d{3} · drawn"))
    loaded = "images => images.every(i => i.complete && i.naturalWidth > 0)"
    page.wait_for_load_state("networkidle")
    assert page.locator("#results img").evaluate_all(loaded)


def test_typing_ranks_pictures_without_pressing_enter(page: Page, server: Server) -> None:
    page.fill("#query", "a blue square")
    expect(page.locator("#status")).to_contain_text("16 of 16 pictures nearest to “a blue square”")
    assert names(page) == expected(server, text="a blue square")
    assert page.url.endswith("?q=a%20blue%20square")
    page.reload()
    assert page.input_value("#query") == "a blue square"


def test_an_example_is_searched_by_one_click(page: Page, server: Server) -> None:
    page.get_by_role("button", name="sailing boat").click()
    expect(page.locator("#status")).to_contain_text("“sailing boat”")
    assert names(page) == expected(server, text="sailing boat")


def test_a_dropped_picture_finds_itself_first(page: Page) -> None:
    drop(page, "#search", encoded(drawing("green", "square")))
    expect(page.locator("#status")).to_contain_text("your picture")
    assert names(page)[0] == "a green square"
    expect(page.locator("#results .score").first).to_contain_text("1.000")
    expect(page.locator("#query-image img")).to_be_visible()


def test_a_pasted_and_a_chosen_picture_search_as_well(page: Page) -> None:
    page.evaluate(
        """encoded => {
            const bytes = Uint8Array.from(atob(encoded), c => c.charCodeAt(0));
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([bytes], "x.png", { type: "image/png" }));
            document.body.dispatchEvent(
                new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
        }""",
        base64.b64encode(encoded(drawing("purple", "circle"))).decode(),
    )
    expect(page.locator("#results .name").first).to_have_text("a purple circle")
    file = {"name": "x.png", "mimeType": "image/png", "buffer": encoded(drawing("gray", "square"))}
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Use a picture").click()
    chooser.value.set_files(file)  # type: ignore[arg-type] # a dict literal, not its TypedDict
    expect(page.locator("#results .name").first).to_have_text("a gray square")


def test_a_click_on_a_picture_gives_more_like_it(page: Page, server: Server) -> None:
    page.get_by_role("button", name=re.compile("^a yellow circle ?, similarity")).click()
    expect(page.locator("#status")).to_contain_text("the picture “a yellow circle”")
    assert names(page) == expected(server, id="yellow-circle")
    assert "a yellow circle" not in names(page)


def test_pictures_and_words_are_added_to_a_search_and_taken_away_again(
    page: Page, server: Server
) -> None:
    page.get_by_role("button", name="Add to the search: a yellow circle").click()
    expect(page.locator("#status")).to_contain_text("“red apple” + “a yellow circle”")
    page.fill("#query", "blue")
    expect(page.locator("#status")).to_contain_text("“blue” + “a yellow circle”")
    page.get_by_role("button", name="Without words").click()
    expect(page.locator("#status")).to_contain_text("to “a yellow circle” \N{MINUS SIGN} “blue”")
    wanted = [{"id": "yellow-circle", "weight": 1}, {"text": "blue", "weight": -0.7}]
    assert names(page) == expected(server, parts=wanted)
    page.get_by_role("button", name="Remove \N{MINUS SIGN} blue").click()
    expect(page.locator("#added button")).to_have_count(1)
    page.get_by_role("button", name="Remove + a yellow circle").click()
    expect(page.locator("#added")).to_be_hidden()


def test_a_filter_leaves_what_fulfils_it(page: Page, server: Server) -> None:
    page.locator("#filters summary").click()
    page.get_by_label("Name of a fact").fill("shape")
    page.get_by_label("Value").fill("circle")
    page.get_by_role("button", name="Add filter").click()
    expect(page.locator("#results li")).to_have_count(8)
    assert names(page) == expected(server, text="red apple", filter={"shape": "circle"})
    page.get_by_role("button", name="Remove shape is circle").click()
    expect(page.locator("#results li")).to_have_count(16)
    page.get_by_label("Condition").select_option("gte")
    page.get_by_label("Value").fill("many")
    page.get_by_role("button", name="Add filter").click()
    expect(page.locator("#status.error")).to_contain_text("need a number")


def test_a_closer_look_shows_the_facts_and_goes_with_escape(page: Page) -> None:
    page.get_by_role("button", name="Look closer: a red circle").click()
    expect(page.locator("#item")).to_be_visible()
    expect(page.locator("#item-facts")).to_contain_text("red-circle")
    expect(page.locator("#item-facts")).to_contain_text("drawn_flat")
    page.keyboard.press("Escape")
    expect(page.locator("#item")).to_be_hidden()


def test_the_health_of_the_collection_is_shown(page: Page) -> None:
    expect(page.locator("#health-facts")).to_contain_text("16")
    expect(page.locator("#health-note")).to_contain_text("Every search compares all items")


def test_a_file_that_is_no_picture_is_told_in_words(browser: Browser, server: Server) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#results li")).to_have_count(16)
    drop(page, "#search", b"no picture at all")
    expect(page.locator("#status.error")).to_contain_text("not a readable image")
    expect(page.locator("#results li")).to_have_count(16)
    context.close()


def test_everything_is_reached_by_keyboard(page: Page, server: Server) -> None:
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    page.keyboard.press("Control+a")
    page.keyboard.type("orange square")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("“orange square”")
    seen: list[str] = []
    for _ in range(100):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert ring != "none", seen[-1]
        if seen[-1] == "classify-first":
            break
    order = ["search-pick", "chip", "hit", "labels", "classify-pick", "classify-first"]
    assert [name for name in dict.fromkeys(seen) if name in order] == order
    assert seen.count("hit") == 16
    page.locator(".hit").nth(2).focus()
    name = names(page)[2]
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text(f"the picture “{name}”")
    assert page.evaluate("document.activeElement.id") == "results"  # not lost with its button


def test_every_control_and_picture_has_a_name(page: Page) -> None:
    page.get_by_role("button", name="Use the first result").click()
    expect(page.locator("#bars li")).to_have_count(5)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll(
            "button, input, select, textarea, a, img")].filter(e => {
            const label = e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim();
            return e.tagName === "IMG" ? !e.hasAttribute("alt") : !label;
        }).map(e => e.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("[aria-live=polite]").count() == 4
    assert page.get_attribute("html", "lang") == "en"
    assert page.locator("h1").count() == 1


@pytest.mark.parametrize("path", ["/", "/docs"])
@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_is_wider_than_a_phone(
    browser: Browser, server: Server, width: int, path: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800})
    page = context.new_page()
    page.goto(server.url + path)
    expect(page.locator("#results li, .operation").nth(8)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def test_dark_and_light_follow_the_system(browser: Browser, server: Server) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(server.url)
        colours[scheme] = [
            page.evaluate(f"getComputedStyle(document.body).{name}")
            for name in ("backgroundColor", "color")
        ]
        context.close()
    light, dark = (
        [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours[scheme]]
        for scheme in ("light", "dark")
    )
    assert light[0] > 600 > 200 > light[1]  # bright ground, dark ink
    assert dark[0] < 200 < 600 < dark[1]


def test_the_api_page_tries_an_operation_and_shows_its_answer(
    browser: Browser, server: Server
) -> None:
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{server.url}/docs")
    paths = page.locator(".operation summary code")
    document = httpx.get(f"{server.url}/openapi.json").json()
    expect(paths).to_have_count(sum(len(methods) for methods in document["paths"].values()))
    page.locator("summary", has_text="/v1/search").click()
    operation = page.locator("details[open]")
    expect(operation).to_contain_text("More like this stored item.")
    operation.get_by_role("button", name="Send").click()
    expect(operation.locator("pre")).to_contain_text("200 OK")
    expect(operation.locator("pre")).to_contain_text('"thumbnail": "/v1/items/')
    assert complaints == []
    page.close()
