"""Table of runtimes -> export commands with their flags, for every artifact that one can make."""

from dataclasses import dataclass

from efficientnet.precision import Precision
from efficientnet.runtimes.names import RUNTIMES


@dataclass(frozen=True)
class Candidate:
    """One export command with its flags."""

    command: str
    name: str
    """First part of the artifact's directory."""
    precision: Precision
    flags: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """As people write it."""
        return f"{self.name} {self.precision}"


# Those for the CPU first.
CANDIDATES = tuple(
    Candidate(row.command, export.name, precision, export.flags)
    for device in ("cpu", "cuda")
    for row in RUNTIMES.values()
    for export in row.exports
    if export.device == device
    for precision in export.precisions
)

COMMANDS = tuple(dict.fromkeys(candidate.command for candidate in CANDIDATES))
