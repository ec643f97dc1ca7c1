"""AblationRecord -> sentences: what came out, whichever way it is, each beside the paper's."""

from training.studies.ablation_plan import (
    FIXED,
    PROGRESSIVE,
    PROGRESSIVE_ADAPTIVE,
    RANDOM,
    RANDOM_ADAPTIVE,
    magnitude_row,
)
from training.studies.ablation_results import (
    PAPER_B4,
    PAPER_MEANS,
    PAPER_TOP1,
    AblationRecord,
    Spread,
    difference,
    magnitude_trend,
    points,
    spread,
    time_saved,
)

MARGIN = (
    "Differences, of times too, are taken seed by seed. Their margin is half of the 95 % "
    "confidence interval of their mean (Student's t): what is not larger cannot be told from none."
)

# What is compared with what, and which of the paper's tables says by how much.
COMPARISONS = (
    ("Adaptive regularisation, rising sizes", PROGRESSIVE_ADAPTIVE, PROGRESSIVE),
    ("Adaptive regularisation, random sizes", RANDOM_ADAPTIVE, RANDOM),
    ("Rising instead of random sizes, both adaptive", PROGRESSIVE_ADAPTIVE, RANDOM_ADAPTIVE),
)


def headline(record: AblationRecord) -> str:
    """Say in one line what came out."""
    where = f"{record.variant} on {record.name}"
    if record.has("schedules"):
        change = difference(record, PROGRESSIVE_ADAPTIVE, FIXED)
        time = _time_against_fixed(time_saved(record, PROGRESSIVE_ADAPTIVE))
        if not change.is_certain:
            return (
                f"{where}: with {PROGRESSIVE_ADAPTIVE}, top-1 changes by {_points(change)}, which "
                f"{_seeds(record)} cannot tell from none, {time}"
            )
        verb = "raises" if change.mean > 0 else "lowers"
        by = f"{abs(change.mean):.1f} points"
        return f"{where}: {PROGRESSIVE_ADAPTIVE} {verb} top-1 by {by} {time}"
    _, trend = magnitude_trend(record)
    words = {
        "shows": "larger images want more RandAugment",
        "is reversed": "larger images want less RandAugment",
    }
    unclear = f"{_seeds(record)} cannot tell whether larger images want more RandAugment"
    return f"{where}: {words.get(trend, unclear)}"


def schedule_findings(record: AblationRecord) -> list[str]:
    """Write what the schedules came to, whichever way it is, each beside the paper's."""
    (old_top1, old_hours), (new_top1, new_hours) = PAPER_B4[FIXED], PAPER_B4[PROGRESSIVE_ADAPTIVE]
    change = difference(record, PROGRESSIVE_ADAPTIVE, FIXED)
    time = _time_against_fixed(time_saved(record, PROGRESSIVE_ADAPTIVE))
    findings = [
        f"**{PROGRESSIVE_ADAPTIVE}: {_points(change)} {_certainty(change)} {time}.** The paper "
        f"(Table 12, EfficientNet-B4): {new_top1 - old_top1:+.1f} points in "
        f"{_less(100 * (1 - new_hours / old_hours))} time."
    ]
    for title, row, other in COMPARISONS:
        change = difference(record, row, other)
        paper = PAPER_TOP1[row] - PAPER_TOP1[other]
        if not change.is_certain:
            verdict = f"nothing that {_seeds(record)} can tell from none; the paper has"
        else:
            verdict = "as in the paper," if change.mean > 0 else "unlike in the paper,"
        findings.append(
            f"{title} ({row} against {other}): {_points(change)} {_certainty(change)}: "
            f"{verdict} {paper:+.1f} (Table 13)."
        )
    return findings


def magnitude_findings(record: AblationRecord) -> list[str]:
    """Write what the magnitudes came to, beside the paper's."""
    (weak, _, strong), (small, _, large) = record.magnitudes, record.image_sizes
    best = [
        max(record.magnitudes, key=lambda m: spread(points(record, magnitude_row(m, s))).mean)
        for s in record.image_sizes
    ]
    listed = ", ".join(
        f"{m:g} at {size} px" for m, size in zip(best, record.image_sizes, strict=True)
    )
    gains = [
        difference(record, magnitude_row(strong, size), magnitude_row(weak, size))
        for size in (small, large)
    ]
    change, trend = magnitude_trend(record)
    paper = [PAPER_MEANS[2][i] - PAPER_MEANS[0][i] for i in (0, 2)]
    return [
        f"**Best magnitude on average: {listed}. The paper's trend, that larger images want more, "
        f"{trend}.** There it is 5 at 128 px, 10 at 192 px, 15 at 300 px.",
        f"From magnitude {weak:g} to {strong:g}: {_points(gains[0])} {_certainty(gains[0])} at "
        f"{small} px and {_points(gains[1])} {_certainty(gains[1])} at {large} px, which is "
        f"{_points(change)} {_certainty(change)} apart. The paper, from 5 to 15: "
        f"{paper[0]:+.1f} at 128 px and {paper[1]:+.1f} at 300 px.",
    ]


def setting(record: AblationRecord) -> str:
    """Write what the numbers were made with."""
    machines = "; ".join(
        f"{e.gpus[0] if e.gpus else f'{e.num_cores} cores of {e.processor}'}, torch "
        f"{e.libraries.get('torch')}, commit {e.git_commit}"
        for e in record.environments
    )
    rounds = _seeds(record)
    if record.num_rounds < record.num_rounds_planned:
        rounds += f" of the {record.num_rounds_planned} planned"
    at_once = f", {record.jobs} runs at once (their times are less certain)"
    return (
        f"{rounds}, {record.num_images_evaluated:,} held-out images (one of them is "
        f"{100 / record.num_images_evaluated:.2g} points){at_once * (record.jobs > 1)}; "
        f"{machines}; {record.finished_at:%Y-%m-%d} UTC."
    )


def _points(change: Spread) -> str:
    return f"{change.mean:+.1f} points"


def _certainty(change: Spread) -> str:
    if change.margin is None:
        return "(one seed, so no margin)"
    side = "outside" if change.is_certain else "within"
    return f"({side} the margin of {change.margin:.1f})"


def _time_against_fixed(saved: Spread) -> str:
    if saved.margin is None:
        return f"in {_less(saved.mean)} time than {FIXED} (one seed, so no margin)"
    margin = f"margin {saved.margin:.0f} %"
    if saved.is_certain:
        return f"in {_less(saved.mean)} time ({margin}) than {FIXED}"
    return f"in about the same time ({_less(saved.mean)}, {margin}) as {FIXED}"


def _less(saved_percent: float) -> str:
    return f"{abs(saved_percent):.0f} % {'less' if saved_percent >= 0 else 'more'}"


def _seeds(record: AblationRecord) -> str:
    return f"{record.num_rounds} seed{'s' * (record.num_rounds > 1)}"
