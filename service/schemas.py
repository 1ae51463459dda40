"""The JSON of requests and answers, with examples for the OpenAPI page."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from contract.bundle import CalibrationMethod
from contract.errors import RecordError
from contract.records import (
    MAX_ITEM,
    MAX_TIME,
    MAX_USER_ID_BYTES,
    MIN_ITEM,
    MIN_TIME,
    check_user_id,
)
from service.experiment import ArmName

MAX_CANDIDATES = 1000
MAX_INLINE_BEHAVIORS = 10_000
MAX_EVENTS = 1000
MAX_RECOMMENDATIONS = 1000
MAX_EXPLAINED = 20
MAX_DEADLINE_MS = 60_000


def _user_id(value: Any) -> Any:
    # An integer is taken as its decimal string; bool is an int to Python, but no user id.
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        try:
            check_user_id(value)
        except RecordError as error:
            raise ValueError(str(error)) from error
    return value


UserId = Annotated[
    str,
    BeforeValidator(
        _user_id,
        json_schema_input_type=Annotated[str, Field(min_length=1, max_length=MAX_USER_ID_BYTES)]
        | int,
    ),
    Field(
        strict=True,
        description=f"1 to {MAX_USER_ID_BYTES} bytes; an integer is taken as its decimal string.",
        examples=["4711"],
    ),
]
ItemId = Annotated[
    int,
    Field(strict=True, ge=MIN_ITEM, le=MAX_ITEM, description="The shop's own id of an item."),
]
UnixTime = Annotated[int, Field(strict=True, ge=MIN_TIME, le=MAX_TIME, description="Unix seconds.")]
RankingTime = Annotated[
    UnixTime | None,
    Field(description="Moment from which elapsed time is measured back; now unless said."),
]


AskedArm = Annotated[
    ArmName | None,
    Field(description="Answer by this arm, whoever the user is: for testers."),
]


# Long lists of objects fail at the first that is wrong (`fail_fast`): a body of 200 KB can hold
# 30,000 errors, and to put all of them into words would hold up everybody else for 0.7 s.


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Behavior(_Body):
    """One thing that a user did."""

    item_id: ItemId
    time: UnixTime


class ScoreBody(_Body):
    """Candidates to be scored for a user."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [
                {"user_id": "4711", "candidates": [1193, 661, 914]},
                {
                    "user_id": "4711",
                    "candidates": [1193, 661],
                    "ranking_time": 978300760,
                    "history": [{"item_id": 3186, "time": 978300019}],
                },
            ]
        },
    )

    user_id: UserId
    candidates: Annotated[
        list[ItemId],
        Field(
            min_length=1,
            max_length=MAX_CANDIDATES,
            description="Scored in this order; an item that stands twice is scored twice.",
        ),
    ]
    ranking_time: RankingTime = None
    arm: AskedArm = None
    history: Annotated[
        list[Behavior] | None,
        Field(
            max_length=MAX_INLINE_BEHAVIORS,
            fail_fast=True,
            description="Oldest first; read from the history store unless given.",
        ),
    ] = None


class ScoreAnswer(BaseModel):
    """Scores in the order asked."""

    scores: list[float]
    score_kind: Literal["probability", "affinity"]
    arm: Annotated[str, Field(description="The arm that answered.")]
    model: str
    version: str
    history_length: Annotated[int, Field(description="Behaviors that the model has read.")]
    unknown_candidates: Annotated[
        int, Field(description="Candidates outside of the model's catalogue.")
    ]
    degraded: Annotated[
        bool, Field(description="Scored without the stored history: the store was away.")
    ]

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "scores": [0.81, 0.07, 0.33],
                    "score_kind": "probability",
                    "arm": "main",
                    "model": "imn-3p-plus",
                    "version": "imn-3p-plus-0f3a9c1d2e4b",
                    "history_length": 52,
                    "unknown_candidates": 0,
                    "degraded": False,
                }
            ]
        }
    )


class ExplainBody(ScoreBody):
    """A few candidates whose scores are to be explained."""

    candidates: Annotated[
        list[ItemId],
        Field(min_length=1, max_length=MAX_EXPLAINED, description="Explained in this order."),
    ]


