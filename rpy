#!/bin/bash
cd /tmp/h/roots; export PYTHONPATH=/tmp/h/roots OPENBLAS_NUM_THREADS=1 JAX_PLATFORMS=cpu; exec /tmp/v/311/bin/python "$@"
