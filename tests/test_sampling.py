"""Who writes a batch: the policies by themselves, and whole runs of the methods that sample."""

import copy
import dataclasses
import json

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import okd.evaluate as evaluate_module
from okd import METHODS, OKDConfig, OKDTrainer, decoding, sampling
from okd.cli import main
from okd.data import Collator, rows_of, seed_of
from okd.decoding import Draw, write
from okd.encoding import encode
from okd.sampling import LengthOptions

SEED = 42  # transformers' default


def trainer(tmp_path, method="gkd", student=None, teacher=None, texts=None, **options):
    if LengthOptions in METHODS[method].option_groups:
        options = {"max_new_tokens": 8, **options}
    return OKDTrainer(
        student or tiny.llama(),
        teacher or tiny.llama(seed=1, layers=3, hidden=48),
        tiny.config(tmp_path, method=method, **options),
        train_dataset=tiny.examples(),
        eval_dataset=tiny.examples(8, seed=9),
        processing_class=tiny.tokenizer(),
        text_dataset=texts,
    )


def rows(n=4):
    return encode(tiny.examples(n), tiny.tokenizer(), max_length=32).rows


def batch(n=4):
    return Collator(tiny.EOS)(rows(n))


def seeds(writer="student", step=0, n=4):
    return [seed_of(SEED, step, row["id"], writer) for row in rows(n)]


def responses(found):
    return [row["input_ids"][3:] for row in found]


# --- a written row ---


def test_a_written_row_is_its_prompt_and_one_response(tmp_path):
    sampler = trainer(tmp_path, student_share=1.0).sampler
    given = rows(8)
    found = sampler.respond(given)
    for old, new in zip(given, found, strict=True):
        assert new["id"] == old["id"] and new["writer"] == "student"
        assert new["input_ids"][:3] == old["input_ids"][:3] and new["labels"][:3] == [-100] * 3
        response = new["input_ids"][3:]
        assert new["labels"][3:] == response and tiny.EOS not in response[:-1]
        assert response[-1] == tiny.EOS or len(response) == 8, "an end that was written is a response token"
    assert [row["input_ids"] for row in found] != [row["input_ids"] for row in given]


def test_it_is_what_the_student_writes(tmp_path):
    """Prompt, ends, limit and numbers reach the decoder, whose tests are elsewhere."""
    student = tiny.llama()
    student.generation_config.eos_token_id = [tiny.EOS, 5, 7]
    run = trainer(tmp_path, student=student, sampling_temperature=0.8, sampling_top_p=0.9, sampling_top_k=20)
    run.sampler.step = 3
    found = run.sampler.respond(rows())
    expected = write(
        student.eval(),
        [row["input_ids"][:3] for row in rows()],
        [8] * 4,
        ends=[tiny.EOS, 5, 7],
        vocab_size=tiny.VOCAB,
        seeds=seeds(step=3),
        draw=Draw(0.8, 0.9, 20),
    )
    assert responses(found) == expected.responses


def test_a_response_ends_where_those_of_any_teacher_do(tmp_path):
    """As the saved student will, though the first teacher knows nothing of the second one's end."""
    teachers = {"a": tiny.llama(seed=1), "b": tiny.llama(seed=2)}
    teachers["b"].generation_config.eos_token_id = [7, 9]
    method = dataclasses.replace(METHODS["routed"], name="mine", responses=sampling.student)
    args = tiny.config(tmp_path, method=method, max_new_tokens=20)
    data = [{**example, "teacher": "a"} for example in tiny.examples()]
    run = OKDTrainer(tiny.llama(), teachers, args, data, processing_class=tiny.tokenizer())
    found = responses(run.sampler.respond(rows(24)))
    expected = write(
        run.student.eval(),
        [row["input_ids"][:3] for row in rows(24)],
        [20] * 24,
        ends=[tiny.EOS, 7, 9],
        vocab_size=tiny.VOCAB,
        seeds=seeds(n=24),
        draw=Draw(),
    )
    assert found == expected.responses and {7, 9} & {response[-1] for response in found}
    assert run.ends == {tiny.EOS, 7, 9}


