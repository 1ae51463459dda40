"""Who may ask what, over real HTTP."""

import http.client
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import date, timedelta
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import Mount, Route

from loadtest.redis_server import free_port
from service.access import KEY, ROLES, Access, TokenBucket, route_of
from service.api_keys import ApiKeys, Role, described, make_key, parse_keys
from service.app import create_app
from service.errors import ServiceError
from service.listening import bind
from service.metrics import Metrics
from service.settings import Settings
from tests.service.conftest import patient_settings
from tests.service.dummy_model import DummyModel
from tests.service.histories import NOW
from tests.service.live_service import PATIENCE_S, LiveService, live_service
from tests.service.logged import Logged
from tests.service.problem_answers import assert_problem

ALL_ROLES = get_args(Role)
DOCUMENT = Path(__file__).parents[2] / "docs/security.md"
SCORE = {"user_id": "ann", "candidates": [1]}
# A request of each route that succeeds for whoever may.
REQUESTS: dict[str, tuple[str, str, Any]] = {
    "/": ("GET", "/", None),
    "/page/": ("GET", "/page/page.js", None),
    "/docs": ("GET", "/docs", None),
    "/openapi.json": ("GET", "/openapi.json", None),
    "/healthz": ("GET", "/healthz", None),
    "/readyz": ("GET", "/readyz", None),
    "/score": ("POST", "/score", SCORE),
    "/recommend": ("POST", "/recommend", {"user_id": "ann", "k": 1}),
    "/items/sample": ("GET", "/items/sample", None),
    "/models": ("GET", "/models", None),
    "/events": ("POST", "/events", {"user_id": "ann", "item_id": 1, "time": NOW}),
    "/explain": ("POST", "/explain", SCORE),
    "/users/sample": ("GET", "/users/sample", None),
    "/users/{user_id}/history": ("GET", "/users/a/history/history", None),
    "/metrics": ("GET", "/metrics", None),
    "/experiments": ("GET", "/experiments", None),
}
GUARDED = sorted(route for route in REQUESTS if ROLES[route] is not None)
OPEN = sorted(set(REQUESTS) - set(GUARDED))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class KeyFile:
    """A file of keys, and the keys that stand nowhere else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: dict[str, str] = {}

    def add(self, name: str, *roles: str, **options: Any) -> str:
        """Return the key that was added."""
        key = self.keys[name] = make_key()
        with self.path.open("a") as file:
            file.write(described(name, key, roles=roles, **options))
        return key


@pytest.fixture
def keys(tmp_path) -> KeyFile:
    """A file with a key for each role, and one for all of them."""
    file = KeyFile(tmp_path / "keys.toml")
    for role in ALL_ROLES:
        file.add(role, role)
    file.add("all", *ALL_ROLES)
    return file


@pytest.fixture
def guarded(serve, keys) -> LiveService:
    """A service that asks for keys; its client's own may do everything."""
    service: LiveService = serve(api_keys=keys.path, explains=True)
    service.client.headers.update(bearer(keys.keys["all"]))
    return service


def address_of(service: LiveService, path: str) -> str:
    return str(service.client.base_url).rstrip("/") + path


def ask(service: LiveService, route: str, **headers: str) -> httpx.Response:
    """Ask a route as whom the headers say, and as nobody without."""
    method, path, body = REQUESTS[route]
    return httpx.request(
        method,
        address_of(service, path),
        json=body,
        headers=headers,
        trust_env=False,
        verify=False,
        timeout=30.0,
    )


def routes_of(router: Any) -> Iterator[Mount | Route]:
    """Yield what an application or a router of FastAPI's answers with."""
    for route in router.routes:
        if isinstance(route, Mount | Route):
            yield route
        else:
            yield from routes_of(route.original_router)


def name_of(route: Mount | Route) -> str:
    """Return the path of a route as `ROLES` writes it."""
    if isinstance(route, Mount):
        return f"{route.path}/"
    return route.path.replace("{user_id:text}", "{user_id}")


