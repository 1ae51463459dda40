"""The routes for people who look: why a score, what a user did, whom and what to begin with."""

import time
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

import numpy as np
import orjson
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import TypeAdapter, WithJsonSchema
from starlette.convertors import Convertor, register_url_convertor

from contract.errors import RecordError
from contract.records import (
    MAX_USER_ID_BYTES,
    RECORD,
    check_user_id,
    encode_records,
    history_in_time_order,
)
from service.api import DeadlineMs, services_of
from service.errors import (
    BodyTooLargeError,
    CorruptHistoryError,
    DeadlineExceededError,
    DeviceMemoryError,
    HistoryUnavailableError,
    InvalidRequestError,
    ModelFailedError,
    NotExplainableError,
    OverloadedError,
    UnknownArmError,
    UnsupportedEncodingError,
)
from service.experiment import ArmName
from service.problems import responses
from service.schemas import (
    MAX_INLINE_BEHAVIORS,
    ExplainAnswer,
    ExplainBody,
    HistoryAnswer,
    SomeItems,
    SomeUsers,
    TitledBehavior,
    TitledItem,
)
from service.scorer import ScoreRequest
from service.wiring import ARM, USABLE_SHARE, Services


def _never_kept(response: Response) -> None:
    """What a user did is for whoever asked, and for no cache between."""
    response.headers["Cache-Control"] = "no-store"


router = APIRouter(dependencies=[Depends(_never_kept)])


