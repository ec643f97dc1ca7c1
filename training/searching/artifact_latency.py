"""A trained network -> the latency of its export, relative to that of the exported reference."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.formats.checkpoint import CheckpointRecord, save_checkpoint
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.measuring.clock import Call
from efficientnet.measuring.inputs import map_inputs, prepare_inputs, rotate
from efficientnet.measuring.turns import TimeBudget, measure_calls
from efficientnet.network.variants import VariantSpec
from efficientnet.runtimes import open_runtime
from training.recipe.config import config_to_json
from training.searching.experiment import Experiment, train
from training.searching.search_config import SearchConfig, target_of
from training.searching.step_time import Ratio, ratio_of
from training.searching.study import SearchError

LOG_LINES = 5
SECONDS_OF_ALL_TURNS = 2.0

REFERENCE, ARTIFACT = "reference", "artifact"

log = logging.getLogger(__name__)


class ExportFailedError(PipelineError):
    """A network that the export refuses."""


@dataclass(frozen=True, eq=False)
class ArtifactBench:
    """Exports networks and times them, each in turns with the exported reference."""

    config: SearchConfig
    experiment: Experiment
    folder: Path
    """Of this process alone: several workers of one machine have one folder of results."""

    def export_reference(self, spec: VariantSpec) -> None:
        """Train the reference as all others are, and export it; SearchError where that fails."""
        log.info("training and exporting the reference %s", spec.name)
        _, state = train(self.experiment, spec, self.experiment.base.seed)
        try:
            self._export(spec, state.average.tensors, REFERENCE)
        except ExportFailedError as error:
            raise SearchError(
                f"--target-artifact {self.config.target_artifact}: the reference {spec.name} "
                f"cannot be exported: {error}; mend that, or give another target"
            ) from None

    def measure(self, spec: VariantSpec, weights: dict[str, Tensor], name: str) -> Ratio:
        """Export a network and time single images in turns with the reference."""
        artifacts = {
            "network": self._export(spec, weights, name),
            "reference": self.folder / REFERENCE / ARTIFACT,
        }
        samples, preprocess = self.experiment.dataset.val, self.experiment.preprocess
        inputs = prepare_inputs(samples, preprocess, 1, self.config.seed)
        with inputs.file:
            descriptor = inputs.file.fileno()
            openers = {
                role: partial(_open_call, path, descriptor, inputs.image_size)
                for role, path in artifacts.items()
            }
            budget = TimeBudget(SECONDS_OF_ALL_TURNS, self.config.turns)
            turns = measure_calls(openers, budget, (descriptor,))
        shutil.rmtree(self.folder / name)
        return ratio_of(turns["network"], turns["reference"])

    def _export(self, spec: VariantSpec, weights: dict[str, Tensor], name: str) -> Path:
        config = self.experiment.config_for(spec)
        dataset, folder = self.experiment.dataset, self.folder / name
        record = CheckpointRecord(
            variant=spec.name,
            architecture=config.architecture,
            num_classes=len(dataset.class_names),
            class_names=dataset.class_names,
            network=self.experiment.network,
            preprocess=self.experiment.preprocess,
            data=dataset.source,
            epoch=config.epochs,
            recipe=f"search-{spec.name}",
            train_config=config_to_json(config),
            environment=current_environment(),
        )
        save_checkpoint(folder / "checkpoint", weights, record, train_state=None)
        assert self.config.target_artifact is not None
        command, precision = target_of(self.config.target_artifact)
        artifact = folder / ARTIFACT
        words = [sys.executable, str(PROJECT_ROOT / "export" / command), "--precision", precision]
        words += ["--checkpoint", str(folder / "checkpoint"), "--output", str(artifact)]
        if precision in ("int8", "fp8"):
            # Trained for a few epochs, a network may lose more than one that is served would be
            # allowed to; nor is time spent on keeping blocks.
            words += ["--max-drop", "100"]
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            last = " ".join(done.stderr.strip().splitlines()[-LOG_LINES:])
            raise ExportFailedError(f"export/{command} ended with {done.returncode}: {last}")
        return artifact


@contextmanager
def open_bench(
    config: SearchConfig, experiment: Experiment, reference: VariantSpec
) -> Generator[ArtifactBench | None]:
    """Export the reference; None without a target."""
    if config.target_artifact is None:
        yield None
        return
    with TemporaryDirectory(prefix="artifacts-", dir=config.directory) as folder:
        bench = ArtifactBench(config, experiment, Path(folder))
        bench.export_reference(reference)
        yield bench


def _open_call(artifact: Path, descriptor: int, image_size: int) -> Call:
    infer = open_runtime(artifact, num_usable_cores()).infer
    batches = rotate(map_inputs(descriptor, image_size), 1)
    return lambda: infer(next(batches))
