"""The claims that the studies test, each marked by a rule that was fixed before any run, with the figure that decided it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hypervl_jax.evaluation.analysis import REQUIRED_MARGIN
from hypervl_jax.evaluation.arm_study import MARGIN
from hypervl_jax.evaluation.compression_study import ENTROPY, UNIFORM
from hypervl_jax.evaluation.failure_signs import MOST_SHARE
from hypervl_jax.evaluation.study_text import estimate, number, share

HELD, NOT_HELD, NOT_TESTABLE = "held", "**not held**", "not testable here"

TOKENS_SAVED, SCORE_KEPT = 0.202, 0.987
"""HyperVL (arXiv 2512.14052): 20.2 % fewer visual tokens at 98.7 % of the score."""

LEAST_RANK, LEAST_AGREEMENT, LEAST_GAIN = 0.8, 0.9, 0.05
"""Rank correlation of the tasks' α with α*, share of same answers, share of an answer's time: below, a claim is not held."""

MAIN_EPSILON = 0.05
"""The ε whose compressor the claims are about, chosen before any run; the others are shown beside it."""

_NOT_WORSE = frozenset(
    {"Large does not lose by sharing the LLM, at equal Large steps", "the KL term does not cost Large"}
)
"""Contrasts that ask whether something is not worse, by `MARGIN`, instead of better."""


class Claim(NamedTuple):
    """What is claimed, the paper's figure, ours, and the mark; whether it is about answers, which a model that sees nothing says
    nothing about.
    """

    text: str
    paper: str
    ours: str
    mark: str
    about_score: bool = True


def mark(held: bool) -> str:
    """The mark of a claim that was tested."""
    return HELD if held else NOT_HELD


def main_compressor(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The compressor at `MAIN_EPSILON` that saw all tasks; else the first that saw all; None without any."""
    whole = [row for row in values["compressors"] if not row["left_out"]]
    at = [row for row in whole if row["epsilon"] == MAIN_EPSILON]
    return next(iter(at or whole), None)


def vrc_claims(values: Mapping[str, Any], real_share: float) -> list[Claim]:
    """The VRC's claims from an ablation's figures; `real_share` is its share of a Base tile's FLOPs at the real sizes."""
    row = main_compressor(values)
    if row is None:
        return []
    claims = _vrc_claims(row, real_share)
    if values["reads"]["mean"] >= REQUIRED_MARGIN:
        return claims
    # Whoever does not look loses nothing by compression.
    blind = f"the model reads too little: {estimate(values['reads'], True)} points above blank pictures, {share(REQUIRED_MARGIN)} are needed"
    return [claim._replace(ours=blind, mark=NOT_TESTABLE) if claim.about_score else claim for claim in claims]


def _vrc_claims(row: Mapping[str, Any], real_share: float) -> list[Claim]:
    found, rank = row["vrc"], row["adaptivity"]["tasks"]
    retention, saved = found["retention"], found["tokens_saved"]
    differences = {other["kind"]: found["against"][other["name"]] for other in row["same_tokens"]}
    rules = {kind: value for kind, value in differences.items() if kind != UNIFORM}
    latency = {way: sum(steps.values()) for way, steps in row["latency"].items()}
    return [
        Claim(
            "fewer visual tokens at nearly the whole score",
            f"{share(TOKENS_SAVED)} fewer at {share(SCORE_KEPT)}",
            f"{share(saved)} fewer ({share(found['mean_tokens_saved'])} as a mean over tasks) at {estimate(retention)} %",
            mark(saved >= TOKENS_SAVED and retention["mean"] >= SCORE_KEPT),
        ),
        Claim(
            "content-adaptive: the tasks' mean α follows α*",
            "DocVQA 49.5 % saved, ChartQA 3.2 %",
            f"rank correlation {number(rank)} (at least {LEAST_RANK}); saved "
            + ", ".join(f"{task['task']} {share(task['tokens_saved'])}" for task in row["tasks"]),
            mark(rank is not None and rank >= LEAST_RANK),
        ),
        Claim(
            "above uniform scaling at equal tokens",
            "not given",
            f"{estimate(differences[UNIFORM], True)} points",
            mark(differences[UNIFORM]["low"] > 0),
        ),
        Claim(
            "above the hand rules at equal tokens",
            "not given",
            ", ".join(
                f"{'entropy' if kind == ENTROPY else kind} {estimate(value, True)}" for kind, value in rules.items()
            ),
            mark(all(value["low"] > 0 for value in rules.values())),
        ),
        Claim(
            f"the compressor costs at most {MOST_SHARE:.0%} of one Base tile (real sizes, FLOPs)",
            "about 2 ms on a phone",
            f"{100 * real_share:.2f} %",
            mark(real_share <= MOST_SHARE),
            about_score=False,
        ),
        Claim(
            f"an answer is faster with the compressor, by {LEAST_GAIN:.0%} or more (tiny model, this machine)",
            "12.9× with tiling and VRC on an NPU",
            f"{latency['full']:.1f} ms without, {latency['vrc']:.1f} ms with",
            mark(latency["vrc"] <= (1 - LEAST_GAIN) * latency["full"]),
            about_score=False,
        ),
    ]


