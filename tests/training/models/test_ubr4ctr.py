"""UBR4CTR: what is kept, what is made of it, and how the selection learns."""

import itertools
import math
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.training.models.click_checks import (
    assert_company_changes_nothing,
    assert_empty_history_is_finite,
    assert_every_parameter_learns,
    assert_exports,
    assert_order_of_candidates_is_free,
    assert_padding_changes_nothing,
    operators,
)
from tests.training.models.inputs import N_ROWS, SPEC, inputs
from training.models.encoder import ItemEncoder
from training.models.ubr4ctr import UBR4CTR

WIDTH = 6
Model = TypeVar("Model", bound=UBR4CTR)


class Told(UBR4CTR):
    """Keeps what it is told to, where the model would draw lots."""

    kept: Tensor

    def _keep(self, keep_logits_BL: Tensor) -> Tensor:
        del keep_logits_BL
        return self.kept


def ubr4ctr(kind: type[Model]) -> Model:
    """Return a model with weights so large that every term of it matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(
            ItemEncoder(N_ROWS, WIDTH),
            SPEC,
            embedding_dim=WIDTH,
            selection_heads=2,
            selection_units=5,
            head_units=(8,),
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        with torch.no_grad():
            model.items.items.weight[0].zero_()
            # About half of the behaviors are kept.
            items, buckets, _ = inputs([12])
            history = model.history(model.items, items, buckets)
            last_of(model.policy.layers).bias.sub_(model.policy(history, items != 0).median())
    return model.eval()


def last_of(layers: nn.Sequential) -> nn.Linear:
    layer = layers[-1]
    assert isinstance(layer, nn.Linear)
    return layer


def literal_probabilities(model: UBR4CTR, e: Tensor) -> Tensor:
    """Return the probabilities of keeping n behaviors [n, D], one query and head at a time."""
    policy = model.policy
    query = policy.attention.query(e)
    key, value = policy.attention.key_value(e).chunk(2, dim=-1)
    probabilities = []
    for i in range(len(e)):
        met = []
        for head in (slice(0, 3), slice(3, 6)):
            weights = torch.softmax(key[:, head] @ query[i, head] / math.sqrt(3), dim=0)
            met.append(weights @ value[:, head])
        x = e[i] + policy.attention.output(torch.cat(met))
        x = (x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-5)
        x = x * policy.norm.weight + policy.norm.bias
        first, _, second = policy.layers
        hidden = (first.weight @ x + first.bias).clamp(min=0)
        probabilities.append(torch.sigmoid(second.weight @ hidden + second.bias)[0])
    return torch.stack(probabilities)


def literal_logit(model: UBR4CTR, e: Tensor, kept: list[bool], v: Tensor) -> Tensor:
    """Return the logit of one target [D] for n behaviors [n, D]."""
    query = model.query.weight @ v + model.query.bias
    exponentials = [
        math.exp(query @ one) if keep else 0.0 for one, keep in zip(e, kept, strict=True)
    ]
    u = torch.zeros(WIDTH)
    for one, exponential in zip(e, exponentials, strict=True):
        if exponential:
            u = u + exponential / sum(exponentials) * one
    logit: Tensor = model.head(torch.cat([u, v]))
    return logit


def encoded(model: UBR4CTR, items: Tensor, buckets: Tensor, length: int) -> Tensor:
    """Return the behaviors [length, D] of one row."""
    whole: Tensor = model.history(model.items, items[None], buckets[None])[0]
    return whole[len(items) - length :]


@torch.no_grad()
def test_scores_are_those_of_the_equations_with_what_is_more_likely_kept_than_not():
    model = ubr4ctr(UBR4CTR)
    lengths = [12, 5, 1, 0]
    items, buckets, candidates = inputs(lengths)
    logits = model(items, buckets, candidates)
    n_kept = 0
    for b, length in enumerate(lengths):
        e = encoded(model, items[b], buckets[b], length)
        kept = [bool(p > 0.5) for p in literal_probabilities(model, e)] if length else []
        n_kept += sum(kept)
        expected = [literal_logit(model, e, kept, model.items(row)) for row in candidates[b]]
        torch.testing.assert_close(logits[b], torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert 5 < n_kept < 13


def test_nothing_kept_is_a_user_of_zeros():
    model = ubr4ctr(UBR4CTR)
    with torch.no_grad():
        last_of(model.policy.layers).bias.fill_(-100.0)
    items, buckets, candidates = inputs([12, 0])
    v = model.items(candidates)
    expected = model.head(torch.cat([torch.zeros_like(v), v], dim=-1))
    torch.testing.assert_close(model(items, buckets, candidates), expected)


def test_in_training_a_behavior_is_kept_with_its_probability():
    model = ubr4ctr(UBR4CTR)
    with torch.no_grad():
        last_of(model.policy.layers).weight.zero_()
        last_of(model.policy.layers).bias.fill_(math.log(0.3 / 0.7))
        items, buckets, candidates = inputs([1], n_candidates=1)
        without = model(items, buckets, candidates)
        n = 4000
        torch.manual_seed(0)
        drawn = model.train()(
            items.expand(n, -1), buckets.expand(n, -1, -1), candidates.expand(n, -1)
        )
    assert (drawn != without).float().mean().item() == pytest.approx(0.3, abs=0.03)


def reward(logit: Tensor, label: Tensor) -> Tensor:
    """Return 1 - logloss / log 2, no less than -1."""
    p = torch.sigmoid(logit if label else -logit)
    return torch.clamp(1 + torch.log2(p), min=-1.0)


def test_the_policys_gradient_is_that_of_the_expected_reward():
    """Over all ways to keep three behaviors of four places, each as often as it is drawn."""
    model = ubr4ctr(Told).train()
    items, buckets, candidates = inputs([3], n_candidates=3, length=4)
    labels, mask = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[True, True, False]])
    policy = list(model.policy.parameters())
    e = encoded(model, items[0], buckets[0], 3).detach()
    p = literal_probabilities(model, e)
    expected_reward = torch.zeros(())
    found = [torch.zeros_like(one) for one in policy]
    rewards = []
    for kept in itertools.product([False, True], repeat=3):
        of_places = torch.where(torch.tensor(kept), p, 1 - p)
        with torch.no_grad():
            logits = [literal_logit(model, e, list(kept), model.items(c)) for c in candidates[0]]
            gained = sum(reward(logits[c], labels[0, c]) for c in (0, 1))
        rewards.append(float(gained))
        expected_reward = expected_reward + of_places.prod() * gained
        model.kept = torch.tensor([[True, *kept]])  # padding is not kept, whatever is drawn
        loss = model.training_loss(items, buckets, candidates, labels, mask)
        for total, one in zip(found, torch.autograd.grad(loss, policy), strict=True):
            total += of_places.prod().detach() * one
    assert max(rewards) - min(rewards) > 0.05
    exact = torch.autograd.grad(-expected_reward, policy)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_all_but_the_policy_learn_from_the_bce_alone():
    model = ubr4ctr(Told).train()
    items, buckets, candidates = inputs([12, 5, 0])
    labels = torch.arange(15).reshape(3, 5) % 2 * 1.0
    mask = torch.arange(15).reshape(3, 5) % 4 != 0
    model.kept = torch.arange(12).expand(3, -1) % 3 != 0
    others = [one for name, one in model.named_parameters() if not name.startswith("policy")]
    loss = model.training_loss(items, buckets, candidates, labels, mask)
    bce = functional.binary_cross_entropy_with_logits(
        model(items, buckets, candidates), labels, weight=mask.float(), reduction="sum"
    )
    found, expected = torch.autograd.grad(loss, others), torch.autograd.grad(bce, others)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_reward_is_no_less_than_minus_one():
    """However wrong the logits are, the policy is told -1 for each sample."""
    model = ubr4ctr(Told).train()
    with torch.no_grad():
        last = last_of(model.head.layers)
        last.weight.zero_()
        last.bias.fill_(-50.0)
    items, buckets, candidates = inputs([2], n_candidates=3)
    model.kept = torch.ones(1, 12, dtype=torch.bool)
    ones = torch.ones(1, 3)
    p = literal_probabilities(model, encoded(model, items[0], buckets[0], 2))
    loss = model.training_loss(items, buckets, candidates, ones, ones)
    torch.testing.assert_close(loss, 3 * (50 + p.log().sum()))


def test_the_rules_of_click_models_hold():
    model = ubr4ctr(UBR4CTR)
    assert_padding_changes_nothing(model, tolerance=1e-5)
    assert_company_changes_nothing(model, tolerance=1e-5)
    assert_order_of_candidates_is_free(model, tolerance=1e-5)
    assert_empty_history_is_finite(model)


def test_a_request_is_selected_from_once_however_many_candidates_it_has():
    model = ubr4ctr(UBR4CTR)
    rows = []
    model.policy.register_forward_hook(lambda *call: rows.append(call[2].shape))
    model(*inputs([12, 3], n_candidates=5))
    assert rows == [(2, 12)]


def test_every_parameter_learns():
    assert_every_parameter_learns(ubr4ctr(UBR4CTR))


def test_the_graph_is_the_model(tmp_path):
    found = operators(assert_exports(ubr4ctr(UBR4CTR), tmp_path))
    assert not {"Loop", "Scan", "If", "Bernoulli", "RandomUniformLike"} & set(found)
