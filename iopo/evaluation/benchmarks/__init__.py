"""One module a benchmark: load its file, join responses by key, score, total."""
