"""Shared by the Python tests: tiny models (models.py), PEFT adapters (adapters.py), the transformers + PEFT oracle (oracle.py),
the sampling oracle (sampling.py), driving an engine (drive.py), fixtures (fixtures.py).
"""
