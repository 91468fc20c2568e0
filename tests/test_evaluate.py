"""okd.evaluate against whole logits in float64, a greedy loop of one row at a time, and ROUGE-L worked out by hand."""

from __future__ import annotations

import copy
import logging
import math
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from okd import evaluate as module
from okd import teachers
from okd.answers import generate_answers, rouge_l
from okd.evaluate import divergence_metrics, evaluate

VOCAB, PAD, EOS = 64, 0, 1


def llama(seed: int, vocab_size: int = VOCAB, **options) -> LlamaForCausalLM:
    """A random model whose distributions are far from flat, in float64."""
    torch.manual_seed(seed)
    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**config, **options})).double().eval()


def adapted(model: LlamaForCausalLM):
    """The model (changed in place) with a LoRA that changes its output."""
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(9)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return peft.double().eval()


@pytest.fixture(autouse=True)
def one_thread():
    """On models this small threads only wait for one another: 127 s instead of 6 s on two busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(2, VOCAB)}}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="right")


def row(name: str, *segments: tuple[int, bool]) -> dict:
    """A row of random words, by segments of (length, is response)."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    ids, labels = [], []
    for length, response in segments:
        new = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
        ids += new
        labels += new if response else [-100] * length
    return {"id": name, "input_ids": ids, "labels": labels}


ROWS = [
    row("short", (3, False), (2, True)),
    row("long", (9, False), (11, True)),
    row("two turns", (4, False), (3, True), (5, False), (4, True)),
    row("text", (1, False), (8, True)),
    row("middle", (7, False), (6, True)),
]


@torch.no_grad()
def expected_divergences(student, teacher, rows) -> dict[str, float]:
    """By definition, from whole logits of one unpadded row at a time."""
    found = []
    for example in rows:
        ids = torch.tensor([example["input_ids"]])
        log_q, log_p = (torch.log_softmax(model(ids).logits[0], dim=-1) for model in (student, teacher))
        for t in range(ids.shape[1] - 1):
            y = example["labels"][t + 1]
            if y == -100:
                continue
            forward = (log_p[t].exp() * (log_p[t] - log_q[t])).sum().item()
            reverse = (log_q[t].exp() * (log_q[t] - log_p[t])).sum().item()
            agreement = float(log_q[t].argmax() == log_p[t].argmax())
            found.append(
                (1 - log_p[t, y].exp().item(), forward, reverse, -log_q[t, y].item(), -log_p[t, y].item(), agreement)
            )
    half = math.ceil(len(found) / 2)
    by_uncertainty = sorted(found, key=lambda token: token[0])
    expected = {"tokens": len(found), "unc_median": by_uncertainty[half - 1][0]}
    for suffix, tokens in (("", found), ("_easy", by_uncertainty[:half]), ("_hard", by_uncertainty[half:])):
        _, forward, reverse, student_nll, teacher_nll, agreement = (
            sum(x) / len(tokens) for x in zip(*tokens, strict=True)
        )
        expected["forward_kl" + suffix] = forward
        expected["reverse_kl" + suffix] = reverse
        expected["perplexity" + suffix] = math.exp(student_nll)
        expected["teacher_perplexity" + suffix] = math.exp(teacher_nll)
        expected["top1_agreement" + suffix] = agreement
    return expected


def measured(student, teacher, rows=ROWS, **options) -> dict[str, float]:
    return divergence_metrics(student, teacher, rows, pad_token_id=PAD, progress=False, **options)


