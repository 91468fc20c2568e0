"""Where the models of a run come from, and how they are loaded and saved: dtypes, quantisation, adapters."""

import copy
import dataclasses
import json
import os
import shutil

import pytest
import tiny
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from ranks import run_ranks
from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from okd import OKDTrainer, layers, loading, models
from okd.cli import main, parse_train
from okd.directory import exact_config
from okd.loading import load_models, quantization_config, teacher_sources
from okd.run import RunConfig
from okd.student import base_state, prepare_student

IDS = torch.arange(2, 34).view(2, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, a student, and adapters over each."""
    root = tmp_path_factory.mktemp("models")
    tiny.save_models(root)
    for name in ("teacher", "student"):
        adapted = with_lora(AutoModelForCausalLM.from_pretrained(root / name))
        adapted.save_pretrained(root / f"{name}_adapter")
    (root / "train.jsonl").write_text("\n".join(json.dumps(e) for e in tiny.examples(24)))
    return root


def with_lora(model, seed=3):
    """A LoRA that changes what the model says."""
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    return adapted


def trainer(folder, student, teacher, tokenizer=None, **options):
    arguments = tiny.config(folder, **options)
    return OKDTrainer(student, teacher, arguments, tiny.examples(), processing_class=tokenizer or tiny.tokenizer())


def loaded(folder, args=None, **options):
    """(student, teacher, tokenizer, the teachers' tokenizers) of `okd train`."""
    places = {k: str(folder / v) for k, v in options.items() if k in ("student", "teacher")}
    config = RunConfig(**{**options, **places})
    args = args or tiny.config(folder / "out", method="forward_kd")
    return load_models(config, args, teacher_sources(config, args))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def kl(model, other):
    p, q = logits(model).log_softmax(-1), logits(other).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def command(folder, output, *options, method="forward_kd", student="student", teacher="teacher"):
    models = ["--teacher", str(folder / teacher)]
    models += [] if student is None else ["--student", str(folder / student)]
    return [
        "train", method, *models, "--train-data", str(folder / "train.jsonl"), "--output-dir", str(output),
        "--max-steps", "4", "--use-cpu", "--eval-answers", "0", "--disable-tqdm", "true", "--learning-rate", "1e-2",
        *options,
    ]  # fmt: skip


# --- how a role is loaded


def test_each_role_has_its_dtype_attention_and_arguments(folder):
    student, teacher, *_ = loaded(
        folder,
        student="student",
        teacher="teacher",
        dtype="float32",
        teacher_dtype="bfloat16",
        attn_implementation="eager",
        student_kwargs='{"attn_implementation": "sdpa", "attention_dropout": 0.25}',
    )
    assert (student.dtype, teacher.dtype) == (torch.float32, torch.bfloat16)
    assert (student.config._attn_implementation, teacher.config._attn_implementation) == ("sdpa", "eager")
    assert (student.config.attention_dropout, teacher.config.attention_dropout) == (0.25, 0.0)
    student, teacher, *_ = loaded(folder, teacher="teacher", student_dtype="bfloat16")
    assert (student.dtype, teacher.dtype) == (torch.bfloat16, torch.float32), "a student that is a copy of its teacher"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"trust_remote_code": true}', "run no code from a model's repository.*got trust_remote_code=True"),
        ('{"use_safetensors": false}', "read no pickles.*got use_safetensors=False"),
        ('{"weights_only": false}', "got weights_only=False"),
        ("[1]", r"expected teacher_kwargs as a JSON object; got '\[1\]'"),
        ("{revision: 1}", "expected teacher_kwargs as a JSON object; got '{revision: 1}'"),
    ],
)
def test_arguments_that_are_refused(folder, text, message):
    with pytest.raises(ValueError, match=message):
        loaded(folder, student="student", teacher="teacher", teacher_kwargs=text)
    assert models.load_model(str(folder / "teacher")) is not None


