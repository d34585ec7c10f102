"""What other libraries call our options leads to ours."""

import shlex

import pytest

from configs import transfer
from tl_jax import config as options
from tl_jax.core import synonyms
from tl_jax.core.options import OPTIONS
from tl_jax.methods import recipes, rules
from tl_jax.studies import command

ASKED = [
    ("learning_rate=0.1", "it is lr here, such as --config.lr=0.001"),
    ("optimizer.learning_rate=0.1", "it is lr here"),
    ("epochs=5", """it is total here, such as --config.total="(10,'epochs')\""""),
    ("num_epochs=5", "it is total here"),
    ("max_steps=5", """--config.total="(1000,'steps')\""""),
    ("optimizer.weight_decay=0.1", "it is weight_decay here"),
    ("dropout=0.1", "it is model.dropout here"),
    ("freeze=True", "it is method.name here, such as --config.method.name=linear_probe"),
    ("backbone=resnet50", "it is model.name here"),
    ("pretrained=True", "it is model.weights here"),
    ("dataset=cifar10", "it is data.source here"),
    ("num-classes=10", "how many classes"),
    ("output_dir=W", "--workdir FOLDER"),
    ("shots=3", "it is data.shots here"),
    ("total=10", """expected (amount > 0, one of epochs, steps, examples), such as --config.total="(10,'epochs')\""""),
    ("data.shotts=3", "did you mean 'data.shots'"),
]


@pytest.mark.parametrize(("item", "hint"), ASKED)
def test_a_word_of_another_library_is_answered_with_ours_and_an_example(item, hint, capsys):
    for given in (["--config", f"configs/transfer.py:{item}"], ["--config", "configs/transfer.py", f"--config.{item}"]):
        if "-" in item and given[-1].startswith("--config."):
            continue  # no flag has such a name
        assert command.main(given) == 2
        assert hint in capsys.readouterr().err
    key, _, value = item.partition("=")
    with pytest.raises(ValueError) as error:
        options.override(options.make(), {key: int(value) if value.isdigit() else value})
    assert hint in str(error.value)


def test_every_example_is_accepted_and_no_synonym_is_an_option():
    ours = {*OPTIONS, *options.SHORT}
    for option, value, names in synonyms._ROWS:
        assert not ours & set(names.split())
        shown = synonyms._shown(option, value)
        flags = shlex.split(shown.removeprefix(", such as"))  # as a shell reads it
        _, items = command._parse(["--config", "configs/transfer.py", *flags])
        options.check(options.parse(transfer.get_config(), items))
    names = [name for *_, names in synonyms._ROWS for name in names.split()] + " ".join(synonyms.ELSEWHERE).split()
    assert len(names) == len(set(names))


def test_a_config_file_that_sets_an_unknown_option_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "from tl_jax import config\n\n\ndef get_config(arg=''):\n    made = config.parse(config.make(), arg)\n"
        "    made.learning_rate = 0.1\n    return made\n"
    )
    assert command.main(["--config", str(tmp_path / "own.py")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/own.py sets learning_rate, which does not exist (it is lr here" in error and len(error) < 300


@pytest.mark.parametrize("name", sorted(set(recipes.METHODS) - {*rules.NAMES, *rules.PROBES}))
def test_a_way_of_adapting_that_is_several_options_says_which(name):
    """What the message names is what configs/methods.py sets."""
    with pytest.raises(ValueError, match=f"configs/methods.py:{name},") as error:
        rules.make_rules(name, ["backbone/stem/kernel", "head/kernel"], ["stem", "pre_logits"])
    assert all(f"{key} = {value!r}" in str(error.value) for key, value in recipes.methods(10.0)[name].items())


@pytest.mark.parametrize(("word", "ours"), [("finetune", "full"), ("fine-tune", "full"), ("frozen", "linear_probe")])
def test_another_word_for_what_trains_is_answered_with_ours(word, ours):
    with pytest.raises(ValueError, match=f"it is '{ours}' here"):
        rules.make_rules(word, [], [])
