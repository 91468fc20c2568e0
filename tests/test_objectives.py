"""Each loss of a batch against its definition: whole logits, loops and plain autograd, in fp64."""

import itertools
import math

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import okd.objectives as objectives
import okd_kernels
from okd import OKDConfig, OKDTrainer
from okd.answers import prompt_and_reference
from okd.data import IGNORE, Collator
from okd.objectives import LOSSES as ALL_LOSSES
from okd.pair import StudentTeacher
from okd.sampling import POLICIES
from okd.teachers import attach_online_module

LOSSES = {name: loss for name, loss in ALL_LOSSES.items() if name != "ensemble"}  # tests/test_selection.py has it
DISTILLING = [name for name in LOSSES if name != "cross_entropy"]
PRESET = {"divergence": "forward_kd", "cross_entropy": "sft"}  # the others are called after their loss
ROWS = [  # several turns, a student's row, a row of one response token
    {"input_ids": [5, 9, 7, 8, 12, 13, 4, 1], "labels": [-100, -100, 7, 8, -100, 13, 4, 1]},
    {"input_ids": [6, 3, 9, 22, 1, 4], "labels": [-100, -100, 9, 22, 1, 4], "student_written": True},
    {"input_ids": [14, 15, 16, 17, 18, 19], "labels": [-100, -100, -100, 17, 18, 19], "student_written": True},
    {"input_ids": [2, 1], "labels": [-100, 1]},
]


def batch(rows=ROWS, **changes):
    collated = Collator(tiny.EOS)([{"id": str(i), **row, **changes} for i, row in enumerate(rows)])
    return {k: v for k, v in collated.items() if k not in ("ids", "labels")}


def pair(loss, online=False, vocab=24, **options):
    """fp64; a vocabulary so small that both models' top tokens overlap; an online module that has moved already."""
    method = PRESET.get(loss, loss)
    args = OKDConfig(method=method, online_teacher=online, use_cpu=True, **options)
    student = tiny.llama(vocab=vocab, tie_word_embeddings=False)
    teacher = None if loss == "cross_entropy" else tiny.llama(seed=1, layers=3, hidden=48, vocab=vocab)
    if teacher is not None:
        teacher.requires_grad_(False)
    if online:
        teacher = attach_online_module(teacher, args)
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    both = StudentTeacher(student, teacher, args).double()
    both.progress = 0.25
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


# --- the definitions, one for each loss: (pair, batch, z, u, T) -> summed loss of the student ------------------------


def expect_divergence(both, inputs, z, u, t):
    return t**2 * kl((u / t).log_softmax(-1), (z / t).log_softmax(-1)).sum()


def expect_cross_entropy(both, inputs, z, u, t):
    return nn.functional.cross_entropy(z, inputs["targets"], reduction="sum")


def expect_taid(both, inputs, z, u, t):
    share = 0.4 + 0.6 * both.progress
    target = ((1 - share) * z.detach() + share * u) / t
    return t**2 * kl(target.log_softmax(-1), (z / t).log_softmax(-1)).sum()


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


def expect_rlkd(both, inputs, z, u, t):
    total = expect_divergence(both, inputs, z, u, t) / 2
    for ours, theirs in zip(z, u, strict=True):
        union = sorted({*ours.topk(5).indices.tolist(), *theirs.topk(5).indices.tolist()})
        a, b = isotonic_ranks(ours[union]), isotonic_ranks(theirs[union])
        total = total + 1 - torch.corrcoef(torch.stack((a, b)))[0, 1]
    return total


