"""Examples, rows and batches against texts cut by hand, brute-force loops, and the standard library itself."""

import hashlib
import json

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from okd import data
from okd.chat import APART, THOUGHTLESS
from okd.data import Collator, rows_of, rows_written, seed_of, uniform
from okd.encoding import Encoded, encode
from okd.examples import read_jsonl
from okd.models import response_rows

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"


def make_tokenizer(chat_template=None, bos=False, eos="<|im_end|>", trim_offsets=False):
    """A token is a byte, a special token, or "ab": the only merge, to show where texts are tokenised apart."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    elif trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    # pad == eos, as in SmolLM2
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<|im_end|>")
    fast.chat_template = chat_template
    return fast


def tokens_of(tokenizer, *pieces):
    """(input_ids, labels) of a text cut by hand into pieces, each (text, is_response)."""
    input_ids, labels = [], []
    for text, is_response in pieces:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        input_ids += ids
        labels += ids if is_response else [-100] * len(ids)
    return input_ids, labels


def response_of(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


# --- read_jsonl ---


def test_read_jsonl_keeps_every_shape_and_names_examples_by_file_and_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(
        '{"prompt": "2+2?", "completion": "4", "task": "sums"}\n'
        "  \n"
        '{"text": "caf\u00e9\u2028end", "id": 7}\r\n'
        '{"messages": [{"role": "user", "content": "Hi"}], "id": null}',
        encoding="utf-8",
    )
    assert read_jsonl(path) == [
        {"prompt": "2+2?", "completion": "4", "task": "sums", "id": "train.jsonl:1"},
        {"text": "caf\u00e9\u2028end", "id": "7"},
        {"messages": [user("Hi")], "id": "train.jsonl:4"},
    ]


@pytest.mark.parametrize(
    "line, expected, got",
    [
        (b'{"prompt": "a" "b"}', "expected a JSON object", "\"b\"}' (Expecting ',' delimiter"),
        (b'{"text": "\xff"}', "expected a JSON object", "xff\"}' (Invalid"),
        (b"[1, 2]", 'expected {"messages": [...]}', "got [1, 2]; write an object"),
        (b'{"question": "a"}', 'or {"text": string}', "got {'question': 'a'}; rename the fields"),
        (b'{"prompt": "a"}', '{"prompt": string, "completion": string}', "got {'prompt': 'a'}"),
        (
            b'{"prompt": "a", "completion": 4}',
            '"completion": string}',
            "'completion': 4}; rename the fields, or make them",
        ),
        (b'{"text": null}', 'or {"text": string}', "got {'text': None}"),
        (b'{"messages": []}', '"messages" to be a list of {"role": string, "content": string}', "got []; correct"),
        (b'{"messages": "Hi"}', '"messages" to be a list', "got 'Hi'"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": [1]}]}',
            '"content": string}',
            "'bot'",
        ),
        (b'{"messages": [{"role": 1, "content": "a"}]}', '"role": string', "got {'role': 1, 'content': 'a'}"),
        (b'{"text": ["' + b"x" * 500 + b'"]}', 'or {"text": string}', "xxx...; rename"),
    ],
)
def test_read_jsonl_names_a_line_without_an_example_and_says_why(tmp_path, line, expected, got):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    good, bad = read_jsonl(path)
    assert good == {"text": "good", "id": "bad.jsonl:1"}
    assert set(bad) == {"id", "bad"} and bad["id"] == "bad.jsonl:3"
    assert expected in bad["bad"] and got in bad["bad"] and len(bad["bad"]) < 300
    with pytest.raises(ValueError) as error:
        encode([good, bad], make_tokenizer(), max_length=99)
    assert f"got 1 of 2: {bad['bad']} (bad.jsonl:3). Correct them" in str(error.value)


def test_one_bad_line_in_two_hundred_is_counted_and_the_rest_trains(tmp_path):
    path = tmp_path / "train.jsonl"
    lines = [json.dumps({"prompt": f"{i}+1?", "completion": f"{i + 1}"}) for i in range(200)]
    path.write_text("\n".join([*lines[:77], '{"prompt": "77+1?", ', *lines[77:]]))
    encoded = encode(read_jsonl(path), make_tokenizer(), max_length=99)
    assert len(encoded.rows) == 200 and list(encoded.bad.values()) == [["train.jsonl:78"]]
    tokens = sum(len(f"{i}+1?{i + 1}") + 1 for i in range(200))
    responses = sum(len(str(i + 1)) + 1 for i in range(200))
    start = (
        f"200 examples, {tokens:,} tokens ({responses} response); skipped 1 (train.jsonl:78): expected a JSON object"
    )
    assert encoded.summary().startswith(start)
    path.write_text("\n".join([*lines, *['{"prompt": '] * 3]))  # 3 of 203 are more than 1 %
    with pytest.raises(
        ValueError, match=r"at most 1\.0 % of the examples to be none; got 3 of 203: .*\(train.jsonl:201"
    ):
        encode(read_jsonl(path), make_tokenizer(), max_length=99)
    assert len(encode(read_jsonl(path), make_tokenizer(), max_length=99, max_bad_share=0.02).rows) == 200
    one = [{"text": "x"}] * 99 + [{"id": "none"}]
    assert len(encode(one, make_tokenizer(), max_length=99).rows) == 99, "1 % is at most 1 %"
    with pytest.raises(ValueError, match=r"at most 0\.0 %"):
        encode(one, make_tokenizer(), max_length=99, max_bad_share=0)


def test_a_field_of_the_name_bad_is_like_any_other(tmp_path):
    path = tmp_path / "rated.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "bad": "no"}')
    assert encode(read_jsonl(path), make_tokenizer(), max_length=9).bad == {}


def test_read_jsonl_says_that_a_file_is_empty_or_missing(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: expected at least one example, got an empty file; write"):
        read_jsonl(path)
    with pytest.raises(
        FileNotFoundError, match=r"none\.jsonl: expected a JSON lines file, got no file of that name; check"
    ):
        read_jsonl(str(tmp_path / "none.jsonl"))


# --- encode: chat ---


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_the_response_is_every_assistant_turn_with_its_end_of_turn_token(trim_offsets):
    tokenizer = make_tokenizer(CHATML, trim_offsets=trim_offsets)
    messages = [user("Hi, caf\u00e9?"), assistant("  caf\u00e9 \U0001f600\n\n"), user("More"), assistant("")]
    messages += [user("assistant\n"), assistant("ab <|im_start|>")]
    row = encode([{"id": "chat", "messages": messages}], tokenizer, max_length=1000).rows[0]
    input_ids, labels = tokens_of(
        tokenizer,
        (DEFAULT_SYSTEM + "<|im_start|>user\nHi, caf\u00e9?<|im_end|>\n<|im_start|>assistant\n", False),
        ("  caf\u00e9 \U0001f600\n\n<|im_end|>", True),
        ("\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_end|>", True),
        ("\n<|im_start|>user\nassistant\n<|im_end|>\n<|im_start|>assistant\n", False),
        ("ab <|im_start|><|im_end|>", True),
        ("\n", False),
    )
    assert row == {"id": "chat", "input_ids": input_ids, "labels": labels}
    assert response_of(tokenizer, row) == "  caf\u00e9 \U0001f600\n\n<|im_end|><|im_end|>ab <|im_start|><|im_end|>"


def test_a_given_system_prompt_replaces_the_default():
    tokenizer = make_tokenizer(CHATML)
    messages = [{"role": "system", "content": "S"}, assistant("one"), assistant("two")]
    row = encode([{"messages": messages}], tokenizer, max_length=1000).rows[0]
    assert (row["input_ids"], row["labels"]) == tokens_of(
        tokenizer,
        ("<|im_start|>system\nS<|im_end|>\n<|im_start|>assistant\n", False),
        ("one<|im_end|>", True),
        ("\n<|im_start|>assistant\n", False),
        ("two<|im_end|>", True),
        ("\n", False),
    )


def test_a_space_before_the_turn_is_no_response_when_the_tokenizer_trims_offsets():
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for trim_offsets in (False, True):
        tokenizer = make_tokenizer(template, trim_offsets=trim_offsets)
        row = encode([{"prompt": "q", "completion": "x y"}], tokenizer, max_length=1000).rows[0]
        pieces = ("user: q<|im_end|>assistant: ", False), ("x y<|im_end|>", True)
        assert (row["input_ids"], row["labels"]) == tokens_of(tokenizer, *pieces)


def test_prompt_and_completion_are_a_conversation_where_there_is_a_template():
    tokenizer = make_tokenizer(CHATML)
    pair, chat = {"prompt": "2+2?", "completion": "4"}, {"messages": [user("2+2?"), assistant("4")]}
    rows = encode([pair, chat], tokenizer, max_length=1000, chat_template=True).rows
    assert rows[0]["input_ids"] == rows[1]["input_ids"] and rows[0]["labels"] == rows[1]["labels"]
    assert [row["id"] for row in rows] == ["#0", "#1"]
    assert response_of(tokenizer, rows[0]) == "4<|im_end|>"
    raw = encode([pair], tokenizer, max_length=1000, chat_template=False).rows[0]
    assert tokenizer.decode(raw["input_ids"]) == "2+2?4<|im_end|>"


def test_fields_that_are_none_are_absent():
    """A datasets.Dataset of mixed examples has every column in every row."""
    tokenizer = make_tokenizer(CHATML)
    example = {"id": None, "input_ids": None, "messages": None, "prompt": "a", "completion": "b", "text": None}
    row = encode([example], tokenizer, max_length=1000).rows[0]
    assert row["id"] == "#0" and response_of(tokenizer, row) == "b<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_gives_each_turn_a_row_of_its_own():
    hides_old_turns = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last or m['role'] == 'user' else 'old' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(hides_old_turns)
    single = {"id": "one", "messages": [user("a"), assistant("b")]}
    double = {"id": "two", "messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
    encoded = encode([single, double], tokenizer, max_length=99)
    start = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    first = tokens_of(tokenizer, (start, False), ("b<|im_end|>", True), ("\n", False))
    more = start + "old<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    second = tokens_of(tokenizer, (more, False), ("d<|im_end|>", True), ("\n", False))
    assert [row["id"] for row in encoded.rows] == ["one", "two#1", "two#2"]
    assert [(row["input_ids"], row["labels"]) for row in encoded.rows] == [first, first, second]
    assert encoded.notes == {APART: ["two"]} and encoded.bad == {}


def test_a_template_without_a_turn_like_its_prompt_is_refused():
    tokenizer = make_tokenizer(CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"))
    expected = r"got 1 of 1: expected a chat template that renders a turn after its own prompt; .*chat_template=False"
    with pytest.raises(ValueError, match=rf"{expected}.* \(#0\)"):
        encode([{"prompt": "a", "completion": "b"}], tokenizer, max_length=99)


def test_errors_of_the_chat_name_the_example_and_the_remedy():
    tokenizer, bare = make_tokenizer(CHATML), make_tokenizer()
    chat = {"id": "x7", "messages": [user("a"), assistant("b")]}
    for options, this in (({}, bare), ({"chat_template": False}, bare), ({"chat_template": False}, tokenizer)):
        with pytest.raises(ValueError, match=r'1 of 1: expected a chat template for "messages", got .*; set.*\(x7\)'):
            encode([chat], this, max_length=99, **options)
    with pytest.raises(ValueError, match=r"chat_template=True, got one without; set tokenizer.chat_template, or pass"):
        encode([chat], bare, max_length=99, chat_template=True)
    with pytest.raises(
        ValueError, match=r'expected a message before that of role "assistant", got none; begin.*\(x8\)'
    ):
        encode([{"id": "x8", "messages": [assistant("b")]}], tokenizer, max_length=99)
    with pytest.raises(ValueError, match=r"1 of 2: expected .*got 'just a string'; write an object \(#1\)"):
        encode([chat, "just a string"], tokenizer, max_length=99)
    strict = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"roles must alternate \(x7\)"):
        encode([chat], strict, max_length=99)


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_lone_surrogate_is_counted_under_the_id_of_its_example(template, tmp_path):
    path = tmp_path / "cut.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"id": "cut", "prompt": "a", "completion": "b\\ud83d"}\n')
    examples = read_jsonl(path)
    assert examples[1]["completion"] == "b\ud83d"
    encoded = encode(examples, make_tokenizer(template), max_length=200, max_bad_share=0.5)
    assert [row["id"] for row in encoded.rows] == ["cut.jsonl:1"] and list(encoded.bad.values()) == [["cut"]]
    encoded.summary().encode()  # can be printed


def test_a_slow_tokenizer_is_refused_for_chat():
    class SlowTokenizer:
        is_fast, chat_template = False, CHATML

    with pytest.raises(
        ValueError, match=r"expected a fast tokenizer, .*got SlowTokenizer; load one with AutoTokenizer"
    ):
        encode([{"prompt": "a", "completion": "b"}], SlowTokenizer(), max_length=99)


# --- encode: raw text ---


@pytest.mark.parametrize("bos", [False, True])
def test_raw_prompt_and_completion_are_tokenised_apart(bos):
    tokenizer = make_tokenizer(bos=bos)
    row = encode([{"prompt": "xa", "completion": "bab"}], tokenizer, max_length=1000).rows[0]
    vocab = tokenizer.get_vocab()
    start = [vocab["<s>"]] if bos else []
    assert row["input_ids"] == start + [vocab[t] for t in ("x", "a", "b", "ab", "<|im_end|>")]
    assert row["labels"] == [-100] * len(start) + [-100, -100, vocab["b"], vocab["ab"], vocab["<|im_end|>"]]


def test_all_of_a_text_but_its_first_token_is_response_template_or_not():
    for tokenizer in (make_tokenizer(), make_tokenizer(CHATML)):
        vocab = tokenizer.get_vocab()
        row = encode([{"text": "cab"}], tokenizer, max_length=1000).rows[0]
        assert row["input_ids"] == [vocab["c"], vocab["ab"], vocab["<|im_end|>"]]
        assert row["labels"] == [-100, vocab["ab"], vocab["<|im_end|>"]]
    with_bos = make_tokenizer(bos=True)
    row = encode([{"text": "c"}], with_bos, max_length=1000).rows[0]
    assert row["labels"] == [-100, vocab["c"], vocab["<|im_end|>"]]


def test_the_first_token_has_no_label_though_it_is_response():
    row = encode([{"prompt": "", "completion": "xy"}], make_tokenizer(), max_length=1000).rows[0]
    assert row["labels"] == [-100, *row["input_ids"][1:]] and len(row["labels"]) == 3


def test_raw_text_needs_an_eos_token():
    with pytest.raises(ValueError, match=r"expected an eos token .*got none; set tokenizer.eos_token \(#0\)"):
        encode([{"text": "a"}], make_tokenizer(eos=None), max_length=99)


def sentencepiece(scheme, kind):
    """Puts a space, as "\u2581", before each text. Prefers long pieces, with or without such a space before them."""
    words = ["\u2581ab", "ab", "\u2581cd", "cd", "\u2581Q:", "\u2581A:", "Q:", "A:"]
    pieces = ["<unk>", "</s>", "\u2581", *"abcdQA:\n", *words]
    if kind == "unigram":
        model = models.Unigram([(p, -1.0 if p in words else -9.0) for p in pieces], unk_id=0)
    else:
        merges = [("a", "b"), ("c", "d"), ("\u2581", "ab"), ("\u2581", "cd"), ("Q", ":"), ("A", ":")]
        merges += [("\u2581", "Q:"), ("\u2581", "A:")]
        vocab = {p: i for i, p in enumerate(pieces)}
        model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_tokenizer_that_puts_a_space_before_each_text_reads_prompt_and_completion_as_one(scheme, kind):
    tokenizer = sentencepiece(scheme, kind)
    for prompt, completion, before, response in (
        ("ab", "cd", ["\u2581ab"], ["cd"]),
        ("ab", " cd", ["\u2581ab"], ["\u2581cd"]),
        ("Q: ab\nA:", " cd ab", ["\u2581Q:", "\u2581ab", "\n", "A:"], ["\u2581cd", "\u2581ab"]),
        ("ab", "", ["\u2581ab"], []),
        ("", "ab cd", [], ["\u2581ab", "\u2581cd"]),
        # one piece lies across the boundary: the response has it, or it would lose its first word
        ("ab ", "cd ab", ["\u2581ab"], ["\u2581cd", "\u2581ab"]),
    ):
        given = {"prompt": prompt, "completion": completion}
        (row,) = encode([given], tokenizer, max_length=99).rows
        joined = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
        expected = tokenizer.convert_tokens_to_ids([*before, *response, "</s>"])
        assert row["input_ids"] == [*joined, tokenizer.eos_token_id] == expected, (prompt, completion)
        first = len(before) or 1
        assert row["labels"] == [-100] * first + expected[first:], (prompt, completion)


# --- encode: length, rows, accounts ---


def test_what_is_truncated_or_skipped_is_counted_and_named():
    tokenizer = make_tokenizer()
    examples = [
        {"id": "fits", "prompt": "12345", "completion": "6789"},  # 10 tokens with eos
        {"id": "cut", "prompt": "1234567", "completion": "89012"},  # 13 tokens, 3 of the response remain
        {"id": "last", "prompt": "123456789", "completion": "0"},  # 11 tokens, 1 of the response remains
        *({"id": f"long{i}", "prompt": "1234567890", "completion": "1"} for i in range(7)),
        {"id": "silent", "input_ids": [5, 6], "labels": [5, -100]},
    ]
    encoded = encode(iter(examples), tokenizer, max_length=10)
    assert [tokenizer.decode(row["input_ids"]) for row in encoded.rows] == [
        "123456789<|im_end|>",
        "1234567890",
        "1234567890",
    ]
    assert [response_of(tokenizer, row) for row in encoded.rows] == ["6789<|im_end|>", "890", "0"]
    assert encoded.truncated == ["cut", "last"]
    assert encoded.skipped == {
        "without response token in the first 10": [f"long{i}" for i in range(7)],
        "without response token": ["silent"],
    }
    assert encoded.summary() == (
        "3 examples, 30 tokens (9 response); truncated 2; "
        "skipped 7 without response token in the first 10 (long0, long1, long2, long3, long4, ...); "
        "skipped 1 without response token (silent)"
    )


def test_summary_writes_thousands_and_leaves_out_what_did_not_happen():
    encoded = encode([{"text": "x" * 1200}] * 2, make_tokenizer(), max_length=5000)
    assert encoded.summary() == "2 examples, 2,402 tokens (2,400 response)"


def test_summary_says_what_was_bad_and_what_was_done():
    encoded = Encoded(
        rows=[{"id": "x#1", "input_ids": [1, 2, 3], "labels": [-100, 2, 3]}],
        bad={"expected a JSON object": [f"f:{i}" for i in range(6)], "roles must alternate": ["y"]},
        notes={APART: ["x"], THOUGHTLESS: ["x", "z"]},
    )
    assert encoded.summary() == (
        "1 examples, 3 tokens (2 response); skipped 6 (f:0, f:1, f:2, f:3, f:4, ...): expected a JSON object; "
        "skipped 1 (y): roles must alternate; "
        "1 with turns as rows of their own, as the template rewrites earlier ones (x); "
        "2 with an empty thought of the template's, which is not trained (x, z)"
    )
    encoded = Encoded(bad={f"reason {i}": [f"id{i}a", f"id{i}b"] for i in range(1007)})
    parts = encoded.summary().split("; ")
    assert parts[1:6] == [f"skipped 2 (id{i}a, id{i}b): reason {i}" for i in range(5)]
    assert parts[6:] == ["skipped 2,004 for other reasons"]


def test_no_example_left_is_an_error_that_says_why():
    sharegpt = {"id": "s", "messages": [user("a"), {"role": "gpt", "content": "b"}]}
    with pytest.raises(ValueError, match=r'got 0 examples.*skipped 1 without response token \(s\); .*role "assistant"'):
        encode([sharegpt], make_tokenizer(CHATML), max_length=99)
    with pytest.raises(ValueError, match=r"skipped 1 without response token in the first 3 \(#0\); raise max_length"):
        encode([{"prompt": "12345", "completion": "6"}], make_tokenizer(), max_length=3)
    with pytest.raises(ValueError, match="expected at least one example with a response token, got 0 examples"):
        encode([], make_tokenizer(), max_length=99)


def test_rows_pass_through_under_the_same_rules():
    given = [
        {"id": 3, "input_ids": [9, 8, 7], "labels": [9, 8, -100]},
        {"input_ids": torch.tensor([1, 2, 3, 4]), "labels": torch.tensor([-100, 2, 3, 4])},
    ]
    encoded = encode(given, make_tokenizer(), max_length=3)
    assert encoded.rows == [
        {"id": "3", "input_ids": [9, 8, 7], "labels": [-100, 8, -100]},
        {"id": "#1", "input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    ]
    assert encoded.truncated == ["#1"]
    assert encode(encoded.rows, make_tokenizer(), max_length=3).rows == encoded.rows
    assert given[0]["labels"] == [9, 8, -100]  # the caller's list is untouched
    with pytest.raises(ValueError, match=r"expected a label for each of 2 tokens, got 0; use -100 for none \(#0\)"):
        encode([{"input_ids": [1, 2]}], make_tokenizer(), max_length=3)


# --- Collator ---


def test_collator_equals_a_brute_force_loop_and_keeps_eos_where_pad_is_eos():
    pad = eos = 2
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, n in enumerate([5, 1, 8, 3]):
        input_ids = [*torch.randint(0, 5, (n,), generator=generator).tolist()[:-1], eos]
        keep = torch.rand(n, generator=generator).lt(0.6).tolist()
        labels = [token if k else -100 for token, k in zip(input_ids, keep, strict=True)]
        rows.append({"id": f"r{i}", "input_ids": input_ids, "labels": [-100, *labels[1:]]})
    rows[2]["input_ids"][3:] = rows[2]["labels"][3:] = [eos] * 5  # a response of eos = pad tokens only

    batch = Collator(pad)(rows)
    length = 8
    positions, targets = [], []
    for b, row in enumerate(rows):
        missing = length - len(row["input_ids"])
        assert batch["input_ids"][b].tolist() == row["input_ids"] + [pad] * missing
        assert batch["attention_mask"][b].tolist() == [1] * len(row["input_ids"]) + [0] * missing
        assert batch["labels"][b].tolist() == row["labels"] + [-100] * missing
        for t in range(len(row["labels"]) - 1):
            if row["labels"][t + 1] != -100:
                positions.append(b * length + t)
                targets.append(row["labels"][t + 1])
    assert len(positions) > 5
    assert batch["positions"].tolist() == positions and batch["targets"].tolist() == targets
    assert batch.pop("ids") == ["r0", "r1", "r2", "r3"]
    assert batch.pop("writers") == ["dataset"] * 4 and batch.pop("teachers") == [None] * 4
    assert batch.pop("spans") == [(i, 0, len(row["input_ids"])) for i, row in enumerate(rows)]
    counts = batch.pop("counts")
    assert counts == [sum(label != -100 for label in row["labels"]) for row in rows] and 0 in counts
    assert all(tensor.dtype == torch.int64 and tensor.device.type == "cpu" for tensor in batch.values())


def test_collated_positions_gather_the_tokens_before_the_encoded_response():
    tokenizer = make_tokenizer(CHATML)
    pairs = [("1+1?", "2"), ("Say abc", "abc")]
    examples = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    batch = Collator(tokenizer.pad_token_id)(encode(examples, tokenizer, max_length=1000).rows)
    assert tokenizer.decode(batch["targets"]) == "2<|im_end|>abc<|im_end|>"
    assert tokenizer.decode(batch["input_ids"].flatten()[batch["positions"]]) == "\n2\nabc"


def test_collator_refuses_a_missing_pad_token():
    with pytest.raises(ValueError, match="expected an int as pad_token_id, got None; eos_token_id will do"):
        Collator(None)


# --- what the teacher reads ---


def test_a_teacher_reads_a_prompt_of_its_own():
    """A string, with and without a chat template; messages; ids of rows. The response is the student's."""
    chat, bare, bos = make_tokenizer(CHATML), make_tokenizer(), make_tokenizer(bos=True)
    example = {"prompt": "2+2?", "completion": "4", "teacher_prompt": "It is 4. 2+2?"}
    told = DEFAULT_SYSTEM + "<|im_start|>user\nIt is 4. 2+2?<|im_end|>\n<|im_start|>assistant\n"
    for tokenizer, options, expected in (
        (chat, {}, told),
        (chat, {"chat_template": False}, "It is 4. 2+2?"),
        (bare, {}, "It is 4. 2+2?"),
        (bos, {}, "<s>It is 4. 2+2?"),
    ):
        row = encode([example], tokenizer, max_length=99, **options).rows[0]
        assert tokenizer.decode(row["teacher_prompt"]) == expected
        without = encode([{**example, "teacher_prompt": None}], tokenizer, max_length=99, **options).rows[0]
        assert row == {**without, "teacher_prompt": row["teacher_prompt"]} and "teacher_prompt" not in without
        assert encode([row], tokenizer, max_length=99, **options).rows == [row], "a row passes through"
    messages = [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("c")]
    row = encode([{**example, "teacher_prompt": messages}], chat, max_length=99).rows[0]
    assert chat.decode(row["teacher_prompt"]) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    named = encode([{"prompt": "a", "completion": "b", "teacher": "math"}], bare, max_length=99).rows[0]
    assert named["teacher"] == "math" and "teacher_prompt" not in named


