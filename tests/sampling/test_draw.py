"""The draw itself; its log-probabilities are compared with ``generate`` in ``test_settings.py``."""

from __future__ import annotations

import torch

from trl_grpo_ext.sampling.draw import inverse_cdf


def test_inverse_cdf_takes_the_token_whose_share_holds_the_uniform_number() -> None:
    logprobs_BV = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).log().expand(7, -1)
    below_one = 1 - 2.0**-53
    uniforms_B = torch.tensor(
        [0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9, below_one], dtype=torch.float64
    )
    assert inverse_cdf(logprobs_BV, uniforms_B).tolist() == [1, 1, 3, 3, 4, 4, 4]


def test_inverse_cdf_takes_no_token_of_probability_zero_when_the_sum_is_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(200, 1000, generator=generator) * 5
    logits_BV[:, ::2] = -torch.inf
    logprobs_BV = logits_BV.log_softmax(dim=-1)
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64).repeat(100)
    drawn_B = inverse_cdf(logprobs_BV, ends)
    assert logprobs_BV.gather(1, drawn_B[:, None]).isfinite().all()
