"""Speech and annotations to batches."""
