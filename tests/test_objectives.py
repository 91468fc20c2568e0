"""Each loss of a batch against its definition: whole logits, loops and plain autograd, in fp64."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import okd_kernels
from okd import METHODS, OKDConfig, OKDTrainer, checkpoints
from okd.answers import prompt_and_reference
from okd.data import IGNORE, Collator, batch_rows, rows_of, seed_of
from okd.ensemble import Ensemble
from okd.objectives import Totals, divergence
from okd.online import Online, attach_online_module
from okd.pair import StudentTeacher
from okd.teachers import Frozen

LOSSES = ("divergence", "cross_entropy", "taid", "rlkd", "mixkd", "minillm", "distillm2")  # ensemble: test_selection.py
DISTILLING = [name for name in LOSSES if name != "cross_entropy"]
PRESET = {"divergence": "forward_kd", "cross_entropy": "sft"}  # the others are called after their loss
ROWS = [  # several turns, a student's row, a row of one response token
    {"input_ids": [5, 9, 7, 8, 12, 13, 4, 1], "labels": [-100, -100, 7, 8, -100, 13, 4, 1]},
    {"input_ids": [6, 3, 9, 22, 1, 4], "labels": [-100, -100, 9, 22, 1, 4], "writer": "student"},
    {"input_ids": [14, 15, 16, 17, 18, 19], "labels": [-100, -100, -100, 17, 18, 19], "writer": "student"},
    {"input_ids": [2, 1], "labels": [-100, 1]},
]
ONE = Totals(tokens=1, own_rows=1, given_rows=1, text_tokens=1)


def batch(rows=ROWS, **changes):
    return Collator(tiny.EOS)([{"id": str(i), **row, **changes} for i, row in enumerate(rows)])


def pair(loss, online=False, vocab=24, **options):
    """fp64; a vocabulary so small that both models' top tokens overlap; an online module that has moved already."""
    args = OKDConfig(method=PRESET.get(loss, loss), online_teacher=online, use_cpu=True, **options)
    student = tiny.llama(vocab=vocab, tie_word_embeddings=False)
    teacher = None if loss == "cross_entropy" else tiny.llama(seed=1, layers=3, hidden=48, vocab=vocab)
    if online:
        teacher = attach_online_module(teacher, args)
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    if teacher is not None:
        teacher = Online(teacher) if online else Frozen(teacher)
    both = StudentTeacher(student, teacher, args).double()
    both.progress = 0.25
    if loss == "taid":
        both.loss.state["t"] = 0.55
    return both


def logits(model, inputs):
    """(N, V) before each response token, by the model's own forward."""
    z = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    return z.flatten(0, 1)[inputs["positions"]]


def kl(a, b):
    """Sum over the vocabulary of a log(a / b), from log-probabilities."""
    return (a.exp() * (a - b)).sum(-1)


def skew(a, b, alpha):
    """KL(a || alpha a + (1 - alpha) b)"""
    return kl(a, (alpha * a.exp() + (1 - alpha) * b.exp()).log())


def row_of(inputs):
    return inputs["positions"] // inputs["input_ids"].shape[1]


def is_reference(inputs):
    """(N,) whether nobody but the dataset or the teacher wrote the token."""
    return torch.tensor([inputs["writers"][row] in ("dataset", "teacher") for row in row_of(inputs)])


def nll(z, inputs):
    return nn.functional.cross_entropy(z, inputs["targets"], reduction="none")


# --- the definitions, one for each loss: (pair, batch, z, u, T, totals) -> loss of the student ------------------------


def expect_divergence(both, inputs, z, u, t, totals):
    distance = t**2 * kl((u / t).log_softmax(-1), (z / t).log_softmax(-1))
    ce = both.student_objective.ce_weight * nll(z, inputs)[is_reference(inputs)].sum()
    return (distance.sum() + ce) / totals.tokens


def expect_cross_entropy(both, inputs, z, u, t, totals):
    return nll(z, inputs).sum() / totals.tokens


def expect_taid(both, inputs, z, u, t, totals):
    share = both.loss.state["t"]
    target = ((1 - share) * z.detach() + share * u) / t
    return t**2 * kl(target.log_softmax(-1), (z / t).log_softmax(-1)).sum() / totals.tokens


