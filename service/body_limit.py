"""Refuses request bodies that are too large, or compressed, before they are read into memory."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTooLargeError, ServiceError, UnsupportedEncodingError
from service.problems import problem_response


class BodyLimit:
    """ASGI middleware: answers 413 to bodies of more than `max_bytes`, 415 to encoded ones.

    A length that is announced is refused at once. A body without one (chunked) is gathered up to
    the limit before the application sees it: an error raised while the application reads would be
    taken for a broken connection.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what fits."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = None
        for name, value in scope["headers"]:
            if name == b"content-length":
                announced = value
            elif name == b"content-encoding" and value != b"identity":
                error = UnsupportedEncodingError(
                    "the body has a Content-Encoding, expected plain JSON"
                )
                await self._refuse(error, scope, receive, send)
                return
        if announced is not None:  # the server reads no more than it announces
            body_fits = announced.isdigit() and int(announced) <= self._max_bytes
            if body_fits:
                await self._app(scope, receive, send)
            else:
                await self._refuse(self._too_large(), scope, receive, send)
            return
        gathered: list[Message] = []
        received = 0
        while not gathered or gathered[-1].get("more_body", False):
            gathered.append(await receive())
            received += len(gathered[-1].get("body", b""))
            if received > self._max_bytes:
                await self._refuse(self._too_large(), scope, receive, send)
                return
        waiting = iter(gathered)

        async def replay() -> Message:
            return next(waiting, None) or await receive()

        await self._app(scope, replay, send)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body has more than {self._max_bytes:,} bytes")

    async def _refuse(
        self, error: ServiceError, scope: Scope, receive: Receive, send: Send
    ) -> None:
        await problem_response(error)(scope, receive, send)
