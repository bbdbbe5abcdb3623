"""Families have names that no host owns, and the first tables' names for them are still known."""

from __future__ import annotations

import pytest

from dode_nodes.tables.families import family_of


@pytest.mark.parametrize(
    ("hosts", "ours"),
    [("SD15", "sd15"), ("SDXL", "sdxl"), ("SDXLRefiner", "sdxl-refiner"), ("SD3", "sd3"), ("Flux", "flux"),
     ("FluxSchnell", "flux"), ("WAN21_T2V", "wan"), ("WAN22_T2V", "wan")],
)  # fmt: skip
def test_a_hosts_class_has_our_name(hosts, ours):
    assert family_of(hosts) == family_of(ours) == ours


def test_a_class_that_nobody_knows_is_a_family_of_its_own():
    assert family_of("SomebodysConfig") == "SomebodysConfig"
