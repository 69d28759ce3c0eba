r"""Which part of a reply is its final answer, as a careful human grader reads it.

The first of these that a reply has, after its thinking, is read, and nothing else:

1. ``<answer>...</answer>``, and inside it as below;
2. ``\boxed{...}``;
3. the line after ``####``;
4. "the answer is ...", up to the end of the sentence;
5. the last line or sentence that has an answer in it, if it has one only.

Of several the last one counts. Those that stand in one paragraph are read together, as a list.
"""

from __future__ import annotations

import re

from trl_grpo_ext.rewards.math.answers import Answer, Words
from trl_grpo_ext.rewards.math.brackets import closing_brace
from trl_grpo_ext.rewards.math.parse import read_answer
from trl_grpo_ext.rewards.math.prose import is_uncertain, read_prose

_CLAUSE = 200  # characters before "the answer is" that may deny it
MAX_TAIL = 2000  # characters in which a reply without any marker is searched

_THOUGHT_TAG = re.compile(r"<(/?)(?:think|thinking|thought|reasoning|reflection)>", re.IGNORECASE)
_ANSWER_IS = re.compile(
    r"\banswers?\b(?:[^.!?\n:=]{0,80}?\b(?:is|are)\b\s*:?|(?:\s*\([^()\n]{0,20}\))?[\s*_]*[:=])[\s*_]*"
    r"|\bfinal answer\W*\n\W*?(?=[\w$\\(-])",
    re.IGNORECASE,
)
_REASON = re.compile(r"\s+(?:because|since|which means)\b|,\s+(?:because|since|as|so|which)\b")
_DENIED = re.compile(
    r"\b(?:wrong|incorrect|false|doubt\w*|nobody|no one|never|not)\b[^.,;:!?\n]*$", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?](?=[\s*_]|$)|\n")
_DISPLAY = re.compile(r"\s*(?:\$\$(.*?)\$\$|\\\[(.*?)\\\])", re.DOTALL)
_BOX = re.compile(r"(?P<sign>(?<![\w)\]}])-(?=\\))?\\boxed\s*\{")
_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*(.*)")
_PERCENT = re.compile(r"\s*\$?\s*\\?%")


def read_reply(reply: str, *, starts_in_thought: bool = False) -> Answer | None:
    r"""Return the final answer of a reply; ``None`` if it has none, or not exactly one.

    Args:
        reply: Untrusted text of any length; the time is linear in it.
        starts_in_thought: Whether the chat template has opened the thinking, so that a reply
            that does not close it has no answer.

    Example:
        >>> read_reply(r"<think>Is it 71?</think> It is \boxed{72}.").value
        Fraction(72, 1)
        >>> read_reply(r"\boxed{72} or \boxed{73}").kind
        'list'
    """
    text = said(reply, starts_in_thought=starts_in_thought)
    if "<answer>" in text:
        return _from_tags(text)
    return _read_marked(text)


def read_gold(gold: str) -> Answer | None:
    """Return the answer of a gold solution, or of a gold answer that stands alone.

    Example:
        >>> read_gold("48 + 24 = 72 clips altogether. #### 72").value
        Fraction(72, 1)
    """
    if "####" in gold:
        return read_answer(gold.rpartition("####")[2])
    return read_answer(_joined(_boxes(gold)) if r"\boxed" in gold else gold)


def said(reply: str, *, starts_in_thought: bool = False) -> str:
    """Return what a reply says outside its thinking, HTML comments and what is struck out.

    Example:
        >>> said("<think>7?</think>8<think>9?")
        '8'
    """
    text = reply
    if starts_in_thought or "<" in reply:
        text = _without_thoughts(reply, is_thought=starts_in_thought)
    text = re.sub(r"<!--(?:(?!-->|<!--).)*(?:-->|$)", " ", text, flags=re.DOTALL)
    return re.sub(r"~~[^~\n]*~~", " ", text)


