"""Options as flat tables: setting them, reading them back, naming a run by them, and refusing what is invalid."""

import importlib
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from configs import methods, transfer
from tl_jax import config as options
from tl_jax.core import files
from tl_jax.core.options import OPTIONS
from tl_jax.methods import probes, recipes
from tl_jax.runtime import workdir

CONFIGS = sorted(path.stem for path in pathlib.Path("configs").glob("*.py"))


def get_config(name):
    return importlib.import_module(f"configs.{name}").get_config()


def change(**values):
    return options.override(options.make().lock(), {key.replace("__", "."): value for key, value in values.items()})


def test_override_sets_options_in_a_copy():
    config = options.make().lock()
    changed = options.override(config, {"lr": 1, "method.name": "full", "total": (3, "steps")})
    assert (changed.lr, changed.method.name, changed.total) == (1.0, "full", (3, "steps"))
    assert (config.lr, config.method.name, config.total) == (1e-3, "linear_probe", (10.0, "epochs"))
    assert changed.is_locked and options.flatten(options.override(config, {})) == options.flatten(config)


def test_override_replaces_a_section_that_starts_empty_whole():
    config = options.override(transfer.get_config(), {
        "groups": {"backbone": {"lr_mult": 0.1}, "head": {"weight_decay": 0.0}}, "optimizer_args": {"b1": 0.8},
    })  # fmt: skip
    changed = options.override(config, {"groups": {"head": {"lr_mult": 2.0}}, "optimizer_args": {}})
    assert changed.groups.to_dict() == {"head": {"lr_mult": 2.0}} and changed.optimizer_args.to_dict() == {}
    assert config.groups.backbone.lr_mult == 0.1
    assert options.override(config, {"groups.backbone.lr_mult": 0.5}).groups.head.weight_decay == 0.0
    with pytest.raises(ValueError, match=r"'schedule' = .*set its options one by one"):
        options.override(config, {"schedule": {"name": "linear"}})


def test_override_lists_everything_that_does_not_fit_with_hints():
    with pytest.raises(ValueError) as error:
        change(metod__name="full", method__nme="full", lr="high", total=3, groups=4, method__name__x=1)
    message = str(error.value)
    for part in (
        "'metod.name' does not exist (did you mean 'method.name'?)",
        "'method.nme' does not exist (did you mean 'method.name'?)",
        "'lr' = 'high'", "'total' = 3", "'groups' = 4", "'method.name.x' does not exist",
    ):  # fmt: skip
        assert part in message, part


@pytest.mark.parametrize("name", CONFIGS)
def test_a_flat_table_gives_the_config_back(name):
    """Through JSON, as it lies in config.json, and with phases, groups and penalties in it."""
    config = get_config(name)
    if name == "methods":
        lp_ft = options.override(config, methods.methods(4.0)["lp_ft"])
        config = options.override(lp_ft, {
            "terms": {"l2_sp": {"alpha": 0.1}}, "schedule.args": {"final": 0.1},
            "data.extra_eval": (("other", "digits", "test"),), "groups": {"head": {"args": {"b1": 0.8}}},
        })  # fmt: skip
    table = json.loads(json.dumps(options.flatten(config)))
    again = options.from_flat(table)
    assert options.flatten(again) == options.flatten(config) == table
    assert type(again) is ConfigDict and again.is_locked
    # Not only the same as JSON: what reads the config finds what it expects.
    assert again.total == config.total and again.phases == config.phases and again.groups == config.groups
    assert options.fingerprint(options.from_flat(options.identity(config))) == options.fingerprint(config)
    changed = options.override(again, {"lr": 0.5, "phases": (), "groups": {}})
    assert changed.lr == 0.5 and changed.phases == () and "groups" in changed


