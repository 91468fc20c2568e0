"""The loss of several teachers against plain PyTorch in fp64: the gate, the policy and its REINFORCE steps."""

import copy
import functools
import itertools
import math

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from okd import OKDConfig, OKDTrainer, selection
from okd.data import Collator, uniform
from okd.encoding import encode
from okd.ensemble import Ensemble
from okd.objectives import Totals
from okd.pair import StudentTeacher
from okd.selection import Gate, Policy

METHODS = ("gated_ensemble", "rl_multi_teacher")
OF_TWENTY = Totals(tokens=20.0, own_rows=1, given_rows=1, text_tokens=1)


def make_teachers(k=2):
    return [tiny.llama(seed=1, layers=3, hidden=48), tiny.llama(seed=2), tiny.llama(seed=5, hidden=64)][:k]


def make_pair(tmp_path, method, k=2, **options):
    """In fp64, with a selection that prefers something."""
    args = tiny.config(tmp_path, method=method, **options)
    pair = StudentTeacher(tiny.llama(), Ensemble(make_teachers(k)), args).double()
    torch.manual_seed(0)
    for parameter in pair.selection.parameters():
        nn.init.normal_(parameter, std=0.7)
    pair.progress = 0.9
    return pair.train()


def encoded(n, seed=0):
    return encode(tiny.examples(n, seed=seed), tiny.tokenizer(), max_length=32).rows


def make_batch(n=3):
    return Collator(tiny.EOS)(encoded(n))


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
    loss = pair(batch, OF_TWENTY)
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
    pair = StudentTeacher(tiny.llama(), Ensemble(make_teachers(3)), tiny.config(tmp_path, method="gated_ensemble"))
    metrics = pair(make_batch()).metrics
    assert all(metrics[f"teacher_{i}_weight"].eq(1 / 3).all() for i in (1, 2, 3))


# --- the policy ---


def policy_of_definition(pair, batch):
    """(states of each teacher (B, D), -CE_s (B,), -KL of each teacher (B, K), per-token KLs (N, K), nll, example)."""
    log_q, log_p, u, nll, targets, example = oracle(pair, batch)
    kls = torch.stack([kl(p.detach(), log_q) for p in log_p], 1)
    encoding, states = hidden_means(pair.student, batch, example).detach(), []
    for i, p in enumerate(log_p):
        agreement = (p.argmax(-1) == log_q.argmax(-1)).double()
        ce = nn.functional.cross_entropy(u[i], targets, reduction="none")
        statistics = torch.stack([-(p.exp() * p).sum(-1), kls[:, i], agreement, ce], 1)
        states.append(torch.cat([encoding, per_example(statistics, example).log1p()], 1).detach())
    return states, -per_example(nll, example).detach(), -per_example(kls, example).detach(), kls, nll, example


def probabilities(pair, states):
    """(B, K)"""
    scores = [s @ w + b for s, w, b in zip(states, pair.selection.weights, pair.selection.bias, strict=True)]
    return torch.stack(scores, 1).sigmoid()


def force(monkeypatch, batch, drawn):
    """What is drawn for the examples of the batch: (B, K) of 0 and 1."""
    rows = {name: row for name, row in zip(batch["ids"], drawn, strict=True)}
    monkeypatch.setattr(selection, "uniform", lambda seed, step, name, k: 0.0 if rows[name][k] else 1.0)


def taught_by(drawn, probability):
    """(B, K) weights of the teachers that were selected, the most probable one where none was."""
    best = nn.functional.one_hot(probability.argmax(1), drawn.shape[1]).to(drawn)
    selected = torch.where(drawn.sum(1, keepdim=True) > 0, drawn, best)
    return selected / selected.sum(1, keepdim=True)


