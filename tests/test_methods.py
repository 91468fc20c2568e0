"""Methods: one of your own, the presets by their numbers, and which options each of them reads."""

import copy
import dataclasses
import json

import pytest
import tiny
import torch
from torch import nn
from transformers import HfArgumentParser

from okd import METHODS, OKDConfig, OKDTrainer, objectives, sampling, selection
from okd.config import GROUPS
from okd.data import Collator
from okd.decoding import Draw
from okd.encoding import encode
from okd.methods import DivergenceOptions, Method, readers_of
from okd.objectives import Totals
from okd.online import LoraOptions, OnlineOptions, PromptOptions, SalienceOptions
from okd.options import check, groups_of, option, reads
from okd.sampling import LengthOptions
from okd_kernels import Objective


def trainer(directory, method, **options):
    return OKDTrainer(
        tiny.llama(),
        tiny.llama(seed=1, layers=3, hidden=48),
        tiny.config(directory, method=method, **{"max_steps": 8, **options}),
        train_dataset=tiny.examples(),
        eval_dataset=tiny.examples(8, seed=9),
        processing_class=tiny.tokenizer(),
    )


def batch(n=3):
    return Collator(tiny.EOS)(encode(tiny.examples(n), tiny.tokenizer(), max_length=32).rows)


# --- a method of one's own ---


def later_tokens_more(pair, batch, totals):
    """The divergence, token k of a response weighing k."""
    places = [k for n in batch["counts"] for k in range(1, n + 1)]
    weights = torch.tensor(places, dtype=torch.float32)
    rows = pair.student_rows(batch), pair.teacher_rows(batch)
    return pair.distil(*rows, batch["targets"], totals.tokens, token_weights=weights)


MINE = Method("mine", "later tokens weigh more", student=Objective("jsd", beta=0.3), loss=later_tokens_more)


def test_a_method_of_ones_own_is_its_definition(tmp_path):
    """Value and gradients against whole logits and plain PyTorch."""
    run, inputs = trainer(tmp_path, MINE), batch()
    student, teacher = (copy.deepcopy(m).double() for m in (run.pair.student, run.pair.teacher.model))
    found = run.compute_loss(run.model, dict(inputs), num_items_in_batch=Totals.of([inputs]))
    found.backward()

    feed = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    total, tokens = 0.0, 0
    z, u = (m(**feed).logits.log_softmax(-1) for m in (student, teacher))
    for b, labels in enumerate(inputs["labels"]):
        counted = [t for t in range(len(labels) - 1) if labels[t + 1] != -100]
        for k, t in enumerate(counted, start=1):
            log_q, log_p = z[b, t], u[b, t].detach()
            log_m = (0.7 * log_q.exp() + 0.3 * log_p.exp()).log()
            total = total + k * 0.3 * (log_p.exp() * (log_p - log_m)).sum()
            total = total + k * 0.7 * (log_q.exp() * (log_q - log_m)).sum()
        tokens += len(counted)
    (total / tokens).backward()
    assert found.item() == pytest.approx((total / tokens).item(), rel=1e-5)
    expected = dict(student.named_parameters())
    for name, parameter in run.pair.student.named_parameters():
        truth = expected[name].grad
        assert (parameter.grad.double() - truth).norm() < 2e-5 * truth.norm(), name
    assert not any(p.requires_grad or p.grad is not None for p in run.pair.teacher.parameters())


def test_a_method_of_ones_own_trains(tmp_path):
    run = trainer(tmp_path, MINE, max_steps=16)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.7 * before
    entries = [e for e in run.state.log_history if "student_loss" in e]
    assert len(entries) == 16 and entries[-1]["student_loss"] < entries[0]["student_loss"]