def isotonic_ranks(scores):
    """Pool adjacent violators: 1 for the lowest, n for the highest, blocks that would fall out of order averaged."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i].item())
    blocks = []  # of [sum of y, members]
    for place, i in enumerate(order):
        blocks.append([scores[i] - (len(scores) - place), [i]])
        while len(blocks) > 1 and blocks[-2][0].item() / len(blocks[-2][1]) < blocks[-1][0].item() / len(blocks[-1][1]):
            total, members = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + members]
    ranks = [None] * len(scores)
    for total, members in blocks:
        for i in members:
            ranks[i] = scores[i] - total / len(members)
    return torch.stack(ranks)


def expect_rlkd(both, inputs, z, u, t, totals):
    total = expect_divergence(both, inputs, z, u, t, totals) / 2
    for ours, theirs in zip(z, u, strict=True):
        union = sorted({*ours.topk(5).indices.tolist(), *theirs.topk(5).indices.tolist()})
        a, b = isotonic_ranks(ours[union]), isotonic_ranks(theirs[union])
        total = total + (1 - torch.corrcoef(torch.stack((a, b)))[0, 1]) / totals.tokens
    return total


def expect_mixkd(both, inputs, z, u, t, totals):
    """CE(x), which Eq. 8 of the paper has beside the mixture's, KL(x), and both of the mixture; row by row, without
    padding. The draws of partners and shares are repeated."""
    options, rows = both.options, range(len(inputs["input_ids"]))
    draws = np.random.default_rng(seed_of(*both.seed, *inputs["ids"]))
    order = draws.permutation(len(rows)).tolist()
    partner = [order[order.index(i) - 1] for i in rows]
    assert all(i != j for i, j in zip(rows, partner, strict=True))
    shares = torch.tensor(draws.beta(options.mixup_alpha, options.mixup_alpha, len(rows))).float().double()
    length = inputs["input_ids"].shape[1]
    label = dict(zip(inputs["positions"].tolist(), inputs["targets"].tolist(), strict=True))
    distance = t**2 * kl((u / t).log_softmax(-1), (z / t).log_softmax(-1)).sum()
    total, mixed = distance + nll(z, inputs)[is_reference(inputs)].sum(), 0
    for i, j, share in zip(rows, partner, shares, strict=True):
        n = int(inputs["attention_mask"][[i, j]].sum(1).min())
        outputs = []
        for model in (both.student, both.teacher.model):
            e, other = (model.get_input_embeddings()(inputs["input_ids"][r : r + 1, :n]) for r in (i, j))
            outputs.append(model(inputs_embeds=share * e + (1 - share) * other, use_cache=False).logits[0])
        for place in range(n):
            ours, theirs = (label.get(r * length + place) for r in (i, j))
            if ours is None or theirs is None:
                continue
            mixed += 1
            z_mixed, u_mixed = outputs[0][place], outputs[1][place].detach()
            log_q = z_mixed.log_softmax(-1)
            total = total - options.mixup_ce_weight * (share * log_q[ours] + (1 - share) * log_q[theirs])
            distance = kl((u_mixed / t).log_softmax(-1), (z_mixed / t).log_softmax(-1))
            total = total + options.mixup_weight * t**2 * distance
    assert mixed >= 4, "the problem must have rows that meet"
    return total / totals.tokens


def expect_minillm(both, inputs, z, u, t, totals):
    """Token by token. What is held still is a float."""
    options, a = both.options, both.method.teacher_share
    distances = t**2 * kl((z / t).log_softmax(-1), (u / t).log_softmax(-1))
    log_q = -nll(z, inputs)
    q, p = ((-nll(x, inputs)).exp().tolist() for x in (z, u))
    rows, total = row_of(inputs).tolist(), 0
    for i, row in enumerate(rows):
        writer = inputs["writers"][row]
        if writer == "text":
            total = total - options.text_weight * log_q[i] / totals.text_tokens
            continue
        weight = q[i] / ((1 - a) * q[i] + a * p[i]) if writer == "student" else 1.0
        total = total + weight * distances[i] / totals.tokens
        future = [math.log(p[k] / q[k]) for k in range(i + 1, len(rows)) if rows[k] == row]
        future = [max(-options.reward_clip, min(options.reward_clip, reward)) for reward in future]
        if writer != "student":
            total = total - both.student_objective.ce_weight * log_q[i] / totals.tokens
        elif future:
            value = sum(future) / (len(future) if options.length_normalized else 1)
            total = total - weight * value * log_q[i] / totals.tokens
    return total


def expect_distillm2(both, inputs, z, u, t, totals, alpha=0.1, alpha_own=0.1):
    """The mean over each response first: one of a hundred tokens weighs as much as one of ten."""
    start = both.options.lowering_start
    growth = start + (1 - start) * both.progress
    log_q, log_p, ce = (z / t).log_softmax(-1), (u / t).log_softmax(-1), nll(z, inputs)
    mixture = ((1 - alpha_own) * log_p.exp() + alpha_own * log_q.detach().exp()).log()
    total = 0
    for row, writer in enumerate(inputs["writers"]):
        at = row_of(inputs) == row
        if writer == "student":
            total = total + growth * t**2 * kl(log_q, mixture)[at].mean() / totals.own_rows
        else:
            raised = t**2 * skew(log_p, log_q, alpha)[at] + both.student_objective.ce_weight * ce[at]
            total = total + raised.mean() / totals.given_rows
    return total


def expect_teacher(both, inputs, z, u, t, totals):
    """a KL(q || p) + (1 - a) CE, the latter of references only: the student's own words are none."""
    a = both.options.teacher_kl_weight
    distance = t**2 * kl((z / t).log_softmax(-1).detach(), (u / t).log_softmax(-1))
    each = a * distance + (1 - a) * nll(u, inputs) * is_reference(inputs)
    if both.method.name == "minillm":  # whose batches the student writes
        each = a * distance
    if both.method.name != "distillm2":
        return each.sum() / totals.tokens
    rows = [each[row_of(inputs) == row].mean() for row in range(len(inputs["writers"]))]
    sizes = [totals.own_rows if writer == "student" else totals.given_rows for writer in inputs["writers"]]
    return sum(loss / n for loss, n in zip(rows, sizes, strict=True))


