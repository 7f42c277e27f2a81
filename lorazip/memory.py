"""Peak anonymous memory of this process: what a job really needs, without the file pages that it maps."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
PERIOD = 0.05  # seconds between two looks; a look costs 30 microseconds


def anonymous_memory() -> int:
    """Resident anonymous bytes now (Linux); elsewhere the peak of the whole resident set, maps included."""
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 0


class PeakMemory:
    """Sample `anonymous_memory` in a thread while a block runs; `peak` holds the most that was seen."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_memory())

    def _watch(self) -> None:
        while not self._done.wait(PERIOD):
            self.peak = max(self.peak, anonymous_memory())
