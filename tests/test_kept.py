"""Responses that are kept: written once by beam search, or all at the start of an epoch; and what a restart takes."""

import copy
import json

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from okd import OKDTrainer, kept, sampling
from okd.data import rows_of, seed_of
from okd.decoding import Draw, write
from okd.encoding import encode

LIMIT, SEED = 8, 42


def examples(n=8):
    """As `tiny.examples`, each with a prompt of its own."""
    return [
        {"id": f"e{i}", "prompt": f"w{3 * i + 2} w{3 * i + 3} w{3 * i + 4}", "completion": f"w{3 * i + 5} w{3 * i + 6}"}
        for i in range(n)
    ]


def rows(n=8):
    return encode(examples(n), tiny.tokenizer(), max_length=64).rows


PROMPTS = [row["input_ids"][:3] for row in rows()]


def llama_teacher(seed=1):
    return tiny.llama(seed=seed, layers=3, hidden=48)


def trainer(directory, method="seqkd", teacher=None, student=None, **options):
    return OKDTrainer(
        student or tiny.llama(),
        llama_teacher() if teacher is None else teacher or None,
        tiny.config(directory, method=method, **{"max_steps": 6, "max_new_tokens": LIMIT, **options}),
        train_dataset=examples(),
        processing_class=tiny.tokenizer(),
    )


@pytest.fixture
def asked(monkeypatch):
    """Prompts that a model has been asked for a response to: (kind, prompt)."""
    seen, beams, sampled = [], sampling.generate_responses, sampling.write

    def by_beams(model, prompts, **options):
        seen.extend(("beams", tuple(prompt)) for prompt in prompts)
        return beams(model, prompts, **options)

    def by_sampling(model, prompts, *args, **options):
        seen.extend(("samples", tuple(prompt)) for prompt in prompts)
        return sampled(model, prompts, *args, **options)

    monkeypatch.setattr(sampling, "generate_responses", by_beams)
    monkeypatch.setattr(sampling, "write", by_sampling)
    return seen


def trained_rows(run):
    """The rows of every step of the run, which trains: a list for each step."""
    seen, original = [], run.sampler.collate

    def collate(given):
        seen.append(copy.deepcopy(list(given)))
        return original(given)

    run.sampler.collate = collate
    return seen


def responses(found):
    return [row["input_ids"][3:] for row in found]


@torch.no_grad()
def beam_search(model, beams=5, limit=LIMIT):
    """By transformers, one prompt at a time."""
    found = []
    for prompt in PROMPTS:
        ids = (
            model.eval()
            .generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, 3, dtype=torch.long),
                num_beams=beams,
                do_sample=False,
                max_new_tokens=limit,
                eos_token_id=tiny.EOS,
                pad_token_id=tiny.EOS,
            )[0, 3:]
            .tolist()
        )
        found.append(ids[: ids.index(tiny.EOS) + 1] if tiny.EOS in ids else ids)
    return found


def kept_file(directory, name="teacher_0"):
    return directory / "responses" / f"{name}.jsonl"


# --- once, by beam search (SeqKD) ---


def test_seqkd_writes_by_beam_search(tmp_path):
    found = trainer(tmp_path).sampler.respond(rows(), "teacher")
    assert responses(found) == beam_search(llama_teacher())
    assert {row["writer"] for row in found} == {"teacher"} and [row["id"] for row in found] == [
        f"e{i}" for i in range(8)
    ]
    assert all(row["labels"] == [-100] * 3 + row["input_ids"][3:] for row in found)
    greedy = trainer(tmp_path / "greedy", num_beams=1).sampler.respond(rows(), "teacher")
    assert responses(greedy) == beam_search(llama_teacher(), beams=1) != responses(found)


def test_beams_write_ids_that_both_models_know(tmp_path):
    """The teacher's head has more rows than the student's, and would use them."""
    student, teacher = tiny.llama(vocab=32), llama_teacher()
    run = trainer(tmp_path, student=student, teacher=teacher, vocab_size=32)
    beyond = [token for row in beam_search(llama_teacher()) for token in row if token >= 32]
    found = run.sampler.respond(rows(), "teacher")
    assert beyond and max(token for row in responses(found) for token in row) < 32


