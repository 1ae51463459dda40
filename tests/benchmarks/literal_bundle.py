"""IMN's equations taken literally, as a bundle: what a peer is given that has no rearranged graph.

    python -m tests.benchmarks.literal_bundle MODEL.pt BUNDLE TARGET

The bundle is that of the same checkpoint, but for its graph; its golden rows hold all the same. A
checkpoint of anything but IMN without ablations is refused.
"""

import argparse
import json
import shutil
from pathlib import Path

from contract.bundle import MANIFEST, MODEL, file_entry
from exporter.convert import convert
from tests.training.models.literal_imn import LiteralIMN
from training.checkpoint import load_model
from training.folders import staged_folder
from training.models.build import Scorer
from training.models.imn import IterativeMemoryNetwork


def main(arguments: list[str] | None = None) -> None:
    """Write the bundle."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("checkpoint", "bundle", "target"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(arguments)
    trained = load_model(options.checkpoint)
    if not isinstance(trained.model, IterativeMemoryNetwork):
        parser.error(f"{options.checkpoint}: {trained.config.model.name} is not IMN")
    try:
        network = LiteralIMN(trained.model)
    except ValueError as error:
        parser.error(f"{options.checkpoint}: {error}")
    with staged_folder(options.target) as staging:
        shutil.copytree(options.bundle, staging, dirs_exist_ok=True)
        literal = Scorer(network, trained.score_kind, trained.calibration).eval()
        convert(literal, trained.config.features, staging / MODEL)
        manifest = json.loads((staging / MANIFEST).read_text())
        manifest["files"][MODEL] = file_entry(staging / MODEL).model_dump()
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
