"""Contenders, a time budget -> what each turn of each gave, and the ratios within the turns.

The words, wherever programs are compared: a contender takes turns with others, of which only one
computes at a time; a turn gives samples; two contenders are compared by their ratio within each
turn, since what the machine did meanwhile happened to both; and the ratio of the reference to
itself, which takes part a second time under another name, is the noise.
"""

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

from efficientnet.measuring.clock import SETTLING_FRACTION, Call, TimedCall
from efficientnet.measuring.contender import Contender, running

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


@dataclass(frozen=True)
class TimeBudget:
    """How long things take, derived from the seconds measured of each contender."""

    seconds: float
    num_turns: int
    max_windows: int = 30
    """Of a warm-up that does not settle."""
    num_parts: int = 1
    """Budgets such as this one that a longer one was split into."""

    @property
    def turn_s(self) -> float:
        """Length of a turn."""
        return self.seconds / self.num_turns

    @property
    def window_s(self) -> float:
        """Length of a warm-up's window: a second, less when all is short."""
        return min(1.0, self.num_parts * self.seconds / 10)

    @property
    def warm_up_s(self) -> float:
        """Longest warm-up."""
        return self.max_windows * self.window_s

    @property
    def planned_s(self) -> float:
        """Time for a warm-up that is stable at once and all turns."""
        return 3 * self.window_s + self.seconds * (1 + SETTLING_FRACTION)

    def split(self, num_parts: int) -> list["TimeBudget"]:
        """Deal the turns out to parts, as evenly as they go, and to each at least one."""
        turns = [len(range(part, self.num_turns, num_parts)) for part in range(num_parts)]
        return [
            replace(self, seconds=self.turn_s * own, num_turns=own, num_parts=num_parts)
            for own in turns
        ]


def take_turns(
    contenders: Iterable[Name], num_turns: int, turn: Callable[[Name, int], Result]
) -> dict[Name, list[Result]]:
    """Call `turn` for each contender and the number of its turn from 0; return what it gave."""
    results: dict[Name, list[Result]] = {contender: [] for contender in contenders}
    order = list(results)
    for number in range(num_turns):
        for contender in order:
            results[contender].append(turn(contender, number))
        # There and back: a machine that gets slower or faster meanwhile favors nobody.
        order.reverse()
    return results


def measure_calls(
    openers: Mapping[str, Callable[[], Call]], budget: TimeBudget, descriptors: Sequence[int] = ()
) -> dict[str, tuple[float, ...]]:
    """Let calls take turns, each in a process of its own; return each turn's median in ms.

    An opener, which is pickled, makes a call in its process; `descriptors` are of open files that
    they need. A process that fails is a ContenderError.
    """
    contenders = {
        name: Contender(name, partial(_timed, opener), descriptors)
        for name, opener in openers.items()
    }
    with running(list(contenders.values())):
        for contender in contenders.values():
            contender.ask("warm_up", budget.window_s, budget.warm_up_s)
        turns = take_turns(
            contenders,
            budget.num_turns,
            lambda name, _: contenders[name].ask("turn", budget.turn_s),
        )
    return {name: tuple(turn.median_ms for turn in own) for name, own in turns.items()}


def _timed(opener: Callable[[], Call]) -> TimedCall:
    return TimedCall(opener())


class Ratio(NamedTuple):
    """Of two contenders within their turns."""

    median: float
    low: float
    high: float


def turn_ratios(own: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Divide turn by turn."""
    return [a / b for a, b in zip(own, reference, strict=True)]


def ratio(own: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Compare what two contenders gave in each turn."""
    ratios = turn_ratios(own, reference)
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
