"""Progress: the total only shrinks, whatever the parts do, and whoever is told can end the work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dode_nodes.fit.progress import Progress
from tests.toys import Interrupted, Telling

ANSWER = torch.zeros(2, 1)


@dataclass
class Piece:
    """Work, or parts of it: what it was planned as, what it turns out to need at most, and what it takes."""

    taken: list[float] = field(default_factory=list)
    parts: list[Piece] = field(default_factory=list)
    known_late: int = 0
    never_needed: int = 0

    @property
    def needed(self) -> int:
        own = sum(part.planned for part in self.parts) if self.parts else round(sum(self.taken))
        return own + self.never_needed

    @property
    def planned(self) -> int:
        return self.needed + self.known_late

    @property
    def spent(self) -> float:
        return sum(self.taken) + sum(part.spent for part in self.parts)

    def work(self, progress: Any) -> None:
        """As every function of a fit does."""
        with Progress.of(progress, self.needed) as mine:
            for evaluations in self.taken:
                mine.advance(evaluations, "stage", ANSWER)
            shares = mine.split(*(part.planned for part in self.parts))
            for part, share in zip(self.parts, shares, strict=True):
                part.work(share)


slack = st.integers(0, 9)
leaves = st.builds(
    Piece, taken=st.lists(st.integers(1, 5), max_size=4), known_late=slack, never_needed=slack
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda parts: st.builds(
        Piece, parts=st.lists(parts, min_size=1, max_size=4), known_late=slack, never_needed=slack
    ),
    max_leaves=12,
)


@given(trees)
def test_the_total_only_shrinks_and_is_what_was_done_in_the_end(tree):
    told = Telling()
    tree.work(told)
    given_back = known_before_the_first_evaluation(tree) if tree.spent else tree.needed
    told.check(planned=tree.needed - given_back, spent=tree.spent)
    evaluations = len(told) - 1  # and once more, at the end
    assert evaluations == sum(len(leaf.taken) for leaf in leaves_of(tree))


def known_before_the_first_evaluation(tree):
    """What parts give back by then: those on the way to it, and all that end before."""
    for_nothing = 0
    for part in tree.parts:
        for_nothing += part.known_late
        if part.spent:
            return for_nothing + known_before_the_first_evaluation(part)
        for_nothing += part.needed
    return for_nothing


def leaves_of(tree):
    return [leaf for part in tree.parts for leaf in leaves_of(part)] if tree.parts else [tree]


def standing_for_others(piece, by):
    return replace(
        piece,
        taken=[by * evaluations for evaluations in piece.taken],
        parts=[standing_for_others(part, by) for part in piece.parts],
    )


@given(trees, st.integers(1, 7), st.integers(1, 7))
@example(Piece(parts=[Piece(taken=[1]), Piece(taken=[1])]), 7, 5)  # 1.4 are 1, and both are 3
def test_a_rank_that_stands_for_others_never_tells_too_much(tree, all_ranks, own):
    """It counts fractions of evaluations."""
    told = Telling()
    standing_for_others(tree, all_ranks / own).work(told)
    totals = [note.total for note in told]
    assert totals == sorted(totals, reverse=True)
    assert all(note.done <= note.total for note in told)
    assert told[-1].done == told[-1].total


def test_what_a_part_does_is_told_as_of_the_whole():
    told = Telling()
    with Progress(10, told) as work:
        first, second = work.split(4, 5)
        assert (first.total, second.total, work.total) == (4, 5, 10)
        first.advance(3, "first", ANSWER)
        assert (first.done, work.done) == (3, 3)
        with first:
            pass
        assert (first.total, work.total) == (3, 9)
        second.advance(5, "second", ANSWER)
    assert told == [
        ("first", 3, 10, (2, 1)),
        ("second", 8, 9, (2, 1)),
        ("second", 8, 8, (2, 1)),
    ]


def test_a_part_that_needs_less_than_its_share_gives_back_the_rest_before_it_begins():
    work = Progress(100)
    part, _ = work.split(60, 40)
    assert Progress.of(part, 50) is part
    assert (part.total, work.total) == (50, 90)


@pytest.mark.parametrize("given", [None, Telling()])
def test_a_function_that_is_called_by_itself_has_a_whole_of_its_own(given):
    work = Progress.of(given, 7)
    work.advance(2, "alone", ANSWER)
    assert (work.done, work.total) == (2, 7)
    assert given is None or given[-1] == ("alone", 2, 7, (2, 1))


@pytest.mark.parametrize("inside", [True, False])
def test_what_tell_raises_passes_through_all_parts(inside):
    stop, told = Interrupted(), Telling()

    def tell(progress):
        told(progress)
        if progress.done >= 3:
            raise stop

    work = Progress(20, tell)

    def all_parts():
        with work:
            (outer,) = work.split(15)
            with outer:
                (inner,) = outer.split(9)
                with inner:
                    inner.advance(2, "", ANSWER)
                    inner.advance(2 if inside else 0, "", ANSWER)
            work.advance(1, "", ANSWER)

    with pytest.raises(Interrupted) as caught:
        all_parts()
    assert caught.value is stop
    assert told[-1].done == (4 if inside else 3)  # nothing more is told
    assert work.done == work.total == told[-1].done


def test_an_end_that_is_told_may_be_an_interrupt_too():
    def stop_at_the_end(progress):
        if progress.done == progress.total:
            raise Interrupted

    with pytest.raises(Interrupted), Progress(5, stop_at_the_end) as work:
        work.advance(2, "", ANSWER)


def test_a_plan_that_is_too_small_is_a_mistake_of_the_program():
    work = Progress(10)
    with pytest.raises(ValueError, match=r"the parts take \(6, 5\) evaluations, but 10 were planned"):
        work.split(6, 5)
    (part,) = work.split(6)
    with pytest.raises(ValueError, match="the work takes 7 evaluations, but 6 were planned"):
        Progress.of(part, 7)
    assert (part.total, work.total) == (6, 10)