def test_the_fingerprint_does_not_depend_on_the_order_of_keys():
    config = options.override(transfer.get_config(), {"groups": {"a": {"lr_mult": 1.0, "weight_decay": 2.0}, "b": {}}})
    table = options.flatten(config)
    turned = {key: table[key] for key in sorted(table, reverse=True)}
    turned["groups"] = {"b": {}, "a": {"weight_decay": 2.0, "lr_mult": 1.0}}
    assert options.fingerprint(options.from_flat(turned)) == options.fingerprint(config)
    regularized = [change(terms={"delta": args}) for args in ({"a": 1, "b": 2}, {"b": 2, "a": 1})]
    assert options.fingerprint(regularized[0]) == options.fingerprint(regularized[1])


def other_value(value):
    """A value of the same type that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return {**value, "x": 1} if isinstance(value, dict) else [*value, "x"]


def test_the_fingerprint_changes_with_every_option_that_decides_numbers():
    table, unchanged = options.flatten(options.make()), options.fingerprint(options.make())
    prints = {key: options.fingerprint(options.from_flat({**table, key: other_value(table[key])})) for key in table}
    same = {key for key, value in prints.items() if value == unchanged}
    assert same == {key for key in OPTIONS if not OPTIONS[key].numbers}
    assert same == {"model.weights_sha256", "data.workers", "cache_dir", "fsdp", "log", "feature_map"}
    assert len(set(prints.values())) == 1 + len(table) - len(same)


# The defaults at their introduction. A new option adds a line; no line is ever edited, see Option.initial.
INITIAL = """
{"seed": 0, "task": "classification", "task_args": {}, "terms": {}, "model.name": "resnet18", "model.weights": "",
"model.image_size": 0, "model.keep_head": false, "model.reinit": [], "model.head": [], "model.head_init": "zeros",
"model.dtype": "float32", "model.prefix_dtype": "", "model.dropout": 0.0, "model.drop_path": 0.0, "model.remat": "",
"model.attention": "xla", "networks": {}, "data.source": "digits", "data.train": "train[:80%]", "data.val":
"train[80%:]", "data.test": "", "data.extra_eval": [], "data.labels": [], "data.text": [], "data.resample": "",
"data.group": "",
"data.allow_duplicates": false, "data.shots": 0,
"data.sampling": "shuffled", "data.split_seed": 0, "data.augment": [], "data.on_error": "fail", "data.data_dir": "",
"data.workers": 0, "data.card": {}, "data.override_card": false, "data.transductive": false,
"data.candidates": [], "data.poison": "", "streams": {},
"norm_batches": "joint", "method.name": "linear_probe", "method.k": 0, "method.blocks": [], "method.rules": [],
"method.norm": [], "method.add": [], "method.stoch_norm": 0.0, "method.auto_rgn": false, "method.grid": [],
"method.label_smoothing": 0.0, "method.mixup": 0.0, "method.cutmix": 0.0, "batch_size": 32, "total": [10.0, "epochs"],
"accumulate": 1, "lr": 0.001, "optimizer": "adamw", "optimizer_args": {}, "weight_decay": 0.0, "decay": ".*/kernel",
"clip": 1.0, "groups": {}, "layer_decay": 1.0, "schedule.name": "cosine", "schedule.warmup": [0.0, "epochs"],
"schedule.args": {}, "ema": 0.0, "phases": [], "eval_batch_size": 128, "log_every": [10.0, "steps"], "eval_every":
[1.0, "epochs"], "select": "last", "patience": 0, "min_delta": 0.0, "resamples": 1000, "seeds": [], "baseline": [],
"replicas": [], "cache": "", "views": 1, "cache_dir": "", "parallel": "jit", "fsdp": 0,
"model.weights_sha256": "", "data.weights": "", "method.mix_domains": 0.0, "turns": [], "restart": false,
"data.labelled": true,
 "model.channels": 0, "model.tokenizer": "", "model.vectors": "", "model.max_length": 0, "model.pooling": "",
 "model.partial": [], "log": [], "feature_map": "pca",
 "data.image": "", "data.columns": [], "model.parts": {}, "model.fusion": {},
 "model.hidden_dropout": 0.0}
