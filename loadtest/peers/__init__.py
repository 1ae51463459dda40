"""Other model servers, each doing the work of the service, for a fair comparison."""

import os

# onnxruntime 1.29 and later tells Microsoft about the machine and its models unless this is set
# before it is imported; a thread of its own does.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