def move(student, seed, size=0.05):
    """An update by hand."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


ACTIONS = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 1]]).double()


@pytest.mark.parametrize("reward", ["ce", "ce_kd", "dev"])
def test_the_policy_ascends_the_delayed_reward(reward, tmp_path, monkeypatch):
    """Three steps of two micro-batches, the student updated by hand between the lesson and the reward; every number
    of the step from whole logits: rise of the reward, leave-one-out baseline, running moments, gradient."""
    options = {"selection_reward": reward, "selection_learning_rate": 0.3, "selection_warmup": 0.0}
    pair = make_pair(tmp_path, "rl_multi_teacher", 3, student_ce_weight=0.4, **options)
    held_out = Collator(tiny.EOS)(encoded(5, seed=9))
    pair.selection.held_out = lambda: held_out
    rows, moments = encoded(5), torch.zeros(3, dtype=torch.float64)
    batches = [Collator(tiny.EOS)(part) for part in (rows[:3], rows[3:])]
    whole = Collator(tiny.EOS)(rows)
    for step in range(3):
        pair.at(step, 10)
        actions = ACTIONS.roll(step, 0)
        force(monkeypatch, whole, actions)
        learning = [*pair.selection.weights, pair.selection.bias]
        old = [p.clone() for p in learning]
        parts = [policy_of_definition(pair, batch) for batch in batches]
        for batch in batches:
            pair(batch, OF_TWENTY).total.backward()
        assert all(p.grad is None for p in learning)
        states = [torch.cat([part[0][k] for part in parts]) for k in range(3)]
        probability = probabilities(pair, states).detach()
        weights = taught_by(actions, probability)

        move(pair.student, seed=step)
        found = pair.after_update(None)
        later = [policy_of_definition(pair, batch) for batch in batches]
        rewards = []
        for measured, shares in ((parts, torch.full_like(weights, 1 / 3)), (later, weights)):
            ce, kd = (torch.cat([part[i] for part in measured]) for i in (1, 2))
            rewards.append(ce if reward == "ce" else ce + (shares * kd).sum(1))
        rise = rewards[1] - rewards[0]
        accuracy = torch.zeros((), dtype=torch.float64)
        if reward == "dev":
            log_q, _, _, _, targets, _ = oracle(pair, held_out)
            rise, accuracy = rise / 2, (log_q.argmax(-1) == targets).double().mean() / 2
        others = torch.stack([torch.cat([rise[:i], rise[i + 1 :]]).mean() for i in range(5)])
        advantage = (rise - others + accuracy - moments[2]) / moments[1].sqrt()
        assert found == {"reward_rise": pytest.approx(rise.mean().item(), rel=1e-6)} and rise.std() > 1e-3

        gradient = [((advantage * (actions - probability)[:, k]) @ states[k]) / 5 for k in range(3)]
        gradient.append((advantage.unsqueeze(1) * (actions - probability)).mean(0))
        for parameter, before, by in zip(learning, old, gradient, strict=True):
            if step == 0:
                assert torch.equal(parameter, before), "there is nothing to compare with yet"
            else:
                torch.testing.assert_close(parameter, before + 0.3 * by, rtol=1e-6, atol=1e-9)
                assert by.abs().max() > 1e-3
        now = torch.stack([rise.mean(), rise.var(correction=0), accuracy])
        moments = moments + (now - moments) / (step + 1)
        torch.testing.assert_close(pair.selection.moments, moments, rtol=1e-6, atol=1e-9)


def test_a_step_of_one_example_is_compared_with_the_steps_before(tmp_path, monkeypatch):
    """It has no others: the mean rise of the steps before stands in for theirs, and its distance from that for theirs
    from one another. Their variance would be 0, and the policy would be thrown away by the first such step."""
    pair = make_pair(tmp_path, "rl_multi_teacher", 2, selection_learning_rate=0.3, selection_warmup=0.0)
    mean = variance = 0.0
    for step, row in enumerate(encoded(4)):
        pair.at(step, 10)
        batch = Collator(tiny.EOS)([row])
        force(monkeypatch, batch, [[1, 0]])
        states, *_ = policy_of_definition(pair, batch)
        probability, bias = probabilities(pair, states).detach(), pair.selection.bias.clone()
        pair(batch)
        move(pair.student, seed=step)
        rise = pair.after_update(None)["reward_rise"]
        advantage = (rise - mean) / variance**0.5 if step else 0.0
        by = 0.3 * advantage * (torch.tensor([1.0, 0.0]) - probability[0])
        torch.testing.assert_close(pair.selection.bias, bias + by, rtol=1e-6, atol=1e-9)
        assert by.abs().max() < 30
        variance += ((rise - mean) ** 2 - variance) / (step + 1)
        mean += (rise - mean) / (step + 1)
        assert pair.selection.moments[:2].tolist() == pytest.approx([mean, variance], rel=1e-6)


def test_the_moments_run_once_twenty_steps_are_seen(tmp_path):
    pair = make_pair(tmp_path, "rl_multi_teacher", selection_warmup=0.0)
    pair.selection.updates.fill_(40)
    pair.selection.moments.copy_(torch.tensor([1.0, 2.0, 3.0]))
    pair(make_batch())
    move(pair.student, seed=0)
    rise = pair.after_update(None)["reward_rise"]
    assert pair.selection.moments[0].item() == pytest.approx(0.95 * 1 + 0.05 * rise, rel=1e-6)
    assert pair.selection.moments[2].item() == pytest.approx(0.95 * 3, rel=1e-6)


def test_policy_gradient_is_that_of_the_expected_reward(tmp_path, monkeypatch):
    """Enumerating all 2^K selections of one example, none included, each followed by an update of its own, whatever
    the baseline: expected over them, the step is along the gradient of the expected rise."""
    pair = make_pair(tmp_path, "rl_multi_teacher", 3, selection_reward="ce_kd", selection_learning_rate=1.0)
    batch = make_batch(1)
    states, ce, kls, *_ = policy_of_definition(pair, batch)
    probability = probabilities(pair, states)
    before = ce[0] + kls[0].mean()
    weights = {n: p.clone() for n, p in pair.student.named_parameters()}
    policy = {n: p.detach().clone().requires_grad_() for n, p in pair.selection.named_parameters()}
    scores = torch.stack([s @ policy[f"weights.{k}"] for k, s in enumerate(states)], 1) + policy["bias"]
    expected, average = 0.0, {}
    for number, bits in enumerate(itertools.product((0.0, 1.0), repeat=3)):
        drawn = torch.tensor([bits], dtype=torch.float64)
        chance = torch.where(drawn == 1, scores.sigmoid(), 1 - scores.sigmoid()).prod()
        force(monkeypatch, batch, drawn)
        pair.selection.moments.copy_(torch.tensor([-3.3, 4.0, 0.0]))
        pair.selection.updates.fill_(7)
        pair(batch)
        move(pair.student, seed=number)
        _, ce, kls, *_ = policy_of_definition(pair, batch)
        rise = ce[0] + (taught_by(drawn, probability)[0] * kls[0]).sum() - before
        expected = expected + chance * rise.detach() / 2  # the deviation, the root of 4
        assert pair.after_update(None)["reward_rise"] == pytest.approx(rise.item(), rel=1e-6)
        with torch.no_grad():
            for name, parameter in pair.selection.named_parameters():
                average[name] = average.get(name, 0) + chance * (parameter - policy[name])
                parameter.copy_(policy[name])
            for name, parameter in pair.student.named_parameters():
                parameter.copy_(weights[name])
    truth = torch.autograd.grad(expected, list(policy.values()))
    for name, gradient in zip(policy, truth, strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(average[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_student_learns_from_the_mean_of_the_selected(tmp_path, monkeypatch):
    """The first example from teachers 1 and 3, the second from none: the most probable, the third from teacher 2."""
    pair = make_pair(tmp_path, "rl_multi_teacher", 3, student_ce_weight=0.4)
    batch = make_batch()
    force(monkeypatch, batch, ACTIONS[:3])
    loss = pair(batch)
    loss.total.backward()
    ours = gradients(pair.student)
    pair.zero_grad()
    states, _, _, kls, nll, example = policy_of_definition(pair, batch)
    best = nn.functional.one_hot(probabilities(pair, states)[1].argmax(), 3)
    weights = torch.stack([torch.tensor([0.5, 0, 0.5]), best, torch.tensor([0, 1, 0])])
    expected = ((weights[example] * kls).sum(1) + 0.4 * nll).mean()
    expected.backward()
    assert loss.student.item() == pytest.approx(expected.item(), rel=1e-9)
    for name, gradient in gradients(pair.student).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-7, atol=1e-10, msg=name)
    selected = torch.stack([loss.metrics[f"teacher_{i}_selected"] for i in (1, 2, 3)], 1)
    assert torch.equal(selected, (weights[example] > 0).double())
    assert torch.equal(pair.selection.drawn[0].actions, ACTIONS[:3]), "the policy is judged by what it drew"


def test_what_is_drawn_hangs_on_seed_step_and_example(tmp_path):
    """Not on the batch that the example is in: each is selected where its own number is below the probability."""
    pair = make_pair(tmp_path, "rl_multi_teacher", 3, selection_warmup=0.0)
    rows, drawn = encoded(6), []
    for step, sizes in ((4, (6,)), (4, (1, 3, 2)), (5, (6,))):
        pair.at(step, 10)
        start = 0
        for size in sizes:
            pair(Collator(tiny.EOS)(rows[start : start + size]))
            start += size
        lessons, pair.selection.drawn = pair.selection.drawn, []
        drawn.append(torch.cat([one.actions for one in lessons]))
        states = [torch.cat([one.states[k] for one in lessons]) for k in range(3)]
        numbers = torch.tensor([[uniform(42, step, row["id"], k) for k in range(3)] for row in rows])
        assert torch.equal(drawn[-1], (numbers < probabilities(pair, states)).double())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_each_example_counts_by_its_tokens(tmp_path, monkeypatch):
    """So that micro-batches add up: their losses over the tokens of all of them are the loss of the whole batch, and
    the policy's step is that of the whole batch."""
    rows = encoded(4)
    drawn = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    totals = Totals(tokens=30.0, own_rows=1, given_rows=4, text_tokens=1)
    found, learned = [], []
    for size in (4, 2):
        pair = make_pair(tmp_path, "rl_multi_teacher", 2)
        force(monkeypatch, Collator(tiny.EOS)(rows), drawn)
        for step in range(2):
            pair.zero_grad()
            for start in range(0, 4, size):
                pair(Collator(tiny.EOS)(rows[start : start + size]), totals).total.backward()
            gradient = gradients(pair)
            move(pair.student, seed=step)
            pair.after_update(None)
        found.append(gradient)
        learned.append({n: p.clone() for n, p in pair.selection.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-7, atol=1e-10, msg=name)
    start = dict(make_pair(tmp_path, "rl_multi_teacher", 2).selection.named_parameters())
    for name, value in learned[0].items():
        torch.testing.assert_close(learned[1][name], value, rtol=1e-7, atol=1e-10, msg=name)
        assert not torch.equal(value, start[name]), name


def test_warm_up_averages_all_teachers_and_evaluation_is_no_experience(tmp_path):
    pair = make_pair(tmp_path, "rl_multi_teacher", 3, selection_warmup=0.5)
    start = [p.clone() for p in pair.selection.parameters()]
    rises = []
    for step, n in enumerate((2, 3, 4)):
        pair.at(step, 10)
        metrics = pair(make_batch(n)).metrics
        assert all(metrics[f"teacher_{i}_weight"].eq(1 / 3).all() for i in (1, 2, 3))
        move(pair.student, seed=step)
        rises.append(pair.after_update(None)["reward_rise"])
    assert all(map(torch.equal, pair.selection.parameters(), start)), "what was not chosen is not learned from"
    assert pair.selection.moments[0].item() == pytest.approx(sum(rises) / 3, rel=1e-6), "but teaches what is usual"
    pair.at(5, 10)
    pair(make_batch(4))
    move(pair.student, seed=3)
    pair.after_update(None)
    assert not any(map(torch.equal, pair.selection.parameters(), start))
    before = {name: value.clone() for name, value in pair.selection.state_dict().items()}
    pair.eval()
    with torch.no_grad():
        pair(make_batch())
    assert pair.selection.drawn == [] and pair.after_update(None) == {}
    assert all(torch.equal(value, before[name]) for name, value in pair.selection.state_dict().items())


def test_out_of_training_the_policy_draws_nothing(tmp_path, monkeypatch):
    pair = make_pair(tmp_path, "rl_multi_teacher", 3).eval()
    batch = make_batch()
    monkeypatch.setattr(selection, "uniform", None)
    with torch.no_grad():
        metrics = pair(batch).metrics
    states, *_, example = policy_of_definition(pair, batch)
    probability = probabilities(pair, states)
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
        tiny.config(tmp_path, **options),
        train_dataset=tiny.examples(),
        eval_dataset=tiny.examples(8, seed=9),
        processing_class=tiny.tokenizer(),
    )


