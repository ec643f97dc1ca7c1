"""A seed -> mutated pictures and requests sent to a service -> what it answered, by status.

    python tests/fuzz_service.py
    python tests/fuzz_service.py --files 1000 --requests 100000 --seed 1

Looked for: a 5xx, an answer that comes late or not at all where one is due, a process that ends or
is replaced, a line of the log that tells of a fault, memory that grows. The exit code is 1 if one
is found, and what was sent then lies in --keep.
"""

import argparse
import io
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from processes import service_at

from efficientnet.images.decoding import IMAGE_FORMATS
from efficientnet.images.preprocess import decode_image
from serving.demo import running_service

# Of the service, and what a busy machine may add to it.
TIMEOUT_S = 30
ALLOWANCE_S = 10.0

# From the third quarter of all that is sent to the last, 25,000 of which each left 400 bytes.
MAX_GROWTH_BYTES = 10_000_000

NUM_CLIENTS = 32
# Sent between two looks at processes and memory.
BLOCK = 500
REQUESTS = "requests"
BOUNDARY = b"fuzz"

# Mutated requests often lack their end, for which the service waits, as it must: only each 50th
# is waited for until it is answered or its connection closed.
PATIENCE_S, PATIENT_EVERY = 1.0, 50
REST_S = 0.5
UNFINISHED, CLOSED = "unfinished", "closed"
FAULTS = re.compile(r"\d{4}-\d\d-\d\dT[^\n]*(?:ERROR|CRITICAL)[^\n]*|Traceback[^\n]*")

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
NUMBERS = (0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
WORDS = (
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\0",
    b":",
    b"%",
    b"%00",
    b"/../",
    b"\xff",
    b"chunked",
    b"-1",
)
WORDS += (b"99999999999999999999", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n")
WORDS += (b"Expect: 100-continue\r\n", b"Host: a\r\nHost: b\r\n", b"--" + BOUNDARY, b"HTTP/1.0")


@dataclass
class Findings:
    """What came of all that was sent."""

    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Of each kind."""
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    sizes: list[int] = field(default_factory=list)
    """Bytes of the service, after each BLOCK."""


def mutate(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Change some bytes, cut, repeat, insert or cross with another; one to eight such changes."""
    mutated = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        if not mutated:
            break
        # Heads of files and requests are where decisions are made.
        limit = rng.choice((32, 256, len(mutated)))
        at = rng.randrange(min(limit, len(mutated)))
        match rng.randrange(8):
            case 0:
                mutated[at] ^= 1 << rng.randrange(8)
            case 1:
                mutated[at] = rng.choice(INTERESTING)
            case 2:
                number = struct.pack(rng.choice("<>") + "I", rng.choice(NUMBERS))
                width = rng.choice((2, 4))
                mutated[at : at + width] = number[-width:]
            case 3:
                del mutated[at : at + rng.choice((1, 4, 64, len(mutated)))]
            case 4:
                part = mutated[at : at + rng.choice((1, 16, 256))]
                mutated[at:at] = part * rng.choice((1, 2, 100))
            case 5:
                mutated[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
            case 6:
                other = rng.choice(others)
                mutated[at:] = other[rng.randrange(len(other)) :]
            case _:
                mutated[at:at] = rng.choice(WORDS)
    return bytes(mutated)


def with_checksums(png: bytes) -> bytes:
    """Put right the checksums of a PNG's chunks, without which nothing of a chunk is looked at."""
    fixed, at = bytearray(png), len(b"\x89PNG\r\n\x1a\n")
    while at + 12 <= len(fixed):
        end = at + 8 + int.from_bytes(fixed[at : at + 4])
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(fixed[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


def pictures() -> dict[str, list[bytes]]:
    """Return small pictures of every kind that the service reads, in all modes and compressions."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    pixels[8:, 8:] = 90
    colored = Image.fromarray(pixels, "RGBA")
    Image.init()
    made: dict[str, list[bytes]] = {kind: [] for kind in IMAGE_FORMATS}
    for kind in IMAGE_FORMATS:
        for mode in ("RGB", "L", "1", "P", "RGBA", "CMYK", "I;16", "LA", "F"):
            image = (colored.convert("L") if mode[0] in "IF" else colored).convert(mode)
            for options in OPTIONS.get(kind, ({},)):
                buffer = io.BytesIO()
                try:
                    image.save(buffer, kind, **options)
                    decode_image(buffer.getvalue())
                except Exception:
                    continue  # not every kind has every mode
                made[kind].append(buffer.getvalue())
        # Frames of other modes than the first one's would have bytes of chance in them.
        if kind in ("PNG", "GIF", "WEBP", "AVIF"):
            buffer = io.BytesIO()
            frames = [colored.convert("RGB"), *(Image.new("RGB", (20, 24), c) for c in COLORS)]
            frames[0].save(
                buffer, kind, save_all=True, append_images=frames[1:], **OPTIONS[kind][-1]
            )
            made[kind].append(without_times(buffer.getvalue()))
    return made


COLORS = ("red", "#123456")
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "JPEG": ({}, {"progressive": True}, {"quality": 20, "restart_marker_rows": 1}),
    "PNG": ({},),
    "GIF": ({}, {"interlace": 1}),
    "WEBP": ({}, {"lossless": True}),
    "AVIF": ({"speed": 10, "max_threads": 1},),
    "TIFF": tuple(
        {"compression": name}
        for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4", "zstd")
    ),
}


def without_times(data: bytes) -> bytes:
    """Take out when an AVIF of several pictures was made, so that a seed gives the same again."""
    fixed = bytearray(data)
    for box in (b"mvhd", b"tkhd", b"mdhd"):
        at = fixed.find(box)
        if at >= 0:
            fixed[at + 8 : at + 24] = bytes(16)
    return bytes(fixed)


def request_of(head: str, body: bytes = b"", **headers: object) -> bytes:
    """Write a request."""
    given = {
        "Host": "localhost",
        "Connection": "close",
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    if body:
        given.setdefault("Content-Length", len(body))
    lines = [f"{head} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def form_of(*pictures: bytes, field: str = "image", top_k: int = 3) -> bytes:
    """Write a form of pictures."""
    parts = b"".join(
        b'--%s\r\nContent-Disposition: form-data; name="%s"; filename="p"\r\n\r\n%s\r\n'
        % (BOUNDARY, field.encode(), picture)
        for picture in pictures
    )
    number = b'--%s\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n%d\r\n'
    return parts + number % (BOUNDARY, top_k) + b"--" + BOUNDARY + b"--\r\n"


def requests(picture: bytes, image_size: int, model: str) -> list[bytes]:
    """Return a request of every kind that the service answers."""
    gets = ("/", "/docs", "/openapi.json", "/info", "/model", "/readyz", "/metrics", "/v2", "/none")
    gets += ("/v2/health/ready", f"/v2/models/{model}", f"/v2/models/{model}/stats", "/favicon.ico")
    form_type = f"multipart/form-data; boundary={BOUNDARY.decode()}"
    one, several = form_of(picture), form_of(picture, b"none", picture, field="images")
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (one[:40], one[40:]))
    infer, shape = f"POST /v2/models/{model}/infer", [1, 3, image_size, image_size]
    values = np.zeros(shape, np.float32).tobytes()
    named = f'{{"name":"input","shape":{shape},"datatype":"FP32"'
    as_json = f'{{"id":"a","inputs":[{named},"data":{[0] * (3 * image_size**2)}}}]}}'.encode()
    size = f'"parameters":{{"binary_data_size":{len(values)}}}'
    head = f'{{"inputs":[{named},{size}}}]}}'.encode()
    length = {
        "Inference_Header_Content_Length": len(head),
        "Content_Type": "application/octet-stream",
    }
    posts = [
        request_of("POST /classify", one, Content_Type=form_type),
        request_of("POST /classify?top_k=2", picture, Content_Type="image/png"),
        request_of("POST /classify", one, Content_Type=form_type, Expect="100-continue"),
        request_of(
            "POST /classify",
            chunks + b"0\r\n\r\n",
            Content_Type=form_type,
            Transfer_Encoding="chunked",
        ).replace(b"Content-Length: %d\r\n" % (len(chunks) + 5), b""),
        request_of("POST /classify/batch", several, Content_Type=form_type),
        request_of(infer, as_json, Content_Type="application/json"),
        request_of(infer, head + values, **length),
        request_of("POST /classify", one, Content_Type="application/json"),
    ]
    ids = {"X_Request_ID": "a" * 20, "Accept": "*/*", "Origin": "https://example.org"}
    return [
        *(request_of(f"GET {path}", **ids) for path in gets),
        request_of("HEAD /"),
        request_of("OPTIONS /classify", **ids),
        request_of("GET /", Connection="Upgrade", Upgrade="websocket") * 2,
        *posts * 3,
    ]


def ask(port: int, request: bytes, patience_s: float) -> tuple[str, float]:
    """Send bytes as they are and nothing after them; return the first status, and the seconds."""
    started = time.monotonic()
    status = ""
    with socket.create_connection(("127.0.0.1", port), timeout=patience_s) as client:
        answer = b""
        try:
            client.sendall(request)
            while received := client.recv(65536):
                answer += received
                found = re.match(rb"(?:HTTP/1.1 100 .*\r\n\r\n)?HTTP/1.1 ([2-5]\d\d)", answer)
                if found and not status:
                    status = found[1].decode()
                    seconds = time.monotonic() - started
                    client.settimeout(REST_S)
        except TimeoutError:
            status = status or UNFINISHED
        except ConnectionError:
            pass
    return status or CLOSED, seconds if status.isdigit() else time.monotonic() - started


def send_all(
    port: int, inputs: Iterator[tuple[str, bytes]], service: psutil.Process, keep: Path
) -> Findings:
    """Send each of the inputs, of which each has a kind; look at answers, processes and memory."""
    findings = Findings()
    processes = [service, *service.children(recursive=True)]

    def send(numbered: tuple[int, tuple[str, bytes]]) -> None:
        number, (kind, request) = numbered
        is_patient = kind != REQUESTS or number % PATIENT_EVERY == 0
        longest_s = TIMEOUT_S + ALLOWANCE_S
        status, seconds = ask(port, request, longest_s if is_patient else PATIENCE_S)
        findings.statuses[kind][status] += 1
        findings.longest_s = max(findings.longest_s, seconds)
        if status[0] == "5" or (is_patient and (seconds > longest_s or status == UNFINISHED)):
            path = keep / f"{kind}-{number}"
            path.write_bytes(request)
            findings.faults.append(f"{status} after {seconds:.1f} s: {path}")

    numbered = enumerate(inputs)
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        while block := list(islice(numbered, BLOCK)):
            list(pool.map(send, block))
            if processes != [service, *service.children(recursive=True)]:
                findings.faults.append(f"a process has ended or come by input {block[-1][0]}")
                return findings
            findings.sizes.append(sum(own_bytes(process) for process in processes))
    return findings


def growth_of(sizes: Sequence[int]) -> float:
    """Compare the last quarter with the one before: the first half warms allocators up."""
    quarter = len(sizes) // 4
    if not quarter:
        return 0.0
    return float(np.mean(sizes[-quarter:]) - np.mean(sizes[-2 * quarter : -quarter]))


def slope_of(sizes: Sequence[int]) -> float:
    """Return how much memory an input of the last half leaves."""
    last = sizes[len(sizes) // 2 :]
    return float(np.polyfit(BLOCK * np.arange(len(last)), last, 1)[0]) if len(last) > 1 else 0.0


def own_bytes(process: psutil.Process) -> int:
    """Return the memory that a process shares with no other."""
    return process.memory_full_info().uss


def fuzz(artifact: Path, num_files: int, num_requests: int, seed: int, keep: Path) -> bool:
    """Send all, print what came of it, and return whether nothing was found."""
    keep.mkdir(parents=True, exist_ok=True)
    log_path = keep / "service.log"
    os.environ["CLASSIFIER_TIMEOUT_S"] = str(TIMEOUT_S)
    is_good = True
    with running_service(artifact, log_path) as port:
        service = service_at(port)
        for inputs in plans_of(port, num_files, num_requests, seed):
            findings = send_all(port, inputs, service, keep)
            for kind, statuses in findings.statuses.items():
                counts = ", ".join(f"{n} x {s}" for s, n in sorted(statuses.items()))
                print(f"{kind}: {counts}")
            sizes = findings.sizes
            print(
                f"longest {findings.longest_s:.2f} s; memory, MB: "
                f"{' '.join(f'{size / 1e6:.0f}' for size in sizes[:: len(sizes) // 20 or 1])}; "
                f"{slope_of(sizes):+.0f} bytes for each of the last half",
                flush=True,
            )
            if (growth := growth_of(sizes)) > MAX_GROWTH_BYTES:
                findings.faults.append(f"memory grew by {growth / 1e6:.1f} MB in the last quarter")
            for fault in findings.faults:
                print(f"FOUND: {fault}")
            is_good &= not findings.faults
    for line in sorted(set(FAULTS.findall(log_path.read_text(errors="replace")))):
        print(f"FOUND in the log: {line}")
        is_good = False
    return is_good


def plans_of(
    port: int, num_files: int, num_requests: int, seed: int
) -> list[Iterator[tuple[str, bytes]]]:
    """Return the files, of all kinds in turn, and the requests: the same for a seed."""
    facts = httpx.get(f"http://127.0.0.1:{port}/model").json()
    by_kind = pictures()
    valid = requests(by_kind["PNG"][0], facts["image_size"], facts["variant"])
    for request in valid:
        require_answered(port, request)
    print(
        ", ".join(f"{len(made)} {kind}" for kind, made in by_kind.items())
        + f" and {len(valid)} requests are mutated, seed {seed}",
        flush=True,
    )

    def files(kind: str) -> Iterator[bytes]:
        for number, mutated in enumerate(mutations(by_kind[kind], num_files, f"{seed} {kind}")):
            if kind == "PNG" and number % 4:
                mutated = with_checksums(mutated)
            yield request_of("POST /classify", mutated or b"\0", Content_Type="image/x")

    # Of one kind after the other, what each takes for the first time would look like a leak.
    in_turn = zip(*(zip(repeat(kind), files(kind)) for kind in by_kind), strict=True)
    whole = zip(repeat(REQUESTS), mutations(valid, num_requests, str(seed)))
    return [
        *([chain.from_iterable(in_turn)] if num_files else []),
        *([whole] if num_requests else []),
    ]


def require_answered(port: int, request: bytes) -> None:
    """Fail unless a request that is not mutated is answered."""
    status, _ = ask(port, request, TIMEOUT_S)
    if status[0] not in "234":
        raise RuntimeError(f"{status} is the answer to {request[:200]!r}")


def mutations(sources: Sequence[bytes], number: int, seed: str) -> Iterator[bytes]:
    """Mutate each of the sources in turn."""
    rng = random.Random(seed)
    for index in range(number):
        yield mutate(sources[index % len(sources)], sources, rng)


def main() -> None:
    """Make a tiny network where none is given, and fuzz a service of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifact", type=Path, help="default: a tiny random network")
    parser.add_argument("--files", type=int, default=10_000, help="of each kind")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("reports/fuzz"))
    arguments = parser.parse_args()
    with ExitStack() as stack:
        artifact = arguments.artifact
        if artifact is None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            artifact = tiny_artifact(scratch)
        is_good = fuzz(
            artifact, arguments.files, arguments.requests, arguments.seed, arguments.keep
        )
    sys.exit(not is_good)


def tiny_artifact(folder: Path) -> Path:
    """Export the network that tests serve."""
    from common_fixtures import write_tiny_checkpoint

    write_tiny_checkpoint(folder / "checkpoint")
    command = [sys.executable, "export/ort.py", "--checkpoint", str(folder / "checkpoint")]
    command += ["--output", str(folder / "artifact")]
    root = Path(__file__).resolve().parents[1]
    subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL)
    return folder / "artifact"


if __name__ == "__main__":
    main()
