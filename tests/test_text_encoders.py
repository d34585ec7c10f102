"""BERT, its relatives and GPT-2: the numbers of transformers, files in and out, and what padding must not change."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pretrained import close

from tl_jax import models
from tl_jax.core import trees
from tl_jax.methods import rules
from tl_jax.models import attention, bert, gpt2, peft, tokens
from tl_jax.weights import formats, load

torch_reference = pytest.importorskip("torch_reference")
transformers = pytest.importorskip("transformers")
torch = torch_reference.torch

SIZE, VOCAB, LENGTH = (2, 24, 3), 50, 9
_SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
CONFIGS = {
    "bert": lambda **own: transformers.BertConfig(**_SHAPE, **own),
    "roberta": lambda **own: transformers.RobertaConfig(
        **_SHAPE, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, **own
    ),
    "distilbert": lambda **own: transformers.DistilBertConfig(n_layers=2, dim=24, n_heads=3, hidden_dim=96, **own),
    "gpt2": lambda **own: transformers.GPT2Config(
        n_layer=2, n_embd=24, n_head=3, bos_token_id=0, eos_token_id=0, pad_token_id=0, **own
    ),
}
CLASSES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "gpt2": "GPT2"}
KINDS = tuple(CONFIGS)
EACH = pytest.mark.parametrize("kind", KINDS)
ONE_NOW = pytest.mark.parametrize("kind", ["bert", *(pytest.param(x, marks=pytest.mark.slow) for x in KINDS[1:])])
TWO_NOW = pytest.mark.parametrize(
    "kind", [x if x in ("bert", "gpt2") else pytest.param(x, marks=pytest.mark.slow) for x in KINDS]
)
LEFT = [False, pytest.param(True, marks=pytest.mark.slow)]
SIDES = pytest.mark.parametrize("left", LEFT, ids=["right", "left"])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Networks small_bert, small_bert.mlm, ... in the table of models."""
    for kind in KINDS[:-1]:
        for name, variant in bert.variants(f"small_{kind}", kind, SIZE, VOCAB, max_length=LENGTH).items():
            monkeypatch.setitem(models.MODELS, name, variant)
    variant = gpt2.variant("small_gpt2", SIZE)
    monkeypatch.setitem(
        models.MODELS, "small_gpt2", variant._replace(card=variant.card.replace(vocab=VOCAB, max_length=LENGTH))
    )


@functools.cache
def twin(kind, what="Model"):
    """transformers' small network with random weights; what: the end of the name of its class."""
    own = {"num_labels": 4} if what == "ForSequenceClassification" else {}
    cls = getattr(transformers, CLASSES[kind] + {"ForMaskedLM": "LMHeadModel"}.get(what, what) if kind == "gpt2"
                  else CLASSES[kind] + what)  # fmt: skip
    return torch_reference.randomize(cls(CONFIGS[kind](vocab_size=VOCAB, **own)))


def texts(lengths=range(1, LENGTH + 1), length=LENGTH, left=False, seed=0):
    """Random tokens and segments of these lengths, which are those of any other padding with the same seed."""
    x = np.zeros((len(lengths), length, 2), np.int32)
    x[..., 0] = -1
    for i, count in enumerate(lengths):
        rng = np.random.default_rng((seed, i))
        place = slice(length - count, length) if left else slice(count)
        x[i, place, 0], x[i, place, 1] = rng.integers(0, VOCAB, count), rng.integers(0, 2, count)
    return x


def numbers(model, x):
    """What transformers' network is given; its positions count the tokens, and its own were randomized."""
    kind, mask = model.config.model_type, x[..., 0] >= 0
    place = np.maximum(mask.cumsum(1) - 1, 0)
    given = {"input_ids": np.maximum(x[..., 0], 0), "attention_mask": mask}
    given["position_ids"] = place + 2 if kind == "roberta" else place
    given |= {"token_type_ids": x[..., 1]} if kind == "bert" else {}
    return {name: torch.from_numpy(value.astype(np.int64)) for name, value in given.items()}


def theirs(model, x):
    with torch.no_grad():
        return model(**numbers(model, x), output_hidden_states=True)