class _Text(Convertor[str]):
    """A part of a path with any characters: Starlette's own `path` stops at a line break."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("text", _Text())

_MAX_SAMPLE = 100
HowMany = Annotated[int, Query(ge=1, le=_MAX_SAMPLE, description="At most so many.")]


@router.post(
    "/explain",
    summary="Say why candidates got their scores",
    response_model=ExplainAnswer,
    responses=responses(
        InvalidRequestError,
        UnknownArmError,
        BodyTooLargeError,
        UnsupportedEncodingError,
        NotExplainableError,
        OverloadedError,
        HistoryUnavailableError,
        DeadlineExceededError,
        DeviceMemoryError,
        CorruptHistoryError,
        ModelFailedError,
    ),
)
async def explain(
    body: ExplainBody, request: Request, x_deadline_ms: DeadlineMs = None
) -> Response:
    """Score up to 20 candidates and return what each behavior weighed in each iteration.

    For bundles of IMN: `GET /models` says whether they explain. Weights are those that the model
    computes with: each in 0 .. 1, not adding up to 1. The deadline is that of a recommendation. The
    `Server-Timing` header says where the time went, in milliseconds.
    """
    services, started = services_of(request), time.perf_counter()
    arm = services.arms.arm_for(body.user_id, body.arm)
    request.scope[ARM] = arm
    usual_s = services.settings.recommend_deadline_s
    deadline_s = usual_s if x_deadline_ms is None else x_deadline_ms / 1000
    found = await arm.explainer.explain(
        ScoreRequest(
            user_id=body.user_id,
            candidates=np.array(body.candidates, dtype=np.int64),
            ranking_time=int(time.time()) if body.ranking_time is None else body.ranking_time,
            history=None
            if body.history is None
            else encode_records(
                [behavior.item_id for behavior in body.history],
                [behavior.time for behavior in body.history],
            ),
        ),
        deadline=started + USABLE_SHARE * deadline_s,
        has_left=request.is_disconnected,
    )
    explained = time.perf_counter()
    manifest, titles = arm.model.manifest, services.titles
    content = orjson.dumps(
        {
            "behaviors": [
                {"item_id": item_id, "time": at, "title": titles.get(item_id)}
                for item_id, at in zip(found.item_ids.tolist(), found.times.tolist(), strict=True)
            ],
            "candidates": [
                {
                    "item_id": item_id,
                    "title": titles.get(item_id),
                    "known": bool(found.known[c]),
                    "score": found.scores[c],
                    "weights": np.ascontiguousarray(found.weights[c]),
                }
                for c, item_id in enumerate(body.candidates)
            ],
            "iterations": found.weights.shape[1],
            "score_kind": manifest.score_kind,
            "arm": arm.name,
            "model": manifest.model_name,
            "version": manifest.model_version,
            "history_length": len(found.item_ids),
            "degraded": found.degraded,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
    now = time.perf_counter()
    seconds = {**found.seconds, "respond": now - explained, "total": now - started}
    timing = ", ".join(f"{stage};dur={1000 * s:.3f}" for stage, s in seconds.items())
    return Response(content, media_type="application/json", headers={"Server-Timing": timing})


@router.get(
    "/users/sample",
    summary="Some users who have a history",
    responses=responses(InvalidRequestError, HistoryUnavailableError),
)
async def some_users(request: Request, limit: HowMany = 10) -> SomeUsers:
    """Return ids of users, drawn at random; fewer than asked where the same are drawn again."""
    services = services_of(request)
    try:
        return SomeUsers(user_ids=await services.history.some_users(limit))
    except HistoryUnavailableError:
        services.metrics.redis_failures.labels("fetch").inc()
        raise


@router.get(
    "/users/{user_id:text}/history",
    summary="What a user did",
    responses=responses(InvalidRequestError, HistoryUnavailableError, CorruptHistoryError),
)
async def history(
    user_id: Annotated[
        str,
        # Checked below, as everywhere else; here it is only told.
        Path(json_schema_extra={"minLength": 1, "maxLength": MAX_USER_ID_BYTES}),
    ],
    request: Request,
    limit: Annotated[
        int,
        Query(ge=1, le=MAX_INLINE_BEHAVIORS, description="The newest behaviors, at most so many."),
    ] = 1000,
) -> HistoryAnswer:
    """Return a user's newest behaviors, oldest first; none of an unknown user.

    It changes nothing.
    """
    services = services_of(request)
    try:
        # Starlette replaces bytes that are no UTF-8: that would be another user.
        unquote_to_bytes(request.scope["raw_path"]).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError("user_id: the path is not valid UTF-8") from error
    try:
        check_user_id(user_id)
    except RecordError as error:
        raise InvalidRequestError(f"user_id: {error}") from error
    (found,) = await services.history.fetch([user_id], limit)
    if isinstance(found, HistoryUnavailableError):
        services.metrics.redis_failures.labels("fetch").inc()
    if not isinstance(found, bytes):
        raise found
    return HistoryAnswer(
        user_id=user_id, behaviors=_behaviors(services, history_in_time_order(found))
    )


@router.get(
    "/items/sample",
    summary="Some items of a catalogue",
    responses=responses(InvalidRequestError, UnknownArmError),
)
async def some_items(
    request: Request,
    limit: HowMany = 10,
    arm: Annotated[
        ArmName | None,
        WithJsonSchema(TypeAdapter(ArmName).json_schema()),  # it may be absent, and is never null
        Query(description="Whose catalogue; the first arm's unless said."),
    ] = None,
) -> SomeItems:
    """Return items that the model of an arm knows, drawn at random without repetition."""
    services = services_of(request)
    chosen = next(iter(services.arms)) if arm is None else services.arms.arm_for("", arm)
    item_ids = chosen.model.catalogue.item_ids
    drawn = np.random.default_rng().choice(item_ids, min(limit, len(item_ids)), replace=False)
    return SomeItems(items=[_item(services, item_id) for item_id in drawn.tolist()])


def _behaviors(services: Services, records: bytes) -> list[TitledBehavior]:
    rows: list[Any] = np.frombuffer(records, dtype=RECORD).tolist()
    return [
        TitledBehavior(item_id=item_id, time=at, title=services.titles.get(item_id))
        for item_id, at in rows
    ]


def _item(services: Services, item_id: int) -> TitledItem:
    return TitledItem(item_id=item_id, title=services.titles.get(item_id))
