"""A language model as judge: prompts, requests, parsing, cost."""
