"""A bundle's manifest, the files it lists, and its catalogue."""

from collections.abc import Callable
from hashlib import sha256

import numpy as np

from contract.bundle import (
    CATALOGUE,
    FORMAT_VERSION,
    GOLDEN,
    MANIFEST,
    MODEL,
    REQUIRED_FILES,
    FileEntry,
    Manifest,
    read_catalogue,
    read_manifest,
    verify_files,
)
from contract.errors import BundleError
from contract.features import FeatureSpec
from tests.fuzz.pieces import Pieces, scratch_folder

_FOLDER = scratch_folder()
_IDS = np.array([3, 5, 8], dtype=np.int64)


def _good() -> Manifest:
    np.save(_FOLDER / CATALOGUE, _IDS)
    (_FOLDER / MODEL).write_bytes(b"a graph")
    (_FOLDER / GOLDEN).write_bytes(b"golden rows")
    contents = {name: (_FOLDER / name).read_bytes() for name in REQUIRED_FILES}
    return Manifest(
        format_version=FORMAT_VERSION,
        model_name="m",
        model_version="m-1",
        score_kind="probability",
        features=FeatureSpec(history_length=10),
        n_items=len(_IDS),
        golden_tolerance=1e-3,
        metrics={"auc": 0.7},
        training_config={"name": "m", "seed": [1, 2.5, None]},
        data_fingerprint="f",
        produced_with={"onnx": "1"},
        files={
            name: FileEntry(sha256=sha256(content).hexdigest(), size_bytes=len(content))
            for name, content in contents.items()
        },
    )


_GOOD = _good()
_CATALOGUE = (_FOLDER / CATALOGUE).read_bytes()


def _manifests(given: Pieces) -> None:
    (_FOLDER / CATALOGUE).write_bytes(_CATALOGUE)
    (_FOLDER / MANIFEST).write_bytes(given.rest())
    try:
        manifest = read_manifest(_FOLDER)
    except BundleError as error:
        if MANIFEST not in str(error):
            raise
        return
    assert manifest.format_version == FORMAT_VERSION
    assert 0 < manifest.golden_tolerance < float("inf")
    assert set(REQUIRED_FILES) <= set(manifest.files)
    for name in manifest.files:
        assert (_FOLDER / name).parent == _FOLDER
        assert "\0" not in name
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    try:
        verify_files(_FOLDER, manifest)
        catalogue = read_catalogue(_FOLDER, manifest)
    except BundleError:
        return
    assert catalogue.item_ids.tolist() == _IDS.tolist()


def _catalogues(given: Pieces) -> None:
    (_FOLDER / CATALOGUE).write_bytes(given.rest())
    try:
        catalogue = read_catalogue(_FOLDER, _GOOD)
    except BundleError as error:
        if CATALOGUE not in str(error):
            raise
        return
    ids_N = catalogue.item_ids
    assert ids_N.dtype == np.int64
    assert len(ids_N) == _GOOD.n_items
    assert (np.diff(ids_N) > 0).all()
    assert ids_N[0] >= 1


ASKED: list[Callable[[Pieces], None]] = [_manifests, _catalogues]
TOKENS = [
    *(f'"{name}"'.encode() for name in (*Manifest.model_fields, *REQUIRED_FILES)),
    *(
        b"NaN",
        b"Infinity",
        b"1e999",
        b"-0",
        b"null",
        b"true",
        b"\\u0000",
        b"\\ud800",
        b"../",
        b"[[[[",
    ),
    *(b"\x93NUMPY", b"'descr': '|O'", b"'shape': (1152921504606846976,)"),
]


def one_input(data: bytes) -> None:
    """Read one of them; whatever is raised but what is documented is a find."""
    given = Pieces(data)
    ASKED[given.byte() % len(ASKED)](given)


def seeds() -> list[bytes]:
    """Return inputs that are good ones."""
    return [b"\0" + _GOOD.model_dump_json().encode(), b"\1" + _CATALOGUE]
