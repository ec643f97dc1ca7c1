"""What an artifact is bound to, and this machine -> a refusal where library, version or GPU differ.

Nothing is ever rebuilt silently.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from efficientnet.formats.artifact import ArtifactError, Binding
from efficientnet.machine.gpu import Gpu, why_no_gpu


def require_binding(directory: Path, binding: Binding | None, command: str) -> Binding:
    """Return what a manifest says of the machine that its program is for."""
    if binding is None:
        raise ArtifactError(
            f"{directory}/manifest.json does not say what the program was built for: it is "
            f"damaged; make it again with 'python {command}'"
        )
    return binding


def import_bound(
    directory: Path, package: str, binding: Binding | None, load: Callable[[], Any]
) -> Any:
    """Import the library that a program runs in."""
    try:
        return load()
    # Its Python part without its libraries fails with an OSError.
    except (ImportError, OSError) as error:
        raise ArtifactError(
            f"{directory} needs {package}, which cannot be imported here ({error}); install the "
            f"version that built it: {binding.version if binding else 'unknown'}"
        ) from error


def require_version(directory: Path, binding: Binding, found: str) -> None:
    """Check that a program was built by the version of its library that is here."""
    if found != binding.version:
        raise ArtifactError(
            f"{directory} was built by {binding.library} {binding.version}, here is {found}, and "
            "it runs in the version that built it only: install that one, or run "
            f"'{binding.rebuild}' here"
        )


def require_gpu(directory: Path, binding: Binding, gpu: Gpu | None) -> Gpu:
    """Return the GPU that is here if a program was built for such a one, or for all."""
    if gpu is None:
        raise ArtifactError(
            f"{directory} runs on an NVIDIA GPU ({binding.device}), and none answers here: "
            f"{why_no_gpu()}; 'python export/ort.py' makes an artifact for the CPU"
        )
    built_for = binding.compute_capability
    if built_for is not None and gpu.compute_capability not in built_for.split():
        raise ArtifactError(
            f"{directory} was built for compute capability {built_for} ({binding.device}), this "
            f"device is {gpu.compute_capability} ({gpu.name}): run '{binding.rebuild}' here"
        )
    return gpu
