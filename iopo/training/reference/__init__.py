"""The reference of a run: where its log-probs come from, and the cache on disk."""
