"""The objective against optax and torch on one chip and on meshes, what its gradient costs, and what DCL needs of it."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from hypervl_jax import partitioning
from hypervl_jax.partitioning import MeshConfig
from hypervl_jax.training import losses
from hypervl_jax.training.loss_chunks import LossWeights
from tests.small import random_batch

ROWS, LENGTH, WIDTH, WORDS = 8, 20, 16, 48
MESHES = {
    "one chip": None,
    "fsdp": MeshConfig(fsdp=8),
    "fsdp and tensor": MeshConfig(fsdp=4, tensor=2),
    "slice, context and tensor": MeshConfig(slice=2, fsdp=1, context=2, tensor=2),
    "data and fsdp": MeshConfig(data=2, fsdp=4),
}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {
        "hidden": normal(ROWS, LENGTH, WIDTH),
        "teacher": normal(ROWS, LENGTH, WIDTH),
        "head": normal(WIDTH, WORDS),
        "targets": rng.integers(0, WORDS, (ROWS, LENGTH)).astype(np.int32),
        "weights": LossWeights(*(rng.random((ROWS, LENGTH)).astype(np.float32) for _ in LossWeights._fields)),
    }


def on(mesh):
    """The context of a mesh of all eight devices, or of none."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(partitioning.make_mesh(mesh))


def assert_close(actual, expected):
    """Equal to 1e-5 of the value, or of the largest value where sums cancel."""
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def plain_loss(inputs, hidden, head, temperature, with_teacher):
    """All logits at once, losses from optax."""
    student, targets, weights = hidden @ head, inputs["targets"], inputs["weights"]
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(student, targets)
    loss = weights.cross_entropy * cross_entropy + weights.z_squared * jax.nn.logsumexp(student, axis=-1) ** 2
    if with_teacher:
        teacher = jax.nn.softmax(jax.lax.stop_gradient(inputs["teacher"] @ head) / temperature)
        kl = optax.losses.kl_divergence(jax.nn.log_softmax(student / temperature), teacher)
        loss += weights.kl_at_temperature * kl
    return jnp.sum(loss)


def chunked_loss(inputs, hidden, head, temperature, with_teacher, chunk=7):
    teacher = inputs["teacher"] if with_teacher else None
    arguments = (hidden, head, inputs["targets"], inputs["weights"])
    return losses.weighted_loss(*arguments, chunk=chunk, teacher_hidden=teacher, temperature=temperature)[0]


def loss_and_gradients(function, inputs, with_teacher, mesh=None):
    loss = lambda *x: function(inputs, *x, with_teacher)
    with on(mesh):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(inputs["hidden"], inputs["head"], 2.0)


@pytest.fixture(scope="module")
def with_optax(inputs):
    return {with_teacher: loss_and_gradients(plain_loss, inputs, with_teacher) for with_teacher in (False, True)}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_loss_and_gradients_agree_with_optax_on_every_mesh(inputs, with_optax, mesh):
    ours, expected = loss_and_gradients(chunked_loss, inputs, True, mesh), with_optax[True]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert_close(a, b)


def test_loss_and_gradients_without_a_teacher_agree_with_optax(inputs, with_optax):
    ours, expected = loss_and_gradients(chunked_loss, inputs, False), with_optax[False]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert_close(a, b)


def test_smoothed_kl_and_its_gradient_agree_with_torch(inputs):
    weights = np.asarray(inputs["weights"].kl_at_temperature)
    only_kl = LossWeights(np.zeros_like(weights), np.zeros_like(weights), weights)
    loss = lambda hidden: chunked_loss({**inputs, "weights": only_kl}, hidden, inputs["head"], 2.0, True)
    value, gradient = jax.jit(jax.value_and_grad(loss))(inputs["hidden"])
    hidden = torch.tensor(inputs["hidden"], requires_grad=True)
    head, teacher = torch.tensor(inputs["head"]), torch.tensor(inputs["teacher"])
    log_student, log_teacher = (torch.log_softmax(x @ head / 2.0, dim=-1) for x in (hidden, teacher))
    pointwise = torch.nn.functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    expected = (pointwise * torch.tensor(weights)).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, hidden.grad.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=2, context=2, tensor=2)], ids=["one chip", "mesh"])
def test_every_term_agrees_with_all_logits_at_once(inputs, mesh):
    def terms():
        teacher = {"teacher_hidden": inputs["teacher"], "temperature": 3.0}
        return losses.token_terms(inputs["hidden"], inputs["head"], inputs["targets"], chunk=6, **teacher)

    with on(mesh):
        ours = jax.jit(terms)()
    student, teacher = (jnp.asarray(inputs[name] @ inputs["head"]) for name in ("hidden", "teacher"))
    cross_entropy = lambda x: optax.losses.softmax_cross_entropy_with_integer_labels(x, inputs["targets"])
    entropy = lambda x: -jnp.sum(jax.nn.softmax(x) * jax.nn.log_softmax(x), axis=-1)
    kl = lambda t: optax.losses.kl_divergence(jax.nn.log_softmax(student / t), jax.nn.softmax(teacher / t))
    expected = losses.TokenTerms(
        cross_entropy=cross_entropy(student),
        z_squared=jax.nn.logsumexp(student, axis=-1) ** 2,
        teacher_cross_entropy=cross_entropy(teacher),
        kl_at_temperature=kl(3.0),
        kl=kl(1.0),
        entropy=entropy(student),
        teacher_entropy=entropy(teacher),
        agreement=jnp.argmax(student, axis=-1) == jnp.argmax(teacher, axis=-1),
    )
    for name, term in ours._asdict().items():
        np.testing.assert_allclose(term, getattr(expected, name), rtol=1e-5, atol=1e-5, err_msg=name)
    assert 0 < np.mean(ours.agreement) < 1


