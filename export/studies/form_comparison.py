"""Checkpoint -> what folding batch norm and fusing squeeze-excite bring, runtime by runtime."""

import importlib
import json
import logging
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch.utils._python_dispatch import TorchDispatchMode

from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import read_artifact
from efficientnet.images.datasets import data_name
from efficientnet.machine.environment import current_environment
from efficientnet.machine.gpu import current_gpu, why_no_gpu
from efficientnet.measuring.turns import turn_ratios
from efficientnet.reporting.publishing import Measured, find_section, publish_record
from efficientnet.reporting.tables import NOTHING, Table, format_ms, format_ratio
from efficientnet.runtimes import names
from export.builders import measuring
from export.graphs.fusion_forms import FORMS, EagerModel, Form, model_in_form, open_eager
from export.inputs.reference import BATCH_SIZE, Reference, load_reference
from export.inputs.study_config import AblationConfig, RuntimeName
from export.studies.ablation_artifacts import make_artifact

SECTION = "fusion"
TITLE = "What folding batch norm and fusing squeeze-excite bring"

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
    executed: dict[str, int] | None = None
    """Kind of layer or operator -> how many a call executes; None where the runtime does not tell
    (AOTInductor)."""
    reason: str | None = None
    """Why it was not measured."""

    @property
    def verdict(self) -> str:
        """Whether the form gains anything: only where no turn says otherwise."""
        if self.reason is not None:
            return f"not measured: {self.reason}"
        if self.form == "nothing":
            return NOTHING
        if max(self.turn_ratios) < 1:
            return "faster"
        return "slower" if min(self.turn_ratios) > 1 else "no gain"


class AblationRecord(Measured):
    """All rows of one run."""

    format_version: Literal[2] = 2
    variant: str
    image_size: int
    """Pixels."""
    checkpoint_sha256: str
    num_parity_images: int
    data: str
    seconds: float
    """Measured for each row."""
    rows: tuple[FormRecord, ...]


def main(config: AblationConfig) -> AblationRecord:
    """Make and measure all forms; return the record."""
    if config.publish:
        find_section(config.readme, SECTION)
    started_at = datetime.now(UTC)
    reference = load_reference(config.export_config)
    rows: list[FormRecord] = []
    for number, runtime in enumerate(config.runtimes, start=1):
        log.info("[%d of %d] %s", number, len(config.runtimes), runtime)
        rows += measure_forms(runtime, reference, config)
    record = AblationRecord(
        variant=reference.variant,
        image_size=reference.image_size,
        checkpoint_sha256=reference.record.weights_sha256,
        num_parity_images=config.num_parity_images,
        data=data_name(reference.dataset.source),
        seconds=config.seconds,
        environment=current_environment(),
        started_at=started_at,
        rows=tuple(rows),
    )
    log.info("%s", "\n".join([table_of(rows).aligned_text(), *executed_lines(rows)]))
    if config.publish:
        text = to_markdown(record)
        publish_record(record, f"{SECTION}.json", config.readme, SECTION, text, TITLE)
    return record


def measure_forms(
    runtime: RuntimeName, reference: Reference, config: AblationConfig
) -> list[FormRecord]:
    """Measure the three forms in a runtime, in turns."""
    reason = why_not_here(runtime)
    if reason is not None:
        log.info("not measured: %s", reason)
        return [FormRecord(runtime=runtime, form=form, reason=reason) for form in FORMS]
    is_eager = runtime in ("torch", "torch-cuda")
    turns, errors, executed = (_measure_eager if is_eager else _measure_artifacts)(
        runtime, reference, config
    )
    return [
        FormRecord(
            runtime=runtime,
            form=form,
            turn_p50_ms=turns[form],
            turn_ratios=tuple(turn_ratios(turns[form], turns["nothing"])),
            max_abs_logit_error=errors[form],
            executed=executed[form],
        )
        for form in FORMS
    ]


def why_not_here(runtime: RuntimeName) -> str | None:
    """Say what a runtime lacks on this machine; None when it runs here."""
    device = "cuda" if runtime.endswith("-cuda") else "cpu"
    try:
        importlib.import_module(names.RUNTIMES[runtime.removesuffix("-cuda")].module)
        if runtime.startswith("aoti"):
            aoti = importlib.import_module("export.builders.aoti_builder")
            aoti.find_target(device, "fp32")
            aoti.require_compiler()
        elif runtime == "tensorrt":
            target = importlib.import_module("export.builders.tensorrt_target")
            target.find_target("tensorrt", "fp32", None)
        elif device == "cuda" and current_gpu() is None:
            return f"no NVIDIA GPU answers here ({why_no_gpu()})"
    # A library without its driver fails with an OSError.
    except (ImportError, OSError, PipelineError) as error:
        return re.split(r"[:;,] ", str(error))[0]
    return None


# Of each form: the medians of its turns, its largest logit error, and what is executed.
Found = tuple[dict[Form, tuple[float, ...]], dict[Form, float], dict[Form, dict[str, int] | None]]