def write(model, path, **changes):
    """The file of a state dict, with other spellings of keys: {regex: replacement}."""
    state = model.state_dict()
    for regex, text in changes.get("spelled", {}).items():
        state = {re.sub(regex, text, key): value for key, value in state.items()}
    torch.save(state, path)
    return path


@functools.partial(jax.jit, static_argnums=0)
def _run(model, variables, x):
    return model.apply(variables, x)


def run(model, variables, x):
    """(logits, out); traced once for equal networks, whose heads' layers have no hash."""
    return _run(model, variables, x) if not model.head else jax.jit(model.apply)(variables, x)


def loaded(kind, folder, what="Model", name="", **given):
    return load.load(name or f"small_{kind}", write(twin(kind, what), folder / "w.pth"), **given)


def network(kind, **fields):
    """A small network of ours and random variables."""
    module = models.get(f"small_{kind}").module
    model = module(**{"num_classes": 5, "vocab_size": VOCAB, **fields})
    return model, variables_of(model)


def variables_of(model):
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), texts()), np.random.default_rng(0)
    flat = {
        path: rng.standard_normal(leaf.shape).astype(np.float32) * 0.2 for path, leaf in trees.flatten(shapes).items()
    }
    return trees.unflatten({path: 1 + x if path.endswith("scale") else x for path, x in flat.items()})


@SIDES
@EACH
def test_every_layer_is_that_of_transformers(kind, left, tmp_path):
    own, x = loaded(kind, tmp_path), texts(left=left)
    assert own.layout == "hf" and own.card.num_classes == 0 and "new" not in own.origins.values()
    logits, out = run(own.model, own.variables, x)
    there = x[..., 0] >= 0
    hidden = [each.numpy() for each in theirs(twin(kind), x).hidden_states]
    cuts = list(own.model.cuts[:-1])
    if "norm" in cuts:
        cuts.remove("block1")  # theirs is behind the last norm
    for cut, expected in zip(cuts, hidden, strict=True):
        close(out[cut][..., :-1][there], expected[there], 1e-5)
        np.testing.assert_array_equal(out[cut][..., -1], there)
        assert not np.asarray(out[cut])[~there].any()
    last = LENGTH - 1 if left else there.sum(1) - 1
    place = last if kind == "gpt2" else there.argmax(1)
    close(out["pre_logits"], hidden[-1][np.arange(len(x)), place], 1e-5)
    np.testing.assert_array_equal(logits, out["pre_logits"])


@SIDES
@TWO_NOW
def test_classes_are_those_of_transformers_and_go_back_bit_for_bit(kind, left, tmp_path):
    model = twin(kind, "ForSequenceClassification")
    own, x = loaded(kind, tmp_path, "ForSequenceClassification"), texts(left=left)
    assert own.card.num_classes == 4 and "new" not in own.origins.values()
    logits, _ = run(own.model, own.variables, x)
    if kind == "gpt2" or not left:  # the others read the first place, not the first token
        if kind == "gpt2":
            x = np.where(x[..., :1] == 0, [[[1, 0]]], x)  # its padding, by which transformers finds the last token
            logits, _ = run(own.model, own.variables, x)
        close(logits, theirs(model, x).logits.numpy(), 1e-5)
    load.export(own.variables, f"small_{kind}", tmp_path / "again.safetensors", card=own.card)
    assert_same(formats.read(tmp_path / "again.safetensors")[0], model.state_dict())


def assert_same(found, state):
    assert set(found) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(found[key], value.numpy())


@pytest.mark.slow
@EACH
def test_gradients_are_those_of_transformers(kind, tmp_path):
    model, table = twin(kind, "ForSequenceClassification"), models.get(f"small_{kind}").layouts["hf"]
    own, x = loaded(kind, tmp_path, "ForSequenceClassification"), texts([LENGTH, LENGTH])
    x = np.maximum(x, [2, 0])  # what they take for padding has no gradient
    gradient = jax.grad(lambda params: jnp.sin(own.model.apply({"params": params}, x, True)[0]).sum())
    model.zero_grad()
    model(**numbers(model, x)).logits.sin().sum().backward()
    named = dict(model.named_parameters())
    for path, ours in trees.flatten(jax.jit(gradient)(own.variables["params"])).items():
        keys, transform = load.tables.sources_of(table, f"params/{path}")
        for key, value in zip(keys, transform.export(np.asarray(ours)) if keys else (), strict=True):
            expected = named[key].grad.numpy()
            # A constant in all scores changes no softmax: the gradient of a key's bias is nothing but rounding.
            assert np.abs(value - expected).max() < 1e-4 * max(np.abs(expected).max(), 0.1), key


