"""An artifact -> each step from the eager model to it, compared on held-out images.

Eager model -> batch norm folded -> ONNX graph in float32 -> ONNX graph in the artifact's precision
-> the artifact. The first that answers differently is the one at fault.
"""

import copy
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from efficientnet.formats.artifact import ArtifactManifest, ParityTolerances
from efficientnet.network.model import EfficientNet
from efficientnet.precision import Precision
from efficientnet.runtimes.protocol import open_program
from export.checks import layers, logit_agreement
from export.checks.stepwise_record import ParityStepRecord, StepwiseParityRecord
from export.graphs.calibration import CALIBRATION_FILE, CalibrationError
from export.graphs.folding import INPUT_NAME, export_onnx, fold_batch_norm
from export.graphs.precision import typed_graph
from export.inputs.config import ExportConfig
from export.inputs.reference import BATCH_SIZE, Reference, answer_of

# Of the logits' standard deviation, in float64 on both sides: what folding changes is the rounding
# of weights to float32 (1.4e-7 of V2-B0), and the order of additions in float32 would hide it.
FOLD_TOLERANCE = 1e-5

# It is a matter of the weights more than of the images, and CPUs are slow in float64.
NUM_FOLD_IMAGES = 16


Array = NDArray[np.floating]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComparedStep:
    """A step that was compared, or skipped."""

    record: ParityStepRecord
    precision: Precision = "fp32"
    worst: NDArray[np.float32] | None = None
    """Some of its images, the largest logit error first."""
    show: layers.Show | None = None
    """None where nobody can look inside."""


