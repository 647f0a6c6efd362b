"""Speech understanding with an LLM behind a Whisper encoder, in the unified format of UniSLU (arXiv 2507.12951)."""
