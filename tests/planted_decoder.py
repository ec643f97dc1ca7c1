"""The process that forks decoders, with faults planted for the pictures that ask for them."""

import ctypes
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from efficientnet.images import budget
from serving import decoding_process

IS_BROKEN = sys.argv.pop(1) == "broken"


def spin() -> None:
    while True:
        pass


def fail() -> None:
    raise IndexError("list index out of range")


FAULTS = {
    b"hang": lambda: time.sleep(600),
    b"spin": spin,
    b"crash": lambda: ctypes.string_at(0),
    b"killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    b"eat": lambda: np.ones(1_000_000_000, np.uint8),
    b"fault": fail,
    b"network": lambda: socket.create_connection(("127.0.0.1", 80)),
    b"file": lambda: Path(__file__).read_bytes(),
}

original = decoding_process.decode_and_resize
forker = os.getpid()


def decode_and_resize(picture: bytes, *rest: Any) -> Any:
    if os.getpid() != forker and IS_BROKEN:
        FAULTS[b"crash"]()
    if picture in FAULTS:
        FAULTS[picture]()
    return original(picture, *rest)


decoding_process.decode_and_resize = decode_and_resize
budget.MAX_JPEG_SCANS = 10**9  # as for a costly picture of a kind that nobody has thought of
decoding_process.main()