def test_each_example_is_written_once(tmp_path, asked):
    """Three epochs, of which the first generates."""
    run = trainer(tmp_path)
    seen = trained_rows(run)
    run.train()
    assert sorted(asked) == sorted(("beams", tuple(prompt)) for prompt in PROMPTS)
    expected = dict(zip([row["id"] for row in rows()], beam_search(llama_teacher()), strict=True))
    assert len(seen) == 6
    for epoch in range(3):
        of_epoch = [row for step in seen[2 * epoch : 2 * epoch + 2] for row in step]
        assert {row["id"]: row["input_ids"][3:] for row in of_epoch} == expected
    losses = [e["student_loss"] for e in run.state.log_history if "student_loss" in e]
    assert losses[-1] < 0.8 * losses[0]
    rates = [e["generated_tokens_per_second"] for e in run.state.log_history if "student_loss" in e]
    assert min(rates[:2]) > 1 and max(rates[2:]) == 0
    lines = [json.loads(line) for line in kept_file(tmp_path).read_text().splitlines()]
    assert sorted(ids for line in lines for ids in line.values()) == sorted(expected.values())


def test_a_restart_takes_what_was_written(tmp_path, asked):
    first = responses(trainer(tmp_path).sampler.respond(rows(), "teacher"))
    asked.clear()
    run = trainer(tmp_path)
    assert responses(run.sampler.respond(rows(), "teacher")) == first and asked == []
    run.train()
    assert asked == []


def test_a_line_that_was_cut_short_is_written_anew(tmp_path, asked):
    """And once only: what is appended after it is whole."""
    first = responses(trainer(tmp_path).sampler.respond(rows(), "teacher"))
    path = kept_file(tmp_path)
    path.write_text(path.read_text()[:-6])
    asked.clear()
    assert responses(trainer(tmp_path).sampler.respond(rows(), "teacher")) == first
    assert asked == [("beams", tuple(PROMPTS[-1]))]
    asked.clear()
    assert responses(trainer(tmp_path).sampler.respond(rows(), "teacher")) == first
    assert asked == []


def with_other_attention():
    """The same embeddings and head, as after a LoRA was merged."""
    teacher = llama_teacher()
    with torch.no_grad():
        teacher.model.layers[1].self_attn.q_proj.weight.add_(0.3)
    return teacher


def with_adapter():
    torch.manual_seed(3)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    return get_peft_model(llama_teacher(), adapter)


@pytest.mark.parametrize(
    "others",
    [
        {"teacher": lambda: llama_teacher(2)},
        {"teacher": with_other_attention},
        {"teacher": with_adapter},
        {"seed": 43},
        {"max_new_tokens": 5},
        {"num_beams": 3},
    ],
)
def test_other_responses_are_not_taken(others, tmp_path, asked):
    trainer(tmp_path).sampler.respond(rows(), "teacher")
    asked.clear()
    options = {name: value() if callable(value) else value for name, value in others.items()}
    found = trainer(tmp_path, **options).sampler.respond(rows(), "teacher")
    assert len(asked) == 8
    if "teacher" in others:
        assert responses(found) == beam_search(others["teacher"]())
    if "max_new_tokens" in others:
        assert max(map(len, responses(found))) == 5
    asked.clear()
    trainer(tmp_path).sampler.respond(rows(), "teacher")
    assert asked == [], "the first ones are kept beside them"


