"""Generation, judging and scoring: what a model's answers are worth."""
