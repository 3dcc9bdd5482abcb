"""How words of answers are compared."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in text.split() if word not in _ARTICLES)


def shared(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """How many words two texts share, each as often as it stands in both."""
    return (Counter(ours) & Counter(theirs)).total()


def f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Harmonic mean of the shares of shared words in two texts; 0 where they share none."""
    return 2 * shared(ours, theirs) / (len(ours) + len(theirs)) if ours and theirs else 0.0
