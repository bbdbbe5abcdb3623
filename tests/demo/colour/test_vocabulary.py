"""A text is a bag of the words that the network knows."""

from __future__ import annotations

import pytest

from dode_nodes.demo.colour.vocabulary import Vocabulary, prompts_of, words_of
from dode_nodes.errors import DodeError

NAMES = ["grinning face yellow", "cat face", "cat animal", "dog animal", "dog animal"]


def test_a_texts_words_are_lower_case_once_and_without_fillers():
    assert words_of("The Cat, a SMILING cat with hearts") == ("cat", "smiling", "heart")


def test_numbers_are_the_words_places_and_0_is_none():
    vocabulary = Vocabulary.of(name.split() for name in NAMES)
    assert vocabulary.words == ("", "animal", "cat", "dog", "face", "grinning", "yellow")
    assert vocabulary.numbers(["dog", "Cat with a face", "submarine"]).tolist() == [[3, 0], [2, 4], [0, 0]]


def test_no_word_at_all_still_has_a_shape():
    assert Vocabulary.of([["cat"]]).numbers([""]).tolist() == [[0]]


def test_prompts_to_fit_and_to_test_share_none_and_are_always_the_same():
    fit, test = prompts_of(NAMES)
    assert (fit, test) == prompts_of(NAMES)
    singles = {"grinning", "face", "yellow", "cat", "animal", "dog"}
    pairs = {"grinning face", "grinning yellow", "face yellow", "cat face", "cat animal", "dog animal"}
    assert sorted(fit + test) == sorted(singles | pairs | {"grinning face yellow"})
    assert abs(len(fit) - len(test)) <= 1


def test_pairs_in_another_order_are_the_same_prompt():
    fit, test = prompts_of(["face cat", "cat face"])
    assert sorted(fit + test) == ["cat", "face", "face cat"]


def test_no_prompt_has_more_than_three_words():
    fit, test = prompts_of(["dawn lake cloud sun snow"])
    assert len(fit + test) == 5 + 10 + 10
    assert max(len(prompt.split()) for prompt in fit + test) == 3


@pytest.mark.parametrize("text", ["", "red CATS", "a cat, on the dog"])
def test_known_words_pass(text):
    Vocabulary(("", "cat", "dog", "red")).check(text)


def test_an_unknown_word_is_named_with_those_that_are_spelt_much_like_it():
    vocabulary = Vocabulary(("", "cat", "flower", "sunflower"))
    with pytest.raises(
        DodeError, match=r"'flowery'.* It knows flower, sunflower\. All its words: cat, flower, "
    ):
        vocabulary.check("cat flowery")
    with pytest.raises(DodeError, match=r"does not know it\. All its words: "):
        vocabulary.check("xyz")
