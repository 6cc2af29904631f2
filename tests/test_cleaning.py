"""Filters before tokenising, each against a slow and obvious one."""

import random
import unicodedata

import numpy as np
import pytest

from moesaic.data.cleaning import Cleaner, CleanOptions, normalised, repeats_at_most


def most_repeats(ids: list[int], period: int) -> int:
    """How often, at most, a sequence of 1 to ``period`` ids stands one after the other."""
    most = 1
    for p in range(1, period + 1):
        for start in range(len(ids)):
            count = 1
            while ids[start + count * p : start + (count + 1) * p] == ids[start : start + p]:
                if start + (count + 1) * p > len(ids):
                    break
                count += 1
            most = max(most, count)
    return most


@pytest.mark.parametrize("seed", range(40))
def test_repeats_are_counted_as_going_through_them_does(seed: int) -> None:
    draw = random.Random(seed)
    period = draw.randint(1, 5)
    unit = [draw.randint(0, 3) for _ in range(draw.randint(1, 6))]
    ids = [draw.randint(0, 3) for _ in range(draw.randint(0, 9))] + unit * draw.randint(1, 7)
    ids += [draw.randint(0, 3) for _ in range(draw.randint(0, 9))]
    found = most_repeats(ids, period)
    for most in range(1, 9):
        assert repeats_at_most(np.array(ids), most, period) == (found <= most), (ids, found, most)


def test_olmoe_leaves_out_what_repeats_32_times() -> None:
    cleaner = Cleaner(CleanOptions(repeats=32))
    around = list(range(100, 140))
    for unit in ([7], [1, 2, 3], list(range(13))):
        assert cleaner.keeps(np.array(around + unit * 31 + around))
        assert not cleaner.keeps(np.array(around + unit * 32 + around))
    assert cleaner.keeps(np.array(list(range(14)) * 32))  # a period that is not looked for
    assert cleaner.dropped == {"repeat themselves": 3}


def test_what_is_one_word_or_two() -> None:
    cleaner = Cleaner(CleanOptions(top_word=0.3, top_two_words=0.5))
    assert cleaner.text("a b c d e f g h i j") is not None
    assert cleaner.text("a a a a b c d e f g") is None
    assert cleaner.text("a a a b b b c d e f") is None
    assert cleaner.dropped == {"are mostly one word": 1, "are mostly two words": 1}
    assert Cleaner(CleanOptions(top_word=0.3)).text("a a a b b b c d e f") is not None


def test_exact_duplicates_are_of_words_and_over_all_domains() -> None:
    cleaner = Cleaner(CleanOptions(exact_duplicates=True))
    assert cleaner.text("one two\nthree") == "one two\nthree"
    assert cleaner.text("one  two three") is None
    assert cleaner.text("one two four") is not None
    assert cleaner.dropped == {"are duplicates": 1}


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_those_whose_true_similarity_is_above_the_threshold(seed: int) -> None:
    draw = random.Random(seed)
    words = [f"w{i}" for i in range(5000)]

    def shingles(text: list[str]) -> set[tuple[str, ...]]:
        return {tuple(text[i : i + 5]) for i in range(len(text) - 4)}

    for changed in (0, 2, 100, 400):
        first = draw.choices(words, k=400)
        second = list(first)
        for place in draw.sample(range(400), changed):
            second[place] = draw.choice(words)
        a, b = shingles(first), shingles(second)
        similarity = len(a & b) / len(a | b)
        assert similarity > 0.9 or similarity < 0.5, "the estimate's error is 0.04: stay clear of 0.7"
        cleaner = Cleaner(CleanOptions(near_duplicates=0.7))
        assert cleaner.text(" ".join(first)) is not None
        assert (cleaner.text(" ".join(second)) is None) == (similarity > 0.7)


def test_short_documents_and_their_reasons() -> None:
    cleaner = Cleaner(CleanOptions(min_chars=4, near_duplicates=0.8, top_word=1.0))
    assert [cleaner.text(text) for text in ("abc", "", "abcd", "abcd", "    ")] == [
        None,
        None,
        "abcd",
        None,
        "    ",
    ]
    assert cleaner.dropped == {"are too short": 2, "are near duplicates": 1}


def test_normal_text() -> None:
    assert normalised("a\r\nb\rc\x00\x1b\td\x0c") == "a\nb\nc\td\x0c"
    assert normalised("e\u0301") == unicodedata.normalize("NFC", "e\u0301") == "é"
    assert Cleaner(CleanOptions(normalise=True)).text("a\r\n") == "a\n"
    assert Cleaner(CleanOptions()).text("a\r\n") == "a\r\n"