@TWO_NOW
def test_logits_of_tokens_are_those_of_transformers_and_go_back_bit_for_bit(kind, tmp_path):
    model, name = twin(kind, "ForMaskedLM"), f"small_{kind}" if kind == "gpt2" else f"small_{kind}.mlm"
    own, x = loaded(kind, tmp_path, "ForMaskedLM", name), texts()
    assert "new" not in own.origins.values() and not own.dropped
    _, out = run(own.model, own.variables, x)
    there, expected = x[..., 0] >= 0, theirs(model, x).logits.numpy()
    hidden = out[own.model.cuts[-2]]
    for given in (hidden, hidden[..., :-1]):
        found = own.model.apply(own.variables, given, method="token_logits")
        assert found.dtype == jnp.float32
        close(found[there], expected[there], 1e-5)
    load.export(own.variables, name, tmp_path / "again.safetensors", card=own.card)
    written, state = formats.read(tmp_path / "again.safetensors")[0], model.state_dict()
    assert_same(written, {key: value for key, value in state.items() if key != "lm_head.weight"})


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_the_head_of_tokens_is_dropped_for_classes_and_made_anew_where_a_file_has_none(kind, tmp_path):
    with pytest.raises(ValueError, match="the file has no head: give num_classes for a new one"):
        loaded(kind, tmp_path, name=f"small_{kind}.mlm")
    own = loaded(kind, tmp_path, name=f"small_{kind}.mlm", num_classes=0)
    new = {path for path, origin in own.origins.items() if origin == "new"}
    assert {path.split("/")[2] for path in new} == {"transform", "norm", "token_bias"}
    file_of = write(twin(kind, "ForMaskedLM"), tmp_path / "mlm.pth")
    for name in (f"small_{kind}", f"small_{kind}.mlm"):
        own = load.load(name, file_of, 3)
        assert set(own.variables["params"]["head"]) == {"kernel", "bias"} and own.dropped
    with pytest.raises(ValueError, match="classes in the place of a token_head"):
        own.model.apply(own.variables, np.zeros((1, 2, 24), np.float32), method="token_logits")
    assert load.load(f"small_{kind}", file_of).card.num_classes == 0


