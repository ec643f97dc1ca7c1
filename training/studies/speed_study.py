"""Variant, image sizes, batch sizes -> images per second and memory of a training step."""

import logging
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import timm
import torch
from tqdm import tqdm

from efficientnet.formats.records import TrainingSpeedRecord, append_record
from efficientnet.images.datasets import data_name
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.measuring.contender import Contender, running
from efficientnet.measuring.peaks import cpu_peaks, describe_peak, gpu_peak
from efficientnet.measuring.turns import take_turns
from efficientnet.network.cost import DevicePeak, network_cost
from efficientnet.network.variants import get_variant
from efficientnet.reporting.publishing import find_section
from efficientnet.reporting.tables import format_rate
from training.learning.memory import USABLE_SHARE, MemoryModel, device_memory_bytes
from training.studies.speed_plan import OURS, SpeedConfig, StepCase, plan
from training.studies.speed_subject import Device, Measured, StepSubject, StepTurn, StepWarmUp
from training.studies.speed_tables import SECTION, document, publish

# Of a case's time, at most, for steps that do not count.
WARM_UP_FRACTION = 0.5

log = logging.getLogger(__name__)


def main(config: SpeedConfig) -> Path:
    """Measure all rows, print the table, and return the records' file."""
    if config.publish:
        find_section(config.readme, SECTION)
    groups = plan(config)
    recorder = Recorder(config)
    records: list[TrainingSpeedRecord] = []
    for group in tqdm(groups, "measuring", unit="row", disable=None, leave=False):
        for measured in recorder.predict(group) or measure(group, config.seconds, config.turns):
            record = recorder.record(measured)
            append_record(config.output, record)
            records.append(record)
            speed = "OOM" if record.images_per_s is None else format_rate(record.images_per_s)
            log.info("%s: %s images/s", measured.case.describe(), speed)
    print(document(records, as_markdown=False))
    if config.publish:
        publish(records, config.readme)
    return config.output


def measure(group: Sequence[StepCase], seconds: float, num_turns: int) -> list[Measured]:
    """Let the processes of a group take turns; one alone has a single long one.

    All are in memory at once. Each has so many seconds in all, without its warm-up.
    """
    takes_turns = len(group) > 1
    num_turns = num_turns if takes_turns else 1
    processes = {case: Contender(case.describe(), partial(StepSubject, case)) for case in group}
    rows: dict[StepCase, Measured] = {}

    def ask(case: StepCase, method: str, *arguments: float) -> StepWarmUp | StepTurn | None:
        # What the device does not hold has no answer, and its process keeps none of the memory.
        answer = processes[case].ask(method, *arguments)
        if answer is None:
            rows[case].is_out_of_memory = True
            processes[case].stop()
        return answer

    def turn(case: StepCase, _: int) -> None:
        if rows[case].is_out_of_memory:
            return
        taken = ask(case, "turn", seconds / num_turns, 1 if takes_turns else 0)
        if isinstance(taken, StepTurn):
            rows[case].turns += (taken,)

    with running(list(processes.values())):
        for case in group:
            rows[case] = Measured(case, processes[case].ask("device"))
        for case in group:
            warm_up = ask(case, "warm_up", WARM_UP_FRACTION * seconds)
            rows[case].warm_up = warm_up if isinstance(warm_up, StepWarmUp) else None
        take_turns(group, num_turns, turn)
    return list(rows.values())


class Recorder:
    """Adds to what was measured what is known beforehand: costs, memory, the device's peak."""

    def __init__(self, config: SpeedConfig) -> None:
        self._config = config
        self._started_at = datetime.now(UTC)
        self._memory_models: dict[tuple[str, str], MemoryModel] = {}
        self._cpu_peak: DevicePeak | None = None
        self._is_cpu = not torch.cuda.is_available()
        self._cpu_bytes = device_memory_bytes(torch.device("cpu"))
        if self._is_cpu:
            # Now: nothing else computes.
            peaks = cpu_peaks(config.threads or num_usable_cores(), [config.precision])
            self._cpu_peak = peaks[config.precision]
            log.info("the CPU's peak in %s: %s", config.precision, describe_peak(self._cpu_peak))

    def predict(self, group: Sequence[StepCase]) -> list[Measured]:
        """Return the rows of a group that a CPU cannot hold, so that it is not tried; else none."""
        if not self._is_cpu:
            return []
        limit = self._config.memory_limit_bytes or self._cpu_bytes * USABLE_SHARE
        # Those that take turns are all in memory at once.
        needed = sum(self.predicted_bytes(case) for case in group)
        if needed <= limit:
            return []
        log.info(
            f"{group[0].describe()} is not tried: about {needed / 1e9:.1f} GB are needed, "
            f"{limit / 1e9:.1f} GB can be used"
        )
        device = Device("cpu", "", self._cpu_bytes)
        return [Measured(case, device, is_out_of_memory=True) for case in group]

    def predicted_bytes(self, case: StepCase) -> int:
        """Return what our step takes, by training/learning/memory.py."""
        key = (case.variant, case.padding)
        if key not in self._memory_models:
            train_config = case.train_config()
            self._memory_models[key] = MemoryModel(
                train_config, train_config.network_options(None), case.num_classes
            )
        return self._memory_models[key].bytes_for(case.image_size, case.micro_batch_size)

    def record(self, measured: Measured) -> TrainingSpeedRecord:
        """Make the record of a row."""
        case, device = measured.case, measured.device
        turns = () if measured.is_out_of_memory else measured.turns
        batch_size = case.micro_batch_size
        step_ms = [sample for turn in turns for sample in turn.samples_ms]
        elapsed_s = sum(turn.elapsed_s for turn in turns)
        images_per_s = batch_size * len(step_ms) / elapsed_s if turns else None
        peak = self._cpu_peak if device.type == "cpu" else gpu_peak(device.name, case.precision)
        mfu, warm_up = None, measured.warm_up
        if peak and images_per_s is not None:
            spec = get_variant(case.variant)
            flops = network_cost(spec, case.image_size, num_classes=case.num_classes).flops
            mfu = 3 * flops * images_per_s / peak.operations_per_s
        return TrainingSpeedRecord(
            variant=case.variant,
            contender=case.contender,
            contender_version=None if case.contender == OURS else timm.__version__,
            image_size=case.image_size,
            micro_batch_size=batch_size,
            precision=case.precision,
            num_classes=case.num_classes,
            is_compiled=case.is_compiled,
            is_loader_fed=case.data is not None,
            data="synthetic" if case.data is None else data_name(case.data),
            num_workers=case.num_workers,
            num_threads=case.num_threads,
            table=self._config.table,
            num_warm_up_steps=warm_up.num_steps if warm_up else 0,
            num_steps=len(step_ms),
            images_per_s=images_per_s,
            step_p50_ms=statistics.median(step_ms) if step_ms else None,
            turn_p50_ms=tuple(statistics.median(turn.samples_ms) for turn in turns),
            compile_s=warm_up.compile_s if warm_up else None,
            peak_memory_bytes=max(turn.peak_memory_bytes for turn in turns) if turns else None,
            predicted_memory_bytes=self.predicted_bytes(case) if case.contender == OURS else None,
            device_memory_bytes=device.memory_bytes,
            mfu=mfu,
            device_peak=describe_peak(peak) if peak else None,
            is_out_of_memory=measured.is_out_of_memory,
            environment=current_environment(),
            started_at=self._started_at,
        )
