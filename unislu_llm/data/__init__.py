"""Audio, manifests, examples and batches."""
