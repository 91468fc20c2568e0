"""A teacher that is offloaded, or on another device than its student: the numbers are those of one in memory beside it.

On a machine with one device, the second one is `far.py`'s, in a process of its own; OKD_TEST_DEVICE=cuda has a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils import backend_registration
from transformers import AutoModelForCausalLM

import okd.models
from okd import OKDTrainer, preparing
from okd.cli import main, parse_train
from okd.data import Collator
from okd.encoding import encode
from okd.evaluate import evaluate
from okd.exposure import exposure_bias
from okd.online import attach_online_module
from okd.pair import StudentTeacher
from okd.preparing import prepare_teacher, refuse_elsewhere
from okd.teachers import Frozen

DEVICE = os.environ.get("OKD_TEST_DEVICE", "cpu")
if DEVICE == "far":
    import far
elsewhere = pytest.mark.skipif(
    DEVICE != "far" and not (DEVICE == "cuda" and torch.cuda.is_available()), reason="needs a second device"
)
near = pytest.mark.skipif(DEVICE == "far", reason="this process has the second device")
SHORT = {"max_new_tokens": 4}
METHODS = {
    "forward_kd": {},
    "mixkd": {},
    "rlkd": {},
    "minillm": SHORT,
    "skd": {**SHORT, "skd_top_k": 2},
    "distillm2": SHORT,
    "seqkd": {**SHORT, "num_beams": 2},
}
MAPS = {
    "a_layer": {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
                "model.rotary_emb": "cpu", "lm_head": "disk"},
    "all": {"": "disk"},
}  # fmt: skip


def teacher(seed=1, **options):
    return tiny.llama(seed=seed, hidden=48, tie_word_embeddings=False, attn_implementation="eager", **options)


@pytest.fixture
def offloaded(tmp_path):
    """A teacher by its map, from the disk."""

    def load(name="a_layer", seed=1):
        folder = tmp_path / f"teacher-{seed}"
        teacher(seed).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, device_map=MAPS[name], offload_folder=tmp_path / "offload", attn_implementation="eager"
        )

    return load


def trainer(folder, given, method="forward_kd", **options):
    args = tiny.config(folder, method=method, **{"max_steps": 2, **options})
    return OKDTrainer(tiny.llama(), given, args, train_dataset=tiny.examples(8), processing_class=tiny.tokenizer())


def trained(folder, given, method="forward_kd", **options):
    run = trainer(folder, given, method, **options)
    run.train()
    return run


def logged(run):
    """Losses and metrics of each step; not the times."""
    log = (entry for entry in run.state.log_history if "loss" in entry)
    return [{k: v for k, v in entry.items() if "second" not in k and "generating" not in k} for entry in log]


def assert_same_run(one, other, exact=True):
    for entry, expected in zip(logged(one), logged(other), strict=True):
        assert entry == (expected if exact else pytest.approx(expected, rel=1e-3, abs=1e-4))
    for ours, theirs in zip(one.pair.sides().values(), other.pair.sides().values(), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), **({"rtol": 0, "atol": 0} if exact else {}))


def assert_same_weights(one, other):
    for ours, theirs in zip(one.pair.sides().values(), other.pair.sides().values(), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.detach().cpu(), b.detach().cpu())


def rows():
    return encode(tiny.examples(6, seed=5), tiny.tokenizer(), max_length=64).rows


# --- offloaded


@near
@pytest.mark.parametrize("method", METHODS)
def test_an_offloaded_teacher_teaches_as_one_in_memory(method, offloaded, tmp_path):
    options = METHODS[method]
    model = offloaded("all")
    run = trained(tmp_path / "offloaded", model, method, **options)
    assert_same_run(run, trained(tmp_path / "memory", teacher(), method, **options))
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta and model.lm_head.weight.is_meta


@near
def test_a_teacher_on_disk_judges_as_one_in_memory(offloaded):
    given = (tiny.tokenizer(), rows())
    options = {"max_new_tokens": 3, "progress": False}
    found, expected = (evaluate(tiny.llama(), m, *given, **options)[0] for m in (offloaded("all"), teacher()))
    assert found == expected
    found, expected = (exposure_bias(tiny.llama(), m, *given, **options) for m in (offloaded("all"), teacher()))
    assert found == expected


@near
def test_the_head_on_disk_is_read_once(offloaded, monkeypatch):
    model, read, align = offloaded("all"), [], okd.models.align_module_device
    monkeypatch.setattr(okd.models, "align_module_device", lambda *a: read.append(a) or align(*a))
    pair = StudentTeacher(tiny.llama(), Frozen(model), tiny.config("unused", method="forward_kd"))
    for _ in range(3):
        assert torch.equal(pair.teacher_head().weight, teacher().lm_head.weight)
    assert len(read) == 1


@near
def test_several_teachers_are_each_where_they_are(offloaded, tmp_path):
    runs = [trained(tmp_path / name, [first, teacher(2)], "gated_ensemble")
            for name, first in (("offloaded", offloaded()), ("memory", teacher()))]  # fmt: skip
    assert_same_run(*runs)


@near
def test_a_lora_in_offloaded_layers_learns_as_in_memory(offloaded, tmp_path):
    args = tiny.config(tmp_path, online_rank=4)
    models = [attach_online_module(model, args) for model in (offloaded(), teacher())]
    in_memory = {name: p for name, p in models[1].named_parameters() if p.requires_grad}
    for name, p in models[0].named_parameters():
        if p.requires_grad:
            assert ("lora_B" in name) == (not p.any())  # drawn anew, as PEFT draws them
            p.data.copy_(in_memory[name])
    runs = [
        trained(tmp_path / str(i), model, "okd", online_rank=4, max_grad_norm=0.1) for i, model in enumerate(models)
    ]
    assert_same_run(*runs)
    assert all(p.any() for p in runs[0].pair.sides()["teacher"])


@near
def test_an_online_teacher_on_disk_resumes(offloaded, tmp_path):
    options = {"online_rank": 4, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trained(tmp_path / "run", offloaded(), "okd", **options)
    again = trainer(tmp_path / "run", offloaded(), "okd", **options)
    again.train(str(tmp_path / "run" / "checkpoint-2"))
    assert_same_weights(again, whole)


@near
def test_kept_responses_are_those_of_the_same_teacher_in_memory(offloaded, tmp_path):
    """The fingerprint of its weights reads them from the disk."""
    numbers = [trainer(tmp_path, model, "seqkd", **SHORT).sampler.keeper.how for model in (offloaded("all"), teacher())]
    assert numbers[0] == numbers[1]


# --- what stays, what is refused


@near
@pytest.mark.parametrize("method", ["forward_kd", "okd"])
def test_a_placed_teacher_stays(method, tmp_path):
    run = trainer(tmp_path, teacher(), method, teacher_device="cpu")
    run.pair.to("meta")
    assert {p.device.type for p in run.pair.student.parameters()} == {"meta"}
    assert {p.device.type for p in run.teacher.parameters()} == {"cpu"}
    assert {p.device.type for p in trainer(tmp_path, teacher(), method).pair.to("meta").parameters()} == {"meta"}


@near
def test_salience_wants_a_teacher_in_memory(offloaded, tmp_path):
    with pytest.raises(ValueError, match=r"expected a teacher in memory, .*; got an offloaded one: choose"):
        trainer(tmp_path, offloaded(), "clda")


@near
def test_an_online_module_is_not_offloaded(offloaded, tmp_path):
    args = tiny.config(tmp_path, online_module="p_tuning")
    with pytest.raises(ValueError, match=r"expected the online module in memory, .* such as prompt_encoder"):
        prepare_teacher(offloaded("all"), args)


@near
def test_one_place_for_a_teacher(offloaded, tmp_path):
    with pytest.raises(
        ValueError, match=r"expected a teacher in one piece to put it on cpu; got one with the device_m"
    ):
        trainer(tmp_path, offloaded(), teacher_device="cpu")


@near
@pytest.mark.parametrize(
    ("options", "got"), [({"method": "sft"}, "NoneType"), ({"self_teacher": "average"}, "Averaged")]
)
def test_a_teacher_device_wants_a_teacher(options, got, tmp_path):
    with pytest.raises(ValueError, match=f"expected a teacher of its own to put on cpu; got {got}: leave teacher_devi"):
        trainer(tmp_path, None, teacher_device="cpu", **options)


@near
@pytest.mark.parametrize("name", ["cuda:77", "nowhere"])
def test_a_device_that_this_machine_has_not(name, tmp_path):
    with pytest.raises(ValueError, match=f"expected a device of this machine, such as cpu or cuda:1; got '{name}' "):
        trainer(tmp_path, teacher(), teacher_device=name)


@near
def test_several_processes_want_the_teacher_beside_the_student(offloaded, tmp_path, monkeypatch):
    run = trainer(tmp_path, offloaded())
    monkeypatch.setattr(preparing, "ranks", lambda: 2)
    with pytest.raises(
        ValueError, match=r"expected the teacher on cpu, as its student, in a run of 2 processes; got one"
    ):
        refuse_elsewhere(run)
    refuse_elsewhere(trainer(tmp_path, teacher(), teacher_device="cpu"))


# --- from the command line


@pytest.fixture
def folder(tmp_path):
    for name, model in (("student", tiny.llama()), ("teacher", teacher())):
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.examples(12)))
    return tmp_path


@near
def test_devices_on_the_command_line(folder, capsys):
    words = ["evaluate", "--student", f"{folder}/student", "--file", f"{folder}/data.jsonl", "--answers", "0"]
    words += ["--teacher", f"{folder}/teacher"]
    assert main([*words, "--device", "cpu", "--teacher-device", "cpu"]) == 0
    encoded = encode(tiny.examples(12), tiny.tokenizer(), max_length=512)
    expected, _ = evaluate(tiny.llama(), teacher(), tiny.tokenizer(), encoded.rows, generate=0, progress=False)
    found = json.loads(capsys.readouterr().out)
    assert found.pop("rouge_l") is expected.pop("rouge_l") is None
    assert found == pytest.approx(expected, rel=1e-5)
    assert main([*words, "--teacher-device", "nowhere"]) == 2
    assert "expected a device of this machine, such as cpu or cuda:1; got 'nowhere'" in capsys.readouterr().err


@near
@pytest.mark.parametrize(("command", "last"), [("train", []), ("train", ["--dry-run"]), ("cache", [])])
@pytest.mark.parametrize("name", ["cuda:77", "nowhere"])
def test_a_run_without_its_device_ends_before_it_begins(command, last, name, tmp_path, capsys):
    """Neither models nor data are there, which it would miss next."""
    words = [command, "okd", "--teacher", f"{tmp_path}/none", "--train-data", f"{tmp_path}/none.jsonl", *last]
    words += ["--output-dir", f"{tmp_path}/run", "--teacher-device", name, "--device", "cpu"]
    words += ["--teacher-cache", f"{tmp_path}/cache"] if command == "cache" else []
    assert main(words) == 2
    assert f"expected a device of this machine, such as cpu or cuda:1; got '{name}'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@near
def test_okd_train_with_a_teacher_on_disk(folder):
    """The student, a copy of the teacher by default, is in memory."""
    kwargs = json.dumps({"device_map": {"": "disk"}, "offload_folder": str(folder / "offload")})
    words = ["train", "forward_kd", "--teacher", f"{folder}/teacher", "--train-data", f"{folder}/data.jsonl"]
    words += ["--student-layers", "0", "--max-steps", "1", "--eval-answers", "0", "--eval-share", "0.3"]
    words += ["--device", "cpu", "--disable-tqdm", "true", "--save-strategy", "no"]
    metrics = []
    for name, options in (("disk", ["--teacher-kwargs", kwargs]), ("memory", ["--teacher-device", "cpu"])):
        assert main([*words, *options, "--output-dir", f"{folder}/{name}"]) == 0
        found = json.loads((folder / name / "metrics.json").read_text())
        metrics.append((found["before"], found["after"]))
    assert metrics[0] == metrics[1]


@near
def test_okd_train_on_the_cpu(capsys):
    words = ["forward_kd", "--output-dir", "unused", "--teacher", "a", "--train-data", "b"]
    assert parse_train([*words, "--device", "cpu"])[1].use_cpu
    with pytest.raises(SystemExit):
        parse_train([*words, "--device", "cuda:1"])
    assert "expected --device cpu" in capsys.readouterr().err


# --- a second device


@near
@pytest.mark.slow
def test_a_second_device():
    """The tests below, in a process that has one."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch takes no device from Python")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(words, env=os.environ | {"OKD_TEST_DEVICE": "far"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def assert_apart(run):
    assert {p.device.type for p in run.teacher.parameters()} == {DEVICE}
    assert {p.device.type for p in run.pair.student.parameters()} == {"cpu"}


@elsewhere
@pytest.mark.parametrize("method", METHODS)
def test_elsewhere_it_teaches_the_same(method, tmp_path):
    options = METHODS[method]
    run = trained(tmp_path / "elsewhere", teacher(), method, teacher_device=DEVICE, **options)
    assert_apart(run)
    assert_same_run(run, trained(tmp_path / "beside", teacher(), method, **options), exact=False)


@elsewhere
@pytest.mark.parametrize("options", [{"online_rank": 4}, {"online_module": "prefix"}])
def test_elsewhere_it_learns(options, tmp_path):
    """Gradients go back, each side is clipped by its own norm, one optimizer has both."""
    runs = [
        trained(tmp_path / str(i), teacher(), "okd", teacher_device=device, max_grad_norm=0.1, **options)
        for i, device in enumerate((DEVICE, None))
    ]
    assert_apart(runs[0])
    assert_same_run(*runs, exact=False)
    assert all(p.cpu().any() for p in runs[0].pair.sides()["teacher"])


@elsewhere
@pytest.mark.skipif(DEVICE == "far", reason="far has no storage that could be saved")
def test_elsewhere_it_resumes(tmp_path):
    options = {"online_rank": 4, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "teacher_device": DEVICE}
    whole = trained(tmp_path, teacher(), "okd", **options)
    again = trainer(tmp_path, teacher(), "okd", **options)
    again.train(str(tmp_path / "checkpoint-2"))
    assert_same_weights(again, whole)


@elsewhere
def test_elsewhere_the_least_salient_weights_learn(tmp_path):
    runs = [
        trained(tmp_path / str(i), teacher(), "clda", teacher_device=device, clda_share=0.3)
        for i, device in enumerate((DEVICE, None))
    ]
    assert_apart(runs[0])
    assert_same_run(*runs, exact=False)


@elsewhere
def test_elsewhere_there_are_several(tmp_path):
    """The second one is moved by its owner, the first, on the CPU, by the trainer: to the student."""
    runs = [
        trained(tmp_path / str(i), [teacher(), teacher(2).to(device)], "gated_ensemble")
        for i, device in enumerate((DEVICE, "cpu"))
    ]
    devices = [next(model.parameters()).device.type for model in runs[0].pair.teacher.models]
    assert devices == ["cpu", DEVICE]
    assert_same_run(*runs, exact=False)


@elsewhere
def test_elsewhere_it_judges_the_same():
    given, options = (tiny.tokenizer(), rows()), {"max_new_tokens": 3, "progress": False}
    student, models = tiny.llama(), (teacher().to(DEVICE), teacher())
    found, expected = (evaluate(student, model, *given, **options)[0] for model in models)
    assert found == pytest.approx(expected, rel=1e-4)


@elsewhere
@pytest.mark.skipif(DEVICE != "far", reason="far.py counts what crosses")
def test_hidden_states_travel_and_the_head_once(tmp_path):
    pair = StudentTeacher(tiny.llama(), Frozen(teacher()), tiny.config(tmp_path, method="forward_kd"))
    pair.teacher.place(torch.device("far"))
    batch = Collator(tiny.EOS)(rows())
    n, head = len(batch["targets"]), tiny.VOCAB * 48
    sizes = []
    for _ in range(2):
        far.crossed.clear()
        pair(batch)
        sizes.append([size for is_back, size in far.crossed if is_back])
    assert sizes == [[head, n * 48], [n * 48]] or sizes == [[n * 48, head], [n * 48]]
    assert {size for is_back, size in far.crossed if not is_back} == {batch["input_ids"].numel(), n}
