"""The base of the project's own errors: failures that the message explains."""


class PipelineError(Exception):
    """A broken contract between stages: what was found, what was expected, what to do."""
