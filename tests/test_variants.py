"""What is tried beside the presets, against definitions of whole logits in fp64, and for what each claims."""

import copy

import pytest
import tiny
import torch
from torch import nn
from transformers import TrainerCallback

from benchmarks.variants import VARIANTS
from okd import OKDConfig, OKDTrainer, checkpoints, leash
from okd.data import Collator
from okd.encoding import encode
from okd.leash import EVERY
from okd.online import Online, attach_online_module
from okd.pair import StudentTeacher
from okd.teachers import as_it_was

A = 0.3


def batch(n=4):
    return Collator(tiny.EOS)(encode(tiny.examples(n), tiny.tokenizer(), max_length=32).rows)


def pair(name, **options):
    """fp64, with an online module that has moved."""
    args = OKDConfig(method=VARIANTS.get(name, name), use_cpu=True, teacher_kl_weight=A, **options)
    teacher = attach_online_module(tiny.llama(seed=1, layers=3, hidden=48), args)
    for parameter_name, parameter in teacher.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.2)
    both = StudentTeacher(tiny.llama(), Online(teacher), args).double().train()
    both.at(0, 100)
    return both


def log_probabilities(both, inputs):
    """(N, V) of student, online teacher, and the teacher's base."""

    def of(model):
        z = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
        return z.flatten(0, 1)[inputs["positions"]].log_softmax(-1)

    with torch.no_grad(), as_it_was(both.teacher) as base:
        log_base = of(base)
    return of(both.student), of(both.teacher.model), log_base


def kl(a, b):
    return (a.exp() * (a - b)).sum(-1)


def nll(log_p, inputs):
    return nn.functional.nll_loss(log_p, inputs["targets"], reduction="none")


def assert_is(both, inputs, student, teacher):
    """Values of both sides, and the gradient of every parameter that trains."""
    loss = both(inputs)
    assert loss.student.item() == pytest.approx(student.item(), rel=1e-6)
    assert loss.teacher.item() == pytest.approx(teacher.item(), rel=1e-6)
    parameters = {n: p for n, p in both.named_parameters() if p.requires_grad}
    found, truth = (torch.autograd.grad(x, parameters.values()) for x in (loss.total, student + teacher))
    assert any("lora" in name for name in parameters)
    for name, ours, expected in zip(parameters, found, truth, strict=True):
        assert (ours - expected).norm() <= 2e-6 * expected.norm(), name
    for values in loss.metrics.values():
        assert values.shape == inputs["targets"].shape and not values.requires_grad


# --- the definitions ---


@pytest.mark.parametrize("value", [A, 0.05])
def test_trust_is_okd_with_an_a_of_its_own(value):
    both, inputs = pair("okd_trust_0.05"), batch()
    assert both.loss.state == {"value": A}, "it starts at teacher_kl_weight"
    both.loss.state["value"] = value
    log_q, log_p, _ = log_probabilities(both, inputs)
    teacher = value * kl(log_q.detach(), log_p) + (1 - value) * nll(log_p, inputs)
    assert_is(both, inputs, kl(log_p.detach(), log_q).mean(), teacher.mean())


@pytest.mark.parametrize("value", [1.0, 4.0])
def test_leash_adds_the_way_from_the_base(value):
    both, inputs = pair("okd_leash", temperature=2.0), batch()
    both.loss.state["value"] = value
    log_q, log_p, log_base = log_probabilities(both, inputs)
    soft_q, soft_p = ((x / 2).log_softmax(-1) for x in (log_q, log_p))  # the penalty is at temperature 1
    pull = 4 * kl(soft_q.detach(), soft_p)
    teacher = A * pull + (1 - A) * nll(log_p, inputs) + value * kl(log_base, log_p)
    assert_is(both, inputs, 4 * kl(soft_p.detach(), soft_q).mean(), teacher.mean())


@pytest.mark.parametrize("name", ["okd_unc", "okd_lost"])
def test_the_pull_is_weighted_by_difficulty(name):
    both, inputs = pair(name), batch()
    log_q, log_p, _ = log_probabilities(both, inputs)
    judge = log_p if name == "okd_unc" else log_q
    inputs["targets"][::2] = judge[::2].argmax(-1)  # tokens that are easy
    weights = 1 - nll(judge, inputs).neg().exp().detach()
    assert weights.min() < 0.9 < 0.98 < weights.max()
    teacher = A * weights * kl(log_q.detach(), log_p) + (1 - A) * nll(log_p, inputs)
    assert_is(both, inputs, kl(log_p.detach(), log_q).mean(), teacher.mean())


@pytest.mark.parametrize("name", [*VARIANTS, "okd_leash"])
def test_a_teacher_that_rests_is_frozen(name):
    """Where `online_every` lets it, the variants are forward KD, and measure nothing."""
    both, inputs = pair(name, online_every=3), batch()
    both.at(EVERY, 100)
    log_q, log_p, _ = log_probabilities(both, inputs)
    loss = both(inputs)
    assert loss.teacher is None and not getattr(both.loss, "shifts", None)
    assert loss.student.item() == pytest.approx(kl(log_p, log_q).mean().item(), rel=1e-6)


# --- the controllers ---


