"""What happens to long runs: kills at any moment, full disks, damaged files, other numbers of processes."""

import errno
import json
import os
import random
import resource
import signal
import socket
import sys

import pytest
import tiny
from tiny import train_arguments
from transformers import LlamaForCausalLM, TrainerCallback

from okd import OKDTrainer, durable
from okd.cli import main
from okd.durable import MANIFEST, checkpoints, is_whole, last_checkpoint

TOUCHES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")  # and what opens a file to write
SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny.save_inputs(root)
    return root


def trainer(folder, callback=None, **options):
    config = tiny.config(folder, method="sft", **{**SAVING, **options})
    examples = tiny.examples()
    return OKDTrainer(
        tiny.llama(), None, config, train_dataset=examples, eval_dataset=examples[:4],
        processing_class=tiny.tokenizer(), callbacks=[callback] if callback else None,
    )  # fmt: skip


def names(directory):
    return [path.name for path in checkpoints(directory)]


# --- kills


def killed(argv, output, at=None, after=None):
    """Whether the command is killed: before the at-th time that it touches a file under output, or the first one of a
    name; or after so many seconds."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def touched(event, details):
            nonlocal count
            writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in TOUCHES) and str(details[0]).startswith(str(output)):
                count += 1
                if at == count or str(details[0]).endswith(str(at)):
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            if at is not None:
                sys.addaudithook(touched)
            if after is not None:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, inside a write, too
                signal.setitimer(signal.ITIMER_REAL, after)
            status = main(argv)
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "refused"
    return os.WIFSIGNALED(status)


def outcome(output):
    """What a run makes that others read, without its times."""
    student = {path.name: path.read_bytes() for path in (output / "student").rglob("*.safetensors")}
    figures = json.loads((output / "metrics.json").read_text())
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    return student, figures["before"], figures["after"], losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("okd", ("--student-lora-rank", "2", "--student-layers", "0")),  # its base has no name
        ("seqkd", ("--max-new-tokens", "3", "--num-beams", "2")),  # keeps what is written
    ],
    ids=["lora", "kept"],
)
def test_killed_at_any_moment_a_run_goes_on_to_the_same_student(folder, tmp_path, method, options):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main(train_arguments(folder, whole, *options, "--max-steps", "8", method=method)) == 0
    draw = random.Random(method)
    command = train_arguments(folder, run, *options, "--max-steps", "8", method=method)
    moments = [{"at": draw.randint(1, 60)} if i % 2 else {"after": draw.uniform(0.5, 1.5)} for i in range(8)]
    moments = [{"at": 3}, *moments, {"at": "student/generation_config.json"}, {"at": ".metrics.json.part"}]
    for moment in moments:
        killed([*command, "--resume"] if run.is_dir() else command, run, **moment)
        print(moment, names(run), is_whole(checkpoints(run)[-1]) if names(run) else "")
    assert not killed([*command, "--resume"], run)
    assert outcome(run) == outcome(whole)
    assert names(run) == ["checkpoint-7", "checkpoint-8"]


def on_two_processes(argv, hurt=None):
    """Their exit statuses; `hurt` is how the second one saves its random state."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if pids[-1] == 0:
            status = 1
            try:
                signal.alarm(60)  # ends the one that waits for ever
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                if rank == 1 and hurt is not None:
                    OKDTrainer._save_rng_state = hurt
                status = main(argv)
            finally:
                os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


save_rng_state = OKDTrainer._save_rng_state


def die(self, directory):
    if self.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    save_rng_state(self, directory)


def fill(self, directory):
    if self.state.global_step == 3:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save_rng_state(self, directory)


