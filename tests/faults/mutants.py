"""Planted faults: one change of the code each, and the tests that have to notice it; see test_mutants.py."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 900  # seconds for the tests of one fault
LEFT_OUT = shutil.ignore_patterns(".git", "workdirs", ".venv", "__pycache__", ".*_cache")


class Mutant(NamedTuple):
    """fault: in words. file: in tl_jax. old: occurs there once. tests: what pytest gets, relative to tests/."""

    fault: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    # the step
    Mutant("the random key is the same in every step", "training/steps.py",
           "key = jax.random.fold_in(state.key, state.step)\n        if plan", "key = state.key\n        if plan",
           "test_steps.py -k random"),
    Mutant("all devices draw the same random numbers", "training/steps.py",
           "key = jax.random.fold_in(key, jax.lax.axis_index(plan.axis_name))", "pass", "test_steps.py -k random"),
    Mutant("the turns of a step draw the same random numbers", "training/steps.py",
           "jax.random.fold_in(key, i) if i else key)", "key)", "test_turns.py -k random"),
    Mutant("updated statistics of BatchNorm are forgotten", "training/steps.py",
           'return out, {**batch_stats, **updates.get("batch_stats", {})}', "return out, batch_stats",
           "test_steps.py -k full_fine_tuning"),
    Mutant("the decay of the moving average is one minus itself", "training/steps.py",
           "state.ema, 1 - plan.ema)", "state.ema, plan.ema)", "test_steps.py -k moving_average"),
    Mutant("the moving average takes statistics that are frozen", "training/steps.py",
           "statistics = updated_statistics(batch_stats, plan.frozen_norms)\n    return",
           "statistics = updated_statistics(batch_stats, ())\n    return", "test_steps.py test_phases.py -k average"),
    Mutant("accumulated gradients are summed, not averaged", "training/steps.py",
           "lambda g: g / count, grads", "lambda g: g, grads", "test_steps.py -k accumulated"),
    Mutant("a loss that is not finite goes unnoticed", "training/steps.py",
           "jnp.where(finite, NEVER, state.step)", "jnp.where(finite, NEVER, NEVER)", "test_steps.py -k nan"),
    Mutant("gradients of devices are summed, not averaged", "training/steps.py",
           "jax.lax.pmean((grads, statistics)", "jax.lax.psum((grads, statistics)",
           "test_steps.py -k devices_and_mode"),
    Mutant("progress counts from the beginning of the run, not of the phase", "training/steps.py",
           "progress = (step - plan.start) / plan.length", "progress = step / plan.length",
           "test_steps.py -k progress"),
    Mutant("a turn moves the optimizer values of other groups", "training/steps.py",
           "opt_state = optim.select_groups(state.opt_state, opt_state, turn.groups) if turn else opt_state", "pass",
           "test_turns.py"),
    Mutant("inputs are normalised with the mean not over the deviation", "training/steps.py",
           "- (mean / std).reshape(axes)", "- mean.reshape(axes)", "test_steps.py -k shifted"),
    # the optimizer
    Mutant("the cosine is one step too long", "training/optim.py",
           "jnp.minimum(k / steps, 1.0))))", "jnp.minimum(k / (steps + 1), 1.0))))",
           "test_optim.py -k 'schedule or cosine'"),
    Mutant("the warm-up ends below the peak", "training/optim.py",
           "peak * (count + 1) / (warmup_steps + 1)", "peak * (count + 1) / (warmup_steps + 2)",
           "test_optim.py -k schedule"),
    Mutant("gradients are not clipped", "training/optim.py",
           "return optax.chain(clip_norm, tx)", "return tx", "test_optim.py -k clip"),
    Mutant("weight decay acts on biases too", "training/optim.py",
           "group.weight_decay > 0 and re.fullmatch(group.decay, path) is not None", "group.weight_decay > 0",
           "test_optim.py -k decay"),
    Mutant("what becomes trainable late has the rate of step 0", "training/optim.py",
           "steps = count - offset", "steps = count", "test_optim.py -k trainable"),
    Mutant("a new phase begins with new moments", "training/optim.py",
           "return value if leaf.ndim else jnp.array(value)", "return leaf", "test_optim.py -k phases"),
    # checkpoints and files
    Mutant("a checkpoint is not forced to the disk", "runtime/leaves.py",
           "os.ftruncate(file, sum(map(len, pieces)))\n        os.fsync(file)",
           "os.ftruncate(file, sum(map(len, pieces)))", "faults/test_durable.py"),
    Mutant("the index of a checkpoint is not forced to the disk", "runtime/leaves.py",
           "file.flush()\n        os.fsync(file.fileno())", "file.flush()", "faults/test_durable.py"),
    Mutant("a file is not forced to the disk before it gets its name", "core/files.py",
           "file.flush()\n            os.fsync(file.fileno())", "file.flush()", "faults/test_durable.py"),
    Mutant("the oldest checkpoint is restored", "runtime/checkpoint.py",
           "for step in reversed(self.steps()):", "for step in self.steps():", "test_checkpoint.py -k damaged"),
    Mutant("a changed leaf of a checkpoint is taken", "runtime/leaves.py",
           'return leaf if trees.leaf_hash(leaf) == entry["sha256"] else None', "return leaf",
           "test_checkpoint.py -k 'flipped or damaged'"),
    Mutant("a full disk is noticed while a checkpoint is written", "runtime/checkpoint.py",
           "shutil.disk_usage(self._folder).free) < needed:", "shutil.disk_usage(self._folder).free) < 0:",
           "test_checkpoint.py -k full_disk"),
    Mutant("two launchers may work in one folder", "core/files.py",
           "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n        except",
           "pass\n        except", "test_train.py test_bookkeeping.py test_run.py -k 'two or lock or process'"),
    Mutant("a run is claimed by two workers", "studies/store.py",
           'if not taken or (folder / "result.json").exists()', 'if (folder / "result.json").exists()',
           "test_store.py -k 'killed or states'"),
    Mutant("a frozen leaf that moved is not told", "training/audit.py",
           "def check_frozen(start: Mapping[str, str], end: Mapping[str, str]) -> None:",
           "def check_frozen(start: Mapping[str, str], end: Mapping[str, str]) -> None:\n    return\n",
           "test_audit.py"),
    Mutant("changed files of a finished run are taken", "core/manifest.py",
           'if found != (expected := hashes.get(name, "no entry")):',
           'expected = hashes.get(name, "no entry")\n        if found == "no file":', "test_manifest.py"),
    # data
    Mutant("batches are off by one example", "data/pipeline.py",
           "np.arange(step * size, (step + 1) * size)\n        indices",
           "np.arange(step * size, (step + 1) * size) + 1\n        indices", "test_data_pipeline.py -k epoch"),
    Mutant("the last batch of an evaluation is dropped", "data/pipeline.py",
           "return -(-len(self.source) // self.batch_size)", "return len(self.source) // self.batch_size",
           "test_data_pipeline.py -k evaluation"),
    Mutant("padding holds the last example", "data/pipeline.py",
           "        for values in batch.values():\n            values[rows.index < 0] = 0\n", "",
           "test_data_pipeline.py -k evaluation"),
    Mutant("labels are shifted by one example", "data/pipeline.py",
           "batch[LABEL] = source.labels[rows.index]", "batch[LABEL] = source.labels[np.roll(rows.index, 1)]",
           "test_data_pipeline.py"),
    Mutant("every process reads the slice of the first", "data/pipeline.py",
           "here = slice(self.process_index * size, (self.process_index + 1) * size)", "here = slice(0, size)",
           "test_data_pipeline.py -k processes"),
    Mutant("an example is augmented alike in every epoch", "data/pipeline.py",
           "rows.index.tolist(), rows.domain.tolist(), rows.counter.tolist()\n        for",
           "rows.index.tolist(), rows.domain.tolist(), rows.index.tolist()\n        for",
           "test_data_pipeline.py -k augmented"),
    Mutant("every epoch has the same order", "data/order.py",
           "np.random.default_rng([seed, block])", "np.random.default_rng([seed, 0])",
           "test_data_pipeline.py -k epoch"),
    Mutant("all images are mirrored", "data/image/ops.py",
           "image[:, ::-1] if rng.random() < probability else image", "image[:, ::-1]", "test_data_ops.py -k flip"),
    Mutant("the margin of a crop is cut off, not rounded", "data/image/ops.py",
           "top, left = (round((side - want) / 2)", "top, left = (int((side - want) / 2)",
           "test_data_ops.py test_inputs.py -k evaluation"),
    Mutant("what is left out is trained on too", "data/resample.py",
           "(np.delete(np.arange(len(labels)), held), held)", "(np.arange(len(labels)), held)",
           "test_resample.py test_probes.py"),
    Mutant("sealed labels can be read as an array", "data/sealed.py",
           "    __getitem__ = __array__ = __iter__ =",
           "    __array__ = lambda self, *_, **__: self._values\n    __getitem__ = __iter__ =",
           "test_sealed_labels.py -k read"),
    # caches
    Mutant("cached features do not depend on the data", "training/feature_cache.py",
           '"data": batches.source.fingerprint', '"data": ""', "test_features.py -k depend"),
    Mutant("cached features do not depend on the weights", "training/frozen_columns.py",
           '"weights": messages.fingerprint(trees.leaf_hashes(leaves))', '"weights": ""', "test_features.py -k values"),
    Mutant("damaged features are taken", "training/feature_cache.py",
           'if (meta.get("key"), meta.get("sha256")) == (cached.key, _sha256(cached, stop_requested)):',
           'if meta.get("key") == cached.key:', "test_features.py -k damaged"),
    # losses
    Mutant("smoothed labels do not sum to one", "tasks/losses.py",
           "+ smoothing / num_classes", "+ smoothing / (num_classes - 1)", "test_losses.py"),
    Mutant("the weight of positives is that of negatives", "tasks/losses.py",
           "targets * jax.nn.softplus(-x) + (1.0 - targets) * jax.nn.softplus(x)",
           "(1.0 - targets) * jax.nn.softplus(x) + targets * jax.nn.softplus(-x)", "test_losses.py -k binary"),
    Mutant("a reversed gradient is not reversed", "methods/term.py",
           "((-strength * gradient)", "((strength * gradient)", "test_domain_terms.py -k reverse"),
    Mutant("the discrepancy counts pairs across domains once", "methods/domain/discrepancy.py",
           "- 2 * across.mean()", "- across.mean()", "test_domain_terms.py -k formulas"),
    Mutant("CORAL divides by D, not by its square", "methods/domain/discrepancy.py",
           "/ (4 * x.shape[-1] ** 2)", "/ (4 * x.shape[-1])", "test_domain_terms.py -k formulas"),
    Mutant("distillation has the divergence the wrong way round", "methods/distill.py",
           "jnp.exp(p) * (p - q)", "jnp.exp(q) * (q - p)", "test_distill.py -k answers"),
    Mutant("LoRA is not scaled by its rank", "models/peft.py",
           "return alpha / b.shape[0] *", "return alpha *", "test_adapt.py -k papers_formula"),
    # numbers
    Mutant("the last example is never drawn by the bootstrap", "tasks/intervals.py",
           "rng.integers(count, size", "rng.integers(count - 1, size", "test_metrics.py test_tasks.py"),
    Mutant("an interval of 95 % leaves out 5 % on each side", "tasks/intervals.py",
           "[(1 - level) / 2, (1 + level) / 2]", "[1 - level, level]", "test_metrics.py -k interval"),
    Mutant("ties count as won in the ROC curve", "tasks/intervals.py",
           "negatives[1::2] / 2", "negatives[1::2]", "test_metrics.py -k sklearn"),
    Mutant("the deviation over seeds divides by their number", "studies/report/statistics.py",
           "values.std(ddof=1)", "values.std(ddof=0)", "test_statistics.py -k scipy"),
    Mutant("Holm's correction is Bonferroni's of the rank below", "studies/report/statistics.py",
           "np.arange(len(order), 0, -1)", "np.arange(len(order) - 1, -1, -1)", "test_statistics.py -k holm"),
    # weights
    Mutant("kernels come in transposed", "models/conversion.py",
           "lambda w: w.transpose(2, 3, 1, 0)", "lambda w: w.transpose(3, 2, 1, 0)", "test_pretrained_parity.py"),
    Mutant("other bytes than the hub's are taken", "weights/hub.py",
           "if found != blob.name:", "if not found:", "test_hub.py -k wrong"),
    Mutant("other bytes than a file's name says are taken", "weights/hub.py",
           "if hashed and not found.startswith(name[1]):", "if hashed and not found:",
           "test_weights_sanity.py -k hash"),
    Mutant("a changed file of an export is taken", "serving/artefact.py",
           'found = files.sha256(folder / name) if name in there else "no file"',
           'found = expected if name in there else "no file"', "test_export.py -k 'flipped or changed'"),
)  # fmt: skip


def tree(folder: pathlib.Path) -> pathlib.Path:
    """A copy of the working tree; shared material is found beside it, as beside the tree itself."""
    copy = folder / "tree"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return copy


def passes(copy: pathlib.Path, tests: str) -> tuple[bool, str]:
    """Whether tests pass in a copy, and what they print; RuntimeError where none ran, or they could not begin."""
    paths = re.sub(r"\S+\.py\b", r"tests/\g<0>", tests)
    words = ["bash", "-c", f"exec {sys.executable} -m pytest -n 0 -x -q -m 'not exhaustive' {paths}"]
    environment = {name: x for name, x in os.environ.items() if name != "BATTERY"}
    done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest {tests} ended with code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr}")
    return done.returncode == 0, done.stdout


def plant(copy: pathlib.Path, mutant: Mutant) -> str:
    """Writes the fault into a copy; returns the file's text of before."""
    path = copy / "tl_jax" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise RuntimeError(f"{mutant.fault}: {mutant.file} has {mutant.old!r} {text.count(mutant.old)} times, not once")
    path.write_text(text.replace(mutant.old, mutant.new))
    return text


def killed_by(copy: pathlib.Path, mutant: Mutant) -> str:
    """The first test that notices a fault, "" where none does."""
    text = plant(copy, mutant)
    try:
        good, printed = passes(copy, mutant.tests)
    finally:
        (copy / "tl_jax" / mutant.file).write_text(text)
    if good:
        return ""
    return next((line.split()[1] for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))), "pytest")
