"""What tests of models share."""

import pytest


@pytest.fixture
def eight_bits_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has these products too, if slow ones."""
    monkeypatch.setattr("theworld.models.fp8.check_fp8", lambda device: None)
