"""The loss of several teachers against plain PyTorch in fp64: the gate, the policy and its REINFORCE gradient."""

import itertools
import math

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from okd import OKDConfig, OKDTrainer
from okd.data import Collator, encode
from okd.pair import StudentTeacher
from okd.selection import SELECTIONS
from okd.teachers import Ensemble

METHODS = ("gated_ensemble", "rl_multi_teacher")
INPUTS = ("input_ids", "attention_mask", "positions", "targets")


def config(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 1e-2,
    }
    return OKDConfig(**{**defaults, **options})


def make_teachers(k=2):
    return [tiny.llama(seed=1, layers=3, hidden=48), tiny.llama(seed=2), tiny.llama(seed=5, hidden=64)][:k]


def make_pair(tmp_path, method, k=2, **options):
    """In fp64, with a selection that prefers something."""
    args = config(tmp_path, method=method, **options)
    pair = StudentTeacher(tiny.llama(), Ensemble(make_teachers(k)), args).double()
    torch.manual_seed(0)
    for parameter in pair.selection.parameters():
        nn.init.normal_(parameter, std=0.7)
    pair.progress = 0.9
    return pair.train()


def make_batch(n=3):
    return Collator(tiny.EOS)(encode(tiny.examples(n), tiny.tokenizer(), max_length=32).rows)


def oracle(pair, batch, temperature=1.0):
    """Whole logits: (log q, log p of each teacher) at the temperature, -log q(y), targets, and each token's example."""
    feed = {k: batch[k] for k in ("input_ids", "attention_mask")}
    mask = batch["labels"][:, 1:] != -100
    targets = batch["labels"][:, 1:][mask]
    example = mask.nonzero()[:, 0]
    z, *u = (model(**feed).logits[:, :-1][mask] for model in [pair.student, *pair.teacher.models])
    nll = nn.functional.cross_entropy(z, targets, reduction="none")
    return (z / temperature).log_softmax(-1), [(x / temperature).log_softmax(-1) for x in u], u, nll, targets, example


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def per_example(values, example):
    return torch.stack([values[example == b].mean(0) for b in example.unique()])


def hidden_means(model, batch, example):
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    rows = model.model(**inputs).last_hidden_state.flatten(0, 1)[batch["positions"]]
    return nn.functional.normalize(per_example(rows, example), dim=1)


def gradients(pair):
    return {n: p.grad.clone() for n, p in pair.named_parameters() if p.grad is not None}


# --- the gate ---


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_gate_is_its_definition(divergence, tmp_path):
    """Value and gradients of student and gate: sum_i a_i T^2 D(p_i, q) + c CE at T = 1.5."""
    c, t = 0.7, 1.5
    pair = make_pair(tmp_path, "gated_ensemble", 3, student_divergence=divergence, student_ce_weight=c, temperature=t)
    batch = make_batch()
    loss = pair(**{k: batch[k] for k in INPUTS}, normalizer=20.0)
    loss.total.backward()
    ours = gradients(pair)
    assert not [n for n in ours if n.startswith("teacher.")]
    pair.zero_grad()

    log_q, log_p, u, nll, targets, example = oracle(pair, batch, t)
    scores = []
    for i, model in enumerate(pair.teacher.models):
        entropy = per_example(-(log_p[i].exp() * log_p[i]).sum(-1), example)
        teacher_nll = per_example(nn.functional.cross_entropy(u[i], targets, reduction="none"), example)
        nats = torch.stack([entropy, teacher_nll], 1).log1p()
        state = torch.cat([hidden_means(model, batch, example), nats], 1).detach()
        scores.append(state @ pair.selection.weights[i] + pair.selection.bias[i])
    a = torch.stack(scores, 1).softmax(1)
    assert a.std(0).min() > 0.01 and a.std(1).min() > 0.05, "weights that differ, or the test would show nothing"

    def jsd(p, q):
        m = (0.5 * p.exp() + 0.5 * q.exp()).log()
        return 0.5 * kl(p, m) + 0.5 * kl(q, m)

    distance = {"forward_kl": kl, "jsd": jsd}[divergence]
    d = torch.stack([t**2 * distance(p.detach(), log_q) for p in log_p], 1)
    expected = ((a[example] * d).sum(1) + c * nll).sum() / 20
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-9)
    truth = gradients(pair)
    assert ours.keys() == truth.keys() and sum(n.startswith("selection.") for n in truth) == 4
    for name, gradient in truth.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-7, atol=1e-10, msg=name)
    for i in range(3):
        torch.testing.assert_close(loss.metrics[f"teacher_{i + 1}_weight"], a[example, i].detach())
    torch.testing.assert_close(loss.metrics["distillation_loss"], (a[example] * d).sum(1).detach())


