"""Memory of one training step, counted on the real modules.

In: training options and a teacher on the meta device. Out: bytes by part.
Invariant: a tensor that autograd keeps is counted once, whoever keeps it; nothing is allocated.
"""

import torch
from torch import Tensor

from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.models.student import build_student
from scalekd_cache.planning.costs import MetaTeacher
from scalekd_cache.scalekd.heads import ScaleKDHeads
from scalekd_cache.scalekd.losses import Targets, distillation_losses

OPTIMIZER_TENSORS = {"sgd": 1, "adamw": 2, "lamb": 2}


def step_memory(training: DistillConfig, teacher: MetaTeacher, size: int, num_classes: int) -> dict[str, float]:
    """Bytes of one training step of a micro-batch in float32: what autograd keeps is counted, tensor by tensor.

    Call it under `torch.device("meta")`: the real student, heads, tail and losses run, and nothing is computed.
    """
    student = build_student(training.student, num_classes=num_classes, image_size=size)
    heads = ScaleKDHeads(training.scalekd, student.tap_shapes, teacher.tail_in, teacher.tail_out, student.layer_norm)
    if training.student.grad_checkpointing:
        heads.checkpoint_gradients()
    trained = sum(value.numel() for module in (student, heads) for value in module.parameters())
    batch, device = training.train.micro_batch_size, torch.get_default_device()
    own = {value.untyped_storage()._cdata for module in (student, heads, teacher.tail)
           for value in (*module.parameters(), *module.buffers())}  # fmt: skip
    kept: dict[int, int] = {}

    def count(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        s3, s4, logits = student(torch.zeros(batch, 3, size, size, device=device))
        height, width = teacher.tail_out[1:]
        targets = Targets(
            torch.ones(batch, *teacher.tail_out, device=device), torch.ones(batch, 2, height, width, device=device),
            torch.ones(batch, num_classes, device=device),
        )  # fmt: skip
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        maps = heads(s3, s4, teacher.tail)
        total = distillation_losses(training.scalekd, training.train, logits, labels, maps, targets).total
    assert total.requires_grad
    parts = {
        "weights": 4.0 * (trained + teacher.tail_params),
        "gradients": 4.0 * trained,
        "optimizer": 4.0 * trained * OPTIMIZER_TENSORS[training.optim.name],
        "activations": float(sum(kept.values())),
    }
    return {**parts, "total": sum(parts.values())}
