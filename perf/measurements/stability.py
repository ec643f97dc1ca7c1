"""LatencyRecords -> what makes one unstable, and its eager reference."""

from collections.abc import Sequence

from efficientnet.formats.records import LatencyRecord
from efficientnet.measuring.clock import relative_spread
from efficientnet.runtimes.names import EAGER_RUNTIME
from perf.measurements.scenarios import SCENARIOS

# Twice what two windows of a warm-up may differ by.
MAX_TURN_SPREAD = 0.10

# Of all cores: a call that uses them all waits for whatever else runs.
MAX_BUSY_ELSEWHERE = 0.10

BELOW_FLOOR = (
    "faster than its floor, which therefore is wrong: the device does more than the peak that was "
    "measured (was it busy then?)"
)


def instabilities(record: LatencyRecord) -> list[str]:
    """Say what makes a measurement unstable, if anything does."""
    reasons: list[str] = []
    if not record.is_warmup_stable:
        reasons.append("the warm-up had not settled when its time was over")
    spread = relative_spread(record.turn_p50_ms)
    if spread > MAX_TURN_SPREAD:
        reasons.append(f"the medians of its turns differ by {100 * spread:.0f} %")
    elsewhere, num_cores = record.cores_busy_elsewhere, record.environment.num_cores
    if elsewhere is not None and elsewhere > MAX_BUSY_ELSEWHERE * num_cores:
        reasons.append(f"other programs kept {elsewhere:.1f} of {num_cores} cores busy meanwhile")
    return reasons


def is_below_floor(record: LatencyRecord) -> bool:
    """Whether a call took less time than is possible by what is known of the device."""
    if record.p50_ms is None or record.floor_ms is None:
        return False
    return record.p50_ms < record.floor_ms


def eager_of(record: LatencyRecord, records: Sequence[LatencyRecord]) -> LatencyRecord | None:
    """Find the eager model of the same weights, measured in the same run and scenario."""
    is_any_size = SCENARIOS[record.scenario].picks_fastest
    for other in records:
        if (
            other.runtime == EAGER_RUNTIME
            and other.started_at == record.started_at
            and other.environment == record.environment
            and other.checkpoint_sha256 == record.checkpoint_sha256
            and other.scenario == record.scenario
            and (is_any_size or other.batch_size == record.batch_size)
            and other.num_threads == record.num_threads
            and other.timed_region == record.timed_region
        ):
            return other
    return None
