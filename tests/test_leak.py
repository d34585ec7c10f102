"""The leak test: poisoned target labels change nothing that is decided, and planted leaks are found and named."""

import pathlib

import numpy as np
import pytest
from candidate_runs import config_of, load, make_tables  # noqa: F401

from tl_jax.core import files
from tl_jax.data import pipeline, sources
from tl_jax.studies import command, leak
from tl_jax.training import candidates, loop


@pytest.mark.slow
def test_the_poison_proof_passes_and_the_result_says_so(tables, tmp_path):
    _, differences = leak.prove(config_of(tables, select="infomax"), tmp_path / "w", verbose=False)
    assert differences == []
    result = files.read_json(tmp_path / "w" / "result.json")
    assert result["leak_test"] == "passed"
    poisoned = files.read_json(tmp_path / "w" / "poison" / "none" / "result.json")
    assert poisoned["poison"] == "none"
    scored = [found["extra_eval"]["target_test"]["accuracy"]["value"] for found in (result, poisoned)]
    assert scored[0] != scored[1]  # the poison was there
    rows = files.read_json(tmp_path / "w" / "poison" / "permuted" / "ledger.json")["openings"]
    clean = files.read_json(tmp_path / "w" / "ledger.json")["openings"]
    differ = [a["stream"] for a, b in zip(rows, clean, strict=True) if a["sha256"] != b["sha256"]]
    assert differ == ["target_test", "held_out"]
    assert {"metrics.jsonl", "choices.json", "trained.safetensors"} <= set(leak.decided(tmp_path / "w"))
    assert any(what.startswith("checkpoints/6: ") for what in leak.decided(tmp_path / "w"))
    again, _ = leak.prove(config_of(tables, select="infomax"), tmp_path / "w", verbose=False)
    assert again["result"]["leak_test"] == "passed"


@pytest.mark.slow
def test_nothing_is_proved_where_nothing_is_sealed(tables, tmp_path):
    plain = {"streams": {}, "terms": {}, "data.candidates": (), "data.extra_eval": (), "total": (1.0, "steps")}
    with pytest.raises(ValueError, match="has no sealed labels, so that nothing can be proved"):
        leak.prove(config_of(tables, **plain), tmp_path / "w", verbose=False)


def plant_stratified(monkeypatch):
    real = sources._permutation
    monkeypatch.setattr(sources, "_permutation", lambda source, seed: real(source.opened(), seed))


FOLDERS: list[pathlib.Path] = []


def plant_choice(monkeypatch):
    def best(run, rows):
        labels = run.material.data["target_test"].opened().labels
        folder = FOLDERS[-1] if FOLDERS else None
        steps = [row["step"] for row in rows if "val/accuracy" in row]
        hits = {
            s: (candidates.read(candidates.path_of(folder, s))["test_logits"].argmax(1) == labels).mean() for s in steps
        }
        return min(hits, key=lambda s: (-hits[s], s)) if hits else None

    real = candidates.write
    monkeypatch.setattr(candidates, "write", lambda folder, *rest: (FOLDERS.append(folder), real(folder, *rest))[1])
    monkeypatch.setattr(loop, "best_step", best)
    monkeypatch.setattr("tl_jax.training.train.best_step", best)


TABLES: list[pathlib.Path] = []
POISON: list[str] = []


def plant_selector(monkeypatch):
    real = candidates.scores_of

    def scores(paths):
        found = real(paths)
        labels = load(TABLES[-1], "train[75%:]", poison=POISON[-1]).opened().labels
        hits = [(candidates.read(path)["test_logits"].argmax(1) == labels).mean() for path in paths]
        return found | {"entropy": [float(hit) for hit in hits]}

    real_choose = candidates.choose
    monkeypatch.setattr(
        candidates, "choose", lambda run, *rest: (POISON.append(run.settings.data.poison), real_choose(run, *rest))[1]
    )
    monkeypatch.setattr(candidates, "scores_of", scores)


def plant_term(monkeypatch):
    """A stream that leaks its labels into what is trained on: the first column of its inputs."""
    real = pipeline.Batches.index

    def index(self, step):
        batch = real(self, step)
        if self.source.sealed and "mask" not in batch and not hasattr(self, "num_workers"):
            labels = self.source.labels.open()[batch["index"]]
            batch["table"] = batch["table"] + 0.1 * labels[:, None].astype(np.float32)
        return batch

    monkeypatch.setattr(pipeline.Batches, "index", index)


PLANTS = {
    "slices": (plant_stratified, "fingerprint of target"),
    "term": (plant_term, "trained.safetensors"),
    "selector": (plant_selector, "choices.json"),
    "checkpoint": (plant_choice, "selected step"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant", ["selector", *(pytest.param(p, marks=pytest.mark.slow) for p in ("slices", "term", "checkpoint"))]
)
def test_a_planted_leak_fails_the_test_and_is_named(plant, tables, tmp_path, monkeypatch):
    TABLES.append(tables)
    make, named = PLANTS[plant]
    make(monkeypatch)
    select = "best_val" if plant == "checkpoint" else "last"
    steps = 2.0 if plant == "selector" else 8.0
    config = config_of(tables, select=select, lr=0.4, eval_every=(1.0, "steps"), total=(steps, "steps"))
    _, differences = leak.prove(config, tmp_path / "w", verbose=False)
    assert any(named in line for line in differences), differences
    assert files.read_json(tmp_path / "w" / "result.json")["leak_test"].startswith("failed: ")


@pytest.mark.slow
def test_the_command_proves_and_fails_where_labels_decide(tables, tmp_path, monkeypatch, capsys):
    config = config_of(tables, total=(2.0, "steps"))
    monkeypatch.setattr(command, "read_config", lambda *_: config)
    argv = ["--config", "c.py", "--workdir", str(tmp_path / "w"), "--prove-no-leak"]
    assert command.main(argv) == 0
    assert "leak test: passed" in capsys.readouterr().out
    plant_stratified(monkeypatch)
    argv[3] = str(tmp_path / "leaky")
    assert command.main(argv) == 1
    assert "leak test: FAILED" in (error := capsys.readouterr().err) and "fingerprint of target" in error
    assert command.main(["--study", "s", "--prove-no-leak"]) == 2
