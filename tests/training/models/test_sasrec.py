"""SASRec: torch's own layers with the same weights, padding, positions, users.

Shapes: B requests, L history length, D embedding width, H heads.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tests.training.models.literal_transformer import torch_layer
from tests.training.models.next_item_checks import (
    N_ROWS,
    SPEC,
    assert_causal,
    assert_company_changes_nothing,
    assert_empty_history_is_finite,
    assert_every_parameter_learns,
    assert_exports,
    assert_last_equals_encode,
    assert_padding_changes_nothing,
    histories,
    with_large_weights,
)
from training.models.attention import Norm, TransformerBlock
from training.models.encoder import ItemEncoder
from training.models.next_item import UNKNOWN_USER
from training.models.sasrec import Positions, SASRec

WIDTH, N_HEADS, LENGTH, N_USERS = 8, 2, SPEC.history_length, 4


def sasrec(
    *,
    positions: Positions = "row",
    norm: Norm = "pre",
    mask_padding: bool = True,
    n_layers: int = 2,
    n_users: int = 0,
    user_dropout: float = 0.5,
) -> SASRec:
    """Return a model without dropout, its weights so large that every term of it matters."""
    model = SASRec(
        ItemEncoder(N_ROWS, WIDTH),
        SPEC,
        embedding_dim=WIDTH,
        n_layers=n_layers,
        n_heads=N_HEADS,
        ffn_units=12,
        dropout=0.0,
        norm=norm,
        positions=positions,
        mask_padding=mask_padding,
        n_users=n_users,
        user_dropout=user_dropout,
    )
    with_large_weights(model)
    return model


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


both_positions = pytest.mark.parametrize("positions", ["row", "relative"])
norms = pytest.mark.parametrize("norm", ["pre", "post", "query"])


def literal_vectors(model: SASRec, items: list[int], norm: Norm) -> Tensor:
    """Return the user vectors [L, D] of one history without padding."""
    n = len(items)
    x = model.items.items.weight[items] * math.sqrt(WIDTH)
    mask = torch.full((n, n), -math.inf).triu(1).expand(N_HEADS, n, n).clone()
    if model.row_positions is not None:
        x = x + model.row_positions.weight[LENGTH - n :]
    else:
        assert model.distance_bias is not None
        for i in range(n):
            for j in range(i + 1):
                mask[:, i, j] = model.distance_bias[:, i - j]
    x = x.unsqueeze(0)
    for block in model.blocks:
        assert isinstance(block, TransformerBlock)
        x = torch_layer(block, norm)(x, src_mask=mask)
    return nn.functional.layer_norm(x[0], (WIDTH,), model.norm.weight, model.norm.bias)


class TestVectors:
    @both_positions
    @pytest.mark.parametrize("norm", ["pre", "post"])
    def test_are_those_of_torchs_own_layers(self, positions, norm):
        model = sasrec(positions=positions, norm=norm)
        items, buckets = histories(model, SPEC, [12, 5, 1])
        vectors = model.encode(items, buckets)
        for b, n in enumerate([12, 5, 1]):
            expected = literal_vectors(model, items[b, -n:].tolist(), norm)
            torch.testing.assert_close(vectors[b, -n:], expected, rtol=1e-4, atol=1e-5)

    @both_positions
    def test_do_not_know_when_things_were_done(self, positions):
        model = sasrec(positions=positions)
        items, buckets = histories(model, SPEC, [12, 5])
        assert torch.equal(model.encode(items, buckets + 1), model.encode(items, buckets))

    def test_are_dropped_out_in_training_alone(self):
        model = sasrec()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        items, buckets = histories(model, SPEC, [12, 5])
        assert torch.equal(model.encode(items, buckets), model.encode(items, buckets))
        model.train()
        assert not torch.equal(model.encode(items, buckets), model.encode(items, buckets))


class TestPadding:
    @both_positions
    @norms
    def test_contributes_exactly_nothing(self, positions, norm):
        """Whatever padding's positions hold, to the last bit."""
        model = sasrec(positions=positions, norm=norm)
        items, buckets = histories(model, SPEC, [5, 4])
        before = model.encode(items, buckets)[:, -4:]
        with torch.no_grad():
            if model.row_positions is not None:
                model.row_positions.weight[: LENGTH - 5] += 100 * torch.randn(WIDTH)
        wider = pad(items[:, 5:], (5, 0)), buckets
        assert torch.equal(model.encode(*wider)[:, -4:], before)
        narrow = model.encode(items[:, -5:], buckets[:, -5:])[:, -4:]
        torch.testing.assert_close(narrow, before, rtol=1e-5, atol=1e-6)

    @both_positions
    @norms
    def test_leaks_in_the_classic_form(self, positions, norm):
        """Its keys are no zeros: they have biases, and from the second layer on much more."""
        model = sasrec(positions=positions, norm=norm, mask_padding=False)
        items, buckets = histories(model, SPEC, [5, 4], width=5)
        candidates = torch.arange(2, N_ROWS).expand(2, -1)
        narrow = model(items, buckets, candidates)
        wider = pad(items, (7, 0)), pad(buckets, (0, 0, 7, 0))
        assert not torch.allclose(model(*wider, candidates), narrow, atol=1e-3)

    def test_of_the_classic_form_is_what_full_rows_do_not_have(self):
        model, classic = sasrec(), sasrec(mask_padding=False)
        items, buckets = histories(model, SPEC, [12])
        torch.testing.assert_close(classic.encode(items, buckets), model.encode(items, buckets))

    def test_of_the_classic_form_has_no_position(self):
        """Kang and McAuley's padding has an embedding of zeros altogether."""
        model = sasrec(mask_padding=False)
        items, buckets = histories(model, SPEC, [5])
        before = model.encode_last(items, buckets)
        assert model.row_positions is not None
        with torch.no_grad():
            model.row_positions.weight[: LENGTH - 5] += 100 * torch.randn(WIDTH)
        assert torch.equal(model.encode_last(items, buckets), before)