def test_a_bare_network_with_the_first_spelling_of_norms_and_numbers_of_positions(tmp_path):
    model = twin("bert", "ForPreTraining")
    whole = load.load("small_bert", write(model, tmp_path / "w.pth"))
    old = {r"\.LayerNorm\.weight$": ".LayerNorm.gamma", r"\.LayerNorm\.bias$": ".LayerNorm.beta", r"^bert\.": ""}
    tensors = formats.read(write(model, tmp_path / "s.pth", spelled=old))[0]
    places = {"embeddings.position_ids": np.arange(9)[None]}
    formats.write_safetensors(tmp_path / "s.safetensors", tensors | places, {})
    again = load.load("small_bert", tmp_path / "s.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again.variables, whole.variables)
    formats.write_safetensors(tmp_path / "s.safetensors", {**tensors, "extra.weight": np.ones(2, np.float32)}, {})
    with pytest.raises(ValueError, match=r"1 unused keys \[extra\.weight\]"):
        load.load("small_bert", tmp_path / "s.safetensors")


@pytest.mark.slow
def test_other_spellings_of_the_same_file(tmp_path):
    model = twin("bert", "ForPreTraining")
    whole = load.load("small_bert.mlm", write(model, tmp_path / "w.pth"))
    old = {r"\.LayerNorm\.weight$": ".LayerNorm.gamma", r"\.LayerNorm\.bias$": ".LayerNorm.beta"}
    for spelled in (old, {r"^bert\.": ""}, {**old, r"^bert\.": ""}):
        own = load.load("small_bert.mlm", write(model, tmp_path / "s.pth", spelled=spelled))
        jax.tree.map(np.testing.assert_array_equal, own.variables, whole.variables)
    model.save_pretrained(tmp_path)
    saved = load.load("small_bert.mlm", tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, saved.variables, whole.variables)
    assert load.load("small_bert", tmp_path / "w.pth", 2).dropped[0] == "bert.pooler.dense.bias"
    masks = {"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32), "lm_head.weight": np.ones((50, 24))}
    tensors = formats.read(write(twin("gpt2", "ForMaskedLM"), tmp_path / "g.pth"))[0]
    bare = {key.removeprefix("transformer."): value for key, value in (tensors | masks).items()}
    formats.write_safetensors(tmp_path / "g.safetensors", bare, {})
    jax.tree.map(
        np.testing.assert_array_equal,
        load.load("small_gpt2", tmp_path / "g.safetensors").variables,
        load.load("small_gpt2", tmp_path / "g.pth").variables,
    )


@ONE_NOW
def test_the_vocabulary_is_that_of_the_file(kind, tmp_path):
    model, cls = twin(kind), type(twin(kind))
    larger = torch_reference.randomize(cls(CONFIGS[kind](vocab_size=VOCAB + 7)))
    own = load.load(f"small_{kind}", write(larger, tmp_path / "w.pth"), 3)
    assert own.card.vocab == own.model.vocab_size == VOCAB + 7
    load.export(own.variables, f"small_{kind}", tmp_path / "w.safetensors", card=own.card, layout="native")
    assert load.load("", tmp_path / "w.safetensors").card == own.card
    assert load.load(f"small_{kind}", write(model, tmp_path / "w.pth")).card.vocab == VOCAB


@pytest.mark.thin(1)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
@EACH
def test_padding_changes_nothing_wherever_it_stands(kind, pooling):
    model, variables = network(kind, pooling=pooling)
    lengths = [1, 4, LENGTH, 2]
    logits, out = run(model, variables, texts(lengths))
    for length, left in ((LENGTH, True), (2 * LENGTH, False), (2 * LENGTH, True)):
        x = texts(lengths, length, left)
        x[..., 1] = np.where(x[..., 0] < 0, 1, x[..., 1])  # a segment of padding means nothing
        again, its = run(model, variables, x)
        close(again, logits, 1e-5)
        for cut in model.cuts[:-1]:
            close(its[cut][x[..., 0] >= 0], out[cut][texts(lengths)[..., 0] >= 0], 1e-5)
    noise = np.random.default_rng(1).standard_normal(out["stem"].shape).astype(np.float32) * 1e3
    cut, there = out["stem"], np.asarray(out["stem"])[..., -1:] > 0
    noisy = jnp.where(there, cut, jnp.concatenate([noise[..., :-1], cut[..., -1:]], -1))
    close(jax.jit(functools.partial(model.apply, start="stem"))(variables, noisy)[0], logits, 1e-6)


def test_a_causal_network_does_not_read_what_comes():
    model, variables = network("gpt2")
    x = texts([LENGTH])
    other = np.concatenate([x[:, :5], (x[:, 5:] + [7, 0]) % [VOCAB, 2]], axis=1)
    (_, out), (_, others) = (run(model, variables, y) for y in (x, other))
    for cut in model.cuts[:-1]:
        np.testing.assert_array_equal(out[cut][:, :5], others[cut][:, :5])
        assert np.abs(out[cut][:, 5:] - others[cut][:, 5:]).max() > 1e-3


@pytest.mark.slow
@ONE_NOW
def test_cuts_half_precision_and_texts_without_a_token(kind):
    model, variables = network(kind, depth=1)
    x = np.concatenate([texts([3, LENGTH]), texts([0, 0])])
    logits, out = run(model, variables, x)
    names = [*model.cuts, "embedding", "logits"]
    assert set(out) == set(names) and np.isfinite(logits).all()
    assert not np.asarray(out["pre_logits"][2:]).any()

    @jax.jit
    def from_and_to(variables, x, out):
        return {
            cut: (model.apply(variables, out[cut], start=cut), model.apply(variables, x, stop=cut))
            for cut in model.cuts
        }

    for cut, ((again, rest), (stopped, before)) in from_and_to(variables, x, out).items():
        close(again, logits, 1e-6)
        close(stopped, out[cut], 1e-6)
        assert set(rest) == set(names[names.index(cut) + 1 :]) and {*before, *rest} == set(names)
    half, its = run(model.clone(dtype=jnp.bfloat16), variables, x)
    assert half.dtype == its["pre_logits"].dtype == jnp.float32 and its["stem"].dtype == jnp.bfloat16
    close(half, logits, 0.1)


@pytest.mark.slow
@ONE_NOW
def test_gradients_are_finite_and_the_same_where_they_are_recomputed(kind):
    model, variables = network(kind, depth=1)
    x = np.concatenate([texts([3, LENGTH]), texts([0, 0])])

    def gradient(remat):
        def loss(params):
            return jnp.sum(jnp.sin(model.clone(remat=remat).apply({"params": params}, x, True)[0]))

        return jax.jit(jax.value_and_grad(loss))(variables["params"])

    plain = gradient("")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plain))
    for remat in ("block", "dots"):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), gradient(remat), plain)