def _measure_eager(runtime: RuntimeName, reference: Reference, config: AblationConfig) -> Found:
    device = "cuda" if runtime == "torch-cuda" else "cpu"
    openers = {form: partial(open_eager, reference.checkpoint, form, device) for form in FORMS}
    images = reference.parity_images
    turns = measuring.measure_callables(openers, images, config.seconds, config.turns)
    errors, executed = dict[Form, float](), dict[Form, dict[str, int] | None]()
    for form in FORMS:
        model = EagerModel(model_in_form(reference.model, form, device), device)
        batches = [images[i : i + BATCH_SIZE] for i in range(0, len(images), BATCH_SIZE)]
        logits = np.concatenate([model(batch) for batch in batches])
        errors[form] = float(np.abs(logits.astype(np.float64) - reference.parity_logits).max())
        with CountOperators() as counted:
            model(images[:1])
        executed[form] = dict(counted.operators.most_common())
    return {form: turns[form] for form in FORMS}, errors, executed


def _measure_artifacts(runtime: RuntimeName, reference: Reference, config: AblationConfig) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            make_artifact(runtime, reference, config.export_config, form, Path(folder) / form)
            for form in FORMS
        ]
        records = measuring.measure(paths, config.seconds, config.turns, 1, config.data)
        errors: dict[Form, float] = {}
        for form, path in zip(FORMS, paths, strict=True):
            parity = read_artifact(path).parity
            assert parity is not None
            errors[form] = parity.max_abs_logit_error
        found = executed_by(runtime, paths, config.data)
        executed = dict[Form, dict[str, int] | None](zip(FORMS, found, strict=True))
    turns = dict[Form, tuple[float, ...]]()
    for form, record in zip(FORMS, records, strict=True):
        turns[form] = record.turn_p50_ms
    return turns, errors, executed


class CountOperators(TorchDispatchMode):
    """Counts torch's operators that are not views, by name."""

    # The profiler's innermost events are allocations and views inside of operators.
    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator."""
        if not func.is_view:
            self.operators[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def executed_by(
    runtime: RuntimeName, paths: Sequence[Path], data: str | None
) -> list[dict[str, int] | None]:
    """Count the layers that artifacts execute by kind, as the runtime tells."""
    if runtime in ("onnxruntime", "openvino"):
        programs = measuring.profile(paths, 1, 1, data)
        return [{kind["kind"]: kind["num_layers"] for kind in p["kinds"]} for p in programs]
    if runtime == "tensorrt":
        files = [json.loads((path / "layers.json").read_text()) for path in paths]
        layers = [file["model.engine"]["Layers"] for file in files]
        return [dict(Counter(layer["LayerType"] for layer in own)) for own in layers]
    return [None for _ in paths]


def table_of(rows: Sequence[FormRecord]) -> Table:
    """Lay out the forms of each runtime; a runtime that is not here gets one line."""
    columns = ("runtime", "form", "p50 ms", "ratio", "range", "logit error", "executed", "gain")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if row.reason is not None:
            if row.form == "nothing":
                lines.append((row.runtime, "all", *[NOTHING] * 5, row.verdict))
            continue
        low, high = min(row.turn_ratios), max(row.turn_ratios)
        is_base = row.form == "nothing"
        lines.append(
            (
                row.runtime,
                FORMS[row.form],
                format_ms(statistics.median(row.turn_p50_ms)),
                format_ratio(statistics.median(row.turn_ratios)),
                NOTHING if is_base else f"{format_ratio(low)} to {format_ratio(high)}",
                f"{row.max_abs_logit_error:.1e}",
                str(sum(row.executed.values())) if row.executed else NOTHING,
                row.verdict,
            )
        )
    return Table(columns, tuple(lines), frozenset({"runtime", "form", "gain"}))


def executed_lines(rows: Sequence[FormRecord]) -> list[str]:
    """Tell for each runtime what it executes of the last form, by kind."""
    return [
        f"{row.runtime}: {', '.join(f'{number} {kind}' for kind, number in row.executed.items())}"
        for row in rows
        if row.form == "fused" and row.executed
    ]


def to_markdown(record: AblationRecord) -> str:
    """Write the table, what is executed, and how it was measured."""
    versions = record.environment.libraries
    wanted = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13")
    libraries = ", ".join(f"{name} {versions[name]}" for name in wanted if name in versions)
    devices = [gpu.partition(",")[0] for gpu in record.environment.gpus]
    cores = f"{record.environment.num_cores} cores of {record.environment.processor}"
    executed = "\n".join(f"- {line}" for line in executed_lines(record.rows))
    return (
        f"{table_of(record.rows).markdown()}\n\n"
        f"What is executed of the last form:\n\n{executed}\n\n"
        f"{record.variant} at {record.image_size} px, batch 1, fp32, "
        f"{', '.join([*devices, cores])}, {libraries}, {record.started_at:%Y-%m-%d} UTC. "
        "Each form in a process of its own, taking turns within its runtime; ms: median of the "
        f"turns' medians, {record.seconds:g} s each; ratio: median of the ratios to 'nothing' "
        "within a turn, and their range, which is 'no gain' where 1 is in it; logit error: the "
        f"largest against the eager model, on {record.num_parity_images} held-out images; "
        "executed: layers that ONNX Runtime and OpenVINO tell in a profile, layers of TensorRT's "
        "engine, operators of eager torch that are not views.\n"
    )
