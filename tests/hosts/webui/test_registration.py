"""Registering, on small stand-ins of the host's modules; see in_host/ for the real ones."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.import_comfyui import REPOSITORY

OURS = "dode_nodes.hosts.webui.samplers"
SamplerData = namedtuple("SamplerData", ["name", "constructor", "aliases", "options"])


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The list of samplers, the map, and what is made of them, as the hosts have them."""
    stock = [SamplerData("DPM++ 2M", None, [], {"scheduler": "karras"}), SamplerData("Euler", None, [], {})]
    samplers = ModuleType("modules.sd_samplers")
    samplers.all_samplers = stock
    samplers.all_samplers_map = {each.name: each for each in stock}
    samplers.samplers_map = {}

    def set_samplers() -> None:
        samplers.samplers_map = {each.name.lower(): each.name for each in samplers.all_samplers}

    @functools.cache
    def get_sampler_and_scheduler(name: str, scheduler: str) -> str:
        return samplers.all_samplers_map.get(name, samplers.all_samplers[0]).name

    samplers.set_samplers, samplers.get_sampler_and_scheduler = set_samplers, get_sampler_and_scheduler
    common = ModuleType("modules.sd_samplers_common")
    common.SamplerData = SamplerData
    package = ModuleType("modules")
    package.sd_samplers, package.sd_samplers_common = samplers, common
    for module in (package, samplers, common):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    yield samplers
    sys.modules.pop(OURS, None)


@pytest.fixture
def ours(host: ModuleType) -> ModuleType:
    """Our module, over this host."""
    return importlib.import_module(OURS)


def test_it_is_offered_in_place_and_once(host, ours):
    held, map_ = host.all_samplers, host.all_samplers_map
    assert host.get_sampler_and_scheduler("D-ODE", "Automatic") == "DPM++ 2M"
    for _ in range(2):
        ours.register()
        assert [each.name for each in held] == ["DPM++ 2M", "Euler", "D-ODE"]
        assert list(map_) == ["DPM++ 2M", "Euler", "D-ODE"]
        assert map_["D-ODE"].options == {"scheduler": "karras"}
        assert host.samplers_map["d-ode"] == "D-ODE"
        assert host.get_sampler_and_scheduler("D-ODE", "Automatic") == "D-ODE"


def test_it_leaves_without_a_trace(host, ours):
    before = list(host.all_samplers), dict(host.all_samplers_map)
    ours.register()
    ours.unregister()
    ours.unregister()
    assert (host.all_samplers, host.all_samplers_map) == before
    assert host.get_sampler_and_scheduler("D-ODE", "Automatic") == "DPM++ 2M"


def test_another_extensions_sampler_stays_where_it_is(host, ours):
    ours.register()
    host.all_samplers.append(SamplerData("Another", None, [], {}))
    ours.register()
    assert [each.name for each in host.all_samplers] == ["DPM++ 2M", "Euler", "Another", "D-ODE"]


def test_an_unused_extension_imports_no_numerics():
    """Neither when the host loads it, nor when it makes its page, nor at a picture of another sampler."""
    code = """
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

HOST = ["fastapi", "fastapi.security", "gradio", "modules", "modules.ui_common", "pydantic"]
sys.modules |= {name: MagicMock(__version__="4.40.0") for name in HOST}
sys.modules["modules"].scripts.Script = sys.modules["pydantic"].create_model.return_value = object
from dode_nodes.hosts.webui import extension, tab

extension.load()
script = extension.DodeScript()
script.elem_id = str
extension.folders.folders = lambda: [extension.folders.PACK_FOLDER]
script.ui(False)
tab.make()
script.process(SimpleNamespace(sampler_name="Euler", hr_sampler_name=None), "auto")
print([name for name in ("torch", "numpy", "safetensors", "einops", "tqdm", "PIL") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
