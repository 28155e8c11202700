"""Checkers of answers: numbers however they are written, letters, texts, and functions of one's own."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm_hf.experiments.answers import expected_answers, find_checker, pattern_checker, read_choice, read_number


NUMBER = find_checker("number")
NUMBERS = st.decimals(min_value=-(10**12), max_value=10**12, allow_nan=False, places=3)
WORDS = st.text(alphabet="abc xyz,.:;=()%$\n", max_size=30).filter(lambda text: text[-1:] not in ("$", ".", ","))
FORMS = (
    "{0:f}",
    "{0:,f}",
    "{0:f}000",
    "{0:,f}%",
    "$ {0:,f}",
    "\\boxed{{{0:f}}}",
    "**{0:f}**",
    "{0:f}.",
    "{0:f} dollars",
    "{0:f}kg",
)


@given(NUMBERS, st.sampled_from(FORMS), st.sampled_from(FORMS), WORDS)
def test_a_number_is_the_same_however_it_is_written(number, form, other, words):
    text = f"At first 3 of 4. {words} = {form.format(number)}"
    assert NUMBER.is_right(text, other.format(number))
    assert NUMBER.is_right(f"so {number:f} #### {form.format(number)} of 17", f"#### {other.format(number)}")
    assert not NUMBER.is_right(text, f"{number + 1:f}")
    assert float(read_number(text)) == float(number)


@given(st.text(max_size=60))
def test_any_text_has_a_number_or_none(text):
    found = read_number(text)
    assert found is None or read_number(found) == found
    assert (found is not None) <= any(c.isdigit() for c in text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 5 - 3", "3"),
        ("It is -3", "-3"),
        ("$-3", "-3"),
        ("-$3.50", "-3.5"),
        ("\u22123", "-3"),
        ("1,2,3", "3"),
        ("12,345,678", "12345678"),
        ("10-3 = 7.", "7"),
        ("-0.0", "0"),
        ("1e3", "1000"),
        ("USD100", "100"),
        ("x-3", "3"),
        ("v 2.50.", "2.5"),
        ("1 and then ####", None),
        ("#### 4\n#### 1,000 and 7", "1000"),
        ("", None),
    ],
)
def test_numbers(text, number):
    assert read_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("b", "B"),
        (" (C). ", "C"),
        ("A cat. The answer is B.", "B"),
        ("Answer: **d**", "D"),
        ("(A) is wrong, so (B)", "B"),
        ("\\boxed{E}", "E"),
        ("#### A", "A"),
        ("I think that a dog", None),
        ("the answer is big", None),
        ("K", None),
    ],
)
def test_choices(text, letter):
    assert read_choice(text) == letter


def test_texts_and_patterns():
    exact = find_checker("exact")
    assert exact.is_right(" a  b\n", "a b") and not exact.is_right("a", "a b") and exact.read(" \n") is None
    pattern = pattern_checker("#### (.+)")
    assert [pattern.read(text) for text in ("a #### 3\n#### 4 ", "none")] == ["4", None]
    assert pattern.is_right("#### 4", "x #### 4 ") and not pattern.is_right("4", "#### 4")


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    text = "def longer(completion, answer):\n    return len(completion) > len(answer)\nx = 1"
    (tmp_path / "judges.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    longer = find_checker("judges:longer")
    assert longer.is_right("abc", "ab") is True and longer.is_right("a", "ab") is False
    for name, message in (("judges:shorter", "cannot be imported"), ("nowhere:f", "cannot be imported")):
        with pytest.raises(ValueError, match=f"`answer_checker` is '{name}', which {message} .*PYTHONPATH"):
            find_checker(name)
    with pytest.raises(TypeError, match="which is no function of a completion and an answer"):
        find_checker("judges:x")
    sys.modules.pop("judges")


def test_what_cannot_be_read_is_named():
    with pytest.raises(ValueError, match="it must be number, exact, choice, or a function .* Did you mean 'number'"):
        find_checker("numbr")
    values = [1, 2.5, "#### 3", [{"role": "assistant", "content": "4"}]]
    assert [NUMBER.read(text) for text in expected_answers(values, NUMBER, "x")] == ["1", "2.5", "3", "4"]
    with pytest.raises(ValueError, match=r"`c`: no answer is found by 'number' in 3 of 4 rows: 1, 2, 3 \(from 0\)"):
        expected_answers(["1", None, "x", []], NUMBER, "`c`")
