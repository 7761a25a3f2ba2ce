"""Input-Output Preference Optimization (IOPO) in plain PyTorch."""

__version__ = "0.1.0"
