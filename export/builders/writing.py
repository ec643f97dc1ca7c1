"""What a runtime's builder made -> an artifact, once it has answered like the eager model."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from efficientnet.formats import artifact as formats
from efficientnet.machine.atomic import sha256_of_file
from efficientnet.machine.environment import current_environment
from efficientnet.runtimes.protocol import VNNI, open_program
from export.checks import logit_agreement
from export.checks.gate import Attempt, Gate, keep_within_drop
from export.checks.sensitivity import rank_blocks
from export.graphs.folding import INPUT_NAME, OUTPUT_NAME
from export.inputs.config import ExportConfig
from export.inputs.reference import Reference

BUILD_LOG = "build.log"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """What a builder left in the artifact's directory."""

    program_file: str
    weight_bytes: int
    other_files: tuple[str, ...] = ()
    """Beside the programs."""
    static_programs: tuple[formats.StaticProgram, ...] = ()
    """Where there is a file for each batch size, program_file among them."""
    static_batches: tuple[int, ...] = ()
    """Of a program of one file: the sizes that its runtime prepares when it opens it."""
    log: tuple[str, ...] = ()
    """Lines for build.log."""
    provider: str | None = None
    opset: int | None = None
    target_device: str = "cpu"
    binding: formats.Binding | None = None
    quantization: formats.QuantizationRecord | None = None


# A program's batch size, or the fewest and the most images of a call.
Batch = int | tuple[int, int]

# Fills an empty directory; the names of the blocks that stay in a higher precision are given to it.
Builder = Callable[[Path, tuple[str, ...]], Built]


def vnni_binding(library: str, rebuild: str) -> formats.Binding:
    """Bind an int8 program whose weights have all 8 bits to processors with VNNI."""
    return formats.Binding(
        library=library,
        version=metadata.version(library),
        compute_capability=None,
        device=VNNI,
        rebuild=rebuild,
    )


def default_output(config: ExportConfig, reference: Reference, name: str) -> Path:
    """Return --output, or artifacts/<variant>/<name>-<precision>."""
    return config.output or Path("artifacts") / reference.variant / f"{name}-{config.precision}"


def program_files(program_file: str, config: ExportConfig) -> dict[str, Batch]:
    """Name a file for each of --batches (model.pt2 -> model-b8.pt2), or one for all of --batch."""
    low, _, high = config.batch
    if config.batches is None and low < high:
        return {program_file: (low, high)}
    stem, _, suffix = program_file.rpartition(".")
    sizes = config.static_batches if config.batches else (high,)
    return {f"{stem}-b{size}.{suffix}": size for size in sizes}


def static_programs(files: Mapping[str, Batch]) -> tuple[formats.StaticProgram, ...]:
    """List the programs that are for one batch size each."""
    sizes = {file: batch for file, batch in files.items() if isinstance(batch, int)}
    return tuple(formats.StaticProgram(batch_size=size, file=file) for file, size in sizes.items())


