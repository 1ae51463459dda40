"""Spans, as a collector on a socket receives them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from service.app import create_app
from tests.service.conftest import patient_settings
from tests.service.dummy_model import DummyModel
from tests.service.live_service import LiveService, live_service, wait_until

pytest.importorskip("opentelemetry.sdk", reason="needs the extra `otel`")
trace_service = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="needs the extra `otel`"
)

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY = {"user_id": "ann", "candidates": [1]}
_ERROR = 2
_SERVER = 2


class Collector:
    """Keeps the spans that are sent to it; `resources` are the attributes of their senders."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []

    @contextmanager
    def listening(self) -> Iterator[str]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(trace_service.ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()
            thread.join()

    def take(self, request: Any) -> None:
        for one in request.resource_spans:
            self.resources.append(values(one.resource.attributes))
            for scope in one.scope_spans:
                self.spans.extend(scope.spans)

    def wait_for(self, count: int) -> list[Any]:
        """Return the spans in the order of their begin, as soon as there are so many."""
        wait_until(lambda: len(self.spans) >= count, f"{count} spans have come")
        assert len(self.spans) == count
        return sorted(self.spans, key=lambda span: (span.start_time_unix_nano, -len(span.name)))


def values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@pytest.fixture
def collector(monkeypatch) -> Iterator[Collector]:
    """A collector that OpenTelemetry's variables name."""
    found = Collector()
    with found.listening() as url:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield found


@contextmanager
def tracing_service(redis_url: str) -> Iterator[LiveService]:
    """Serve until the block ends; by then all that waits has been sent."""
    model = DummyModel()
    app = create_app(patient_settings(redis_url, tracing="otel"), lambda _: model)
    with live_service(app, model) as service:
        yield service


def test_a_request_and_its_stages_are_spans_of_the_callers_trace(collector, serve):
    service = serve(tracing="otel")
    given = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "shop=7"}
    answer = service.client.post("/score", json=BODY, headers={**given, "X-Request-Id": "r-1"})
    request, *stages = collector.wait_for(6)
    assert request.name == "POST /score"
    assert request.kind == _SERVER
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert request.trace_state == "shop=7"
    assert answer.headers["traceparent"] == f"00-{TRACE}-{request.span_id.hex()}-01"
    assert [stage.name for stage in stages] == ["queue", "fetch", "encode", "queue", "infer"]
    for stage in stages:
        assert (stage.trace_id, stage.parent_span_id) == (request.trace_id, request.span_id)
        assert request.start_time_unix_nano <= stage.start_time_unix_nano
        assert stage.start_time_unix_nano <= stage.end_time_unix_nano
        assert stage.end_time_unix_nano <= request.end_time_unix_nano
    said = values(request.attributes)
    assert said["http.route"] == "/score"
    assert said["http.request.method"] == "POST"
    assert said["http.response.status_code"] == 200
    assert (said["mneme.request_id"], said["mneme.arm"]) == ("r-1", "main")
    assert collector.resources[0]["service.name"] == "mneme"
    assert "ann" not in said.values()


def test_a_trace_may_begin_here(collector, serve):
    answer = serve(tracing="otel").client.post("/score", json=BODY)
    request = collector.wait_for(6)[0]
    assert request.parent_span_id == b""
    ids = f"{request.trace_id.hex()}-{request.span_id.hex()}"
    assert answer.headers["traceparent"] == f"00-{ids}-01"


def test_a_recommendation_says_its_sums(collector, serve):
    serve(tracing="otel").recommended()
    (request,) = collector.wait_for(1)
    assert request.name == "POST /recommend"
    said = values(request.attributes)
    assert {"mneme.queue_s", "mneme.infer_s", "mneme.fetch_s"} <= set(said)


def test_a_request_that_failed_is_an_error(collector, serve):
    service = serve(tracing="otel")
    service.model.fails_with = ZeroDivisionError()
    assert service.score().status_code == 500
    (request,) = collector.wait_for(1)
    assert request.status.code == _ERROR


@pytest.mark.parametrize(
    ("variable", "value", "flags"),
    [
        pytest.param("OTEL_TRACES_SAMPLER", "parentbased_always_on", "00", id="as the caller"),
        pytest.param("OTEL_TRACES_SAMPLER", "always_off", "01", id="never"),
        pytest.param("OTEL_SDK_DISABLED", "true", "01", id="disabled"),
    ],
)
def test_what_is_not_sampled_is_not_sent_and_says_so(
    collector, redis_url, monkeypatch, variable, value, flags
):
    monkeypatch.setenv(variable, value)
    given = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
    with tracing_service(redis_url) as service:
        answer = service.client.post("/score", json=BODY, headers=given)
    head, span_id, answered = answer.headers["traceparent"].rsplit("-", 2)
    assert (head, answered) == (f"00-{TRACE}", "00")
    assert span_id not in (PARENT, "0" * 16)
    assert collector.spans == []


def test_spans_that_wait_are_sent_at_the_end(collector, redis_url, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    with tracing_service(redis_url) as service:
        service.scores()
        assert collector.spans == []
    assert len(collector.spans) == 6


def test_the_name_of_the_service_is_the_operators(collector, serve, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ranking")
    serve(tracing="otel").scores()
    collector.wait_for(6)
    assert collector.resources[0]["service.name"] == "ranking"
