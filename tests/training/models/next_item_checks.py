"""What every next-item model must keep, whatever it computes between history and user vector.

Shapes: B requests, C candidates, L history length, D width of user and item vectors, R catalogue
rows, G time granularities.
"""

from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from onnx import GraphProto
from torch import Tensor, nn
from torch.nn import functional

from contract.catalogue import FIRST_ROW, PADDING_ROW
from contract.features import AGE_SECONDS, DAYS, HOURS, FeatureSpec
from exporter.convert import convert
from exporter.parity import VALUE_TOLERANCE, open_session, prove_signature, prove_values
from training.models.build import Scorer
from training.models.next_item import NO_TARGET, NextItemModel

N_ROWS = 20
SPEC = FeatureSpec(history_length=12, granularities=(HOURS, DAYS, AGE_SECONDS))
# Random ages: a month of seconds, so that differences fall into many different buckets.
_MAX_ELAPSED = 1 << 22


def with_large_weights(model: NextItemModel, *, std: float = 0.5, seed: int = 0) -> NextItemModel:
    """Return the model in evaluation mode, its weights so large that every term of it matters.

    Rows of tables that are padding stay 0.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
    return model.eval()


def histories(
    model: NextItemModel,
    spec: FeatureSpec,
    lengths: Sequence[int],
    *,
    width: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return random items [B, L] and buckets [B, L, G], right-aligned, of so many behaviors each.

    Unknown items occur; ages and buckets never rise along a row. `width`: L, of the spec unless
    said.
    """
    generator = torch.Generator().manual_seed(seed)
    width = spec.history_length if width is None else width
    shape = (len(lengths), width)
    valid_BL = torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)
    items_BL = torch.randint(1, len(model.item_table()), shape, generator=generator) * valid_BL
    buckets = [
        torch.randint(min(one.n_buckets, _MAX_ELAPSED), shape, generator=generator)
        .sort(dim=1, descending=True)
        .values
        * valid_BL
        for one in spec.granularities
    ]
    return items_BL, torch.stack(buckets, dim=2)


