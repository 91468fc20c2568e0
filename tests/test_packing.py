"""Packed lines against the same rows on lines of their own."""

import random

import pytest
import tiny
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from okd import METHODS, OKDTrainer
from okd.data import Collator, Packed, batch_rows, lengths_of, packed, row_of_token, rows_of, tokens_of
from okd.encoding import Stream, encode
from okd.models import check_packing, response_rows
from okd.pair import StudentTeacher


def encoded(n=12, **options):
    return encode(tiny.examples(n, **options), tiny.tokenizer(), max_length=40).rows


def lines(rows, max_length=24):
    return [[rows[i] for i in line] for line in packed(lengths_of(rows), max_length)]


# --- lines ---


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_on_one_line_that_holds_it_and_few_lines_are_needed(seed):
    random.seed(seed)
    lengths = [random.randint(1, 100) for _ in range(500)]
    found = packed(lengths, 100)
    assert sorted(i for line in found for i in line) == list(range(500))
    assert all(sum(lengths[i] for i in line) <= 100 for line in found)
    assert len(found) <= 1.05 * sum(lengths) / 100 + 1
    assert found == packed(lengths, 100)


def test_best_fit_puts_a_row_where_least_room_is_left():
    assert packed([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert packed([3, 3], 3) == [[0], [1]] and packed([], 5) == []
    rows = encoded(3)
    data = Packed(rows, lengths_of(rows), 100)
    assert len(data) == 1 and sorted(row["id"] for row in data[0]) == sorted(row["id"] for row in rows)


# --- batches ---


def test_a_packed_batch_has_the_tokens_targets_and_rows_of_its_lines():
    rows = encoded()
    given = lines(rows)
    assert any(len(line) > 1 for line in given)
    batch = Collator(tiny.EOS)(given)
    order = [row for line in given for row in line]
    assert batch["ids"] == [row["id"] for row in order] and rows_of(batch) == order
    flat = batch["input_ids"].flatten()
    for i, row in enumerate(order):
        at = tokens_of(batch, [i])
        labels = [label for label in row["labels"] if label != -100]
        assert batch["targets"][at].tolist() == labels and batch["counts"][i] == len(labels)
        assert flat[batch["positions"][at] + 1].tolist() == labels
        line, first, n = batch["spans"][i]
        assert batch["position_ids"][line, first : first + n].tolist() == list(range(n))
        assert (row_of_token(batch)[at] == i).all()
    assert batch["attention_mask"].sum() == sum(len(row["input_ids"]) for row in rows)
    assert "position_ids" not in Collator(tiny.EOS)(rows)


def test_some_rows_of_a_packed_batch_are_those_rows_as_a_batch():
    told = [{**row, "teacher_prompt": [5, 6, 7, 8][: 1 + i % 4]} for i, row in enumerate(encoded(6))]
    for given in (told, lines(told)):
        batch = Collator(tiny.EOS)(given)
        order = [row for line in given for row in (line if isinstance(line, list) else [line])]
        for chosen in ([0], [4, 1], [2, 3, 5]):
            part, expected = batch_rows(batch, chosen), Collator(tiny.EOS)([order[i] for i in chosen])
            assert rows_of(part) == [order[i] for i in chosen]
            for prefix in ("", "teacher_"):
                ids, mask = (part[f"{prefix}{name}"] for name in ("input_ids", "attention_mask"))
                assert torch.equal(mask, expected[f"{prefix}attention_mask"])
                assert torch.equal(ids * mask, expected[f"{prefix}input_ids"] * mask)
                assert torch.equal(part[f"{prefix}positions"], expected[f"{prefix}positions"])
            assert torch.equal(part["labels"], expected["labels"]) and torch.equal(part["targets"], expected["targets"])


# --- models ---


def sizes(**options):
    return {"vocab_size": 64, "initializer_range": 0.2, **options}


def transformer(**options):
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return sizes(**common, num_key_value_heads=2, head_dim=8, **options)


MODELS = {
    "llama": tiny.llama,
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**transformer())),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**transformer(sliding_window=3))),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**sizes(n_embd=32, n_layer=2, n_head=4, n_positions=64))),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_on_one_line_do_not_see_one_another(name, attention):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation(attention)
    check_packing(model, "student")
    rows = encoded()
    given = lines(rows)
    with torch.no_grad():
        together = response_rows(model, Collator(tiny.EOS)(given))
        alone = response_rows(model, Collator(tiny.EOS)([row for line in given for row in line]))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: MambaForCausalLM(MambaConfig(**sizes(hidden_size=32, num_hidden_layers=2, state_size=4))),
        lambda: BloomForCausalLM(BloomConfig(**sizes(hidden_size=32, n_layer=2, n_head=4))),
    ],
)
def test_a_model_that_looks_across_rows_is_refused(build, tmp_path):
    torch.manual_seed(0)
    model = build()
    options = {"train_dataset": tiny.examples(), "processing_class": tiny.tokenizer()}
    with pytest.raises(ValueError, match=r"expected a student whose attention stays within.*group_by_length"):
        OKDTrainer(model, None, tiny.config(tmp_path, method="sft", packing=True), **options)
    with pytest.raises(ValueError, match="expected a teacher whose attention stays within"):
        args = tiny.config(tmp_path, method="forward_kd", packing=True, vocab_size=64)
        OKDTrainer(tiny.llama(), model, args, **options)