def write_checked_artifact(
    reference: Reference,
    config: ExportConfig,
    output: Path,
    runtime: str,
    build: Builder,
    can_run_here: bool = True,
    is_judged: bool = True,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Build in a hidden directory, check, write the manifest, and only then take `output`'s place.

    `finish` gets the artifact, complete and still hidden, for what is decided by running it.

    A program that cannot run here is written without parity, and refused until it was checked.
    One that others made of the checkpoint (`is_judged` False) is compared, but not refused.

    Raises:
        CheckpointError: the eager model answers with NaN or infinity; nothing is built.
        ParityError, AccuracyDropError: the program answers otherwise than it may; nothing is
            written.
        GateError: there are no images that a quantised program can be judged by.
    """
    started = time.perf_counter()
    if can_run_here:
        # A network that is broken itself is told before anything is built.
        _ = reference.parity_logits
    with formats.new_artifact_directory(output) as directory:

        def attempt(kept: tuple[str, ...]) -> Attempt:
            tried = directory / f"attempt-{len(kept)}"
            tried.mkdir()
            built = build(tried, kept)
            lines = "".join(f"{line}\n" for line in built.log)
            (tried / BUILD_LOG).write_text(lines, encoding="utf-8")
            return Attempt(tried, _manifest(reference, config, tried, runtime, built))

        if config.is_quantized and can_run_here and is_judged:
            gate = Gate(reference, config.num_gate_images, config.max_drop / 100)

            def judge(built: Attempt) -> Attempt:
                found = gate.measure(open_program(*built))
                manifest = built.manifest.model_copy(update={"gate": found})
                # What parity finds is judged together with the loss.
                return Attempt(
                    built.directory, check_parity(reference, built.directory, manifest, False)
                )

            tried, manifest = keep_within_drop(
                attempt, judge, lambda: rank_blocks(reference, config), config.keeps_blocks
            )
        else:
            tried, manifest = attempt(())
        for file in tried.iterdir():
            file.rename(directory / file.name)
        for other in directory.glob("attempt-*"):
            shutil.rmtree(other)
        if can_run_here and manifest.parity is None:
            manifest = check_parity(reference, directory, manifest, is_judged)
        elif not can_run_here:
            log.info(
                "not checked: it cannot run here, and is refused until "
                "'python export/parity.py %s' has compared it on the machine it is for",
                output,
            )
        seconds = time.perf_counter() - started
        build_record = manifest.build.model_copy(update={"seconds": seconds})
        formats.write_manifest(directory, manifest.model_copy(update={"build": build_record}))
        if finish is not None:
            finish(directory)
    return output


def log_line(directory: Path, line: str) -> None:
    """Log a line, and add it to an artifact's build.log."""
    log.info("%s", line)
    with (directory / BUILD_LOG).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def check_parity(
    reference: Reference,
    directory: Path,
    manifest: formats.ArtifactManifest,
    is_judged: bool = True,
) -> formats.ArtifactManifest:
    """Compare a program with the eager model; return the manifest with what was found."""
    runtime = open_program(directory, manifest)
    tolerances = logit_agreement.tolerances_for(
        manifest.precision, reference.parity_logits, manifest.is_for_time_only
    )
    found = logit_agreement.run_in_batches(
        runtime, reference.parity_images, reference.parity_logits, manifest.prepared_sizes
    )
    parity = logit_agreement.compare_logits(found, reference.parity_logits, tolerances)
    line = (
        f"parity on {parity.num_images} held-out images: "
        f"largest logit error {parity.max_abs_logit_error:.1e} "
        f"(at most {tolerances.max_abs_logit_error:.0e}), "
        f"top-1 agreement {parity.top1_agreement:.1%}, {parity.num_flips} other top-1 classes"
    )
    log_line(directory, line)
    if is_judged:
        logit_agreement.require_parity(parity)
    return manifest.model_copy(update={"parity": parity})


def _manifest(
    reference: Reference, config: ExportConfig, directory: Path, runtime: str, built: Built
) -> formats.ArtifactManifest:
    low, opt = config.batch[0], config.tuned_batch_size
    static_files = (program.file for program in built.static_programs)
    names = list(dict.fromkeys((built.program_file, *static_files, *built.other_files)))
    static_sizes = [program.batch_size for program in built.static_programs]
    highest = max(static_sizes) if static_sizes else config.max_batch_size
    return formats.ArtifactManifest(
        variant=reference.variant,
        architecture=reference.record.architecture,
        runtime=runtime,
        precision=config.precision,
        provider=built.provider,
        program_file=built.program_file,
        program_sha256=sha256_of_file(directory / built.program_file),
        other_files={name: sha256_of_file(directory / name) for name in names[1:]},
        static_programs=built.static_programs,
        static_batches=built.static_batches,
        checkpoint_sha256=reference.record.weights_sha256,
        input=formats.InputSpec(
            name=INPUT_NAME,
            dtype="float32",
            layout="NCHW",
            shape=(3, reference.image_size, reference.image_size),
            batch=formats.BatchRange(
                min=1 if static_sizes else min(low, highest), opt=min(opt, highest), max=highest
            ),
        ),
        output=formats.OutputSpec(
            name=OUTPUT_NAME, dtype="float32", shape=(reference.record.num_classes,)
        ),
        preprocess=reference.preprocess,
        class_names=reference.record.class_names,
        data=reference.record.data,
        build=formats.BuildRecord(
            environment=current_environment(),
            opset=built.opset,
            target_device=built.target_device,
            compute_capability=built.binding.compute_capability if built.binding else None,
            seconds=0.0,
        ),
        binding=built.binding,
        quantization=built.quantization and _with_limits(built.quantization, config),
        parity=None,
        size_bytes=sum((directory / name).stat().st_size for name in names),
        flops_per_image=reference.cost.flops,
        weight_bytes=built.weight_bytes,
    )


def _with_limits(
    record: formats.QuantizationRecord, config: ExportConfig
) -> formats.QuantizationRecord:
    # An artifact that cannot run here is judged elsewhere, by the limits that were asked for.
    limits = {"max_drop": config.max_drop / 100, "num_gate_images": config.num_gate_images}
    return record.model_copy(update=limits)
