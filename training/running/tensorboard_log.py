"""Steps and epochs of a run -> TensorBoard."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard.writer import SummaryWriter

from training.running.metrics import EpochMetrics
from training.running.progress import StepReport

STEPS_BETWEEN_POINTS = 10

log = logging.getLogger(__name__)


class TensorBoardLog:
    """Writes loss, learning rate, image size and speed of the steps, and the epochs' results.

    Points after `first_step`, of a run that was killed, are struck out. What cannot be written (a
    full disk) ends this log, with an error in the run's, not the training.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        self._writer: SummaryWriter | None = SummaryWriter(
            str(run / "tensorboard"), purge_step=first_step + 1
        )

    def close(self) -> None:
        """Write what is left."""
        with self._end_if_it_fails():
            if self._writer:
                self._writer.close()

    def on_step(self, report: StepReport) -> None:
        """Write a point for every tenth step."""
        if report.step % STEPS_BETWEEN_POINTS:
            return
        values = {
            "step/learning_rate": report.learning_rate,
            "step/images_per_s": report.images_per_s,
        }
        for name in ("image_size", "randaugment_magnitude", "mixup_alpha", "dropout_rate"):
            values[f"stage/{name}"] = getattr(report.stage, name)
        if report.loss is not None:
            values["step/loss"] = report.loss
        self._write(values, report.step)

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Write an epoch's results."""
        names = ("train_loss", "val_loss", "top1", "top5", "balanced_accuracy", "images_per_s")
        values = {f"epoch/{name}": getattr(metrics, name) for name in names}
        self._write({k: v for k, v in values.items() if v is not None}, metrics.step)
        with self._end_if_it_fails():
            if self._writer:
                self._writer.flush()

    def _write(self, values: dict[str, float], step: int) -> None:
        with self._end_if_it_fails():
            for name, value in values.items():
                if self._writer:
                    self._writer.add_scalar(name, value, step)

    @contextmanager
    def _end_if_it_fails(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            log.error("TensorBoard's log could not be written: %s; training goes on", error)
            self._writer = None
