"""What the teacher is: the online module's own turn, the least salient weights, several teachers and their judge."""

import copy
import json

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from transformers.utils import logging

from okd import OKDConfig, OKDTrainer, salience
from okd.cli import main, parse_train
from okd.data import Collator
from okd.encoding import encode
from okd.ensemble import Ensemble, load_ensemble
from okd.evaluate import divergence_metrics
from okd.models import hidden_states, load_model
from okd.online import Online, attach_online_module
from okd.salience import calibration_batches, non_salient_modules, saliency
from okd.teachers import as_it_was

MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MATRICES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def big(seed=1):
    return tiny.llama(seed=seed, layers=3, hidden=48)


def trainer(tmp_path, teacher=None, **options):
    return OKDTrainer(
        tiny.llama(),
        teacher or big(),
        tiny.config(tmp_path, **options),
        train_dataset=tiny.examples(),
        eval_dataset=tiny.examples(8, seed=9),
        processing_class=tiny.tokenizer(),
    )


def rows(n=12):
    return encode(tiny.examples(n), tiny.tokenizer(), max_length=32).rows


def feed(n=3):
    batch = Collator(tiny.EOS)(rows(n))
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def teacher_loss(student, teacher, batch, a):
    """a KL(q || p) + (1 - a) CE of whole logits."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    mask = batch["labels"][:, 1:] != -100
    log_q = student(**inputs).logits[:, :-1][mask].log_softmax(-1).detach()
    u = teacher(**inputs).logits[:, :-1][mask]
    kl = (log_q.exp() * (log_q - u.log_softmax(-1))).sum(-1).mean()
    return a * kl + (1 - a) * nn.functional.cross_entropy(u, batch["labels"][:, 1:][mask])


class Recorder(TrainerCallback):
    """The parameters that may train, after each step."""

    def __init__(self, pair):
        self.pair, self.steps = pair, [self.weights(pair)]

    @staticmethod
    def weights(pair):
        return {n: p.detach().clone() for n, p in pair.named_parameters() if p.requires_grad}

    def on_step_end(self, *_, **__):
        self.steps.append(self.weights(self.pair))

    def moved(self):
        """For each step, which sides moved."""
        pairs = zip(self.steps, self.steps[1:], strict=False)
        return ["".join(sorted({n[0] for n, p in b.items() if not torch.equal(a[n], p)})) for a, b in pairs]


# --- the weights that matter least ---


def test_saliency_is_the_mean_of_weight_times_gradient(tmp_path):
    args = tiny.config(tmp_path, method="clda", teacher_kl_weight=0.3)
    student, teacher = tiny.llama(), big()
    batches = calibration_batches(rows(), Collator(tiny.EOS), args)
    assert [len(batch["ids"]) for batch in batches] == [4, 4, 4]
    found = saliency(student, teacher, args, batches)
    assert all(p.grad is None for p in [*teacher.parameters(), *student.parameters()])
    assert not any(p.requires_grad for p in teacher.parameters())

    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double().requires_grad_(True)
    weights = {
        f"model.layers.{i}.{m}": teacher.get_submodule(f"model.layers.{i}.{m}").weight
        for i in range(3)
        for m in MATRICES
    }
    assert set(found) == set(weights), "neither embeddings nor lm_head"
    truth = dict.fromkeys(weights, 0.0)
    for batch in batches:
        gradients = torch.autograd.grad(teacher_loss(student, teacher, batch, 0.3), list(weights.values()))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            truth[name] += (weight * gradient).abs().mean().item() / len(batches)
    assert found == pytest.approx(truth, rel=1e-4)


def test_the_least_salient_share_is_chosen(tmp_path, monkeypatch):
    teacher, args = big(), tiny.config(tmp_path, method="clda", clda_share=0.3)
    scores = saliency(tiny.llama(), teacher, args, calibration_batches(rows(), Collator(tiny.EOS), args))
    chosen = non_salient_modules(tiny.llama(), teacher, args, calibration_batches(rows(), Collator(tiny.EOS), args))
    assert max(scores[name] for name in chosen) < min(scores[name] for name in scores.keys() - set(chosen))
    size = {name: teacher.get_submodule(name).weight.numel() for name in scores}
    held, nxt = sum(size[n] for n in chosen), min(scores.keys() - set(chosen), key=scores.get)
    assert held <= 0.3 * sum(size.values()) < held + size[nxt]
    args.clda_share = 1e-9
    batches = calibration_batches(rows(), Collator(tiny.EOS), args)
    assert non_salient_modules(tiny.llama(), teacher, args, batches) == [min(scores, key=scores.get)]


def test_clda_learns_in_turns_and_the_base_stays(tmp_path):
    teacher = big()
    base = copy.deepcopy(teacher)
    run = trainer(tmp_path, teacher=teacher, method="clda", clda_share=0.3, max_steps=5, warmup_steps=0)
    training = {n for n, p in run.pair.teacher.named_parameters() if p.requires_grad}
    assert training and all(".modules_to_save." in n for n in training)
    with torch.no_grad():
        assert torch.equal(run.teacher(**feed()).logits, base(**feed()).logits), "it starts at no change"
    recorder = Recorder(run.pair)
    run.add_callback(recorder)
    run.train()
    assert recorder.moved() == ["s", "t", "s", "t", "s"], "AdamW's momentum must rest too"
    with torch.no_grad(), as_it_was(run.pair.teacher) as judge:
        assert torch.equal(judge(**feed()).logits, base(**feed()).logits)
    assert {n for n, p in run.pair.teacher.named_parameters() if p.requires_grad} == training

    both = trainer(tmp_path, method="clda", alternating=False, max_steps=2, warmup_steps=0)
    recorder = Recorder(both.pair)
    both.add_callback(recorder)
    both.train()
    assert recorder.moved() == ["st", "st"]


def test_on_the_teachers_turn_only_its_loss_has_a_gradient(tmp_path):
    run = trainer(tmp_path, method="clda", clda_share=0.5, teacher_kl_weight=0.3)
    student, teacher = (copy.deepcopy(m).double() for m in (run.pair.student, run.teacher))
    run.pair.at(1, 4)
    batch = Collator(tiny.EOS)(rows(4))
    loss = run.pair(batch)
    loss.total.backward()
    assert loss.student.item() > 0 and all(p.grad is None for p in run.pair.student.parameters())
    teacher_loss(student, teacher, batch, 0.3).backward()
    truth = {n: p.grad for n, p in teacher.named_parameters() if p.requires_grad}
    for name, parameter in run.teacher.named_parameters():
        if name in truth:
            torch.testing.assert_close(parameter.grad.double(), truth[name], rtol=1e-4, atol=1e-6)
    run.pair.at(2, 4)
    run.pair.zero_grad()
    loss = run.pair(batch)
    loss.total.backward()
    assert loss.teacher is None and all(p.grad is None for p in run.pair.teacher.parameters())


@pytest.mark.slow
def test_clda_saves_an_adapter_that_plain_peft_loads_and_resumes_in_the_middle(tmp_path):
    whole = trainer(tmp_path / "whole", method="clda", max_steps=6)
    whole.train()
    whole.save_model(str(tmp_path / "out"))
    assert not [p for p in (tmp_path / "out").rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    loaded = PeftModel.from_pretrained(big(), tmp_path / "out" / "teacher_adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**feed()).logits, whole.teacher(**feed()).logits)

    trainer(tmp_path / "parts", method="clda", max_steps=6, save_strategy="steps", save_steps=3).train()
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    again = trainer(tmp_path / "parts", method="clda", max_steps=6)
    again.train(resume_from_checkpoint=str(checkpoint))
    tiny.assert_same_weights(again.pair, whole.pair)

    other = trainer(tmp_path / "other", method="clda", clda_share=0.5)
    with pytest.raises(
        ValueError, match=r"expected the adapter that trains here; \d+ weights are in one of the two only"
    ):
        other.train(resume_from_checkpoint=str(checkpoint))
    given = PeftModel.from_pretrained(big(), checkpoint / "teacher_adapter", is_trainable=True)
    other = trainer(tmp_path / "other", teacher=given, method="clda", clda_share=0.5, max_steps=6)
    other.train(resume_from_checkpoint=str(checkpoint))
    tiny.assert_same_weights(other.pair.student, whole.pair.student)


def gpt2():
    torch.manual_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    )


COPIED = {
    "llama": (big, ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]),
    "gpt2": (gpt2, ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]),  # Conv1D: transposed, with a bias
}


@pytest.mark.parametrize("kind", COPIED)
def test_copies_of_16_bit_weights_train_in_fp32(kind, tmp_path):
    """bf16 rounds updates below a 256th of a weight away. Products stay in bf16, and so does all that is frozen."""
    make, modules = COPIED[kind]
    base = make().bfloat16().eval()
    teacher = Online(attach_online_module(copy.deepcopy(base), tiny.config(tmp_path, method="clda"), modules))
    training = {n: p for n, p in teacher.named_parameters() if p.requires_grad}
    assert len(training) == (4 if kind == "gpt2" else 2) and all(".modules_to_save." in n for n in training)
    assert {p.dtype for p in training.values()} == {torch.float32}
    assert {p.dtype for n, p in teacher.named_parameters() if n not in training} == {torch.bfloat16}
    inputs = (feed()["input_ids"], feed()["attention_mask"])
    ours, theirs = hidden_states(teacher.model, *inputs), hidden_states(base, *inputs)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    ours.float().square().mean().backward()
    with torch.no_grad():
        for name, parameter in training.items():
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
            if name.endswith("bias"):  # zero at the start
                continue
            before = parameter.clone()
            parameter *= 1 + 1e-4
            torch.testing.assert_close(parameter / before, torch.full_like(before, 1 + 1e-4), rtol=1e-6, atol=0)
            rounded = before.bfloat16()
            assert torch.equal(rounded * (1 + 1e-4), rounded), "what bf16 would have made of it"
    with as_it_was(teacher) as judge, torch.no_grad():
        assert torch.equal(hidden_states(judge, *inputs), theirs)


def test_a_16_bit_teachers_copies_move_by_less_than_its_dtype_shows(tmp_path):
    run = trainer(tmp_path, big().bfloat16(), method="clda", clda_share=0.3, learning_rate=1e-5, warmup_steps=0)
    before = {n: p.detach().clone() for n, p in run.teacher.named_parameters() if p.requires_grad}
    run.train()
    moved = dict(run.teacher.named_parameters())
    for name, weight in before.items():
        change = (moved[name].detach() - weight).abs()
        assert moved[name].dtype == torch.float32 and 1e-6 < change.mean() < 1e-4, name


def test_non_salient_weights_need_data_to_be_found(tmp_path):
    with pytest.raises(ValueError, match="expected training data, by which clda finds"):
        OKDTrainer(tiny.llama(), big(), tiny.config(tmp_path, method="clda"), processing_class=tiny.tokenizer())


# --- when the teacher learns ---


def watched(run):
    """Train it: which sides moved at each step, and whether the teacher's rows had a graph."""
    forward, graphs = run.pair.teacher_rows, []

    def teacher_rows(batch):
        rows = forward(batch)
        graphs.append(rows.requires_grad)
        return rows

    run.pair.teacher_rows = teacher_rows
    recorder = Recorder(run.pair)
    run.add_callback(recorder)
    run.train()
    return recorder.moved(), graphs


