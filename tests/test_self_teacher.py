"""A student that is its own teacher: its exponential average, or itself on prompts that tell it more."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from okd import OKDConfig, OKDTrainer
from okd.data import Collator
from okd.encoding import encode
from okd.pair import StudentTeacher
from okd.teachers import Averaged, Itself


def config(tmp_path, **options):
    return tiny.config(tmp_path, **{"method": "forward_kd", **options})


def told(n=24, seed=0):
    """Examples whose teacher reads the answer before the prompt."""
    return [{**e, "teacher_prompt": f"{e['completion']} w50 {e['prompt']}"} for e in tiny.examples(n, seed=seed)]


def trainer(tmp_path, student=None, teacher=None, examples=None, **options):
    return OKDTrainer(
        tiny.llama() if student is None else student,
        teacher,
        config(tmp_path, **options),
        train_dataset=told() if examples is None else examples,
        eval_dataset=told(8, seed=9),
        processing_class=tiny.tokenizer(),
    )


def adapted(seed=0):
    model = get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def move(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


class Weights(TrainerCallback):
    """The student's weights that train, after each step."""

    def __init__(self, student):
        self.student, self.steps = student, []

    def on_step_end(self, *_, **__):
        weights = {n: p.detach().clone() for n, p in self.student.named_parameters() if p.requires_grad}
        self.steps.append(weights)


# --- the average ---


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_the_average_follows_its_recurrence(decay):
    """w <- d w + (1 - d) w_student, after each update."""
    student = tiny.llama().double()
    student.register_buffer("seen", torch.zeros(()))
    average = Averaged(student, decay)
    expected = {n: p.detach().clone() for n, p in student.named_parameters()}
    for step in range(4):
        move(student, step)
        student.seen += 1
        average.after_update(student)
        for name, p in student.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    for name, p in average.model.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-12, atol=1e-14, msg=name)
        assert not p.requires_grad
    assert average.model.seen == 4, "buffers are the student's"
    assert average.model.lm_head.weight is average.model.model.embed_tokens.weight, "tied, as the student's"
    assert average.model.lm_head.weight is not student.lm_head.weight


def test_it_starts_as_the_student_and_has_no_dropout(tmp_path):
    student = tiny.llama(attention_dropout=0.5)
    run = trainer(tmp_path, student, self_teacher="average")
    batch = Collator(tiny.EOS)(encode(tiny.examples(4), tiny.tokenizer(), max_length=32).rows)
    run.pair.train()
    assert student.training and not run.teacher.training and not run.pair.teacher.model.model.training
    with torch.no_grad():
        assert run.pair(batch).student > 1e-4, "the student drops, its average does not"
        student.eval()
        assert run.pair(batch).student == pytest.approx(0, abs=1e-7)


def test_through_the_trainer_it_averages_once_a_step(tmp_path):
    options = {"self_teacher": "average", "average_decay": 0.9, "gradient_accumulation_steps": 2, "warmup_steps": 0}
    run = trainer(tmp_path, **options, student_ce_weight=1.0, max_steps=3)
    start = {n: p.detach().clone() for n, p in run.pair.student.named_parameters()}
    recorder = Weights(run.pair.student)
    run.add_callback(recorder)
    run.train()
    expected = start
    for weights in recorder.steps:
        expected = {n: torch.lerp(expected[n], w, 1 - 0.9) for n, w in weights.items()}
    assert len(recorder.steps) == 3
    for name, p in run.teacher.named_parameters():
        assert torch.equal(p, expected[name]) and not torch.equal(p, start[name]), name
    assert not set(map(id, run.teacher.parameters())) & {id(p) for g in run.optimizer.param_groups for p in g["params"]}