def expect_mixkd(both, inputs, z, u, t):
    """Row by row, without padding. The draws of partners and shares are repeated."""
    args, rows = both.args, [r for r in range(len(inputs["input_ids"]))]
    order = torch.randperm(len(rows)).tolist()
    partner = [order[order.index(i) - 1] for i in rows]
    assert all(i != j for i, j in zip(rows, partner, strict=True))
    shares = torch.distributions.Beta(args.mixup_alpha, args.mixup_alpha).sample((len(rows),)).double()
    length = inputs["input_ids"].shape[1]
    label = dict(zip(inputs["positions"].tolist(), inputs["targets"].tolist(), strict=True))
    total, mixed = expect_divergence(both, inputs, z, u, t), 0
    for i, j, share in zip(rows, partner, shares, strict=True):
        n = int(inputs["attention_mask"][[i, j]].sum(1).min())
        outputs = []
        for model in (both.student, both.teacher):
            e, other = (model.get_input_embeddings()(inputs["input_ids"][r : r + 1, :n]) for r in (i, j))
            outputs.append(model(inputs_embeds=share * e + (1 - share) * other, use_cache=False).logits[0])
        for place in range(n):
            ours, theirs = (label.get(r * length + place) for r in (i, j))
            if ours is None or theirs is None:
                continue
            mixed += 1
            z_mixed, u_mixed = outputs[0][place], outputs[1][place].detach()
            log_q = z_mixed.log_softmax(-1)
            total = total - args.mixup_ce_weight * (share * log_q[ours] + (1 - share) * log_q[theirs])
            distance = kl((u_mixed / t).log_softmax(-1), (z_mixed / t).log_softmax(-1))
            total = total + args.mixup_weight * t**2 * distance
    assert mixed >= 4, "the problem must have rows that meet"
    return total


def expect_minillm(both, inputs, z, u, t):
    log_q, log_p = z.log_softmax(-1), u.log_softmax(-1)
    total = t**2 * kl((z / t).log_softmax(-1), (u / t).log_softmax(-1)).sum()
    rewards = (log_p - log_q).gather(1, inputs["targets"].unsqueeze(1)).squeeze(1).tolist()
    rows, written = row_of(inputs).tolist(), inputs["student_written"].tolist()
    for i, row in enumerate(rows):
        future = [rewards[k] for k in range(i + 1, len(rows)) if rows[k] == row]
        if written[row] and future:
            total = total - sum(future) / len(future) * log_q[i, inputs["targets"][i]]
    return total


def expect_distillm2(both, inputs, z, u, t):
    alpha, log_q, log_p = 0.1, (z / t).log_softmax(-1), (u / t).log_softmax(-1)
    mixture = ((1 - alpha) * log_p.exp() + alpha * log_q.detach().exp()).log()
    own = inputs["student_written"][row_of(inputs)]
    return t**2 * (skew(log_p, log_q, alpha)[~own].sum() + kl(log_q, mixture)[own].sum())


def expect_teacher(both, inputs, z, u, t):
    a = both.args.teacher_kl_weight
    distance = kl((z / t).log_softmax(-1).detach(), (u / t).log_softmax(-1)).sum()
    nll = nn.functional.cross_entropy(u, inputs["targets"], reduction="none")
    if both.args.method == "distillm2":  # the student's own words are no references
        nll = nll[~inputs["student_written"][row_of(inputs)]]
    if both.args.method == "minillm":  # nor is a batch that has some of them
        nll = nll[:0]
    return a * t**2 * distance + (1 - a) * nll.sum()


def gradients(both, loss):
    parameters = {n: p for n, p in both.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values(), allow_unused=True), strict=True))


CASES = [(name, False, 1.0) for name in LOSSES] + [(name, online, 2.0) for name in DISTILLING for online in (0, 1)]