class StepwiseParity:
    """The steps from one checkpoint; those that its artifacts share are run once."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def compare(
        self, directory: Path, manifest: ArtifactManifest, wants_layers: bool = False
    ) -> StepwiseParityRecord:
        """Compare every step with the eager model; with `wants_layers` look into the first bad one.

        All steps are run, also those after one that breaks: each starts at the checkpoint again.
        """
        reference, runtime = self._reference, open_program(directory, manifest)
        steps = [*self._shared]
        named = _graph_of_artifact(reference, directory, manifest)
        if named is not None:
            steps.append(self._compare_graph(*named, manifest.precision, manifest.is_for_time_only))
        provider = f" ({manifest.provider})" if manifest.provider else ""
        found = logit_agreement.run_in_batches(
            runtime, reference.parity_images, reference.parity_logits, manifest.prepared_sizes
        )
        name = f"{manifest.runtime}{provider} {manifest.precision}"
        show = _show_of_artifact(directory, manifest)
        is_for_time_only = manifest.is_for_time_only
        steps.append(self._compare(name, manifest.precision, found, show, is_for_time_only))
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
            steps=tuple(step.record for step in steps),
            first_broken=None if broken is None else steps[broken].record.name,
            layers=_compare_layers(reference.model, seen) if wants_layers else None,
        )

    @cached_property
    def _shared(self) -> tuple[ComparedStep, ...]:
        reference = self._reference
        folded = fold_batch_norm(reference.model)
        show = partial(layers.show_model, folded)
        answer = answer_of(folded, reference.parity_images)
        # ONNX Runtime without its graph optimisations executes what is written, node by node: this
        # step is about the export alone. What an optimiser makes of it is the artifact's matter.
        graph = export_onnx(reference.model, reference.image_size)
        return (
            _compare_fold(reference, folded),
            self._compare("batch norm folded, fp32", "fp32", answer, show),
            self._compare_graph("ONNX fp32, not optimized", graph, "fp32"),
        )

    def _compare_graph(
        self,
        name: str,
        graph: onnx.ModelProto | str,
        precision: Precision,
        is_for_time_only: bool = False,
    ) -> ComparedStep:
        # A text is the reason why there is no graph.
        if isinstance(graph, str):
            return ComparedStep(ParityStepRecord(name=name, skipped=graph))
        try:
            session = layers.open_session(graph, is_optimized=False)
        except NoKernel as error:
            reason = f"ONNX Runtime's CPU provider cannot run it: {error}"
            return ComparedStep(ParityStepRecord(name=name, skipped=reason))
        images = self._reference.parity_images
        batches = (images[i : i + BATCH_SIZE] for i in range(0, len(images), BATCH_SIZE))
        found = [np.asarray(session.run(None, {INPUT_NAME: batch})[0]) for batch in batches]
        show = partial(layers.show_onnx, graph, False)
        answers = np.concatenate(found).astype(np.float32)
        return self._compare(name, precision, answers, show, is_for_time_only)

    def _compare(
        self,
        name: str,
        precision: Precision,
        found: Array,
        show: layers.Show | None,
        is_for_time_only: bool = False,
    ) -> ComparedStep:
        logits, images = self._reference.parity_logits, self._reference.parity_images
        tolerances = logit_agreement.tolerances_for(precision, logits, is_for_time_only)
        return _compare(name, precision, found, logits, tolerances, images, show)


def _compare(
    name: str,
    precision: Precision,
    found: Array,
    expected: Array,
    tolerances: ParityTolerances,
    images: NDArray[np.float32],
    show: layers.Show | None,
) -> ComparedStep:
    parity = logit_agreement.compare_logits(found, expected, tolerances)
    problem = logit_agreement.problem_of(parity)
    log.info("%s: %s", name, problem or "agrees")
    errors = logit_agreement.logit_errors(found, expected).max(axis=1)
    worst = images[np.argsort(-errors, kind="stable")[: layers.NUM_IMAGES]]
    record = ParityStepRecord(name=name, parity=parity, problem=problem)
    return ComparedStep(record, precision, worst, show)


def _compare_layers(model: EfficientNet, compared: Sequence[ComparedStep]) -> layers.LayersRecord:
    # Of the last step, or of the last before it that lets one look inside.
    step = next(c for c in reversed(compared) if c.show)
    assert step.show is not None and step.worst is not None
    name, last, note = step.record.name, compared[-1].record.name, None
    if name != last:
        note = f"{last} does not show what its layers put out; these are of the nearest that does"
    return layers.compare_layers(model, step.show, step.worst, step.precision, name, note)


def _compare_fold(reference: Reference, folded: EfficientNet) -> ComparedStep:
    step = max(1, len(reference.parity_images) // NUM_FOLD_IMAGES)
    images = reference.parity_images[::step][:NUM_FOLD_IMAGES]
    expected, found = (
        answer_of(copy.deepcopy(model).double(), images.astype(np.float64))
        for model in (reference.model, folded)
    )
    error = FOLD_TOLERANCE * float(expected.std())
    tolerances = ParityTolerances(
        max_abs_logit_error=error, min_top1_agreement=1.0, flip_margin=error
    )
    name, show = "batch norm folded, in float64", partial(layers.show_model, folded)
    return _compare(name, "fp32", found, expected, tolerances, images, show)


def _graph_of_artifact(
    reference: Reference, directory: Path, manifest: ArtifactManifest
) -> tuple[str, onnx.ModelProto | str] | None:
    # Name and graph that the artifact's runtime is given, or why there is none; None where it is
    # the float32 one.
    precision = manifest.precision
    is_file = manifest.runtime == "onnxruntime"
    name = f"{manifest.program_file}, not optimized" if is_file else f"ONNX {precision}"
    makes_its_own = manifest.runtime in ("openvino", "native")
    if precision == "bf16" and not makes_its_own:
        return name, "ONNX Runtime's CPU provider has no convolution in bf16"
    if is_file:
        return name, onnx.load(directory / manifest.program_file)
    if precision == "fp32" or makes_its_own:
        return None
    if precision == "fp16":
        return name, export_onnx(reference.model, reference.image_size, "fp16")
    quantization = manifest.quantization
    if quantization is None:
        return name, "manifest.json does not tell how the ranges were chosen"
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
        return name, f"the calibration cannot be repeated: {error}"
    assert typed.quantization is not None
    if typed.quantization.calibration_sha256 != quantization.calibration_sha256:
        return name, "the images that it was calibrated with are not here"
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
        return partial(layers.show_openvino, program, precision)
    if manifest.runtime == "native":
        return partial(layers.show_native, program)
    return None
