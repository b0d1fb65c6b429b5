"""The MLflow model registry: champion and challenger."""