def test_rows_that_cannot_be_written_stay(tmp_path):
    text = {"id": "text", "input_ids": [4, 5, 6], "labels": [-100, 5, 6]}
    long = {"id": "long", "input_ids": [*range(2, 34), 6], "labels": [-100] * 32 + [6]}
    almost = {"id": "almost", "input_ids": [*range(2, 32), 6], "labels": [-100] * 30 + [6]}
    turns = {"id": "turns", "input_ids": [2, 3, 4, 5, 6, 7], "labels": [-100, -100, 4, -100, 6, -100]}
    sampler = trainer(tmp_path, max_length=32).sampler
    found = sampler.respond([text, long, almost, turns])
    assert found[:2] == [text, long]
    assert found[2]["input_ids"][:30] == almost["input_ids"][:30] and 31 <= len(found[2]["input_ids"]) <= 32
    assert found[3]["input_ids"][:2] == [2, 3] and found[3]["labels"][:3] == [-100, -100, found[3]["input_ids"][2]]
    assert sampler.respond([text]) == [text] and sampler.logs().get("generated_tokens_per_second") is None
    assert sampling.paired(sampler, [text, turns])[0] == text, "once, not twice"


def test_no_row_is_longer_than_the_positions_of_a_model(tmp_path):
    sampler = trainer(tmp_path, max_new_tokens=500).sampler  # max_length 512, 64 positions
    sampler.ends = set()  # never ends
    assert [len(row["input_ids"]) for row in sampler.respond(rows(2))] == [64, 64]


def test_a_response_fits_behind_the_teachers_prompt_too(tmp_path):
    """The row has max_length, of each model's positions what it reads counts."""
    short, long = [3, 4, 5], [3 + i % 40 for i in range(60)]
    told = {"id": "told", "input_ids": [*short, 6], "labels": [-100] * 3 + [6], "teacher_prompt": long}
    knows = {"id": "knows", "input_ids": [*long, 6], "labels": [-100] * 60 + [6], "teacher_prompt": short}
    full = {**told, "id": "full", "teacher_prompt": [*long, *range(2, 6)]}
    sampler = trainer(tmp_path, max_new_tokens=30, max_length=62).sampler  # both models have 64 positions
    sampler.ends = set()  # never ends
    for writer in ("student", "teacher"):
        found = sampler.respond([told, knows, full], writer)
        assert [len(row["labels"]) - row["labels"].count(-100) for row in found] == [4, 2, 1]
        assert [row.get("writer") for row in found] == [writer, writer, None]
        assert [row["teacher_prompt"] for row in found] == [long, short, full["teacher_prompt"]]
        assert found[0]["input_ids"][:3] == short and found[1]["input_ids"][:60] == long
    of_teacher = write(
        sampler.pair.teacher.model,
        [long],
        [4],
        ends=(),
        vocab_size=tiny.VOCAB,
        seeds=[seed_of(SEED, 0, "told", "teacher")],
        draw=Draw(),
    )
    assert found[0]["input_ids"][3:] == of_teacher.responses[0], "it answers what it was told"


def test_writing_is_under_autocast_with_logits_in_fp32(tmp_path, monkeypatch):
    """bf16=True with fp32 weights: decoders run in bf16, as in the step; what is drawn from is not rounded to it."""
    run = trainer(tmp_path, "skd", bf16=True, max_steps=1)
    seen, dtypes = set(), set()
    hidden_states, draw = decoding.hidden_states, decoding.Draw.__call__

    def watched(*args, **options):
        seen.add(torch.is_autocast_enabled("cpu"))
        return hidden_states(*args, **options)

    def drawn(self, logits, uniform):
        dtypes.add((logits.dtype, bool((logits == logits.bfloat16()).all())))
        return draw(self, logits, uniform)

    monkeypatch.setattr(decoding, "hidden_states", watched)
    monkeypatch.setattr(decoding.Draw, "__call__", drawn)
    run.train()
    assert seen == {True} and dtypes == {(torch.float32, False)}


