"""What a request leaves behind: ids in its answer, and in the log where its time went if slow."""

import asyncio
import logging
from collections.abc import Iterator
from math import inf
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from service.access import KEY
from service.logs import log_event
from service.scorer import Scored
from service.settings import Settings
from service.trace_context import RequestContext, read_context
from service.wiring import ARM, ASKED, SCORED, STAGES

if TYPE_CHECKING:
    from service.tracing import Tracing

_log = logging.getLogger(__name__)
_SPAN = "mneme.span"
# Digits of seconds that are written: a microsecond says enough.
_DIGITS = 6


class RequestLog:
    """Gives requests their ids, writes the slow ones into the log, and spans where asked to."""

    def __init__(self, settings: Settings) -> None:
        def slow_s(deadline_s: float) -> float:
            return deadline_s if settings.slow_request_s is None else settings.slow_request_s

        self._slow_s = {
            "/score": slow_s(settings.deadline_s),
            "/recommend": slow_s(settings.recommend_deadline_s),
            "/events": slow_s(settings.deadline_s),
        }
        self._allowance = Allowance(settings.slow_log_per_s)
        self._personal_data = settings.log_personal_data
        self._tracing = _tracing(settings)

    def begin(self, scope: Scope, route: str) -> RequestContext:
        """Return the ids of a request that has arrived."""
        context = read_context(scope["headers"])
        if self._tracing is not None:
            scope[_SPAN], context = self._tracing.begin(context, f"{scope['method']} {route}")
        return context

    def end(
        self,
        context: RequestContext,
        scope: Scope,
        *,
        route: str,
        status: int,
        began: float,
        ended: float,
    ) -> None:
        """Tell of a request that has been answered.

        `status`: 0 where no answer had begun. `began`, `ended`: on the clock of
        `time.perf_counter`.
        """
        if self._tracing is not None:
            self._tracing.end(
                scope[_SPAN],
                stages=stages_of(scope.get(SCORED), scope.get(STAGES, {})),
                attributes=_attributes(context, scope, route, status),
                failed=status >= 500,
            )
        taken_s = ended - began
        is_slow = taken_s > self._slow_s.get(route, inf)
        if is_slow and (withheld := self._allowance.take(ended)) is not None:
            fields = self._fields(context, scope, route, status, taken_s)
            log_event(_log, logging.WARNING, "request-slow", **fields, withheld=withheld)
        elif _log.isEnabledFor(logging.DEBUG):
            fields = self._fields(context, scope, route, status, taken_s)
            log_event(_log, logging.DEBUG, "request-answered", **fields)

    async def close(self) -> None:
        """Send the spans that wait."""
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    def _fields(
        self, context: RequestContext, scope: Scope, route: str, status: int, taken_s: float
    ) -> dict[str, Any]:
        fields: dict[str, Any] = {
            **ids_of(context),
            "route": route,
            "status": status,
            "taken_s": round(taken_s, _DIGITS),
        }
        if key := scope.get(KEY):
            fields["key"] = key
        if arm := scope.get(ARM):
            fields |= {"arm": arm.name, "version": arm.metrics.version}
        if stages := scope.get(STAGES):
            fields["stages_s"] = {name: round(s, _DIGITS) for name, s in stages.items()}
        if self._personal_data and (asked := scope.get(ASKED)):
            fields |= asked.model_dump(include={"user_id", "candidates"})
        return fields


class Allowance:
    """Lets so many events a second pass; those of one second may come at once."""

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._most = max(1.0, per_s) if per_s else 0.0
        self._left = self._most
        self._asked = 0.0
        self._withheld = 0

    def take(self, now: float) -> int | None:
        """Return how many were withheld since the latest that passed; None withholds this one."""
        self._left = min(self._most, self._left + (now - self._asked) * self._per_s)
        self._asked = now
        if self._left < 1:
            self._withheld += 1
            return None
        self._left -= 1
        withheld, self._withheld = self._withheld, 0
        return withheld


def ids_of(context: RequestContext) -> dict[str, str]:
    """Return the fields by which an event is found from its request."""
    ids = {
        "request_id": context.request_id,
        "trace_id": context.trace_id,
        "span_id": context.span_id,
    }
    return ids if context.parent_id is None else {**ids, "parent_id": context.parent_id}


def _tracing(settings: Settings) -> "Tracing | None":
    if settings.tracing == "off":
        return None
    # Only here: whoever does not trace need not have it, and does not load it.
    from service.tracing import Tracing

    return Tracing()


def stages_of(
    scored: Scored | None, seconds: dict[str, float]
) -> Iterator[tuple[str, float, float]]:
    """Yield name, begin and end of what happened to a request of `/score`, in order.

    It waits twice: for the preparation, and for the device. What lies between a stage and the
    next, a turn of the event loop, is not told apart from them.
    """
    if scored is None:
        return
    encoding = scored.began + scored.fetch_s
    ready = encoding + scored.encode_s
    running = scored.ended - scored.infer_s
    arrived = running - seconds["queue"] - (ready - scored.began)
    yield "queue", min(arrived, scored.began), scored.began
    yield "fetch", scored.began, encoding
    yield "encode", encoding, ready
    yield "queue", ready, max(ready, running)
    yield "infer", running, scored.ended


def _attributes(
    context: RequestContext, scope: Scope, route: str, status: int
) -> dict[str, str | int | float]:
    arm = scope.get(ARM)
    return {
        "http.request.method": scope["method"],
        "http.route": route,
        "http.response.status_code": status,
        "mneme.request_id": context.request_id,
        **({"mneme.arm": arm.name, "mneme.version": arm.metrics.version} if arm else {}),
        **{f"mneme.{stage}_s": seconds for stage, seconds in scope.get(STAGES, {}).items()},
    }
