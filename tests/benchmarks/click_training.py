"""Training samples a second of DIN and IMN-3P, beside FuxiCTR's DIN, TWIN and SIM.

    FUXICTR_PYTHON -m tests.benchmarks.click_training CHECKOUT_OF_FUXICTR

FUXICTR_PYTHON: an interpreter that has the package fuxictr, torch, polars, pydantic and tqdm. The
checkout holds the models, in model_zoo/LongCTR.

A step is forward, loss, backward, Adam and reading the loss: of Mneme the run's own loss and Adam,
of FuxiCTR its models' `train_step`. All learn 512 samples a step, of histories of 200 random
behaviors without padding, 20,000 items, embeddings 32 wide, ReLU layers of 128 and 64 in the head.
Both DIN have attention layers of 80 and 40 with sigmoids and a softmax over the behaviors; TWIN and
SIM have their default two heads of 32, top 50 and short history of 50. A behavior is the item alone
for FuxiCTR; Mneme also adds two time buckets and the position. One process, one thread, batches
that are in memory; one step of each model in turns; the processor time of the median step.

FuxiCTR reads a history for each sample; Mneme one for all candidates that were shown together. So
all is measured twice: two candidates a history, and one, where nothing is shared.

Shapes: B histories, C candidates, L history length, G time granularities, N = B * C samples.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contract.catalogue import FIRST_ROW, PADDING_ROW
from contract.features import FeatureSpec
from loadtest.results import table, write_section
from training.comparison.click_costs import ClickSubject
from training.comparison.costs import full_rows, in_turns, one_thread
from training.config import parse_config
from training.tasks import ClickLoss

PEERS = ("DIN", "TWIN", "SIM")
_PAGE = Path("docs/results/click_training.md")
_N_SAMPLES = 512
_N_ITEMS = 20_000
_LENGTH = 200
_WIDTH = 32
_ROUNDS = 21
_HEAD_UNITS = [128, 64]
_ATTENTION_UNITS = [80, 40]
# What BaseModel.fit of FuxiCTR has unless told otherwise; `train_step` alone finds it unset.
_MAX_GRADIENT_NORM = 10.0
_OURS: Mapping[str, dict[str, Any]] = {
    "DIN": {"name": "din", "attention_units": _ATTENTION_UNITS},
    "IMN-3P": {"name": "imn", "iterations": 3},
}

Step = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Model inputs `items` [B, L], `buckets` [B, L, G] and `candidates` [B, C], int64, and float32
    `labels` [B, C], 1 for clicks. Nothing is padding.
    """

    items: Tensor
    buckets: Tensor
    candidates: Tensor
    labels: Tensor


def main() -> None:
    """Measure, and write the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", type=Path, help="a checkout of reczoo/FuxiCTR")
    parser.add_argument("--page", type=Path, default=_PAGE)
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    options = parser.parse_args()
    version = open_peer(options.peer)
    subjects = {name: our_subject(name, n_items=_N_ITEMS, length=_LENGTH) for name in _OURS}
    spec = next(iter(subjects.values())).config.features
    rates = {}
    for n_candidates in (2, 1):
        batch = random_batch(
            spec, n_items=_N_ITEMS, n_samples=_N_SAMPLES, n_candidates=n_candidates
        )
        steps = {f"Mneme {name}": our_step(one, batch) for name, one in subjects.items()}
        steps |= {f"FuxiCTR {name}": peer_step(name, batch, n_items=_N_ITEMS) for name in PEERS}
        rates[n_candidates] = samples_per_s(steps, n_samples=_N_SAMPLES, rounds=options.rounds)
    listed = [
        (
            model,
            *(f"{rate[model]:,.0f}" for rate in rates.values()),
            *(f"{rate[model] / rate['FuxiCTR DIN']:.2f}" for rate in rates.values()),
        )
        for model in rates[2]
    ]
    heads = ("", "samples/s, C = 2", "C = 1", "over FuxiCTR's DIN, C = 2", "C = 1")
    intro = (__doc__ or "").split("\n\n", 3)[3].rsplit("\n\n", 1)[0]
    versions = f"FuxiCTR {version}, `model_zoo/LongCTR`; median of {options.rounds} steps."
    page = f"{intro}\n\n{versions}\n\n{table(heads, listed)}"
    print(page)
    write_section(
        options.page,
        title="Training of click models",
        command="python -m tests.benchmarks.click_training FuxiCTR",
        text=page,
        figures=figures(rates),
    )


def figures(rates: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Return ratios and samples a second by name; plain names are of two candidates a history.

    `rates`: by candidates of a history, by side and model.
    """
    named = {}
    for n_candidates, rate in rates.items():
        suffix = "" if n_candidates == 2 else f"_c{n_candidates}"
        named[f"training_vs_peer_din{suffix}"] = rate["Mneme DIN"] / rate["FuxiCTR DIN"]
        for peer in PEERS:
            name = f"training_vs_peer_imn_over_{peer.lower()}{suffix}"
            named[name] = rate["Mneme IMN-3P"] / rate[f"FuxiCTR {peer}"]
        for model, one in rate.items():
            name = model.lower().replace("-", "_").replace(" ", "_")
            named[f"training_{name}_samples_per_s{suffix}"] = one
    return {name: float(f"{value:.4g}") for name, value in named.items()}