ROUTES = list(routes_of(create_app(Settings(bundle=Path("unused")), lambda _: DummyModel())))
# What a path may be made of so that it is nearly a route's.
PARTS = [*sorted(ROLES), "/users/", "/history", *"/;.?#a \0\r\n\v\x85\u2028"]


class TestTable:
    def test_every_route_of_the_application_has_its_place(self):
        paths = {name_of(route) for route in ROUTES}
        assert {"/score", "/page/", "/metrics"} <= paths
        assert {path for path in paths if route_of(path) == "other"} == set()
        assert set(ROLES) - paths == {"/admin/", "other"}

    @given(path=st.text() | st.lists(st.sampled_from(PARTS)).map("".join))
    def test_what_answers_a_path_is_what_it_was_checked_as(self, path):
        """But for a line break at its end, with which it is refused."""
        if not path.endswith("\n"):
            answering = [route for route in ROUTES if route.path_regex.match(path)]
            assert {route_of(path)} >= {route_of(name_of(route)) for route in answering}

    def test_every_route_is_asked_by_these_tests(self):
        assert set(ROLES) - set(REQUESTS) == {"/admin/", "other"}

    def test_the_document_says_the_same(self):
        rows = re.findall(r"^\| (`.*?) \| (\S+) \|", DOCUMENT.read_text(), re.MULTILINE)
        told = {
            route: None if role == "nobody's" else role.strip("`")
            for routes, role in rows
            for route in re.findall(r"`([^`]+)`", routes)
        }
        assert told == {
            ("any other" if route == "other" else route): role for route, role in ROLES.items()
        } | {"any other": "admin"}


@pytest.mark.parametrize("route", GUARDED)
class TestGuardedRoutes:
    def test_without_a_key_it_is_401(self, guarded, route):
        answer = ask(guarded, route)
        problem = assert_problem(answer, 401, "unauthenticated")
        assert problem["detail"] == "send an API key as `Authorization: Bearer KEY`"
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="mneme"'

    def test_the_role_that_it_asks_for_opens_it_and_no_other_does(self, guarded, keys, route):
        asked = ROLES[route]
        assert asked is not None
        answer = ask(guarded, route, **bearer(keys.keys[asked]))
        assert answer.status_code == 200, answer.text
        for role in set(ALL_ROLES) - {asked}:
            answer = ask(guarded, route, **bearer(keys.keys[role]))
            problem = assert_problem(answer, 403, "forbidden")
            assert problem["detail"] == f"this asks for the role {asked}; '{role}' has {role}"
            assert 'error="insufficient_scope"' in answer.headers["WWW-Authenticate"]


@pytest.mark.parametrize("route", OPEN)
def test_what_is_open_asks_nobody(guarded, route):
    assert ask(guarded, route).status_code == 200
    assert ask(guarded, route, **bearer("nonsense")).status_code == 200


@pytest.mark.parametrize("path", ["/admin/reload", "/admin/", "/nothing", "/score/", "/metrics/x"])
def test_what_nobody_has_thought_of_is_for_admins(guarded, keys, path):
    client = guarded.client
    assert_problem(client.get(path, headers=bearer(keys.keys["score"])), 403, "forbidden")
    answer = client.get(path, headers=bearer(keys.keys["admin"]))
    assert answer.status_code in (404, 405)


