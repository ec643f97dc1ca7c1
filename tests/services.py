"""An artifact -> a service by `python serving/run.py`, its workers, and what it answers."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from processes import child_pids, process_exists
from service_processes import ServiceProcess

from efficientnet.images.datasets import load_dataset
from serving.demo import free_port, stop, wait_until_ready

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Running:
    process: ServiceProcess
    port: int
    log: Path

    @property
    def workers(self) -> set[int]:
        return {pid for pid in child_pids(self.process.pid) if process_exists(pid)}

    def num_ready(self) -> int:
        return self.log.read_text().count("is ready, process")

    def get(self, path: str) -> httpx.Response:
        # A connection of its own: it may go to any worker.
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=30)

    def classify(self) -> httpx.Response:
        picture = load_dataset("digits").val[0].read()
        files = {"image": ("picture", picture)}
        return httpx.post(f"http://127.0.0.1:{self.port}/classify", files=files, timeout=30)


@contextmanager
def running(artifact: Path, folder: Path, *flags: str, **variables: str) -> Iterator[Running]:
    port, log = free_port(), folder / "service.log"
    command = [sys.executable, "serving/run.py", "--artifact", str(artifact), "--port", str(port)]
    command += flags
    environment = {**os.environ, "BENTOML_HOME": str(folder / "home"), **variables}
    with log.open("wb") as file:
        process = ServiceProcess(command, cwd=ROOT, env=environment, stdout=file)
    try:
        wait_until_ready(process, port, log)
        yield Running(process, port, log)
    finally:
        stop(process)
