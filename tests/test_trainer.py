"""The training step against the definition of OKD, and everything around it that must not go wrong silently."""

import copy
import dataclasses
import json
import math
import types

import pytest
import tiny
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, TrainerCallback
from transformers.utils import logging

from okd import METHODS, OKDConfig, OKDTrainer, objectives
from okd.data import Collator
from okd.encoding import encode
from okd.evaluate import divergence_metrics
from okd.objectives import Totals
from okd.online import distance_from_base
from okd.pair import StudentTeacher
from okd.sampling import LengthOptions
from okd.sharding import launch_options
from okd.teachers import as_it_was
from okd_kernels import Objective


def config(tmp_path, **options):
    method = options.get("method", "okd")
    if LengthOptions in (METHODS[method] if isinstance(method, str) else method).option_groups:
        options = {"max_new_tokens": 8, **options}
    return tiny.config(tmp_path, **options)


def trainer(tmp_path, student=None, teacher=None, eval_dataset=None, **options):
    args = config(tmp_path, **options)
    if teacher is None and args.resolved.needs_teacher and args.self_teacher is None:
        teacher = tiny.llama(seed=1, layers=3, hidden=48)
        if args.resolved.takes_several:
            teacher = {"even": teacher, "odd": tiny.llama(seed=2)}
    datasets = {"train_dataset": tiny.examples(), "eval_dataset": eval_dataset or tiny.examples(8, seed=9)}
    if args.resolved.is_routed:
        datasets = {name: routed(examples) for name, examples in datasets.items()}
    return OKDTrainer(student or tiny.llama(), teacher, args, processing_class=tiny.tokenizer(), **datasets)


def routed(examples):
    """Each example names its teacher."""
    return [{**example, "teacher": ("even", "odd")[i % 2]} for i, example in enumerate(examples)]


def batch(n=3):
    rows = encode(tiny.examples(n), tiny.tokenizer(), max_length=32).rows
    return Collator(tiny.EOS)(rows)


def random_adapter(teacher):
    """LoRA starts at no change, where half of its gradients are zero: move it."""
    for name, parameter in teacher.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_one_step_is_eq_16_and_17(divergence, tmp_path):
    """Gradients of one step against whole logits and plain PyTorch: student, LoRA, and nothing else."""
    a = 0.3
    run = trainer(tmp_path, student_divergence=divergence, teacher_kl_weight=a)
    random_adapter(run.teacher)
    student, teacher = (copy.deepcopy(m).double() for m in (run.pair.student, run.teacher))
    inputs = batch()
    run.create_optimizer()
    run.training_step(run.model, inputs, num_items_in_batch=Totals.of([inputs]))

    feed = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    mask = inputs["labels"][:, 1:] != -100
    labels = inputs["labels"][:, 1:][mask]
    log_q = student(**feed).logits[:, :-1][mask].log_softmax(-1)
    u = teacher(**feed).logits[:, :-1][mask]
    log_p = u.log_softmax(-1)

    def kl(x, y):
        return (x.exp() * (x - y)).sum(-1).mean()

    log_m = (0.5 * (log_q.exp() + log_p.detach().exp())).log()
    student_loss = {
        "forward_kl": lambda: kl(log_p.detach(), log_q),
        "reverse_kl": lambda: kl(log_q, log_p.detach()),
        "jsd": lambda: 0.5 * kl(log_p.detach(), log_m) + 0.5 * kl(log_q, log_m),
    }[divergence]()
    teacher_loss = a * kl(log_q.detach(), log_p) + (1 - a) * nn.functional.cross_entropy(u, labels)
    (student_loss + teacher_loss).backward()

    trained = 0
    for ours, definition in ((run.pair.student, student), (run.teacher, teacher)):
        expected = dict(definition.named_parameters())
        for name, parameter in ours.named_parameters():
            truth = expected[name].grad
            if truth is None:
                assert parameter.grad is None, f"{name} must not have a gradient"
                continue
            error = (parameter.grad.double() - truth).norm() / truth.norm()
            assert error < 2e-5, f"{name}: relative error {error:.1e}"
            trained += 1
    lora = 3 * 2 * 2  # layers, q and v, A and B
    assert trained == lora + len(list(student.parameters()))
    means = run.meters.flush()
    assert means["student_loss"] == pytest.approx(student_loss.item(), rel=1e-5)
    assert means["teacher_loss"] == pytest.approx(teacher_loss.item(), rel=1e-5)