class TitledItem(BaseModel):
    """An item, with its title where the operator has named a file of titles that holds it."""

    item_id: int
    title: str | None


class TitledBehavior(TitledItem):
    """One thing that a user did."""

    time: Annotated[int, Field(description="Unix seconds.")]


class ExplainedCandidate(TitledItem):
    """A candidate's score, and what every behavior weighed in it."""

    known: Annotated[bool, Field(description="Whether the model's catalogue holds it.")]
    score: float
    weights: Annotated[
        list[list[float]],
        Field(description="For each iteration one number for each of `behaviors`, in its order."),
    ]


class ExplainAnswer(BaseModel):
    """Scores in the order asked, and what they are made of."""

    behaviors: Annotated[
        list[TitledBehavior], Field(description="Those that the model has read, oldest first.")
    ]
    candidates: list[ExplainedCandidate]
    iterations: int
    score_kind: Literal["probability", "affinity"]
    arm: Annotated[str, Field(description="The arm that answered.")]
    model: str
    version: str
    history_length: Annotated[int, Field(description="Behaviors that the model has read.")]
    degraded: Annotated[
        bool, Field(description="Explained without the stored history: the store was away.")
    ]

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "behaviors": [
                        {"item_id": 3186, "title": "Girl, Interrupted", "time": 978300019},
                        {"item_id": 1721, "title": "Titanic", "time": 978300055},
                    ],
                    "candidates": [
                        {
                            "item_id": 1193,
                            "title": "One Flew Over the Cuckoo's Nest",
                            "known": True,
                            "score": 0.81,
                            "weights": [[0.31, 0.02], [0.27, 0.01], [0.3, 0.01]],
                        }
                    ],
                    "iterations": 3,
                    "score_kind": "probability",
                    "arm": "main",
                    "model": "imn-3p-plus",
                    "version": "imn-3p-plus-0f3a9c1d2e4b",
                    "history_length": 2,
                    "degraded": False,
                }
            ]
        }
    )


class HistoryAnswer(BaseModel):
    """What is stored of a user."""

    user_id: str
    behaviors: Annotated[
        list[TitledBehavior],
        Field(description="Oldest first; empty where the user is unknown."),
    ]


class SomeUsers(BaseModel):
    """Users, drawn at random from those who have a history."""

    user_ids: list[str]


class SomeItems(BaseModel):
    """Items, drawn at random from a catalogue."""

    items: list[TitledItem]


class RecommendBody(_Body):
    """A user for whom the whole catalogue is to be ranked."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [
                {"user_id": "4711", "k": 10},
                {"user_id": "4711", "k": 3, "exclude_seen": True, "ranking_time": 978300760},
            ]
        },
    )

    user_id: UserId
    k: Annotated[
        int,
        Field(
            strict=True,
            ge=1,
            le=MAX_RECOMMENDATIONS,
            description="Items to recommend; at most as many as the catalogue holds.",
        ),
    ]
    exclude_seen: Annotated[
        bool,
        Field(
            strict=True,
            description="Leave out every item that stands in the user's stored history, also those "
            "that are older than what the model reads.",
        ),
    ] = False
    ranking_time: RankingTime = None
    arm: AskedArm = None


class RecommendAnswer(BaseModel):
    """The items of the highest scores, best first; of equal ones the smaller item id."""

    item_ids: Annotated[
        list[int],
        Field(description="`k` items, or fewer where the user has seen almost all others."),
    ]
    scores: Annotated[
        list[float],
        Field(description="Their affinities, of which only the order means something."),
    ]
    arm: Annotated[str, Field(description="The arm that answered.")]
    model: str
    version: str
    history_length: Annotated[int, Field(description="Behaviors that the model has read.")]
    degraded: Annotated[
        bool,
        Field(
            description="Ranked without the stored history: the store was away. Seen items are not "
            "left out then."
        ),
    ]

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "item_ids": [1193, 914, 661],
                    "scores": [7.25, 6.5, 6.125],
                    "arm": "main",
                    "model": "sasrec",
                    "version": "sasrec-0f3a9c1d2e4b",
                    "history_length": 52,
                    "degraded": False,
                }
            ]
        }
    )


class Event(_Body):
    """One behavior of one user."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"user_id": "4711", "item_id": 1193, "time": 978300760}]},
    )

    user_id: UserId
    item_id: ItemId
    time: Annotated[UnixTime | None, Field(description="When it happened; now unless said.")] = None


