"""The service under load, beside a plain loop of the same program -> record, table and picture."""

import logging
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from efficientnet.formats.artifact import read_artifact
from efficientnet.images.datasets import read_photos
from efficientnet.machine.atomic import write_bytes, write_text
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.measuring.contender import Contender, running
from efficientnet.measuring.turns import TimeBudget, take_turns
from efficientnet.reporting.publishing import find_section, publish_part, published_directory
from perf.service_load.config import LoadConfig
from perf.service_load.load_contenders import (
    LoadError,
    LoopTurn,
    PlainLoop,
    running_peer,
    running_service,
)
from perf.service_load.load_generator import (
    Answers,
    Schedule,
    Target,
    in_forms,
    planned_times,
    send_in_turn,
    send_planned,
)
from perf.service_load.load_record import (
    SECTION,
    LoadRecord,
    Peer,
    Point,
    Saturated,
    Service,
    SingleClient,
    draw,
    to_markdown,
    to_point,
)

# Of a bound that is not given, in medians of the plain loop.
BOUND_FACTOR = 5

WARM_UP_S = 1.0

PLAIN = "plain loop"

Targets = dict[Service, Target]


class Rate(NamedTuple):
    """How much a contender did in a turn."""

    images_per_s: float
    generator_cores: float = 0.0
    """Processors that its clients kept busy."""


log = logging.getLogger(__name__)


def main(config: LoadConfig) -> Path:
    """Measure, and return the table's file.

    Raises:
        ArtifactError: missing, damaged, or not ours.
        PreprocessingError: there are no photos.
        PublishError: docs/results.md has no place for the table; nothing is measured then.
        LoadError: the service ended, or did not get ready.
    """
    if config.publish:
        find_section(config.readme, SECTION)
    record = measure(config)
    folder = config.output.parent
    if config.publish:
        folder = published_directory(record.started_at, [record.environment])
        publish_part(record, f"{record.slug}.json", config.readme, SECTION, to_markdown)
    else:
        write_text(config.output, record.model_dump_json(indent=1) + "\n")
    write_bytes(folder / f"{record.slug}.png", draw(record))
    table = folder / f"{record.slug}.md"
    write_text(table, to_markdown(record, picture=f"{record.slug}.png"))
    return table


def measure(config: LoadConfig) -> LoadRecord:
    """Let the services and the plain loops take turns."""
    artifact = config.artifact.absolute()
    manifest = read_artifact(artifact)
    pictures = read_photos(config.photos)[: config.num_photos]
    budget = TimeBudget(config.seconds, config.turns)
    started_at, num_cores = datetime.now(UTC), num_usable_cores()
    loops = [
        Contender(PLAIN, partial(PlainLoop, artifact, pictures, num_threads))
        for num_threads in (num_cores, *[1] * num_cores)
    ]
    with ExitStack() as stack:
        log.info("open %s in %d loops and two services", artifact, len(loops))
        stack.enter_context(running(loops))
        targets: Targets = {}
        batches: dict[Service, int] = {"batched": config.batch, "unbatched": 1}
        for service, batch in batches.items():
            served = stack.enter_context(
                running_service(artifact, CLASSIFIER_NETWORK_BATCH=str(batch))
            )
            targets[service] = Target(f"{served.address}/classify", pictures)
        skipped: dict[Peer, str] = {}
        for peer in config.peers:
            try:
                served = stack.enter_context(
                    running_peer(peer, artifact, config.batch, config.peer_packages)
                )
            except LoadError as error:
                skipped[peer] = str(error).splitlines()[-1]
                log.warning("%s does not take part: %s", peer, error)
                continue
            address = f"{served.address}/classify"
            targets[peer] = (
                in_forms(address, pictures) if peer == "litserve" else Target(address, pictures)
            )
        for target in targets.values():
            send_in_turn(target, config.clients, min(WARM_UP_S, budget.turn_s))

        single, elsewhere = _single(loops[0], targets, budget)
        saturated = _saturated(loops[1:], targets, config, budget)
        bound_ms = config.bound_ms or BOUND_FACTOR * single.plain_p50_ms
        rates = [factor * saturated.best_plain for factor in config.rates]
        points: list[Point] = []
        for schedule in config.schedules:
            for rate in tqdm(rates, schedule, unit="rate", disable=None, leave=False):
                log.info("%s, %.1f a second", schedule, rate)
                answers = _at_rate(targets, budget, schedule, rate, config.seed)
                points += (
                    to_point(name, schedule, rate, own, bound_ms, config.seconds)
                    for name, own in answers.items()
                )
    return LoadRecord(
        variant=manifest.variant,
        runtime=manifest.runtime,
        precision=manifest.precision,
        image_size=manifest.preprocess.image_size,
        program_sha256=manifest.program_sha256,
        num_photos=len(pictures),
        batch=config.batch,
        seconds=config.seconds,
        num_turns=config.turns,
        bound_ms=bound_ms,
        single=single,
        saturated=saturated,
        points=tuple(points),
        skipped=skipped,
        cores_busy_elsewhere=elsewhere,
        environment=current_environment(),
        started_at=started_at,
    )


