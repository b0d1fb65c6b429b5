"""Benchmarks: what the README claims, measured. ``make bench`` runs them; tests never assert times."""
