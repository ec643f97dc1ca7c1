"""What can be set when a service is put under load."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from efficientnet.command import require_least, require_positive

DrillName = Literal["overload", "slow-clients", "kill", "drain", "change", "artifact", "memory"]


@dataclass(frozen=True)
class LoadConfig:
    """Settings of a load test."""

    artifact: tyro.conf.Positional[Path]
    """What is served."""

    photos: Path
    """Folder of pictures that are sent."""

    seconds: float = 20.0
    """Measured time of each row, above 0."""

    turns: int = 2
    """Turns that this time is split into, at least 1."""

    rates: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
    """Requests a second at planned times, in parts of what the best plain loop does; above 0."""

    schedules: tuple[Literal["poisson", "fixed"], ...] = ("poisson", "fixed")
    """poisson: each moment is as likely as any other; fixed: evenly spaced."""

    batch: int = 8
    """Most images in a call of the network, of the service with batching and of the plain loop;
    above 1."""

    clients: int = 32
    """Clients that saturate the service, each of which waits for its answer."""

    bound_ms: float | None = None
    """Latency within which 99 of 100 requests are to be answered; None = 5 times the plain loop's
    median."""

    num_photos: int = 64
    """Pictures that are sent, the first of the folder."""

    peers: tuple[Literal["litserve", "fastapi"], ...] = ()
    """Services of the same artifact made with other tools, which take part. One whose package is
    missing is skipped with the reason."""

    peer_packages: Path | None = None
    """Folder of packages for the peers only: `pip install --target FOLDER litserve`, which keeps
    the versions that LitServe brings out of our own environment."""

    seed: int = 0
    """Of the Poisson schedule."""

    output: Path = Path("reports/load.json")
    """File that is written; the table and the picture stand beside it."""

    publish: bool = False
    """Write to reports/published/<date>-<device>/, and the table into docs/results.md."""

    readme: Path = Path("docs/results.md")

    def __post_init__(self) -> None:
        require_positive(self, "seconds")
        if not self.rates or not all(0 < rate < float("inf") for rate in self.rates):
            raise ValueError(f"--rates is {list(self.rates)}, expected numbers above 0")
        if not self.schedules:
            raise ValueError("--schedules is empty, expected poisson, fixed or both")
        if self.bound_ms is not None:
            require_positive(self, "bound_ms")
        require_least(self, turns=1, batch=2, clients=1, num_photos=1)


@dataclass(frozen=True)
class DrillsConfig:
    """Settings of the drills."""

    artifact: tyro.conf.Positional[Path]
    """What is served."""

    photos: Path
    """Folder of pictures that are sent."""

    drills: tuple[DrillName, ...] = (
        "overload",
        "slow-clients",
        "kill",
        "drain",
        "change",
        "artifact",
        "memory",
    )
    """Which, in this order."""

    seconds: float = 60.0
    """Of load in the drill overload, above 0; the others take a third of it."""

    slow_clients: int = 1000
    """Clients that send a byte a second, at least 1."""

    requests: int = 200_000
    """In the drill memory, at least 1000."""

    num_photos: int = 64
    """Pictures that are sent, the first of the folder."""

    output: Path = Path("reports/drills")
    """Folder of a record and a table for each drill."""

    publish: bool = False
    """Write to reports/published/<date>-<device>/, and the tables into docs/serving.md."""

    readme: Path = Path("docs/serving.md")

    def __post_init__(self) -> None:
        require_positive(self, "seconds")
        require_least(self, slow_clients=1, requests=1000, num_photos=1)
        if not self.drills:
            raise ValueError("--drills is empty, expected overload, slow-clients, kill, ...")
