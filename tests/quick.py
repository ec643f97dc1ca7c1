"""What takes seconds and is tested once -> stand-ins that other tests take in its place."""

import gc
import pickle
from collections.abc import Callable
from typing import Any

import torch

from efficientnet.errors import PipelineError
from efficientnet.measuring import peaks
from efficientnet.measuring.contender import Contender, ContenderError


def tell_peaks(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Tell peaks of this processor in the place of measuring them; see test_devices.py."""

    def told(_: int, *asked: str) -> dict[str, tuple[float, str]]:
        return dict.fromkeys(asked, (1e12, "told"))

    patch(peaks, "_measure", told)


def hold_contenders_here(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Hold what contenders hold in this process in the place of one each; see test_perf_latency.py.

    It may leave denormals flushed, as in a process of its own: `take_back` is for after it.
    """

    def answer(self: Any, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (PipelineError, ValueError, OSError) as error:
            reason = str(error)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ContenderError(f"{self.name}: {reason}", self)

    def wait(self: Any) -> None:
        self.subject = answer(self, lambda: pickle.loads(self._opener)())

    def ask(self: Any, method: str, *arguments: object) -> Any:
        return answer(self, lambda: getattr(self.subject, method)(*arguments))

    for name, method in (("start", lambda _: None), ("wait", wait), ("ask", ask)):
        patch(Contender, name, method)
    patch(Contender, "stop", lambda self: vars(self).pop("subject", None))


def take_back() -> None:
    """Take back what a contender has set for all its process."""
    gc.enable()
    torch.set_flush_denormal(False)
    torch.set_num_threads(1)
