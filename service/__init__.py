"""A bundle and Redis to `POST /score`."""

import os

# onnxruntime 1.29 and later tells Microsoft about the machine and its models unless this is set
# before it is imported; a thread of its own does.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
