"""Bundles to be measured: real models of the project's own command lines, hardly trained.

What a model costs does not depend on what it has learned; one epoch on a small world is enough.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

BundleName = Literal["imn-3p-plus", "youtube-dnn", "popularity"]
BUNDLE_NAMES: tuple[BundleName, ...] = ("imn-3p-plus", "youtube-dnn", "popularity")

_RUNS: dict[BundleName, tuple[str, ...]] = {
    "imn-3p-plus": ("demo-imn-3p", "--set", "model.enhancement_steps=3"),
    "youtube-dnn": ("demo-youtube-dnn",),
    "popularity": ("demo-popularity",),
}
# A shop's catalogue, of which few items are ever met: every table has its real size.
_WORLD = ("--users", "400", "--history-length", "100", "--memory", "90", "--items", "20000")


class BundleError(RuntimeError):
    """A step of making a bundle failed."""


def make_bundle(
    name: BundleName, folder: Path, *, history_length: int = 1000, seed: int = 1
) -> Path:
    """Return the bundle of a model for histories of `history_length`, made unless it is there.

    Another `seed` gives another model of the same cost.
    """
    run_folder = folder / f"{name}-{history_length}{'' if seed == 1 else f'-seed-{seed}'}"
    bundle = run_folder / "bundle"
    if not bundle.exists():
        log = _prepared_log(folder)
        settings = {"features.history_length": history_length, "train.seed": seed}
        chosen = [flag for setting, n in settings.items() for flag in ("--set", f"{setting}={n}")]
        epochs = ("--set", "train.max_epochs=1", "--no-progress")
        step("training", "train", *_RUNS[name], *chosen, *epochs, log, run_folder)
        step("exporter", run_folder / "model.pt", bundle)
    return bundle


def step(module: str, *arguments: str | Path) -> None:
    """Run one of the project's command lines; raises BundleError with what it said."""
    command: Sequence[str] = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise BundleError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")


def _prepared_log(folder: Path) -> Path:
    prepared = folder / "log"
    if not prepared.exists():
        folder.mkdir(parents=True, exist_ok=True)
        step("loadtest", "world", folder / "world.parquet", *_WORLD)
        step("training", "prepare", folder / "world.parquet", prepared)
    return prepared
