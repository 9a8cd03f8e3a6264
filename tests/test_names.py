"""Whatever a name holds, Markdown shows it as it is: no markup, no picture, no row of its own."""

import copy
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import ema_timm.compare
from ema_timm.bench.report.markdown import grid
from ema_timm.checkpoints.cards.text import card_text
from ema_timm.checkpoints.pictures import named_pictures
from ema_timm.compare.report import markdown
from ema_timm.errors import UserError
from ema_timm.integrations.yolo.card import detector_card_text
from ema_timm.names import code, encodable, escape, printable

NAMES = [
    "<unk>", "<img src=x>", '<img src="x.png" onerror=alert(1)>', "[a](http://b)", "![a](b.png)",
    "a|b", "a\\|b", "|", "||", "`", "``", "a`b``c", "`<img src=x>", "` a", " a ", "  ", "a  b",
    "*a*", "**a**", "_a_", "a_b", "~~a~~", "# a", "- a", "1. a", "> a", "---", "a\nb",
    "a\r\n\r\n<b>", "&lt;", "&#60;img src=x&#62;", "a\\", "\\`", "$x$", "<!-- a", "-->",
    "<script>", "http://b.org", "www.b.org", "a@b.org", "[x]: http://b", "<http://b>",
    "caf\udce9", "\u202eabc", "a\tb", "\0",
    "日本語", "🐈 cat", "```", "~~~", "| --- |", "\n---\n", "'\"",
]  # fmt: skip

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def inlines(text):
    return [token for token in MARKDOWN.parse(text) if token.type == "inline"]


def shown(token):
    """The text of an inline token; fails for anything but text and code."""
    kinds = {child.type for child in token.children}
    assert kinds <= {"text", "text_special", "code_inline", "softbreak"}, kinds
    return "".join(child.content or "\n" for child in token.children)