def _single(
    plain: Contender, targets: Targets, budget: TimeBudget
) -> tuple[SingleClient, float | None]:
    log.info("single client")
    loop_turns = list[LoopTurn]()

    def turn(service: Service | None, _: int) -> Sequence[float]:
        if service is None:
            loop_turns.append(plain.ask("turn", 1, budget.turn_s))
            return loop_turns[-1].samples_ms
        return send_in_turn(targets[service], 1, budget.turn_s).latencies_ms

    turns = take_turns((None, *targets), budget.num_turns, turn)

    def median(contender: Service | None) -> float:
        return statistics.median(ms for own in turns[contender] for ms in own)

    busy = [t.cores_busy_elsewhere for t in loop_turns if t.cores_busy_elsewhere is not None]
    single = SingleClient(
        plain_p50_ms=median(None), service_p50_ms={name: median(name) for name in targets}
    )
    return single, statistics.fmean(busy) if busy else None


def _saturated(
    loops: Sequence[Contender],
    targets: Targets,
    config: LoadConfig,
    budget: TimeBudget,
) -> Saturated:
    log.info("saturated")
    batch_sizes = (1, config.batch)

    def turn(contender: int | Service, _: int) -> Rate:
        if isinstance(contender, int):
            return _ask_all(loops, contender, budget.turn_s)
        answers = send_in_turn(targets[contender], config.clients, budget.turn_s)
        return Rate(answers.num_answered / answers.seconds, answers.generator_s / answers.seconds)

    turns = take_turns((*batch_sizes, *targets), budget.num_turns, turn)

    def mean(contender: int | Service) -> Rate:
        return Rate(*map(statistics.fmean, zip(*turns[contender], strict=True)))

    return Saturated(
        plain_images_per_s={size: mean(size).images_per_s for size in batch_sizes},
        service_images_per_s={name: mean(name).images_per_s for name in targets},
        num_clients=config.clients,
        generator_cores={name: mean(name).generator_cores for name in targets},
    )


def _ask_all(loops: Sequence[Contender], batch_size: int, turn_s: float) -> Rate:
    # Together they are one contender.
    with ThreadPoolExecutor(len(loops)) as pool:
        turns: list[LoopTurn] = list(
            pool.map(lambda loop: loop.ask("turn", batch_size, turn_s), loops)
        )
    return Rate(sum(turn.images_per_s for turn in turns))


def _at_rate(
    targets: Targets,
    budget: TimeBudget,
    schedule: Schedule,
    rate: float,
    seed: int,
) -> dict[Service, list[Answers]]:
    def turn(service: Service, number: int) -> Answers:
        # The same plan for all.
        times = planned_times(schedule, rate, budget.turn_s, seed + number)
        return send_planned(targets[service], times)

    return take_turns(targets, budget.num_turns, turn)