def dcl_claims(values: Mapping[str, Any], guessed: float) -> list[Claim]:
    """DCL's claims from the arms' figures: better where the interval lies above 0, not worse where it lies above −`MARGIN`.

    `guessed` is what the best guess without the pictures scores: two branches that both guess agree, which says nothing.
    """
    dcl = next((arm for arm in values["arms"] if arm["name"] == "dcl"), None)
    claims = [_contrast_claim(row) for row in values["contrasts"]] + ([_agreement_claim(dcl)] if dcl else [])
    if dcl and dcl["branches"]["base"]["score"]["mean"] - guessed >= REQUIRED_MARGIN:
        return claims
    note = f"; the branches read too little to tell: {share(REQUIRED_MARGIN)} above the best blind guess ({share(guessed)}) are needed"
    return [claim._replace(ours=claim.ours + note, mark=NOT_TESTABLE) for claim in claims]


def _contrast_claim(row: Mapping[str, Any]) -> Claim:
    found, not_worse = row["difference"], row["question"] in _NOT_WORSE
    ours = f"{estimate(found, True)} points, seeds {len(row['seeds'])}; smallest detectable {share(row['detectable'])}"
    bound = f" (not worse by more than {share(MARGIN)})" if not_worse else ""
    return Claim(row["question"] + bound, _paper(row), ours, mark(found["low"] > (-MARGIN if not_worse else 0)))


def _agreement_claim(dcl: Mapping[str, Any]) -> Claim:
    same = dcl["same_answer"]
    ours = (
        f"{estimate(same)} % of answers, KL {dcl['kl']['mean']:.3f} nats, 1 − cos {dcl['hidden_distance']['mean']:.3f}"
    )
    text = f"switching encoders keeps at least {LEAST_AGREEMENT:.0%} of answers after DCL"
    return Claim(text, "not given", ours, mark(same["mean"] >= LEAST_AGREEMENT))


def _paper(row: Mapping[str, Any]) -> str:
    lifts = row["branch"] == "base" and row["arm"] == "dcl" and row["baseline"].startswith("base")
    return "+5.0 AI2D, +2.6 ChartQA, +22 OCRBench" if lifts else "not given"


def untested() -> list[Claim]:
    """What this machine cannot say."""
    needs = "needs the weights, 352.5B tokens and the benchmarks' files"
    return [
        Claim("OpenCompass average", "64.5 (1.8B)", needs, NOT_TESTABLE),
        Claim(
            "VRC on DocVQA and ChartQA",
            "49.5 % and 3.2 % saved",
            f"{needs}; `tools.ablate_compressor` reads them",
            NOT_TESTABLE,
        ),
        Claim("latency and memory on a Qualcomm NPU", "12.9×, 6.8×", "needs the device", NOT_TESTABLE),
    ]


def claims_rows(claims: Iterable[Claim]) -> list[Sequence[str]]:
    """As cells of a table."""
    return [(claim.text, claim.paper, claim.ours, claim.mark) for claim in claims]