# --- losses ---


def loss_and_gradients(method, given, tmp_path, **options):
    args = tiny.config(tmp_path, method=method, **options)
    teachers = [tiny.llama(seed=1), tiny.llama(seed=2)]
    if METHODS[method].is_routed:
        teachers = {"a": teachers[0], "b": teachers[1]}
    elif not METHODS[method].takes_several:
        teachers = teachers[0] if METHODS[method].needs_teacher else None
    from okd.preparing import prepare_teacher

    student = tiny.llama(layers=1)
    torch.manual_seed(3)
    teacher = prepare_teacher(teachers, args, student, [], Collator(tiny.EOS))
    pair = StudentTeacher(student, teacher, args)
    if teacher is not None and teacher.learns:  # a LoRA starts at no change, where half of its gradients are zero
        torch.manual_seed(4)
        for parameter in pair.sides()["teacher"]:
            torch.nn.init.normal_(parameter, std=0.1)
    pair.at(1, 4)
    loss = pair(Collator(tiny.EOS)(given))
    loss.total.backward()
    gradients = {name: p.grad for name, p in pair.named_parameters() if p.grad is not None}
    return loss, gradients


WRITERS = ("dataset", "student", "teacher")


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"mixkd", "clda"}))
def test_losses_and_gradients_are_those_of_rows_on_their_own_lines(method, tmp_path):
    rows = encoded()
    for i, row in enumerate(rows):
        row["writer"], row["teacher"] = WRITERS[i % 3], "ab"[i % 2]
    given = lines(rows)
    flat = [row for line in given for row in line]
    (ours, together), (theirs, alone) = (loss_and_gradients(method, x, tmp_path) for x in (given, flat))
    torch.testing.assert_close(ours.student, theirs.student, rtol=1e-5, atol=1e-6)
    assert together.keys() == alone.keys() and together
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-3, atol=1e-5, msg=name)
    for name, values in ours.metrics.items():
        torch.testing.assert_close(values, theirs.metrics[name], rtol=1e-3, atol=1e-4, msg=name)


# --- training ---


def trained(tmp_path, **options):
    args = tiny.config(tmp_path, packing=True, max_length=24, per_device_train_batch_size=2, **options)
    data = {"train_dataset": tiny.examples(), "eval_dataset": tiny.examples(8, seed=9)}
    run = OKDTrainer(tiny.llama(layers=1), tiny.llama(seed=1), args, **data, processing_class=tiny.tokenizer())
    return run, run.train()


@pytest.mark.parametrize("method", ["okd", "gkd", "distillm2"])
def test_a_packed_run_learns_from_every_row(method, tmp_path):
    options = {"student_share": 0.5} if method == "gkd" else {}
    run, result = trained(tmp_path, method=method, num_train_epochs=1, max_steps=-1, **options)
    seen = len(run.train_dataset)
    assert seen < 24 / 1.5 and result.global_step == -(-seen // 2)
    assert sorted(row["id"] for line in run.train_dataset for row in line) == sorted(e["id"] for e in tiny.examples())
    assert all(entry["student_loss"] > 0 for entry in run.state.log_history if "student_loss" in entry)


def test_a_stream_is_packed_as_it_comes(tmp_path):
    class Examples(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from tiny.examples()

    args = tiny.config(tmp_path, packing=True, max_length=24, per_device_train_batch_size=2, max_steps=3)
    data = {"train_dataset": Examples(), "processing_class": tiny.tokenizer()}
    run = OKDTrainer(tiny.llama(layers=1), tiny.llama(seed=1), args, **data)
    assert isinstance(run.train_dataset, Stream)
    found = list(run.train_dataset)
    assert sorted(row["id"] for line in found for row in line) == sorted(e["id"] for e in tiny.examples())
    assert all(sum(len(row["input_ids"]) for row in line) <= 24 for line in found)
    assert run.train().global_step == 3


def test_what_packing_does_not_go_with(tmp_path):
    with pytest.raises(ValueError, match="got method mixkd, whose rows are mixed: leave packing out"):
        tiny.config(tmp_path, method="mixkd", packing=True)
    with pytest.raises(ValueError, match="with online_module=prefix: leave packing out"):
        tiny.config(tmp_path, method="okd", online_module="prefix", packing=True)
    with pytest.raises(ValueError, match="packing, or batches of like lengths"):
        tiny.config(tmp_path, packing=True, train_sampling_strategy="group_by_length")


def test_batches_of_like_lengths(tmp_path):
    args = tiny.config(tmp_path, method="sft", train_sampling_strategy="group_by_length", max_steps=-1)
    run = OKDTrainer(tiny.llama(), None, args, train_dataset=tiny.examples(64), processing_class=tiny.tokenizer())
    batches = [batch["attention_mask"] for batch in run.get_train_dataloader()]
    padding = sum((mask == 0).sum().item() for mask in batches) / sum(mask.numel() for mask in batches)
    assert len(batches) == 16 and padding < 0.1
