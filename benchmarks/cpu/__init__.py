"""What decides a CPU run: the dtype of its products, and how its threads wait."""
