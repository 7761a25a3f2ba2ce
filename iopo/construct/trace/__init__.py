"""TRACE's construction of quads with any OpenAI-compatible server."""
