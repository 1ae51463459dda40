"""The few shapes that a device is asked for: batches are padded up to them.

Allocations, cuDNN plans and CUDA graphs belong to a shape; a device that sees few of them keeps
them all. Shapes: B requests, C candidates, L history length.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

# Between neighbours lies a fifth to a third, more where they are small anyway. A CPU pays for every
# padded cell, and has nothing to keep but memory plans.
_CPU_BATCHES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)
_CPU_CANDIDATES = (
    *(1, 2, 4, 6, 8, 10, 12, 16, 20, 25, 32, 40, 50, 64, 80, 100),
    *(125, 150, 200, 250, 300, 400, 500, 650, 800, 1000),
)
_CPU_LENGTH_SHARES = (1 / 100, 1 / 50, 1 / 20, 1 / 10, 1 / 7, 1 / 5, 0.3, 0.4, 0.55, 0.75, 1)
# A GPU pays little for padding and much for a shape: each has a CUDA graph and buffers.
_CUDA_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_CUDA_CANDIDATES = (10, 50, 100, 200, 500, 1000)
_CUDA_LENGTH_SHARES = (1 / 10, 0.4, 1)


class Shape(NamedTuple):
    """A batch: B requests, C candidates of each, L behaviors of each."""

    batch: int
    candidates: int
    length: int

    @property
    def work(self) -> int:
        """What the batch costs: pairs of candidate and behavior."""
        return self.batch * self.candidates * self.length


class ShapeGrid:
    """The sizes of each axis, ascending. What is larger than all of them stays as it is."""

    def __init__(
        self, *, batches: Sequence[int], candidates: Sequence[int], lengths: Sequence[int]
    ) -> None:
        self.batches, self.candidates, self.lengths = batches, candidates, lengths
        # Asked several times for each request.
        self._up = tuple(_rounded_up(sizes) for sizes in (batches, candidates, lengths))

    def round_up(self, batch: int, candidates: int, length: int) -> Shape:
        """Return the smallest shape of the grid that holds the batch."""
        batches, many, lengths = self._up
        return Shape(
            batches[batch] if batch < len(batches) else batch,
            many[candidates] if candidates < len(many) else candidates,
            lengths[length] if length < len(lengths) else length,
        )

    def shapes(self, max_work: int) -> Iterator[Shape]:
        """Yield, largest first, the shapes of at most `max_work`; those of one request always."""
        for batch in reversed(self.batches):
            for candidates in reversed(self.candidates):
                for length in reversed(self.lengths):
                    shape = Shape(batch, candidates, length)
                    if batch == 1 or shape.work <= max_work:
                        yield shape


def shape_grid(provider: Literal["cpu", "cuda"], history_length: int) -> ShapeGrid:
    """Return the grid for a device and a model's history length."""
    on_cpu = provider == "cpu"
    shares = _CPU_LENGTH_SHARES if on_cpu else _CUDA_LENGTH_SHARES
    return ShapeGrid(
        batches=_CPU_BATCHES if on_cpu else _CUDA_BATCHES,
        candidates=_CPU_CANDIDATES if on_cpu else _CUDA_CANDIDATES,
        lengths=sorted({max(1, round(share * history_length)) for share in shares}),
    )


def _rounded_up(sizes: Sequence[int]) -> list[int]:
    """Return for each number, from 0 to the largest size, the size that holds it."""
    return [sizes[bisect_left(sizes, n)] for n in range(max(sizes, default=-1) + 1)]
