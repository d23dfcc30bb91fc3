"""Losses of one chip's tokens, a chunk of tokens at a time, and their gradients in closed form.

For a token with target y, student logits s, teacher logits t and loss weights a (cross-entropy), b (squared log-partition)
and c (KL of the distributions p, q that T smooths: Hinton et al., arXiv 1503.02531), with log Z = logsumexp(s):

    loss         =  a (log Z - s_y)  +  b (log Z)²  +  c KL(p ‖ q),     p = softmax(t / T), q = softmax(s / T)
    d loss / d s =  (a + 2 b log Z) softmax(s)  -  a onehot(y)  +  c (q - p) / T

The weights are known before the logits, so the gradient of a chunk is formed while its logits exist: nothing is recomputed and
no logits outlive their chunk. The code is that of one chip; `Shards` says what lies on the others.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32


class TokenTerms(NamedTuple):
    """Float32 values at each position, unweighted. The KL terms are 0 without a teacher.

    `kl_at_temperature` is KL(teacher ‖ student) of the distributions smoothed by T, `kl` the same at T = 1; `agreement` is 1
    where both have the same most likely token.
    """

    cross_entropy: Float32[Array, "*tokens"]
    z_squared: Float32[Array, "*tokens"]
    teacher_cross_entropy: Float32[Array, "*tokens"]
    kl_at_temperature: Float32[Array, "*tokens"]
    kl: Float32[Array, "*tokens"]
    entropy: Float32[Array, "*tokens"]
    teacher_entropy: Float32[Array, "*tokens"]
    agreement: Float32[Array, "*tokens"]


class LossWeights(NamedTuple):
    """What the terms of these names weigh in the loss at each position, denominators and λ T² included."""

    cross_entropy: Float32[Array, "*tokens"]
    z_squared: Float32[Array, "*tokens"]
    kl_at_temperature: Float32[Array, "*tokens"]


class Tokens(NamedTuple):
    """What the losses read of each token beside the student's hidden state; without a teacher its states are None."""

    targets: Int32[Array, "*tokens"]
    weights: LossWeights
    teacher_hidden: Float[Array, "*tokens d"] | None


class Shards(NamedTuple):
    """Mesh axes that split the tokens, the head's width and the head's vocabulary; empty where nothing is split."""

    tokens: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()


class Wanted(NamedTuple):
    """Which gradients are formed: a frozen head costs neither the matrix product nor the accumulator."""

    hidden: bool = False
    head: bool = False


class Totals(NamedTuple):
    """Terms of all tokens, and the wanted gradients of the weighted loss; what is not wanted is None."""

    terms: TokenTerms
    hidden_gradient: Float[Array, "t d"] | None
    head_gradient: Float32[Array, "d n"] | None


class Centred(NamedTuple):
    """Logits less their maximum over the whole vocabulary, that maximum, and the token that has it."""

    logits: Float32[Array, "c n"]
    maximum: Float32[Array, "c"]
    likeliest: Int32[Array, "c"]


class Moments(NamedTuple):
    """Sums over the whole vocabulary for centred logits x: Σ eˣ, Σ x eˣ, Σ e^(x/T), and x of the target."""

    partition: Float32[Array, "c"]
    energy: Float32[Array, "c"]
    smooth_partition: Float32[Array, "c"]
    target: Float32[Array, "c"]

    def cross_entropy(self) -> Float32[Array, "c"]:
        """-log softmax(x) of the target."""
        return jnp.log(self.partition) - self.target

    def entropy(self) -> Float32[Array, "c"]:
        """Entropy of softmax(x), in nats."""
        return jnp.log(self.partition) - self.energy / self.partition


