"""This checkout -> hashes of what it does: before and after a change that must not change anything.

    python tests/behaviour.py > /tmp/before    # then change, and once more
    python tests/behaviour.py | diff /tmp/before -

The weights after 20 steps of the smallest training, the ONNX graph that is made of them, --help of
every command, and report.md of the published records. Weights and graph are those of one processor:
another one sums in another order.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from commands import COMMANDS, ROOT

TRAINING = [
    *("tiny", "--steps", "20", "--progressive.num-stages", "1", "--num-workers", "0"),
    *("--name", "lock", "--output"),
]


def main() -> None:
    """Print a line for each: hash and name."""
    for command in COMMANDS:
        show(f"{command} --help", run(command, "--help"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("training/run.py", *TRAINING, name)
        checkpoint = folder / "lock/checkpoint"
        show("weights after 20 steps", (checkpoint / "weights.safetensors").read_bytes())
        artifact = folder / "artifact"
        run("export/ort.py", "--checkpoint", str(checkpoint), "--output", str(artifact))
        show("ONNX graph", (artifact / "model.onnx").read_bytes())
        for published in sorted((ROOT / "reports/published").glob("*/latency.jsonl")):
            records = [f"--{kind}={published.with_stem(kind)}" for kind in ("latency", "accuracy")]
            run("perf/report.py", *records, "--output", str(folder / "report"))
            report = (folder / "report/report.md").read_text().replace(name, "")
            show(f"report of {published.parent.name}", report.encode())


def run(command: str, *flags: str) -> bytes:
    """Run a command of this checkout in one thread; return its stdout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, ROOT / command, *flags], env=environment, check=True, capture_output=True
    ).stdout


def show(name: str, content: bytes) -> None:
    """Print a line."""
    print(hashlib.sha256(content).hexdigest()[:16], name, flush=True)


if __name__ == "__main__":
    main()
