"""Cases of a group -> what their processes measured, taking turns."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from efficientnet.measuring.contender import Contender, running
from efficientnet.measuring.turns import take_turns
from training.studies.speed_plan import StepCase
from training.studies.speed_subject import Device, StepSubject, StepTurn, StepWarmUp

# Of a case's time, at most, for steps that do not count.
WARM_UP_FRACTION = 0.5


@dataclass
class Measured:
    """What a process answered so far."""

    case: StepCase
    device: Device
    warm_up: StepWarmUp | None = None
    turns: tuple[StepTurn, ...] = ()
    is_out_of_memory: bool = False


def measure(group: Sequence[StepCase], seconds: float, num_turns: int) -> list[Measured]:
    """Let the processes of a group take turns; one alone has a single long one.

    All are in memory at once. Each has so many seconds in all, without its warm-up.
    """
    takes_turns = len(group) > 1
    num_turns = num_turns if takes_turns else 1
    processes = {case: Contender(case.describe(), partial(StepSubject, case)) for case in group}
    rows: dict[StepCase, Measured] = {}

    def ask(case: StepCase, method: str, *arguments: float) -> StepWarmUp | StepTurn | None:
        # What the device does not hold has no answer, and its process keeps none of the memory.
        answer = processes[case].ask(method, *arguments)
        if answer is None:
            rows[case].is_out_of_memory = True
            processes[case].stop()
        return answer

    def turn(case: StepCase, _: int) -> None:
        if rows[case].is_out_of_memory:
            return
        taken = ask(case, "turn", seconds / num_turns, 1 if takes_turns else 0)
        if isinstance(taken, StepTurn):
            rows[case].turns += (taken,)

    with running(list(processes.values())):
        for case in group:
            rows[case] = Measured(case, processes[case].ask("device"))
        for case in group:
            warm_up = ask(case, "warm_up", WARM_UP_FRACTION * seconds)
            rows[case].warm_up = warm_up if isinstance(warm_up, StepWarmUp) else None
        take_turns(group, num_turns, turn)
    return list(rows.values())
