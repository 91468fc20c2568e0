"""The DistillationTrainer of docs/how-to/trl.md, run from there: TRL's own loss is what its must equal."""

import copy
import json

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import Cohere2Config, Cohere2ForCausalLM, Gemma2Config, Gemma2ForCausalLM

trl = pytest.importorskip("trl", reason="pip install okd-kernels[bench]")

from benchmarks.trl_trainer import LOSSES, block, fused, run_job, summarise  # noqa: E402

PROMPTS = [{"prompt": e["prompt"]} for e in tiny.examples(16)]
BETAS = (0.0, 0.3, 0.5, 1.0)
FIGURES = ("loss", "norm", "entropy")
SIZES = {
    "vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": tiny.EOS, "pad_token_id": tiny.EOS,
}  # fmt: skip


def trainer(kind, tmp_path, student, teacher, **options):
    defaults = {
        "max_completion_length": 8, "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 0.1,
        "optim": "sgd", "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False,
        "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    args = trl.DistillationConfig(str(tmp_path), **{**defaults, **options})
    data, tokenizer = Dataset.from_list(PROMPTS), tiny.tokenizer()
    return kind(copy.deepcopy(student).train(), teacher, args, data, data, processing_class=tokenizer)


def ending_early():
    """A student whose completions end at different lengths, so that they are padded."""
    student = tiny.llama(tie_word_embeddings=False)
    with torch.no_grad():
        student.lm_head.weight[tiny.EOS] += 0.3
    return student


def generated(one):
    """A micro-batch of TRL's, padded on both sides."""
    batch = one._generate_and_score_completions(PROMPTS[:5])
    assert 0 < batch["completion_mask"].float().mean() < 1
    return batch


def loss_and_gradients(one, batch):
    one.model.zero_grad()
    with one.compute_loss_context_manager():
        loss = one.compute_loss(one.model, dict(batch))
    loss.backward()
    found = {name: p.grad.clone() for name, p in one.model.named_parameters()}
    return loss.detach(), found, one._metrics["train"]["entropy"].pop()


def assert_equal(pair, batch, rtol=1e-5):
    (loss, gradients, entropy), (expected, theirs, their_entropy) = (loss_and_gradients(x, batch) for x in pair)
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)
    assert entropy == pytest.approx(their_entropy, rel=rtol)
    for name, gradient in theirs.items():
        assert (gradients[name] - gradient).norm() <= 5 * rtol * gradient.norm(), name
    assert expected > 0 and any(x.any() for x in theirs.values())


@pytest.fixture
def pair(tmp_path):
    student, teacher = ending_early(), tiny.llama(seed=1, layers=3)
    return [trainer(kind, tmp_path, student, teacher) for kind in (fused(), trl.DistillationTrainer)]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_gradients_and_entropy_equal_those_of_trl(pair, temperature):
    batch = generated(pair[1])
    for beta in BETAS:
        for one in pair:
            one.beta, one.temperature = beta, temperature
        assert_equal(pair, batch)
        assert_equal(pair, batch | {"num_items_in_batch": torch.tensor(77)})


def test_under_autocast(tmp_path):
    student, teacher = ending_early(), tiny.llama(seed=1, layers=3)
    pair = [trainer(kind, tmp_path, student, teacher, bf16=True) for kind in (fused(), trl.DistillationTrainer)]
    assert_equal(pair, generated(pair[1]), rtol=2e-3)


def test_scale_and_softcap_of_the_logits(tmp_path):
    torch.manual_seed(0)
    cohere = Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.3, layer_types=["full_attention"]))
    gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0))
    for student, teacher in ((cohere, gemma), (gemma, cohere)):
        pair = [trainer(kind, tmp_path, student, teacher) for kind in (fused(), trl.DistillationTrainer)]
        batch = pair[1]._generate_and_score_completions(PROMPTS[:5])
        assert_equal(pair, batch)


def test_prompt_padding_and_tools_do_not_count(pair):
    """The mean of KL(student || teacher) from whole logits, row by row without padding, over the tokens that count."""
    ours, _ = pair
    batch = generated(ours)
    mask = batch["completion_mask"]
    batch["tool_mask"] = (torch.arange(mask.shape[1]) % 3 != 1).long().expand_as(mask)
    batch["num_items_in_batch"] = (mask * batch["tool_mask"]).sum()
    divergences = []
    for i in range(len(mask)):
        prompt, completion = (batch[f"{x}_ids"][i][batch[f"{x}_mask"][i].bool()] for x in ("prompt", "completion"))
        ids = torch.cat([prompt, completion]).unsqueeze(0)
        with torch.no_grad():
            z, u = (
                m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                for m in (ours.model, ours.teacher_model)
            )
        divergences.append((z.exp() * (z - u)).sum(-1)[batch["tool_mask"][i, : len(completion)].bool()])
    loss = ours.compute_loss(ours.model, dict(batch))
    assert loss.item() == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-5)
    assert_equal(pair, batch)