def test_the_share_of_generating_leaves_evaluations_out(tmp_path, monkeypatch):
    run = trainer(tmp_path, student_share=1.0)
    now = [100.0]
    monkeypatch.setattr(sampling.time, "perf_counter", lambda: now[0])
    run.meters.since = run.sampler.since = 100.0
    run.sampler.note(generating_seconds=1.0, rows=1, student_written_rows=1, generated_tokens=5)
    metrics = evaluate_module.divergence_metrics

    def slow(*args, **options):
        now[0] += 50.0
        return metrics(*args, **options)

    monkeypatch.setattr(evaluate_module, "divergence_metrics", slow)
    now[0] += 4.0
    run.evaluate()
    assert run.sampler.logs()["generating_share"] == pytest.approx(0.25)
    assert run.meters.since == 150.0


def test_a_policy_that_remembers_nothing_needs_no_file_to_resume(tmp_path):
    trainer(tmp_path, "gkd").sampler.load(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"none.json: expected the sampler's state of this run"):
        trainer(tmp_path, "distillm", eval_strategy="steps").sampler.load(tmp_path / "none.json")


def test_ids_are_those_that_both_models_know(tmp_path):
    run = trainer(tmp_path, student=tiny.llama(vocab=80), vocab_size=64, sampling_temperature=50.0, max_new_tokens=40)
    assert max(max(row["input_ids"]) for row in run.sampler.respond(rows(8))) < 64


# --- seeds, and what sampling leaves alone ---


def ids_of(batches):
    return [b["input_ids"].tolist() for b in batches]


def test_the_numbers_follow_seed_step_id_and_writer(tmp_path):
    run = trainer(tmp_path, student_share=1.0, gradient_accumulation_steps=2)
    first = ids_of(run.sampler([batch(), batch()], step=3))
    assert first[0] == first[1], "the same examples twice"
    run.sampler([batch()], step=2)
    assert ids_of(run.sampler([batch()], step=3)) == first[:1], "whatever was drawn before"
    assert ids_of(run.sampler([batch()], step=4))[0] != first[0]
    renamed = batch()
    renamed["ids"] = [f"other-{name}" for name in renamed["ids"]]
    assert ids_of(run.sampler([renamed], step=3))[0] != first[0]
    uniforms = [torch.Generator().manual_seed(seeds(writer)[0]) for writer in ("student", "teacher")]
    assert len({torch.rand((), generator=numbers).item() for numbers in uniforms}) == 2
    run.args.seed = 43
    assert ids_of(run.sampler([batch()], step=3))[0] != first[0]


def as_process(run, index, monkeypatch):
    monkeypatch.setattr(type(run.args), "process_index", property(lambda self: self.__dict__.get("rank", 0)))
    run.args.__dict__["rank"] = index


def test_processes_agree_who_writes_and_what(tmp_path, monkeypatch):
    runs = [trainer(tmp_path) for _ in range(2)]
    as_process(runs[1], 1, monkeypatch)
    assert [run.args.process_index for run in runs] == [0, 1]
    coins = []
    for step in range(40):
        (a,), (b,) = (run.sampler([batch()], step) for run in runs)
        assert a["writers"] == b["writers"] and ids_of([a]) == ids_of([b])
        coins.append("student" in a["writers"])
    assert 12 <= sum(coins) <= 28, "half of the batches"


@pytest.mark.parametrize("method", ["gkd", "skd", "minillm", "seqkd", "distillm2", "distillm"])
def test_a_row_is_written_alike_whatever_shares_its_batch(method, tmp_path, monkeypatch):
    """By each policy: alone, among others, in another order, on another process."""
    options = {"gkd": {"student_share": 1.0}, "seqkd": {"generate": "step"}, "distillm2": {"generate": "step"}}
    found = []
    for process, parts in (
        (0, [[0, 1, 2, 3, 4, 5]]),
        (1, [[0, 1, 2, 3, 4, 5]]),
        (0, [[5, 3, 1], [4], [0, 2]]),
        (1, [[2, 4], [1, 0, 5, 3]]),
    ):
        run = trainer(tmp_path, method, **options.get(method, {}))
        as_process(run, process, monkeypatch)
        if method == "distillm":
            run.sampler.state["phi"] = 1.0  # the student writes until its buffer is full
        batches = [Collator(tiny.EOS)([rows(6)[i] for i in part]) for part in parts]
        written = [row for one in run.sampler(batches, step=2) for row in rows_of(one)]
        assert not any(row.get("writer", "dataset") == "dataset" for row in written)
        found.append({(row["id"], row["writer"]): row["input_ids"] for row in written})
    assert len(found[0]) == (12 if method == "distillm2" else 6)
    assert found[1] == found[0] and found[2] == found[0] and found[3] == found[0]


