"""What was measured -> LatencyRecords, and a table of those of one run."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from efficientnet.formats.records import LatencyRecord
from efficientnet.machine.environment import current_environment
from efficientnet.measuring.clock import summarize
from efficientnet.measuring.peaks import describe_peak
from efficientnet.network.cost import DevicePeak, latency_floor_ms, network_cost
from efficientnet.reporting.tables import Table, format_ms, format_rate, format_ratio
from perf.measurements.measured_programs import SEED, MeasuredRow
from perf.measurements.scenarios import SCENARIOS, rate_ratio, time_ratio
from perf.measurements.stability import eager_of, instabilities

# More than these go to a .npy file: a line of the records should stay readable.
MAX_SAMPLES_IN_RECORD = 5000


def make_record(
    row: MeasuredRow,
    scenario: str,
    num_threads: int,
    started_at: datetime,
    folder: Path,
    peaks: Mapping[Path, DevicePeak | None],
) -> LatencyRecord:
    """Write down a measurement; many samples go to a file in `folder`, beside the records."""
    program, measured, samples = row.program.program, row.measured, row.measured.samples_ms
    summary, peak = summarize(samples), peaks[program.path]
    cost = network_cost(
        program.spec,
        program.preprocess.image_size,
        measured.batch_size,
        program.precision,
        len(program.class_names),
    )
    call_s = summary.mean_ms / 1e3
    kept: tuple[float, ...] | str = samples
    if len(samples) > MAX_SAMPLES_IN_RECORD:
        kept = f"latency-{started_at:%Y%m%dT%H%M%SZ}-{program.program_sha256[:8]}"
        kept += f"-{program.runtime}-{scenario}-{measured.batch_size}.npy"
        np.save(folder / kept, np.asarray(samples, dtype=np.float32))
    return LatencyRecord(
        **program.identity,
        data=row.program.data,
        environment=current_environment(),
        started_at=started_at,
        batch_size=measured.batch_size,
        scenario=scenario,
        timed_region="end_to_end",
        clock="perf_counter",
        num_threads=num_threads,
        num_warmup=measured.num_warmup,
        is_warmup_stable=measured.is_warmup_stable,
        num_iterations=len(samples),
        num_turns=len(measured.turns),
        num_processes=len(measured.warm_ups),
        num_input_images=row.program.num_input_images,
        seed=SEED,
        **vars(summary),
        turn_p50_ms=tuple(turn.median_ms for turn in measured.turns),
        samples_ms=kept,
        throughput_images_per_s=row.server.images_per_s if row.server else measured.images_per_s,
        server=row.server,
        peak_device_memory_bytes=None,
        peak_process_memory_bytes=measured.peak_memory_bytes,
        mfu=cost.flops / call_s / peak.operations_per_s if peak else None,
        mbu=cost.weight_bytes / call_s / peak.bytes_per_s if peak else None,
        floor_ms=latency_floor_ms(cost, peak) if peak else None,
        device_peak=describe_peak(peak) if peak else None,
        harness_overhead_ms=row.overhead_ms,
        cores_busy_elsewhere=measured.cores_busy_elsewhere,
    )


def results_table(names: Sequence[str], records: Sequence[LatencyRecord]) -> Table:
    """Lay out the records of one run, each beside its eager row."""
    rows: list[tuple[str, ...]] = []
    for name, record in zip(names, records, strict=True):
        eager, compares = eager_of(record, records), SCENARIOS[record.scenario].compares
        ratios = (time_ratio(record, eager), rate_ratio(record, eager)) if eager else (None, None)
        rows.append(
            (
                name,
                record.scenario,
                str(record.batch_size),
                format_ms(record.p50_ms),
                format_ms(record.p90_ms),
                format_ms(record.p99_ms),
                format_rate(record.throughput_images_per_s),
                # Calls of different batch sizes compare by their images only.
                format_ratio(ratios[0] if compares == "time" else None),
                format_ratio(ratios[1]),
                "no" if instabilities(record) else "yes",
            )
        )
    columns = ("program", "scenario", "batch", "p50 ms", "p90 ms", "p99 ms", "images/s")
    columns += ("time / eager", "images/s / eager", "stable")
    return Table(columns, tuple(rows), frozenset(columns[:2]))
