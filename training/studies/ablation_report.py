"""AblationRecord -> ablation.md with tables, .png and .json; and their publication."""

import os
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from efficientnet.machine.atomic import write_bytes, write_text
from efficientnet.reporting.publishing import PUBLISHED, published_directory, write_section
from efficientnet.reporting.tables import NOTHING, Table, format_percent
from training.studies.ablation_picture import draw
from training.studies.ablation_plan import (
    FIXED,
    NUM_RANDOM_STAGES,
    NUM_STAGES,
    PROGRESSIVE,
    PROGRESSIVE_ADAPTIVE,
    RANDOM,
    RANDOM_ADAPTIVE,
    SCHEDULES,
    AblationConfig,
    PlannedRun,
)
from training.studies.ablation_results import (
    PAPER_B4,
    PAPER_MAGNITUDES,
    PAPER_MEANS,
    PAPER_SIZES,
    PAPER_TOP1,
    AblationRecord,
    RunRecord,
    Spread,
    collect_rounds,
    difference,
    magnitude_gain,
    magnitude_grid,
    magnitude_trend,
    paper_grid,
    points,
    spread,
    time_saved,
)

MARGIN = (
    "Differences, of times too, are taken seed by seed. Their margin, in brackets, is half of the "
    "95 % confidence interval of their mean (Student's t): what is not larger cannot be told from "
    "none."
)

# What is compared with what, beside fixed, in the paper's Table 13.
COMPARISONS = (
    (PROGRESSIVE_ADAPTIVE, PROGRESSIVE),
    (RANDOM_ADAPTIVE, RANDOM),
    (PROGRESSIVE_ADAPTIVE, RANDOM_ADAPTIVE),
)


def write_results(
    config: AblationConfig, planned: Sequence[PlannedRun], results: dict[Path, RunRecord]
) -> AblationRecord:
    """Write ablation.png, .md and, last, .json of the rounds that are complete."""
    record = collect_rounds(config, planned, results)
    write_files(record, config.directory, "ablation")
    return record


def publish(record: AblationRecord, readme: Path, published: Path = PUBLISHED) -> Path:
    """Write the results among the published ones, and tables into docs/results.md."""
    directory = published_directory(record.finished_at, record.environments, published)
    stem = section_name(record.name)
    record = _without_folders(record)
    text = write_files(record, directory, stem)
    link = Path(os.path.relpath(directory, readme.parent)).as_posix()
    parts = [f"**{title_of(record)}**"]
    if record.has("schedules"):
        parts += [schedules_table(record).markdown(), comparisons_table(record).markdown()]
    if record.has("magnitudes"):
        parts.append(magnitudes_table(record).markdown())
    parts.append(f"![Top-1 by schedule, and by magnitude and size]({link}/{stem}.png)")
    parts.append(
        f"{setting(record)} {MARGIN} [All tables]({link}/{stem}.md), "
        f"[all runs]({link}/{stem}.json)."
    )
    write_section(readme, stem, "\n\n".join(parts))
    return text


def _without_folders(record: AblationRecord) -> AblationRecord:
    # Where the data lies on the machine it was measured on is of no use to a reader.
    def name(flag: str) -> str:
        return Path(flag).name if Path(flag).is_absolute() else flag

    runs = tuple(
        run.model_copy(update={"flags": tuple(name(flag) for flag in run.flags)})
        for run in record.runs
    )
    return record.model_copy(update={"runs": runs})


def section_name(name: str) -> str:
    """Name the section of docs/results.md and the published files."""
    return f"ablation-{name}"


