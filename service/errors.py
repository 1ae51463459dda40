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
    retry_after_s: int | None = None
    challenge: ClassVar[str | None] = None

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


class MalformedRequestError(ServiceError):
    """What arrived is no HTTP/1.1, or more of it ahead of its answers than is kept."""

    status = HTTPStatus.BAD_REQUEST
    problem = "malformed-request"
    title = "The request is not valid HTTP"


class HeadTooLargeError(ServiceError):
    """The target and the headers have more bytes than the service reads."""

    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    problem = "head-too-large"
    title = "The request's head is too large"


class RequestTooSlowError(ServiceError):
    """The request did not arrive in the time that it may take."""

    status = HTTPStatus.REQUEST_TIMEOUT
    problem = "request-too-slow"
    title = "The request took too long to arrive"


class BodyTooLargeError(ServiceError):
    """The body has more bytes than the service reads."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    problem = "body-too-large"
    title = "The request body is too large"


class UnsupportedEncodingError(ServiceError):
    """The body is compressed: the service would have to unpack what may have any size."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    problem = "unsupported-encoding"
    title = "The request body is encoded"


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


class DeviceMemoryError(ServiceError):
    """The device has no memory for the request, not even for a run of it alone."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    problem = "device-memory"
    title = "The device is out of memory"
    retry_after_s = 1


class TooManyConnectionsError(ServiceError):
    """The worker holds as many connections as it may."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    problem = "too-many-connections"
    title = "Too many connections are open"
    retry_after_s = 1


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


class UnauthenticatedError(ServiceError):
    """The request carries no key, or one that is not known or has expired."""

    status = HTTPStatus.UNAUTHORIZED
    problem = "unauthenticated"
    title = "A valid API key is needed"
    challenge = 'Bearer realm="mneme"'


class ForbiddenError(ServiceError):
    """The key is known, and its roles do not allow the request."""

    status = HTTPStatus.FORBIDDEN
    problem = "forbidden"
    title = "The API key does not allow this"
    challenge = 'Bearer realm="mneme", error="insufficient_scope"'


class RateLimitedError(ServiceError):
    """The key has been used more often than it may."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    problem = "rate-limited"
    title = "The API key has no requests left for now"

    def __init__(self, detail: str, *, retry_after_s: int = 1) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class ForeignPageError(ServiceError):
    """A browser asks for a page of another origin, where no key says that it may."""

    status = HTTPStatus.FORBIDDEN
    problem = "foreign-page"
    title = "Pages of other origins may not ask"


class NotHereError(ServiceError):
    """The route does not exist on the port that was asked."""

    status = HTTPStatus.NOT_FOUND
    problem = "not-found"
    title = "Not Found"


class ClientLeft(Exception):  # noqa: N818  # no error: nobody is there to be told
    """Nobody waits for the answer any more."""
