"""SIGTERM, Ctrl-C, a hang-up and the end of a given time as requests: finish the step, save, leave with exit code 6.

A second SIGTERM or Ctrl-C leaves at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from finetune.errors import Interrupted
from finetune.timelimit import TimeLimit

_MOMENT = 0.05
"""Seconds after which a request that was swallowed is made again."""
_PR_SET_PDEATHSIG = 1
_asked = False


def first(number: int, frame: FrameType | None) -> None:
    """The handler of Ctrl-C and SIGTERM until a run listens. A library that is being loaded may swallow what it raises,
    or make another error of it: ``asked`` remembers."""
    global _asked
    _asked = True
    raise KeyboardInterrupt


def asked() -> bool:
    """Whether somebody asked this process to stop before a run listened."""
    return _asked


class StopRequest:
    """Whether somebody asked to stop. Outside ``deferred`` a request cuts the work on the spot.

    It does so by KeyboardInterrupt, which no ``except Exception`` of a library swallows; ``stop_requests`` turns it
    into ``Interrupted``.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferring = False
        self._limit: TimeLimit | None = None
        self._why = "on request"

    def within(self, limit: TimeLimit | None) -> None:
        """Let the end of this time be a request too. Work that is not deferred is cut when it comes."""
        self._limit = limit
        self._set_alarm()

    def step_done(self, seconds: float) -> None:
        """Between two steps: ask to stop where there is no time for another one like it."""
        if self._limit and not self._limit.allows(seconds):
            self._time_is_up()
            signal.setitimer(signal.ITIMER_REAL, 0)  # it must not come once more while the stopped run closes

    def saved(self, seconds: float) -> None:
        """A save took so long, which is kept back for the last one."""
        if self._limit:
            self._limit.saved(seconds)
            self._set_alarm()

    def _set_alarm(self) -> None:
        if self._limit and not self.requested:
            signal.setitimer(signal.ITIMER_REAL, max(_MOMENT, self._limit.left()))

    def _time_is_up(self) -> None:
        if self._limit and not self.requested:
            self.requested, self._why = True, self._limit.words

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(Interrupted.exit_code)
        self.requested = True
        if not self._deferring:
            raise KeyboardInterrupt

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        """The terminal or the parent is gone. Each thread of a dying parent may send one: a second means nothing."""
        if not self.requested:
            self._handle(number, frame)

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        """The given time is over, or a request was swallowed a moment ago."""
        self._time_is_up()
        if not self._deferring:
            raise KeyboardInterrupt

    def _swallowed(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Python drops what is raised while it finalizes an object; then the request is made again a moment later."""
        if unraisable.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, _MOMENT)
        else:
            sys.__unraisablehook__(unraisable)

    def interrupted(self, detail: str = "nothing is lost") -> Interrupted:
        return Interrupted(f"stopped {self._why}; {detail}", fix="the same command goes on from here")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a request only sets ``requested``: for work that must not be cut in two. Leaving answers it.

        One that a library swallowed before is answered on entering.
        """
        if self.requested:
            raise self.interrupted()
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.requested:
            raise self.interrupted()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within ``deferred``: a request, also one made before, raises KeyboardInterrupt on the spot."""
        self._deferring = False
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._deferring = True


@contextlib.contextmanager
def out_of_reach() -> Iterator[None]:
    """Processes started inside never get these signals. Schedulers and terminals send them to every process of a job,
    and a helper that died of one would take the step, and with it the checkpoint, along."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def end_with(parent: int) -> None:
    """Ask the system to send this process SIGHUP when its ``parent`` ends, however that ends.

    It saves where it stands then, as on request. Linux only (prctl(2), PR_SET_PDEATHSIG); elsewhere nothing happens.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a parent under nohup hands down that it is ignored
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP, 0, 0, 0)
    if os.getppid() != parent:  # it ended before this was asked
        os.kill(os.getpid(), signal.SIGHUP)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listen while inside; afterwards the former handlers are back. Signals reach the main thread alone: in another
    one nothing is listened for."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    handlers = {signal.SIGINT: request._handle, signal.SIGTERM: request._handle, signal.SIGALRM: request._alarm}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: the command is to outlive its terminal
        handlers[signal.SIGHUP] = request._hang_up
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    former_hook, sys.unraisablehook = sys.unraisablehook, request._swallowed
    try:
        if asked():
            raise KeyboardInterrupt
        yield request
    except KeyboardInterrupt:
        raise request.interrupted() from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = former_hook
        for number, handler in former.items():
            signal.signal(number, handler)
