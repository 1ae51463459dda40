"""The routes: HTTP in, HTTP out, and nothing else."""

import time
from typing import Annotated

import orjson
from fastapi import APIRouter, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import WithJsonSchema

from contract.records import encode_records
from service.access import KEY
from service.arms import Arm
from service.errors import (
    BodyTooLargeError,
    CorruptHistoryError,
    DeadlineExceededError,
    DeviceMemoryError,
    HistoryUnavailableError,
    IdempotencyKeyReusedError,
    InvalidRequestError,
    ModelFailedError,
    NotRecommendableError,
    OverloadedError,
    UnknownArmError,
    UnsupportedEncodingError,
)
from service.experiment import Experiment
from service.history import Appended, Idempotency
from service.problems import responses
from service.recommender import RecommendRequest
from service.schemas import (
    MAX_DEADLINE_MS,
    EventBatch,
    EventsAnswer,
    EventsBody,
    ExperimentInfo,
    ModelInfo,
    Models,
    RecommendAnswer,
    RecommendBody,
    ScoreAnswer,
    ScoreBody,
)
from service.wiring import ARM, ASKED, STAGES, USABLE_SHARE, Services

router = APIRouter()

DeadlineMs = Annotated[
    float | None,
    # It may be absent, and is never null.
    WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": MAX_DEADLINE_MS}),
    Header(
        gt=0,
        le=MAX_DEADLINE_MS,
        description="Milliseconds within which the answer is of use; what cannot be answered "
        "by then is refused.",
    ),
]

IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[!-~]{1,256}$",
        description="Names this call, whatever becomes of it: 1 to 256 visible ASCII characters, "
        "a UUID for one. A repetition of the call bears the same key.",
    ),
]


def services_of(request: Request) -> Services:
    """Return the collaborators of the application that was asked."""
    services: Services = request.app.state.services
    return services


@router.post(
    "/score",
    summary="Score candidates for a user",
    response_model=ScoreAnswer,
    responses=responses(
        InvalidRequestError,
        UnknownArmError,
        BodyTooLargeError,
        UnsupportedEncodingError,
        OverloadedError,
        HistoryUnavailableError,
        DeadlineExceededError,
        DeviceMemoryError,
        CorruptHistoryError,
        ModelFailedError,
    ),
)
async def score(body: ScoreBody, x_deadline_ms: DeadlineMs = None) -> Response:
    """Score up to 1,000 candidates by the user's behaviors, in the order asked.

    An unknown user is scored with an empty history (`history_length` 0), unknown candidates as
    the unknown item. The `Server-Timing` header says where the time went, in milliseconds.
    """
    # This is the documentation of the route; the application hands it to `score_endpoint`.
    raise NotImplementedError


