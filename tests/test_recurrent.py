"""Recurrent networks, convolutions over words and their mean: torch's numbers and files, padding, cuts, precision."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import close

from tl_jax import models
from tl_jax.core import trees
from tl_jax.methods import rules
from tl_jax.models import conversion, peft, recurrent, tokens
from tl_jax.weights import formats, load

VOCAB, LENGTH, CLASSES = 23, 7, 3
KINDS = {  # names with the numbers of a small network
    "bigru": "bigru_4_5d", "textcnn": "textcnn_5d", "hidden": "word_average_6_5d", "bilstm": "bilstm_4x2_5d",
    "lstm": "lstm_6_5d", "gru": "gru_6x2_5d", "word_average": "word_average_5d",
}  # fmt: skip
EACH = pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
ONE_NOW, SOME_NOW = pytest.mark.thin(1), pytest.mark.thin(1)


def make(name, monkeypatch=None, **fields):
    """The network of a name for a small vocabulary; it is in the table of models meanwhile."""
    variant = recurrent.variant_of(name)
    card = variant.card.replace(vocab=VOCAB, max_length=LENGTH, num_classes=CLASSES)
    if monkeypatch:
        monkeypatch.setitem(models.MODELS, name, variant._replace(card=card))
    return variant.module(**{"num_classes": CLASSES, "vocab_size": VOCAB, **fields})


def texts(lengths=range(1, LENGTH + 1), length=LENGTH, left=False, seed=0):
    """int32 [B, length, 2]: a text of each length with padding on one side; texts depend on seed and lengths alone."""
    rng, x = np.random.default_rng(seed), np.full((len(lengths), length, 2), (-1, 0), np.int32)
    for row, count in zip(x, lengths, strict=True):
        row[length - count :, 0][:count] = words = rng.integers(0, VOCAB, count)
        if not left:
            row[:, 0] = -1
            row[:count, 0] = words
    return x


def random_variables(model, seed=0):
    flat = trees.flatten(jax.eval_shape(model.init, jax.random.key(0), texts()))
    rng = np.random.default_rng(seed)
    return trees.unflatten({path: rng.standard_normal(x.shape).astype(np.float32) * 0.4 for path, x in flat.items()})


@functools.partial(jax.jit, static_argnums=0, static_argnames=("start", "stop"))
def run(model, variables, x, **call):
    return model.apply(variables, x, **call)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(model, variables, x):
    def loss(params):
        logits, _ = model.apply({**variables, "params": params}, x, True)
        return jnp.sum(jnp.sin(logits)), logits

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


def gradient(model, variables, x):
    """The logits, and the gradient of a function of them."""
    (_, logits), grads = value_and_gradient(model, variables, x)
    return logits, trees.flatten({"params": grads})


# Networks as people write them in torch.


@pytest.fixture
def torch():
    return pytest.importorskip("torch_reference").torch


def torch_recurrent(torch, cell, width, layers, both, dim=5, rnn=""):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(VOCAB, dim)
            kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell]
            setattr(self, rnn or cell, kind(dim, width, layers, batch_first=True, bidirectional=both))
            self.fc = torch.nn.Linear(width * (1 + both), CLASSES)

        def forward(self, words, lengths):
            packed = torch.nn.utils.rnn.pack_padded_sequence(
                self.embedding(words), lengths, batch_first=True, enforce_sorted=False
            )
            states, last = getattr(self, rnn or cell)(packed)
            last = last[0] if cell == "lstm" else last
            features = torch.cat([last[-2], last[-1]], dim=-1) if both else last[-1]
            return self.fc(features), features, torch.nn.utils.rnn.pad_packed_sequence(states, batch_first=True)[0]

    return drawn(torch, Net())


def drawn(torch, net):
    """The network in float64 with random numbers that float32 holds."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)
    return net.double()


def saved(torch, net, path):
    torch.save({key: x.float() for key, x in net.state_dict().items()}, path)
    return path


