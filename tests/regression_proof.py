"""This checkout -> how often perf/regression.py finds changes that were made to be found.

    python tests/regression_proof.py --repeats 20
    python tests/regression_proof.py --repeats 20 -- --exports ort --turn-seconds 0.1

In a clone, ONNX Runtime's and the eager runtime's calls are made 20 % longer by a commit. Compared
are: the commit before it with it (slower: must fail), itself with an empty commit (identical: must
not), and it with the commit before it (faster: must say so). What follows -- goes to the command.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FACTOR = 1.2

# After the imports of a runtime's module: its infer takes so much longer, and answers the same.
SLOWER = """

def _slower(infer):
    import time

    def longer(self, images):
        started = time.perf_counter()
        answer = infer(self, images)
        end = started + {factor} * (time.perf_counter() - started)
        while time.perf_counter() < end:
            pass
        return answer

    return longer


{name}.infer = _slower({name}.infer)
"""
RUNTIMES = {
    "efficientnet/runtimes/onnxruntime_runtime.py": "OnnxRuntime",
    "efficientnet/runtimes/torch_runtime.py": "TorchRuntime",
}
EXPECTED = {"slower": "regression", "identical": "no regression", "faster": "faster"}


def main() -> None:
    """Print each finding, and a table of how often."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=EXPECTED, default=list(EXPECTED))
    parser.add_argument("flags", nargs="*", help="of perf/regression.py, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="regression-proof-") as name:
        clone = Path(name) / "clone"
        revisions = make_commits(clone)
        # The same for all: what is compared is not training.
        checkpoint = ["--checkpoint", train(clone)]
        for case in arguments.cases:
            found: Counter[str] = Counter()
            for number in range(arguments.repeats):
                started = time.monotonic()
                flags = [*checkpoint, *arguments.flags]
                finding = compare(clone, *revisions[case], flags)
                found[finding] += 1
                seconds = time.monotonic() - started
                print(f"{case} {number + 1}: {finding} ({seconds:.0f} s)", flush=True)
            told = ", ".join(f"{finding} {count}" for finding, count in found.items())
            print(f"{case}, expected {EXPECTED[case]}: {told} of {arguments.repeats}", flush=True)


def make_commits(clone: Path) -> dict[str, tuple[str, str]]:
    """Clone this checkout's HEAD and add the commits; return base and head of each case."""
    git(ROOT, "clone", "--quiet", "--shared", str(ROOT), str(clone))
    before = git(clone, "rev-parse", "HEAD")
    commit(clone, "no change", "--allow-empty")
    same = git(clone, "rev-parse", "HEAD")
    for path, name in RUNTIMES.items():
        with (clone / path).open("a", encoding="utf-8") as file:
            file.write(SLOWER.format(factor=FACTOR, name=name))
    commit(clone, "slower", "--all")
    slower = git(clone, "rev-parse", "HEAD")
    return {"slower": (before, slower), "identical": (before, same), "faster": (slower, before)}


def train(clone: Path) -> str:
    """Train a small network on the embedded digits by the clone's own command."""
    done = subprocess.run(
        [sys.executable, "training/run.py", "tiny", "--epochs", "4", "--num-workers", "0"],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone)},
        check=True,
        capture_output=True,
        text=True,
    )
    return str(clone / done.stdout.splitlines()[-1])


def compare(clone: Path, base: str, head: str, flags: list[str]) -> str:
    """Run the clone's own command; return its worst finding, which its exit code must fit."""
    output = clone / "reports" / "latency-ci"
    command = [sys.executable, clone / "perf/regression.py", "--base", base, "--head", head]
    done = subprocess.run(
        [*command, "--output", output, *flags],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1) or not (output / "regression.json").is_file():
        sys.exit(f"perf/regression.py failed: {done.stderr}")
    record = json.loads((output / "regression.json").read_text())
    findings = {program["latency"] for program in record["programs"]}
    order = ("regression", "inconclusive", "faster", "no regression")
    worst = next(finding for finding in order if finding in findings)
    (output / "regression.json").unlink()
    for program in record["programs"]:
        print(
            f"  {program['name']}: {program['latency']}, ratio {program['ratio']:.3f} "
            f"({program['low']:.3f} to {program['high']:.3f}), equals "
            f"{program['noise_low']:.3f} to {program['noise_high']:.3f}; {program['accuracy']}"
        )
    assert (done.returncode == 1) == (
        worst == "regression" or any(p["accuracy"] == "regression" for p in record["programs"])
    )
    return worst


def commit(clone: Path, message: str, *flags: str) -> None:
    """Commit with a name of its own, as there may be none."""
    who = ["-c", "user.name=proof", "-c", "user.email=proof@localhost"]
    git(clone, *who, "commit", "--quiet", "--no-verify", "-m", message, *flags)


def git(where: Path, *arguments: str) -> str:
    """Run git; return what it printed."""
    return subprocess.run(
        ["git", "-C", str(where), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