@pytest.mark.parametrize("method", ["gkd", "skd", "okd"])
def test_sampling_leaves_modes_gradients_and_random_state_alone(method, tmp_path):
    """And dropout is off meanwhile: equal numbers give equal rows."""
    student = get_peft_model(
        tiny.llama(), LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.5, init_lora_weights=False)
    )
    run = trainer(tmp_path, method, student=student, online_teacher=True, online_dropout=0.5)
    run.pair.train()
    student.base_model.model.model.norm.eval()  # a frozen part in another mode than its parent
    flags = [m.training for m in run.pair.modules()] + [p.requires_grad for p in run.pair.parameters()]
    state = torch.get_rng_state()
    found = []
    for _ in range(2):
        found.append([run.sampler.respond(rows(), writer) for writer in ("student", "teacher", "both")])
    assert found[0] == found[1]
    assert flags == [m.training for m in run.pair.modules()] + [p.requires_grad for p in run.pair.parameters()]
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.grad is not None for p in run.pair.parameters())


def test_tokens_of_the_written_batches_are_counted(tmp_path):
    run = trainer(tmp_path, student_share=1.0, gradient_accumulation_steps=2)
    batches, totals = run.get_batch_samples(iter([batch(), batch(3)]), 2, torch.device("cpu"))
    expected = sum(label != -100 for b in batches for row in rows_of(b) for label in row["labels"])
    assert totals.tokens == expected == sum(len(b["targets"]) for b in batches)
    assert totals.tokens != sum(len(b["targets"]) for b in (batch(), batch(3)))
    assert totals.own_rows == 7 and totals.given_rows == totals.text_tokens == 1, "1 where there is nothing to count"


# --- the policies ---


def random_module(run):
    for name, parameter in run.pair.teacher.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=2.0)


def test_the_teacher_writes_as_it_was_and_judges_as_it_is(tmp_path):
    base = tiny.llama(seed=1, layers=3, hidden=48).eval()
    runs = [trainer(tmp_path, "skd"), trainer(tmp_path, "skd", online_teacher=True)]
    random_module(runs[1])
    found = {}
    for writer in ("teacher", "both"):
        for i, run in enumerate(runs):
            found[writer, i] = run.sampler.respond(rows(), writer)
    assert found["teacher", 0] == found["teacher", 1] and found["both", 0] != found["both", 1]
    options = {"ends": [tiny.EOS], "vocab_size": tiny.VOCAB, "draw": Draw()}
    prompts = [row["input_ids"][:3] for row in rows()]
    expected = write(base, prompts, [8] * 4, seeds=seeds("teacher"), **options)
    assert responses(found["teacher", 0]) == expected.responses
    assert {row["writer"] for row in found["teacher", 0]} == {"teacher"}
    assert {row["writer"] for row in found["both", 0]} == {"both"}


def test_a_teacher_whose_prefix_is_off_may_write(tmp_path):
    run = trainer(tmp_path, "distillm2", online_teacher=True, online_module="prefix")
    assert len(run.sampler.respond(rows(), "teacher")) == 4


def test_evaluating_other_data_does_not_move_phi(tmp_path):
    run = trainer(tmp_path, "distillm", eval_strategy="steps", eval_steps=1)
    before = dict(run.sampler.state)
    run.evaluate(tiny.examples(4), metric_key_prefix="train")
    assert run.sampler.state == before
    run.evaluate()
    assert run.sampler.state != before


