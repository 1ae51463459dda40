"""A bundle, checked and loaded into onnxruntime.

Shapes: B requests, C candidates.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from contract.bundle import (
    GOLDEN,
    INPUT_NAMES,
    MODEL,
    OUTPUT_NAME,
    Manifest,
    read_catalogue,
    read_manifest,
    verify_files,
)
from contract.catalogue import Catalogue
from contract.encoding import ModelInputs, encode
from contract.errors import BundleError
from contract.golden import GoldenRows

Provider = Literal["cpu", "cuda"]
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Model(Protocol):
    """What the scorer needs of a model; a test's model need not be a network."""

    manifest: Manifest
    catalogue: Catalogue

    def run(self, inputs: ModelInputs) -> NDArray[np.float32]:
        """Return scores float32 [B, C]. Called by one thread at a time."""


class OnnxModel:
    """A bundle on one device. Raises BundleError when anything about it does not hold."""

    def __init__(self, folder: Path, *, provider: Provider = "cpu", threads: int = 0) -> None:
        _refuse_two_runtimes()
        self.folder = folder
        self.manifest = read_manifest(folder)
        verify_files(folder, self.manifest)
        self.catalogue = read_catalogue(folder, self.manifest)
        golden = GoldenRows.load(folder / GOLDEN)
        self._session = _open_session(folder, provider, threads)
        self._check_signature()
        self._check_golden(golden)

    def run(self, inputs: ModelInputs) -> NDArray[np.float32]:
        """Return scores float32 [B, C]."""
        (scores_BC,) = self._session.run([OUTPUT_NAME], inputs.as_feed())
        return scores_BC  # type: ignore[no-any-return]  # onnxruntime is untyped

    def _check_signature(self) -> None:
        n_granularities = len(self.manifest.features.granularities)
        expected = [
            (INPUT_NAMES[0], "tensor(int64)", 2, None),
            (INPUT_NAMES[1], "tensor(int64)", 3, n_granularities),
            (INPUT_NAMES[2], "tensor(int64)", 2, None),
            (OUTPUT_NAME, "tensor(float)", 2, None),
        ]
        nodes = [*self._session.get_inputs(), *self._session.get_outputs()]
        found = [
            (node.name, node.type, len(node.shape), node.shape[2] if len(node.shape) > 2 else None)
            for node in nodes
        ]
        if found != expected:
            raise BundleError(
                f"bundle {self.folder}: {MODEL} has (name, type, axes, granularities) {found}, "
                f"expected {expected}"
            )

    def _check_golden(self, golden: GoldenRows) -> None:
        """Score the golden rows on this very device and compare."""
        try:
            inputs, _ = encode(
                golden.histories,
                golden.candidates,
                golden.ranking_times,
                self.catalogue,
                self.manifest.features,
            )
            scores_BC = self.run(inputs)
        except Exception as error:  # onnxruntime's errors share no base class but Exception
            raise BundleError(
                f"bundle {self.folder}: {MODEL} cannot score {GOLDEN}: {error}"
            ) from error
        difference_BC = np.abs(scores_BC - golden.scores)
        tolerance = self.manifest.golden_tolerance * np.maximum(1.0, np.abs(golden.scores))
        if not (difference_BC <= tolerance).all():  # written so that NaN fails too
            raise BundleError(
                f"bundle {self.folder}: {MODEL} differs from {GOLDEN} by up to "
                f"{difference_BC.max():.2e}, allowed are {self.manifest.golden_tolerance:.0e}"
            )


def _open_session(folder: Path, provider: Provider, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if provider == "cuda":
        # Without this, nodes that the GPU cannot run move to the CPU silently.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    name = _PROVIDERS[provider]
    if name not in ort.get_available_providers():
        raise BundleError(
            f"bundle {folder}: cannot run on {provider}: this onnxruntime has no {name}, only "
            f"{', '.join(ort.get_available_providers())}"
        )
    try:
        session = ort.InferenceSession(folder / MODEL, options, providers=[name])
    except Exception as error:  # onnxruntime's errors share no base class but Exception
        raise BundleError(
            f"bundle {folder}: {MODEL} cannot be loaded for {provider}: {error}"
        ) from error
    if name not in session.get_providers():
        raise BundleError(f"bundle {folder}: asked for {name}, got {session.get_providers()}")
    return session


def _refuse_two_runtimes() -> None:
    found = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(found) > 1:
        raise BundleError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "uninstall both, then install one"
        )


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