def test_the_teacher_waits_until_online_start(tmp_path):
    run = trainer(tmp_path, method="okd", online_start=0.5, max_steps=6, warmup_steps=0)
    moved, graphs = watched(run)
    assert moved == ["s", "s", "s", "st", "st", "st"]
    entries = [e for e in run.state.log_history if "student_loss" in e]
    assert ["teacher_loss" in e for e in entries] == [False] * 3 + [True] * 3
    assert all(e["online_learning_rate"] == e["learning_rate"] for e in entries)
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["student_loss"] + entry.get("teacher_loss", 0), rel=1e-4)
    assert sum(graphs) == 3, "no teacher backward is run before"


@pytest.mark.parametrize(
    "options, moved",
    [
        ({"online_every": 3}, ["st", "s", "s", "st", "s", "s", "st"]),
        ({"online_every": 2, "online_start": 0.4}, ["s", "s", "s", "s", "st", "s", "st"]),
        ({"online_stop": 0.5}, ["st"] * 4 + ["s"] * 3),
    ],
)
def test_the_teacher_moves_at_some_steps_only(options, moved, tmp_path):
    """At the others it has no graph, and neither AdamW's momentum nor a logged gradient of an earlier step."""
    run = trainer(tmp_path, method="okd", max_steps=7, warmup_steps=0, lr_scheduler_type="constant", **options)
    found, graphs = watched(run)
    assert found == moved
    assert sum(graphs) == moved.count("st")
    entries = [e for e in run.state.log_history if "student_loss" in e]
    assert ["teacher_loss" in e for e in entries] == ["teacher_grad_norm" in e for e in entries]
    assert [e.get("teacher_grad_norm", 0) > 0 for e in entries] == [sides == "st" for sides in moved]


