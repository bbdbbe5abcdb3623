"""Landscapes show what their words say, and leave the rest open."""

from __future__ import annotations

import pytest
import torch

from dode_nodes.demo.colour.landscapes import GROUNDS, SCENES, TIMES, draw

COUNT = 24


def drawn(*words, seed=0):
    """Pictures of one scene, [24, 3, 64, 64]."""
    assert words in SCENES
    torch.manual_seed(seed)
    return draw([words] * COUNT)


def brightness(pictures):
    return pictures.mean(dim=(1, 2, 3))


def test_scenes_are_all_times_and_grounds_each_once():
    assert len(SCENES) == len(set(SCENES))
    assert {words[:2] for words in SCENES} == {(time, ground) for time in TIMES for ground in GROUNDS}
    for words in SCENES:
        assert ("star" in words or "moon" in words) <= ("night" in words)
        assert not {"sun", "fog"} & set(words) or "night" not in words
        assert "autumn" not in words or words[1] in ("hill", "lake", "forest")


def test_every_scene_is_a_picture():
    torch.manual_seed(0)
    pictures = draw(SCENES)
    assert pictures.shape == (len(SCENES), 3, 64, 64)
    assert pictures.isfinite().all()
    assert pictures.abs().max() <= 1
    assert pictures.std(dim=(1, 2, 3)).min() > 0.02


def test_a_seed_is_a_picture():
    assert torch.equal(drawn("day", "lake", seed=3), drawn("day", "lake", seed=3))
    one, other = drawn("day", "lake", seed=3)[:2]
    assert (one - other).square().mean().sqrt() > 0.1


def test_nights_are_darkest_and_snow_is_bright():
    night = brightness(drawn("night", "hill"))
    assert night.max() < brightness(drawn("day", "hill")).median()
    assert brightness(drawn("day", "hill", "snow")).median() > brightness(drawn("day", "hill")).median()


@pytest.mark.parametrize(("words", "disc"), [(("night", "sea"), "moon"), (("day", "desert"), "sun")])
def test_a_sun_or_a_moon_is_the_brightest_in_the_sky(words, disc):
    sky = slice(2, 24)
    without, shown = (pictures[:, :, sky].sum(dim=1).amax(dim=(1, 2)) for pictures in
                      (drawn(*words), drawn(*words, disc)))  # fmt: skip
    assert (shown > without.median()).float().mean() > 0.9


def test_a_lake_shows_what_is_above_it():
    """The lower part, turned upside down, is like the upper; on land it is not."""

    def likeness(pictures):
        upper, lower = pictures[:, :, 20:32].flatten(1), pictures[:, :, 36:48].flip(2).flatten(1)
        return torch.stack(
            [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(upper, lower, strict=True)]
        )

    assert likeness(drawn("sunset", "lake")).mean() > likeness(drawn("sunset", "forest")).mean() + 0.2


def test_autumn_woods_are_red_and_summers_are_green():
    def green(pictures):
        return (pictures[:, 1] - pictures[:, 0])[:, 48:].mean(dim=(1, 2))

    assert green(drawn("day", "forest")).min() > green(drawn("day", "forest", "autumn")).max()
