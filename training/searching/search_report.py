"""SearchRecord -> report.md, pictures and the record itself; and their publication."""

import os
from collections import Counter
from pathlib import Path

from efficientnet.machine.atomic import write_bytes, write_text
from efficientnet.network.variant_file import write_variant_file
from efficientnet.reporting.publishing import find_section, published_directory, write_section
from training.searching import search_tables as tables
from training.searching.search_pictures import pictures
from training.searching.search_record import SearchRecord
from training.studies.spread import MARGIN

ALT = {
    "reward": "Reward over trials",
    "plane": "Accuracy against step time and size",
    "choices": "Choices of the best networks",
    "importance": "Importance of each choice",
}

# In the setting.
PARAMETERS = "reference's parameters"


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


def publish(record: SearchRecord, readme: Path) -> Path:
    """Write the results among the published ones, and their essence into docs/results.md."""
    directory = published_directory(record.finished_at, [record.environment])
    stem = section_name(record.name)
    find_section(readme, stem)  # before anything is written
    text = write_files(record, directory, stem, f"{stem}.json")
    if record.best is not None:
        origin = {"search": record.name, "report": text.name}
        write_variant_file(directory / f"{stem}-found.json", record.best, origin)
    link = Path(os.path.relpath(directory, readme.parent)).as_posix()
    parts = [f"**{title_of(record)}**", tables.outcomes_table(record).markdown()]
    if record.best_trial is not None:
        parts.append(tables.found_table(record).markdown())
        parts.append(tables.networks_table(record, [record.best_trial]).markdown())
        if record.compared:
            parts += [tables.compared_table(record).markdown(), MARGIN]
        parts += [f"![{ALT[name]}]({link}/{stem}-{name}.png)" for name in ("plane", "choices")]
    where = record.environment
    parts.append(
        f"{where.gpus[0] if where.gpus else f'{where.num_cores} cores of {where.processor}'}, "
        f"{record.finished_at:%Y-%m-%d} UTC. [All of it]({link}/{stem}.md), "
        f"[all trials]({link}/{stem}.json)."
    )
    write_section(readme, stem, "\n\n".join(parts), [record.environment])
    return text


def title_of(record: SearchRecord) -> str:
    """Name what was searched on what."""
    setting = record.setting
    what = "Front" if setting["objective"] == "front" else "Search"
    exponents = f"w {setting['w']:g}, v {setting['v']:g}"
    if setting["target_artifact"]:
        exponents += f", u {setting['u']:g} of {setting['target_artifact']}"
    return f"{what} around {setting['reference']} on {setting['data']}: {exponents}"


def _front(record: SearchRecord) -> list[str]:
    if record.setting["objective"] != "front":
        return []
    front = sorted(record.front, key=lambda trial: -(trial.top1 or 0.0))
    return [
        "## The front",
        "Networks that none is better than in all of accuracy, step time, size (and latency); each "
        "is a variant file in `front/`.",
        tables.networks_table(record, front).markdown(),
    ]


def to_markdown(record: SearchRecord, shown: dict[str, str]) -> str:
    """Write all of it."""
    setting = record.setting
    parts = [f"# {title_of(record)}", tables.outcomes_table(record).markdown()]
    best = record.best_trial
    if best is None:
        parts.append("No network was trained to its end: there is nothing to show.")
    else:
        parts += ["## The found network", tables.found_table(record).markdown()]
        parts.append(tables.networks_table(record, [best]).markdown())
        parts.append(
            "```sh\npython -m efficientnet --variant-file found.json\n"
            "python training/run.py --variant-file found.json\n```"
        )
        if record.compared:
            parts += [
                "## Beside others, at the same budget",
                tables.compared_table(record).markdown(),
            ]
            parts.append(
                f"Trained for as many epochs, by other seeds than the search's; top-1 on the "
                f"{record.num_held_out:,} images that no choice was made by. {MARGIN}"
            )
        listed = tables.best_trials(record)[: tables.NUM_LISTED]
        parts.append("## All networks")
        parts += [f"![{ALT[n]}]({shown[n]})" for n in ("reward", "plane")]
        parts += [
            "Shade: reward. Variants of the family stand where the mean of their seeds is.",
            tables.networks_table(record, listed).markdown(),
            "Stages: layers x operator (F fused, M MBConv) expansion k kernel.",
            *_front(record),
            f"## Choices of the best {len(tables.best_trials(record))}, and of all in brackets",
            f"![{ALT['choices']}]({shown['choices']})",
            tables.choices_table(record).markdown(),
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
        f"{setting['epochs']} epochs of batches of {setting['batch_size']}; "
        f"{record.space.num_choices:,} choices, {record.sampler}, seed {record.seed}. "
        f"{on}. {record.started_at:%Y-%m-%d %H:%M} to {record.finished_at:%H:%M} UTC; torch "
        f"{record.environment.libraries.get('torch')}, commit "
        f"{record.environment.git_commit or 'unknown'}.",
    ]
    if len(devices) > 1:
        parts.append(
            "Workers had different devices: a ratio of step times is that of its device, and "
            "rewards of different devices are not quite comparable."
        )
    return "\n\n".join(parts) + "\n"