@dataclasses.dataclass(frozen=True)
class ChipLosses:
    """The losses of tokens that lie on one chip.

    Args:
        head: this chip's share of the vocabulary, the whole width, in the dtype of the hidden states.
        temperature: T of the smoothed KL.
        wanted: gradients to form.
        shards: mesh axes that the code runs under.
    """

    head: Float[Array, "d n"]
    temperature: Float32[Array, ""]
    wanted: Wanted
    shards: Shards

    def totals(self, hidden: Float[Array, "t d"], tokens: Tokens, chunk: int) -> Totals:
        """Terms and gradients, `chunk` tokens at a time; the head's gradient is the sum over this chip's tokens alone."""
        count = hidden.shape[0]
        chunk = min(chunk, count)

        def body(number: Int32[Array, ""], totals: Totals) -> Totals:
            # Where the chunks do not come out even the last one begins early; tokens it sees again weigh nothing.
            start = jnp.minimum(number * chunk, count - chunk)
            take = lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk)
            part, fresh = jax.tree.map(take, tokens), start + jnp.arange(chunk) >= number * chunk
            part = part._replace(weights=jax.tree.map(lambda weight: jnp.where(fresh, weight, 0.0), part.weights))
            return _add(totals, self.chunk_totals(take(hidden), part), start)

        return jax.lax.fori_loop(0, -(-count // chunk), body, self._zeros(hidden))

    def chunk_totals(self, hidden: Float[Array, "c d"], part: Tokens) -> Totals:
        """Terms and gradients of one chunk: the one place where logits exist."""
        chosen = self._columns() == part.targets[:, None]
        student = self._centred(hidden)
        moments = self._moments(student, chosen)
        gradient = self._likelihood_gradient(student, moments, chosen, part.weights)
        terms = _student_terms(student, moments)
        if part.teacher_hidden is not None:
            teacher = self._centred(part.teacher_hidden)
            teacher_moments = self._moments(teacher, chosen)
            terms = self._with_teacher(terms, student, moments, teacher, teacher_moments)
            smooth = self._smooth(student, moments) - self._smooth(teacher, teacher_moments)
            gradient += (part.weights.kl_at_temperature / self.temperature)[:, None] * smooth
        return Totals(terms, *self._gradients(hidden, gradient.astype(hidden.dtype)))

    def _zeros(self, hidden: Float[Array, "t d"]) -> Totals:
        terms = TokenTerms(*(jnp.zeros(hidden.shape[0], jnp.float32) for _ in TokenTerms._fields))
        head = jnp.zeros(self.head.shape, jnp.float32) if self.wanted.head else None
        return Totals(terms, jnp.zeros_like(hidden) if self.wanted.hidden else None, head)

    def _columns(self) -> Int32[Array, "n"]:
        """The tokens whose logits this chip has."""
        size, axes = self.head.shape[1], self.shards.vocabulary
        return jnp.arange(size) + (size * jax.lax.axis_index(axes) if axes else 0)

    def _sum(self, x: Float32[Array, "c n"]) -> Float32[Array, "c"]:
        """The sum over the whole vocabulary."""
        return jax.lax.psum(jnp.sum(x, axis=-1), self.shards.vocabulary)

    def _centred(self, hidden: Float[Array, "c d"]) -> Centred:
        logits = jnp.einsum("cd,dn->cn", hidden, self.head, preferred_element_type=jnp.float32)
        local = jnp.max(logits, axis=-1)
        maximum = jax.lax.pmax(local, self.shards.vocabulary)
        likeliest = jnp.where(local == maximum, self._columns()[jnp.argmax(logits, axis=-1)], jnp.iinfo(jnp.int32).max)
        return Centred(logits - maximum[:, None], maximum, jax.lax.pmin(likeliest, self.shards.vocabulary))

    def _moments(self, x: Centred, chosen: Bool[Array, "c n"]) -> Moments:
        exponential = jnp.exp(x.logits)
        return Moments(
            self._sum(exponential),
            self._sum(exponential * x.logits),
            self._sum(jnp.exp(x.logits / self.temperature)),
            self._sum(jnp.where(chosen, x.logits, 0.0)),
        )

    def _smooth(self, x: Centred, moments: Moments) -> Float32[Array, "c n"]:
        """softmax(logits / T)."""
        return jnp.exp(x.logits / self.temperature) / moments.smooth_partition[:, None]

    def _with_teacher(
        self, terms: TokenTerms, student: Centred, moments: Moments, teacher: Centred, teacher_moments: Moments
    ) -> TokenTerms:
        """The student's terms and what the teacher adds to them; the KLs are taken from differences of logits."""
        difference = teacher.logits - student.logits
        plain = self._sum(jnp.exp(teacher.logits) * difference) / teacher_moments.partition
        smooth = self._sum(jnp.exp(teacher.logits / self.temperature) * difference) / teacher_moments.smooth_partition
        log_ratio = lambda a, b: jnp.log(a) - jnp.log(b)
        return terms._replace(
            teacher_cross_entropy=teacher_moments.cross_entropy(),
            kl_at_temperature=smooth / self.temperature
            + log_ratio(moments.smooth_partition, teacher_moments.smooth_partition),
            kl=plain + log_ratio(moments.partition, teacher_moments.partition),
            entropy=moments.entropy(),
            teacher_entropy=teacher_moments.entropy(),
            agreement=(student.likeliest == teacher.likeliest).astype(jnp.float32),
        )

    def _likelihood_gradient(
        self, student: Centred, moments: Moments, chosen: Bool[Array, "c n"], weights: LossWeights
    ) -> Float32[Array, "c n"]:
        """Gradient of cross-entropy and z-loss with respect to the logits."""
        log_partition = student.maximum + jnp.log(moments.partition)
        total = weights.cross_entropy + 2 * weights.z_squared * log_partition
        probabilities = jnp.exp(student.logits) * (total / moments.partition)[:, None]
        return probabilities - jnp.where(chosen, weights.cross_entropy[:, None], 0.0)

    def _gradients(
        self, hidden: Float[Array, "c d"], gradient: Float[Array, "c n"]
    ) -> tuple[Float[Array, "c d"] | None, Float32[Array, "d n"] | None]:
        """From the gradient of the logits, in the dtype of the hidden states, those of hidden states and head."""
        product = lambda equation, *x: jnp.einsum(equation, *x, preferred_element_type=jnp.float32)
        hidden_gradient = head_gradient = None
        if self.wanted.hidden:
            partial = product("cn,dn->cd", gradient, self.head)
            hidden_gradient = jax.lax.psum(partial, self.shards.vocabulary).astype(hidden.dtype)
        if self.wanted.head:
            head_gradient = product("cd,cn->dn", hidden, gradient)
        return hidden_gradient, head_gradient


def _student_terms(student: Centred, moments: Moments) -> TokenTerms:
    zeros = jnp.zeros_like(student.maximum)
    z_squared = (student.maximum + jnp.log(moments.partition)) ** 2
    return TokenTerms(moments.cross_entropy(), z_squared, *(zeros,) * (len(TokenTerms._fields) - 2))


def _add(totals: Totals, part: Totals, start: Int32[Array, ""]) -> Totals:
    """`totals` with the chunk that begins at token `start`: terms written, gradients added."""
    write = lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, start, axis=0)
    read = lambda whole, new: jax.lax.dynamic_slice_in_dim(whole, start, new.shape[0])
    return Totals(
        jax.tree.map(write, totals.terms, part.terms),
        jax.tree.map(
            lambda whole, new: write(whole, read(whole, new) + new), totals.hidden_gradient, part.hidden_gradient
        ),
        jax.tree.map(jnp.add, totals.head_gradient, part.head_gradient),
    )