def samples_per_s(steps: Mapping[str, Step], *, n_samples: int, rounds: int) -> dict[str, float]:
    """Return how many samples each step learns in a second of the one thread's processor time."""
    with one_thread():
        taken_s = in_turns(steps, rounds, time.thread_time)
    return {name: n_samples / one_s for name, one_s in taken_s.items()}


def random_batch(spec: FeatureSpec, *, n_items: int, n_samples: int, n_candidates: int) -> Batch:
    """Return full random histories, each with its candidates, the first of which was clicked."""
    n_rows, n_histories = n_items + FIRST_ROW, n_samples // n_candidates
    items_BL, buckets_BLG = full_rows(n_rows, spec, n_histories)
    generator = torch.Generator().manual_seed(1)
    shape = (n_histories, n_candidates)
    labels_BC = torch.zeros(shape)
    # With one candidate each, every other history has a click.
    labels_BC[:: 2 if n_candidates == 1 else 1, 0] = 1
    return Batch(
        items=items_BL,
        buckets=buckets_BLG,
        candidates=torch.randint(FIRST_ROW, n_rows, shape, generator=generator),
        labels=labels_BC,
    )


def our_subject(name: str, *, n_items: int, length: int) -> ClickSubject:
    """Return one of our models, to be built untrained."""
    model = {"embedding_dim": _WIDTH, "head_units": _HEAD_UNITS, **_OURS[name]}
    raw = {"name": "rate", "features": {"history_length": length}, "model": model}
    return ClickSubject(config=parse_config(raw, "benchmark"), n_rows=n_items + FIRST_ROW)


def our_step(subject: ClickSubject, batch: Batch) -> Step:
    """Return a step of the trainer, which returns the mean loss of the batch before it."""
    config = subject.config
    model, _ = subject.build(config.features.history_length)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=config.train.learning_rate)
    summed = ClickLoss(config.model, subject.item_counts)
    inputs = (batch.items, batch.buckets, batch.candidates)
    mask_BC = torch.ones_like(batch.labels, dtype=torch.bool)

    def step() -> float:
        optimizer.zero_grad()
        loss = summed(model, inputs, batch.labels, mask_BC) / mask_BC.numel()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def open_peer(checkout: Path) -> str:
    """Make FuxiCTR's models importable; return the version of its package.

    Raises SystemExit where the checkout or the package is missing.
    """
    zoo = checkout / "model_zoo" / "LongCTR"
    if not all((zoo / name).is_dir() for name in PEERS):
        raise SystemExit(f"{zoo} does not hold {', '.join(PEERS)}: is this FuxiCTR's checkout?")
    sys.path.insert(0, str(zoo.resolve()))
    try:
        version: str = importlib.import_module("fuxictr").__version__
    except ImportError as error:
        raise SystemExit(f"this interpreter has no package fuxictr: {error}") from error
    return version


def peer_step(name: str, batch: Batch, *, n_items: int) -> Step:
    """Return a step of FuxiCTR's model, which returns the mean loss of the batch before it."""
    model = _peer_model(name, n_items + FIRST_ROW).train()
    model._max_gradient_norm, model._batch_index = _MAX_GRADIENT_NORM, 0
    rows = peer_rows(batch)

    def step() -> float:
        loss: float = model.train_step(rows).item()
        return loss

    return step


def peer_rows(batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return the batch as LongCTR's loader makes it: labels [N], the items [N * (L + 1)] of each
    history with the target behind it, and the mask [N, L] of behaviors.
    """
    n_candidates = batch.candidates.shape[1]
    history_NL = batch.items.repeat_interleave(n_candidates, dim=0)
    target_N1 = batch.candidates.view(-1, 1)
    items = torch.cat([history_NL, target_N1], dim=1).flatten()
    return (
        {"label": batch.labels.flatten()},
        {"item": items},
        (history_NL != PADDING_ROW).float(),
    )


def _peer_model(name: str, n_rows: int) -> Any:
    """Return an untrained model of `model_zoo/LongCTR` that sees items alone."""
    feature_map = importlib.import_module("fuxictr.features").FeatureMap("random", "")
    feature_map.labels = ["label"]
    feature_map.default_emb_dim = _WIDTH
    feature_map.features["item"] = {
        "source": "item",
        "type": "categorical",
        "vocab_size": n_rows,
        "padding_idx": PADDING_ROW,
    }
    of_attention = (
        {
            "attention_hidden_units": _ATTENTION_UNITS,
            "attention_hidden_activations": "Sigmoid",
            "din_use_softmax": True,
        }
        if name == "DIN"
        else {"attention_dim": 64, "num_heads": 2, "topk": 50, "short_seq_len": 50}
    )
    torch.manual_seed(1)
    return getattr(importlib.import_module(name), name)(
        feature_map,
        model_id=name,
        gpu=-1,
        embedding_dim=_WIDTH,
        dnn_hidden_units=_HEAD_UNITS,
        learning_rate=1e-3,
        optimizer="adam",
        loss="binary_crossentropy",
        metrics=["AUC"],
        verbose=0,
        model_root="",
        **of_attention,
    )


if __name__ == "__main__":
    main()
