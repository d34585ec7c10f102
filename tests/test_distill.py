"""Terms of distillation: losses and gradients of fixed tensors against the papers' equations in torch, float64."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.methods import TERMS, distill_features
from tl_jax.methods.term import MAIN, Context, Network, Start, StreamFacts

torch = pytest.importorskip("torch")
functional = torch.nn.functional
B, K = 12, 5
STUDENT = SimpleNamespace(cuts=("stem", "stage1/block0", "stage1", "stage2", "pre_logits"))
TEACHER = SimpleNamespace(cuts=("stem", "stage1", "stage2/block0", "stage2", "pre_logits"))


def draw(*shape, seed=0, scale=1.0):
    return np.random.default_rng((seed, *shape)).normal(0, scale, shape)


def value_and_gradients(term, student, teacher, params=None, memory=None, modules=(STUDENT, TEACHER), **fields):
    """The result of a term on {output: array} of the student and of teachers by name, and the gradients."""
    teachers = teacher if "teacher" in teacher or "one" in teacher else {"teacher": teacher}

    def loss(student, teachers, params):
        empty = {name: {} for name in Context._fields}
        context = Context(**{
            **empty, "outputs": {MAIN: student}, "forward": lambda network, of: (teachers[network], {}),
            "params": params, "memory": memory, "modules": {"model": modules[0], "teacher": modules[1]}, **fields,
        })  # fmt: skip
        result = term.loss(context)
        return result.loss, result

    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (student, teachers, params or {}))
    gradients, result = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    assert not any(np.any(x) for x in jax.tree.leaves(gradients[1])), "a teacher has a gradient"
    return result, gradients[0], gradients[2]


def leaf(x):
    return torch.tensor(np.asarray(x, np.float64), requires_grad=True)


def agree(ours, theirs):
    """To 1e-5 of the largest number."""
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def softened(x, t):
    return functional.softmax(x / t, dim=1), functional.log_softmax(x / t, dim=1)


def their_kd(s, t, temperature=4.0):
    p = torch.stack([softened(x, temperature)[0] for x in t]).mean(0)
    return temperature**2 * functional.kl_div(softened(s, temperature)[1], p, reduction="sum") / len(s)


def their_hard(s, t):
    return functional.cross_entropy(s, torch.stack([softened(x, 1.0)[0] for x in t]).mean(0).argmax(1))


def their_dkd(s, t, label, temperature=4.0):
    p, q = (softened(x, temperature)[0] for x in (t[0], s))
    rows, tckd, nckd = torch.arange(len(s)), 0.0, 0.0
    for i in rows:
        others = [k for k in range(K) if k != label[i]]
        p_b, q_b = (torch.stack([x[i, label[i]], x[i, others].sum()]) for x in (p, q))
        p_hat, q_hat = (x[i, others] / x[i, others].sum() for x in (p, q))
        tckd, nckd = tckd + (p_b * (p_b / q_b).log()).sum(), nckd + (p_hat * (p_hat / q_hat).log()).sum()
    return temperature**2 * (1.0 * tckd + 8.0 * nckd) / len(s)


def their_dist(s, t, temperature=2.0):
    def pearson(a, b):
        return torch.stack([torch.corrcoef(torch.stack([x, y]))[0, 1] for x, y in zip(a, b, strict=True)])

    p, q = softened(t[0], temperature)[0], softened(s, temperature)[0]
    inter, intra = (1 - pearson(q, p)).mean(), (1 - pearson(q.T, p.T)).mean()
    return temperature**2 * (1.5 * inter + 0.5 * intra)


LABEL = np.arange(B) % K
ANSWERS = {
    "kd": ({"temperature": 4.0}, their_kd),
    "hard": ({}, their_hard),
    "dkd": ({}, lambda s, t: their_dkd(s, t, LABEL)),
    "dist": ({"temperature": 2.0, "beta": 1.5, "gamma": 0.5}, their_dist),
}


# Answers that are certain, too; their correlation would be that of float64's last digits.
@pytest.mark.parametrize(
    "name, scale", [*((name, 2.0) for name in ANSWERS), *((name, 60.0) for name in list(ANSWERS)[:3])]
)
def test_answers_are_learned_as_the_papers_say(name, scale):
    arguments, theirs = ANSWERS[name]
    student, teacher = draw(B, K, scale=scale), draw(B, K, seed=1, scale=scale)
    encoded = {MAIN: jax.nn.one_hot(LABEL, K)}
    found, gradients, _ = value_and_gradients(TERMS[name](**arguments), {"logits": student}, {"logits": teacher},
                                              encoded=encoded)  # fmt: skip
    s = leaf(student)
    expected = theirs(s, [torch.tensor(teacher)])
    expected.backward()
    agree(found.loss, expected.item())
    agree(gradients["logits"], s.grad)
    assert float(found.logs["agreement"]) == np.mean(student.argmax(1) == teacher.argmax(1))


@pytest.mark.parametrize("name", ["kd", "hard"])
def test_several_teachers_teach_the_mean_of_their_probabilities(name):
    student, one, two = draw(B, K), draw(B, K, seed=1, scale=3), draw(B, K, seed=2, scale=3)
    term = TERMS[name](teacher=("one", "two"))
    assert term.reads == ("one", "two")
    found, gradients, _ = value_and_gradients(
        term, {"logits": student}, {"one": {"logits": one}, "two": {"logits": two}}
    )
    s = leaf(student)
    expected = ANSWERS[name][1](s, [torch.tensor(one), torch.tensor(two)])
    expected.backward()
    agree(found.loss, expected.item())
    agree(gradients["logits"], s.grad)


def test_a_distillation_token_learns_what_the_class_token_does_not():
    student = {"logits": draw(B, K), "distilled_logits": draw(B, K, seed=3)}
    for name in ("kd", "hard"):
        _, gradients, _ = value_and_gradients(TERMS[name](), student, {"logits": draw(B, K, seed=1)})
        assert not np.any(gradients["logits"]) and np.any(gradients["distilled_logits"])


def test_streams_are_one_batch():
    student, other, teacher = draw(B, K), draw(4, K, seed=5), draw(B + 4, K, seed=1)
    answers = {MAIN: teacher[:B], "more": teacher[B:]}
    empty = {name: {} for name in Context._fields}
    found = TERMS["kd"](streams=(MAIN, "more")).loss(Context(**{
        **empty, "outputs": {MAIN: {"logits": jnp.asarray(student)}, "more": {"logits": jnp.asarray(other)}},
        "forward": lambda network, of: ({"logits": jnp.asarray(answers[of])}, {}),
    }))  # fmt: skip
    expected = their_kd(torch.tensor(np.concatenate([student, other])), [torch.tensor(teacher)])
    agree(found.loss, expected.item())


# Features. Maps are [B, h, w, C] here and [B, C, h, w] in torch.


def as_torch(x):
    return leaf(np.moveaxis(x, -1, 1))


def test_hints_are_the_distance_to_what_a_1x1_convolution_makes_of_the_student():
    student, teacher = draw(B, 4, 4, 6), draw(B, 7, 8, 9, seed=1)  # 7 rows to 4: bins of unequal size
    layer = {"kernel": draw(6, 9, seed=2), "bias": draw(9, seed=3)}
    term = TERMS["fitnet"](cuts=(("stage1", "stage2"),))
    found, gradients, own = value_and_gradients(
        term, {"stage1": student}, {"stage2": teacher}, {"fitnet": {"hint0": layer}}
    )
    s, w, b = as_torch(student), leaf(layer["kernel"].T[..., None, None]), leaf(layer["bias"])
    smaller = functional.adaptive_avg_pool2d(as_torch(teacher).detach(), (4, 4))
    expected = 100 * functional.mse_loss(functional.conv2d(s, w, b), smaller)
    expected.backward()
    agree(found.loss, expected.item())
    agree(gradients["stage1"], np.moveaxis(s.grad.numpy(), 1, -1))
    agree(own["fitnet"]["hint0"]["kernel"], w.grad[:, :, 0, 0].T)
    agree(own["fitnet"]["hint0"]["bias"], b.grad)


def test_attention_is_transferred_at_the_end_of_every_stage():
    student = {"stage1": draw(B, 8, 8, 3), "stage2": draw(B, 4, 4, 6)}
    teacher = {"stage1": draw(B, 8, 8, 5, seed=1), "stage2": draw(B, 6, 6, 9, seed=1)}
    term = TERMS["at"]()
    assert term.takes(STUDENT, TEACHER) == ("stage1", "stage2")
    found, gradients, _ = value_and_gradients(term, student, teacher)
    expected, leaves = 0.0, {}
    for cut, x in student.items():
        leaves[cut], size = as_torch(x), x.shape[1]
        other = functional.adaptive_avg_pool2d(as_torch(teacher[cut]).detach(), (size, size))
        both = [functional.normalize(each.pow(2).mean(1).flatten(1)) for each in (leaves[cut], other)]
        expected = expected + 1000 * (both[0] - both[1]).pow(2).mean()
    expected.backward()
    agree(found.loss, expected.item())
    for cut, x in leaves.items():
        agree(gradients[cut], np.moveaxis(x.grad.numpy(), 1, -1))


def relations(x):
    """Normalised distances and cosines by their definitions, one pair and one triple at a time."""
    n = len(x)
    far = torch.stack(
        [(x[i] - x[j]).pow(2).sum().clamp_min(1e-12).sqrt() for i in range(n) for j in range(n) if i != j]
    )
    units = [[functional.normalize(x[i] - x[j], dim=0) for i in range(n)] for j in range(n)]
    turned = torch.stack([units[j][i] @ units[j][k] for j in range(n) for i in range(n) for k in range(n)])
    return torch.cat([far / far.mean(), torch.zeros(n, dtype=far.dtype)]), turned


@pytest.mark.parametrize("duplicates", [False, True])
def test_relations_of_examples_and_their_gradients_are_finite_on_duplicates(duplicates):
    student, teacher = draw(7, 4), draw(7, 6, seed=1)
    if duplicates:
        student[3], teacher[3], teacher[5] = student[1], teacher[1], teacher[0]
    found, gradients, _ = value_and_gradients(TERMS["rkd"](), {"pre_logits": student}, {"pre_logits": teacher})
    s = leaf(student)
    with torch.no_grad():
        known = relations(torch.tensor(teacher))
    far, turned = (functional.smooth_l1_loss(a, b) for a, b in zip(relations(s), known, strict=True))
    expected = 25 * far + 50 * turned
    expected.backward()
    assert np.isfinite(gradients["pre_logits"]).all()
    agree(found.loss, expected.item())
    agree(gradients["pre_logits"], s.grad)
    agree([found.logs["distance"], found.logs["angle"]], [far.item(), turned.item()])


def test_relations_of_a_batch_of_one_example_are_zero():
    found, gradients, _ = value_and_gradients(TERMS["rkd"](), {"pre_logits": np.ones((4, 3))},
                                              {"pre_logits": np.ones((4, 2))})  # fmt: skip
    assert np.isfinite(found.loss) and np.isfinite(gradients["pre_logits"]).all()


def start_of(term, student=None, teacher=None, modules=(STUDENT, TEACHER), classes="abc", names=(), examples=40):
    """What a term is told before training, of networks with these shapes."""
    shapes = [{"logits": (1, 3), "pre_logits": (1, 6)} | (x or {}) for x in (student, teacher)]
    card = SimpleNamespace(class_names=names)
    blank = Start(*[None] * len(Start._fields))
    return term.init(blank._replace(
        task=SimpleNamespace(spec=SimpleNamespace(class_names=tuple(classes))), model=modules[0], shapes=shapes[0],
        networks={"teacher": Network(modules[1], card, {})}, outputs={"teacher": shapes[1]}, key=jax.random.key(0),
        facts={MAIN: StreamFacts(examples, 1)},
    ))  # fmt: skip


def their_crd(own, rows, chosen, index, scales, count):
    """Both directions of equation 18 with the authors' constants; own, rows: of student and teacher."""
    loss, found = 0.0, []
    for i, (a, b) in enumerate(((0, 1), (1, 0))):
        place = torch.tensor(np.concatenate([index[:, None], np.tile(chosen, (len(index), 1))], axis=1))
        p = torch.exp((rows[b][place] * own[a][:, None]).sum(-1) / 0.07)
        z = scales[i] or float(p.detach().mean()) * count
        found.append(z)
        noise = len(chosen) / count
        log_d = torch.cat([p[:, :1] / z, torch.full_like(p[:, 1:], noise)], 1).log() - (p / z + noise + 1e-7).log()
        loss = loss - log_d.sum() / len(index)
    return loss, found


