"""An artifact -> LitServe as its pages teach it: a process a core, each with batches of its own.

python perf/peers/litserve_server.py ARTIFACT PORT PROCESSES BATCH
"""

import sys
from collections.abc import Sequence
from typing import Any

import litserve  # pyright: ignore[reportMissingImports]
import numpy as np
from fastapi import Request
from numpy.typing import NDArray

from efficientnet.images.preprocess import preprocess
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.probabilities import softmax, top_classes

# LitServe's own pages wait so long for a batch to fill; longer would only add to the latency.
BATCH_TIMEOUT_S = 0.002


class Classifier(litserve.LitAPI):
    """Classifies pictures.

    Args:
        artifact: what classifies.
        batch: images in a call.
    """

    def __init__(self, artifact: str, batch: int) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=BATCH_TIMEOUT_S, api_path="/classify")
        self._artifact = artifact

    def setup(self, device: str) -> None:
        """Open the network."""
        self._runtime = open_runtime(self._artifact, num_threads=1)

    def decode_request(self, request: Request) -> NDArray[np.float32]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Prepare the picture of a form."""
        data: bytes = request["image"].file.read()
        return preprocess(data, self._runtime.info.preprocess)

    def batch(self, inputs: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Join prepared pictures."""
        return np.stack(inputs)

    def predict(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """Call the network."""
        return softmax(self._runtime.infer(x if x.ndim == 4 else x[np.newaxis]))

    def unbatch(self, output: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """Split the answers."""
        return list(output)

    def encode_response(self, output: NDArray[np.float64]) -> list[dict[str, Any]]:
        """Return the best classes."""
        names = self._runtime.info.class_names
        return [
            {"label": names[index], "probability": float(output.ravel()[index])}
            for index in top_classes(output.reshape(1, -1), 5)[0]
        ]


if __name__ == "__main__":
    artifact, port, processes, batch = sys.argv[1:]
    server = litserve.LitServer(
        Classifier(artifact, int(batch)), accelerator="cpu", workers_per_device=int(processes)
    )
    server.run(host="127.0.0.1", port=int(port), log_level="warning", generate_client_file=False)