def gradients(both, loss):
    parameters = {n: p for n, p in both.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values(), allow_unused=True), strict=True))


def assert_close(ours, truth):
    """Of gradients by name. Norms and rotations of the models are in fp32, whatever their weights."""
    for parameter, gradient in truth.items():
        assert (ours[parameter] - gradient).norm() <= 2e-6 * gradient.norm(), parameter


def assert_same_gradients(both, loss, expected):
    assert_close(gradients(both, loss), gradients(both, expected))


CASES = [(name, False, 1.0) for name in LOSSES] + [(name, online, 2.0) for name in DISTILLING for online in (0, 1)]


@pytest.mark.parametrize("name, online, temperature", CASES)
def test_the_loss_is_its_definition(name, online, temperature):
    """Values, and the gradient of every parameter that learns on either side, divided by the totals of more batches."""
    options = {"mixup_ce_weight": 0.7, "mixup_weight": 0.6} if name == "mixkd" else {}
    options |= {"teacher_kl_weight": 0.3} if online else {}
    both, inputs = pair(name, bool(online), temperature=temperature, **options), batch()
    totals = Totals(tokens=torch.tensor(17), own_rows=torch.tensor(3), given_rows=torch.tensor(5), text_tokens=1)
    loss = both(inputs, totals)
    z = logits(both.student, inputs)
    u = None if both.teacher is None else logits(both.teacher.model, inputs)
    held = None if u is None else u.detach()
    expected = globals()[f"expect_{name}"](both, inputs, z, held, temperature, totals)
    assert loss.student.item() == pytest.approx(expected.item(), rel=1e-6)
    total = expected
    if online:
        teacher = expect_teacher(both, inputs, z, u, temperature, totals)
        assert loss.teacher.item() == pytest.approx(teacher.item(), rel=1e-6)
        total = total + teacher
    else:
        assert loss.teacher is None
    ours = gradients(both, loss.total)
    assert_close(ours, gradients(both, total))
    assert any("lora_B" in n for n in ours) == bool(online)
    for metric, values in loss.metrics.items():
        assert values.shape == inputs["targets"].shape and not values.requires_grad, metric


@pytest.mark.parametrize("method", ["minillm", "skd", "gkd", "imitkd"])
def test_an_online_teacher_learns_no_words_of_the_student_as_labels(method):
    """Drafts that its teacher has mended are none either. Of the batch of `imitkd`, some rows are the dataset's: those
    are references, and no others."""
    changes = {"imitkd": {}, "skd": {"writer": "both"}}.get(method, {"writer": "student"})
    both, inputs = pair(method, online=True, teacher_kl_weight=0.3), batch(**changes)
    assert is_reference(inputs).any() == (method == "imitkd") and not is_reference(inputs).all()
    z, u = (logits(model, inputs) for model in (both.student, both.teacher.model))
    nlls = nll(u, inputs) * is_reference(inputs)
    expected = (0.3 * kl(z.log_softmax(-1), u.log_softmax(-1)) + 0.7 * nlls).mean()
    assert both(inputs).teacher.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("method", ["gkd", "imitkd", "skd", "minillm", "distillm2"])
