"""An artifact -> each step from the eager model to it, compared on held-out images.

Eager model -> batch norm folded -> ONNX graph in float32 -> ONNX graph in the artifact's precision
-> the artifact. The first that answers differently is the one at fault.
"""

import copy
import importlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from efficientnet.formats.artifact import (
    ArtifactManifest,
    ParityTolerances,
)
from efficientnet.network.model import EfficientNet
from efficientnet.precision import Precision
from efficientnet.runtimes.protocol import open_program
from export.checks import layers, logit_agreement
from export.checks.stepwise_record import ParityStepRecord, StepwiseParityRecord
from export.graphs.calibration import CALIBRATION_FILE, CalibrationError
from export.graphs.folding import INPUT_NAME, export_onnx, fold_batch_norm
from export.graphs.precision import typed_graph
from export.inputs.config import ExportConfig
from export.inputs.reference import BATCH_SIZE, Reference

# Folding batch norm changes the function only by rounding the folded weights to float32. That is
# what is limited here, computed in float64 on both sides: in float32 the order of additions alone
# moves the logits by more, and would hide it (V2-B0 with logits up to 3.6: 1.4e-7 by the fold,
# 1.7e-6 in all). In units of the eager logits' standard deviation.
FOLD_TOLERANCE = 1e-5

# It is a matter of the weights more than of the images, and CPUs are slow in float64.
NUM_FOLD_IMAGES = 16


Array = NDArray[np.floating]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParityStep:
    """A step that can be run."""

    name: str
    precision: Precision
    images: NDArray[np.float32]
    expected: Array
    """The eager model's logits for them."""
    tolerances: ParityTolerances
    answer: Callable[[NDArray[np.float32]], Array]
    show: layers.Show | None
    """None where nobody can look inside."""


@dataclass(frozen=True)
class Skipped:
    """A step that cannot be run here."""

    name: str
    reason: str


@dataclass(frozen=True)
class ComparedStep:
    """A step that was compared, or skipped."""

    record: ParityStepRecord
    step: ParityStep | None = None
    """None where it was skipped."""
    worst: NDArray[np.intp] | None = None
    """Indices of its images, the largest logit error first."""