def test_what_does_not_train_exists_once():
    """The base of a LoRA student is its average's too: the average costs as much as the adapter."""
    student = adapted()
    average = Averaged(student, 0.5)
    ours, theirs = dict(average.model.named_parameters()), dict(student.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, p in theirs.items():
        assert (ours[name] is p) == ("lora_" not in name), name
    start = {n: p.detach().clone() for n, p in theirs.items()}
    move(student, 0)
    average.after_update(student)
    for name, p in ours.items():
        torch.testing.assert_close(p, (start[name] + theirs[name]) / 2 if "lora_" in name else start[name])
        assert not p.requires_grad


@pytest.mark.parametrize("make", [tiny.llama, adapted], ids=["whole", "LoRA"])
def test_it_is_saved_and_resumed_bit_for_bit(make, tmp_path):
    options = {"self_teacher": "average", "average_decay": 0.8, "student_ce_weight": 1.0, "max_steps": 6}
    whole = trainer(tmp_path / "whole", make(), **options)
    whole.train()
    trainer(tmp_path / "parts", make(), save_strategy="steps", save_steps=3, **options).train()
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    saved = load_file(next((checkpoint / "teacher_average").glob("*.safetensors")))
    assert saved and not [p for p in (checkpoint / "teacher_average").rglob("*") if p.suffix in (".bin", ".pt")]
    again = trainer(tmp_path / "parts", make(), **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    tiny.assert_same_weights(again.pair.student, whole.pair.student)
    tiny.assert_same_weights(again.teacher, whole.teacher)
    student = dict(whole.pair.student.named_parameters())
    assert any(not torch.equal(p, student[n]) for n, p in whole.teacher.named_parameters())
    if make is tiny.llama:  # plain transformers loads it
        whole.save_model(str(tmp_path / "out"))
        tiny.assert_same_weights(
            AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "teacher_average"), whole.teacher
        )


# --- itself, on other prompts ---


def itself_pair(student, **options):
    args = OKDConfig(method="forward_kd", self_teacher="student", use_cpu=True, **options)
    return StudentTeacher(student, Itself(student), args).double()


@pytest.mark.parametrize("make", [lambda: tiny.llama(attention_dropout=0.5), adapted], ids=["whole", "LoRA"])
def test_it_reads_what_the_rows_tell_their_teacher(make):
    """Row by row: its logits are the student's own after the longer prompt; in the loss they are held still."""
    student = make()
    pair = itself_pair(student, temperature=1.5, student_ce_weight=0.4)
    rows = encode(told(3), tiny.tokenizer(), max_length=32).rows
    batch = Collator(tiny.EOS)(rows)
    pair.train()
    teacher = pair.teacher_head().logits(pair.teacher_rows(batch))
    assert not teacher.requires_grad and student.training
    assert not list(pair.teacher.parameters()), "its weights are the student's"
    pair.eval()  # the student's dropout, which is not the matter
    loss = pair(batch)
    z, u = [], []
    for row in rows:
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        response = row["input_ids"][start:]
        assert len(row["teacher_prompt"]) > start
        z.append(student(torch.tensor([row["input_ids"]])).logits[0, start - 1 : -1])
        longer = torch.tensor([[*row["teacher_prompt"], *response]])
        u.append(student(longer).logits[0, len(row["teacher_prompt"]) - 1 : -1].detach())
    z, u = torch.cat(z), torch.cat(u)
    torch.testing.assert_close(teacher, u, rtol=1e-9, atol=1e-10)
    log_q, log_p = (z / 1.5).log_softmax(-1), (u / 1.5).log_softmax(-1)
    distance = 1.5**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    expected = (distance + 0.4 * nn.functional.cross_entropy(z, batch["targets"], reduction="none")).mean()
    assert loss.student.item() == pytest.approx(expected.item(), rel=1e-9) and loss.teacher is None
    parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}
    truth = torch.autograd.grad(expected, parameters.values())
    ours = torch.autograd.grad(loss.total, parameters.values())
    for name, one, other in zip(parameters, ours, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10, msg=name)


