"""The pointer file: what it names, and that it is replaced whole or not at all."""

import shutil
from pathlib import Path

import pytest

from contract.errors import BundleError
from service.pointer import MAX_LINES, bundle_in_force, publish, rollback
from tests.service.tiny_bundle import change_manifest, flip_a_byte


@pytest.fixture
def bundles(good_bundle, tmp_path) -> list[Path]:
    """Three bundles, of the versions 0, 1, 2."""
    made = []
    for n in range(3):
        made.append(Path(shutil.copytree(good_bundle, tmp_path / f"bundle {n}")))
        change_manifest(made[n], model_version=str(n))
    return made


@pytest.fixture
def pointer(tmp_path) -> Path:
    return Path(tmp_path / "pointer")


def test_a_folder_stands_for_itself(tmp_path):
    assert bundle_in_force(tmp_path) == tmp_path
    assert bundle_in_force(Path("nowhere")) == Path("nowhere")


def test_what_is_published_is_in_force_and_the_others_follow_newest_first(pointer, bundles):
    for n in (0, 1, 2):
        assert publish(pointer, bundles[n]).model_version == str(n)
        assert bundle_in_force(pointer) == bundles[n]
    assert pointer.read_text() == "bundle 2\nbundle 1\nbundle 0\n"
    assert pointer.stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in pointer.parent.glob("*pointer*")) == ["pointer"]


def test_a_bundle_elsewhere_is_named_in_full(bundles, tmp_path):
    (tmp_path / "folder").mkdir()
    pointer = tmp_path / "folder" / "pointer"
    publish(pointer, bundles[0])
    assert pointer.read_text() == f"{bundles[0]}\n"


def test_one_that_is_published_again_moves_to_the_front(pointer, bundles):
    for n in (0, 1, 0):
        publish(pointer, bundles[n])
    assert pointer.read_text() == "bundle 0\nbundle 1\n"


def test_so_many_earlier_ones_are_kept(pointer, bundles):
    pointer.write_text("".join(f"earlier {n}\n" for n in range(100)))
    publish(pointer, bundles[0])
    assert len(pointer.read_text().splitlines()) == MAX_LINES


def test_rollback_goes_back_by_one_at_a_time(pointer, bundles):
    for bundle in bundles:
        publish(pointer, bundle)
    assert [rollback(pointer).model_version for _ in range(2)] == ["1", "0"]
    assert pointer.read_text() == "bundle 0\n"
    with pytest.raises(BundleError, match=r"names one bundle only, there is none to go back to"):
        rollback(pointer)
    assert pointer.read_text() == "bundle 0\n"


def test_what_does_not_hold_is_not_published(pointer, bundles):
    publish(pointer, bundles[0])
    flip_a_byte(bundles[1] / "model.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx has sha256"):
        publish(pointer, bundles[1])
    assert pointer.read_text() == "bundle 0\n"


def test_what_does_not_hold_any_more_is_not_rolled_back_to(pointer, bundles):
    for n in (0, 1):
        publish(pointer, bundles[n])
    shutil.rmtree(bundles[0])
    with pytest.raises(BundleError, match="no such folder"):
        rollback(pointer)
    assert pointer.read_text() == "bundle 1\nbundle 0\n"


def test_blank_lines_mean_nothing_and_folders_are_relative_to_the_file(pointer, monkeypatch):
    pointer.write_text("\n  model \n\n")
    monkeypatch.chdir("/")
    assert bundle_in_force(pointer) == pointer.parent / "model"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n\n", "is empty, its first line must name a bundle"), (b"\xff", "cannot be read: ")],
    ids=["empty", "no text"],
)
def test_a_file_that_names_nothing_is_refused(pointer, content, message):
    pointer.write_bytes(content)
    with pytest.raises(BundleError, match=f"^pointer {pointer}: {message}"):
        bundle_in_force(pointer)


def test_a_name_of_two_lines_is_refused(pointer, bundles):
    odd = bundles[0].rename(bundles[0].parent / "two\nlines")
    with pytest.raises(BundleError, match="cannot stand in one line"):
        publish(pointer, odd)
    assert not pointer.exists()


def test_a_folder_that_is_not_there_cannot_take_a_pointer(bundles, tmp_path):
    with pytest.raises(BundleError, match="cannot be written: "):
        publish(tmp_path / "nowhere" / "pointer", bundles[0])