class StepwiseParity:
    """The steps from one checkpoint; those that its artifacts share are run once."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def compare(
        self, directory: Path, manifest: ArtifactManifest, wants_layers: bool = False
    ) -> StepwiseParityRecord:
        """Compare every step with the eager model; with `wants_layers` look into the first bad one.

        All steps are run, also those after one that breaks: each starts at the checkpoint again.

        Raises:
            ArtifactError: the artifact cannot be opened here; before anything else is done.
        """
        reference, runtime = self._reference, open_program(directory, manifest)
        steps = [*self._shared]
        graph = _graph_of_artifact(reference, directory, manifest)
        if graph is not None:
            steps.append(self._compare_graph(graph, manifest.precision))
        provider = f" ({manifest.provider})" if manifest.provider else ""
        artifact = self._parity_step(
            f"{manifest.runtime}{provider} {manifest.precision}",
            manifest.precision,
            partial(
                logit_agreement.run_in_batches,
                runtime,
                expected=reference.parity_logits,
                sizes=manifest.prepared_sizes,
            ),
            _show_of_artifact(directory, manifest),
        )
        steps.append(_compare(artifact))
        broken = next((i for i, step in enumerate(steps) if step.record.problem), None)
        seen = steps if broken is None else steps[: broken + 1]
        return StepwiseParityRecord(
            artifact=str(directory),
            program_sha256=manifest.program_sha256,
            checkpoint_sha256=manifest.checkpoint_sha256,
            variant=manifest.variant,
            runtime=manifest.runtime,
            precision=manifest.precision,
            image_size=reference.image_size,
            rungs=tuple(step.record for step in steps),
            first_broken=None if broken is None else steps[broken].record.name,
            layers=_compare_layers(reference.model, seen) if wants_layers else None,
        )

    @cached_property
    def _shared(self) -> tuple[ComparedStep, ...]:
        reference = self._reference
        folded = fold_batch_norm(reference.model)
        steps = [
            _compare(_fold_step(reference, folded)),
            _compare(
                self._parity_step(
                    "batch norm folded, fp32",
                    "fp32",
                    partial(_answer_of_model, folded),
                    partial(layers.show_model, folded),
                )
            ),
        ]
        # ONNX Runtime without its graph optimisations executes what is written, node by node: this
        # step is about the export alone. What an optimiser makes of it is the artifact's matter.
        graph = export_onnx(reference.model, reference.image_size)
        steps.append(self._compare_graph(("ONNX fp32, not optimized", graph), "fp32"))
        return tuple(steps)

    def _compare_graph(
        self, named: tuple[str, onnx.ModelProto] | Skipped, precision: Precision
    ) -> ComparedStep:
        if isinstance(named, Skipped):
            return ComparedStep(ParityStepRecord(name=named.name, skipped=named.reason))
        name, graph = named
        try:
            answer = _answer_of_graph(graph)
        except NoKernel as error:
            reason = f"ONNX Runtime's CPU provider cannot run it: {error}"
            return ComparedStep(ParityStepRecord(name=name, skipped=reason))
        return _compare(
            self._parity_step(name, precision, answer, partial(layers.show_onnx, graph, False))
        )

    def _parity_step(
        self,
        name: str,
        precision: Precision,
        answer: Callable[[NDArray[np.float32]], Array],
        show: layers.Show | None,
    ) -> ParityStep:
        logits = self._reference.parity_logits
        tolerances = logit_agreement.tolerances_for(precision, logits)
        images = self._reference.parity_images
        return ParityStep(name, precision, images, logits, tolerances, answer, show)


def _compare(step: ParityStep) -> ComparedStep:
    found = step.answer(step.images)
    parity = logit_agreement.compare_logits(found, step.expected, step.tolerances)
    problem = logit_agreement.problem_of(parity)
    log.info("%s: %s", step.name, problem or "agrees")
    errors = logit_agreement.logit_errors(found, step.expected)
    worst = np.argsort(-errors.max(axis=1), kind="stable")
    return ComparedStep(
        ParityStepRecord(name=step.name, parity=parity, problem=problem), step, worst
    )


def _compare_layers(model: EfficientNet, compared: Sequence[ComparedStep]) -> layers.LayersRecord:
    # Of the last step, or of the last before it that lets one look inside.
    shown = next(c for c in reversed(compared) if c.step and c.step.show)
    step, worst, last = shown.step, shown.worst, compared[-1].record.name
    assert step is not None and step.show is not None and worst is not None
    note = None
    if step.name != last:
        note = f"{last} does not show what its layers put out; these are of the nearest that does"
    images = step.images[worst[: layers.NUM_IMAGES]]
    return layers.compare_layers(model, step.show, images, step.precision, step.name, note)


def _fold_step(reference: Reference, folded: EfficientNet) -> ParityStep:
    step = max(1, len(reference.parity_images) // NUM_FOLD_IMAGES)
    images = reference.parity_images[::step][:NUM_FOLD_IMAGES]
    expected = _answer_of_model(copy.deepcopy(reference.model).double(), images.astype(np.float64))
    error = FOLD_TOLERANCE * float(expected.std())
    return ParityStep(
        "batch norm folded, in float64",
        "fp32",
        images,
        expected,
        ParityTolerances(max_abs_logit_error=error, min_top1_agreement=1.0, flip_margin=error),
        lambda x: _answer_of_model(copy.deepcopy(folded).double(), x.astype(np.float64)),
        partial(layers.show_model, folded),
    )


def _graph_of_artifact(
    reference: Reference, directory: Path, manifest: ArtifactManifest
) -> tuple[str, onnx.ModelProto] | Skipped | None:
    # The graph that the artifact's runtime is given; None where it is the float32 one.
    precision = manifest.precision
    is_file = manifest.runtime == "onnxruntime"
    name = f"{manifest.program_file}, not optimized" if is_file else f"ONNX {precision}"
    makes_its_own = manifest.runtime in ("openvino", "native")
    if precision == "bf16" and not makes_its_own:
        return Skipped(name, "ONNX Runtime's CPU provider has no convolution in bf16")
    if is_file:
        return name, onnx.load(directory / manifest.program_file)
    if precision == "fp32" or makes_its_own:
        return None
    if precision == "fp16":
        return name, export_onnx(reference.model, reference.image_size, "fp16")
    quantization = manifest.quantization
    if quantization is None:
        return Skipped(name, "manifest.json does not tell how the ranges were chosen")
    try:
        seed = json.loads((directory / CALIBRATION_FILE).read_text(encoding="utf-8"))["seed"]
        config = ExportConfig(
            precision=precision,
            num_calibration_images=quantization.num_calibration_images,
            seed=seed,
        )
        scheme = "tensorrt-fp8" if precision == "fp8" else "tensorrt"
        with tempfile.TemporaryDirectory() as folder:
            in_float = (*quantization.kept_blocks, *quantization.float_layers)
            typed = typed_graph(reference, config, in_float, scheme, Path(folder))
    except (FileNotFoundError, CalibrationError) as error:
        return Skipped(name, f"the calibration cannot be repeated: {error}")
    assert typed.quantization is not None
    if typed.quantization.calibration_sha256 != quantization.calibration_sha256:
        return Skipped(name, "the images that it was calibrated with are not here")
    return name, typed.model


def _show_of_artifact(directory: Path, manifest: ArtifactManifest) -> layers.Show | None:
    # TensorRT and compiled torch programs fuse other layers when some are made outputs, by which a
    # fault can vanish (NVIDIA/TensorRT#4338), or have no layers left.
    program = directory / manifest.program_file
    if manifest.runtime == "onnxruntime" and manifest.provider is None:
        return partial(layers.show_onnx, onnx.load(program), True)
    if manifest.runtime == "openvino":
        quantization = manifest.quantization
        precision = quantization.kept_precision if quantization else manifest.precision
        # Imported only for its artifacts, so that OpenVINO is not needed by the others.
        return partial(
            importlib.import_module("export.checks.openvino_layers").show_openvino,
            program,
            precision,
        )
    if manifest.runtime == "native":
        return partial(importlib.import_module("export.checks.native_layers").show_native, program)
    return None


def _answer_of_model(model: EfficientNet, images: Array) -> Array:
    with torch.inference_mode():
        batches = torch.from_numpy(images).split(BATCH_SIZE)
        return torch.cat([model(batch) for batch in batches]).numpy()


def _answer_of_graph(graph: onnx.ModelProto) -> Callable[[NDArray[np.float32]], Array]:
    session = layers.open_session(graph, is_optimized=False)

    def answer(images: NDArray[np.float32]) -> Array:
        starts = range(0, len(images), BATCH_SIZE)
        batches = [session.run(None, {INPUT_NAME: images[i : i + BATCH_SIZE]})[0] for i in starts]
        return np.concatenate([np.asarray(batch, dtype=np.float32) for batch in batches])

    return answer