@pytest.mark.parametrize("generate", ["step", "once"])
def test_a_frozen_teachers_own_adapter_is_the_teacher(generate, tmp_path):
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    teacher = get_peft_model(tiny.llama(seed=1), adapter)
    merged = copy.deepcopy(teacher).merge_and_unload()
    found = []
    for i, model in enumerate((teacher, merged)):
        sampler = trainer(tmp_path / str(i), "seqkd", teacher=model, generate=generate).sampler
        found.append(sampler.respond(rows(), "teacher"))
    assert found[0] == found[1]


def test_interleaved_takes_its_options(tmp_path):
    run = trainer(tmp_path, "skd", skd_gamma=3, skd_top_k=12, skd_student_temperature=1.5, skd_top_p=0.9)
    found = run.sampler.respond(rows(), "both")
    options = {"ends": [tiny.EOS], "vocab_size": tiny.VOCAB, "draw": Draw(1.5, 0.9), "teacher_draw": Draw(0.2, 0.9)}
    written = write(
        run.pair.student.eval(),
        [row["input_ids"][:3] for row in rows()],
        [8] * 4,
        teacher=run.pair.teacher.model,
        top_k=12,
        seeds=seeds("both"),
        **options,
    )
    assert responses(found) == written.responses
    assert run.sampler.logs()["acceptance_rate"] == written.accepted / written.tokens
    assert 0 < written.accepted < written.tokens


def test_paired_rows(tmp_path):
    sampler = trainer(tmp_path).sampler
    found = sampling.paired(sampler, rows(3))
    assert [row["id"] for row in found] == [row["id"] for row in rows(3)] * 2
    assert [row["writer"] for row in found] == ["teacher"] * 3 + ["student"] * 3
    assert all(a["input_ids"][:3] == b["input_ids"][:3] for a, b in zip(found[:3], found[3:], strict=True))
    assert [a["input_ids"] for a in found[:3]] != [b["input_ids"] for b in found[3:]]


def test_distillm_schedule(tmp_path):
    """Against the rule of the paper, step by step: dataset, generate and push, replay."""
    run = trainer(tmp_path, "distillm", replay_size=20, eval_strategy="steps", eval_steps=1, max_steps=400)
    sampler, count = run.sampler, 0

    def respond(given):
        nonlocal count
        count += len(given)
        return [{**row, "id": f"{count - len(given) + i}", "writer": "student"} for i, row in enumerate(given)]

    sampler.respond = respond
    seen, buffer, total = {"dataset": 0, "generate": 0, "replay": 0}, [], 400
    for t in range(total):
        phi = sampler.state["phi"] = 0.0 if t < 20 else 0.7
        run.pair.progress = t / total
        (found,) = sampler([batch(3)], t)
        u = sampler.coin
        if u < phi * (1 - t / total) or (u < phi and len(buffer) < 20):
            kind, names = "generate", [str(count - 3 + i) for i in range(3)]
            buffer = (buffer + names)[-20:]
            assert found["ids"] == names
        elif u < phi:
            kind = "replay"
            assert set(found["ids"]) <= set(buffer) and len(set(found["ids"])) == 3
        else:
            kind = "dataset"
            assert found["ids"] == batch(3)["ids"]
        seen[kind] += 1
        assert found["writers"] == ["dataset" if kind == "dataset" else "student"] * 3
        assert [row["id"] for row in sampler.state["buffer"]] == buffer
    assert min(seen.values()) > 60 and sum(seen.values()) == 400
    json.dumps(sampler.state)


def test_phi_grows_when_the_held_out_loss_has_risen_by_a_tenth(tmp_path):
    """Above a reference that moves only with phi: a slow rise counts too, and a fall in between does not lower it."""
    sampler = trainer(tmp_path, "distillm", eval_strategy="steps", eval_steps=1).sampler
    assert sampler.wants_reference
    seen = []
    for loss in (1.0, 1.04, 1.08, 1.12, 1.16, 0.5, 1.2, 1.24):
        sampler.on_evaluate(loss)
        seen.append((round(sampler.state["phi"], 3), sampler.state["reference"]))
    assert not sampler.wants_reference
    first, second, third = (0.0, 1.0), (0.1, 1.12), (0.2, 1.24)
    assert seen == [first, first, first, second, second, second, second, third]
    phis = []
    for k in range(12):
        sampler.on_evaluate(2.0 + k)
        phis.append(round(sampler.state["phi"], 3))
    assert phis == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert sampler.logs()["phi"] == 1.0


