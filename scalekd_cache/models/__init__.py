"""The networks: frozen teachers and their tails, students, weights files and evaluation.

In: timm model names and options, weights files (safetensors), uint8 images. Out: `Teacher` (features and logits),
`Tail` (the end of a teacher, stored in a cache), `Student` (two feature maps and logits), `Tally` (accuracy).
Hooks replace timm's `forward_intermediates` for teachers and students. They record the maps during an ordinary forward
pass of the whole model, because ZeRO 3 gathers parameters only when a module is called. The map after the final norm
also needs its own definition for each family.
"""