@pytest.mark.slow
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
    assert math.isfinite(entries[-1]["distillation_loss"])


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


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_policy_finds_the_teacher_that_teaches(seed, tmp_path):
    """Of a teacher that knows the task and a copy of the student, which holds it back, by what the student makes of it.

    The code before rewarded with -CE - KD of the student *before* the update, against a running mean. No action changes
    that CE, the copy's KD begins at 0, and a student that improves rewards whatever was selected: with both of these
    seeds, and with two of three others, it found the copy.
    """
    student, loss = taught(tiny.llama(), 8)
    skilled, skilled_loss = taught(tiny.llama(seed=1, layers=3, hidden=48), 40)
    assert skilled_loss < 0.4 < 1.2 < loss
    options = {"max_steps": 60, "per_device_train_batch_size": 8, "student_ce_weight": 0.0, "seed": seed}
    run = trainer(tmp_path, [copy.deepcopy(student), skilled], student, method="rl_multi_teacher", **options)
    run.train()
    run.pair.train()
    run.pair(Collator(tiny.EOS)(encoded(24)))
    of_copy, of_skilled = probabilities(run.pair, run.pair.selection.drawn[-1].states).mean(0).tolist()
    assert of_skilled > 0.5 and of_copy < 0.25
    entries = [e for e in run.state.log_history if "student_loss" in e]
    last = {i: sum(e[f"teacher_{i}_selected"] for e in entries[-20:]) / 20 for i in (1, 2)}
    assert last[2] > 0.85 and last[1] < 0.3, "where none is selected, the more probable one teaches"
    assert all(math.isfinite(e["reward_rise"]) for e in entries)


