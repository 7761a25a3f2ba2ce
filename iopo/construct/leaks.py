"""Scorers that do not read the instruction: on good data they are at chance."""

from __future__ import annotations

import zlib
from functools import lru_cache

from iopo.constraints import text as cut

_SLOTS = 1 << 15
_WORDS = 40  # of a response that are looked at
WARM_UP = 100  # rows that are learnt from before guesses count


class SideGuesser:
    """Guesses which of two responses is y1 from the responses alone, and learns from each row.

    A hashed perceptron over words, ends and length; every guess is made before its row is learnt,
    so the count is honest. On x-preference a scorer of y alone ties by definition (x1y1 and x2y1
    have the same y); what can leak is the side: y1 the longer, the better or the politer one. Then
    objectives on the first rows only (dpo with quad_rows=first) learn y and not the instruction.
    """

    def __init__(self) -> None:
        self._weights = [0.0] * _SLOTS
        self._rows = 0
        self.right = 0
        self.guesses = 0
        self.longer_first = 0  # y1 is the longer one, minus y2 is: a scorer of length alone
        self.unequal = 0

    def add(self, y1: str, y2: str) -> None:
        """Guess, then learn, from one row."""
        longer = (len(y1) > len(y2)) - (len(y1) < len(y2))
        self.longer_first += longer
        self.unequal += longer != 0
        first, second = _slots(y1), _slots(y2)
        margin = sum(self._weights[i] for i in first) - sum(self._weights[i] for i in second)
        if self._rows >= WARM_UP and margin != 0:
            self.guesses += 1
            self.right += margin > 0
        self._rows += 1
        if margin <= 0:
            for slots, sign in ((first, 1.0), (second, -1.0)):
                for i in slots:
                    self._weights[i] += sign

    def y_only(self) -> float:
        """Standard deviations of the right guesses from half of them."""
        n = self.guesses
        return (2 * self.right - n) / n**0.5 if n else 0.0

    def length_only(self) -> float:
        """Standard deviations from chance of 'y1 is the longer response'."""
        return self.longer_first / self.unequal**0.5 if self.unequal else 0.0


def _slots(text: str) -> list[int]:
    words = cut.words(text[:1000])[:_WORDS]
    features = {word.lower() for word in words}
    features |= {f"length {len(text).bit_length()}", f"first {text[:1]}", f"last {text[-1:]}"}
    return [_slot(feature) for feature in features]


@lru_cache(maxsize=1 << 16)
def _slot(feature: str) -> int:
    return zlib.crc32(feature.encode("utf-8", "surrogatepass")) % _SLOTS
