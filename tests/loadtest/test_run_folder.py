"""Reports of given runs."""

import json
import math

import numpy as np

from loadtest.objective import Objective, judge
from loadtest.run_folder import Part, Run, make_report, markdown
from tests.loadtest.given_results import SENDING, result_of


def test_the_report_is_json_and_an_infinite_percentile_is_null():
    result = result_of([0.0101234] * 98 + [math.inf] * 2, statuses={200: 98, 503: 2})
    done = Run(
        verdict=judge(result, Objective(), SENDING),
        judged=result,
        parts=[Part(name="50x2", result=result), Part(name="0x5", result=None)],
    )
    report = json.loads(json.dumps(make_report(done, Objective(), 0.001), allow_nan=False))
    assert report["verdict"] == "FAIL"
    assert report["exit_code"] == 1
    assert report["judged"]["p50_s"] == 0.0101234
    assert report["judged"]["p99_s"] is None
    assert report["judged"]["errors"] == 0.02
    assert report["stages"][1] == {"stage": "0x5"}
    assert report["statuses"] == {"200": 98, "503": 2}
    page = markdown(report)
    assert "| 50x2 | 100 | 50.0 | 49.0 | 10.123 | 10.123 | - | - | 98.00 | 2.000 |" in page
    assert "by status: 98 of 200, 2 of 503" in page


def test_late_queued_and_unsent_requests_are_counted():
    n = 100
    result = result_of(
        [0.01] * n, send_delays_s=np.array([0.0005] * 97 + [0.002] * 3), queued=7, unsent=2
    )
    done = Run(
        verdict=judge(result, Objective(), SENDING),
        judged=result,
        parts=[Part(name="50x2", result=result)],
    )
    report = make_report(done, Objective(), 0.001)
    assert report["late_sends"]["requests"] == 3
    assert report["late_sends"]["p99_s"] == report["late_sends"]["max_s"] == 0.002
    assert report["judged"]["queued"] == 7
    assert report["judged"]["unsent"] == 2
