"""What a step costs: each model goes forward once, the teacher backward no further than its lowest adapted layer."""

import pytest
import tiny
import torch

from okd import OKDConfig, OKDTrainer

LAYERS, ADAPTED = 3, 1


def one_step(tmp_path, **options):
    """(layers of the student that went forward, teacher layers that did, those of them that went backward)."""
    args = OKDConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        logging_strategy="no",
        logging_first_step=False,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    run = OKDTrainer(
        tiny.llama(),
        tiny.llama(seed=1, layers=LAYERS, hidden=48),
        args,
        train_dataset=tiny.examples(),
        processing_class=tiny.tokenizer(),
    )
    teacher = run.teacher.get_base_model() if args.online else run.teacher
    seen = {"student": [], "teacher": [], "backward": []}
    for side, model in (("student", run.pair.student), ("teacher", teacher)):
        for i, layer in enumerate(model.model.layers):
            # a checkpoint calls its layer again in the backward pass
            layer.register_forward_hook(lambda *_, side=side, i=i: seen[side].append(i) if forward[0] else None)
    for i, layer in enumerate(teacher.model.layers):
        layer.mlp.down_proj.register_full_backward_hook(lambda *_, i=i: seen["backward"].append(i))
    forward = [True]
    backward = run.accelerator.backward

    def leave_forward(*args, **kwargs):
        forward[0] = False
        return backward(*args, **kwargs)

    run.accelerator.backward = leave_forward
    run.train()
    assert all(p.grad is None for name, p in run.teacher.named_parameters() if "lora" not in name)
    return seen["student"], seen["teacher"], sorted(set(seen["backward"]))


@pytest.mark.parametrize("checkpointing", [{}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("method", ["okd", "forward_kd"])
def test_each_model_goes_forward_once_and_the_teacher_back_to_its_lowest_adapted_layer(tmp_path, method, checkpointing):
    torch.manual_seed(0)
    share = {"online_layers": ADAPTED / LAYERS} if method == "okd" else {}
    student, teacher, backward = one_step(tmp_path, method=method, **share, **checkpointing)
    assert student == [0, 1] and teacher == list(range(LAYERS))
    assert backward == ([2] if method == "okd" else [])


def test_reentrant_checkpoints_reach_the_online_module(tmp_path):
    """They need inputs with gradients: there the whole teacher goes backward."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    _, _, backward = one_step(tmp_path, method="okd", online_layers=ADAPTED / LAYERS, **options)
    assert backward[-1] == LAYERS - 1


@pytest.mark.parametrize(("options", "moved"), [({}, 1.0), ({"exact_head": True}, 1.0), ({"exact_head": False}, 0.25)])
def test_rows_of_the_head_that_backward_leaves_out_do_not_learn(tmp_path, options, moved):
    """But with an exact head."""
    chosen = {"backward_columns": "0.25", **options} if options else {}
    student = tiny.llama(vocab=512, tie_word_embeddings=False)
    before = student.lm_head.weight.detach().clone()
    args = tiny.config(tmp_path, method="forward_kd", optim="sgd", max_steps=1, warmup_steps=0, **chosen)
    teacher = tiny.llama(seed=1, vocab=512)
    run = OKDTrainer(student, teacher, args, train_dataset=tiny.examples(), processing_class=tiny.tokenizer(vocab=512))
    run.train()
    share = (student.lm_head.weight != before).any(1).double().mean().item()
    assert share == pytest.approx(moved, abs=0.02)