def test_the_students_own_words_are_no_labels(method):
    """`student_ce_weight` counts references only: rows that the student wrote or drafted have no such gradient."""
    plain, both = pair(method), pair(method, student_ce_weight=0.5)
    writer = "both" if method == "skd" else "student"
    own = batch(writer=writer)
    loss, without = both(own), plain(own)
    torch.testing.assert_close(loss.student, without.student, rtol=1e-12, atol=0)
    assert_close(gradients(both, loss.total), gradients(plain, without.total))

    mixed = batch([{**row, "writer": writer if i in (0, 2) else "dataset"} for i, row in enumerate(ROWS)])
    loss, without = both(mixed), plain(mixed)
    each = nll(logits(both.student, mixed), mixed)[is_reference(mixed)]
    assert 0 < len(each) < len(mixed["targets"])
    ce = each.sum() / len(mixed["targets"])
    if method == "distillm2":
        of_rows = row_of(mixed)[is_reference(mixed)]
        ce = (each[of_rows == 1].mean() + each[of_rows == 3].mean()) / 2
    assert loss.student.item() == pytest.approx((without.student + 0.5 * ce).item(), rel=1e-9)
    truth, of_ce = gradients(plain, without.total), gradients(both, 0.5 * ce)
    assert_close(gradients(both, loss.total), {name: gradient + of_ce[name] for name, gradient in truth.items()})
    for name, values in without.metrics.items():
        torch.testing.assert_close(loss.metrics[name], values, rtol=1e-9, atol=1e-13, msg=name)
    order = nll(logits(both.student, mixed), mixed)
    torch.testing.assert_close(loss.metrics["student_nll"], order, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_is_over_the_response_tokens_of_the_batch(name):
    both, inputs = pair(name), batch()
    of_batch = Totals(tokens=torch.tensor(len(inputs["targets"])), own_rows=2, given_rows=2, text_tokens=1)
    values = [both(inputs, totals).student.item() for totals in (None, of_batch)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mixkd"])
def test_micro_batches_add_up_to_the_batch(name):
    both, whole = pair(name), batch()
    totals = Totals(tokens=torch.tensor(len(whole["targets"])), own_rows=2, given_rows=2, text_tokens=1)
    assert totals == Totals.of([batch(ROWS[:1]), batch(ROWS[1:])])
    parts = [both(batch(rows), totals).student for rows in (ROWS[:1], ROWS[1:])]
    assert sum(parts).item() == pytest.approx(both(whole, totals).student.item(), rel=1e-9)


def test_totals_count_what_is_there():
    """Text apart from responses, the student's responses and drafts apart from others; 1 where there is nothing."""
    rows = [{**ROWS[i], "writer": w} for i, w in enumerate(("both", "text", "student", "teacher"))]
    assert Totals.of([batch(rows), batch(rows[1:2])]) == Totals(tokens=9, own_rows=2, given_rows=1, text_tokens=8)
    assert Totals.of([]) == ONE
    assert Totals.of([batch(rows)], lambda x: 2 * x) == Totals(tokens=18, own_rows=4, given_rows=2, text_tokens=8)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["none counted", "all the student's", "none the student's"])
def test_every_parameter_that_learns_gets_a_gradient(name, kind):
    """Whatever a process's batch holds, as DDP wants it; without a response token, gradients of zero."""
    both = pair(name, online=name in DISTILLING)
    rows = [{**row, "labels": [IGNORE] * len(row["labels"])} for row in ROWS] if kind == "none counted" else ROWS
    changes = {} if kind == "none counted" else {"writer": "student" if kind == "all the student's" else "dataset"}
    loss = both(batch(rows, **changes))
    found = gradients(both, loss.total)
    assert all(g is not None and g.isfinite().all() for g in found.values())
    if kind == "none counted":
        assert loss.total.item() == 0 and all((g == 0).all() for g in found.values())


def test_cross_entropy_makes_no_logits_of_the_whole_batch(monkeypatch):
    """Every tensor that is made on the way, forward and backward, stays below N x V."""
    monkeypatch.setitem(okd_kernels.call.WORKSPACE_BYTES, "cpu", 1 << 14)
    both = pair("cross_entropy", vocab=512)
    inputs = batch([{"input_ids": list(range(2, 60)), "labels": [IGNORE, *range(3, 60)]}] * 6)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [x.untyped_storage().nbytes() // 8 for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            Largest.numel = max(Largest.numel, *sizes, 0)
            return out

    with Largest():
        both(inputs).total.backward()
    n = len(inputs["targets"])
    assert 0 < Largest.numel < n * 512 / 4
    with Largest():  # the measure sees logits where there are some
        logits(both.student, inputs)
    assert Largest.numel >= n * 512


# --- TAID ------------------------------------------------------------------------------------------------------------


def test_taid_moves_from_a_target_of_its_own_to_the_teacher():
    inputs = batch()
    both = pair("taid")
    values = {}
    for t in (0.4, 0.7, 1.0):
        both.loss.state["t"] = t
        loss = both(inputs)
        values[t] = loss.student.item()
        assert loss.metrics["target_t"].unique().item() == pytest.approx(t)
    assert values[0.4] < values[0.7] < values[1.0]
    whole = both(inputs, loss=divergence)
    assert values[1.0] == pytest.approx(whole.student.item(), rel=1e-12)


def test_an_online_teacher_is_the_end_point_of_taids_path():
    """The teacher of the moment, not its base."""
    inputs, both = batch(), pair("taid", online=True)
    both.loss.state["t"] = 1.0
    with torch.no_grad(), both.teacher.as_it_was() as base:
        log_base = logits(base, inputs).log_softmax(-1)
    log_q, log_p = (logits(model, inputs).log_softmax(-1) for model in (both.student, both.teacher.model))
    expected, of_base = kl(log_p, log_q).mean().item(), kl(log_base, log_q).mean().item()
    assert both(inputs).student.item() == pytest.approx(expected, rel=1e-6) != pytest.approx(of_base, rel=0.01)


@pytest.mark.parametrize("rate, max_steps", [(5e-4, 20_000), (0.5, 40), (0.0, 10)])
def test_taid_runs_ahead_of_its_line_while_the_loss_falls(rate, max_steps, tmp_path):
    """t <- min(1, max(line, t + rate sigmoid(m) (1 - t))), m <- 0.99 m + 0.01 (L' - L) / L'. The first loss is only
    remembered. Half-way, what it remembers goes through a checkpoint."""
    options = {} if rate == 5e-4 else {"taid_rate": rate}
    fresh = pair("taid", **options).loss
    both = pair("taid", **options)
    both.loss.state = dict(fresh.state, t=0.4)
    losses = [3.0, 2.5, 2.6, 1.0, 0.2, 0.4, 0.3, 0.1]
    t, m, before, ahead = 0.4, 0.0, None, 0
    for step, loss in enumerate(losses):
        both.at(step, max_steps)
        both.after_update(loss)
        if before is not None:
            m = 0.99 * m + 0.01 * (before - loss) / before
            line, run = 0.4 + 0.6 * (step + 1) / max_steps, t + rate / (1 + math.exp(-m)) * (1 - t)
            ahead += run > line
            t = min(1.0, max(line, run))
        before = loss
        assert both.loss.state["t"] == pytest.approx(t, rel=1e-12) and (step or t == 0.4)
        assert both.loss.state["loss"] == loss
        if step == 4:
            checkpoints.save(both, tmp_path)
            state, both = both.loss.state, pair("taid", **options)
            assert both.loss.state != state
            checkpoints.load(both, tmp_path)
            assert both.loss.state == state
    assert ahead == (0 if rate == 0 else 7), "all but the first run ahead, or the test would show nothing"


def test_taid_ends_at_the_teacher():
    both = pair("taid")
    for step in range(10):
        both.at(step, 10)
        both.after_update(1.0)
    assert both.loss.state["t"] == 1.0


def test_taid_with_a_lora_on_the_head():
    both = pair("taid")
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    both.student = get_peft_model(both.student, config).double()
    inputs = batch()
    loss, z, u = both(inputs), logits(both.student, inputs), logits(both.teacher.model, inputs).detach()
    expected = expect_taid(both, inputs, z, u, 1.0, Totals.of([inputs]))
    assert loss.student.item() == pytest.approx(expected.item(), rel=1e-9)
    ours, truth = gradients(both, loss.total), gradients(both, expected)
    assert sum("lm_head" in n for n in truth) == 2
    for parameter, gradient in truth.items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-6, atol=1e-9)


# --- MixKD -----------------------------------------------------------------------------------------------------------


def test_rows_that_meet_themselves_are_mixed_into_themselves():
    """A batch of one: the mixture's terms are the plain row's, and beside them stand its own CE and KL."""
    both, inputs = pair("mixkd", mixup_ce_weight=0.5, mixup_weight=2.0), batch(ROWS[:1])
    z, u = (logits(model, inputs) for model in (both.student, both.teacher.model))
    ce, distance = nll(z, inputs).mean().item(), kl(u.log_softmax(-1), z.log_softmax(-1)).mean().item()
    loss = both(inputs)
    assert loss.student.item() == pytest.approx((1 + 0.5) * ce + (1 + 2) * distance, rel=1e-6)
    assert (loss.metrics["mixed_share"] == 1).all()


def test_the_students_own_divergence_is_that_of_mixed_rows_too():
    both, inputs = pair("mixkd", student_divergence="jsd", divergence_beta=0.2, student_ce_weight=0.4), batch(ROWS[:1])
    loss, plain = both(inputs), both(inputs, loss=divergence)
    ce = nll(logits(both.student, inputs), inputs).mean().item()
    assert loss.student.item() == pytest.approx(2 * (plain.student.item() - 0.4 * ce) + 1.4 * ce, rel=1e-6)


def test_partners_and_shares_hang_on_seed_step_and_rows():
    both, inputs = pair("mixkd"), batch()
    value = both(inputs).student.item()
    torch.manual_seed(99)
    assert both(inputs).student.item() == value
    both.at(1, 10)
    assert both(inputs).student.item() != pytest.approx(value, rel=1e-6)


# --- MiniLLM ---------------------------------------------------------------------------------------------------------


def test_the_students_own_tokens_are_no_references_for_the_teacher():
    """A batch that the student wrote: L_t is a KL(q || p) alone; of the dataset's rows, all of L_t."""
    for writer, ce_weight in (("student", 0.0), ("dataset", 0.7)):
        both, inputs = pair("gkd", online=True, teacher_kl_weight=0.3), batch(writer=writer)
        loss = both(inputs)
        expected = 0.3 * loss.metrics["reverse_kl"].mean() + ce_weight * loss.metrics["teacher_nll"].mean()
        torch.testing.assert_close(loss.teacher, expected)


@pytest.mark.parametrize("length_normalized", [False, True])
def test_minillm_is_the_gradient_of_kl_between_whole_responses(length_normalized):
    """Expected over all 3^3 responses to a prompt, each weighed by q: the sum is unbiased, the mean is not."""
    both, length, vocab = pair("minillm", vocab=3, teacher_share=0.0, length_normalized=length_normalized), 3, 3
    rows = [
        {"input_ids": [0, 2, *response], "labels": [IGNORE, IGNORE, *response], "writer": "student"}
        for response in itertools.product(range(vocab), repeat=length)
    ]
    inputs = batch(rows)
    log_q, log_p = (
        -nll(logits(model, inputs), inputs).view(-1, length).sum(1) for model in (both.student, both.teacher.model)
    )
    assert log_q.exp().sum().item() == pytest.approx(1)
    truth = gradients(both, (log_q.exp() * (log_q - log_p.detach())).sum())
    expected = {}
    for row, weight in zip(rows, log_q.exp().tolist(), strict=True):
        for parameter, gradient in gradients(both, both(batch([row]), ONE).student).items():
            expected[parameter] = expected.get(parameter, 0) + weight * gradient
    error = math.sqrt(sum((expected[k] - truth[k]).square().sum().item() for k in truth))
    size = math.sqrt(sum(g.square().sum().item() for g in truth.values()))
    assert error > 0.01 * size if length_normalized else error < 1e-6 * size


def test_importance_weights_make_up_for_the_teachers_share():
    """Responses of one token, drawn from the mixture: expected over them, w KL has the gradient of KL."""
    both = pair("minillm", vocab=3, teacher_share=0.4)
    rows = [{"input_ids": [0, 2, y], "labels": [IGNORE, IGNORE, y], "writer": "student"} for y in range(3)]
    inputs = batch(rows[:1])
    log_q, log_p = (logits(model, inputs)[0].log_softmax(-1) for model in (both.student, both.teacher.model))
    truth, expected = gradients(both, kl(log_q, log_p.detach())), {}
    for row, share in zip(rows, (0.6 * log_q.exp() + 0.4 * log_p.exp()).tolist(), strict=True):
        for parameter, gradient in gradients(both, both(batch([row]), ONE).student).items():
            expected[parameter] = expected.get(parameter, 0) + share * gradient
    assert_close(expected, truth)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"teacher_share": 0.5, "reward_clip": 0.7},
        {"reward_clip": 0.3, "length_normalized": False, "student_ce_weight": 0.6, "temperature": 2.0},
        {"text_weight": 2.5, "teacher_share": 0.0},
    ],
    ids=str,
)
def test_minillm_of_every_kind_of_row(options):
    """Rows of the student, of the dataset (the KL alone), and of plain text (its cross-entropy alone)."""
    both = pair("minillm", **options)
    text = {"input_ids": [3, 20, 21, 9, 8], "labels": [IGNORE, 20, 21, 9, 8], "writer": "text"}
    inputs = batch([ROWS[0], text, *ROWS[1:], {**text, "input_ids": [4, 20, 2, 9, 7], "labels": [IGNORE, 20, 2, 9, 7]}])
    totals = Totals(tokens=23.0, own_rows=2, given_rows=2, text_tokens=11.0)
    loss = both(inputs, totals)
    z, u = logits(both.student, inputs), logits(both.teacher.model, inputs).detach()
    rewards = (nll(z, inputs) - nll(u, inputs)).abs()
    assert "reward_clip" not in options or 0 < (rewards > options["reward_clip"]).sum() < len(rewards)
    expected = expect_minillm(both, inputs, z, u, options.get("temperature", 1.0), totals)
    assert loss.student.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(both, loss.total, expected)
    own = torch.tensor([inputs["writers"][row] == "student" for row in row_of(inputs) if row not in (1, 5)])
    assert (loss.metrics["importance"][~own] == 1).all() and len(own) == len(loss.metrics["importance"])
    assert (loss.metrics["importance"][own] == 1).all() == (options.get("teacher_share") == 0.0)


