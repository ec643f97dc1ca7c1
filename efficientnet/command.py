"""What all commands do alike: flags in, log on stderr, answer on stdout, exit code 0, 1 or 2."""

import errno
import importlib
import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import tyro
from pydantic import BaseModel

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.images.tar_index import DatasetError
from efficientnet.machine.atomic import write_text
from efficientnet.machine.children import kill_children_at_exit

Config = TypeVar("Config")

PROJECT_LOGGERS = ("__main__", "efficientnet", "training", "export", "serving", "perf")

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True, kw_only=True)
class JsonFlags:
    """Flags of a command whose result is JSON that is larger than a screen."""

    json: bool = False
    """Print the result as one line of JSON; otherwise it goes to a file, whose path is printed."""

    result_file: ClassVar[Path]


class Terminated(KeyboardInterrupt):
    """SIGTERM, which batch systems and containers send: like Ctrl-C it ends a command in order."""


def parse_flags(
    config_class: type[Config], doc: str | None, args: list[str] | None = None
) -> Config:
    """Fill a config dataclass from the command line; the module's docstring is the help text.

    Wrong flags end the process with exit code 2, and so does a ValueError of the dataclass's own
    checks.
    """
    return tyro.cli(
        config_class, args=args, description=describe(doc), config=(tyro.conf.FlagCreatePairsOff,)
    )


def describe(doc: str | None) -> str | None:
    """Make a docstring the text of --help, which runs lines together that are not indented."""
    return doc and re.sub(r"^ *(?=(python|curl|torchrun) )", "    ", doc, flags=re.MULTILINE)


def require_least(config: object, **least: int) -> None:
    """Refuse flags below the least that they may be; of several values all count, None does not."""
    for name, low in least.items():
        value = getattr(config, name)
        each = value if isinstance(value, tuple) else (value,)
        if value is not None and (not each or min(each) < low):
            found = " ".join(map(str, each)) or "empty"
            raise ValueError(f"{flag_of(name)} is {found}, expected at least {low}")


def require_positive(config: object, *names: str) -> None:
    """Refuse flags that are not more than 0, or not finite."""
    for name in names:
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(
                f"{flag_of(name)} is {getattr(config, name):g}, expected more than 0, and finite"
            )


def require_only_publishing(config: Any, holds: str) -> None:
    """Raise a ValueError that names the flags beside --record: with it nothing else is done.

    `config` has the fields record, publish and readme; `holds` says what a record holds.
    """
    values = {field: getattr(config, field.name) for field in fields(config)}
    given = [
        f"{flag_of(field.name)} {value}"
        for field, value in values.items()
        if field.name not in ("record", "publish", "readme") and value != field.default
    ]
    if config.record is not None and given:
        raise ValueError(
            f"{', '.join(given)} given with --record, which holds {holds}: "
            "give none but --publish and --readme"
        )


def flag_of(name: str) -> str:
    """Return the flag of a field."""
    return f"--{name.replace('_', '-')}"


def late(module: str, needs: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Return the `main` of a module that is imported when it is called.

    So that --help and wrong flags are answered before torch is loaded. `needs`: packages that may
    be missing, whose absence is told in one line.
    """

    def main(config: Any) -> Any:
        try:
            imported = importlib.import_module(module)
        except ImportError as error:
            if not needs:
                raise
            raise PipelineError(
                f"{error}: this command needs {' and '.join(needs)}: 'make setup', or pip install "
                + " ".join(needs)
            ) from error
        return imported.main(config)

    return main


def run_command(
    parse: Callable[[], Config], main: Callable[[Config], Path | BaseModel | str | None]
) -> NoReturn:
    """Parse, run, print what was made on the last line of stdout, and exit.

    Exit codes: 0 done, 1 failed or refused, 2 wrong usage, 130 interrupted by Ctrl-C, 143 ended by
    SIGTERM. A failure that its message explains is printed in one line; anything else is a bug and
    keeps its traceback.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in PROJECT_LOGGERS:  # the libraries' own chatter stays out of the log
        logging.getLogger(name).setLevel(logging.INFO)
    kill_children_at_exit()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        config = parse()
    except (DatasetError, PipelineError, OSError) as error:
        _fail(error, FAILED)
    except ValueError as error:
        _fail(error, WRONG_USAGE)
    try:
        tell(config, main(config))
    except PipelineError as error:
        _fail(error, FAILED)
    except ValueError as error:
        if not _was_raised_here(error):
            raise
        _fail(error, FAILED)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(
                f"the disk is full ({error}); what was written before is whole: "
                "free some space and go on",
                FAILED,
            )
        _fail(error, FAILED)
    except Terminated as end:
        _fail(end, TERMINATED)
    except KeyboardInterrupt as interrupt:
        _fail(str(interrupt) or "interrupted", INTERRUPTED)
    sys.exit(DONE)


def tell(config: object, made: Path | BaseModel | str | None) -> None:
    """Print what a command made: a path, JSON, or the path of a file of JSON (see JsonFlags)."""
    if isinstance(made, BaseModel):
        if isinstance(config, JsonFlags) and not config.json:
            write_text(config.result_file, made.model_dump_json(indent=1) + "\n")
            made = config.result_file
        else:
            made = made.model_dump_json()
    if made is not None:
        print(made)


def _terminate(*_: object) -> None:
    # It may come twice, as torchrun sends it on: the second would break off the cleaning up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated("ended by SIGTERM")


def _was_raised_here(error: BaseException) -> bool:
    # A ValueError of ours speaks of a user's value; one out of a library is a bug to be seen whole.
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    source = Path(trace.tb_frame.f_code.co_filename).resolve() if trace else PROJECT_ROOT
    return source.is_relative_to(PROJECT_ROOT) and "site-packages" not in source.parts


def _fail(reason: object, code: int) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(code)