@pytest.mark.parametrize("name, online, temperature", CASES)
def test_the_loss_is_its_definition(name, online, temperature):
    """Values, and the gradient of every parameter that learns on either side, with a normalizer of more tokens."""
    options = {"mixup_ce_weight": 0.7, "mixup_weight": 0.6} if name == "mixkd" else {}
    both, inputs = pair(name, bool(online), temperature=temperature, teacher_kl_weight=0.3, **options), batch()
    torch.manual_seed(5)
    loss = both(normalizer=torch.tensor(17), **inputs)
    z = logits(both.student, inputs)
    u = None if both.teacher is None else logits(both.teacher, inputs)
    torch.manual_seed(5)
    held = None if u is None else u.detach()
    expected = globals()[f"expect_{name}"](both, inputs, z, held, temperature) / 17
    assert loss.student.item() == pytest.approx(expected.item(), rel=1e-6)
    total = expected
    if online:
        teacher = expect_teacher(both, inputs, z, u, temperature) / 17
        assert loss.teacher.item() == pytest.approx(teacher.item(), rel=1e-6)
        total = total + teacher
    else:
        assert loss.teacher is None
    ours, truth = gradients(both, loss.total), gradients(both, total)
    for parameter, gradient in truth.items():
        assert (ours[parameter] - gradient).norm() <= 2e-6 * gradient.norm(), parameter
    assert any("lora_B" in n for n in ours) == bool(online)
    for metric, values in loss.metrics.items():
        assert values.shape == inputs["targets"].shape and not values.requires_grad, metric


