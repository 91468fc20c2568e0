"""Chat templates of the kinds that real models have: which tokens are trained, against conversations cut by hand."""

import datetime
import json

import pytest
import tiny
from peft import LoraConfig, get_peft_model
from test_data import CHATML, DEFAULT_SYSTEM, assistant, make_tokenizer, tokens_of, user
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from okd import OKDConfig, OKDTrainer
from okd.answers import end_tokens
from okd.chat import APART, LOST, THOUGHTLESS, Template
from okd.cli import main
from okd.data import tokens_of as tokens_in
from okd.encoding import encode, encoder_options
from okd.ensemble import models_of
from okd.models import stop_tokens
from okd.pair import StudentTeacher

# Drops the thoughts of turns before the last question, and puts an empty one before a later turn that has none.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% set parts = (m.content or '').split('</think>') %}"
    "{% if loop.index0 > ns.last %}"
    "<think>\n{{ parts[0].replace('<think>', '').strip() if parts | length > 1 else '' }}\n</think>\n\n"
    "{% endif %}{{ parts[-1].strip() }}"
    "{% if m.tool_calls %}<tool_call>{{ m.tool_calls | tojson }}</tool_call>{% endif %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# The day in the system turn, tools before it.
LLAMA3 = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<s><|im_start|>system\nToday: {{ date_string }}{% if tools %} tools: {{ tools | tojson }}{% endif %}<|im_end|>"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Turns must alternate, there is no system, and the assistant is called otherwise.
GEMMA = (
    "<s>{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# No token ends a turn but the one that begins the next.
GLM = (
    "<s>{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<|im_end|>' }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWO_TURNS = [user("one"), assistant("<think>a</think>1"), user("two"), assistant("<think>b</think>2")]


def only(rendered):
    (row,) = rendered.rows
    return row


def test_a_template_that_drops_earlier_thoughts_gives_each_turn_a_row_of_its_own():
    tokenizer = make_tokenizer(QWEN3)
    found = Template(tokenizer).encode(TWO_TURNS)
    first = tokens_of(
        tokenizer,
        ("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\na\n</think>\n\n1<|im_end|>", True),
        ("\n", False),
    )
    second = tokens_of(
        tokenizer,
        ("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n", False),
        ("<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\nb\n</think>\n\n2<|im_end|>", True),
        ("\n", False),
    )
    assert found.rows == [first, second] and found.notes == [APART]
    rows = encode([{"id": "x", "messages": TWO_TURNS}], tokenizer, max_length=500).rows
    assert [row["id"] for row in rows] == ["x#1", "x#2"]
    assert [(row["input_ids"], row["labels"]) for row in rows] == [first, second]


def test_an_empty_thought_of_the_templates_is_not_trained():
    tokenizer = make_tokenizer(QWEN3)
    found = Template(tokenizer).encode([user("one"), assistant("1")])
    expected = tokens_of(
        tokenizer,
        ("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("1<|im_end|>", True),
        ("\n", False),
    )
    assert only(found) == expected and found.notes == [THOUGHTLESS]
    in_prompt = Template(tokenizer, kwargs={"enable_thinking": False}).encode([user("one"), assistant("1")])
    assert only(in_prompt) == expected and in_prompt.notes == []
    own = Template(tokenizer).encode([user("one"), assistant("<think></think>1")])
    assert tokenizer.decode([x for x in only(own)[1] if x != -100]) == "<think>\n\n</think>\n\n1<|im_end|>"


def test_a_turn_that_calls_a_tool_is_a_turn_and_tools_reach_the_template():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "sum"}]}
    tokenizer = make_tokenizer(QWEN3)
    labels = only(Template(tokenizer).encode([user("one"), call]))[1]
    assert tokenizer.decode([x for x in labels if x != -100]) == '<tool_call>[{"name": "sum"}]</tool_call><|im_end|>'
    (row,) = encode([{"messages": [user("one"), call]}], tokenizer, max_length=500).rows
    assert row["labels"] == labels
    tokenizer = make_tokenizer(LLAMA3)
    example = {"messages": [user("one"), assistant("1")], "tools": [{"name": "sum"}]}
    (row,) = encode([example], tokenizer, max_length=500).rows
    assert 'tools: [{"name": "sum"}]' in tokenizer.decode(row["input_ids"])


