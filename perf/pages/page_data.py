"""Rows, layers and older records -> what the page's script shows, as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efficientnet.formats.records import LatencyRecord
from efficientnet.measuring.intervals import wilson_interval
from efficientnet.runtimes.names import title
from perf.layer_times.layer_tables import ProgramLayers, least_ms
from perf.measurements.scenarios import SCENARIOS
from perf.pages.document import PAPER, machine_name
from perf.pages.history import Line
from perf.pages.latency_tables import result_tables
from perf.pages.rows import Joined, Row

# Of the samples of a row, evenly from the least to the most: what a distribution is drawn from.
QUANTILES = np.linspace(0, 1, 41)

# Of all programs together, characters. Beyond, programs compare by their intervals only.
MAX_HITS = 2_000_000

MAX_LAYERS = 20

SCOPES = {
    "end_to_end": "round trip: host memory to host memory",
    "compute": "device: images and logits stay on it",
}


def page_data(
    joined: Joined, samples_folder: Path, history: Sequence[Line], layers: Sequence[ProgramLayers]
) -> str:
    """Write all that can be filtered and compared, safe between script tags.

    Args:
        joined: the rows.
        samples_folder: where files of samples lie that records name.
        history: lines over commits.
        layers: of programs, as perf/layers.py measured them.
    """
    hits: dict[str, int] = {}
    tables: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for number, group in enumerate(joined.groups):
        shown = [scenario for scenario in SCENARIOS.values() if group.of(scenario)]
        for scenario, (heading, table) in zip(shown, result_tables(group), strict=True):
            for row, cells in zip(group.of(scenario), table.rows, strict=True):
                rows.append(_row(row, number, cells, samples_folder, hits))
            tables.append(
                {
                    "machine": number,
                    "scenario": scenario.name,
                    "title": heading,
                    "columns": table.columns,
                    "words": sorted(table.words),
                    "notes": table.notes,
                    "isTime": scenario.compares == "time",
                    "where": scenario.where,
                }
            )
    if sum(map(len, hits)) > MAX_HITS:
        hits = {}
        for row in rows:
            row["hits"] = None
    data = {
        "machines": [machine_name(group.environment) for group in joined.groups],
        "scopes": SCOPES,
        "tables": tables,
        "rows": rows,
        "hits": list(hits),
        "paper": [{"name": name, "ms": ms, "top1": top1} for name, ms, top1 in PAPER],
        "history": [line._asdict() for line in history],
        "layers": {program.program_sha256[:12]: _layers(program) for program in layers},
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # Names cannot end the script that holds them.
    return text.replace("<", "\\u003c")


def _row(
    row: Row, machine: int, cells: Sequence[str], folder: Path, hits: dict[str, int]
) -> dict[str, Any]:
    record, accuracy = row.latency, row.accuracy
    num_right = round(accuracy.top1 * accuracy.num_images)
    low, high = wilson_interval(num_right, accuracy.num_images)
    index = hits.setdefault(accuracy.hits, len(hits)) if accuracy.hits else None
    return {
        "machine": machine,
        "scenario": record.scenario,
        "scope": record.timed_region,
        "network": f"{row.label}, {record.image_size} px",
        "runtime": title(record.runtime, "").strip(),
        "precision": record.precision,
        "batch": record.batch_size,
        "threads": record.num_threads,
        "isEager": row.is_eager,
        "cells": cells,
        "p50": _digits(record.p50_ms),
        "p90": _digits(record.p90_ms),
        "p99": _digits(record.p99_ms),
        "rate": _digits(record.throughput_images_per_s),
        "turns": [_digits(ms) for ms in record.turn_p50_ms],
        "quantiles": [_digits(ms) for ms in _quantiles(record, folder)],
        "floor": _digits(record.floor_ms),
        "limit": _limit(record),
        "peak": record.device_peak,
        "overhead": _digits(record.harness_overhead_ms),
        "top1": round(accuracy.top1, 5),
        "low": round(low, 5),
        "high": round(high, 5),
        "images": accuracy.num_images,
        "data": f"{accuracy.data} ({accuracy.dataset_sha256[:7]})",
        "hits": index,
        "unstable": row.instabilities,
        "run": f"{record.started_at:%Y-%m-%d %H:%M} UTC",
        "commit": record.environment.git_commit or "unknown",
        "program": record.program_sha256[:12],
        "weights": record.checkpoint_sha256[:7],
        "calls": record.num_iterations,
    }


def _quantiles(record: LatencyRecord, folder: Path) -> list[float]:
    samples = record.samples_ms
    if isinstance(samples, str):
        path = folder / samples
        if not path.is_file():
            return []
        samples = np.load(path)
    ordered = np.sort(np.asarray(samples))
    return ordered[np.round(QUANTILES * (len(ordered) - 1)).astype(int)].tolist()


def _limit(record: LatencyRecord) -> str | None:
    # The longer of the two is the floor, of which both are shares of the same time.
    if record.mfu is None or record.mbu is None:
        return None
    return "computing" if record.mfu >= record.mbu else "reading the weights"


def _layers(program: ProgramLayers) -> list[dict[str, Any]]:
    slowest = sorted(program.layers, key=lambda layer: -layer.ms)[:MAX_LAYERS]
    return [
        {
            "module": layer.module or layer.name,
            "kind": layer.kind,
            "ms": _digits(layer.ms),
            "share": round(layer.ms / program.layers_ms, 4),
            "least": _digits(least_ms(program, layer)),
        }
        for layer in slowest
    ]


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