def test_only_response_rows_reach_the_heads(tmp_path, monkeypatch):
    import okd.pair as module

    seen = []
    original = module.linear_distillation_loss

    def spy(*args, **options):
        student_hidden, _, teacher_hidden, _, targets = args
        seen.append((len(student_hidden), len(teacher_hidden), targets.tolist()))
        return original(*args, **options)

    monkeypatch.setattr(module, "linear_distillation_loss", spy)
    inputs = batch()
    run = trainer(tmp_path)
    run.compute_loss(run.model, inputs, num_items_in_batch=Totals(5, 1, 3, 1))
    labels = inputs["labels"][:, 1:]
    responses = labels[labels != -100].tolist()
    assert seen == [(len(responses), len(responses), responses)]
    assert len(responses) < inputs["attention_mask"].sum()


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    """Batches of unequal token counts: a mean of means would differ."""
    weights = []
    for size, accumulation in ((4, 1), (1, 4)):
        run = trainer(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=0.0,
            warmup_steps=0,
        )
        run.train()
        weights.append({n: p.detach().clone() for n, p in run.pair.named_parameters() if p.requires_grad})
    moved = 0.0
    start = dict(tiny.llama().named_parameters())
    for name, one in weights[0].items():
        torch.testing.assert_close(one, weights[1][name], rtol=1e-4, atol=2e-6)
        if name.startswith("student."):
            moved += (one - start[name.removeprefix("student.")]).norm().item()
    assert moved > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_learns(method, tmp_path):
    run = trainer(tmp_path, method=method, max_steps={"skd": 15, "minillm": 20}.get(method, 30))
    rows = beam_answers(run.teacher) if method == "seqkd" else None  # it learns the modes of a flat teacher
    before = run.evaluate(rows)
    run.train()
    after = run.evaluate(rows)
    if METHODS[method].student.ce_weight:  # labels count here: these teachers know nothing of them
        assert after["eval_perplexity"] < 0.5 * before["eval_perplexity"]
        assert ("eval_forward_kl" in after) == (method != "sft")
        assert method != "mixkd" or after["eval_forward_kl"] < 0.9 * before["eval_forward_kl"]
    elif method == "routed":  # half of the examples have another teacher than the judge
        assert after["eval_loss"] < 0.7 * before["eval_loss"]
        assert after["eval_loss"] != after["eval_forward_kl"] > 0
    else:
        sampled = method == "minillm"  # it sees the teacher through single tokens, in part
        assert after["eval_forward_kl"] < (0.85 if sampled else 0.7) * before["eval_forward_kl"]
        assert after["eval_loss"] == after["eval_forward_kl"]


def beam_answers(teacher):
    """Rows of training prompts with the teacher's beam search, as transformers does it."""
    rows = []
    for example in tiny.examples(12):
        prompt = tiny.tokenizer()(example["prompt"], return_tensors="pt").input_ids
        written = teacher.generate(prompt, num_beams=5, do_sample=False, max_new_tokens=8, pad_token_id=0)[0].tolist()
        labels = [-100] * prompt.shape[1] + written[prompt.shape[1] :]
        rows.append({"id": example["id"], "input_ids": written, "labels": labels})
    return rows


@pytest.mark.parametrize("module", ["prefix", "p_tuning"])
def test_prompt_modules_are_the_online_module(module, tmp_path):
    """Gradients reach the prompt through PEFT's own forward, the hidden rows are the tokens', the base stays."""
    teacher = tiny.llama(seed=1, layers=3, hidden=48)
    base = copy.deepcopy(teacher)
    run = trainer(tmp_path, teacher=teacher, online_module=module, online_virtual_tokens=5, max_steps=3)
    start = {n: p.detach().clone() for n, p in run.teacher.named_parameters() if p.requires_grad}
    run.train()
    moved = [n for n, p in run.teacher.named_parameters() if n in start and not torch.equal(p, start[n])]
    assert moved and all("prompt_encoder" in n for n in start)
    inputs = batch()
    feed = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with torch.no_grad(), as_it_was(run.teacher) as judge:
        torch.testing.assert_close(judge(**feed).logits, base(**feed).logits)


