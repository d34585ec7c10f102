"""Weights by name: a file is what it was when it was first used, and every refusal says what to do."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_hub import COMMIT, served  # noqa: F401
from test_pretrained import random_variables

from configs import smoke
from tl_jax import __main__ as command
from tl_jax import config as options
from tl_jax import load_run, models
from tl_jax.core import trees
from tl_jax.runtime import sharding
from tl_jax.training.build import build
from tl_jax.training.train import train
from tl_jax.weights import formats, hub, load, published

NAME, OTHER = "resnet18.a1_in1k", "f" * 40
SPEC, FILE = f"timm:{NAME}", "model.safetensors"


def hexes(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def timms(served, tmp_path):  # noqa: F811
    """The local hub with one repository of the table, `name`, whose file is small; and the file of records."""
    served.repo, served.records, served.cache = f"timm/{NAME}", tmp_path / published.RECORDS, tmp_path / "cache"
    return served


def downloads(served):  # noqa: F811
    return sum(command == "GET" for command, _ in served.requests)


def test_files_of_clip_are_named_by_the_network_that_they_were_trained_with():
    quick = [name for name in published.table() if "quickgelu" in name]
    assert len(quick) >= 10 and not any(name.replace("quickgelu_", "") in published.table() for name in quick)
    assert all("_quickgelu_" not in published.table()[name].repo for name in quick)


def test_first_use_records_and_later_ones_ask_nobody(timms):
    path = hub.resolve(SPEC)
    assert path.read_bytes() == timms.files[FILE] and path.parent.name == COMMIT
    assert timms.records.read_text() == f"{SPEC} {COMMIT} {hexes(timms.files[FILE])}\n"
    timms.requests.clear()
    timms.commits.append(OTHER)  # the repository goes on; what is here stays what it was
    assert hub.resolve(SPEC) == path and timms.requests == []


@pytest.mark.parametrize("form", ['"{}"', 'W/"{}"', "{}"])
@pytest.mark.parametrize("cdn", ["", "http://localhost"])
def test_the_hash_of_the_hub_is_read_in_every_form_and_through_a_redirect(timms, form, cdn):
    timms.form, timms.cdn = form, cdn and f"{cdn}:{timms.port}"
    assert hub.resolve(SPEC).resolve().name == hexes(timms.files[FILE])
    shutil.rmtree(timms.cache)
    timms.etags[FILE] = "0" * 64
    with pytest.raises(ValueError, match=f"the hub says {'0' * 64}"):
        hub.resolve(SPEC)


def test_without_a_hash_of_the_hub_the_record_is_what_counts(timms):
    timms.etags[FILE] = "weak"
    path = hub.resolve(SPEC)
    path.resolve().write_bytes(b"rotten")
    with pytest.raises(ValueError, match=rf"found revision {COMMIT} with sha256 {hexes(b'rotten')}, expected"):
        hub.resolve(SPEC)


def test_another_file_or_revision_is_refused_until_the_record_is_removed(timms):
    hub.resolve(SPEC)
    was = hexes(timms.files[FILE])
    expected = rf"expected revision {COMMIT} with sha256 {was}, as {timms.records} recorded at .* remove its line there"
    shutil.rmtree(timms.cache)
    timms.files[FILE] = b"another"
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"found revision {COMMIT} with sha256 {hexes(b'another')}, {expected}"):
            hub.resolve(SPEC)
    shutil.rmtree(timms.cache)
    timms.commits.append(OTHER)
    timms.requests.clear()
    with pytest.raises(ValueError, match=rf"found revision {OTHER}, {expected}; .* is {SPEC}@{COMMIT}"):
        hub.resolve(SPEC)
    assert downloads(timms) == 0 and not timms.cache.exists()
    timms.records.unlink()
    assert hub.resolve(SPEC).parent.name == OTHER
    assert timms.records.read_text() == f"{SPEC} {OTHER} {hexes(b'another')}\n"


def test_an_older_revision_is_named_behind_the_name_and_has_its_own_record(timms):
    hub.resolve(SPEC)
    timms.commits.append(OTHER)
    shutil.rmtree(timms.cache)
    assert hub.resolve(f"{SPEC}@{COMMIT}").parent.name == COMMIT
    assert [line.split()[0] for line in timms.records.read_text().splitlines()] == [SPEC, f"{SPEC}@{COMMIT}"]


def test_a_pin_takes_the_place_of_the_record(timms):
    hub.resolve(f"{SPEC}#sha256={hexes(timms.files[FILE])}")
    assert not timms.records.exists()
    with pytest.raises(ValueError, match=f"expected {'0' * 64}"):
        hub.resolve(f"{SPEC}#sha256={'0' * 64}")
    timms.records.write_text(f"{SPEC} {OTHER} {'0' * 64}\n")
    hub.resolve(f"{SPEC}#sha256={hexes(timms.files[FILE])}")


def test_offline_the_cache_counts_with_a_record_and_without(timms, monkeypatch):
    path = hub.resolve(SPEC)
    timms.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.resolve(SPEC) == path
    timms.records.unlink()  # as if another program had filled the cache
    assert hub.resolve(SPEC) == path and timms.records.exists() and timms.requests == []


@pytest.mark.parametrize("recorded", [False, True])
def test_offline_without_the_file_the_message_is_a_recipe_that_works(timms, monkeypatch, recorded):
    if recorded:
        hub.resolve(SPEC)
        shutil.rmtree(timms.cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = timms.cache / f"models--timm--{NAME}"
    with pytest.raises(FileNotFoundError, match="not in the local cache, and HF_HUB_OFFLINE is set; bring") as error:
        hub.resolve(SPEC)
    text = str(error.value)
    place = f"{FILE} of the repository timm/{NAME} to {folder}/snapshots/{COMMIT if recorded else 'COMMIT'}/{FILE}"
    assert place in text and (f"{folder}/refs/main" in text) != recorded
    card = "data.override_card=True and data.card={'interpolation': 'bicubic', 'crop': 0.95}"
    assert text.endswith(f"give weights=PATH with model.name=resnet18, {card}")
    file = folder / "snapshots" / COMMIT / FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(timms.files[FILE])
    if not recorded:
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(COMMIT)
    assert hub.resolve(SPEC) == file
    file.write_bytes(b"another file")
    with pytest.raises(ValueError, match="To accept the new one, remove its line there"):
        hub.resolve(SPEC)


def test_hf_home_says_where_the_cache_and_the_records_lie(timms, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert hub.resolve(SPEC).is_relative_to(tmp_path / "home/hub")
    assert (tmp_path / "home" / published.RECORDS).exists()


def test_a_repository_or_file_that_is_gone_is_named(timms):
    timms.files.clear()
    with pytest.raises(FileNotFoundError, match=f"'timm/{NAME}' has no file '{FILE}'"):
        hub.resolve(SPEC)
    timms.repo = "owner/name"
    with pytest.raises(FileNotFoundError, match=f"no repository 'timm/{NAME}'"):
        hub.resolve(SPEC)


def test_records_that_cannot_be_written_or_read_say_what_to_do(timms, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(published.files, "write_text", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only")))
        with pytest.raises(OSError, match=rf"{SPEC}: .*Read-only.* append #sha256={hexes(timms.files[FILE])}"):
            hub.resolve(SPEC)
    hub.resolve(SPEC)
    timms.records.write_text(f"{timms.records.read_text()}{SPEC} cut\n")
    with pytest.raises(ValueError, match=rf"{timms.records}: line 2 is damaged, expected SPEC REVISION SHA256; remove"):
        hub.resolve(SPEC)


def test_many_at_once_record_each_file_once(tmp_path):
    path, found = tmp_path / published.RECORDS, published.Record(COMMIT, "0" * 64)
    specs = [f"timm:{i % 5}" for i in range(40)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda spec: published.check(spec, found, path), specs))
    assert sorted(path.read_text().splitlines()) == [f"timm:{i} {COMMIT} {'0' * 64}" for i in range(5)]
    with pytest.raises(ValueError, match=f"found revision {OTHER} .* expected revision {COMMIT}"):
        published.check("timm:1", found._replace(revision=OTHER), path)


@pytest.mark.slow
def test_two_processes_at_once_download_and_record_the_same(timms):
    code = f"from tl_jax.weights import hub; input(); print(hub.resolve({SPEC!r}))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    root = pathlib.Path(__file__).parents[1]
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=root, env=dict(os.environ), **pipes) for _ in range(2)]
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    paths = {process.communicate(timeout=120)[0].strip() for process in both}
    assert paths == {str(hub.resolve(SPEC))} and [process.returncode for process in both] == [0, 0]
    assert len(timms.records.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet50", "resnet50.a1_in1k, .*resnet50.tv2_in1k"),
        ("resnet50.a1_in2k", "nearest: resnet50.a1_in1k"),
        ("vit_base_patch32_clip_224.openai", "vit_base_patch32_clip_quickgelu_224.openai"),
        ("timm/resnet50.tv_in1k", "resnet50.tv_in1k"),
        ("", "nearest: none"),
    ],
)
def test_a_name_that_is_not_in_the_table_gets_the_nearest_and_the_command_that_lists_all(name, near):
    with pytest.raises(ValueError, match=rf"timm:{name}: .*{near}.* `python -m tl_jax inspect timm:` lists all"):
        hub.resolve(f"timm:{name}")


def test_inspect_lists_the_names(capsys):
    assert command.main(["inspect", "timm:"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(published.table()) + 3 and lines[0].split() == ["file", "licence", "pixels", "classes"]
    assert lines[2].split() == [NAME, "apache-2.0", "224", "1,000"]


@pytest.fixture
def small(timms, tmp_path):
    """A published file of a small network, in timm's layout and without a card: (spec, variables)."""
    name = "mobilenetv3_small_050"
    variables, file = random_variables(name), tmp_path / "w.safetensors"
    load.export(variables, name, file, card=models.get(name).card)
    formats.write_safetensors(file, formats.read(file)[0], {})
    timms.repo, timms.files[FILE] = f"timm/{name}.lamb_in1k", file.read_bytes()
    return f"timm:{name}.lamb_in1k", variables


