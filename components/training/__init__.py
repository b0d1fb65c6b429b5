"""Loader, sampling, losses, soft labels, the gate, finetune and distil, on Ray Train."""
