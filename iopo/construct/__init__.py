"""Making verified quadruples from tasks, sampled responses and constraints that code checks."""
