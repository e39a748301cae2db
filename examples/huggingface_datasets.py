"""Read one view of a cache as a Hugging Face dataset: python examples/huggingface_datasets.py caches/demo"""

import sys

import timm
import torch
from datasets import IterableDataset
from torch.nn.functional import cross_entropy

from scalekd_cache import RecordDecoder


def samples(decoder, view, ranges):
    """Yield the decoded records of some ranges of images."""
    for number in ranges:  # `datasets` shuffles this list and divides it among nodes and workers
        for position in decoder.cache.positions(view, number):
            yield from decoder.read([position], view)


decoder = RecordDecoder(sys.argv[1])
ranges = list(range(decoder.cache.num_ranges))
dataset = IterableDataset.from_generator(samples, gen_kwargs={"decoder": decoder, "view": 0, "ranges": ranges})
loader = torch.utils.data.DataLoader(dataset.shuffle(seed=0, buffer_size=1000), batch_size=32, num_workers=2)

torch.manual_seed(0)
student = timm.create_model("resnet18", num_classes=decoder.num_classes)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
for step, batch in enumerate(loader, start=1):
    logits, soft_labels = student(batch["image"] / 255), batch["logits"].softmax(1)
    loss = cross_entropy(logits, batch["label"]) + cross_entropy(logits, soft_labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: {len(logits)} samples, loss {loss.item():.4f}", flush=True)
