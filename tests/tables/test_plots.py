"""The figures: what is drawn, that it can be read, and that nothing is shared or imported early."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dode_nodes import DodeError, LambdaRow, LambdaTable
from dode_nodes.tables import plots

pytest.importorskip("matplotlib")


def row(solver: str = "euler", steps: int = 4, prediction: str = "noise", **fields: object) -> LambdaRow:
    """A row with a full report, over σ from 10."""
    sigmas = np.append(np.geomspace(10, 0.1, steps), 0)
    report = {
        "lambda_standard_error": [None, *[0.1] * (steps - 1)],
        "error": {"stock": [0.2] * steps, "dode": [0.1] * steps, "stock_end": 0.2, "dode_end": 0.1},
        "teacher_error": 0.05,
        "shrunk_to": 1.0,
    }
    facts = {
        "sigmas": sigmas,
        "evaluations": (1,) * steps,
        "weights": np.linspace(0, 1, steps),
        "report": report,
    }
    return LambdaRow(solver=solver, prediction=prediction, **(facts | fields))


def axes(figure) -> list:
    return list(figure.axes)


def labels(ax) -> list[str]:
    return ax.get_legend_handles_labels()[1]


def png_size(figure) -> tuple[int, int]:
    """(width, height) of the figure as PNG, in pixels."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    header = file.getvalue()[16:24]
    return int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")


class TestLambdaFigure:
    def test_a_panel_per_solver_and_prediction(self) -> None:
        figure = plots.lambda_figure([row(), row(steps=6), row(prediction="data"), row("ipndm"), row("deis")])
        titles = [ax.get_title(loc="left") for ax in axes(figure)]
        assert titles == ["euler (noise)", "euler (data)", "ipndm (noise)", "deis (noise)"]
        assert labels(axes(figure)[0]) == ["4 evaluations", "6 evaluations"]

    def test_draws_lambda_without_the_first(self) -> None:
        (ax,) = axes(plots.lambda_figure([row()]))
        sigmas, lambdas = np.array(ax.containers[0].lines[0].get_data(), dtype=float)
        np.testing.assert_allclose(sigmas, row().sigmas[1:-1])
        np.testing.assert_allclose(lambdas, row().weights[1:])

    def test_sigma_is_logarithmic_but_for_flow(self) -> None:
        (ax,) = axes(plots.lambda_figure([row()]))
        assert ax.get_xscale() == "log"
        flow = row(sigmas=[1, 0.75, 0.5, 0.25, 0])
        (ax,) = axes(plots.lambda_figure([flow]))
        assert ax.get_xscale() == "linear"
        assert ax.xaxis_inverted()

    def test_says_where_lambda_was_shrunk(self) -> None:
        shrunk = [row(report={"shrunk_to": part, "lambda_standard_error": [9.0] * 4}) for part in (0.25, 0.0)]
        (ax,) = axes(plots.lambda_figure(shrunk))
        assert labels(ax) == [
            "4 evaluations, shrunk to 0.25 of the fit",
            "4 evaluations, set to 0: it did harm",
        ]
        assert ax.get_ylim()[1] < 2  # the standard errors were of another λ

    def test_stages_merged_steps_channels_and_history(self) -> None:
        stages = row(evaluations=(2, 2, 2, 1), weights=np.arange(7.0))
        merged = row(evaluations=(3, 0, 0, 1))
        channels = row(weights=np.ones((4, 3)) * [1, 2, 3])
        history = row(form="history", weights=np.tril(np.ones((4, 4))) * 1.5)
        assert plots._asked(stages) == sorted(plots._asked(stages), reverse=True)
        assert len(plots._asked(merged)) == 4
        assert [value for _, value, _ in plots._lambdas(channels)] == [2, 2, 2]
        assert [value for _, value, _ in plots._lambdas(history)] == [0.5] * 4
        png_size(plots.lambda_figure([stages, merged, channels, history]))

    def test_no_rows(self) -> None:
        with pytest.raises(DodeError, match="no row"):
            plots.lambda_figure([])


class TestErrorPerStepFigure:
    def test_stock_is_grey_and_dashed(self) -> None:
        (ax,) = axes(plots.error_per_step_figure(row()))
        stock, dode = ax.lines[:2]
        assert (stock.get_color(), stock.get_linestyle()) == (plots.GREY, "--")
        assert (dode.get_color(), dode.get_linestyle()) == (plots.COLOURS[0], "-")
        np.testing.assert_allclose(dode.get_ydata(), 0.1)
        assert "the teacher's own, about" in labels(ax)

    @pytest.mark.parametrize(
        "report", [{}, {"error": 3}, {"error": {"stock": "none", "dode": [None]}}, {"error": {"stock": [[]]}}]
    )
    def test_a_row_without_errors(self, report: dict) -> None:
        with pytest.raises(DodeError, match="not checked"):
            plots.error_per_step_figure(row(report=report))


