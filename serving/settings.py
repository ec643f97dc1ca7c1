"""Environment variables CLASSIFIER_... -> Settings, read once when the service starts."""

import difflib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from efficientnet import PROJECT_ROOT
from efficientnet.formats.artifact import MANIFEST_FILE
from efficientnet.machine.environment import num_usable_cores

# pyproject.toml's, which is not there in a bento.
VERSION = "0.1.0"

PREFIX = "CLASSIFIER_"
ARTIFACT_VARIABLE = f"{PREFIX}ARTIFACT"
ARTIFACT_SHA256_VARIABLE = f"{PREFIX}ARTIFACT_SHA256"
DEFAULT_ARTIFACT = PROJECT_ROOT / "artifacts" / "v2-s" / "onnxruntime-fp32"

PROCESS_ENVIRONMENT = {
    "BENTOML_DO_NOT_TRACK": "True",
    # The service has no use for the threads of numpy's linear algebra, and workers are forked from
    # a process that should have none.
    "OPENBLAS_NUM_THREADS": "1",
    # Left alone, glibc keeps what a picture of 50 megapixels took, for each thread: measured 850 MB
    # of resident memory instead of 140 MB after four such pictures. Blocks above the first number
    # of bytes go back to the system at once. Those below are kept, up to the second number, for the
    # next picture: to map them anew was 450 page faults, and a fifth of the time to decode a photo.
    "MALLOC_MMAP_THRESHOLD_": "16000000",
    "MALLOC_TRIM_THRESHOLD_": "32000000",
}

# Connections that the kernel accepts before a worker looks at them.
BACKLOG = 2048

# Kubernetes and Docker's links tell containers where a service named `classifier` is, in variables
# that begin with its name: CLASSIFIER_SERVICE_HOST, CLASSIFIER_PORT_3000_TCP_ADDR.
OF_THE_PLATFORM = re.compile(
    rf"{PREFIX}(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP)(_\w+)?)?|NAME|ENV_\w+)"
)


