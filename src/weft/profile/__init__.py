"""Profile: where a step's time and memory went, from traces of its processes, and what to change."""