def test_teacher_prompts_that_are_refused():
    tokenizer, bare = make_tokenizer(CHATML), make_tokenizer()
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    with pytest.raises(ValueError, match=r"expected one response with teacher_prompt.*got several: split.*\(two\)"):
        encode([{"id": "two", "messages": turns, "teacher_prompt": "x"}], tokenizer, max_length=999)
    apart = make_tokenizer(
        CHATML.replace("m['content']", "m['content'] if loop.last or m['role'] == 'user' else 'old'")
    )
    assert len(encode([{"messages": turns}], apart, max_length=999).rows) == 2
    with pytest.raises(ValueError, match=r"got several: split.*\(two\)"):  # though each has a row of its own
        encode([{"id": "two", "messages": turns, "teacher_prompt": "x"}], apart, max_length=999)
    single = {"id": "one", "messages": turns[:2], "teacher_prompt": "x"}
    assert encode([single], tokenizer, max_length=999).rows[0]["teacher_prompt"]
    pair = {"id": "p", "prompt": "a", "completion": "b"}
    for this, given in ((bare, [user("a")]), (tokenizer, 7), (tokenizer, [{"role": "user"}]), (tokenizer, ["a"])):
        with pytest.raises(ValueError, match=r"expected teacher_prompt as a string, or messages where.*\(p\)"):
            encode([{**pair, "teacher_prompt": given}], this, max_length=99)


