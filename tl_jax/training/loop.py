"""The training loop: steps, lines of metrics, evaluations and checkpoints of a program, phase by phase."""

import collections
import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from tl_jax import config, tasks
from tl_jax.core import console, messages
from tl_jax.core.options import LANGUAGE, SELECTORS
from tl_jax.methods.term import MAIN
from tl_jax.runtime import preemption, roofline, sharding, wall
from tl_jax.runtime.checkpoint import Checkpoints
from tl_jax.runtime.log import RunLog, feed, log
from tl_jax.runtime.preemption import Preempted
from tl_jax.training import artifacts, audit, between, candidates, single, steps
from tl_jax.training.build import Run, intervals
from tl_jax.training.single import Line, Program, Stop


class Ended(NamedTuple):
    """How training ended: the last state and its step, the rows of each run, and the errors of those that diverged."""

    state: Any
    step: int
    rows: list[list[dict[str, Any]]]
    failed: dict[int, FloatingPointError]


@dataclasses.dataclass(eq=False)
class Loop:
    """A program on its way: `Loop(...).run()` trains it to the end, from its newest checkpoint on.

    folders: of the runs, by number; a run without one is trained and leaves nothing. Raises Preempted, with everything
    saved, soon after `stop_requested(steps done)` has become true.
    """

    program: Program
    checkpoints: Checkpoints
    folders: Mapping[int, pathlib.Path]
    parallel: sharding.Parallel
    verbose: bool
    stop_requested: Stop
    line: Line | None = None  # whose sums may still be on their way: nothing is waited for without need

    def run(self) -> Ended:
        """Trains every phase that is left."""
        self.first, count = self.program.runs[0], len(self.program.runs)
        run, (self.log_every, self.eval_every) = self.first, intervals(self.first)
        self.identity = identity_of(self.program)
        self.state, meta = resume(
            self.checkpoints, self.identity, lambda step: self.program.initial(run.phase_of(step))
        )
        start = self.saved = int(self.state.step)
        for folder in self.folders.values():
            candidates.forget(folder, start)
        self.held_out: dict[int, between.HeldOut] = {}  # by phase
        # Of the steps whose line is to be written; of several runs none asks.
        self.costs: collections.deque[dict[str, Any]] = collections.deque(maxlen=None if count == 1 else 0)
        rows = meta.get("rows") or [[] for _ in range(count)]
        self.failed = {int(j): FloatingPointError(text) for j, text in meta.get("failed", {}).items()}
        self.frozen = meta.get("frozen")
        first = run.phase_of(start)
        with contextlib.ExitStack() as stack:
            about = (start, run.total_steps, self.verbose and count == 1, count)
            logs = (
                RunLog(self.folders.get(j), rows[j], *about, self.program.runs[j].settings.shown) for j in range(count)
            )
            self.logs = dict(enumerate(map(stack.enter_context, logs)))
            shown = self.verbose and count > 1 and jax.process_index() == 0  # one run has a bar of its own
            self.tick = stack.enter_context(console.bar("train", run.total_steps, start, shown=shown))
            done = start
            if meta.get("owed"):
                judged = self.program.batches(first, self.state, self._judged(), self.stop_requested)
                self._evaluate(first, start, judged)
            for i in range(first, len(run.phases)):
                if self._over():
                    break
                if i > first:
                    self._prove_frozen(i - 1)
                    self.state, self.frozen = self.program.enter(i, self.state), None
                if done < run.phases[i].stop:
                    with wall.timed("training"):
                        done = self._phase(i, done)
        if not self._all_failed():
            self._prove_frozen(run.phase_of(done))
        return Ended(self.state, done, [log.rows for log in self.logs.values()], self.failed)

    def _prove_frozen(self, i: int) -> None:
        audit.check_frozen(self.frozen, self.program.frozen_hashes(i, self.state))

    def _judged(self) -> list[str]:
        """The sets that every evaluation predicts: val, and those of candidates."""
        names = ["val", *candidates.names(self.first)]  # val itself is among these where it is the sealed test
        return list(dict.fromkeys(names)) if "val" in self.first.material.data else []

    def _refresh(self, i: int, step: int) -> None:
        if names := single.due(self.first, i, step):
            with self._saved(i, step):
                state = self.program.refresh(i, self.state, names, self.stop_requested)
            self.state = state

    @contextlib.contextmanager
    def _saved(self, i: int, done: int, owed: bool = False):
        """Within the block, which leaves the state alone, a stop is answered by a checkpoint after `done` steps."""

        def save() -> None:
            if done > self.saved:
                self._write_line(wait=True)
                self._read(self.program.take_line(i, self.state, done)[1])
                self._prove_frozen(i)
                self._save(done, owed)
            self.checkpoints.wait()

        try:
            with preemption.saved_by(save):
                yield
        except Preempted:
            save()
            raise

    def _phase(self, i: int, start: int) -> int:
        """Trains phase i from a step on; the step after which it ended."""
        phase, program, compiled, taken = self.first.phases[i], self.program, {}, collections.Counter()
        self._refresh(i, start)
        self.frozen = self.frozen or program.frozen_hashes(i, self.state)
        sets = program.batches(i, self.state, [*phase.plan.fed, *self._judged()], self.stop_requested)
        judged = {name: sets.pop(name) for name in self._judged()}
        if not start and len(judged) > 1:
            with self._saved(i, start):
                self._write_candidates(start, self._predict(i, judged))
        with contextlib.closing(program.iterate(sets, start, phase.stop)) as stream, preemption.saved_by(None):
            batches = feed(self.logs.values(), stream, lambda: self.state.step.is_ready())
            for done in range(start + 1, phase.stop + 1):
                with self._saved(i, done - 1):
                    batch = next(batches)
                    shapes = single.shapes_of(batch)  # of texts there are several
                    if shapes not in compiled:
                        with wall.timed("compiling"):
                            compiled[shapes] = program.compile(i, self.state, batch)
                        if len(compiled) == 1:
                            self._note_cost(i, compiled[shapes][1])
                    step_fn, cost = compiled[shapes]
                    taken[shapes] += 1
                    self.costs.append(cost)
                if done > start + 1:
                    self._refresh(i, done - 1)
                self.state = step_fn(self.state, batch)
                if done == start + 1:
                    self.checkpoints.prepare(self.state)  # while the device is busy
                if self._after_step(i, done, judged):
                    break
        if len(compiled) > 1:
            self._note_cost(i, roofline.mean([(cost, taken[shapes]) for shapes, (_, cost) in compiled.items()]))
        return done

    def _after_step(self, i: int, done: int, judged: Mapping[str, Any]) -> bool:
        """Lines, evaluation, checkpoint; whether training ends early here."""
        last = done == self.first.phases[i].stop
        evaluates, stopping = done % self.eval_every == 0 or last, self.stop_requested(done)
        if done % self.log_every == 0 or last:
            self._write_line(wait=True)
            self.state, self.line = self.program.take_line(i, self.state, done)
        self._write_line(wait=evaluates or stopping)
        if not (evaluates or stopping):
            return self._all_failed()
        self._read(self.program.take_line(i, self.state, done)[1])
        if stopping:  # a checkpoint leaves out what is frozen: prove it while it is there
            self._prove_frozen(i)
        with contextlib.ExitStack() as stack:
            for each in self.logs.values():
                stack.enter_context(each.untimed())
            if evaluates and judged:
                self._evaluate(i, done, judged)
            self._save(done)
        if stopping:
            raise Preempted(f"stopped after step {done} of {self.first.total_steps}")
        return self._over()

    @wall.timed("evaluation")
    def _evaluate(self, i: int, done: int, judged: Mapping[str, Any]) -> None:
        """Scores every run that goes on on val, and writes its candidate."""
        with self._saved(i, done, owed=True):
            task, seen = self.first.task, self._predict(i, judged)
            held_out = self._held_out(i)
        every = ((j, each) for found in seen.values() for j, each in found.items())
        lost = {j: each for j, each in every if isinstance(each, FloatingPointError)}
        self._fail({j: not_finite(done - 1, done, f"its outputs on val are not: {lost[j]}") for j in lost})
        sound = {j: each for j, each in seen["val"].items() if j not in lost}
        scores = {j: {} if each.labels is None else task.scores(each) for j, each in sound.items()}
        if len(seen) > 1:
            further = self._write_candidates(done, {name: {j: found[j] for j in sound} for name, found in seen.items()})
            scores = {j: {**scores[j], **further[j], **held_out} for j in scores}
        for j, values in scores.items():
            if values:
                self.logs[j].evaluated(done, values)
        if self.verbose and len(self.logs) > 1 and any(task.monitor[0][0] in values for values in scores.values()):
            best = max(scores, key=lambda j: tasks.preference(task.monitor, scores[j]))
            name = task.monitor[0][0]
            log(f"step {done}  {len(scores)} replicas, best val {name} {scores[best][name]:.4g} (replica {best})")

    def _predict(self, i: int, judged: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
        """The outputs of every run that goes on on each set."""
        going = list(self._going())
        return {name: self.program.predict(i, self.state, each, going) for name, each in judged.items()}

    def _write_candidates(self, done: int, seen: Mapping[str, Mapping[int, Any]]) -> dict[int, dict[str, float]]:
        """Writes the candidate of every run; the score of each, where a selector chooses."""
        own = {j: {name: found[j] for name, found in seen.items()} for j in seen["val"]}
        sound = {j: x for j, x in own.items() if not any(isinstance(y, FloatingPointError) for y in x.values())}
        return {j: candidates.write(self.folders.get(j), self.program.runs[j], done, x) for j, x in sound.items()}

    def _held_out(self, i: int) -> dict[str, float]:
        """The held-out accuracy of the discriminators of an only run."""
        if len(self.program.runs) > 1:
            return {}
        if i not in self.held_out:
            self.held_out[i] = between.HeldOut(self.first, i, self.parallel, self.stop_requested)
        return self.held_out[i](self.state)

    def _save(self, done: int, owed: bool = False) -> None:
        """Starts a checkpoint; owed: the evaluation on val after this step is not in it, and comes when it goes on."""
        rows = [each.rows for each in self.logs.values()]
        best = {best_step(self.first, each.rows) for each in self._going().values()}
        chooses = len(self.logs) == 1 or self.first.settings.loop.select != "last"
        failed = {str(j): str(error) for j, error in self.failed.items()}
        meta = {**self.identity, "rows": rows, "frozen": self.frozen, "failed": failed}
        meta |= {"owed": True} if owed else {}
        self.checkpoints.save(done, self.state, meta, keep=best if chooses else ())
        self.saved = done

    def _over(self) -> bool:
        """Whether nothing is left to train: every run diverged, or stopped early."""
        return self._all_failed() or stopped_early(self.first, self.logs[0].rows)

    def _all_failed(self) -> bool:
        return len(self.failed) == len(self.logs)

    def _going(self) -> dict[int, RunLog]:
        return {j: log for j, log in self.logs.items() if j not in self.failed}

    def _write_line(self, wait: bool) -> None:
        """Writes the line, if there is one and its sums are there or need to be waited for."""
        line = self.line
        if line is None or not (wait or line.sums["loss"].is_ready()):
            return
        what = "tokens" if self.first.task.spec.name in LANGUAGE else "examples"
        self.line, order = None, self.first.phases[self.first.phase_of(line.step)].plan.sums
        for j, (sums, lr) in self._read(line).items():
            log_training(self.logs[j], line.step, {name: sums[name] for name in order}, lr, what)
        self.tick(line.step, f"{len(self._going())} replicas")

    def _read(self, line: Line) -> dict[int, tuple[dict[str, float], float]]:
        """Sums and learning rate of each run that goes on; notes those that have met a number that is not finite."""
        read = self.program.read_line(line)
        if diverged := {j: bad for j, (*_, bad) in read.items() if bad != steps.NEVER}:
            sound = f"the last sound checkpoint: {max(self.checkpoints.steps(), default='none')}"
            left = sound if len(self.logs) == 1 else "the runs trained together with it go on"
            self._fail({j: not_finite(bad, line.step, left) for j, bad in diverged.items()})
        return {j: read[j][:2] for j in self._going()}

    def _fail(self, errors: Mapping[int, FloatingPointError]) -> None:
        """Notes the runs that diverged; an only run ends with its error."""
        self.failed = {**errors, **self.failed}
        if len(self.logs) == 1:
            for error in self.failed.values():
                raise error

    def _note_cost(self, i: int, cost: dict[str, Any]) -> None:
        runs, count, each = self.program.runs, len(self.logs), single.flops_of_features(self.first, i)
        for j, folder in self.folders.items():
            once = sum(flops * single.kept(runs[j], name) for name, flops in each.items())
            artifacts.note_cost(folder, runs[j], i, {**cost, "flops_of_features": once}, count)
        if count == 1:
            self.logs[0].rates = self._rates

    def _rates(self, count: int, seconds: float) -> Mapping[str, Any]:
        """Further columns of timing.jsonl for the next `count` steps, which took `seconds`."""
        costs = [(self.costs.popleft(), 1) for _ in range(min(count, len(self.costs)))]
        if not costs:
            return {}
        limit = roofline.peak(self.parallel.mesh.devices.flat[0].device_kind)
        dtype, devices = self.first.settings.model.dtype, self.parallel.mesh.size
        return roofline.rates(count / seconds, roofline.mean(costs), limit, dtype, devices)


def identity_of(program: Program) -> dict[str, Any]:
    """What must be the same for a checkpoint to be of this program, as flat tables."""
    first, *others = program.runs
    if not others:
        return first.identity
    runs = {str(j): run for j, run in enumerate(program.runs)}
    options = {j: messages.fingerprint(run.settings.identity) for j, run in runs.items()}
    data = {j: run.material.data[MAIN].fingerprint for j, run in runs.items()}
    return {**first.identity, "replicas": options, "data of replicas": data}


def resume(checkpoints: Checkpoints, identity: Mapping[str, Any], initial: Any) -> tuple[Any, dict[str, Any]]:
    """State and JSON data of the newest intact checkpoint; as the run begins, its state initial(0) and no data.

    initial(step) has the structure of the state after `step` steps. Raises ValueError where the checkpoints are of
    another run: other options, groups, classes, card, data or weights.
    """
    for step in checkpoints.steps():
        try:
            saved = checkpoints.meta(step)
        except ValueError:
            continue  # unreadable: restore_latest passes over it and says so
        listing = []
        for part, now in identity.items():
            difference = config.difference if part == "options" else messages.difference
            if lines := difference(saved.get(part, {}), now):
                listing += [f"{part} (saved -> now):", *lines]
        if listing:
            raise ValueError("the checkpoints are of another run; choose another workdir:\n" + "\n".join(listing))
    restored = checkpoints.restore_latest(initial)
    if restored is None:
        return initial(0), {}
    for message in restored.damaged:
        log(f"passed over: {message}")
    log(f"resumed after step {restored.step}")
    return restored.state, restored.meta


def log_training(run_log: RunLog, step: int, sums: Mapping[str, float], lr: float, what: str) -> None:
    """Writes the means since the last line; what: examples or tokens."""
    counts = {
        name: "steps" if name == "grad_norm" else "examples" for name in sums if name not in ("examples", "steps")
    }
    row = {**{f"train/{name}": sums[name] / sums[count] for name, count in counts.items()}, "train/lr": lr}
    run_log.write(step, row)
    run_log.progress(step, row, sums["examples"], what)


def not_finite(bad_step: int, step: int, left: str) -> FloatingPointError:
    """What a run that diverged ends with; left: what is there of it."""
    return FloatingPointError(
        f"the loss or its gradient was not finite at step {bad_step} (counted from 0), seen after step {step}; {left}. "
        "Likely: lr too high, no warm-up, or clip=0"
    )


def best_step(run: Run, rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The step whose val scores the task prefers, or `select`, where it is a selector; among equals the earliest."""
    select = run.settings.loop.select
    monitor = ((select, "max"),) if select in SELECTORS else run.task.monitor
    scored = [row for row in rows if f"val/{monitor[0][0]}" in row]

    def order(row):
        return tasks.preference(monitor, {name: row.get(f"val/{name}") for name, _ in monitor})

    return max(scored, key=order)["step"] if scored else None


def stopped_early(run: Run, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `patience` evaluations in a row did not improve the best monitored score by more than min_delta."""
    loop, (name, side) = run.settings.loop, run.task.monitor[0]
    if not loop.patience:
        return False
    best, since = -math.inf, 0
    for row in rows:
        if (value := row.get(f"val/{name}")) is None:
            continue
        signed = value if side == "max" else -value
        best, since = (signed, 0) if signed > best + loop.min_delta else (best, since + 1)
        if since >= loop.patience:
            return True
    return False