def test_the_base_teacher_is_left_alone_and_the_adapter_moves(tmp_path):
    teacher = tiny.llama(seed=1, layers=3, hidden=48)
    base = copy.deepcopy(teacher)
    run = trainer(tmp_path, teacher=teacher)
    run.train()
    feed = {k: batch()[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        online = run.teacher(**feed).logits
        with as_it_was(run.teacher) as judge:
            assert torch.equal(judge(**feed).logits, base(**feed).logits)
        assert (online - base(**feed).logits).abs().max() > 1e-3


def test_log_entries(tmp_path):
    run = trainer(tmp_path, max_steps=2, online_learning_rate=3e-3, warmup_steps=0)
    run.train()
    entry = next(e for e in run.state.log_history if "student_loss" in e)
    assert entry["loss"] == pytest.approx(entry["student_loss"] + entry["teacher_loss"], rel=1e-4)
    assert 0 <= entry["top1_agreement"] <= 1 and entry["tokens_per_second"] > 0
    assert entry["online_learning_rate"] == pytest.approx(0.3 * entry["learning_rate"])
    # Before the first step the online module changes nothing: the student's loss is the KL to the base teacher.
    assert entry["forward_kl"] == pytest.approx(entry["student_loss"], rel=1e-5)
    assert entry["base_forward_kl"] == pytest.approx(_kl_to_base(run), rel=0.5)


def test_how_far_the_teacher_moved(tmp_path):
    """The logged shift and the held-out one are KL(base teacher || online teacher), from whole logits."""
    run = trainer(tmp_path, max_steps=1, online_learning_rate=3e-2, warmup_steps=0)
    fresh = run.held_out_means(run.train_dataset[:4], distance_from_base)
    assert fresh["teacher_shift"] == pytest.approx(0, abs=1e-7)
    run.train()
    entry = next(e for e in run.state.log_history if "teacher_shift" in e)
    batch = run._last_batch
    with torch.no_grad():
        online = _log_probabilities(run.teacher, batch)
        with as_it_was(run.teacher) as judge:
            base = _log_probabilities(judge, batch)
    expected = (base.exp() * (base - online)).sum(-1).mean().item()
    nll = -online.gather(1, batch["targets"].unsqueeze(1)).mean().item()
    assert expected > 1e-4
    assert entry["teacher_shift"] == pytest.approx(expected, rel=1e-3)
    assert entry["base_forward_kl"] == pytest.approx(_kl_to_base(run), rel=1e-5)
    found = run.pair(batch, loss=distance_from_base).metrics["online_teacher_nll"].mean().item()
    assert found == pytest.approx(nll, rel=1e-4)


def test_distances_from_the_base_teacher_are_at_temperature_1(tmp_path):
    """As those of an evaluation, beside which they are drawn."""
    rows = encode(tiny.examples(8, seed=9), tiny.tokenizer(), max_length=32).rows
    run = trainer(tmp_path, temperature=3.0)
    found = run.held_out_means(rows, distance_from_base)["forward_kl"]
    assert found == pytest.approx(run.evaluate()["eval_forward_kl"], rel=1e-5)


def test_a_frozen_teacher_has_no_shift(tmp_path):
    run = trainer(tmp_path, max_steps=1, method="forward_kd")
    run.train()
    assert not any("teacher_shift" in entry for entry in run.state.log_history)


def _log_probabilities(model, batch):
    """(N, V) of the tokens before a response token, from whole logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.flatten(0, 1)[batch["positions"]].double().log_softmax(-1)


def _kl_to_base(run):
    with torch.no_grad(), as_it_was(run.teacher) as judge:
        log_p, log_q = (_log_probabilities(model, run._last_batch) for model in (judge, run.pair.student))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def test_one_optimizer_two_learning_rates(tmp_path):
    run = trainer(tmp_path, online_learning_rate=3e-4, weight_decay=0.1)
    groups = run.create_optimizer().param_groups
    names = {id(p): n for n, p in run.pair.named_parameters()}
    by_side = [{names[id(p)].split(".")[0] for p in g["params"]} for g in groups]
    assert by_side == [{"student"}, {"student"}, {"teacher"}]
    assert [g["lr"] for g in groups] == [1e-2, 1e-2, 3e-4]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0, 0.0]
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in run.pair.parameters())


def test_resume_equals_not_stopping(tmp_path):
    """Student, adapter, optimizer, schedule and data order: bit for bit."""
    whole = trainer(tmp_path / "whole", max_steps=6)
    whole.train()
    first = trainer(tmp_path / "parts", max_steps=6, save_strategy="steps", save_steps=3)
    first.train()
    again = trainer(tmp_path / "parts", max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert again.state.global_step == 6
    tiny.assert_same_weights(again.pair, whole.pair)


REMEMBERING = {  # options with which a method draws, or remembers, as much as it can
    "imitkd": {"student_share": 1.0},
    "gkd": {"student_share": 1.0},
    "distillm": {"replay_size": 4, "eval_strategy": "steps", "eval_steps": 1},
    "distillm2": {"skew_curriculum": True, "lowering_start": 0.5},
    "rl_multi_teacher": {"selection_reward": "ce_kd"},
    "okd": {"online_dropout": 0.1},
}


class StopAt(TrainerCallback):
    """An interruption, after the checkpoint of the step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_resumes_bit_for_bit(tmp_path, method):
    options = {"method": method, "save_strategy": "steps", "save_steps": 2, **REMEMBERING.get(method, {})}

    def start(folder):
        run = trainer(tmp_path / folder, **options)
        if method == "distillm":  # else the student would write no sooner than the held-out loss rises
            run.sampler.state |= {"phi": 1.0, "reference": 1e9}
        return run

    whole = start("whole")
    whole.train()
    first = start("parts")
    first.add_callback(StopAt(2))
    first.train()
    assert first.state.global_step == 2
    again = trainer(tmp_path / "parts", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert again.state.global_step == 4
    tiny.assert_same_weights(again.pair, whole.pair)
    assert again.sampler.state == whole.sampler.state
    assert getattr(again.pair.loss, "state", None) == getattr(whole.pair.loss, "state", None)
    moved = dict(first.pair.student.named_parameters())
    assert not all(torch.equal(p, moved[name]) for name, p in again.pair.student.named_parameters())
    assert _entries(again, after=2) == _entries(whole, after=2)


def _entries(run, after):
    """What was logged after a step, but for times."""
    timed = ("tokens_per_second", "generated_tokens_per_second", "generating_share")
    entries = [entry for entry in run.state.log_history if entry["step"] > after and "train_loss" not in entry]
    return [{name: value for name, value in entry.items() if name not in timed} for entry in entries]


def test_a_self_teacher_resumes_bit_for_bit(tmp_path):
    options = {"method": "forward_kd", "self_teacher": "average", "average_decay": 0.5, "student_ce_weight": 1.0}
    whole = trainer(tmp_path, **options, save_strategy="steps", save_steps=2)
    whole.train()
    again = trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    tiny.assert_same_weights(again.pair, whole.pair)
    assert not torch.equal(again.teacher.model.norm.weight, tiny.llama().model.norm.weight)


def test_log_file_has_each_entry_once(tmp_path):
    """From the first step, and after a resume what the interrupted run wrote beyond its checkpoint is replaced."""

    def lines():
        return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    first = trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=3)
    first.train()
    assert lines() == first.state.log_history
    assert [entry["step"] for entry in lines()] == [1, 2, 3, 4, 5, 5]  # the last one is Trainer's summary
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"loss": 1.')  # what a killed run leaves
    again = trainer(tmp_path, max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert lines() == again.state.log_history
    assert [entry["step"] for entry in lines()] == [1, 2, 3, 4, 5, 6, 6]
    assert lines()[:3] == first.state.log_history[:3]
    anew = trainer(tmp_path, max_steps=1)
    anew.train()
    assert lines() == anew.state.log_history and len(lines()) == 2


def test_a_line_for_each_log_entry_where_there_is_no_bar(tmp_path, capsys):
    run = trainer(tmp_path, method="forward_kd", max_steps=3, eval_strategy="steps", eval_steps=3)
    run.train()
    expected = [
        f"step {e['step']} of 3  student {e['student_loss']:.3f}  KL {e['base_forward_kl']:.3f}  "
        f"tok/s {e['tokens_per_second']:.0f}"
        for e in run.state.log_history
        if "student_loss" in e
    ]
    (evaluation,) = [e for e in run.state.log_history if "eval_loss" in e]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(expected) == 3
    assert lines == [*expected, f"step 3 of 3  held-out loss {evaluation['eval_loss']:.3f}"]


def test_a_large_gradient_of_the_teacher_does_not_scale_the_students_step(tmp_path):
    """Each side is clipped by its own norm. LoRA starts at no change, so that its alpha scales its gradient alone."""
    found = {}
    for alpha in (1, 10_000):
        options = {"max_steps": 1, "max_grad_norm": 1.0, "optim": "sgd", "learning_rate": 0.1, "warmup_steps": 0}
        run = trainer(tmp_path, online_alpha=alpha, **options)
        start = {name: p.detach().clone() for name, p in run.pair.named_parameters() if p.requires_grad}
        run.train()
        moved = {side: 0.0 for side in ("student", "teacher")}
        for name, parameter in run.pair.named_parameters():
            if name in start:
                moved[name.split(".")[0]] += (parameter.detach().double() - start[name]).square().sum().item()
        entry = next(e for e in run.state.log_history if "grad_norm" in e)
        found[alpha] = run.pair.student, entry, {side: square**0.5 for side, square in moved.items()}
    (small, entry, step), (large, other, other_step) = found.values()
    tiny.assert_same_weights(small, large)
    assert other["teacher_grad_norm"] == pytest.approx(1e4 * entry["teacher_grad_norm"], rel=1e-4)
    assert other["grad_norm"] == entry["grad_norm"] > 1
    assert step["student"] == other_step["student"] == pytest.approx(0.1, rel=1e-4)  # lr times max_grad_norm
    assert entry["teacher_grad_norm"] < 1 < other["teacher_grad_norm"]
    assert step["teacher"] == pytest.approx(0.1 * entry["teacher_grad_norm"], rel=1e-3)
    assert other_step["teacher"] == pytest.approx(0.1, rel=1e-3)


def test_the_distance_from_a_frozen_teacher_costs_no_forward_pass(tmp_path):
    """A forward a step; where the training measures another distribution, or the teacher moves, one or two an entry."""

    def forwards(**options):
        run, count = trainer(tmp_path, max_steps=3, **options), []
        decoder = run.teacher.get_base_model().model if run.args.online else run.teacher.model
        decoder.register_forward_hook(lambda *_: count.append(None))
        run.train()
        entries = [e for e in run.state.log_history if "base_forward_kl" in e]
        assert len(entries) == 3
        return len(count), entries

    n, entries = forwards(method="forward_kd")
    assert n == 3 and all(e["base_forward_kl"] == e["forward_kl"] for e in entries)
    assert forwards(method="forward_kd", temperature=2.0)[0] == 6
    assert forwards(method="okd")[0] == 9  # the base, and what has become of it


ENCODERS = {
    "ours": None,
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8, prefix_projection=True
    ),
}


@pytest.mark.parametrize("given", ENCODERS)
def test_resume_with_an_encoder_that_peft_does_not_save(tmp_path, given):
    """PEFT saves the prompt or prefix, which a network makes; the network trains on. Also one that the user brings."""

    def run(folder, seed=0, **options):
        encoder = copy.deepcopy(ENCODERS[given])
        if encoder is None:
            return trainer(tmp_path / folder, max_steps=4, online_module="p_tuning", **options)
        teacher = tiny.llama(seed=1)
        torch.manual_seed(seed)
        return trainer(tmp_path / folder, teacher=get_peft_model(teacher, encoder, "online"), max_steps=4, **options)

    whole = run("whole")
    whole.train()
    run("parts", save_strategy="steps", save_steps=2).train()
    again = run("parts", seed=99)  # another encoder to begin with
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    tiny.assert_same_weights(again.pair, whole.pair)


def test_resume_with_an_adapter_of_another_name(tmp_path):
    def run(**options):
        torch.manual_seed(0)
        adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        teacher = get_peft_model(tiny.llama(seed=1), adapter, adapter_name="online")
        return trainer(tmp_path, teacher=teacher, max_steps=4, **options)

    whole = run(save_strategy="steps", save_steps=2)
    whole.train()
    again = run()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    tiny.assert_same_weights(again.pair, whole.pair)


def test_a_frozen_teachers_own_adapter_is_part_of_the_judge(tmp_path):
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    teacher = get_peft_model(tiny.llama(seed=1), adapter)
    online, merged = copy.deepcopy(teacher), copy.deepcopy(teacher).merge_and_unload()

    def measured(teacher, method):
        return trainer(tmp_path, teacher=teacher, method=method).evaluate()["eval_forward_kl"]

    assert measured(teacher, "forward_kd") == pytest.approx(measured(merged, "forward_kd"), rel=1e-5)
    assert measured(online, "okd") == pytest.approx(measured(tiny.llama(seed=1), "forward_kd"), rel=1e-5)


def test_dropout_of_the_teachers_base_is_off_and_of_its_lora_on(tmp_path):
    teacher = tiny.llama(seed=1, attention_dropout=0.5)
    run = trainer(tmp_path, teacher=teacher, online_dropout=0.1)
    run.pair.train()
    training = {name for name, module in run.teacher.named_modules() if module.training}
    assert training and all("lora_dropout" in name for name in training)
    run.pair.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run.pair.train()
    layers = run.teacher.get_base_model().model.layers
    assert all(layer.training and not layer.self_attn.training for layer in layers), "a layer asks its own flag"


def test_dropout_of_a_layer_that_is_checkpointed_is_off(tmp_path):
    """OPT's layers look at the flag that makes them checkpoint for their dropout, too."""
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    teacher = OPTForCausalLM(OPTConfig(vocab_size=tiny.VOCAB, max_position_embeddings=64, dropout=0.5, **sizes))
    run = trainer(tmp_path, teacher=teacher, gradient_checkpointing=True)
    run.pair.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run.pair.train()
    layer = run.teacher.get_base_model().model.decoder.layers[0]
    assert layer.training, "else it would not checkpoint"
    one, other = (run.pair.teacher_rows(batch()) for _ in range(2))
    assert torch.equal(one, other)


def test_several_gpus_in_one_process_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(OKDConfig, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 2) or 2))
    assert config(tmp_path)._n_gpu == 1


