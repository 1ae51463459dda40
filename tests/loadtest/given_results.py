"""Results of a load as a test wants them, and a way of sending that finds nobody."""

import numpy as np

from loadtest.objective import Sending
from loadtest.open_loop import ScheduleResult, Target


def result_of(latencies_s: list[float], **fields) -> ScheduleResult:
    n = len(latencies_s)
    codes = np.where(np.isfinite(latencies_s), 200, 503).astype(np.int16)
    return ScheduleResult(
        **{
            "rate": n / 2.0,
            "duration_s": 2.0,
            "arrivals_s": np.linspace(0.0, 1.9, n),
            "latencies_s": np.array(latencies_s),
            "send_delays_s": np.zeros(n),
            "statuses": {200: n},
            "codes": codes,
            "waited": np.zeros(n, np.bool_),
            "sent": np.ones(n, np.bool_),
            "timed_out": np.zeros(n, np.bool_),
            **fields,
        }
    )


SENDING = Sending(
    target=Target(host="127.0.0.1", port=1, path="/score"),
    timeout_s=1.0,
    connections=1,
    processes=1,
    max_late_s=0.001,
)
