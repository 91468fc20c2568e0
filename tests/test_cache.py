"""A cached teacher gives the losses and gradients of one that is computed; what does not fit its cache is refused."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import tiny
import torch

from okd import OKDTrainer, loading, run
from okd.cache import MANIFEST, TeacherCache, read_manifest
from okd.cli import main
from okd.encoding import encode
from okd.filling import fill
from okd.layers import first_trainable_layer


def trainer_of(folder, name, method, teacher=None, train=None, held_out=None, **options):
    args = tiny.config(folder / name, method=method, **options)
    student, teacher = tiny.llama(), tiny.llama(seed=1, layers=6, hidden=48) if teacher is None else teacher
    train = tiny.examples() if train is None else train
    held_out = tiny.examples(6, seed=9) if held_out is None else held_out
    return OKDTrainer(student, teacher, args, train, held_out, processing_class=tiny.tokenizer())


def history(trainer):
    trainer.train()
    kept = ("student_loss", "teacher_loss", "base_forward_kl", "teacher_shift", "grad_norm", "teacher_grad_norm")
    return [{k: entry[k] for k in kept if k in entry} for entry in trainer.state.log_history if "loss" in entry]


def assert_close(found, expected, tolerance):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance / 10), name


CASES = {
    "forward_kd": {},
    "reverse_kd": {"temperature": 2.0},
    "taid": {},
    "rlkd": {},
    "okd": {"online_layers": 1 / 3, "teacher_kl_weight": 0.5},
    "okd at the top": {"online_layers": 0.1},
    "okd packed": {"online_layers": 1 / 3, "packing": True, "max_length": 32},
    "okd checkpointed": {"online_layers": 0.5, "gradient_checkpointing": True},
    "okd reentrant": {
        "online_layers": 0.5,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "forward_kd packed": {"packing": True, "max_length": 32},
    "okd every": {"online_layers": 0.5, "online_every": 2},
    "okd, workers load": {"online_layers": 0.5, "dataloader_num_workers": 1},
}


FAST = ("forward_kd", "reverse_kd", "okd", "okd packed", "okd checkpointed")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in FAST)) for c in CASES])
def test_cached_is_uncached(tmp_path, case):
    method, options = case.replace(",", "").split()[0], CASES[case]
    expected = trainer_of(tmp_path, "uncached", method, **options)
    cached = trainer_of(tmp_path, "cached", method, teacher_cache=str(tmp_path / "cache"), **options)
    assert_close(history(cached), history(expected), 1e-4)
    for one, other in zip(cached.pair.student.parameters(), expected.pair.student.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert cached.evaluate() == pytest.approx(expected.evaluate(), rel=1e-3)


def test_the_body_takes_no_part(tmp_path):
    """Nor do the layers below the online module, whose weights may be anything once their states are kept."""
    options = {"teacher_cache": str(tmp_path / "cache")}
    trainer = trainer_of(tmp_path, "first", "forward_kd", **options)
    expected = history(trainer)
    assert trainer.teacher is None and sum(p.numel() for p in trainer.pair.teacher.parameters()) == 64 * 48
    again = trainer_of(tmp_path, "second", "forward_kd", **options)
    again.pair.teacher.release()
    assert history(again) == expected

    options = {"teacher_cache": str(tmp_path / "other"), "online_layers": 1 / 3}
    expected = history(trainer_of(tmp_path, "third", "okd", **options))
    again = trainer_of(tmp_path, "fourth", "okd", **options)
    again.fill_cache()
    again.pair.teacher.release()
    layers = again.teacher.get_base_model().model.layers
    assert [sum(p.numel() for p in layer.parameters()) > 0 for layer in layers] == [False] * 4 + [True] * 2
    assert history(again) == expected
    assert again.evaluate()["eval_forward_kl"] > 0
    with pytest.raises(ValueError, match="and the teacher that computes them is not in memory"):
        again.evaluate(tiny.examples(5, seed=77))


def test_a_frozen_teacher_goes_on_from_states_of_a_lower_layer(tmp_path):
    trainer = trainer_of(tmp_path, "okd", "okd", online_layers=1 / 3, teacher_cache=str(tmp_path / "cache"))
    trainer.fill_cache()
    files = sorted((tmp_path / "cache" / "states").iterdir())
    found = trainer_of(tmp_path, "kd", "forward_kd", teacher_cache=str(tmp_path / "cache"))
    assert_close(history(found), history(trainer_of(tmp_path, "expected", "forward_kd")), 1e-4)
    assert sorted((tmp_path / "cache" / "states").iterdir()) == files


@pytest.mark.parametrize("method", ["forward_kd", "okd"])
def test_sixteen_bits(tmp_path, method):
    options = {"online_layers": 1 / 3} if method == "okd" else {}
    expected = trainer_of(tmp_path, "uncached", method, **options)
    options |= {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_dtype": "bfloat16"}
    found = trainer_of(tmp_path, "cached", method, **options)
    assert_close(history(found), history(expected), 1e-2)
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    assert manifest["dtype"] == "bfloat16"

    def kept(row):
        return sum(label != -100 for label in row["labels"]) if method == "forward_kd" else len(row["input_ids"])

    sizes = sum(file.stat().st_size for file in (tmp_path / "cache" / "states").iterdir())
    assert sizes < 0.75 * sum(map(kept, (*found.train_dataset, *found.eval_dataset))) * 48 * 4 + 40 * 32


def test_likeliest_tokens(tmp_path):
    """All of them: the divergence itself. A few: less than it; what is evaluated is exact in any case."""
    options = {"temperature": 2.0}
    expected = trainer_of(tmp_path, "uncached", "forward_kd", **options)
    of_all = history(expected)
    options |= {"teacher_cache": str(tmp_path / "all"), "teacher_cache_top_k": 64}
    found = history(trainer_of(tmp_path, "all", "forward_kd", **options))
    assert [x["student_loss"] for x in found] == pytest.approx([x["student_loss"] for x in of_all], rel=1e-3)
    options |= {"teacher_cache": str(tmp_path / "few"), "teacher_cache_top_k": 8}
    cached = trainer_of(tmp_path, "few", "forward_kd", **options)
    before = cached.evaluate()
    assert before == pytest.approx(trainer_of(tmp_path, "fresh", "forward_kd").evaluate(), rel=1e-4)
    found = history(cached)
    assert 0.3 * of_all[0]["student_loss"] < found[0]["student_loss"] < 0.999 * of_all[0]["student_loss"]
    entry = cached.cache.entry(cached.train_dataset[0])
    assert {name: (x.shape[1], x.element_size()) for name, x in entry.items()} == {"ids": (8, 4), "log_probs": (8, 4)}


def test_teacher_prompts(tmp_path):
    """Rows are found by what the teacher reads."""
    data = [{**example, "teacher_prompt": "w9 w8 w7 w6"} for example in tiny.examples()]
    for method, options in (("forward_kd", {}), ("okd", {"online_layers": 1 / 3})):
        expected = history(trainer_of(tmp_path, f"{method}-u", method, train=data, **options))
        options = {**options, "teacher_cache": str(tmp_path / method)}
        assert_close(history(trainer_of(tmp_path, f"{method}-c", method, train=data, **options)), expected, 1e-4)


def test_what_is_complete_is_not_written_to(tmp_path):
    options = {"teacher_cache": str(tmp_path / "cache")}
    expected = history(trainer_of(tmp_path, "first", "forward_kd", **options))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert history(trainer_of(tmp_path, "second", "forward_kd", **options)) == expected
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == files


def test_missing_rows_are_added(tmp_path, caplog):
    options = {"teacher_cache": str(tmp_path / "cache")}
    trainer_of(tmp_path, "first", "forward_kd", **options).fill_cache()
    caplog.clear()
    more = [*tiny.examples(), *tiny.examples(40, seed=5)]
    trainer = trainer_of(tmp_path, "second", "forward_kd", train=more, **options)
    missing = len(trainer.cache.missing(trainer.train_dataset))
    assert 0 < missing < len(more)
    trainer.fill_cache()
    assert f"{missing} rows" in caplog.text and not trainer.cache.missing(trainer.train_dataset)
    caplog.clear()
    trainer.evaluate(tiny.examples(5, seed=77))  # rows that nobody announced
    assert " rows, " in caplog.text


def test_what_was_killed_goes_on(tmp_path, monkeypatch):
    """Rows that were written are not computed again, and all are the same in the end."""
    monkeypatch.setattr("okd.store.UNWRITTEN_SECONDS", 0.0)
    options = {"per_device_eval_batch_size": 4}
    whole = trainer_of(tmp_path, "whole", "forward_kd", teacher_cache=str(tmp_path / "whole-cache"), **options)
    whole.fill_cache()
    options["teacher_cache"] = str(tmp_path / "cache")
    killed = trainer_of(tmp_path, "killed", "forward_kd", **options)
    put, count = killed.cache.store.put, []

    def put_some(key, entry):
        if len(count) == 10:
            raise KeyboardInterrupt
        count.append(key)
        put(key, entry)

    monkeypatch.setattr(killed.cache.store, "put", put_some)
    with pytest.raises(KeyboardInterrupt):
        killed.fill_cache()
    again = trainer_of(tmp_path, "again", "forward_kd", **options)
    put = again.cache.store.put
    monkeypatch.setattr(again.cache.store, "put", lambda key, entry: (count.append(key), put(key, entry)))
    again.fill_cache()
    assert len(count) == len(set(count))
    for row in again.train_dataset:
        assert torch.equal(again.cache.entry(row)["states"], whole.cache.entry(row)["states"])


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr("okd.durable.shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    trainer = trainer_of(tmp_path, "run", "forward_kd", teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(OSError, match=r"expected .* GiB of room, 192 bytes a token; got 0.00.*bfloat16"):
        trainer.train()
    assert not (tmp_path / "cache").exists()


def _other(**changes):
    return {"teacher": tiny.llama(seed=1, layers=6, hidden=48), **changes}


REFUSED = {
    "another teacher": (_other(teacher=tiny.llama(seed=2, layers=6, hidden=48)), "expected a cache of the teacher"),
    "another dtype": ({"teacher_cache_dtype": "bfloat16"}, "teacher_cache_dtype=bfloat16; got one of float32"),
    "another kind": ({"teacher_cache_top_k": 4}, "top_k=4; got one of None"),
    "another template": ({"chat_template_kwargs": '{"a": 1}'}, "this chat template and its options"),
    "other data": (
        {"train": [{"prompt": "w60 w59", "completion": "w58"}]},
        "expected the data that it was made of; got",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_run_is_refused(tmp_path, case):
    changes, message = REFUSED[case]
    options = {"teacher_cache": str(tmp_path / "cache")}
    trainer_of(tmp_path, "first", "forward_kd", train=tiny.examples(8), **options).fill_cache()
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, "second", "forward_kd", **{"train": tiny.examples(8), **options, **changes}).fill_cache()


def test_a_higher_boundary_is_refused(tmp_path):
    cache = str(tmp_path / "cache")
    trainer_of(tmp_path, "first", "okd", online_layers=1 / 6, teacher_cache=cache).fill_cache()
    trainer_of(tmp_path, "smaller", "okd", online_layers=1 / 6, online_rank=2, teacher_cache=cache).fill_cache()
    with pytest.raises(ValueError, match="states that enter layer 3, the lowest that learns, or a lower one; got one"):
        trainer_of(tmp_path, "second", "okd", online_layers=0.5, teacher_cache=cache)


def test_another_directory_is_refused(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected a teacher cache or an empty directory"):
        trainer_of(tmp_path, "run", "forward_kd", teacher_cache=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("okd", {}, "frozen layers below all that learns.*online_layers=0.33"),
        ("okd", {"online_module": "prefix"}, "frozen layers below all that learns"),
        ("okd", {"online_module": "p_tuning"}, "frozen layers below all that learns"),
        ("okd", {"online_layers": 0.5, "teacher_cache_top_k": 4}, "frozen teacher.*got method okd, whose teacher"),
        ("rlkd", {"teacher_cache_top_k": 4}, "got method rlkd, which reads the teacher's hidden states"),
        ("alpha_beta_kd", {"teacher_cache_top_k": 4}, "got alpha_beta"),
        ("gkd", {}, "responses that do not change"),
        ("skd", {}, "responses that do not change"),
        ("minillm", {}, "responses that do not change"),
        ("distillm", {}, "responses that do not change"),
        ("distillm2", {}, "responses that do not change"),
        ("seqkd", {}, "responses that do not change"),
        ("mixkd", {}, "responses that do not change"),
        ("sft", {}, "responses that do not change"),
        ("gated_ensemble", {}, "responses that do not change"),
        ("forward_kd", {"self_teacher": "average"}, "expected a teacher of its own with teacher_cache"),
    ],
)
def test_methods_that_a_cache_does_not_serve(tmp_path, method, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, "run", method, teacher_cache=str(tmp_path / "cache"), **options)


def test_options_without_a_cache(tmp_path):
    with pytest.raises(ValueError, match="expected teacher_cache with teacher_cache_top_k; got none"):
        tiny.config(tmp_path, method="forward_kd", teacher_cache_top_k=4)


def test_a_damaged_file_is_named(tmp_path):
    cache = str(tmp_path / "cache")
    trainer_of(tmp_path, "first", "forward_kd", teacher_cache=cache).fill_cache()
    file = next((tmp_path / "cache" / "states").iterdir())
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"expected a whole safetensors file.*remove it"):
        trainer_of(tmp_path, "second", "forward_kd", teacher_cache=cache)


def test_wrong_states_are_found(tmp_path):
    """At the start, by the whole model: not after a training."""
    cache = str(tmp_path / "cache")
    trainer_of(tmp_path, "first", "okd", online_layers=1 / 3, teacher_cache=cache).fill_cache()
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    (tmp_path / "cache" / MANIFEST).write_text(json.dumps({**manifest, "layer": 3}))
    with pytest.raises(ValueError, match="whose last hidden states are others than those of the whole model"):
        trainer_of(tmp_path, "second", "okd", online_layers=1 / 3, teacher_cache=cache).train()


def test_a_stream_is_refused(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(tiny.examples()).to_iterable_dataset()
    with pytest.raises(ValueError, match="expected all training data at once with teacher_cache"):
        trainer_of(tmp_path, "run", "forward_kd", train=data, teacher_cache=str(tmp_path / "cache"))


def test_a_stream_is_refused_beside_a_complete_cache(tmp_path, capsys):
    """Before its rows are looked for there."""
    tiny.save_inputs(tmp_path)
    assert main(cached(tmp_path)) == 0
    capsys.readouterr()
    assert main(cached(tmp_path, "--stream", command="train")) == 2
    assert "expected all training data at once with teacher_cache" in capsys.readouterr().err


def test_the_lowest_layer_that_learns():
    model = tiny.llama(layers=4)
    assert first_trainable_layer(model) == 0
    model.requires_grad_(False)
    assert first_trainable_layer(model) == 4
    model.model.norm.weight.requires_grad_()
    assert first_trainable_layer(model) == 4
    model.model.layers[2].mlp.up_proj.weight.requires_grad_()
    assert first_trainable_layer(model) == 2


def test_a_run_resumes_beside_its_cache(tmp_path):
    options = {"online_layers": 1 / 3, "teacher_cache": str(tmp_path / "cache"), "save_strategy": "steps"}
    expected = trainer_of(tmp_path, "whole", "okd", save_steps=2, **options)
    expected.train()
    again = trainer_of(tmp_path, "whole", "okd", save_steps=2, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    tiny.assert_same_weights(again.pair.student, expected.pair.student)
    tiny.assert_same_weights(again.teacher, expected.teacher)


# --- the command


def cached(root, *options, method="forward_kd", command="cache"):
    words = tiny.train_arguments(root, root / "out", "--teacher-cache", str(root / "cache"), *options, method=method)
    return [command, *words[1:]]


@pytest.mark.slow
def test_okd_cache(tmp_path, monkeypatch, capsys):
    """Afterwards `okd train` needs no weights of the teacher, but what is new brings them back."""
    tiny.save_inputs(tmp_path)
    assert main(cached(tmp_path)) == 0
    assert "is complete" in capsys.readouterr().out and not any((tmp_path / "out").iterdir())
    loaded = []
    load = loading.load_teacher
    monkeypatch.setattr(loading, "load_teacher", lambda *given: loaded.append(given) or load(*given))
    monkeypatch.setattr(run, "load_teacher", loading.load_teacher)
    assert main(cached(tmp_path, "--eval-strategy", "steps", "--eval-steps", "2", command="train")) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert not loaded
    assert main(tiny.train_arguments(tmp_path, tmp_path / "uncached", method="forward_kd")) == 0
    expected = json.loads((tmp_path / "uncached" / "metrics.json").read_text())
    for when in ("before", "after"):
        for name in ("forward_kl", "reverse_kl", "perplexity", "teacher_perplexity", "rouge_l"):
            assert found[when][name] == pytest.approx(expected[when][name], rel=1e-4), name
    loaded.clear()
    lines = [json.dumps(line) for line in tiny.examples(90)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    assert main(cached(tmp_path, "--overwrite", command="train")) == 0
    assert len(loaded) == 1


def test_other_files_of_the_teacher_are_refused(tmp_path, capsys):
    tiny.save_inputs(tmp_path)
    assert main(cached(tmp_path)) == 0
    tiny.llama(seed=4, layers=3, hidden=48).save_pretrained(tmp_path / "teacher")
    assert main(cached(tmp_path, command="train")) == 2
    assert "expected a cache of the teacher" in capsys.readouterr().err


def test_okd_cache_wants_a_directory(tmp_path, capsys):
    tiny.save_inputs(tmp_path)
    assert main(["cache", *tiny.train_arguments(tmp_path, tmp_path / "out", method="forward_kd")[1:]]) == 2
    assert "pass --teacher-cache" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_by_the_system(tmp_path):
    """By SIGKILL, as soon as something is written: what is whole stays, and the next one goes on with the rest."""
    tiny.save_inputs(tmp_path)
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(line) for line in tiny.examples(4000)))
    code = "import sys; from okd import cli, store; store.UNWRITTEN_SECONDS = 0.0; cli.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *cached(tmp_path, "--per-device-eval-batch-size", "2")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    states = tmp_path / "cache" / "states"
    while process.poll() is None and len(list(states.glob("*.safetensors"))) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    files = set(states.glob("*.safetensors"))
    assert len(files) >= 3 and not json.loads((tmp_path / "cache" / MANIFEST).read_text())["is_complete"]
    assert main(cached(tmp_path)) == 0
    manifest = read_manifest(tmp_path / "cache")
    assert manifest.is_complete and files < set(states.glob("*.safetensors"))
    whole = TeacherCache(tmp_path / "cache", manifest)
    rows = encode(tiny.examples(4000), tiny.tokenizer(), max_length=512).rows
    assert not whole.missing(rows)


def test_rows_of_one_text_are_told_apart_by_what_is_learned(tmp_path):
    """At the top, where states of response tokens alone are kept; below it they are the same."""
    ids = list(range(2, 12))
    rows = [{"id": str(n), "input_ids": ids, "labels": [-100] * n + ids[n:]} for n in (3, 6)]
    for method, options, count in (("forward_kd", {}, 2), ("okd", {"online_layers": 0.5}, 1)):
        cache = tmp_path / f"{method}-cache"
        trainer = trainer_of(tmp_path, method, method, teacher_cache=str(cache), **options)
        assert len(trainer.cache.missing(rows)) == count
        fill(
            *(trainer.cache, trainer.pair.teacher, rows, trainer.args, tiny.EOS),
            inside=lambda work: work(),
            autocast=trainer.accelerator.autocast,
        )
        lengths = [len(trainer.cache.entry(row)["states"]) for row in rows]
        assert lengths == ([7, 4] if method == "forward_kd" else [10, 10])


def test_no_memory_is_no_refusal(tmp_path):
    trainer = trainer_of(tmp_path, "run", "okd", online_layers=0.5, teacher_cache=str(tmp_path / "cache"))
    layer = trainer.teacher.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fill_cache()