def test_a_step_without_learning_is_that_of_a_frozen_teacher(tmp_path):
    """The module's own gradient is that of its step alone: it has learned once when step 1 meets a frozen copy."""
    run = trainer(tmp_path, method="okd", online_every=2, max_steps=1, warmup_steps=0)
    run.train()
    frozen = trainer(tmp_path, copy.deepcopy(run.teacher).merge_and_unload(), method="forward_kd")
    frozen.pair.student.load_state_dict(run.pair.student.state_dict())
    batch = Collator(tiny.EOS)(rows(4))
    losses = []
    for one in (run, frozen):
        one.pair.zero_grad()
        one.pair.at(1, 4)
        loss = one.pair(batch)
        loss.total.backward()
        losses.append(loss)
    assert losses[0].teacher is None and losses[0].student.item() == pytest.approx(losses[1].student.item(), rel=1e-5)
    truth = dict(frozen.pair.student.named_parameters())
    for name, parameter in run.pair.student.named_parameters():
        torch.testing.assert_close(parameter.grad, truth[name].grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in run.pair.teacher.parameters())


def test_a_teacher_that_leaves_its_base_is_warned_of_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("okd.meters.FAR", 1e-3)
    said = {}
    for name, options in (("far", {"online_learning_rate": 0.3}), ("near", {"online_learning_rate": 0.0})):
        caplog.clear()
        logging.enable_propagation()
        run = trainer(tmp_path / name, method="okd", max_steps=4, logging_steps=1, **options)
        run.train()
        logging.disable_propagation()
        said[name] = [r.getMessage() for r in caplog.records if "near its base" in r.getMessage()]
        shifts = [e["teacher_shift"] for e in run.state.log_history if "teacher_shift" in e]
        assert (sum(x > 1e-3 for x in shifts) > 1) is (name == "far")
    assert len(said["far"]) == 1 and "Lower teacher_kl_weight or online_learning_rate" in said["far"][0]
    assert said["near"] == []