@pytest.mark.parametrize("kind", ["guarded", "service"])
@pytest.mark.parametrize("ending", ["%0a", "%0A?x", "%0a#", "%0a#z", "%0a?x#z"])
def test_a_path_that_ends_with_a_line_break_is_no_routes(request, keys, kind, ending):
    """The patterns of Starlette's routes pass it."""
    service = request.getfixturevalue(kind)
    host, port = service.address
    with closing(http.client.HTTPConnection(host, port, timeout=PATIENCE_S)) as connection:
        for method, path, _ in [*REQUESTS.values(), ("GET", "/admin/status", None)]:
            connection.request(method, path + ending, headers=bearer(keys.keys["admin"]))
            answer = connection.getresponse()
            problem = json.loads(answer.read())
            assert (answer.status, problem["type"]) == (400, "urn:mneme:problem:malformed-request")
            assert problem["detail"] == "the path ends with a line break, which no route's does"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer x{key}",
        "Bearer {short}",
        "Bearer {digest}",
        "Bearer " + "x" * 10_000,
    ],
    ids=[
        "empty",
        "scheme",
        "Basic",
        "bare",
        "longer",
        "before",
        "shorter",
        "digest",
        "long",
    ],
)
def test_what_is_no_known_key_is_401(guarded, keys, value):
    key = keys.keys["all"]
    digest = re.findall(r'sha256 = "(\w+)"', keys.path.read_text())[-1]
    value = value.format(key=key, short=key[:-1], digest=digest)
    answer = guarded.client.get("/models", headers={"Authorization": value})
    assert_problem(answer, 401, "unauthenticated")
    assert key not in answer.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_is_read_in_any_case(guarded, keys, scheme):
    headers = {"Authorization": f"{scheme}  {keys.keys['score']}"}
    assert guarded.client.get("/models", headers=headers).status_code == 200


def test_a_key_in_the_address_is_none(guarded, keys):
    """Addresses stand in logs of proxies and in histories of browsers."""
    key = keys.keys["all"]
    for query in (f"?key={key}", f"?access_token={key}", f"?Authorization=Bearer%20{key}"):
        url = address_of(guarded, f"/models{query}")
        assert_problem(httpx.get(url, trust_env=False, verify=False), 401, "unauthenticated")


def test_a_refused_score_costs_the_model_nothing(guarded):
    assert_problem(ask(guarded, "/score"), 401, "unauthenticated")
    assert guarded.model.runs == []


def test_a_body_that_is_too_large_is_not_read_for_whom_nobody_knows(guarded):
    url = address_of(guarded, "/score")
    answer = httpx.post(url, content=b"x" * 1_000_000, trust_env=False, verify=False)
    assert_problem(answer, 401, "unauthenticated")


def test_an_expired_key_says_so_to_whom_holds_it(serve, keys):
    today = date.today()  # noqa: DTZ011  # either neighbor would do
    old = keys.add("old", "score", expires=today - timedelta(days=1))
    new = keys.add("new", "score", expires=today + timedelta(days=2))
    service = serve(api_keys=keys.path)
    problem = assert_problem(ask(service, "/score", **bearer(old)), 401, "unauthenticated")
    assert problem["detail"] == "the API key 'old' has expired"
    assert ask(service, "/score", **bearer(new)).status_code == 200


def test_it_is_told_when_keys_expire_and_which_are_gone():
    metrics = Metrics()

    def expires(name: str) -> float | None:
        value: float | None = metrics.registry.get_sample_value(
            "mneme_api_key_expires_seconds", {"key": name}
        )
        return value

    def known(**days: date | None) -> ApiKeys:
        lines = [
            described(name, make_key(), roles=["score"], expires=day) for name, day in days.items()
        ]
        return parse_keys("".join(lines).encode(), Path("keys.toml"))

    keys = known(old=date(1970, 1, 2), forever=None)
    access = Access(Settings(bundle=Path("unused")), metrics, keys)
    assert (expires("old"), expires("forever")) == (86_400, 0)
    access.apply(known(new=date(1970, 1, 3), forever=None))
    assert (expires("old"), expires("new")) == (0, 2 * 86_400)


