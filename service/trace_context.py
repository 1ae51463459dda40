"""Who asks: the id of a request, and its place in a trace (W3C Trace Context, level 1).

https://www.w3.org/TR/trace-context/
"""

import random
import re
from collections.abc import Iterable
from typing import NamedTuple

_REQUEST_ID = b"x-request-id"
_TRACEPARENT = b"traceparent"
_TRACESTATE = b"tracestate"
# Long enough for anybody's ids, and nothing that a log or a header would have to escape.
_ALLOWED_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
# version "-" trace-id "-" parent-id "-" flags; later versions may go on behind a dash.
_ALLOWED_PARENT = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
_SAMPLED = 1


class RequestContext(NamedTuple):
    """Ids of one request, in lower-case hex but for its own, which is the sender's where given.

    `parent_id`: the sender's span, None where this service begins the trace. `span_id`: the parent
    of what follows. `trace_state`: the sender's `tracestate`, which says nothing without a parent.
    """

    request_id: str
    trace_id: str
    span_id: str
    parent_id: str | None = None
    is_sampled: bool = False
    trace_state: str = ""

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that hand the context on."""
        flags = "01" if self.is_sampled else "00"
        return [
            (_REQUEST_ID, self.request_id.encode()),
            (_TRACEPARENT, f"00-{self.trace_id}-{self.span_id}-{flags}".encode()),
        ]


def read_context(headers: Iterable[tuple[bytes, bytes]]) -> RequestContext:
    """Return the context of a request from its headers (names in lower case).

    A request id that is not allowed is replaced, as is a `traceparent` that is not valid.
    """
    request_id = parent = None
    states: list[bytes] = []
    for name, value in headers:
        if name == _REQUEST_ID:
            request_id = value
        elif name == _TRACEPARENT:
            # Sent twice it says nothing: empty is not valid either.
            parent = value if parent is None else b""
        elif name == _TRACESTATE:
            states.append(value)
    # Ids are told apart, not kept secret, and the system's generator takes three times as long.
    fresh = random.getrandbits(192).to_bytes(24).hex()
    trace_id, span_id = fresh[:32], fresh[32:]
    if request_id is not None and _ALLOWED_ID.fullmatch(request_id):
        own_id = request_id.decode()
    else:
        own_id = trace_id
    found = None if parent is None else _ALLOWED_PARENT.fullmatch(parent)
    # Version 00 ends with the flags.
    if found is None or (found[1] == b"00" and found[5]):
        return RequestContext(own_id, trace_id, span_id)
    return RequestContext(
        own_id,
        found[2].decode(),
        span_id,
        found[3].decode(),
        bool(int(found[4], 16) & _SAMPLED),
        b",".join(states).decode("latin-1"),
    )
