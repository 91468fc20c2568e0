"""The documents' code, run as it stands on tiny models: a user who copies a block must get a student that learns."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from okd import OKDTrainer
from okd.data import Collator
from okd.encoding import encode
from okd_kernels import LinearHead, linear_distillation_loss

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [b for page in PAGES for b in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)]
RUN_HERE = (
    "for batch in loader",
    "class DistillationTrainer(Trainer)",
    "class DistillationSFTTrainer",
    "class DistillationAxolotlTrainer",
    "class OnlineDistillation",
    "OKDTrainer(student, teacher, args",
    "def halves",
)
RUN_BY_TEST_TRL = ("class FusedDistillationTrainer", "trainer = FusedDistillationTrainer(")


def block(text):
    (found,) = [b for b in BLOCKS if text in b]
    return found


def rows():
    return encode(tiny.examples(), tiny.tokenizer(), max_length=32).rows


def kl(student, teacher):
    """Mean KL(teacher || student) over the response tokens, from whole logits."""
    batch = Collator(tiny.EOS)(rows())
    with torch.no_grad():
        z, u = (
            m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
            for m in (student, teacher)
        )
    z, u = z[batch["positions"]].log_softmax(-1), u[batch["positions"]].log_softmax(-1)
    return (u.exp() * (u - z)).sum(-1).mean().item()


def arguments(tmp_path):
    return {
        "output_dir": str(tmp_path),
        "max_steps": 20,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
    }


def test_every_block_is_run():
    named = [block(text) for text in (*RUN_HERE, *RUN_BY_TEST_TRL)]
    assert sorted(named) == sorted(BLOCKS)


def test_plain_loop():
    student, teacher = tiny.llama(), get_peft_model(tiny.llama(seed=1), LoraConfig(r=4))
    collated = Collator(tiny.EOS)(rows())
    batch = SimpleNamespace(**{**collated, "mask": collated["attention_mask"]})
    lora = {name: p for name, p in teacher.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([*student.parameters(), *lora.values()], lr=1e-2)
    before = kl(student, teacher)
    start = {name: p.detach().clone() for name, p in lora.items()}
    exec(
        block("for batch in loader"),
        {"student": student, "teacher": teacher, "optimizer": optimizer, "loader": [batch] * 20},
    )
    assert kl(student, teacher) < 0.5 * before
    assert not any(torch.equal(p, start[name]) for name, p in lora.items()), "the teacher learns too"


def collate(examples):
    batch = Collator(tiny.EOS)(examples)
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_trainer(tmp_path, bf16):
    namespace = {}
    exec(block("class DistillationTrainer(Trainer)"), namespace)
    student, teacher = tiny.llama(), tiny.llama(seed=1)
    before = kl(student, teacher)
    args = TrainingArguments(**arguments(tmp_path), remove_unused_columns=False, bf16=bf16)
    trainer = namespace["DistillationTrainer"](
        student, args, teacher=teacher, train_dataset=rows(), eval_dataset=rows(), data_collator=collate
    )
    seen = []
    student.get_decoder().layers[0].mlp.up_proj.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert set(seen) == {torch.bfloat16 if bf16 else torch.float32}
    assert kl(student, teacher) < 0.6 * before
    assert trainer.evaluate()["eval_loss"] < 0.6 * start


def test_transformers_trainer_without_a_response(tmp_path):
    namespace = {}
    exec(block("class DistillationTrainer(Trainer)"), namespace)
    args = TrainingArguments(**arguments(tmp_path))
    trainer = namespace["DistillationTrainer"](tiny.llama(), args, teacher=tiny.llama(seed=1))
    batch = collate(rows()[:2])
    batch["labels"].fill_(-100)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=3)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


@pytest.mark.parametrize("packing", [False, True])
def test_trl(tmp_path, packing):
    trl = pytest.importorskip("trl", reason="pip install okd-kernels[bench]")
    namespace = {}
    for name in ("class DistillationTrainer(Trainer)", "class DistillationSFTTrainer"):
        exec(block(name), namespace)
    student, teacher = tiny.llama(), tiny.llama(seed=1)
    before = kl(student, teacher)
    data = Dataset.from_list([{k: e[k] for k in ("prompt", "completion")} for e in tiny.examples()])
    args = trl.SFTConfig(**arguments(tmp_path), max_length=32, completion_only_loss=True, packing=packing)
    trainer = namespace["DistillationSFTTrainer"](student, args, train_dataset=data, processing_class=tiny.tokenizer())
    trainer.teacher = teacher.eval().requires_grad_(False)
    trainer.train()
    assert kl(student, teacher) < 0.7 * before


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="pip install okd-kernels[bench]")
    namespace = {"torch": torch}
    exec(block("class OnlineDistillation"), namespace)
    student, base = tiny.llama(), tiny.llama(seed=1)
    teacher = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    before = kl(student, teacher)
    module = namespace["OnlineDistillation"](student, teacher)
    loader = torch.utils.data.DataLoader(rows(), batch_size=8, collate_fn=Collator(tiny.EOS))
    trainer = lightning.Trainer(
        max_steps=60, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    assert kl(student, teacher) < 0.9 * before
    assert any(p.abs().max() > 0 for n, p in teacher.named_parameters() if "lora_B" in n), "the teacher learns too"


def test_trainer_from_python(tmp_path):
    source = block("OKDTrainer(student, teacher, args").replace('"runs/okd"', repr(str(tmp_path)))
    source = source.replace("learning_rate=2e-4", 'learning_rate=1e-2, use_cpu=True, save_strategy="no", max_steps=20')
    student, teacher = tiny.llama(), tiny.llama(seed=1, layers=3)
    before = kl(student, teacher)
    exec(source, {"student": student, "teacher": teacher, "examples": tiny.examples(), "tokenizer": tiny.tokenizer()})
    assert kl(student, teacher) < 0.8 * before


def test_axolotl(tmp_path, monkeypatch):
    """With transformers' trainer in place of axolotl's, which inherits it."""
    for name in ("axolotl", "axolotl.core", "axolotl.core.trainers", "axolotl.core.trainers.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.core.trainers.base"].AxolotlTrainer = Trainer
    namespace = {}
    for name in ("class DistillationTrainer(Trainer)", "class DistillationAxolotlTrainer"):
        exec(block(name), namespace)
    student, teacher = tiny.llama(), tiny.llama(seed=1)
    before = kl(student, teacher)
    args = TrainingArguments(**arguments(tmp_path), remove_unused_columns=False)
    trainer = namespace["DistillationAxolotlTrainer"](student, args, train_dataset=rows(), data_collator=collate)
    trainer.teacher = teacher.eval().requires_grad_(False)
    trainer.train()
    assert kl(student, teacher) < 0.6 * before


def test_method_of_ones_own(tmp_path):
    namespace = {}
    exec(block("def halves"), namespace)
    losses = {}
    for method in ("jsd", namespace["config"].method):
        trainer = OKDTrainer(
            tiny.llama(), tiny.llama(seed=1), tiny.config(tmp_path, method=method, max_steps=1),
            train_dataset=tiny.examples(), processing_class=tiny.tokenizer(),
        )  # fmt: skip
        losses[trainer.args.resolved.name] = trainer.train().training_loss
    assert losses["halves"] == pytest.approx(losses["jsd"] / 2, rel=1e-5)


def test_loss_call_matches_whole_logits():
    x, w, y, u = torch.randn(5, 8), torch.randn(30, 8), torch.randn(5, 6), torch.randn(30, 6)
    loss = linear_distillation_loss(x, LinearHead(w), y, LinearHead(u))
    p, log_q = (y @ u.T).softmax(-1), (x @ w.T).log_softmax(-1)
    assert loss.student.item() == pytest.approx((p * (p.log() - log_q)).sum(-1).mean().item(), rel=1e-5)
