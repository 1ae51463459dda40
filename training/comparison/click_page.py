"""The pages of a comparison of click models."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from training.comparison.click_choice import compare_clicks
from training.comparison.click_figures import figures
from training.comparison.click_measured_sections import attention_sections, cost_sections
from training.comparison.click_measurements import measure_clicks
from training.comparison.click_sections import later_sections, sections
from training.comparison.costs import describe_machine
from training.comparison.page import Content, check_targets, read_citation, write_pages
from training.data.log import PreparedLog

_INTRO = (
    "The run with the best validation AUC decides which settings stand for a model; the test part "
    "chooses nothing. Main setups are without ablation and features of items, and read as many "
    "behaviors as most runs on their data do. Runs of the same settings are averaged; ± is the "
    "sample standard deviation over their seeds. A training that a limit has ended, and not "
    "patience, is marked as shortened."
)


def write_click_comparison(
    folders: Sequence[Path],
    logs: Mapping[str, PreparedLog],
    *,
    page: Path,
    html: Path,
    command: str,
    costs: bool = False,
    cited: Sequence[Path] = (),
    device: torch.device,
) -> None:
    """Compare finished runs of click models and write `page`, its JSON twin and `html`.

    `logs`: by the names that figures begin with; each run finds its own. `costs`: measure cost over
    the history length, on `device`, where attention is measured, too. `cited`: twins of other
    pages, whose figures are repeated. Raises CheckpointError and ConfigError (`compare_clicks`).
    """
    check_targets(page, html)
    citations = [read_citation(path) for path in cited]
    data_sets = compare_clicks(folders, logs)
    measured = measure_clicks(data_sets, costs=costs, device=device)
    content = Content(
        title="Click models",
        intro=_INTRO,
        sections=[
            *sections(data_sets),
            *cost_sections(measured),
            *attention_sections(data_sets, measured),
            *later_sections(data_sets),
        ],
        figures=figures(data_sets, measured),
        command=command,
        machine=describe_machine(device),
    )
    write_pages(page, html, content, citations)