def _without_thoughts(reply: str, *, is_thought: bool) -> str:
    """Return what follows the last end of a thought, up to the next beginning of one."""
    kept: list[str] = []
    start = 0
    for tag in _THOUGHT_TAG.finditer(reply):
        if tag[1]:
            kept = []  # also of thinking that the chat template opened
        elif not is_thought:
            kept.append(reply[start : tag.start()])
        start, is_thought = tag.end(), not tag[1]
    return "".join(kept if is_thought else [*kept, reply[start:]])


def _from_tags(text: str) -> Answer | None:
    start = text.rfind("<answer>")
    if start > text.rfind("</answer>"):
        return None  # it was cut off
    contents = _TAGS.findall(text, _paragraph_start(text, start))
    return _read_marked(_joined(contents), in_tags=True)


def _read_marked(text: str, *, in_tags: bool = False) -> Answer | None:
    if r"\boxed" in text:
        return read_answer(_joined(_boxes(text)))
    if "####" in text and (claims := _hashes(text)):
        return read_answer(_joined(claims))
    if (statement := _statement(text)) is not None:
        return read_answer(statement) or read_prose(statement)
    if (answer := read_answer(text)) is not None:
        return answer
    return read_prose(text.strip()) if in_tags else _last_sentence(text[-MAX_TAIL:])


def _boxes(text: str) -> list[str]:
    """Return the contents of the last paragraph's boxes, with sign and percent; none if cut off."""
    contents: list[str] = []
    end = _paragraph_start(text, text.rfind(r"\boxed"))
    for box in _BOX.finditer(text, end):
        if box.start() < end:
            continue  # a box in a box
        closing = closing_brace(text, box.end() - 1)
        if closing is None:
            return []
        end = closing + 1
        percent = "%" if _PERCENT.match(text, end) else ""
        contents.append(f"{box['sign'] or ''}{text[box.end() : closing]}{percent}")
    return contents


def _hashes(text: str) -> list[str]:
    """Return what follows ``####`` in the last paragraph that has it; headings are left out."""
    lines = [line for line in _HASHES.finditer(text) if not _is_heading(line, text)]
    if not lines:
        return []
    start = _paragraph_start(text, lines[-1].start())
    return [line[1] for line in lines if line.start() >= start]


def _is_heading(line: re.Match[str], text: str) -> bool:
    """Return whether words stand behind the hashes, and text below them."""
    answer = read_answer(line[1])
    return (answer is None or isinstance(answer, Words)) and bool(text[line.end() :].strip())


def _statement(text: str) -> str | None:
    """Return what the last "the answer is" is followed by, ``None`` if nobody says so."""
    matches = list(_ANSWER_IS.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    if _DENIED.search(text[max(0, match.start() - _CLAUSE) : match.start()]):
        return ""
    start = match.end()
    if display := _DISPLAY.match(text, start):
        return display[1] or display[2]
    end = _SENTENCE_END.search(text, start)
    if end and end[0] == "?":
        return ""
    return _REASON.split(text[start : end.start() if end else None], maxsplit=1)[0].strip("*_ ")


def _last_sentence(text: str) -> Answer | None:
    """Read the last line if it is an answer, else the last sentence with a digit."""
    answer = read_answer(text.rstrip().rpartition("\n")[2])
    if answer is not None and not isinstance(answer, Words):
        return answer
    end = len(text)
    for match in reversed([None, *_SENTENCE_END.finditer(text)]):
        start = match.end() if match else 0
        if any(map(str.isdigit, text[start:end])):
            break
        end = match.start() if match else 0
    is_question = text[end : end + 1] == "?"
    return None if is_question or is_uncertain(text[start:]) else read_prose(text[start:end])


def _paragraph_start(text: str, position: int) -> int:
    return text.rfind("\n\n", 0, max(position, 0)) + 1


def _joined(claims: list[str]) -> str:
    """Return the one answer that the claims agree on, or the list of them."""
    return claims[0] if len(set(claims)) == 1 else " ; ".join(claims)
