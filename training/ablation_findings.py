"""AblationRecord -> sentences: what came out, whichever way it is, each beside the paper's."""

from training.ablation_plan import (
    FIXED,
    PROGRESSIVE,
    PROGRESSIVE_ADAPTIVE,
    RANDOM,
    RANDOM_ADAPTIVE,
    magnitude_row,
)
from training.ablation_results import (
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

# What is compared with what, and which of the paper's tables says by how much.
COMPARISONS = (
    ("Adaptive regularisation, rising sizes", PROGRESSIVE_ADAPTIVE, PROGRESSIVE),
    ("Adaptive regularisation, random sizes", RANDOM_ADAPTIVE, RANDOM),
    ("Rising instead of random sizes, both adaptive", PROGRESSIVE_ADAPTIVE, RANDOM_ADAPTIVE),
)


def headline(record: AblationRecord) -> str:
    """Say in one line what came out."""
    where = f"{record.variant} on {record.data}"
    if record.has("schedules"):
        change = difference(record, PROGRESSIVE_ADAPTIVE, FIXED)
        by = f"by {abs(change.mean):.1f} points"
        if change.is_within:
            effect = f"holds top-1 ({_points(change)}, within one deviation)"
        else:
            effect = f"raises top-1 {by}" if change.mean > 0 else f"lowers top-1 {by}"
        saved = time_saved(record, PROGRESSIVE_ADAPTIVE)
        return f"{where}: {PROGRESSIVE_ADAPTIVE} {effect} in {_less_time(saved)} time than fixed"
    _, trend = magnitude_trend(record)
    words = {
        "shows": "larger images want more RandAugment",
        "is reversed": "larger images want less RandAugment",
    }
    return f"{where}: {words.get(trend, 'no effect of the image size on the best RandAugment')}"


def schedule_findings(record: AblationRecord) -> list[str]:
    """Write what the schedules came to, whichever way it is, each beside the paper's."""
    (old_top1, old_hours), (new_top1, new_hours) = PAPER_B4[FIXED], PAPER_B4[PROGRESSIVE_ADAPTIVE]
    change = difference(record, PROGRESSIVE_ADAPTIVE, FIXED)
    saved = time_saved(record, PROGRESSIVE_ADAPTIVE)
    findings = [
        f"**{PROGRESSIVE_ADAPTIVE}: {_points(change)} {_certainty(change)} in {_less_time(saved)} "
        f"time than {FIXED}.** The paper (Table 12, EfficientNet-B4): "
        f"{new_top1 - old_top1:+.1f} points in {_less_time(1 - new_hours / old_hours)} time."
    ]
    for title, row, other in COMPARISONS:
        change = difference(record, row, other)
        paper = PAPER_TOP1[row] - PAPER_TOP1[other]
        if change.is_within:
            verdict = f"nothing that {record.num_rounds} seeds would show; the paper has"
        elif change.deviation is None:
            verdict = "the paper has"
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
        f"**Best magnitude: {listed}. The paper's trend, that larger images want more, {trend}.** "
        "There it is 5 at 128 px, 10 at 192 px, 15 at 300 px.",
        f"From magnitude {weak:g} to {strong:g}: {_points(gains[0])} {_certainty(gains[0])} at "
        f"{small} px and {_points(gains[1])} {_certainty(gains[1])} at {large} px, which is "
        f"{_points(change)} {_certainty(change)} apart. The paper, from 5 to 15: "
        f"{paper[0]:+.1f} at 128 px and {paper[1]:+.1f} at 300 px.",
    ]


def setting(record: AblationRecord) -> str:
    """Write what the numbers were made with."""
    machines = "; ".join(
        f"{e.gpus[0] if e.gpus else f'{e.num_cores} cores of {e.cpu}'}, torch "
        f"{e.libraries.get('torch')}, commit {e.git_commit}"
        for e in record.environments
    )
    rounds = f"{record.num_rounds} seed{'s' * (record.num_rounds > 1)}"
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
    if change.deviation is None:
        return "(one seed, so no deviation)"
    side = "within" if change.is_within else "outside"
    return f"({side} one deviation, {change.deviation:.1f})"


def _less_time(saved: float) -> str:
    return f"{abs(100 * saved):.0f} % {'less' if saved >= 0 else 'more'}"