class TestPositions:
    def prefixes_agree(self, model: SASRec) -> list[bool]:
        """Return whether the vector at each place is that of the history up to there."""
        items, buckets = histories(model, SPEC, [12])
        whole = model.encode(items, buckets)[0]
        return [
            torch.allclose(
                model.encode(items[:, : i + 1], buckets[:, : i + 1])[0, -1],
                whole[i],
                rtol=1e-4,
                atol=1e-5,
            )
            for i in range(LENGTH)
        ]

    def test_relative_ones_train_every_place_with_what_serving_sees(self):
        assert self.prefixes_agree(sasrec(positions="relative")) == [True] * LENGTH

    def test_those_of_the_row_train_the_last_place_only_with_it(self):
        assert self.prefixes_agree(sasrec(positions="row")) == [False] * (LENGTH - 1) + [True]

    def test_those_of_the_row_are_counted_from_its_end(self):
        model = sasrec(positions="row")
        items, buckets = histories(model, SPEC, [4], width=4)
        before = model.encode_last(items, buckets)
        assert model.row_positions is not None
        with torch.no_grad():
            model.row_positions.weight[: LENGTH - 4] += torch.randn(WIDTH)
            assert torch.equal(model.encode_last(items, buckets), before)
            model.row_positions.weight[LENGTH - 4] += torch.randn(WIDTH)
        assert not torch.allclose(model.encode_last(items, buckets), before)

    def test_relative_ones_start_even(self):
        """Untrained, only the order of causality tells places apart."""
        model = SASRec(
            ItemEncoder(N_ROWS, WIDTH),
            SPEC,
            embedding_dim=WIDTH,
            n_layers=1,
            n_heads=N_HEADS,
            ffn_units=12,
            dropout=0.0,
            positions="relative",
        ).eval()
        items, buckets = histories(model, SPEC, [12])
        turned = torch.cat([items[:, :-1].flip(1), items[:, -1:]], dim=1)
        torch.testing.assert_close(
            model.encode_last(turned, buckets), model.encode_last(items, buckets)
        )