@router.post(
    "/recommend",
    summary="Rank the whole catalogue for a user",
    response_model=RecommendAnswer,
    responses=responses(
        InvalidRequestError,
        UnknownArmError,
        BodyTooLargeError,
        UnsupportedEncodingError,
        NotRecommendableError,
        OverloadedError,
        HistoryUnavailableError,
        DeadlineExceededError,
        DeviceMemoryError,
        CorruptHistoryError,
        ModelFailedError,
    ),
)
async def recommend(
    body: RecommendBody, request: Request, x_deadline_ms: DeadlineMs = None
) -> Response:
    """Return the `k` items of the catalogue with the highest scores, best first.

    For models whose scores are affinities only: `GET /models` says whether they are. An unknown
    user is recommended to by an empty history (`history_length` 0). The deadline is 200 ms unless
    the header or the operator says otherwise. The `Server-Timing` header says where the time went,
    in milliseconds; `queue` and `infer` are sums over the blocks in which the catalogue is scored.
    """
    services = services_of(request)
    started = time.perf_counter()
    settings = services.settings
    arm = services.arms.arm_for(body.user_id, body.arm)
    request.scope[ARM] = arm
    request.scope[ASKED] = body
    manifest = arm.model.manifest
    if manifest.score_kind == "affinity" and body.k > manifest.n_items:
        message = f"Input should be at most {manifest.n_items}, the items of the catalogue"
        raise RequestValidationError([{"type": "less_than_equal", "loc": ("k",), "msg": message}])
    deadline_s = settings.recommend_deadline_s if x_deadline_ms is None else x_deadline_ms / 1000
    found = await arm.recommender.recommend(
        RecommendRequest(
            user_id=body.user_id,
            k=body.k,
            exclude_seen=body.exclude_seen,
            ranking_time=int(time.time()) if body.ranking_time is None else body.ranking_time,
        ),
        deadline=started + USABLE_SHARE * deadline_s,
        has_left=request.is_disconnected,
    )
    ranked = time.perf_counter()
    content = orjson.dumps(
        {
            "item_ids": found.item_ids,
            "scores": found.scores,
            "arm": arm.name,
            "model": manifest.model_name,
            "version": manifest.model_version,
            "history_length": found.history_length,
            "degraded": found.degraded,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
    now = time.perf_counter()
    seconds = {**found.seconds, "respond": now - ranked, "total": now - started}
    request.scope[STAGES] = seconds
    for stage, taken_s in seconds.items():
        arm.metrics.observe_recommend_stage(stage, taken_s)
    arm.metrics.history_behaviors.observe(found.history_length)
    arm.metrics.degraded.inc(found.degraded)
    timing = ", ".join(f"{stage};dur={1000 * s:.3f}" for stage, s in seconds.items())
    return Response(content, media_type="application/json", headers={"Server-Timing": timing})


@router.post(
    "/events",
    summary="Append behaviors to histories",
    response_model=EventsAnswer,
    responses=responses(
        InvalidRequestError,
        IdempotencyKeyReusedError,
        BodyTooLargeError,
        UnsupportedEncodingError,
        HistoryUnavailableError,
        CorruptHistoryError,
    ),
)
async def events(
    body: EventsBody, request: Request, idempotency_key: IdempotencyKey = None
) -> EventsAnswer:
    """Append one behavior, or many as `{"events": [...]}`.

    Safe to repeat: a behavior (user, item, time) that stands among the user's newest 128 already,
    or among as many more as the call brings of the user, is not appended again. Give `time` where a
    call may be repeated: without it, the repetition is another moment, and so another behavior. A
    call that fails may have served some users; repeat it.

    With an `Idempotency-Key`, a new one for each call, a repetition appends nothing however long
    ago the first call was (an hour, unless the operator says otherwise), and gets the same
    answer; `time` may be left out. Another body under the same key is answered 422. Where API keys
    are asked for, callers with different ones may use the same `Idempotency-Key`.
    """
    services = services_of(request)
    now = int(time.time())
    latest = now + services.settings.max_clock_skew_s
    posted = body.events if isinstance(body, EventBatch) else [body]
    by_user: dict[str, tuple[list[int], list[int]]] = {}
    for number, event in enumerate(posted):
        happened = now if event.time is None else event.time
        if happened > latest:
            field = f"events.{number}.time" if isinstance(body, EventBatch) else "time"
            raise InvalidRequestError(
                f"{field}: {happened} lies more than {services.settings.max_clock_skew_s} s in "
                "the future (unix seconds are expected)"
            )
        items, times = by_user.setdefault(event.user_id, ([], []))
        items.append(event.item_id)
        times.append(happened)
    try:
        outcome = await services.history.append(
            {user_id: encode_records(*behaviors) for user_id, behaviors in by_user.items()},
            idempotency=None
            if idempotency_key is None
            else Idempotency.of(
                idempotency_key,
                body.model_dump_json().encode(),
                caller=request.scope.get(KEY, ""),
            ),
        )
    except HistoryUnavailableError:
        services.metrics.redis_failures.labels("append").inc()
        raise
    served = {user: one for user, one in outcome.items() if isinstance(one, Appended)}
    broken = [error for error in outcome.values() if isinstance(error, CorruptHistoryError)]
    appended = sum(one.count for one in served.values())
    new = sum(one.count for one in served.values() if not one.earlier)
    n_served = sum(len(by_user[user][0]) for user in served)
    services.metrics.events.labels("appended").inc(new)
    services.metrics.events.labels("duplicate").inc(n_served - new)
    services.metrics.events.labels("refused").inc(len(posted) - n_served)
    services.metrics.corrupt_appends.inc(len(broken))
    if broken:
        raise broken[0]
    return EventsAnswer(appended=appended, duplicates=len(posted) - appended)


def _described(arm: Arm, experiment: Experiment) -> ModelInfo:
    manifest, chosen = arm.model.manifest, experiment.arms[arm.name]
    return ModelInfo(
        arm=arm.name,
        share=chosen.share,
        shadow=chosen.shadow,
        model=manifest.model_name,
        version=manifest.model_version,
        score_kind=manifest.score_kind,
        history_length=arm.history_length,
        items=manifest.n_items,
        calibration=manifest.calibration,
        explains=arm.model.explain is not None,
        metrics=manifest.metrics,
    )


@router.get("/models", summary="What is served")
async def models(request: Request) -> Models:
    """Return share, model, version, calibration and test metrics of each arm."""
    arms = services_of(request).arms
    return Models(models=[_described(arm, arms.experiment) for arm in arms])


@router.get("/experiments", summary="Who is answered by what")
async def experiments(request: Request) -> ExperimentInfo:
    """Return the experiment that is served, and why what the files say now is not."""
    services = services_of(request)
    experiment = services.arms.experiment
    return ExperimentInfo(
        salt=experiment.salt,
        shares={name: arm.share for name, arm in experiment.arms.items() if not arm.shadow},
        shadows={name: arm.share for name, arm in experiment.arms.items() if arm.shadow},
        refused=services.supervised.status.refused,
    )


@router.get("/healthz", summary="Whether the process lives")
async def healthz() -> dict[str, str]:
    """Answer as long as the event loop runs."""
    return {"status": "alive"}


@router.get("/readyz", summary="Whether requests can be scored")
async def readyz(request: Request) -> Response:
    """Answer 200 when the model is loaded and histories can be read, 503 otherwise.

    Also while a run of the device takes so long that the process may have to be replaced. A service
    that was told to end answers 503 at once, and serves on for a while.
    """
    services = services_of(request)
    if services.supervised.draining:
        return JSONResponse({"status": "draining"}, 503)
    redis = await services.history.is_ready()
    is_stuck = services.watchdog.suspects_device
    ready = (redis or services.settings.on_redis_failure == "cold") and not is_stuck
    content = {"status": "ready" if ready else "not ready", "redis": "up" if redis else "away"}
    content |= {"device": "stuck"} if is_stuck else {}
    return JSONResponse(content, 200 if ready else 503)


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Return all metrics in Prometheus' text format."""
    services = services_of(request)
    services.metrics.redis_up.set(await services.history.is_ready())
    services.metrics.reload_refused.set(services.supervised.status.refused is not None)
    return Response(services.metrics.text(), media_type=CONTENT_TYPE_LATEST)
