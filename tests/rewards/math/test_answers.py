"""Boxed replies, gold answers and what a careful grader says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trl_grpo_ext.rewards.math.reward import MathReward

# Each line: reply | gold answer | score. "-" is None: the gold answer cannot be read.
NUMBERS = r"""
72 | 72 | 1
73 | 72 | 0
72. | 72 | 1
72.0 | 72 | 1
7.2 | 72 | 0
720 | 72 | 0
27 | 72 | 0
-72 | 72 | 0
−5 | -5 | 1
-5 | \text{−5} | 1
5 | -5 | 0
--5 | 5 | 0
007 | 7 | 1
.5 | 1/2 | 1
1,000 | 1000 | 1
1000 | 1,000 | 1
1 000 | 1000 | 1
1{,}000 | 1000 | 1
1\,000 | 1000 | 1
(1,000) | 1000 | 0
1,00 | 100 | 0
10,00 | 1000 | 0
1/3 | \frac{1}{3} | 1
\frac13 | 1/3 | 1
\dfrac{2}{6} | 1/3 | 1
0.333 | 1/3 | 0
0.333333333333 | 1/3 | 0
0.\overline{3} | 1/3 | 1
1/3 | 0.333 | 0
½ | 0.5 | 1
1½ | 3/2 | 1
1 1/2 | 1.5 | 1
1\frac{1}{2} | \frac{3}{2} | 1
-1 1/2 | -1.5 | 1
11/2 | 1 1/2 | 0
1.5e3 | 1500 | 1
1.5 \times 10^{3} | 1500 | 1
1.5 \times 10^{4} | 1500 | 0
1e999999999 | 1 | 0
７２ | 72 | 1
٧٢ | 72 | 1
7²  | 72 | 0
7^2 | 72 | 0
7​2 | 72 | 1
\infty | \infty | 1
-\infty | \infty | 0
NaN | 0 | 0
1/0 | 0 | 0
3:4 | 3:4 | 1
4:3 | 3:4 | 0
3:4 | 3/4 | 0
"""

UNITS = r"""
$72 | 72 | 1
\$72 | 72 dollars | 1
72 dollars | \$72 | 1
72$ | 72 | 1
7200 cents | $72 | 1
72 cents | $72 | 0
€72 | $72 | 0
72 clips | 72 | 1
72 clips in May | 72 | 1
5 km | 5 | 1
5 | 5\text{ km} | 1
5 km | 5 m | 0
5 km | 5000 m | 1
5 km | 5 miles | 0
5 kilometers | 5 km | 1
60 mph | 60 miles per hour | 1
60 km/h | 60 miles per hour | 0
5 cm^2 | 5 square centimeters | 1
5 cm^2 | 5 cm | 0
5 cm² | 5\text{ cm}^2 | 1
2 hours | 120 minutes | 1
5 boys | 5 girls | 0
5 | 5m | 0
5x | 5 | 0
5m | 5 | 0
5 m | 5 | 1
90^\circ | 90 | 1
90° | 90 degrees | 1
50\% | 50% | 1
50% | 50 | 1
50 | 50\% | 1
50% | 0.5 | 1
0.5 | 50% | 1
33.3% | 0.333 | 1
33.3% | 1/3 | 0
5% | 0.5 | 0
72 thousand | 72 | 0
72 dozen | 72 | 0
72 or more | 72 | 0
72 times 2 | 72 | 0
\frac{\pi}{2} \text{ cm} | \frac{\pi}{2} | 1
\frac{\pi}{2} \text{ cm} | \frac{\pi}{2} \text{ m} | 0
"""

WORDS = r"""
yes | Yes | 1
Yes. | yes | 1
no | yes | 0
yes or no | yes | 0
\text{Monday} | Monday | 1
the Monday | monday | 1
Tuesday | Monday | 0
not Monday | Monday | 0
B | (B) | 1
(B) | B | 1
b | B | 1
\textbf{(B)} | B | 1
(B) 17 | B | 1
(C) 17 | B | 0
(B) or (C) | B | 0
(A) (B) (C) (D) | B | 0
(B) and (C) | B | 0
option B | B | 1
(B) (c) | B | 0
(B) is wrong | B | 0
(B) Paris | B | 1
В | B | 0
3:30 pm | 3:30 p.m. | 1
3:30 am | 3:30 pm | 0
"""

GROUPS = r"""
(1, 2) | (1,2) | 1
(2, 1) | (1,2) | 0
(1, 2) | 1, 2 | 0
\left(\frac12, 3\right) | (0.5, 3) | 1
(0,1) | [0,1] | 0
[0,1) | [0,1) | 1
(-\infty, 3] | (-∞, 3] | 1
(-\infty, 1) \cup (2, 3] | (2,3] \cup (-\infty,1) | 1
(-\infty, 1) \cup (2, 3) | (2,3] \cup (-\infty,1) | 0
x > 3 | (3, \infty) | 1
x \ge 3 | (3, \infty) | 0
1 < x \le 2 | (1, 2] | 1
2 \ge x > 1 | 1 < x \le 2 | 1
y > 3 | x > 3 | 0
\{1, 2\} | \{2, 1\} | 1
{1,2} | \{2,1\} | 1
\{1, 2, 3\} | \{1, 2\} | 0
\{1\} | \{1, 2\} | 0
1, 2 and 3 | 3, 2, 1 | 1
1, 2 | 1, 2, 3 | 0
\emptyset | \varnothing | 1
\pm 5 | 5, -5 | 1
5 | \pm 5 | 0
\pm 5 | 5 | 0
x = 5 or x = 7 | 5, 7 | 1
x = 5 | 5, 7 | 0
x=1, y=2 | y=2, x=1 | 1
x=1, y=2 | x=2, y=1 | 0
[1, 2, 3] | (1, 2, 3) | 1
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{bmatrix}1&2\\3&4\end{bmatrix} | 1
\begin{pmatrix} 1 & 2 \\ 4 & 3 \end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix} | 0
"""

EXPRESSIONS = r"""
2\sqrt{3} | \sqrt{12} | 1
2√3 | \sqrt{12} | 1
2*sqrt(3) | \sqrt{12} | 1
2\sqrt{3} | \sqrt{13} | 0
(x+1)^2 | x^2+2x+1 | 1
(x+1)^2 | x^2+2x | 0
x | X | 0
y | x | 0
\frac{3}{2}x | 1.5x | 1
\pi/4 | \frac{\pi}{4} | 1
3.14159265 | \pi | 0
\frac{314159265358979323846264338327}{100000000000000000000000000000} | \pi | 0
\sqrt{2} \cdot 10^{-20} | 2\sqrt{2} \cdot 10^{-20} | 0
1024 | 2^{10} | 1
3628800 | 10! | 1
3+4i | 4i+3 | 1
3-4i | 4i+3 | 0
x=5 | 5 | 1
5 | x=5 | 1
y=5 | x=5 | 0
y = 2x+1 | 2x+1 | 1
y = 2x+1 | 2x - y + 1 = 0 | 1
x^2+y^2=4 | 4 = y^2+x^2 | 1
x^2+y^2=4 | x^2+y^2=5 | 0
x < y | y > x | 1
x \le y | x < y | 0
\frac{1}{2} \ln 2 | \ln \sqrt{2} | 1
2 \pm \sqrt{3} | 2 - \sqrt{3}, 2 + \sqrt{3} | 1
\{\sqrt{2}, \pi\} | \{\pi, \sqrt 2\} | 1
(\pi, 1) | (1, \pi) | 0
\frac{1}{0} | \pi | 0
x^{99999999} | x^2 | 0
"""

# What a policy might try. The gold answer stands somewhere in each of them.
HACKS = r"""
5 or 7 | 7 | 0
72 \text{ or } 73 | 72 | 0
x=5, maybe 7 | 5 | 0
x=5, maybe 7 | 7 | 0
5/7 | 5 | 0
70, 71, 72, 73 | 72 | 0
70 71 72 73 | 72 | 0
70+2 | 72 | 0
70+2 = 72 | 72 | 1
72 = 72 | 72 | 1
73 = 72 | 72 | 0
72 = 73 | 72 | 0
72 = 73 = 72 | 72 | 0
\text{not } x = 72 | 72 | 0
x \ne 72 | 72 | 0
-x = 72 | 72 | 0
x \approx 72 | 72 | 1
73 \approx 72 | 72 | 0
144/2 + 0 | 72 | 0
\sqrt{5184} | 72 | 0
|{-72}| | 72 | 0
\sin 60^\circ | \frac{\sqrt{3}}{2} | 0
\int_0^1 2x^2 dx | \frac{\pi}{4} | 0
\max(71, 72) | 72 | 0
\binom{9}{2} \cdot 2 | 72 | 0
6! / 10 | 72 | 0
72! | 72 | 0
73 % 72 | 72 | 0
73 \phantom{72} | 72 | 0
\phantom{73} 72 | 72 | 0
not 72 | 72 | 0
about 70 to 75 | 72 | 0
between 71 and 73 | 72 | 0
72 (or 73) | 72 | 0
72? | 72 | 0
7̶2̶ | 72 | 0
‮27 | 72 | 0
__import__('os').system('touch /tmp/hacked') | 72 | 0
x if True else 72 | 72 | 0
\text{72 or 73} | 72 | 0
\boxed{72} or \boxed{73} | 73 | 0
5 thousands | 5 | 0
5 dozens | 5 | 0
2\text{ fifths} | 2 | 0
5 no six | 5 | 0
5 rather six | 5 | 0
5 until ten | 5 | 0
5 with remainder two | 5 | 0
5 aka seven | 5 | 0
5 doubled | 5 | 0
5 seven | 5 | 0
5 dollars fifty cents | 5 | 0
5 clips oder sieben | 5 | 0
y' | y | 0
2x' | 2x | 0
x''+1 | x+1 | 0
(A) CD | A | 0
(A) (BB) | A | 0
"""

TABLE = {
    "numbers": NUMBERS,
    "units": UNITS,
    "words": WORDS,
    "groups": GROUPS,
    "expressions": EXPRESSIONS,
    "hacks": HACKS,
}


def rows() -> Iterator[tuple[str, str, float]]:
    for table in TABLE.values():
        for line in table.strip().splitlines():
            reply, gold, score = line.rsplit(" | ", 2)
            yield reply, gold, float(score)


ROWS = list(rows())


@pytest.fixture(scope="module")
def scores() -> dict[tuple[str, str], float | None]:
    """The score of each row, in a box; one batch, as in training."""
    reward = MathReward(time_limit_s=20)
    boxed = [rf"So it is $\boxed{{{reply}}}$." for reply, _, _ in ROWS]
    found = reward(completions=boxed, answer=[gold for _, gold, _ in ROWS])
    reward.close()
    return {(reply, gold): score for (reply, gold, _), score in zip(ROWS, found, strict=True)}


def test_the_table_is_long_enough() -> None:
    assert len(ROWS) >= 150
    assert len({row[:2] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("reply", "gold", "score"), ROWS)
def test_answer_in_a_box_scores_as_a_careful_grader_would(
    reply: str, gold: str, score: float, scores: dict[tuple[str, str], float | None]
) -> None:
    assert scores[reply, gold] == score


@pytest.mark.parametrize(
    "gold", ["", "  ", "(1,000)", "nan", "a" * 600, None, True, [72], float("nan")]
)
def test_gold_answer_that_cannot_be_read_is_not_scored(gold: object) -> None:
    assert MathReward()(completions=["72"], answer=[gold]) == [None]


@pytest.mark.parametrize("gold", [72, 72.0, "72", "$72$", r"\boxed{72}", "6 * 12 = 72\n#### 72"])
def test_gold_answer_is_read_from_numbers_answers_and_solutions(gold: object) -> None:
    assert MathReward()(completions=["72", "73"], answer=[gold, gold]) == [1.0, 0.0]
