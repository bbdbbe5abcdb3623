"""Figures of λ and of errors: what is drawn, and that any table there can be is drawn in bounded time."""

from __future__ import annotations

import tracemalloc
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from dode_nodes import DodeError, LambdaRow, LambdaTable
from dode_nodes.tables import figures, plots
from dode_nodes.tables.provenance import Distances, HeldOutErrors, Origin, StockSetting, Unseen
from dode_nodes.tables.row import MAX_EVALUATIONS
from tests.tables import rows
from tests.tables.drawn import axes, labels, png_size

NUMBERS = set("0123456789.−-e+")

pytest.importorskip("matplotlib")


def row(solver: str = "euler", steps: int = 4, prediction: str = "noise", **fields: object) -> LambdaRow:
    """A row with a full report, over σ from 10."""
    sigmas = np.append(np.geomspace(10, 0.1, steps), 0)
    report = {
        "lambda_standard_error": [None, *[0.1] * (steps - 1)],
        "after_steps": {"stock": [0.2] * steps, "dode": [0.1] * steps},
        "teacher_error": 0.05,
        "shrunk_to": 1.0,
    }
    facts = {
        "sigmas": sigmas,
        "evaluations": (1,) * steps,
        "weights": np.linspace(0, 1, steps),
        "errors": HeldOutErrors(4, [0.1] * steps, 0.2),
        "report": report,
    }
    return LambdaRow(solver=solver, prediction=prediction, **(facts | fields))


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
        shrunk = [
            row(report={"shrunk_to": part, "lambda_standard_error": [part] * 4}) for part in (0.25, 0.0)
        ]
        (ax,) = axes(plots.lambda_figure(shrunk))
        assert labels(ax) == [
            "4 evaluations, shrunk to 0.25 of the fit",
            "4 evaluations, set to 0: it made things worse",
        ]
        for part, drawn in zip((0.25, 0.0), ax.containers, strict=True):  # as they are: of the λ that is kept
            (bars,) = drawn.lines[2]
            np.testing.assert_allclose([np.ptp(bar[:, 1]) for bar in bars.get_segments()], 2 * part)

    def test_stages_merged_steps_and_history(self) -> None:
        stages = row(evaluations=(2, 2, 2, 1), weights=np.arange(7.0))
        merged = row(evaluations=(3, 0, 0, 1))
        history = row(form="history", weights=np.tril(np.ones((4, 4))) * 1.5)
        assert plots._asked(stages) == sorted(plots._asked(stages), reverse=True)
        assert len(plots._asked(merged)) == 4
        assert [value for _, value, _ in plots._lambdas(history)] == [0.5] * 4
        png_size(plots.lambda_figure([stages, merged, history]))

    def test_no_rows(self) -> None:
        with pytest.raises(DodeError, match="no row"):
            plots.lambda_figure([])


class TestErrorPerStepFigure:
    def test_stock_is_grey_and_dashed(self) -> None:
        (ax,) = axes(plots.error_per_step_figure(row()))
        stock, dode = ax.lines[:2]
        assert (stock.get_color(), stock.get_linestyle()) == (figures.GREY, "--")
        assert (dode.get_color(), dode.get_linestyle()) == (figures.COLOURS[0], "-")
        np.testing.assert_allclose(dode.get_ydata(), 0.1)
        assert "the teacher's own error, about" in labels(ax)

    @pytest.mark.parametrize(
        "report",
        [
            {},
            {"after_steps": {}},
            {"after_steps": {"stock": [0.1], "dode": [None]}},
            {"after_steps": {"stock": [0.1]}},
        ],
    )
    def test_a_row_without_errors(self, report: dict) -> None:
        with pytest.raises(DodeError, match="not checked"):
            plots.error_per_step_figure(row(report=report))