@pytest.mark.parametrize("counted", [0, 3])
def test_a_batch_with_few_tokens_that_count(pair, counted):
    batch = generated(pair[1])
    tool_mask = torch.zeros_like(batch["completion_mask"])
    tool_mask[:counted, 0] = 1
    batch |= {"tool_mask": tool_mask, "num_items_in_batch": torch.tensor(counted)}
    if counted:
        assert_equal(pair, batch)
    else:
        for one in pair:
            loss, gradients, entropy = loss_and_gradients(one, batch)
            assert loss == entropy == 0 and not any(x.any() for x in gradients.values())


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_run_has_the_curve_of_trl(tmp_path, beta):
    student, teacher = ending_early(), tiny.llama(seed=1)
    logs = []
    for kind in (fused(), trl.DistillationTrainer):
        one = trainer(kind, tmp_path, student, teacher, beta=beta, max_steps=3)  # which sets the seed
        one.train()
        one.evaluate()
        logs.append([{k: x[k] for k in x if k.split("_")[-1] in FIGURES} for x in one.state.log_history])
    assert len(logs[0]) == 3 + 2 and logs[0][0].keys() == {"loss", "grad_norm", "entropy"}
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_accumulation_is_exact(tmp_path):
    """Two micro-batches of completions that differ in length make the step of one batch that holds both."""
    student, teacher = ending_early(), tiny.llama(seed=1)
    models = []
    for size, micro_batches in ((8, 1), (2, 4)):
        one = trainer(
            fused(), tmp_path, student, teacher, max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=micro_batches,
        )  # fmt: skip
        one.train()
        models.append(one.model)
    for (name, start), whole, parts in zip(student.named_parameters(), *(m.parameters() for m in models), strict=True):
        assert not torch.equal(whole, start), name
        assert (whole - parts).norm() <= 1e-4 * (whole - start).norm(), name


def test_what_is_not_covered_raises(pair):
    ours, _ = pair
    batch = generated(ours)
    with pytest.raises(ValueError, match="expected text alone; got pixel_values: use trl"):
        ours.compute_loss(ours.model, batch | {"pixel_values": torch.zeros(1)})
    ours.model.lm_head.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(ValueError, match="expected the head's weight"):
        ours.compute_loss(ours.model, batch)


def test_the_run_of_the_page(tmp_path):
    options = f"{str(tmp_path)!r}, max_steps=10, max_completion_length=8, learning_rate=1e-2, use_cpu=True, bf16=False"
    options += ", gradient_checkpointing=False, report_to='none', save_strategy='no', logging_steps=1"
    source = block("FusedDistillationTrainer(\n").replace('"runs/trl"', options)
    prompts = Dataset.from_list(PROMPTS)
    names = {"student": tiny.llama(), "teacher": tiny.llama(seed=1), "prompts": prompts, "tokenizer": tiny.tokenizer()}
    names |= {"trl": trl, "FusedDistillationTrainer": fused()}
    exec(source, names)
    losses = [x["loss"] for x in names["trainer"].state.log_history if "loss" in x]
    assert losses[-1] < 0.8 * losses[0]


def test_the_benchmark_runs_both_on_the_same_completions(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tiny.save_models(tmp_path)
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(x) for x in PROMPTS))
    job = {"student": str(tmp_path / "student"), "teacher": str(tmp_path / "teacher")} | {
        "tokenizer": str(tmp_path / "teacher"), "train_file": str(tmp_path / "prompts.jsonl"), "batch_size": 2,
        "length": 16, "completion": 8, "steps": 2, "warmup": 1, "beta": 0.5, "seed": 0,
    }  # fmt: skip
    found = {loss: run_job(job | {"loss": loss}) for loss in LOSSES}
    for one in found.values():
        assert len(one["step_s"]) == 2 and len(one["loss"]) == 3 and one["peak_bytes"] > 2**20
        assert all(0 < learning < step for learning, step in zip(one["learning_s"], one["step_s"], strict=True))
    assert found["ours"]["completion_tokens"] == found["trl"]["completion_tokens"]
    assert found["ours"]["loss"] == pytest.approx(found["trl"]["loss"], rel=1e-5) and min(found["trl"]["loss"]) > 0
    summary = summarise(0.5, [found])
    assert summary["largest_relative_difference_of_losses"] < 1e-5
    with pytest.raises(ValueError, match="expected 20 prompts of at most 8 tokens"):
        run_job(job | {"loss": "trl", "steps": 9})
