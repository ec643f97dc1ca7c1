"""Batches on the CPU -> batches on the device, each copied while the one before is used."""

from collections.abc import Iterable, Iterator

import torch

from training.batches.loader import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on the device; on the CPU they are passed on as they are.

    On a GPU each is copied from pinned memory on a stream of its own, one batch ahead, so that the
    copy does not stand in the way of the computation.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)

    def copy(batch: Batch) -> Batch:
        with torch.cuda.stream(side):
            return batch._replace(
                images=batch.images.to(device, non_blocking=True),
                labels=batch.labels.to(device, non_blocking=True),
            )

    ahead: Batch | None = None
    for batch in batches:
        fresh = copy(batch)
        if ahead is not None:
            yield ahead
        # Only now: the batch handed out next must be there before the computation reads it.
        torch.cuda.current_stream(device).wait_stream(side)
        for tensor in (fresh.images, fresh.labels):
            # Its memory must not be given away while the computation still reads it.
            tensor.record_stream(torch.cuda.current_stream(device))
        ahead = fresh
    if ahead is not None:
        yield ahead
