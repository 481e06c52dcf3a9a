"""Is this machine ready to run a model, and what would mend it."""
