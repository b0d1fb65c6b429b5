"""Manifest, ingest, validate: images become rows that can be trusted. Imports no torch."""
