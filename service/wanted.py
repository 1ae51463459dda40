"""What is to be served, by the files as they stand."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from contract.bundle import MANIFEST, Manifest, read_manifest
from service.experiment import Experiment, read_experiment
from service.pointer import bundle_in_force
from service.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An experiment whose bundles are there. `versions`: of their models, by folder.

    `fingerprint`: another one means that something else is to be served.
    """

    experiment: Experiment
    versions: Sequence[str]
    fingerprint: str


def read_wanted(settings: Settings) -> Wanted:
    """Return what the bundle, the pointer file or the experiments file says.

    Reads manifests and no model. Raises BundleError or ExperimentError.
    """
    experiment = wanted_experiment(settings)
    digest = hashlib.sha256(experiment.model_dump_json().encode())
    versions = []
    for bundle in sorted({arm.bundle for arm in experiment.arms.values()}):
        manifest = read_manifest(bundle)
        versions.append(manifest.model_version)
        digest.update(_state(bundle, manifest).encode())
    return Wanted(experiment=experiment, versions=versions, fingerprint=digest.hexdigest())


def wanted_experiment(settings: Settings) -> Experiment:
    """Return the arms that the settings name. Raises BundleError or ExperimentError."""
    if settings.bundle is not None:
        return Experiment.of_bundle(bundle_in_force(settings.bundle))
    assert settings.experiments is not None, "the settings name one or the other"
    return read_experiment(settings.experiments)


def _state(bundle: Path, manifest: Manifest) -> str:
    """Return what tells the files of a bundle from others, without reading all of them.

    Times and sizes are among it: a copy that was half done when it was refused is tried again.
    """
    lines = [manifest.model_dump_json()]
    for name in sorted([*manifest.files, MANIFEST]):
        with suppress(FileNotFoundError):
            found = (bundle / name).stat()
            lines.append(f"{name} {found.st_size} {found.st_mtime_ns} {found.st_ino}")
    return "\n".join(lines)
