"""Programs that drive train.py and evaluate.py as processes; nothing imports them."""
