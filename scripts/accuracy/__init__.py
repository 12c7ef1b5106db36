"""Accuracy after pruning on digits-dg, beside Torch-Pruning: `python -m accuracy`."""