def test_overrides_reach_a_method_of_ones_own(tmp_path):
    """It is read like a preset: options of its divergence, and of a teacher that learns."""
    resolved = OKDConfig(method=MINE, student_divergence="skew_kl", divergence_alpha=0.2).resolved
    assert resolved.student == Objective("skew_kl", alpha=0.2) and resolved.loss is later_tokens_more
    assert OKDConfig(method=MINE, divergence_beta=0.1).resolved.student == Objective("jsd", beta=0.1)
    run = trainer(tmp_path, MINE, online_teacher=True, teacher_kl_weight=0.4, online_rank=4)
    assert run.pair.teacher.learns and run.args.resolved.teacher == Objective("forward_kl", 0.4, 0.6)
    run.train()
    assert all("teacher_loss" in e for e in run.state.log_history if "student_loss" in e)
    with pytest.raises(ValueError, match=r"options that method mine reads; got taid_start=0\.5"):
        OKDConfig(method=MINE, taid_start=0.5)


class Tempered:
    """The divergence, weighted by how its mean over the steps compares with the first step's: it remembers both."""

    def __init__(self, options):
        self.options, self.state, self.updates = options, {"first": None, "mean": None}, 0

    def __call__(self, pair, batch, totals):
        loss = objectives.divergence(pair, batch, totals)
        weight = 1.0 if self.state["first"] is None else self.state["mean"] / self.state["first"]
        return loss._replace(student=loss.student * weight)

    def after_update(self, pair, loss):
        first, mean = self.state["first"], self.state["mean"]
        self.state = {"first": loss if first is None else first, "mean": loss if mean is None else (mean + loss) / 2}
        self.updates += 1


TEMPERED = Method("tempered", "it remembers", loss=Tempered)


def test_a_loss_that_remembers_is_saved_and_resumed(tmp_path):
    whole = trainer(tmp_path / "whole", TEMPERED)
    whole.train()
    losses = [e["student_loss"] for e in whole.state.log_history if "student_loss" in e]
    assert whole.pair.loss.updates == len(losses) == 8
    mean = losses[0]
    for loss in losses[1:]:
        mean = (mean + loss) / 2
    assert whole.pair.loss.state["first"] == pytest.approx(losses[0], rel=1e-5)
    assert whole.pair.loss.state["mean"] == pytest.approx(mean, rel=1e-5)

    trainer(tmp_path / "parts", TEMPERED, save_strategy="steps", save_steps=5).train()
    saved = json.loads((tmp_path / "parts" / "checkpoint-5" / "method.json").read_text())
    assert saved["first"] == whole.pair.loss.state["first"] and saved["mean"] != whole.pair.loss.state["mean"]
    again = trainer(tmp_path / "parts", TEMPERED)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
    assert again.pair.loss.updates == 3 and again.pair.loss.state == whole.pair.loss.state
    tiny.assert_same_weights(again.pair, whole.pair)


