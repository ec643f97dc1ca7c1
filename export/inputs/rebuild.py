"""A command's config -> the command line that makes the same artifact again elsewhere."""

import shlex
from dataclasses import MISSING, fields, replace
from pathlib import Path

from export.inputs.config import ExportConfig


def rebuild_command(script: str, config: ExportConfig, checkpoint: Path) -> str:
    """Write the command line: all settings that are not the default."""
    words = ["python", script]
    if checkpoint.is_relative_to(Path.cwd()):
        checkpoint = checkpoint.relative_to(Path.cwd())
    config = replace(config, checkpoint=checkpoint)
    for field in fields(config):
        value, default = getattr(config, field.name), field.default
        assert default is not MISSING
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{flag}" if value else f"--no-{flag}"] if value != default else []
        elif value != default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{flag}", *map(str, values)]
    return shlex.join(words)
