import re
from datetime import timedelta
from typing import Any, Literal

import pytest
from test_perf_report import CPU, STARTED, config_of, make_accuracy, make_latency

from efficientnet.formats.records import append_record, pack_hits
from perf.pages import report

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

from playwright.sync_api import Browser, Page, expect

NUM_IMAGES = 200
PROGRAMS = {
    "torch": (6.0, "fp32", 180),
    "onnxruntime": (3.0, "fp32", 180),
    "native": (1.5, "int8", 172),
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report of two networks, three programs of each, two scenarios and two commits."""
    folder = tmp_path_factory.mktemp("page")
    for number in range(2):
        for runtime, (ms, precision, num_right) in PROGRAMS.items():
            program: dict[str, Any] = {
                "variant": f"net{number}",
                "precision": precision,
                "checkpoint_sha256": str(number) * 64,
                "program_sha256": f"{number}{runtime}".encode().hex().ljust(64, "0"),
            }
            hits = pack_hits([True] * num_right + [False] * (NUM_IMAGES - num_right))
            counts: dict[str, Any] = {
                "num_images": NUM_IMAGES,
                "hits": hits,
                "top1": num_right / NUM_IMAGES,
            }
            append_record(folder / "accuracy.jsonl", make_accuracy(runtime, **program, **counts))
            for scenario, batch in (("single_stream", 1), ("batch16", 16)):
                for age, commit in ((1, "older"), (0, "newer")):
                    record = make_latency(
                        runtime,
                        (1 + number) * ms * batch,
                        scenario=scenario,
                        batch_size=batch,
                        environment=CPU.model_copy(update={"git_commit": commit}),
                        started_at=STARTED - timedelta(days=age),
                        floor_ms=ms * batch / 4,
                        mfu=0.25,
                        mbu=0.1,
                        device_peak="1 TOP/s, measured",
                        **program,
                    )
                    append_record(folder / "latency.jsonl", record)
    report.main(config_of(folder))
    return f"file://{folder / 'out' / 'report.html'}"


def rows(page: Page) -> int:
    return page.locator("#table tbody tr").count()


def test_rows_are_filtered_by_runtime_precision_and_scenario(page: Page):
    assert rows(page) == 6
    page.select_option("#filter-runtime", label="native engine")
    assert rows(page) == 2
    page.select_option("#filter-precision", label="int8")
    page.select_option("#filter-network", label="net1, 32 px")
    assert rows(page) == 1
    page.select_option("#filter-scenario", value="batch16")
    assert page.locator("#table tbody td[data-title='batch']").inner_text() == "16"
    expect(page.locator("#filter-scope")).to_have_value("end_to_end")


def test_the_two_fastest_are_compared_in_time_accuracy_limit_and_device(page: Page):
    text = page.locator("#pair").inner_text()

    for fact in (
        "A takes 0.50 of B's",
        "0 are right in A only and 8 in B only: \N{MINUS SIGN}4.0 points for A",
        "A trade: A is faster, B is more accurate",
        "4 times 0.375 ms, the least this device needs for computing",
        CPU.processor,
        "86.0 %, 95 %:",
        "200 images of digits",
    ):
        assert fact in text.replace("\N{NO-BREAK SPACE}", " "), fact


def test_another_row_takes_the_place_of_the_older_choice_by_keyboard(page: Page):
    eager = page.locator("#table tbody tr", has_text="eager PyTorch").first.locator("input")
    eager.focus()
    page.keyboard.press("Space")

    expect(page.locator("#table input:focus")).to_be_checked()
    assert page.locator("#table input:checked").count() == 2
    assert "B: net0, 32 px eager PyTorch fp32" in page.locator("#pair").inner_text()


def test_columns_are_ordered_by_number_from_the_keyboard(page: Page):
    page.get_by_role("button", name="p50 ms").focus()
    page.keyboard.press("Enter")
    times = page.locator("#table td[data-title='p50 ms']").all_inner_texts()
    assert times == sorted(times, key=float)
    page.keyboard.press("Enter")
    times = page.locator("#table td[data-title='p50 ms']").all_inner_texts()
    assert times == sorted(times, key=float, reverse=True)


def test_charts_show_the_front_the_papers_points_batches_and_commits(page: Page):
    assert page.locator("#tradeoff path.line.front").count() > 0
    for chart in ("distribution", "batch-time", "batch-rate", "history"):
        assert page.locator(f"#{chart} > svg path.line").count() == 2, chart
    assert page.locator("#tradeoff path.mark.paper").count() == 0
    page.select_option("#filter-scenario", value="batch16")
    # Three, and one that explains them.
    assert page.locator("#tradeoff path.mark.paper").count() == 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_its_window_and_its_text_is_told_from_the_ground(
    browser: Browser, address: str, scheme: Literal["light", "dark"], width: int
):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    text, ground = (
        sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}"))))
        for name in ("color", "backgroundColor")
    )
    assert (text > ground) == (scheme == "dark") and abs(text - ground) > 450
    page.close()


def test_without_a_script_the_page_says_where_the_tables_are(browser: Browser, address: str):
    page = browser.new_page(java_script_enabled=False)
    page.goto(address)
    assert "report.md" in page.locator("noscript").inner_text()
    assert "of eager PyTorch's time" in page.locator(".verdict").inner_text()
    page.close()