@reads(LengthOptions)
def first_half(sampler, rows):
    """The student writes every other row."""
    written = sampler.respond(rows[::2])
    return [written[i // 2] if i % 2 == 0 else row for i, row in enumerate(rows)]


def test_a_sampling_policy_of_ones_own(tmp_path):
    method = Method("halves", "half of the rows are student-written", responses=first_half)
    run = trainer(tmp_path, method, max_new_tokens=6)
    run.train()
    shares = {e["student_written_share"] for e in run.state.log_history if "student_loss" in e}
    assert shares == {0.5}
    with pytest.raises(ValueError, match="options that method halves reads; got sampling_top_k=3"):
        OKDConfig(method=method, sampling_top_k=3)


# --- the presets ---

FIXED = {  # divergence of the student, its cross-entropy, who writes
    "okd": (Objective("forward_kl"), sampling.dataset),
    "okd_leash": (Objective("forward_kl"), sampling.dataset),
    "sft": (Objective(weight=0.0, ce_weight=1.0), sampling.dataset),
    "forward_kd": (Objective("forward_kl"), sampling.dataset),
    "reverse_kd": (Objective("reverse_kl"), sampling.dataset),
    "jsd": (Objective("jsd", beta=0.5), sampling.dataset),
    "skew_kd": (Objective("skew_kl", alpha=0.1), sampling.dataset),
    "alpha_beta_kd": (Objective("alpha_beta", alpha=0.2, beta=0.7), sampling.dataset),
    "taid": (Objective("forward_kl"), sampling.dataset),
    "rlkd": (Objective("forward_kl"), sampling.dataset),
    "mixkd": (Objective("forward_kl", ce_weight=1.0), sampling.dataset),
    "minillm": (Objective("reverse_kl"), sampling.mixture),
    "distillm2": (Objective("skew_kl", alpha=0.1), sampling.paired),
    "seqkd": (Objective(weight=0.0, ce_weight=1.0), sampling.teacher),
    "imitkd": (Objective("forward_kl"), sampling.student),
    "gkd": (Objective("jsd", beta=0.5), sampling.student),
    "skd": (Objective("forward_kl"), sampling.interleaved),
    "distillm": (Objective("skew_reverse_kl", alpha=0.1), sampling.replay),
    "clda": (Objective("forward_kl"), sampling.dataset),
    "gated_ensemble": (Objective("forward_kl", ce_weight=1.0), sampling.dataset),
    "rl_multi_teacher": (Objective("forward_kl", ce_weight=1.0), sampling.dataset),
    "routed": (Objective("forward_kl"), sampling.dataset),
}


@pytest.mark.parametrize("name", METHODS)
def test_presets_are_the_published_methods(name):
    """Their numbers, from the page of definitions."""
    config = OKDConfig(method=name)
    method = config.resolved
    assert method == METHODS[name] and method.name == name and config.method == name
    student, responses = FIXED[name]
    assert method.student == student and method.responses is responses
    online = {"okd": ("lora", False), "okd_leash": ("lora", False), "clda": ("non_salient", True)}.get(name)
    assert config.online is (online is not None)
    if online is not None:
        a = 0.7 if name == "okd_leash" else 0.1
        assert method.teacher == Objective("forward_kl", weight=a, ce_weight=round(1 - a, 9))
        assert (method.online_module, method.alternating) == online
    assert method.needs_teacher is (name != "sft")
    assert method.takes_several is (name in ("gated_ensemble", "rl_multi_teacher", "routed"))
    assert method.is_routed is (name == "routed")
    assert method.student_share == (0.5 if name in ("gkd", "imitkd") else 1.0)
    assert method.teacher_share == (0.2 if name == "minillm" else 0.0)
    assert method.draw == (Draw(0.8) if name == "distillm2" else Draw())
    assert method.generate == {"distillm2": "epoch", "seqkd": "once"}.get(name, "step")
    assert method.fixed_divergence is (name in ("minillm", "distillm2"))
    selections = {"gated_ensemble": selection.Gate, "rl_multi_teacher": selection.Policy}
    assert method.selection is selections.get(name)
    assert config.temperature == 1.0


def test_every_preset_has_its_numbers():
    assert set(FIXED) == set(METHODS)
    config = OKDConfig()
    assert config.resolved.name == "okd"
    assert (config.taid_start, config.taid_rate, config.taid_momentum) == (0.4, 5e-4, 0.99)
    assert (config.skd_gamma, config.skd_top_k, config.skd_top_p) == (5, 25, 0.5)
    assert (config.skd_student_temperature, config.skd_teacher_temperature) == (0.5, 0.2)
    assert (config.online_rank, config.online_alpha, config.online_dropout, config.online_layers) == (32, None, 0, 1)
    assert config.teacher_leash == 0.05
    assert config.replay_size == 1000 and config.num_beams == 5 and objectives.RANKED == 5
    assert (sampling.PHI_STEP, sampling.LOSS_RISE) == (0.1, 0.1)
    assert not config.skew_curriculum and config.lowering_start == 1.0 and config.length_normalized
    assert (config.mixup_ce_weight, config.mixup_weight, config.text_weight) == (1.0, 1.0, 1.0)
    assert (config.weight_decay, config.warmup_steps, str(config.lr_scheduler_type.value)) == (0.0, 0.03, "linear")


# --- options that a method reads, and those that it does not ---

OPTIONS = [(group, field) for group in GROUPS for field in dataclasses.fields(group)]
VALUES = {"student_divergence": "jsd", "divergence_alpha": 0.3, "divergence_beta": 0.3, "online_learning_rate": 1e-3}
VALUES |= {"online_target_modules": ["o_proj"], "teacher_device": "cpu", "rollout_url": "http://localhost:8000"}
VALUES |= {"teacher_tokenizer": "auto", "teacher_cache": "cache", "backward_columns": "0.5"}


def another(field):
    """A value that is allowed, and is not the default."""
    limits, default = field.metadata["help"], field.default
    if field.name in VALUES:
        return VALUES[field.name]
    if limits.choices:
        return next(choice for choice in limits.choices if choice != default)
    if "bool" in str(field.type):  # HfArgumentParser makes types of the words
        return not default
    low, high = limits.least if limits.above is None else limits.above, limits.most
    if "int" in str(field.type):
        return next(n for n in (3, 4) if n != default and (low is None or low <= n))
    return next(x for x in (0.25, 0.5) if x != default and low <= x <= high)


def refused_for_another_reason(method, name):
    """Words of the message, where a method reads the group but cannot take the value."""
    several = method.takes_several and method.student.weight > 0
    has = dataclasses.asdict(method.student)["divergence"]
    if name == "student_divergence" and method.fixed_divergence:
        return f"expected no student_divergence with method {method.name}, which has its own"
    if name == "divergence_alpha" and has not in ("skew_kl", "skew_reverse_kl", "alpha_beta"):
        return f"{has} has no alpha; got divergence_alpha: leave it out"
    if name == "divergence_beta" and has not in ("jsd", "alpha_beta"):
        return f"{has} has no beta; got divergence_beta: leave it out"
    if name.startswith("sampling_") and method.generate == "once":
        return f"expected no {name} with generate=once, which searches by beams"
    if name == "num_beams" and method.generate == "epoch":
        return "expected num_beams with generate=once; got 3 with generate=epoch, which samples"
    if name.startswith("rollout_") and name != "rollout_url":
        return f"expected rollout_url with {name}"
    if name == "teacher_tokenizer" and method.name == "skd":
        return "expected responses of the data or the student's with teacher_tokenizer; got method skd"
    if name.startswith("teacher_cache_"):
        return f"expected teacher_cache with {name}; got none"
    if name == "online_every" and method.alternating:
        return f"expected alternating or online_every; got {method.name} with both (online_every=3)"
    if name == "exact_head":
        return "expected backward_columns with exact_head; got none"
    if name == "average_decay":
        return "expected average_decay with self_teacher=average; got 0.25 without"
    if name == "online_teacher" and several:
        return f"expected online_teacher with a method that distils from one teacher; got {method.name}"
    return None


def test_options_are_those_of_the_configuration():
    names = [field.name for _, field in OPTIONS]
    assert len(names) == len(set(names)) > 40
    for group, field in OPTIONS:
        assert group.__doc__.startswith("Read "), group
        assert field.metadata["help"] and another(field) != field.default
        assert getattr(OKDConfig(), field.name) == field.default
    check(dataclasses.make_dataclass("All", [(f.name, f.type, f) for _, f in OPTIONS])())


@pytest.mark.parametrize("name", METHODS)
def test_options_that_a_method_does_not_read_are_refused(name):
    """And say which do; those that it reads are taken."""
    method, taken = METHODS[name], 0
    for group, field in OPTIONS:
        options = {"method": name, field.name: another(field)}
        reason = refused_for_another_reason(method, field.name)
        if group in method.option_groups and reason is None:
            config = OKDConfig(**options)
            assert getattr(config, field.name) == another(field)
            taken += 1
            continue
        with pytest.raises(ValueError) as error:
            OKDConfig(**options)
        message = str(error.value)
        if group in method.option_groups:
            assert reason in message
            continue
        assert message.startswith(f"expected options that method {name} reads; got {field.name}={another(field)!r} (")
        named = message.rpartition("or choose a method that does: ")[2]
        assert named == (", ".join(readers_of(group)) or "none as it stands") and name not in named.split(", ")
    assert taken > 0 or not method.option_groups


def test_which_presets_read_a_group():
    """By hand, from the table of the methods."""
    divergence = [name for name in METHODS if name not in ("sft", "seqkd")]
    one_teacher = [n for n in METHODS if n not in ("sft", "gated_ensemble", "rl_multi_teacher", "routed")]
    expected = {
        "DivergenceOptions": divergence,
        "SelfTeacherOptions": one_teacher,
        "OnlineOptions": ["okd", "okd_leash", "clda"],
        "LoraOptions": ["okd", "okd_leash"],
        "PromptOptions": [],
        "SalienceOptions": ["clda"],
        "LeashOptions": ["okd_leash"],
        "TaidOptions": ["taid"],
        "MixupOptions": ["mixkd"],
        "SelectionOptions": ["gated_ensemble", "rl_multi_teacher"],
        "PolicyOptions": ["rl_multi_teacher"],
        "LengthOptions": ["minillm", "distillm2", "seqkd", "imitkd", "gkd", "skd", "distillm"],
        "DrawOptions": ["distillm2", "seqkd", "imitkd", "gkd", "distillm"],
        "KeptOptions": ["distillm2", "seqkd"],
        "RolloutOptions": ["distillm2", "imitkd", "gkd", "distillm"],
        "ShareOptions": ["imitkd", "gkd"],
        "PolicyGradientOptions": ["minillm"],
        "MixtureOptions": ["minillm"],
        "ContrastiveOptions": ["distillm2"],
        "InterleavedOptions": ["skd"],
        "TokenizerOptions": [n for n in divergence if METHODS[n].loss is objectives.divergence],
        "ReplayOptions": ["distillm"],
        "CacheOptions": [
            *["okd", "okd_leash", "forward_kd", "reverse_kd", "jsd", "skew_kd", "alpha_beta_kd", "taid", "rlkd", "clda"]
        ],
    }
    assert {group.__name__: readers_of(group) for group in GROUPS} == expected


def test_options_of_a_module_are_read_where_it_is_chosen():
    prefix = OKDConfig(online_module="prefix", online_virtual_tokens=5)
    assert PromptOptions in prefix.resolved.option_groups and LoraOptions not in prefix.resolved.option_groups
    with pytest.raises(ValueError, match=r"method okd reads; got online_rank=4 \(read by online_module=lora\)"):
        OKDConfig(online_module="prefix", online_rank=4)
    salient = OKDConfig(method="gkd", online_teacher=True, online_module="non_salient", clda_share=0.2)
    assert {OnlineOptions, SalienceOptions} <= salient.resolved.option_groups
    assert OKDConfig(method="clda", online_module="lora", online_rank=4).resolved.alternating
    with pytest.raises(ValueError, match=r"method forward_kd reads; got online_start=0\.5"):
        OKDConfig(method="forward_kd", online_start=0.5)
    assert OKDConfig(method="forward_kd", online_teacher=True, online_start=0.5).online


# --- overrides ---


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"student_divergence": "reverse_kl"}, {"student": Objective("reverse_kl")}),
        ({"student_ce_weight": 0.5}, {"student": Objective("forward_kl", ce_weight=0.5)}),
        ({"method": "gkd", "divergence_beta": 0.1}, {"student": Objective("jsd", beta=0.1)}),
        ({"method": "gkd", "divergence_beta": 0.0}, {"student": Objective("forward_kl")}),
        ({"method": "distillm", "divergence_alpha": 0.3}, {"student": Objective("skew_reverse_kl", alpha=0.3)}),
        (
            {"method": "alpha_beta_kd", "divergence_alpha": 0.5},
            {"student": Objective("alpha_beta", alpha=0.5, beta=0.7)},
        ),
        ({"method": "gkd", "student_divergence": "skew_kl"}, {"student": Objective("skew_kl", alpha=0.1)}),
        (
            {"method": "mixkd", "student_divergence": "jsd", "divergence_beta": 0.2},
            {"student": Objective("jsd", beta=0.2, ce_weight=1.0)},
        ),
        ({"method": "sft", "student_ce_weight": 0.5}, {"student": Objective(weight=0.0, ce_weight=0.5)}),
        ({"teacher_kl_weight": 0.3}, {"teacher": Objective("forward_kl", weight=0.3, ce_weight=0.7)}),
        ({"teacher_kl_weight": 1.0}, {"teacher": Objective("forward_kl", weight=1.0, ce_weight=0.0)}),
        (
            {"method": "gkd", "online_teacher": True},
            {"teacher": Objective("forward_kl", weight=0.1, ce_weight=0.9), "online_module": "lora"},
        ),
        ({"method": "gkd", "student_share": 0.0}, {"student_share": 0.0}),
        ({"method": "imitkd", "student_share": 0.9}, {"student_share": 0.9}),
        ({"method": "minillm", "teacher_share": 0.0}, {"teacher_share": 0.0}),
        ({"method": "distillm2", "sampling_top_p": 0.9}, {"draw": Draw(0.8, 0.9, 0)}),
        ({"method": "gkd", "sampling_temperature": 0.5, "sampling_top_k": 7}, {"draw": Draw(0.5, 1.0, 7)}),
        ({"method": "distillm2", "generate": "step"}, {"generate": "step"}),
        (
            {"method": "seqkd", "generate": "epoch", "sampling_temperature": 0.7},
            {"generate": "epoch", "draw": Draw(0.7)},
        ),
        ({"method": "clda", "alternating": False}, {"alternating": False}),
        ({"alternating": True, "online_module": "p_tuning"}, {"alternating": True, "online_module": "p_tuning"}),
    ],
)
def test_overrides(options, expected):
    """What is given changes, and nothing else."""
    config = OKDConfig(**options)
    method = METHODS[options.get("method", "okd")]
    assert config.resolved == dataclasses.replace(method, **expected) != method
    assert METHODS[method.name] is method, "the preset stays"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "none"}, r"expected method to be one of okd, okd_leash, .*, or a Method; got 'none'"),
        ({"student_divergence": "kl"}, r"expected a divergence out of forward_kl, .*; got 'kl'"),
        ({"student_divergence": "jsd", "divergence_alpha": 0.1}, "jsd has no alpha; got divergence_alpha: leave it"),
        ({"method": "gkd", "divergence_beta": 1.5}, "jsd: expected beta between 0 and 1; got 1.5"),
        ({"method": "minillm", "student_divergence": "jsd"}, "expected no student_divergence with method minillm"),
        (
            {"method": "distillm2", "generate": "once"},
            "generate=once with a method whose teacher writes.*got distillm2",
        ),
        (
            {"method": "gkd", "online_teacher": True, "alternating": True, "online_module": "prefix"}
            | {"gradient_checkpointing": True},
            "expected online_module prefix without gradient_checkpointing",
        ),
        ({"method": "distillm2", "num_beams": 3}, "expected num_beams with generate=once; got 3 with generate=epoch"),
        (
            {"method": "seqkd", "num_beams": 3, "generate": "step"},
            "got 3 with generate=step, which samples: leave it out",
        ),
        (
            {"method": "seqkd", "sampling_top_k": 3},
            "expected no sampling_top_k with generate=once.*or pass generate=step",
        ),
        ({"method": "skd", "generate": "step"}, "method skd reads; got generate='step'.*distillm2, seqkd"),
        ({"method": "sft", "student_divergence": "jsd"}, "method sft reads; got student_divergence='jsd'"),
        ({"method": "sft", "self_teacher": "average"}, "method sft reads; got self_teacher='average'"),
        ({"method": "mixkd", "per_device_train_batch_size": 1}, "at least 2 rows for method mixkd to mix; got 1"),
        (
            {"method": "rlkd", "online_teacher": True, "alternating": True},
            "expected alternating with a method whose teacher learns by its divergence.*got rlkd",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OKDConfig(**options)


# --- ranges ---


@pytest.mark.parametrize(
    "name, wrong, bound",
    [
        ("temperature", (0, -1.0, float("nan"), float("inf")), "above 0, and finite"),
        ("teacher_kl_weight", (-0.1, 1.1), "at least 0 and at most 1"),
        ("online_rank", (0,), "at least 1, and finite"),
        ("online_layers", (0, 1.5), "above 0 and at most 1"),
        ("clda_share", (0,), "above 0 and at most 1"),
        ("mixup_alpha", (0,), "above 0, and finite"),
        ("mixup_weight", (-1,), "at least 0, and finite"),
        ("teacher_share", (1.0,), "at least 0 and at most 0.999"),
        ("student_ce_weight", (-1,), "at least 0, and finite"),
        ("average_decay", (1.1,), "at least 0 and at most 1"),
        ("reward_clip", (0,), "above 0, and finite"),
        ("max_length", (0,), "at least 1, and finite"),
    ],
)
def test_numbers_out_of_range_are_refused(name, wrong, bound):
    for value in wrong:
        with pytest.raises(ValueError) as error:
            OKDConfig(**{name: value})
        assert str(error.value) == f"expected {name} to be {bound}; got {value}"


@pytest.mark.parametrize(
    "name, choices",
    [
        ("online_module", "lora, prefix, p_tuning, non_salient"),
        ("generate", "step, epoch, once"),
        ("self_teacher", "average, student"),
        ("selection_reward", "ce, ce_kd, dev"),
    ],
)
def test_words_that_are_no_choice_are_refused(name, choices):
    with pytest.raises(ValueError, match=f"expected {name} to be one of {choices}; got 'other'"):
        OKDConfig(**{name: "other"})


@dataclasses.dataclass
class Options:
    """Read by nobody."""

    closed: float = option(0.5, "within", least=0, most=1)
    opened: float | None = option(None, "above", above=0)
    free: float = option(-5.0, "any")
    word: str = option("a", "one of two", choices=("a", "b"))


def test_check():
    check(Options())
    for good in ({"closed": 0}, {"closed": 1}, {"opened": 1e-9}, {"free": float("inf")}, {"word": "b"}):
        check(Options(**good))
    for bad, message in (
        ({"closed": 1.1}, "expected closed to be at least 0 and at most 1; got 1.1"),
        ({"opened": 0.0}, "expected opened to be above 0, and finite; got 0.0"),
        ({"word": "c"}, "expected word to be one of a, b; got 'c'"),
    ):
        with pytest.raises(ValueError) as error:
            check(Options(**bad))
        assert str(error.value) == message


def test_parts_declare_what_they_read():
    @reads(Options, DivergenceOptions)
    def part():
        """A part of a method."""

    assert groups_of(part, None, later_tokens_more) == {Options, DivergenceOptions}
    assert groups_of() == groups_of(nn.Linear) == frozenset()
    assert groups_of(selection.Gate, sampling.student) == selection.Gate.reads | sampling.student.reads


# --- from the command line, and into files ---


def test_parses_from_the_command_line():
    words = ["--output_dir", "x", "--method", "gkd", "--student_share", "0.25", "--max_new_tokens", "9"]
    (config,) = HfArgumentParser(OKDConfig).parse_args_into_dataclasses([*words, "--sampling_top_k", "4"])
    assert config.method == "gkd" and config.resolved.student_share == 0.25 and config.max_new_tokens == 9
    assert config.resolved.draw == Draw(1.0, 1.0, 4)
    (default,) = HfArgumentParser(OKDConfig).parse_args_into_dataclasses(["--output_dir", "x"])
    assert default.resolved == METHODS["okd"]
    with pytest.raises(ValueError, match=r"method gkd reads; got taid_start=0\.1"):
        HfArgumentParser(OKDConfig).parse_args_into_dataclasses([*words, "--taid_start", "0.1"])


@pytest.mark.parametrize("method", ["gkd", MINE, TEMPERED])
def test_a_configuration_is_written_as_json(method):
    config = OKDConfig(output_dir="x", method=method, student_ce_weight=0.5)
    name = method if isinstance(method, str) else method.name
    for found in (config.to_dict(), json.loads(config.to_json_string()), config.to_sanitized_dict()):
        assert found["method"] == name and found["student_ce_weight"] == 0.5
    assert name in repr(config)
    copied = copy.deepcopy(config)
    assert copied.resolved == config.resolved
