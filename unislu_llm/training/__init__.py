"""Training: one loop for both decoders and both objectives."""
