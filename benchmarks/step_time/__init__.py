"""What one update of each optimizer costs: time against AdamW, memory traffic, peak memory.

``python -m benchmarks.step_time`` times the compiled update (``tx.update`` and ``apply_updates``,
parameters and state donated, as in training) of each registry entry in turns with
``optax.adamw``; ``--train-memory`` measures whole training runs.
"""