class TestReportFigure:
    def test_lambda_beside_errors(self) -> None:
        figure = plots.report_figure(LambdaTable([row(), row("ipndm")]))
        assert [ax.get_ylabel()[:8] for ax in axes(figure)] == ["λ (0: th", "distance"] * 2

    def test_odd_reports_do_not_stop_it(self) -> None:
        odd = row(report={"error": [], "lambda_standard_error": 1, "teacher_error": "?", "shrunk_to": None})
        png_size(plots.report_figure(LambdaTable([odd])))

    def test_refined_rows_have_panels_of_their_own(self) -> None:
        rows = [row(), refined(), refined(steps=6), refined("dpmpp_2m")]
        figure = plots.report_figure(LambdaTable(rows))
        assert [(ax.get_title(loc="left"), ax.get_ylabel()[:8]) for ax in axes(figure)] == [
            ("euler (noise)", "λ (0: th"),
            ("euler (noise)", "distance"),
            ("euler, refined (noise)", "σ"),
            ("euler, refined (noise)", "distance"),
            ("dpmpp_2m, refined (noise)", "σ"),
            ("dpmpp_2m, refined (noise)", "distance"),
        ]
        schedules, stages = axes(figure)[2:4]
        assert labels(schedules) == ["before refining", "4 evaluations", "6 evaluations"]
        assert labels(stages) == ["4 evaluations", "6 evaluations"]
        assert [tick.get_text() for tick in stages.get_xticklabels()] == ["stock", "λ", "iPNDM-3", "1", "2"]
        png_size(figure)

    def test_sigma_before_and_after(self) -> None:
        for moved, scale in ((refined(), "log"), (refined(sigmas=[1, 0.7, 0.5, 0.3, 0]), "linear")):
            ax = axes(plots.report_figure(LambdaTable([moved])))[0]
            _, before, after = ax.lines
            assert (before.get_color(), before.get_linestyle()) == (plots.GREY, "--")
            np.testing.assert_allclose(before.get_ydata(), moved.plain.sigmas[:-1])
            np.testing.assert_allclose(after.get_ydata(), moved.sigmas[:-1])
            assert ax.get_yscale() == scale

    def test_stages_go_on_from_the_nearest_on_the_fitted_latents(self) -> None:
        ax = axes(plots.report_figure(LambdaTable([refined()])))[1]
        begun, path, kept = ax.lines[:3]
        np.testing.assert_allclose(begun.get_ydata(), [0.2, 0.4, 0.3])
        np.testing.assert_allclose(path.get_ydata(), [0.3, 0.1, 0.15])
        assert list(path.get_xdata()) == [2, 3, 4]
        assert (list(kept.get_xdata()), list(kept.get_ydata())) == ([3], [0.1])

    def test_lambda_where_refining_keeps_sigma(self) -> None:
        heun = refined("heun", form="lambda", weights=np.ones(4), moved=False)
        left, right = axes(plots.report_figure(LambdaTable([heun])))
        assert left.get_ylabel().startswith("λ")
        assert right.get_ylabel().startswith("distance")

    @pytest.mark.parametrize(
        "stages",
        [
            None,
            [],
            [{"stage": "$x^$", "held_out_error": 0.1}, {"stage": "y" * 99, "held_out_error": 0.2}],
            [{"stage": "row given", "held_out_error": None}, {"stage": "Jacobian 1", "held_out_error": 0.0}],
            [{"stage": f"Jacobian {i}", "held_out_error": 0.1, "fitted_error": "x"} for i in range(2000)],
        ],
    )
    def test_odd_stages_do_not_stop_it(self, stages: list | None) -> None:
        png_size(plots.report_figure(LambdaTable([refined(stages=stages)])))


