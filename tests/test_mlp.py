"""Multi-layer perceptrons: what torch computes, cuts and rules, tables and their columns, features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import close

from tl_jax.core import trees
from tl_jax.methods import rules
from tl_jax.models import peft
from tl_jax.models.mlp import MLP
from tl_jax.weights import formats, load

WIDE = functools.partial(MLP, num_classes=3, widths=(16, 12, 8))
COLUMNS = ("age", "bmi", "pressure", "sugar", "lipids")


def table(rows=6, columns=5, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def random_variables(model, columns=5):
    flat = trees.flatten(jax.eval_shape(model.init, jax.random.key(0), table(columns=columns)))
    rng = np.random.default_rng(0)
    drawn = {path: rng.standard_normal(leaf.shape).astype(np.float32) * 0.5 for path, leaf in flat.items()}
    return trees.unflatten({path: 1 + np.abs(x) if path.endswith(("scale", "var")) else x for path, x in drawn.items()})


@pytest.mark.thin(2)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("activation", "norm"), [("relu", True), ("gelu", False)])
def test_it_computes_what_torch_computes(activation, norm, train):
    torch = pytest.importorskip("torch_reference").torch
    model = WIDE(activation=activation, norm=norm)
    variables = random_variables(model)
    params, stats = variables["params"], variables.get("batch_stats", {})

    def linear(leaves):
        layer = torch.nn.Linear(*leaves["kernel"].shape)
        layer.load_state_dict({"weight": torch.tensor(leaves["kernel"].T), "bias": torch.tensor(leaves["bias"])})
        return layer

    modules = []
    for name in ("stem", "block0", "block1"):
        layer = params["backbone"][name]
        modules += [linear(layer["dense"])]
        if norm:
            running = stats["backbone"][name]["norm"]
            modules += [torch.nn.BatchNorm1d(len(running["mean"]))]
            tensors = {"weight": layer["norm"]["scale"], "bias": layer["norm"]["bias"]}
            tensors |= {"running_mean": running["mean"], "running_var": running["var"]}
            modules[-1].load_state_dict({key: torch.tensor(x) for key, x in tensors.items()}, strict=False)
        modules += [{"relu": torch.nn.ReLU, "gelu": torch.nn.GELU}[activation]()]
    reference = torch.nn.Sequential(*modules, linear(params["head"])).double().train(train)
    expected = reference(torch.tensor(table()).double()).detach()
    (logits, _), state = model.apply(variables, table(), train, mutable=["batch_stats"])
    close(logits, expected)
    if norm:
        means = [module.running_mean for module in reference if isinstance(module, torch.nn.BatchNorm1d)]
        for name, mean in zip(("stem", "block0", "block1"), means, strict=True):
            close(state["batch_stats"]["backbone"][name]["norm"]["mean"], mean)


def test_running_from_any_cut_gives_the_same_logits():
    model = WIDE(norm=True)
    variables = random_variables(model)
    logits, out = model.apply(variables, table())
    assert model.cuts == ("stem", "block0", "block1", "pre_logits")
    assert tuple(out) == (*model.cuts, "embedding", "logits")
    for cut in model.cuts:
        np.testing.assert_array_equal(model.apply(variables, out[cut], start=cut)[0], logits)
        np.testing.assert_array_equal(model.apply(variables, table(), stop=cut)[0], out[cut])
    with pytest.raises(ValueError, match="start='stage1' is no cut"):
        model.apply(variables, table(), start="stage1")


def test_rules_places_and_layer_decay_know_its_parts():
    model = WIDE(norm=True)
    paths = list(trees.flatten(random_variables(model)["params"]))
    matches = trees.match_rules(paths, rules.make_rules("last_k", paths, model.cuts, 1))
    trained = {path.rpartition("/")[0] for path, match in matches.items() if match.value != "frozen"}
    assert trained == {"backbone/block1/dense", "backbone/block1/norm", "head"}
    place = rules.places(paths, model.cuts)
    assert [place[f"backbone/{part}/dense/kernel"] for part in ("stem", "block0", "block1")] == [0, 1, 2]
    factor = rules.layer_multipliers(paths, model.cuts, 0.5)
    assert [factor[f"{path}/kernel"] for path in ("backbone/stem/dense", "backbone/block1/dense", "head")] == [
        0.125, 0.5, 1.0,
    ]  # fmt: skip


def test_dropout_acts_in_training_and_behind_the_deterministic_cuts_alone():
    model = WIDE(dropout=0.5)
    variables = random_variables(model)
    np.testing.assert_array_equal(model.apply(variables, table())[0], WIDE().apply(variables, table())[0])
    first, other = (model.apply(variables, table(), True, rngs={"dropout": jax.random.key(seed)})[1] for seed in (0, 1))
    equal = tuple(cut for cut in model.cuts if np.array_equal(first[cut], other[cut]))
    assert equal == model.deterministic_cuts == ("stem",)
    assert WIDE().deterministic_cuts == WIDE().cuts


@pytest.mark.parametrize("remat", ["", "block"])
def test_every_parameter_has_a_gradient_with_and_without_remat(remat):
    model = WIDE(norm=True, remat=remat)
    variables = random_variables(model)

    def loss(params):
        (logits, _), _ = model.apply({**variables, "params": params}, table(), True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(logits))

    gradient = trees.flatten(jax.jit(jax.grad(loss))(variables["params"]))
    # The batch's mean takes a bias before BatchNorm out again.
    assert {path for path, leaf in gradient.items() if np.abs(leaf).max() < 1e-4} == {
        f"backbone/{part}/dense/bias" for part in ("stem", "block0", "block1")
    }


def test_bfloat16_computes_near_float32():
    model = WIDE(norm=True)
    variables = random_variables(model)
    logits, out = model.clone(dtype=jnp.bfloat16).apply(variables, table())
    assert out["block1"].dtype == jnp.bfloat16 and logits.dtype == out["pre_logits"].dtype == jnp.float32
    close(logits, model.apply(variables, table())[0], 0.05)


def test_frozen_norms_keep_their_statistics():
    model = WIDE(norm=True, frozen_norms=("backbone/block0/norm",))
    variables = random_variables(model)
    _, state = model.apply(variables, table(), True, mutable=["batch_stats"])
    kept = {
        path.split("/")[1]
        for path, leaf in trees.flatten(state["batch_stats"]).items()
        if np.array_equal(leaf, trees.flatten(variables["batch_stats"])[path])
    }
    assert kept == {"block0"}


def test_stochastic_depth_is_refused():
    with pytest.raises(ValueError, match=r"model.drop_path=0.1: MLP has no residual branches"):
        WIDE(drop_path=0.1).init(jax.random.key(0), table())


def test_a_discriminator_is_an_mlp_of_one_output_on_features():
    model = MLP(num_classes=1, widths=(1024, 1024), norm=True, head_init="lecun")
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 512)))
    # Two dense layers, BatchNorm's scale and bias, the output.
    assert sum(leaf.size for leaf in jax.tree.leaves(tree["params"])) == 513 * 1024 + 1025 * 1024 + 4 * 1024 + 1025


@pytest.mark.parametrize(
    ("name", "parameters"), [("mlp_small", 6 * 64 + 65 * 64), ("mlp_medium", 6 * 256 + 2 * 257 * 256)]
)
def test_a_table_goes_out_and_comes_back_bit_equal(name, parameters, tmp_path):
    path, layers = tmp_path / "w.safetensors", (("batch_norm", {}),)
    made = load.load(name, "", 4, columns=COLUMNS, head=layers, head_init="lecun", seed=1)
    backbone = made.variables["params"]["backbone"]
    assert sum(leaf.size for leaf in jax.tree.leaves(backbone)) == parameters
    assert load.example_input(made.card).shape == (1, 5) and set(made.origins.values()) == {"new"}
    card = made.card.replace(
        mean=(1.0,) * 5, std=(2.0,) * 5, task="regression", target_mean=(0.5,) * 4, target_std=(3.0,) * 4
    )
    load.export(made.variables, name, path, card=card)
    for columns in ((), COLUMNS):
        loaded = load.load(name, path, columns=columns)
        assert (loaded.card, loaded.layout) == (card, "native")
        jax.tree.map(np.testing.assert_array_equal, loaded.variables, made.variables)
    fresh = load.load(name, path, 2)
    assert (fresh.card.task, fresh.card.target_mean, fresh.card.head) == ("classification", (), ())
    assert fresh.card.mean == card.mean and fresh.variables["params"]["head"]["kernel"].shape[1] == 2
    jax.tree.map(np.testing.assert_array_equal, fresh.variables["params"]["backbone"], backbone)


def test_columns_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mlp_small reads a table: give its columns"):
        load.load("mlp_small", "")
    with pytest.raises(ValueError, match="resnet18 reads an image and no columns; given were 5"):
        load.load("resnet18", "", columns=COLUMNS)
    made = load.load("mlp_small", "", columns=COLUMNS)
    load.export(made.variables, "mlp_small", tmp_path / "w.safetensors", card=made.card)
    with pytest.raises(ValueError, match=r"reads 5 columns \('age', .*they must be the same in the same order"):
        load.load("mlp_small", tmp_path / "w.safetensors", columns=COLUMNS[::-1])
    with pytest.raises(ValueError, match="mlp_medium"):
        load.load("mlp_medium", tmp_path / "w.safetensors")


@pytest.mark.slow
def test_a_table_file_without_a_card_needs_its_columns(tmp_path):
    made = load.load("mlp_small", "", columns=COLUMNS)
    formats.write_safetensors(tmp_path / "w.safetensors", trees.flatten(made.variables), {})
    loaded = load.load("mlp_small", tmp_path / "w.safetensors", columns=COLUMNS)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, made.variables)
    with pytest.raises(
        ValueError, match=r"wrong shapes \[params/backbone/stem/dense/kernel is \(5, 64\), expected \(4"
    ):
        load.load("mlp_small", tmp_path / "w.safetensors", columns=COLUMNS[1:])


@pytest.mark.slow
def test_low_rank_updates_merge():
    addition = ("lora", {"rank": 2, "targets": "backbone/.*/kernel"})
    model = WIDE(norm=True)
    variables = random_variables(model)
    added = jax.tree.map(lambda x: x + 0.3, peft.init(model, variables, [addition], jax.random.key(0)))
    both = {**variables, "params": {**variables["params"], **added}}
    adapted = peft.Adapted(model, (addition,)).apply(both, table())[0]
    close(model.apply(peft.merge(both, (addition,)), table())[0], adapted)
