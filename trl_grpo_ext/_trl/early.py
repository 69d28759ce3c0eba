"""TRL's trainer that hands completions to their rewards while others are still sampled.

A finished completion goes to its rewards at once, so that services score it while others are
sampled and the reference runs; the call that TRL makes later collects.
"""

from __future__ import annotations

from typing import Any, cast

from trl.data_utils import is_conversational
from trl.trainer import grpo_trainer

from trl_grpo_ext._trl.own_reference import OwnReference
from trl_grpo_ext.rewards.scores import Score
from trl_grpo_ext.sampling import Completion


class EarlyRewardSeams(OwnReference):
    """``trl.GRPOTrainer`` with early submission of completions to rewards that have ``submit``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._rows_in_work: list[dict[str, Any]] = []  # of this generation; none: submit nothing
        self._rows_a_group = 1  # of this generation; while it samples, TRL's mode says "eval"
        self._prompts_in_work: list[list[int]] = []
        self._finished: dict[int, Any] = {}  # completions of this generation
        self._submitted_groups: set[int] = set()  # of this generation, by their first completion
        self._known: list[list[Score] | None] = []  # their scores: of an interrupted run
        self._told: list[list[tuple[str, float]]] = []  # metrics of that batch, a list a reward
        super().__init__(*args, **kwargs)

    def known_scores(self) -> list[list[Score] | None]:
        """Return the scores that an interrupted run had of this batch, a list a reward.

        ``None`` stands for a reward that is called as if nothing was known.
        """
        return [None] * len(self.reward_funcs)

    @property
    def _group_size_in_mode(self) -> int:
        train = self._mode == "train"
        return cast(int, self.num_generations if train else self.num_generations_eval)

    @property
    def _submits(self) -> bool:
        """Whether rewards are told of completions before TRL calls them."""
        changes_completions = (
            self.tools or self.environment_factories is not None or self.rollout_func is not None
        )
        return self.extended and self.options.overlap_rewards and not changes_completions

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows_in_work = inputs if self._submits else []
        self._submitted_groups = set()
        self._rows_a_group = self._group_size_in_mode
        self._told = [[] for _ in self.reward_funcs]
        self._known = self.known_scores() if self.extended else []
        try:
            return cast(dict[str, Any], super()._generate_and_score_completions(inputs))
        finally:
            self._rows_in_work = []

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self._finished = {}
        output = super()._generate(*args, **kwargs)
        if self._rows_in_work:
            for index, (ids, completion) in enumerate(zip(output[1], output[3], strict=True)):
                self._submit(index, completion, ids)
        return output

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        self._prompts_in_work = prompt_ids
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def completion_finished(self, index: int, completion: Completion) -> None:
        """Submit a completion of the batch, while others are still sampled."""
        takers = ("submit", "submit_group")
        if self._rows_in_work and any(
            hasattr(func, name) for func in self.reward_funcs for name in takers
        ):
            self._submit(index, self._parsed(index, completion.ids), completion.ids)

    def _parsed(self, index: int, ids: list[int]) -> Any:
        """The completion, as TRL hands it to rewards."""
        tokenizer: Any = self._tokenizer
        if not is_conversational({"prompt": self._rows_in_work[index]["prompt"]}):
            return tokenizer.decode(ids, skip_special_tokens=True)
        if any(getattr(tokenizer, f"response_{kind}", None) for kind in ("template", "schema")):
            prefix = self._prompts_in_work[index]
            return [grpo_trainer.parse_response(tokenizer, ids, prefix=prefix, tools=None)]
        content = tokenizer.decode(ids, skip_special_tokens=True)
        return [{"role": "assistant", "content": content}]

    def _submit(self, index: int, completion: Any, ids: list[int]) -> None:
        """Hand a completion to each reward that takes it early; once more changes nothing."""
        row, place = self._rows_in_work[index], self._place_in_group(index)
        self._finished[index] = completion
        group = range(index - place, index - place + self._rows_a_group)
        is_whole = all(member in self._finished for member in group)
        hands_over = is_whole and group.start not in self._submitted_groups
        for reward, known in zip(cast(list[Any], self.reward_funcs), self._known, strict=True):
            if known is not None and known[index] is not None:
                continue
            if not getattr(reward, "needs_group", False):
                if hasattr(reward, "submit"):
                    reward.submit(
                        row=row, completion=completion, completion_ids=ids, group_index=place
                    )
            elif hands_over and hasattr(reward, "submit_group"):
                completions = [self._finished[member] for member in group]
                reward.submit_group(row=row, completions=completions)
        if is_whole:
            self._submitted_groups.add(group.start)

    def _place_in_group(self, index: int) -> int:
        first = self.accelerator.process_index * len(self._rows_in_work)
        return int((first + index) % self._rows_a_group)