@pytest.mark.parametrize("chunk", [23, 1000], ids=["uneven", "longer than the tokens"])
def test_the_chunk_changes_neither_loss_nor_gradients(inputs, chunk):
    whole, parts = (
        loss_and_gradients(partial(chunked_loss, chunk=size), inputs, True) for size in (ROWS * LENGTH, chunk)
    )
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert_close(a, b)


def test_kl_of_equal_branches_is_zero_and_they_agree(inputs):
    hidden = inputs["hidden"]
    measure = partial(losses.token_terms, chunk=50, teacher_hidden=hidden, temperature=3.0)
    terms = jax.jit(measure)(hidden, inputs["head"], inputs["targets"])
    assert np.all(np.asarray(terms.kl) == 0)
    assert np.all(np.asarray(terms.kl_at_temperature) == 0)
    assert np.all(np.asarray(terms.agreement) == 1)
    np.testing.assert_array_equal(terms.entropy, terms.teacher_entropy)


def test_logits_far_from_zero_neither_overflow_nor_lose_the_kl(inputs):
    """Two words of each hidden state's head have logits near 1e4; KL and gradient stay those of the differences."""
    head = jnp.concatenate([jnp.full((WIDTH, 2), 100.0), jnp.zeros((WIDTH, 2))], axis=1).at[0, 0].add(0.01)
    hidden, teacher = jnp.full((1, 2, WIDTH), 6.0), jnp.full((1, 2, WIDTH), 6.0).at[:, :, 0].add(50.0)
    terms = losses.token_terms(hidden, head, jnp.zeros((1, 2), jnp.int32), chunk=2, teacher_hidden=teacher)
    gap = lambda x: (x @ head)[..., 0] - (x @ head)[..., 1]
    p, q = jax.nn.sigmoid(gap(teacher)), jax.nn.sigmoid(gap(hidden))
    expected = p * jnp.log(p / q) + (1 - p) * jnp.log((1 - p) / (1 - q))
    np.testing.assert_allclose(terms.kl, expected, rtol=1e-5)
    np.testing.assert_allclose(terms.cross_entropy, -jnp.log(q), rtol=1e-5)


def test_no_gradient_reaches_the_teacher_its_use_of_the_head_or_the_terms(inputs, with_optax):
    def loss(teacher, head):
        arguments = (inputs["hidden"], head, inputs["targets"], inputs["weights"])
        return losses.weighted_loss(*arguments, chunk=50, teacher_hidden=teacher, temperature=2.0)

    gradients = jax.jit(jax.grad(lambda *x: loss(*x)[0], argnums=(0, 1)))(inputs["teacher"], inputs["head"])
    assert np.all(np.asarray(gradients[0]) == 0)
    assert_close(gradients[1], with_optax[True][1][1])
    of_terms = jax.jit(jax.grad(lambda head: jnp.sum(loss(inputs["teacher"], head)[1].kl)))(inputs["head"])
    assert np.all(np.asarray(of_terms) == 0)


def compiled_gradient(words, rows, length, width, chunk, argnums=(0, 1)):
    """The compiled gradient of cross-entropy over zeros, on the mesh that is set."""
    hidden, head = jnp.zeros((rows, length, width)), jnp.zeros((width, words))
    targets, weights = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length))

    def loss(hidden, head):
        return losses.weighted_loss(hidden, head, targets, LossWeights(weights, weights, weights), chunk=chunk)[0]

    return jax.jit(jax.grad(loss, argnums=argnums)).lower(hidden, head).compile()


def test_full_logits_never_exist_whether_or_not_the_chunks_come_out_even():
    words, tokens = 4096, 512
    temporaries = lambda chunk: compiled_gradient(words, 2, 256, 8, chunk).memory_analysis().temp_size_in_bytes
    logits = tokens * words * 4
    assert temporaries(tokens) >= logits
    even, uneven = temporaries(16), temporaries(15)
    assert even < logits / 8
    assert uneven < 1.01 * even


def test_no_product_is_formed_for_a_head_that_does_not_move():
    """Logits, gradient of the hidden states and gradient of the head are one matrix product of the same size each."""
    flops = lambda argnums: compiled_gradient(1024, 2, 64, 128, 128, argnums).cost_analysis()["flops"]
    assert flops((0, 1)) / flops((0,)) == pytest.approx(3 / 2, rel=0.05)


def collectives(text):
    """Lines of a compiled program that move data between devices."""
    names = (" all-gather(", " all-reduce(", " reduce-scatter(", " collective-permute(", " all-to-all(")
    return [line for line in text.splitlines() if any(name in line for name in names)]


def test_the_head_is_gathered_once_and_its_gradient_reduced_once_not_in_every_chunk():
    with jax.set_mesh(partitioning.make_mesh(MeshConfig(fsdp=8))):
        lines = collectives(compiled_gradient(64, 8, 32, 16, 4).as_text())
    of_the_head = [line for line in lines if "shard_map" in line]
    assert ["while/body" in line for line in of_the_head] == [False, False]
    assert " all-gather(" in of_the_head[0]
    assert " reduce-scatter(" in of_the_head[1]


def test_kl_positions():
    batch = random_batch(0)
    answer, text, everything = (np.asarray(losses.kl_mask(batch, name)) for name in losses.KL_POSITIONS)
    np.testing.assert_array_equal(answer, batch.loss_weights > 0)
    for row in range(batch.tokens.shape[0]):
        for place in range(batch.tokens.shape[1]):
            following = place + 1
            inside = (
                following < batch.tokens.shape[1]
                and batch.segments[row, place] > 0
                and batch.segments[row, following] == batch.segments[row, place]
            )
            assert everything[row, place] == inside
            assert text[row, place] == (inside and batch.visual_index[row, following] < 0)