def test_contrast_with_the_memory_over_two_steps():
    count, term = 40, TERMS["crd"](negatives=30, width=8)
    networks, memory = start_of(term, examples=count)
    params = {"crd": networks["crd"].variables["params"]}
    assert params["crd"]["student"]["kernel"].shape == (6, 8) and networks["crd"].group == "crd"
    assert {name: x.shape for name, x in memory.items()} == {
        "scale": (2,),
        "student": (count, 8),
        "teacher": (count, 8),
    }
    assert np.abs(memory["student"]).max() <= (8 / 3) ** -0.5
    rows = [torch.tensor(np.float64(memory[name])) for name in ("student", "teacher")]
    scales = [0.0, 0.0]
    for step in range(2):
        student, teacher = draw(B, 6, seed=step), draw(B, 6, seed=10 + step)
        index, key = np.random.default_rng(step).permutation(count)[:B], jax.random.key(step)
        result, gradients, own = value_and_gradients(
            term, {"pre_logits": student}, {"pre_logits": teacher}, params, memory,
            batch={MAIN: {"index": jnp.asarray(index)}}, key=key,
        )  # fmt: skip
        chosen = np.asarray(jax.random.randint(key, (30,), 0, count))
        s, leaves = leaf(student), jax.tree.map(leaf, params["crd"])
        made = [functional.normalize(x @ leaves[n]["kernel"] + leaves[n]["bias"])
                for n, x in (("student", s), ("teacher", torch.tensor(teacher)))]  # fmt: skip
        expected, scales = their_crd(made, rows, chosen, index, scales, count)
        (0.8 * expected).backward()
        agree(result.loss, 0.8 * expected.item())
        agree(gradients["pre_logits"], s.grad)
        for name in ("student", "teacher"):
            for part, x in own["crd"][name].items():
                agree(x, leaves[name][part].grad)
        for name, bank, x in zip(("student", "teacher"), rows, made, strict=True):
            bank[index] = functional.normalize(0.5 * bank[index] + 0.5 * x.detach())
            agree(result.memory[name], bank)
        agree(result.memory["scale"], scales)
        memory = result.memory


