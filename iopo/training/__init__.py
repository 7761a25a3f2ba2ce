"""From a config to a trained model: setup.build_run builds a run, loop.train_steps takes its steps.

Nothing is imported here: a report or a launcher needs no model code, whose import takes seconds.
"""
