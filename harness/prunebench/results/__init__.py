"""What is kept of runs, and what is made of it. Imports neither torch nor transformers."""
