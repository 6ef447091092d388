"""Data, model, training loop, logs, checkpoints and reports: what the command line runs."""
