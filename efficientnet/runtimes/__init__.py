"""A path on disk -> something that turns images into logits; see open_runtime."""

from efficientnet.runtimes.protocol import ProgramInfo, Runtime, open_runtime

__all__ = ["ProgramInfo", "Runtime", "open_runtime"]