def refined(
    began: str = "euler", steps: int = 4, moved: bool = True, stages: object = (), **fields: object
) -> LambdaRow:
    """A row of weights over the history that began with the row of that solver, and moved its σ."""
    sigmas = np.asarray(fields.pop("sigmas", row(steps=steps).sigmas), dtype=float)
    errors = {"row given": (0.5, 0.2), "plain solver": (0.6, 0.4), "iPNDM-3": (0.2, 0.3),
              "Jacobian 1": (0.1, 0.1), "Jacobian 2": (0.05, 0.15)}  # fmt: skip
    made = [
        {"stage": name, "fitted_error": fitted, "held_out_error": held, "evaluations": 10}
        for name, (fitted, held) in errors.items()
    ]
    told = {
        "kept": "Jacobian 1",
        "stages": made if stages == () else stages,
        "from": {"solver": began, "solver_options": {}, "sigmas": sigmas.tolist()},
    }
    if moved:
        sigmas = np.append(np.append(sigmas[0], sigmas[1:-1] * 1.1), 0)
    facts = {"form": "history", "weights": np.tri(steps), "report": {"refined": told}}
    return row("euler" if moved else began, steps, sigmas=sigmas, **(facts | fields))


class TestErrorAgainstEvaluations:
    def test_panels_share_axes_and_keep_their_numbers(self) -> None:
        curves = [
            plots.Curve("euler", [5, 8], [0.2, 0.1], True),
            plots.Curve("D", [5, 8], [0.1, 0.02], False),
        ]
        figure = plots.error_against_evaluations_figure(
            [plots.Panel(name, curves) for name in "abc"], "a note"
        )
        assert [ax.get_title(loc="left") for ax in axes(figure)] == ["a", "b", "c"]
        for ax in axes(figure):
            assert list(ax.get_xticks()) == [5, 8]
            assert [list(line.get_ydata()) for line in ax.lines] == [[0.2, 0.1], [0.1, 0.02]]
            assert ax.get_ylim() == axes(figure)[0].get_ylim()

    def test_nothing_to_draw(self) -> None:
        with pytest.raises(DodeError, match="no curve"):
            plots.error_against_evaluations_figure([])


class TestPictureGrid:
    def test_a_cell_per_picture_in_order(self) -> None:
        images = np.linspace(0, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
        rows = [plots.PictureRow("one", images[0]), plots.PictureRow("two", images[1], heads_group=True)]
        figure = plots.picture_grid(rows, [plots.Block("left", ["0", "1"]), plots.Block("right", ["2"])])
        drawn = [ax.images[0].get_array() for ax in axes(figure)]
        np.testing.assert_allclose(np.stack(drawn), images.reshape(6, 16, 16))
        assert [text.get_text() for text in figure.texts] == ["left", "0", "1", "right", "2", "one", "two"]

    def test_words_stay_inside(self) -> None:
        label = "10 × D-dpmpp_2m (data)\nkarras −penultimate · error 0.1234"
        figure = plots.picture_grid(
            [plots.PictureRow(label, np.zeros((10, 16, 16)))], [plots.Block("", "0123456789")]
        )
        png_size(figure)
        left = min(text.get_window_extent().x0 for text in figure.texts)
        assert left >= 0

    @pytest.mark.parametrize(("side", "pictures"), [(16, 10), (512, 4), (1024, 1)])
    def test_size(self, side: int, pictures: int) -> None:
        rows = [plots.PictureRow("row", np.zeros((pictures, side, side, 3)))] * 2
        width, height = png_size(plots.picture_grid(rows, [plots.Block("title", [""] * pictures)]))
        assert 700 <= width <= 2600
        assert 100 <= height <= 2600

    def test_rows_that_do_not_fit(self) -> None:
        with pytest.raises(DodeError, match="2 pictures"):
            plots.picture_grid([plots.PictureRow("row", np.zeros((3, 8, 8)))], [plots.Block("", "ab")])
        with pytest.raises(DodeError, match="no picture"):
            plots.picture_grid([], [])


class TestComparisonFigure:
    def test_with_and_without_pictures(self) -> None:
        labels_ = ["euler, 8 evaluations: 0.1 from the teacher", "D-euler", "teacher"]
        with_pictures = plots.comparison_figure(labels_, [np.zeros((2, 8, 8, 3))] * 3, [0.2, 0.1])
        assert len(axes(with_pictures)) == 6
        (bars,) = axes(plots.comparison_figure(labels_, [None] * 3, [0.2, 0.1]))
        assert [bar.get_width() for bar in bars.patches] == [0.2, 0.1]


def test_matplotlib_is_imported_when_a_figure_is_drawn_and_pyplot_never(tmp_path: Path) -> None:
    code = (
        "import sys, dode_nodes, dode_nodes.plots, dode_nodes.__main__\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from dode_nodes.plots import Curve, Panel, error_against_evaluations_figure as draw\n"
        "draw([Panel('', [Curve('', [1], [1.0], True)])]).savefig(sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "figure.png")], check=True, timeout=60)
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DodeError, match="pip install"):
        plots.lambda_figure([row()])
