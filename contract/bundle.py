"""The bundle: one exported model in a folder with everything that is needed to serve it.

manifest.json    what it is, how to encode for it, and the sha256 and size of every other file
model.onnx       the graph (with model.onnx.data beside it where tables are large)
catalogue.npy    int64 item ids, ascending
golden.npz       requests and the scores they must get
explain.onnx     where the model can tell: the same scores, and what each behavior weighs (with
                 explain.onnx.data beside it where tables are large)
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from contract.catalogue import Catalogue
from contract.errors import BundleError
from contract.features import FeatureSpec
from contract.files import open_plain, read_array, read_plain

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
CATALOGUE = "catalogue.npy"
GOLDEN = "golden.npz"
EXPLAIN = "explain.onnx"
REQUIRED_FILES = (MODEL, CATALOGUE, GOLDEN)

INPUT_NAMES = ("history_items", "history_buckets", "candidate_items")
OUTPUT_NAME = "scores"
# Of the explain graph, beside the scores [B, C]: float32 [B, C, P, L], P passes over the history.
WEIGHTS_NAME = "weights"

ScoreKind = Literal["probability", "affinity"]
Precision = Literal["fp32", "tf32", "fp16"]
CalibrationMethod = Literal["none", "platt", "isotonic"]
_HASH_CHUNK_BYTES = 1 << 20
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_REASONS = 10
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


class FileEntry(BaseModel):
    """Size and hash of one file of the bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, Field(ge=0)]


class Manifest(BaseModel):
    """What manifest.json says.

    `score_kind`: a click `probability`, or an `affinity`, of which only the order means something.
    `golden_tolerance`: largest absolute difference of a served golden score.
    `produced_with`: versions of the programs that made the bundle, and the ONNX opset.
    `precision`: `tf32` allows the device to round the factors of matrix products to 10 mantissa
    bits; `fp16` is a graph of float16 weights. `auc_change`: AUC on the test part minus that of
    the fp32 model; None for fp32, and where it was not measured. `calibration`: of the graph's
    probabilities, on the validation part; `metrics` are those of the calibrated ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: int
    model_name: Annotated[str, Field(min_length=1)]
    model_version: Annotated[str, Field(min_length=1)]
    score_kind: ScoreKind
    features: FeatureSpec
    n_items: Annotated[int, Field(ge=0)]
    golden_tolerance: Annotated[float, Field(gt=0)]
    precision: Precision = "fp32"
    auc_change: float | None = None
    calibration: CalibrationMethod = "none"
    metrics: dict[str, float]
    training_config: dict[str, Any]
    data_fingerprint: str
    produced_with: dict[str, str]
    files: dict[str, FileEntry]

    @property
    def explains(self) -> bool:
        """Return whether the bundle holds an explain graph."""
        return EXPLAIN in self.files

    @model_validator(mode="after")
    def _files_are_plain_names(self) -> "Manifest":
        for name in self.files:
            if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
                raise ValueError(f"files: {name!r} is not a plain file name")
        missing = [name for name in REQUIRED_FILES if name not in self.files]
        if missing:
            raise ValueError(f"files: {', '.join(missing)} must be listed")
        return self


def file_entry(path: Path) -> FileEntry:
    """Return size and sha256 of a plain file, read in chunks."""
    with open_plain(path) as file:
        return FileEntry(sha256=_sha256(file), size_bytes=os.fstat(file.fileno()).st_size)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_HASH_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json; BundleError names the folder, the file and the reason."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"bundle {folder}: no such folder")
    try:
        content = read_plain(path, max_bytes=_MAX_MANIFEST_BYTES)
        raw = json.loads(content)
    except FileNotFoundError as error:
        raise BundleError(f"bundle {folder}: {MANIFEST} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"bundle {folder}: {MANIFEST} is not readable: {error}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"bundle {folder}: {MANIFEST} has format version {version!r}, "
            f"this program reads version {FORMAT_VERSION}"
        )
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}"
            for e in error.errors()[:_MAX_REASONS]
        )
        raise BundleError(f"bundle {folder}: {MANIFEST}: {reasons}") from error


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raise BundleError unless every listed file is there, plain, with its size and hash."""
    for name, expected in manifest.files.items():
        try:
            with open_plain(folder / name) as file:
                size, found = os.fstat(file.fileno()).st_size, ""
                if size == expected.size_bytes:
                    found = _sha256(file)
        except FileNotFoundError as error:
            raise BundleError(f"bundle {folder}: {name} is missing") from error
        except OSError as error:
            raise BundleError(f"bundle {folder}: {name}: {error.strerror}") from error
        if size != expected.size_bytes:
            raise BundleError(
                f"bundle {folder}: {name} has {size} bytes, {MANIFEST} says {expected.size_bytes}"
            )
        if found != expected.sha256:
            raise BundleError(
                f"bundle {folder}: {name} has sha256 {found[:12]}…, "
                f"{MANIFEST} says {expected.sha256[:12]}…: the file was altered"
            )


def read_catalogue(folder: Path, manifest: Manifest) -> Catalogue:
    """Read catalogue.npy; BundleError unless it is a catalogue of `manifest.n_items` items."""
    try:
        with open_plain(folder / CATALOGUE) as file:
            catalogue = Catalogue(read_array(file))
    except (OSError, ValueError) as error:
        raise BundleError(f"bundle {folder}: {CATALOGUE}: {error}") from error
    if len(catalogue) != manifest.n_items:
        raise BundleError(
            f"bundle {folder}: {CATALOGUE} holds {len(catalogue)} items, "
            f"{MANIFEST} says {manifest.n_items}"
        )
    return catalogue