class TestReportFigure:
    def test_lambda_beside_errors(self) -> None:
        figure = plots.report_figure(LambdaTable([row(), row("ipndm")]))
        assert [ax.get_ylabel()[:8] for ax in axes(figure)] == ["λ (0: th", "distance"] * 2

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
        assert all(tick == int(tick) for tick in stages.get_xticks())
        png_size(figure)

    def test_sigma_before_and_after(self) -> None:
        for moved, scale in ((refined(), "log"), (refined(sigmas=[1, 0.7, 0.5, 0.3, 0]), "linear")):
            ax = axes(plots.report_figure(LambdaTable([moved])))[0]
            _, before, after = ax.lines
            assert (before.get_color(), before.get_linestyle()) == (figures.GREY, "--")
            np.testing.assert_allclose(before.get_ydata(), moved.plain.sigmas[:-1])
            np.testing.assert_allclose(after.get_ydata(), moved.sigmas[:-1])
            assert ax.get_yscale() == scale

    def test_stages_begin_in_one_place_and_the_nearest_so_far_goes_on(self) -> None:
        ax = axes(plots.report_figure(LambdaTable([refined()])))[1]
        tried, nearest, kept = ax.lines[:3]
        assert list(tried.get_xdata()) == [0, 0, 0, 1, 2]
        np.testing.assert_allclose(tried.get_ydata(), [0.2, 0.4, 0.3, 0.1, 0.15])
        assert list(nearest.get_xdata()) == [0, 1, 2]
        np.testing.assert_allclose(nearest.get_ydata(), [0.2, 0.1, 0.1])
        assert (list(kept.get_xdata()), list(kept.get_ydata())) == ([1], [0.1])

    def test_above_all_stands_what_is_gained_in_lines_that_fit(self) -> None:
        unseen = Unseen(8, Distances(0.1, 0.1, 0.1, 0.1), Distances(0.19, 0.2, 0.1, 0.3), 1.0)
        rows = [
            row(steps=n, unseen=unseen, best_stock=StockSetting("n" * 40, "n" * 40, 0.2, 4)) for n in (4, 5)
        ]
        figure = plots.report_figure(LambdaTable(rows))
        lines = figure.get_suptitle().splitlines()
        assert lines[0].startswith("4 evaluations: 1.9 times nearer to the slow sampler's pictures than")
        figure.draw_without_rendering()
        assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1
        png_size(figure)

    def test_bars_show_how_far_stock_and_the_row_end(self) -> None:
        def told(steps: int, dode: float, stock: float, best: StockSetting | None) -> LambdaRow:
            of = [Distances(rms, rms, rms, rms) for rms in (dode, stock)]
            return row(steps=steps, unseen=Unseen(8, *of, 1.0), best_stock=best)

        best = StockSetting("deis", "beta", 0.2, 4)
        for setting, stock in ((best, "best stock sampler"), (None, "stock sampler")):
            bars = axes(
                plots.report_figure(LambdaTable([told(5, 0.1, 0.2, setting), told(4, 1e300, 3, setting)]))
            )[0]
            assert labels(bars) == [stock, "D-ODE, at the same speed"]
            assert [bar.get_width() for bar in bars.patches] == pytest.approx([3, 0.2, 1e100, 0.1])
            assert [tick.get_text() for tick in bars.get_yticklabels()] == ["4", "5"]
        few = replace(told(5, 0.1, 0.2, best), unseen=Unseen(7, *[Distances(0.1, 0.1, 0.1, 0.1)] * 2, 1.0))
        assert len(axes(plots.report_figure(LambdaTable([few])))) == 2

    def test_lambda_where_refining_keeps_sigma(self) -> None:
        heun = refined("heun", form="lambda", weights=np.ones(4), moved=False)
        left, right = axes(plots.report_figure(LambdaTable([heun])))
        assert left.get_ylabel().startswith("λ")
        assert right.get_ylabel().startswith("distance")

    @pytest.mark.parametrize(
        "stages",
        [
            [],
            [{"stage": "(x/y)", "held_out_error": 0.1}, {"stage": "y" * 99, "held_out_error": 0.2}],
            [{"stage": "row given", "held_out_error": None}, {"stage": "Jacobian 1", "held_out_error": 0.0}],
            [{"stage": f"Jacobian {i}", "held_out_error": 0.1} for i in range(1000)],
        ],
    )
    def test_odd_stages_do_not_stop_it(self, stages: list) -> None:
        png_size(plots.report_figure(LambdaTable([refined(stages=stages)])))

    def test_a_solver_that_is_called_refined_has_a_panel_of_its_own(self) -> None:
        table = LambdaTable([row("euler, refined"), refined()])
        figure = plots.report_figure(table)
        assert [(ax.get_title(loc="left"), ax.get_ylabel()[:8]) for ax in axes(figure)] == [
            ("euler, refined (noise)", "λ (0: th"),
            ("euler, refined (noise)", "distance"),
            ("euler, refined (noise)", "σ"),
            ("euler, refined (noise)", "distance"),
        ]
        png_size(figure)

    def test_names_are_no_formulas(self) -> None:
        figure = plots.report_figure(LambdaTable([row("a (x/y) b")]))
        assert axes(figure)[0].get_title(loc="left") == "a (x/y) b (noise)"
        png_size(figure)

    def test_no_text_is_a_formula(self) -> None:
        for figure in (
            plots.report_figure(LambdaTable([row(), refined()])),
            plots.error_against_evaluations_figure(
                [plots.Panel("$", [plots.Curve("$x^$", [1], [1.0], False)])], "$"
            ),
        ):
            from matplotlib.text import Text

            said = [
                text
                for text in figure.findobj(Text)
                if text.get_text() and not set(text.get_text()) <= NUMBERS
            ]
            assert len(said) > 4
            assert not any(text.get_parse_math() for text in said)
            png_size(figure)

    def test_numbers_beyond_the_axes_are_drawn_at_their_edge(self) -> None:
        huge = row(steps=3, weights=[0, 1e3, -1e3], report={"lambda_standard_error": [None, 1e308]})
        png_size(plots.report_figure(LambdaTable([huge])))

    def test_of_a_very_long_table_the_first_is_drawn(self) -> None:
        many = [row(f"solver {i}") for i in range(100)] + [row("solver 0", steps=2)] * 100
        figure = plots.report_figure(LambdaTable(many))
        assert len(axes(figure)) == 2 * 16
        assert len(labels(axes(figure)[0])) == 24

    def test_the_largest_row_is_drawn_in_bounded_memory(self) -> None:
        n = MAX_EVALUATIONS
        largest = LambdaRow("euler", np.linspace(1, 0, n + 1), (1,) * n, np.tri(n) / 7, form="history")
        tracemalloc.start()
        try:
            png_size(plots.report_figure(LambdaTable([largest])))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 25e6

    @settings(max_examples=6, deadline=None)
    @given(row=rows.rows())
    def test_whatever_passes_the_gate_can_be_drawn(self, row: LambdaRow) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fonts lack letters, axes have no extent
            png_size(plots.report_figure(LambdaTable([row])))


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
    told = {"kept": "Jacobian 1", "stages": made if stages == () else stages}
    origin = Origin("refined", began, {}, sigmas)
    if moved:
        sigmas = np.append(np.append(sigmas[0], sigmas[1:-1] * 1.1), 0)
    facts = {"form": "history", "weights": np.tri(steps), "report": {"refined": told}, "origin": origin}
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
