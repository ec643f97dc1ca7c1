import base64
import io
import json
import math
import re
import shlex
from typing import Literal

import httpx
import pytest
from PIL import Image

from efficientnet.images.datasets import load_dataset

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

from playwright.sync_api import Browser, Locator, Page, Route, expect
from processes import wait_until

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


def digit(index: int) -> bytes:
    return load_dataset("digits").val[index].read()


def hand_over(
    page: Page, event: str, picture: bytes, name: str = "digit.png", kind: str = "image/png"
) -> None:
    page.evaluate(HAND_OVER, [event, name, kind, base64.b64encode(picture).decode()])


def answer_of(address: str, picture: bytes) -> list[tuple[str, float]]:
    response = httpx.post(f"{address}classify", files={"image": ("digit.png", picture)})
    return [(entry["label"], entry["probability"]) for entry in response.json()]


def filled_part(row: Locator) -> float:
    track, filled = (row.locator(name).bounding_box() for name in (".bar", ".bar span"))
    assert track and filled
    return filled["width"] / track["width"]


def bottom_of(row: Locator) -> float:
    box = row.bounding_box()
    # None while the answer before gives way to the next.
    return box["y"] + box["height"] if box else math.inf


def expect_shown(page: Page, answer: list[tuple[str, float]]) -> None:
    rows = page.locator("#classes li")
    expect(rows).to_have_count(len(answer))
    expect(page.locator("#sheet")).to_have_attribute("data-state", "done")
    expect(page.locator("#classes .label")).to_have_text([label for label, _ in answer])
    percents = [f"{100 * probability:.1f} %" for _, probability in answer]
    expect(page.locator("#classes .percent")).to_have_text(percents)
    for row, (_, probability) in zip(rows.all(), answer, strict=True):
        assert float(row.get_attribute("data-probability") or "nan") == probability
        # Bars grow.
        assert wait_until(lambda row=row, part=probability: abs(filled_part(row) - part) < 0.01, 10)


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
        "This picture is too large.This file has 21 MB, more than the 20 MB allowed. "
        "Make it smaller and choose it again."
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


def take(page: Page, *names: tuple[str, bytes]) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator("#picture").click()
    chooser.value.set_files(
        [{"name": name, "mimeType": "image/png", "buffer": data} for name, data in names]
    )


def answer_with(page: Page, *probabilities: float) -> None:
    body = json.dumps(
        [
            {"label": f"class {i}", "class_index": i, "probability": probability}
            for i, probability in enumerate(probabilities)
        ]
    )
    page.route("**/classify", lambda route: route.fulfill(status=200, body=body))


def test_a_guess_looks_unlike_an_answer_and_says_what_the_network_knows(page: Page) -> None:
    answer_with(page, 0.49, 0.3)
    hand_over(page, "drop", digit(0))
    note = page.locator("#unsure")
    expect(note).to_contain_text("Not sure")
    known = page.locator("#known")
    expect(known).to_contain_text("trained on digits")
    expect(known).to_contain_text("10 classes: 0, 1, 2, 3, 4")
    expect(page.locator("#spoken")).to_have_text("Not sure. Nearest class: class 0, 49.0 %")
    weight = "element => getComputedStyle(element).fontWeight"
    assert page.locator("#classes .label").first.evaluate(weight) == "400"
    page.unroute("**/classify")
    answer_with(page, 0.51, 0.3)
    hand_over(page, "drop", digit(1))
    expect(page.locator("#spoken")).to_have_text("Best class: class 0, 51.0 %")
    expect(note).to_be_hidden()
    assert page.locator("#classes .label").first.evaluate(weight) == "650"


def test_before_the_first_picture_kinds_and_sizes_are_told_and_samples_can_be_clicked(
    page: Page,
) -> None:
    kinds = page.locator("#kinds")
    for fact in ("JPEG", "AVIF", "20 MB", "50 megapixels"):
        expect(kinds).to_contain_text(fact)
    samples = page.locator("#samples button")
    expect(samples).to_have_count(4)
    for sample in samples.all():
        sample.click()
        expect(page.locator("#sheet")).to_have_attribute("data-state", "done")
        expect(page.locator("#preview")).to_be_visible()
    expect(page.locator("#name")).to_contain_text("flower.jpg")


