"""SIGINT and SIGTERM during training: the first asks the run to stop after its step, the second ends it at once."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType, TracebackType

from xdiffusion.training.run_record import REPOSITORY

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Takes the signals while it is entered; `signal` is the number of the one that came, 0 before that."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        with suppress(OSError, AttributeError):  # the reader of a pipe may have got the same signal, or there is none
            # written by the system call: print may be what was interrupted
            os.write(sys.__stderr__.fileno(), b"\nstopping after this step; again to quit at once\n")


def resuming_command(script: str, words: Sequence[str], processes: int) -> str:
    """The command line that goes on with a run that was started as `script words`; of several machines, this one's."""
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith("--resume_from"):
            kept.append(word)
        skip = word == "--resume_from"
    of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    launcher = ["python"] if processes == 1 else ["torchrun", "--nproc_per_node", str(of_machine)]
    if of_machine < processes and {"GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():  # torchrun's
        launcher += ["--nnodes", str(processes // of_machine), "--node_rank", os.environ["GROUP_RANK"]]
        launcher += ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    return shlex.join([*launcher, os.path.relpath(REPOSITORY / script), *kept, "--resume_from", "auto"])
