"""What a worker trains on: the manifest's rows, their pictures, and batches of them."""
