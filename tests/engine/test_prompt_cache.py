"""What the prompt cache keeps, and what it counts."""

from app.engine.prompt_cache import PromptCache


def test_texts_are_missing_once_and_counted_each_time() -> None:
    cache = PromptCache(8)
    assert cache.missing(["a", "b", "a"]) == ["a", "b"]
    cache.add(["a", "b"], [1, 2])
    assert cache.missing(["a", "c"]) == ["c"]
    assert cache.stats() == {"entries": 2, "hits": 2, "misses": 3}


def test_the_least_recently_used_text_is_dropped_after_its_use() -> None:
    cache = PromptCache(2)
    cache.add(["a", "b"], [1, 2])
    assert cache.use(["a", "b"]) == {"a": 1, "b": 2}
    assert cache.use(["a"]) == {"a": 1}
    cache.add(["c"], [3])
    assert cache.use(["c"]) == {"c": 3}
    assert ["a" in cache, "b" in cache, "c" in cache] == [True, False, True]


def test_a_cache_without_capacity_still_serves_what_was_just_added() -> None:
    cache = PromptCache(0)
    cache.add(["a"], [1])
    assert cache.use(["a"]) == {"a": 1} and "a" not in cache
