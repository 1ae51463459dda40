"""What is to be served, and whether it is something else than before."""

import os
import shutil
from pathlib import Path

import pytest

from contract.errors import BundleError
from service.experiment import ExperimentError
from service.pointer import publish
from service.settings import Settings
from service.wanted import read_wanted
from tests.service.tiny_bundle import change_manifest


def test_a_folder_is_one_arm(bundle):
    wanted = read_wanted(Settings(bundle=bundle))
    assert {name: arm.bundle for name, arm in wanted.experiment.arms.items()} == {"main": bundle}
    assert wanted.versions == ["tiny-1"]


def test_a_pointer_stands_for_the_bundle_that_it_names(bundle, tmp_path):
    pointer = tmp_path / "pointer"
    publish(pointer, bundle)
    assert read_wanted(Settings(bundle=pointer)) == read_wanted(Settings(bundle=bundle))


def test_nothing_has_changed_where_nothing_was_changed(bundle):
    settings = Settings(bundle=bundle)
    assert read_wanted(settings).fingerprint == read_wanted(settings).fingerprint


def test_another_target_another_manifest_and_another_file_are_changes(bundle, tmp_path):
    pointer = tmp_path / "pointer"
    publish(pointer, bundle)
    settings = Settings(bundle=pointer)
    seen = [read_wanted(settings).fingerprint]
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    publish(pointer, other)
    seen.append(read_wanted(settings).fingerprint)
    change_manifest(other, model_version="tiny-2")
    seen.append(read_wanted(settings).fingerprint)
    (other / "model.onnx").unlink()  # a copy that is not done
    seen.append(read_wanted(settings).fingerprint)
    shutil.copy(bundle / "model.onnx", other)
    seen.append(read_wanted(settings).fingerprint)
    os.utime(other / "model.onnx", ns=(1, 1))
    seen.append(read_wanted(settings).fingerprint)
    assert len(set(seen)) == len(seen)


def test_each_bundle_of_an_experiment_is_looked_at(bundle, tmp_path):
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    change_manifest(other, model_version="tiny-2")
    path = tmp_path / "experiments.toml"
    arm = '[arms.{}]\nbundle = "{}"\nshare = 0.5\n'
    path.write_text('salt = "s"\n' + arm.format("a", bundle) + arm.format("b", other))
    settings = Settings(experiments=path)
    before = read_wanted(settings)
    assert before.versions == ["tiny-1", "tiny-2"]
    change_manifest(other, model_version="tiny-3")
    assert read_wanted(settings).fingerprint != before.fingerprint
    path.write_text(path.read_text().replace("0.5", "0.50"))  # says the same
    changed = read_wanted(settings).fingerprint
    path.write_text(path.read_text().replace('salt = "s"', 'salt = "t"'))
    assert read_wanted(settings).fingerprint != changed


def test_what_is_not_there_is_refused_by_its_name(tmp_path):
    with pytest.raises(BundleError, match="nowhere: no such folder"):
        read_wanted(Settings(bundle=tmp_path / "nowhere"))
    with pytest.raises(ExperimentError, match=r"nowhere\.toml: cannot be read"):
        read_wanted(Settings(experiments=tmp_path / "nowhere.toml"))
