"""SearchRecord -> report.md, pictures and the record itself; and their publication."""

import os
from collections import Counter
from pathlib import Path

from efficientnet.machine.atomic import write_bytes, write_text
from efficientnet.network.variant_file import write_variant_file
from efficientnet.reporting.publishing import PUBLISHED, published_directory, write_section
from efficientnet.reporting.tables import format_percent
from training.running.progress import format_seconds
from training.searching.search_pictures import pictures
from training.searching.search_record import SearchRecord
from training.searching.search_tables import (
    NUM_LISTED,
    best_trials,
    choices_table,
    compared_table,
    found_table,
    networks_table,
)

ALT = {
    "reward": "Reward over trials",
    "plane": "Accuracy against step time and size",
    "choices": "Choices of the best networks",
    "importance": "Importance of each choice",
}

# In the setting.
PARAMETERS = "reference's parameters"

MARGIN = (
    "Differences are taken seed by seed. Their margin, in brackets, is half of the 95 % confidence "
    "interval of their mean (Student's t): what is not larger cannot be told from none."
)


def section_name(name: str) -> str:
    """Name the section of docs/results.md and the published files."""
    return f"search-{name}"


def write_files(record: SearchRecord, directory: Path, stem: str, json_name: str) -> Path:
    """Write the pictures, the text and, last, the record; return the text."""
    drawn = pictures(record)
    for name, picture in drawn.items():
        write_bytes(directory / f"{stem}-{name}.png", picture)
    text = directory / f"{stem}.md"
    write_text(text, to_markdown(record, {name: f"{stem}-{name}.png" for name in drawn}))
    write_text(directory / json_name, record.model_dump_json(indent=1) + "\n")
    return text


def publish(record: SearchRecord, readme: Path, published: Path = PUBLISHED) -> Path:
    """Write the results among the published ones, and their essence into docs/results.md.

    Returns:
        The published text.
    """
    directory = published_directory(record.finished_at, [record.environment], published)
    stem = section_name(record.name)
    text = write_files(record, directory, stem, f"{stem}.json")
    if record.best is not None:
        origin = {"search": record.name, "report": text.name}
        write_variant_file(directory / f"{stem}-found.json", record.best, origin)
    link = Path(os.path.relpath(directory, readme.parent)).as_posix()
    parts = [f"**{title_of(record)}**", counts(record)]
    if record.best is not None:
        parts += [found_table(record).markdown(), found_line(record)]
        if record.compared:
            parts += [compared_table(record).markdown(), MARGIN]
        parts += [
            f"![{ALT['plane']}]({link}/{stem}-plane.png)",
            f"![{ALT['choices']}]({link}/{stem}-choices.png)",
        ]
    parts.append(f"[All of it]({link}/{stem}.md), [all trials]({link}/{stem}.json).")
    write_section(readme, stem, "\n\n".join(parts))
    return text


def title_of(record: SearchRecord) -> str:
    """Name what was searched on what."""
    setting = record.setting
    what = "Front" if setting["objective"] == "front" else "Search"
    exponents = f"w {setting['w']:g}, v {setting['v']:g}"
    if setting["target_artifact"]:
        exponents += f", u {setting['u']:g} of {setting['target_artifact']}"
    return f"{what} around {setting['reference']} on {setting['data']}: {exponents}"


def counts(record: SearchRecord) -> str:
    """Tell how many networks came to what."""
    whole, pruned, failed = (record.count(o) for o in ("whole", "pruned", "failed"))
    num_networks = whole + pruned + failed
    parts = [
        f"{num_networks} networks of {record.space.num_choices:,} choices ({record.sampler}): "
        f"{whole} trained to their end, {pruned} pruned, {failed} failed"
    ]
    others = {o: record.count(o) for o in ("reused", "twin", "cut short", "running")}
    said = {
        "reused": "chosen again, whose result was taken over",
        "twin": "left to another worker",
        "cut short": "cut short, with their worker or by hand",
        "running": "under way",
    }
    parts += [f"{count} {said[name]}" for name, count in others.items() if count]
    seconds = [t.seconds for t in record.trials if t.seconds]
    if seconds:
        parts.append(f"{format_seconds(sum(seconds) / len(seconds))} each on average")
    return "; ".join(parts) + "."


