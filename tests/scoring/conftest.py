from __future__ import annotations

from hypothesis import settings

# The first call loads the normaliser and its spelling table, which no example should be timed for.
settings.register_profile("scoring", deadline=None)
settings.load_profile("scoring")