def assert_padding_changes_nothing(
    model: NextItemModel, spec: FeatureSpec = SPEC, *, tolerance: float = 1e-5
) -> None:
    """A wider row with the same behaviors gives the same vectors, at every one of them."""
    width = spec.history_length // 2
    assert width > 1
    lengths = [width, width - 1, 1, 0]
    items, buckets = histories(model, spec, lengths, width=width)
    valid_BL = items != PADDING_ROW
    last_BD, all_BLD = model.encode_last(items, buckets), model.encode(items, buckets)
    for n_more in (1, spec.history_length - width):
        wider = (
            functional.pad(items, (n_more, 0), value=PADDING_ROW),
            functional.pad(buckets, (0, 0, n_more, 0)),
        )
        torch.testing.assert_close(
            model.encode_last(*wider), last_BD, rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(
            model.encode(*wider)[:, n_more:][valid_BL],
            all_BLD[valid_BL],
            rtol=tolerance,
            atol=tolerance,
        )


def assert_company_changes_nothing(
    model: NextItemModel, spec: FeatureSpec = SPEC, *, tolerance: float = 1e-5
) -> None:
    """A row gives the same vectors alone as beside full, short and empty rows."""
    length = spec.history_length
    items, buckets = histories(model, spec, [length, length // 2, 1, 0])
    last_BD, all_BLD = model.encode_last(items, buckets), model.encode(items, buckets)
    for b in range(len(items)):
        alone = items[b : b + 1], buckets[b : b + 1]
        torch.testing.assert_close(
            model.encode_last(*alone)[0], last_BD[b], rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(
            model.encode(*alone)[0], all_BLD[b], rtol=tolerance, atol=tolerance
        )


def assert_empty_history_is_finite(model: NextItemModel, spec: FeatureSpec = SPEC) -> None:
    """Padding alone gives vectors and scores that are numbers, at any width."""
    for width in (1, spec.history_length):
        items, buckets = histories(model, spec, [0, 0], width=width)
        candidates = torch.tensor([[1, 2], [3, 1]])
        assert model.encode(items, buckets).isfinite().all()
        assert model.encode_last(items, buckets).isfinite().all()
        assert model(items, buckets, candidates).isfinite().all()


def assert_last_equals_encode(
    model: NextItemModel,
    spec: FeatureSpec = SPEC,
    *,
    users: Tensor | None = None,
    tolerance: float = 1e-5,
) -> None:
    """`encode_last` is the last of `encode`, for full, short and empty rows of any width.

    `users`: int64 [4], of the four rows.
    """
    for width in sorted({1, 2, spec.history_length // 2, spec.history_length}):
        items, buckets = histories(model, spec, [width, max(1, width - 1), 1, 0], width=width)
        all_BLD = model.encode(items, buckets, users)
        assert all_BLD.shape[:2] == items.shape
        torch.testing.assert_close(
            model.encode_last(items, buckets, users),
            all_BLD[:, -1],
            rtol=tolerance,
            atol=tolerance,
        )


def assert_causal(
    model: NextItemModel, spec: FeatureSpec = SPEC, *, tolerance: float = 1e-5
) -> None:
    """The model calls itself causal, and what comes after a position does not change its vector.

    The linear age of the very next behavior may count: it is the time that is asked about.
    """
    assert model.causal
    length = spec.history_length
    items, buckets = histories(model, spec, [length, length // 2 + 1])
    before_BLD = model.encode(items, buckets)
    for i in range(length - 1):
        changed = with_another_future(model, spec, items, buckets, i)
        seen_BL = (items != PADDING_ROW) & (torch.arange(length) <= i)
        torch.testing.assert_close(
            model.encode(*changed)[seen_BL], before_BLD[seen_BL], rtol=tolerance, atol=tolerance
        )


def assert_not_causal(model: NextItemModel, spec: FeatureSpec = SPEC) -> None:
    """The model says that it is not causal, and the last behavior changes the first vector."""
    assert not model.causal
    items, buckets = histories(model, spec, [spec.history_length])
    changed = with_another_future(model, spec, items, buckets, spec.history_length - 2)
    first_BD, other_BD = model.encode(items, buckets)[:, 0], model.encode(*changed)[:, 0]
    assert not torch.allclose(first_BD, other_BD, rtol=1e-4, atol=1e-4)


def with_another_future(
    model: NextItemModel, spec: FeatureSpec, items: Tensor, buckets: Tensor, position: int
) -> tuple[Tensor, Tensor]:
    """Return the inputs with other items and buckets after a position, the next linear age kept."""
    other_items, other_buckets = histories(model, spec, [spec.history_length] * len(items), seed=1)
    after_L = torch.arange(items.shape[1]) > position
    is_known_G = torch.tensor([one.scale == "linear" for one in spec.granularities])
    changed_buckets = torch.where(after_L[:, None], other_buckets, buckets)
    changed_buckets[:, position + 1, is_known_G] = buckets[:, position + 1, is_known_G]
    # Another item everywhere after the position, padding aside.
    differs_BL = 1 + (items + other_items) % (len(model.item_table()) - 1)
    changed_items = torch.where(after_L & (items != PADDING_ROW), differs_BL, items)
    return changed_items, changed_buckets


def assert_exports(
    model: NextItemModel,
    spec: FeatureSpec,
    tmp_path: Path,
    *,
    tolerance: float = VALUE_TOLERANCE,
) -> GraphProto:
    """The graph keeps the contract, scores as the model does, and holds ONNX's own operators only.

    It is exported at one length and proven at others, so no part of it depends on L. Returned for
    further checks.
    """
    path = tmp_path / "model.onnx"
    scorer = Scorer(model.eval(), "affinity")
    convert(scorer, spec, path)
    session = open_session(path)
    prove_signature(session, spec)
    prove_values(session, scorer, spec, len(model.item_table()), tolerance=tolerance)
    exported = onnx.load(path)
    assert {node.domain for node in exported.graph.node} <= {"", "ai.onnx"}
    graph: GraphProto = exported.graph
    return graph


def training_batch(
    model: NextItemModel, spec: FeatureSpec = SPEC, *, n_users: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return items [B, L], buckets [B, L, G], targets [B, L] and users [B], as a loader would.

    The last two rows have nothing to learn; one of them is empty.
    """
    length = spec.history_length
    lengths = [length] * 4 + [max(1, length // 2)] * 3 + [1, length, 0]
    items, buckets = histories(model, spec, lengths)
    generator = torch.Generator().manual_seed(2)
    next_B1 = torch.randint(
        FIRST_ROW, len(model.item_table()), (len(items), 1), generator=generator
    )
    targets = torch.cat([items[:, 1:], next_B1], dim=1)
    is_learned_BL = (items != PADDING_ROW) & (targets >= FIRST_ROW)
    targets = torch.where(is_learned_BL, targets, NO_TARGET)
    targets[-2:] = NO_TARGET
    users = torch.arange(len(items)) % n_users + 1 if n_users else torch.zeros(len(items)).long()
    return items, buckets, targets, users


def assert_every_parameter_learns(
    model: NextItemModel, spec: FeatureSpec = SPEC, *, n_users: int = 0
) -> None:
    """One step of a full softmax in training mode gives every parameter a gradient, all finite.

    `n_users`: users that the model has embeddings of.
    """
    batch = training_batch(model, spec, n_users=n_users)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vectors_ND, rows_N, _ = model.train().training_pairs(*batch)
        functional.cross_entropy(vectors_ND @ model.item_table().T, rows_N).backward()
    model.eval()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} is not part of the loss"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert parameter.grad.any(), f"the gradient of {name} is 0"