@pytest.mark.parametrize("method", ["minillm", "skd", "gkd", "imitkd"])
def test_an_online_teacher_learns_no_words_of_the_student_as_labels(method):
    """Nor where a row of the batch could not be rewritten, as in that of `imitkd` here."""
    changes = {} if method == "imitkd" else {"student_written": method != "skd"}  # mended drafts are marked as nobody's
    both, inputs = pair(method, online=True), batch(**changes)
    assert inputs["student_written"].unique().numel() == 1 + (method == "imitkd")
    distance = kl(*(logits(model, inputs).log_softmax(-1) for model in (both.student, both.teacher))).mean()
    assert both(**inputs).teacher.item() == pytest.approx(both.args.teacher_kl_weight * distance.item(), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_is_over_the_response_tokens_of_the_batch(name):
    both, inputs = pair(name), batch()
    values = []
    for normalizer in (None, torch.tensor(len(inputs["targets"]))):
        torch.manual_seed(5)
        values.append(both(normalizer=normalizer, **inputs).student.item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mixkd"])
def test_micro_batches_add_up_to_the_batch(name):
    both, whole = pair(name), batch()
    n = torch.tensor(len(whole["targets"]))
    parts = [both(normalizer=n, **batch(rows)).student for rows in (ROWS[:1], ROWS[1:])]
    assert sum(parts).item() == pytest.approx(both(normalizer=n, **whole).student.item(), rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["none counted", "all the student's", "none the student's"])
def test_every_parameter_that_learns_gets_a_gradient(name, kind):
    """Whatever a process's batch holds, as DDP wants it; without a response token, gradients of zero."""
    both = pair(name, online=name in DISTILLING)
    rows = [{**row, "labels": [IGNORE] * len(row["labels"])} for row in ROWS] if kind == "none counted" else ROWS
    changes = {} if kind == "none counted" else {"student_written": kind == "all the student's"}
    loss = both(**batch(rows, **changes))
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
        both(**inputs).total.backward()
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
    for both.progress in (0.0, 0.5, 1.0):
        loss = both(**inputs)
        values[both.progress] = loss.student.item()
        assert loss.metrics["target_t"].unique().item() == pytest.approx(0.4 + 0.6 * both.progress)
    assert values[0.0] < values[0.5] < values[1.0]
    whole = both(loss=LOSSES["divergence"], **inputs)
    assert values[1.0] == pytest.approx(whole.student.item(), rel=1e-12)


def test_taid_with_a_lora_on_the_head():
    both = pair("taid")
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    both.student = get_peft_model(both.student, config).double()
    inputs = batch()
    loss, z, u = both(**inputs), logits(both.student, inputs), logits(both.teacher, inputs).detach()
    expected = expect_taid(both, inputs, z, u, 1.0) / len(z)
    assert loss.student.item() == pytest.approx(expected.item(), rel=1e-9)
    ours, truth = gradients(both, loss.total), gradients(both, expected)
    assert sum("lm_head" in n for n in truth) == 2
    for parameter, gradient in truth.items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-6, atol=1e-9)


# --- MixKD -----------------------------------------------------------------------------------------------------------


def test_rows_that_meet_themselves_are_mixed_into_themselves():
    """A batch of one: L_mix is the loss of the plain row, both terms of it."""
    both, inputs = pair("mixkd", mixup_ce_weight=0.5, mixup_weight=2.0), batch(ROWS[:1])
    loss, plain = both(**inputs), both(loss=LOSSES["divergence"], **inputs)
    ce = expect_cross_entropy(both, inputs, logits(both.student, inputs), None, 1.0) / len(inputs["targets"])
    assert loss.student.item() == pytest.approx(3 * plain.student.item() + 0.5 * ce.item(), rel=1e-6)
    assert (loss.metrics["mixed_share"] == 1).all()


def test_the_students_own_divergence_is_that_of_mixed_rows_too():
    both, inputs = pair("mixkd", student_divergence="jsd", divergence_beta=0.2, student_ce_weight=0.4), batch(ROWS[:1])
    loss, plain = both(**inputs), both(loss=LOSSES["divergence"], **inputs)
    ce = expect_cross_entropy(both, inputs, logits(both.student, inputs), None, 1.0).item() / len(inputs["targets"])
    assert loss.student.item() == pytest.approx(2 * (plain.student.item() - 0.4 * ce) + 1.4 * ce, rel=1e-6)


# --- MiniLLM ---------------------------------------------------------------------------------------------------------


def test_the_students_own_tokens_are_no_references_for_the_teacher():
    """A batch that the student wrote: L_t is a KL(q || p) alone; where only some rows are its own, all of L_t."""
    for own, ce_weight in ((True, 0.0), (False, 0.7)):
        both, inputs = pair("divergence", online=True, teacher_kl_weight=0.3), batch()
        both.args.method = "gkd"
        inputs["student_written"] = torch.full_like(inputs["student_written"], own)
        loss = both(**inputs)
        expected = 0.3 * loss.metrics["reverse_kl"].mean() + ce_weight * loss.metrics["teacher_nll"].mean()
        torch.testing.assert_close(loss.teacher, expected)


@pytest.mark.parametrize("length_normalized", [False, True])
def test_minillm_is_the_gradient_of_kl_between_whole_responses(length_normalized):
    """Expected over all 3^3 responses to a prompt, each weighed by q: the sum is unbiased, the mean is not."""
    both, length, vocab = pair("minillm", vocab=3), 3, 3
    rows = [
        {"input_ids": [0, 2, *response], "labels": [IGNORE, IGNORE, *response], "student_written": True}
        for response in itertools.product(range(vocab), repeat=length)
    ]
    inputs = batch(rows)
    log_q, log_p = (
        logits(model, inputs).log_softmax(-1).gather(1, inputs["targets"].unsqueeze(1)).view(-1, length).sum(1)
        for model in (both.student, both.teacher)
    )
    assert log_q.exp().sum().item() == pytest.approx(1)
    truth = gradients(both, (log_q.exp() * (log_q - log_p.detach())).sum())
    expected = {}
    for row, weight in zip(rows, log_q.exp().tolist(), strict=True):
        loss = objectives.minillm(both, batch([row]), 1.0, length_normalized=length_normalized)
        for parameter, gradient in gradients(both, loss.student).items():
            expected[parameter] = expected.get(parameter, 0) + weight * gradient
    error = math.sqrt(sum((expected[k] - truth[k]).square().sum().item() for k in truth))
    size = math.sqrt(sum(g.square().sum().item() for g in truth.values()))
    assert error > 0.01 * size if length_normalized else error < 1e-6 * size


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
        {"id": row["id"], "input_ids": x, "labels": [IGNORE] * start + x[start:], "student_written": True}
        for row, x in zip(rows, ids.tolist(), strict=True)
    ]


