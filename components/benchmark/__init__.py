"""Latency, throughput and accuracy in the user's own environment, and a choice."""
