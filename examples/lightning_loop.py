"""ScaleKD in a Lightning loop (pip install lightning): python examples/lightning_loop.py caches/demo"""

import sys

import lightning
import torch

from scalekd_cache import CachedTargets, ScaleKDLoss, timm_student


class Distillation(lightning.LightningModule):
    def __init__(self, targets):
        super().__init__()
        self.student = timm_student("resnet18", targets)
        self.loss = ScaleKDLoss(targets, self.student)

    def training_step(self, batch, number):
        terms = self.loss(*self.student(batch.images), batch.labels, batch.targets)
        self.log("loss", terms.total)
        print(f"step {number + 1}: loss {terms.total.item():.4f}", flush=True)
        return terms.total

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


lightning.seed_everything(0)
targets = CachedTargets(sys.argv[1], batch_size=32, epochs=1)  # one pass contains all epochs, so max_epochs=1
trainer = lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Distillation(targets), targets)
