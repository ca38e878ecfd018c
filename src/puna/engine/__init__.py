"""From token ids to token ids: caches, sampling, the generation loop. It knows no text."""
