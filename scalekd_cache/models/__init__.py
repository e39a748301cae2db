"""Networks: frozen teachers and their tails, students, weights files and evaluation.

In: timm model names and options, weights files (safetensors), uint8 images. Out: `Teacher` (features and logits),
`Tail` (the end of a teacher, stored in a cache), `Student` (two feature maps and logits), `Tally` (accuracy).
Teachers and students use hooks instead of timm's `forward_intermediates`. The hooks record feature maps during an
ordinary forward pass of the whole model, because ZeRO 3 gathers parameters only when a module is called, and because
the map after the final norm is defined differently for each family.
"""
