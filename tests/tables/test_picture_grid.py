"""Pictures side by side: every one in its place, words inside the figure, files of a bearable size."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from dode_nodes import DodeError
from dode_nodes.tables.picture_grid import Block, PictureRow, comparison_figure, picture_grid
from tests.tables.drawn import axes, png_size

pytest.importorskip("matplotlib")


class TestPictureGrid:
    def test_a_cell_per_picture_in_order(self) -> None:
        images = np.linspace(0, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
        rows = [PictureRow("one", images[0]), PictureRow("two", images[1], heads_group=True)]
        figure = picture_grid(rows, [Block("left", ["0", "1"]), Block("right", ["2"])])
        drawn = [ax.images[0].get_array() for ax in axes(figure)]
        np.testing.assert_allclose(np.stack(drawn), images.reshape(6, 16, 16))
        assert [text.get_text() for text in figure.texts] == ["left", "0", "1", "right", "2", "one", "two"]

    def test_words_stay_inside(self) -> None:
        label = "10 × refined D-dpmpp_2m (noise), error 0.1234\nσ from karras −penultimate"
        figure = picture_grid([PictureRow(label, np.zeros((10, 16, 16)))], [Block("", "0123456789")])
        png_size(figure)
        left = min(text.get_window_extent().x0 for text in figure.texts)
        assert left >= 0

    def test_headings_of_several_words_touch_nothing(self) -> None:
        headings = ["day mountain cloud", "night mountain star", "sunset lake", "1"]
        figure = picture_grid([PictureRow("row", np.zeros((4, 64, 64)))], [Block("title", headings)])
        png_size(figure)
        title, *words, _ = [text.get_window_extent() for text in figure.texts]
        assert not any(a.overlaps(b) for a, b in combinations([title, *words], 2))
        assert min(box.y0 for box in words) > max(ax.get_window_extent().y1 for ax in axes(figure))

    @pytest.mark.parametrize(("side", "pictures"), [(16, 10), (512, 4), (1024, 1)])
    def test_size(self, side: int, pictures: int) -> None:
        rows = [PictureRow("row", np.zeros((pictures, side, side, 3)))] * 2
        width, height = png_size(picture_grid(rows, [Block("title", [""] * pictures)]))
        assert 700 <= width <= 2600
        assert 100 <= height <= 2600

    def test_rows_that_do_not_fit(self) -> None:
        with pytest.raises(DodeError, match="2 pictures"):
            picture_grid([PictureRow("row", np.zeros((3, 8, 8)))], [Block("", "ab")])
        with pytest.raises(DodeError, match="no picture"):
            picture_grid([], [])


class TestComparisonFigure:
    def test_with_and_without_pictures(self) -> None:
        labels_ = ["euler, 8 evaluations: 0.1 from the teacher", "D-euler", "teacher"]
        pictures = [np.full((2, 8, 8, 3), grey) for grey in (0.5, 0.45, 0.4)]
        with_pictures = comparison_figure(labels_, pictures, [0.2, 0.1])
        shown = [float(ax.images[0].get_array().mean()) for ax in axes(with_pictures)]
        by_row = [0.5, 0.45, 0.4, 4 * 0.1, 4 * 0.05]
        assert shown == pytest.approx([grey for grey in by_row for _ in range(2)])
        (bars,) = axes(comparison_figure(labels_, [None] * 3, [0.2, 0.1]))
        assert [bar.get_width() for bar in bars.patches] == [0.2, 0.1]

    def test_of_many_noises_the_first_are_shown_and_that_is_said(self) -> None:
        pictures = [np.full((64, 8, 8, 3), grey) for grey in (0.5, 0.45, 0.4)]
        figure = comparison_figure(["stock", "D-ODE", "teacher"], pictures, [0.2, 0.1])
        assert len(axes(figure)) == 5 * 8
        assert "the first 8 of 64 noises" in [text.get_text() for text in figure.texts]

    def test_long_names_leave_room_for_the_bars(self) -> None:
        label = "best stock: ipndm, max_order 3, beta without the penultimate σ, 4 evaluations: 0.2183 from the teacher"
        figure = comparison_figure([label, label, "teacher"], [None] * 3, [0.2, 0.1])
        png_size(figure)
        assert axes(figure)[0].get_position().width > 0.3

    @pytest.mark.parametrize("pictures", [None, np.zeros((1, 8, 8, 3))], ids=["bars", "pictures"])
    def test_names_are_no_formulas(self, pictures: np.ndarray | None) -> None:
        name = "a $x^$ b"
        figure = comparison_figure([name, "D-ODE", "teacher"], [pictures] * 3, [0.2, 0.1])
        words = axes(figure)[0].get_yticklabels() if pictures is None else figure.texts
        assert name in [text.get_text() for text in words]
        png_size(figure)
