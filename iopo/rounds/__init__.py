"""On-policy rounds: sample, verify, relabel, train, repeat."""