@pytest.mark.slow
def test_where_one_of_two_processes_ends_in_a_save_both_stop_and_go_on(folder, tmp_path, capfd):
    """What one has written of a checkpoint is not whole. Another number of processes is refused."""
    whole = tmp_path / "whole"
    assert on_two_processes(train_arguments(folder, whole)) == [0, 0]
    for hurt, status in ((die, -signal.SIGKILL), (fill, 2)):
        run = tmp_path / hurt.__name__
        argv = train_arguments(folder, run)
        assert on_two_processes(argv, hurt) == [1, status]
        assert names(run)[-1] == "checkpoint-3" and last_checkpoint(run).name == "checkpoint-2"
        assert on_two_processes([*argv, "--resume"]) == [0, 0]
        assert outcome(run) == outcome(whole)
    assert "checkpoint-3: expected to write it; got [Errno 28] No space left on device (" in capfd.readouterr().err
    assert main([*argv, "--resume"]) == 2
    assert "expected 2 processes, by whose number" in capfd.readouterr().err


# --- checkpoints


class Interrupt(TrainerCallback):
    """Inside the save of a step, by a method of the trainer."""

    def __init__(self, monkeypatch, step, method, error=KeyboardInterrupt):
        self.arguments = monkeypatch, step, method, error

    def on_step_end(self, args, state, control, **kwargs):
        monkeypatch, step, method, error = self.arguments
        if state.global_step == step:
            monkeypatch.setattr(OKDTrainer, method, lambda *_: (_ for _ in ()).throw(error()))


def cut_short(folder, monkeypatch, step=3, method="_save_rng_state", **options):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        trainer(folder, Interrupt(patch, step, method), **options).train()


def test_a_checkpoint_that_was_cut_short_is_passed_over_and_written_anew(tmp_path, monkeypatch, caplog):
    whole = trainer(tmp_path / "whole")
    whole.train()
    cut_short(tmp_path / "parts", monkeypatch)
    assert names(tmp_path / "parts") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    half = tmp_path / "parts" / "checkpoint-3"
    (half / "left-over").touch()
    assert not is_whole(half) and last_checkpoint(tmp_path / "parts").name == "checkpoint-2"
    again = trainer(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"got one cut short: remove .*3, and --resume goes on from checkp"):
        again.train(resume_from_checkpoint=str(half))
    again.train(resume_from_checkpoint=True)
    assert f"{half}: expected a whole checkpoint; got one cut short: passing it over" in caplog.text
    tiny.assert_same_weights(again.pair.student, whole.pair.student)
    assert names(tmp_path / "parts") == ["checkpoint-3", "checkpoint-4"] and is_whole(half)
    assert not (half / "left-over").exists()


def test_without_a_whole_checkpoint_there_is_nothing_to_go_on_from(tmp_path, monkeypatch):
    cut_short(tmp_path, monkeypatch, step=1)
    with pytest.raises(ValueError, match=r"expected a whole checkpoint in .*; got none"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


class Begun(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.at = state.global_step


def test_a_checkpoint_of_an_earlier_version_is_taken_as_it_is(tmp_path):
    trainer(tmp_path, max_steps=2).train()
    for name in names(tmp_path):
        (tmp_path / name / MANIFEST).unlink()
    again, begun = trainer(tmp_path), Begun()
    again.add_callback(begun)
    assert again.train(resume_from_checkpoint=True).global_step == 4 and begun.at == 2


def test_what_is_left_of_a_removed_checkpoint_does_not_look_whole(tmp_path, monkeypatch):
    trainer(tmp_path, max_steps=1).train()
    monkeypatch.setattr(durable.shutil, "rmtree", lambda *_, **__: None)  # killed there
    durable.remove(tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "student").is_dir() and last_checkpoint(tmp_path) is None


def test_the_best_checkpoint_and_the_last_stay(tmp_path):
    """Whichever the limit; and after the end with a limit of 1 the best alone, as Trainer has it."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 1.0}
    for limit, kept in ((1, ["checkpoint-1"]), (2, ["checkpoint-1", "checkpoint-4"])):
        output = tmp_path / str(limit)
        run = trainer(output, **{**options, "save_total_limit": limit})
        run.train()
        assert run.state.best_model_checkpoint == str(output / "checkpoint-1")
        assert names(output) == kept and all(map(is_whole, checkpoints(output)))
        best = type(run.pair.student).from_pretrained(output / "checkpoint-1" / "student")
        tiny.assert_same_weights(run.pair.student, best)


def test_older_checkpoints_go_after_the_new_one_is_whole(tmp_path, monkeypatch):
    write = durable.write_manifest
    monkeypatch.setattr(durable, "write_manifest", lambda path: die_at(path, "checkpoint-3") or write(path))
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, save_total_limit=1).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"] and last_checkpoint(tmp_path).name == "checkpoint-2"


def die_at(path, name):
    if path.name == name:
        raise KeyboardInterrupt


def test_what_is_removed_at_the_end_of_a_run_does_not_look_whole(tmp_path, monkeypatch):
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 1.0}
    run = trainer(tmp_path, save_total_limit=1, max_steps=2, **options)
    monkeypatch.setattr(durable.shutil, "rmtree", lambda *_, **__: None)  # killed there
    run.train()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"] and last_checkpoint(tmp_path).name == "checkpoint-1"


def test_a_base_that_was_cut_short_is_written_anew(tmp_path, monkeypatch):
    """Of a LoRA's checkpoints, which name the directory."""

    def half(self, directory, **_):
        directory.mkdir(parents=True)
        raise KeyboardInterrupt

    options = {"student_lora_rank": 2, "max_steps": 1}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LlamaForCausalLM, "save_pretrained", half)
        trainer(tmp_path, **options).train()
    trainer(tmp_path, **options).train()
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "student" / "base")
    tiny.assert_same_weights(saved, tiny.llama())


