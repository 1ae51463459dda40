"""Files and folders appear whole or not at all, and never change under their reader."""

import pytest

from training.folders import staged_file, staged_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestFolder:
    def test_appears_when_the_block_has_succeeded(self, tmp_path):
        target = tmp_path / "out"
        with staged_folder(target) as staging:
            (staging / "a.txt").write_text("a")
            (staging / "inner").mkdir()
            (staging / "inner" / "b.txt").write_text("b")
            assert not target.exists()
            assert staging.parent == target.parent  # one file system: a rename is atomic
        assert names(tmp_path) == ["out"]
        assert (target / "a.txt").read_text() == "a"
        assert (target / "inner" / "b.txt").read_text() == "b"

    def test_may_be_read_by_others(self, tmp_path):
        with staged_folder(tmp_path / "out"):
            pass
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755

    def test_parents_are_made(self, tmp_path):
        with staged_folder(tmp_path / "some" / "where" / "out"):
            pass
        assert (tmp_path / "some" / "where" / "out").is_dir()

    @pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
    def test_a_failed_block_leaves_nothing_behind(self, tmp_path, failure):
        def write():
            with staged_folder(tmp_path / "out") as staging:
                (staging / "a.txt").write_text("a")
                raise failure("stop")

        with pytest.raises(failure, match="stop"):
            write()
        assert names(tmp_path) == []

    def test_a_block_may_be_tried_again_after_a_failure(self, tmp_path):
        with pytest.raises(ValueError, match="stop"), staged_folder(tmp_path / "out"):
            raise ValueError("stop")
        with staged_folder(tmp_path / "out"):
            pass
        assert names(tmp_path) == ["out"]

    @pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
    def test_an_existing_target_is_refused_before_any_work(self, tmp_path, kind):
        target = tmp_path / "out"
        if kind == "file":
            target.write_text("mine")
        else:
            target.mkdir()
            if kind == "folder":
                (target / "mine").write_text("mine")
        before = names(target) if target.is_dir() else target.read_text()
        with (
            pytest.raises(FileExistsError, match="out exists: name a new folder, or remove it"),
            staged_folder(target),
        ):
            pytest.fail("the block must not run")
        assert before == (names(target) if target.is_dir() else target.read_text())
        assert names(tmp_path) == ["out"]

    def test_of_two_writers_the_first_to_finish_wins(self, tmp_path):
        target = tmp_path / "out"

        def write():
            with staged_folder(target) as slow:
                (slow / "who").write_text("slow")
                with staged_folder(target) as quick:
                    (quick / "who").write_text("quick")

        with pytest.raises(OSError, match="out"):
            write()
        assert (target / "who").read_text() == "quick"
        assert names(tmp_path) == ["out"]


class TestFile:
    def test_replaces_its_target_at_the_end(self, tmp_path):
        target = tmp_path / "model.pt"
        target.write_text("old")
        with staged_file(target) as staging:
            staging.write_text("new")
            assert target.read_text() == "old"
            assert staging.parent == target.parent
        assert target.read_text() == "new"
        assert names(tmp_path) == ["model.pt"]

    def test_makes_a_new_file(self, tmp_path):
        with staged_file(tmp_path / "model.pt") as staging:
            staging.write_text("new")
        assert (tmp_path / "model.pt").read_text() == "new"

    def test_an_open_reader_keeps_what_it_had(self, tmp_path):
        target = tmp_path / "model.pt"
        target.write_text("old")
        with target.open() as reader:
            with staged_file(target) as staging:
                staging.write_text("new")
            assert reader.read() == "old"

    @pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
    def test_a_failed_block_leaves_the_target_as_it_was(self, tmp_path, failure):
        target = tmp_path / "model.pt"
        target.write_text("old")

        def write():
            with staged_file(target) as staging:
                staging.write_text("half")
                raise failure("stop")

        with pytest.raises(failure, match="stop"):
            write()
        assert target.read_text() == "old"
        assert names(tmp_path) == ["model.pt"]

    def test_a_block_that_writes_nothing_is_an_error(self, tmp_path):
        with (
            pytest.raises(FileNotFoundError, match=r"model\.pt"),
            staged_file(tmp_path / "model.pt"),
        ):
            pass
        assert names(tmp_path) == []
