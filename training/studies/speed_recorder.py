"""What a process measured -> its record, with costs, memory and the device's peak."""

import logging
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime

import timm
import torch

from efficientnet.formats.records import TrainingSpeedRecord
from efficientnet.images.datasets import data_name
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.measuring.peaks import cpu_peaks, describe_peak, gpu_peak
from efficientnet.network.cost import DevicePeak, network_cost
from efficientnet.network.variants import get_variant
from training.learning.memory import USABLE_SHARE, MemoryModel, device_memory_bytes
from training.studies.speed_plan import OURS, SpeedConfig, StepCase
from training.studies.speed_subject import Device, Measured

log = logging.getLogger(__name__)


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
            "%s is not tried: about %.1f GB are needed, %.1f GB can be used",
            group[0].describe(),
            needed / 1e9,
            limit / 1e9,
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
        case, device, turns = measured.case, measured.device, measured.turns
        if measured.is_out_of_memory:
            turns = ()
        batch_size = case.micro_batch_size
        step_ms = [sample for turn in turns for sample in turn.samples_ms]
        elapsed_s = sum(turn.elapsed_s for turn in turns)
        images_per_s = batch_size * len(step_ms) / elapsed_s if turns else None
        peak = self._cpu_peak if device.type == "cpu" else gpu_peak(device.name, case.precision)
        mfu = None
        if peak and images_per_s is not None:
            cost = network_cost(
                get_variant(case.variant), case.image_size, num_classes=case.num_classes
            )
            mfu = 3 * cost.flops * images_per_s / peak.operations_per_s
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
            num_warm_up_steps=measured.warm_up.num_steps if measured.warm_up else 0,
            num_steps=len(step_ms),
            images_per_s=images_per_s,
            step_p50_ms=statistics.median(step_ms) if step_ms else None,
            turn_p50_ms=tuple(statistics.median(turn.samples_ms) for turn in turns),
            compile_s=measured.warm_up.compile_s if measured.warm_up else None,
            peak_memory_bytes=max(turn.peak_memory_bytes for turn in turns) if turns else None,
            predicted_memory_bytes=self.predicted_bytes(case) if case.contender == OURS else None,
            device_memory_bytes=device.memory_bytes,
            mfu=mfu,
            device_peak=describe_peak(peak) if peak else None,
            is_out_of_memory=measured.is_out_of_memory,
            environment=current_environment(),
            started_at=self._started_at,
        )
