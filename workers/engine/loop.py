"""An engine that steps by itself, in a thread: requests are handed in and news taken out from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from shoal.workers.engine.request import EngineEnded, Load, Output, Request
from shoal.workers.expert_plan import Plan

if TYPE_CHECKING:
    from shoal.workers.engine.engine import Engine

IDLE_SECONDS = (0.001, 0.01)  # between two looks for work, the shortest and the longest


class EngineLoop:
    """Steps as long as there is work, on all ranks of the model together.

    A step needs every rank; each begins with a turn that all agree on, so that ranks without requests step along.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._news: list[Output] = []
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._stopping = self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, again: bool = False) -> None:
        """Queues a request. Raises what ``Engine.add`` raises."""
        self._call(lambda: self.engine.add(request, again))

    def cancel(self, request: str) -> bool:
        """Ends a request before the next step and frees its pages; False when it has ended."""
        return bool(self._call(lambda: self.engine.cancel(request)))

    def load(self) -> Load:
        """How busy the engine is."""
        load: Load = self._call(self.engine.load)
        return load

    def place(self, plan: Plan) -> None:
        """Moves experts as :meth:`Engine.place` has it; returns when that is done. Raises EngineEnded."""
        self._call(lambda: self.engine.place(plan))
        with self._changed:
            self._changed.wait_for(lambda: not self.engine.moves or self._ended)
        if self.engine.moves:
            raise self._why()

    def take(self, seconds: float) -> list[Output]:
        """All news since the last call; waits for some, but no longer than ``seconds``.

        Raises EngineEnded once the loop has ended and all news were taken.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._news or self._ended, seconds)
            news, self._news = self._news, []
        if not news and self._ended:
            raise self._why()
        return news

    def wait(self) -> None:
        """Returns when the loop has ended. Raises EngineEnded when that was an error."""
        self._thread.join()
        if self._error:
            raise self._why()

    def stop(self) -> None:
        """Ends the loop on all ranks after the step under way."""
        self._stopping = True
        self._wake.set()

    def _call(self, function: Callable[[], Any]) -> Any:
        """Calls something of the engine's between two steps, in the loop's own thread."""
        result: Future[Any] = Future()
        self._calls.put((function, result))
        self._wake.set()
        while True:
            try:
                return result.result(timeout=1.0)
            except TimeoutError:
                if self._ended and not result.done():
                    raise self._why() from None

    def _run(self) -> None:
        try:
            idle = IDLE_SECONDS[0]
            while True:
                self._wake.clear()
                self._answer()
                turn = self.engine.turn(self._stopping)
                if turn.stop:
                    return
                if turn.moves:
                    self._move()
                if turn.requests:
                    self._tell(self.engine.step(turn))
                    idle = IDLE_SECONDS[0]
                elif not turn.moves:
                    self._wake.wait(idle)
                    idle = min(2 * idle, IDLE_SECONDS[1])
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _why(self) -> EngineEnded:
        if self._error is None:
            return EngineEnded("the engine was stopped")
        return EngineEnded(f"the engine ended by {type(self._error).__name__}: {self._error}")

    def _answer(self) -> None:
        while True:
            try:
                function, result = self._calls.get_nowait()
            except Empty:
                return
            try:
                result.set_result(function())
            except Exception as error:
                result.set_exception(error)

    def _move(self) -> None:
        self.engine.move()
        with self._changed:
            self._changed.notify_all()

    def _tell(self, news: list[Output]) -> None:
        if news:
            with self._changed:
                self._news += news
                self._changed.notify_all()
