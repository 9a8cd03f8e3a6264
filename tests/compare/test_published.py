"""The comparison that is published: its table says what its numbers are."""

import json
from pathlib import Path

import pytest

from ema_timm.compare.report import as_csv, markdown
from ema_timm.compare.rows import make_rows
from ema_timm.compare.variants import read_variants

COMPARE = Path(__file__).resolve().parents[2] / "ema_timm" / "compare"
DIGITS = COMPARE / "results" / "digits"


@pytest.fixture(scope="module")
def content():
    return json.loads((DIGITS / "compare.json").read_text("utf-8"))


def test_rows_follow_from_the_runs(content):
    names = [row["variant"] for row in content["rows"]]
    variants = read_variants(names, content["model"])
    rows = make_rows(content["runs"], variants, content["settings"]["model_kwargs"])
    assert json.loads(json.dumps(rows)) == content["rows"]
    assert len(content["runs"]) == len(names) * len(content["seeds"])
    for run in content["runs"]:
        assert run["top1"] == pytest.approx(100 * run["correct"] / run["images"])


def test_tables_follow_from_the_rows(content):
    text = markdown(content)
    assert (DIGITS / "compare.md").read_text("utf-8") == text
    assert (DIGITS / "compare.csv").read_text("utf-8") == as_csv(content)
    assert text.split("\n\n")[0] in (DIGITS / "README.md").read_text("utf-8")


def test_the_guide_says_what_all_intervals_show(content):
    verdicts = {row["difference"]["verdict"] for row in content["rows"] if row["difference"]}
    assert verdicts == {"no difference shown"}
    assert "No layer shows a significant difference" in (DIGITS / "README.md").read_text("utf-8")


def test_the_readme_says_the_accuracies(content):
    text = (COMPARE.parents[1] / "README.md").read_text("utf-8")
    for row in content["rows"]:
        if not row["variant"].startswith("ema@groups=") or row["variant"] == "ema@groups=16":
            assert f"| {row['top1']['mean']:.2f} |" in text, row["variant"]