TOLD = [
    {"id": "a", "input_ids": [11, 12, 13, 14], "labels": [-100, -100, 13, 14], "teacher_prompt": [5]},
    {"id": "b", "input_ids": [21, 22, 23], "labels": [-100, 22, 23], "teacher_prompt": [6, 7, 8, 9, 6, 7]},
    {"id": "c", "input_ids": [31, 32, 33, 34, 35], "labels": [-100, -100, -100, 34, 35], "teacher_prompt": [4, 4, 4]},
]


def test_teacher_positions_predict_the_same_targets():
    batch = Collator(2)(TOLD)
    ids, mask, positions = (batch[f"teacher_{name}"] for name in ("input_ids", "attention_mask", "positions"))
    width = 8
    assert ids.shape == mask.shape == (3, width)
    for i, row in enumerate(TOLD):
        start = next(t for t, label in enumerate(row["labels"]) if label != -100)
        sequence = row["teacher_prompt"] + row["input_ids"][start:]
        assert ids[i].tolist() == sequence + [2] * (width - len(sequence))
        assert mask[i].tolist() == [1] * len(sequence) + [0] * (width - len(sequence))
        own = data.tokens_of(batch, [i])
        first = len(row["teacher_prompt"]) - 1
        assert positions[own].tolist() == [i * width + first + k for k in range(len(own))]
    assert torch.equal(ids.flatten()[positions + 1], batch["targets"])
    assert torch.equal(batch["input_ids"].flatten()[batch["positions"] + 1], batch["targets"])
    assert batch["targets"].tolist() == [13, 14, 22, 23, 34, 35]


