"""Steps and epochs of a run -> TensorBoard."""

from pathlib import Path
from typing import Self

from torch.utils.tensorboard.writer import SummaryWriter

from training.loop import StepReport
from training.metrics import EpochMetrics

STEPS_BETWEEN_POINTS = 10


class TensorBoardLog:
    """Writes loss, learning rate, image size and speed of the steps, and the epochs' results.

    Args:
        run: the run's directory; TensorBoard reads its folder `tensorboard`.
        first_step: points after it, of a run that was killed, are struck out.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def __enter__(self) -> Self:
        """Do nothing more."""
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is left."""
        self._writer.close()

    def on_step(self, report: StepReport) -> None:
        """Write a point for every tenth step."""
        if report.step % STEPS_BETWEEN_POINTS:
            return
        for name, value in (
            ("step/loss", report.loss),
            ("step/learning_rate", report.learning_rate),
            ("step/images_per_s", report.images_per_s),
            ("stage/image_size", report.stage.image_size),
            ("stage/randaugment_magnitude", report.stage.randaugment_magnitude),
            ("stage/mixup_alpha", report.stage.mixup_alpha),
            ("stage/dropout_rate", report.stage.dropout_rate),
        ):
            self._writer.add_scalar(name, value, report.step)

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Write an epoch's results."""
        for name in ("train_loss", "val_loss", "top1", "top5", "images_per_s"):
            self._writer.add_scalar(f"epoch/{name}", getattr(metrics, name), metrics.step)
        self._writer.flush()