def test_a_checkpoint_that_a_run_has_gone_on_from_is_not_written_again(tmp_path):
    """At its end, where it would be missing while it is written."""
    options = {"save_strategy": "epoch"}  # ends inside the first
    trainer(tmp_path, **options).train()
    file = tmp_path / "checkpoint-4" / MANIFEST
    written = file.stat().st_mtime_ns
    assert trainer(tmp_path, **options).train(resume_from_checkpoint=True).global_step == 4
    assert file.stat().st_mtime_ns == written


class Preempt(TrainerCallback):
    """As SIGTERM does, seconds later."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.manager.is_checkpoint_requested = True


def test_a_checkpoint_on_sigterm_is_whole(tmp_path):
    """transformers' enable_jit_checkpoint, whose mark of what is not whole is ours, too."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    term, preempt = signal.getsignal(signal.SIGTERM), Preempt()
    run = trainer(tmp_path / "parts", preempt, save_strategy="no", enable_jit_checkpoint=True)
    (jit,) = (c for c in run.callback_handler.callbacks if hasattr(c, "jit_manager"))
    preempt.manager = jit.jit_manager
    run.train()
    assert signal.getsignal(signal.SIGTERM) == term
    assert names(tmp_path / "parts") == ["checkpoint-2"] and is_whole(tmp_path / "parts" / "checkpoint-2")
    again = trainer(tmp_path / "parts")
    again.train(resume_from_checkpoint=True)
    tiny.assert_same_weights(again.pair.student, whole.pair.student)


def test_weights_alone(tmp_path):
    run = trainer(tmp_path, max_steps=1, save_only_model=True)
    run.train()
    files = json.loads((tmp_path / "checkpoint-1" / MANIFEST).read_text())["files"]
    assert "student/model.safetensors" in files and "optimizer.pt" not in files
    assert trainer(tmp_path).train(resume_from_checkpoint=True).global_step == 4


