"""SIGINT and SIGTERM: the first asks training to finish its step and save, the second ends it."""

import os
import signal
from types import FrameType


class Interrupt:
    """While entered, ``requested`` turns True at the first signal.

    A second signal ends the process at once with 128 + its number. Checkpoints are only ever
    renamed into place whole, so that harms nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: the caller's own handling stays
                break
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