@pytest.mark.parametrize("options", [{"method": "okd", "online_every": 2}, {"method": "clda"}])
def test_the_gradient_norms_that_are_logged_are_of_each_sides_last_step(options, tmp_path):
    """Entries of two steps each, the second of which one side sits out: the teacher, or the student (in turns)."""
    run = trainer(tmp_path, **options, max_steps=4, logging_steps=2, logging_first_step=False)
    run.train()
    entries = [e for e in run.state.log_history if "student_loss" in e]
    assert len(entries) == 2 and all(e["grad_norm"] > 0 and e["teacher_grad_norm"] > 0 for e in entries)


def test_a_loss_of_some_steps_is_averaged_over_those(tmp_path):
    """Entries of two steps each, of which the teacher learns at one."""
    single, double = (
        trainer(tmp_path, method="clda", max_steps=4, logging_steps=n, logging_first_step=False) for n in (1, 2)
    )
    for run in (single, double):
        run.train()
    teacher = [[e["teacher_loss"] for e in r.state.log_history if "teacher_loss" in e] for r in (single, double)]
    assert teacher[0] == pytest.approx(teacher[1], rel=1e-6) and len(teacher[0]) == 2


@pytest.mark.parametrize("when", [{"online_start": 0.5}, {"online_every": 3}, {"online_stop": 0.5}])
def test_online_start_resumes(when, tmp_path):
    """And the other options that say when the teacher learns: as if nothing had stopped the run."""
    options = {"method": "okd", **when, "max_steps": 6}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    trainer(tmp_path / "parts", **options, save_strategy="steps", save_steps=2).train()
    again = trainer(tmp_path / "parts", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    tiny.assert_same_weights(again.pair, whole.pair)


def test_early_stopping_watches_the_held_out_loss(tmp_path):
    options = {"method": "forward_kd", "eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2}
    run = trainer(tmp_path, **options, learning_rate=0.0, max_steps=20)
    run.train()
    assert run.state.global_step == 3, "one evaluation sets the mark, two do not lower it"
    run = trainer(tmp_path, **options, max_steps=6)
    run.train()
    assert run.state.global_step == 6
    losses = [e["eval_loss"] for e in run.state.log_history if "eval_loss" in e]
    assert run.state.best_metric == min(losses) == losses[-1]


def test_early_stopping_goes_on_counting_after_a_resume(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 4, "learning_rate": 0.0}
    options |= {"method": "forward_kd", "max_steps": 20}
    trainer(tmp_path, **options, save_strategy="steps", save_steps=3).train()
    run = trainer(tmp_path, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert run.state.global_step == 5


# --- several teachers ---


def adapter(path, seed, **options):
    """A saved LoRA over `big()` that changes its predictions."""
    model = get_peft_model(big(), LoraConfig(r=4, **{"target_modules": ["q_proj", "v_proj"], **options}))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, model in (("teacher", big()), ("other", tiny.llama(seed=2)), ("student", tiny.llama())):
        model.save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    (root / "train.jsonl").write_text("\n".join(json.dumps(e) for e in tiny.examples(40)))
    adapter(root / "a", 3)
    adapter(root / "b", 4, target_modules=["q_proj", "lm_head"])
    return root


def ensemble_of(folder, *names):
    sources = {name: str(folder / name) for name in names}
    return load_ensemble(load_model(sources[names[0]]), sources)


def test_members_of_an_ensemble_are_the_teachers(folder):
    """One base, two adapters over it, and another model: rows and heads of each, in any order of use."""
    apart = [
        big(),
        adapter(folder / "a", 3),
        adapter(folder / "b", 4, target_modules=["q_proj", "lm_head"]),
        tiny.llama(seed=2),
    ]
    ensemble = ensemble_of(folder, "teacher", "a", "b", "other")
    assert len(ensemble.members) == 4 and len(ensemble.models) == 2
    assert not any(p.requires_grad for p in ensemble.parameters())
    assert ensemble.widths() == [48, 48, 48, 32] and ensemble.names == ["teacher", "a", "b", "other"]
    batch = Collator(tiny.EOS)(rows(3))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    for _ in range(2):
        for i, model in enumerate(apart):
            hidden, head = ensemble.taught(i, batch)
            expected = model(**inputs).logits.flatten(0, 1)[batch["positions"]]
            torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-4, atol=1e-5)
            assert not hidden.requires_grad
        assert not any(p.requires_grad for p in ensemble.parameters())


def test_the_first_of_several_teachers_is_the_judge(folder):
    ensemble = ensemble_of(folder, "teacher", "a", "other")
    options = {"rows": rows(6), "pad_token_id": tiny.EOS, "progress": False}
    ensemble.taught(1, Collator(tiny.EOS)(rows(3)))  # leaves another adapter active
    found = divergence_metrics(tiny.llama(), ensemble, **options)
    assert found == pytest.approx(divergence_metrics(tiny.llama(), big(), **options), rel=1e-6)
    tuned = adapter(folder / "a", 3)
    found = divergence_metrics(tiny.llama(), Ensemble([tuned, big()]), **options)
    apart = divergence_metrics(tiny.llama(), adapter(folder / "a", 3).merge_and_unload(), **options)
    assert found == pytest.approx(apart, rel=1e-4)


def test_a_judge_with_a_prompt_is_refused():
    prompted = get_peft_model(big(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="expected a first teacher, which judges, without prompt or prefix"):
        Ensemble([prompted, big()])
    assert len(Ensemble([big(), prompted]).members) == 2


def test_the_number_of_teachers_fits_the_method(tmp_path):
    with pytest.raises(
        ValueError, match="one teacher for method okd; got 2: pass one, or use gated_ensemble or rl_multi"
    ):
        trainer(tmp_path, teacher=[big(), big(2)])
    with pytest.raises(ValueError, match="expected several teachers for method gated_ensemble; got one: pass"):
        trainer(tmp_path, teacher=[big()], method="gated_ensemble")
    assert trainer(tmp_path, teacher=[big()]).teacher.peft_config


# --- the command line ---


def train(folder, output, method, *options, teachers=("teacher",)):
    """`--teacher` of one, `--teachers` of several: names of directories, or name=directory."""
    named = [text.rpartition("=") for text in teachers]
    sources = [f"{name}{equals}{folder / source}" for name, equals, source in named]
    paths = ("--teachers" if len(sources) > 1 else "--teacher", *sources)
    paths += ("--student", str(folder / "student"), "--output-dir", str(output))
    data = ("--train-data", str(folder / "train.jsonl"), "--eval-answers", "0", "--max-steps", "4", "--use-cpu")
    return main(["train", method, *paths, *data, "--disable-tqdm", "true", "--learning-rate", "1e-2", *options])


def test_online_teacher_with_a_method_whose_teacher_is_frozen(folder, tmp_path):
    assert train(folder, tmp_path, "reverse_kd", "--online-teacher", "--logging-steps", "1") == 0
    saved = PeftModel.from_pretrained(big(), tmp_path / "teacher_adapter")
    with torch.no_grad():
        assert (saved(**feed()).logits - big()(**feed()).logits).abs().max() > 1e-3, "it has learned"


@pytest.mark.parametrize("method", ["gated_ensemble", "rl_multi_teacher", "routed"])
def test_online_teacher_is_refused_elsewhere(method):
    with pytest.raises(ValueError, match=f"online_teacher with a method that distils from one teacher; got {method}"):
        OKDConfig(method=method, online_teacher=True)


@pytest.mark.parametrize("method", ["sft", "seqkd"])
def test_online_teacher_is_not_read_where_nothing_is_distilled(method):
    with pytest.raises(ValueError, match=f"options that method {method} reads; got online_teacher=True"):
        OKDConfig(method=method, online_teacher=True)


def test_several_teachers_from_the_command_line(folder, tmp_path, capsys):
    several = ("teacher", "a", "other")
    assert train(folder, tmp_path / "run", "rl_multi_teacher", teachers=several) == 0
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert "selection.safetensors" in files and "teacher_adapter" not in files
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["after"]["perplexity"] < found["before"]["perplexity"]
    written, _ = parse_train(["--config", str(tmp_path / "run" / "config.yaml")])
    assert written.teachers == [str(folder / name) for name in several] and written.teacher is None
    capsys.readouterr()
    assert train(folder, tmp_path / "x", "okd", teachers=several) == 2
    assert "expected one teacher for method okd; got 3" in capsys.readouterr().err
    assert train(folder, tmp_path / "x", "gated_ensemble") == 2
    assert "--teachers" in capsys.readouterr().err and not (tmp_path / "x").exists()
    assert train(folder, tmp_path / "x", "gated_ensemble", "--teacher", "another", teachers=several) == 2
    assert "expected --teacher, or several as --teachers; got both" in capsys.readouterr().err


def test_named_teachers_teach_the_examples_that_name_them(folder, tmp_path, capsys):
    examples = [{**e, "teacher": ("math", "chat")[i % 2]} for i, e in enumerate(tiny.examples(40))]
    (tmp_path / "routed.jsonl").write_text("\n".join(json.dumps(e) for e in examples))
    data = ("--train-data", str(tmp_path / "routed.jsonl"))
    named = ("math=teacher", "chat=other")
    assert train(folder, tmp_path / "run", "routed", *data, teachers=named) == 0
    capsys.readouterr()
    assert train(folder, tmp_path / "x", "routed", *data, teachers=("math=teacher", "talk=other")) == 2
    error = capsys.readouterr().err
    assert '"teacher" of every example to be one of math, talk; got chat in ' in error
    assert train(folder, tmp_path / "x", "routed", *data, teachers=("math=teacher", "math=other")) == 2
    assert "expected teachers as name=source, each name once" in capsys.readouterr().err


def test_tokenizers_of_all_teachers_are_compared(folder, tmp_path, capsys):
    tiny.llama(seed=2).save_pretrained(tmp_path / "odd")
    tiny.tokenizer(vocab=60).save_pretrained(tmp_path / "odd")
    assert train(folder, tmp_path / "run", "gated_ensemble", teachers=("teacher", "a", str(tmp_path / "odd"))) == 2
    assert "share a tokenizer; 4 tokens differ" in capsys.readouterr().err


def test_the_student_of_a_shared_base_has_no_adapters(folder, tmp_path):
    arguments = ["train", "gated_ensemble", "--teachers", str(folder / "teacher"), str(folder / "a")]
    arguments += ["--student-layers", "0,2", "--use-cpu", "--train-data", str(folder / "train.jsonl")]
    assert main([*arguments, "--max-steps", "1", "--eval-answers", "0", "--output-dir", str(tmp_path)]) == 0
    student = load_model(str(tmp_path / "student"))
    assert not [n for n, _ in student.named_parameters() if "lora" in n] and student.config.num_hidden_layers == 2


@pytest.mark.slow
def test_a_resumed_run_does_not_choose_the_weights_again(folder, tmp_path, monkeypatch):
    saving = ("--save-strategy", "steps", "--save-steps", "3")
    assert train(folder, tmp_path / "whole", "clda", *saving) == 0
    compute_loss = OKDTrainer.compute_loss

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OKDTrainer, "compute_loss", interrupted)
        assert train(folder, tmp_path / "parts", "clda", *saving) == 130
    monkeypatch.setattr(salience, "saliency", None)
    assert train(folder, tmp_path / "parts", "clda", *saving, "--resume") == 0
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts")]
    assert metrics[0]["before"] == metrics[1]["before"] and metrics[0]["after"] == metrics[1]["after"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"online_start": 1.5}, "online_start to be at least 0 and at most 1; got 1.5"),
        ({"online_stop": -0.5}, "online_stop to be at least 0 and at most 1; got -0.5"),
        ({"online_every": 0}, "online_every to be at least 1, and finite; got 0"),
        ({"alternating": True, "online_every": 2}, r"alternating or online_every; got okd with both \(.*=2\): choose"),
        ({"method": "clda", "online_every": 2}, "expected alternating or online_every; got clda with both"),
        ({"method": "forward_kd", "online_every": 2}, "options that method forward_kd reads; got online_every=2"),
        ({"online_start": 0.5, "online_stop": 0.5}, r"online_stop after online_start=0\.5; got 0\.5, with which"),
        ({"selection_warmup": -1.0}, "selection_warmup to be at least 0 and at most 1; got -1.0"),
        ({"clda_share": 0.0}, "clda_share to be above 0 and at most 1; got 0.0"),
        ({"method": "forward_kd", "alternating": True}, "options that method forward_kd reads; got alternating=True"),
        (
            {"method": "taid", "online_teacher": True, "alternating": True},
            "expected alternating with a method whose teacher learns by its divergence, such as okd or clda; got taid",
        ),
        ({"early_stopping_patience": 2}, "evaluations to watch; got 2 and no evaluations: pass eval_strategy"),
        ({"early_stopping_patience": 0, "eval_strategy": "steps", "eval_steps": 1}, "patience of at least 1"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        OKDConfig(**options)
