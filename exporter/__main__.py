"""`python -m exporter CHECKPOINT BUNDLE`: a trained model to a bundle, proven equal."""

import argparse
import sys
from pathlib import Path
from typing import get_args

from contract.bundle import Precision
from contract.errors import ContractError
from exporter.bundles import export
from exporter.errors import ExportError
from exporter.parity import ParityRow
from training.errors import TrainingError


def main(arguments: list[str] | None = None) -> int:
    """Export one model; return the exit code. Errors of the user end in one clear line."""
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
    try:
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
    except (ExportError, TrainingError, ContractError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.bundle}: {manifest.model_version}, {manifest.n_items:,} items, "
        f"{manifest.precision} within {manifest.golden_tolerance:.1e}"
    )
    return 0


def _print_parity(rows: list[ParityRow]) -> None:
    print("scores of the graph against the model, largest difference (relative above 1)")
    print(f"{'B':>4}{'L':>6}{'C':>6}{'difference':>13}")
    for row in rows:
        print(f"{row.batch_size:4}{row.length:6}{row.n_candidates:6}{row.max_difference:13.1e}")


if __name__ == "__main__":
    sys.exit(main())
