"""AblationRecord -> ablation.md with tables, .png and .json; and their publication."""

import os
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from efficientnet.machine.atomic import write_bytes, write_text
from efficientnet.reporting.publishing import find_section, published_directory, write_section
from efficientnet.reporting.tables import NOTHING, Table, format_percent
from training.ablations import ablation_plan as plan
from training.ablations import ablation_results as results
from training.ablations.ablation_picture import draw
from training.ablations.ablation_results import AblationRecord
from training.studies.spread import MARGIN, Spread, spread

# What is compared with what, beside fixed, in the paper's Table 13.
COMPARISONS = (
    (plan.PROGRESSIVE_ADAPTIVE, plan.PROGRESSIVE),
    (plan.RANDOM_ADAPTIVE, plan.RANDOM),
    (plan.PROGRESSIVE_ADAPTIVE, plan.RANDOM_ADAPTIVE),
)


def publish(record: AblationRecord, readme: Path) -> Path:
    """Write the results among the published ones, and tables into docs/results.md."""
    directory = published_directory(record.finished_at, record.environments)
    stem = section_name(record.name)
    find_section(readme, stem)  # before anything is written
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
    write_section(readme, stem, "\n\n".join(parts), record.environments)
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
            f"{plan.NUM_STAGES} stages, or as many as there are epochs; random resize: "
            f"{plan.NUM_RANDOM_STAGES} such sizes, or as many as there are epochs, in an order "
            "drawn by the seed. Adaptive: RandAugment, Mixup and dropout go with the size; the "
            "others have the last values throughout. Pixels: of an image of training, on average, "
            "relative to fixed.",
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
        f"{e.libraries.get('torch')}, commit {e.git_commit or 'unknown'}"
        for e in record.environments
    )
    seeds = f"{record.num_rounds} seed{'s' * (record.num_rounds > 1)}"
    at_once = f", {record.jobs} runs at once (their times are less certain)"
    return (
        f"{seeds}, {record.num_images_evaluated:,} held-out images (one of them is "
        f"{100 / record.num_images_evaluated:.2g} points){at_once * (record.jobs > 1)}; "
        f"{machines}; {record.finished_at:%Y-%m-%d} UTC."
    )


def schedules_table(record: AblationRecord) -> Table:
    """Lay out the schedules beside the paper's."""
    columns = ("schedule", "top-1 %", "against fixed (margin)", "training s", "pixels")
    columns += ("time saved % (margin)", "paper: Table 13", "paper: Table 12, B4")
    fixed_pixels = record.of(plan.FIXED)[0].mean_pixels
    rows: list[tuple[str, ...]] = []
    for name in plan.SCHEDULES:
        runs, gain, saved = record.of(name), NOTHING, NOTHING
        b4 = results.PAPER_B4.get(name)
        paper = NOTHING if b4 is None else f"{b4[0]} in {b4[1]} h"
        if name != plan.FIXED:
            gain = spread(results.gains(record, name, plan.FIXED)).with_margin("+.1f")
            saved = spread(results.time_saved(record, name)).with_margin(".0f")
            if b4:
                share = format_percent(1 - b4[1] / results.PAPER_B4[plan.FIXED][1], 0)
                paper += f", {share} saved"
        rows.append(
            (
                name,
                spread(results.points(record, name)).text(),
                gain,
                spread([run.seconds for run in runs]).text(),
                f"{statistics.fmean(run.mean_pixels for run in runs) / fixed_pixels:.2f}",
                saved,
                f"{results.PAPER_TOP1[name]}" if name in results.PAPER_TOP1 else NOTHING,
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
            spread(results.gains(record, row, other)).with_margin("+.1f"),
            f"{results.PAPER_TOP1[row] - results.PAPER_TOP1[other]:+.1f}",
        )
        for row, other in COMPARISONS
    )
    return Table(columns, rows, frozenset({"schedule", "against"}))


def magnitudes_table(record: AblationRecord) -> Table:
    """Lay out top-1 by magnitude and size beside the paper's; the best of a size is bold."""
    ours, papers = results.magnitude_grid(record), results.paper_grid()
    rows = [
        (
            f"{record.magnitudes[i]:g}",
            *_bold_best(ours, i, 1),
            f"{results.PAPER_MAGNITUDES[i]:g}",
            *_bold_best(papers, i, 2),
        )
        for i in range(3)
    ]
    sizes = record.image_sizes
    (weak, _, strong), (small, _, large) = record.magnitudes, sizes
    paper_gains = [
        after - before
        for before, after in zip(results.PAPER_MEANS[0], results.PAPER_MEANS[2], strict=True)
    ]
    rows.append(
        (
            f"from {weak:g} to {strong:g} (margin)",
            *(spread(results.magnitude_gains(record, s)).with_margin("+.1f") for s in sizes),
            f"from {results.PAPER_MAGNITUDES[0]:g} to {results.PAPER_MAGNITUDES[2]:g}",
            *(f"{gain:+.1f}" for gain in paper_gains),
        )
    )
    columns = ("magnitude", *(f"{size} px" for size in record.image_sizes))
    columns += ("paper: magnitude", *(f"paper: {size} px" for size in results.PAPER_SIZES))
    trend = spread(results.magnitude_trend(record)).with_margin("+.1f")
    note = (
        f"At {large} px the strongest magnitude gains {trend} points more over the weakest than "
        f"at {small} px; in the paper, where larger images want more, "
        f"{paper_gains[2] - paper_gains[0]:+.1f}."
    )
    return Table(columns, tuple(rows), notes=(note,))


def _bold_best(grid: Sequence[Sequence[Spread]], row: int, decimals: int) -> list[str]:
    cells: list[str] = []
    for column, cell in enumerate(grid[row]):
        deviation = "" if cell.std is None else f" ± {cell.std:.{decimals}f}"
        mark = "**" * (cell.mean == max(line[column].mean for line in grid))
        cells.append(f"{mark}{cell.mean:.1f}{deviation}{mark}")
    return cells


def write_files(record: AblationRecord, directory: Path, stem: str) -> Path:
    """Write the picture, the text and, last, the record; return the text."""
    text = directory / f"{stem}.md"
    write_bytes(directory / f"{stem}.png", draw(record))
    write_text(text, to_markdown(record, f"{stem}.png"))
    write_text(directory / f"{stem}.json", record.model_dump_json(indent=1) + "\n")
    return text
