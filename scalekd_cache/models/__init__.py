"""The networks: frozen teachers and their tails, students, weights files, evaluation.

In: names and options of timm models, weights files (safetensors), uint8 images. Out: `Teacher` (features and logits),
`Tail` (the end of a teacher, kept in a cache), `Student` (two feature maps and logits), `Tally` (accuracy).
Custom code instead of timm's `forward_intermediates`: hooks record the maps of teachers and students in one plain call
of the model, because ZeRO 3 gathers parameters only then, and because the map after the final norm needs a definition
for each family.
"""
