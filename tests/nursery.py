"""Runs the command line in processes that fail at a chosen step: killed, stopped, interrupted, or out of disk.

Starting Python and torch takes seconds, a fork of a process that has imported them a hundredth; so one process (this
file, run as a script) imports them and forks a child for every order that it reads. A step is a change of the file
system: a file opened for writing, a directory made, a rename, a removal. Python announces each to audit hooks just
before it happens, so a fault can be placed before every one of them, and nothing of lorazip is patched.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

Fault = Literal["", "kill", "stop", "interrupt", "full"]


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        pid: its process.
        code: its exit code, or minus the signal that killed or stopped it.
        out, err: what it printed.
        steps: how many steps it took.
        peak: bytes of anonymous memory at most.
    """

    pid: int
    code: int
    out: str = ""
    err: str = ""
    steps: int = 0
    peak: int = 0


class Nursery:
    """The test's end: gives orders to the forking process."""

    def __init__(self, **variables: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **variables}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def close(self) -> None:
        self.process.communicate()

    def run(
        self,
        *arguments: str | Path,
        fault: Fault = "",
        at: int = 0,
        below: Path = Path("/nowhere"),
        limit: int | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> Ended:
        """Run `lorazip ARGUMENTS`.

        Args:
            fault: what happens just before step `at`: the process kills, stops or interrupts (Ctrl-C) itself, or the
                disk is full from then on. A file that is about to be written when the process is killed is left empty.
            below: only changes below this directory count as steps.
            limit: bytes that a file may have, as by `ulimit -f`.
            environment: variables that the command sees changed; None removes one.
        """
        return self._order(
            arguments=[str(a) for a in arguments],
            fault=fault,
            at=at,
            below=str(below),
            limit=limit,
            environment=dict(environment or {}),
        )

    def signal(self, pid: int, number: signal.Signals) -> Ended:
        """Send a signal to a stopped child and wait for its end."""
        return self._order(pid=pid, signal=number)

    def _order(self, **order: Any) -> Ended:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))


class Saboteur:
    """An audit hook that counts steps and strikes at one."""

    def __init__(self, fault: Fault, at: int, below: str):
        self.fault, self.at, self.below, self.steps = fault, at, below, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_step(event, arguments):
            return
        self.steps += 1
        if self.fault == "full" and self.steps >= self.at and event in ("open", "os.mkdir", "os.rename"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
        if self.steps == self.at and self.fault == "kill" and event == "open":
            self.fault = ""  # opening it here is announced as well
            os.close(os.open(arguments[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
            os.kill(os.getpid(), signal.SIGKILL)
        if self.steps == self.at and self.fault in ("kill", "stop", "interrupt"):
            name = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}[self.fault]
            os.kill(os.getpid(), name)

    def _is_step(self, event: str, arguments: tuple[Any, ...]) -> bool:
        match event:
            case "open":
                path, _, flags = arguments
                return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and self._is_below(path, -1)
            case "os.remove" | "os.rmdir" | "os.mkdir":
                return self._is_below(arguments[0], arguments[-1])
            case "os.rename":
                return self._is_below(arguments[0], arguments[2])
        return False

    def _is_below(self, path: Any, directory: int) -> bool:
        # shutil.rmtree names things relative to descriptors of what it removes.
        if directory != -1:
            return True
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.below + "/")


def child(order: dict[str, Any], report: int) -> NoReturn:
    """In the forked process: run the command with its fault, and tell what it took."""
    from lorazip.cli import main
    from lorazip.memory import PeakMemory

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for variable, value in order["environment"].items():
        os.environ.pop(variable, None)
        if value is not None:
            os.environ[variable] = value
    if order["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    saboteur = Saboteur(order["fault"], order["at"], order["below"])
    sys.addaudithook(saboteur)
    code = 70
    memory = PeakMemory()
    try:
        with memory:
            main(order["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(report, b"%d %d" % (saboteur.steps, memory.peak))
    os._exit(code)


def read(descriptor: int) -> str:
    with open(descriptor, encoding="utf-8") as pipe:
        return pipe.read()


def serve() -> None:
    """Read orders from stdin, one a line, and answer each on stdout when its child has ended or stopped."""
    import torch

    import lorazip.cli  # noqa: F401 - what all children share
    from lorazip.trellis import trellis

    trellis(1).encode(torch.zeros(1, 64))  # the compiled search too: half a second for each child otherwise
    running: dict[int, list[int]] = {}  # pid -> the pipes that its output, errors and figures come through
    for line in sys.stdin:
        order = json.loads(line)
        if "signal" in order:
            pid = order["pid"]
            os.kill(pid, order["signal"])
        else:
            pipes = [os.pipe() for _ in range(3)]
            pid = os.fork()
            if pid == 0:
                os.dup2(pipes[0][1], 1)
                os.dup2(pipes[1][1], 2)
                child(order, pipes[2][1])
            for _, end in pipes:
                os.close(end)
            running[pid] = [end for end, _ in pipes]
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            answer = Ended(pid, -os.WSTOPSIG(status))
        else:
            # What commands say here is short: it waits in the pipes.
            out, err, figures = (read(end) for end in running.pop(pid))
            answer = Ended(pid, os.waitstatus_to_exitcode(status), out, err, *map(int, figures.split()))
        print(json.dumps(asdict(answer)), flush=True)


if __name__ == "__main__":
    serve()
