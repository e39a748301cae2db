"""Exports students to other formats and imports upstream's checkpoints.

In: a trained student, or a checkpoint from upstream's distiller. Out: a folder for `timm.create_model`, a file in
another format (safetensors, ONNX, torch.export, torchvision, mmpretrain), or an imported student and projectors.
Every export is reloaded, and it is kept only if the logits match.
The parameter name tables are custom, because no library converts timm to torchvision or mmpretrain. The reader for
upstream's pickles is custom, because it must load only tensors.
"""