def test_rows_written_anew_at_each_step(tmp_path, asked):
    run = trainer(tmp_path, generate="step")
    seen = trained_rows(run)
    run.train()
    assert len(asked) == 24 and {kind for kind, _ in asked} == {"samples"}
    epochs = [{row["id"]: row["input_ids"] for step in seen[i : i + 2] for row in step} for i in (0, 2, 4)]
    assert all(len(epoch) == 8 for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert not (tmp_path / "responses").exists()


# --- at the start of each epoch (DistiLLM-2) ---


def samples(model, writer, epoch, draw):
    written = write(
        model.eval(),
        PROMPTS,
        [LIMIT] * 8,
        ends=[tiny.EOS],
        vocab_size=tiny.VOCAB,
        seeds=[seed_of(SEED, epoch, f"e{i}", writer) for i in range(8)],
        draw=draw,
    )
    return {f"e{i}": response for i, response in enumerate(written.responses)}


def students_at_epochs(run):
    """Copies of the student at the start of each epoch of the run, which trains; and the step."""
    found, begin = [], run.sampler.begin_epoch

    def begin_epoch(epoch):
        found.append((epoch, run.state.global_step, copy.deepcopy(run.pair.student)))
        begin(epoch)

    run.sampler.begin_epoch = begin_epoch
    return found


def test_an_epochs_responses_are_written_at_its_start(tmp_path, asked):
    """The student's by the student of that moment, the teacher's once for all; at the temperature of the paper."""
    run = trainer(tmp_path, "distillm2")
    seen, students = trained_rows(run), students_at_epochs(run)
    run.train()
    assert len(asked) == 8 + 3 * 8 and {kind for kind, _ in asked} == {"samples"}
    assert [(epoch, step) for epoch, step, _ in students] == [(0, 0), (1, 2), (2, 4)]
    of_teacher = samples(llama_teacher(), "teacher", 0, Draw(0.8))
    of_epochs = [samples(student, "student", epoch, Draw(0.8)) for epoch, _, student in students]
    assert of_epochs[0] != of_epochs[1] != of_epochs[2]
    for epoch, expected in enumerate(of_epochs):
        for part in seen[2 * epoch : 2 * epoch + 2]:
            assert [row["writer"] for row in part] == ["teacher"] * 4 + ["student"] * 4
            for row in part:
                assert row["input_ids"][3:] == (of_teacher if row["writer"] == "teacher" else expected)[row["id"]]
    for step in seen:
        assert [row["id"] for row in step[:4]] == [row["id"] for row in step[4:]]
    assert len(kept_file(tmp_path, "teacher_0").read_text().splitlines()) == 8
    assert all(len(kept_file(tmp_path, f"student_{e}_0").read_text().splitlines()) == 8 for e in range(3))


def test_a_run_resumed_within_an_epoch_trains_on_the_same_rows(tmp_path, asked):
    """Bit for bit; the student of the checkpoint writes nothing of the epoch that it is in the middle of, and all of
    the next one, whatever another run has left of it."""
    options = {"max_steps": 12, "per_device_train_batch_size": 2}  # 4 steps an epoch
    whole = trainer(tmp_path / "whole", "distillm2", **options)
    expected = trained_rows(whole)
    whole.train()
    trainer(tmp_path / "parts", "distillm2", save_strategy="steps", save_steps=6, **options).train()
    path = kept_file(tmp_path / "parts", "student_2_0")
    path.write_text("".join(line.replace("[", "[3, ") + "\n" for line in path.read_text().splitlines()))
    asked.clear()
    again = trainer(tmp_path / "parts", "distillm2", **options)
    found, students = trained_rows(again), students_at_epochs(again)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-6"))
    assert [(epoch, step) for epoch, step, _ in students] == [(1, 6), (2, 8)]
    assert asked.count(("samples", tuple(PROMPTS[0]))) == 1 and len(asked) == 8
    assert found == expected[6:]
    tiny.assert_same_weights(again.pair, whole.pair)


def test_a_new_run_in_an_old_directory_asks_its_own_student(tmp_path, asked):
    """The teacher's responses are the same; those of another student are not this one's."""
    trainer(tmp_path, "distillm2").train()
    asked.clear()
    run = trainer(tmp_path, "distillm2", student=tiny.llama(seed=5), learning_rate=5e-3)
    seen, students = trained_rows(run), students_at_epochs(run)
    run.train()
    assert len(asked) == 3 * 8
    for i, (epoch, _, student) in enumerate(students):
        expected = samples(student, "student", epoch, Draw(0.8))
        own = {row["id"]: row["input_ids"][3:] for part in seen[2 * i : 2 * i + 2] for row in part[4:]}
        assert own == expected


def test_a_new_run_asks_its_own_self_teacher(tmp_path, asked):
    """Which is made of the student."""
    for student in (tiny.llama(), tiny.llama(seed=5)):
        run = trainer(tmp_path, "distillm2", teacher=False, student=student, self_teacher="average", max_steps=2)
        expected = samples(student, "teacher", 0, Draw(0.8))
        seen = trained_rows(run)
        asked.clear()
        run.train()
        assert len(asked) == 16
        assert {row["id"]: row["input_ids"][3:] for step in seen for row in step[:4]} == expected


def test_responses_of_several_processes_are_shared_out(tmp_path, monkeypatch, asked):
    """Each writes its part of an epoch, and reads the others': here one process after the other."""
    runs = [trainer(tmp_path, "distillm2") for _ in range(2)]
    monkeypatch.setattr(type(runs[1].args), "process_index", property(lambda self: self.__dict__.get("rank", 0)))
    runs[1].args.__dict__["rank"] = 1
    monkeypatch.setattr(kept, "ranks", lambda: 2)
    monkeypatch.setattr(kept, "gather_object", lambda found: found)  # by file instead
    for run in runs:
        run.sampler.begin_epoch(0)
    assert sorted(asked) == sorted([("samples", tuple(prompt)) for prompt in PROMPTS] * 2), "each prompt by each writer"
    for name in ("teacher", "student_0"):
        parts = [kept_file(tmp_path, f"{name}_{rank}").read_text().splitlines() for rank in range(2)]
        assert [len(part) for part in parts] == [4, 4]
    asked.clear()
    monkeypatch.setattr(kept, "ranks", lambda: 1)
    run = trainer(tmp_path, "distillm2")
    run.sampler.begin_epoch(0)
    (batch,) = run.sampler([run.data_collator(rows())], 0)
    assert asked == []
    expected = samples(tiny.llama(), "student", 0, Draw(0.8))
    assert {row["id"]: row["input_ids"][3:] for row in rows_of(batch)[8:]} == expected
