"""Reading wrk's report."""

import pytest

from loadtest.benchmarks.overhead import parse_wrk

_REPORT = """Running 8s test @ http://127.0.0.1:1
  1 threads and 8 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.23ms  100.00us   5.00ms   90.00%
  Latency Distribution
     50%    1.20ms
     75%    1.30ms
     90%    1.40ms
     99%  980.00us
  1000 requests in 8.00s, 1.00MB read
{extra}Requests/sec:   4512.34
Transfer/sec:      1.00MB
"""


def test_rate_and_percentiles_are_read():
    result = parse_wrk(_REPORT.format(extra=""))
    assert result.requests_per_s == 4512.34
    assert result.p50_s == pytest.approx(0.0012)
    assert result.p99_s == pytest.approx(0.00098)
    assert result.failed == 0


def test_failures_of_every_kind_are_counted():
    """A server that refuses is fast, and must not look good for it."""
    extra = (
        "  Socket errors: connect 0, read 2, write 0, timeout 3\n  Non-2xx or 3xx responses: 7\n"
    )
    assert parse_wrk(_REPORT.format(extra=extra)).failed == 12


def test_another_report_is_an_error_that_shows_it():
    with pytest.raises(RuntimeError, match="unable to connect"):
        parse_wrk("unable to connect to 127.0.0.1:1")
