"""A runtime and the three forms -> their measured rows, or the reason why there are none."""

import importlib
import logging
import re
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import read_artifact
from efficientnet.machine.gpu import current_gpu, why_no_gpu
from efficientnet.measuring.turns import turn_ratios
from efficientnet.runtimes import names
from export.builders.measuring import measure, measure_callables
from export.graphs.fusable_parts import Executed, count_parts
from export.graphs.fusion_forms import FORMS, EagerModel, Form, model_in_form, open_eager
from export.inputs.config import ExportConfig
from export.inputs.reference import BATCH_SIZE, Reference
from export.inputs.study_config import RuntimeName
from export.studies.ablation_artifacts import MAKERS
from export.studies.executed_layers import executed_by_torch

log = logging.getLogger(__name__)


class FormRecord(BaseModel):
    """One form in one runtime."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: str
    form: Form
    turn_p50_ms: tuple[float, ...] = ()
    """Median of a call in each turn; empty where it was not measured."""
    turn_ratios: tuple[float, ...] = ()
    """Its time over that of 'nothing' within each turn."""
    max_abs_logit_error: float | None = None
    """Against the eager model, on held-out images."""
    executed: Executed | None = None
    reason: str | None = None
    """Why it was not measured."""

    @property
    def p50_ms(self) -> float | None:
        """Median over the turns."""
        return statistics.median(self.turn_p50_ms) if self.turn_p50_ms else None

    @property
    def verdict(self) -> str:
        """Whether the form gains anything: only where no turn says otherwise."""
        if self.reason is not None:
            return f"not measured: {self.reason}"
        if self.form == "nothing":
            return ""
        if max(self.turn_ratios) < 1:
            return "faster"
        return "slower" if min(self.turn_ratios) > 1 else "no gain"


def measure_forms(
    runtime: RuntimeName,
    reference: Reference,
    config: ExportConfig,
    seconds: float,
    turns: int,
    folder: Path,
) -> list[FormRecord]:
    """Measure the three forms in a runtime, in turns; the artifacts stay in the folder."""
    reason = why_not_here(runtime)
    if reason is not None:
        log.info("not measured: %s", reason)
        return [FormRecord(runtime=runtime, form=form, reason=reason) for form in FORMS]
    if runtime in ("torch", "torch-cuda"):
        return _measure_eager(runtime, reference, seconds, turns)
    return _measure_artifacts(runtime, reference, config, seconds, turns, folder)


def why_not_here(runtime: RuntimeName) -> str | None:
    """Say what a runtime lacks on this machine; None when it runs here."""
    device = "cuda" if runtime.endswith("-cuda") else "cpu"
    try:
        importlib.import_module(names.RUNTIMES[runtime.removesuffix("-cuda")].module)
        if runtime.startswith("aoti"):
            aoti = importlib.import_module("export.builders.aoti_export")
            aoti.find_target(aoti.AotiConfig(device=device))
            aoti.aoti_builder.require_compiler()
        elif runtime == "tensorrt":
            importlib.import_module("export.builders.tensorrt_target").find_target(
                "tensorrt", "fp32", None
            )
        elif device == "cuda" and current_gpu() is None:
            return f"no NVIDIA GPU answers here ({why_no_gpu()})"
    # A library without its driver fails with an OSError.
    except (ImportError, OSError, PipelineError) as error:
        return re.split(r"[:;,] ", str(error))[0]
    return None


def _measure_eager(
    runtime: RuntimeName, reference: Reference, seconds: float, turns: int
) -> list[FormRecord]:
    device = "cuda" if runtime == "torch-cuda" else "cpu"
    openers = {form: partial(open_eager, reference.checkpoint, form, device) for form in FORMS}
    images = reference.parity_images
    measured = measure_callables(openers, images, seconds, turns)
    rows: list[FormRecord] = []
    for form in FORMS:
        model = EagerModel(model_in_form(reference.model, form, device), device)
        batches = [images[i : i + BATCH_SIZE] for i in range(0, len(images), BATCH_SIZE)]
        logits = np.concatenate([model(batch) for batch in batches])
        error = float(np.abs(logits.astype(np.float64) - reference.parity_logits).max())
        executed = executed_by_torch(model, images[:1], count_parts(reference.model))
        rows.append(_row(runtime, form, measured, error, executed))
    return rows


def _measure_artifacts(
    runtime: RuntimeName,
    reference: Reference,
    config: ExportConfig,
    seconds: float,
    turns: int,
    folder: Path,
) -> list[FormRecord]:
    made = {form: MAKERS[runtime](reference, config, form, folder / form) for form in FORMS}
    manifests = {form: read_artifact(made[form].artifact) for form in FORMS}
    paths = [made[form].artifact for form in FORMS]
    records = measure(paths, seconds, turns, 1, config.data)
    measured = {form: r.turn_p50_ms for form, r in zip(FORMS, records, strict=True)}
    rows: list[FormRecord] = []
    for form in FORMS:
        parity = manifests[form].parity
        assert parity is not None
        error = parity.max_abs_logit_error
        rows.append(_row(runtime, form, measured, error, made[form].executed))
    return rows


def _row(
    runtime: str,
    form: Form,
    measured: Mapping[str, Sequence[float]],
    error: float,
    executed: Executed,
) -> FormRecord:
    turns = measured[form]
    return FormRecord(
        runtime=runtime,
        form=form,
        turn_p50_ms=tuple(turns),
        turn_ratios=tuple(turn_ratios(turns, measured["nothing"])),
        max_abs_logit_error=error,
        executed=executed,
    )
