"""The training loop over Accelerate."""
