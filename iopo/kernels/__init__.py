"""The head: log-probabilities of target tokens without the logits ever existing."""
