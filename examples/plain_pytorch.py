"""Train with ScaleKD in a plain PyTorch loop: python examples/plain_pytorch.py caches/demo [student.safetensors]"""

import sys

import torch
from safetensors.torch import save_file

from scalekd_cache import CachedTargets, ScaleKDLoss, timm_student

torch.manual_seed(0)
targets = CachedTargets(sys.argv[1], batch_size=32, epochs=1)
student = timm_student("resnet18", targets)
loss = ScaleKDLoss(targets, student)
optimizer = torch.optim.AdamW([*student.parameters(), *loss.parameters()], lr=1e-3)
for step, (images, labels, target) in enumerate(targets, start=1):
    terms = loss(*student(images), labels, target)
    optimizer.zero_grad()
    terms.total.backward()
    optimizer.step()
    print(f"step {step} of {len(targets)}: loss {terms.total.item():.4f}", flush=True)
if len(sys.argv) > 2:
    save_file(student.model.state_dict(), sys.argv[2])  # for load_state_dict of the timm model
