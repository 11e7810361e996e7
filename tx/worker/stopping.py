"""When a sampled row ends: stop tokens, end of sequence, stop strings, length. No JAX.

A row's tokens arrive a slice at a time. ``RowStop.push`` says how many of the new ones the row keeps: those up to and
including the token that ends it; what the slice drew beyond is dropped. Not here: the decode loop's own early exit on
stop tokens, which only saves steps (``generator``); this module's word is final.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

Detokenize = Callable[[Sequence[int]], str]

_MARGIN = 16
"""Tokens decoded ahead of the longest stop string: room for tokens without text and for a cut character or space."""


class RowStop:
    """One row's end.

    The row ends at the first token that is a stop token, that completes a stop string in the text of the sampled
    tokens (the prompt doesn't count), or that is the ``limit``-th; the first two are "stop" even at the limit.
    """

    def __init__(
        self, stop_ids: Collection[int], stop_strings: Sequence[str], limit: int, detokenize: Detokenize
    ) -> None:
        self.tokens: list[int] = []
        self.reason: Literal["stop", "length"] | None = None
        self._stop_ids = frozenset(stop_ids)
        self._strings = tuple(stop_strings)
        self._limit = limit
        self._detokenize = detokenize
        # A token that adds to a string adds at least one of its bytes, so this many tokens hold any stop string.
        self._window = max((len(text.encode()) for text in stop_strings), default=0) + _MARGIN

    def push(self, tokens: Sequence[int]) -> int:
        """Take a slice of new tokens; how many of them are kept. ``reason`` is set once the row has ended."""
        if self.reason is not None:
            return 0
        new = list(tokens[: self._limit - len(self.tokens)])
        by_id = next((at + 1 for at, token in enumerate(new) if token in self._stop_ids), None)
        if by_id is not None:
            new = new[:by_id]
        by_string = self._first_completed(new)
        kept = len(new) if by_string is None else by_string
        self.tokens += new[:kept]
        if by_id is not None or by_string is not None:
            self.reason = "stop"
        elif len(self.tokens) >= self._limit:
            self.reason = "length"
        return kept

    def _first_completed(self, new: Sequence[int]) -> int | None:
        """How many of the new tokens complete the first stop string, or None.

        Worked example: tokens "a", "b\\n", "\\nUser", ":" with the string "\\n\\nUser:" completes at the fourth token;
        the first three are text that only in hindsight was part of the stop string, and they are kept.
        """
        if not self._strings or not new:
            return None
        known = self.tokens[-self._window :]
        if not self._has_stop([*known, *new]):
            return None
        # Which of the few new tokens it was: the shortest prefix that has the string.
        return next(count for count in range(1, len(new) + 1) if self._has_stop([*known, *new[:count]]))

    def _has_stop(self, tokens: Sequence[int]) -> bool:
        text = self._detokenize(tokens)
        return any(string in text for string in self._strings)
