import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from efficientnet.machine.environment import current_environment
from efficientnet.network.architectures import peer_of
from efficientnet.network.variants import get_variant
from perf.measurements import network
from perf.measurements.network import (
    ComparisonRecord,
    NetworkConfig,
    NetworkRecord,
    main,
    to_markdown,
)


def test_the_table_shows_times_ratio_range_and_noise():
    record = NetworkRecord(
        started_at=datetime(2026, 1, 2, tzinfo=UTC),
        num_threads=2,
        environment=current_environment(),
        comparisons=(
            ComparisonRecord(
                variant="b0",
                padding="same",
                passes="forward",
                image_size=224,
                batch_size=1,
                turn_p50_ms={"ours": (8, 9), "timm": (10, 10), "timm again": (11, 11)},
            ),
        ),
    )
    text = to_markdown(record)
    assert "| b0 | same | forward | 224 | 1 | 8.50 | 10.0 | 0.85 | 0.80 to 0.90 | 1.10 |" in text
    assert "2026-01-02" in text


@pytest.mark.parametrize(
    ("name", "padding", "expected"),
    [
        ("b4", "same", "tf_efficientnet_b4"),
        ("b4", "symmetric", "efficientnet_b4"),
        ("v2-s", "same", "tf_efficientnetv2_s"),
        ("v2-m", "symmetric", "efficientnetv2_m"),
    ],
)
def test_timm_has_the_same_network_under_its_own_name(name, padding, expected):
    assert peer_of(name, "timm", padding) == expected


def test_three_processes_are_compared_for_real_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small = replace(get_variant("b0"), eval_image_size=32, train_image_size=32)
    monkeypatch.setattr(network, "get_variant", lambda _: small)
    output = tmp_path / "network.json"
    table = main(
        NetworkConfig(
            variants=("b0",),
            paddings=("same",),
            seconds=0.2,
            turns=2,
            threads=1,
            output=output,
        )
    )
    assert table == tmp_path / "network.md" and "| b0 | same | forward |" in table.read_text()
    rows = json.loads(output.read_text())["comparisons"]
    assert [row["passes"] for row in rows] == ["forward", "forward + backward"]
    for row in rows:
        assert set(row["turn_p50_ms"]) == {"ours", "timm", "timm again"}
        assert all(len(turns) == 2 and min(turns) > 0 for turns in row["turn_p50_ms"].values())