def to_markdown(record: AblationRecord, picture: str) -> str:
    """Write picture, tables and how it was measured."""
    parts = [f"# {title_of(record)}", f"![Results]({picture})"]
    if record.has("schedules"):
        first, _, last = record.image_sizes
        parts += [
            "## Schedules",
            schedules_table(record).markdown(),
            comparisons_table(record).markdown(),
            f"Evaluated at {last} px. Progressive: sizes rise from {first} to {last} px in "
            f"{NUM_STAGES} stages, or as many as there are epochs; random resize: "
            f"{NUM_RANDOM_STAGES} such sizes, or as many as there are epochs, in an order drawn by "
            "the seed. Adaptive: RandAugment, Mixup and dropout go with the size; the others have "
            "the last values throughout. Pixels: of an image of training, on average, relative to "
            "fixed.",
        ]
    if record.has("magnitudes"):
        parts += [
            "## RandAugment's magnitude by image size",
            magnitudes_table(record).markdown(),
            "Top-1 in %, trained and evaluated at that size; the best magnitude of a size is bold.",
        ]
    example = record.runs[0]
    parts += [
        "## How it was measured",
        f"{setting(record)} Top-1: of the averaged weights after the last epoch, mean ± sample "
        f"deviation over the seeds. {MARGIN} Seconds: in training, evaluation excluded. All rows "
        "of a seed are trained before those of the next, in another order each time.",
        f"A run ({example.row}); the flags of all are in the records:",
        f"```\npython training/run.py {record.variant} {shlex.join(example.flags)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def title_of(record: AblationRecord) -> str:
    """Name what was trained on what."""
    return f"{record.variant} on {record.name}"


def setting(record: AblationRecord) -> str:
    """Write what the numbers were made with."""
    machines = "; ".join(
        f"{e.gpus[0] if e.gpus else f'{e.num_cores} cores of {e.processor}'}, torch "
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


def schedules_table(record: AblationRecord) -> Table:
    """Lay out the schedules beside the paper's."""
    columns = ("schedule", "top-1 %", "against fixed (margin)", "training s", "pixels")
    columns += ("time saved % (margin)", "paper: Table 13", "paper: Table 12, B4")
    fixed_pixels = record.of(FIXED)[0].mean_pixels
    rows: list[tuple[str, ...]] = []
    for name in SCHEDULES:
        runs = record.of(name)
        b4 = PAPER_B4.get(name)
        is_fixed = name == FIXED
        paper = NOTHING if b4 is None else f"{b4[0]} in {b4[1]} h"
        if b4 and not is_fixed:
            paper += f", {format_percent(1 - b4[1] / PAPER_B4[FIXED][1], 0)} saved"
        rows.append(
            (
                name,
                spread(points(record, name)).text(),
                NOTHING if is_fixed else _with_margin(difference(record, name, FIXED), "+.1f"),
                spread([run.seconds for run in runs]).text(),
                f"{statistics.fmean(run.mean_pixels for run in runs) / fixed_pixels:.2f}",
                NOTHING if is_fixed else _with_margin(time_saved(record, name), ".0f"),
                f"{PAPER_TOP1[name]}" if name in PAPER_TOP1 else NOTHING,
                paper,
            )
        )
    return Table(columns, tuple(rows), frozenset({"schedule"}))


def comparisons_table(record: AblationRecord) -> Table:
    """Lay out what a row gains over another beside the paper's gain."""
    columns = ("schedule", "against", "top-1 points (margin)", "paper: Table 13")
    rows = tuple(
        (
            row,
            other,
            _with_margin(difference(record, row, other), "+.1f"),
            f"{PAPER_TOP1[row] - PAPER_TOP1[other]:+.1f}",
        )
        for row, other in COMPARISONS
    )
    return Table(columns, rows, frozenset({"schedule", "against"}))


def _with_margin(change: Spread, digits: str) -> str:
    margin = NOTHING if change.margin is None else f"{change.margin:{digits.lstrip('+')}}"
    return f"{change.mean:{digits}} ({margin})"


def magnitudes_table(record: AblationRecord) -> Table:
    """Lay out top-1 by magnitude and size beside the paper's; the best of a size is bold."""
    ours, papers = magnitude_grid(record), paper_grid()
    rows = [
        (
            f"{record.magnitudes[i]:g}",
            *_bold_best(ours, i, 1),
            f"{PAPER_MAGNITUDES[i]:g}",
            *_bold_best(papers, i, 2),
        )
        for i in range(3)
    ]
    (weak, _, strong), (small, _, large) = record.magnitudes, record.image_sizes
    paper_gains = [
        after - before for before, after in zip(PAPER_MEANS[0], PAPER_MEANS[2], strict=True)
    ]
    rows.append(
        (
            f"from {weak:g} to {strong:g} (margin)",
            *(_with_margin(magnitude_gain(record, s), "+.1f") for s in record.image_sizes),
            f"from {PAPER_MAGNITUDES[0]:g} to {PAPER_MAGNITUDES[2]:g}",
            *(f"{gain:+.1f}" for gain in paper_gains),
        )
    )
    columns = ("magnitude", *(f"{size} px" for size in record.image_sizes))
    columns += ("paper: magnitude", *(f"paper: {size} px" for size in PAPER_SIZES))
    trend = _with_margin(magnitude_trend(record), "+.1f")
    note = (
        f"At {large} px the strongest magnitude gains {trend} points more over the weakest than at "
        f"{small} px; in the paper, where larger images want more, "
        f"{paper_gains[2] - paper_gains[0]:+.1f}."
    )
    return Table(columns, tuple(rows), notes=(note,))


def _bold_best(grid: Sequence[Sequence[Spread]], row: int, decimals: int) -> list[str]:
    cells: list[str] = []
    for column, cell in enumerate(grid[row]):
        text = f"{cell.mean:.1f}"
        if cell.std is not None:
            text += f" ± {cell.std:.{decimals}f}"
        is_best = cell.mean == max(line[column].mean for line in grid)
        cells.append(f"**{text}**" if is_best else text)
    return cells


def write_files(record: AblationRecord, directory: Path, stem: str) -> Path:
    """Write the picture, the text and, last, the record; return the text."""
    text = directory / f"{stem}.md"
    write_bytes(directory / f"{stem}.png", draw(record))
    write_text(text, to_markdown(record, f"{stem}.png"))
    write_text(directory / f"{stem}.json", record.model_dump_json(indent=1) + "\n")
    return text