@torch.no_grad()
def greedy(model, prompt: list[int], eos: set[int], max_new_tokens: int) -> list[int]:
    """Token by token, without cache, padding or `generate`; the ending token is not part of the answer."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token in eos:
            break
        ids.append(token)
    return ids[len(prompt) :]


# --- divergences ------------------------------------------------------------------------------------------------------


def test_divergences_equal_their_definitions_on_whole_logits():
    student, teacher = llama(0), llama(1, hidden_size=48, num_hidden_layers=3)
    expected = expected_divergences(student, teacher, ROWS)
    assert expected["tokens"] == 2 + 11 + 3 + 4 + 8 + 6
    assert expected["forward_kl"] > 0.5 and 0 < expected["top1_agreement"] < 1  # otherwise the comparison shows little
    assert measured(student, teacher, batch_size=2) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_divergences_do_not_depend_on_the_batch_size(batch_size):
    student, teacher = llama(0), llama(1)
    assert measured(student, teacher, batch_size=batch_size) == pytest.approx(measured(student, teacher), rel=1e-12)


def test_tokens_of_equal_uncertainty_have_halves_but_a_single_token_has_none():
    one = row("one", (3, False), (1, True))
    metrics = measured(llama(0), llama(1), [one, one])
    assert metrics["forward_kl_easy"] == metrics["forward_kl_hard"] == pytest.approx(metrics["forward_kl"], rel=1e-12)
    metrics = measured(llama(0), llama(1), [one])
    assert metrics["tokens"] == 1 and not any(name.endswith(("_easy", "_hard")) for name in metrics)


def test_sums_are_float64_within_a_batch_and_across_batches(monkeypatch):
    def loss(hidden, *_, **__):
        metrics = {name: torch.zeros(len(hidden)) for name in module.STATISTICS}
        metrics["forward_kl"][:2] = torch.tensor([2.0**24, 1.0])  # whose sum is no float32
        return SimpleNamespace(metrics=metrics)

    monkeypatch.setattr(module, "linear_distillation_loss", loss)
    metrics = measured(llama(0), llama(1), batch_size=1)
    assert metrics["forward_kl"] * metrics["tokens"] == pytest.approx(len(ROWS) * (2**24 + 1), rel=1e-14)


def test_heads_padded_to_different_sizes_are_compared_on_the_ids_they_share():
    student, teacher = llama(0), llama(1, vocab_size=VOCAB + 16)
    cut = copy.deepcopy(teacher)
    cut.resize_token_embeddings(VOCAB)
    assert measured(student, teacher) == pytest.approx(expected_divergences(student, cut, ROWS), rel=1e-10)


def test_padding_that_both_heads_have_is_cut_off_by_vocab_size():
    student, teacher = llama(0, vocab_size=VOCAB + 32), llama(1, vocab_size=VOCAB + 16)
    cut = copy.deepcopy((student, teacher))
    for model in cut:
        model.resize_token_embeddings(VOCAB)
    expected = expected_divergences(*cut, ROWS)
    assert measured(student, teacher, vocab_size=VOCAB) == pytest.approx(expected, rel=1e-10)
    assert measured(student, teacher)["forward_kl"] != pytest.approx(expected["forward_kl"], rel=1e-3)


def test_the_teachers_adapter_is_off_and_on_again_afterwards():
    student, base = llama(0), llama(1)
    teacher = adapted(copy.deepcopy(base))
    ids = torch.tensor([ROWS[1]["input_ids"]])
    with torch.no_grad():
        before = teacher(ids).logits
        assert (before - base(ids).logits).abs().max() > 0.1
    assert measured(student, teacher) == pytest.approx(expected_divergences(student, base, ROWS), rel=1e-10)
    with torch.no_grad():
        assert torch.equal(teacher(ids).logits, before)


def test_the_teacher_reads_prompts_of_its_own():
    """Row by row: the student after its prompt, the teacher after the one that the row has for it, of any length."""
    student, teacher = llama(0), llama(1)
    told = {"short": [9, 4, 33, 7, 12, 60], "long": [5]}
    rows = [
        {**example, "teacher_prompt": told[example["id"]]} if example["id"] in told else example for example in ROWS
    ]
    rows = [example for example in rows if example["id"] != "two turns"]
    sums = dict.fromkeys(("forward_kl", "reverse_kl"), 0.0)
    nlls, n = [], 0
    for example in rows:
        start = example["labels"].index(next(label for label in example["labels"][1:] if label != -100), 1)
        response, read = example["input_ids"][start:], example.get("teacher_prompt", example["input_ids"][:start])
        with torch.no_grad():
            log_q = student(torch.tensor([example["input_ids"]])).logits[0, start - 1 : -1].log_softmax(-1)
            log_p = teacher(torch.tensor([[*read, *response]])).logits[0, len(read) - 1 : -1].log_softmax(-1)
        sums["forward_kl"] += (log_p.exp() * (log_p - log_q)).sum().item()
        sums["reverse_kl"] += (log_q.exp() * (log_q - log_p)).sum().item()
        nlls += (-log_p.gather(1, torch.tensor(response).unsqueeze(1))).squeeze(1).tolist()
        n += len(response)
    for batch_size in (1, 4):
        found = measured(student, teacher, rows, batch_size=batch_size)
        assert found["tokens"] == n
        assert {name: found[name] for name in sums} == pytest.approx({k: v / n for k, v in sums.items()}, rel=1e-9)
        assert found["teacher_perplexity"] == pytest.approx(math.exp(sum(nlls) / n), rel=1e-9)


def test_a_perplexity_beyond_all_numbers_is_infinite(monkeypatch):
    def loss(hidden, *_, **__):
        return SimpleNamespace(metrics={name: torch.full((len(hidden),), 1e4) for name in module.STATISTICS})

    monkeypatch.setattr(module, "linear_distillation_loss", loss)
    assert measured(llama(0), llama(1))["perplexity"] == math.inf


def test_the_students_adapter_stays_on():
    student, teacher = adapted(llama(0)), llama(1)
    merged = copy.deepcopy(student).merge_and_unload()
    assert measured(student, teacher) == pytest.approx(expected_divergences(merged, teacher, ROWS), rel=1e-10)


def test_dropout_is_off_while_measuring():
    student, teacher = llama(0, attention_dropout=0.5), llama(1, attention_dropout=0.5)
    expected = expected_divergences(student, teacher, ROWS)
    assert measured(student.train(), teacher.train()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("fails", [False, True])
def test_training_and_requires_grad_flags_are_restored(monkeypatch, fails):
    student, teacher = llama(0).train(), adapted(llama(1)).train()
    student.model.layers[1].eval()  # a frozen part in another mode than its parent
    teacher.requires_grad_(False)  # PEFT would make the adapter trainable on leaving `disable_adapter`

    def flags():
        return [
            [*(m.training for m in model.modules()), *(p.requires_grad for p in model.parameters())]
            for model in (student, teacher)
        ]

    before, real, seen = flags(), module.response_rows, []

    def response_rows(model, batch, **options):
        seen.append((model.training, torch.is_grad_enabled()))
        if fails and len(seen) == 2:
            raise RuntimeError("out of memory")
        return real(model, batch, **options)

    for place in (module, teachers):
        monkeypatch.setattr(place, "response_rows", response_rows)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            measured(student, teacher)
    else:
        measured(student, teacher)
    assert seen == [(False, False)] * 2
    assert flags() == before
    assert torch.is_grad_enabled()


def test_without_a_teacher_perplexity_takes_one_forward_a_batch(monkeypatch):
    student, calls, real = llama(0), [], module.response_rows
    monkeypatch.setattr(module, "response_rows", lambda model, batch: calls.append(batch) or real(model, batch))
    expected = expected_divergences(student, llama(1), ROWS)
    assert measured(student, None, batch_size=2) == pytest.approx(
        {"perplexity": expected["perplexity"], "tokens": expected["tokens"]}, rel=1e-10
    )
    assert [batch["input_ids"].shape[1] for batch in calls] == [20, 13, 5]  # batches of like lengths, the longest first


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "expected a row with a response token, got none"),
        ([row("prompt only", (4, False))], {}, "expected a row with a response token, got none"),
        ([row("first only", (1, True), (3, False))], {}, "expected a row with a response token, got none"),
        ([{"id": "a", "input_ids": [2, VOCAB], "labels": [-100, VOCAB]}], {}, "below 64, the student's .*, got 64"),
        (ROWS, {"batch_size": 0}, "expected batch_size >= 1, got 0"),
    ],
)
def test_unusable_rows_are_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        measured(llama(0), llama(1), rows, **options)


def test_ids_outside_the_teachers_vocabulary_are_refused():
    with pytest.raises(ValueError, match="below 32, the teacher's vocabulary size"):
        measured(llama(0), llama(1, vocab_size=32))


def test_one_model_cannot_be_student_and_teacher():
    model = adapted(llama(0))
    with pytest.raises(ValueError, match="expected two models, got one as student and teacher"):
        measured(model, model)


# --- answers ----------------------------------------------------------------------------------------------------------

PROMPTS = {"short": 3, "long": 9, "two turns": 4, "middle": 7}  # in the order of ROWS; "text" has none


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids if i not in (PAD, EOS))


def answered(model, tokenizer, **options) -> list[dict[str, str]]:
    return generate_answers(model, tokenizer, ROWS, max_new_tokens=12, progress=False, **options)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answers_equal_a_greedy_loop_of_one_row_at_a_time(tokenizer, batch_size):
    model = llama(3)
    prompts = [example["input_ids"][: PROMPTS[example["id"]]] for example in ROWS if example["id"] in PROMPTS]
    unstopped = [greedy(model, prompt, {EOS}, 12) for prompt in prompts]
    model.generation_config.eos_token_id = [unstopped[0][4], unstopped[1][7]]  # beside the tokenizer's own
    expected = [greedy(model, prompt, {EOS, unstopped[0][4], unstopped[1][7]}, 12) for prompt in prompts]
    assert sorted(map(len, expected))[0] < 12 and max(map(len, expected)) == 12  # by an end, and by length
    answers = answered(model, tokenizer, batch_size=batch_size)
    assert [answer["id"] for answer in answers] == list(PROMPTS)
    assert [answer["prompt"] for answer in answers] == list(map(words, prompts))
    assert [answer["answer"] for answer in answers] == list(map(words, expected))


def test_the_reference_is_the_first_response_without_special_tokens(tokenizer):
    two_turns = {**ROWS[2], "input_ids": list(ROWS[2]["input_ids"])}
    two_turns["input_ids"][0] = two_turns["input_ids"][6] = EOS  # the first turn is of positions 4 to 6
    (answer,) = generate_answers(llama(3), tokenizer, [two_turns], progress=False)
    assert answer["prompt"] == words(two_turns["input_ids"][1:4])
    assert answer["reference"] == words(two_turns["input_ids"][4:6])


def test_a_checkpoints_generation_config_changes_nothing_and_nothing_warns(tokenizer, caplog):
    model = llama(3)
    expected = answered(model, tokenizer)
    hostile = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.5}
    for name, value in {**hostile, "max_length": 11, "num_beams": 2, "use_cache": False}.items():
        setattr(model.generation_config, name, value)
    tokenizer.pad_token = None
    saved = copy.deepcopy(model.generation_config)
    root = transformers_logging.get_logger("transformers")
    root.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert answered(model, tokenizer) == expected
    finally:
        root.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert model.generation_config == saved
    assert tokenizer.padding_side == "right"


def test_answers_of_an_adapted_model_are_those_of_the_merged_one(tokenizer):
    model = adapted(llama(3)).train()
    merged = copy.deepcopy(model).merge_and_unload().eval()
    answers = answered(model, tokenizer)
    assert answers == answered(merged, tokenizer)
    assert answers != answered(llama(3), tokenizer)
    assert model.training


def test_generation_options_reach_the_model(tokenizer):
    answers = answered(llama(3), tokenizer, suppress_tokens=list(range(2, VOCAB - 1)), eos_token_id=None)
    allowed = {f"w{VOCAB - 1}", ""}
    assert {word for answer in answers for word in answer["answer"].split(" ")} <= allowed


# --- ROUGE-L and the whole --------------------------------------------------------------------------------------------


def test_rouge_l_equals_values_worked_out_by_hand():
    pairs = [
        ("the cat sat on the mat", "the cat on mat"),  # LCS "the cat on mat": P 4/4, R 4/6, F 4/5
        ("He was RUNNING fast!", "fast he runs"),  # stemmed "he run": P 2/3, R 2/4, F 4/7
        ("nothing in common", ""),  # F 0
    ]
    answers = [{"reference": reference, "answer": answer} for reference, answer in pairs]
    assert rouge_l(answers) == pytest.approx(100 * (4 / 5 + 4 / 7 + 0) / 3, rel=1e-12)


def test_rouge_l_refuses_an_empty_list():
    with pytest.raises(ValueError, match="expected at least one answer, got none"):
        rouge_l([])


def test_rouge_l_without_its_package_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match="pip install rouge-score"):
        rouge_l([{"reference": "a", "answer": "a"}])


def test_evaluate_joins_divergences_answers_and_their_score(tokenizer):
    student, teacher = llama(3), llama(1)
    metrics, answers = evaluate(student, teacher, tokenizer, ROWS, max_new_tokens=12, progress=False)
    assert answers == answered(student, tokenizer)
    divergences = expected_divergences(student, teacher, ROWS)
    assert metrics == pytest.approx({**divergences, "rouge_l": rouge_l(answers), "rows": 5, "answers": 4}, rel=1e-10)


def test_evaluate_without_a_teacher_has_perplexity_and_rouge_l_only(tokenizer):
    student = llama(3)
    metrics, answers = evaluate(student, None, tokenizer, ROWS, max_new_tokens=12, progress=False)
    divergences = expected_divergences(student, student, ROWS)
    kept = {name: divergences[name] for name in ("perplexity", "tokens")}
    assert metrics == pytest.approx({**kept, "rouge_l": rouge_l(answers), "rows": 5, "answers": 4}, rel=1e-10)


@pytest.mark.parametrize(("generate", "ids"), [(0, []), (2, ["short", "long"]), (99, list(PROMPTS))])
def test_generate_limits_the_rows_that_are_answered(tokenizer, generate, ids):
    metrics, answers = evaluate(llama(3), None, tokenizer, ROWS, generate=generate, max_new_tokens=2, progress=False)
    assert [answer["id"] for answer in answers] == ids
    assert metrics["answers"] == len(ids)
    assert (metrics["rouge_l"] is None) == (not ids)


def test_seeds_are_answers_sampled_from_the_students_own_distribution(tokenizer):
    """Mean and deviation over seeds of ROUGE-L, of samples that a plain loop draws from the same random numbers."""
    student = llama(3, initializer_range=0.2)
    student.generation_config.update(do_sample=True, temperature=0.1, top_k=2, top_p=0.3)  # must not count
    state = torch.get_rng_state()
    one = [ROWS[1]]
    metrics, answers = evaluate(student, None, tokenizer, one, max_new_tokens=6, seeds=3, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    scores, first = [], None
    for seed in range(3):
        torch.manual_seed(seed)
        ids = list(one[0]["input_ids"][:9])
        for _ in range(6):
            with torch.no_grad():
                q = student(torch.tensor([ids])).logits[0, -1].softmax(-1)
            ids.append(torch.multinomial(q, 1).item())
            if ids[-1] == EOS:
                break
        answer = {"reference": words(one[0]["input_ids"][9:]), "answer": words(ids[9:])}
        first = first or answer["answer"]
        scores.append(rouge_l([answer]))
    mean = sum(scores) / 3
    assert answers[0]["answer"] == first
    assert metrics["rouge_l"] == pytest.approx(mean)
    assert metrics["rouge_l_std"] == pytest.approx((sum((s - mean) ** 2 for s in scores) / 2) ** 0.5)


def test_one_seed_is_greedy_and_none_is_refused(tokenizer):
    metrics, answers = evaluate(llama(3), None, tokenizer, ROWS, max_new_tokens=12, seeds=1, progress=False)
    assert answers == answered(llama(3), tokenizer) and "rouge_l_std" not in metrics
    with pytest.raises(ValueError, match="expected seeds >= 1, got 0"):
        evaluate(llama(3), None, tokenizer, ROWS, seeds=0)


def test_a_negative_number_of_rows_to_answer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="expected generate to be a number of rows >= 0, got -1"):
        evaluate(llama(3), None, tokenizer, ROWS, generate=-1)


def test_progress_is_shown_on_request_only(tokenizer, capsys):
    evaluate(llama(3), None, tokenizer, ROWS, generate=2, max_new_tokens=2, progress=False)
    assert capsys.readouterr() == ("", "")
    evaluate(llama(3), None, tokenizer, ROWS, generate=2, max_new_tokens=2)
    shown = capsys.readouterr()
    assert "divergence" in shown.err and "answers" in shown.err
    assert shown.err.split("\r")[-2].strip() == ""  # the bar is wiped when it is done