# --- DistiLLM-2 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["teacher", "student"])
def test_a_long_response_weighs_as_much_as_a_short_one(writer):
    generator = torch.Generator().manual_seed(2)
    rows = []
    for n in (10, 128):
        ids = torch.randint(2, 24, (3 + n,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE] * 3 + ids[3:], "writer": writer})
    both, inputs = pair("distillm2"), batch(rows)
    apart = [both(batch([row])).student.item() for row in rows]
    assert inputs["counts"] == [10, 128] and apart[0] != pytest.approx(apart[1], rel=0.01)
    assert both(inputs).student.item() == pytest.approx(sum(apart) / 2, rel=1e-6)
    z, u = logits(both.student, inputs), logits(both.teacher.model, inputs).detach()
    expected = expect_distillm2(both, inputs, z, u, 1.0, Totals.of([inputs]))
    assert both(inputs).student.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_the_weight_of_the_students_responses_grows_to_one(progress):
    both, inputs = pair("distillm2", lowering_start=0.2), batch()
    both.progress = progress
    z, u = logits(both.student, inputs), logits(both.teacher.model, inputs).detach()
    expected = expect_distillm2(both, inputs, z, u, 1.0, Totals.of([inputs]))
    loss = both(inputs)
    assert loss.student.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(both, loss.total, expected)
    own, given = batch(ROWS[1:3]), batch([ROWS[0], ROWS[3]])
    weight = (loss.student - both(given).student) / pair("distillm2")(own).student
    assert weight.item() == pytest.approx(0.2 + 0.8 * progress, rel=1e-6)


