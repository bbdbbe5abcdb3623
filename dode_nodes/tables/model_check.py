"""Whether a table's model is the one at hand, by what each says of itself."""

from __future__ import annotations

from ..errors import DodeError
from .families import family_of
from .gate import Facts

_SIGMA_RTOL = 0.01
SAME, OTHER_STRENGTHS, UNKNOWN, OTHERS = range(4)
"""LoRAs and patches, compared: the nearer the smaller."""
KINDS = (
    ("family", "family"),
    ("prediction_type", "prediction type"),
    ("channels", "number of channels"),
)
"""By these a table's model is another kind than one at hand: each fact's name, and as people know it."""


def check_facts(theirs: Facts, mine: Facts, same: bool | None) -> list[str]:
    """Compare a table's facts about its model with those of a model at hand. What one of them does not say is no reason.

    Args:
        theirs: the table's.
        mine: the model's; ``family`` by its neutral name.
        same: whether the weights are those of the table; None where that cannot be told.

    Returns:
        Remarks, one line each: another model of the family, other patches, another shift, another range of σ.

    Raises:
        DodeError: another family, prediction type or number of channels.
    """
    if "family" in theirs:
        theirs = dict(theirs) | {"family": family_of(theirs["family"])}
    for key, words in KINDS:
        if None not in (theirs.get(key), mine.get(key)) and theirs[key] != mine[key]:
            raise DodeError(
                f"this λ table was made for another kind of model: its {words} is '{theirs[key]}', "
                f"this model's is '{mine[key]}'. Distil a table for this model"
            )
    remarks = []
    if same is False:
        remarks.append(
            "the λ table was made for another checkpoint of this family; distil a table for this model"
        )
    elif same is None and theirs.get("fingerprint"):
        remarks.append("could not check whether the λ table was made for this checkpoint")
    elif (patches := compared_patches(theirs, mine)) == OTHERS:
        remarks.append("the λ table was made with different LoRAs or patches on this model")
    elif patches == OTHER_STRENGTHS:
        remarks.append("the λ table was made with the same LoRAs or patches at other strengths")
    shifts = theirs.get("shift"), mine.get("shift")
    if None not in shifts and shifts[0] != shifts[1]:
        remarks.append(f"the λ table was made at shift {shifts[0]:g}, this model has {shifts[1]:g}")
    elif not same_range(theirs, mine):
        remarks.append(
            f"the λ table was made for σ from {theirs['sigma_max']:g} to {theirs['sigma_min']:g}, this model's "
            f"go from {mine['sigma_max']:g} to {mine['sigma_min']:g}"
        )
    return remarks


def compared_patches(theirs: Facts, mine: Facts) -> int:
    """How near the LoRAs and patches of two models are: by what is in them, else by how many and how strong they are."""
    a, b = theirs.get("patches"), mine.get("patches")
    if a is None or b is None:
        return UNKNOWN
    if a == b:
        return SAME
    contents = a.get("content"), b.get("content")
    if None not in contents:
        return OTHER_STRENGTHS if contents[0] == contents[1] else OTHERS
    counted = [(each.get("weights"), each.get("strengths")) for each in (a, b)]
    return UNKNOWN if counted[0] == counted[1] else OTHERS


def same_range(theirs: Facts, mine: Facts) -> bool:
    """Hosts compute the ends in ways of their own. Where the terminal SNR is 0, σ begins at hundreds of times more."""
    known = [end for end in ("sigma_min", "sigma_max") if None not in (theirs.get(end), mine.get(end))]
    return len(known) < 2 or all(abs(theirs[end] - mine[end]) <= _SIGMA_RTOL * mine[end] for end in known)
