"""The service does what its own OpenAPI says, and its OpenAPI says what it does."""

from contract.records import MAX_ITEM
from tests.service.openapi.schema_run import run_schemathesis

_EXAMPLES = 30


def test_nothing_is_answered_that_is_not_documented(serve, tmp_path):
    """No status, no content type, no refusal of what is allowed, no answer to what is not."""
    found = run_schemathesis(serve(explains=True), tmp_path, examples=_EXAMPLES, seed=1)
    assert found.failures == [], found.output
    assert found.requests > 12 * _EXAMPLES


def test_the_largest_item_id_is_told_exactly(service):
    """As a float it would be one that the service refuses."""
    text = service.client.get("/openapi.json").text
    assert f'"maximum":{MAX_ITEM}' in text
    assert "9.223372036854776" not in text


def test_each_route_tells_what_may_be_wrong_with_its_http(service):
    paths = service.client.get("/openapi.json").json()["paths"]
    for route in (route for methods in paths.values() for route in methods.values()):
        for status in ("400", "408", "431"):
            schema = route["responses"][status]["content"]["application/problem+json"]["schema"]
            assert schema["title"] == "Problem"