@torch.no_grad()
def cross_entropy(model, examples):
    nlls = []
    for row in encode(examples, tiny.tokenizer(), max_length=64).rows:
        log_q = model.eval()(torch.tensor([row["input_ids"]])).logits[0, :-1].double().log_softmax(-1)
        nlls += [-log_q[t, label].item() for t, label in enumerate(row["labels"][1:]) if label != -100]
    return sum(nlls) / len(nlls)


def test_the_reference_is_measured_before_the_training(tmp_path):
    run = trainer(tmp_path, "distillm", eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=4)
    expected = cross_entropy(run.pair.student, tiny.examples(8, seed=9))
    run.train()
    assert run.sampler.state["reference"] == pytest.approx(expected, rel=1e-5)
    assert cross_entropy(run.pair.student, tiny.examples(8, seed=9)) < 0.95 * expected, "it has learned since"
    assert [e["step"] for e in run.state.log_history if "eval_loss" in e] == [2, 4], "and it is no evaluation"
    saved = json.loads((tmp_path / "checkpoint-4" / "sampler_0.json").read_text())
    assert saved == run.sampler.state
    never = trainer(tmp_path, "distillm")
    never.train()
    assert never.sampler.state["reference"] is None


def test_says_that_phi_will_never_move(tmp_path, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    trainer(tmp_path, "distillm")
    (said,) = [r.getMessage() for r in caplog.records if "eval_strategy" in r.getMessage()]
    caplog.clear()
    trainer(tmp_path, "distillm", eval_strategy="steps", eval_steps=2)
    trainer(tmp_path, "gkd")
    logging.disable_propagation()
    assert "every batch will be the dataset's: set eval_strategy=steps" in said
    assert not [r for r in caplog.records if "eval_strategy" in r.getMessage()]


# --- a mixture with the teacher (minillm), and plain text beside the responses ---


def test_minillm_samples_from_the_mixture(tmp_path):
    """Its share is the method's 0.2, or the one given; 0 is the student alone."""
    found = {}
    for share in (None, 0.0, 0.5):
        run = trainer(tmp_path, "minillm", **({} if share is None else {"teacher_share": share}))
        written = [row for one in run.sampler([batch()], step=1) for row in rows_of(one)]
        assert {row["writer"] for row in written} == {"student"}
        models = {"teacher": run.pair.teacher.model} if share != 0 else {}
        expected = write(
            run.pair.student.eval(),
            [row["input_ids"][:3] for row in rows()],
            [8] * 4,
            ends=[tiny.EOS],
            vocab_size=tiny.VOCAB,
            seeds=seeds(step=1),
            draw=Draw(),
            share=0.2 if share is None else share,
            **models,
        )
        found[share] = responses(written)
        assert found[share] == expected.responses
    assert found[None] != found[0.0] and found[0.5] != found[0.0]
    gkd = trainer(tmp_path, "gkd", student_share=1.0)
    gkd.sampler.step = 1
    assert responses(gkd.sampler.respond(rows())) == found[0.0]


def test_minillm_does_not_read_a_temperature(tmp_path):
    """Its importance weights would not know of one."""
    with pytest.raises(ValueError, match=r"that method minillm reads; got sampling_temperature=0\.7") as error:
        trainer(tmp_path, "minillm", sampling_temperature=0.7)
    named = str(error.value).rpartition("choose a method that does: ")[2].split(", ")
    assert named == ["distillm2", "seqkd", "imitkd", "gkd", "distillm"]


def texts(n):
    """Plain text by a rule of its own."""
    return [{"id": f"text-{i}", "text": " ".join(f"w{60 - (i + k) % 50}" for k in range(6))} for i in range(n)]


@pytest.mark.parametrize("n", [16, 14])
def test_rows_of_plain_text_come_once_a_pass_on_one_rank(n, tmp_path, monkeypatch):
    """With each batch as many as it has rows, in an order of its own in each pass, others on each rank."""
    runs = [trainer(tmp_path, "minillm", texts=texts(n), gradient_accumulation_steps=2) for _ in range(2)]
    as_process(runs[1], 1, monkeypatch)
    monkeypatch.setattr(sampling, "ranks", lambda: 2)
    monkeypatch.setattr(sampling.Sampler, "respond", lambda self, given, *args, **options: list(given))
    encoded = {row["id"]: row for row in encode(texts(n), tiny.tokenizer(), max_length=512).rows}
    seen = []
    for step in range(7):  # 4 rows, 2 batches and 2 ranks: 16 texts a step
        of_ranks = [run.sampler([batch(), batch()], step) for run in runs]
        for micro in zip(*of_ranks, strict=True):
            for one in micro:
                assert one["writers"] == ["dataset"] * 4 + ["text"] * 4 and one["ids"][:4] == batch()["ids"]
                for row in rows_of(one)[4:]:
                    assert row == {**encoded[row["id"]], "writer": "text"}
                    seen.append(row["id"])
    assert len(seen) == 112
    passes = [seen[start : start + n] for start in range(0, 112, n)]
    assert all(sorted(one) == sorted(encoded) for one in passes), "all of them once a pass"
    assert len({tuple(one) for one in passes}) == len(passes), "each in an order of its own"


def test_a_last_batch_that_is_smaller_repeats_no_text(tmp_path):
    run = trainer(tmp_path, "minillm", texts=texts(30), per_device_train_batch_size=5)
    run.sampler.respond = lambda given, **options: list(given)
    seen = []
    for step, n in enumerate((5, 5, 5, 4)):
        (one,) = run.sampler([batch(n)], step)
        seen += one["ids"][n:]
    assert len(seen) == len(set(seen)) == 19


@pytest.mark.slow
def test_plain_text_is_learned_beside_the_responses(tmp_path):
    losses = {}
    for weight in (0.0, 1.0):
        run = trainer(tmp_path, "minillm", texts=texts(24), text_weight=weight, max_steps=12)
        before = run.evaluate(texts(24))["eval_perplexity"]
        run.train()
        losses[weight] = run.evaluate(texts(24))["eval_perplexity"] / before
    assert losses[1.0] < 0.5 and losses[1.0] < 0.7 * losses[0.0]
    assert not run.sampler.is_idle
    batches, totals = run.get_batch_samples(iter([batch()]), 1, torch.device("cpu"))
    assert batches == [] and totals is None, "the run is at its end"


def test_plain_text_is_refused_by_other_methods(tmp_path):
    for method in ("gkd", "okd", "seqkd"):
        with pytest.raises(
            ValueError, match=f"expected text_dataset with minillm, which reads it; got it with {method}"
        ):
            trainer(tmp_path, method, texts=texts(4))


# --- whole runs ---


def slow(method):
    return pytest.param(method, marks=pytest.mark.slow)


ADAPTIVE = {"eval_strategy": "steps", "eval_steps": 1, "replay_size": 8}


@pytest.fixture
def eager_phi(monkeypatch):
    """Every evaluation raises phi, so that a short run generates and replays."""
    monkeypatch.setattr("okd.sampling.LOSS_RISE", -100.0)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("method", ["gkd", "imitkd", slow("skd"), slow("distillm"), slow("seqkd")])
def test_learns(method, online, tmp_path, eager_phi):
    """With accumulation, from any teacher, and what is logged on the way."""
    if method == "seqkd" and online:
        with pytest.raises(ValueError, match="expected options that method seqkd reads; got online_teacher=True"):
            trainer(tmp_path, method, online_teacher=True)
        return
    options = {"distillm": {**ADAPTIVE, "eval_steps": 4}, "seqkd": {"generate": "step"}}.get(method, {})
    run = trainer(tmp_path, method, max_steps=24, gradient_accumulation_steps=2, online_teacher=online, **options)
    before = run.evaluate()["eval_forward_kl"]
    run.train()
    # One sampled token says less than a whole distribution; and a teacher whose examples are all drafted by the student
    # has no reference to learn from: it follows the student.
    factor = 0.85 if method == "seqkd" else 0.75 if method == "skd" and online else 0.7
    assert run.evaluate()["eval_forward_kl"] < factor * before
    entries = [e for e in run.state.log_history if "student_loss" in e]
    assert len(entries) == 24 and all(0 < e["generating_share"] < 1 for e in entries)
    assert ("teacher_loss" in entries[0]) is online
    shares = [e["student_written_share"] for e in entries]
    assert {"skd": max(shares) == 0, "seqkd": max(shares) == 0}.get(method, 0.2 < sum(shares) / 24 < 0.8), shares
    if method == "skd":
        assert all(0 < e["acceptance_rate"] <= 1 for e in entries)
    if method == "distillm":
        assert entries[-1]["phi"] > 0.4 and entries[-1]["replay_rows"] == 8
    if method != "distillm":
        assert max(e["generated_tokens_per_second"] for e in entries) > 1


@pytest.mark.parametrize("method", ["gkd", slow("skd"), "distillm"])
def test_resume_equals_not_stopping(method, tmp_path, eager_phi):
    """Buffer, phi and numbers too: bit for bit."""
    options = {"max_steps": 10, **(ADAPTIVE if method == "distillm" else {})}
    whole = trainer(tmp_path / "whole", method, **options)
    whole.train()
    trainer(tmp_path / "parts", method, save_strategy="steps", save_steps=6, **options).train()
    again = trainer(tmp_path / "parts", method, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-6"))
    tiny.assert_same_weights(again.pair, whole.pair)
    assert again.sampler.state == whole.sampler.state
    if method == "distillm":
        assert len(whole.sampler.state["buffer"]) == 8 and whole.sampler.state["phi"] == pytest.approx(1.0)
        kinds = [e["student_written_share"] for e in again.state.log_history if "student_loss" in e]
        assert sum(kinds[:6]) > 0 and sum(kinds[6:]) > 0, "the student writes before and after the checkpoint"


@pytest.mark.slow
def test_skd_from_the_command_line(tmp_path):
    for name, model in (("teacher", tiny.llama(seed=1, layers=3, hidden=48)), ("student", tiny.llama())):
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(e) for e in tiny.examples(40)))
    arguments = ["train", "skd", "--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "student")]
    arguments += ["--train-data", str(tmp_path / "train.jsonl"), "--output-dir", str(tmp_path / "run"), "--use-cpu"]
    arguments += ["--max-steps", "8", "--max-new-tokens", "6", "--skd-top-k", "12", "--skd-gamma", "3"]
    arguments += ["--learning-rate", "1e-2", "--eval-answers", "0", "--disable-tqdm", "true", "--online-teacher"]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["method"] == "skd" and found["after"]["forward_kl"] < 0.9 * found["before"]["forward_kl"]
    assert (tmp_path / "run" / "teacher_adapter").is_dir()


# --- errors ---


@pytest.mark.parametrize(
    "options, message",
    [
        ({"student_share": 1.5}, "expected student_share to be at least 0 and at most 1; got 1.5"),
        (
            {"method": "skd", "student_share": 0.5},
            r"that method skd reads; got student_share=0\.5.*: leave it out, or choose a method that does: imitkd, gkd",
        ),
        ({"max_new_tokens": 0}, "expected max_new_tokens to be at least 1, and finite; got 0"),
        ({"sampling_temperature": 0}, "expected sampling_temperature to be above 0, and finite; got 0"),
        ({"sampling_top_p": 0}, "expected sampling_top_p to be above 0 and at most 1; got 0"),
        ({"sampling_top_k": -1}, "expected sampling_top_k to be at least 0, and finite; got -1"),
        ({"skd_gamma": 0}, "expected skd_gamma to be at least 1"),
        ({"replay_size": 0}, "expected replay_size to be at least 1"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        OKDConfig(**{"method": "gkd", **options})


@pytest.mark.parametrize("method", ["gkd", "skd", "seqkd"])
def test_a_model_that_is_not_finite_stops_at_its_loss(method, tmp_path):
    """Not at an index out of range while it writes."""
    run = trainer(tmp_path, method, **({"student_share": 1.0, "sampling_top_p": 0.9} if method == "gkd" else {}))
    with torch.no_grad():
        run.pair.student.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 0: expected a finite loss; got student nan"):
        run.train()