def test_a_teacher_alone_may_move(tmp_path):
    run = trainer(tmp_path, learning_rate=0.0, online_learning_rate=1e-3, max_steps=2)
    before = copy.deepcopy(run.pair.student.state_dict())
    run.train()
    assert all(torch.equal(x, before[name]) for name, x in run.pair.student.state_dict().items())
    assert [e["online_learning_rate"] for e in run.state.log_history if "student_loss" in e] == [1e-3, 1e-3]


def test_saves_student_and_adapter_without_pickles(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "out"))
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert not [f for f in files if f.endswith((".bin", ".pt", ".pkl"))]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student")
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, dict(run.pair.student.named_parameters())[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "student").get_vocab() == tiny.tokenizer().get_vocab()
    from peft import PeftModel

    teacher = PeftModel.from_pretrained(tiny.llama(seed=1, layers=3, hidden=48), tmp_path / "out" / "teacher_adapter")
    feed = {k: batch()[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(teacher(**feed).logits, run.teacher(**feed).logits)


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(tmp_path):
    student = tiny.llama()
    run = trainer(tmp_path, student=student)
    with torch.no_grad():
        student.model.norm.weight[0] = math.nan
    with pytest.raises(
        FloatingPointError, match=r"step 0: expected a finite loss; got student nan.*non_finite_batch_0"
    ):
        run.train()
    saved = json.loads((tmp_path / "non_finite_batch_0.json").read_text())
    assert saved["step"] == 0 and len(saved["ids"]) == 4 and saved["ids"][0].startswith("example-")


def test_the_micro_batch_is_named_whose_loss_is_not_finite_and_nothing_moves(tmp_path):
    """Out of those of a step; by a method of one's own."""

    def loss(pair, batch, totals):
        found = objectives.divergence(pair, batch, totals)
        return found._replace(student=found.student * math.nan) if "example-3" in batch["ids"] else found

    class Weights(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.before = copy.deepcopy(run.pair.student.state_dict())

    method = dataclasses.replace(METHODS["forward_kd"], name="mine", loss=loss)
    run = trainer(tmp_path, method=method, gradient_accumulation_steps=3, max_steps=2)
    run.add_callback(weights := Weights())
    with pytest.raises(FloatingPointError, match=r"got student nan, teacher none. .*names the examples of its batch"):
        run.train()
    (path,) = tmp_path.glob("non_finite_batch_*.json")
    saved = json.loads(path.read_text())
    assert saved["step"] == run.state.global_step and len(saved["ids"]) == 4 and "example-3" in saved["ids"]
    for name, weight in run.pair.student.state_dict().items():
        assert torch.equal(weight, weights.before[name]), name


def test_a_teacher_stays_in_evaluation_mode(tmp_path):
    frozen, online = trainer(tmp_path, method="forward_kd").pair, trainer(tmp_path).pair
    for both in (frozen, online):
        assert not both.train().teacher.model.training and both.student.training


def test_online_module_on_the_last_layers_only(tmp_path):
    teacher = trainer(tmp_path, online_layers=0.34).teacher
    layers = {n.split("layers.")[1].split(".")[0] for n, p in teacher.named_parameters() if p.requires_grad}
    assert layers == {"2"}


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        run = trainer(tmp_path, max_steps=1, gradient_checkpointing=checkpointing, optim="sgd", learning_rate=0.1)
        run.train()
        gradients.append({n: p.detach().clone() for n, p in run.pair.named_parameters() if p.requires_grad})
    for name, one in gradients[0].items():
        torch.testing.assert_close(one, gradients[1][name], rtol=1e-5, atol=1e-7)


def test_objectives_of_the_presets():
    def student(**options):
        return OKDConfig(**options).resolved.student

    assert OKDConfig(method="okd", teacher_kl_weight=0.2).resolved.teacher == Objective("forward_kl", 0.2, 0.8)
    assert student(method="okd") == Objective("forward_kl")
    assert student(method="jsd", divergence_beta=0.1) == Objective("jsd", beta=0.1)
    assert student(method="okd", student_divergence="reverse_kl") == Objective("reverse_kl")
    assert student(method="skew_kd") == Objective("skew_kl", alpha=0.1)
    assert student(method="forward_kd", student_ce_weight=0.5) == Objective(ce_weight=0.5)
    online = {name for name in METHODS if OKDConfig(method=name).resolved.teacher is not None}
    assert online == {"okd", "okd_leash", "clda"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "okdd"}, "expected method to be one of okd, okd_leash, sft.*got 'okdd'"),
        ({"student_divergence": "kl"}, "expected a divergence out of"),
        ({"divergence_beta": 0.5}, "forward_kl has no beta; got divergence_beta"),
        ({"method": "jsd", "divergence_beta": 2.0}, "beta between 0 and 1"),
        ({"teacher_kl_weight": 1.5}, "teacher_kl_weight to be at least 0 and at most 1; got 1.5"),
        ({"online_module": "adapter"}, "online_module to be one of lora, prefix, p_tuning, non_salient"),
        ({"online_layers": 0}, "online_layers to be above 0 and at most 1; got 0"),
        ({"online_rank": 0}, "online_rank to be at least 1, and finite; got 0"),
        ({"temperature": 0}, "temperature to be above 0, and finite; got 0"),
        ({"method": "sft", "student_divergence": "jsd"}, "options that method sft reads; got student_divergence='jsd'"),
        ({"max_new_tokens": 9}, "options that method okd reads; got max_new_tokens=9"),
        ({"label_smoothing_factor": 0.1}, "expected neither label_smoothing_factor nor .*got 0.1 and None"),
        ({"neftune_noise_alpha": 5.0}, "expected neither .* nor neftune_noise_alpha.*got 0.0 and 5.0"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        OKDConfig(**options)


def lora(**options):
    return get_peft_model(
        tiny.llama(seed=1), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options)
    )


def test_each_set_is_evaluated_under_its_own_name(tmp_path):
    sets = {"near": tiny.examples(8, seed=9), "far": tiny.examples(6, seed=5)}
    run = trainer(
        tmp_path,
        method="forward_kd",
        eval_dataset=sets,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        metric_for_best_model="eval_far_forward_kl",
        load_best_model_at_end=True,
    )
    run.train()
    found = run.evaluate()
    for name, examples in sets.items():
        rows = encode(examples, tiny.tokenizer(), max_length=512).rows
        expected = divergence_metrics(run.pair.student, run.teacher, rows, pad_token_id=tiny.EOS, progress=False)
        for metric in ("forward_kl", "reverse_kl", "perplexity", "top1_agreement", "tokens"):
            assert found[f"eval_{name}_{metric}"] == pytest.approx(expected[metric], rel=1e-5)
        assert found[f"eval_{name}_loss"] == found[f"eval_{name}_forward_kl"]
    assert found["eval_near_forward_kl"] != found["eval_far_forward_kl"]
    assert {name.split("_")[1] for name in found if name.startswith("eval_")} == {"near", "far"}
    logged = [e for e in run.state.log_history if e["step"] == 4 and any(name.startswith("eval_") for name in e)]
    assert [set(e) & {"eval_near_loss", "eval_far_loss"} for e in logged[:2]] == [{"eval_near_loss"}, {"eval_far_loss"}]
    assert run.state.best_metric == pytest.approx(found["eval_far_forward_kl"], rel=1e-6)


def test_of_several_sets_by_name_a_method_adapts_to_the_first(tmp_path):
    sets = {"near": tiny.examples(8, seed=9), "far": tiny.examples(6, seed=5)}
    options = {"method": "distillm", "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.0}
    run = trainer(tmp_path, eval_dataset=sets, **options)
    run.train()
    rows = encode(sets["near"], tiny.tokenizer(), max_length=512).rows
    found = divergence_metrics(run.pair.student, run.teacher, rows, pad_token_id=tiny.EOS, progress=False)
    assert run.sampler.state["reference"] == pytest.approx(math.log(found["perplexity"]), rel=1e-6)
    assert run.sampler.state["phi"] == 0, (
        "neither the first set's loss has risen, nor was the second's compared with it"
    )


def test_a_perplexity_beyond_floats_is_infinite(tmp_path):
    """e^800 is none, and no OverflowError either."""
    student = tiny.llama(tie_word_embeddings=False)
    with torch.no_grad():
        student.lm_head.weight.mul_(1e5)
    rows = encode(tiny.examples(4), tiny.tokenizer(), max_length=32).rows
    found = divergence_metrics(student, tiny.llama(seed=1), rows, pad_token_id=tiny.EOS, progress=False)
    assert found["perplexity"] == math.inf and 800 < found["forward_kl"] < math.inf
    alone = divergence_metrics(student, None, rows, pad_token_id=tiny.EOS, progress=False)
    assert alone == {"perplexity": math.inf, "tokens": found["tokens"]}
    evaluated = trainer(tmp_path, student=student, method="sft").evaluate()
    assert evaluated["eval_perplexity"] == evaluated["eval_loss"] == math.inf


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
def test_refuses_functions_that_would_never_be_called(tmp_path, name):
    with pytest.raises(ValueError, match=rf"expected no {name}, as the loss and its metrics are the method's; got one"):
        OKDTrainer(
            tiny.llama(),
            tiny.llama(seed=1),
            config(tmp_path),
            train_dataset=tiny.examples(),
            processing_class=tiny.tokenizer(),
            **{name: lambda *_: {}},
        )


@pytest.mark.parametrize("method", ["okd", "forward_kd", "skd"])
def test_refuses_one_model_as_student_and_teacher(tmp_path, method):
    model = tiny.llama()
    with pytest.raises(ValueError, match=r"expected two models, .*got one as student and teacher: pass teacher=None"):
        trainer(tmp_path, student=model, teacher=model, method=method)
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    "metric, better", [(None, False), ("eval_reverse_kl", False), ("eval_perplexity", False), ("top1_agreement", True)]
)
def test_early_stopping_knows_which_way_is_better(tmp_path, metric, better):
    args = trainer(tmp_path, early_stopping_patience=2, eval_strategy="steps", metric_for_best_model=metric).args
    assert args.greater_is_better is better and args.metric_for_best_model == (metric or "loss")


def test_the_best_model_is_the_one_of_least_divergence(tmp_path):
    """Without early stopping, too."""
    assert OKDConfig(output_dir=str(tmp_path), metric_for_best_model="eval_reverse_kl").greater_is_better is False


def test_only_the_process_that_should_save_writes(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run")
    monkeypatch.setattr(OKDConfig, "should_save", False)
    run.save_model(str(tmp_path / "other"))
    assert not (tmp_path / "other" / "student").exists() and not (tmp_path / "other" / "teacher_adapter").exists()


@pytest.mark.parametrize(
    "options, version, message",
    [
        ({}, 1, "expected FSDP2; got FSDP1"),
        ({"student_lora_rank": 2, "student_save": "merged"}, 2, "to merge the student's LoRA; got sharded ones"),
        ({"method": "rl_multi_teacher"}, 2, "with method rl_multi_teacher, whose policy ascends by itself"),
        ({"alternating": True}, 0, "to learn at every step under DeepSpeed, .*; got alternating"),
        ({"online_start": 0.5}, 0, "to learn at every step under DeepSpeed, .*; got online_start"),
        ({"online_stop": 0.5}, 0, "to learn at every step under DeepSpeed, .*; got online_stop"),
        ({"online_every": 2}, 0, "to learn at every step under DeepSpeed, .*; got online_every"),
    ],
)
def test_refuses_of_divided_models(tmp_path, monkeypatch, options, version, message):
    teacher = [tiny.llama(seed=1), tiny.llama(seed=2)] if "method" in options else tiny.llama(seed=1)
    run = trainer(tmp_path, teacher=teacher, **options)
    run.is_fsdp_enabled, run.is_deepspeed_enabled = version > 0, version == 0
    plugin = types.SimpleNamespace(fsdp_version=version)
    monkeypatch.setattr(run.accelerator.state, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match=message):
        run.train()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"shard": "fsdp3"},
            "expected shard to be one of fsdp2, zero2, zero3, without fsdp or deepspeed .*got 'fsdp3'",
        ),
        ({"shard": "fsdp2", "fsdp": True}, "without fsdp or deepspeed beside it; got 'fsdp2', fsdp=True"),
    ],
)
def test_refuses_a_division(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        OKDConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_shipped_configurations_are_what_the_options_name():
    """Those that accelerate's launcher reads, for torchrun."""
    assert launch_options("fsdp2") == {"fsdp": True, "fsdp_config": {
        "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
        "fsdp_cpu_ram_efficient_loading": True, "fsdp_offload_params": False,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    }}  # fmt: skip
    for stage in (2, 3):
        found = launch_options(f"zero{stage}")["deepspeed"]
        assert found["zero_optimization"] == {"stage": stage} and found["gradient_clipping"] == "auto"


def test_refuses_to_evaluate_what_is_to_be_divided(tmp_path):
    run = trainer(tmp_path)
    run.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="expected a training that divides the models before they are evaluated"):
        run.evaluate()