"""


def test_initial_values_are_those_of_the_introduction():
    assert json.loads(INITIAL) == options.INITIAL


def test_the_identity_leaves_out_what_has_its_initial_value():
    config = change(lr=0.5, data__workers=3, terms={"l2_sp": {"weight": 1.0}}, seed=0)
    assert options.identity(config) == {"lr": 0.5, "terms": {"l2_sp": {"weight": 1.0}}}
    assert options.identity(options.make()) == {}


def test_a_linear_probe_has_a_rate_and_length_of_its_own_and_what_is_given_wins():
    probe, others = (options.HEAD_ALONE["lr"], options.HEAD_ALONE["total"]), (1e-3, (10.0, "epochs"))
    wanted = {
        "": probe, "data=digits": probe, "method=full": others, "method=knn": others, "lr=0.5": (0.5, probe[1]),
        "method.add=(('lora',{}),)": others,
        "method=linear_probe,total=(3,'steps')": (probe[0], (3, "steps")),
    }  # fmt: skip
    assert {arg: (x.lr, x.total) for arg, x in ((arg, transfer.get_config(arg)) for arg in wanted)} == wanted
    of_methods = {"": probe, "linear_probe,lr=0.5": (0.5, probe[1]), "full": (recipes.LR, others[1])}
    assert {arg: (x.lr, x.total) for arg, x in ((arg, methods.get_config(arg)) for arg in of_methods)} == of_methods
    assert options.identity(options.make()) == {}  # what a config.json does not hold means what it meant


@pytest.mark.parametrize("name", ["smoke", "quickstart", "methods"])
def test_an_option_absent_from_a_config_json_had_its_initial_value(name, tmp_path):
    """As where the run is older than the option; an option that had another value cannot be taken away."""
    config = get_config(name)
    table, now = options.flatten(config), options.identity(config)
    (tmp_path / "result.json").write_text("{}")
    for key in table:
        less = {other: value for other, value in table.items() if other != key}
        files.write_json(tmp_path / "config.json", less)
        if key in now:
            with pytest.raises(ValueError, match=rf"  {key}: .* -> "):
                workdir.check_options(tmp_path, now)
        else:
            workdir.check_options(tmp_path, now)
            workdir.check_options(tmp_path, options.flatten(config))
            assert options.fingerprint(options.from_flat(less)) == options.fingerprint(config)


def test_a_changed_default_changes_no_old_meaning(monkeypatch, tmp_path):
    config = options.make()
    monkeypatch.setitem(options.OPTIONS, "clip", OPTIONS["clip"]._replace(default=5.0))
    assert options.make().clip == 5.0 and options.from_flat({}).clip == 1.0
    assert options.identity(options.make()) == {"clip": 5.0} and options.identity(config) == {}
    (tmp_path / "result.json").write_text("{}")
    files.write_json(tmp_path / "config.json", {})
    workdir.check_options(tmp_path, options.identity(config))
    with pytest.raises(ValueError, match=r"other options(.|\n)*clip: 1.0 -> 5.0"):
        workdir.check_options(tmp_path, options.identity(options.make()))


def test_a_config_json_with_unknown_options_is_refused(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    files.write_json(tmp_path / "config.json", {"data.also": []})
    with pytest.raises(ValueError, match=r"other options(.|\n)*data.also"):
        workdir.check_options(tmp_path, options.identity(options.make()))
    with pytest.raises(
        ValueError, match=r"invalid options:\n  method.grids does not exist .did you mean 'method.grid'"
    ):
        options.check(options.from_flat({"method.grids": []}))


def test_every_default_passes_its_check_and_every_option_says_what_it_is():
    for option in OPTIONS.values():
        assert option.check.fits(option.default) and option.check.fits(option.initial) and option.doc, option.name
        assert option.check.fits(options.flatten(options.make())[option.name]), option.name  # as JSON


def test_a_source_is_a_string_or_several():
    config = options.make()
    config.data.source = ("folder:a", "folder:b")
    options.check(config)
    for given in (change(data__source=("folder:a", "folder:b")), transfer.get_config("data=('folder:a','folder:b')")):
        assert given.data.source == ("folder:a", "folder:b")
        assert options.from_flat(options.flatten(given)).data.source == ("folder:a", "folder:b")
        assert change(data__source="digits").data.source == "digits"
    with pytest.raises(ValueError, match=r"data\.source = 3: expected a string, or a sequence of strings"):
        options.check(change(data__source=3))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_passes_its_checks(name):
    options.check(get_config(name))


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_passes_its_checks_in_each_of_its_phases(name):
    config = options.override(transfer.get_config(), methods.methods(4.0)[name])
    options.check(config)
    for phase in config.phases:
        options.check(options.override(config, dict(phase)))


BAD = {
    "task": ("clasification", "one of classification, binary, multilabel, regression"),
    "model.keep_head": (1, "True or False"),
    "model.reinit": ("stage3", "strings"),
    "model.partial": (("stage4/(",), "regular expressions"),
    "data.extra_eval": ((("a", "digits", "test"), ("a", "glyphs", "test")), "each name once"),
    "data.sampling": ("balanced", "one of shuffled, class_balanced"),
    "method.blocks": ((1,), "strings"),
    "method.norm": (("a", "b"), "pairs of strings"),
    "method.add": ((("lora", 8),), "pairs (name, {parameter: value})"),
    "method.stoch_norm": (1.5, "a number of at least 0 and at most 1"),
    "terms": (("l2_sp",), "{name: {parameter: value}}"),
    "streams": ({"b": 3}, "{name: {parameter: value}}"),
    "method.auto_rgn": (1, "True or False"),
    "method.grid": (("a",), "numbers"),
    "method.k": (-1, "an integer of at least 0"),
    "layer_decay": (0.0, "a number above 0"),
    "decay": ("(", "a regular expression"),
    "data.split_seed": (-1, "an integer of at least 0"),
    "norm_batches": ("both", "one of joint, per_stream"),
    "patience": (-1, "an integer of at least 0"),
}


def test_invalid_options_come_together():
    table = options.flatten(transfer.get_config())
    config = options.from_flat(table | {key: value for key, (value, _) in BAD.items()})
    with pytest.raises(ValueError) as error:
        options.check(config)
    first, *lines = str(error.value).splitlines()
    assert first == "invalid options:"
    for key, (_, expected) in BAD.items():
        (line,) = (line for line in lines if line.startswith(f"  {key} = "))
        assert expected in line.partition(": expected ")[2]


def test_tables_are_checked_field_by_field():
    target = {"source": "digits", "split": "test", "batch_size": 8, "augment": (("flip", {}),), "labelled": False}
    teacher = {"name": "resnet18", "weights": "", "cache": "features"}
    terms = {"task": {"weight": 0.1}, "kd": {"weight": ("linear", {"final": 0.0}), "temperature": 4.0}}
    options.check(change(streams={"target": target}, networks={"teacher": teacher}, terms=terms))
    options.check(change(task_args={"class_weight": "balanced"}))
    options.check(change(task="multilabel", task_args={"pos_weight": (1.0, 2.0)}))
    config = change(
        streams={"target": {**target, "batchsize": 8, "shots": -1}, "train": target, "a": {"source": "digits"}},
        networks={"teacher": {"weights": "", "cache": True}, "head": teacher},
        terms={"kd": {"weight": "large"}, "l 1": {}},
        task_args={"pos_weight": 2.0},
        data__card={"meen": (0.5,)},
    )
    with pytest.raises(ValueError) as error:
        options.check(config)
    for part in (
        "streams.target has no parameter 'batchsize' (did you mean 'batch_size'?)",
        "streams.target: shots = -1, expected an integer of at least 0",
        "streams.train: expected a name", "streams.a: split is missing",
        "networks.teacher: name is missing", "networks.teacher: cache = True, expected one of '', features",
        "networks.head: expected a name", "terms.kd: weight = 'large', expected a number, or a pair",
        "terms.l 1: expected",
        "task_args of classification has no parameter 'pos_weight' (did you mean 'class_weight'?)",
        "data.card has no parameter 'meen' (did you mean 'mean'?)",
    ):  # fmt: skip
        assert part in str(error.value), part


def test_patience_needs_a_score():
    options.check(change(patience=3, min_delta=0.01))
    with pytest.raises(ValueError, match="patience = 3: the score is that of val"):
        options.check(change(patience=3, data__val=""))
    with pytest.raises(ValueError, match=r"min_delta = 0\.1 belongs to patience"):
        options.check(change(min_delta=0.1))


def test_a_phase_changes_only_what_can_change_and_says_what_that_is():
    phases = ((("lr", 0.1), ("method.name", "full"), ("schedule.name", "linear"), ("groups", {}), ("terms", {})),)
    options.check(change(phases=phases))
    frozen = ("batch_size", "seed", "ema", "model.name", "data.augment", "method.add", "streams")
    with pytest.raises(ValueError) as error:
        options.check(change(phases=(*phases, tuple((key, 1) for key in (*frozen, "lrr")))))
    assert "phases[1]: 'lrr' does not exist (did you mean 'lr'?)" in str(error.value)
    for key in frozen:
        assert f"phases[1] sets {key}, which cannot change during a run; what can: terms, turns, method.name" in str(
            error.value
        )
    assert "phases[0]" not in str(error.value)
    with pytest.raises(ValueError, match=r"phases = .*expected a sequence, each pairs \(dotted option, value\)"):
        options.check(change(phases=(("lr", 0.1),)))


def test_the_probes_without_gradient_are_those_that_there_are():
    assert options.PROBES == probes.NAMES


@pytest.mark.parametrize("name", options.PROBES)
def test_a_probe_without_gradient_refuses_everything_that_belongs_to_training(name):
    options.check(change(method__name=name, method__grid=(1,), data__resample="loo"))
    config = change(
        method__name=name, phases=((("lr", 0.1),),), method__add=(("lora", {}),), terms={"l2_sp": {}},
        method__auto_rgn=True, select="best_val", patience=2,
    )  # fmt: skip
    with pytest.raises(ValueError) as error:
        options.check(config)
    lines = str(error.value).splitlines()
    for key in ("phases", "method.add", "terms", "method.auto_rgn", "select", "patience"):
        (line,) = (line for line in lines if line.startswith(f"  {key} = "))
        assert f"method.name = {name!r} takes no steps, expected " in line
    with pytest.raises(ValueError, match="takes no steps"):  # nor can a phase be one
        options.check(change(method__name=name, phases=((("method.name", "full"),),)))


@pytest.mark.parametrize("name", ["linear_probe", "full"])
def test_what_belongs_to_probes_without_gradient_is_refused_by_methods_with_steps(name):
    options.check(change(method__name=name, data__resample="kfold:5:0"))
    for key, value in (("data.resample", "loo"), ("method.grid", (1.0,))):
        with pytest.raises(ValueError, match=f"{key} = .* belongs to knn, logistic, ridge; method.name = {name!r}"):
            options.check(options.override(transfer.get_config(), {"method.name": name, key: value}))


def test_r_drop_without_anything_random_is_refused():
    with pytest.raises(ValueError, match=r"two passes are equal: set model\.dropout, hidden_dropout or drop_path"):
        options.check(change(terms={"r_drop": {}}))
    for random in ("model.dropout", "model.hidden_dropout", "model.drop_path", "method.stoch_norm"):
        options.check(options.override(change(terms={"r_drop": {}}), {random: 0.1}))
