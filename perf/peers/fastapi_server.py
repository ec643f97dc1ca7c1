"""An artifact -> FastAPI as its pages teach it: a process a core, a picture at a time in each.

python perf/peers/fastapi_server.py ARTIFACT PORT PROCESSES
"""

import os
import sys
import threading

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

from efficientnet.images.preprocess import preprocess
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.probabilities import softmax, top_classes

ARTIFACT = "PEER_ARTIFACT"

app = FastAPI()
lock = threading.Lock()
# Not in the process that only starts the others.
runtime = open_runtime(os.environ[ARTIFACT], num_threads=1) if ARTIFACT in os.environ else None


@app.get("/health")
async def health() -> str:
    """Say that requests are taken."""
    return "ok"


@app.post("/classify")
async def classify(request: Request) -> list[dict[str, float | str]]:
    """Classify the picture that is the body."""
    return await run_in_threadpool(answer, await request.body())


def answer(data: bytes) -> list[dict[str, float | str]]:
    """Return the best classes of an encoded picture."""
    assert runtime is not None
    images = preprocess(data, runtime.info.preprocess)[np.newaxis]
    with lock:
        probabilities = softmax(runtime.infer(images))
    return [
        {"label": runtime.info.class_names[index], "probability": float(probabilities[0, index])}
        for index in top_classes(probabilities, 5)[0]
    ]


if __name__ == "__main__":
    os.environ[ARTIFACT], port, processes = sys.argv[1:]
    uvicorn.run(
        "perf.peers.fastapi_server:app",
        host="127.0.0.1",
        port=int(port),
        workers=int(processes),
        log_level="warning",
        access_log=False,
    )
