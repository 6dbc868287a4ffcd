"""How a run happens: suites, plans, the runner, what is measured, and the executors."""
