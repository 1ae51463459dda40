"""MIMN: a neural Turing machine reads the history into a few memory slots, which every target then
asks (Pi et al., "Practice on long sequential user behavior modeling for click-through rate
prediction", 2019; constants and form as in its authors' code, UIC-Paper/MIMN).

Shapes: B requests, C candidates, L history length, D embedding width and that of all states, S
memory slots, K questions put to the slots (of a reading and a writing head, or of the candidates),
G time granularities.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from contract.catalogue import PADDING_ROW
from contract.features import FeatureSpec
from training.models.encoder import HistoryEncoder, ItemEncoder
from training.models.head import MLP
from training.models.recurrence import Tensors, recur

_CLIP = 20.0
_FIRST_SLOT_STD = 1e-5
_KEY_STD = 0.5
_MIN_NORM = 1e-8
_MIN_WEIGHT = 1e-30
_N_SHIFTS = 3
_ATTENTION_UNITS = (80, 40)


class Memory(nn.Module):
    """The machine: a controller, and two heads that read from and write to S slots (section 4.2).

    h_t = GRU([x_t, r_(t-1)], h_(t-1)). The parameters of both heads are linear in h_t, and clipped
    to +-20. Addressing: w = softmax(beta (cos(k, key) + cos(k, M)) / 2), beta = 2 (softplus + 1), k
    after a tanh, `key` a learned vector of each slot. Reading: r_t = sum_i w_i M_i, before writing.
    Writing, with a w of its own: M_i <- M_i (1 - w_i e) + w_i a, e after a sigmoid, a after a tanh.

    `balanced`: how much each slot was written to so far is told to the heads, and the writing w is
    moved to neighbours and sharpened: w <- softmax(gamma log(sum_o s_o w_(i-o))), o in -1, 0, 1,
    s after a softmax, gamma = 4 (softplus + 1). The paper has a learned matrix there (equation 7);
    this is the form of its code, which moves the weights that it adds up once more, though: here
    they are the ones that were written with. `traced`: steps tell which slot they read.
    """

    first_slots: Tensor

    def __init__(
        self, width: int, n_slots: int, *, history_length: int, balanced: bool, traced: bool
    ) -> None:
        super().__init__()
        self.history_length = history_length
        self.traced = traced
        # Keys of both heads and what is added; what is erased; the sharpness of both heads; the
        # shift and its sharpness.
        self.head_widths = [3 * width, width, 2, *([_N_SHIFTS, 1] if balanced else [])]
        n_parameters = sum(self.head_widths)
        self.input_gates = nn.Linear(width, 3 * width)
        self.read_gates = nn.Linear(width, 3 * width, bias=False)
        self.state_gates = nn.Linear(width, 3 * width)
        self.heads = nn.Linear(width, n_parameters)
        self.heads_of_use = nn.Linear(n_slots, n_parameters, bias=False) if balanced else None
        self.answer = nn.Linear(2 * width, width)
        self.first_read = nn.Parameter(torch.randn(width))
        self.keys = nn.Parameter(torch.randn(n_slots, width) * _KEY_STD)
        # Not learned: they only give cosines with an empty memory a direction.
        self.register_buffer("first_slots", torch.randn(n_slots, width) * _FIRST_SLOT_STD)

    def forward(self, history_BLD: Tensor, is_behavior_BL: Tensor) -> tuple[Tensors, Tensors]:
        """Return the state after the history, and the trace of its steps.

        State: controller [B, D]; what was read [B, D]; the slots [B, S, D]; the sum of all that was
        added [B, D]; and, of a balanced memory, the writing weights' sum [B, S], as a share of the
        longest history. Trace: the slot most read from, one-hot and 0 at padding, [L, B, S]; what
        that slot held, [L, B, D], without gradient.
        """
        key_directions_SD = self._key_directions()

        def step(state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
            return self._step(state, inputs, key_directions_SD)

        inputs = (
            self.input_gates(history_BLD.transpose(0, 1)),
            is_behavior_BL.transpose(0, 1).unsqueeze(2),
        )
        return recur(step, self._first_state(history_BLD[:, 0]), inputs)

    def ask(self, state: Tensors, target_BCD: Tensor) -> Tensor:
        """Return what targets read, [B, C, D]: each takes one more step, which writes nothing."""
        controller_BD, read_BD, slots_BSD, _, *use = state
        controller_BCD = self._control(
            self.input_gates(target_BCD), read_BD.unsqueeze(1), controller_BD.unsqueeze(1)
        )
        keys_add, _, sharpness_BC2, *_ = self._head_outputs(
            controller_BCD, [use_BS.unsqueeze(1) for use_BS in use]
        )
        keys_BCD = keys_add.chunk(3, dim=2)[0]
        weights_BCS = address(keys_BCD, sharpness_BC2[:, :, 0], slots_BSD, self._key_directions())
        features = torch.cat([controller_BCD, weights_BCS @ slots_BSD], dim=2)
        answer_BCD: Tensor = self.answer(features).clamp(-_CLIP, _CLIP)
        return answer_BCD

    def _first_state(self, like_BD: Tensor) -> Tensors:
        zeros_BD = torch.zeros_like(like_BD)
        zeros_BSD = zeros_BD.unsqueeze(1) * self.first_slots
        state = (
            zeros_BD,
            zeros_BD + torch.tanh(self.first_read),
            zeros_BSD + torch.tanh(self.first_slots),
            torch.zeros_like(like_BD),
        )
        return state if self.heads_of_use is None else (*state, zeros_BSD.sum(dim=2))

    def _step(
        self, state: Tensors, inputs: Tensors, key_directions_SD: Tensor
    ) -> tuple[Tensors, Tensors]:
        before_BD, read_before_BD, slots_BSD, added_BD, *use = state
        input_gates_B, is_behavior_B1 = inputs
        controller_BD = self._control(input_gates_B, read_before_BD, before_BD)
        keys_add, erase_BD, sharpness_B2, *balance = self._head_outputs(controller_BD, use)
        read_key_BD, write_key_BD, add_BD = keys_add.chunk(3, dim=1)
        reading_BS, writing_BS = address(
            torch.stack([read_key_BD, write_key_BD], dim=1),
            sharpness_B2,
            slots_BSD,
            key_directions_SD,
        ).unbind(dim=1)
        if use:
            # Detached: an even use is learned by what moves the weights, not by the addressing.
            moved_BS = move(writing_BS.detach(), *balance) * is_behavior_B1
            use = [use[0] + moved_BS / self.history_length]
            writing_BS = move(writing_BS, *balance)
        read_BD = (reading_BS.unsqueeze(1) @ slots_BSD).squeeze(1)
        writing_BS1 = (writing_BS * is_behavior_B1).unsqueeze(2)
        after = (
            torch.where(is_behavior_B1, controller_BD, before_BD),
            torch.where(is_behavior_B1, read_BD, read_before_BD),
            slots_BSD + writing_BS1 * (add_BD.unsqueeze(1) - erase_BD.unsqueeze(1) * slots_BSD),
            added_BD + add_BD * is_behavior_B1,
            *use,
        )
        if not self.traced:
            return after, ()
        top_BS = one_hot_of_largest(reading_BS) * is_behavior_B1
        return after, (top_BS, (top_BS.unsqueeze(1) @ slots_BSD.detach()).squeeze(1))

    def _control(self, input_gates: Tensor, read: Tensor, state: Tensor) -> Tensor:
        return gru_state(input_gates + self.read_gates(read), self.state_gates(state), state)

    def _head_outputs(self, controller: Tensor, use: Sequence[Tensor]) -> Tensors:
        parameters = self.heads(controller)
        if self.heads_of_use is not None:
            parameters = parameters + self.heads_of_use(use[0].detach())
        parameters = parameters.clamp(-_CLIP, _CLIP)
        keys_add, erase, *others = torch.split(parameters, self.head_widths, dim=-1)
        return torch.tanh(keys_add), torch.sigmoid(erase), *others

    def _key_directions(self) -> Tensor:
        return functional.normalize(torch.tanh(self.keys), dim=1, eps=_MIN_NORM)


class InductionUnit(nn.Module):
    """A second state of each slot, and the attention of targets over them (section 4.3).

    The slot i that step t reads most from takes a GRU step, the others stay:
    s_i <- GRU([x_t, M_i], s_i). Targets read sum_i softmax_i(MLP([v, s_i, v - s_i, v * s_i])) s_i.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_gates = nn.Linear(2 * width, 3 * width)
        self.state_gates = nn.Linear(width, 3 * width)
        first, second = _ATTENTION_UNITS
        self.attention = nn.Sequential(
            nn.Linear(4 * width, first),
            nn.Sigmoid(),
            nn.Linear(first, second),
            nn.Sigmoid(),
            nn.Linear(second, 1, bias=False),  # the softmax would not see it
        )

    def forward(self, history_BLD: Tensor, trace: Tensors) -> Tensor:
        """Return the states [B, S, D]; `trace`: of `Memory`."""
        top_LBS, held_LBD = trace
        gates_LB = self.input_gates(torch.cat([history_BLD.transpose(0, 1), held_LBD], dim=2))
        empty_BSD = torch.zeros_like(top_LBS[0]).unsqueeze(2) * held_LBD[0].unsqueeze(1)
        (states_BSD,), _ = recur(self._step, (empty_BSD,), (gates_LB, top_LBS))
        return states_BSD

    def ask(self, states_BSD: Tensor, target_BCD: Tensor) -> Tensor:
        """Return what targets read, [B, C, D]."""
        n_candidates, n_slots = target_BCD.shape[1], states_BSD.shape[1]
        s = states_BSD.unsqueeze(1).expand(-1, n_candidates, -1, -1)
        v = target_BCD.unsqueeze(2).expand(-1, -1, n_slots, -1)
        scores_BCS = self.attention(torch.cat([v, s, v - s, v * s], dim=3)).squeeze(3)
        return torch.softmax(scores_BCS, dim=2) @ states_BSD

    def _step(self, state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        (states_BSD,), (gates_B, top_BS) = state, inputs
        top_BD = (top_BS.unsqueeze(1) @ states_BSD).squeeze(1)
        change_BD = gru_state(gates_B, self.state_gates(top_BD), top_BD) - top_BD
        return (states_BSD + top_BS.unsqueeze(2) * change_BD.unsqueeze(1),), ()


class MIMN(nn.Module):
    """logit = MLP([v, mean_j e_j, answer to v, mean_j a_j * v(, induction unit's answer to v)]).

    a_j is what behavior j added to the memory. Means stand where the authors' code has sums, which
    it batch-normalises. `utilisation_weight`: above 0 the memory is `balanced`, and the loss has
    that much of its imbalance (see `training_loss`). `induction`: with an InductionUnit. What a
    request's memory holds does not depend on its candidates.
    """

    def __init__(
        self,
        items: ItemEncoder,
        spec: FeatureSpec,
        *,
        embedding_dim: int,
        n_slots: int,
        utilisation_weight: float,
        induction: bool,
        head_units: Sequence[int],
    ) -> None:
        super().__init__()
        self.utilisation_weight = utilisation_weight
        self.items = items
        self.history = HistoryEncoder(spec, embedding_dim)
        self.memory = Memory(
            embedding_dim,
            n_slots,
            history_length=spec.history_length,
            balanced=utilisation_weight > 0,
            traced=induction,
        )
        self.induction = InductionUnit(embedding_dim) if induction else None
        self.head = MLP((5 if induction else 4) * embedding_dim, head_units)

    def forward(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> Tensor:
        """Return logits [B, C] of catalogue rows [B, L], buckets [B, L, G] and rows [B, C]."""
        logits_BC, _ = self._score(history_items, history_buckets, candidate_items)
        return logits_BC

    def training_loss(
        self,
        history_items: Tensor,
        history_buckets: Tensor,
        candidate_items: Tensor,
        labels: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Return the BCE plus the weighted imbalance of the memory, summed over the samples.

        `labels`, `mask`: [B, C], 1 for clicks and 1 for samples, 0 for others. The imbalance of a
        sample is mean_i (u_i - mean u)^2 (equation 8), u_i what its request wrote to slot i as a
        share of the longest history: the authors' weight of 0.001, of sums over 400 behaviors
        divided by slots and batch, would be 0.3 here.
        """
        logits_BC, state = self._score(history_items, history_buckets, candidate_items)
        loss = functional.binary_cross_entropy_with_logits(
            logits_BC, labels, weight=mask.type_as(logits_BC), reduction="sum"
        )
        if not self.utilisation_weight:
            return loss
        imbalance_B = state[-1].var(dim=1, correction=0)
        return loss + self.utilisation_weight * (imbalance_B * mask.sum(dim=1)).sum()

    def _score(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> tuple[Tensor, Tensors]:
        is_behavior_BL = history_items != PADDING_ROW
        history_BLD = self.history(self.items, history_items, history_buckets)
        n_behaviors_B1 = is_behavior_BL.sum(dim=1, keepdim=True).clamp(min=1)
        target_BCD: Tensor = self.items(candidate_items)
        state, trace = self.memory(history_BLD, is_behavior_BL)
        mean_B1D, mean_added_B1D = (
            (total_BD / n_behaviors_B1).unsqueeze(1) for total_BD in (history_BLD.sum(1), state[3])
        )
        features = [
            target_BCD,
            mean_B1D.expand_as(target_BCD),
            self.memory.ask(state, target_BCD),
            mean_added_B1D * target_BCD,
        ]
        if self.induction is not None:
            features.append(self.induction.ask(self.induction(history_BLD, trace), target_BCD))
        return self.head(torch.cat(features, dim=2)), state


def address(
    keys_BKD: Tensor, sharpness_BK: Tensor, slots_BSD: Tensor, key_directions_SD: Tensor
) -> Tensor:
    """Return the weights [B, K, S] of the slots; `sharpness_BK` before its softplus."""
    # One product for both cosines. beta / 2 = softplus + 1.
    directions_BSD = key_directions_SD + functional.normalize(slots_BSD, dim=2, eps=_MIN_NORM)
    questions_BKD = functional.normalize(keys_BKD, dim=2, eps=_MIN_NORM)
    cosines_BKS = questions_BKD @ directions_BSD.transpose(1, 2)
    return torch.softmax((functional.softplus(sharpness_BK) + 1).unsqueeze(2) * cosines_BKS, dim=2)


def move(weights_BS: Tensor, shift_B3: Tensor, sharpness_B1: Tensor) -> Tensor:
    """Return the weights [B, S] moved by 0, 1 and -1 slots, in a ring, and sharpened."""
    stay_B1, up_B1, down_B1 = torch.softmax(shift_B3, dim=1).chunk(_N_SHIFTS, dim=1)
    moved_BS = (
        stay_B1 * weights_BS
        + up_B1 * torch.roll(weights_BS, 1, dims=1)
        + down_B1 * torch.roll(weights_BS, -1, dims=1)
    )
    # By logarithms: powers of small weights would all be 0 in float32.
    gamma_B1 = 4 * (functional.softplus(sharpness_B1) + 1)
    return torch.softmax(gamma_B1 * torch.log(moved_BS.clamp(min=_MIN_WEIGHT)), dim=1)


def gru_state(input_gates: Tensor, state_gates: Tensor, state: Tensor) -> Tensor:
    """Return the next state [..., D] of a GRU; gates r, z, n [..., 3D] of its input and state.

    The reset gate acts on the product with the state, not on the state, as cuDNN has it.
    """
    width = state.shape[-1]
    input_rz, input_n = torch.split(input_gates, [2 * width, width], dim=-1)
    state_rz, state_n = torch.split(state_gates, [2 * width, width], dim=-1)
    r, z = torch.sigmoid(input_rz + state_rz).chunk(2, dim=-1)
    n = torch.tanh(input_n + r * state_n)
    return n + z * (state - n)


def one_hot_of_largest(weights_BS: Tensor) -> Tensor:
    """Return 1 at the largest weight of each row, at the first of equal ones; 0 elsewhere."""
    slots_S = torch.arange(weights_BS.shape[1], device=weights_BS.device)
    return (weights_BS.argmax(dim=1, keepdim=True) == slots_S).type_as(weights_BS)