def test_eval_loss_is_the_methods_distillation_loss(tmp_path):
    run = trainer(tmp_path, make_teachers(), method="gated_ensemble", per_device_eval_batch_size=3)
    nn.init.normal_(run.pair.selection.bias)
    found = run.evaluate()["eval_loss"]
    batch = Collator(tiny.EOS)(encoded(8, seed=9))
    log_q, log_p, *_ = oracle(run.pair, batch)
    a = run.pair.selection.bias.softmax(0)
    expected = sum(a[i] * kl(p, log_q).mean() for i, p in enumerate(log_p))
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_resume_equals_not_stopping(method, tmp_path):
    """Student, selection, running moments, optimizer and the policy's draws: bit for bit."""
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
            pair(batch)

    run(plain)
    with torch.autocast("cpu", torch.bfloat16):
        run(found)
    for x, y in zip(found, plain, strict=True):
        assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())
        torch.testing.assert_close(x, y, rtol=0.1, atol=0.1)  # the models themselves are rounded


@pytest.mark.parametrize("reward", ["ce", "dev"])
def test_autocast_does_not_round_rewards(reward, tmp_path):
    """A step's rise is a small difference of two losses, and the scores decide by small numbers too."""
    learned = []
    for enabled in (False, True):
        pair = make_pair(tmp_path, "rl_multi_teacher", selection_reward=reward, selection_warmup=0.0).float()
        pair.selection.held_out = lambda: make_batch(5)
        rows, distil, kept = pair.student_rows, pair.distil, {}

        def exact(*args, of=None, **options):  # the models themselves would be rounded
            with torch.autocast("cpu", enabled=False):
                return of(*args, **options)

        pair.student_rows, pair.distil = functools.partial(exact, of=rows), functools.partial(exact, of=distil)
        for step in range(2):
            pair.at(step, 10)
            with torch.autocast("cpu", enabled=False):
                pair(make_batch(4))
            move(pair.student, seed=step, size=1e-3)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                kept[step] = pair.after_update(None)["reward_rise"]
        learned.append((kept, pair.selection.bias.clone()))
    for step in range(2):
        assert learned[1][0][step] == pytest.approx(learned[0][0][step], rel=1e-3)
    torch.testing.assert_close(learned[1][1], learned[0][1], rtol=1e-3, atol=1e-5)


