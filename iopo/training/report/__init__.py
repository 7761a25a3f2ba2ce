"""Pages about a run and about a sweep, from their folders alone."""