def test_the_table_gives_model_and_card_and_the_card_says_where_the_bytes_are_from(small, timms, capsys):
    spec, variables = small
    row = published.find(spec)
    loaded = load.load("", spec)
    where = {"source": f"hf://{row.repo}/{FILE}@{COMMIT}", "sha256": hexes(timms.files[FILE])}
    assert loaded.card == row.card(models.get(row.model).card).replace(**where)
    fields = ("mean", "std", "interpolation", "crop", "crop_mode", "input_size", "num_classes", "licence")
    assert all(getattr(loaded.card, field) == getattr(row, field) for field in fields)
    squashed = published.table()["convnext_tiny.fb_in22k_ft_in1k_384"]
    assert squashed.card(loaded.card).crop_mode == "squash"
    for path, value in trees.flatten(variables).items():
        np.testing.assert_array_equal(trees.flatten(loaded.variables)[path], value)
    assert command.main(["inspect", spec]) == 0
    assert f"card {loaded.card.to_json()}" in capsys.readouterr().out


def test_a_model_that_contradicts_the_table_is_refused_before_anything_is_asked(timms):
    with pytest.raises(
        ValueError, match=rf"{SPEC} holds weights of 'resnet18', asked for was 'resnet50': give the first"
    ):
        load.load("resnet50", SPEC)
    assert timms.requests == []


