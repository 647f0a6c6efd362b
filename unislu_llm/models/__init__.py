"""Encoders, projectors and the two decoders."""