def test_keys_that_cannot_be_applied_leave_all_that_were_known():
    key = make_key()
    text = described("a", key, roles=["score"])
    text += described("b", make_key(), roles=["score"], requests_per_s=1.0)
    keys = parse_keys(text.encode(), Path("keys.toml"))
    access = Access(Settings(bundle=Path("unused")), Metrics(), keys)
    impossible = keys.keys["b"].model_copy(update={"burst": 10**400})  # no file may say so
    with pytest.raises(OverflowError):
        access.apply(ApiKeys.model_construct(keys={"b": impossible}))
    authorization = (b"authorization", f"Bearer {key}".encode())
    scope = {"path": "/score", "headers": [authorization]}
    access.check(scope)
    assert scope[KEY] == "a"


class TestRateLimit:
    def test_beyond_its_burst_a_key_is_429_and_others_are_not(self, serve, keys):
        slow = keys.add("slow", "score", "metrics", requests_per_s=0.001, burst=3)
        service = serve(api_keys=keys.path)
        for _ in range(3):
            assert ask(service, "/score", **bearer(slow)).status_code == 200
        answer = ask(service, "/score", **bearer(slow))
        problem = assert_problem(answer, 429, "rate-limited")
        assert problem["detail"] == "'slow' may send 0.001 requests a second"
        assert 900 < int(answer.headers["Retry-After"]) <= 1000
        assert_problem(ask(service, "/metrics", **bearer(slow)), 429, "rate-limited")
        assert ask(service, "/score", **bearer(keys.keys["score"])).status_code == 200

    def test_workers_share_it(self, serve, keys):
        """Each of them counts for itself, so each has its part."""
        slow = keys.add("slow", "score", requests_per_s=0.001, burst=4)
        service = serve(api_keys=keys.path, workers=2)
        statuses = [ask(service, "/score", **bearer(slow)).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]

    def test_a_bucket_holds_its_burst_and_fills_at_its_rate(self):
        bucket = TokenBucket(2.0, burst=3.0)
        assert [bucket.take(100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
        assert bucket.take(100.25) == 0.25
        assert bucket.take(100.5) == 0.0
        assert bucket.take(100.5) == 0.5
        assert [bucket.take(200.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]


def test_requests_are_counted_by_the_name_of_the_key(guarded, keys):
    ask(guarded, "/score")
    ask(guarded, "/score", **bearer("unknown"))
    ask(guarded, "/score", **bearer(keys.keys["score"]))
    ask(guarded, "/score", **bearer(keys.keys["score"]))
    ask(guarded, "/score", **bearer(keys.keys["events"]))

    def count(key, outcome):
        return guarded.metric("mneme_key_requests_total", key=key, outcome=outcome)

    assert count("", "unauthenticated") == 2
    assert count("score", "allowed") == 2
    assert count("events", "forbidden") == 1
    assert count("events", "allowed") == count("read", "allowed") == 0
    assert guarded.metric("mneme_requests_total", route="/score", status="401") == 2


def test_the_log_tells_the_name_of_the_key_and_not_the_key(guarded, keys):
    logged = Logged()
    with logged.listening(logging.DEBUG, personal_data=True):
        ask(guarded, "/score", **bearer(keys.keys["score"]))
        ask(guarded, "/score", **bearer(keys.keys["events"]))
        ask(guarded, "/score")
        allowed, forbidden, nobody = logged.wait_for("request-answered", 3)
    assert (allowed["key"], forbidden["key"]) == ("score", "events")
    assert [one["status"] for one in (allowed, forbidden, nobody)] == [200, 403, 401]
    assert "key" not in nobody
    assert not [key for key in keys.keys.values() if key in logged.text]


def test_no_key_is_told_by_any_metric(guarded, keys):
    for key in keys.keys.values():
        ask(guarded, "/score", **bearer(key))
    text = guarded.client.get("/metrics").text
    assert not [key for key in keys.keys.values() if key in text]


class TestOpenApi:
    def test_it_says_which_role_a_route_asks_for(self, guarded):
        document = guarded.client.get("/openapi.json").json()
        assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        asked = {
            path: operation.get("security", [{"key": [None]}])[0]["key"][0]
            for path, operations in document["paths"].items()
            for operation in operations.values()
        }
        assert asked["/score"] == "score"
        assert asked["/healthz"] is None
        assert asked == {path: ROLES[route_of(path)] for path in asked}

    def test_it_says_what_is_answered_without_a_key(self, guarded):
        document = guarded.client.get("/openapi.json").json()
        answers = document["paths"]["/score"]["post"]["responses"]
        assert "urn:mneme:problem:unauthenticated" in answers["401"]["description"]
        assert "urn:mneme:problem:forbidden" in answers["403"]["description"]
        both = answers["429"]["description"]
        assert "urn:mneme:problem:overloaded" in both
        assert both.count("urn:mneme:problem:rate-limited") == 1
        assert "401" not in document["paths"]["/healthz"]["get"]["responses"]

    def test_without_keys_it_asks_for_none(self, service):
        document = service.client.get("/openapi.json").json()
        assert "securitySchemes" not in document["components"]
        assert "401" not in document["paths"]["/score"]["post"]["responses"]


class TestForeignPages:
    """What pages of the web could ask by the browser of somebody who reaches the service."""

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://localhost:1"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Sec-Fetch-Site": "cross-site", "Origin": "{own}"},
        ],
        ids=[
            "elsewhere",
            "a sandbox",
            "another port",
            "cross",
            "a neighbor",
            "a browser knows better",
        ],
    )
    @pytest.mark.parametrize("route", ["/score", "/events", "/explain"])
    def test_they_may_not_ask_without_a_key(self, service, route, headers):
        own = address_of(service, "")
        headers = {name: value.format(own=own) for name, value in headers.items()}
        assert_problem(ask(service, route, **headers), 403, "foreign-page")

    def test_the_services_own_page_may(self, service):
        own = address_of(service, "")
        for headers in ({"Origin": own}, {"Sec-Fetch-Site": "same-origin", "Origin": "null"}):
            assert ask(service, "/score", **headers).status_code == 200
        assert ask(service, "/score", **{"Sec-Fetch-Site": "none"}).status_code == 200

    def test_links_to_the_service_work(self, service):
        headers = {"Sec-Fetch-Site": "cross-site"}
        assert ask(service, "/", **headers).status_code == 200

    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:8000", "a.b", "1.2.3.4.example", "[::1"]
    )
    def test_a_name_of_the_web_is_not_answered_on_loopback(self, service, host):
        """An address that a name of somebody else's leads to: DNS rebinding."""
        for route in ("/score", "/users/sample"):
            problem = assert_problem(ask(service, route, Host=host), 403, "foreign-page")
            assert f"not as '{host}'" in problem["detail"]

    @pytest.mark.parametrize(
        "host",
        [
            "localhost",
            "LOCALHOST:8000",
            "10.0.0.1:8000",
            "127.0.0.1",
            "[::1]:80",
            "app.localhost",
            "mneme",
        ],
    )
    def test_names_that_nobody_else_can_have_are(self, service, host):
        assert ask(service, "/score", Host=host).status_code == 200

    def test_where_others_guard_the_service_any_name_is(self, serve):
        service = serve(anonymous=True)
        assert ask(service, "/score", Host="scores.shop.example").status_code == 200
        foreign = {"Host": "scores.shop.example", "Origin": "https://evil.example"}
        assert_problem(ask(service, "/score", **foreign), 403, "foreign-page")

    def test_a_key_is_enough_anywhere(self, guarded, keys):
        """A page that knows none cannot send one, and one that does has been given it."""
        headers = {**bearer(keys.keys["score"]), "Origin": "https://shop.example"}
        assert ask(guarded, "/score", **headers, Host="scores.example").status_code == 200


_HEADERS = ("host", "origin", "sec-fetch-site", "authorization", "x-other")
_SENT = st.lists(
    st.tuples(
        st.sampled_from([name.encode() for name in _HEADERS]),
        st.binary() | st.sampled_from([b"Bearer ", b"[::1", b"//", b"a.b", b"null", b"1.2.3.4:x"]),
    )
)
_METRICS = Metrics()


@given(path=st.text() | st.sampled_from(sorted(ROLES)), headers=_SENT, method=st.text())
def test_whatever_is_sent_is_decided_and_without_a_key_only_what_is_open_passes(
    path, headers, method
):
    scope = {"path": path, "headers": headers, "method": method, "server": ("127.0.0.1", 8000)}
    key = described("all", make_key(), roles=ALL_ROLES)
    settings = Settings(bundle=Path("unused"))
    for keys in (None, parse_keys(key.encode(), Path("keys.toml"))):
        access = Access(settings, _METRICS, keys)
        try:
            access.check(scope)
        except ServiceError:
            continue
        assert keys is None or ROLES[route_of(path)] is None


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "PUT", "CONNECT", "X"])
@pytest.mark.parametrize("path", ["/score", "/models", "/nothing"])
def test_no_other_method_does_anything(service, method, path):
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = service.client.request(method, path, headers={**headers, "X-Secret": "an echo"})
    assert answer.status_code in (400, 403, 404, 405)
    assert "an echo" not in answer.text
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("route", sorted(REQUESTS))
def test_no_answer_is_taken_for_another_kind_nor_shared_with_other_origins(guarded, keys, route):
    for headers in (bearer(keys.keys["all"]), {}):
        answer = ask(guarded, route, **headers, Origin="https://evil.example")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("route", ["/users/sample", "/users/{user_id}/history", "/items/sample"])
