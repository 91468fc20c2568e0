"""The router loss of students that are mixtures of experts, against that of transformers' own forward pass."""

import json

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from okd import OKDTrainer
from okd.data import Collator
from okd.encoding import encode
from okd.objectives import Totals

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": tiny.EOS}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "eos_token_id": tiny.EOS}
EXPERTS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, router_aux_loss_coef=0.5),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16, router_aux_loss_coef=0.5),
}
ROWS = encode(tiny.examples(8), tiny.tokenizer(), max_length=32).rows


def experts(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(EXPERTS[kind]).train()


def trainer(tmp_path, student, teacher=None, **options):
    args = tiny.config(tmp_path, **{"method": "sft", **options})
    return OKDTrainer(student, teacher, args, tiny.examples(8), tiny.examples(8), processing_class=tiny.tokenizer())


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("how", ["plain", "checkpoints", "lora"])
def test_loss_and_gradients_are_those_of_the_models_own_forward_pass(tmp_path, kind, how):
    """Of two micro-batches, each with its share of the step's response tokens."""
    student = experts(kind)
    if how == "lora":
        student = get_peft_model(student, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    pair = trainer(tmp_path, student, gradient_checkpointing=how == "checkpoints").pair.train()
    if how == "checkpoints":
        pair.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batches = [Collator(tiny.EOS)(part) for part in (ROWS[:3], ROWS[3:])]
    totals = Totals.of(batches)
    losses = [pair(batch, totals) for batch in batches]
    sum(loss.total for loss in losses).backward()
    found = gradients(student)

    expected = 0
    for batch, loss in zip(batches, losses, strict=True):
        output = student(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            output_router_logits=True,
        )
        expected = expected + output.loss * sum(batch["counts"]) / totals.tokens
        assert loss.metrics["router_loss"].tolist() == pytest.approx([output.aux_loss.item()] * sum(batch["counts"]))
    assert sum(loss.total.item() for loss in losses) == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    reference = gradients(student)
    assert found.keys() == reference.keys()
    assert how == "lora" or any("gate" in name for name in found)
    for name, gradient in reference.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_coefficient(tmp_path):
    """Linear in it; 0 leaves the loss as it was, and nothing asks for router logits."""
    batch, losses = Collator(tiny.EOS)(ROWS), {}
    for coefficient in (None, 0.0, 0.5, 1.0):
        pair = trainer(tmp_path, experts("mixtral"), router_aux_loss_coef=coefficient).pair.train()
        loss = pair(batch)
        losses[coefficient] = loss.student.item()
        assert ("router_loss" in loss.metrics) == (coefficient != 0)
    assert losses[None] == losses[0.5]
    balance = losses[1.0] - losses[0.0]
    assert balance > 1 and losses[0.5] - losses[0.0] == pytest.approx(balance / 2, rel=1e-4)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef with a student .* got 0.1 with LlamaForCausalLM"):
        trainer(tmp_path, tiny.llama(), router_aux_loss_coef=0.1)
    trainer(tmp_path, tiny.llama(), router_aux_loss_coef=0.0)


def test_a_run_logs_it_and_evaluations_and_sampling_do_without(tmp_path):
    student = experts("qwen3_moe")
    asked = []
    hook = student.get_decoder().register_forward_hook(
        lambda _, args, options, output: asked.append((torch.is_grad_enabled(), output.router_logits is not None)),
        with_kwargs=True,
    )
    run = trainer(tmp_path, student, tiny.llama(seed=1), method="gkd", student_share=1.0, max_steps=2, max_new_tokens=4)
    run.train()
    run.evaluate()
    hook.remove()
    assert {seen for learns, seen in asked if learns} == {True}
    assert {seen for learns, seen in asked if not learns} == {False}
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [entry["router_loss"] for entry in entries if "router_loss" in entry]
    assert len(losses) == 2 and all(1.5 < loss < 3 for loss in losses), "2 of 4 experts: 2 where they are equally busy"


def test_checkpoints_without_a_gradient_of_the_routers_are_refused(tmp_path):
    student = experts("mixtral")
    kwargs = {"use_reentrant": True}
    run = trainer(tmp_path, student, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs, max_steps=1)
    with pytest.raises(ValueError, match=r"expected a router loss with a gradient.*use_reentrant"):
        run.train()