def test_the_written_config_takes_all_back(folder, tmp_path):
    options = [
        "--teacher-kwargs", '{"revision": "main", "max_memory": {"0": "3GiB"}}', "--attn-implementation", "eager",
        "--teacher-dtype", "bfloat16", "--teacher-quantization", "8bit", "--quantization-library", "torchao",
        "--student-lora-rank", "4", "--student-lora-target-modules", "q_proj", "v_proj", "--student-save", "merged",
        "--save-dtype", "bfloat16",
    ]  # fmt: skip
    config, args = parse_train(command(folder, tmp_path, *options)[1:])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(exact_config(config, args)))
    again, args_again = parse_train(["--config", str(file), "--output-dir", str(tmp_path)])
    assert again == config and json.loads(again.teacher_kwargs)["max_memory"] == {"0": "3GiB"}
    file.write_text('teacher_kwargs: {revision: main}\nstudent_kwargs: \'{"revision": "main"}\'\n')
    mapped, _ = parse_train(["okd", "--config", str(file), "--output-dir", str(tmp_path)])
    assert mapped.teacher_kwargs == json.loads(mapped.student_kwargs) == {"revision": "main"}
    names = [field.name for field in dataclasses.fields(loading.ModelOptions)]
    assert {"teacher_kwargs", "student_quantization", "teacher_adapter"} <= set(names)
    for name in ("student_lora_rank", "student_lora_target_modules", "student_save", "save_dtype"):
        assert getattr(args_again, name) == getattr(args, name) is not None


def test_save_dtype_is_of_the_student_at_the_end_alone(tmp_path):
    """Checkpoints keep the dtype of the training, so that a resumed run is the run."""
    for name, options in (("untied", {"tie_word_embeddings": False}), ("tied", {})):
        run = trainer(
            tmp_path / name, tiny.llama(**options), tiny.llama(seed=1), save_strategy="steps", save_steps=2,
            save_dtype="bfloat16", method="forward_kd",
        )  # fmt: skip
        run.train()
        run.save_model(str(tmp_path / name))
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name / "student")
        assert saved.dtype == torch.bfloat16
        assert json.loads((tmp_path / name / "student" / "config.json").read_text())["dtype"] == "bfloat16"
        for key, x in run.student.state_dict().items():
            assert torch.equal(saved.state_dict()[key], x.bfloat16()), key
        kept = AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint-4" / "student")
        assert kept.dtype == torch.float32
        tiny.assert_same_weights(kept, run.student)
    sizes = [(tmp_path / n / "student" / "model.safetensors").stat().st_size for n in ("untied", "tied")]
    assert sizes[0] - sizes[1] == pytest.approx(2 * 64 * 32, abs=200), "a tied head is saved once"


# --- quantisation

LIBRARIES = [("8bit", "torchao"), ("8bit", "bitsandbytes"), ("4bit", "bitsandbytes")]


def raw(parameter):
    """The plain tensors that a quantised one is made of, or itself."""
    names = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
    return [getattr(parameter, name) for name in names] or [parameter]


@pytest.mark.parametrize(("bits", "library"), LIBRARIES)
def test_a_quantized_teacher(folder, tmp_path, caplog, bits, library):
    """Is near the one that it was; embeddings and head are untouched; an online LoRA over it learns."""
    pytest.importorskip(library)
    options = {"teacher_quantization": bits, "quantization_library": library, "student": "student"}
    student, teacher, tokenizer, _ = loaded(folder, teacher="teacher", **options)
    plain = models.load_model(str(folder / "teacher"))
    near, far = kl(plain, teacher), kl(plain, tiny.llama(seed=5, layers=3, hidden=48))
    assert 0 < near < (0.4 if bits == "4bit" else 2e-3) * far
    assert torch.equal(teacher.lm_head.weight, plain.lm_head.weight)
    assert type(teacher.lm_head) is torch.nn.Linear and type(student.lm_head.weight) is torch.nn.Parameter
    run = trainer(tmp_path, student, teacher, tokenizer, max_steps=12, online_learning_rate=1e-2)
    assert "inputs will be cast" not in caplog.text, "at every product of 8 bit"
    frozen = {n: p.detach().clone() for n, p in teacher.named_parameters() if not p.requires_grad}
    run.train()
    log = [entry for entry in run.state.log_history if "teacher_loss" in entry]
    assert log[-1]["teacher_loss"] < 0.9 * log[0]["teacher_loss"]
    assert log[-1]["student_loss"] < 0.9 * log[0]["student_loss"]
    for name, parameter in teacher.named_parameters():
        if name in frozen:
            assert all(torch.equal(a, b) for a, b in zip(raw(parameter), raw(frozen[name]), strict=True)), name