@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed", "manifest"])
def test_a_damaged_file_is_named(tmp_path, damage):
    trainer(tmp_path, max_steps=2).train()
    path = tmp_path / "checkpoint-2" / ("manifest.json" if damage == "manifest" else "student/model.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    elif damage == "flipped":
        data[-7] ^= 4
        path.write_bytes(data)
    else:
        path.write_bytes(data[:-7])
    expected = {"truncated": f"{len(data):,} bytes that were saved; got {len(data) - 7:,}", "removed": "got none",
                "flipped": "of CRC-32 ", "manifest": "expected JSON"}[damage]  # fmt: skip
    with pytest.raises(ValueError) as error:
        trainer(tmp_path).train(resume_from_checkpoint=True)
    remedy = f"remove {tmp_path / 'checkpoint-2'}, and --resume goes on from checkpoint-1"
    assert str(error.value).startswith(f"{path}: ") and expected in str(error.value) and remedy in str(error.value)


def test_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    trainer(tmp_path, max_steps=1).train()
    monkeypatch.setattr(durable, "ranks", lambda: 2)
    with pytest.raises(ValueError, match=r"expected 1 processes.*; got 2: start 1 \(torchrun"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


# --- disks


class Fill(TrainerCallback):
    """The disk, after a step: no file may become larger than so many bytes."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@pytest.mark.parametrize(("size", "file"), [(60_000, "student"), (90_000, "optimizer")])
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, size, file):
    """safetensors and torch.save say it in errors of their own."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    try:
        with pytest.raises(OSError, match=r"checkpoint-3: expected to write it; got .* MiB are free there") as error:
            trainer(tmp_path / "parts", Fill(3, size)).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert str(error.value).endswith("make room, and --resume goes on from checkpoint-2")
    assert names(tmp_path / "parts") == ["checkpoint-1", "checkpoint-2"], "no half of one in the way"
    again = trainer(tmp_path / "parts")
    again.train(resume_from_checkpoint=True)
    tiny.assert_same_weights(again.pair.student, whole.pair.student)


def test_a_log_that_cannot_be_written(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    run = trainer(tmp_path)
    run.log_file.start = lambda step: None
    with pytest.raises(OSError, match=r"log.jsonl: expected to write it; got \[Errno 28\] No space left .*begins anew"):
        run.train()


def test_an_error_of_the_training_stays_itself(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=r"^another rank has died$"):
        died = lambda: RuntimeError("another rank has died")  # noqa: E731
        trainer(tmp_path, Interrupt(patch, 1, "_save_rng_state", died)).train()


# --- the command


def test_a_directory_that_cannot_be_written_is_found_before_models_are_loaded(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("okd.run.load_models", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "run", "/proc/run"):
        assert main(train_arguments(folder, output)) == 2
        assert f"{output}: expected a directory that can be written; got " in capsys.readouterr().err


@pytest.mark.slow
def test_to_resume_a_run_without_a_checkpoint_is_to_begin_anew(folder, tmp_path, capsys, caplog, monkeypatch):
    """Of one that was killed while it loaded, or before its first save; not where there is none, or a finished one."""
    run = tmp_path / "run"
    command = train_arguments(folder, run, "--max-steps", "1", "--save-strategy", "no")
    assert main([*command, "--resume"]) == 2
    assert f"expected a checkpoint to resume from in {run}; got none" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("okd.run.load_models", lambda *_: (_ for _ in ()).throw(ValueError("no model")))
        assert main(command) == 2 and not run.exists(), "what fails leaves nothing"
    run.mkdir()
    (run / durable.BEGUN).touch()
    assert main([*command, "--resume"]) == 0 and "the run begins anew" in caplog.text
    written = (run / "student" / "model.safetensors").read_bytes()
    assert main([*command, "--resume"]) == 2, "a finished run that kept no checkpoint"
    (run / "metrics.json").unlink()
    assert main([*command, "--resume", "--seed", "1"]) == 2
    assert "expected the options with which the run" in capsys.readouterr().err
    assert (run / "student" / "model.safetensors").read_bytes() == written
    assert main([*command, "--resume"]) == 0


@pytest.mark.slow
def test_a_run_killed_while_it_replaces_another_is_not_resumed_as_that(folder, tmp_path):
    run = tmp_path / "run"
    assert main(train_arguments(folder, run, "--max-steps", "2")) == 0
    assert killed(train_arguments(folder, run, "--overwrite"), run, at="log.jsonl")
    assert names(run) == [] and (run / "config.yaml").is_file()