def test_a_row_without_a_teacher_prompt_is_read_as_it_is():
    bare = {name: value for name, value in TOLD[0].items() if name != "teacher_prompt"}
    batch = Collator(2)([bare, TOLD[1]])
    assert batch["teacher_input_ids"][0, :4].tolist() == bare["input_ids"]
    assert batch["teacher_positions"][:2].tolist() == batch["positions"][:2].tolist() == [1, 2]
    assert "teacher_input_ids" not in Collator(2)([bare, bare])


def test_hidden_states_at_teacher_positions_are_those_after_its_prompt():
    model = tiny.llama().eval()
    batch = Collator(tiny.EOS)(TOLD)
    with torch.no_grad():
        found, own = response_rows(model, batch, as_teacher=True), response_rows(model, batch)
        for i, row in enumerate(TOLD):
            n = batch["counts"][i]
            alone = model.get_decoder()(torch.tensor([row["teacher_prompt"] + row["input_ids"][-n:]]))
            expected = alone.last_hidden_state[0, -n - 1 : -1]
            at = data.tokens_of(batch, [i])
            torch.testing.assert_close(found[at], expected, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(own[at], expected, atol=1e-2)


# --- rows of a batch ---


def test_rows_of_a_batch_are_those_that_it_was_made_of():
    plain = {"id": "d", "input_ids": [1, 2, 3], "labels": [-100, -100, 3]}
    rows = [plain, {**plain, "writer": "student"}, {**plain, "writer": "text", "teacher": "math"}]
    assert rows_of(Collator(2)(rows)) == rows
    told = [*TOLD, {**TOLD[0], "writer": "both", "teacher": "chat"}]
    assert rows_of(Collator(2)(told)) == told
    silent = {"id": "s", "input_ids": [1, 2], "labels": [-100, -100], "teacher_prompt": [1, 2]}
    assert rows_of(Collator(2)([silent, TOLD[1]])) == [silent, TOLD[1]]
    mixed = [plain, TOLD[1]]  # one without is read by the teacher as by the student
    assert rows_of(Collator(2)(mixed)) == [{**plain, "teacher_prompt": [1, 2]}, TOLD[1]]
    first, again = Collator(2)(mixed), Collator(2)(rows_of(Collator(2)(mixed)))
    assert all(torch.equal(x, again[k]) if isinstance(x, torch.Tensor) else x == again[k] for k, x in first.items())


def test_tokens_of_rows_and_rows_of_writers():
    rows = [
        {"id": "0", "input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"id": "1", "input_ids": [1, 2], "labels": [-100, -100], "writer": "student"},
        {"id": "2", "input_ids": [4, 5, 6, 7], "labels": [-100, 5, -100, 7], "writer": "both"},
        {"id": "3", "input_ids": [8, 9], "labels": [-100, 9], "writer": "teacher"},
    ]
    batch = Collator(0)(rows)
    assert batch["targets"].tolist() == [2, 3, 5, 7, 9] and batch["counts"] == [2, 0, 2, 1]
    for chosen in ([0], [1], [2, 3], [3, 0], []):
        expected = [label for row in chosen for label in rows[row]["labels"] if label != -100]
        at = data.tokens_of(batch, chosen)
        assert at.dtype == torch.long and batch["targets"][at].tolist() == expected
    assert rows_written(batch, "student") == [1] and rows_written(batch, "dataset", "both") == [0, 2]
    assert rows_written(batch, *data.OWN) == [1, 2] and rows_written(batch, "text") == []


def test_seeds_and_numbers_hang_on_their_parts_alone():
    parts = [(42, 3, "a", "student"), (42, 3, "a", "teacher"), (42, 4, "a", "student"), (43, 3, "a", "student")]
    parts += [(42, 3, "b", "student"), (42, "3", "a", "student"), (4, 23, "a", "student")]
    seeds = [seed_of(*part) for part in parts]
    assert len(set(seeds)) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
    digest = hashlib.blake2b(repr(parts[0]).encode(), digest_size=8).digest()
    assert seeds[0] == int.from_bytes(digest, "big") // 2, "the same in each process, on each machine"
    numbers = torch.tensor([uniform(0, step) for step in range(4000)], dtype=torch.float64)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, 20, 0, 1)
    assert ((counts - 200).square() / 200).sum() < 50, "chi-square of 19 degrees: 50 is exceeded once in 8,000"
    assert uniform(7, "a") == seed_of(7, "a") / 2**63


# --- place_of ---


def is_held_out(text, share=0.1):
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < share * 16**8


def test_split_is_a_function_of_the_prompt_alone():
    examples = [{"id": str(i), "prompt": f"What is {i}?", "completion": "?"} for i in range(3000)]
    train, held_out = tiny.split_by_hash(examples)
    oracle = [is_held_out(e["prompt"]) for e in examples]
    assert held_out == [e for e, out in zip(examples, oracle, strict=True) if out]
    assert train == [e for e, out in zip(examples, oracle, strict=True) if not out]
    assert 0.08 < len(held_out) / len(examples) < 0.12
    assert tiny.split_by_hash(examples[::2])[1] == [e for e in examples[::2] if e in held_out]
    more = tiny.split_by_hash(examples, 0.3)[1]
    assert {e["id"] for e in held_out} < {e["id"] for e in more}


def test_a_line_more_moves_no_other_example_to_another_side(tmp_path):
    path = tmp_path / "train.jsonl"
    lines = [json.dumps({"prompt": f"What is {i}?", "completion": "?"}) for i in range(300)]
    sides = []
    for written in (lines, [*lines[:10], '{"text": "new"}', "{", *lines[10:]]):
        path.write_text("\n".join(written))
        split = tiny.split_by_hash(read_jsonl(path), 0.3)
        sides.append([{e["prompt"] for e in side if "prompt" in e} for side in split])
    assert sides[0] == sides[1] and len(sides[0][0]) + len(sides[0][1]) == 300 and 60 < len(sides[0][1]) < 120


def test_examples_of_one_prompt_lie_on_one_side():
    prompts = [f"What is {i}?" for i in range(100)]
    pairs = [{"id": f"{i}-{k}", "prompt": p, "completion": f"{k}"} for i, p in enumerate(prompts) for k in range(3)]
    system = {"role": "system", "content": "S"}
    chats = [
        {"id": f"c{i}-{k}", "messages": [system, user(p), assistant(f"{k}"), user(f"more {k}"), assistant("")]}
        for i, p in enumerate(prompts)
        for k in range(3)
    ]
    for examples, text in (
        (pairs, lambda e: e["prompt"]),
        (chats, lambda e: json.dumps([["system", "S"], ["user", e["messages"][1]["content"]]])),
        ([{"text": p, "messages": None, "prompt": None} for p in prompts], lambda e: e["text"]),
        ([{"id": "one", "input_ids": [i, 2], "labels": [-100, 2]} for i in range(99)], lambda e: f"{e['input_ids']}"),
        ([{"id": f"f:{i}", "bad": "no JSON"} for i in range(99)], lambda e: e["id"]),
        ([{"id": f"f:{i}", "messages": ["no turn", {}]} for i in range(99)], lambda e: e["id"]),
    ):
        train, held_out = tiny.split_by_hash(examples, 0.3)
        assert held_out == [e for e in examples if is_held_out(text(e), 0.3)] and len(held_out) > 10
        assert train == [e for e in examples if not is_held_out(text(e), 0.3)]


def test_split_takes_a_lone_surrogate():
    assert sum(map(len, tiny.split_by_hash([{"prompt": "a\ud83d", "completion": "b"}]))) == 1
