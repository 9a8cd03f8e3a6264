"""What a table of seeds says of chance, on numbers worked out by hand."""

import math

import pytest
from scipy.stats import t as student

from ema_timm.compare.rows import (
    BETTER,
    NO_DIFFERENCE,
    WORSE,
    confidence_interval,
    make_rows,
    standard_deviation,
    t_quantile,
)
from ema_timm.compare.variants import Variant


@pytest.mark.parametrize("degrees", [*range(1, 31), 49, 100, 999])
def test_quantiles_are_students(degrees):
    for probability in (0.75, 0.9, 0.975, 0.995, 0.9995):
        want = student.ppf(probability, degrees)
        assert t_quantile(probability, degrees) == pytest.approx(want, rel=1e-9)


def test_interval_by_hand():
    """Mean 2, deviation 1, t(0.975, 2) = 4.302653 (printed in every table), so 2 ± 4.30 / √3."""
    low, high = confidence_interval([1.0, 2.0, 3.0])
    assert high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2 - low == pytest.approx(high - 2)
    assert low < 0 < high
    assert confidence_interval([1.9, 2.0, 2.1])[0] > 0


def test_one_value_tells_nothing_of_chance():
    assert standard_deviation([3.0]) is None
    assert confidence_interval([3.0]) == (None, None)


def measured(variant, **top1_by_seed):
    shared = {"top5": None, "parameters": 10, "macs": 20, "macs_by_definition": 30}
    cost = {"images_per_second": 5.0, "peak_memory_mib": 7.0, "weights": "random start"}
    return [
        {"variant": variant, "seed": int(seed[1:]), "top1": top1, **shared, **cost}
        if isinstance(top1, float)
        else {"variant": variant, "seed": int(seed[1:]), "why_not": top1}
        for seed, top1 in top1_by_seed.items()
    ]


def rows_of(*runs):
    runs = [run for some in runs for run in some]
    names = dict.fromkeys(run["variant"] for run in runs)
    return make_rows(runs, [Variant(name, "test_resnet", {}) for name in names], {})


def test_differences_are_paired_by_seed():
    """Seeds differ by ten points, variants by one: only pairs show it."""
    none, se, eca, cbam = rows_of(
        measured("none", s1=70.0, s2=80.0, s3=90.0),
        measured("se", s1=71.0, s2=81.1, s3=90.9),
        measured("eca", s1=69.0, s2=79.1, s3=88.9),
        measured("cbam", s1=69.0, s2=81.0, s3=90.5),
    )
    assert none["difference"] is None
    assert none["top1"] == {"mean": 80, "std": 10}
    assert se["difference"]["mean"] == pytest.approx(1.0)
    assert se["difference"]["high"] - 1 == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    verdicts = [row["difference"]["verdict"] for row in (se, eca, cbam)]
    assert verdicts == [BETTER, WORSE, NO_DIFFERENCE]


def test_a_seed_that_only_one_of_two_has_done_is_in_no_difference():
    _, se = rows_of(
        measured("none", s1=70.0, s2=80.0, s3="out of memory"),
        measured("se", s1=71.0, s2=82.0, s3=99.0),
    )
    assert se["seeds"] == [1, 2, 3]
    assert se["difference"]["pairs"] == 2
    assert se["difference"]["mean"] == pytest.approx(1.5)


def test_a_variant_without_results_is_a_row_that_says_why():
    none, se = rows_of(
        measured("none", s1=70.0), measured("se", s1="out of memory", s2="out of memory", s3="lost")
    )
    assert none["why_not"] == []
    assert se["why_not"] == ["seed 1, 2: out of memory", "seed 3: lost"]
    assert "top1" not in se


def test_without_the_plain_network_no_difference_is_claimed():
    (se,) = rows_of(measured("se", s1=70.0, s2=71.0))
    assert se["difference"] is None
