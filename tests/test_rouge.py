"""ROUGE-L in any script: F1 of the longest common subsequence, by hand."""

import pytest

from okd.answers import rouge_l


@pytest.mark.parametrize(
    ("reference", "answer", "f1"),
    [
        ("the cats sat", "the cat sits", 2 / 3),  # stems, as published scores are computed
        ("Это большой дом", "это дом", 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("你好世界", "你好", 2 * 1 * 0.5 / 1.5),  # no spaces: characters are words
        ("日本のGo入門書", "Go入門", 2 * 1 * (3 / 7) / (1 + 3 / 7)),  # 3 of 7: 日 本 の go 入 門 書
        ("สวัสดี", "ลาก่อน", 0.0),
        ("42", "42", 1.0),
        ("Это дом", "", 0.0),
    ],
)
def test_rouge_is_of_the_words_of_the_references_script(reference, answer, f1):
    assert rouge_l([{"reference": reference, "answer": answer}]) == pytest.approx(100 * f1)


def test_an_answer_in_another_script_scores_nothing():
    assert rouge_l([{"reference": "это дом", "answer": "a house"}]) == 0
    assert rouge_l([{"reference": "a house", "answer": "это дом"}]) == 0
