import base64
import io
import json
import os
import shutil
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image

from efficientnet.images.datasets import load_dataset

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

# Gives the page a file as the browser would after a drop or a paste, which no script can start.
HAND_OVER = """
([event, name, type, content]) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, {type}));
    const options = {bubbles: true, cancelable: true, dataTransfer: transfer,
                     clipboardData: transfer};
    const Kind = event === "paste" ? ClipboardEvent : DragEvent;
    document.getElementById("picture").dispatchEvent(new Kind(event, options));
}
"""


@pytest.fixture(scope="module")
def address(service_port: int) -> str:
    return f"http://127.0.0.1:{service_port}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Chromium's sandbox does not start as root, as in most containers.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    yield page
    assert not errors
    page.close()


def digit(index: int) -> bytes:
    return load_dataset("digits").val[index].read()


def hand_over(
    page: Page, event: str, picture: bytes, name: str = "digit.png", kind: str = "image/png"
) -> None:
    page.evaluate(HAND_OVER, [event, name, kind, base64.b64encode(picture).decode()])


def answer_of(address: str, picture: bytes) -> list[tuple[str, float]]:
    response = httpx.post(f"{address}classify", files={"image": ("digit.png", picture)})
    return [(entry["label"], entry["probability"]) for entry in response.json()]


def expect_shown(page: Page, answer: list[tuple[str, float]]) -> None:
    rows = page.locator("#classes li")
    expect(rows).to_have_count(len(answer))
    expect(page.locator("#sheet")).to_have_attribute("data-state", "done")
    expect(page.locator("#classes .label")).to_have_text([label for label, _ in answer])
    percents = [f"{100 * probability:.1f} %" for _, probability in answer]
    expect(page.locator("#classes .percent")).to_have_text(percents)
    for row, (_, probability) in zip(rows.all(), answer, strict=True):
        track = row.locator(".bar").bounding_box()
        filled = row.locator(".bar span").bounding_box()
        assert track and filled
        assert float(row.get_attribute("data-probability") or "nan") == probability
        assert filled["width"] == pytest.approx(track["width"] * probability, abs=2)


def test_page_shows_a_dropped_digit_beside_the_classes_that_the_service_answers(
    page: Page, address: str
) -> None:
    page.emulate_media(reduced_motion="reduce")
    hand_over(page, "drop", digit(0))
    expect_shown(page, answer_of(address, digit(0)))
    preview = page.locator("#preview")
    expect(preview).to_be_visible()
    assert preview.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [8, 8]
    assert preview.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    box = preview.bounding_box()
    assert box and box["width"] > 200
    expect(page.locator("#name")).to_have_text("digit.png \u00b7 8 \u00d7 8 pixels")
    expect(page.locator("#model")).to_contain_text("tiny")


def test_second_picture_replaces_the_first_whether_pasted_or_chosen(
    page: Page, address: str
) -> None:
    page.emulate_media(reduced_motion="reduce")
    hand_over(page, "drop", digit(0))
    expect_shown(page, answer_of(address, digit(0)))
    hand_over(page, "paste", digit(1), "pasted.png")
    expect(page.locator("#name")).to_contain_text("pasted.png")
    expect_shown(page, answer_of(address, digit(1)))
    with page.expect_file_chooser() as chooser:
        page.locator("#picture").press("Enter")
    chooser.value.set_files({"name": "chosen.png", "mimeType": "image/png", "buffer": digit(2)})
    expect(page.locator("#name")).to_contain_text("chosen.png")
    expect_shown(page, answer_of(address, digit(2)))


def test_page_shows_why_the_service_refuses_a_file(page: Page) -> None:
    hand_over(page, "drop", b"no picture", "notes.txt", "text/plain")
    expect(page.get_by_role("alert")).to_contain_text("not an image")
    expect(page.locator("#classes li")).to_have_count(0)
    buffer = io.BytesIO()
    Image.new("1", (8000, 6400)).save(buffer, "PNG")
    hand_over(page, "drop", buffer.getvalue(), "large.png")
    expect(page.get_by_role("alert")).to_contain_text("50 megapixels")


def test_page_refuses_a_file_above_the_limit_without_sending_it(page: Page) -> None:
    expect(page.locator("#model")).to_contain_text("tiny")
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    page.evaluate(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(21e6)], "a.tif", {type: "image/tiff"}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer}));
        }"""
    )
    expect(page.get_by_role("alert")).to_have_text(
        "This file has 21 MB, more than the 20 MB allowed."
    )
    assert not [url for url in sent if url.endswith("/classify")]


def test_slow_answer_to_an_earlier_picture_does_not_replace_a_later_one(
    page: Page, address: str
) -> None:
    page.emulate_media(reduced_motion="reduce")
    held: list[Route] = []
    # The page also aborts the earlier request; here it answers nevertheless, as one may that was
    # already on its way.
    page.evaluate("AbortController.prototype.abort = () => {}")
    page.route("**/classify", lambda route: held.append(route), times=1)
    hand_over(page, "drop", digit(0), "slow.png")
    expect(page.locator("#sheet")).to_have_attribute("data-state", "busy")
    hand_over(page, "drop", digit(1), "quick.png")
    expect_shown(page, answer_of(address, digit(1)))
    with page.expect_response("**/classify"):
        held[0].fulfill(json=[{"label": "late", "class_index": 0, "probability": 1.0}])
    page.wait_for_timeout(100)
    expect_shown(page, answer_of(address, digit(1)))


def test_page_says_when_the_service_cannot_be_reached(page: Page) -> None:
    page.route("**/classify", lambda route: route.abort())
    hand_over(page, "drop", digit(0))
    expect(page.get_by_role("alert")).to_contain_text("The service cannot be reached")


def test_labels_are_shown_as_text_and_never_as_markup(page: Page) -> None:
    label = "<img src=x onerror=alert(1)>"
    body = json.dumps([{"label": label, "class_index": 0, "probability": 0.5}])
    page.route("**/classify", lambda route: route.fulfill(status=200, body=body))
    hand_over(page, "drop", digit(0))
    expect(page.locator("#classes .label")).to_have_text([label])
    assert page.locator("#classes img").count() == 0


@pytest.mark.parametrize("path", ["", "docs"])
def test_page_and_docs_load_nothing_from_another_host(
    browser: Browser, address: str, path: str
) -> None:
    page = browser.new_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"{address}{path}", wait_until="networkidle")
    if path == "docs":
        expect(page.get_by_text("/classify", exact=True).first).to_be_visible()
    assert requests
    assert not [url for url in requests if not url.startswith((address, "data:"))]
    page.close()


@pytest.mark.parametrize("width", [360, 1280])
def test_page_fits_the_width_of_phones_and_desktops(
    browser: Browser, address: str, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(address)
    hand_over(page, "drop", digit(0))
    expect(page.locator("#classes li")).to_have_count(5)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
