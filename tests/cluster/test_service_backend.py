"""What goes between the routes and replicas that draw: refusals, positions, who comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from var_deploy.errors import BackendError
from var_deploy.runtime.request import Request
from var_deploy.sampling import Sampling

pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own modules

Script = list[Any]  # items, an exception to raise, or None to wait for ever


class Told:
    """What a call of a replica tells, in the order of its script."""

    def __init__(self, script: Script) -> None:
        self._script, self.cancelled = list(script), False

    def __aiter__(self) -> Told:
        return self

    async def __anext__(self) -> Any:
        if not self._script:
            raise StopAsyncIteration
        item = self._script.pop(0)
        if item is None:
            await asyncio.Event().wait()
        if isinstance(item, Exception) and not isinstance(item, BackendError):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


class Replicas:
    """A handle to replicas: each call follows the next script."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts, self.calls = list(scripts), list[tuple[Any, Any, Told]]()
        self.draw = self

    def options(self, stream: bool) -> Replicas:
        assert stream
        return self

    def remote(self, work: Any, end: float | None) -> Told:
        told = Told(self._scripts.pop(0))
        self.calls.append((work, end, told))
        return told


def asked(scenario: Callable[..., Coroutine[Any, Any, None]], *scripts: Script) -> Replicas:
    """Run a scenario with a backend in front of such replicas."""
    from var_deploy.cluster.backend import RayBackend
    from var_deploy.serving.metrics import Metrics

    replicas: Any = Replicas(*scripts)

    async def run() -> None:
        await scenario(RayBackend(replicas, None, {}, Metrics()))  # type: ignore[arg-type]

    asyncio.run(run())
    return replicas


def work(**options: Any) -> Any:
    from var_deploy.serving.backend import GenerationRequest

    request = Request(labels=[1], rng_keys=[(7, 0)], sampling=Sampling())
    return GenerationRequest(request=request, **options)


def drawn() -> Script:
    from var_deploy.cluster.replica import Batch, Begun
    from var_deploy.serving.backend import Drawn

    images = Drawn(images=np.zeros((1, 2, 2, 3), np.uint8), scales_done=np.ones(1, np.int64))
    return [Begun(), Batch(images=1, seconds=0.5), images]


def died() -> Exception:
    from ray.exceptions import RayActorError

    return RayActorError()


async def names(backend: Any, asked: Any) -> list[str]:
    return [type(event).__name__ async for event in backend.draw(asked)]


def test_a_work_is_drawn_and_counted() -> None:
    async def scenario(backend: Any) -> None:
        assert await names(backend, work()) == ["Queued", "Drawn"]
        page = backend._metrics.page().decode()
        assert "var_deploy_images_total 1.0" in page and "drawing_seconds_sum 0.5" in page
        await backend.stop()
        assert backend.stopping

    ((_, end, told),) = asked(scenario, drawn()).calls
    assert end is None and not told.cancelled


def test_a_full_queue_is_said_before_anything_else() -> None:
    from ray.serve.exceptions import BackPressureError

    from var_deploy.serving.backend import BusyError

    async def scenario(backend: Any) -> None:
        with pytest.raises(BusyError, match="the queue is full") as refused:
            await anext(backend.draw(work()))
        assert refused.value.retry_after == 1

    asked(scenario, [BackPressureError(num_queued_requests=1, max_queued_requests=1)])


def test_positions_are_told_as_others_leave() -> None:
    async def scenario(backend: Any) -> None:
        first, second = backend.draw(work()), backend.draw(work())
        assert [(await anext(one)).position for one in (first, second)] == [0, 1]
        await first.aclose()
        assert (await anext(second)).position == 0
        await second.aclose()
        await backend.stop()

    calls = asked(scenario, [None], [None]).calls
    assert all(told.cancelled for _, _, told in calls)


def test_a_lost_replica_is_asked_again_once() -> None:
    from var_deploy.cluster.backend import LostError

    async def scenario(backend: Any) -> None:
        assert await names(backend, work()) == ["Queued", "Drawn"]
        with pytest.raises(LostError, match="ask again"):
            await names(backend, work())

    begun = drawn()[:1]
    assert len(asked(scenario, [*begun, died()], drawn(), [died()], [died()]).calls) == 4


def test_what_a_replica_says_is_wrong_is_passed_on() -> None:
    async def scenario(backend: Any) -> None:
        with pytest.raises(BackendError, match="the device has gone"):
            await names(backend, work())
        with pytest.raises(ZeroDivisionError):
            await names(backend, work())

    asked(scenario, [BackendError("the device has gone")], [ZeroDivisionError()])


def test_a_deadline_that_comes_before_its_turn_is_late() -> None:
    from var_deploy.serving.backend import LateError

    async def scenario(backend: Any) -> None:
        with pytest.raises(LateError, match="before this request's turn"):
            await names(backend, work(deadline=0.2))

    ((_, end, told),) = asked(scenario, [None]).calls
    assert end is not None and told.cancelled


def test_the_end_drops_what_was_taken() -> None:
    from var_deploy.serving.backend import StoppingError

    async def scenario(backend: Any) -> None:
        waiting = backend.draw(work())
        await anext(waiting)
        backend.abort()
        with pytest.raises(StoppingError, match="was stopped"):
            await anext(waiting)
        await backend.stop()
        with pytest.raises(StoppingError, match="takes nothing new"):
            await anext(backend.draw(work()))

    asked(scenario, [None])
