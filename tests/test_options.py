"""Options as flat tables: setting them, reading them back, naming a run by them, and refusing what cannot be meant."""

import importlib
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from configs import methods, transfer
from tl_jax import config as options
from tl_jax.methods import probes

CONFIGS = sorted(path.stem for path in pathlib.Path("configs").glob("*.py"))


def get_config(name):
    return importlib.import_module(f"configs.{name}").get_config()


def change(**values):
    return options.override(transfer.get_config(), {key.replace("__", "."): value for key, value in values.items()})


def test_override_sets_options_in_a_copy():
    config = transfer.get_config()
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
            "method.regularize": (("l2_sp", {"alpha": 0.1}),), "schedule.args": {"final": 0.1},
            "data.also": (("other", "digits", "test"),), "groups": {"head": {"args": {"b1": 0.8}}},
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
    regularized = [change(method__regularize=(("delta", args),)) for args in ({"a": 1, "b": 2}, {"b": 2, "a": 1})]
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
    table = options.flatten(transfer.get_config())
    prints = {options.fingerprint(options.from_flat(table))}
    for key, value in table.items():
        prints.add(options.fingerprint(options.from_flat({**table, key: other_value(value)})))
    assert len(prints) == 1 + len(table) - len(options.SPEED_ONLY)
    faster = options.from_flat({**table, "data.workers": 7})
    assert options.fingerprint(faster) == options.fingerprint(transfer.get_config())


def test_every_rule_is_of_an_option_and_every_number_and_structure_has_one():
    table = options.flatten(transfer.get_config())
    assert set(options.RULES) <= set(table)
    # Checked elsewhere: names by who looks them up, the groups by optim, the rest by options.check or compare.
    elsewhere = {"optimizer_args", "groups", "schedule.args", "phases", "seeds", "baseline", "replicas", "data.card"}
    elsewhere |= {"data.augment", "data.override_card"}
    unchecked = {key for key, value in table.items() if not isinstance(value, str)} - set(options.RULES)
    assert unchecked == elsewhere


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
    "model.keep_head": (1, "True or False"),
    "model.reinit": ("stage3", "strings"),
    "data.also": ((("a", "digits", "test"), ("a", "glyphs", "test")), "each name once"),
    "method.blocks": ((1,), "strings"),
    "method.norm": (("a", "b"), "pairs of strings"),
    "method.add": ((("lora", 8),), "pairs (name, {parameter: value})"),
    "method.regularize": (("l2_sp",), "pairs (name, {parameter: value})"),
    "method.auto_rgn": (1, "True or False"),
    "method.grid": (("a",), "numbers"),
    "method.k": (-1, "an integer of at least 0"),
    "layer_decay": (0.0, "a number above 0"),
    "data.split_seed": (-1, "an integer of at least 0"),
}


def test_values_that_cannot_be_meant_come_together():
    table = options.flatten(transfer.get_config())
    config = options.from_flat(table | {key: value for key, (value, _) in BAD.items()})
    with pytest.raises(ValueError) as error:
        options.check(config)
    lines = str(error.value).splitlines()
    for key, (_, expected) in BAD.items():
        (line,) = (line for line in lines if line.startswith(f"  {key} = "))
        assert expected in line


def test_a_phase_changes_only_what_can_change_and_says_what_that_is():
    phases = ((("lr", 0.1), ("method.name", "full"), ("schedule.name", "linear"), ("groups", {})),)
    options.check(change(phases=phases))
    frozen = ("batch_size", "seed", "ema", "model.name", "data.augment", "method.add", "method.grid", "lrr")
    with pytest.raises(ValueError) as error:
        options.check(change(phases=(*phases, tuple((key, 1) for key in frozen))))
    for key in frozen:
        assert f"phases[1] sets {key}, which cannot change during a run; what can: total, lr, optimizer" in str(
            error.value
        )
    assert "phases[0]" not in str(error.value)
    with pytest.raises(ValueError, match=r"phases = .*expected phases, each pairs \(dotted option, value\)"):
        options.check(change(phases=(("lr", 0.1),)))


def test_the_names_of_the_closed_forms_are_those_of_the_closed_forms():
    assert options.CLOSED_FORMS == probes.NAMES


@pytest.mark.parametrize("name", options.CLOSED_FORMS)
def test_a_closed_form_refuses_everything_that_belongs_to_training(name):
    options.check(change(method__name=name, method__grid=(1,), data__resample="loo"))
    config = change(
        method__name=name, phases=((("lr", 0.1),),), method__add=(("lora", {}),), method__regularize=(("l2_sp", {}),),
        method__auto_rgn=True, select="best_val",
    )  # fmt: skip
    with pytest.raises(ValueError) as error:
        options.check(config)
    lines = str(error.value).splitlines()
    for key in ("phases", "method.add", "method.regularize", "method.auto_rgn", "select"):
        (line,) = (line for line in lines if line.startswith(f"  {key} = "))
        assert f"method.name = {name!r} takes no steps, expected " in line
    with pytest.raises(ValueError, match="takes no steps"):  # nor can a phase be one
        options.check(change(method__name=name, phases=((("method.name", "full"),),)))


@pytest.mark.parametrize("name", ["linear_probe", "full"])
def test_what_belongs_to_closed_forms_is_refused_by_methods_with_steps(name):
    options.check(change(method__name=name, data__resample="kfold:5:0"))
    for key, value in (("data.resample", "loo"), ("method.grid", (1.0,))):
        with pytest.raises(ValueError, match=f"{key} = .* belongs to knn, logistic, ridge; method.name = {name!r}"):
            options.check(options.override(transfer.get_config(), {"method.name": name, key: value}))


def test_r_drop_without_anything_random_is_refused():
    pairs = (("r_drop", {}),)
    with pytest.raises(ValueError, match=r"two passes are equal: set model\.dropout or drop_path"):
        options.check(change(method__regularize=pairs))
    for random in ({"model.dropout": 0.1}, {"model.drop_path": 0.1}):
        options.check(options.override(change(method__regularize=pairs), random))
    options.check(change(method__regularize=(*pairs, ("stoch_norm", {}))))
