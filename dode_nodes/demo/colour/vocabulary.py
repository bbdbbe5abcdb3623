"""Texts as the numbers of their words."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations

import torch
from torch import Tensor

from ...errors import DodeError

_NOT_WORDS = {
    "a",
    "above",
    "and",
    "at",
    "behind",
    "by",
    "in",
    "near",
    "of",
    "on",
    "or",
    "over",
    "the",
    "to",
    "under",
    "with",
}

_NEAR = 5
_MOST_WORDS = 3


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text that can mean something, each once, in their order, of several things as of one."""
    words = re.findall(r"[a-z]+", text.lower())
    return tuple(dict.fromkeys(word.removesuffix("s") for word in words if word not in _NOT_WORDS))


@dataclass(frozen=True)
class Vocabulary:
    """The words that a network knows, each with its place as its number; 0 is none."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, texts: Iterable[Iterable[str]]) -> Vocabulary:
        """Of all words of all texts."""
        return cls(("", *sorted({word for text in texts for word in text})))

    def __len__(self) -> int:
        return len(self.words)

    def numbers(self, texts: Sequence[str]) -> Tensor:
        """(B, W) int64, W as the longest text needs it and 0 after the shorter ones' words. Others are left out."""
        place = {word: number for number, word in enumerate(self.words)}
        rows = [[place[word] for word in words_of(text) if word in place] for text in texts]
        longest = max([1, *map(len, rows)])
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)

    def check(self, text: str) -> None:
        """That a text has no other words.

        Raises:
            DodeError: it has; says which ones are spelt much like them.
        """
        for word in words_of(text):
            if word in self.words:
                continue
            near = ", ".join(get_close_matches(word, self.words, _NEAR, cutoff=0.5))
            raise DodeError(
                f"use another word for '{word}': the demo model does not know it. "
                f"{f'It knows {near}. ' if near else ''}All its words: {', '.join(self.words[1:])}"
            )


def prompts_of(names: Iterable[str], seed: int = 0) -> tuple[list[str], list[str]]:
    """What to ask for, to fit on and to test on: every one, two or three words that a picture has, in two halves.

    Args:
        names: each picture's words.
        seed: what the halves depend on; they share no prompt.
    """
    asked: dict[frozenset[str], str] = {}
    for name in names:
        words = words_of(name)
        for count in range(1, _MOST_WORDS + 1):
            for prompt in combinations(words, count):
                asked.setdefault(frozenset(prompt), " ".join(prompt))
    prompts = sorted(asked.values())
    random.Random(seed).shuffle(prompts)  # noqa: S311 - nothing secret
    return prompts[::2], prompts[1::2]