def check_gradient(net, layout, grads):
    """Each leaf has torch's gradient, to 1e-5 of the largest number of the leaf."""
    theirs = {key: parameter.grad.numpy() for key, parameter in net.named_parameters()}
    for path, leaf in grads.items():
        keys, transform = conversion.sources_of(layout, path)
        close(leaf, transform.load(*(theirs[key] for key in keys)), 2e-5)


GEOMETRY = [(cell, layers, both) for layers in (2, 1, 3) for both in (True, False) for cell in ("lstm", "gru")]


@pytest.mark.thin(1)
@pytest.mark.parametrize(("cell", "layers", "both"), GEOMETRY)
def test_states_final_states_logits_and_gradients_are_torchs(cell, layers, both, torch, monkeypatch, tmp_path):
    net, lengths = torch_recurrent(torch, cell, 6, layers, both), [4, 7, 1, 2, 6, 3, 5]
    name = f"{'bi' if both else ''}{cell}_6x{layers}_5d"
    make(name, monkeypatch)
    loaded = load.load(name, saved(torch, net, tmp_path / "w.pth"))
    assert loaded.layout == "torch" and "new" not in loaded.origins.values()
    right, left = texts(lengths), texts(lengths, left=True)
    words = torch.from_numpy(np.maximum(right[..., 0], 0)).long()
    logits, features, states = net(words, torch.tensor(lengths))
    for x in (right, left):
        ours, out = run(loaded.model, loaded.variables, x)
        close(ours, logits.detach())
        close(out["pre_logits"], features.detach())
        last = np.asarray(out[f"block{layers - 1}"])
        assert np.array_equal(last[..., -1], x[..., 0] >= 0)
        for i, count in enumerate(lengths):
            close(last[i, x[i, :, 0] >= 0, :-1], states[i, :count].detach())
    torch.sin(logits).sum().backward()
    for x in (right, left):
        check_gradient(net, recurrent.LAYOUTS[cell]["torch"], gradient(loaded.model, loaded.variables, x)[1])


