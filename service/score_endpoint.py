"""POST /score: from the bytes of a request to the bytes of its answer.

An ASGI application of its own: a framework's routing, injection and response model would cost a
request more than everything else that happens to it, but for the model.
"""

import json
import time
from array import array
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError
from starlette.types import Receive, Scope, Send

from contract.records import encode_records
from service import problems
from service.arms import Arm
from service.errors import ClientLeft, ServiceError
from service.schemas import MAX_DEADLINE_MS, Behavior, ScoreBody
from service.scorer import Scored, ScoreRequest
from service.wiring import ARM, ASKED, SCORED, STAGES, USABLE_SHARE, Services

_DEADLINE = b"x-deadline-ms"
_BODY = TypeAdapter(ScoreBody)
_DEADLINE_MS = TypeAdapter(Annotated[float, Field(gt=0, le=MAX_DEADLINE_MS)])


async def score_endpoint(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one request; whatever is wrong with it is answered as a problem."""
    services: Services = scope["app"].state.services
    started = time.perf_counter()
    try:
        body = _parse(await _read(receive))
        history = None if body.history is None else _records(body.history)
        if history is not None:
            # As objects it is many times as large, and the request may have to wait.
            body = body.model_copy(update={"history": None})
        scope[ASKED] = body
        deadline = started + USABLE_SHARE * _deadline_s(scope, services.settings.deadline_s)
        arm = services.arms.arm_for(body.user_id, body.arm)
        scope[ARM] = arm
        request = ScoreRequest(
            user_id=body.user_id,
            # Half the time of np.array, which looks at every element for its type.
            candidates=np.frombuffer(array("q", body.candidates), dtype=np.int64),
            ranking_time=int(time.time()) if body.ranking_time is None else body.ranking_time,
            history=history,
        )
        answer = arm.batcher.submit(request, deadline=deadline, has_left=_leaving(receive))
        if body.arm is None:  # testers are no part of what is compared
            services.arms.shadow(request, deadline=deadline)
        scored, waited_s = await answer
    except ClientLeft:
        await problems.client_left_response()(scope, receive, send)
    except ServiceError as error:
        await problems.problem_response(error)(scope, receive, send)
    except RequestValidationError as error:
        await problems.validation_response(error)(scope, receive, send)
    else:
        await _answer(arm, scored, waited_s, started, scope, send)


async def _read(receive: Receive) -> bytes:
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        return message.get("body", b"")  # type: ignore[no-any-return]  # ASGI messages are untyped
    chunks = [message.get("body", b"")]
    while message.get("more_body", False):
        message = await receive()
        chunks.append(message.get("body", b""))
    if message["type"] == "http.disconnect":
        raise ClientLeft
    return b"".join(chunks)


def _parse(raw: bytes) -> ScoreBody:
    try:
        return _BODY.validate_json(raw)
    except ValidationError:
        return _parse_slowly(raw)


def _parse_slowly(raw: bytes) -> ScoreBody:
    """Parse once more as every other route does, for errors in the same words."""
    if not raw:
        raise RequestValidationError([{"type": "missing", "loc": (), "msg": "Field required"}])
    try:
        return _BODY.validate_python(json.loads(raw))
    except json.JSONDecodeError as error:
        found = {"type": "json_invalid", "loc": (error.pos,), "ctx": {"error": error.msg}}
        raise RequestValidationError([found]) from error
    except ValidationError as error:
        # A URL for each error would cost more than all the rest.
        raise RequestValidationError(error.errors(include_url=False)) from error
    except (ValueError, RecursionError) as error:
        raise problems.unreadable(error) from error


def _deadline_s(scope: Scope, otherwise: float) -> float:
    for name, value in scope["headers"]:
        if name == _DEADLINE:
            try:
                return _DEADLINE_MS.validate_python(value.decode("latin-1")) / 1000
            except ValidationError as error:
                found = [
                    {**one, "loc": (_DEADLINE.decode(),)} for one in error.errors(include_url=False)
                ]
                raise RequestValidationError(found) from error
    return otherwise


def _records(history: list[Behavior]) -> bytes:
    return encode_records(
        [behavior.item_id for behavior in history], [behavior.time for behavior in history]
    )


def _leaving(receive: Receive) -> Callable[[], bool]:
    """Return a question: has the client closed its connection?

    The body has been read, so the next message can only be the disconnect. The question takes one
    step of waiting for it and gives up: a task that waits would cost every request for the few
    whose clients leave.
    """

    def has_left() -> bool:
        waiting: Any = receive()
        try:
            waiting.send(None)
        except StopIteration:
            return True
        waiting.close()
        return False

    return has_left


async def _answer(
    arm: Arm, scored: Scored, waited_s: float, started: float, scope: Scope, send: Send
) -> None:
    manifest = arm.model.manifest
    body = orjson.dumps(
        {
            "scores": scored.scores,
            "score_kind": manifest.score_kind,
            "arm": arm.name,
            "model": manifest.model_name,
            "version": manifest.model_version,
            "history_length": scored.history_length,
            "unknown_candidates": scored.unknown_candidates,
            "degraded": scored.degraded,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
    now = time.perf_counter()
    respond_s, total_s = now - scored.ended, now - started
    timing = (
        f"fetch;dur={1000 * scored.fetch_s:.3f}, encode;dur={1000 * scored.encode_s:.3f}, "
        f"infer;dur={1000 * scored.infer_s:.3f}, queue;dur={1000 * waited_s:.3f}, "
        f"respond;dur={1000 * respond_s:.3f}, total;dur={1000 * total_s:.3f}"
    )
    scope[SCORED] = scored
    scope[STAGES] = {
        "fetch": scored.fetch_s,
        "encode": scored.encode_s,
        "queue": waited_s,
        "infer": scored.infer_s,
        "respond": respond_s,
        "total": total_s,
    }
    headers = [
        (b"content-length", str(len(body)).encode()),
        (b"content-type", b"application/json"),
        (b"server-timing", timing.encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    arm.observe(scored, waited_s=waited_s, respond_s=respond_s, total_s=total_s)
