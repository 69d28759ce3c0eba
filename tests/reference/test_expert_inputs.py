"""The inputs of experts: what is noted of a module's calls, without padding, and then undone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trl_grpo_ext.reference.expert_inputs import (
    RoutedTokens,
    expert_moments,
    real_tokens,
    recorded_routing,
)

HIDDEN = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 4.0]])
EXPERTS = torch.tensor([[0, 1], [1, 2], [0, 2], [1, 0]])


class Doubling(nn.Module):
    """Three experts without a gate: 2 x, then a matrix that nothing is computed with."""

    has_gate = has_bias = is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(2 * torch.eye(2).repeat(3, 1, 1))
        self.down_proj = nn.Parameter(torch.zeros(3, 2, 2))

    def act_fn(self, inputs: Tensor) -> Tensor:
        return inputs

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        return hidden


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Doubling()

    def forward(self, hidden: Tensor, experts: Tensor, *, by_name: bool = False) -> Tensor:
        weights = torch.ones_like(experts)
        if by_name:
            out: Tensor = self.experts(hidden=hidden, experts=experts, weights=weights)
        else:
            out = self.experts(hidden, experts, weights)
        return out


@pytest.mark.parametrize("by_name", [True, False])
def test_calls_are_noted_by_name_and_in_order(*, by_name: bool) -> None:
    layer = Layer()
    with recorded_routing(layer, ["experts"]) as found:
        layer(HIDDEN, EXPERTS, by_name=by_name)
        layer(HIDDEN[:1], EXPERTS[:1], by_name=by_name)
    layer(HIDDEN, EXPERTS)
    assert list(found) == ["experts"]
    assert [len(call.hidden_NI) for call in found["experts"]] == [4, 1]
    assert torch.equal(found["experts"][0].experts_NK, EXPERTS)


def test_an_error_leaves_no_hook() -> None:
    layer = Layer()
    with pytest.raises(KeyError), recorded_routing(layer, ["experts"]):
        raise KeyError
    assert not layer.experts._forward_pre_hooks


def test_padding_is_left_out_of_all_calls() -> None:
    calls = [RoutedTokens(HIDDEN, EXPERTS), RoutedTokens(HIDDEN[:2], EXPERTS[:2])]
    masks = [torch.tensor([[1, 0], [0, 1]]), torch.tensor([[0], [1]])]
    found = real_tokens(calls, masks)
    assert found.hidden_NI.tolist() == [[1, 0], [0, 4], [2, 0]]
    assert found.experts_NK.tolist() == [[0, 1], [1, 0], [1, 2]]


def test_moments_by_hand() -> None:
    """Expert 1 gets (1, 0), (2, 0) and (0, 4): a sum of diag(5, 16) over N = 3; I = 2.

    All four tokens: diag(5, 25) / 4, which count as two more. Behind the first matrix all is twice
    as large, and the prior has the same variances.
    """
    moments = list(expert_moments(Doubling(), RoutedTokens(HIDDEN, EXPERTS)))
    assert len(moments) == 3
    assert moments[1].keys() == {"up_proj", "down_proj"}
    expected = torch.diag(torch.tensor([5 + 2 * 5 / 4, 16 + 2 * 25 / 4])) / 5
    torch.testing.assert_close(moments[1]["up_proj"], expected)
    torch.testing.assert_close(
        moments[1]["down_proj"].detach(), 4 * torch.diag(torch.tensor([5.0, 16.0])) / 3
    )


def test_an_expert_without_tokens_has_the_moments_of_all_and_then_none() -> None:
    moments = list(expert_moments(Doubling(), RoutedTokens(HIDDEN, EXPERTS % 2)))
    torch.testing.assert_close(moments[2]["up_proj"], torch.diag(torch.tensor([5.0, 25.0])) / 4)
    assert not moments[2]["down_proj"].any()


def test_without_any_token_all_moments_are_0() -> None:
    tokens = RoutedTokens(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.long))
    for moments in expert_moments(Doubling(), tokens):
        assert not any(tensor.any() for tensor in moments.values())