def torch_windows(torch, dim=5):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(VOCAB, dim)
            self.convs = torch.nn.ModuleList(torch.nn.Conv1d(dim, 100, k) for k in (3, 4, 5))
            self.fc = torch.nn.Linear(300, CLASSES)

        def forward(self, words):
            x, maps = self.embedding(words).transpose(1, 2), []
            for k, conv in zip((3, 4, 5), self.convs, strict=True):  # what padding="same" does, without its warning
                maps.append(torch.relu(conv(torch.nn.functional.pad(x, ((k - 1) // 2, k // 2)))).amax(dim=-1))
            return self.fc(torch.cat(maps, dim=-1))

    return drawn(torch, Net())


def torch_mean(torch, dim=5, hidden=0):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.EmbeddingBag(VOCAB, dim, mode="mean")
            if hidden:
                self.hidden = torch.nn.Linear(dim, hidden)
            self.fc = torch.nn.Linear(hidden or dim, CLASSES)

        def forward(self, words):
            x = self.embedding(words)
            return self.fc(torch.relu(self.hidden(x)) if hidden else x)

    return drawn(torch, Net())


OTHERS = {
    "textcnn_5d": torch_windows,
    "word_average_5d": torch_mean,
    "word_average_6_5d": functools.partial(torch_mean, hidden=6),
}


@pytest.mark.parametrize("name", OTHERS)
def test_convolution_and_mean_are_torchs_text_by_text_without_padding(name, torch, monkeypatch, tmp_path):
    net = OTHERS[name](torch)
    make(name, monkeypatch)
    loaded = load.load(name, saved(torch, net, tmp_path / "w.pth"))
    assert loaded.layout == "torch" and "new" not in loaded.origins.values()
    right, left = texts(), texts(left=True)
    expected = torch.cat([net(torch.from_numpy(x[x >= 0]).long()[None]) for x in right[..., 0]])
    torch.sin(expected).sum().backward()
    for x in (right, left):
        logits, grads = gradient(loaded.model, loaded.variables, x)
        close(logits, expected.detach())
        check_gradient(net, models.get(name).layouts["torch"], grads)


@SOME_NOW
@EACH
def test_every_layout_goes_out_and_comes_back_bit_equal(name, monkeypatch, tmp_path):
    variables, card = random_variables(make(name, monkeypatch)), models.get(name).card
    for layout in models.get(name).layouts:
        load.export(variables, name, tmp_path / "w.safetensors", card=card, layout=layout)
        loaded = load.load(name, tmp_path / "w.safetensors")
        assert (loaded.layout, loaded.card) == (layout, card)
        jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", ["textcnn", "bilstm", "gru", "hidden"])
def test_torch_files_go_through_bit_equal_and_torch_takes_the_export(kind, torch, monkeypatch, tmp_path):
    name = KINDS[kind]
    make(name, monkeypatch)
    sizes = {"bilstm": ("lstm", 4, 2, True), "gru": ("gru", 6, 2, False)}
    net = torch_recurrent(torch, *sizes[kind]) if kind in sizes else OTHERS[name](torch)
    loaded = load.load(name, saved(torch, net, tmp_path / "w.pth"))
    load.export(loaded.variables, name, tmp_path / "w.safetensors", card=loaded.card)
    tensors, _ = formats.read(tmp_path / "w.safetensors")
    net.load_state_dict({key: torch.from_numpy(x) for key, x in tensors.items()}, strict=True)
    for key, x in formats.read(tmp_path / "w.pth")[0].items():
        np.testing.assert_array_equal(tensors[key], x)


@pytest.mark.slow
def test_other_names_of_the_same_parts_and_a_file_of_the_recurrent_layer_alone(torch, monkeypatch, tmp_path):
    name = "bigru_4_5d"
    make(name, monkeypatch)
    net = torch_recurrent(torch, "gru", 4, 1, True)
    plain = load.load(name, saved(torch, net, tmp_path / "w.pth"))
    renamed = torch_recurrent(torch, "gru", 4, 1, True, rnn="rnn")
    renamed.emb, renamed.classifier = renamed.embedding, renamed.fc
    del renamed.embedding, renamed.fc
    other = load.load(name, saved(torch, renamed, tmp_path / "other.pth"))
    jax.tree.map(np.testing.assert_array_equal, other.variables, plain.variables)
    alone = load.load(name, saved(torch, net.gru, tmp_path / "alone.pth"), 2, partial=("stem/.*",))
    ours, theirs = (x.variables["params"]["backbone"]["block0"] for x in (alone, plain))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(ValueError, match=r"wrong shapes \[.*weight_ih_l0 is \(12, 5\), expected"):
        load.load("bigru_5_5d", tmp_path / "w.pth", 2)
    with pytest.raises(ValueError, match=r"has no key that lstm|unfilled leaves"):
        load.load("bilstm_4_5d", tmp_path / "w.pth", 2)


@SOME_NOW
@EACH
def test_running_from_any_cut_gives_the_same_logits(name):
    model, x = make(name), texts()
    variables = random_variables(model)
    logits, out = run(model, variables, x)
    assert tuple(sorted(out)) == tuple(sorted((*model.cuts, "embedding", "logits")))
    assert logits.dtype == out["pre_logits"].dtype == jnp.float32
    for cut in model.cuts:
        np.testing.assert_array_equal(run(model, variables, out[cut], start=cut)[0], logits)
        np.testing.assert_array_equal(run(model, variables, x, stop=cut)[0], out[cut])
        if cut != "pre_logits":
            np.testing.assert_array_equal(tokens.mask_of(out[cut]), x[..., 0] >= 0)
            assert not np.asarray(out[cut])[x[..., 0] < 0].any()
    with pytest.raises(ValueError, match="start='block9' is no cut"):
        model.apply(variables, x, start="block9")


@pytest.mark.slow
@ONE_NOW
@EACH
def test_padding_of_any_length_and_on_either_side_changes_nothing(name):
    model = make(name)
    variables = random_variables(model)
    lengths = [3, 7, 0, 1]
    logits, grads = gradient(model, variables, texts(lengths))
    for length, left in ((LENGTH, True), (12, False), (12, True)):
        x = texts(lengths, length, left)
        found, its = gradient(model, variables, x)
        close(found, logits, 1e-6)
        for path, leaf in grads.items():
            close(its[path], leaf, 1e-5)
    # Whatever stands at padded places of a cut is not read.
    x = texts(lengths, 12, True)
    logits, out = run(model, variables, x)
    for cut in model.cuts[:-1]:
        junk = np.where(x[..., :1] >= 0, 0.0, 9.0) * np.append(np.ones(out[cut].shape[-1] - 1), 0)
        np.testing.assert_array_equal(run(model, variables, out[cut] + np.float32(junk), start=cut)[0], logits)


@pytest.mark.slow
@ONE_NOW
@EACH
def test_a_text_without_tokens_is_finite_and_touches_no_other(name):
    model = make(name)
    variables = random_variables(model)
    x = texts([3, 0, 5])
    logits, out = run(model, variables, x)
    assert np.isfinite(logits).all() and all(np.isfinite(leaf).all() for leaf in out.values())
    if "final" not in variables["params"]["backbone"]:
        assert not np.asarray(out["pre_logits"])[1].any()
    close(logits[::2], run(model, variables, x[::2])[0], 1e-6)
    nothing, grads = gradient(model, variables, texts([0, 0]))
    assert np.isfinite(nothing).all() and all(np.isfinite(leaf).all() for leaf in grads.values())
    assert model.apply(variables, texts([0], 1))[0].shape == (1, CLASSES)


@ONE_NOW
@EACH
def test_segments_are_not_read(name):
    model, x = make(name), texts()
    variables, other = random_variables(model), texts()
    other[..., 1] = 1
    np.testing.assert_array_equal(run(model, variables, other)[0], run(model, variables, x)[0])


@ONE_NOW
@pytest.mark.parametrize("pooling", ["last", "mean", "max", "cls"])
def test_pooling_of_states_is_that_of_tokens(pooling):
    x = texts(left=True)
    for name in ("lstm_6_5d", "bigru_4_5d", "textcnn_5d", "word_average_5d"):
        model = make(name, pooling=pooling)
        variables = random_variables(model)
        _, out = run(model, variables, x)
        states = np.asarray(out[model.cuts[-2]])
        for i, row in enumerate(states):
            there = row[row[:, -1] > 0, :-1]
            pooled = {"mean": there.mean(0), "max": there.max(0), "cls": there[0], "last": there[-1]}[pooling]
            if name.startswith("bi") and pooling == "last":
                pooled = np.concatenate([there[-1, :4], there[0, 4:]])
            close(out["pre_logits"][i], pooled, 1e-6)


@pytest.mark.slow
@EACH
def test_bfloat16_computes_near_float32_with_float32_parameters(name):
    model, x = make(name), texts()
    half = model.clone(dtype=jnp.bfloat16)
    tree = jax.eval_shape(half.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
    variables = random_variables(model)
    logits, out = run(half, variables, x)
    assert out[model.cuts[0]].dtype == jnp.bfloat16 and logits.dtype == out["pre_logits"].dtype == jnp.float32
    close(logits, run(model, variables, x)[0], 0.05)
    (_, plain), (_, grads) = gradient(model, variables, x), gradient(half, variables, x)
    for path, leaf in grads.items():  # another word may have the maximum, so not number by number
        assert leaf.dtype == jnp.float32
        assert np.linalg.norm(leaf - plain[path]) < 0.15 * np.linalg.norm(plain[path]), path


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["block", "dots"])
@pytest.mark.parametrize("kind", ["bigru", "bilstm", "textcnn", "hidden"])
def test_recomputing_changes_no_gradient(kind, remat):
    model, x = make(KINDS[kind]), texts()
    variables = random_variables(model)
    plain = gradient(model, variables, x)[1]
    for path, leaf in gradient(model.clone(remat=remat), variables, x)[1].items():
        close(leaf, plain[path], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bigru", "bilstm"])
def test_several_networks_at_once_are_each_of_them(kind):
    """As replicas train: parameters in front under vmap."""
    model, x = make(KINDS[kind]), texts()
    each = [random_variables(model, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *each)

    def loss(params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, x)[0]))

    found = jax.jit(jax.vmap(jax.grad(loss)))(stacked["params"])
    for i, variables in enumerate(each):
        wanted = trees.unflatten(gradient(model, variables, x)[1])["params"]
        jax.tree.map(lambda a, b, i=i: close(a[i], b, 1e-5), found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gru", "bilstm", "textcnn"])
def test_added_parameters_act_on_input_and_state_and_merge(kind):
    model, x = make(KINDS[kind]), texts()
    variables = random_variables(model)
    logits, _ = run(model, variables, x)
    for addition in (("lora", {"rank": 2}), ("ssf", {})):
        added = peft.init(model, variables, [addition], jax.random.key(0))
        kernels = {path.rpartition("/")[0] for path in trees.flatten(variables["params"]) if path.endswith("kernel")}
        owners = {path.rpartition("/")[0] for path in trees.flatten(added[addition[0]])}
        assert owners == {path for path in kernels if path.startswith("backbone/")}
        adapted = peft.Adapted(model, (addition,))
        both = {**variables, "params": {**variables["params"], **added}}
        close(jax.jit(adapted.apply)(both, x)[0], logits, 1e-5)
        rng = np.random.default_rng(0)
        added = jax.tree.map(lambda leaf, rng=rng: np.float32(leaf + 0.2 * rng.standard_normal(leaf.shape)), added)
        both = {**variables, "params": {**variables["params"], **added}}
        changed = jax.jit(adapted.apply)(both, x)[0]
        assert np.abs(changed - logits).max() > 1e-2
        close(run(model, peft.merge(both, (addition,)), x)[0], changed, 1e-5)


def test_rules_places_and_layer_decay_know_the_layers_and_the_word_vectors():
    model = make("bilstm_4x2_5d")
    paths = list(trees.flatten(random_variables(model)["params"]))
    matches = trees.match_rules(paths, rules.make_rules("last_k", paths, model.cuts, 1))
    trained = {path.split("/")[1] for path, match in matches.items() if match.value == "backbone"}
    assert trained == {"block1"}
    factor = rules.layer_multipliers(paths, model.cuts, 0.5)
    embedding, last = "backbone/stem/tok_embed/embedding", "backbone/block1/reverse/hh/kernel"
    assert [factor[path] for path in (embedding, last, "head/kernel")] == [0.125, 0.5, 1.0]
    # Frozen word vectors: a rule as any other; nothing of the network's gradient goes through them.
    own = [("head/.*", "head"), ("backbone/block.*", "backbone"), ("backbone/stem/.*", "frozen")]
    frozen = {path for path, match in trees.match_rules(paths, own).items() if match.value == "frozen"}
    assert frozen == {embedding} and rules.frozen_cuts(set(paths) - frozen, model.cuts) == 1
    assert model.deterministic_cuts == model.cuts


@pytest.mark.slow
@EACH
def test_stochastic_depth_is_refused_and_dropout_acts_in_training_alone(name):
    model, x = make(name, dropout=0.5), texts()
    variables = random_variables(model)
    np.testing.assert_array_equal(run(model, variables, x)[0], run(make(name), variables, x)[0])
    rngs = {"dropout": jax.random.key(0)}
    assert np.abs(model.apply(variables, x, True, rngs=rngs)[0] - run(model, variables, x)[0]).max() > 1e-3
    with pytest.raises(ValueError, match=r"drop_path=0\.1: .* has no residual branches to drop"):
        make(name, drop_path=0.1).init(jax.random.key(0), x)


def test_names_tell_the_sizes():
    model = models.get("bilstm_128x3_50d").module(num_classes=2)
    assert (model.cell, model.width, model.layers, model.bidirectional, model.embed_dim) == ("lstm", 128, 3, True, 50)
    assert models.get("gru_64").module(num_classes=2).embed_dim == 300
    assert models.get("textcnn_100d").module(num_classes=2).embed_dim == 100
    assert models.get("word_average_64_50d").module(num_classes=2).hidden == 64
    for name in recurrent.NAMES:
        card = models.get(name).card
        pooling = {"textcnn": "max", "word_average": "mean"}.get(name, "last")
        assert (card.model, card.input, card.pooling, card.mean) == (name, "text", pooling, ())
    for name in ("lstm_0", "lstm_256x0", "bitextcnn", "lstm_99999", "word_average_50d_50d", "lstm"):
        with pytest.raises(ValueError, match=f"there is no model {re.escape(repr(name))}; nearest: "):
            models.get(name)


# Without the word vectors and the head: torch's formula of the parameters of a layer.
PARAMETERS = {
    "lstm_256": 4 * 256 * (300 + 256 + 2),
    "bilstm_256": 2 * 4 * 256 * (300 + 256 + 2),
    "lstm_256x2": 4 * 256 * (300 + 256 + 2 + 256 + 256 + 2),
    "gru_256": 3 * 256 * (300 + 256 + 2),
    "bigru_256": 2 * 3 * 256 * (300 + 256 + 2),
    "textcnn": (3 + 4 + 5) * 300 * 100 + 3 * 100,
    "word_average": 0,
}


def test_parameters_of_the_named_networks():
    assert tuple(PARAMETERS) == recurrent.NAMES
    for name, count in PARAMETERS.items():
        shapes = load._network_shapes(models.get(name).module, models.get(name).card.to_json())
        sizes = {path: int(np.prod(shape)) for path, shape in shapes.items() if path.startswith("params/backbone/")}
        assert sizes.pop("params/backbone/stem/tok_embed/embedding") == recurrent.VOCAB * 300
        assert sum(sizes.values()) == count, name


def test_a_vocabulary_and_a_pooling_of_the_card_make_the_network(monkeypatch, tmp_path):
    variables = random_variables(make("gru_6x2_5d", monkeypatch))
    card = models.get("gru_6x2_5d").card.replace(pooling="max")
    monkeypatch.setitem(models.MODELS, "gru_6x2_5d", models.get("gru_6x2_5d")._replace(card=card))
    made = load.load("gru_6x2_5d", "", 2, seed=1)
    assert (made.model.vocab_size, made.model.pooling) == (VOCAB, "max")
    load.export(variables, "gru_6x2_5d", tmp_path / "w.safetensors", card=card)
    loaded = load.load("gru_6x2_5d", tmp_path / "w.safetensors")
    assert loaded.model.pooling == "max" and loaded.card == card


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bigru", "textcnn", "bilstm"])
def test_one_exported_program_serves_every_batch_and_length(kind):
    model = make(KINDS[kind])
    variables = random_variables(model)
    batch, length = jax.export.symbolic_shape("b, t")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    traced = jax.export.export(jax.jit(lambda variables, x: model.apply(variables, x)[0]), platforms=["cpu", "cuda"])
    program = traced(shapes, jax.ShapeDtypeStruct((batch, length, 2), jnp.int32))
    for lengths, places in ((range(1, 4), 3), ([1], 1), ([0, 40, 7, 9, 1], 40)):
        x = texts(lengths, places)
        close(program.call(variables, x), run(model, variables, x)[0], 1e-6)
