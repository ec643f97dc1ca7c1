"""Inside the process of a Contender: requests from a pipe -> results of its subject's methods."""

import os
import pickle
import sys
import threading
import traceback
from multiprocessing.connection import Connection

from efficientnet.errors import PipelineError
from efficientnet.machine.children import obey_parent


def _serve(connection: Connection) -> None:
    try:
        sys.path[:], opener = connection.recv()
        subject = pickle.loads(opener)()
        connection.send((None, None))
        while True:
            method, arguments = connection.recv()
            connection.send((getattr(subject, method)(*arguments), None))
    except (EOFError, BrokenPipeError):
        return
    except (PipelineError, ValueError, OSError) as error:
        connection.send((None, str(error)))
    # A runtime's own exceptions have no common base; the traceback is for who looks after it.
    except Exception as error:
        traceback.print_exc()
        reason = str(error).partition("\n")[0]
        connection.send((None, f"{type(error).__name__}: {reason}"))


def _end_with_parent() -> None:
    # Its end of this pipe is closed then. Not through sys.stdin: a thread that holds its lock
    # aborts the interpreter's orderly end.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    obey_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _serve(Connection(int(sys.argv[1])))
