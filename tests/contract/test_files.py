"""Files of others: only plain ones are opened, and no pickle is ever read."""

import io
import os
import re
import socket
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from contract.files import open_plain, read_array, read_plain

ROOT = Path(__file__).parents[2]


class Creates:
    """What a pickle can do: make a file while it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def opened() -> set[str]:
    """Return what this process has open."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(str(link.readlink()))
    return found


def npy(header: str) -> bytes:
    """Return an .npy file with a header of one's own and no data."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def npy_of(shape: str, dtype: str = "'<i8'") -> bytes:
    return npy(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n")


class TestPlainFiles:
    def test_a_plain_file_is_read(self, tmp_path):
        (tmp_path / "file").write_bytes(b"content")
        assert read_plain(tmp_path / "file", max_bytes=7) == b"content"

    def test_a_larger_one_is_refused_and_not_read_to_its_end(self):
        with pytest.raises(OSError, match="more than 1,000 bytes"):
            read_plain(Path("/proc/self/smaps"), max_bytes=1000)

    def test_a_missing_file_is_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            open_plain(tmp_path / "file")

    def test_a_link_is_followed_only_where_it_may_be(self, tmp_path):
        (tmp_path / "file").write_bytes(b"content")
        (tmp_path / "link").symlink_to("file")
        with pytest.raises(OSError, match="a symbolic link, expected the file itself"):
            open_plain(tmp_path / "link")
        with open_plain(tmp_path / "link", follow_links=True) as file:
            assert file.read() == b"content"

    def test_a_pipe_that_nobody_writes_to_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="not a plain file"):
            open_plain(tmp_path / "pipe")

    def test_a_device_is_not_read(self):
        with pytest.raises(OSError, match="not a plain file"):
            open_plain(Path("/dev/zero"))

    def test_a_folder_is_none(self, tmp_path):
        with pytest.raises(OSError, match="not a plain file"):
            open_plain(tmp_path)

    def test_a_socket_is_none(self, tmp_path):
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / "socket"))
            with pytest.raises(OSError, match="No such device"):
                open_plain(tmp_path / "socket")

    def test_a_name_with_nul_is_an_error_as_any_other(self):
        with pytest.raises(OSError, match="null byte"):
            open_plain(Path("a\0b"))

    def test_no_descriptor_is_left_open(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="not a plain file"):
            open_plain(tmp_path / "pipe")
        # Of this pipe: other threads open and close what they need.
        assert str(tmp_path / "pipe") not in opened()
        with (tmp_path / "file").open("w"):
            assert str(tmp_path / "file") in opened()


class TestArrays:
    def test_an_array_is_read(self):
        file = io.BytesIO()
        np.save(file, np.arange(3))
        file.seek(0)
        assert read_array(file).tolist() == [0, 1, 2]

    @pytest.mark.parametrize("wrapped", [True, False], ids=["in an array", "plain"])
    def test_a_pickle_is_refused_and_nothing_of_it_runs(self, tmp_path, wrapped):
        made = tmp_path / "made"
        path = tmp_path / "file.npy"
        objects = np.array([Creates(made)], dtype=object)
        if wrapped:
            np.save(path, objects, allow_pickle=True)
        else:
            objects.dump(path)
        with (
            path.open("rb") as file,
            pytest.raises(ValueError, match=r"pickle|Object arrays|magic"),
        ):
            read_array(file)
        assert not made.exists()

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(b"", id="empty"),
            pytest.param(b"PK\x03\x04", id="an archive"),
            pytest.param(b"\x93NUMPY\x09\x00", id="another version"),
            pytest.param(b"\x93NUMPY\x01\x00\xff\xff{", id="half a header"),
            pytest.param(npy_of(f"({2**60},)"), id="2 to the 60 rows"),
            pytest.param(npy_of(f"({2**62}, 4)"), id="a product that wraps around"),
            pytest.param(npy_of(f"({2**200},)"), id="more than 64 bits"),
            pytest.param(npy_of("(5,)"), id="no data"),
            pytest.param(npy_of("(-5,)"), id="negative"),
            pytest.param(npy_of("('a',)"), id="rows that are no number"),
            pytest.param(npy_of("(1,)", "'|O'"), id="objects"),
            pytest.param(npy_of("(1,)", "[('a', '|O')]"), id="objects in fields"),
            pytest.param(npy_of("(1,)", "{'x': 1}"), id="a type that is none"),
            pytest.param(npy("(" * 9000), id="nested brackets"),
            pytest.param(npy("-" * 9000 + "1"), id="nested signs"),
            pytest.param(npy("__import__('os').getpid()"), id="a program"),
        ],
    )
    @pytest.mark.parametrize("in_memory", [True, False], ids=["as a member", "as a file"])
    @pytest.mark.filterwarnings("ignore::UserWarning")  # of numpy, for headers of Python 2
    def test_whatever_is_no_array_is_a_value_error(self, tmp_path, content, in_memory):
        (tmp_path / "file.npy").write_bytes(content)
        with (
            io.BytesIO(content) if in_memory else (tmp_path / "file.npy").open("rb") as file,
            pytest.raises(ValueError, match=r"."),
        ):
            read_array(file)


@pytest.mark.parametrize(
    "forbidden",
    [
        pytest.param(r"allow_pickle\s*=\s*True", id="numpy"),
        pytest.param(r"weights_only\s*=\s*False", id="torch"),
        pytest.param(r"torch\.load\((?![^)]*weights_only=True)", id="torch by default"),
        pytest.param(r"\bpickle\.loads?\(|\b(marshal|shelve|joblib|dill)\b", id="pickles"),
        pytest.param(r"yaml\.(unsafe_)?load\(|(?<![\w.])eval\(|(?<![\w.])exec\(", id="programs"),
    ],
)
def test_nothing_that_runs_what_it_reads_is_called(forbidden):
    """What goes between a program and its own child, by a pipe, is no file of others."""
    folders = ("contract", "training", "exporter", "service", "loadtest")
    own_pipe = {ROOT / "loadtest/open_loop.py"}
    found = [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path not in own_pipe and re.search(forbidden, path.read_text())
    ]
    assert found == []
