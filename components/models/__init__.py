"""Architectures, heads, re-parameterisation, cost, features, and the model card."""
