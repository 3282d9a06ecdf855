"""Signals as questions between steps, or as an exception where there are no steps."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: the same as Ctrl-C, with another exit code."""


def terminate(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that half-written neighbours are cleaned up on the way."""
    del frame
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


@contextmanager
def listening(handler: Handler, *names: str) -> Generator[None]:
    """Handle the named signals where the system has them; put the old handlers back after."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    before = {s: signal.signal(s, handler) for s in signal.Signals if s.name in names}
    try:
        yield
    finally:
        for one, old in before.items():
            signal.signal(one, old)


class Stop:
    """Turns the first signal into a polite question between steps, a second into the end."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.saved_step: int | None = None
        self.running = False

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        return 130 if self.signal in (None, signal.SIGINT) else 143

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Before the first step there is nothing to save: leave at once."""
        if not self.running:
            terminate(number, frame)
        if self.signal is not None:
            self._leave_now()
        self.signal = number
        sys.stderr.write("\nstopping after this step; once more to stop without saving\n")

    def _leave_now(self) -> None:
        last = "none" if self.saved_step is None else f"step {self.saved_step}"
        os.write(2, f"undiffuse: not saved; last checkpoint: {last}\n".encode())
        os._exit(self.exit_code)
