"""IMN exported: the rearranged graph against the literal one, side by side in one run.

    python -m tests.benchmarks.imn_graphs [--device cuda] [--batches 1] [--candidates 100]

Both are exported from the same weights and fed the same inputs, turn by turn. Peak memory is
what a process of its own adds to its resident set while it runs the graph once more.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from contract.encoding import ModelInputs
from contract.features import FeatureSpec
from exporter.convert import convert
from exporter.parity import random_inputs
from loadtest.machine import describe_machine
from tests.training.models.literal_imn import LiteralIMN
from training.models.build import Scorer
from training.models.encoder import ItemEncoder
from training.models.imn import IterativeMemoryNetwork

SPEC = FeatureSpec(history_length=1000)
N_ROWS = 50_000
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def main() -> None:
    """Print one row a shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=_PROVIDERS, default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 100, 500])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(_added_bytes(options.memory_of, options.batches[0], options.candidates[0]))
        return
    print(f"{describe_machine()}, {options.device}, L = {SPEC.history_length}")
    print(
        f"{'B':>4}{'C':>5}{'literal ms':>12}{'rearranged ms':>15}{'ratio':>8}"
        f"{'difference':>12}{'literal MB':>12}{'rearranged MB':>15}{'ratio':>8}"
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = _export(Path(folder))
        sessions = [_session(path, options.device) for path in paths]
        for batch_size in options.batches:
            for n_candidates in options.candidates:
                _row(paths, sessions, batch_size, n_candidates, options)


def _export(folder: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    model = IterativeMemoryNetwork(
        ItemEncoder(N_ROWS, 32),
        SPEC,
        embedding_dim=32,
        iterations=3,
        enhancement_steps=3,
        attention_units=8,
        head_units=(128, 64),
    )
    paths = (folder / "literal.onnx", folder / "rearranged.onnx")
    for network, path in zip((LiteralIMN(model), model), paths, strict=True):
        convert(Scorer(network, "probability"), SPEC, path)
    return paths


def _session(path: Path, device: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if device == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return ort.InferenceSession(path, options, providers=[_PROVIDERS[device]])


def _row(
    paths: tuple[Path, Path],
    sessions: list[ort.InferenceSession],
    batch_size: int,
    n_candidates: int,
    options: argparse.Namespace,
) -> None:
    feed = _inputs(batch_size, n_candidates).as_feed()
    literal, rearranged = (session.run(None, feed)[0] for session in sessions)
    times_s: tuple[list[float], list[float]] = ([], [])
    for _ in range(options.runs):
        for session, taken in zip(sessions, times_s, strict=True):
            started = time.perf_counter()
            session.run(None, feed)
            taken.append(time.perf_counter() - started)
    slow_ms, fast_ms = (1000 * statistics.median(taken) for taken in times_s)
    memory = ""
    if options.device == "cpu":
        large, small = (_memory_mb(path, batch_size, n_candidates) for path in paths)
        memory = f"{large:12.1f}{small:15.1f}{large / max(small, 0.1):8.1f}"
    print(
        f"{batch_size:4}{n_candidates:5}{slow_ms:12.2f}{fast_ms:15.2f}{slow_ms / fast_ms:8.1f}"
        f"{np.abs(literal - rearranged).max():12.1e}{memory}",
        flush=True,
    )


def _inputs(batch_size: int, n_candidates: int) -> ModelInputs:
    shape = (batch_size, SPEC.history_length, n_candidates)
    return random_inputs(SPEC, N_ROWS, shape, np.random.default_rng(0))


def _memory_mb(path: Path, batch_size: int, n_candidates: int) -> float:
    shape = ["--batches", str(batch_size), "--candidates", str(n_candidates)]
    command = [sys.executable, "-m", __spec__.name, "--memory-of", str(path), *shape]
    return int(subprocess.check_output(command)) / 1e6


def _added_bytes(path: Path, batch_size: int, n_candidates: int) -> int:
    """Return what one run at this shape adds to the process' peak resident set."""
    session = _session(path, "cpu")
    session.run(None, _inputs(1, 1).as_feed())  # what every shape needs is not counted
    feed = _inputs(batch_size, n_candidates).as_feed()
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    session.run(None, feed)
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
