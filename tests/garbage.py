"""Python looks for garbage in what tests make, not among all that is imported, which takes a quarter of their time."""

import gc

gc.disable()  # while all is imported


def imported() -> None:
    """All is imported: leave it alone, and look for garbage from now on."""
    gc.freeze()
    gc.enable()
