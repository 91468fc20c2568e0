"""What others are told of a run: trackers, and the student's model card and its way to the hub; nothing leaves here."""

import json
from typing import ClassVar

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard
from tiny import train_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils

from okd import METHODS, OKDConfig, OKDTrainer, hub
from okd.card import model_card
from okd.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny.save_inputs(root)
    return root


class Api:
    """Of a hub that keeps what it gets, and refuses what it is told to."""

    def __init__(self):
        self.calls, self.refused = [], ()

    def __getattr__(self, name):
        def call(*args, **kwargs):
            if name in self.refused:
                raise ConnectionError("no network")
            if name == "upload_folder":
                kwargs["files"] = {p.name: p.read_bytes() for p in kwargs["folder_path"].iterdir()}
            self.calls.append((name, args, kwargs))
            return type("Answer", (), {"repo_id": f"me/{args[0]}" if args else ""})

        return call

    def of(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def api(monkeypatch):
    found = Api()
    monkeypatch.setattr(hub, "api", lambda: found)
    return found


class Tracker(TrainerCallback):
    """What arrives at a tracker, while it is open."""

    got: ClassVar = []
    is_open = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_open = True

    def on_train_end(self, args, state, control, **kwargs):
        self.is_open = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        assert self.is_open
        self.got += [(state.global_step, name, value) for name, value in logs.items()]


# --- trackers


def test_trackers_get_the_figures_before_and_after(folder, tmp_path, monkeypatch):
    """As figures of held-out examples, at the first step and the last; the log has its own."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mine", Tracker)
    Tracker.got = []
    run = tmp_path / "run"
    assert main(train_arguments(folder, run, "--max-steps", "2", "--report-to", "mine")) == 0
    figures = json.loads((run / "metrics.json").read_text())
    for when, step in (("before", 0), ("after", 2)):
        expected = {(step, f"eval_{when}/{name}", value) for name, value in figures[when].items() if value is not None}
        assert "forward_kl" in figures[when] and {entry for entry in Tracker.got if when in entry[1]} == expected
    assert "eval_" not in (run / "log.jsonl").read_text()
    assert [step for step, name, _ in Tracker.got if name == "loss"] == [1, 2]


def test_trackers_that_are_not_there_are_found_before_models_are_loaded(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("okd.run.load_models", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    expected = {
        "tensorbord": "tensorbord is not supported",
        "tensorboard": "expected report_to to name what is installed; got tensorboard: TensorBoardCallback requires",
    }
    for name, message in expected.items():
        assert main(train_arguments(folder, tmp_path / "run", "--report-to", name)) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


# --- the card


def test_every_run_writes_a_card(folder, tmp_path):
    run = tmp_path / "run"
    assert main(train_arguments(folder, run, "--max-steps", "1", "--student-lora-rank", "2", method="okd")) == 0
    card = ModelCard.load(run / "student" / "README.md")
    assert card.data.tags == ["okd-kernels", "knowledge-distillation", "okd"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert card.data.base_model is None and card.data.datasets is None, "directories of this machine are no names"
    figures = json.loads((run / "metrics.json").read_text())
    assert all(f"{figures[when]['perplexity']:.2f}  " in card.text for when in ("before", "after"))
    assert "[arXiv 2409.12512](https://arxiv.org/abs/2409.12512)" in card.text and "After 1 steps; seed 42" in card.text
    options = yaml.safe_load(card.text.partition("```yaml")[2].partition("```")[0])
    assert options["teacher"] == "teacher" and options["student_lora_rank"] == 2
    assert str(tmp_path) not in card.text and str(folder) not in card.text


def test_a_card_names_what_the_hub_has():
    options = {"teacher": "org/large", "student": "org/small", "train_data": ["org/data@main:train", "mine.jsonl"]}
    card = ModelCard(model_card(METHODS["gkd"], options, "me/student", license="mit", tags="cats"))
    assert (card.data.base_model, card.data.datasets, card.data.license) == ("org/small", ["org/data"], "mit")
    assert card.data.tags[2:] == ["gkd", "cats"] and "distilled from `org/large`" in card.text
    assert 'from_pretrained("me/student")' in card.text


# --- the hub


def push(folder, run, *options):
    return main(train_arguments(folder, run, "--max-steps", "2", "--push-to-hub", "--hub-token", "secret", *options))


def test_a_run_pushes_the_student_at_its_end(folder, tmp_path, api):
    """Its files alone, which load as they are; the token is written nowhere."""
    run = tmp_path / "run"
    assert push(folder, run, "--hub-private-repo", "true", "--hub-revision", "v1") == 0
    created = {"token": "secret", "private": True, "exist_ok": True}
    assert api.of("create_repo") == [(("run",), created)] * 2, "before the models are loaded, and by the trainer"
    ((_, sent),) = api.of("upload_folder")
    assert (sent["repo_id"], sent["revision"], sent["token"]) == ("me/run", "v1", "secret")
    assert api.of("create_branch")[0] == (("me/run",), {"branch": "v1", "token": "secret", "exist_ok": True})
    got = tmp_path / "got"
    got.mkdir()
    for name, data in sent["files"].items():
        (got / name).write_bytes(data)
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    tiny.assert_same_weights(AutoModelForCausalLM.from_pretrained(got), student)
    assert AutoTokenizer.from_pretrained(got).get_vocab() == tiny.tokenizer().get_vocab()
    assert 'from_pretrained("me/run")' in (got / "README.md").read_text()
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors"} <= set(sent["files"])
    assert "hub_token" not in (run / "config.yaml").read_text()
    assert not any("secret" in p.read_text() for p in run.glob("*.*") if p.suffix in (".yaml", ".json", ".jsonl"))


@pytest.mark.slow
def test_a_failed_push_loses_nothing(folder, tmp_path, api, capsys):
    run = tmp_path / "run"
    api.refused = ("upload_folder",)
    assert push(folder, run) == 2
    assert "got no network. Nothing is lost: hf upload me/run " in capsys.readouterr().err
    assert (run / "metrics.json").is_file() and (run / "student" / "README.md").is_file()
    api.refused = ()
    assert push(folder, run, "--resume") == 0 and len(api.of("upload_folder")) == 1


def test_a_hub_that_refuses_is_found_before_models_are_loaded(folder, tmp_path, api, capsys, monkeypatch):
    monkeypatch.setattr("okd.run.load_models", lambda *_: pytest.fail("loaded"))
    api.refused = ("create_repo",)
    assert push(folder, tmp_path / "run") == 2
    assert "expected a repository run on the hub to push to; got no network: log in" in capsys.readouterr().err


def trainer(folder, student=None, **options):
    config = tiny.config(folder, method="sft", max_steps=2, hub_model_id="me-too", **{"push_to_hub": True, **options})
    return OKDTrainer(
        student or tiny.llama(), None, config, train_dataset=tiny.examples(8), processing_class=tiny.tokenizer()
    )


def test_at_every_save(tmp_path, api, caplog):
    """A push that fails does not end the training."""
    saving = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "every_save"}
    trainer(tmp_path, **saving).train()
    sent = [kwargs for _, kwargs in api.of("upload_folder")]
    assert [kwargs["commit_message"] for kwargs in sent] == ["Step 1", "Step 2"]
    assert sent[0]["files"]["model.safetensors"] != sent[1]["files"]["model.safetensors"]
    api.refused = ("upload_folder",)
    again = trainer(tmp_path / "again", **saving)
    again.train()
    assert again.state.global_step == 2 and "the training goes on" in caplog.text


@pytest.mark.parametrize("asked", [True, False])
def test_push_to_hub_from_python(tmp_path, api, asked):
    run = trainer(tmp_path, push_to_hub=asked)
    run.train()
    assert len(api.of("create_repo")) == asked and not api.of("upload_folder"), "when it is called"
    run.push_to_hub("done", license="mit", model_name="A student")
    ((_, sent),) = api.of("upload_folder")
    assert (sent["repo_id"], sent["commit_message"], sent["folder_path"]) == ("me/me-too", "done", tmp_path / "student")
    card = ModelCard(sent["files"]["README.md"].decode())
    assert card.data.license == "mit" and "# A student" in card.text


def test_an_adapter_over_what_nobody_else_has_is_refused(tmp_path, api):
    for path in ("", str(tmp_path)):
        student = tiny.llama()
        student.name_or_path = path
        with pytest.raises(ValueError, match="expected a student that others can load; got a LoRA over"):
            trainer(tmp_path, student, student_lora_rank=2)
    trainer(tmp_path, tiny.llama(), student_lora_rank=2, student_save="merged")


def test_what_is_not_pushed_is_refused(tmp_path):
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match=f"expected hub_strategy end or every_save.*; got {strategy}"):
            OKDConfig(output_dir=str(tmp_path), hub_strategy=strategy)
    with pytest.raises(ValueError, match="expected no hub_always_push"):
        OKDConfig(output_dir=str(tmp_path), hub_always_push=True)