class EventBatch(_Body):
    """Behaviors of any users, each user's oldest first."""

    events: Annotated[list[Event], Field(min_length=1, max_length=MAX_EVENTS, fail_fast=True)]


def _kind(body: Any) -> str:
    return "many" if isinstance(body, dict) and "events" in body else "one"


EventsBody = Annotated[
    Annotated[Event, Tag("one")] | Annotated[EventBatch, Tag("many")], Discriminator(_kind)
]


class EventsAnswer(BaseModel):
    """What became of the posted behaviors."""

    appended: Annotated[int, Field(description="Behaviors that are new in the histories.")]
    duplicates: Annotated[
        int, Field(description="Behaviors that stood there already, and were left out.")
    ]


class ModelInfo(BaseModel):
    """One arm and the model that it serves."""

    arm: str
    share: Annotated[float, Field(description="Of the users: answered, or listened to.")]
    shadow: Annotated[bool, Field(description="It scores and is measured, and never answers.")]
    model: str
    version: str
    score_kind: Literal["probability", "affinity"]
    history_length: Annotated[int, Field(description="Behaviors that it is given at most.")]
    items: int
    calibration: Annotated[
        CalibrationMethod,
        Field(description="How its probabilities were fitted to the validation part."),
    ]
    explains: Annotated[bool, Field(description="Whether `POST /explain` is answered.")]
    metrics: Annotated[
        dict[str, float],
        Field(
            description="Of the test part. Where probabilities are calibrated, they are those of "
            "the calibrated ones, and `..._uncalibrated` are those of the plain ones, such as of "
            "`expected_calibration_error`.",
            examples=[
                {
                    "auc": 0.72,
                    "expected_calibration_error": 0.004,
                    "expected_calibration_error_uncalibrated": 0.031,
                }
            ],
        ),
    ]


class Models(BaseModel):
    """All arms that serve, in the order of the experiments file."""

    models: list[ModelInfo]


class ExperimentInfo(BaseModel):
    """The experiment at present, and what became of the latest change of its file."""

    salt: Annotated[str, Field(description="Of the hash that deals the users out.")]
    shares: Annotated[dict[str, float], Field(description="By arm, of those that answer.")]
    shadows: Annotated[dict[str, float], Field(description="By arm, of those that never do.")]
    refused: Annotated[
        str | None,
        Field(description="Why the files, as they stand, are not served; null where they are."),
    ]


class WorkerStatus(BaseModel):
    """One serving process."""

    pid: int
    generation: int
    state: Annotated[
        Literal["starting", "ready", "serving", "leaving"],
        Field(description="Ready ones wait for the others; leaving ones end their connections."),
    ]


class ReloadStatus(BaseModel):
    """What became of a reload."""

    number: Annotated[int, Field(description="Counted from the start of the service.")]
    outcome: Literal["applied", "refused"]
    reason: Annotated[str | None, Field(description="Why it was refused.")]
    ended: Annotated[float, Field(description="Unix seconds.")]
    took_s: float


class Status(BaseModel):
    """The processes of the service, and what became of the latest reload."""

    generation: Annotated[int, Field(description="Grows with each reload that is applied.")]
    workers: list[WorkerStatus]
    reloading: Annotated[bool, Field(description="A new generation is asked for or being made.")]
    refused: Annotated[
        str | None,
        Field(description="Why the files, as they stand, are not served; null where they are."),
    ]
    last_reload: ReloadStatus | None


class Problem(BaseModel):
    """An error as of RFC 9457."""

    type: Annotated[str, Field(examples=["urn:mneme:problem:invalid-request"])]
    title: str
    status: int
    detail: str
    errors: list[dict[str, str]] | None = None