def of_ranks(rank, world, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    options = {"teacher_quantization": "8bit", "student_quantization": "8bit", "quantization_library": "torchao"}
    args = tiny.config(folder / "out", student_lora_rank=4, per_device_train_batch_size=4 // world, max_steps=3)
    student, teacher, tokenizer, _ = loaded(folder, args, student="student", teacher="teacher", **options)
    run = OKDTrainer(student, teacher, args, tiny.examples(), processing_class=tokenizer)
    run.train()
    return {name: p.detach().clone() for name, p in run.pair.named_parameters() if p.requires_grad}


@pytest.mark.slow
def test_quantized_models_on_two_ranks(folder, tmp_path):
    """DDP, which sends weights to all ranks, leaves those alone that it cannot send."""
    pytest.importorskip("torchao")
    one, other = run_ranks(of_ranks, 2, tmp_path, folder)
    assert any("student" in name for name in one) and any("teacher" in name for name in one)
    for name, parameter in one.items():
        assert torch.equal(parameter, other[name]), name
        assert "lora_B" not in name or parameter.abs().max() > 0


def test_a_library_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    for bits, device, library in (("8bit", "cpu", "torchao"), ("4bit", "cpu", "bitsandbytes"), ("8bit", "cuda", "b")):
        with pytest.raises(ImportError, match=rf"pip install 'okd-kernels\[{library}"):
            quantization_config(bits, None, torch.device(device))


def test_four_bit_has_the_settings_of_qlora():
    pytest.importorskip("bitsandbytes")
    found = quantization_config("4bit", None, torch.device("cuda"))
    assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == ("nf4", True)
    assert found.bnb_4bit_compute_dtype == torch.bfloat16
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="expected 8bit with torchao"):
        quantization_config("4bit", "torchao", torch.device("cuda"))


def test_quantisation_that_is_refused(folder):
    for options, message in (
        ({"student_quantization": "8bit"}, "expected a LoRA over a quantised student"),
        ({"quantization_library": "torchao"}, "quantization_library with student_quantization or teacher_"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(folder, student="student", teacher="teacher", **options)
    args = tiny.config(folder / "out", method="forward_kd", student_lora_rank=2)
    with pytest.raises(ValueError, match="expected a quantised student as it was published"):
        loaded(folder, args, teacher="teacher", student_layers="0,1", student_quantization="8bit")
    with pytest.raises(ValueError, match="to be one of 4bit, 8bit"):
        RunConfig(teacher_quantization="2bit")


# --- a student with a LoRA


def test_the_lora_alone_trains_and_what_is_saved_is_the_student(folder, tmp_path):
    """With plain peft and with plain transformers, over the base that it names; and merged."""
    start = AutoModelForCausalLM.from_pretrained(folder / "student")
    for save in ("adapter", "merged"):
        student = AutoModelForCausalLM.from_pretrained(folder / "student")
        options = {"student_lora_rank": 4, "student_lora_alpha": 8, "student_save": save, "max_steps": 12}
        run = trainer(tmp_path / save, student, tiny.llama(seed=1), method="forward_kd", **options)
        run.train()
        log = [entry["student_loss"] for entry in run.state.log_history if "student_loss" in entry]
        assert log[-1] < 0.9 * log[0]
        run.save_model(str(tmp_path / save))
        place = tmp_path / save / "student"
        loaded = [AutoModelForCausalLM.from_pretrained(place), models.load_model(str(place))]
        assert (place / "adapter_config.json").is_file() == (save == "adapter")
        if save == "adapter":
            assert json.loads((place / "adapter_config.json").read_text())["lora_alpha"] == 8
            assert not (place / "base").exists() and not (place / "model.safetensors").exists()
            base = AutoModelForCausalLM.from_pretrained(folder / "student")
            loaded.append(PeftModel.from_pretrained(base, place))
            loaded.append(models.load_model(str(place), adapter="merge"))
        assert logits(run.student).sub(logits(start)).abs().max() > 0.1
        for model in loaded:
            torch.testing.assert_close(logits(model), logits(run.student), rtol=1e-4, atol=1e-4)
    tiny.assert_same_weights(run.student.unload(), start)


def test_which_modules_carry_it(folder):
    def targets(student, **options):
        model = prepare_student(student, tiny.config("out", method="sft", student_lora_rank=2, **options))
        found = {
            n.split(".lora_A")[0].removeprefix("base_model.model.") for n, _ in model.named_modules() if "lora_A" in n
        }
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        return found

    linear = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    linear |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    untied = tiny.llama(tie_word_embeddings=False)
    assert targets(untied.bfloat16()) == {f"model.layers.{i}.{name}" for i in range(2) for name in linear}
    some = targets(tiny.llama(), student_lora_target_modules=["q_proj", "mlp.up_proj"])
    assert some == {f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")}
    for name in ("lm_head", "proj", "query"):
        with pytest.raises(ValueError, match=rf"among down_proj, .*, v_proj, the linear .* got {name}: correct it"):
            targets(tiny.llama(), student_lora_target_modules=[name])

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "model_type": "clip_vision_model", "projection_dim": 16}
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=tiny.llama().config, vision_feature_layer=-1)
    )
    for names in (None, ["q_proj"]):
        found = targets(copy.deepcopy(llava), student_lora_target_modules=names)
        assert found and all("language_model.layers" in name for name in found)


@pytest.mark.parametrize("change", ["layers", "weights", "made in Python"])
def test_a_base_that_no_name_loads_lies_beside_the_adapter(folder, tmp_path, change):
    """Else the adapter would go onto the whole teacher, or onto weights that it was never trained with."""
    if change == "made in Python":
        student = tiny.llama()
    else:
        student = AutoModelForCausalLM.from_pretrained(folder / "teacher")
        student = layers.keep_layers(student, [0, 2]) if change == "layers" else student
        student.model.layers[0].mlp.up_proj.weight.data.add_(0.0 if change == "layers" else 0.5)
    output = tmp_path / "run"
    run = trainer(
        output, student, tiny.llama(seed=1), method="forward_kd", student_lora_rank=4,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    run.train()
    run.save_model(str(output))
    expected = logits(run.student)
    for place in (output / "student", output / "checkpoint-4" / "student"):
        name = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert name == str((output / "student" / "base").resolve())
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(place)), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(models.load_model(str(place))), expected, rtol=1e-4, atol=1e-4)
    assert not (output / "checkpoint-4" / "student" / "base").exists(), "it exists once"
    shutil.move(output / "student", tmp_path / "moved")
    torch.testing.assert_close(logits(models.load_model(str(tmp_path / "moved"))), expected, rtol=1e-4, atol=1e-4)
    assert models.load_tokenizer(str(tmp_path / "moved")).get_vocab() == tiny.tokenizer().get_vocab()