@pytest.fixture
def glyphs(timms, monkeypatch, tmp_path):
    """A config whose weights are a name of the table, which gives the model; no card is in the file."""
    file, card = tmp_path / "glyphs.safetensors", models.get("resnet8_cifar").card
    formats.write_safetensors(file, formats.read(hub.ASSETS / "glyphs.safetensors")[0], {})
    row = published.File(
        NAME, "owner/glyphs", FILE, "resnet8_cifar", 26, 16, card.mean, card.std, "bilinear", 1.0, "center", "mit"
    )
    monkeypatch.setattr(published, "table", lambda: {NAME: row})
    timms.repo, timms.files[FILE] = row.repo, file.read_bytes()
    return options.override(smoke.get_config(), {"model.name": "", "model.weights": SPEC})


def test_a_config_takes_its_model_from_the_name_and_one_that_contradicts_is_refused(glyphs, timms):
    run = build(glyphs, sharding.make_parallel())
    assert run.settings.model.name == "resnet8_cifar"
    assert run.material.card.source.startswith(f"hf://owner/glyphs/{FILE}@{COMMIT} -> digits")
    assert run.material.base == {"file": SPEC, "sha256": hexes(timms.files[FILE])}
    with pytest.raises(ValueError, match=r"weights of 'resnet8_cifar', asked for was 'resnet18'"):
        build(options.override(glyphs, {"model.name": "resnet18"}), sharding.make_parallel())


@pytest.mark.slow
def test_a_finished_run_keeps_repository_revision_and_sha256(glyphs, timms, tmp_path):
    train(glyphs, tmp_path / "w")
    card, sha256 = load_run(tmp_path / "w").model.card, hexes(timms.files[FILE])
    assert card.source.startswith(f"hf://owner/glyphs/{FILE}@{COMMIT} -> digits")
    assert (card.sha256, card.licence, card.input_size) == (sha256, "mit", 16)
    assert json.loads((tmp_path / "w/result.json").read_text())["weights_sha256"] == sha256
