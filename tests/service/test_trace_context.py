"""Request ids, and traceparent as the W3C recommendation says."""

import re

import pytest

from service.trace_context import read_context

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def headers(*traceparents: str, **others: str) -> list[tuple[bytes, bytes]]:
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in others.items()]
    return [*named, *((b"traceparent", value.encode()) for value in traceparents)]


class TestRequestId:
    @pytest.mark.parametrize("given", ["7", "checkout-17", "A.b_c:d/e+f=@", "x" * 128])
    def test_it_is_the_senders(self, given):
        assert read_context(headers(x_request_id=given)).request_id == given

    @pytest.mark.parametrize(
        "given", ["", "x" * 129, "two words", "line\nbreak", 'quo"te', "é", "a\0b", "<b>", "{}"]
    )
    def test_one_that_is_not_allowed_is_replaced(self, given):
        found = read_context(headers(x_request_id=given)).request_id
        assert re.fullmatch("[0-9a-f]{32}", found)

    def test_one_is_made_where_there_is_none_and_never_the_same(self):
        assert len({read_context([]).request_id for _ in range(100)}) == 100


class TestTraceparent:
    @pytest.mark.parametrize(
        ("flags", "is_sampled", "answered"),
        [("00", False, "00"), ("01", True, "01"), ("03", True, "01"), ("02", False, "00")],
    )
    def test_the_trace_goes_on_with_a_span_of_its_own(self, flags, is_sampled, answered):
        """Flags that level 1 does not know are set to zero."""
        context = read_context(headers(f"00-{TRACE}-{PARENT}-{flags}", tracestate="a=1"))
        assert (context.trace_id, context.parent_id) == (TRACE, PARENT)
        assert context.is_sampled == is_sampled
        assert context.trace_state == "a=1"
        assert re.fullmatch("[0-9a-f]{16}", context.span_id)
        assert context.span_id != PARENT
        handed_on = dict(context.headers)[b"traceparent"].decode()
        assert handed_on == f"00-{TRACE}-{context.span_id}-{answered}"

    @pytest.mark.parametrize(
        "traceparent",
        [f"cc-{TRACE}-{PARENT}-01", f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like"],
        ids=["as today", "with more"],
    )
    def test_of_a_later_version_what_is_known_is_read(self, traceparent):
        context = read_context(headers(traceparent))
        assert (context.trace_id, context.parent_id) == (TRACE, PARENT)
        assert dict(context.headers)[b"traceparent"].startswith(b"00-")

    @pytest.mark.parametrize(
        "traceparents",
        [
            pytest.param([], id="none"),
            pytest.param([""], id="empty"),
            pytest.param([f"ff-{TRACE}-{PARENT}-01"], id="version ff"),
            pytest.param([f"0-{TRACE}-{PARENT}-01"], id="short version"),
            pytest.param([f"00-{TRACE}-{PARENT}-01-more"], id="version 00 with more"),
            pytest.param([f"00-{TRACE}-{PARENT}-01-"], id="version 00 with a dash"),
            pytest.param([f"cc-{TRACE}-{PARENT}-01.more"], id="more without a dash"),
            pytest.param([f"00-{'0' * 32}-{PARENT}-01"], id="trace of zeros"),
            pytest.param([f"00-{TRACE}-{'0' * 16}-01"], id="parent of zeros"),
            pytest.param([f"00-{TRACE.upper()}-{PARENT}-01"], id="upper case"),
            pytest.param([f"00-{TRACE[:-1]}-{PARENT}-01"], id="short trace"),
            pytest.param([f"00-{TRACE}-{PARENT}0-01"], id="long parent"),
            pytest.param([f"00-{TRACE}-{PARENT}-1"], id="short flags"),
            pytest.param([f"00-{TRACE}-{PARENT}-.1"], id="flags that are no hex"),
            pytest.param([f"00_{TRACE}_{PARENT}_01"], id="no dashes"),
            pytest.param([f"00-{TRACE}-{PARENT}-01\n"], id="line break"),
            pytest.param([f"00-{TRACE}-{PARENT}-01"] * 2, id="twice"),
            pytest.param([f"00-{TRACE}-{PARENT}-01"] * 3, id="three times"),
        ],
    )
    def test_one_that_is_not_valid_is_replaced_and_its_state_forgotten(self, traceparents):
        context = read_context(headers(*traceparents, tracestate="a=1"))
        assert context.parent_id is None
        assert context.trace_state == ""
        assert context.trace_id != TRACE
        assert re.fullmatch(
            rb"00-[0-9a-f]{32}-[0-9a-f]{16}-00", dict(context.headers)[b"traceparent"]
        )

    def test_states_of_several_headers_are_one(self):
        state = [(b"tracestate", b"a=1"), (b"tracestate", b"b=2")]
        context = read_context([*headers(f"00-{TRACE}-{PARENT}-01"), *state])
        assert context.trace_state == "a=1,b=2"
