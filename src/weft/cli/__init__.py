"""The command line: one small file per verb. Nothing heavy is imported before the verb runs."""
