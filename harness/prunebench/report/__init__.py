"""Figures of what the records say, and the pages and pictures that show them; imports neither torch nor transformers."""
