"""Records on Weights & Biases, https://wandb.ai; online, or with WANDB_MODE=offline in files to be sent later."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from train.report.output import Record

_ID_FILE = "wandb_id"


class WeightsAndBiases:
    """One run there for a run folder here, however often it is resumed: the folder keeps its id.

    Curves are drawn over "step", not over wandb's own count of records, which cannot go back to a checkpoint's step.
    """

    def __init__(self, folder: Path, project: str):
        """
        Args:
          folder: of the run; its name becomes the run's name.
          project: on Weights & Biases.

        Raises:
          ValueError: if Weights & Biases refuses the run, or is not reached.
        """
        keeper = folder / _ID_FILE
        if not keeper.exists():
            keeper.write_text(uuid.uuid4().hex)
        online = wandb.setup().settings.mode == "online"
        try:
            self._run = wandb.init(
                project=project,
                name=folder.resolve().name,
                id=keeper.read_text().strip(),
                resume="allow" if online else None,  # there is nothing to look up offline, and wandb would say so
                dir=folder,
                settings=wandb.Settings(console="off"),  # a copy of a live display is of no use
            )
        except wandb.Error as error:  # no key, no network, no such project
            raise ValueError(f"Weights & Biases: {error}") from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def start(self, facts: Mapping[str, str]) -> None:
        self._run.config.update(dict(facts), allow_val_change=True)

    def tick(self, step: int) -> None:
        pass

    def step(self, record: Record) -> None:
        self._run.log({name: value for name, value in record.items() if value is not None})

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        numbers = {f"event/{name}/{key}": value for key, value in fields.items() if isinstance(value, int | float)}
        self._run.log({"step": fields["step"], **numbers} if "step" in fields else numbers)

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))