def test_the_skew_follows_the_gap_between_the_models(tmp_path):
    """alpha = 1 - (1 - alpha_0) m / gap, within [0.01, alpha_0], for either writer's tokens; the gap is between the
    (geometric) mean probabilities of a batch's tokens, m its moving average, which a checkpoint keeps."""
    both = pair("distillm2", skew_curriculum=True, divergence_alpha=0.5)
    with torch.no_grad():  # a teacher that knows the tokens better, so that the gaps are positive
        both.teacher.model.lm_head.weight *= 0.2
        both.student.lm_head.weight *= 2
    usual, seen = None, []
    for rows in (ROWS[1:3], ROWS, ROWS[:2], ROWS[2:]):
        inputs = batch(rows)
        z, u = logits(both.student, inputs), logits(both.teacher.model, inputs).detach()
        own = ~is_reference(inputs)
        gaps, alphas = [], []
        for part in (~own, own):
            if part.any():
                of_part = [math.exp(-nll(x, inputs)[part].mean().item()) for x in (u, z)]
                gaps.append(of_part[0] - of_part[1])
                alpha = 0.5 if usual is None else 1 - (1 - 0.5) * usual / (gaps[-1] + 1e-5)
                alphas.append(min(max(alpha, 0.01), 0.5))
            else:
                alphas.append(0.5)
        seen += alphas
        expected = expect_distillm2(both, inputs, z, u, 1.0, Totals.of([inputs]), *alphas)
        assert both(inputs).student.item() == pytest.approx(expected.item(), rel=1e-6)
        both.eval()
        both(batch())  # an evaluation is no step
        both.train()
        both.after_update(1.0)
        usual = sum(gaps) / len(gaps) if usual is None else 0.9 * usual + 0.1 * sum(gaps) / len(gaps)
        assert both.loss.state["gap"] == pytest.approx(usual, rel=1e-6)
    assert min(seen) < 0.4 < max(seen), "alphas that differ, or the test would show nothing"
    checkpoints.save(both, tmp_path)
    again = pair("distillm2", skew_curriculum=True)
    checkpoints.load(again, tmp_path)
    assert again.loss.state == both.loss.state


