"""The errors of the service: what each means, its HTTP status, and its stable problem type.

`service.problems` turns them into answers; nothing else maps errors to statuses.
"""

from http import HTTPStatus
from typing import ClassVar


class ServiceError(Exception):
    """An answer other than scores. `detail` says what was wrong and what was expected."""

    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    problem: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "The service failed"
    retry_after_s: ClassVar[int | None] = None

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class InvalidRequestError(ServiceError):
    """A field is missing, unknown or outside its range."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    problem = "invalid-request"
    title = "The request is not valid"


class IdempotencyKeyReusedError(ServiceError):
    """An Idempotency-Key came with another body than before."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    problem = "idempotency-key-reused"
    title = "The idempotency key belongs to another request"


class UnknownArmError(ServiceError):
    """The request names an arm that the experiment does not have."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    problem = "unknown-arm"
    title = "There is no such arm"


class BodyTooLargeError(ServiceError):
    """The body has more bytes than the service reads."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    problem = "body-too-large"
    title = "The request body is too large"


class HistoryUnavailableError(ServiceError):
    """Redis did not answer in time, or refused the command."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    problem = "history-unavailable"
    title = "The history store is away"
    retry_after_s = 1


class CorruptHistoryError(ServiceError):
    """What is stored under a user's key is no history."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    problem = "corrupt-history"
    title = "The stored history is broken"


class OverloadedError(ServiceError):
    """The queue holds as much work as it may, or so much that the deadline cannot be met."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    problem = "overloaded"
    title = "Too much work is waiting"
    retry_after_s = 1


class DeadlineExceededError(ServiceError):
    """The deadline has passed, or cannot be met any more, and not everything is scored."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    problem = "deadline-exceeded"
    title = "The request could not be scored in time"
    retry_after_s = 1


class ModelFailedError(ServiceError):
    """The model gave something other than finite scores."""

    problem = "model-failed"
    title = "The model could not score the request"


class NotRecommendableError(ServiceError):
    """The bundle's scores are no affinities, by which a whole catalogue could be ranked."""

    status = HTTPStatus.CONFLICT
    problem = "not-recommendable"
    title = "The served model gives no recommendations"


class NotExplainableError(ServiceError):
    """The bundle has no graph that tells what behaviors weigh."""

    status = HTTPStatus.CONFLICT
    problem = "not-explainable"
    title = "The served model gives no explanations"


class ClientLeft(Exception):  # noqa: N818  # no error: nobody is there to be told
    """Nobody waits for the answer any more."""