def test_rows_that_tell_their_teacher_nothing_are_refused(tmp_path):
    examples = told(6)
    del examples[1]["teacher_prompt"], examples[4]["teacher_prompt"]
    with pytest.raises(ValueError, match=r"teacher_prompt in every example .* got 2 without \(example-1, example-4\)"):
        trainer(tmp_path, examples=examples, self_teacher="student")
    assert isinstance(trainer(tmp_path, examples=examples, self_teacher="average").pair.teacher, Averaged)


@pytest.mark.parametrize(
    "options", [{"method": "forward_kd"}, {"method": "gkd", "student_share": 1.0, "max_new_tokens": 8}], ids=str
)
def test_it_teaches_what_the_prompt_tells(options, tmp_path):
    """Towards the labels if the student first learns to copy; here: towards its own words after the longer prompt."""
    run = trainer(tmp_path, self_teacher="student", max_steps=20, **options)
    before = copy.deepcopy(run.pair.student)
    run.train()
    entries = [e for e in run.state.log_history if "student_loss" in e]
    mean = [sum(e["student_loss"] for e in part) / 4 for part in (entries[:4], entries[-4:])]
    assert 0 < mean[1] < 0.8 * mean[0]
    assert all("base_forward_kl" not in e for e in entries), "nothing is left of what it was"
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), run.pair.student.parameters(), strict=True))
    run.save_model(str(tmp_path / "out"))
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == {"student"}


# --- both ---


@pytest.mark.parametrize("kind", ["average", "student"])
def test_evaluation_has_nobody_to_measure_against(kind, tmp_path):
    run = trainer(tmp_path, self_teacher=kind)
    found = run.evaluate()
    batch = Collator(tiny.EOS)(encode(told(8, seed=9), tiny.tokenizer(), max_length=32).rows)
    with torch.no_grad():
        z = run.pair.student(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)[batch["positions"]]
    nll = nn.functional.cross_entropy(z, batch["targets"])
    assert {name for name in found if name.startswith("eval_")} == {"eval_perplexity", "eval_tokens", "eval_loss"}
    assert found["eval_loss"] == pytest.approx(nll.item(), rel=1e-4)
    assert found["eval_perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["average", "student"])
def test_a_self_teacher_stands_alone_and_still(kind, tmp_path):
    with pytest.raises(ValueError, match=f"expected no teacher beside self_teacher={kind}; got both"):
        trainer(tmp_path, teacher=tiny.llama(seed=1), self_teacher=kind)
    for online in ({"method": "okd"}, {"method": "clda"}, {"method": "forward_kd", "online_teacher": True}):
        with pytest.raises(ValueError, match=r"a teacher of its own for method .*, whose teacher learns; got a self"):
            trainer(tmp_path, self_teacher=kind, **online)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"self_teacher": "average", "method": "sft"}, "options that method sft reads; got self_teacher='average'"),
        ({"self_teacher": "average", "method": "routed"}, "options that method routed reads; got self_teacher"),
        ({"self_teacher": "mean"}, "expected self_teacher to be one of average, student; got 'mean'"),
        ({"self_teacher": "average", "average_decay": 1.1}, "average_decay to be at least 0 and at most 1; got 1.1"),
    ],
)
def test_config_errors(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_without_teacher_or_self_teacher(tmp_path):
    with pytest.raises(ValueError, match="expected a teacher for method forward_kd; got None: pass one, or self_teach"):
        trainer(tmp_path)
    with pytest.raises(ValueError, match=r"expected two models, .* got one as student and teacher: pass teacher=None"):
        trainer(tmp_path, student := tiny.llama(), teacher=student)


def test_a_teacher_that_reads_while_it_writes_takes_no_prompt_of_its_own(tmp_path):
    with pytest.raises(ValueError, match="no teacher_prompt with method skd, whose teacher reads the student's prompt"):
        trainer(tmp_path, self_teacher="student", method="skd")
