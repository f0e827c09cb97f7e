"""Checkpoint files, in two layers.

`files` and `names` know tensors and keys, and lie below the models, which load their weights through them. `format` (the
dictionary of our own files), `identify` and `convert` know the models.
"""