def test_a_teacher_with_somebody_elses_online_module_is_refused(tmp_path):
    """PEFT puts the module into the model that was given: that is no longer the base teacher, nor can it become so."""
    teacher = tiny.llama(seed=1)
    run = trainer(tmp_path, teacher=teacher)
    message = r"expected a teacher as it was loaded, or a PEFT model; .*pass trainer.teacher, or load"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, teacher=teacher, method="forward_kd")
    with pytest.raises(ValueError, match=message), as_it_was(teacher):
        pass
    with as_it_was(run.teacher) as judge:
        assert judge is teacher


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_16_bit_weights_that_would_train(tmp_path, caplog, side):
    def run(dtype):
        models = {"student": tiny.llama(), "teacher": lora()}
        models[side] = models[side].to(dtype)
        return trainer(tmp_path, **models)

    with pytest.raises(ValueError, match=rf"expected the {side}.* in float32, since its weights train; got float16"):
        run(torch.float16)
    for dtype in (torch.bfloat16, torch.float32):
        caplog.clear()
        logging.enable_propagation()
        run(dtype)
        logging.disable_propagation()
        warned = [r for r in caplog.records if "since its weights train; got bfloat16" in r.getMessage()]
        assert len(warned) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("has", [True, False])
def test_products_that_a_cpu_has_no_instructions_for_are_warned_of(tmp_path, caplog, has, monkeypatch):
    monkeypatch.setattr("okd.checks.has_fast_gemm", lambda dtype, device: has or dtype == torch.float32)

    def warnings(**options):
        caplog.clear()
        logging.enable_propagation()
        trainer(tmp_path, **options)
        logging.disable_propagation()
        return [r.getMessage() for r in caplog.records if "no instructions" in r.getMessage()]

    assert warnings() == []
    slow = warnings(bf16=True), warnings(teacher=tiny.llama(seed=1).half(), method="forward_kd")
    if has:
        assert slow == ([], [])
    else:
        assert "for bfloat16 products" in slow[0][0] and "for float16 products" in slow[1][0]