def test_gate_starts_as_the_plain_mean(tmp_path):
    pair = StudentTeacher(tiny.llama(), Ensemble(make_teachers(3)), config(tmp_path, method="gated_ensemble"))
    metrics = pair(**{k: make_batch()[k] for k in INPUTS}).metrics
    assert all(metrics[f"teacher_{i}_weight"].eq(1 / 3).all() for i in (1, 2, 3))


# --- the policy ---


def policy_of_definition(pair, batch):
    """(probability (B, K) with a graph, -CE_s (B,), -KL of each teacher (B, K), per-token KLs (N, K), nll, example)."""
    log_q, log_p, u, nll, targets, example = oracle(pair, batch)
    kls = torch.stack([kl(p.detach(), log_q) for p in log_p], 1)
    encoding, scores = hidden_means(pair.student, batch, example).detach(), []
    for i, p in enumerate(log_p):
        agreement = (p.argmax(-1) == log_q.argmax(-1)).double()
        ce = nn.functional.cross_entropy(u[i], targets, reduction="none")
        statistics = torch.stack([-(p.exp() * p).sum(-1), kls[:, i], agreement, ce], 1)
        state = torch.cat([encoding, per_example(statistics, example).log1p()], 1).detach()
        scores.append(state @ pair.selection.weights[i] + pair.selection.bias[i])
    probability = torch.stack(scores, 1).sigmoid()
    return probability, -per_example(nll, example).detach(), -per_example(kls, example).detach(), kls, nll, example


def force(monkeypatch, drawn):
    monkeypatch.setattr(torch, "bernoulli", lambda probability: drawn.to(probability))


def test_policy_gradient_is_that_of_the_expected_reward(tmp_path, monkeypatch):
    """Enumerating all 2^K selections of one example, none included, whatever the baseline."""
    pair = make_pair(tmp_path, "rl_multi_teacher", 3)
    batch = make_batch(1)
    inputs = {k: batch[k] for k in INPUTS}
    probability, ce, kls, *_ = policy_of_definition(pair, batch)
    best = probability[0].argmax()
    expected_reward, average = 0.0, {}
    for bits in itertools.product((0.0, 1.0), repeat=3):
        drawn = torch.tensor([bits], dtype=torch.float64)
        chance = torch.where(drawn == 1, probability, 1 - probability).prod()
        taught = drawn[0] if sum(bits) else nn.functional.one_hot(best, 3).double()
        reward = ce[0] + (taught * kls[0]).sum() / taught.sum()
        expected_reward = expected_reward + chance * reward

        force(monkeypatch, drawn)
        pair.selection.baseline.fill_(-3.3)
        pair.zero_grad()
        loss = pair(**inputs)
        loss.total.backward()
        for name, gradient in gradients(pair.selection).items():
            average[name] = average.get(name, 0) + chance.detach() * gradient
        torch.testing.assert_close(loss.metrics["reward"], reward.detach().expand(len(batch["targets"])))
    truth = torch.autograd.grad(-expected_reward, list(pair.selection.parameters()))
    for (name, _), gradient in zip(pair.selection.named_parameters(), truth, strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(average[name], gradient, rtol=1e-7, atol=1e-10, msg=name)


def test_student_learns_from_the_mean_of_the_selected(tmp_path, monkeypatch):
    """The first example from teachers 1 and 3, the second from none: the most probable, the third from teacher 2."""
    pair = make_pair(tmp_path, "rl_multi_teacher", 3, student_ce_weight=0.4)
    batch = make_batch()
    force(monkeypatch, torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]]))
    loss = pair(**{k: batch[k] for k in INPUTS})
    loss.total.backward()
    ours = gradients(pair.student)
    pair.zero_grad()
    probability, _, _, kls, nll, example = policy_of_definition(pair, batch)
    weights = torch.stack(
        [torch.tensor([0.5, 0, 0.5]), nn.functional.one_hot(probability[1].argmax(), 3), torch.tensor([0, 1, 0])]
    )
    expected = ((weights[example] * kls).sum(1) + 0.4 * nll).mean()
    expected.backward()
    assert loss.student.item() == pytest.approx(expected.item(), rel=1e-9), "the policy's loss is no part of the value"
    for name, gradient in gradients(pair.student).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-7, atol=1e-10, msg=name)
    selected = torch.stack([loss.metrics[f"teacher_{i}_selected"] for i in (1, 2, 3)], 1)
    assert torch.equal(selected, (weights[example] > 0).double())


