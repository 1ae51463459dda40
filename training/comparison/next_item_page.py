"""The pages of a comparison of next-item models."""

from collections.abc import Sequence
from pathlib import Path

import torch

from training.comparison.costs import describe_machine
from training.comparison.next_item_choice import Comparison, compare
from training.comparison.next_item_measurements import measure
from training.comparison.next_item_published import published
from training.comparison.next_item_sections import figures, sections
from training.comparison.page import Content, check_targets, read_citation, write_pages
from training.data.log import PreparedLog


def write_comparison(
    folders: Sequence[Path],
    log: PreparedLog,
    *,
    page: Path,
    html: Path,
    data: str,
    command: str,
    costs: bool = False,
    cited: Sequence[Path] = (),
    device: torch.device,
) -> None:
    """Compare finished runs and write `page`, its JSON twin and `html`.

    `data`: the log's name in figures, by which published ones are found, too. `costs`: measure cost
    over the history length, on `device`. `cited`: twins of other pages, whose figures are repeated.
    Raises CheckpointError and ConfigError (`compare`).
    """
    check_targets(page, html)
    citations = [read_citation(path) for path in cited]
    others = published(data, log.header.n_users)
    comparison = compare(folders, log)
    measured = measure(comparison, log, costs=costs, device=device)
    content = Content(
        title=f"Next-item models on {data}",
        intro=_intro(comparison, log),
        sections=sections(comparison, measured, others),
        figures=figures(comparison, measured, data),
        command=command,
        machine=describe_machine(device),
    )
    write_pages(page, html, content, citations)


def _intro(comparison: Comparison, log: PreparedLog) -> str:
    header = log.header
    return (
        f"{header.n_users:,} users, {header.n_items:,} items, {header.n_behaviors:,} behaviors. "
        f"The run with the best validation {comparison.metric} decides which settings stand for a "
        "model; the test part chooses nothing. Runs of the same settings are averaged; ± is the "
        "sample standard deviation over their seeds. A training that a limit has ended, and not "
        "patience, is marked as shortened."
    )
