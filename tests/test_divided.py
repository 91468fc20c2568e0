"""Models divided over two processes, from the command line: FSDP2, DeepSpeed's ZeRO-2 and ZeRO-3 against one process.

Losses to rounding, evaluations and written responses included; an interrupted run that goes on to the same student, bit
for bit; and checkpoints without the teacher's frozen base.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import gloo
import pytest
import tiny
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_ddp import STEPS, outcome, trainer

from okd import durable
from okd.cli import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # small weights are divided, too
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
KINDS = {  # options, and methods
    "fsdp2": (("--shard", "fsdp2"), ("okd", "clda")),
    "fsdp2, whole": (("--fsdp", "--fsdp-config", '{"state_dict_type": "FULL_STATE_DICT"}'), ("okd",)),
    "zero2": (("--shard", "zero2"), ("okd",)),
    "zero3": (("--deepspeed", json.dumps(ZERO3)), ("okd", "gkd")),
}
METHODS = {"okd": (), "clda": (), "gkd": ("--student-share", "1", "--max-new-tokens", "6", "--student-lora-rank", "4")}
RESUMED = ("okd", "clda")
LOSSES = ("student_loss", "teacher_loss", "forward_kl")


def arguments(folder, output, method, *options):
    return [
        "train", method, "--teacher", f"{folder}/teacher", "--student", f"{folder}/student",
        "--train-data", f"{folder}/train.jsonl", "--eval-data", f"{folder}/eval.jsonl", "--output-dir", str(output),
        "--max-steps", "4", "--save-steps", "2", "--logging-steps", "1", "--eval-strategy", "steps",
        "--eval-steps", "2",
        "--per-device-train-batch-size", "2", "--eval-answers", "4", "--eval-max-new-tokens", "6", "--learning-rate",
        "1e-2", "--max-grad-norm", "1e9", "--disable-tqdm", "true", *METHODS[method], *options,
    ]  # fmt: skip


@contextmanager
def stopped_after(step):
    """As by ctrl-c, after a step that no checkpoint holds."""
    from okd import OKDTrainer

    original = OKDTrainer.after_update

    def after_update(self):
        original(self)
        if self.state.global_step == step:
            raise KeyboardInterrupt

    OKDTrainer.after_update = after_update
    try:
        yield
    finally:
        OKDTrainer.after_update = original


def as_rank(rank, world, with_deepspeed=False):
    gloo.on_gloo(with_deepspeed)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29514", "OKD_TRACEBACK": "1"}


def work(rank, world, folder, kinds):
    as_rank(rank, world, with_deepspeed=kinds[0].startswith("zero"))
    for kind in kinds:
        options, methods = KINDS[kind]
        options = options if kind.startswith("zero") else (*options, "--use-cpu")
        for method in methods:
            whole, cut = (f"{folder}/{kind}/{method}/{name}" for name in ("whole", "cut"))
            assert main(arguments(folder, whole, method, *options)) == 0
            if method not in RESUMED:
                continue
            with stopped_after(2):  # the third step
                assert main(arguments(folder, cut, method, *options)) == 130
            assert main([*arguments(folder, cut, method, *options), "--resume"]) == 0


@pytest.fixture(scope="module", params=["fsdp2", "zero2", "zero3"])
def runs(request, tmp_path_factory):
    kind = request.param
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp(kind)
    tiny.save_inputs(folder)
    kinds = [name for name in KINDS if name.startswith(kind)]
    run_ranks(work, 2, folder, str(folder), kinds)
    for method in {method for kind in kinds for method in KINDS[kind][1]}:
        one_process(folder, folder / "one" / method, method)
    return folder, kinds


def one_process(folder, output, method):
    assert main(arguments(folder, output, method, "--use-cpu", "--gradient-accumulation-steps", "2")) == 0


def log_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def weights_of(output):
    return {
        (file.parent.name, name): x
        for file in sorted(output.glob("*/*.safetensors"))
        for name, x in load_file(file).items()
    }


def cases(runs):
    folder, kinds = runs
    for kind in kinds:
        for method in KINDS[kind][1]:
            yield folder / "one" / method, folder / kind / method


def test_losses_and_evaluations_are_those_of_one_process(runs):
    for one, divided in cases(runs):
        logs = [log_of(output) for output in (divided / "whole", one)]
        assert [entry["step"] for entry in logs[0]] == [entry["step"] for entry in logs[1]]
        for entry, expected in zip(*logs, strict=True):
            for name in (*LOSSES, "eval_forward_kl", "eval_perplexity", "acceptance_rate"):
                assert name not in expected or entry[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
        found, expected = (json.loads((output / "metrics.json").read_text()) for output in (divided / "whole", one))
        for when in ("before", "after"):
            for name in ("forward_kl", "perplexity", "rouge_l"):
                assert found[when][name] == pytest.approx(expected[when][name], rel=1e-3), (when, name)


def test_the_saved_student_is_that_of_one_process(runs):
    for one, divided in cases(runs):
        found, expected = weights_of(divided / "whole"), weights_of(one)
        assert found.keys() == expected.keys() and len(found) > 8
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=2e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_an_interrupted_run_goes_on_to_the_same_student(runs):
    for divided in (divided for _, divided in cases(runs) if divided.name in RESUMED):
        found, expected = weights_of(divided / "cut"), weights_of(divided / "whole")
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert torch.equal(found[name], x), name
        logs = [log_of(divided / name) for name in ("cut", "whole")]
        assert [e.get("student_loss") for e in logs[0]] == [e.get("student_loss") for e in logs[1]]


def names_in(checkpoint):
    """Names of the weights that a checkpoint holds, however it was divided."""
    from torch.distributed.checkpoint import FileSystemReader

    found = {name for file in checkpoint.glob("*/*.safetensors") for name in load_file(file)}
    if (checkpoint / "shards").is_dir():
        found |= set(FileSystemReader(checkpoint / "shards").read_metadata().state_dict_metadata)
    for file in checkpoint.glob("global_step*/*model_states.pt"):
        state = torch.load(file, weights_only=False)
        assert not state.get("frozen_param_fragments")
        found |= set(state["module"])
    return found


def test_checkpoints_have_no_frozen_weights_of_the_teacher(runs):
    for _, divided in cases(runs):
        names = names_in(divided / "whole" / "checkpoint-4")
        frozen = {n for n in names if "teacher" in n and "lora" not in n and "modules_to_save" not in n}
        assert len(names) > 8 and not frozen, frozen


def test_a_damaged_shard_is_named(runs, monkeypatch):
    folder, kinds = runs
    monkeypatch.setattr(durable, "ranks", lambda: 2)
    for kind in kinds:
        checkpoint = folder / kind / "okd" / "whole" / "checkpoint-4"
        durable.check_checkpoint(checkpoint)
        shard = max(
            (p for p in checkpoint.rglob("*") if p.suffix in (".distcp", ".pt")), key=lambda p: p.stat().st_size
        )
        good = shard.read_bytes()
        shard.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
        message = f"{shard.name}: expected the bytes that were saved, .* goes on from checkpoint-2"
        with pytest.raises(ValueError, match=message):
            durable.check_checkpoint(checkpoint)
        shard.write_bytes(good)


# --- methods, and policies that write


CHOSEN = [  # of the presets, and of what else test_ddp.py trains, those that run other layers, or in another order
    "okd", "mixkd", "minillm", "distillm2", "seqkd", "gkd", "skd", "clda", "gated_ensemble", "routed",
    "okd, part of the time", "okd, checkpoints", "forward_kd, averaged", "gkd, packed", "okd, cached",
    "forward_kd, cached",
]  # fmt: skip


def methods_work(rank, world, folder):
    as_rank(rank, world)
    found = {}
    for case in CHOSEN:
        run = trainer(case, f"{folder}/ranks, {case}", shard="fsdp2")
        run.train()
        found[case] = [{k: v for k, v in e.items() if k in (*LOSSES, "target_t")} for e in run.state.log_history]
    return found


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    return run_ranks(methods_work, 2, folder, str(folder))


@pytest.mark.parametrize("case", CHOSEN)
def test_methods_with_fsdp2(methods, case, tmp_path):
    run = trainer(case, tmp_path, gradient_accumulation_steps=2)
    run.train()
    _, logs = outcome(run)
    entries = [entry for entry in methods[0][case] if "student_loss" in entry]
    assert len(entries) == len(logs) == STEPS
    for entry, expected in zip(entries, logs, strict=True):
        for name in ("student_loss", "teacher_loss", "forward_kl", "target_t"):
            assert name not in expected or entry[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


# --- the launchers

LAUNCHERS = {
    "torchrun": ("torch.distributed.run --nproc-per-node 2", ("--shard", "fsdp2")),
    "accelerate": (
        "accelerate.commands.launch --num_processes 2 --mixed_precision no --config_file okd/launch/fsdp2.yaml", (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launched(launcher, tmp_path):
    """Where the first process loads and sends the others their parts: a tied student stays one."""
    tiny.save_inputs(tmp_path)
    one_process(tmp_path, tmp_path / "one", "okd")
    command, options = LAUNCHERS[launcher]
    command = [sys.executable, "-m", *command.split(), "-m", "gloo", "okd.cli"]
    full = [*command, *arguments(tmp_path, tmp_path / "run", "okd", *options, "--use-cpu")]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    env = {k: v for k, v in env.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")}
    result = subprocess.run(full, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    expected, found = (weights_of(tmp_path / name) for name in ("one", "run"))
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=2e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