def test_each_example_counts_by_its_tokens(tmp_path, monkeypatch):
    """So that micro-batches add up: their losses over the tokens of all of them are the loss of the whole batch."""
    pair = make_pair(tmp_path, "rl_multi_teacher", 2)
    rows = encode(tiny.examples(4), tiny.tokenizer(), max_length=32).rows
    drawn = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    found = []
    for size in (4, 2):
        pair.zero_grad()
        for start in range(0, 4, size):
            batch = Collator(tiny.EOS)(rows[start : start + size])
            force(monkeypatch, drawn[start : start + size])
            pair.selection.baseline.zero_()
            pair(**{k: batch[k] for k in INPUTS}, normalizer=30.0).total.backward()
        found.append(gradients(pair))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-7, atol=1e-10, msg=name)


def test_warm_up_averages_all_teachers_and_the_baseline_is_a_running_mean(tmp_path):
    pair = make_pair(tmp_path, "rl_multi_teacher", 3, selection_warmup=0.5)
    pair.progress = 0.49
    rewards = []
    for n in (2, 3, 4):
        batch = make_batch(n)
        loss = pair(**{k: batch[k] for k in INPUTS})
        loss.total.backward()
        assert all(loss.metrics[f"teacher_{i}_weight"].eq(1 / 3).all() for i in (1, 2, 3))
        _, _, example = oracle(pair, batch)[3:]
        rewards.append(per_example(loss.metrics["reward"], example).mean())
    assert not gradients(pair.selection)
    torch.testing.assert_close(pair.selection.baseline, torch.stack(rewards).mean())
    pair.progress = 0.5
    pair(**{k: batch[k] for k in INPUTS}).total.backward()
    assert len(gradients(pair.selection)) == 4
    before = pair.selection.baseline.clone()
    pair.eval()
    with torch.no_grad():
        pair(**{k: batch[k] for k in INPUTS})
    assert torch.equal(pair.selection.baseline, before), "evaluation is no experience"


def test_out_of_training_the_policy_draws_nothing(tmp_path, monkeypatch):
    pair = make_pair(tmp_path, "rl_multi_teacher", 3).eval()
    batch = make_batch()
    monkeypatch.setattr(torch, "bernoulli", None)
    with torch.no_grad():
        metrics = pair(**{k: batch[k] for k in INPUTS}).metrics
    probability, *_, example = policy_of_definition(pair, batch)
    expected = (probability >= 0.5).double()
    nobody = expected.sum(1) == 0
    expected[nobody, probability[nobody].argmax(1)] = 1
    found = torch.stack([metrics[f"teacher_{i}_selected"] for i in (1, 2, 3)], 1)
    assert torch.equal(found, expected[example])


# --- through the trainer ---