def test_what_a_user_did_is_kept_by_no_cache(service, route):
    assert ask(service, route).headers["Cache-Control"] == "no-store"


class TestAdminPort:
    @pytest.fixture
    def both(self, redis_url) -> Any:
        """Return a function that starts a service with two ports, and asks either."""
        with ExitStack() as stack:

            def start(**changes: Any) -> Callable[..., httpx.Response]:
                public, admin = free_port(), free_port()
                settings = patient_settings(redis_url, port=public, admin_port=admin, **changes)
                model = DummyModel(explains=True)
                app = create_app(settings, lambda _: model)
                stack.enter_context(live_service(app, model, sockets=bind(settings)))

                def asked(where: str, route: str, **headers: str) -> httpx.Response:
                    method, path, body = REQUESTS.get(route, ("GET", route, None))
                    port = {"public": public, "admin": admin}[where]
                    url = f"http://127.0.0.1:{port}{path}"
                    return httpx.request(
                        method, url, json=body, headers=headers, trust_env=False, verify=False
                    )

                return asked

            yield start

    def test_each_port_answers_its_own_routes_and_both_say_how_they_are(self, both):
        asked = both()
        for route in REQUESTS:
            where = {True: 200, False: 404}
            is_admins = ROLES[route] in ("metrics", "admin")
            is_probe = route in ("/healthz", "/readyz")
            assert asked("admin", route).status_code == where[is_admins or is_probe], route
            assert asked("public", route).status_code == where[not is_admins], route

    def test_what_is_on_the_other_port_is_as_if_it_were_nowhere(self, both):
        asked = both()
        elsewhere, nowhere = asked("public", "/metrics"), asked("admin", "/nothing")
        assert elsewhere.json() == nowhere.json()
        assert_problem(elsewhere, 404, "not-found")

    def test_its_routes_ask_for_keys_all_the_same(self, both, keys):
        asked = both(api_keys=keys.path)
        assert_problem(asked("admin", "/metrics"), 401, "unauthenticated")
        answer = asked("admin", "/metrics", **bearer(keys.keys["score"]))
        assert_problem(answer, 403, "forbidden")
        answer = asked("admin", "/metrics", **bearer(keys.keys["metrics"]))
        assert answer.status_code == 200
        answer = asked("public", "/metrics", **bearer(keys.keys["metrics"]))
        assert_problem(answer, 404, "not-found")
