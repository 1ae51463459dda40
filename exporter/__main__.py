"""`python -m exporter CHECKPOINT BUNDLE`: a trained model to a bundle, proven equal.

`python -m exporter score BUNDLE REQUESTS SCORED`: what that bundle must answer.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

from contract.bundle import Precision
from contract.errors import ContractError
from contract.golden import GoldenRows
from exporter.bundles import export
from exporter.errors import ExportError
from exporter.parity import ParityRow
from exporter.scoring import score
from training.errors import TrainingError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code. Errors of the user end in one clear line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["score"]:
            return _score(arguments[1:])
        return _export(arguments)
    except (ExportError, TrainingError, ContractError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _export(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m exporter", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="model.pt of a run folder")
    parser.add_argument("bundle", type=Path, help="folder to write; must not exist")
    parser.add_argument("--version", help="name of this version; made from the hash unless said")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="tf32 and fp16 are faster on a GPU, and less exact",
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="PREPARED_LOG",
        help="the log of the run, to measure what tf32 or fp16 costs in AUC",
    )
    options = parser.parse_args(arguments)
    manifest = export(
        options.checkpoint,
        options.bundle,
        model_version=options.version,
        precision=options.precision,
        log=options.log,
        report=_print_parity,
        report_aucs=lambda fp32, variant: print(
            f"AUC on the test part: fp32 {fp32:.6f}, {options.precision} {variant:.6f}"
        ),
    )
    print(
        f"{options.bundle}: {manifest.model_version}, {manifest.n_items:,} items, "
        f"{manifest.precision} within {manifest.golden_tolerance:.1e}"
    )
    return 0


def _score(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m exporter score", description="Score requests by a bundle's graph alone."
    )
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument(
        "requests", type=Path, help=".npz of requests, as golden.npz; its scores are not looked at"
    )
    parser.add_argument(
        "scored", type=Path, help=".npz to write: the same with the bundle's scores"
    )
    options = parser.parse_args(arguments)
    rows = GoldenRows.load(options.requests)
    replace(rows, scores=score(options.bundle, rows)).save(options.scored)
    print(f"{options.scored}: {len(rows.histories):,} requests scored")
    return 0


def _print_parity(rows: list[ParityRow]) -> None:
    print("scores of the graph against the model, largest difference (relative above 1)")
    print(f"{'B':>4}{'L':>6}{'C':>6}{'difference':>13}")
    for row in rows:
        print(f"{row.batch_size:4}{row.length:6}{row.n_candidates:6}{row.max_difference:13.1e}")


if __name__ == "__main__":
    sys.exit(main())