def cells(text):
    """The table of a text, row by row."""
    (body,) = [line for line in text.split("\n\n") if line.startswith("|")]
    row_count = body.count("\n") + 1 - 1  # without the ruler
    tokens = inlines(body)
    width = len(tokens) // row_count
    assert len(tokens) == width * row_count
    return [list(map(shown, tokens[i : i + width])) for i in range(0, len(tokens), width)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("write", [code, escape])
def test_a_name_is_shown_as_it_is(name, write):
    (paragraph,) = inlines(f"before {write(name)} after")
    if write is code or (name == name.strip() and "  " not in name):
        assert shown(paragraph) == f"before {printable(name)} after"
    table = f"| a | b |\n|---|---|\n| {write(name)} | 1 |\n| 2 | 3 |"
    rows = [list(map(shown, inlines(table)))[i : i + 2] for i in (0, 2, 4)]
    assert rows[1][0].strip() == printable(name).strip() and rows[1][1] == "1"
    assert rows[2] == ["2", "3"]


def test_ordinary_text_stays_as_it_is():
    for text in ("closed_form, 0.5 (smallest to largest)", "2.14.0+cpu", "EMA, authors' code",
                 "× lower bound", "Xeon(R) @ 2.10GHz", "forward / forward + backward"):  # fmt: skip
        assert escape(text) == text
    assert code("digit_0") == "`digit_0`"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_for_a_file_is_utf8_and_one_line_is_one(name):
    assert encodable(name).encode("utf-8").decode("utf-8") == name.replace("\udce9", "\\udce9")
    assert len(printable(name).splitlines()) == 1 and printable(name).encode("utf-8")


RESULTS = {
    "architecture": "resnet18_ema",
    "parameters": 1,
    "input": {"input_size": [3, 8, 8], "interpolation": "x", "crop_pct": 1, "crop_mode": "x"},
    "metrics": {"top1": 1.0, "loss": 1.0, "correct": 1, "images": 1},
}


def hostile_results(name, classes):
    """Results in which every text that is not checked elsewhere is ``name``."""
    size = {**RESULTS["input"], "interpolation": name, "crop_mode": name}
    evaluation = {
        "data": {"name": name, "split": name, "images": 1, "fingerprint": name},
        "per_class": {each: {"images": 1, "correct": 1} for each in classes},
        "dtype": name, "amp_dtype": name, "device": name, "versions": {name: name},
    }  # fmt: skip
    return {
        **RESULTS, "architecture": name, "classes": classes, "input": size,
        "evaluation": evaluation, "base": {"model": name, "weights": name},
        "arguments": {"opt": name, "sched": name}, "trained_with": name, "device": name,
        "versions": {name: name}, "card": {"repo_id": name, "license": name},
    }  # fmt: skip


def assert_harmless(text, tmp_path):
    """A card has no markup, links or pictures but those of its template."""
    body = ModelCard(text).text
    for token in MARKDOWN.parse(body):
        assert token.type != "html_block" or token.content.startswith("<!-- ema-timm card, sha256")
        for child in token.children or ():
            assert child.type in {
                "text", "text_special", "code_inline", "softbreak", "link_open", "link_close",
            }, child  # fmt: skip
            assert child.attrs.get("href", "https://docs.ultralytics.com").startswith(
                "https://docs.ultralytics.com"
            )
    headings = [token for token in MARKDOWN.parse(body) if token.type == "heading_open"]
    assert len(headings) == len([line for line in body.splitlines() if line.startswith("#")])
    assert named_pictures(tmp_path, text, {}) == []
    text.encode("utf-8")


@pytest.mark.parametrize("name", [name for name in NAMES if name.strip()])
def test_a_card_has_no_markup_of_names(name, tmp_path):
    text = card_text(hostile_results(name, [name, "b"]))
    assert_harmless(text, tmp_path)
    python = [token.content for token in MARKDOWN.parse(text) if token.info == "python"]
    assert len(python) == 2
    for block in python:
        compile(block, "card", "exec")
    about = {"decoder": "YOLO", "license": name, "imgsz": 640, "ultralytics": name}
    data = {"name": name, "split": name, "images": 1, "fingerprint": name}
    done = {"imgsz": 640, "dtype": name, "conf": 0.1, "iou": 0.1, "device": name}
    detector = {
        "architecture": name, "task": name, "classes": [name], "detector": about, "layers": [],
        "parameters": 1, "metrics": {"images": 1, name: 0.5},
        "evaluation": {**done, "data": data, "versions": {name: name}},
    }  # fmt: skip
    assert_harmless(detector_card_text(detector), tmp_path)


@pytest.mark.parametrize("start", range(0, len(NAMES), 18))
def test_every_class_has_its_row_on_the_card(start):
    classes = NAMES[start : start + 18]
    text = card_text(hostile_results("a", classes))
    table = next(part for part in text.split("\n\n") if part.startswith("| correct, by class"))
    rows = cells(table)[1:]
    assert [row[0] for row in rows] == [printable(name) for name in classes]
    assert {row[1] for row in rows} == {"1 of 1"}
    limits = next(part for part in text.split("\n\n") if part.startswith("It tells"))
    (paragraph,) = inlines(limits)
    assert shown(paragraph).startswith(
        f"It tells {len(classes)} classes apart: {', '.join(map(printable, classes))}."
    )


@pytest.mark.parametrize("name", ["a: [b", "\n---\n", "---", "'\"", "<img src=x>", "a\nb", "# a"])
def test_the_metadata_keep_every_name(name):
    text = card_text(hostile_results(name, [name, "b"]))
    assert ModelCard(text).data.eval_results[0].dataset_name == name


@pytest.mark.parametrize("name", [name for name in NAMES if name.strip()])
def test_tables_of_measurements_and_comparisons_keep_their_rows(name):
    rows = cells(grid(["variant", name], [["a", "1"], [name, "2"], ["b", "3"]]))
    assert [row[0].strip() for row in rows] == ["variant", "a", printable(name).strip(), "b"]
    file = Path(ema_timm.compare.__file__).parent / "results" / "digits" / "compare.json"
    content = json.loads(file.read_text("utf-8"))
    before = cells(markdown(content))
    changed = copy.deepcopy(content)
    changed["rows"][1].update(variant=name, why_not=[name, "b"])
    rows = cells(markdown(changed))
    assert len(rows) == len(before)
    assert rows[2][0] == printable(name)
    assert rows[2][-1].strip() == f"{printable(name)}; b".strip()


@pytest.mark.parametrize(
    "text",
    [
        "`` ` <img src=x> ``", "`a` ``b`<img src=x>``", "```\n<img src=x>\n```", "\\<img src=x>",
        "\\![a](x.png)", "`![a](x.png)`",
    ],
)  # fmt: skip
def test_publish_takes_no_picture_from_code_and_escapes(text, tmp_path):
    assert named_pictures(tmp_path, f"one {text} two\n" if "\n" not in text else text, {}) == []


@pytest.mark.parametrize(
    "text",
    ["` a\n\n![a](x.svg) `", "<img src=x.svg>", "\\` ![a](x.svg) `"],
    ids=["two paragraphs", "html", "no code"],
)
def test_publish_finds_the_pictures_beside_code(text, tmp_path):
    with pytest.raises(UserError, match=r"x\.svg"):
        named_pictures(tmp_path, text, {})
