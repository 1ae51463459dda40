"""What the schema cannot say, so that schemathesis asks what a client who knows would ask."""

import itertools
import time
from typing import Any

import schemathesis
from schemathesis import Case, HookContext

from contract.records import MAX_USER_ID_BYTES
from service.experiment import SINGLE_ARM
from tests.service.dummy_model import KNOWN_ITEMS

_NUMBERS = itertools.count()


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], **kwargs: Any) -> None:
    """Let a valid request be valid for this service: its arm, its catalogue, its clock, its key."""
    del context, kwargs
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if case.query and "arm" in case.query:
        case.query["arm"] = SINGLE_ARM
    if case.headers and "Idempotency-Key" in case.headers:
        case.headers["Idempotency-Key"] = f"request-{next(_NUMBERS)}"
    body: Any = _whole(case.body)
    case.body = body
    if not isinstance(body, dict):
        return
    if body.get("arm") is not None:
        body["arm"] = SINGLE_ARM
    if "k" in body:
        body["k"] = min(body["k"], KNOWN_ITEMS)
    for event in [body, *body.get("events", ())]:
        if event.get("time") is not None:
            event["time"] = min(event["time"], int(time.time()))
        if isinstance(event.get("user_id"), str):
            event["user_id"] = _shortened(event["user_id"])


def _whole(value: Any) -> Any:
    """Return integers for 2.0, which JSON Schema counts among them: to this service it is no id."""
    if isinstance(value, dict):
        return {name: _whole(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shortened(user_id: str) -> str:
    # The schema counts characters, the service bytes.
    return user_id.encode()[:MAX_USER_ID_BYTES].decode(errors="ignore")
