"""Graphs for inference, folding, and the proof that they equal the trained network."""
