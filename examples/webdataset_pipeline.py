"""Read the tars of a cache in a plain webdataset pipeline: python examples/webdataset_pipeline.py caches/demo"""

import glob
import sys

import timm
import torch
import webdataset as wds
from torch.nn.functional import cosine_similarity, cross_entropy

from scalekd_cache import RecordDecoder

decoder = RecordDecoder(sys.argv[1])
tars = sorted(glob.glob(f"{sys.argv[1]}/units/*/v0000.tar"))  # view 0; a URL pattern also works
shards = wds.WebDataset(tars, shardshuffle=len(tars), nodesplitter=wds.split_by_node)
samples = shards.shuffle(1000).map(decoder)
loader = torch.utils.data.DataLoader(samples, batch_size=32, num_workers=2)

torch.manual_seed(0)
student = timm.create_model("resnet18", num_classes=decoder.num_classes)
project = torch.nn.Linear(student.num_features, decoder.feature_shape[0])
optimizer = torch.optim.AdamW([*student.parameters(), *project.parameters()], lr=1e-3)
for step, batch in enumerate(loader, start=1):
    maps = student.forward_features(batch["image"] / 255)
    logits, soft_labels = student.forward_head(maps), batch["logits"].softmax(1)
    similarity = cosine_similarity(project(maps.mean((2, 3))), batch["features"].mean((2, 3)))
    loss = cross_entropy(logits, batch["label"]) + cross_entropy(logits, soft_labels) + 1 - similarity.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: {len(maps)} samples, loss {loss.item():.4f}", flush=True)