def trainer(tmp_path, method, monkeypatch, **options):
    monkeypatch.setitem(POLICIES, "student", sampled)
    monkeypatch.setitem(POLICIES, "paired", lambda sampler, rows: [*rows, *sampled(sampler, rows)])
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 1e-2,
    }
    return OKDTrainer(
        tiny.llama(),
        tiny.llama(seed=1, layers=3, hidden=48),
        OKDConfig(method=method, **{**defaults, **options}),
        train_dataset=tiny.examples(),
        eval_dataset=tiny.examples(8, seed=9),
        processing_class=tiny.tokenizer(),
    )


METRIC = {"taid": "target_t", "rlkd": "rank_loss", "mixkd": "mixed_share", "distillm2": "forward_kl"}


@pytest.mark.parametrize("method", METRIC)
def test_every_method_learns(method, tmp_path, monkeypatch):
    run = trainer(tmp_path, method, monkeypatch, max_steps=30)
    before = run.evaluate()["eval_forward_kl"]
    run.train()
    assert run.evaluate()["eval_forward_kl"] < 0.7 * before
    logged = [entry for entry in run.state.log_history if "student_loss" in entry]
    assert len(logged) == 30 and all(math.isfinite(entry[METRIC[method]]) for entry in logged)
    if method == "rlkd":
        assert sum(entry["rank_loss"] for entry in logged[-5:]) < 0.8 * sum(entry["rank_loss"] for entry in logged[:5])


def test_minillm_makes_the_students_own_responses_likelier_to_the_teacher(tmp_path, monkeypatch):
    """log q(y) - log p(y) of sampled responses, per token: an estimate of KL(q || p) over responses."""
    run = trainer(tmp_path, "minillm", monkeypatch, max_steps=100)

    def distance():
        torch.manual_seed(3)
        rows = [row for _ in range(8) for row in sampled(run.sampler, run.eval_dataset)]
        with torch.no_grad():
            metrics = run.pair(loss=LOSSES["divergence"], **batch(rows)).metrics
        return (metrics["teacher_nll"] - metrics["student_nll"]).mean().item()

    before = distance()
    run.train()
    assert distance() < 0.75 * before
    assert all(math.isfinite(entry["return"]) for entry in run.state.log_history if "student_loss" in entry)


@pytest.mark.parametrize("method", ["taid", "mixkd"])
def test_resume_equals_not_stopping(method, tmp_path, monkeypatch):
    """The schedule of TAID, and the pairs and shares of MixKD: bit for bit, with the teacher online."""
    options = {"max_steps": 6, "online_teacher": True}
    whole = trainer(tmp_path / "whole", method, monkeypatch, **options)
    whole.train()
    trainer(tmp_path / "parts", method, monkeypatch, save_strategy="steps", save_steps=3, **options).train()
    torch.manual_seed(99)
    again = trainer(tmp_path / "parts", method, monkeypatch, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    tiny.assert_same_weights(again.pair, whole.pair)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "minillm", "student_divergence": "jsd"}, "no student_divergence with method minillm.*got jsd"),
        ({"method": "distillm2", "student_divergence": "tvd"}, "no student_divergence with method distillm2.*got tvd"),
        ({"method": "mixkd", "per_device_train_batch_size": 1}, "at least 2 rows.*to mix; got 1"),
        ({"mixup_alpha": 0.0}, "mixup_alpha > 0, of a Beta distribution; got 0.0"),
        ({"mixup_ce_weight": -1.0}, "mixup_ce_weight to be finite and at least 0; got -1.0"),
        ({"mixup_weight": math.inf}, "mixup_weight to be finite and at least 0; got inf"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        OKDConfig(**options)
