"""Each sign of failure is raised when it is provoked, with its value, and not otherwise."""

from hypervl_jax.architecture import hypervl_2b, hypervl_tiny
from hypervl_jax.evaluation import failure_signs
from hypervl_jax.evaluation.benchmarks import group
from hypervl_jax.evaluation.statistics import Estimate
from hypervl_jax.models.compressor import forward_flops
from tests.hypervl_jax.evaluation import examples


def test_a_drop_on_dense_images_is_over_compression():
    (warning,) = failure_signs.over_compression("compressor x", Estimate(-0.2, -0.3, -0.1), 40)
    assert "over-compression" in warning
    assert "−20.0 [−30.0, −10.0]" in warning
    assert "40 images" in warning
    assert not failure_signs.over_compression("x", Estimate(-0.2, -0.5, 0.1), 40), "it may be noise"
    assert not failure_signs.over_compression("x", Estimate(-0.02, -0.03, -0.01), 40), "a small price"


def test_a_compressor_that_takes_what_it_saves_is_overhead():
    full = {"encoder": 10.0, "prefill": 5.0}
    assert not failure_signs.compressor_overhead(
        "x", full, {"compressor": 1.0, "encoder": 6.0, "prefill": 4.0}, "compressor"
    )
    (warning,) = failure_signs.compressor_overhead(
        "x", full, {"compressor": 6.0, "encoder": 6.0, "prefill": 4.0}, "compressor"
    )
    assert "takes 6.00 ms" in warning
    assert "saves 5.00 ms" in warning


def test_the_real_compressor_costs_under_two_percent_of_a_base_tile():
    shares = []
    for config in (hypervl_2b(), hypervl_tiny()):
        cost = forward_flops(config.compressor), config.vision_base.forward_flops()
        shares.append(cost[0] / cost[1])
        assert bool(failure_signs.compressor_share(*cost)) is (shares[-1] > 0.02)
    assert shares[0] < 0.02 < shares[1], "the tiny one's tile is too small for it, and the program says so"


def rows(encoder: str, alpha: float | str, right: int, milliseconds: dict[str, float]) -> list:
    """40 answers, the first `right` of them right."""
    changes = {"encoder": encoder, "alpha": alpha, "milliseconds": milliseconds}
    return [examples.result(number, float(number < right), **changes) for number in range(40)]


FULL, COMPRESSED = {"encoder": 10.0}, {"compressor": 1.0, "encoder": 6.0}


def test_answers_show_the_signs_by_themselves():
    good = rows("base", 1.0, 36, FULL) + rows("base", "auto", 36, COMPRESSED) + rows("large", 1.0, 36, FULL)
    assert failure_signs.of_results(group(good)) == []
    found = failure_signs.of_results(
        group(
            rows("base", 1.0, 36, FULL)
            + rows("base", "auto", 20, {"compressor": 5.0, "encoder": 6.0})
            + rows("large", 1.0, 10, FULL)
        )
    )
    compression, overhead, imbalance = found
    assert (
        "over-compression: α = auto with encoder base changes the score on the 40 images of words by −40.0 ["
        in compression
    )
    assert "compressor overhead: the compressor with encoder base takes 5.00 ms an answer and saves 4.00 ms" in overhead
    assert "branch imbalance: outputs differ when switching encoders: on words 35.0 [" in imbalance
    assert failure_signs.of_results(group(rows("base", 1.0, 36, FULL))) == [], "nothing to compare"


def test_signs_are_told_on_standard_error(capsys):
    failure_signs.tell(["branch imbalance: 3"])
    assert capsys.readouterr() == ("", "warning: branch imbalance: 3\n")