class TestUsers:
    def test_an_unknown_user_is_none(self):
        model = sasrec(n_users=N_USERS)
        items, buckets = histories(model, SPEC, [12, 5])
        unknown = torch.full((2,), UNKNOWN_USER)
        assert torch.equal(
            model.encode(items, buckets, unknown), model.encode(items, buckets, None)
        )
        assert torch.equal(
            model.encode_last(items, buckets, unknown), model.encode_last(items, buckets)
        )

    def test_a_users_embedding_is_added_at_every_place(self):
        model = sasrec(n_users=N_USERS)
        assert model.users is not None
        items, buckets = histories(model, SPEC, [12, 5])
        users = torch.tensor([4, 1])
        expected = model.encode(items, buckets) + model.users.weight[users].unsqueeze(1)
        torch.testing.assert_close(model.encode(items, buckets, users), expected)
        assert_last_equals_encode(model, users=torch.tensor([1, 0, 4, 2]))

    def test_candidates_are_scored_for_an_unknown_user(self):
        model = sasrec(n_users=N_USERS)
        items, buckets = histories(model, SPEC, [12, 5])
        candidates = torch.tensor([[2, 3], [4, 5]])
        expected = torch.einsum(
            "bd,bcd->bc", model.encode_last(items, buckets), model.item_vectors(candidates)
        )
        torch.testing.assert_close(model(items, buckets, candidates), expected)

    def test_without_embeddings_users_change_nothing(self):
        model = sasrec()
        items, buckets = histories(model, SPEC, [12])
        assert model.users is None
        assert torch.equal(
            model.encode(items, buckets, torch.tensor([3])), model.encode(items, buckets)
        )

    def test_in_training_a_user_is_hidden_so_often(self):
        model = sasrec(n_users=N_USERS, n_layers=1, user_dropout=0.3).train()
        assert model.users is not None
        with torch.no_grad():
            model.users.weight[1:] = 1000.0
        items, buckets = histories(model, SPEC, [1], width=1)
        n = 4000
        vectors = model.encode(items.expand(n, -1), buckets.expand(n, -1, -1), torch.full((n,), 2))
        hidden = (vectors.amax(dim=(1, 2)) < 500).float().mean()
        assert hidden.item() == pytest.approx(0.3, abs=0.03)


VARIANTS = [
    pytest.param({}, id="row"),
    pytest.param({"positions": "relative"}, id="relative"),
    pytest.param({"norm": "post"}, id="post-norm"),
    pytest.param({"positions": "relative", "n_layers": 1, "n_users": N_USERS}, id="one layer"),
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_rules_of_next_item_models_hold(changes):
    model = sasrec(**changes)
    assert_padding_changes_nothing(model)
    assert_company_changes_nothing(model)
    assert_empty_history_is_finite(model)
    assert_causal(model)
    assert_last_equals_encode(model)


@both_positions
def test_but_for_padding_they_hold_in_the_classic_form(positions):
    model = sasrec(positions=positions, mask_padding=False)
    assert_company_changes_nothing(model)
    assert_empty_history_is_finite(model)
    assert_causal(model)
    assert_last_equals_encode(model)
    with pytest.raises(AssertionError):
        assert_padding_changes_nothing(model)


@both_positions
def test_every_parameter_learns(positions):
    assert_every_parameter_learns(sasrec(positions=positions, n_users=N_USERS), n_users=N_USERS)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="row"),
        pytest.param({"positions": "relative", "n_users": N_USERS}, id="relative"),
    ],
)
def test_the_graph_is_the_model(changes, tmp_path):
    assert_exports(sasrec(**changes), SPEC, tmp_path)