def test_examples_that_are_cut_or_left_out_are_warned_of(tmp_path, caplog):
    examples = [*tiny.examples(4), {"id": "long", "prompt": "w3 " * 600, "completion": "w4"}]
    logging.enable_propagation()
    OKDTrainer(
        tiny.llama(), tiny.llama(seed=1), config(tmp_path), train_dataset=examples, processing_class=tiny.tokenizer()
    )
    logging.disable_propagation()
    (line,) = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert "long" in line and any(r.levelname == "WARNING" for r in caplog.records if r.getMessage() == line)


def test_refuses_a_base_teacher_that_would_train(tmp_path):
    teacher = lora()
    teacher.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 weights of the base would too, such as .*norm.weight"):
        trainer(tmp_path, teacher=teacher)


def test_refuses_an_online_teacher_that_would_not_train(tmp_path):
    with pytest.raises(
        ValueError, match="expected a teacher whose online module trains; all of its parameters are frozen"
    ):
        trainer(tmp_path, teacher=lora().requires_grad_(False))


def test_a_trainable_adapter_is_frozen_where_the_teacher_does_not_learn(tmp_path):
    run = trainer(tmp_path, teacher=lora(), method="forward_kd")
    run.train()
    assert not any(p.requires_grad for p in run.teacher.parameters())