def found_line(record: SearchRecord) -> str:
    """Tell what the best network came to in its trial."""
    best = record.best_trial
    assert best is not None
    line = (
        f"Found in trial {best.number}: top-1 {format_percent(best.top1 or 0.0)} on the minival, "
        f"{best.step_ratio:.2f} (± {format_percent(best.step_noise or 0.0)}) of the reference's "
        f"step time, {best.size_ratio:.2f} of its parameters"
    )
    if best.latency_ratio is not None:
        line += f", {best.latency_ratio:.2f} of its latency"
    return f"{line}: reward {best.reward:.4f}."


def _front(record: SearchRecord) -> list[str]:
    if record.setting["objective"] != "front":
        return []
    front = sorted(record.front, key=lambda trial: -(trial.top1 or 0.0))
    return [
        "## The front",
        "Networks that none is better than in all of accuracy, step time, size (and latency); each "
        "is a variant file in `front/`.",
        networks_table(record, front).markdown(),
    ]


def to_markdown(record: SearchRecord, shown: dict[str, str]) -> str:
    """Write all of it."""
    setting = record.setting
    parts = [f"# {title_of(record)}", counts(record)]
    if record.best is None:
        parts.append("No network was trained to its end: there is nothing to show.")
    else:
        parts += ["## The found network", found_table(record).markdown(), found_line(record)]
        parts.append(
            "```sh\npython -m efficientnet --variant-file found.json\n"
            "python training/run.py --variant-file found.json\n```"
        )
        if record.compared:
            parts += ["## Beside others, at the same budget", compared_table(record).markdown()]
            parts.append(
                f"Trained for as many epochs, by other seeds than the search's; top-1 on the "
                f"{record.num_held_out:,} images that no choice was made by. {MARGIN}"
            )
        parts += ["## All networks"]
        parts += [f"![{ALT[n]}]({shown[n]})" for n in ("reward", "plane")]
        parts += [
            "Shade: reward. Variants of the family stand where the mean of their seeds is.",
            networks_table(record, best_trials(record)[:NUM_LISTED]).markdown(),
            "Stages: layers x operator (F fused, M MBConv) expansion k kernel.",
            *_front(record),
            f"## Choices of the best {len(best_trials(record))}, and of all in brackets",
            f"![{ALT['choices']}]({shown['choices']})",
            choices_table(record).markdown(),
        ]
        if record.importances:
            parts += [
                "## What the reward depends on",
                f"![{ALT['importance']}]({shown['importance']})",
                "Share of each choice in the reward's variance (fANOVA; Hutter et al. 2014), of "
                "the networks that were trained to their end.",
            ]
    failures = Counter(trial.failure for trial in record.trials if trial.failure)
    if failures:
        parts.append("## Failures")
        parts.append("\n".join(f"- {count}: {reason}" for reason, count in failures.most_common()))
    devices = Counter(trial.device for trial in record.trials if trial.device)
    on = "; ".join(f"{device} ({count} trials)" for device, count in devices.items())
    formula = "A * S^w * P^v" + (" * L^u" if setting["target_artifact"] else "")
    parts += [
        "## How it was measured",
        f"Reward: {formula}. A: top-1 on {setting['minival images']:,} of the training images, of "
        f"the averaged weights. S: the median time of a training step over that of the reference "
        f"{setting['reference']}, the two in turns in one process, anew for each network; its "
        "noise is the standard error over the turns. P: trained parameters over the reference's "
        f"{setting[PARAMETERS]:,}.",
        f"{setting['train images']:,} images, {setting['progressive.image_size'][1]} px, "
        f"{setting['epochs']} epochs of batches of {setting['batch_size']}; seed {record.seed}. "
        f"{on}. {record.started_at:%Y-%m-%d %H:%M} to {record.finished_at:%H:%M} UTC; torch "
        f"{record.environment.libraries.get('torch')}, commit {record.environment.git_commit}.",
    ]
    if len(devices) > 1:
        parts.append(
            "Workers had different devices: a ratio of step times is that of its device, and "
            "rewards of different devices are not quite comparable."
        )
    return "\n\n".join(parts) + "\n"
