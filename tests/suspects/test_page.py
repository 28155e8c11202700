"""`suspects.html` as text: nothing in a row becomes markup, and what it says is what the files say."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prm_hf.suspects.page import page_html, write_page
from prm_hf.suspects.texts import Part, differences, parts_of, shown, texts_html

from .suspect_lines import HOSTILE, line, pairs, ranked, summary, write_lines


class Reader(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.attributes, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")


def held(function):
    return settings(derandomize=True, database=None, deadline=None, max_examples=100)(function)


def test_nothing_in_a_row_becomes_markup():
    harmless = Reader(page_html(pairs(120), summary()))
    assert harmless.elements.count("script") == harmless.elements.count("style") == 1
    assert not {"img", "textarea", "iframe", "object"} & {*harmless.elements}
    assert not [name for name in harmless.attributes if name.startswith("on") or name in ("style", "src")]
    assert harmless.elements.count("article") == 100
    for text in HOSTILE[:4]:
        assert text in harmless.text


@held
@given(st.text() | st.sampled_from(HOSTILE))
def test_any_text_is_shown_as_it_is(text):
    read = Reader(f"<p>{shown(text)}</p>")
    assert {*read.elements} <= {"p", "bdi"} and {*read.attributes} <= {"class"}
    assert not re.search("[\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\xad\ud800-\udfff\x00]", read.text)
    letters = iter(read.text)  # codes are between them
    assert all(c in letters for c in text if c.isprintable())


@held
@given(st.lists(st.text(), min_size=1, max_size=3), st.lists(st.text(), min_size=1, max_size=3))
def test_marks_change_no_text(left, right):
    a, b = ([Part(None, text) for text in texts] for texts in (left, right))
    for parts, marks in zip((a, b), differences(a, b), strict=True):
        assert Reader(texts_html(parts, marks)).text == Reader(texts_html(parts)).text


def marked(a, b):
    found = differences([Part(None, a)], [Part(None, b)])
    return [[text[i:j] for i, j in marks[0]] for text, marks in zip((a, b), found, strict=True)]


def test_words_that_differ_are_marked():
    assert marked("It is 4 apples.", "It is 15 apples.") == [["4"], ["15"]]
    assert marked("so it takes 2 + 1 = 3", "so it takes 2 * 10 + 1 = 3") == [[], ["* 10"]]
    assert marked("我喜欢苹果", "我喜欢香蕉") == [["苹果"], ["香蕉"]]
    assert marked("nothing of this", "is shared here") == [[], []]  # all would be marked
    assert marked("a " * 700, "a " * 699) == [[], []]  # too long to compare
    assert differences([Part("user", "a")], [Part("user", "a"), Part("assistant", "b")]) == (None, None)


def test_conversations_are_texts_of_roles():
    assert parts_of("text") == [Part(None, "text")]
    assert parts_of([{"role": "user", "content": "hi"}]) == [Part("user", "hi")]
    several = [{"type": "text", "text": "look:"}, {"type": "image", "url": "x"}]
    ((role, text),) = parts_of([{"role": "user", "content": several, "name": None}])
    assert role == "user" and text.startswith("look:\n{") and '"url": "x"' in text
    ((_, called),) = parts_of([{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}])
    assert '"name": "f"' in called
    assert parts_of({"a": [1]})[0].text == json.dumps({"a": [1]}, indent=1)


def test_messages_that_both_sides_begin_with_are_the_prompt():
    question = {"role": "user", "content": "How many?"}
    data = {name: [question, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    read = Reader(page_html(ranked([line(0, 0.9, data)]), summary()))
    assert read.text.count("How many?") == 1 and "Prompt" in read.text


UNSEEN = "A model that was not trained on this pair"


@pytest.mark.parametrize(
    "kind, margins, in_sample, expected",
    [
        (
            "preference",
            [0.1, -1],
            [-0.2],
            f"{UNSEEN} prefers the rejected answer, and so does one that was trained on it.",
        ),
        (
            "preference",
            [-1],
            [0.2],
            f"{UNSEEN} prefers the rejected answer, but one that was trained on it prefers the chosen answer.",
        ),
        ("preference", [-1], None, f"{UNSEEN} prefers the rejected answer."),
        ("preference", [], [-1], "A model that was trained on this pair prefers the rejected answer."),
        (
            "preference",
            [0.5],
            [2],
            "A model that was not trained on this pair prefers the chosen answer, but less than in most pairs.",
        ),
        (
            "completion",
            [-1],
            None,
            f"{UNSEEN[:-4]}row finds the completion less likely after its prompt than after another one.",
        ),
        ("label", [-1, math.nan], [math.nan], "A model that was not trained on this row prefers another label."),
        ("label", [], None, "No model says anything of this row, whose label means nothing, as with two equal sides."),
    ],
)
def test_why_a_row_is_suspect(kind, margins, in_sample, expected):
    data = {"prompt": "p", "chosen": "c", "rejected": "r", "completion": "c", "text": "t", "label": 1}
    others = [line(i, 0.1, data, margins=[1.0], in_sample=[1.0]) for i in (1, 2, 3)]
    page = page_html(ranked([line(0, 0.9, data, margins, in_sample), *others]), summary(kind))
    why = re.findall(r'<p class="why">(.*?)</p>', page)
    assert why[0] == expected


def test_the_estimate_and_the_histogram():
    lines = ranked(
        [line(i, p, {"prompt": "", "chosen": "a", "rejected": "b"}) for i, p in enumerate((0.97, 0.52, 0.02))]
    )
    text = Reader(page_html(lines, summary())).text.replace("\xa0", " ")
    assert "Of 3 labels about 28 % are wrong, with 95 % confidence between 21 % and 35 %." in text
    assert "2 of 3 rows have a label that is wrong with a probability above 50 %." in text
    assert "95 to 100 %: 1 rows" in text and "The 3 most suspect rows are below" in text


def test_numbers_are_not_rounded_to_what_they_are_not():
    data = {"prompt": "", "chosen": "a", "rejected": "b"}
    lines = [line(0, 0.9999, data, [-0.0034], None), line(1, 0.001, data, [-12.345], [0.0]), line(2, 0.0, data)]
    text = Reader(page_html(ranked(lines), summary())).text.replace("\xa0", " ")
    for shown_number in ("> 99 % likely", "< 1 % likely", "0 % likely", "fold −0.003", "fold −12.35", "sample +0.00"):
        assert shown_number in text
    assert ">>" not in page_html(ranked(lines), summary()).replace("&gt;", "")


def classes(labels):
    return ranked([line(i, 0.9, {"text": f"t{i}", "label": label}) for i, label in enumerate(labels)])


@pytest.mark.parametrize(
    "kind, lines, words",
    [
        ("preference", pairs(5), ["keep", "flip", "drop"]),
        ("completion", ranked([line(0, 0.9, {"prompt": "p", "completion": "c"})]), ["keep", "drop"]),
        ("label", classes([0, 1, None, -1]), ["keep", "flip", "drop"]),
        ("label", classes(["a", "b", "c"]), ["keep", "drop"]),
    ],
)
def test_decisions_that_a_repair_can_follow(kind, lines, words):
    page = page_html(lines, summary(kind))
    assert list(dict.fromkeys(re.findall(r'<button type="button" data-decision="(\w+)"', page))) == words


def test_columns_of_a_table_are_shown_where_there_is_no_text():
    page = page_html(ranked([line(0, 0.9, {"age": 37, "job": "<b>", "label": "rich"})]), summary("label"))
    assert re.search(r'<dl class="columns"><dt>age</dt><dd dir="auto">37</dd>.*&lt;b&gt;', page)
    assert "Other columns" not in page


def test_the_policy_allows_this_style_and_this_script_alone():
    page = page_html(pairs(5), summary())
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}" in policy
    assert not re.search(r"https?:|\burl\(|@import", page)


def test_a_page_is_written_whole_of_the_two_files(tmp_path):
    write_lines(tmp_path, pairs(5), summary())
    file = write_page(tmp_path)
    assert file == tmp_path / "suspects.html" and file.read_text(encoding="utf-8").endswith("</html>\n")
    before = file.read_bytes()
    (tmp_path / "suspects.jsonl").write_text('{"row": 0}\n')
    with pytest.raises(ValueError, match="cannot be shown .*: find them again"):
        write_page(tmp_path)
    assert file.read_bytes() == before and not list(tmp_path.glob("*.part"))
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path / "nowhere")


def test_decisions_of_other_rows_are_kept_apart():
    keys = {
        re.search(r'data-key="(\w+)"', page_html(lines, summary()))[1]
        for lines in (pairs(5), pairs(6), pairs(5), [{**x, "margins": [1.0]} for x in pairs(5)])
    }
    assert len(keys) == 2


def test_decided_rows_come_after_the_hundred_that_are_open():
    """So that a person goes on with the next ones, and the page still exports what was decided before."""
    lines = pairs(120)
    for place in (0, 3, 110):
        lines[place]["decided"] = "flip"
    page = page_html(lines, summary())
    shown = [int(row) for row in re.findall(r'data-row="(\d+)"', page)]
    decided = [lines[place]["row"] for place in (0, 3, 110)]
    assert shown[100:] == decided and shown[:100] == [x["row"] for x in lines if "decided" not in x][:100]
    assert page.count('data-decided="flip"') == 3 and "3 are decided by hand." in page
