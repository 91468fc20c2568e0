"""What several devices hold of two models, and send one another: against counts of the models, and by hand."""

import logging
import weakref

import pytest
import tiny
from test_plan import parts, planned, really_saved, save  # noqa: F401  (a fixture)
from transformers import LlamaConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from okd.budget import GIB, check_fits
from okd.cli import main, parse_train
from okd.cluster import BUCKET, CARDS, sharding_of
from okd.online import attach_online_module
from okd.plan import plan

N = 4  # devices


def numel(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def models(tmp_path, save):  # noqa: F811
    """(options of `planned`, the teacher as okd trains it, the student): the teacher learns in its last layer."""
    source, teacher = save("teacher", "bfloat16", layers=3, hidden=48, tie_word_embeddings=False)
    smaller, student = save("student", "bfloat16", seed=1, tie_word_embeddings=False)
    options = {"bf16": True, "online_layers": 0.34, "online_rank": 4}
    adapted = attach_online_module(teacher.bfloat16(), tiny.config(tmp_path, **options))
    return {"teacher": source, "student": smaller, "device": "cuda", "devices": N, **options}, adapted, student


def sharded(tmp_path, options, sharding, **changes):
    options = {**options, **changes}
    return planned(tmp_path, options.pop("teacher"), options.pop("student"), sharding=sharding, **options)


def layers(model):
    return model.get_decoder().layers


def test_fsdp2_divides_weights_gradients_and_states(tmp_path, models):
    options, teacher, student = models
    of = parts(sharded(tmp_path, options, "fsdp2"))
    online = sum(p.numel() for p in teacher.parameters() if p.requires_grad)
    base, trains = numel(teacher) - online, numel(student)
    assert of["student weights"].forward == of["student gradients"].update == 4 * trains / N  # fp32
    assert of["student gradients"].forward == 0
    assert of["student optimizer states"].update == 2 * 4 * trains / N
    assert of["teacher weights"].forward == 2 * base / N  # bf16, as saved
    assert of["online module, its states"].update == 4 * 4 * online / N
    top = numel(layers(teacher.get_base_model())[-1])
    assert of["gathered layers"].forward == 2 * 2 * top  # two layers in bf16
    around = [numel(m) - sum(map(numel, layers(m))) for m in (student, teacher.get_base_model())]
    assert of["gathered embeddings, heads"].forward == 2 * sum(around)
    one = numel(layers(student)[0])
    assert of["gradients on their way"].forward == 2 * (around[0] + 2 * one)  # a layer's, and as it is sent
    assert "loss: heads in 16 bit" not in of and "student weights in bfloat16" not in of
    assert of["loss: head's gradient"] == ("loss: head's gradient", 4 * tiny.VOCAB * 32, 0, True)


def test_fsdp2_leaves_gradients_whole_between_micro_batches(tmp_path, models):
    options, teacher, student = models
    found = sharded(tmp_path, options, "fsdp2", gradient_accumulation_steps=2)
    online = sum(p.numel() for p in teacher.parameters() if p.requires_grad)
    assert parts(found)["gradients on their way"].forward == 2 * (numel(student) + online)
    assert parts(found)["student gradients"].forward == 0  # no share beside them
    once = parts(sharded(tmp_path, options, "zero3"))["student gradients"]
    assert once.forward == 2 * numel(student) / N  # which DeepSpeed keeps from step to step
    assert "raise the batch, not the accumulation" in found.table()
    assert parts(found)["loss: head's gradient"].update == 0  # sent, while one device has it beside the embeddings'
    once = sharded(tmp_path, options, "fsdp2").traffic
    name = "gradients, summed and divided"
    assert found.traffic[name] == once.pop(name)
    assert {k: found.traffic[k] for k in once} == {k: 2 * x for k, x in once.items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_keeps_an_fp32_copy_with_the_states(tmp_path, models, stage):
    options, teacher, student = models
    found = sharded(tmp_path, options, f"zero{stage}", gradient_accumulation_steps=2)
    of, n = parts(found), numel(student)
    online = sum(p.numel() for p in teacher.parameters() if p.requires_grad)
    weights, gradients = (N if stage >= least else 1 for least in (3, 2))
    assert of["student weights"].forward == 2 * n / weights
    assert of["teacher weights"].forward == 2 * (numel(teacher) - online) / weights
    assert of["student gradients"].forward == 2 * n / gradients
    assert of["student gradients"].update == 2 * n / gradients + 4 * n / N
    assert of["student optimizer states"].update == (4 + 8) * n / N
    held = 2 * online / weights + 12 * online / N + 2 * online / gradients
    assert of["online module, its states"].forward == held
    assert of["gradients on their way"].forward == 2 * (n + online) < 2 * 2 * BUCKET
    if stage == 3:
        assert of["gathered layers"].forward == 2 * (n + numel(teacher))  # fewer than DeepSpeed keeps alive
        assert of["gathered heads"].forward == 2 * tiny.VOCAB * (32 + 48)
        assert found.traffic["gradients, summed and divided"] == 3 / 4 * 2 * 2 * (n + online)
    else:
        assert "gathered layers" not in of
        # There and back of whole gradients once, or there at both micro-batches; then the updated weights.
        assert sum(found.traffic.values()) == 3 / 4 * 2 * (2 + 1) * (n + online)


def test_a_layer_without_a_graph_is_gathered_once(tmp_path, models):
    options, teacher, student = models
    base = teacher.get_base_model()
    online = sum(p.numel() for p in teacher.parameters() if p.requires_grad)
    found = sharded(tmp_path, options, "fsdp2").traffic
    ring = (N - 1) / N
    assert found == pytest.approx(
        {
            "student weights, forward": ring * 2 * numel(student),
            "student weights, backward": ring * 2 * sum(map(numel, layers(student))),
            "teacher weights, forward": ring * 2 * numel(teacher),
            "teacher weights, backward": ring * 2 * numel(layers(base)[-1]),
            "gradients, summed and divided": ring * 2 * (numel(student) + online),
        }
    )
    del options["online_layers"], options["online_rank"]
    assert "teacher weights, backward" not in sharded(tmp_path, options, "fsdp2", method="forward_kd").traffic


def test_ddp_sends_whole_gradients_and_one_device_nothing(tmp_path, models):
    options, teacher, student = models
    online = sum(p.numel() for p in teacher.parameters() if p.requires_grad)
    found = sharded(tmp_path, options, None)
    assert found.sharding == "ddp"
    assert found.traffic == {"gradients, summed": 3 / 4 * 2 * 4 * (numel(student) + online)}
    alone = sharded(tmp_path, options, "ddp", devices=1)
    assert alone.traffic == {} and alone.table() == sharded(tmp_path, options, None, devices=None).table()
    assert [part for part in found.parts if part.name != "DDP's buckets"] == alone.parts
    whole = sharded(tmp_path, options, "fsdp2", devices=1)
    assert parts(whole)["student weights"] == parts(alone)["student weights"] and whole.traffic == {}


def test_activations_of_gathered_layers_are_in_the_products_dtype(tmp_path, models):
    options, _, student = models
    of = parts(sharded(tmp_path, options, "fsdp2", max_length=32))
    of_student, _ = really_saved(student.bfloat16(), 4, 32)
    assert of["student activations"].forward == pytest.approx(of_student, rel=0.05)
    assert parts(sharded(tmp_path, options, "ddp", max_length=32))["student activations"].forward > 1.1 * of_student


def test_quantised_weights_are_not_divided(tmp_path, models):
    options, _, _ = models
    given = {"teacher_quantization": "4bit"}
    found, whole = (sharded(tmp_path, options, kind, given=given) for kind in ("fsdp2", "ddp"))
    assert parts(found)["teacher weights"] == parts(whole)["teacher weights"]
    assert "the teacher's weights are quantised, and not divided" in found.notes
    assert "teacher weights, forward" not in found.traffic


def test_a_self_teacher_is_divided_and_gathered_too(tmp_path, models):
    options, _, student = models
    for name in ("online_layers", "online_rank"):
        del options[name]
    given = {**options, "teacher": None, "method": "forward_kd", "self_teacher": "average"}
    found = sharded(tmp_path, given, "fsdp2")
    assert parts(found)["averaged self-teacher"].forward == 4 * numel(student) / N
    assert found.traffic["self-teacher weights, forward"] == found.traffic["student weights, forward"]


def test_a_student_in_16_bit_trains_in_fp32(tmp_path, models):
    options, _, student = models
    found = sharded(tmp_path, options, "fsdp2", given={"student_dtype": "bfloat16"})
    assert parts(found)["student weights"].forward == 4 * numel(student) / N
    assert parts(found)["student optimizer states"].forward == 8 * numel(student) / N


def test_the_kind_is_that_of_the_arguments_or_the_launcher(tmp_path, monkeypatch):
    assert sharding_of(tiny.config(tmp_path)) == "ddp"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding_of(tiny.config(tmp_path)) == "fsdp2"
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    args = tiny.config(tmp_path)
    for stage, kind in ((0, "ddp"), (2, "zero2"), (3, "zero3")):
        args.deepspeed_plugin = type("Plugin", (), {"zero_stage": stage})
        assert sharding_of(args) == kind


def test_a_run_with_zero3_is_planned_with_whole_models(tmp_path, models, monkeypatch):
    """There transformers would divide what it makes."""
    options, _, student = models

    class Zero3:
        def is_zero3(self):
            return True

    config = Zero3()
    monkeypatch.setattr("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", weakref.ref(config))
    found = sharded(tmp_path, options, "zero3")
    assert is_deepspeed_zero3_enabled()
    assert found.parameters["student"] == numel(student) and found.flops["student forward"] > 0
    assert not any("could not be built" in note for note in found.notes)


def test_what_fits_when_divided(tmp_path, models, caplog):
    options, _, _ = models
    whole, divided = (sharded(tmp_path, options, kind) for kind in ("ddp", "fsdp2"))
    assert divided.certain < whole.certain
    check_fits(divided, divided.peak)
    with pytest.raises(ValueError, match=r"divide the models .*, train a LoRA"):
        check_fits(whole, whole.certain - 1)
    with pytest.raises(ValueError, match="divide the models among more devices, train a LoRA"):
        check_fits(divided, divided.certain - 1)
    logger = logging.getLogger("okd.budget")
    logger.addHandler(caplog.handler)
    try:
        check_fits(divided, divided.peak - 1)
        assert "lower --per-device-train-batch-size" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_the_network_joins_machines_and_the_card_says_the_rest(tmp_path, models, capsys):
    options, _, _ = models
    assert [CARDS["b200"].link(n) for n in (8, 16)] == [900, 400]
    assert CARDS["h100"].link(16) == 400 and CARDS["a100"].link(16) == 300
    words = ["okd", "--teacher", options["teacher"], "--student", options["student"], "--max-length", "16", "--bf16"]
    words += ["--output-dir", str(tmp_path / "out"), "--gpus", "4"]
    assert main(["plan", *words, "--gpu", "h100", "--shard", "fsdp2"]) == 0
    out = capsys.readouterr().out
    assert "of 79.10: fits" in out and "at 396 TFLOP/s" in out and "at 360 GB/s" in out
    assert "transfers beside products" in out and "products at 40% of 989 TFLOP/s" in out
    assert main(["plan", *words, "--shard", "zero3", "--tflops", "2", "--bandwidth", "3", "--memory", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "at 2 TFLOP/s" in out and "at 3 GB/s" in out and "does not fit" in out and "* to make it fit: " in out
    assert main(["plan", *words, "--tflops", "2"]) == 0
    out = capsys.readouterr().out
    assert "pass --gpu or --bandwidth" in out
    assert main(["plan", *words, "--bandwidth", "0"]) == 2
    assert "expected --bandwidth above 0; got 0" in capsys.readouterr().err


def test_a_teacher_on_a_gpu_that_this_machine_has_not(tmp_path, models, capsys):
    options, _, _ = models
    words = ["okd", "--teacher", options["teacher"], "--student", options["student"], "--max-length", "16", "--bf16"]
    words += ["--output-dir", str(tmp_path / "out"), "--gpus", "1", "--gpu", "h100", "--teacher-device"]
    assert main(["plan", *words, "cuda:77"]) == 0
    out = capsys.readouterr().out
    elsewhere = [line for line in out.splitlines() if "(not in the sum)" in line]
    names = {"teacher weights", "teacher activations", "teacher weights in bfloat16", "online module, its states"}
    assert {line.split(" (")[0] for line in elsewhere} == names  # weights in bfloat16: of the LoRA
    assert {line.index("   (not") for line in elsewhere} == {54} and all("(cuda:77)" in line for line in elsewhere)
    assert main(["plan", *words, "cuda"]) == 0
    assert "(not in the sum)" not in capsys.readouterr().out
    assert main(["plan", *words, "nowhere"]) == 2
    assert "expected the teacher on a device such as cpu or cuda:1; got 'nowhere'" in capsys.readouterr().err


def test_a_steps_time_lies_between_overlap_and_none(tmp_path, models):
    options, _, _ = models
    found = sharded(tmp_path, options, "fsdp2")
    products, transfers = found.seconds(2.0), found.transfer_seconds(0.001)
    assert transfers == pytest.approx(sum(found.traffic.values()) / 1e6) and transfers > products
    assert found.bounds(2.0, 0.001) == {
        "transfers beside products": transfers,
        "one after the other": pytest.approx(products + transfers),
    }


@pytest.mark.slow  # 112 layers are traced
def test_70b_teaches_8b_on_8_cards(tmp_path):
    """Dimensions of Llama 3.1, as its model cards publish them; the counts below are arithmetic on those."""
    common = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False, "dtype": "bfloat16"}
    for name, d, n, heads, inner in (("70b", 8192, 80, 64, 28672), ("8b", 4096, 32, 32, 14336)):
        config = LlamaConfig(
            hidden_size=d, num_hidden_layers=n, num_attention_heads=heads, intermediate_size=inner, **common
        )
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path / name)
    words = ["okd", "--teacher", str(tmp_path / "70b"), "--student", str(tmp_path / "8b"), "--bf16", "--use-cpu"]
    words += ["--max-length", "2048", "--per-device-train-batch-size", "2", "--gradient-checkpointing"]
    config, args = parse_train([*words, "--output-dir", str(tmp_path / "out")])
    found = plan(config, args, "cuda", 8, "fsdp2")

    def layer(d, inner):
        return 2 * d * d + 2 * d * 1024 + 3 * d * inner + 2 * d  # q and o, k and v, gated MLP, norms

    teacher, student = (2 * 128256 * d + d + n * layer(d, i) for d, n, i in ((8192, 80, 28672), (4096, 32, 14336)))
    assert (teacher, student) == (70_553_706_496, 8_030_261_248)
    online = 80 * 32 * (2 * 8192 + 8192 + 1024)  # q (D -> D) and v (D -> 1024) of rank 32
    assert found.parameters["teacher"] == teacher and found.parameters["teacher's online module"] == online
    of = parts(found)
    assert of["teacher weights"].forward == 2 * teacher / 8
    assert of["student weights"].forward == 4 * student / 8
    assert of["student optimizer states"].forward == student
    assert of["gathered layers"].forward == 2 * 2 * (layer(8192, 28672) + online / 80)
    assert of["gathered embeddings, heads"].forward == 2 * (2 * 128256 + 1) * (8192 + 4096)
    inputs = 2 * 2048 * 8192 * 2 * 80  # of each checkpointed layer of the teacher
    assert inputs < of["teacher activations"].forward < inputs + 4 * GIB
    tokens = 2 * 2048
    dense = 2 * tokens * 80 * layer(8192, 28672)
    assert found.flops["teacher forward"] == pytest.approx(dense, rel=0.05)
    assert found.flops["teacher backward"] == pytest.approx(dense, rel=0.1)  # no weight's gradient
    gathered = 7 / 8 * 2 * (2 * (teacher + online + student) - (2 * 128256 + 1) * (8192 + 4096))
    assert sum(found.traffic.values()) == pytest.approx(gathered + 7 / 8 * 2 * (student + online))
    memory = CARDS["h100"].memory * GIB
    check_fits(found, memory)
    assert found.peak < memory < 2 * found.peak
    assert 5 < found.bounds(0.4 * 989, 0.8 * 450)["one after the other"] < 8
    with pytest.raises(ValueError, match="divide the models"):
        check_fits(plan(config, args, "cuda", 8, "zero2"), memory)
