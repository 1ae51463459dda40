"""Retrieval from product keys: 1,024 x 1,024 experts against 16 x 16, side by side in one run.

    python -m tests.benchmarks.product_keys

One thread, k = 8, D = 64; from the query to the k weighted experts, in torch and as an exported
graph in onnxruntime. The sizes take turns, each call has another query, and each figure is the
median of all calls. Writes docs/results/product_keys.md, and its figures beside it as .json.
"""

import datetime
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from exporter.convert import OPSET
from loadtest.machine import describe_machine, yardstick_s
from loadtest.results import table
from training.models.product_keys import ProductKeys

_PAGE = Path(__file__).parents[2] / "docs" / "results" / "product_keys.md"
_COMMAND = "python -m tests.benchmarks.product_keys"
_SMALL, _LARGE = 16, 1024
_WIDTH, _EXPERTS = 64, 8
_BATCHES = (1, 8, 32)
_QUERIES, _ROUNDS = 64, 40

Retrieval = Callable[[np.ndarray], object]


def main() -> None:
    """Measure, and write the page and its figures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    memories = [
        ProductKeys(_WIDTH, keys_per_side=n, n_experts=_EXPERTS, value_width=_WIDTH).eval()
        for n in (_SMALL, _LARGE)
    ]
    with tempfile.TemporaryDirectory() as folder:
        runtimes = {
            "torch": [_in_torch(memory) for memory in memories],
            "onnxruntime": [_in_onnxruntime(memory, Path(folder)) for memory in memories],
        }
        measured = {
            (runtime, batch_size): _medians_s(both, batch_size)
            for runtime, both in runtimes.items()
            for batch_size in _BATCHES
        }
    rows = [
        (runtime, batch_size, f"{1e6 * small:.1f}", f"{1e6 * large:.1f}", f"{large / small:.2f}")
        for (runtime, batch_size), (small, large) in measured.items()
    ]
    page = table(("", "B", "256 experts, us", "1,048,576 experts, us", "ratio"), rows)
    small_s, large_s = measured["onnxruntime", 1]
    figures = {
        "pkm_retrieval_1M_over_256": round(large_s / small_s, 2),
        "pkm_retrieval_256_us": round(1e6 * small_s, 1),
        "pkm_retrieval_1M_us": round(1e6 * large_s, 1),
    }
    print(page)
    _write(page, figures)


def _in_torch(memory: ProductKeys) -> Retrieval:
    @torch.inference_mode()
    def retrieve(query_QD: np.ndarray) -> object:
        return memory(torch.from_numpy(query_QD))

    return retrieve


def _in_onnxruntime(memory: ProductKeys, folder: Path) -> Retrieval:
    path = folder / f"{memory.keys_per_side}.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch warns of its own deprecations while it exports
        program = torch.onnx.export(
            memory,
            (torch.zeros(2, _WIDTH),),
            dynamo=True,
            input_names=["query"],
            opset_version=OPSET,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("Q", min=1)},),
        )
    assert program is not None
    program.save(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda query_QD: session.run(None, {"query": query_QD})


def _medians_s(both: list[Retrieval], batch_size: int) -> list[float]:
    shape = (_QUERIES, batch_size, _WIDTH)
    queries = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    taken_s: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for retrieve, taken in zip(both, taken_s, strict=True):
            for query_QD in queries:
                started = time.perf_counter()
                retrieve(query_QD)
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in taken_s]


def _write(page: str, figures: dict[str, float]) -> None:
    machine = f"{describe_machine()}; two million additions in Python: {yardstick_s():.3f} s"
    _PAGE.write_text(
        f"# Retrieval from product keys\n\n```\n{_COMMAND}\n```\n\n"
        f"{machine}. One thread, k = {_EXPERTS}, D = {_WIDTH}; from queries to their weighted\n"
        f"experts, {_SMALL} and {_LARGE:,} keys a side, in turn in one process; median of "
        f"{_QUERIES * _ROUNDS:,} calls.\n\n{page}\n\n"
        "4,096 times the experts are 64 times the sub-keys. A single query hardly feels them; in\n"
        "a batch their scores and the search among them outweigh the fixed cost of a call.\n"
        "`pkm_retrieval_1M_over_256` is the ratio in onnxruntime at B = 1.\n"
    )
    twin = {
        "figures": figures,
        "command": _COMMAND,
        "machine": machine,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    _PAGE.with_suffix(".json").write_text(json.dumps(twin, indent=2) + "\n")


if __name__ == "__main__":
    main()
