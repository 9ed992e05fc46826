"""Encoded prompts by their text, the least recently used dropped first. Knows nothing of requests or encoders."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any


class PromptCache:
    def __init__(self, capacity: int):
        self.capacity = capacity
        self._encoded: OrderedDict[str, Any] = OrderedDict()
        self._hits = self._misses = 0

    def __contains__(self, text: str) -> bool:
        return text in self._encoded

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The texts that must be encoded, each once; counts hits and misses."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._encoded]
        self._hits += len(texts) - len(missing)
        self._misses += len(missing)
        return missing

    def add(self, texts: Sequence[str], encoded: Sequence[Any]) -> None:
        self._encoded.update(zip(texts, encoded, strict=True))

    def use(self, texts: Sequence[str]) -> dict[str, Any]:
        """The encodings of texts that are all in the cache; afterwards only those used last stay in it."""
        encoded = {text: self._encoded[text] for text in texts}
        for text in texts:
            self._encoded.move_to_end(text)
        while len(self._encoded) > self.capacity:
            self._encoded.popitem(last=False)
        return encoded

    def clear(self) -> None:
        self._encoded.clear()

    def stats(self) -> dict[str, int]:
        return {"entries": len(self._encoded), "hits": self._hits, "misses": self._misses}