@pytest.mark.slow
@EACH
def test_drop_path_drops_branches_in_training_alone(kind):
    model, variables = network(kind)
    logits, dropping = run(model, variables, texts())[0], model.clone(drop_path=0.9)
    close(run(dropping, variables, texts())[0], logits, 1e-6)
    train = jax.jit(functools.partial(dropping.apply, train=True))
    dropped, _ = train(variables, texts(), rngs={"dropout": jax.random.key(0)})
    assert np.isfinite(dropped).all() and np.abs(dropped - logits).max() > 1e-3
    assert dropping.deterministic_cuts == ("stem", "block0")


def test_what_cannot_be_read_is_refused():
    model, variables = network("bert", positions=12, depth=1)
    with pytest.raises(ValueError, match="texts of 13 tokens, but there are positions for 12: truncate them"):
        model.apply(variables, texts([13], 13))
    with pytest.raises(ValueError, match="there are positions for 512"):
        jax.eval_shape(network("roberta")[0].init, jax.random.key(0), texts([513], 513))
    with pytest.raises(ValueError, match=r"model\.head begins with pool: networks of text pool their tokens"):
        jax.eval_shape(model.clone(head=(("pool", {}),)).init, jax.random.key(0), texts())
    x = texts([3, 3])
    x[0, 0, 0] = VOCAB  # of another vocabulary
    assert np.isnan(run(model, variables, x)[0]).any(axis=1).tolist() == [True, False]


def test_names_of_any_size():
    variant = models.get("bert_l3_h48_a4")
    model = variant.module(num_classes=2)
    assert (model.depth, model.width, model.heads, model.vocab_size) == (3, 48, 4, 30522)
    assert models.get("bert_l3_h48_a4") is variant and variant.card.model == "bert_l3_h48_a4"
    assert models.get("bert_l3_h48_a4.mlm").module(num_classes=0).token_head
    assert models.get("gpt2_l1_h16_a2").module(num_classes=0).causal
    own = load.load("bert_l1_h8_a2", "", 3)
    assert own.variables["params"]["head"]["kernel"].shape == (8, 3)
    for name in ("bert_l3_h48_a5", "gpt2_l3_h48_a5"):
        with pytest.raises(ValueError, match=f"{name}: a width of 48 is no multiple of 5 heads"):
            models.get(name)
    for name in ("bert_l0_h8_a2", "bert_l1_h8", "gpt2_l1_h8_a2.mlm", "bert_bas"):
        with pytest.raises(ValueError, match=f"there is no model {name!r}; nearest: "):
            models.get(name)


