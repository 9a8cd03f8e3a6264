"""What a table of seeds says about chance, on numbers worked out by hand and in simulations."""

import math

import numpy as np
import pytest
from scipy.stats import t as student

from ema_timm.compare.intervals import (
    BETTER,
    NO_DIFFERENCE,
    WORSE,
    describe_difference,
    interval_confidence,
    interval_half_width,
    t_quantile,
)
from ema_timm.compare.rows import make_rows
from ema_timm.compare.variants import Variant


@pytest.mark.parametrize("degrees", [*range(1, 31), 49, 100, 999])
def test_quantiles_are_students(degrees):
    for probability in (0.75, 0.9, 0.975, 0.995, 0.9995):
        want = student.ppf(probability, degrees)
        assert t_quantile(probability, degrees) == pytest.approx(want, rel=1e-9)


def test_interval_by_hand():
    """Mean 2, deviation 1, t(0.975, 2) = 4.302653 (printed in every table), so 2 ± 4.30 / √3."""
    found = describe_difference([1.0, 2.0, 3.0], 1000, 0.95)
    assert found["half_width"] == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (found["low"], found["high"]) == (2 - found["half_width"], 2 + found["half_width"])
    assert found["verdict"] == NO_DIFFERENCE
    assert describe_difference([1.9, 2.0, 2.1], 1000, 0.95)["verdict"] == BETTER


@pytest.mark.parametrize("values", [[9.0], [9.0, 9.1]])
def test_fewer_than_three_seeds_give_no_interval(values):
    found = describe_difference(values, 1000, 0.95)
    assert found["verdict"] == "needs 3 seeds"
    assert found["low"] is found["high"] is found["half_width"] is None


def test_equal_differences_have_the_interval_of_one_image():
    """Three seeds that all gain one image of 100 do not show an improvement."""
    found = describe_difference([1.0, 1.0, 1.0], 100, 0.95)
    assert found["half_width"] == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found["verdict"] == NO_DIFFERENCE
    assert describe_difference([5.0, 5.0, 5.0], 100, 0.95)["verdict"] == BETTER


def test_the_intervals_of_a_long_table_are_wider():
    assert interval_confidence(0) == interval_confidence(1) == 0.95
    assert interval_confidence(6) == pytest.approx(1 - 0.05 / 6)
    names = ["none", "a", "b", "c", "d", "e", "f"]
    top1 = {"none": (70.0, 71.0, 72.0, 73.0)}
    of = {
        name: measured(
            name, **{f"s{i}": v for i, v in enumerate(top1.get(name, (70.5, 71.7, 72.6, 73.8)))}
        )
        for name in names
    }
    one, six = rows_of(of["none"], of["a"])[1], rows_of(*of.values())[1]
    want = student.ppf(1 - 0.05 / 12, 3) / student.ppf(0.975, 3)
    ratio = six["difference"]["half_width"] / one["difference"]["half_width"]
    assert ratio == pytest.approx(want)


def differing(images, expected, shape, generator):
    """Differences, in points, of networks that are right on few images that the others miss."""
    gained, lost = generator.poisson(expected, (2, *shape))
    return 100 * (gained - lost) / images


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("images, expected", [(60, 0.3), (60, 5), (1000, 0.5), (5000, 100)])
def test_identical_networks_are_seldom_called_different(images, expected, seeds):
    """In at most 5.5% of rows, however few images the networks differ in."""
    generator = np.random.default_rng(seeds)
    differences = differing(images, expected, (10_000, seeds), generator)
    called = sum(
        describe_difference(row, images, 0.95)["verdict"] in (BETTER, WORSE)
        for row in differences.tolist()
    )
    assert called / len(differences) < 0.055


def measured(variant, **top1_by_seed):
    shared = {"images": 1000, "top5": None, "parameters": 10, "macs": 20, "macs_by_definition": 30}
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
    half_width = interval_half_width([1.0, 1.1, 0.9], 1 - 0.05 / 3)
    assert se["difference"]["high"] - 1 == pytest.approx(half_width, rel=1e-6)
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
    assert se["difference"]["verdict"] == "needs 3 seeds"


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
