"""The loop of every kind of training: phases of steps, checkpoints, going on, going back, and stopping."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from train.checkpoints import Checkpoints
from train.data.batches import Batches
from train.guard import GuardState, gone_back, without_history
from train.report.profile import Profile
from train.report.reporter import Reporter
from train.report.throughput import Work
from train.run_folder import Window, add_window, position, went_back_to
from train.step import Metrics, TrainState
from train.stopping import STOPPED, StopRequest
from train.validation import Validation

_LONG = 60
"""Seconds of a step after which somebody may ask whether it is stuck."""


class Stage(NamedTuple):
    """A phase, made ready: its steps are `first` + 1 to `last` of the run."""

    first: int
    last: int
    step: Any
    """The jitted training step."""
    batches: Batches
    tokens: int
    """Of a batch."""
    work: Work | None
    model: Path
    """A folder with what checkpoints of this phase hold of their model."""
    validation: Validation | None


class Limits(NamedTuple):
    """How often the loop does what; steps and times."""

    save_every: int
    log_every: int
    validate_every: int
    max_skips: int
    max_rollbacks: int


class Loop:
    """One run from where it stands to its end, or to where it is stopped.

    Args:
      folder: of the run, for the list of what was passed over.
      stages: in order, without gaps.
      state: to start from; its step says where. Used up.
      abstract: the shapes, dtypes and shardings of the state.
      limits: how often it does what.
      windows: batches to pass over, from `train.run_folder.read_windows`.
      checkpoints: of the run; left open.
      reporter: is told of everything; left open.
      profile: the steps to trace, if any.
      stop: asked after every step.
    """

    def __init__(
        self,
        folder: Path,
        stages: Sequence[Stage],
        state: TrainState,
        abstract: TrainState,
        *,
        limits: Limits,
        windows: list[Window],
        checkpoints: Checkpoints,
        reporter: Reporter,
        profile: Profile | None,
        stop: StopRequest,
    ):
        self._folder, self._stages, self._state, self._abstract = folder, stages, state, abstract
        self._limits, self._windows, self._checkpoints = limits, windows, checkpoints
        self._reporter, self._profile, self._stop = reporter, profile, stop
        self._step = int(state.step)
        self._programs: dict[int, Any] = {}
        self._saved = checkpoints.restored
        self._own = {self._step}  # steps of this very run; there may be others, of one that was abandoned
        self._interval = _Interval(self._step, 0.0)
        self._told: set[str] = set()
        if went_back_to(windows, self._step):  # and was killed before it saved anything since
            self._change_guard(gone_back)

    def run(self) -> int:
        """Trains. Returns the exit status: 0, or STOPPED if it was asked to stop, with everything saved.

        Raises:
          OSError: if a checkpoint could not be written.
          ValueError: if steps go on being skipped however often the run goes back, or if the data ends in an error.
        """
        total = self._stages[-1].last
        self._save()  # what cannot be written is found out now, and there is always something to go back to
        status = 0
        while self._step < total and not status:
            number = next(number for number, stage in enumerate(self._stages) if self._step < stage.last)
            status = self._run_stage(number)
        self._save()
        self._checkpoints.wait()
        self._check_saves()
        if status:  # who is asked to stop has no time to read
            self._reporter.event("stopped", step=self._step, next="it is saved; the same command goes on from it")
        else:
            self._checkpoints.verify(self._step)
            self._reporter.event("finished", step=self._step)
        return status

    def _run_stage(self, number: int) -> int:
        """Steps until the stage is through, or goes on elsewhere in its data (0), or the run is asked to stop."""
        stage = self._stages[number]
        if number and self._step == stage.first:
            self._change_guard(without_history)
        self._reporter.work = stage.work
        self._checkpoints.use_model(stage.model)
        self._interval = _Interval(self._step, stage.batches.waited)
        unseen: list[tuple[int, Metrics]] = []
        position = self._position(number, self._step)
        with stage.batches.stream(position, lambda: jax.block_until_ready(self._state.step)) as stream:
            for index, batch in stream:
                self._state, metrics = self._take_step(number, batch)
                self._step += 1
                last = self._step == stage.last
                validation = stage.validation if last or self._step % self._limits.validate_every == 0 else None
                reports = last or validation or self._step % self._limits.log_every == 0
                saves = self._step % self._limits.save_every == 0
                ends = last or self._position(number, self._step) != index + 1
                # Looking at a step while the next one runs leaves no gap between them.
                unseen.append((self._step, metrics))
                bad = self._first_bad(unseen, len(unseen) if reports or saves or ends else len(unseen) - 1)
                stop = self._stop.seen()  # not before: while a step is waited for is when signals come
                if stop and bad is None:
                    bad = self._first_bad(unseen, len(unseen))
                if bad is not None:
                    self._go_back(number, bad)
                    return 0
                self._check_saves()
                if reports:
                    self._report(stage, metrics, None if stop else validation)  # who is stopped has no time
                if saves:
                    self._save()
                if stop:
                    return STOPPED
                if ends:
                    return 0
        raise AssertionError("batches are endless")

    def _position(self, number: int, step: int) -> int:
        """Of the batch in a stage that is taken after a step."""
        return position(self._windows, number, step - self._stages[number].first)

    def _take_step(self, number: int, batch: Any) -> tuple[TrainState, Metrics]:
        program = self._program(number, batch)
        self._reporter.tick(self._step + 1)
        if self._profile is not None:
            self._profile.before(self._step + 1)
        result = program(self._state, batch)
        if self._profile is not None:
            self._profile.after(self._step + 1, result[1])
        return result

    def _program(self, number: int, batch: Any) -> Any:
        if number not in self._programs:
            self._programs.clear()  # that of another stage is not coming back, but for a rollback
            begin = time.monotonic()
            self._programs[number] = self._stages[number].step.lower(self._abstract, batch).compile()
            self._reporter.event("compiled", step=self._step, seconds=round(time.monotonic() - begin, 1))
            self._interval.pause(time.monotonic() - begin)
        return self._programs[number]

    def _first_bad(self, unseen: list[tuple[int, Metrics]], count: int) -> int | None:
        """Looks at so many steps, and takes them off the list; gives the first one that the run must go back for."""
        seen, unseen[:count] = unseen[:count], []
        return next((step for step, metrics in seen if self._must_go_back(step, metrics)), None)

    def _must_go_back(self, step: int, metrics: Metrics) -> bool:
        """Notes a step that was skipped. Waits for it."""
        self._wait(step, metrics)
        accepted, in_a_row = jax.device_get((metrics.accepted, metrics.in_a_row))
        if not accepted:
            loss, norm = jax.device_get((metrics.loss, metrics.gradient_norm))
            self._reporter.event("skip", step=step, in_a_row=in_a_row, loss=loss, gradient_norm=norm)
        return bool(in_a_row > self._limits.max_skips)

    def _wait(self, step: int, metrics: Metrics) -> None:
        """Until a step is through; says so, once in a run, when that takes long, or when it is to be the last.

        Asks again and again, for within JAX's own wait no signal would come to anything.
        """
        begin = time.monotonic()
        while not metrics.accepted.is_ready():  # type: ignore[attr-defined]  # of every array, though not declared
            waited = time.monotonic() - begin
            time.sleep(min(max(waited / 20, 1e-4), 0.05))  # hardly longer than the step takes
            if waited >= _LONG:
                self._tell("running", step=step, seconds=_LONG)
            if self._stop.asked:
                self._tell("stopping", step=self._step, when="after this step", again=self._stop.again)

    def _tell(self, event: str, **fields: Any) -> None:
        """Of the first event of a name only."""
        if event not in self._told:
            self._told.add(event)
            self._reporter.event(event, **fields)

    def _go_back(self, number: int, bad: int) -> None:
        """To the newest checkpoint; the batches since then, up to that of step `bad`, are passed over from now on.

        Source: PaLM (arXiv 2204.02311), section 5.1, restarts ahead of a spike and skips the batches around it.
        """
        stage = self._stages[number]
        self._checkpoints.wait()
        self._check_saves()
        target = max(self._own.intersection(self._checkpoints.steps()))
        if len(self._windows) >= self._limits.max_rollbacks:
            raise ValueError(
                f"the run went back {len(self._windows)} times, and again more than {self._limits.max_skips} steps in "
                f"a row were skipped, up to step {bad}; the newest checkpoint is that of step {target}: look at the "
                "data and the learning rate, or allow more by --max-rollbacks"
            )
        window = Window(number, self._position(number, max(target, stage.first)), self._position(number, bad), target)
        self._windows = add_window(self._folder, self._windows, window)
        self._reporter.event("rollback", step=bad, to=target, passed_over=window.stop - window.first)
        del self._state  # there may be no room for two
        self._state, _ = self._checkpoints.restore(target, self._abstract)
        self._change_guard(gone_back)  # the checkpoint may be of a step among those that were skipped
        self._step = self._saved = target

    def _change_guard(self, change: Callable[[GuardState], GuardState]) -> None:
        guard = self._state.guard
        changed = jax.jit(change, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, guard))(guard)
        self._state = self._state._replace(guard=changed)

    def _report(self, stage: Stage, metrics: Metrics, validation: Validation | None) -> None:
        values = jax.device_get(metrics)
        steps, seconds, wait = self._interval.end(self._step, stage.batches.waited)
        scalars = values._asdict()
        scalars.pop("accepted")
        objective = scalars.pop("objective")
        rates = {"tokens": steps * stage.tokens, "seconds": seconds, "data_wait": wait}
        held_out = {}
        if validation is not None:
            begin = time.monotonic()
            held_out = {f"validation_{name}": value for name, value in validation(self._state.params).items()}
            self._interval.pause(time.monotonic() - begin)
        self._reporter.step({"step": self._step} | scalars | objective | held_out | rates)

    def _save(self) -> None:
        if self._step == self._saved:
            return
        begin = time.monotonic()
        self._checkpoints.save(self._step, self._state)
        self._saved = self._step
        self._own.add(self._step)
        self._check_saves()
        self._interval.pause(time.monotonic() - begin)

    def _check_saves(self) -> None:
        """Tells of steps that are whole by now. Raises the OSError of a save that failed."""
        for step, seconds, stalled in self._checkpoints.check():
            self._reporter.event("checkpoint", step=step, seconds=round(seconds, 3), stalled=round(stalled, 3))


class _Interval:
    """From one report to the next."""

    def __init__(self, step: int, waited: float):
        self._step, self._begin, self._waited = step, time.monotonic(), waited

    def pause(self, seconds: float) -> None:
        """Leaves out time in which no step was asked for."""
        self._begin += seconds

    def end(self, step: int, waited: float) -> tuple[int, float, float]:
        """Steps, seconds, and seconds of those that were spent waiting for data; begins the next interval.

        Args:
          waited: seconds that batches were waited for, ever.
        """
        now = time.monotonic()
        result = step - self._step, now - self._begin, waited - self._waited
        self._step, self._begin, self._waited = step, now, waited
        return result
