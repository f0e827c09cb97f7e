"""Checkpoint files, in two layers.

`files` and `names` handle tensors and keys; the models load their weights through them. `format` (the dictionary of our own
files), `identify` and `convert` use the models.
"""