@pytest.mark.parametrize(
    "name, above, below, limits",
    [("okd_trust_0.2", 0.8, 1.25, (0.01, 0.9)), ("okd_leash", 2.0, 0.5, (1 / 64, 64.0))],
)
def test_the_controller_moves_its_number_towards_the_budget(name, above, below, limits, tmp_path, monkeypatch):
    """At every 8th step by that step's shift, over its micro-batches; half-way it goes through a checkpoint."""
    both, inputs = pair(name), [batch(3), batch(2)]
    shifts = []
    for one in inputs:
        _, log_p, log_base = log_probabilities(both, one)
        shifts.append(kl(log_base, log_p).mean().item())
    value = both.loss.state["value"]
    for step in range(2 * EVERY + 1):
        shift = sum(shifts) / 2
        monkeypatch.setattr(both.loss, "leash", shift / 2 if step < EVERY else 2 * shift)
        both.at(step, 100)
        for one in inputs:
            both(one)
        both.eval()
        both(inputs[0])  # an evaluation is no step
        both.train()
        assert both.loss.shifts == pytest.approx(shifts if step % EVERY == 0 else [], rel=1e-6)
        both.after_update(1.0)
        if step % EVERY == 0:
            value *= above if step < EVERY else below
        assert both.loss.state["value"] == pytest.approx(value)
        if step == EVERY:
            checkpoints.save(both, tmp_path)
            both.loss.state["value"] = 0.7
            checkpoints.load(both, tmp_path)
    for budget, limit in ((1e9, limits[0] if below < 1 else limits[1]), (1e-9, limits[1] if below < 1 else limits[0])):
        monkeypatch.setattr(both.loss, "leash", budget)
        for _ in range(50):
            both.at(0, 100)
            both.loss.shifts = [torch.tensor(0.1)]
            both.after_update(1.0)
        assert both.loss.state["value"] == limit


def test_near_its_budget_the_leash_stays():
    both = pair("okd_leash", teacher_leash=0.2)
    for shift in (0.14, 0.2, 0.29):
        both.loss.shifts = [torch.tensor(shift)]
        both.after_update(1.0)
        assert both.loss.state["value"] == 1.0
    trust = pair("okd_trust_0.2")
    trust.loss.shifts = [torch.tensor(0.22)]
    trust.after_update(1.0)
    assert trust.loss.state["value"] == pytest.approx(A / 1.1)


# --- through the trainer ---


def trainer(folder, name, callbacks=None, teacher=None, **options):
    args = tiny.config(folder, method=VARIANTS.get(name, name), **{"warmup_steps": 0, **options})
    return OKDTrainer(
        tiny.llama(),
        teacher or tiny.llama(seed=1, layers=3, hidden=48),
        args,
        train_dataset=tiny.examples(),
        processing_class=tiny.tokenizer(),
        callbacks=callbacks,
    )


@pytest.mark.slow
def test_the_shift_is_held(tmp_path, monkeypatch):
    """Of a teacher that was tuned on the responses; without a controller it follows the student far from its base."""
    monkeypatch.setattr(leash, "EVERY", 1)
    teacher = tiny.llama(seed=1, layers=3, hidden=48)
    OKDTrainer(
        teacher,
        None,
        tiny.config(tmp_path, method="sft", max_steps=60),
        tiny.examples(),
        processing_class=tiny.tokenizer(),
    ).train()
    ends = {}
    for name in ("okd", "okd_trust_0.05", "okd_leash"):
        given = copy.deepcopy(teacher)
        run = trainer(tmp_path, name, teacher=given, teacher_kl_weight=0.9, max_steps=60, online_rank=4)
        run.train()
        shifts = [entry["teacher_shift"] for entry in run.state.log_history if "teacher_shift" in entry]
        ends[name] = sum(shifts[-20:]) / 20
    assert ends["okd"] > 0.2
    assert 0.005 < ends["okd_trust_0.05"] < 0.1 and 0.005 < ends["okd_leash"] < 0.1


@pytest.mark.parametrize("name", [*VARIANTS, "okd_leash"])
def test_every_variant_resumes_bit_for_bit(name, tmp_path, monkeypatch):
    monkeypatch.setattr(leash, "EVERY", 2)
    whole = trainer(tmp_path / "whole", name, max_steps=6)
    whole.train()
    trainer(tmp_path / "parts", name, max_steps=6, save_strategy="steps", save_steps=3).train()
    again = trainer(tmp_path / "parts", name, max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    tiny.assert_same_weights(again.pair, whole.pair)
    assert getattr(again.pair.loss, "state", None) == getattr(whole.pair.loss, "state", None)


class Slower(TrainerCallback):
    """The module's learning rate before each step: the schedule's, times what is left until `stop`."""

    def __init__(self, stop):
        self.stop, self.weights = stop, []

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        group = optimizer.param_groups[-1]
        group["lr"] *= max(0.0, 1 - state.global_step / state.max_steps / self.stop)

    def on_step_end(self, args, state, control, model=None, **_):
        self.weights.append(copy.deepcopy([p for n, p in model.named_parameters() if "lora_A" in n]))


@pytest.mark.parametrize("stop", [1.0, 0.5])
def test_decay_is_a_learning_rate_that_falls_faster(stop, tmp_path):
    """AdamW itself, with that rate in the module's group; two micro-batches a step."""
    options = {"max_steps": 6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "online_stop": stop}
    slower = Slower(stop)
    expected = trainer(tmp_path, "okd", [slower], **options)
    expected.train()
    run, plain = trainer(tmp_path, "okd_decay", **options), trainer(tmp_path, "okd", **options)
    run.train()
    plain.train()
    moved = 0.0
    for (name, ours), (_, truth), (_, other) in zip(
        *(x.pair.named_parameters() for x in (run, expected, plain)), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=2e-5, msg=name)
        moved += (other - truth).norm().item() if "lora" in name else 0
    assert moved > 0.01, "or the test would show nothing"
    after, end = slower.weights[int(6 * stop) - 1], slower.weights[-1]
    assert all(torch.equal(a, b) for a, b in zip(after, end, strict=True))
