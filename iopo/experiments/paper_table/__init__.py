"""The paper's comparison in small."""
