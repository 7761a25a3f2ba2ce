"""Rows in, token ids out: formats -> template -> tokenize -> layout, and which rows make a step."""