def test_several_pictures_become_a_grid_of_which_one_is_shown(page: Page) -> None:
    take(page, ("a.png", digit(0)), ("b.png", b"no picture"), ("c.png", digit(2)))
    cards = page.locator("#grid button")
    expect(cards).to_have_count(3)
    expect(cards.nth(2).locator(".says")).to_contain_text("%")
    expect(cards.nth(1).locator(".says")).to_contain_text("cannot be read as a picture")
    expect(cards.nth(0)).to_have_attribute("aria-current", "true")
    cards.nth(1).press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Save it as JPEG or PNG")
    cards.nth(2).click()
    expect(page.locator("#name")).to_contain_text("c.png")
    expect(page.locator("#classes li")).to_have_count(5)
    take(page, ("d.png", digit(3)))
    expect(page.locator("#grid")).to_be_hidden()


@pytest.mark.parametrize(
    ("preprocess", "expected"),
    [
        ({"crop_fraction": None}, None),
        ({"crop_fraction": 0.5}, (0.375, 0.25, 0.25, 0.5)),
        ({"crop_fraction": 0.5, "is_squashed": True}, (0.25, 0.25, 0.5, 0.5)),
    ],
    ids=["whole", "center", "squashed"],
)
def test_the_part_that_the_network_sees_is_framed(
    browser: Browser,
    address: str,
    preprocess: dict,
    expected: tuple[float, float, float, float] | None,
) -> None:
    page = browser.new_page()
    info = httpx.get(f"{address}info").json()
    info["preprocess"] |= preprocess
    page.route("**/info", lambda route: route.fulfill(json=info))
    page.goto(address)
    buffer = io.BytesIO()
    Image.new("RGB", (400, 200), "red").save(buffer, "PNG")
    hand_over(page, "drop", buffer.getvalue())
    expect(page.locator("#seen")).to_contain_text("32 \u00d7 32 pixels")
    frame = page.locator("#crop")
    if expected is None:
        expect(page.locator("#seen")).to_contain_text("all of it")
        expect(frame).to_be_hidden()
    else:
        outer, inner = page.locator("#picture").bounding_box(), frame.bounding_box()
        assert outer and inner
        # The picture is twice as wide as high, and fills the width.
        height = outer["width"] / 2
        top = outer["y"] + (outer["height"] - height) / 2
        left, above, width, part = expected
        assert inner["x"] == pytest.approx(outer["x"] + left * outer["width"], abs=4)
        assert inner["y"] == pytest.approx(top + above * height, abs=4)
        assert inner["width"] == pytest.approx(width * outer["width"], abs=4)
        assert inner["height"] == pytest.approx(part * height, abs=4)
    page.close()


def test_answer_and_command_line_can_be_copied(browser: Browser, address: str) -> None:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(address)
    hand_over(page, "drop", digit(0), 'it\'s a "digit".png')
    expect(page.locator("#classes li")).to_have_count(5)
    page.locator("#raw summary").click()
    for name in ("json", "curl"):
        button = page.locator(f"[data-copies={name}]")
        button.click()
        expect(button).to_have_text("Copied")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == page.locator(f"#{name}").text_content()
    answer = json.loads(page.locator("#json").text_content() or "")
    assert [(a["label"], a["probability"]) for a in answer] == answer_of(address, digit(0))
    words = shlex.split(page.locator("#curl").text_content() or "")
    assert words == ["curl", "-F", 'image=@"it\'s a \\"digit\\".png"', f"{address}classify"]
    context.close()