def test_a_student_with_a_lora_resumes_bit_for_bit(tmp_path):
    def trained(name, checkpoint=None):
        arguments = {"method": "gkd", "student_lora_rank": 4, "student_lora_dropout": 0.2, "max_new_tokens": 4}
        arguments |= {"save_strategy": "steps", "save_steps": 2, "save_dtype": "bfloat16"}
        run = trainer(tmp_path / name, tiny.llama(), tiny.llama(seed=1), **arguments)
        run.train(resume_from_checkpoint=checkpoint)
        return run.student

    whole = trained("run")
    again = trained("run", str(tmp_path / "run" / "checkpoint-2"))
    tiny.assert_same_weights(again, whole)
    assert any(p.abs().max() > 0 for n, p in again.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, reentrant):
    found = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        run = trainer(
            tmp_path, tiny.llama(), tiny.llama(seed=1), method="forward_kd", student_lora_rank=4, max_steps=3, **options
        )
        run.train()
        found.append({n: p.detach() for n, p in run.student.named_parameters() if "lora" in n})
    for name, parameter in found[0].items():
        torch.testing.assert_close(found[1][name], parameter, rtol=1e-4, atol=1e-6)
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in found[0].items())


@pytest.mark.parametrize(("bits", "library"), LIBRARIES)
def test_qlora(folder, tmp_path, bits, library):
    """The base stays quantised, the head in its dtype; the saved adapter goes onto the base as it was published."""
    pytest.importorskip(library)
    args = tiny.config(tmp_path, method="forward_kd", student_lora_rank=4, max_steps=12)
    options = {"student_quantization": bits, "quantization_library": library, "student_dtype": "bfloat16"}
    student, teacher, tokenizer, _ = loaded(folder, args, student="student", teacher="teacher", **options)
    run = OKDTrainer(student, teacher, args, tiny.examples(), processing_class=tokenizer)
    run.train()
    log = [entry["student_loss"] for entry in run.state.log_history if "student_loss" in entry]
    assert log[-1] < 0.9 * log[0]
    assert {student.lm_head.weight.dtype, student.model.norm.weight.dtype} == {torch.bfloat16}
    run.save_model(str(tmp_path))
    place = str(tmp_path / "student")
    quantized = quantization_config(bits, library, run.args.device)
    again = models.load_model(place, "bfloat16", adapter="train", quantization_config=quantized)
    torch.testing.assert_close(logits(again), logits(run.student))
    assert json.loads((tmp_path / "student" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder / "student"
    )
    plain = AutoModelForCausalLM.from_pretrained(place)
    assert type(plain.model.layers[0].mlp.up_proj.base_layer) is torch.nn.Linear
    assert kl(plain, run.student) < kl(AutoModelForCausalLM.from_pretrained(folder / "student"), run.student)
    with pytest.raises(ValueError, match="of whole precision to merge the student's LoRA into"):
        loaded_again, *_ = loaded(folder, args, student="student", teacher="teacher", **options)
        prepare_student(loaded_again, tiny.config(tmp_path, method="sft", student_lora_rank=4, student_save="merged"))


@pytest.mark.slow
def test_a_saved_student_is_a_source_like_any_other(folder, tmp_path, capsys):
    """okd train, evaluate and generate read the directory of an adapter; training goes on with it."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(command(folder, first, "--student-layers", "0,2", "--student-lora-rank", "4", student=None)) == 0
    student = first / "student"
    assert json.loads((student / "base" / "config.json").read_text())["num_hidden_layers"] == 2
    after = json.loads((first / "metrics.json").read_text())["after"]
    figures = ["--file", str(folder / "train.jsonl"), "--answers", "0"]
    capsys.readouterr()
    assert main(["generate", "--model", str(student), "--prompt", "w2 w3 w4", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["evaluate", "--student", str(student), "--teacher", str(folder / "teacher"), *figures]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main(command(folder, second, student=str(student))) == 0
    found = json.loads((second / "metrics.json").read_text())
    assert found["before"]["forward_kl"] == pytest.approx(after["forward_kl"], rel=1e-4)
    assert (second / "student" / "adapter_model.safetensors").is_file()
    capsys.readouterr()
    assert main(["evaluate", "--student", str(second / "student"), "--teacher", str(folder / "teacher"), *figures]) == 0
    assert json.loads(capsys.readouterr().out)["forward_kl"] < whole["forward_kl"]


def test_student_options_that_would_change_nothing():
    for options, message in (
        ({"student_lora_alpha": 4}, "expected student_lora_rank with student_lora_alpha; got 4 without"),
        ({"student_lora_target_modules": ["q_proj"]}, "student_lora_rank with student_lora_target_modules"),
        ({"student_save": "whole"}, "student_save to be one of adapter, merged"),
        ({"save_dtype": "int8"}, "save_dtype to be one of float32, bfloat16, float16"),
        ({"student_lora_rank": 0}, "student_lora_rank to be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.config("out", **options)
    with pytest.raises(ValueError, match="expected a student with a LoRA to be merged"):
        prepare_student(tiny.llama(), tiny.config("out", student_save="merged"))
    adapted = with_lora(tiny.llama())
    assert prepare_student(adapted, tiny.config("out")) is adapted
    with pytest.raises(ValueError, match="expected no student_lora_rank for a student that is a PEFT model; got 4"):
        prepare_student(adapted, tiny.config("out", student_lora_rank=4))
    with pytest.raises(ValueError, match=r"expected a student as it was loaded, .* pass trainer\.student"):
        prepare_student(adapted.get_base_model(), tiny.config("out", student_lora_rank=4))


def test_the_student_as_its_own_teacher_is_found_under_its_lora(tmp_path):
    model = tiny.llama()
    with pytest.raises(ValueError, match="expected two models"):
        trainer(tmp_path, model, model, method="forward_kd", student_lora_rank=4)


@pytest.mark.parametrize("rank", [None, 4])
def test_a_frozen_base_keeps_its_dtype(folder, tmp_path, monkeypatch, rank):
    """One that trains is in fp32."""
    monkeypatch.setattr(models, "has_fast_gemm", lambda *_: True)
    for name in ("student", "teacher"):
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    args = tiny.config(tmp_path / "out", method="forward_kd", student_lora_rank=rank)
    student, teacher, *_ = loaded(tmp_path, args, student="student", teacher="teacher")
    assert (student.dtype, teacher.dtype) == (torch.float32 if rank is None else torch.bfloat16, torch.bfloat16)


def test_an_adapter_ends_its_responses_as_it_learned_to(folder, tmp_path):
    place = tmp_path / "adapter"
    shutil.copytree(folder / "student_adapter", place)
    assert models.stop_tokens(str(place)) == {tiny.EOS}, "its base's"
    assert models.load_tokenizer(str(place)).get_vocab() == tiny.tokenizer().get_vocab(), "its base's"
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [tiny.EOS, 7]}))
    assert models.stop_tokens(str(place)) == {tiny.EOS, 7}
    assert models.load_model(str(place)).generation_config.eos_token_id == [tiny.EOS, 7]


# --- a teacher that is an adapter


def test_what_becomes_of_a_teachers_adapter(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(base), folder / "teacher_adapter"))
    assert (expected - logits(base)).abs().max() > 0.1
    options = {"student": "student", "teacher": "teacher_adapter"}
    for mode in (None, "merge", "keep"):
        _, teacher, *_ = loaded(folder, **options, teacher_adapter=mode)
        assert hasattr(teacher, "peft_config") == (mode == "keep")
        torch.testing.assert_close(logits(teacher), expected, rtol=1e-4, atol=1e-4)
        run = trainer(tmp_path, tiny.llama(), teacher, method="forward_kd")
        run.train()
        with run.pair.teacher.as_it_was() as judge:
            torch.testing.assert_close(logits(judge), expected, rtol=1e-4, atol=1e-4)
    args = tiny.config(tmp_path / "online", save_strategy="steps", save_steps=2)
    student, teacher, tokenizer, _ = loaded(folder, args, **options, teacher_adapter="train")
    torch.testing.assert_close(logits(teacher), expected, rtol=1e-4, atol=1e-4)
    run = OKDTrainer(student, teacher, args, tiny.examples(), processing_class=tokenizer)
    assert run.teacher is teacher
    run.train()
    assert all(torch.equal(x, base.state_dict()[name]) for name, x in base_state(teacher).items())
    run.save_model(str(tmp_path / "online"))
    saved = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "online" / "teacher_adapter")
    assert saved.peft_config["default"].r == 4 and (logits(saved) - expected).abs().max() > 1e-3


@pytest.mark.slow
def test_a_run_of_adapters_resumes(folder, tmp_path):
    """Student and teacher as if the run had not been stopped; the base of a shortened student is written once."""
    options = ["--teacher-adapter", "train", "--student-layers", "0,2", "--student-lora-rank", "4"]
    options += ["--save-strategy", "steps", "--save-steps", "2"]
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("student", "teacher_adapter")]
    found = []
    for more in ([], ["--resume"]):
        arguments = command(folder, tmp_path, *options, *more, method="okd", teacher="teacher_adapter", student=None)
        assert main(arguments) == 0
        found.append([file.read_bytes() for file in files])
        shutil.rmtree(tmp_path / "checkpoint-4")
        for file in files:
            file.unlink()
    assert found[0] == found[1]
    assert [str(path.parent) for path in tmp_path.rglob("model.safetensors")] == [str(tmp_path / "student" / "base")]


def test_a_student_out_of_a_teachers_adapter_is_whole(folder):
    _, teacher, *_ = loaded(folder, teacher="teacher_adapter", teacher_adapter="keep")
    student, *_ = loaded(folder, teacher="teacher_adapter", teacher_adapter="keep", student_layers="0-2")
    assert not hasattr(student, "peft_config")
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-4)


def test_adapters_that_do_not_fit_the_method(folder, tmp_path):
    online, frozen = tiny.config(tmp_path), tiny.config(tmp_path, method="forward_kd")
    for args, options, message in (
        (frozen, {"teacher_adapter": "train"}, "expected teacher_adapter=train with a method whose teacher learns"),
        (online, {"teacher_adapter": "keep"}, "method okd, whose teacher learns, trains or begins without; got"),
        (online, {"teacher_quantization": "8bit"}, "which is also what a quantised base leaves it at"),
        (
            frozen,
            {"teacher_quantization": "8bit", "teacher_adapter": "merge"},
            "of whole precision to merge the teacher",
        ),
        (
            frozen,
            {"teacher": "teacher", "teacher_adapter": "merge"},
            "expected a teacher that is a directory with a PEFT",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(folder, args, **{"student": "student", "teacher": "teacher_adapter", **options})
    several = tiny.config(tmp_path, method="gated_ensemble")
    teachers = [str(folder / "teacher_adapter"), str(folder / "teacher")]
    config = RunConfig(student=str(folder / "student"), teachers=teachers, teacher_adapter="keep")
    with pytest.raises(ValueError, match="expected one teacher with teacher_adapter=keep; got 2"):
        teacher_sources(config, several)


def test_a_quantized_base_keeps_its_adapter(folder):
    pytest.importorskip("torchao")
    options = {"student": "student", "teacher": "teacher_adapter", "teacher_quantization": "8bit"}
    _, teacher, *_ = loaded(folder, quantization_library="torchao", **options)
    whole = models.load_model(str(folder / "teacher_adapter"), adapter="merge")
    base = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    assert kl(whole, teacher) < 1e-2 * kl(whole, base)


def test_adapters_without_a_base_or_in_a_pickle(folder, tmp_path):
    place = tmp_path / "adapter"
    shutil.copytree(folder / "student_adapter", place)
    file = place / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(FileNotFoundError, match="names its base; got none"):
        models.load_model(str(place))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "weights.gguf").touch()  # how the base of a GGUF teacher's adapter is named
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "package")}))
    assert models.adapter_base(str(place)) == str(tmp_path / "package" / "weights.gguf")
    file.write_text(json.dumps(config))
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"expected adapter_model.safetensors; got .* in a pickle"):
        models.load_model(str(place))
    tiny.llama().config.save_pretrained(tmp_path / "pickle")
    torch.save(tiny.llama().state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="expected a Hugging Face id, a local directory with safetensors"):
        models.load_model(str(tmp_path / "pickle"))


def test_a_named_base_is_compared_without_a_second_model_in_memory(tmp_path, monkeypatch):
    for i, tied in enumerate((True, False)):
        folder = str(tmp_path / str(i))
        tiny.llama(tie_word_embeddings=tied).save_pretrained(folder)
        monkeypatch.setattr("okd.student.load_model", lambda *_: pytest.fail("loaded a second time"))
        options = tiny.config(tmp_path, method="sft", student_lora_rank=2)
        adapted = prepare_student(AutoModelForCausalLM.from_pretrained(folder), options)
        assert adapted.active_peft_config.base_model_name_or_path == folder
        monkeypatch.undo()
        changed = AutoModelForCausalLM.from_pretrained(folder)
        changed.model.norm.weight.data += 1
        assert prepare_student(changed, options).active_peft_config.base_model_name_or_path == ""
