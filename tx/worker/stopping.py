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

_CUT = 3
"""Tokens by which a window may begin inside a character: UTF-8 has four bytes at most."""

_UNKNOWN = "\ufffd"
"""What decoders show for bytes that are no character, or not yet."""


class RowStop:
    """One row's end.

    The row ends at the first token that is a stop token, that completes a stop string in the text of the tokens
    sampled so far (the prompt doesn't count), or that is the ``limit``-th; the first two are "stop" even at the limit.
    That token is kept, as renderers expect, and so is the text of a token that goes on after the stop string.

    Stop strings cost one look at a few dozen tokens per slice: 256 rows take 2-4 ms of host time. Where the text has
    cut or invalid characters it is one per token.
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
        self._unknown_stops = any(_UNKNOWN in text for text in stop_strings)

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
        tokens = [*self.tokens[-self._window - _CUT :], *new]
        known = len(tokens) - len(new)
        if not self._may_have_stop(tokens, max(0, known - self._window)):
            return None
        # Which of the few new tokens it was: the first with which the text has the string.
        for end in range(known + 1, len(tokens) + 1):
            if self._has_stop(self._text(tokens[:end], max(0, end - self._window))):
                return end - known
        return None

    def _may_have_stop(self, tokens: Sequence[int], start: int) -> bool:
        """Whether a look at each of the new tokens is needed; False means that none completes a string.

        What follows may change a text with cut characters, and the answer must not depend on where a slice ended: the
        text is trusted where it is clean but for a character cut at its end, which is looked at without it too.
        """
        for end in range(len(tokens), max(start, len(tokens) - _CUT - 1), -1):
            text = self._text(tokens[:end], start)
            if self._has_stop(text):
                return True
            if not text.endswith(_UNKNOWN):
                break
        return self._unknown_stops or _UNKNOWN in text

    def _text(self, tokens: Sequence[int], start: int) -> str:
        """The text of the tokens from ``start``, or from a little before, so that it doesn't begin inside a character.

        Decoders differ: most show one replacement character for the cut one, others for each byte of the whole run.
        """
        text = self._detokenize(tokens[start:])
        for earlier in range(start - 1, max(0, start - _CUT) - 1, -1):
            if not text.startswith(_UNKNOWN):
                break
            text = self._detokenize(tokens[earlier:])
        return text

    def _has_stop(self, text: str) -> bool:
        return any(string in text for string in self._strings)
