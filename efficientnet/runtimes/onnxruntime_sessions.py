"""A program file and a provider -> a session of ONNX Runtime on that provider, and on no other."""

import onnxruntime as ort

from efficientnet.formats.artifact import ArtifactError, ProgramFile
from efficientnet.machine.denormals import are_flushed, flushed_denormals

# Name of the free axis in exported graphs.
BATCH_AXIS = "batch"

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


def require_provider(provider: str) -> None:
    """Check that a provider can be used."""
    found = ort.get_available_providers()
    if provider not in found:
        raise ArtifactError(
            f"this ONNX Runtime has no {provider} (it has {', '.join(found)}); on a machine with "
            "an NVIDIA GPU: 'pip uninstall onnxruntime && pip install onnxruntime-gpu'"
        )


def open_session(
    program: ProgramFile,
    provider: str,
    num_threads: int,
    options: dict[str, str] | None = None,
    batch_size: int | None = None,
    may_spin: bool = True,
) -> ort.InferenceSession:
    """Open a program on one provider, which executes all of it; `batch_size` None = any.

    `may_spin`: see open_runtime.

    Raises:
        ArtifactError: the provider is not in the package, does not start here, or has no kernel for
            a node; or the file is none of ONNX Runtime's.
    """
    require_provider(provider)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = num_threads
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # For its threads: it does not reach the one that calls, and may stay with the one that opens.
    settings.add_session_config_entry("session.set_denormal_as_zero", str(int(are_flushed())))
    if not may_spin:
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if batch_size is not None:
        settings.add_free_dimension_override_by_name(BATCH_AXIS, batch_size)
    why = ""
    if provider != PROVIDERS["cpu"]:
        ort.preload_dlls()
        # What the provider has no kernel for would go to the CPU without a word otherwise; so would
        # all, when it does not start, and the error speaks of the fall-back alone.
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        why = (
            f": {provider} did not start here, or has no kernel for a node (its own lines stand "
            "above): check the driver, CUDA and cuDNN, or export for the cpu provider"
        )
    try:
        with flushed_denormals():
            session = ort.InferenceSession(
                program.data, settings, providers=[(provider, options or {})], enable_fallback=0
            )
    # ONNX Runtime's own exception classes share no public base but Exception.
    except Exception as error:
        raise ArtifactError(f"ONNX Runtime cannot open {program.path}{why}: {error}") from error
    first = session.get_providers()[0]
    if first != provider:
        raise ArtifactError(
            f"{program.path} is for ONNX Runtime's {provider}, and {first} would run in its "
            f"place{why}"
        )
    return session
