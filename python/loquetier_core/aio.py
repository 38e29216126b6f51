"""AsyncEngine: an Engine for asyncio programs. One thread steps the engine; each request or job is an awaitable or a stream.

    async with AsyncEngine(engine) as aio:
        async for event in aio.stream(prompt_ids, adapter="support"): ...
        result = await aio.train("legal", examples, optimizer=AdamW(lr=1e-4))

Invariants: an id is registered under the same lock as its submission, and the stepping thread hands out events under that lock,
so no event can come before its listener. Events of one step reach a loop in one call. When step() raises, every open stream
raises that error, and so does whatever is submitted afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from ._native import Engine, Error, EvalResult, InferResult, InvalidArgument, TokenEvent, TrainResult


class AsyncEngine:
    """Drives `engine` from a thread of its own. The engine must not be stepped elsewhere; it stays the caller's to close.

    Methods may be called from any running event loop. Cancelling a task, or leaving a stream early, cancels the request or job.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._listeners: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Any]]] = {}
        self._error: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="loquetier-step", daemon=True)
        self._thread.start()

    async def stream(self, prompt_ids: Any, **options: Any) -> AsyncIterator[TokenEvent | InferResult]:
        """Yields the TokenEvents of a request, then its InferResult. `options`: those of Engine.submit_infer."""
        async with self._open(lambda: self.engine.submit_infer(prompt_ids, **options)) as listener:
            while True:
                event = await listener.next()
                yield event
                if isinstance(event, InferResult):
                    return

    async def infer(self, prompt_ids: Any, **options: Any) -> InferResult:
        """The InferResult of a request. `options`: those of Engine.submit_infer."""
        async with self._open(lambda: self.engine.submit_infer(prompt_ids, **options)) as listener:
            while True:
                event = await listener.next()
                if isinstance(event, InferResult):
                    return event

    async def train(self, adapter: str, examples: Any, **options: Any) -> TrainResult:
        """The TrainResult of one mini-batch. `options`: those of Engine.submit_train."""
        async with self._open(lambda: self.engine.submit_train(adapter, examples, **options)) as listener:
            result: TrainResult = await listener.next()
            return result

    async def evaluate(self, adapter: str | None, examples: Any) -> EvalResult:
        """The EvalResult of some examples; adapter None is the base model."""
        async with self._open(lambda: self.engine.submit_eval(adapter, examples)) as listener:
            result: EvalResult = await listener.next()
            return result

    def close(self) -> None:
        """Stops stepping after the step under way. Open streams raise InvalidArgument and their work is cancelled.

        The engine stays usable.
        """
        with self._lock:
            self._closing = True
            self._wake.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)

    def _open(self, submit: Callable[[], int]) -> _Listener:
        return _Listener(self, submit)

    def _run(self) -> None:
        error: BaseException = InvalidArgument("AsyncEngine is closed")
        try:
            while True:
                with self._lock:
                    while not self._closing and not self.engine.has_work():
                        self.engine.stats()  # raises when the engine was closed under its waiters, which has_work() does not
                        self._wake.wait()
                    if self._closing:
                        break
                result = self.engine.step()
                with self._lock:
                    self._deliver(
                        [
                            *((e.request_id, e) for e in result.tokens),
                            *((r.request_id, r) for r in result.finished),
                            *((r.job_id, r) for r in result.trained),
                            *((r.job_id, r) for r in result.evaluated),
                        ]
                    )
        except BaseException as caught:  # whatever it is, the waiting tasks must learn of it
            error = caught
        with self._lock:
            self._error = error
            self._deliver([(id_, error) for id_ in self._listeners])

    def _deliver(self, events: list[tuple[int, Any]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Any], Any]]] = {}
        for id_, event in events:
            if id_ in self._listeners:
                loop, queue = self._listeners[id_]
                by_loop.setdefault(loop, []).append((queue, event))
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, items)
            except RuntimeError:  # that loop is closed: nobody is listening any more
                continue


def _put_all(items: list[tuple[asyncio.Queue[Any], Any]]) -> None:
    for queue, event in items:
        queue.put_nowait(event)


class _Listener:
    """One submitted request or job: submits on entry, cancels on exit when the last event has not come."""

    def __init__(self, owner: AsyncEngine, submit: Callable[[], int]) -> None:
        self._owner = owner
        self._submit = submit
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._done = False

    async def __aenter__(self) -> _Listener:
        owner = self._owner
        with owner._lock:
            if owner._error is not None:
                raise owner._error
            self._id = self._submit()
            owner._listeners[self._id] = (asyncio.get_running_loop(), self._queue)
            owner._wake.notify()
        return self

    async def next(self) -> Any:
        event = await self._queue.get()
        self._done = not isinstance(event, (TokenEvent, BaseException))
        if isinstance(event, BaseException):
            raise event
        return event

    async def __aexit__(self, *exception: object) -> None:
        owner = self._owner
        with owner._lock:
            owner._listeners.pop(self._id, None)
            if not self._done:
                with contextlib.suppress(Error):  # a closed or broken engine has nothing left to cancel
                    owner.engine.cancel(self._id)
                owner._wake.notify()
