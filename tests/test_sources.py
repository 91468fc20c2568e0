"""Where examples come from: files, directories, streams; what is encoded once and found again; what is mixed."""

import gzip
import json
from collections import Counter

import datasets
import pytest
import tiny
import torch

from okd import OKDTrainer
from okd.cli import main, parse_train
from okd.data import Rows
from okd.encoding import Encoded, Encoder, Stream, encode
from okd.examples import place_of
from okd.sources import DataOptions, encode_all, open_all, open_data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, examples):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt") as file:
        file.writelines(f"{example if isinstance(example, str) else json.dumps(example)}\n" for example in examples)
    return str(path)


def encoder(max_length=40, **options):
    return Encoder(tiny.tokenizer(), max_length=max_length, **options)


def load(tmp_path, config):
    return encode_all(config, tiny.config(tmp_path), open_all(config), encoder())


def pairs(n=20, **more):
    return [{"prompt": f"w{i + 2} w3", "completion": "w4 w5", **more} for i in range(n)]


def in_memory(examples):
    return encode(examples, tiny.tokenizer(), max_length=40).rows


# --- kinds ---


@pytest.mark.parametrize(
    "kind", ["lines.jsonl", "lines.json", "lines.jsonl.gz", "array.json", "table.parquet", "t.csv"]
)
def test_every_kind_of_file_gives_the_rows_of_its_examples(tmp_path, kind):
    path = tmp_path / kind
    if kind == "array.json":
        path.write_text(json.dumps(pairs()))
    elif kind == "table.parquet":
        datasets.Dataset.from_list(pairs()).to_parquet(path)
    elif kind == "t.csv":
        datasets.Dataset.from_list(pairs()).to_csv(path)
    else:
        write(path, pairs())
    name, data = open_data(str(path))
    rows = Encoded.of(encoder().map(data, name)).rows
    assert isinstance(rows, Rows) and len(rows) == 20
    assert list(rows) == [{**row, "id": f"{kind}:{i + 1}"} for i, row in enumerate(in_memory(pairs()))]
    assert rows[3:5] == [rows[3], rows[4]] and rows[-1] == rows[19]


def test_a_directory_is_read_like_a_data_set_of_the_hub(tmp_path):
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_list(pairs(5)).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(pairs(3)).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    assert [len(open_data(f"{folder}{split}")[1]) for split in ("", ":train", ":test")] == [5, 5, 3]
    assert open_data(f"{folder}:test")[0] == "folder"