@dataclass(frozen=True)
class Settings:
    """Limits of the service and the artifact that it serves."""

    artifact: Path = DEFAULT_ARTIFACT
    """Artifact directory. CLASSIFIER_ARTIFACT, where a relative path starts at the folder that
    holds serving/: the processes of a built bento do not share a working directory."""

    artifact_sha256: str = ""
    """SHA-256 of the manifest.json of the only artifact to be served; empty = of the one that is
    there at the start, or that the service is changed to, also for workers that are started later.
    CLASSIFIER_ARTIFACT_SHA256."""

    workers: int = 1
    """Processes, each with the network in memory. CLASSIFIER_WORKERS."""

    drain_s: int = 1
    """Time for which connections are still taken after SIGTERM, when the service says that it is
    not ready. CLASSIFIER_DRAIN_S."""

    max_upload_bytes: int = 20_000_000
    """Largest picture file. CLASSIFIER_MAX_UPLOAD_BYTES."""

    default_top_k: int = 5
    """Classes in an answer when the request does not say. CLASSIFIER_DEFAULT_TOP_K."""

    max_batch: int = 32
    """Pictures in one request to /classify/batch. CLASSIFIER_MAX_BATCH."""

    network_batch: int = 8
    """Most images in one call of the network, of as many requests; 1 = one after the other.
    CLASSIFIER_NETWORK_BATCH."""

    batch_wait_ms: int = 2
    """Longest time for which an image waits for others that are being decoded.
    CLASSIFIER_BATCH_WAIT_MS; 0 = it does not wait."""

    max_concurrency: int = 64
    """Pictures, or batches, that are classified or wait for it, in each worker; one more is
    answered with 429, before its body is read. CLASSIFIER_MAX_CONCURRENCY."""

    timeout_s: int = 60
    """Longest time for a request: 408 if its body has not come by then, else 504.
    CLASSIFIER_TIMEOUT_S."""

    decode_cpu_s: int = 10
    """Processor time that decoding a picture may take; then its decoder is ended.
    CLASSIFIER_DECODE_CPU_S."""

    decode_memory_bytes: int = 1_000_000_000
    """Memory that decoding a picture may take, on Linux. CLASSIFIER_DECODE_MEMORY_BYTES."""

    min_upload_bytes_per_s: int = 1000
    """Least rate of a body, after the first 5 s; then 408. CLASSIFIER_MIN_UPLOAD_BYTES_PER_S."""

    max_connections_per_address: int = 256
    """Connections of one address, in each worker; one more is answered with 429. Fewer than the
    uploads that may be on their way, so that one client cannot take all of them.
    CLASSIFIER_MAX_CONNECTIONS_PER_ADDRESS."""

    allowed_hosts: tuple[str, ...] = ()
    """Names by which the service may be asked, beside IP addresses, localhost and this machine's
    name; * = any. CLASSIFIER_ALLOWED_HOSTS, with commas between them."""

    api_key: str = field(default="", repr=False)
    """What requests must have in `Authorization: Bearer KEY`, all but probes and metrics; empty =
    nothing. CLASSIFIER_API_KEY."""

    cors_origins: tuple[str, ...] = ()
    """Sites whose pages may ask the service, such as https://example.org; * = any.
    CLASSIFIER_CORS_ORIGINS, with commas between them."""

    num_threads: int | None = None
    """CPU threads of one call of the network; None = one per usable core, shared among the workers.
    CLASSIFIER_NUM_THREADS."""

    @property
    def num_decoders(self) -> int:
        """Pictures that each worker decodes at once, each in a process, beside the network."""
        # Two at least, so that a costly picture does not hold up all others.
        return max(2, num_usable_cores() // self.workers)

    @property
    def threads_per_worker(self) -> int:
        """CPU threads of the network in each process."""
        return self.num_threads or max(1, num_usable_cores() // self.workers)


VARIABLES = {f"{PREFIX}{name.upper()}": name for name in Settings.__dataclass_fields__}


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Fill the settings from environment variables; what is unset or empty keeps its default.

    Raises:
        ValueError: a number is not a whole one of at least 1, a hash is none, a key is too short,
            or there is no such setting.
    """
    _refuse_unknown(environment)
    values: dict[str, int | str | Path | tuple[str, ...]] = {}
    for variable, name in VARIABLES.items():
        text = environment.get(variable, "").strip()
        if not text:
            continue
        if name == "artifact":
            values[name] = PROJECT_ROOT / text
        elif name == "artifact_sha256":
            values[name] = _sha256(variable, text)
        elif name == "api_key":
            values[name] = _api_key(variable, text)
        elif name in ("allowed_hosts", "cors_origins"):
            values[name] = tuple(part.strip() for part in text.split(",") if part.strip())
        else:
            values[name] = _count(variable, text, least=0 if name == "batch_wait_ms" else 1)
    return Settings(**values)  # pyright: ignore[reportArgumentType]


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    for variable in environment:
        if not variable.startswith(PREFIX) or variable in VARIABLES:
            continue
        if OF_THE_PLATFORM.fullmatch(variable):
            continue
        # Without the prefix, which all have and which would outweigh the rest.
        names = [known.removeprefix(PREFIX) for known in VARIABLES]
        name = variable.removeprefix(PREFIX)
        nearest = PREFIX + difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
        raise ValueError(
            f"there is no setting {variable}; the nearest is {nearest}, "
            "and docs/serving.md lists all"
        )


def _count(variable: str, text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ValueError(f"{variable} is '{text}', expected a whole number of at least {least}")
    return number


def _api_key(variable: str, text: str) -> str:
    if not re.fullmatch(r"[!-~]{16,}", text):
        raise ValueError(
            f"{variable} has {len(text)} characters, expected at least 16 of ASCII without spaces; "
            "'openssl rand -hex 32' makes one"
        )
    return text


def _sha256(variable: str, text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError(f"{variable} is '{text}', expected 64 hexadecimal digits")
    return text


def artifact_sha256(artifact: Path) -> str:
    """Name an artifact by its manifest, which holds the hashes of its other files."""
    return hashlib.sha256((artifact / MANIFEST_FILE).read_bytes()).hexdigest()
