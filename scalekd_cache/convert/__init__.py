"""Exports students to other formats, and imports upstream's checkpoints.

In: a trained student, or a checkpoint from upstream's distiller. Out: a folder for `timm.create_model`, a file in a
different format (safetensors, ONNX, torch.export, torchvision, mmpretrain), or an imported student and projectors.
Every export is reloaded, and its logits are compared before it is kept.
The tables of parameter names are custom code, because no library converts timm to torchvision or mmpretrain. The
reader for upstream's pickles is custom code because it must load only tensors.
"""
