"""Bad input: what was expected, what came, and what to do."""

import pytest
import torch
from torch import nn

from okd_kernels import LinearHead, Objective, distillation_loss, linear_distillation_loss

X, W, Y, U = torch.zeros(4, 8), torch.zeros(32, 8), torch.zeros(4, 6), torch.zeros(32, 6)


@pytest.mark.parametrize(
    "args, options, error, message",
    [
        ((X, W, Y, torch.zeros(40, 6)), {}, ValueError, r"student 32 and teacher 40.*pass vocab_size=len\(tokenizer\)"),
        ((X, W, Y, U), {"vocab_size": 33}, ValueError, r"vocab_size in \[1, 32\].*got 33"),
        ((X, U, Y, W), {}, ValueError, r"student_hidden of shape \(\.\.\., 6\).*got \(4, 8\).*swapped"),
        ((X, W, Y[:3], U), {}, ValueError, r"one leading shape; got \(4, 8\) and \(3, 6\)"),
        ((X, W.bfloat16(), Y, U), {}, TypeError, r"student's head in torch.float32.*got torch.bfloat16.*autocast"),
        ((X.long(), W, Y, U), {}, TypeError, "floating-point student_hidden; got torch.int64"),
        ((X, W.to(torch.int8), Y, U), {}, TypeError, "got torch.int8: dequantise"),
        ((X, W[0], Y, U), {}, ValueError, r"weight of shape \(V, D\); got \(8,\)"),
        ((X, nn.Identity(), Y, U), {}, TypeError, "got Identity"),
        ((X.to("meta"), W, Y.to("meta"), U), {}, ValueError, "student's head on meta.*got cpu"),
        ((X, W, Y.to("meta"), U.to("meta")), {}, ValueError, "one device; got cpu and meta"),
        ((X, W, Y, U, torch.zeros(3).long()), {}, ValueError, r"labels of shape \(4,\).*got \(3,\)"),
        ((X, W, Y, U, torch.zeros(4)), {}, TypeError, "torch.int64; got torch.float32"),
        ((X, W, Y, U, torch.full((4,), 32)), {}, ValueError, r"labels in \[0, 32\) or ignore_index=-100; got 32"),
        ((X, W, Y, U, torch.full((4,), -1)), {}, ValueError, "got -1"),
        (
            (X, W, Y, U),
            {"student": Objective(ce_weight=0.5)},
            ValueError,
            "labels, since the student's ce_weight is 0.5",
        ),
        ((X, W, Y, U), {"student": "kl"}, ValueError, "expected a divergence out of"),
        ((X, W, Y, U), {"student": None}, TypeError, "a divergence's name or an Objective; got None"),
        ((X, W, Y, U), {"normalizer": -1}, ValueError, "normalizer >= 0; got -1"),
        ((X, W, Y, U), {"normalizer": torch.ones(2)}, ValueError, r"one normalizer; got a tensor of shape \(2,\)"),
        (
            [t.double() for t in (X, W, Y, U)],
            {"backend": "triton"},
            ValueError,
            "at most fp32 for backend='triton'; got torch.float64",
        ),
        ((X, W, Y, U), {"temperature": 0}, ValueError, "temperature > 0; got 0"),
        ((X, W, Y, U), {"target_mix": 1.5}, ValueError, "target_mix between 0 and 1; got 1.5"),
        ((X, W, Y, U), {"target_mix": 0.5, "teacher": "jsd"}, ValueError, "teacher=None with target_mix below 1"),
        ((X, W, Y, U), {"reduction": "avg"}, ValueError, "mean, sum or none; got 'avg'"),
        ((X, W, Y, U), {"reduction": "sum", "normalizer": 3}, ValueError, "normalizer with reduction='mean' only"),
        ((X, W, Y, U), {"backend": "cuda"}, ValueError, "one of auto, triton, torch, reference; got 'cuda'"),
        ((X, W, Y, U), {"workspace_bytes": 0}, ValueError, "workspace_bytes > 0; got 0"),
        ((X, W, Y, U), {"token_weights": torch.ones(3)}, ValueError, r"token_weights of shape \(4,\).*got \(3,\)"),
        ((X, W, Y, U), {"token_weights": torch.ones(4, requires_grad=True)}, ValueError, "without gradient"),
        ((X, LinearHead(W), Y, U), {"labels": torch.zeros(4, 1).long()}, ValueError, r"got \(4, 1\)"),
    ],
)
def test_errors(args, options, error, message):
    with pytest.raises(error, match=message):
        linear_distillation_loss(*args, **options)


def test_an_explicit_backend_never_falls_back(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="expected CUDA or ROCm tensors for backend='triton'; got cpu"):
        linear_distillation_loss(X, W, Y, U, backend="triton")


def test_logit_errors():
    with pytest.raises(ValueError, match="student 32 and teacher 40"):
        distillation_loss(torch.zeros(4, 32), torch.zeros(4, 40))
    with pytest.raises(TypeError, match="floating-point teacher_logits"):
        distillation_loss(torch.zeros(4, 32), torch.zeros(4, 32).long())
    with pytest.raises(ValueError, match="one leading shape"):
        distillation_loss(torch.zeros(4, 32), torch.zeros(5, 32))


def test_a_group_without_a_process_group():
    with pytest.raises(ValueError, match=r"initialised process group.*init_process_group.*or leave out group"):
        linear_distillation_loss(X, W, Y, U, group=object())


def test_the_reference_takes_whole_heads(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="whole heads for backend='reference'; got a group"):
            linear_distillation_loss(X, W, Y, U, group=torch.distributed.group.WORLD, backend="reference")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("label", [-1, 32])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_a_label_that_is_no_token(backend, ce_weight, label):
    labels = torch.tensor([1, -100, label, 3])
    options = {"student": Objective(ce_weight=ce_weight), "backend": backend}
    for call in (
        lambda: linear_distillation_loss(X, W, Y, U, labels, **options),
        lambda: distillation_loss(torch.zeros(4, 32), torch.zeros(4, 32), labels, **options),
    ):
        with pytest.raises(ValueError, match=rf"labels in \[0, 32\) or ignore_index=-100; got {label}"):
            call()
