"""Completions a second of the math reward, against math-verify's own parse and verify, one by one.

    python benchmarks/rewards_math.py [--solutions train.jsonl]

Without a file of GSM8K (lines of JSON with `answer`) the solutions are made up in its form.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

from math_verify import parse, verify
from rich import print as show
from rich.table import Table

from trl_grpo_ext.rewards.math import MathReward

EXPRESSIONS = [
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{\pi}{4}", r"\pi/4"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\sqrt{5}", r"\sqrt{6}"),
]
Pairs = list[tuple[str, str]]


def made_up(num_pairs: int) -> list[str]:
    """Solutions in the form of GSM8K's."""
    draw = random.Random(0)
    pairs = [(draw.randint(1, 5000), draw.randint(1, 5000)) for _ in range(num_pairs)]
    line = "She sold {a} clips in April.\nShe sold {a}+{b} = {c} clips in all.\n#### {c}"
    return [line.format(a=a, b=b, c=a + b) for a, b in pairs]


def solutions(path: Path | None, num_pairs: int) -> list[str]:
    if path is None:
        return made_up(num_pairs)
    lines = path.read_text(encoding="utf-8").splitlines()[:num_pairs]
    return [json.loads(line)["answer"] for line in lines]


def pairs_of(texts: list[str], num_expressions: int) -> dict[str, Pairs]:
    """Each kind of completions, with the gold answers."""
    boxed = [rf"{text.rpartition('####')[0]} \boxed{{{_end(text)}}}" for text in texts]
    algebra = [
        (rf"So \boxed{{{reply} + {n}}}.", f"{gold} + {n}")
        for n, (reply, gold) in _cycle(num_expressions)
    ]
    return {
        "GSM8K, ####": [(text, _end(text)) for text in texts],
        "GSM8K, boxed": [(reply, _end(text)) for reply, text in zip(boxed, texts, strict=True)],
        "expressions, all different": algebra,
    }


def _end(text: str) -> str:
    return text.rpartition("####")[2].strip()


def _cycle(count: int) -> list[tuple[int, tuple[str, str]]]:
    return [(n + 1, EXPRESSIONS[n % len(EXPRESSIONS)]) for n in range(count)]


def ours(pairs: Pairs, reward: MathReward) -> list[float | None]:
    return reward(completions=[reply for reply, _ in pairs], answer=[gold for _, gold in pairs])


def naive(pairs: Pairs) -> list[float | None]:
    return [float(verify(parse(f"${gold}$"), parse(reply))) for reply, gold in pairs]


def timed(run: Callable[[], list[float | None]]) -> tuple[float, int]:
    """Seconds, and how many scored 1."""
    start = time.perf_counter()
    scores = run()
    return time.perf_counter() - start, scores.count(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--solutions", type=Path)
    parser.add_argument("--num-pairs", type=int, default=2000)
    parser.add_argument("--num-expressions", type=int, default=200)
    arguments = parser.parse_args()
    table = Table("completions", "number", "ours a second", "right", "naive a second", "right")
    reward = MathReward()
    reward(completions=[r"\boxed{x + 1}"] * 2, answer=["1 + x", "2 + x"])  # starts the workers
    texts = solutions(arguments.solutions, arguments.num_pairs)
    for name, pairs in pairs_of(texts, arguments.num_expressions).items():
        ours_s, ours_right = timed(lambda pairs=pairs: ours(pairs, reward))  # type: ignore[misc]
        naive_s, naive_right = timed(lambda pairs=pairs: naive(pairs))  # type: ignore[misc]
        rates = [f"{len(pairs) / seconds:,.0f}" for seconds in (ours_s, naive_s)]
        table.add_row(name, str(len(pairs)), rates[0], str(ours_right), rates[1], str(naive_right))
    show(table)


if __name__ == "__main__":
    main()