# As published, with the pooler where the file has one (Hugging Face's model pages; for the sizes that have no such
# number, that of transformers' network with random weights).
COUNTS = {
    "bert_tiny": 4385920, "bert_mini": 11170560, "bert_small": 28763648, "bert_medium": 41373184,
    "bert_base": 109482240, "bert_large": 335141888, "bert_base_chinese": 102267648, "minilm_l6": 22713216,
    "minilm_l12": 33360000, "distilbert_base": 66362880, "roberta_base": 124645632, "distilroberta_base": 82118400,
    "gpt2": 124439808, "gpt2_medium": 354823168, "gpt2_large": 774030080, "distilgpt2": 81912576,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_the_published_one(name):
    variant = models.get(name)
    model = variant.module(num_classes=0)
    assert (model.vocab_size, model.pooling) == (variant.card.vocab, variant.card.pooling)
    assert variant.card.max_length <= model.positions - model.first_position
    count = sum(np.prod(shape) for shape in load.default_shapes(name).values())
    pooler = 0 if "gpt" in name or name == "distilbert_base" else model.width * (model.width + 1)
    assert count + pooler == COUNTS[name]


def test_every_model_of_these_families_is_counted():
    named = {name.removesuffix(".mlm") for family in (bert, gpt2) for name in family.VARIANTS}
    assert named == set(COUNTS)


@pytest.mark.thin(1)
@pytest.mark.parametrize("addition", [("adapter", {"bottleneck": 2}), ("lora", {"rank": 2}), ("ssf", {})])
@EACH
def test_added_parameters_begin_without_effect_and_then_have_one(kind, addition):
    model, variables = network(kind, depth=1)
    x, rng = texts([3, LENGTH]), np.random.default_rng(0)
    logits, _ = run(model, variables, x)
    added = peft.init(model, variables, [addition], jax.random.key(0))
    adapted = jax.jit(peft.Adapted(model, (addition,)).apply)
    close(adapted({"params": {**variables["params"], **added}}, x)[0], logits)
    added = jax.tree.map(lambda leaf: np.float32(leaf + 0.1 * rng.standard_normal(leaf.shape)), added)
    both = {"params": {**variables["params"], **added}}
    changed, _ = adapted(both, x)
    assert np.abs(changed - logits).max() > 1e-2
    if peft.can_merge((addition,)):
        close(run(model, peft.merge(both, (addition,)), x)[0], changed)


@EACH
def test_the_places_of_lora_and_the_decay_by_layers(kind):
    model, variables = network(kind, depth=1)
    lora = trees.flatten(peft.init(model, variables, [("lora", {"rank": 2})], jax.random.key(0)))
    assert {path.rpartition("/")[0][14:] for path in lora} == {f"block0/attn/{name}" for name in ("qkv", "proj")}
    with pytest.raises(ValueError, match="prompt needs a ViT, and this is a Transformer"):
        peft.init(model, variables, [("prompt", {})], jax.random.key(0))
    factors = rules.layer_multipliers(trees.flatten(variables["params"]), model.cuts, 0.5)
    expected = {"stem/tok_embed/embedding": 2, "stem/pos_embed": 2, "block0/attn/qkv/kernel": 1, "block0/norm2/bias": 1}
    assert all(factors[f"backbone/{path}"] == 0.5**depth for path, depth in expected.items())
    assert factors["head/kernel"] == 1


@pytest.mark.thin(1)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("count", [7, 300])  # of 300 the scores are made in two parts
def test_attention_with_a_mask_is_that_of_float64(count, causal):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, count, 2, 8)).astype(np.float32) for _ in range(3))
    mask = np.arange(count) < np.array([[count], [4], [2]])
    mask[2] = mask[2, ::-1]
    scores = np.einsum("bqhd,bkhd->bhqk", q.astype(np.float64), k) / np.sqrt(8)
    read = mask[:, None, None] & (np.tril(np.ones((count, count), bool)) if causal else True)
    weights = np.where(read, np.exp(scores), 0)
    expected = np.einsum("bhqk,bkhd->bqhd", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9), v)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.02)):
        own = (jnp.asarray(x, dtype) for x in (q, k, v))
        found = np.asarray(attention.attend(*own, mask=jnp.asarray(mask), causal=causal), np.float32)
        close(found[mask], expected[mask], tolerance)
        assert np.isfinite(found).all()


