"""A run of libFuzzer over one target."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
TARGETS = ("codec", "bundles", "requests")
# An input that takes longer is a find, as is one that needs so much memory.
_TIMEOUT_S = 10
_MEMORY_MB = 2048
_LONGEST_INPUT = 4096
# In memory, where there is such a place: each input may be several files.
_SCRATCH = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Fuzzing:
    """`executions`: inputs that were tried; `crashes`: the files of those that failed."""

    target: str
    executions: int
    crashes: list[Path]
    output: str


def fuzz(target: str, folder: Path, *, executions: int, seed: int) -> Fuzzing:
    """Try so many inputs, beginning with the target's own seeds; the first crash ends it.

    `folder`: for the corpus and for what crashes. Needs atheris.
    """
    module = import_module(f"tests.fuzz.{target}")
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(module.seeds()):
        (corpus / f"seed-{number}").write_bytes(content)
    words = folder / "words.dict"
    words.write_text("".join(f'"{_escaped(token)}"\n' for token in module.TOKENS))
    scratch = TemporaryDirectory(dir=_SCRATCH if _SCRATCH.is_dir() else None)
    with scratch as temporary:  # libFuzzer ends its process without any clearing up
        done = subprocess.run(
            [
                *(sys.executable, "-m", "tests.fuzz.target", target),
                *(f"-runs={executions}", f"-seed={seed}", f"-dict={words}"),
                *(f"-timeout={_TIMEOUT_S}", f"-rss_limit_mb={_MEMORY_MB}"),
                *(f"-max_len={_LONGEST_INPUT}", f"-artifact_prefix={folder}/"),
                *("-print_final_stats=1", "-verbosity=1", str(corpus)),
            ],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": temporary},
            capture_output=True,
            check=False,
        )
    output = (done.stdout + done.stderr).decode(errors="replace")
    counted = re.search(r"stat::number_of_executed_units:\s*(\d+)", output)
    assert counted, output
    crashes = sorted(
        path for kind in ("crash", "timeout", "oom", "leak") for path in folder.glob(f"{kind}-*")
    )
    assert bool(crashes) == bool(done.returncode), output
    return Fuzzing(target=target, executions=int(counted[1]), crashes=crashes, output=output)


def _escaped(token: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in token)
