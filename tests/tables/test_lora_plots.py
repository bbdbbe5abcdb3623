"""The figure of a LoRA's training."""

from __future__ import annotations

import pytest

from dode_nodes.tables.lora_plots import Errors, lora_figure


def test_bars_are_the_errors_and_the_curve_is_the_loss_with_its_running_mean():
    losses = [100.0 / (1 + i) for i in range(40)]
    figure = lora_figure([Errors(1, None, 0.4, None), Errors(2, 0.3, 0.2, 0.1)], losses)
    left, right = figure.axes
    bars = [[bar.get_width() for bar in group] for group in left.containers]
    assert bars == [[0, 0.3], [0.4, 0.2], [0, 0.1]]
    assert [label.get_text() for label in left.get_yticklabels()] == ["1", "2"]
    assert [text.get_text() for text in left.texts] == ["–", "0.300", "0.400", "0.200", "–", "0.100"]
    batches, mean = right.lines
    assert list(batches.get_ydata()) == losses
    assert list(mean.get_xdata()) == list(range(20, 41))
    assert mean.get_ydata()[-1] == pytest.approx(sum(losses[-20:]) / 20)


@pytest.mark.parametrize("losses", [[], [3.0], [0.0, 0.0]], ids=str)
def test_few_batches_are_drawn_too(losses):
    figure = lora_figure([Errors(2, 0.3, 0.2, 0.1)], losses)
    figure.canvas.draw()