def test_metrics_are_a_table_and_not_raw_text(page: Page) -> None:
    hand_over(page, "drop", digit(0))
    expect(page.locator("#classes li")).to_have_count(5)
    page.locator("#numbers summary").click()
    rows = page.locator("#metrics tr")
    expect(rows.filter(has_text="Pictures classified").locator("td")).to_have_text(
        re.compile(r"^[1-9]\d*$")
    )
    expect(rows.filter(has_text="on average")).to_have_text(re.compile(r"decode \d.* ms.*network"))
    expect(rows.filter(has_text="Requests answered").locator("td")).to_have_text(
        re.compile(r"^[1-9]\d*$")
    )


def test_a_drag_is_seen_before_the_drop(page: Page) -> None:
    drop = page.locator("#drop")
    expect(drop).not_to_be_visible()
    page.evaluate("document.dispatchEvent(new DragEvent('dragenter', {cancelable: true}))")
    expect(drop).to_be_visible()
    page.evaluate("document.dispatchEvent(new DragEvent('dragleave'))")
    expect(drop).not_to_be_visible()


def test_what_was_busy_can_be_tried_again(page: Page, address: str) -> None:
    busy = {"code": "overloaded", "detail": "64 pictures wait", "status": 429}
    page.route("**/classify", lambda route: route.fulfill(status=429, json=busy), times=1)
    hand_over(page, "drop", digit(0))
    expect(page.get_by_role("alert")).to_contain_text("The service is busy")
    page.get_by_role("button", name="Try again").click()
    expect_shown(page, answer_of(address, digit(0)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_bars_and_borders_can_be_told_from_what_is_around_them(
    browser: Browser, address: str, scheme: Literal["light", "dark"]
) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(address)
    value = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"

    def luminance(name: str) -> float:
        text = page.evaluate(value, f"--{name}").removeprefix("#")
        parts = [int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (
            part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for front in ("edge", "accent", "accent-soft", "unsure", "warn"):
        for back in ("ground", "surface", "track"):
            light, dark = sorted((luminance(front), luminance(back)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, (front, back)
    page.close()


@pytest.mark.parametrize("size", [(375, 667), (390, 844)])
def test_on_a_phone_the_five_best_are_seen_without_scrolling(
    browser: Browser, address: str, size: tuple[int, int]
) -> None:
    width, height = size
    page = browser.new_page(viewport={"width": width, "height": height}, has_touch=True)
    page.goto(address)
    for probabilities in ((0.9, 0.05, 0.03, 0.01, 0.01), (0.3, 0.2, 0.2, 0.2, 0.1)):
        answer_with(page, *probabilities)
        hand_over(page, "drop", digit(0))
        expect(page.locator("#classes li")).to_have_count(5)
        rows = page.locator("#classes li")
        assert wait_until(lambda rows=rows: max(map(bottom_of, rows.all())) <= height, 5)
        page.unroute("**/classify")
    page.close()


@pytest.mark.parametrize("state", ["empty", "done", "unsure", "error", "grid"])
def test_axe_finds_nothing_in_light_and_dark(page: Page, state: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.base", reason="axe is not installed")
    page.emulate_media(reduced_motion="reduce")
    expect(page.locator("#samples")).to_be_visible()
    if state == "grid":
        take(page, ("a.png", digit(0)), ("b.png", b"no picture"))
        expect(page.locator("#grid button").nth(1)).to_contain_text("cannot be read")
    elif state == "error":
        hand_over(page, "drop", b"no picture", "notes.txt", "text/plain")
        expect(page.get_by_role("alert")).to_be_visible()
    elif state != "empty":
        answer_with(page, 0.9 if state == "done" else 0.3)
        hand_over(page, "drop", digit(0))
        expect(page.locator("#classes li")).to_have_count(1)
        page.locator("#raw summary").click()
        page.locator("#numbers summary").click()
        expect(page.locator("#metrics tr")).not_to_have_count(0)
    page.evaluate(axe.AXE_FILE_PATH.read_text())
    schemes: list[Literal["light", "dark"]] = ["light", "dark"]
    for scheme in schemes:
        page.emulate_media(reduced_motion="reduce", color_scheme=scheme)
        found = page.evaluate("async () => (await axe.run()).violations")
        assert not [(v["id"], [node["html"] for node in v["nodes"]]) for v in found], scheme
