"""What the library costs before the first step: tracing, lowering and compiling a train step.

``python -m benchmarks.compile_time`` does all three for ``make_train_step`` on eight devices, in
turns with the step that one would write by hand for the same model and optimizer with ``jax.jit``.
"""
