"""Exact match: the one way an answer is scored."""

from __future__ import annotations


def final_answer(response: str) -> str:
    """What a response says after its last `</think>`, without outer blanks; the whole response when it has none."""
    return response.rpartition("</think>")[2].strip()


def exact_match(response: str, answer: str) -> bool:
    """True when the final answer is the expected one, letter for letter apart from runs of blanks.

    An unfinished thought (`<think>` never closed) is never a match.
    """
    if "<think>" in response and "</think>" not in response:
        return False
    return final_answer(response).split() == answer.split()