def taught(model, steps):
    """The model after steps of cross-entropy on the rule behind `tiny.examples`, and its last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = make_batch(48)
    for _ in range(steps):
        loss = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), loss.item()


def trainer(tmp_path, teachers, student=None, **options):
    return OKDTrainer(
        student or tiny.llama(),
        teachers,
        config(tmp_path, **options),
        train_dataset=tiny.examples(),
        eval_dataset=tiny.examples(8, seed=9),
        processing_class=tiny.tokenizer(),
    )


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(method, tmp_path):
    skilled, _ = taught(tiny.llama(seed=1, layers=3, hidden=48), 40)
    run = trainer(tmp_path, [skilled, tiny.llama(seed=2)], method=method, max_steps=60)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_perplexity"] < 0.2 * before["eval_perplexity"]
    entries = [e for e in run.state.log_history if "student_loss" in e]
    assert entries[0]["teacher_1_weight"] == 0.5
    for entry in entries:
        assert entry["teacher_1_weight"] + entry["teacher_2_weight"] == pytest.approx(1)
    if method == "rl_multi_teacher":
        assert [e["teacher_2_selected"] for e in entries[:6]] == [1] * 6, "the warm-up: a tenth of 60 steps"
        assert any(0 < e["teacher_2_selected"] < 1 for e in entries[6:])
    assert math.isfinite(entries[-1]["base_forward_kl"])


def test_the_gate_finds_the_skilled_teacher(tmp_path):
    """One teacher knows the task, the other has random weights; the student can speak, if not so well."""
    skilled, loss = taught(tiny.llama(seed=1, layers=3, hidden=48), 40)
    assert loss < 0.4
    student, loss = taught(tiny.llama(), 8)
    assert loss > 1.2
    teachers = [tiny.llama(seed=2), skilled]
    run = trainer(tmp_path, teachers, student, method="gated_ensemble", max_steps=20, selection_learning_rate=0.05)
    run.train()
    entries = [e for e in run.state.log_history if "student_loss" in e]
    assert entries[0]["teacher_2_weight"] == 0.5 and entries[-1]["teacher_2_weight"] > 0.9


def test_the_policy_finds_the_teacher_of_the_highest_reward(tmp_path):
    """With a student that stays, the reward is a fixed function of the choice."""
    teachers = [tiny.llama(seed=2), taught(tiny.llama(seed=1, layers=3, hidden=48), 40)[0]]
    student, _ = taught(tiny.llama(), 12)
    run = trainer(
        tmp_path,
        teachers,
        student,
        method="rl_multi_teacher",
        learning_rate=0.0,
        max_steps=100,
        logging_steps=5,
        selection_learning_rate=0.1,
    )
    run.train()
    entries = [e for e in run.state.log_history if "student_loss" in e]
    first, last = (
        {n: sum(e[n] for e in part) / len(part) for n in ("reward", "teacher_1_selected", "teacher_2_weight")}
        for part in (entries[:3], entries[-4:])
    )
    assert first["teacher_1_selected"] == 1 and last["teacher_1_selected"] < 0.2
    assert last["teacher_2_weight"] > 0.85
    assert last["reward"] > first["reward"] + 0.1


def test_eval_loss_is_the_methods_distillation_loss(tmp_path):
    run = trainer(tmp_path, make_teachers(), method="gated_ensemble", per_device_eval_batch_size=3)
    nn.init.normal_(run.pair.selection.bias)
    found = run.evaluate()["eval_loss"]
    batch = Collator(tiny.EOS)(encode(tiny.examples(8, seed=9), tiny.tokenizer(), max_length=32).rows)
    log_q, log_p, *_ = oracle(run.pair, batch)
    a = run.pair.selection.bias.softmax(0)
    expected = sum(a[i] * kl(p, log_q).mean() for i, p in enumerate(log_p))
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_resume_equals_not_stopping(method, tmp_path):
    """Student, selection, baseline, optimizer and the policy's draws: bit for bit."""
    whole = trainer(tmp_path / "whole", make_teachers(), method=method, max_steps=6)
    whole.train()
    trainer(
        tmp_path / "parts", make_teachers(), method=method, max_steps=6, save_strategy="steps", save_steps=3
    ).train()
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    saved = load_file(checkpoint / "selection.safetensors")
    assert saved.keys() == whole.pair.selection.state_dict().keys()
    again = trainer(tmp_path / "parts", make_teachers(), method=method, max_steps=6)
    again.train(resume_from_checkpoint=str(checkpoint))
    expected = whole.pair.state_dict()
    for name, value in again.pair.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert any(not torch.equal(value, expected[f"selection.{name}"]) for name, value in saved.items())


@pytest.mark.parametrize("method", METHODS)
def test_autocast_does_not_round_what_a_selection_sees(method, tmp_path):
    pair = make_pair(tmp_path, method).float()
    batch = make_batch()
    plain, found = [], []
    forward = type(pair.selection).forward

    def watched(lesson, into):
        into += [
            lesson.encoding(lesson.student_rows),
            lesson.summary(0, "teacher_nll"),
            lesson.mean @ lesson.divergences,
        ]
        return forward(pair.selection, lesson)

    def run(into):
        pair.selection.forward = lambda lesson: watched(lesson, into)
        with torch.no_grad():
            pair(**{k: batch[k] for k in INPUTS})

    run(plain)
    with torch.autocast("cpu", torch.bfloat16):
        run(found)
    for x, y in zip(found, plain, strict=True):
        assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())
        torch.testing.assert_close(x, y, rtol=0.1, atol=0.1)  # the models themselves are rounded


def test_the_selection_has_its_own_learning_rate(tmp_path):
    run = trainer(tmp_path, make_teachers(), method="gated_ensemble", selection_learning_rate=0.03)
    groups = run.create_optimizer().param_groups
    selection = {id(p) for p in run.pair.selection.parameters()}
    assert [g["lr"] for g in groups] == [1e-2, 1e-2, 0.03]
    assert {id(p) for p in groups[2]["params"]} == selection


def test_every_selection_starts_indifferent():
    for kind in SELECTIONS.values():
        selection = kind(32, [48, 32], OKDConfig())
        assert all(p.eq(0).all() for p in selection.parameters())
