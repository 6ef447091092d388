"""What the TPU compiler says of each kernel's program, beside that of the kernel's definition."""
