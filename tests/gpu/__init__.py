"""What a host with one NVIDIA GPU, and no network, is asked to prove: ``python -m tests.gpu``. docs/gpu.md says how."""
