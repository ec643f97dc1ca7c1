"""Two programs -> their ratio over ten whole measurements, and how far it strays.

    python tests/report_stability.py artifacts/lite0/openvino-int8 artifacts/lite0/native-int8
    python tests/report_stability.py A B --repeats 10 --data photos -- --seconds 10

Each repeat is perf/latency.py as it comes, with fresh processes. The report has the ratio of the
medians of all calls; beside it stands the median of those within the turns, of an image. Exit
code 1 where the first strays by more than --most from its median.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from efficientnet.formats.records import LatencyRecord, read_records
from efficientnet.measuring.turns import ratio
from perf.measurements.scenarios import SCENARIOS, rate_ratio, time_ratio

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Print each ratio, and how far they stray in each scenario."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="After -- stand flags of perf/latency.py, as -- --seconds 10."
    )
    parser.add_argument("paths", nargs=2, type=Path)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--most", type=float, default=0.03)
    parser.add_argument("--data", help="of perf/latency.py")
    # By hand: argparse takes no positional arguments both before and after the flags.
    words = [*sys.argv[1:], "--"]
    cut = words.index("--")
    arguments, flags = parser.parse_args(words[:cut]), words[cut + 1 : -1]
    flags += ["--data", arguments.data] if arguments.data else []
    reports: dict[str, list[float]] = defaultdict(list)
    within: dict[str, list[float]] = defaultdict(list)
    for number in range(arguments.repeats):
        for first, second in measure(arguments.paths, flags):
            name = first.scenario
            divide = time_ratio if SCENARIOS[name].compares == "time" else rate_ratio
            own = divide(first, second)
            if own is None:
                sys.exit(f"{name}: too few calls for a median; measure longer: -- --seconds 60")
            turns = ratio(first.turn_p50_ms, second.turn_p50_ms).median
            reports[name].append(own)
            turns *= second.batch_size / first.batch_size
            within[name].append(turns)
            print(f"{number + 1} {name}: {own:.4f}, within turns {turns:.4f}", flush=True)
    strayed = False
    for name, own in reports.items():
        print(f"{name}: strays {told(own)}; within turns {told(within[name])}")
        strayed |= stray(own) > arguments.most
    sys.exit(1 if strayed else 0)


def measure(paths: list[Path], flags: list[str]) -> list[tuple[LatencyRecord, LatencyRecord]]:
    """Run perf/latency.py once; return the records of both programs, scenario by scenario."""
    with tempfile.TemporaryDirectory(prefix="stability-") as folder:
        output = Path(folder) / "latency.jsonl"
        command = [sys.executable, ROOT / "perf/latency.py", *paths, "--output", output, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        records = read_records(output, LatencyRecord)
    return list(zip(records[::2], records[1::2], strict=True))


def stray(ratios: list[float]) -> float:
    """Return how far the farthest is from the median, as a part of it."""
    median = statistics.median(ratios)
    return max(abs(one / median - 1) for one in ratios)


def told(ratios: list[float]) -> str:
    """Say the median and how far the others are from it."""
    return f"{100 * stray(ratios):.1f} % at most from {statistics.median(ratios):.4f}"


if __name__ == "__main__":
    main()