def test_todays_date_is_pinned(tmp_path):
    tokenizer = make_tokenizer(LLAMA3)
    example = {"messages": [user("one"), assistant("1")]}
    (row,) = encode([example], tokenizer, max_length=500).rows
    assert "Today: 01 Jan 2025" in tokenizer.decode(row["input_ids"])
    for date, said in (("2026-11-29", "29 Nov 2026"), ("2024-02-29", "29 Feb 2024")):
        options = encoder_options(OKDConfig(output_dir=str(tmp_path), use_cpu=True, chat_date=date))
        day = LLAMA3.replace("date_string", "day")
        in_a_macro = "{%- macro say(form) %}{{ strftime_now(form) }}{% endmacro %}" + day.replace("strftime_now", "say")
        for template in (LLAMA3, day, in_a_macro):  # by its variable, or by strftime_now
            (row,) = encode([example], make_tokenizer(template), **options).rows
            assert f"Today: {said}" in tokenizer.decode(row["input_ids"])
        template = "\n  {% if strftime_now is defined %}{{ strftime_now(FORMAT) }}{% endif %} " + CHATML
        for form in ("%Y-%m-%d", "%A, %d %B %y", "%-d/%-m", "%H:%M", "%j"):
            text = Template(make_tokenizer(template.replace("FORMAT", repr(form))), kwargs=options["template_kwargs"])
            expected = datetime.date.fromisoformat(date).strftime(form)
            assert text.render([user("a")]) == f"\n{expected} {DEFAULT_SYSTEM}<|im_start|>user\na<|im_end|>\n"
    with pytest.raises(ValueError, match="Invalid isoformat string: 'today'"):
        OKDConfig(output_dir=str(tmp_path), use_cpu=True, chat_date="today")


def test_alternating_turns_train_and_a_conversation_that_the_template_refuses_is_counted():
    tokenizer = make_tokenizer(GEMMA)
    good = {"id": "good", "messages": [user("one"), assistant("1"), user("two"), assistant("2")]}
    bad = {"id": "bad", "messages": [user("one"), user("two"), assistant("2")]}
    encoded = encode([good, bad], tokenizer, max_length=500, max_bad_share=0.5)
    (row,) = encoded.rows
    assert tokenizer.decode([x for x in row["labels"] if x != -100]) == "1<|im_end|>2<|im_end|>"
    assert list(encoded.bad.values()) == [["bad"]] and "roles must alternate" in next(iter(encoded.bad))
    with pytest.raises(ValueError, match=r"at most 1\.0 % .* got 1 of 2: roles must alternate \(bad\)"):
        encode([good, bad], tokenizer, max_length=500)


def test_a_turn_without_an_end_of_its_own_ends_with_the_token_that_ends_generation():
    tokenizer = make_tokenizer(GLM, eos="<s>")
    stop = tokenizer.convert_tokens_to_ids("<|im_start|>")  # what begins the next question
    ids, labels = only(Template(tokenizer, ends=[stop]).encode([user("a"), assistant("1"), user("b"), assistant("2")]))
    trained = [x for x in labels if x != -100]
    assert trained == [*tokenizer("1")["input_ids"], stop, *tokenizer("2")["input_ids"], stop]
    assert ids[-1] == stop
    with pytest.raises(ValueError, match="a token that ends generation"):
        Template(tokenizer).encode([user("a"), assistant("1"), user("b"), assistant("2")])
    ids, labels = only(Template(tokenizer).encode([user("a"), assistant("1")]))
    assert labels[-1] == ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("end", ["<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"])
def test_marks_of_the_template_say_what_is_trained(end):
    """The token that ends a turn is trained where they leave it out, too."""
    tokenizer = make_tokenizer(MARKED.replace("<|im_end|>{% endgeneration %}", end))
    turns = [user("one"), assistant("1"), user("two"), {**assistant("2"), "weight": 0}, user("three"), assistant("3")]
    found = Template(tokenizer).encode(turns)
    pieces = []
    for question, answer, trained in (("one", "1", True), ("two", "2", False), ("three", "3", True)):
        pieces += [(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False)]
        pieces += [(f"{answer}<|im_end|>", trained), ("\n", False)]
    assert only(found) == tokens_of(tokenizer, *pieces) and found.notes == []


@pytest.mark.parametrize("first", ["", "1"])
def test_an_empty_turn_does_not_shift_which_are_trained(first):
    """Its marks hold nothing; and those of a turn with a thought come in two pieces."""
    piece = "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"
    template = MARKED.replace("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}", f"{piece}{piece}")
    turns = [user("one"), assistant(first), user("two"), {**assistant("2"), "weight": 0}, user("three"), assistant("3")]
    tokenizer = make_tokenizer(template)
    labels = only(Template(tokenizer).encode(turns))[1]
    assert tokenizer.decode([x for x in labels if x != -100]) == "1<|im_end|>1<|im_end|>" * bool(first) + (
        "3<|im_end|>3<|im_end|>"
    )


