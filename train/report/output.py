"""What every output of a run offers; the reporter passes each record on to all of them."""

from collections.abc import Mapping
from typing import Any, Protocol

Record = Mapping[str, float | int | None]
"""Numbers of one interval by name, "step" among them; None for what is not known."""


class Output(Protocol):
    """One place that records go to. An error in it is an OSError or a ValueError, and stops the run."""

    def start(self, facts: Mapping[str, str]) -> None:
        """What the run is, before its first step."""

    def step(self, record: Record) -> None:
        """One interval, as it ends."""

    def tick(self, step: int) -> None:
        """A step is begun."""

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Something that happened, between intervals."""

    def close(self, failed: bool = False) -> None:
        """Nothing comes after this; `failed` if an error ended the run."""