# --- teachers that the data name -------------------------------------------------------------------------------------


def routed_pair(**options):
    teachers = {"math": tiny.llama(seed=1, layers=3, hidden=48, vocab=24), "chat": tiny.llama(seed=2, vocab=24)}
    args = OKDConfig(method="routed", use_cpu=True, **options)
    student = tiny.llama(vocab=24, tie_word_embeddings=False)
    return StudentTeacher(student, Ensemble(teachers), args).double()


NAMES = ("chat", "math", "math", "chat")
PROMPTS = ([3, 4, 5, 9, 9, 2], None, [7], None)  # what the teacher reads in place of all before the response


def routed_rows(prompts):
    one_turn = {"input_ids": [5, 9, 7, 8, 12], "labels": [-100, -100, 7, 8, 12]}
    rows = [{**row, "teacher": name} for row, name in zip([one_turn, *ROWS[1:]], NAMES, strict=True)]
    return [
        row if prompt is None else {**row, "teacher_prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)
    ]


@pytest.mark.parametrize("prompts", [(None,) * 4, PROMPTS], ids=["as the student", "prompts of their own"])
def test_each_example_is_taught_by_the_teacher_that_it_names(prompts):
    """Value and gradient, row by row without padding; the metrics come in the tokens' order."""
    t, both = 1.5, routed_pair(temperature=1.5, student_ce_weight=0.3)
    rows = routed_rows(prompts)
    inputs = batch(rows, writer="dataset")
    total, distances, nlls = 0, [], []
    for row, prompt in zip(rows, prompts, strict=True):
        start = row["labels"].index(next(label for label in row["labels"] if label != IGNORE))
        response = row["input_ids"][start:]
        read = row["input_ids"][:start] if prompt is None else prompt
        teacher = both.teacher.models[both.teacher.names.index(row["teacher"])]
        z = both.student(torch.tensor([row["input_ids"]])).logits[0, start - 1 : -1]
        u = teacher(torch.tensor([[*read, *response]])).logits[0, len(read) - 1 : -1].detach()
        distances.append(kl((u / t).log_softmax(-1), (z / t).log_softmax(-1)))
        nlls.append(nn.functional.cross_entropy(z, torch.tensor(response), reduction="none"))
        total = total + (t**2 * distances[-1] + 0.3 * nlls[-1]).sum()
    totals = Totals(tokens=19.0, own_rows=1, given_rows=4, text_tokens=1)
    loss = both(inputs, totals)
    assert loss.student.item() == pytest.approx(total.item() / 19, rel=1e-9) and loss.teacher is None
    assert_same_gradients(both, loss.total, total / 19)
    torch.testing.assert_close(loss.metrics["student_nll"], torch.cat(nlls).detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.metrics["forward_kl"], torch.cat(distances).detach(), rtol=1e-9, atol=1e-12)


def test_an_example_of_no_teacher_is_refused():
    """Held-out ones too, which nobody sees before they are measured: their tokens would count without a loss."""
    rows = routed_rows((None,) * 4)
    del rows[1]["teacher"]
    rows[3]["teacher"] = "talk"
    with pytest.raises(
        ValueError, match="every example to be one of math, chat; got another, or none, in 1, 3: correct"
    ):
        routed_pair()(batch(rows))


def test_rows_of_a_batch_are_a_batch():
    rows = [{"id": str(i), **row} for i, row in enumerate(routed_rows(PROMPTS))]
    whole = Collator(tiny.EOS)(rows)
    for chosen in ([0, 2], [1, 3], [3]):
        part = batch_rows(whole, chosen)
        assert part.keys() == whole.keys()
        apart = rows_of(part)
        read = [{**row, "teacher_prompt": row.get("teacher_prompt", row["input_ids"][:2])} for row in rows]
        read[3]["teacher_prompt"] = rows[3]["input_ids"][:1]
        assert apart == [read[i] for i in chosen]
        for prefix in ("", "teacher_"):
            ids = part[f"{prefix}input_ids"].flatten()
            assert torch.equal(ids[part[f"{prefix}positions"] + 1], part["targets"])
        assert len(part["targets"]) == sum(part["counts"]) == sum(whole["counts"][i] for i in chosen)


# --- through the trainer ---------------------------------------------------------------------------------------------


@torch.no_grad()
def sampled(sampler, rows, length=5):
    """Responses of the student, of this many tokens; the prompts are of one length."""
    ids = torch.tensor([prompt_and_reference(row)[0] for row in rows])
    start = ids.shape[1]
    for _ in range(length):
        q = sampler.pair.student(ids).logits[:, -1].softmax(-1)
        ids = torch.cat((ids, torch.multinomial(q, 1)), 1)
    return [
        {"id": row["id"], "input_ids": x, "labels": [IGNORE] * start + x[start:], "writer": "student"}
        for row, x in zip(rows, ids.tolist(), strict=True)
    ]


def doubled(sampler, rows):
    return [*rows, *sampled(sampler, rows)]


WRITTEN = {  # as the presets, but for who writes
    "minillm": dataclasses.replace(METHODS["minillm"], responses=sampled, teacher_share=0.0),
    "distillm2": dataclasses.replace(METHODS["distillm2"], responses=doubled, generate="step"),
}


def trainer(tmp_path, method, **options):
    return OKDTrainer(
        tiny.llama(),
        tiny.llama(seed=1, layers=3, hidden=48),
        tiny.config(tmp_path, method=WRITTEN.get(method, method), **{"max_steps": -1, **options}),
        train_dataset=tiny.examples(),
        eval_dataset=tiny.examples(8, seed=9),
        processing_class=tiny.tokenizer(),
    )


METRIC = {"taid": "target_t", "rlkd": "rank_loss", "mixkd": "mixed_share", "distillm2": "forward_kl"}


@pytest.mark.parametrize("method", METRIC)
def test_every_method_learns(method, tmp_path):
    # the cross-entropy of mixkd draws to the labels, not to the teacher
    run = trainer(tmp_path, method, max_steps=30, **({"student_ce_weight": 0.0} if method == "mixkd" else {}))
    before = run.evaluate()["eval_forward_kl"]
    run.train()
    assert run.evaluate()["eval_forward_kl"] < 0.7 * before
    logged = [entry for entry in run.state.log_history if "student_loss" in entry]
    assert len(logged) == 30 and all(math.isfinite(entry[METRIC[method]]) for entry in logged)
    if method == "rlkd":
        assert sum(entry["rank_loss"] for entry in logged[-5:]) < 0.8 * sum(entry["rank_loss"] for entry in logged[:5])
    if method == "taid":  # t of a step is what the losses before it came to
        shares = [entry["target_t"] for entry in logged]
        lines = [0.4 + 0.6 * step / 30 for step in range(30)]
        assert shares[:2] == pytest.approx([0.4, 0.4]) and shares[1:] == sorted(shares[1:])
        assert all(line - 1e-6 <= share <= line + 0.02 for share, line in zip(shares[2:], lines[2:], strict=True))


@pytest.mark.slow
def test_minillm_makes_the_students_own_responses_likelier_to_the_teacher(tmp_path):
    """log q(y) - log p(y) of sampled responses, per token: an estimate of KL(q || p) over responses."""
    run = trainer(tmp_path, "minillm", max_steps=100)

    def distance():
        torch.manual_seed(3)
        rows = [row for _ in range(8) for row in sampled(run.sampler, run.eval_dataset)]
        with torch.no_grad():
            metrics = run.pair(batch(rows), loss=divergence).metrics
        return (metrics["teacher_nll"] - metrics["student_nll"]).mean().item()

    before = distance()
    run.train()
    assert distance() < 0.75 * before
    assert all(math.isfinite(entry["return"]) for entry in run.state.log_history if "student_loss" in entry)


@pytest.mark.parametrize("method", ["taid", "mixkd"])
def test_resume_equals_not_stopping(method, tmp_path):
    """What TAID remembers, and the pairs and shares of MixKD: bit for bit, with the teacher online."""
    options = {"max_steps": 6, "online_teacher": True}
    whole = trainer(tmp_path / "whole", method, **options)
    whole.train()
    trainer(tmp_path / "parts", method, save_strategy="steps", save_steps=3, **options).train()
    torch.manual_seed(99)
    again = trainer(tmp_path / "parts", method, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    tiny.assert_same_weights(again.pair, whole.pair)
    if method == "taid":
        assert again.pair.loss.state == whole.pair.loss.state


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "minillm", "student_divergence": "jsd"}, "no student_divergence with method minillm.*got jsd"),
        ({"method": "distillm2", "student_divergence": "tvd"}, "no student_divergence with method distillm2.*got tvd"),
        ({"method": "mixkd", "per_device_train_batch_size": 1}, "at least 2 rows.*to mix; got 1"),
        ({"mixup_alpha": 0.0}, "mixup_alpha to be above 0, and finite; got 0.0"),
        ({"mixup_ce_weight": -1.0}, "mixup_ce_weight to be at least 0, and finite; got -1.0"),
        ({"mixup_weight": math.inf}, "mixup_weight to be at least 0, and finite; got inf"),
        ({"method": "forward_kd", "mixup_weight": 2.0}, "options that method forward_kd reads; got mixup_weight=2.0"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        OKDConfig(**options)