def test_what_is_not_there_or_empty_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: expected a file, a directory.*Check the spelling"):
        open_data(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl: expected at least one example, got an empty file"):
        open_data(str(tmp_path / "empty.jsonl"))
    (tmp_path / "x.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"expected a file named \.jsonl, .*got \.xlsx"):
        open_data(str(tmp_path / "x.xlsx"))


def test_a_line_that_is_no_json_or_no_utf8_is_counted_and_the_rest_is_read(tmp_path):
    path = tmp_path / "some.jsonl"
    good = [json.dumps(example).encode() for example in pairs(200)]
    text = json.dumps({"prompt": "w2\u2028w3", "completion": "w4"}, ensure_ascii=False).encode()
    path.write_bytes(b"\r\n".join([*good[:50], b'{"prompt": "\xff', b"  ", text, *good[50:], b"{"]))
    name, data = open_data(str(path))
    encoded = Encoded.of(encoder().map(data, name), max_bad_share=0.01)
    assert len(encoded.rows) == 201 and encoded.rows[50]["id"] == "some.jsonl:53"
    assert sorted(name for names in encoded.bad.values() for name in names) == ["some.jsonl:204", "some.jsonl:51"]
    with pytest.raises(ValueError, match=r"at most 0\.5 % of the examples to be none; got 2 of 203"):
        Encoded.of(encoder().map(data, name), max_bad_share=0.005)


def test_a_lone_surrogate_is_counted_wherever_it_stands(tmp_path):
    text = json.dumps({"id": "cut\ud83d", "prompt": "w2", "completion": "w3\ud83d"})
    path = write(tmp_path / "cut.jsonl", [*pairs(2), text, json.dumps({"id": "odd\ud83d", **pairs(1)[0]})])
    encoded = Encoded.of(encoder().map(open_data(path)[1], "cut.jsonl"))
    assert [row["id"] for row in encoded.rows] == ["cut.jsonl:1", "cut.jsonl:2", "odd\\ud83d"]
    assert list(encoded.bad.values()) == [["cut\\ud83d"]]


def test_lines_need_no_common_schema(tmp_path):
    """As Arrow would want: content that is null, arguments that are other things, ids that are numbers."""
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    given = [
        {"id": 7, "messages": [{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3"}]},
        {"messages": [{"role": "user", "content": "w2"}, {"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5", "weight": 0}]},
    ]
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] or m['tool_calls'][0]['function']['name'] }} <eos> "
        "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    path = write(tmp_path / "tools.jsonl", given)
    encode_lines = Encoder(tokenizer, max_length=40)
    found = Encoded.of(encode_lines.map(open_data(path)[1], "tools.jsonl"))
    assert [row["id"] for row in found.rows] == ["7", "tools.jsonl:2"]
    assert found.skipped == {"without response token": ["tools.jsonl:3"]}


def test_fields_that_arrow_adds_to_a_row_are_not_there(tmp_path):
    """A turn without `weight` in a column of turns, some of which have one, is trained."""
    turns = [
        [{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3", "weight": w}] for w in (0, None)
    ]
    data = datasets.Dataset.from_list([{"messages": part} for part in turns])
    assert "weight" in data[1]["messages"][1]
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"
        "{{ 1 / 0 if messages[0].weight is defined }}{% if add_generation_prompt %}w9 {% endif %}"
    ).replace("w9 ", "")
    found = encode(data, tokenizer, max_length=40)
    assert [row["id"] for row in found.rows] == ["#1"] and not found.bad


@pytest.mark.parametrize("stored", [True, False])
def test_columns_of_other_names(tmp_path, stored):
    given = [{"question": "w2", "answer": "w3", "key": str(i)} for i in range(20)]
    if stored:
        path = str(tmp_path / "qa.parquet")
        datasets.Dataset.from_list(given).to_parquet(path)
    else:
        path = write(tmp_path / "qa.jsonl", given)
    config = DataOptions(train_data=[path], data_columns=["prompt=question", "completion=answer", "id=key"])
    name, data = open_data(path)
    rows = Encoded.of(encoder(columns=config.columns).map(data, name)).rows
    expected = in_memory([{"prompt": "w2", "completion": "w3", "id": str(i)} for i in range(20)])
    assert list(rows) == expected
    with pytest.raises(ValueError, match=r"ours=theirs, ours one of messages, .*got input=question"):
        _ = DataOptions(data_columns=["input=question"]).columns
    if stored:
        wrong = encoder(columns={"prompt": "problem"})
        with pytest.raises(ValueError, match=r"none called problem in qa\.parquet, which has question, answer, key"):
            wrong.map(data, name)


def test_messages_of_other_common_forms():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    turns = [{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3"}]
    more = [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}]
    (expected,) = encode([{"messages": turns}], tokenizer, max_length=40).rows
    spoken = [{"from": "human", "value": "w2"}, {"from": "gpt", "value": "w3"}]
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in turns]
    for given in (
        {"messages": spoken},
        {"messages": parts},
        {"prompt": turns[:1], "completion": turns[1:]},
    ):
        assert encode([given], tokenizer, max_length=40).rows == [expected]
    (both,) = encode([{"messages": turns + more}], tokenizer, max_length=40).rows
    (last,) = encode([{"prompt": [*turns, more[0]], "completion": more[1:]}], tokenizer, max_length=40).rows
    assert last["input_ids"] == both["input_ids"]
    labels = [label for label in both["labels"] if label != -100]
    assert [label for label in last["labels"] if label != -100] == labels[len(labels) // 2 :], (
        "the prompt is no response"
    )
    image = [{"role": "user", "content": [{"type": "image"}]}, turns[1]]
    with pytest.raises(ValueError, match='expected "messages" to be a list'):
        encode([{"messages": image}], tokenizer, max_length=40)


# --- once ---


def test_a_data_set_is_encoded_once_for_all_runs_until_something_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "train.jsonl", pairs())
    calls = Counter()
    whole = Encoder.columnar

    def counted(self, *args, **kwargs):
        calls["encoded"] += 1
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Encoder, "columnar", counted)

    def rows(**options):
        tokenizer = options.pop("tokenizer", tiny.tokenizer())
        name, data = open_data(path)
        return list(Encoded.of(Encoder(tokenizer, max_length=40, **options).map(data, name)).rows)

    first = rows()
    assert calls["encoded"] == 1 and rows() == first and calls["encoded"] == 1
    used = tiny.tokenizer()
    used(["w2", "w3 w4"], padding=True, truncation=True, max_length=5)  # leaves a state behind
    assert rows(tokenizer=used) == first and calls["encoded"] == 1
    rows(ends=[5])
    assert calls["encoded"] == 2
    other = tiny.tokenizer()
    other.chat_template = "{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"
    rows(tokenizer=other)
    rows(tokenizer=tiny.tokenizer(vocab=80))
    assert calls["encoded"] == 4
    write(tmp_path / "train.jsonl", pairs(21))
    assert len(rows()) == 21 and calls["encoded"] == 5


def test_several_processes_give_the_rows_of_one(tmp_path):
    path = write(tmp_path / "train.jsonl", pairs(2100))
    name, data = open_data(path)
    one = Encoded.of(encoder().map(data, name)).rows
    shards = [tmp_path / "two.jsonl"]
    write(shards[0], pairs(2100))
    name, data = open_data(str(shards[0]))
    two = Encoded.of(encoder().map(data, name, num_proc=2)).rows
    assert len(two) == 2100 and two.records.cache_files != one.records.cache_files and len(two.records.cache_files) == 2
    assert [row["input_ids"] for row in two] == [row["input_ids"] for row in one]
    assert [row["id"].split(":")[1] for row in two] == [row["id"].split(":")[1] for row in one]


# --- sides and mixtures ---


def test_the_held_out_side_is_that_of_the_hash_of_the_prompt(tmp_path):
    given = [{"id": str(i), **example} for i, example in enumerate(pairs(60))]
    path = write(tmp_path / "train.jsonl", given)
    data = load(tmp_path, DataOptions(train_data=[path], eval_share=0.3))
    train, held_out = tiny.split_by_hash(given, 0.3)
    assert [row["id"] for row in data["train"].rows] == [example["id"] for example in train]
    assert [row["id"] for row in data["held-out"].rows] == [example["id"] for example in held_out]
    assert all(0 <= place_of(example) < 1 for example in given) and data["text"] is None
    with pytest.raises(
        ValueError, match="both sides of the split; got 1 to train and 0 held out of 1: pass --eval-data"
    ):
        load(tmp_path, DataOptions(train_data=[write(tmp_path / "one.jsonl", pairs(1))], eval_share=1e-9))
    with pytest.raises(ValueError, match="expected training data; got none: pass --train-data"):
        open_all(DataOptions())


def test_several_files_are_joined_or_drawn_from_by_weight(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", pairs(n)) for name, n in (("a", 30), ("b", 60))]
    held_out = write(tmp_path / "held.jsonl", pairs(3))
    data = load(tmp_path, DataOptions(train_data=files, eval_data=[held_out]))
    assert [row["id"] for row in data["train"].rows] == [f"{n}.jsonl:{i}" for n, m in (("a", 30), ("b", 60)) for i in
                                                       range(1, m + 1)]  # fmt: skip
    assert [row["id"] for row in data["held-out"].rows] == [f"held.jsonl:{i}" for i in (1, 2, 3)]
    drawn = DataOptions(train_data=files, eval_data=[held_out], train_weights=[3, 1])
    mixed = [row["id"] for row in load(tmp_path, drawn)["train"].rows]
    assert mixed == [row["id"] for row in load(tmp_path, drawn)["train"].rows]
    share = sum(name.startswith("a") for name in mixed) / len(mixed)
    assert 0.65 < share < 0.85 and len(set(mixed)) == 90, "each is read through"
    with pytest.raises(ValueError, match=r"expected train_weights above 0, one for each of 2 train_data; got \[1\]"):
        open_all(DataOptions(train_data=files, train_weights=[1]))


# --- streams ---


def endless():
    i = 0
    while True:
        yield {"id": str(i), **pairs(30)[i % 30]}
        i += 1


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return endless()


@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_an_endless_stream_is_read_as_it_is_needed(tmp_path, kind):
    data = Endless() if kind == "torch" else datasets.IterableDataset.from_generator(endless)
    args = tiny.config(tmp_path, method="forward_kd", max_steps=3)
    run = OKDTrainer(tiny.llama(layers=1), tiny.llama(seed=1), args, train_dataset=data,
                     processing_class=tiny.tokenizer())  # fmt: skip
    assert isinstance(run.train_dataset, Stream)
    (first,) = in_memory([next(endless())])
    assert next(iter(run.train_dataset)) == first
    assert run.train().global_step == 3


def test_a_stream_is_resumed_where_it_was(tmp_path):
    def run(folder, resume=None, **options):
        args = tiny.config(tmp_path / folder, method="forward_kd", **options)
        trainer = OKDTrainer(tiny.llama(layers=1), tiny.llama(seed=1), args, train_dataset=Endless(),
                             processing_class=tiny.tokenizer())  # fmt: skip
        trainer.train(resume)
        return trainer.pair.student

    whole = run("whole", max_steps=4)
    run("part", max_steps=4, save_strategy="steps", save_steps=2)
    tiny.assert_same_weights(run("part", str(tmp_path / "part" / "checkpoint-2"), max_steps=4), whole)


def test_a_stream_wants_its_length_and_methods_that_need_no_other(tmp_path):
    options = {"train_dataset": Endless(), "processing_class": tiny.tokenizer()}
    with pytest.raises(ValueError, match="expected max_steps above 0 with a stream, whose length nobody knows; got -1"):
        OKDTrainer(tiny.llama(), tiny.llama(seed=1), tiny.config(tmp_path, max_steps=-1), **options)
    with pytest.raises(ValueError, match="expected all training data at once with method seqkd"):
        OKDTrainer(tiny.llama(), tiny.llama(seed=1), tiny.config(tmp_path, method="seqkd"), **options)


def test_too_many_bad_examples_end_a_stream_but_a_few_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr("okd.encoding.JUDGED", 100)
    good, bad = pairs(1)[0], {"prompt": "w2"}
    records = [record for i in range(1000) for record in encoder()(good if i % 200 else bad, f"#{i}")]
    assert len(list(Stream(records, 0.01))) == 995
    records = [record for i in range(1000) for record in encoder()(good if i % 20 else bad, f"#{i}")]
    with pytest.raises(ValueError, match=r"at most 1\.0 % of the examples to be none; got 6 of 101"):
        list(Stream(records, 0.01))
    with pytest.raises(ValueError, match=r"got 1 of 10: "):  # at its end at the latest
        list(Stream(records[:10], 0.01))


def test_streamed_files_are_split_mixed_and_shuffled(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", pairs(40)) for name in "ab"]
    options = {"train_data": files, "stream": True, "stream_buffer": 16, "eval_share": 0.3, "eval_examples": 6}
    data = load(tmp_path, DataOptions(**options, train_weights=[1, 1]))
    train, _ = tiny.split_by_hash(pairs(40), 0.3)
    order = [row["id"] for row in data["train"]]
    assert len(set(order)) == 2 * len(train) and order != sorted(order)
    assert order == [row["id"] for row in data["train"]]
    assert [row["id"][0] for row in data["held-out"].rows] == ["a"] * 3 + ["b"] * 3
    assert not {row["id"] for row in data["held-out"].rows} & set(order)
    data["train"].set_epoch(1)
    assert [row["id"] for row in data["train"]] != order
    mixed = load(tmp_path, DataOptions(**options, train_weights=[9, 1]))["train"]
    first = [row["id"][0] for row, _ in zip(mixed, range(20), strict=False)]
    assert first.count("a") > 3 * first.count("b")
    with pytest.raises(ValueError, match="expected train_weights with a stream of 2 train_data"):
        load(tmp_path, DataOptions(**options))


# --- the command ---


@pytest.mark.slow
def test_okd_train_takes_several_data_sets(tmp_path, capsys):
    model = tiny.llama()
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    files = [write(tmp_path / f"{name}.jsonl", [{"q": e["prompt"], "a": e["completion"]} for e in tiny.examples(24, n)])
             for n, name in enumerate("ab")]  # fmt: skip
    common = ["train", "okd", "--teacher", str(tmp_path / "model"), "--student-layers", "0", "--use-cpu"]
    common += ["--train-data", *files, "--data-columns", "prompt=q", "completion=a", "--eval-answers", "0"]
    common += ["--eval-examples", "4", "--max-steps", "2", "--save-strategy", "no", "--disable-tqdm", "true"]
    assert main([*common, "--output-dir", str(tmp_path / "run"), "--packing", "--train-weights", "2", "1"]) == 0
    assert "train: " in capsys.readouterr().out
    config, args = parse_train(["--config", str(tmp_path / "run" / "config.yaml"), "--output-dir", str(tmp_path / "x")])
    assert config.train_data == files and config.train_weights == [2, 1] and args.packing
    assert config.data_columns == ["prompt=q", "completion=a"]
    assert main([*common, "--output-dir", str(tmp_path / "streamed"), "--stream", "--train-weights", "1", "1"]) == 0
    assert main([*common, "--output-dir", str(tmp_path / "nothing"), "--train-data", str(tmp_path / "none")]) == 2
    assert "expected a file, a directory" in capsys.readouterr().err and not (tmp_path / "nothing").exists()
