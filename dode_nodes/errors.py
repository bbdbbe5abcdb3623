"""Everything this package raises on purpose."""


class DodeError(ValueError):
    """What was wrong with the input or the model's answer, and what to do about it."""


class NotFinite(DodeError):
    """The model's answer holds NaN or infinite values."""


class IneligibleSampler(DodeError):
    """A sampler that cannot be distilled (or cannot teach); the message says which condition failed."""


class TableError(DodeError):
    """A λ table's file or content is unusable; the message names the file and the reason."""


class NameTaken(TableError):
    """There is a file of this name, which is not overwritten."""