# --- where a prompt ends


def spaced(kind, template, trim_offsets=False):
    """Words that hold the space before them: of bytes, or SentencePiece's, which puts a space before each text, too."""
    characters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "\u2581", "\n"]
    space = "\u2581" if kind.startswith("sentencepiece") else "\u0120"
    merges = [("h", "i"), (space, "hi"), ("\u010a", "\u010a")]
    vocab = {token: i for i, token in enumerate([*characters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        scheme = kind.partition(" ")[2] or "first"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(["<s>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>")
    fast.chat_template = template
    return fast


OPENINGS = {"a space": "A: ", "two newlines": "A:\n\n", "a colon": "A:"}
PLAIN = "{% for m in messages %}{{ 'OPENING' if m.role == 'assistant' else 'U:' }}TURN{% endfor %}"
PLAIN += "{% if add_generation_prompt %}OPENING{% endif %}"
UNMARKED = PLAIN.replace("TURN", "{{ m.content }}<|im_end|>")
WITH_MARKS = PLAIN.replace(
    "TURN", "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}"
)  # fmt: skip


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("kind", ["bytes", "bytes, trimmed", "sentencepiece first", "sentencepiece always"])
@pytest.mark.parametrize("template", [UNMARKED, WITH_MARKS])
def test_a_response_goes_on_from_the_tokens_of_its_prompt(opening, kind, template):
    """What the model is given at generation, which has no part in the first word of the turn."""
    template = template.replace("OPENING", OPENINGS[opening])
    tokenizer = spaced(kind.partition(",")[0], template, trim_offsets="trimmed" in kind)
    turns = [user("hi"), assistant("hi you"), user("hi hi"), assistant("\nhi")]
    for n in (2, 4):
        chat = Template(tokenizer)
        ids, labels = only(chat.encode([{**m, "weight": i == n - 1} for i, m in enumerate(turns[:n])]))
        start = next(i for i, label in enumerate(labels) if label != -100)
        assert ids[:start] == chat.prompt(turns[: n - 1])
        assert labels[start:] == ids[start:]
        assert tokenizer.decode(ids) == tokenizer.decode(tokenizer(chat.render(turns[:n]))["input_ids"])
        assert tokenizer.convert_ids_to_tokens(labels[start + n // 4]) == "hi"
    labels = only(chat.encode(turns))[1]
    assert labels.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}])
def test_a_turn_that_says_so_is_not_trained(off):
    tokenizer = make_tokenizer(CHATML)
    turns = [user("one"), {**assistant("1"), **off}, user("two"), assistant("2")]
    labels = only(Template(tokenizer).encode(turns))[1]
    assert tokenizer.decode([x for x in labels if x != -100]) == "2<|im_end|>"
    none = encode([{"messages": [user("a"), assistant("b")]}, {"messages": turns[:2]}], tokenizer, max_length=500)
    assert len(none.rows) == 1 and list(none.skipped) == ["without response token"]


def test_turns_unlike_their_prompt_are_left_out_and_counted():
    """The opening of a turn hangs on whether it is the first: `add_generation_prompt` does not know."""
    template = CHATML.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant{{ messages|length }}\n{% endif %}"
    )
    template = template.replace(
        "<|im_start|>{{ m['role'] }}\n",
        "<|im_start|>{{ m['role'] }}{{ loop.index0 if m['role'] == 'assistant' and loop.index0 == 3 else '' }}\n",
    )
    tokenizer = make_tokenizer(template)
    found = Template(tokenizer).encode([user("one"), assistant("1"), user("two"), assistant("2")])
    assert tokenizer.decode([x for x in only(found)[1] if x != -100]) == "2<|im_end|>"
    assert found.notes == [LOST]


# --- where a response ends ---


def test_an_end_of_the_models_that_is_not_the_tokenizers_ends_a_turn():
    """As of Llama 3: the turn ends with <|eot_id|>, the tokenizer's eos is another."""
    tokenizer = make_tokenizer(CHATML, eos="<s>")
    example, end = {"messages": [user("a"), assistant("b")]}, tokenizer.convert_tokens_to_ids("<|im_end|>")
    (row,) = encode([example], tokenizer, max_length=200, ends=[end]).rows
    assert tokenizer.decode([x for x in row["labels"] if x != -100]) == "b<|im_end|>"
    with pytest.raises(ValueError, match=f"one of .{tokenizer.eos_token_id}.; the template puts .* there"):
        encode([example], tokenizer, max_length=200)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_saved_student_ends_where_it_learned_to(tmp_path, adapted):
    """At the ends of either model and of the tokenizer, though its own file is one that transformers would refuse."""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5, "temperature": 0.6, "do_sample": false}')
    student, teacher = tiny.llama(), tiny.llama(seed=1)
    student.generation_config = GenerationConfig.from_pretrained(tmp_path)
    teacher.generation_config.eos_token_id = [7, 9]
    if adapted:
        student = get_peft_model(student, LoraConfig(target_modules=["q_proj"]))
    args = OKDConfig(output_dir=str(tmp_path / "run"), use_cpu=True, method="forward_kd")
    run = OKDTrainer(student, teacher, args, tiny.examples(4), processing_class=tiny.tokenizer())
    assert run.ends == {tiny.EOS, 5, 7, 9}
    run.save_model(str(tmp_path / "out"))
    saved = tmp_path / "out" / "student"
    found = json.loads((saved / "generation_config.json").read_text())
    assert found["eos_token_id"] == [1, 5, 7, 9] and found["temperature"] == 0.6
    assert stop_tokens(str(saved)) == {1, 5, 7, 9}
    assert student.generation_config.eos_token_id == 5, "the live model is untouched"
    if not adapted:
        loaded = AutoModelForCausalLM.from_pretrained(saved)
        assert end_tokens(tiny.tokenizer(), loaded) == {1, 5, 7, 9}


def test_stop_tokens_of_a_directory(tmp_path):
    assert stop_tokens(str(tmp_path)) == set()
    for given, expected in (("{}", set()), ('{"eos_token_id": 3}', {3}), ('{"eos_token_id": [3, 4]}', {3, 4})):
        (tmp_path / "generation_config.json").write_text(given)
        assert stop_tokens(str(tmp_path)) == expected


def test_models_of_what_is_given_as_teacher():
    a, b = tiny.llama(), tiny.llama(seed=1)
    for given, expected in (
        (a, [a]),
        ([a, b], [a, b]),
        ({"x": a, "y": b}, [a, b]),
        ({"x": (a, "lora"), "y": b}, [a, b]),
    ):
        assert models_of(given) == expected
    assert end_tokens(tiny.tokenizer(), *models_of(None)) == {tiny.EOS}


SAID = {  # what each template's assistant says, of TWO_TURNS, and in how many rows
    "qwen3": (QWEN3, ["<think>\na\n</think>\n\n1<|im_end|>", "<think>\nb\n</think>\n\n2<|im_end|>"]),
    "llama3": (LLAMA3, ["<think>a</think>1<|im_end|><think>b</think>2<|im_end|>"]),
    "gemma": (GEMMA, ["<think>a</think>1<|im_end|><think>b</think>2<|im_end|>"]),
}


@pytest.mark.parametrize("family", SAID)
def test_okd_train_on_chat_data_of_a_family(family, tmp_path, capsys, monkeypatch):
    """Several turns of each conversation, by the command: what reaches the loss is what the assistant says."""
    template, said = SAID[family]
    tokenizer = make_tokenizer(template, bos=family != "qwen3")
    model = tiny.llama(layers=1, vocab=len(tokenizer), max_position_embeddings=256)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps({"id": str(i), "messages": TWO_TURNS}) + "\n" for i in range(8)))
    learned, whole = [], StudentTeacher.forward

    def watched(self, batch, *args, **kwargs):
        learned.append([tokenizer.decode(batch["targets"][tokens_in(batch, [i])]) for i in range(len(batch["ids"]))])
        return whole(self, batch, *args, **kwargs)

    monkeypatch.setattr(StudentTeacher, "forward", watched)
    words = ["train", "okd", "--teacher", str(tmp_path / "model"), "--train-data", str(data), "--eval-data", str(data)]
    words += ["--output-dir", str(tmp_path / "run"), "--max-steps", "1", "--use-cpu", "--eval-answers", "2"]
    words += ["--eval-max-new-tokens", "4", "--save-strategy", "no", "--disable-tqdm", "True"]
    assert main([*words, "--per-device-train-batch-size", "16"]) == 0
    assert sorted(learned[0]) == sorted(said * 8)
    assert f"train: {8 * len(said)} examples" in capsys.readouterr().out
    saved = tmp_path / "run" / "student"
    assert tokenizer.eos_token_id in stop_tokens(str(saved))
    assert (saved / "chat_template.jinja").read_text() == template
