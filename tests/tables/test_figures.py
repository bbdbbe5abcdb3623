"""matplotlib comes late, alone, or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dode_nodes import DodeError
from dode_nodes.tables import figures, plots
from tests.tables.rows import row_of

pytest.importorskip("matplotlib")


def test_matplotlib_is_imported_when_a_figure_is_drawn_and_pyplot_never(tmp_path: Path) -> None:
    code = (
        "import sys, dode_nodes.cli.commands, dode_nodes.tables.picture_grid, dode_nodes.tables.plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from dode_nodes.tables.plots import Curve, Panel, error_against_evaluations_figure as draw\n"
        "draw([Panel('', [Curve('', [1], [1.0], True)])]).savefig(sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "figure.png")], check=True, timeout=60)
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DodeError, match="pip install"):
        figures.matplotlib_figure()
    with pytest.raises(DodeError, match="pip install"):
        plots.lambda_figure([row_of()])