# What is compared, and what is refused.


class Tokens(SimpleNamespace):
    cuts, grid = ("stem", "block0", "block1", "pre_logits"), (2, 3)


def test_tokens_of_a_vit_are_a_map_of_its_patches():
    x = draw(B, 9, 4)  # class, distillation, a register, 6 patches
    np.testing.assert_array_equal(distill_features.as_map(x, Tokens()), x[:, 3:].reshape(B, 2, 3, 4))
    networks, _ = start_of(TERMS["fitnet"](), {"block1": (1, 9, 4)}, {"stage2": (1, 5, 5, 7)}, (Tokens(), TEACHER))
    assert networks["fitnet"].variables["params"]["hint0"]["kernel"].shape == (4, 7)


def test_networks_of_unlike_stages_are_compared_at_their_last_maps():
    assert TERMS["at"]().takes(STUDENT, Tokens()) == ("block0", "block1")
    deeper = SimpleNamespace(cuts=("stem", "block0", "block1", "block2", "pre_logits"))
    assert TERMS["at"]().takes(STUDENT, deeper) == TERMS["fitnet"]().takes(STUDENT, deeper) == ("block2",)


@pytest.mark.parametrize(
    "term, given, message",
    [
        (TERMS["fitnet"](cuts=(("stage7", "stage2"),)), {}, "the student has no cut 'stage7'.*it has stem"),
        (TERMS["at"](cuts=(("pre_logits", "stage3"),)), {}, "the teacher has no cut 'stage3'"),
        (
            TERMS["fitnet"](cuts=(("stage2", "stage2"),)),
            {"student": {"stage2": (1, 8, 6)}, "teacher": {"stage2": (1, 4, 4, 3)}},
            "tokens of a text are no map",
        ),
        (
            TERMS["at"](cuts=(("pre_logits", "pre_logits"),)), {}, "at compares places, and one map has a single one",
        ),
        (TERMS["kd"](), {"classes": "abcd"}, "'teacher' answers with 3 classes, the data has 4"),
        (TERMS["dist"](), {"names": ("b", "a", "c")}, "'teacher' has other classes: in another order: b, a, c"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_training(term, given, message):
    with pytest.raises(ValueError, match=message):
        start_of(term, **given)
