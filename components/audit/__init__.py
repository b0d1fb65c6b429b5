"""Imbalance, synthetic data, and the plan they write for training. Imports no torch."""
