"""A plan -> Ray Data, which has its missing parts done on all cores -> the table's folder.

Ray carries numbers of parts and nothing else: pictures are read where they are classified, and
results written there.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Read by Ray when it is imported: no report to its makers, no bars between ours.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import pyarrow.parquet as pq
import ray
from tqdm import tqdm

from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import read_artifact
from efficientnet.images.tar_index import DatasetError
from efficientnet.machine.environment import num_usable_cores
from serving.bulk import BulkConfig
from serving.bulk_parts import (
    BulkError,
    PartClassifier,
    Plan,
    absolute_source,
    open_plan,
    part_path,
)
from serving.settings import artifact_sha256, read_settings

# Smallest that Ray takes; nothing is put there but numbers.
OBJECT_STORE_BYTES = 80_000_000

SECONDS_BETWEEN_LINES = 30.0
NUM_BROKEN_SHOWN = 5

EXPECTED = (PipelineError, DatasetError, OSError)

log = logging.getLogger(__name__)


class Worker:
    """A PartClassifier in one of Ray's processes; its errors come back in its answers.

    Args:
        arguments: of PartClassifier.
    """

    def __init__(self, *arguments: Any) -> None:
        self._classify: Callable[[int], tuple[int, int]]
        try:
            self._classify = PartClassifier(*arguments).classify
        except EXPECTED as error:
            problem = str(error)

            def fail(_: int) -> tuple[int, int]:
                raise BulkError(problem)

            self._classify = fail

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int] | list[str]]:
        """Have one part done; say how many pictures it had, how many broken, and what failed."""
        (part,) = batch["part"].tolist()
        try:
            num_images, num_broken = self._classify(part)
        except EXPECTED as error:
            return {"images": [0], "broken": [0], "problem": [str(error)]}
        return {"images": [num_images], "broken": [num_broken], "problem": [""]}


def main(config: BulkConfig) -> Path:
    """Classify what is missing, and return the table's folder.

    Raises:
        ArtifactError: missing, damaged, or not ours.
        DatasetError, BulkError: see open_plan.
        BulkError: the data or the table is gone; parts that are done stay.
    """
    artifact = (config.artifact or read_settings(os.environ).artifact).absolute()
    read_artifact(artifact)
    wanted = Plan(
        data=absolute_source(config.data),
        artifact_sha256=artifact_sha256(artifact),
        top_k=config.top_k,
        part_images=config.part_images,
        num_images=0,
    )
    table = config.output.absolute()
    with _cluster():
        resources = ray.cluster_resources()
        num_networks = int(resources.get("CPU", 0)) // config.cores
        if config.gpus:
            num_networks = min(num_networks, int(resources.get("GPU", 0)) // config.gpus)
        if num_networks < 1:
            raise BulkError(
                f"a network is to have {config.cores} cores and {config.gpus} GPUs, and there are "
                f"{resources.get('CPU', 0):g} and {resources.get('GPU', 0):g}: give less with "
                "--cores and --gpus"
            )
        plan = open_plan(table, wanted, num_networks)
        missing = plan.missing(table)
        num_done = plan.num_images - sum(map(plan.size_of, missing))
        log.info("%d of %d pictures of %s are done", num_done, plan.num_images, plan.data)
        if missing:
            arguments = (table, artifact, config.batch, config.cores)
            _show(_classify(missing, arguments, num_networks, config), plan, num_done)
    _tell_broken(table, plan)
    return config.output


@contextmanager
def _cluster() -> Iterator[None]:
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:
        options |= {
            "address": "local",
            "num_cpus": num_usable_cores(),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    on_terminate = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    signal.signal(signal.SIGTERM, on_terminate)  # Ray's own ends the process without a word
    try:
        yield
    finally:
        ray.shutdown()


def _classify(
    parts: list[int], arguments: tuple[object, ...], num_networks: int, config: BulkConfig
) -> Iterator[dict[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    done = ray.data.from_items(
        [{"part": part} for part in parts], override_num_blocks=len(parts)
    ).map_batches(
        Worker,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(num_networks, len(parts))),
        num_cpus=config.cores,
        num_gpus=config.gpus or None,
    )
    for row in done.iter_rows():
        if row["problem"]:
            raise BulkError(f"{row['problem']}; what is done stays: start again to do the rest")
        yield row


def _show(done: Iterator[dict[str, Any]], plan: Plan, num_done: int) -> None:
    started = told = time.monotonic()
    num_new = num_broken = 0
    with tqdm(total=plan.num_images, initial=num_done, unit="picture", disable=None) as bar:
        for part in done:
            num_new += part["images"]
            num_broken += part["broken"]
            bar.update(part["images"])
            bar.set_postfix(broken=num_broken)
            now = time.monotonic()
            if bar.disable and now - told > SECONDS_BETWEEN_LINES:
                told = now
                log.info("%d of %d, %d broken", num_done + num_new, plan.num_images, num_broken)
    seconds = time.monotonic() - started
    log.info("%d pictures in %.1f s, %.1f a second", num_new, seconds, num_new / seconds)


def _tell_broken(table: Path, plan: Plan) -> None:
    num_broken = 0
    for part in range(plan.num_parts):
        rows = pq.read_table(part_path(table, part), columns=["image", "error"])
        broken = rows.filter(rows["error"].is_valid()).to_pylist()
        for row in broken[: max(0, NUM_BROKEN_SHOWN - num_broken)]:
            log.warning("broken: %s: %s", row["image"], row["error"])
        num_broken += len(broken)
    log.info(
        "%d pictures are in the table, %d of them broken, which have an `error` in the place of "
        "classes",
        plan.num_images,
        num_broken,
    )
