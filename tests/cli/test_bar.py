"""The progress bar: one over everything, whose total may shrink, and the place where a stop is heeded."""

from __future__ import annotations

import pytest
import torch

from dode_nodes.cli.bar import Bar
from dode_nodes.fit.progress import Progress

LATENT = torch.zeros(1)


def test_it_follows_the_whole_and_its_shrinking_total(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar() as bar:
        bar.begin("what it may cost", "a remark")
        with Progress(10, bar) as work:
            first, second = work.split(6, 4)
            with first:
                first.advance(2, "teacher", LATENT)
                assert (bar._bar.n, bar._bar.total) == (2, 10)
            second.advance(4, "student", LATENT)
        assert (bar._bar.n, bar._bar.total) == (6, 6)
    printed = capsys.readouterr()
    assert printed.out == "what it may cost\na remark\n"
    assert "student" in printed.err
    assert "6.00/6.00" in printed.err


def test_before_it_begins_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar() as bar:
        Progress(10, bar).advance(2, "teacher", LATENT)
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def begin_and_advance(bar: Bar) -> None:
    bar.begin()
    Progress(10, bar).advance(2, "teacher", LATENT)


def test_what_the_stop_raises_ends_the_work_with_the_bar_closed(capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    bar = Bar(stop)
    with pytest.raises(KeyboardInterrupt), bar:
        begin_and_advance(bar)
    assert bar._bar.disable  # as tqdm marks a closed one
    assert capsys.readouterr().err.endswith("\n")