def test_refuses_a_student_that_would_not_train(tmp_path):
    with pytest.raises(ValueError, match="expected a student with trainable parameters"):
        trainer(tmp_path, student=tiny.llama().requires_grad_(False))


def test_refuses_a_missing_teacher_or_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="expected a teacher for method okd; got None"):
        OKDTrainer(tiny.llama(), None, config(tmp_path), processing_class=tiny.tokenizer())
    with pytest.raises(ValueError, match="expected processing_class"):
        OKDTrainer(tiny.llama(), tiny.llama(), config(tmp_path))


def test_heads_of_two_sizes_say_what_to_pass(tmp_path):
    teacher = tiny.llama(seed=1, vocab=72)
    with pytest.raises(ValueError, match=r"student 64 and teacher 72.*vocab_size=len\(tokenizer\), at most 64"):
        trainer(tmp_path, teacher=teacher)
    run = trainer(tmp_path, teacher=teacher, vocab_size=64, max_steps=1)  # still without an online module
    assert math.isfinite(run.train().training_loss)


def test_rows_beyond_the_positions_of_a_model_are_warned_of(tmp_path, caplog):
    logging.enable_propagation()
    trainer(tmp_path, teacher=tiny.llama(seed=1, max_position_embeddings=7))
    logging.disable_propagation()
    (line,) = [r.getMessage() for r in caplog.records if "positions" in r.getMessage()]
    assert "rows of at most 7 tokens" in line and "pass max_length=7" in line


def test_says_once_what_trains(tmp_path, caplog):
    logging.enable_propagation()
    pair = trainer(tmp_path).pair
    logging.disable_propagation()
    (line,) = [r.getMessage() for r in caplog.records if "parameters train" in r.getMessage()]
    n = sum(p.numel() for p in pair.student.parameters())
    m = sum(p.numel() for p in pair.teacher.parameters() if p.requires_grad)
    assert f"student: {n:,} of {n:,} parameters train" in line
    assert f"teacher: {m:,} of" in line and "q_proj.lora_A" in line


def test_pair_is_one_module_with_one_forward(tmp_path):
    """What DDP needs: the loss is the module's output, computed inside its forward."""
    pair = trainer(tmp_path).pair
    assert isinstance(pair, StudentTeacher)
    loss = pair(batch())
    assert loss.total.item() == pytest.approx(loss.student.item() + loss.teacher.item())
