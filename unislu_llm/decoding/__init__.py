"""From speech to unified text, for both decoders."""
