"""Inside the process of a Worker: requests from a pipe -> warm-ups and turns of one program.

A fresh interpreter that imports nothing but its own runtime, so that its memory and its threads are
those of the program. It ends when the process that started it ends, however that happened: it
notices that its standard input is closed.
"""

import gc
import os
import resource
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from efficientnet.errors import PipelineError
from efficientnet.measuring.clock import measure_turn, warm_up_until_stable
from efficientnet.measuring.contender import Answer, Assignment, Failure, TurnRequest, WarmUpRequest
from efficientnet.measuring.inputs import map_inputs, rotate
from efficientnet.measuring.machine_use import CpuUse
from efficientnet.measuring.null_runtime import NullRuntime
from efficientnet.runtimes import ProgramInfo, Runtime, open_runtime


def _run(connection: Connection) -> None:
    assignment: Assignment = connection.recv()
    try:
        runtime = _open(assignment)
        images = map_inputs(assignment.inputs_descriptor, assignment.image_size)
        # A collection in the middle of a call would be measured as part of it.
        gc.disable()
        connection.send(Answer(None, _peak_memory_bytes(images.nbytes)))
        while True:
            request: WarmUpRequest | TurnRequest = connection.recv()
            gc.collect()
            batches = rotate(images, request.batch_size)

            # Bound as defaults: the harness should add as little to a call as it can.
            def call(infer=runtime.infer, batches=batches) -> object:
                return infer(next(batches))

            before = CpuUse.now()
            if isinstance(request, WarmUpRequest):
                result = warm_up_until_stable(
                    call, time.perf_counter_ns, request.window_s, request.max_s
                )
            else:
                result = measure_turn(call, time.perf_counter_ns, request.seconds)
            elsewhere = before.cores_busy_elsewhere()
            connection.send(Answer(result, _peak_memory_bytes(images.nbytes), elsewhere))
    except EOFError:
        return
    except (PipelineError, ValueError, OSError) as error:
        connection.send(Failure(str(error)))
    # A runtime's own exceptions have no common base; the traceback is for who looks after it.
    except Exception as error:
        traceback.print_exc()
        connection.send(Failure(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))


def _open(assignment: Assignment) -> Runtime:
    if isinstance(assignment.program, ProgramInfo):
        return NullRuntime(assignment.program)
    return open_runtime(assignment.program, assignment.num_threads)


def _peak_memory_bytes(inputs_bytes: int) -> int:
    # Linux lets getrusage's peak live on through exec: it would be that of the process which
    # started this one.
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        peak = int(line.split()[1]) * 1024
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(0, peak - inputs_bytes)


def _end_with_parent() -> None:
    # Not through sys.stdin: a thread that holds its lock aborts the interpreter's orderly end.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _run(Connection(int(sys.argv[1])))
