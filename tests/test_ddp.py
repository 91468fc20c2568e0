"""Two ranks against one process that accumulates two batches: every preset trains to the same weights under DDP."""

import os

import datasets
import pytest
import tiny
import torch
from ranks import run_ranks

from okd import METHODS, OKDConfig, OKDTrainer

STEPS = 3
NON_REENTRANT, REENTRANT = ({"use_reentrant": reentrant} for reentrant in (False, True))
CASES = {name: {"method": name} for name in METHODS} | {
    "okd, part of the time": {"method": "okd", "online_start": 0.5},
    "okd, every other step": {"method": "okd", "online_every": 2},
    "okd, checkpoints": {"method": "okd", "gradient_checkpointing": True},
    "okd, reentrant": {"method": "okd", "gradient_checkpointing": True, "gradient_checkpointing_kwargs": REENTRANT},
    "okd, part of the time, checkpoints": {
        "method": "okd",
        "online_start": 0.5,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": NON_REENTRANT,
    },
    "okd, part of the time, reentrant": {
        "method": "okd",
        "online_start": 0.5,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": REENTRANT,
    },
    "mixkd, reentrant": {"method": "mixkd", "gradient_checkpointing": True, "gradient_checkpointing_kwargs": REENTRANT},
    "clda, reentrant": {"method": "clda", "gradient_checkpointing": True, "gradient_checkpointing_kwargs": REENTRANT},
    "forward_kd, averaged": {"method": "forward_kd", "self_teacher": "average", "average_decay": 0.5},
    "distillm2, curricula": {"method": "distillm2", "skew_curriculum": True, "lowering_start": 0.5},
    "rl_multi_teacher, dev": {"method": "rl_multi_teacher", "selection_reward": "dev", "selection_warmup": 0.0},
    "okd, student with a LoRA": {"method": "okd", "student_lora_rank": 4},
    "okd, cached": {"method": "okd", "online_layers": 0.4},
    "forward_kd, cached": {"method": "forward_kd"},
    "okd, packed": {"method": "okd", "packing": True, "max_length": 24},
    "gkd, packed": {"method": "gkd", "packing": True, "max_length": 24, "student_share": 1.0},
    "okd, streamed": {"method": "okd"},
    "okd, from disk": {"method": "okd"},
    "gkd, with labels": {"method": "gkd", "student_ce_weight": 0.5, "student_share": 1.0},
}


class Streamed(torch.utils.data.IterableDataset):
    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


def trainer(case, folder, **options):
    """A run of 2 rows a batch; the selection learns at once, and responses are short."""
    method = METHODS[CASES[case]["method"]]
    chosen = {"selection_warmup": 0.0} if method.name == "rl_multi_teacher" else {}
    if method.responses.__name__ != "dataset":
        chosen["max_new_tokens"] = 6
    if case.endswith("cached"):
        chosen["teacher_cache"] = f"{folder}/cache"  # one for all ranks
    args = OKDConfig(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "optim": "sgd",
            "learning_rate": 0.3,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            **chosen,
            **CASES[case],
            **options,
        }
    )
    teacher = None
    if method.needs_teacher and args.self_teacher is None:
        teacher = tiny.llama(seed=1, layers=3, hidden=48)
        if method.takes_several:
            teacher = {"a": teacher, "b": tiny.llama(seed=2)}
    rows, held_out = tiny.examples(), tiny.examples(8, seed=9)
    for i, example in enumerate([*rows, *held_out]):
        example["teacher"] = "ab"[i % 2]
    texts = [{"text": example["completion"]} for example in tiny.examples(7, seed=5)]
    kinds = {"okd, streamed": Streamed, "okd, from disk": datasets.Dataset.from_list}
    return OKDTrainer(
        tiny.llama(),
        teacher,
        args,
        train_dataset=kinds.get(case, list)(rows),
        eval_dataset=held_out,
        processing_class=tiny.tokenizer(),
        text_dataset=texts if method.name == "minillm" else None,
    )


def outcome(run):
    """Weights of all that trains, and the log without its rates."""
    weights = {name: p.detach().clone() for name, p in run.pair.named_parameters() if p.requires_grad}
    if run.pair.selection is not None:
        weights |= {f"selection.{name}": x.clone() for name, x in run.pair.selection.state_dict().items()}
    if run.pair.method.needs_teacher and not run.pair.teacher.judges:
        weights |= {f"teacher.{name}": p.clone() for name, p in run.pair.teacher.model.named_parameters()}
    names = ("student_loss", "teacher_loss", "forward_kl", "grad_norm", "teacher_grad_norm", "target_t")
    logs = [
        {name: entry[name] for name in names if name in entry} for entry in run.state.log_history if "loss" in entry
    ]
    return weights, logs


def of_ranks(rank, world, folder):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29512",
    }
    found = {}
    for case in CASES:
        run = trainer(case, f"{folder}/ranks, {case}")
        try:
            run.train()
            found[case] = outcome(run)
        except Exception as error:  # the other cases have results
            found[case] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return run_ranks(of_ranks, 2, folder, str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(replicas, case, tmp_path):
    for rank in replicas:
        assert not isinstance(rank[case], str), rank[case]
    run = trainer(case, tmp_path, gradient_accumulation_steps=2)
    run.train()
    weights, logs = outcome(run)
    start = {name: p for name, p in trainer(case, tmp_path / "start").pair.named_parameters() if p.requires_grad}
    assert any(not torch.equal(weights[name], start[name]) for name in start)
    (ours, log), (others, _) = (rank[case] for rank in replicas)
    for name, expected in weights.items():
        assert torch.equal(ours[name], others[name]), f"{name} differs between ranks"
        torch.testing.assert_close(ours[name], expected, rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert len(log) == len(logs) == STEPS
    for entry, expected in zip(log, logs, strict=True):
        assert entry == pytest.approx(expected, rel=1e-3, abs=1e-5)