def test_the_selection_has_its_own_learning_rate(tmp_path):
    run = trainer(tmp_path, make_teachers(), method="gated_ensemble", selection_learning_rate=0.03)
    groups = run.create_optimizer().param_groups
    selection = {id(p) for p in run.pair.selection.parameters()}
    assert [g["lr"] for g in groups] == [1e-2, 1e-2, 0.03]
    assert {id(p) for p in groups[2]["params"]} == selection


def test_the_policy_is_no_business_of_the_optimizer(tmp_path):
    run = trainer(tmp_path, make_teachers(), method="rl_multi_teacher", selection_learning_rate=0.03)
    assert [g["lr"] for g in run.create_optimizer().param_groups] == [1e-2, 1e-2]
    assert run.pair.selection.rate == 0.03 and not any(p.requires_grad for p in run.pair.selection.parameters())


def test_every_selection_starts_indifferent():
    for kind in (Gate, Policy):
        selection = kind(32, [48, 32], OKDConfig())
        assert all(p.eq(0).all() for p in selection.parameters())


def test_the_reward_on_held_out_data_needs_some(tmp_path):
    options = {"method": "rl_multi_teacher", "selection_reward": "dev"}
    with pytest.raises(ValueError, match="expected an eval_dataset with selection_reward=dev"):
        OKDTrainer(
            tiny.llama(),
            make_teachers(),
            tiny.config(tmp_path, **options),
            train_dataset=tiny.examples(),
            processing_class=tiny.tokenizer(),
        )
    run = trainer(tmp_path, make_teachers(), per_device_eval_batch_size=3, **options)
    ids = []
    for step in range(4):
        run.pair.at(step, 10)
        ids.append(run.pair.selection.held_out()["ids"])
    names = [f"example-{i}" for i in range(8)]
    assert ids == [names[:3], names[3:6], [*names[6:], names[0]], names[1:4]], "batch after batch, round and round"
    run.train()
    assert all(math.isfinite(e["reward_rise"]) for e in run.state.log_history if "student_loss" in e)
