"""Students and checkpoints in other formats.

In: a trained student, or a checkpoint of upstream's distiller. Out: a folder for `timm.create_model`, one file of
another format (safetensors, ONNX, torch.export, torchvision, mmpretrain), or an imported student and projectors.
Every export is loaded again and its logits are compared before it is kept.
Custom code: the tables of parameter names, because no library converts timm to torchvision or mmpretrain, and the
reader of upstream's pickles, which loads tensors only.
"""