@pytest.fixture
def gpu(monkeypatch):
    """What is traced is for a GPU, which is not here."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.thin(1)
@pytest.mark.parametrize("length", [9, 8])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_fused_attention_of_texts_lowers_for_a_gpu_with_its_gradient(length, kind, gpu):
    """No GPU runs it here: this holds that jax accepts the call, and that cuDNN's kernels are what it asks for."""
    model = network(kind, heads=3, width=24, attention="cudnn", dtype=jnp.bfloat16)[0]
    variables = jax.eval_shape(model.init, jax.random.key(0), texts())
    x = jax.ShapeDtypeStruct((4, length, 2), jnp.int32)
    step = jax.jit(jax.grad(lambda variables, x: model.apply(variables, x, True)[0].sum()))
    text = step.trace(variables, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text and "case" in text  # padding in front takes the other way


@pytest.mark.thin(1)
@pytest.mark.parametrize("length", [9, 8])
@pytest.mark.parametrize("causal", [False, True])
def test_what_cudnn_is_told_of_padding(length, causal, gpu, monkeypatch):
    """jax's own form of the call in the place of the kernel gives the numbers of a mask; of left padding too."""
    plain = functools.partial(jax.nn.dot_product_attention)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: plain(*a, **k))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((3, length, 2, 8)), jnp.bfloat16) for _ in range(3))
    right = np.arange(length) < np.array([[length], [3], [1]])
    for mask in (right, right[:, ::-1]):
        mask = jnp.asarray(mask)
        fused, own = (attention.attend(q, k, v, how, mask=mask, causal=causal) for how in ("cudnn", "xla"))
        close(np.float32(fused)[mask], np.float32(own)[mask], 0.02)
        assert not np.float32(fused)[~mask].any()
    nothing = attention.attend(q, k, v, "cudnn", mask=jnp.zeros((3, length), bool), causal=causal)
    assert np.isfinite(np.float32(nothing)).all()


@pytest.mark.slow
def test_minilm_as_published_gives_the_vectors_of_transformers(shared):
    tokenizers = pytest.importorskip("tokenizers")
    folder = shared / "weights/all_minilm_l6_v2"
    own = load.load("minilm_l6", folder / "model.safetensors")
    assert own.card.vocab == 30522 and own.card.pooling == "mean" and "new" not in own.origins.values()
    reader = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reader.no_padding(), reader.no_truncation()
    rain = "It rains in Zürich; don't go out! " * 9
    sentences = ("A man is playing a guitar.", "Someone plays an instrument.", rain, "")
    read = [reader.encode(sentence).ids for sentence in sentences]
    x = np.full((len(read), max(map(len, read)), 2), [-1, 0], np.int32)
    for row, its in zip(x, read, strict=True):
        row[: len(its), 0] = its
    vectors, out = run(own.model, own.variables, x)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    mask, hidden = x[..., 0] >= 0, theirs(model, x).last_hidden_state.numpy()
    close(out["block5"][..., :-1][mask], hidden[mask], 1e-5)
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    close(vectors, mean, 1e-5)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > 0.4 > 0.3 > unit[0] @ unit[2]
    assert tokens.mask_of(x).sum() == sum(map(len, read))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["", *(pytest.param(x, marks=pytest.mark.slow) for x in ("block", "dots"))])
@ONE_NOW
def test_the_token_that_is_read_by_itself_is_that_of_all_tokens_with_the_same_gradients(kind, remat):
    model, variables = network(kind, remat=remat, drop_path=0.5)
    x, cut = np.concatenate([texts(left=True), texts([0, 4])]), model.cuts[-2]
    rngs, weights = {"dropout": jax.random.key(3)}, np.random.default_rng(1).standard_normal((len(x), 5))

    def loss(params, alone):
        logits, out = model.apply({"params": params}, x, True, rngs=rngs)
        if not alone:  # behind all tokens of the last block
            logits, _ = model.apply({"params": params}, out[cut], True, start=cut)
        return jnp.sum(weights * logits), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    ((_, one), gradient), ((_, all_of_them), full) = (step(variables["params"], alone) for alone in (True, False))
    close(one, all_of_them, 1e-5)
    jax.tree.map(functools.partial(close, tolerance=1e-5), gradient, full)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_of_the_last_block_one_token_is_computed_where_nothing_else_is_read(kind, pooling):
    """Not where that token does not read all others, or all are read."""
    model, variables = network(kind, depth=1, pooling=pooling)

    def flops(what):
        def loss(params):
            logits, out = model.apply({"params": params}, texts([40, 30], 40), True)
            return {"logits": logits, "block0": out["block0"]}[what].sum()

        return jax.jit(jax.grad(loss)).lower(variables["params"]).compile().cost_analysis()["flops"]

    saves = pooling == "last" or (pooling == "cls" and kind == "bert")
    assert (flops("logits") < 0.6 * flops("block0")) == saves
